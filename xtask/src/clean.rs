//! `cargo xtask clean`: removes what killed tests and clusters and a demo with `--keep` left on this
//! machine.
//!
//! Everything of theirs is called `malla-<pid>-…` after the process that made it, or lies inside
//! such a thing (links, addresses, qdiscs and listeners go with their namespace); setup makes one file
//! more (`install.sh`). What belongs to a process that still lives is left alone, and so is an agent
//! that was installed in earnest.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use crate::process::{answer, started};
use crate::{packages, root, say, setup};

const PREFIX: &str = "malla-";

#[derive(Debug, Args)]
pub(crate) struct Clean {
    /// Only what this process left, and not what others did.
    #[arg(long)]
    pid: Option<u32>,
}

impl Clean {
    /// Removes what is left, and says what it was.
    ///
    /// # Errors
    ///
    /// Fails if something cannot be removed, after trying everything else.
    pub(crate) fn run(&self) -> Result<()> {
        clean(self.pid, None)
    }
}

/// Removes what this process itself has made, before it ends.
///
/// # Errors
///
/// As [`Clean::run`].
pub(crate) fn own() -> Result<()> {
    let pid = std::process::id();
    clean(Some(pid), Some(pid))
}

/// `only` the things of one maker, or those of all that are gone; `own` is a maker that still lives.
fn clean(only: Option<u32>, own: Option<u32>) -> Result<()> {
    let mut removed = 0;
    let mut problems = Vec::new();
    let leftovers = |dir: &Path| leftovers_in(dir, only, own);
    let mut tell = |what: String, done: Result<()>| match done {
        Ok(()) => {
            removed += 1;
            // Who removes its own things has said what became of them.
            if own.is_none() {
                say(&format!("removed {what}"));
            }
        }
        Err(error) => problems.push(format!("{what}: {error:#}")),
    };
    // Processes first: they hold the rest.
    for name in leftovers(Path::new("/run/netns"))? {
        tell(format!("namespace {name}"), namespace(&name));
    }
    for root in cgroup_roots()? {
        for name in leftovers(&root)? {
            tell(format!("cgroup {}", root.join(&name).display()), cgroup(&root.join(&name)));
        }
    }
    let target = root()?.join("target");
    let images = target.join("cluster");
    let places =
        [std::env::temp_dir(), PathBuf::from("/sys/fs/bpf"), setup::cache()?, target, images];
    for place in places {
        for name in leftovers(&place)? {
            tell(place.join(&name).display().to_string(), directory(&place.join(&name)));
        }
    }
    if only.is_none()
        && let Some(policy) = packages::leftover_policy()
    {
        let removed = fs::remove_file(policy).context("remove the file");
        tell(format!("{}, which kept services from starting", policy.display()), removed);
    }
    ensure!(problems.is_empty(), "not removed:\n    {}", problems.join("\n    "));
    if own.is_none() {
        say(if removed == 0 { "nothing was left" } else { "clean" });
    }
    Ok(())
}

/// Names in `dir` that are ours and whose maker is gone, or only those of one maker.
fn leftovers_in(dir: &Path, only: Option<u32>, own: Option<u32>) -> Result<Vec<String>> {
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let name = entry.context("read a directory")?.file_name().to_string_lossy().into_owned();
        match maker(&name) {
            Some(pid) if only.is_some_and(|only| only != pid) => {}
            Some(pid) if own == Some(pid) => names.push(name),
            Some(pid) if started(pid).is_some() => {
                say(&format!("left {}: process {pid} still uses it", dir.join(&name).display()));
            }
            Some(_) => names.push(name),
            None => {}
        }
    }
    Ok(names)
}

/// The process id in `malla-<pid>-…`.
fn maker(name: &str) -> Option<u32> {
    let (pid, _) = name.strip_prefix(PREFIX)?.split_once('-')?;
    pid.parse().ok()
}

fn namespace(name: &str) -> Result<()> {
    for pid in answer("ip", &["netns", "pids", name]).unwrap_or_default().lines() {
        kill(pid);
    }
    succeed(Command::new("ip").args(["netns", "delete", name]))
}

fn cgroup(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).context("read the cgroup")? {
        let path = entry.context("read the cgroup")?.path();
        if path.is_dir() {
            cgroup(&path)?;
        }
    }
    // A killed process leaves its cgroup a moment later.
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        for pid in fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default().lines() {
            kill(pid);
        }
        // A process that is no longer listed may still be on its way out, and then it is busy.
        match fs::remove_dir(dir) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy && Instant::now() < deadline => {}
            done => return done.context("remove the cgroup"),
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// A directory with what is mounted in it, or a file.
fn directory(dir: &Path) -> Result<()> {
    if dir.symlink_metadata().is_ok_and(|it| !it.is_dir()) {
        return fs::remove_file(dir).context("remove the file");
    }
    let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    let inside = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    for target in inside.filter(|target| Path::new(target).starts_with(dir)) {
        succeed(Command::new("umount").arg(target))?;
    }
    fs::remove_dir_all(dir).context("remove the directory")
}

fn cgroup_roots() -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    // Version 1 too, where a machine has both: a node of a cluster has its place in every hierarchy.
    let cgroup = |kind: &&str| kind.starts_with("cgroup");
    let cgroups = fields.filter(|fields| fields.get(2).is_some_and(cgroup));
    Ok(cgroups.filter_map(|fields| fields.get(1).map(PathBuf::from)).collect())
}

fn kill(pid: &str) {
    // It may be gone already, and that is what was wanted.
    drop(Command::new("kill").args(["-KILL", pid]).output());
}

fn succeed(command: &mut Command) -> Result<()> {
    let output = command.output().context("start it")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}", said.trim());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_with_a_process_id_are_ours() {
        assert_eq!(maker("malla-4711-0-pod"), Some(4711));
        for other in ["malla", "malla-0", "malla-system-x", "other-4711-x", "malla-x-1"] {
            assert_eq!(maker(other), None, "{other}");
        }
    }
}
