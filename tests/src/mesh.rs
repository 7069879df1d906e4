//! A mesh under test: nodes joined by links, pods on them, an agent on each node.
//!
//! ```text
//! pod a1 ─┐eth0      p0┌───────┐ to-1            to-0 ┌───────┐p0      eth0┌─ pod b1
//!         └────────────┤ node a├──────────────────────┤ node b├────────────┘
//! pod a2 ──────────────┤       │   one link, no other │       │
//! ```
//!
//! Every pod has a route to its node and nothing else, as with most CNIs; nodes forward between
//! their pods and to each other's pod ranges. Cluster addresses of services lead nowhere unless an
//! agent (or, in a plain mesh, nftables) knows them.

mod layout;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{Context as _, Result, bail};

use crate::agent::{Agent, AgentFiles, binary};
use crate::cgroup::Cgroup;
use crate::guard::Guard;
use crate::manifests::{Manifests, pod_file};
use crate::netns::{Netns, sysctl};
use crate::pod::Pod;
use crate::sys;
use crate::topology::{Builder, Family, PodSpec, ServiceSpec};
use crate::wait;

/// What identities begin with, unless a node has a CA of its own.
const TRUST_DOMAIN: &str = "cluster.local";

/// Counts the meshes of this process: every one has names of its own.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// Nodes, pods and agents; all of it is removed when dropped.
///
/// Fields are dropped in order: agents end before what they hold on to goes.
#[derive(Debug)]
pub struct Mesh {
    nodes: Vec<Node>,
    pods: Vec<Arc<Pod>>,
    services: Vec<(ServiceSpec, Service)>,
    manifests: Manifests,
    ca_dir: PathBuf,
    cgroup: Cgroup,
    state: StateDir,
}

/// A node, with its agent.
#[derive(Debug)]
pub struct Node {
    agent: Option<Agent>,
    name: String,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    only: Option<Family>,
    mtu: u32,
    netns: Arc<Netns>,
}

/// A service's cluster addresses.
#[derive(Clone, Debug)]
pub struct Service {
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

/// Everything of a mesh that lies in files. A bpf file system must be unmounted before it goes.
#[derive(Debug)]
struct StateDir(PathBuf);

impl Mesh {
    /// An empty description.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// Two nodes `a` and `b` with two enrolled pods each, `a1`, `a2`, `b1`, `b2`; the service `b` is
    /// `b1`, the service `a` is `a2`, the service `both` is `b1` and `b2`, each port 80 for 8080.
    ///
    /// # Errors
    ///
    /// Fails if something cannot be made.
    pub fn two_nodes() -> Result<Self> {
        Self::two_nodes_builder().start()
    }

    /// The description of [`Mesh::two_nodes`], to be changed.
    pub fn two_nodes_builder() -> Builder {
        Self::builder()
            .node("a")
            .node("b")
            .namespace("default", &[("malla.dev/mesh", "enabled")])
            .pod(PodSpec::new("a1", "a"))
            .pod(PodSpec::new("a2", "a"))
            .pod(PodSpec::new("b1", "b"))
            .pod(PodSpec::new("b2", "b"))
            .service(ServiceSpec::new("a").port(80, 8080).pods(&["a2"]))
            .service(ServiceSpec::new("b").port(80, 8080).pods(&["b1"]))
            .service(ServiceSpec::new("both").port(80, 8080).pods(&["b1", "b2"]))
    }

    pub(crate) fn start(builder: Builder) -> Result<Self> {
        Guard::over_this_process()?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let id = format!("malla-{}-{number}", std::process::id());
        let state = StateDir(std::env::temp_dir().join(&id));
        fs::create_dir(&state.0).with_context(|| format!("create {}", state.0.display()))?;
        let manifests =
            Manifests::new(state.0.join("manifests"), state.0.join("manifests.staging"))?;
        let mut mesh = Self {
            nodes: Vec::new(),
            pods: Vec::new(),
            services: Vec::new(),
            manifests,
            ca_dir: state.0.join("ca"),
            cgroup: Cgroup::join()?,
            state,
        };
        mesh.lay_out(&builder, &id, number)?;
        mesh.describe(&builder)?;
        if builder.plain_services {
            mesh.translate_services()?;
        }
        if builder.agents {
            mesh.start_agents(&builder)?;
        }
        Ok(mesh)
    }

    /// The node of this name.
    #[expect(clippy::panic, reason = "a test that names what it did not make is wrong")]
    pub fn node(&self, name: &str) -> &Node {
        let found = self.nodes.iter().find(|node| node.name == name);
        found.unwrap_or_else(|| panic!("no node {name}"))
    }

