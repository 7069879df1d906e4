//! `cargo xtask fuzz`: every fuzz target for a bounded time, with the project's own compiler.
//!
//! Without a sanitizer, which only nightly compilers offer: nearly all parsers here are safe Rust, and what
//! they may break are their promises, which the targets and debug assertions check. `events` and `packet`
//! read structures with `unsafe`, once they have looked at how many bytes there are: what the fuzzer finds of
//! them are broken promises too, and a read past the end would go unnoticed.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::process::{cargo, must, watch};
use crate::{root, say, setup};

const CARGO_FUZZ: &str = "0.13.2";
const FUZZ_DIR: &str = "mesh-agent/fuzz";

#[derive(Debug, Args)]
pub(crate) struct Fuzz {
    /// How long each target runs.
    #[arg(long, default_value_t = 60)]
    seconds: u64,

    /// Only this target.
    target: Option<String>,
}

impl Fuzz {
    /// Runs the targets one after the other, and fails if one found something.
    pub(crate) fn run(&self) -> Result<()> {
        let targets = targets()?;
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
        let wanted = |target: &&String| self.target.as_ref().is_none_or(|only| only == *target);
        for target in targets.iter().filter(wanted) {
            say(&format!("fuzz: {target} for {} s", self.seconds));
            let corpus = root()?.join(FUZZ_DIR).join("corpus").join(target);
            fs::create_dir_all(&corpus).with_context(|| format!("make {}", corpus.display()))?;
            let mut fuzz = cargo("fuzz run --sanitizer none --fuzz-dir")?;
            fuzz.args([FUZZ_DIR, target]);
            // What is found goes to the first directory; the seeds stay as they are.
            fuzz.args(["corpus", "seeds"].map(|inputs| format!("{FUZZ_DIR}/{inputs}/{target}")));
            fuzz.arg("--").arg(format!("-max_total_time={}", self.seconds));
            fuzz.env("PATH", &path);
            // The build comes on top of the time that was asked for.
            let ran = watch(target, fuzz, Duration::from_secs(self.seconds + 900))?;
            if ran.success {
                let summary = ran.lines.iter().rev().find(|line| line.starts_with("Done "));
                say(&format!("ok      fuzz {target}: {}", summary.map_or("", String::as_str)));
            } else {
                say(&format!("FAILED  fuzz {target}: {}\n{}", ran.how, ran.tail()));
                found.push(target.as_str());
            }
        }
        if !found.is_empty() {
            bail!("findings in {} (the input lies in {FUZZ_DIR}/artifacts)", found.join(", "));
        }
        Ok(())
    }
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
