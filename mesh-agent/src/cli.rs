//! The command line. Parsing ends here: past this file every value has its final type and unit.
//!
//! Exit codes: 0 ok, 1 a problem was found, 2 wrong usage, 3 no agent answered.

pub mod ask;
mod authority;
pub mod check;
mod environment;
pub mod node;
pub mod output;
pub mod parts;
mod problems;
mod tables;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::num::{NonZeroU16, NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum, value_parser};
use clap_complete::Shell;
use mesh_core::addr::Cidr;
use mesh_core::balance::Policy;
use mesh_core::spiffe::TrustDomain;

pub use self::authority::{Ca, CaRun};
pub use self::check::Check;
pub use self::environment::{UnknownVariable, unknown_variables};
use self::output::Format;
pub use self::problems::{FlagProblem, cgroup2};
use crate::discovery::owner::DaemonSetName;
use crate::identity::ca::BUNDLE;
use crate::identity::kubernetes::SIGNER;
use crate::telemetry::{AccessLogFormat, DEFAULT_SERIES_LIMIT, LabelGroup, LogFormat, parse_level};
use crate::tunnel::CarrierChoice;

/// Carries this node's pod traffic over mutual TLS, without sidecars.
#[derive(Debug, Parser)]
#[command(name = "mesh-agent", version, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Attach the eBPF programs and carry traffic until SIGTERM.
    Run(Box<Run>),
    /// Report whether this kernel and this node can run the mesh, and what is missing. Changes nothing.
    Check(Box<Check>),
    /// Detach every program and remove pinned maps: the way out after a crash. Refuses while an agent runs.
    Detach(Detach),
    /// A certificate authority: of a cluster, or in a directory for running without one.
    #[command(subcommand)]
    Ca(Ca),
    /// Print the completion script of a shell.
    Completion {
        /// Which shell.
        shell: Shell,
    },
    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it as help")]
    Question(Question),
}

/// What a running agent can be asked.
#[derive(Debug, Subcommand)]
pub enum Question {
    /// Whether the agent works, and on what.
    Status(AskAgent),
    /// The pods that are known, and whether they are enrolled.
    Workloads(Ask),
    /// The services that are known.
    Services(Ask),
    /// The certificates that are held, and the trusted roots.
    Certs(Ask),
    /// The connections that are open.
    Connections(Ask),
    /// The tunnels to other nodes.
    Tunnels(Ask),
    /// All of these and the effective configuration, for a report of a problem: names, addresses and identities,
    /// and no secrets. JSON, unless it is to be YAML.
    Dump(AskAgent),
    /// Show the log level, or change it until the agent ends.
    Log(Log),
    /// Version of this program, and of the agent that runs.
    Version(AskAgent),
}

/// How an endpoint is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, ValueEnum)]
pub enum Balance {
    /// The less loaded of two drawn at random (P2C over peak EWMA).
    #[default]
    LeastLoaded,
    /// The one chosen longest ago.
    RoundRobin,
    /// Any.
    Random,
}

impl Balance {
    /// The word, as on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::LeastLoaded => "least-loaded",
            Self::RoundRobin => "round-robin",
            Self::Random => "random",
        }
    }
}

impl From<Balance> for Policy {
    fn from(balance: Balance) -> Self {
        match balance {
            Balance::LeastLoaded => Self::LeastLoaded,
            Balance::RoundRobin => Self::RoundRobin,
            Balance::Random => Self::Random,
        }
    }
}

/// Something that is there or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Not there.
    #[default]
    Off,
    /// There.
    On,
}

impl Switch {
    /// The word, as on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
        }
    }

    /// Whether it is there.
    pub fn is_on(self) -> bool {
        self == Self::On
    }
}

/// Every flag can be set in the environment as `MESH_<FLAG>`.
#[derive(Clone, Debug, Args)]
pub struct Run {
    /// This node's name, as pods have it in `spec.nodeName`. A wrong name means no pods here.
    #[arg(long, env = "MESH_NODE", value_name = "NAME")]
    pub node: String,

