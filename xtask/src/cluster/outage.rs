//! The API server taken away and brought back, as tests want it: they leave files in the cluster's
//! directory, and the process that keeps the cluster, whose child the server is, does as they say. Or it is
//! stopped where it is, with all its connections.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Subcommand;

use crate::cluster::keep::kubectl;
use crate::cluster::meant;
use crate::cluster::state::Cluster;
use crate::privilege;
use crate::process::must;

/// Its name among the cluster's processes.
pub(crate) const API_SERVER: &str = "kube-apiserver";

const LIMIT: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(50);

/// `cargo xtask cluster api-server …`.
#[derive(Debug, Subcommand)]
pub(crate) enum Task {
    /// Ask it to end, and wait until it has.
    Away,
    /// Start it again, and wait until it is ready.
    Back,
    /// Stop it where it is (SIGSTOP): its connections stay open, and nothing is answered.
    Freeze,
    /// Let it go on.
    Thaw,
}

impl Task {
    pub(crate) fn run(&self) -> Result<()> {
        let cluster = meant()?.context("this checkout has no cluster")?;
        let outage = Outage::of(&cluster);
        match self {
            Self::Away => {
                as_root(&["touch"], &outage.wanted)?;
                until("the API server to end", || outage.is_now())
            }
            Self::Back => {
                // Whoever has stopped it may have died of it.
                if server(&cluster).is_ok() {
                    signal(&cluster, "CONT")?;
                }
                as_root(&["rm", "-f"], &outage.wanted)?;
                until("the API server to start", || !outage.is_now())?;
                until("the API server to be ready", || {
                    let ready = kubectl(&cluster, &["get", "--raw", "/readyz"]).output();
                    ready.is_ok_and(|output| output.status.success())
                })
            }
            Self::Freeze => signal(&cluster, "STOP"),
            Self::Thaw => signal(&cluster, "CONT"),
        }
    }
}

fn signal(cluster: &Cluster, signal: &str) -> Result<()> {
    let pid = server(cluster)?.to_string();
    let mut kill = privilege::command("kill")?;
    kill.args(["-s", signal, &pid]);
    must("signalling the API server", kill, LIMIT).map(drop)
}

/// The process of the API server: the child of that name of the cluster's keeper.
fn server(cluster: &Cluster) -> Result<u32> {
    let dirs = fs::read_dir("/proc").context("read /proc")?.flatten();
    let mut pids = dirs.filter_map(|dir| dir.file_name().to_str()?.parse().ok());
    let is_it = |pid: &u32| {
        // proc_pid_stat(5): the name in brackets, the state, the parent.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(") ")).is_some_and(
            |(name, rest)| {
                let parent = rest.split(' ').nth(1).and_then(|parent| parent.parse().ok());
                name == API_SERVER && parent == Some(cluster.pid)
            },
        )
    };
    pids.find(is_it).context("the cluster has no API server now")
}

fn as_root(command: &[&str], file: &Path) -> Result<()> {
    let mut run = privilege::command(command[0])?;
    run.args(&command[1..]).arg(file);
    must("asking the cluster's keeper", run, LIMIT).map(drop)
}

fn until(what: &str, holds: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        ensure!(Instant::now() < deadline, "waited {} s for {what}", LIMIT.as_secs());
        thread::sleep(PAUSE);
    }
    Ok(())
}

/// The files, and what their reader remembers.
#[derive(Debug)]
pub(crate) struct Outage {
    /// There while somebody wants it away.
    wanted: PathBuf,
    /// There while it is gone.
    now: PathBuf,
    /// When it was asked to end.
    since: Option<Instant>,
}

impl Outage {
    pub(crate) fn of(cluster: &Cluster) -> Self {
        let file = |what: &str| cluster.dir.join(format!("{API_SERVER}.{what}"));
        Self { wanted: file("unwanted"), now: file("gone"), since: None }
    }

    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.exists()
    }

    pub(crate) fn since(&self) -> Option<Instant> {
        self.since
    }

    pub(crate) fn is_now(&self) -> bool {
        self.now.exists()
    }

    /// It is asked to end.
    pub(crate) fn begin(&mut self) {
        self.since = Some(Instant::now());
    }

    /// It has ended.
    pub(crate) fn now(&self) -> Result<()> {
        if self.is_now() {
            return Ok(());
        }
        fs::write(&self.now, "").with_context(|| format!("write {}", self.now.display()))
    }

    /// It is about to start again.
    pub(crate) fn end(&mut self) -> Result<()> {
        self.since = None;
        fs::remove_file(&self.now).with_context(|| format!("remove {}", self.now.display()))
    }
}
