//! `cargo xtask setup`: installs what building and testing need, once.
//!
//! What is done is remembered in the cache (`$MALLA_CACHE`, or `malla` in the user's cache
//! directory), keyed by versions, so that a fresh checkout does not do it again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::packages::Packages;
use crate::process::{installed, must};
use crate::say;
use crate::toolchain::{Candidate, Needs, Toolchain};

const ENV_FILE: &str = "ebpf-toolchain.env";

/// How long rustup may take.
const RUSTUP_LIMIT: Duration = Duration::from_secs(1200);

/// What the tests run, and the package it comes in.
const PROGRAMS: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("nft", "nftables"),
    ("tcpdump", "tcpdump"),
    ("nginx", "nginx-light"),
    ("redis-server", "redis-server"),
    ("redis-benchmark", "redis-tools"),
    ("curl", "curl"),
    ("wrk", "wrk"),
    ("iperf3", "iperf3"),
    ("pg_lsclusters", "postgresql"),
    ("ssh", "openssh-client"),
    ("sshd", "openssh-server"),
    ("/usr/lib/python3/dist-packages/websockets/__init__.py", "python3-websockets"),
    ("mount", "mount"),
    ("kill", "procps"),
];

#[derive(Debug, Args)]
pub(crate) struct Setup {
    /// Only what building needs, and not the programs that tests run: for an image's build.
    #[arg(long)]
    build: bool,
}

impl Setup {
    /// Tells every step.
    pub(crate) fn run(&self) -> Result<()> {
        if self.build {
            ebpf_toolchain(Say::Everything, &mut Packages::default())?;
            return Ok(());
        }
        run(Say::Everything).map(drop)
    }
}

/// How much to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Say {
    /// A line for every step, also for those that find nothing to do.
    Everything,
    /// Only what is really done: another task called this one.
    Changes,
}

/// Makes the machine ready to build, test and show everything, and returns the toolchain for the
/// eBPF programs.
///
/// # Errors
///
/// Fails if no toolchain for the eBPF programs can be found or installed. A missing test program
/// is reported and not an error: the tests that need it say so when they are skipped.
pub(crate) fn run(say_what: Say) -> Result<Toolchain> {
    let mut packages = Packages::default();
    test_programs(say_what, &mut packages)?;
    let toolchain = ebpf_toolchain(say_what, &mut packages)?;
    if say_what == Say::Everything {
        say("setup: ready");
    }
    Ok(toolchain)
}

/// Makes the machine ready to build, for which nothing that tests run is needed.
///
/// # Errors
///
/// As [`run`].
pub(crate) fn toolchain() -> Result<Toolchain> {
    ebpf_toolchain(Say::Changes, &mut Packages::default())
}

/// Where the results of setup are kept.
pub(crate) fn cache() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("MALLA_CACHE") {
        return Ok(dir.into());
    }
    if let Some(dir) = std::env::var_os("XDG_CACHE_HOME") {
        return Ok(PathBuf::from(dir).join("malla"));
    }
    let home = std::env::var_os("HOME").context("neither MALLA_CACHE nor HOME is set")?;
    Ok(PathBuf::from(home).join(".cache/malla"))
}

fn test_programs(say_what: Say, packages: &mut Packages) -> Result<()> {
    let missing = PROGRAMS.iter().filter(|(program, _)| !installed(program));
    let mut names: Vec<String> = missing.map(|(_, package)| (*package).to_owned()).collect();
    names.dedup();
    if names.is_empty() {
        if say_what == Say::Everything {
            say(
                "setup: programs for the tests are there (ip, nft, tcpdump, nginx, redis, curl, PostgreSQL, …)",
            );
        }
        return Ok(());
    }
    let skipped = |names: &[String], error: anyhow::Error| {
        say(&format!("setup: tests that need {} will be skipped: {error:#}", names.join(", ")));
    };
    if let Err(error) = Packages::may_install(&names) {
        skipped(&names, error);
    } else if packages.install(&names).is_err() {
        // One that this release of the distribution does not have must not keep the others away.
        for name in names.chunks(1) {
            if let Err(error) = packages.install(name) {
                skipped(name, error);
            }
        }
    }
    Ok(())
}

fn ebpf_toolchain(say_what: Say, packages: &mut Packages) -> Result<Toolchain> {
    let cache = &cache()?;
    fs::create_dir_all(cache).with_context(|| format!("create {}", cache.display()))?;
    let file = cache.join(ENV_FILE);
    if let Ok(text) = fs::read_to_string(&file) {
        let toolchain = Toolchain::from_env(&text);
        if toolchain.is_complete() {
            if say_what == Say::Everything {
                say(&format!("setup: eBPF toolchain: {} (chosen before)", toolchain.name));
            }
            return Ok(toolchain);
        }
    }

    // A candidate that needs nothing is tried before one that has to be installed.
    let mut candidates = Vec::new();
    let mut impossible = Vec::new();
    for candidate in Candidate::ALL {
        match candidate.look(cache) {
            Ok((_, needs)) => candidates.push((needs.nothing(), candidate)),
            Err(error) => impossible.push(format!("{}: {error:#}", candidate.describe())),
        }
    }
    candidates.sort_by_key(|(ready, _)| !ready);
    for (ready, candidate) in candidates {
        let why = if ready { "everything is there" } else { "installing what it needs" };
        say(&format!("setup: trying {}: {why}", candidate.describe()));
        match obtain(candidate, cache, packages) {
            Ok(toolchain) => {
                let partial = cache.join(format!("{ENV_FILE}.{}", std::process::id()));
                fs::write(&partial, toolchain.to_env()).context("write the toolchain file")?;
                fs::rename(&partial, &file).context("write the toolchain file")?;
                say(&format!("setup: eBPF toolchain: {}: it builds for BPF", toolchain.name));
                return Ok(toolchain);
            }
            Err(error) => say(&format!("setup: not {}: {error:#}", candidate.describe())),
        }
    }
    for reason in impossible {
        say(&format!("setup: not {reason}"));
    }
    bail!(
        "no toolchain for the eBPF programs, see the reasons above; \
         with rustup (https://rustup.rs) and a network, setup gets one itself"
    )
}

/// Installs what a candidate needs and tries it.
fn obtain(candidate: Candidate, cache: &Path, packages: &mut Packages) -> Result<Toolchain> {
    let (_, needs) = candidate.look(cache)?;
    if !needs.packages.is_empty() {
        packages.install(&needs.packages)?;
    }
    // Only now is a compiler there that says which LLVM it wants.
    let (toolchain, Needs { rust_src, linker, .. }) = candidate.look(cache)?;
    if let Some(channel) = rust_src {
        say(&format!("setup: adding rust-src to rustup's {channel}"));
        let mut add = Command::new("rustup");
        add.args(["component", "add", "rust-src", "--toolchain", &channel]);
        must("rustup component add", add, RUSTUP_LIMIT)?;
    }
    if let Some(linker) = linker {
        say(&format!("setup: building {}: about two minutes", linker.describe()));
        linker.install()?;
    }
    // Named so that `cargo xtask clean` finds it after a kill.
    let trial = cache.join(format!("malla-{}-trial", std::process::id()));
    let tried = toolchain.try_out(&trial);
    if let Err(error) = fs::remove_dir_all(&trial) {
        say(&format!("setup: {} stays behind: {error}", trial.display()));
    }
    tried.map(|()| toolchain)
}
