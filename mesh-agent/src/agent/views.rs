//! What the agent tells of itself: to the admin socket, to the probes, to Prometheus.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Instant, SystemTime};

use arc_swap::ArcSwap;
use mesh_core::snapshot::{Snapshot, Workload};
use serde_json::json;
use tokio::sync::watch;

use super::connections::Connections;
use super::redirects::Redirected;
use super::shortfall::Shortfall;
use crate::admin::{self, view};
use crate::cli::Run;
use crate::discovery::Problem;
use crate::identity::store::{CertState, Identities};
use crate::node::{Node, Worker};
use crate::telemetry::{self, Direction, LogLevel, Readiness, Telemetry, TunnelNumbers};
use crate::tunnel::{self, TunnelStats};

/// Where answers are taken from.
#[derive(Debug)]
pub(super) struct Views {
    pub(super) started: Instant,
    pub(super) options: Run,
    pub(super) node: Arc<Node>,
    pub(super) identities: Arc<Identities>,
    pub(super) contexts: Vec<Arc<Worker>>,
    pub(super) stats: Arc<TunnelStats>,
    pub(super) problems: watch::Receiver<Arc<[Problem]>>,
    /// NetworkPolicies, which nobody enforces between pods of the mesh.
    pub(super) policies: watch::Receiver<usize>,
    pub(super) confirmed: Option<watch::Receiver<Option<tokio::time::Instant>>>,
    pub(super) shortfall: watch::Receiver<Shortfall>,
    pub(super) redirected: watch::Receiver<Redirected>,
    /// Whether there is a kubelet whose probes are to be recognised, and it is not found.
    pub(super) no_kubelet: watch::Receiver<bool>,
    /// What kernel and listeners follow. `node.known` is ahead of it while pods are being enrolled.
    pub(super) applied: ArcSwap<Snapshot>,
    pub(super) is_applied: AtomicBool,
    pub(super) applied_at: Mutex<Instant>,
    pub(super) direct: OnceLock<Connections>,
}

impl Views {
    /// A snapshot has taken effect in kernel and listeners. The same one may again, when something is
    /// tried another time: it does not get younger by that.
    pub(super) fn applied(&self, snapshot: Arc<Snapshot>) {
        if !Arc::ptr_eq(&self.applied.load(), &snapshot) {
            *self.applied_at.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
            self.applied.store(snapshot);
        }
        self.is_applied.store(true, Ordering::Release);
    }

    pub(super) fn readiness(self: Arc<Self>) -> Readiness {
        Arc::new(move || self.ready())
    }

    pub(super) fn telemetry_sources(self: Arc<Self>) -> telemetry::Sources {
        let [capture, pods, tunnels, certificates, snapshot, direct, lost] =
            std::array::from_fn(|_| Arc::clone(&self));
        telemetry::Sources {
            capture: Box::new(move || capture.node.capture.counters()),
            not_enrolled: Box::new(move || pods.shortfall.borrow().not_enrolled_by_reason()),
            tunnels: Box::new(move || tunnels.tunnel_numbers()),
            certificates: Box::new(move || {
                let held = certificates.identities.view(SystemTime::now());
                held.into_iter().filter_map(|cert| Some((cert.identity, cert.not_after?))).collect()
            }),
            snapshot: Box::new(move || telemetry::SnapshotState {
                age: snapshot.snapshot_age(),
                in_manifests: snapshot.problem_count(),
                problems: u64::try_from(snapshot.all_problems().len()).unwrap_or(u64::MAX),
                policies: u64::try_from(*snapshot.policies.borrow()).unwrap_or(u64::MAX),
            }),
            look_at_direct: Box::new(move || {
                if let Some(connections) = direct.direct.get() {
                    connections.look();
                }
            }),
            direct_events_lost: Box::new(move || lost.node.capture.direct_events_lost()),
        }
    }

    /// Direct connections are followed from now on.
    pub(super) fn follow_direct(&self, connections: Connections) {
        self.direct.get_or_init(|| connections);
    }

    pub(super) fn admin_sources(
        self: Arc<Self>,
        telemetry: Telemetry,
        log: LogLevel,
    ) -> admin::Sources {
        let [status, workloads, snapshot, certificates, tunnels, config] =
            std::array::from_fn(|_| Arc::clone(&self));
        admin::Sources {
            status: Box::new(move || status.status()),
            workloads: Box::new(move || workloads.workloads()),
            snapshot: Box::new(move || snapshot.applied.load_full()),
            certificates: Box::new(move || certificates.certificates()),
            tunnels: Box::new(move || tunnels.tunnels()),
            config: Box::new(move || config.config()),
            telemetry,
            log,
        }
    }

