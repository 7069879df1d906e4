//! The command line. Parsing ends here: past this file every value has its final type and unit.
//!
//! Exit codes: 0 ok, 1 a problem was found, 2 wrong usage, 3 no agent answered.

pub mod ask;
pub mod check;
pub mod output;
pub mod parts;

use std::fmt;
use std::fs;
use std::net::SocketAddr;
use std::num::{NonZeroU16, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum, value_parser};
use clap_complete::Shell;
use mesh_core::balance::Policy;
use mesh_core::spiffe::TrustDomain;

use self::output::Format;
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
    /// Report whether this kernel can run the mesh, and what is missing. Changes nothing.
    Check(Check),
    /// Detach every program and remove pinned maps: the way out after a crash.
    Detach(Detach),
    /// A certificate authority in a directory, for running without a cluster.
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
    Status(Ask),
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
    /// Show the log level, or change it until the agent ends.
    Log(Log),
    /// Version of this program, and of the agent that runs.
    Version(Ask),
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

/// Every flag can be set in the environment as `MESH_<FLAG>`.
#[derive(Clone, Debug, Args)]
pub struct Run {
    /// This node's name, as pods have it in `spec.nodeName`. A wrong name means no pods here.
    #[arg(long, env = "MESH_NODE", value_name = "NAME")]
    pub node: String,

    /// Directory of Kubernetes YAML: Namespace, Node, Pod, Service, EndpointSlice. Changes are
    /// followed; a file that is wrong leaves the last good state in use.
    #[arg(long, env = "MESH_MANIFESTS", value_name = "DIR")]
    pub manifests: PathBuf,

    /// Directory of the certificate authority, made by `mesh-agent ca init`. Agents that do not
    /// share a root refuse each other.
    #[arg(long, env = "MESH_CA_DIR", value_name = "DIR")]
    pub ca_dir: PathBuf,

    /// Trust domain of this mesh. Must be the one that the CA was made for.
    #[arg(long, env = "MESH_TRUST_DOMAIN", value_name = "NAME", default_value = "cluster.local")]
    pub trust_domain: TrustDomain,

    /// cgroup v2 directory whose processes are captured; enrolment narrows it to pods.
    #[arg(long, env = "MESH_CGROUP", value_name = "DIR", default_value = DEFAULT_CGROUP)]
    pub cgroup: PathBuf,

    /// Directory below a bpf file system where maps and links are pinned. Two agents with one
    /// directory would take each other's programs.
    #[arg(long, env = "MESH_BPFFS", value_name = "DIR", default_value = DEFAULT_BPFFS)]
    pub bpffs: PathBuf,

    /// TCP and UDP port of this node where other agents reach this one. The same on every node.
    #[arg(long, env = "MESH_TUNNEL_PORT", value_name = "PORT", default_value = "15019")]
    pub tunnel_port: NonZeroU16,

    /// Serves `/metrics`.
    #[arg(long, env = "MESH_METRICS_ADDR", value_name = "ADDR", default_value = "[::]:15020")]
    pub metrics_addr: SocketAddr,

    /// Serves `/healthz/ready` and `/healthz/live`.
    #[arg(long, env = "MESH_READY_ADDR", value_name = "ADDR", default_value = "[::]:15021")]
    pub ready_addr: SocketAddr,

    #[command(flatten)]
    #[expect(missing_docs, reason = "clap would show it as help")]
    pub admin: Admin,

    /// What carries tunnels. `auto` takes lanes, falls back to what passes, and says so.
    #[arg(long, env = "MESH_CARRIER", value_enum, default_value_t)]
    pub carrier: CarrierChoice,

    /// How an endpoint of a service is chosen, for each connection.
    #[arg(long, env = "MESH_BALANCE", value_enum, default_value_t)]
    pub balance: Balance,

    /// Connections that this agent holds at once. Past it a pod's own wait in the kernel's queues, and
    /// those that come through tunnels are refused as overloaded: too low makes clients wait or fail,
    /// too high lets pods and peers use up memory and file descriptors.
    #[arg(long, env = "MESH_MAX_CONNECTIONS", value_name = "N", default_value = "65536")]
    pub max_connections: NonZeroUsize,

    /// Most pods of this node that can be enrolled. Changing it moves the kernel's maps at the next
    /// start. Too low leaves pods out of the mesh, which the agent then is not ready for.
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

    /// Threads that carry connections [default: one for each CPU that this process may use].
    #[arg(long, env = "MESH_WORKERS", value_name = "N")]
    pub workers: Option<NonZeroUsize>,

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

const DEFAULT_CGROUP: &str = "/sys/fs/cgroup";
const DEFAULT_BPFFS: &str = "/sys/fs/bpf/malla";

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

/// Asks a running agent.
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
}

/// `mesh-agent check`.
#[derive(Clone, Debug, Args)]
pub struct Check {
    /// cgroup v2 directory that `run` would attach to.
    #[arg(long, env = "MESH_CGROUP", value_name = "DIR", default_value = DEFAULT_CGROUP)]
    pub cgroup: PathBuf,

