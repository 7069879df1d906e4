//! Disks that are full: what agents write there is written whole or not at all, and traffic does not
//! depend on it.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result, ensure};
use harness::{Carrier, Mesh, Serve, exchange, wait};
use serde_json::Value;

use crate::{joined, mesh};

/// A file system of a few pages, unmounted when dropped.
struct Disk(PathBuf);

impl Disk {
    fn new(path: PathBuf, options: &str) -> Result<Self> {
        fs::create_dir_all(&path)?;
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "malla-disk"]).arg(&path);
        ensure!(mount.status()?.success(), "mount a tmpfs on {}", path.display());
        Ok(Self(path))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes until there is no room for another byte.
    fn fill(&self) -> Result<()> {
        let mut file = File::create(self.path("filler"))?;
        while file.write_all(&[0; 512]).is_ok() {}
        Ok(())
    }

    fn free(&self) -> Result<()> {
        Ok(fs::remove_file(self.path("filler"))?)
    }

    fn names(&self) -> Result<Vec<String>> {
        let entries = fs::read_dir(&self.0)?;
        entries.map(|entry| Ok(entry?.file_name().display().to_string())).collect()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}

/// Lets the agent of node b write `log` on `disk`.
fn put_on(mesh: &mut Mesh, log: &str, disk: &Disk) -> Result<()> {
    mesh.agent_mut("b").kill()?;
    let path = mesh.state_dir().join("node-b").join(log);
    fs::remove_file(&path)?;
    symlink(disk.path(log), &path)?;
    mesh.agent_mut("b").restart()
}

fn exchanges(mesh: &Mesh, number: usize) -> Result<()> {
    let to = mesh.pod("b1").v4(8080);
    thread::scope(|scope| {
        let ask = || {
            (0..number / 4).try_for_each(|_| exchange(&mut mesh.pod("a1").connect(to)?, &[7; 3000]))
        };
        let asking: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
        asking.into_iter().try_for_each(|one| joined(one))
    })
}

#[test]
fn access_log_on_a_full_disk_loses_whole_records_and_says_so() -> Result<()> {
    harness::require!("mount", "umount");
    let mut mesh = mesh(Carrier::Lane)?;
    let disk = Disk::new(mesh.state_dir().join("disk"), "size=16k")?;
    put_on(&mut mesh, "access.log", &disk)?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    exchanges(&mesh, 4)?;
    disk.fill()?;
    // More records than pages are left for.
    exchanges(&mesh, 100)?;
    let agent = mesh.agent("b");
    agent.wait_for_metric("mesh_access_log_lost_total", &[], 1.0)?;
    wait::until(wait::SOON, "the agent to say so", || {
        agent.log().contains("access log cannot be written")
    })?;
    disk.free()?;
    let before = agent.output().lines().count();
    wait::until(wait::SOON, "records to be written again", || {
        exchanges(&mesh, 4).is_ok() && agent.output().lines().count() > before + 1
    })?;
    wait::until(wait::SOON, "the agent to say so", || {
        agent.log().contains("access log is written again")
    })?;
    for line in agent.output().lines() {
        serde_json::from_str::<Value>(line).with_context(|| format!("half a record: {line}"))?;
    }
    Ok(())
}

#[test]
fn agents_log_on_a_full_disk_ends_nothing() -> Result<()> {
    harness::require!("mount", "umount");
    let mut mesh = mesh(Carrier::Quic)?;
    let disk = Disk::new(mesh.state_dir().join("disk"), "size=64k")?;
    put_on(&mut mesh, "agent.log", &disk)?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    disk.fill()?;
    let pid = mesh.agent("b").pid();
    exchanges(&mesh, 40)?;
    // It has something to say about that.
    mesh.enrol("b2", false)?;
    mesh.enrol("b2", true)?;
    exchanges(&mesh, 4)?;
    ensure!(mesh.agent("b").is_ready() && mesh.agent("b").pid() == pid, "the agent ended");
    Ok(())
}

#[test]
fn what_an_agent_makes_at_its_start_is_made_whole_or_not_at_all() -> Result<()> {
    harness::require!("mount", "umount");
    let mut mesh = mesh(Carrier::Auto)?;
    // Bytes, but no room for a further name.
    let disk = Disk::new(mesh.state_dir().join("disk"), "size=64k,nr_inodes=2")?;
    disk.fill()?;
    let agent = mesh.agent_mut("b");
    agent.kill()?;
    agent.set_flag(&format!("--admin-socket={}", disk.path("admin.sock").display()));
    agent.start_again()?;
    let ended = agent.wait_until_gone(wait::SOON)?;
    ensure!(!ended.success(), "it runs without a socket");
    ensure!(agent.log().contains("No space left on device"), "it does not say why");
    ensure!(disk.names()? == ["filler"], "it left {:?}", disk.names()?);
    drop(disk);

    // A name, but no room for bytes.
    let disk = Disk::new(mesh.state_dir().join("disk"), "size=4k")?;
    disk.fill()?;
    let agent = mesh.agent_mut("b");
    agent.set_flag(&format!("--admin-socket={}", disk.path("admin.sock").display()));
    agent.restart()?;
    ensure!(
        agent.log().contains("no lasting key for QUIC resets"),
        "it does not say what it lacks"
    );
    let mut names = disk.names()?;
    names.sort();
    ensure!(names == ["admin.sock", "filler"], "it left {names:?}");
    agent.kill()?;

    let dir = disk.path("ca");
    let init = |mesh: &Mesh| {
        let dir = dir.display().to_string();
        mesh.agent("a").cli(&["ca", "init", "--dir", &dir, "--trust-domain", "elsewhere"])
    };
    let full = init(&mesh)?;
    ensure!(full.code != 0 && full.stderr.contains("No space left"), "{full:?}");
    ensure!(is_empty(&dir)?, "half a root was left");
    drop(disk);
    // Room for two of the three files.
    let disk = Disk::new(mesh.state_dir().join("disk"), "size=8k")?;
    let full = init(&mesh)?;
    ensure!(full.code != 0 && is_empty(&dir)?, "half a root was left: {full:?}");
    drop(disk);
    let _disk = Disk::new(mesh.state_dir().join("disk"), "size=64k")?;
    let made = init(&mesh)?;
    ensure!(made.code == 0, "{made:?}");
    Ok(())
}

fn is_empty(dir: &Path) -> Result<bool> {
    Ok(fs::read_dir(dir).map_or(true, |mut entries| entries.next().is_none()))
}
