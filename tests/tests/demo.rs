//! The demo keeps what it promises and leaves nothing behind, however it ends; and where it cannot
//! clean up itself, `cargo xtask clean` does.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};

use anyhow::{Context as _, Result, ensure};
use harness::{Cgroup, Netns, wait};

/// The last line before the load in the mesh: everything runs by then.
const MESHED: &str = "s of load with the mesh";

/// A demo that runs, killed when dropped.
struct Demo {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Demo {
    fn start(args: &[&str]) -> Result<Self> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_malla-demo"));
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().context("start the demo")?;
        let said = BufReader::new(child.stdout.take().context("no output")?);
        Ok(Self { child, said })
    }

    /// Reads until the demo has said this.
    fn wait_to_hear(&mut self, what: &str) -> Result<()> {
        let mut line = String::new();
        while !line.contains(what) {
            line.clear();
            ensure!(self.said.read_line(&mut line)? > 0, "it ended before it said `{what}`");
        }
        Ok(())
    }

    /// What else it says, and how it ends.
    fn end(&mut self) -> Result<(String, ExitStatus)> {
        let mut rest = String::new();
        self.said.read_to_string(&mut rest)?;
        Ok((rest, self.child.wait()?))
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// What a demo of this process id has left, removed when dropped.
struct Leftovers(String);

impl Leftovers {
    fn clean(&self) -> Result<Output> {
        let this = std::env::current_exe()?;
        let xtask = this.ancestors().nth(2).context("no target directory")?.join("xtask");
        Ok(Command::new(&xtask).args(["clean", "--pid", &self.0]).output()?)
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        // Nothing is left if the test has passed.
        self.clean().ok();
    }
}

/// Namespaces, cgroups, directories and mounts that are called after this process.
fn traces(pid: u32) -> Result<Vec<PathBuf>> {
    let prefix = format!("malla-{pid}-");
    let mut found = Vec::new();
    let cgroups = Cgroup::join()?;
    let cgroups = cgroups.path().parent().context("no cgroup root")?;
    for dir in [Path::new("/run/netns"), cgroups, &std::env::temp_dir(), Path::new("/sys/fs/bpf")] {
        for entry in fs::read_dir(dir).into_iter().flatten() {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)) {
                found.push(path);
            }
        }
    }
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mounts = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    found.extend(mounts.filter(|mount| mount.contains(&prefix)).map(PathBuf::from));
    Ok(found)
}

fn kill(signal: &str, pid: &str) -> Result<()> {
    let status = Command::new("kill").args([signal, pid]).status()?;
    ensure!(status.success(), "kill {signal} {pid}: {status}");
    Ok(())
}

#[test]
fn demo_keeps_its_promises_and_leaves_nothing_behind() -> Result<()> {
    harness::require!("tcpdump", "nft");
    let mut demo = Demo::start(&["--duration", "4"])?;
    demo.wait_to_hear(MESHED)?;
    ensure!(!traces(demo.pid())?.is_empty(), "otherwise nothing is looked for");
    let (said, status) = demo.end()?;
    ensure!(status.success(), "{status}:\n{said}");
    ensure!(said.matches('\u{2714}').count() >= 6 && !said.contains('\u{2718}'), "{said}");
    assert_eq!(traces(demo.pid())?, [] as [PathBuf; 0]);
    Ok(())
}

#[test]
fn demo_that_is_interrupted_leaves_nothing_behind() -> Result<()> {
    harness::require!("tcpdump", "nft");
    let mut demo = Demo::start(&["--duration", "120"])?;
    demo.wait_to_hear("s of load without the mesh")?;
    kill("-INT", &demo.pid().to_string())?;
    let (said, status) = demo.end()?;
    assert_eq!(status.code(), Some(1), "{said}");
    assert_eq!(traces(demo.pid())?, [] as [PathBuf; 0]);
    Ok(())
}

#[test]
fn what_a_killed_demo_left_is_removed_by_clean_and_nothing_else() -> Result<()> {
    harness::require!("tcpdump", "nft", "tc");
    let mut demo = Demo::start(&["--duration", "120"])?;
    demo.wait_to_hear("s of load without the mesh")?;
    let pid = demo.pid().to_string();
    // Its guard, a child, would clean up after it.
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let is_guard = |child: &&str| {
        let line = fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains("malla-guard")
    };
    let guard = children.split_whitespace().find(is_guard).context("no guard")?;
    kill("-KILL", guard)?;
    kill("-KILL", &pid)?;
    demo.child.wait()?;
    let leftovers = Leftovers(pid.clone());

    let left = traces(demo.pid())?;
    let has = |what: &str| left.iter().any(|path| path.starts_with(what));
    ensure!(has("/run/netns") && has("/sys/fs/cgroup"), "{left:?}");
    let bpffs = left.iter().find(|path| path.ends_with("bpf")).context("no pins")?;
    ensure!(fs::read_dir(bpffs)?.count() > 0, "{} is empty", bpffs.display());
    let netns = left.iter().find(|path| path.starts_with("/run/netns")).context("none")?;
    let netns = netns.file_name().context("no name")?.to_string_lossy().into_owned();
    // One thing more than a demo leaves, and a namespace that looks like one of ours and is another's.
    let qdisc = ["-n", &netns, "qdisc", "add", "dev", "lo", "root", "pfifo"];
    ensure!(Command::new("tc").args(qdisc).status()?.success(), "tc qdisc add");
    let another = Netns::new(&format!("malla-{}-bystander", 4_194_304 + std::process::id()))?;

    let output = leftovers.clean()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let gone = || traces(demo.pid()).is_ok_and(|left| left.is_empty());
    wait::until(wait::SOON, "everything to be gone", gone)?;
    assert!(another.path().exists(), "what others made stays");
    let agents = fs::read_dir("/proc")?.flatten().filter(|entry| {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&format!("malla-{pid}-"))
    });
    assert_eq!(agents.count(), 0, "agents of the demo still run");
    Ok(())
}