    /// Whether this agent does its work: the programs are attached and the manifests have taken effect,
    /// so every pod was tried once. A pod that cannot be enrolled is a problem of that pod: it must not
    /// take the whole node out of service, nor hold up an upgrade.
    fn ready(&self) -> Result<(), String> {
        if self.node.is_draining() {
            return Err("draining".into());
        }
        if !self.is_applied.load(Ordering::Acquire) {
            return Err(match self.confirmed {
                None => "the manifests have not taken effect yet",
                Some(_) => "the state of the cluster is not known yet",
            }
            .into());
        }
        if !self.identities.ready(SystemTime::now()) {
            return Err("a workload has no certificate".into());
        }
        let shortfall = self.shortfall.borrow();
        if let Some(why) = &shortfall.uncaptured {
            return Err(format!("destinations of the mesh may not be captured: {why}"));
        }
        Ok(())
    }

    /// What cannot be presented, and so refuses its pods' connections.
    fn missing_certificates(&self) -> impl Iterator<Item = view::ProblemView> {
        let all = self.identities.view(SystemTime::now()).into_iter();
        let missing = all.filter(|cert| cert.state == CertState::Unavailable);
        missing.map(|cert| view::ProblemView {
            place: cert.identity.to_string(),
            field: String::new(),
            message: format!(
                "no certificate: {}",
                cert.error.as_deref().unwrap_or("it has expired")
            ),
            remedy:
                "connections of its pods are refused until there is one: see `mesh-agent certs`"
                    .into(),
        })
    }

    /// Everything that somebody should look at.
    fn all_problems(&self) -> Vec<view::ProblemView> {
        let mut problems: Vec<_> = self.problems.borrow().iter().map(problem).collect();
        problems.extend(self.shortfall.borrow().problems());
        problems.extend(self.missing_certificates());
        if let Some(error) = self.identities.trust_problem() {
            problems.push(view::ProblemView {
                place: self.options.bundle().display().to_string(),
                field: String::new(),
                message: telemetry::chain(&*error),
                remedy: "the last good roots stay in force until the file is corrected".into(),
            });
        }
        if *self.no_kubelet.borrow() {
            problems.push(view::ProblemView {
                place: "the kubelet".into(),
                field: "--kubelet-cgroup".into(),
                message: format!(
                    "no cgroup of the node is called {} and has a process: strict pods refuse the kubelet's probes",
                    self.options.kubelet_cgroup.join(" or ")
                ),
                remedy: "name the cgroup that it runs in: `cat /proc/$(pidof kubelet)/cgroup`".into(),
            });
        }
        problems
    }

    fn status(&self) -> view::StatusView {
        let snapshot = self.applied.load_full();
        let ready = self.ready();
        let mut carriers = BTreeMap::new();
        for tunnel in self.all_tunnels() {
            let node = self.node_name(tunnel.peer.node);
            carriers.insert(node, tunnel.carrier.as_str().to_owned());
        }
        view::StatusView {
            version: env!("CARGO_PKG_VERSION").into(),
            node: snapshot.node.to_string(),
            trust_domain: snapshot.trust_domain.to_string(),
            uptime_s: self.started.elapsed().as_secs(),
            ready: ready.is_ok(),
            not_ready_reason: ready.err(),
            snapshot: view::snapshot(
                &snapshot,
                self.shortfall.borrow().not_enrolled.len(),
                self.snapshot_age().as_secs(),
            ),
            problems: self.all_problems(),
            connections: view::ConnectionCounts {
                outbound: self.node.telemetry.open_count(Direction::Outbound),
                inbound: self.node.telemetry.open_count(Direction::Inbound),
            },
            workers: self.contexts.len(),
            carrier: self.options.carrier.as_str().into(),
            carriers,
            // One that cannot be counted is no reason to tell nothing.
            verdicts: self.node.capture.sweep_verdicts().unwrap_or_default(),
            kernel: self
                .node
                .capture
                .counters()
                .into_iter()
                .map(|(event, count)| (event.to_owned(), count))
                .collect(),
            redirect_peer: self.redirected.borrow().clone(),
            network_policies: *self.policies.borrow(),
        }
    }

    /// What the manifests ask for, and where that has failed, why.
    fn workloads(&self) -> Vec<view::WorkloadView> {
        let shortfall = self.shortfall.borrow();
        let failing = |pod: &Workload| {
            let mut all = shortfall.not_enrolled.iter();
            let found = all.find(|failing| failing.is(pod));
            found.map(|failing| failing.why.clone())
        };
        view::workloads(&self.applied.load(), failing)
    }