    /// Directory of Kubernetes YAML: Namespace, Node, Pod, Service, EndpointSlice. Changes are
    /// followed; a file that is wrong leaves the last good state in use. Without it the Kubernetes API
    /// is followed.
    #[arg(long, env = "MESH_MANIFESTS", value_name = "DIR")]
    pub manifests: Option<PathBuf>,

    /// How to reach the Kubernetes API [default: as a pod does, by its service account].
    #[arg(long, env = "MESH_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// The DaemonSet that this agent belongs to. If that is deleted the agent takes back what it wrote on
    /// pods, and everything out of the kernel when it ends, and pods talk in plain text. Without it the
    /// programs stay, and pods are refused until another agent is there.
    #[arg(
        long,
        env = "MESH_DAEMONSET",
        value_name = "NAMESPACE/NAME",
        conflicts_with = "manifests"
    )]
    pub daemonset: Option<DaemonSetName>,

    /// What the cgroup of the node's kubelet may be called: the first of these that is there is it. Its
    /// connections reach the applications of strict pods too, which its probes need, and with it those of any
    /// other process in that cgroup.
    #[arg(
        long,
        env = "MESH_KUBELET_CGROUP",
        value_name = "NAME,...",
        value_delimiter = ',',
        default_value = DEFAULT_KUBELET_CGROUP
    )]
    pub kubelet_cgroup: Vec<String>,

    /// How long connections into the mesh are refused of a new pod that the Kubernetes API has not told
    /// of yet; 0: not at all. Too short and, while that API is slow, a pod of the mesh talks in plain text;
    /// too long and, while it is down, others cannot talk to the mesh when they start.
    #[arg(long = "unknown-pods-s", env = "MESH_UNKNOWN_PODS_S", value_name = "N", default_value = "5", value_parser = seconds)]
    pub unknown_pods: Duration,

    /// Blocks of addresses that pods of other nodes have, separated by commas: for networks whose Nodes do
    /// not say so (`spec.podCIDRs`). A pod that no Service selects is then found by its address. Too few
    /// and a pod that is dialled so is reached in plain text; too many and the API is asked for addresses
    /// that are no pod's.
    #[arg(
        long = "pod-cidrs",
        env = "MESH_POD_CIDRS",
        value_name = "LIST",
        value_delimiter = ',',
        conflicts_with = "manifests"
    )]
    pub pod_cidrs: Vec<Cidr>,

    /// Directory of the certificate authority, made by `mesh-agent ca init`. Agents that do not
    /// share a root refuse each other. Without it certificates are asked for over the Kubernetes API.
    #[arg(long, env = "MESH_CA_DIR", value_name = "DIR")]
    pub ca_dir: Option<PathBuf>,

    /// Who signs, when certificates are asked for over the Kubernetes API: `mesh-agent ca run`, or
    /// somebody else who certifies SPIFFE URIs as they are asked for.
    #[arg(long, env = "MESH_SIGNER", value_name = "NAME", default_value = SIGNER)]
    pub signer: String,

    /// Roots to trust, in PEM; changes are followed [default: bundle.pem of --ca-dir, or without that
    /// /etc/malla/trust/bundle.pem]. Peers below other roots are refused.
    #[arg(long, env = "MESH_TRUST_BUNDLE", value_name = "FILE")]
    pub trust_bundle: Option<PathBuf>,

    /// Trust domain of this mesh. Must be the one that the CA was made for.
    #[arg(long, env = "MESH_TRUST_DOMAIN", value_name = "NAME", default_value = "cluster.local")]
    pub trust_domain: TrustDomain,

    /// cgroup v2 directory whose processes are captured; enrolment narrows it to pods. Where v1 is
    /// mounted, `unified` in it.
    #[arg(long, env = "MESH_CGROUP", value_name = "DIR", default_value = DEFAULT_CGROUP)]
    pub cgroup: PathBuf,

    /// Directory below a bpf file system where maps and links are pinned. Two agents with one
    /// directory would take each other's programs.
    #[arg(long, env = "MESH_BPFFS", value_name = "DIR", default_value = DEFAULT_BPFFS)]
    pub bpffs: PathBuf,

    /// TCP and UDP port of this node where other agents reach this one. The same on every node.
    #[arg(long, env = "MESH_TUNNEL_PORT", value_name = "PORT", default_value = DEFAULT_TUNNEL_PORT)]
    pub tunnel_port: NonZeroU16,

    /// Serves `/metrics`.
    #[arg(long, env = "MESH_METRICS_ADDR", value_name = "ADDR", default_value = DEFAULT_METRICS_ADDR)]
    pub metrics_addr: SocketAddr,

    /// Serves `/healthz/ready` and `/healthz/live`: to the node alone, since who keeps its connections there
    /// busy has the agent restarted.
    #[arg(long, env = "MESH_READY_ADDR", value_name = "ADDR", default_value = DEFAULT_READY_ADDR)]
    pub ready_addr: SocketAddr,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it as help")]
    pub admin: Admin,

    /// Where another agent of this node runs, wait until it drains, ready for that: for a DaemonSet that
    /// starts the new agent before it ends the old one. The two must have the same ports and
    /// --admin-socket. Without it a second agent refuses to start.
    #[arg(long, env = "MESH_STANDBY", value_enum, default_value_t)]
    pub standby: Switch,

    /// What carries tunnels. `auto` takes lanes, falls back to what passes, and says so.
    #[arg(long, env = "MESH_CARRIER", value_enum, default_value_t)]
    pub carrier: CarrierChoice,

    /// How an endpoint of a service is chosen, for each connection.
    #[arg(long, env = "MESH_BALANCE", value_enum, default_value_t)]
    pub balance: Balance,

    /// Connections that this agent holds at once, and direct ones that it follows. Past it a pod's own wait
    /// in the kernel's queues, those that come through tunnels are refused as overloaded, and further
    /// direct ones are carried: too low makes clients wait or fail,
    /// too high lets pods and peers use up memory and file descriptors.
    #[arg(long, env = "MESH_MAX_CONNECTIONS", value_name = "N", default_value = "65536")]
    pub max_connections: NonZeroUsize,

    /// Connections that a worker of this agent has to one identity on one node, and lanes that it keeps
    /// for one remote address. Further ones are refused as overloaded: too low fails clients of a busy
    /// service, too high lets one peer take what others need.
    #[arg(long, env = "MESH_MAX_CONNECTIONS_PER_PEER", value_name = "N", default_value = "16384")]
    pub max_connections_per_peer: NonZeroU32,

    /// MiB that QUIC peers may send before applications read it, all together; one peer half of it.
    /// Each QUIC connection takes one. Too little refuses connections and resets flows that nobody reads;
    /// too much lets applications that do not read use up the memory of the node.
    #[arg(long, env = "MESH_QUIC_MEMORY_MIB", value_name = "N", default_value = "1024")]
    pub quic_memory_mib: NonZeroU32,

    /// Most pods of this node that can be enrolled. Changing it moves the kernel's maps at the next
    /// start. Too low leaves pods out of the mesh, which `status` and `mesh_pods_not_enrolled` tell.
    #[arg(long, env = "MESH_MAX_PODS", value_name = "N", default_value = "1024", value_parser = value_parser!(u32).range(1..=65_536))]
    pub max_pods: u32,

    /// Most addresses of the mesh, of services and of pods, that the kernel knows; 100 bytes each when
    /// used. Too low makes every pod capture everything, which costs the traffic that leaves the mesh.
    #[arg(long, env = "MESH_MAX_DESTINATIONS", value_name = "N", default_value = "65536", value_parser = value_parser!(u32).range(1..=16_777_216))]
    pub max_destinations: u32,

    /// Most connections between `connect()` and the agent's `accept()`, 110 bytes of the kernel's memory
    /// each. Too low and a flood of connections resets others.
    #[arg(long, env = "MESH_MAX_FLOWS", value_name = "N", default_value = "65536", value_parser = value_parser!(u32).range(1..=16_777_216))]
    pub max_flows: u32,

    /// Most decisions that the kernel keeps so that pods of this node reach each other without the
    /// agent: one for each pod and destination, 1,100 bytes when used. Past it the agent carries.
    #[arg(long, env = "MESH_MAX_VERDICTS", value_name = "N", default_value = "16384", value_parser = value_parser!(u32).range(1..=1_048_576))]
    pub max_verdicts: u32,
    /// Skips the node's netfilter, and with it every NetworkPolicy or CNI rule enforced there, for TCP
    /// between two enrolled pods of this node: their packets go from veth to veth (`bpf_redirect_peer`),
    /// which is faster than routing them. For pods plugged in by a plain veth that carries nobody else's
    /// program, filter or queue; `status` says of each pod whether it is. Needs Linux 6.6. Changing it
    /// moves the kernel's maps at the next start.
    #[arg(long, env = "MESH_REDIRECT_PEER", value_enum, default_value_t)]
    pub redirect_peer: Switch,

    /// Threads that carry connections [default: one for each CPU that this process may use].
    #[arg(long, env = "MESH_WORKERS", value_name = "N")]
    pub workers: Option<NonZeroUsize>,

    /// Microseconds that a worker whose work comes in short intervals goes on looking for more before
    /// it sleeps; 0 never. Waking a sleeping core takes longer than all else that a mesh adds to a
    /// small exchange. It costs CPU while small exchanges follow each other at shorter intervals than
    /// this, at most the whole of a core that nobody else wants.
    #[arg(long = "poll-us", env = "MESH_POLL_US", value_name = "MICROSECONDS", default_value = "50", value_parser = microseconds)]
    pub poll: Duration,

    /// Seconds that making a tunnel or reaching the application may take. Too low refuses what is
    /// only slow; too high makes clients wait for what is dead.
    #[arg(long = "connect-timeout-s", env = "MESH_CONNECT_TIMEOUT_S", value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub connect_timeout: Duration,

    /// Seconds that connections may finish after SIGTERM. Keep below the pod's
    /// `terminationGracePeriodSeconds`, or the kubelet cuts them instead.
    #[arg(long = "drain-s", env = "MESH_DRAIN_S", value_name = "SECONDS", default_value = "25", value_parser = seconds)]
    pub drain: Duration,

    /// Seconds that a workload's certificate is valid. It is renewed at half of that, so a CA that
    /// is away for longer stops new tunnels.
    #[arg(long = "cert-lifetime-s", env = "MESH_CERT_LIFETIME_S", value_name = "SECONDS", default_value = "86400", value_parser = seconds)]
    pub cert_lifetime: Duration,

    /// One record on standard output for each connection that ended.
    #[arg(long, env = "MESH_ACCESS_LOG", value_enum, default_value_t)]
    pub access_log: AccessLogFormat,

    /// Most label sets of the `istio_tcp_*` metrics; what exceeds them is counted as `unknown`.
    #[arg(long, env = "MESH_METRICS_SERIES_LIMIT", value_name = "N", default_value_t = DEFAULT_SERIES_LIMIT)]
    pub metrics_series_limit: usize,

    /// Seconds for which the `istio_tcp_*` metrics of a deleted workload are shown to whoever scrapes; after that they go
    /// when they have been scraped once more. Longer than the scrape interval of the slowest.
    #[arg(long = "metrics-linger-s", env = "MESH_METRICS_LINGER_S", value_name = "SECONDS", default_value = "120", value_parser = seconds)]
    pub metrics_linger: Duration,

    /// The cluster's name in metrics.
    #[arg(long, env = "MESH_CLUSTER_NAME", value_name = "NAME", default_value = "Kubernetes")]
    pub cluster_name: String,

    /// Labels to leave out of the `istio_tcp_*` metrics, separated by commas.
    #[arg(long, env = "MESH_METRICS_DROP_LABELS", value_enum, value_delimiter = ',')]
    pub metrics_drop_labels: Vec<LabelGroup>,

    /// How the agent's own log is written, on standard error.
    #[arg(long, env = "MESH_LOG_FORMAT", value_enum, default_value_t)]
    pub log_format: LogFormat,

    /// off, error, warn, info, debug or trace, also for one module: info,mesh_agent::tunnel=debug.
    #[arg(long, env = "MESH_LOG", value_name = "LEVEL", default_value = "info", value_parser = parse_level)]
    pub log: String,
}

