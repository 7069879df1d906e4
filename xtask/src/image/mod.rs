//! `cargo xtask image`: the agent's image, and those of the ordinary programs that tests run in pods,
//! all of them made here, without a container engine and without pulling anything.

mod agent;
pub(crate) mod oci;
mod programs;

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use clap::Args;

pub(crate) use self::programs::{ALL, COREDNS, EVERY_NODE, PAUSE};
use crate::say;

#[derive(Debug, Args)]
pub(crate) struct Image {
    /// Where to write the archive. `docker load`, `podman load`, `ctr images import` and `kind load
    /// image-archive` take it, and `cargo xtask cluster load`.
    #[arg(long)]
    out: PathBuf,

    /// Not the agent but a program of the tests: pause, coredns, busybox, curl, nginx, postgres,
    /// redis.
    #[arg(long)]
    program: Option<String>,

    /// Not optimised, and built sooner.
    #[arg(long, conflicts_with = "program")]
    debug: bool,

    /// Of this program, built already, together with the libraries that it wants.
    #[arg(long, conflicts_with_all = ["program", "debug"], hide = true)]
    of: Option<PathBuf>,
}

impl Image {
    /// Makes the image, and says what it is called.
    pub(crate) fn run(&self) -> Result<()> {
        let Some(program) = &self.program else {
            let name = match &self.of {
                Some(agent) => agent::write_of(agent, &self.out)?,
                None => agent::write(&self.out, self.debug)?,
            };
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