    /// The pod of this name.
    #[expect(clippy::panic, reason = "a test that names what it did not make is wrong")]
    pub fn pod(&self, name: &str) -> &Pod {
        let found = self.pods.iter().find(|pod| pod.name() == name);
        found.unwrap_or_else(|| panic!("no pod {name}"))
    }

    /// The pod of this name, for a thread that acts in it while the mesh is being changed.
    #[expect(clippy::panic, reason = "a test that names what it did not make is wrong")]
    pub fn shared_pod(&self, name: &str) -> Arc<Pod> {
        let found = self.pods.iter().find(|pod| pod.name() == name);
        found.map_or_else(|| panic!("no pod {name}"), Arc::clone)
    }

    /// The addresses of the service of this name.
    #[expect(clippy::panic, reason = "a test that names what it did not make is wrong")]
    pub fn service(&self, name: &str) -> &Service {
        let found = self.services.iter().find(|(spec, _)| spec.name == name);
        found.map_or_else(|| panic!("no service {name}"), |(_, service)| service)
    }

    /// The agent of the node of this name.
    #[expect(clippy::panic, reason = "a test that asks a plain mesh for an agent is wrong")]
    pub fn agent(&self, node: &str) -> &Agent {
        let agent = self.node(node).agent.as_ref();
        agent.unwrap_or_else(|| panic!("node {node} has no agent"))
    }

    /// The agent of the node of this name, to be stopped or started.
    #[expect(clippy::panic, reason = "a test that asks a plain mesh for an agent is wrong")]
    pub fn agent_mut(&mut self, node: &str) -> &mut Agent {
        let found = self.nodes.iter_mut().find(|known| known.name == node);
        let agent = found.and_then(|node| node.agent.as_mut());
        agent.unwrap_or_else(|| panic!("node {node} has no agent"))
    }

    /// Every node.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Every pod.
    pub fn pods(&self) -> &[Arc<Pod>] {
        &self.pods
    }

    /// The manifests that the agents follow.
    pub fn manifests(&self) -> &Manifests {
        &self.manifests
    }

    /// The directory of the certificate authority.
    pub fn ca_dir(&self) -> &Path {
        &self.ca_dir
    }

    /// Where the mesh's files lie.
    pub fn state_dir(&self) -> &Path {
        &self.state.0
    }

    /// Sets an annotation of a pod and waits until its node's agent has read it.
    ///
    /// # Errors
    ///
    /// Fails if the manifest cannot be written or the agent does not follow.
    pub fn annotate(&self, pod: &str, key: &str, value: &str) -> Result<()> {
        let pod = self.pod(pod);
        self.manifests.pod(&pod.spec().annotation(key, value), pod, pod.netns())?;
        pod.remember(key, value);
        if key != "malla.dev/mesh" {
            return Ok(());
        }
        let enrolled = value == "enabled";
        let what = format!("{} to be enrolled: {enrolled}", pod.name());
        // Every agent: others must know as well how the pod is to be reached.
        for agent in self.nodes.iter().filter_map(|node| node.agent.as_ref()) {
            wait::until(wait::SOON, &what, || agent.is_enrolled(pod) == Some(enrolled))?;
        }
        Ok(())
    }

    /// Takes a pod into the mesh, or out of it.
    ///
    /// # Errors
    ///
    /// As [`Mesh::annotate`].
    pub fn enrol(&self, pod: &str, enrolled: bool) -> Result<()> {
        self.annotate(pod, "malla.dev/mesh", if enrolled { "enabled" } else { "disabled" })
    }

    /// Puts other pods behind a service.
    ///
    /// # Errors
    ///
    /// Fails if the manifest cannot be written.
    pub fn endpoints(&self, service: &str, pods: &[&str]) -> Result<()> {
        let found = self.services.iter().find(|(spec, _)| spec.name == service);
        let (spec, addresses) = found.with_context(|| format!("no service {service}"))?;
        let pods: Vec<&Pod> = pods.iter().map(|name| self.pod(name)).collect();
        self.manifests.service(spec, addresses, &pods)
    }

    /// Describes a service anew, at the addresses that it has.
    ///
    /// # Errors
    ///
    /// Fails if there is none of its name, or the manifest cannot be written.
    pub fn change_service(&self, spec: &ServiceSpec) -> Result<()> {
        let found = self.services.iter().find(|(known, _)| known.name == spec.name);
        let (_, addresses) = found.with_context(|| format!("no service {}", spec.name))?;
        let pods: Vec<&Pod> = spec.pods.iter().map(|name| self.pod(name)).collect();
        self.manifests.service(spec, addresses, &pods)
    }