impl Run {
    /// Where the trusted roots are.
    pub fn bundle(&self) -> PathBuf {
        let own = || self.ca_dir.as_ref().map(|dir| dir.join(BUNDLE));
        self.trust_bundle.clone().or_else(own).unwrap_or_else(|| DEFAULT_TRUST_BUNDLE.into())
    }
}

/// Where the deployment mounts the ConfigMap `malla-trust`.
const DEFAULT_TRUST_BUNDLE: &str = "/etc/malla/trust/bundle.pem";
const DEFAULT_CGROUP: &str = "/sys/fs/cgroup";
const DEFAULT_BPFFS: &str = "/sys/fs/bpf/malla";
const DEFAULT_TUNNEL_PORT: &str = "15019";
const DEFAULT_METRICS_ADDR: &str = "[::]:15020";
const DEFAULT_READY_ADDR: &str = "127.0.0.1:15021";
const DEFAULT_KUBELET_CGROUP: &str =
    "kubelet.service,k3s.service,k3s-agent.service,rke2-server.service,rke2-agent.service";

/// Where the admin socket is.
#[derive(Clone, Debug, Args)]
pub struct Admin {
    /// Unix socket of the agent for `mesh-agent status` and its kin; only its owner may open it.
    #[arg(
        long = "admin-socket",
        env = "MESH_ADMIN_SOCKET",
        value_name = "PATH",
        default_value = "/run/malla/admin.sock"
    )]
    pub socket: PathBuf,
}