    /// Directory below a bpf file system that `run` would pin to.
    #[arg(long, env = "MESH_BPFFS", value_name = "DIR", default_value = DEFAULT_BPFFS)]
    pub bpffs: PathBuf,

    /// How to print the report.
    #[arg(long, short, value_enum, default_value_t)]
    pub output: Format,
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
}

/// `mesh-agent detach`.
#[derive(Clone, Debug, Args)]
pub struct Detach {
    /// Directory where the agent pinned its maps and links.
    #[arg(long, env = "MESH_BPFFS", value_name = "DIR", default_value = DEFAULT_BPFFS)]
    pub bpffs: PathBuf,
}

/// `mesh-agent ca`.
#[derive(Clone, Debug, Subcommand)]
pub enum Ca {
    /// Make a root certificate and its key. Never overwrites one.
    Init {
        /// Where to.
        #[arg(long, env = "MESH_CA_DIR", value_name = "DIR")]
        dir: PathBuf,
        /// Which trust domain the root is for.
        #[arg(
            long,
            env = "MESH_TRUST_DOMAIN",
            value_name = "NAME",
            default_value = "cluster.local"
        )]
        trust_domain: TrustDomain,
    },
    /// Show the root certificate and the trusted bundle.
    Show {
        /// Where from.
        #[arg(long, env = "MESH_CA_DIR", value_name = "DIR")]
        dir: PathBuf,
        /// How to print it.
        #[arg(long, short, value_enum, default_value_t)]
        output: Format,
    },
}

fn seconds(text: &str) -> Result<Duration, std::num::ParseIntError> {
    text.parse().map(Duration::from_secs)
}

/// A flag whose value cannot work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlagProblem {
    /// The flag.
    pub flag: &'static str,
    /// What is wrong with its value.
    pub problem: String,
    /// What to do.
    pub remedy: String,
}

impl fmt::Display for FlagProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { flag, problem, remedy } = self;
        write!(f, "{flag}: {problem}: {remedy}")
    }
}

impl Run {
    /// Everything that clap cannot see, all at once: values that do not go together, directories
    /// that are not there.
    pub fn problems(&self) -> Vec<FlagProblem> {
        let mut found = Vec::new();
        let mut note = |flag, problem: String, remedy: &str| {
            found.push(FlagProblem { flag, problem, remedy: remedy.to_owned() });
        };
        if !is_node_name(&self.node) {
            let problem = format!("`{}` is not the name of a Kubernetes node", self.node);
            note("--node", problem, "lower-case letters, digits, - and ., 253 characters at most");
        }
        if !self.manifests.is_dir() {
            let problem = format!("{} is not a directory", self.manifests.display());
            note("--manifests", problem, "create it; it may be empty");
        }
        if let Err(error) = fs::metadata(self.ca_dir.join("root.pem")) {
            let problem = format!("no root.pem in {} ({error})", self.ca_dir.display());
            note("--ca-dir", problem, "make one with `mesh-agent ca init --dir DIR`");
        }
        // Every cgroup v2 directory has this file, and no v1 directory does.
        if !self.cgroup.join("cgroup.controllers").exists() {
            let problem = format!("{} is not a cgroup v2 directory", self.cgroup.display());
            note("--cgroup", problem, "`findmnt -t cgroup2` shows where there is one");
        }
        let ports = [
            ("--tunnel-port", self.tunnel_port.get()),
            ("--metrics-addr", self.metrics_addr.port()),
            ("--ready-addr", self.ready_addr.port()),
        ];
        for (index, (flag, port)) in ports.iter().enumerate() {
            if let Some((other, _)) = ports[..index].iter().find(|(_, taken)| taken == port)
                && *port != 0
            {
                note(flag, format!("port {port} is that of {other} too"), "choose another port");
            }
        }
        let within = |value: Duration, range: std::ops::RangeInclusive<u64>| {
            range.contains(&value.as_secs())
        };
        if !within(self.connect_timeout, 1..=300) {
            let problem = format!("{} s", self.connect_timeout.as_secs());
            note("--connect-timeout-s", problem, "1 to 300");
        }
        if !within(self.drain, 0..=86_400) {
            note("--drain-s", format!("{} s", self.drain.as_secs()), "0 to 86400, a day");
        }
        if !within(self.cert_lifetime, 2..=31_536_000) {
            let problem = format!("{} s", self.cert_lifetime.as_secs());
            note("--cert-lifetime-s", problem, "2 to 31536000, a year");
        }
        if self.workers.is_some_and(|workers| workers.get() > MAX_WORKERS) {
            note("--workers", "too many".into(), "1 to 1024, one for each CPU is best");
        }
        if self.metrics_series_limit == 0 {
            let remedy = "at least 1; to save series leave labels out with --metrics-drop-labels";
            note("--metrics-series-limit", "no series at all".into(), remedy);
        }
        found
    }
}

const MAX_WORKERS: usize = 1024;

