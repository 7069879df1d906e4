//! The nodes, the two pods, and what carries the bytes between them.

use std::env;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::process::{self, Child, Command};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use harness::{Agent, Mesh, Node, Pod, PodSpec, ServiceSpec, wait};

use crate::direct::{Ways, warm_up};
use crate::hops::Hop;
use crate::ports;
use crate::results::{Place, Side};
use crate::server;
use crate::stages::Taken;
use crate::usage::Part;

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
                 translates it, as kube-proxy does, where the mesh does not: one map has the ports of \
                 this service and 1,000 others. Connections are tracked on all sides, for a second after \
                 their end. Each side has a third of the client's ports."
            }
            Self::Pod => {
                " On the same node clients dial the server's pod on all sides, and nothing is \
                 translated or tracked. Each side has a third of the client's ports."
            }
        }
    }
}

const NODES: [&str; 2] = ["a", "b"];
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
                let ports = server::ports().into_iter();
                builder.service(ports.fold(service, |service, port| service.port(port, port)))
            }
        };
        // Without a mesh to measure, no agent has to be built.
        let agents = sides.iter().any(|side| side.is_mesh());
        let mesh = if agents { builder } else { builder.plain() }.start()?;
        if !agents {
            // The harness's own, by which every connection is tracked: the baseline is the same whether
            // there is a mesh to compare with it or not.
            let delete = ["delete", "table", "inet", "kube_proxy"];
            mesh.nodes().iter().try_for_each(|node| nft(node, &delete))?;
        }
        if place == Place::SameNode && dial == Dial::Service {
            translate(&mesh)?;
            ports::forget_soon(|key, value| mesh.node(NODES[0]).sysctl(key, value))?;
        }
        for pod in mesh.pods() {
            ports::provide(|key, value| pod.sysctl(key, value))?;
        }
        Ok(Self { mesh, place, dial, agents, hops: Vec::new() })
    }

    /// Turns to `side`, and says which processes carry it, or decide how it is carried. They are fresh
    /// ones, but for the hops, which are here.
    ///
    /// # Errors
    ///
    /// Fails when an agent does not end, or does not become ready.
    pub(crate) fn take(&mut self, side: Side) -> Result<Vec<(Part, u32)>> {
        ports::turn_to(side, |key, value| self.mesh.pod(CLIENT).sysctl(key, value))?;
        self.hops.clear();
        let mut here = Vec::new();
        if side == Side::Hops {
            self.hops = self.two_hops()?;
            here.push((Part::Hops, process::id()));
        }
        if !self.agents {
            return Ok(here);
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
            nodes.iter().try_for_each(|node| detach(self.mesh.agent(node)))?;
            return Ok(here);
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
        let pid = |node| self.mesh.agent(node).pid();
        Ok(match self.place {
            Place::Across => {
                vec![(Part::ClientAgent, pid(NODES[0])), (Part::ServerAgent, pid(NODES[1]))]
            }
            Place::SameNode => vec![(Part::NodeAgent, pid(NODES[0]))],
        })
    }

    /// Checks that `connections` of the client's are open and that it is `side` that carries them. Of
    /// the direct sides [`World::went_direct`] counts them with all others.
    ///
    /// # Errors
    ///
    /// Fails when they are not: whatever was measured then is not what it is called.
    pub(crate) fn carries(&self, side: Side, connections: usize) -> Result<()> {
        if side.is_direct() {
            return Ok(());
        }
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

    /// What the stages of both nodes' agents have taken until now, `None` where no agent carries.
    ///
    /// # Errors
    ///
    /// Fails when an agent does not tell.
    pub(crate) fn stages(&self, side: Side) -> Result<Option<Taken>> {
        if !side.is_mesh() || side.is_direct() {
            return Ok(None);
        }
        let [client, server] = NODES.map(|node| self.mesh.agent(node));
        Taken::so_far(client, server).map(Some)
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
        let address = self.server_address();
        let ports = server::ports().into_iter();
        let destinations: Vec<_> = ports.map(|port| SocketAddr::new(address, port)).collect();
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
        ports::provide(|key, value| near.sysctl(key, value))?;
        near.sysctl("net/ipv4/ip_local_port_range", "20480 65535")?;
        let client = self.mesh.pod(CLIENT).netns();
        let server = self.server();
        let ports = server::ports();
        Ok(vec![
            Hop::start(far.netns(), &ports, server.netns(), server.v4_ip().into())?,
            Hop::start(client, &ports, near.netns(), far.v4().into())?,
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

/// Lets the node translate the service that is dialled and more of them, as nodes do: one look into a map
/// for each new connection, as kube-proxy's nftables mode has it, whichever port it dials.
fn translate(mesh: &Mesh) -> Result<()> {
    let (service, pod) = (mesh.service(SERVER).v4_ip(), mesh.pod(SERVER).v4_ip());
    let dialled = server::ports().into_iter();
    let dialled = dialled.map(|port| format!("{service} . {port} : {pod} . {port}"));
    let others = (0..OTHER_SERVICES)
        .map(|at| format!("10.111.{}.{} . 80 : 10.112.0.1 . 8080", at / 250, at % 250 + 1));
    let elements: Vec<_> = dialled.chain(others).collect();
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
    let done = nft(mesh.node(NODES[0]), &["-f", &path.display().to_string()]);
    let removed = fs::remove_file(&path);
    done?;
    removed.with_context(|| format!("remove {}", path.display()))
}

fn nft(node: &Node, args: &[&str]) -> Result<()> {
    let run = || Command::new("nft").args(args).output().context("run nft");
    let done = node.netns().run(run)?;
    ensure!(done.status.success(), "nft: {}", String::from_utf8_lossy(&done.stderr).trim());
    Ok(())
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
