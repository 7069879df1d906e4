//! The nodes, the two pods, and what carries the bytes between them.

use std::env;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::process::{self, Child, Command};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use harness::{Agent, Mesh, Pod, PodSpec, ServiceSpec, wait};

use crate::direct::{Ways, warm_up};
use crate::hops::Hop;
use crate::results::{Place, Side};
use crate::run::Agents;
use crate::server::{ECHO_MANY, ECHO_ONE, SINK};
use crate::stages::Taken;

/// What is set in both pods, for readers of the table.
pub(crate) const SETTINGS: &str = "In both pods net.ipv4.tcp_tw_reuse=1 and \
     net.ipv4.ip_local_port_range=10240 65535, so that a client's own TIME_WAIT ports are not what \
     is measured";
/// What clients on the same node dial.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dial {
    /// The service's ClusterIP, which nftables translates where the mesh does not.
    Service,
    /// The server's pod: the same path with and without the mesh, and no rule of nftables anywhere.
    Pod,
}

impl Dial {
    /// The same, for readers of the table.
    pub(crate) fn told(self) -> &'static str {
        match self {
            Self::Service => {
                " On the same node clients dial the service's ClusterIP on all sides, and nftables \
                 translates it, as kube-proxy does, where the mesh does not: a rule for each port of \
                 this one service behind a map of 1,000 others, and connections tracked on all sides. \
                 Each side has a third of the client's ports."
            }
            Self::Pod => {
                " On the same node clients dial the server's pod on all sides, and nothing is \
                 translated or tracked. Each side has a third of the client's ports."
            }
        }
    }
}

/// The same as files; the server's ports lie outside of the range.
const SYSCTLS: [(&str, &str); 2] =
    [("net/ipv4/tcp_tw_reuse", "1"), ("net/ipv4/ip_local_port_range", "10240 65535")];

const NODES: [&str; 2] = ["a", "b"];
/// All that clients dial.
const PORTS: [u16; 3] = [ECHO_ONE, ECHO_MANY, SINK];
const CLIENT: &str = "client";
const SERVER: &str = "server";
/// Services that the node of both pods translates beside the one that is measured.
const OTHER_SERVICES: usize = 1000;
/// Of an agent: listeners, idle lanes, maps and namespaces.
const OTHER_DESCRIPTORS: usize = 1000;
/// What an agent may take to end when nothing is open any more.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Two nodes joined by a link with a pod on each, or one node with both.
#[derive(Debug)]
pub(crate) struct World {
    mesh: Mesh,
    place: Place,
    dial: Dial,
    /// Whether there are any, running or not.
    agents: bool,
    /// Only on the side that is named after them.
    hops: Vec<Hop>,
}

impl World {
    /// Makes them, as `sides`, all of `place`, need them.
    ///
    /// # Errors
    ///
    /// Fails without the privilege, or when an agent does not become ready.
    pub(crate) fn new(place: Place, dial: Dial, sides: &[Side]) -> Result<Self> {
        let nodes = nodes(place);
        let builder = nodes.iter().fold(Mesh::builder(), |builder, node| builder.node(node));
        let builder = builder
            .namespace("default", &[("malla.dev/mesh", "enabled")])
            .pod(PodSpec::new(CLIENT, NODES[0]))
            .pod(PodSpec::new(SERVER, nodes[nodes.len() - 1]))
            // A record, or a line of the log, for each of some hundred thousand connections would
            // measure the disk.
            .flag("--access-log=off")
            .flag("--log=warn")
            .flag("--drain-s=1");
        let builder = match place {
            Place::Across => builder,
            // Across nodes a rule of nftables would turn on connection tracking for all sides.
            Place::SameNode => {
                let service = ServiceSpec::new(SERVER).pods(&[SERVER]);
                let service =
                    PORTS.iter().fold(service, |service, port| service.port(*port, *port));
                let builder = builder.service(service);
                if dial == Dial::Service { builder.translated_services() } else { builder }
            }
        };
        // Without a mesh to measure, no agent has to be built.
        let agents = sides.iter().any(|side| side.is_mesh());
        let mesh = if agents { builder } else { builder.plain() }.start()?;
        if place == Place::SameNode && dial == Dial::Service {
            other_services(&mesh)?;
        }
        for pod in mesh.pods() {
            pod.run(|| {
                SYSCTLS.iter().try_for_each(|(key, value)| {
                    let path = format!("/proc/sys/{key}");
                    fs::write(&path, value).with_context(|| format!("write {path}"))
                })
            })?;
        }
        Ok(Self { mesh, place, dial, agents, hops: Vec::new() })
    }