/// RFC 1123 subdomain, as Kubernetes demands of a node's name.
fn is_node_name(name: &str) -> bool {
    let is_label = |label: &str| {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        !label.is_empty()
            && label.bytes().all(allowed)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;
    use clap::error::ErrorKind;

    use super::*;
    use crate::capture::CaptureConfig;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    fn run(line: &str) -> Box<Run> {
        match parse(line).unwrap().command {
            Command::Run(run) => run,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_has_the_documented_defaults() {
        let run = run("mesh-agent run --node n1 --manifests /m --ca-dir /c");
        assert_eq!(run.trust_domain.as_str(), "cluster.local");
        assert_eq!(run.cgroup, PathBuf::from("/sys/fs/cgroup"));
        assert_eq!(run.bpffs, PathBuf::from("/sys/fs/bpf/malla"));
        assert_eq!(run.tunnel_port.get(), 15019);
        assert_eq!(run.metrics_addr, "[::]:15020".parse().unwrap());
        assert_eq!(run.ready_addr, "[::]:15021".parse().unwrap());
        assert_eq!(run.admin.socket, PathBuf::from("/run/malla/admin.sock"));
        assert_eq!(run.carrier, CarrierChoice::Auto);
        assert_eq!(run.workers, None);
        let sizes = CaptureConfig::default();
        assert_eq!(run.max_pods, sizes.max_pods);
        assert_eq!(run.max_destinations, sizes.max_destinations);
        assert_eq!(run.max_flows, sizes.max_flows);
        assert_eq!(run.connect_timeout, Duration::from_secs(5));
        assert_eq!(run.drain, Duration::from_secs(25));
        assert_eq!(run.cert_lifetime, Duration::from_secs(86_400));
        assert_eq!(run.access_log, AccessLogFormat::Text);
        assert_eq!(run.log_format, LogFormat::Text);
        assert_eq!(run.log, "info");
    }

    #[test]
    fn every_flag_of_run_can_be_set_in_the_environment() {
        let command = Cli::command();
        let run = command.find_subcommand("run").unwrap();
        for arg in run.get_arguments().filter(|arg| arg.get_long() != Some("help")) {
            let Some(long) = arg.get_long().filter(|long| *long != "version") else {
                continue;
            };
            let expected = format!("MESH_{}", long.to_uppercase().replace('-', "_"));
            assert_eq!(arg.get_env().and_then(|env| env.to_str()), Some(&*expected), "--{long}");
            assert!(arg.get_help().is_some(), "--{long} has no help");
        }
    }

    #[test]
    fn label_groups_are_a_list() {
        let run = run(
            "mesh-agent run --node n1 --manifests /m --ca-dir /c --metrics-drop-labels principal,app",
        );
        assert_eq!(run.metrics_drop_labels, [LabelGroup::Principal, LabelGroup::App]);
    }

    #[test]
    fn wrong_usage_ends_with_2() {
        for line in [
            "mesh-agent",
            "mesh-agent run",
            "mesh-agent run --node n1 --manifests /m --ca-dir /c --tunnel-port 0",
            "mesh-agent run --node n1 --manifests /m --ca-dir /c --carrier pigeon",
            "mesh-agent run --node n1 --manifests /m --ca-dir /c --drain-s soon",
            "mesh-agent run --node n1 --manifests /m --ca-dir /c --log debgu",
            "mesh-agent run --node n1 --manifests /m --ca-dir /c --trust-domain A",
            "mesh-agent status -o xml",
            "mesh-agent log debgu",
        ] {
            let error = parse(line).unwrap_err();
            assert_ne!(error.kind(), ErrorKind::DisplayHelp, "{line}");
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn all_problems_of_run_are_told_at_once_with_flag_and_remedy() {
        let run = run("mesh-agent run --node N_1 --manifests /nowhere --ca-dir /nowhere \
                       --cgroup /nowhere --metrics-addr 127.0.0.1:15019 --connect-timeout-s 0 \
                       --drain-s 90000 --cert-lifetime-s 1 --workers 2000 --metrics-series-limit 0");
        let flags: Vec<_> = run.problems().iter().map(|problem| problem.flag).collect();
        let expected = [
            "--node",
            "--manifests",
            "--ca-dir",
            "--cgroup",
            "--metrics-addr",
            "--connect-timeout-s",
            "--drain-s",
            "--cert-lifetime-s",
            "--workers",
            "--metrics-series-limit",
        ];
        assert_eq!(flags, expected);
        assert!(run.problems().iter().all(|problem| !problem.remedy.is_empty()));
    }

    #[test]
    fn node_names_are_those_of_kubernetes() {
        for (name, is_one) in [
            ("node-1", true),
            ("ip-10-0-0-1.eu-west-1.compute.internal", true),
            ("", false),
            ("Node", false),
            ("-a", false),
            ("a..b", false),
            ("a_b", false),
        ] {
            assert_eq!(is_node_name(name), is_one, "{name}");
        }
    }
}