    /// Of files: how long it has been in force. Of the API: how long nobody has confirmed it.
    fn snapshot_age(&self) -> std::time::Duration {
        if let Some(confirmed) = &self.confirmed {
            let since = confirmed.borrow().map_or(self.started, tokio::time::Instant::into_std);
            return since.elapsed();
        }
        self.applied_at.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    fn problem_count(&self) -> u64 {
        let count = self.problems.borrow().len() + self.shortfall.borrow().problems().count();
        u64::try_from(count).unwrap_or(u64::MAX)
    }

    fn certificates(&self) -> Vec<view::CertificateView> {
        let now = SystemTime::now();
        let leaves = self.identities.view(now).into_iter().map(|cert| view::leaf(&cert));
        let roots = self.identities.roots().into_iter().map(|root| view::root(&root, now));
        leaves.chain(roots).collect()
    }

    fn all_tunnels(&self) -> impl Iterator<Item = tunnel::TunnelView> {
        self.contexts.iter().flat_map(|context| context.tunnels.view())
    }

    fn tunnels(&self) -> Vec<view::TunnelView> {
        let shown = self.all_tunnels().map(|tunnel| view::TunnelView {
            node: self.node_name(tunnel.peer.node),
            from: tunnel.peer.from.to_string(),
            to: tunnel.peer.to.to_string(),
            carrier: tunnel.carrier.as_str().into(),
            state: match (tunnel.failing, tunnel.busy) {
                (Some(reason), _) => format!("failing: {reason}"),
                (None, 0) => "idle".into(),
                (None, _) => "busy".into(),
            },
            flows: u64::try_from(tunnel.busy).unwrap_or(u64::MAX),
            age_s: tunnel.since_s,
        });
        shown.collect()
    }

    fn tunnel_numbers(&self) -> TunnelNumbers {
        let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let stats = &self.stats;
        let idle = read(&stats.lanes_idle);
        TunnelNumbers {
            tunnels: vec![
                ("lane", "idle", idle),
                ("lane", "busy", read(&stats.lanes_open).saturating_sub(idle)),
                ("quic", "open", read(&stats.quic_connections)),
            ],
            handshakes: stats
                .all_handshakes()
                .map(|(side, kind, count)| (side.as_str(), kind.as_str(), count))
                .collect(),
            refusals: stats
                .refusals()
                .map(|(side, reason, count)| (side.as_str(), reason, count))
                .collect(),
            events: vec![
                ("dial", read(&stats.dials)),
                ("flow", read(&stats.flows)),
                ("flow_refused", read(&stats.flows_refused)),
                ("flow_given_up", read(&stats.flows_given_up)),
                ("fallback", read(&stats.fallbacks)),
                ("retry", read(&stats.retries)),
            ],
        }
    }

    /// The name of the node with this tunnel address, or the address.
    fn node_name(&self, peer: mesh_core::addr::PeerAddr) -> String {
        let snapshot = self.node.known.load();
        let found = snapshot.nodes().find(|(_, node)| node.peers.contains(&peer));
        found.map_or_else(|| peer.to_string(), |(name, _)| name.to_string())
    }

    /// The effective configuration. Nothing in it is secret.
    fn config(&self) -> serde_json::Value {
        let options = &self.options;
        json!({
            "node": options.node,
            "manifests": options.manifests,
            "kubeconfig": options.kubeconfig,
            "daemonset": options.daemonset.as_ref().map(|of| format!("{}/{}", of.namespace, of.name)),
            "kubelet_cgroup": options.kubelet_cgroup,
            "pod_cidrs": options.pod_cidrs.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "ca_dir": options.ca_dir,
            "signer": options.signer,
            "trust_bundle": options.bundle(),
            "trust_domain": options.trust_domain.as_str(),
            "cgroup": options.cgroup,
            "bpffs": options.bpffs,
            "tunnel_port": options.tunnel_port,
            "metrics_addr": options.metrics_addr,
            "ready_addr": options.ready_addr,
            "admin_socket": options.admin.socket,
            "standby": options.standby.as_str(),
            "carrier": options.carrier.as_str(),
            "balance": options.balance.as_str(),
            "workers": self.contexts.len(),
            "max_connections": options.max_connections,
            "max_connections_per_peer": options.max_connections_per_peer,
            "quic_memory_mib": options.quic_memory_mib,
            "max_pods": options.max_pods,
            "max_destinations": options.max_destinations,
            "max_flows": options.max_flows,
            "max_verdicts": options.max_verdicts,
            "redirect_peer": options.redirect_peer.as_str(),
            "connect_timeout_s": options.connect_timeout.as_secs(),
            "drain_s": options.drain.as_secs(),
            "unknown_pods_s": options.unknown_pods.as_secs(),
            "poll_us": options.poll.as_micros(),
            "cert_lifetime_s": options.cert_lifetime.as_secs(),
            "cluster_name": options.cluster_name,
            "metrics_series_limit": options.metrics_series_limit,
            "metrics_linger_s": options.metrics_linger.as_secs(),
            "metrics_drop_labels": options.metrics_drop_labels.iter().map(word).collect::<Vec<_>>(),
            "access_log": word(&options.access_log),
            "log_format": word(&options.log_format),
            "log": options.log,
        })
    }
}

/// As it is written on the command line.
fn word(value: &impl clap::ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn problem(problem: &Problem) -> view::ProblemView {
    let place = match (problem.at.as_str(), problem.object.as_str()) {
        ("", object) => object.to_owned(),
        (at, "") => at.to_owned(),
        (at, object) => format!("{at}: {object}"),
    };
    view::ProblemView {
        place,
        field: problem.field.clone(),
        message: problem.message.clone(),
        remedy: problem.remedy.clone(),
    }
}
