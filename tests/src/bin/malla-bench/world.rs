//! The two nodes, the two pods, and what carries the bytes between them.

use std::fs;
use std::net::IpAddr;
use std::process::{self, Child, Command};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Agent, Mesh, Pod, PodSpec, wait};

use crate::results::Side;
use crate::run::Agents;

/// What is set in both pods, for readers of the table.
pub(crate) const SETTINGS: &str = "In both pods net.ipv4.tcp_tw_reuse=1 and \
     net.ipv4.ip_local_port_range=10240 65535, so that a client's own TIME_WAIT ports are not what \
     is measured";
/// The same as files; the server's ports lie outside of the range.
const SYSCTLS: [(&str, &str); 2] =
    [("net/ipv4/tcp_tw_reuse", "1"), ("net/ipv4/ip_local_port_range", "10240 65535")];

const NODES: [&str; 2] = ["a", "b"];
const CLIENT: &str = "client";
const SERVER: &str = "server";
/// What an agent may take to end when nothing is open any more.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Two nodes joined by a link, a pod on each.
#[derive(Debug)]
pub(crate) struct World {
    mesh: Mesh,
    /// Whether there are any, running or not.
    agents: bool,
}

impl World {
    /// Makes them, as `sides` need them.
    ///
    /// # Errors
    ///
    /// Fails without the privilege, or when an agent does not become ready.
    pub(crate) fn new(sides: &[Side]) -> Result<Self> {
        let builder = Mesh::builder()
            .node(NODES[0])
            .node(NODES[1])
            .namespace("default", &[("malla.dev/mesh", "enabled")])
            .pod(PodSpec::new(CLIENT, NODES[0]))
            .pod(PodSpec::new(SERVER, NODES[1]))
            // A record, or a line of the log, for each of some hundred thousand connections would
            // measure the disk.
            .flag("--access-log=off")
            .flag("--log=warn")
            .flag("--drain-s=1");
        // Without a mesh to measure, no agent has to be built.
        let agents = sides.iter().any(|side| *side != Side::Plain);
        let mesh = if agents { builder } else { builder.plain() }.start()?;
        for pod in mesh.pods() {
            pod.run(|| {
                SYSCTLS.iter().try_for_each(|(key, value)| {
                    let path = format!("/proc/sys/{key}");
                    fs::write(&path, value).with_context(|| format!("write {path}"))
                })
            })?;
        }
        Ok(Self { mesh, agents })
    }

    /// Turns to `side`, and says which processes are its agents. They are fresh ones.
    ///
    /// # Errors
    ///
    /// Fails when an agent does not end, or does not become ready.
    pub(crate) fn take(&mut self, side: Side) -> Result<Option<Agents>> {
        if !self.agents {
            return Ok(None);
        }
        for node in NODES {
            let agent = self.mesh.agent_mut(node);
            if agent.pid() != 0 {
                agent.terminate()?;
                agent.wait_until_gone(END_LIMIT)?;
            }
        }
        if side == Side::Plain {
            return NODES.iter().try_for_each(|node| detach(self.mesh.agent(node))).map(|()| None);
        }
        for node in NODES {
            let agent = self.mesh.agent_mut(node);
            agent.set_flag(&format!("--carrier={}", side.name()));
            agent.restart()?;
        }
        for node in NODES {
            let agent = self.mesh.agent(node);
            wait::until(wait::SOON, "both pods to be enrolled", || {
                self.mesh.pods().iter().all(|pod| agent.is_enrolled(pod) == Some(true))
            })?;
        }
        let pid = |node| self.mesh.agent(node).pid();
        Ok(Some(Agents { client: pid(NODES[0]), server: pid(NODES[1]) }))
    }

    /// Checks that `connections` of the client's are open and that it is `side` that carries them.
    ///
    /// # Errors
    ///
    /// Fails when they are not: whatever was measured then is not what it is called.
    pub(crate) fn carries(&self, side: Side, connections: usize) -> Result<()> {
        let open = self.mesh.agent(NODES[0]).ask(&["connections"])?;
        let open = open.as_array().context("no list of connections")?;
        let carried = open.iter().filter(|one| one["carrier"] == side.name()).count();
        ensure!(
            carried >= connections,
            "of {connections} connections held open {} are in the mesh and {carried} over {}",
            open.len(),
            side.name(),
        );
        Ok(())
    }

    /// Starts a command in the server's pod.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be started.
    pub(crate) fn start_in_server(&self, command: &mut Command) -> Result<Child> {
        self.server().netns().spawn(command)
    }

    /// Starts a command in the client's pod.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be started.
    pub(crate) fn start_in_client(&self, command: &mut Command) -> Result<Child> {
        self.mesh.pod(CLIENT).netns().spawn(command)
    }

    /// The server's pod's address.
    pub(crate) fn server_address(&self) -> IpAddr {
        self.server().v4_ip().into()
    }

    fn server(&self) -> &Pod {
        self.mesh.pod(SERVER)
    }
}

/// Leaves nothing of the mesh in the kernel.
fn detach(agent: &Agent) -> Result<()> {
    let done = agent.cli(&["detach"])?;
    ensure!(done.code == 0, "mesh-agent detach: {}", done.stderr.trim());
    Ok(())
}

/// Lets this process hold as many connections as it may at all: shells begin with 1,024.
///
/// # Errors
///
/// Fails where `/proc` or `prlimit` does.
pub(crate) fn many_descriptors() -> Result<()> {
    let limits = fs::read_to_string("/proc/self/limits").context("read /proc/self/limits")?;
    let most = most_descriptors(&limits).context("no limit of open files")?;
    let pid = process::id().to_string();
    let limit = format!("--nofile={most}:");
    let done = Command::new("prlimit").args(["--pid", &pid, &limit]).output();
    let done = done.context("run prlimit")?;
    ensure!(done.status.success(), "prlimit: {}", String::from_utf8_lossy(&done.stderr).trim());
    Ok(())
}

/// The hard limit in the line `Max open files 1024 524288 files` of proc(5).
fn most_descriptors(limits: &str) -> Option<&str> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().nth(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hard_limit_is_the_second_figure() {
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax open files  1024  524288  files\n";
        assert_eq!(most_descriptors(limits), Some("524288"));
        assert_eq!(most_descriptors("Max processes 1 2 processes"), None);
    }
}