    /// Deletes a pod's manifest; its namespace stays until the mesh goes.
    ///
    /// # Errors
    ///
    /// Fails if there is none.
    pub fn delete_pod_manifest(&self, pod: &str) -> Result<()> {
        let pod = self.pod(pod);
        self.manifests.remove(&pod_file(pod.namespace(), pod.name()))
    }

    /// Has the pod `name` go, which lives in the namespace of `from`, and another one come that has its name
    /// and addresses, a UID of its own, and the namespace and service account of the pod `to`, which is
    /// described no more.
    ///
    /// # Errors
    ///
    /// Fails if a manifest cannot be written, or the system refuses.
    pub fn succeed_pod(&self, name: &str, from: &str, to: &str) -> Result<()> {
        let (pod, new) = (self.pod(name), self.pod(to));
        let file = pod_file(new.namespace(), new.name());
        if self.manifests.dir().join(format!("{file}.yaml")).exists() {
            self.manifests.remove(&file)?;
        }
        self.move_addresses(pod, from, to)?;
        let uid = format!("{}-{}", new.uid(), NEXT.fetch_add(1, Ordering::Relaxed));
        let spec = pod.spec().service_account(&new.spec().service_account);
        self.manifests.pod_as(&spec, pod, &uid, new.netns())
    }

    /// Attaches somebody else's `sock_ops` program behind the agents', until what is returned is dropped: it
    /// asks for callbacks of its own when a connection to this port begins, and takes away those that others
    /// asked for.
    ///
    /// # Errors
    ///
    /// Fails if the system refuses.
    pub fn take_callbacks(&self, port: u16) -> Result<OwnedFd> {
        // Code, registers, offset, immediate: `struct bpf_insn`.
        let instruction = |code: u64, dst: u64, src: u64, offset: u64, immediate: u32| {
            code | dst << 8 | src << 12 | offset << 16 | u64::from(immediate) << 32
        };
        let port = u32::from(port.to_be()) << 16; // As `bpf_sock_ops.remote_port` has it.
        let program = [
            instruction(0x61, 2, 1, 0, 0),  // r2 = ctx->op
            instruction(0x55, 2, 0, 4, 3),  // unless it is BPF_SOCK_OPS_TCP_CONNECT_CB, end
            instruction(0x61, 2, 1, 64, 0), // r2 = ctx->remote_port
            instruction(0x56, 2, 0, 2, port),
            instruction(0xb7, 2, 0, 0, 1), // r2 = BPF_SOCK_OPS_RTO_CB_FLAG
            instruction(0x85, 0, 0, 0, 59), // bpf_sock_ops_cb_flags_set(ctx, r2)
            instruction(0xb7, 0, 0, 0, 1), // return 1
            instruction(0x95, 0, 0, 0, 0),
        ];
        let cgroup = fs::File::open(self.cgroup.path()).context("open the cgroup")?;
        sys::attach_sock_ops(&cgroup, &program).context("attach a sock_ops program")
    }

    /// Changes the annotations of a namespace.
    ///
    /// # Errors
    ///
    /// Fails if the manifest cannot be written.
    pub fn annotate_namespace(&self, name: &str, annotations: &[(&str, &str)]) -> Result<()> {
        let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        let annotations: Vec<_> = annotations.iter().map(own).collect();
        self.manifests.namespace(name, &annotations)
    }

    /// Leaves everything running when this process ends. `cargo xtask clean` removes it.
    pub fn keep(self) {
        std::mem::forget(self);
    }

    fn describe(&self, builder: &Builder) -> Result<()> {
        for (name, annotations) in &builder.namespaces {
            self.manifests.namespace(name, annotations)?;
        }
        self.manifests.nodes(&self.nodes, &builder.zones)?;
        for pod in &self.pods {
            self.manifests.pod(&pod.spec(), pod, pod.netns())?;
        }
        for (spec, service) in &self.services {
            let pods: Vec<&Pod> = spec.pods.iter().map(|name| self.pod(name)).collect();
            self.manifests.service(spec, service, &pods)?;
        }
        Ok(())
    }

