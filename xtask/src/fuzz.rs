//! `cargo xtask fuzz`: every fuzz target for a bounded time, with the project's own compiler.
//!
//! Without a sanitizer, which only nightly compilers offer: nearly all parsers here are safe Rust, and what
//! they may break are their promises, which the targets and debug assertions check. `events` and `packet`
//! read structures with `unsafe`, once they have looked at how many bytes there are: what the fuzzer finds of
//! them are broken promises too, and a read past the end would go unnoticed.
//!
//! What was found to be worth feeding is kept in one file for each target ([`kept`]), from which the next run goes
//! on, and which unit tests repeat.

mod kept;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::process::{cargo, must, watch};
use crate::{root, say, setup};

const CARGO_FUZZ: &str = "0.13.2";
const FUZZ_DIR: &str = "mesh-agent/fuzz";
/// For one target, with its build.
const KEEP_LIMIT: Duration = Duration::from_secs(1800);

#[derive(Debug, Args)]
pub(crate) struct Fuzz {
    /// How long each target runs.
    #[arg(long, default_value_t = 60)]
    seconds: u64,

    /// Put what was found into `mesh-agent/fuzz/kept`, to be committed: of all inputs a few that reach as much.
    /// With `--seconds 0` of what earlier runs have found.
    #[arg(long)]
    keep: bool,

    /// Only this target.
    target: Option<String>,
}

impl Fuzz {
    /// Runs the targets one after the other, and fails if one found something.
    pub(crate) fn run(&self) -> Result<()> {
        let mut targets = targets()?;
        if let Some(only) = &self.target {
            if !targets.contains(only) {
                bail!("no fuzz target `{only}`: write one of {}", targets.join(", "));
            }
            targets.retain(|target| target == only);
        }
        if self.seconds == 0 && !self.keep {
            bail!("--seconds 0 runs nothing: with --keep it keeps what was found before");
        }
        // mesh-agent embeds the eBPF programs, the fuzzed one too.
        setup::toolchain()?;
        let bin = setup::cache()?.join(format!("cargo-fuzz-{CARGO_FUZZ}"));
        if !bin.join("bin/cargo-fuzz").is_file() {
            say(&format!("fuzz: building cargo-fuzz {CARGO_FUZZ}: about a minute"));
            let mut install = cargo("install cargo-fuzz --locked")?;
            install.args(["--version", CARGO_FUZZ, "--root"]).arg(&bin).current_dir("/");
            must("building cargo-fuzz", install, Duration::from_secs(1200))?;
        }
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{path}", bin.join("bin").display());

        let mut found = Vec::new();
        for target in &targets {
            let kept = root()?.join(FUZZ_DIR).join("kept").join(target);
            kept::unpack(&kept, &root()?.join(FUZZ_DIR).join("corpus").join(target))?;
            // What is found goes to the first directory; the seeds stay as they are.
            let inputs = ["corpus", "seeds"].map(|inputs| format!("{FUZZ_DIR}/{inputs}/{target}"));
            if self.seconds > 0 {
                say(&format!("fuzz: {target} for {} s", self.seconds));
                let mut fuzz = fuzz(target, &inputs, &path)?;
                fuzz.arg(format!("-max_total_time={}", self.seconds));
                // The build comes on top of the time that was asked for.
                let ran = watch(target, fuzz, Duration::from_secs(self.seconds + 900))?;
                if !ran.success {
                    say(&format!("FAILED  fuzz {target}: {}\n{}", ran.how, ran.tail()));
                    found.push(target.as_str());
                    continue;
                }
                let summary = ran.lines.iter().rev().find(|line| line.starts_with("Done "));
                say(&format!("ok      fuzz {target}: {}", summary.map_or("", String::as_str)));
            }
            if self.keep
                && let Err(error) = keep(target, inputs, &kept, &path)
            {
                say(&format!("FAILED  fuzz {target}: {error:#}"));
                found.push(target.as_str());
            }
        }
        if !found.is_empty() {
            bail!(
                "{} failed (what breaks a promise lies in {FUZZ_DIR}/artifacts)",
                found.join(", ")
            );
        }
        Ok(())
    }
}

/// Runs a target on these directories, with libFuzzer's options to come.
fn fuzz(target: &str, inputs: &[String], path: &str) -> Result<Command> {
    let mut fuzz = cargo("fuzz run --sanitizer none --fuzz-dir")?;
    fuzz.args([FUZZ_DIR, target]).args(inputs).arg("--").env("PATH", path);
    Ok(fuzz)
}

/// Packs few of all inputs that reach as much. What breaks a promise is no input to keep but a finding.
fn keep(target: &str, inputs: [String; 2], kept: &Path, path: &str) -> Result<()> {
    let few = format!("{FUZZ_DIR}/target/few/{target}");
    let place = root()?.join(&few);
    if place.exists() {
        fs::remove_dir_all(&place).with_context(|| format!("empty {}", place.display()))?;
    }
    fs::create_dir_all(&place).with_context(|| format!("make {}", place.display()))?;
    let [corpus, seeds] = inputs;
    let mut merge = fuzz(target, &[few, corpus, seeds], path)?;
    merge.arg("-set_cover_merge=1");
    let merged = must(&format!("fuzz: what is worth keeping of {target}"), merge, KEEP_LIMIT)?;
    // It goes on without the input that has ended it.
    if !merged.lines.iter().any(|line| line.contains("successful in 1 attempt")) {
        bail!("an input fails; nothing is kept\n{}", merged.tail());
    }
    let (inputs, bytes) = kept::pack(&place, kept)?;
    say(&format!("kept    fuzz {target}: {inputs} inputs, {bytes} bytes in {}", kept.display()));
    Ok(())
}

/// The names of all targets.
fn targets() -> Result<Vec<String>> {
    let dir = root()?.join(FUZZ_DIR).join("fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))? {
        let path = entry.context("read a directory")?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names)
}
