//! `cargo xtask build`, and the start of programs that had to be built first.

use std::collections::HashMap;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde_json::Value;

use crate::process::{attached, cargo, watch};
use crate::{privilege, say, setup};

/// A cold release build with link-time optimisation takes minutes on two cores.
const BUILD_LIMIT: Duration = Duration::from_secs(3600);

#[derive(Debug, Args)]
pub(crate) struct Build {
    /// Optimised: what one installs, and what `demo` and `bench` run.
    #[arg(long)]
    release: bool,
}

impl Build {
    /// Builds on this terminal.
    pub(crate) fn run(&self) -> Result<()> {
        setup::toolchain()?;
        let mut build = cargo("build --package mesh-agent --package mesh-tests --bins")?;
        if self.release {
            build.arg("--release");
        }
        attached(build)
    }
}

/// An executable that cargo built.
#[derive(Clone, Debug)]
pub(crate) struct Executable {
    /// The package it belongs to.
    pub(crate) package: String,
    /// The target's name: `malla-demo`, `capture`.
    pub(crate) name: String,
    /// `lib`, `bin`, `test`.
    pub(crate) kind: String,
    /// Whether it runs the tests of its target rather than being the target.
    pub(crate) is_test: bool,
    /// Where it lies.
    pub(crate) path: PathBuf,
    /// Where its package lies: tests run there.
    pub(crate) dir: PathBuf,
}

/// Runs `cargo <args>` and returns the executables that it built or found up to date.
///
/// # Errors
///
/// Fails with what the compiler said.
pub(crate) fn executables(what: &str, args: &str) -> Result<Vec<Executable>> {
    built(what, cargo(args)?)
}

/// Flags of the compiler by which the C library becomes part of a program.
pub(crate) const STATIC: &str = "-C target-feature=+crt-static";

/// The same with what they need of C linked in: they run where there is no library. `args` has to
/// name a target.
///
/// # Errors
///
/// As [`executables`].
pub(crate) fn static_executables(what: &str, args: &str) -> Result<Vec<Executable>> {
    let mut command = cargo(args)?;
    command.env("RUSTFLAGS", STATIC);
    built(what, command)
}

fn built(what: &str, mut command: std::process::Command) -> Result<Vec<Executable>> {
    command.arg("--message-format=json-render-diagnostics");
    let built = watch(what, command, BUILD_LIMIT)?;
    let (messages, human): (Vec<_>, Vec<_>) =
        built.lines.iter().cloned().partition(|line| line.starts_with('{'));
    if !built.success {
        let human: String = human.iter().map(|line| format!("    {line}\n")).collect();
        bail!("{what} failed ({}):\n{human}", built.how);
    }
    Ok(messages.iter().filter_map(|line| executable(line)).collect())
}

/// One line of cargo's JSON, if it tells of an executable.
fn executable(line: &str) -> Option<Executable> {
    let message: Value = serde_json::from_str(line).ok()?;
    let path = message["executable"].as_str()?;
    let manifest = PathBuf::from(message["manifest_path"].as_str()?);
    let dir = manifest.parent()?.to_owned();
    // `path+file:///x/mesh-agent#0.1.0`, or `…/core#mesh-core@0.1.0` where the names differ.
    let (before, after) = message["package_id"].as_str()?.rsplit_once('#')?;
    let package = match after.split_once('@') {
        Some((name, _)) => name,
        None => before.rsplit('/').next()?,
    };
    Some(Executable {
        package: package.to_owned(),
        name: message["target"]["name"].as_str()?.to_owned(),
        kind: message["target"]["kind"][0].as_str()?.to_owned(),
        is_test: message["profile"]["test"].as_bool()?,
        path: path.into(),
        dir,
    })
}

/// Builds everything in release mode and becomes the tests' program `name`, as root.
///
/// # Errors
///
/// Fails if something does not build; otherwise this process is gone.
pub(crate) fn run_program(name: &str, args: &[String]) -> Result<()> {
    setup::run(setup::Say::Changes)?;
    say("building (release)");
    let built = executables(
        "release build",
        "build --release --package mesh-agent --package mesh-tests --bins",
    )?;
    let mut by_name: HashMap<_, _> = built.into_iter().map(|e| (e.name.clone(), e.path)).collect();
    let program = by_name.remove(name).with_context(|| format!("cargo built no {name}"))?;
    let agent = by_name.remove("mesh-agent").context("cargo built no mesh-agent")?;

    let mut command = privilege::command(&program)?;
    command.args(args).env("MALLA_AGENT", agent);
    Err(command.exec()).with_context(|| format!("start {}", program.display()))
}

/// Runs the benchmarks of single stages.
///
/// # Errors
///
/// Fails if they do not build, or do not run.
pub(crate) fn micro(args: &[String]) -> Result<()> {
    setup::toolchain()?;
    let mut bench = cargo("bench --package mesh-core --package mesh-agent")?;
    bench.args(["--features", "mesh-agent/bench", "--bench", "decisions", "--bench", "bytes"]);
    bench.arg("--").args(args);
    attached(bench)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_name_is_read_from_both_forms_of_its_id() {
        let message = |id: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","package_id":"{id}","manifest_path":"/x/core/Cargo.toml",
                "target":{{"kind":["lib"],"name":"mesh_core"}},"profile":{{"test":true}},"executable":"/t/x-1"}}"#
            )
        };
        let named = executable(&message("path+file:///x/core#mesh-core@0.1.0")).unwrap();
        assert_eq!((named.package.as_str(), named.is_test), ("mesh-core", true));
        let plain = executable(&message("path+file:///x/xtask#0.1.0")).unwrap();
        assert_eq!(plain.package, "xtask");
        assert!(executable(r#"{"reason":"build-finished","success":true}"#).is_none());
    }
}
