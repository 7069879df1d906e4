//! The processes of pods as the machine sees them, which needs no API server. Only of clusters that are
//! made here, whose nodes are this machine's processes.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpStream};
use std::panic::resume_unwind;
use std::process::{Command, Output, Stdio};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{Agents, Cluster, read, xtask};
use crate::agent::{has_stopped, http_get};
use crate::metrics::Metrics;
use crate::{sys, wait};

const METRICS_PORT: u16 = 15020;
const READY_PORT: u16 = 15021;

/// The API server away, until dropped.
#[derive(Debug)]
pub struct Outage {
    is_over: bool,
}

impl Outage {
    /// Asks the API server of the cluster that was made here to end, and waits until it has.
    ///
    /// # Errors
    ///
    /// Fails if it does not end.
    pub fn begin() -> Result<Self> {
        let this = Self { is_over: false };
        read(xtask()?.args(["cluster", "api-server", "away"])).map(|_said| this)
    }

    /// Starts it again, and waits until it is ready.
    ///
    /// # Errors
    ///
    /// Fails if it does not become ready.
    pub fn end(mut self) -> Result<()> {
        self.is_over = true;
        bring_back()
    }
}

impl Drop for Outage {
    fn drop(&mut self) {
        if !self.is_over {
            bring_back().ok();
        }
    }
}

fn bring_back() -> Result<()> {
    tell_api_server("back")
}

fn tell_api_server(what: &str) -> Result<()> {
    read(xtask()?.args(["cluster", "api-server", what])).map(drop)
}

/// The API server stopped where it is, until dropped: connections to it open, and nothing is answered.
#[derive(Debug)]
pub struct Frozen(());

impl Frozen {
    /// Stops the API server of the cluster that was made here.
    ///
    /// # Errors
    ///
    /// Fails if there is none.
    pub fn begin() -> Result<Self> {
        // Before: also what fails when it has happened is undone.
        let this = Self(());
        tell_api_server("freeze").map(|()| this)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        tell_api_server("thaw").ok();
    }
}

/// A process of a pod's container.
#[derive(Debug)]
pub struct PodProcess {
    uid: String,
    program: String,
    pid: u32,
}

/// A process that does nothing, and goes on when this is dropped.
#[derive(Debug)]
pub struct Stopped<'a>(&'a PodProcess);

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        sys::kill(self.0.pid, libc::SIGCONT).ok();
    }
}

impl PodProcess {
    /// Waits for a process of the pod with this UID whose command line begins with `program`.
    fn find(uid: &str, program: &str, not: Option<u32>) -> Result<Self> {
        let what = format!("{program} of {uid}");
        let pid = wait::until_some(wait::SOON, &what, || {
            let all = fs::read_dir("/proc").ok()?.flatten();
            let mut pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
            pids.find(|pid| Some(*pid) != not && is_of(*pid, uid, program))
        })?;
        Ok(Self { uid: uid.to_owned(), program: program.to_owned(), pid })
    }

    /// Kills it without a word, and waits for the one that the kubelet starts in its place.
    ///
    /// # Errors
    ///
    /// Fails if it has ended, or none is started.
    pub fn kill(&mut self) -> Result<()> {
        // It is the same one: no other process is in that pod's cgroup with its name.
        ensure!(is_of(self.pid, &self.uid, &self.program), "{self:?} has ended");
        sys::kill(self.pid, libc::SIGKILL).context("kill a pod's process")?;
        *self = Self::find(&self.uid, &self.program, Some(self.pid))?;
        Ok(())
    }