/// Asks a running agent about itself.
#[derive(Clone, Debug, Args)]
pub struct AskAgent {
    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it as help")]
    pub admin: Admin,

    /// How to print the answer. The keys of json and yaml are stable.
    #[arg(long, short, value_enum, default_value_t)]
    pub output: Format,
}

/// Asks a running agent for what it knows.
#[derive(Clone, Debug, Args)]
pub struct Ask {
    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it as help")]
    pub admin: Admin,

    /// How to print the answer. The keys of json and yaml are stable.
    #[arg(long, short, value_enum, default_value_t)]
    pub output: Format,

    /// Only what belongs to this namespace.
    #[arg(long, short, value_name = "NAME")]
    pub namespace: Option<String>,

    /// What belongs to any, as without -n.
    #[arg(long, short = 'A', conflicts_with = "namespace")]
    pub all_namespaces: bool,
}

/// `mesh-agent log`.
#[derive(Clone, Debug, Args)]
pub struct Log {
    /// The new level; without it the present one is shown.
    #[arg(value_parser = parse_level)]
    pub level: Option<String>,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it as help")]
    pub admin: Admin,

    /// How to print the level. The keys of json and yaml are stable.
    #[arg(long, short, value_enum, default_value_t)]
    pub output: Format,
}

/// `mesh-agent detach`.
#[derive(Clone, Debug, Args)]
pub struct Detach {
    /// Directory where the agent pinned its maps and links.
    #[arg(long, env = "MESH_BPFFS", value_name = "DIR", default_value = DEFAULT_BPFFS)]
    pub bpffs: PathBuf,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it as help")]
    pub admin: Admin,

    /// How to print what was removed. The keys of json and yaml are stable.
    #[arg(long, short, value_enum, default_value_t)]
    pub output: Format,
}

fn microseconds(text: &str) -> Result<Duration, std::num::ParseIntError> {
    text.parse().map(Duration::from_micros)
}

fn seconds(text: &str) -> Result<Duration, std::num::ParseIntError> {
    text.parse().map(Duration::from_secs)
}