    fn start_agents(&mut self, builder: &Builder) -> Result<()> {
        init_ca(&self.ca_dir, TRUST_DOMAIN)?;
        for node in &mut self.nodes {
            let dir = self.state.0.join(format!("node-{}", node.name));
            let own_ca = builder.own_ca.iter().find(|(name, _)| *name == node.name);
            let (ca_dir, trust_domain) = match own_ca {
                None => (self.ca_dir.clone(), TRUST_DOMAIN),
                Some((_, trust_domain)) => {
                    init_ca(&dir.join("ca"), trust_domain)?;
                    (dir.join("ca"), trust_domain.as_str())
                }
            };
            let files = AgentFiles {
                dir,
                manifests: self.manifests.dir().to_owned(),
                ca_dir,
                trust_domain: trust_domain.to_owned(),
                cgroup: self.cgroup.path().to_owned(),
            };
            let netns = Arc::clone(&node.netns);
            node.agent = Some(Agent::start(&node.name, netns, files, builder)?);
        }
        for node in &mut self.nodes {
            if let Some(agent) = &mut node.agent {
                agent.wait_until_ready()?;
            }
        }
        Ok(())
    }
}

impl Node {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its IPv4 address.
    pub fn v4(&self) -> Ipv4Addr {
        self.v4
    }

    /// Its IPv6 address.
    pub fn v6(&self) -> Ipv6Addr {
        self.v6
    }

    /// Whether it has an address of this family.
    pub(crate) fn has(&self, family: Family) -> bool {
        self.only.is_none_or(|only| only == family)
    }

    /// The addresses that it has.
    pub(crate) fn ips(&self) -> impl Iterator<Item = IpAddr> {
        let all = [(Family::V4, IpAddr::from(self.v4)), (Family::V6, self.v6.into())];
        all.into_iter().filter_map(|(family, ip)| self.has(family).then_some(ip))
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Writes a setting of its network namespace, such as `net/ipv4/tcp_mtu_probing`.
    ///
    /// # Errors
    ///
    /// Fails if there is no such setting, or no such value of it.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.netns.run(|| sysctl(key, value))
    }

    /// The same namespace, for who outlives the borrow.
    pub(crate) fn shared_netns(&self) -> Arc<Netns> {
        Arc::clone(&self.netns)
    }

    /// The largest packet of its links.
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// The link to the node that was described `index`th, as `tcpdump` and `ip` call it.
    pub fn link_to(&self, index: usize) -> String {
        format!("to-{index}")
    }
}

impl Service {
    /// Its IPv4 cluster address.
    pub fn v4_ip(&self) -> Ipv4Addr {
        self.v4
    }

    /// Its IPv6 cluster address.
    pub fn v6_ip(&self) -> Ipv6Addr {
        self.v6
    }

    /// Its IPv4 cluster address with a port.
    pub fn v4(&self, port: u16) -> SocketAddr {
        (self.v4, port).into()
    }

    /// Its IPv6 cluster address with a port.
    pub fn v6(&self, port: u16) -> SocketAddr {
        (self.v6, port).into()
    }

    /// Its cluster address of this family with a port.
    pub fn addr(&self, family: Family, port: u16) -> SocketAddr {
        match family {
            Family::V4 => self.v4(port),
            Family::V6 => self.v6(port),
        }
    }
}

impl StateDir {
    /// Keeps what the agents logged, for whoever wants to know why a test failed: in `$MALLA_LOGS`,
    /// by the name of the test. No directories are made: this is root, and whoever is not root and
    /// called it through `sudo` could not remove them.
    fn save_logs(&self) -> Result<()> {
        let Some(logs) = std::env::var_os("MALLA_LOGS") else {
            return Ok(());
        };
        let test = thread::current().name().unwrap_or("main").replace(':', "-");
        let id = self.0.file_name().context("no name")?.display().to_string();
        for entry in fs::read_dir(&self.0)? {
            let dir = entry?;
            let node = dir.file_name().display().to_string();
            for name in ["agent.log", "access.log"] {
                let log = dir.path().join(name);
                if log.is_file() {
                    fs::copy(&log, Path::new(&logs).join(format!("{test}-{id}.{node}.{name}")))?;
                }
            }
        }
        Ok(())
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        // A log that cannot be kept is no reason to leave the rest behind.
        self.save_logs().ok();
        fs::remove_dir_all(&self.0).ok();
    }
}

/// Makes a certificate authority in `dir`.
///
/// # Errors
///
/// Fails if there is one already.
pub fn init_ca(dir: &Path, trust_domain: &str) -> Result<()> {
    let mut command = Command::new(binary()?);
    command.args(["ca", "init", "--trust-domain", trust_domain, "--dir"]).arg(dir);
    let output = command.output().context("mesh-agent ca init")?;
    if !output.status.success() {
        bail!("mesh-agent ca init: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