    /// Stops it where it is (SIGSTOP), until what is returned is dropped.
    ///
    /// # Errors
    ///
    /// Fails if it has ended, or does not stop.
    pub fn stop(&self) -> Result<Stopped<'_>> {
        ensure!(is_of(self.pid, &self.uid, &self.program), "{self:?} has ended");
        // Before: also what fails when it has happened is undone.
        let this = Stopped(self);
        sys::kill(self.pid, libc::SIGSTOP).context("stop a pod's process")?;
        let stops = || has_stopped(self.pid).unwrap_or(false);
        wait::until(wait::SOON, "the process to stop", stops)?;
        Ok(this)
    }

    /// Runs a command with the files and the network that it sees, and returns what becomes of it.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be started.
    pub fn run(&self, command: &[&str]) -> Result<Output> {
        let mut enter = Command::new("nsenter");
        enter.args(["--target", &self.pid.to_string(), "--mount", "--net", "--"]);
        sys::unblock_interrupts(&mut enter);
        enter.args(command).stdin(Stdio::null()).output().context("start nsenter")
    }

    /// Runs a program of this machine with the network that it sees, in the cgroup of whoever runs this.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be started.
    pub fn run_beside(&self, command: &[&str]) -> Result<Output> {
        let mut enter = Command::new("nsenter");
        enter.args(["--target", &self.pid.to_string(), "--net", "--"]);
        sys::unblock_interrupts(&mut enter);
        enter.args(command).stdin(Stdio::null()).output().context("start nsenter")
    }

    /// What the agent that it is answers to a command of its command line.
    ///
    /// # Errors
    ///
    /// Fails with what it says.
    pub fn ask(&self, command: &[&str]) -> Result<Value> {
        let output = self.run(&[&[self.program.as_str()], command, &["-o", "json"]].concat())?;
        serde_json::from_slice(&output.stdout).with_context(|| {
            let said = String::from_utf8_lossy(&output.stderr);
            format!("read the answer to {command:?}: {}", said.trim())
        })
    }

    /// What the agent that it is counts.
    ///
    /// # Errors
    ///
    /// Fails if it does not answer.
    pub fn metrics(&self) -> Result<Metrics> {
        Ok(Metrics::parse(&self.http(METRICS_PORT, "/metrics")?.1))
    }

    /// What it keeps in memory, in bytes (`VmRSS`, proc_pid_status(5)).
    ///
    /// # Errors
    ///
    /// Fails if it has ended.
    pub fn resident(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).context("read it")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).context("no VmRSS")?;
        Ok(kib.parse::<u64>().context("read VmRSS")? * 1024)
    }

    /// Whether the agent that it is says that it is ready.
    pub fn is_ready(&self) -> bool {
        self.http(READY_PORT, "/healthz/ready").is_ok_and(|(status, _)| status == 200)
    }

    /// Breaks all connections to the API server of the network that it is in, where that is a node's.
    ///
    /// # Errors
    ///
    /// Fails if there are none.
    pub fn disconnect_from_api(&self) -> Result<()> {
        let mut kill = Command::new("nsenter");
        kill.args(["--target", &self.pid.to_string(), "--net", "--"]);
        // Pods ask the Service's port, and what Kubernetes runs on the node asks the server's own.
        kill.args(["ss", "--kill", "--no-header", "--tcp", "state", "established", "dport = :443"]);
        sys::unblock_interrupts(&mut kill);
        let killed = read(&mut kill)?;
        ensure!(!killed.trim().is_empty(), "no connection to the API server, or no SOCK_DESTROY");
        Ok(())
    }

    fn http(&self, port: u16, path: &str) -> Result<(u16, String)> {
        let netns = File::open(format!("/proc/{}/ns/net", self.pid)).context("open a netns")?;
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                sys::enter_netns(&netns).context("enter a netns")?;
                http_get(TcpStream::connect((Ipv4Addr::LOCALHOST, port))?, path)
            });
            inside.join().unwrap_or_else(|panicked| resume_unwind(panicked))
        })
    }
}

fn is_of(pid: u32, uid: &str, program: &str) -> bool {
    let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let command = read("cmdline");
    command.split(|byte| *byte == 0).next() == Some(program.as_bytes())
        && String::from_utf8_lossy(&read("cgroup")).contains(uid)
}

impl Cluster {
    /// The process of a pod of the namespace whose command line begins with `program`.
    ///
    /// # Errors
    ///
    /// Fails if there is none.
    pub fn process(&self, pod: &str, program: &str) -> Result<PodProcess> {
        let pod = self.get(&["pod", pod])?;
        let uid = pod["metadata"]["uid"].as_str().context("no UID")?;
        PodProcess::find(uid, program, None)
    }
}

impl Agents {
    /// The process of the agent of `node`.
    ///
    /// # Errors
    ///
    /// Fails if there is none.
    pub fn process(&self, node: &str) -> Result<PodProcess> {
        self.system().process(self.pod(node)?, "/mesh-agent")
    }
}
