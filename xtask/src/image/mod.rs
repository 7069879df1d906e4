//! `cargo xtask image`: the agent's image, and those of the ordinary programs that tests run in pods,
//! all of them made here, without a container engine and without pulling anything.

mod agent;
pub(crate) mod oci;
mod programs;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::Args;

pub(crate) use self::agent::{RELEASE, TESTED};
pub(crate) use self::programs::{ALL, COREDNS, EVERY_NODE, PAUSE};
use crate::say;

#[derive(Debug, Args)]
pub(crate) struct Image {
    /// Where to write the archive. `docker load`, `podman load`, `ctr images import` and `kind load
    /// image-archive` take it, and `cargo xtask cluster load`.
    #[arg(long)]
    out: PathBuf,

    /// Not the agent but a program of the tests: pause, coredns, busybox, curl, nginx, postgres, bookinfo,
    /// redis.
    #[arg(long)]
    program: Option<String>,

    /// The profile of cargo that the agent is built in. `tested` is what the cluster tests run: as
    /// `release` but hardly optimised, and so built in a minute or two.
    #[arg(long, conflicts_with = "program", default_value = RELEASE)]
    profile: String,
}

impl Image {
    /// Makes the image, and says what it is called.
    pub(crate) fn run(&self) -> Result<()> {
        let Some(program) = &self.program else {
            let name = agent::write(&self.out, &self.profile)?;
            say(&format!("image: {name} in {}", self.out.display()));
            return Ok(());
        };
        let Some(image) = by_name(program) else {
            let names: Vec<_> = ALL.iter().map(|image| image.short).collect();
            bail!("no image {program}; there are {}", names.join(", "));
        };
        let archive = image.archive()?;
        std::fs::copy(&archive, &self.out)
            .with_context(|| format!("write {}", self.out.display()))?;
        say(&format!("image: {} in {}", image.name()?, self.out.display()));
        Ok(())
    }
}

/// Writes the agent's image, built in a profile of cargo, and returns its name.
///
/// # Errors
///
/// Fails with what the compiler said, or if a file cannot be written.
pub(crate) fn agent(out: &Path, profile: &str) -> Result<String> {
    agent::write(out, profile)
}

/// One of the tests' images.
pub(crate) fn by_name(short: &str) -> Option<&'static programs::Program> {
    ALL.into_iter().find(|image| image.short == short)
}

/// What Docker and Kubernetes call this machine's processor.
fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => bail!("no images for {other}"),
    }
}