    /// Turns to `side`, and says which processes carry it. They are fresh ones; none on the direct
    /// way, which no agent carries.
    ///
    /// # Errors
    ///
    /// Fails when an agent does not end, or does not become ready.
    pub(crate) fn take(&mut self, side: Side) -> Result<Option<Agents>> {
        if let Some(range) = own_ports(side) {
            self.mesh.pod(CLIENT).sysctl("net/ipv4/ip_local_port_range", range)?;
        }
        self.hops.clear();
        if side == Side::Hops {
            self.hops = self.two_hops()?;
        }
        if !self.agents {
            return Ok(None);
        }
        let nodes = nodes(self.place);
        for node in nodes {
            let agent = self.mesh.agent_mut(node);
            if agent.pid() != 0 {
                agent.terminate()?;
                agent.wait_until_gone(END_LIMIT)?;
            }
        }
        if !side.is_mesh() {
            return nodes.iter().try_for_each(|node| detach(self.mesh.agent(node))).map(|()| None);
        }
        for node in nodes {
            let agent = self.mesh.agent_mut(node);
            if !side.is_direct() {
                agent.set_flag(&format!("--carrier={}", side.name()));
            }
            let redirect = if side == Side::Redirect { "on" } else { "off" };
            agent.set_flag(&format!("--redirect-peer={redirect}"));
            agent.restart()?;
        }
        for node in nodes {
            let agent = self.mesh.agent(node);
            wait::until(wait::SOON, "both pods to be enrolled", || {
                self.mesh.pods().iter().all(|pod| agent.is_enrolled(pod) == Some(true))
            })?;
        }
        if side == Side::Redirect {
            let agent = self.mesh.agent(NODES[0]);
            wait::until(wait::SOON, "the pods' cables to be looked at", || {
                let status = agent.cli(&["status", "-o", "json"]).and_then(|cli| cli.json());
                let pods = status.unwrap_or_default()["redirect_peer"].take();
                let pods = pods.as_object().map_or(0, |pods| {
                    pods.values().filter(|said| said.as_str() == Some("on")).count()
                });
                pods == self.mesh.pods().len()
            })?;
        }
        if side.is_direct() {
            return Ok(None);
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

    /// What the stages of both nodes' agents have taken until now.
    ///
    /// # Errors
    ///
    /// Fails when an agent does not tell.
    pub(crate) fn stages(&self) -> Result<Taken> {
        let [client, server] = NODES.map(|node| self.mesh.agent(node));
        Taken::so_far(client, server)
    }

    /// On the direct sides: lets the agent decide about all that clients will dial, and says how
    /// many connections have gone which way until then. The server has to be there.
    ///
    /// # Errors
    ///
    /// Fails when the direct way does not come about.
    pub(crate) fn warm_up(&self, side: Side) -> Result<Option<Ways>> {
        if !side.is_direct() {
            return Ok(None);
        }
        let agent = self.mesh.agent(NODES[0]);
        let destinations = PORTS.map(|port| SocketAddr::new(self.server_address(), port));
        warm_up(agent, self.mesh.pod(CLIENT), &destinations)?;
        Ways::so_far(agent).map(Some)
    }

    /// Checks that all of the `opened` connections since `before` went direct, past the node or not.
    ///
    /// # Errors
    ///
    /// Fails when they did not: whatever was measured then is not what it is called.
    pub(crate) fn went_direct(&self, side: Side, before: Ways, opened: u64) -> Result<()> {
        let past_the_node = side == Side::Redirect;
        Ways::so_far(self.mesh.agent(NODES[0]))?.all_direct_since(before, opened, past_the_node)
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

    fn two_hops(&self) -> Result<Vec<Hop>> {
        let [near, far] = NODES.map(|node| self.mesh.node(node));
        // It opens a connection between the nodes for each of the client's; an agent's own ports stay
        // free for those who come after it.
        near.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
        near.sysctl("net/ipv4/ip_local_port_range", "20480 65535")?;
        let client = self.mesh.pod(CLIENT).netns();
        let server = self.server();
        Ok(vec![
            Hop::start(far.netns(), &PORTS, server.netns(), server.v4_ip().into())?,
            Hop::start(client, &PORTS, near.netns(), far.v4().into())?,
        ])
    }

    /// What clients dial: the server's pod, on the same node its service if that is asked for, and before two
    /// hops the first of them.
    pub(crate) fn server_address(&self) -> IpAddr {
        if !self.hops.is_empty() {
            return self.mesh.pod(CLIENT).v4_ip().into();
        }
        match (self.place, self.dial) {
            (Place::Across, _) | (_, Dial::Pod) => self.server().v4_ip().into(),
            (Place::SameNode, Dial::Service) => self.mesh.service(SERVER).v4_ip().into(),
        }
    }

    fn server(&self) -> &Pod {
        self.mesh.pod(SERVER)
    }
}

/// Lets the node translate more services than the one that is dialled, as nodes do: one look into a
/// map for each new connection, as kube-proxy's nftables mode has it.
fn other_services(mesh: &Mesh) -> Result<()> {
    let elements: Vec<_> = (0..OTHER_SERVICES)
        .map(|at| format!("10.111.{}.{} . 80 : 10.112.0.1 . 8080", at / 250, at % 250 + 1))
        .collect();
    let table = format!(
        "table ip bench_services {{\n map services {{\n  \
         type ipv4_addr . inet_service : ipv4_addr . inet_service; elements = {{ {} }}\n }}\n \
         chain services {{\n  type nat hook prerouting priority dstnat - 1; policy accept;\n  \
         dnat ip to ip daddr . tcp dport map @services\n }}\n}}\n",
        elements.join(", ")
    );
    // A file, and not standard input: it is longer than a pipe holds.
    let path = env::temp_dir().join(format!("malla-bench-{}.nft", process::id()));
    fs::write(&path, table).with_context(|| format!("write {}", path.display()))?;
    let done = mesh
        .node(NODES[0])
        .netns()
        .run(|| Command::new("nft").arg("-f").arg(&path).output().context("run nft"));
    let removed = fs::remove_file(&path);
    let done = done?;
    removed.with_context(|| format!("remove {}", path.display()))?;
    ensure!(done.status.success(), "nft: {}", String::from_utf8_lossy(&done.stderr).trim());
    Ok(())
}

/// The client's ports on the same node, as many for each side. All sides' connections end at the
/// server's pod, and the node tracks one for two minutes after its end: where the other side had
/// just used a port, a new connection had to be given another one, at 8 times the CPU.
fn own_ports(side: Side) -> Option<&'static str> {
    match side {
        Side::Plain | Side::Hops | Side::Lane | Side::Quic => None,
        Side::Near => Some("10240 28671"),
        Side::Direct => Some("28672 47103"),
        Side::Redirect => Some("47104 65535"),
    }
}

fn nodes(place: Place) -> &'static [&'static str] {
    match place {
        Place::Across => &NODES,
        Place::SameNode => &NODES[..1],
    }
}

/// Leaves nothing of the mesh in the kernel.
fn detach(agent: &Agent) -> Result<()> {
    let done = agent.cli(&["detach"])?;
    ensure!(done.code == 0, "mesh-agent detach: {}", done.stderr.trim());
    Ok(())
}

/// Connections that can be held open at once: each takes two descriptors of an agent whose carrier is
/// lanes, and some are in use for other things.
///
/// # Errors
///
/// Fails where `/proc` does.
pub(crate) fn most_idle() -> Result<usize> {
    let limits = fs::read_to_string("/proc/self/limits").context("read /proc/self/limits")?;
    // `unlimited` is not a number.
    let most = most_descriptors(&limits).and_then(|most| most.parse::<usize>().ok());
    Ok(most.map_or(usize::MAX, |most| most.saturating_sub(OTHER_DESCRIPTORS) / 2))
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
