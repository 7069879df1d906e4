//! Wires the agent together, runs it, and ends it.
//!
//! ```text
//! control thread                                 worker threads
//! source    ─► snapshot ─► pods ─► capture       pod listeners ─► outbound, inbound
//! CA ─► identities                               tunnel port   ─► inbound
//! metrics, probes, admin socket, signals
//! ```
//!
//! Every task that outlives a connection is started here, and joined or dropped here.

mod connections;
mod direct;
mod drain;
mod ending;
mod heart;
mod identities;
mod kubelet;
mod listeners;
mod namespaces;
mod pods;
mod policies;
mod redirects;
mod shortfall;
mod signer;
mod source;
mod turn;
mod uncertified;
mod uninstall;
mod unknown;
mod views;

use std::collections::{HashMap, HashSet};
use std::num::NonZeroUsize;
use std::pin::pin;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use arc_swap::ArcSwap;
use mesh_core::addr::EndpointAddr;
use mesh_core::affinity::Client;
use mesh_core::balance::Loads;
use mesh_core::snapshot::Snapshot;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, mpsc as queue, watch};
use tokio::task::JoinSet;
use tracing::{debug, error, info, warn};

use self::connections::Connections;
use self::direct::{Verdicts, WISHES};
use self::heart::Heart;
pub(crate) use self::listeners::Port;
use self::listeners::{Doors, serve_http, serve_tunnels};
use self::pods::Pods;
pub use self::signer::run_ca;
use self::source::Source;
use self::turn::Turn;
pub use self::uninstall::remove_files;
use self::unknown::{Unknown, standings};
use self::views::Views;
use crate::capture::{Capture, CaptureConfig};
use crate::cli::{Run, UnknownVariable, unknown_variables};
use crate::discovery::owner::Owner;
use crate::identity::store::Identities;
use crate::identity::verify::verify_peer;
use crate::known::Known;
use crate::net;
use crate::node::{Limits, Node, Wish, Worker};
use crate::telemetry::{self, LogLevel, Telemetry};
use crate::tunnel::{Credentials, Credit, TicketKeys, TunnelConfig, TunnelStats, Tunnels};
use crate::workers::Workers;

/// Runs the agent until SIGTERM or SIGINT, then drains.
///
/// # Errors
///
/// What keeps it from starting; once it runs, nothing short of a signal ends it.
pub fn run(options: Run) -> Result<()> {
    let log = telemetry::init_logging(options.log_format, &options.log).context("start logging")?;
    warn_of_unknown_variables();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let agent = runtime.block_on(Agent::start(options, log))?;
    runtime.block_on(agent.carry_on())
}

/// A flag whose variable is misspelt has its default, and nothing else would tell.
fn warn_of_unknown_variables() {
    for UnknownVariable { name, nearest } in unknown_variables() {
        warn!(variable = name, nearest, "no flag has this variable: what it says is ignored");
    }
}

struct Agent {
    options: Run,
    node: Arc<Node>,
    workers: Arc<Workers>,
    contexts: Vec<Arc<Worker>>,
    pods: Pods,
    verdicts: Verdicts,
    connections: Option<Connections>,
    wished: queue::Receiver<Wish>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    views: Arc<Views>,
    drain: watch::Sender<bool>,
    /// Turns true before that: peers go to a successor, or are told to come again.
    dismiss: watch::Sender<bool>,
    heart: Option<Heart>,
    /// Only in a cluster.
    unknown: Option<Unknown>,
    /// Only where it is known.
    owner: Option<Arc<Owner>>,
    /// Only in a cluster: what pods say in the API, where there is to be no agent any more.
    taken_back: Option<watch::Receiver<bool>>,
    /// Only where a successor may wait for it.
    turn: Option<Turn>,
    /// Whose QUIC connections' packets come here.
    doors: Doors,
    /// Whether new ones do.
    leads: bool,
    /// Tunnel listeners, one a worker and carrier.
    tunnels: JoinSet<()>,
    /// What a successor does instead as soon as this agent drains: answers at shared ports and at the
    /// admin socket, and reads what the programs tell and tells them what only one may.
    shared: JoinSet<()>,
    /// Everything else; dropped at the end.
    control: JoinSet<()>,
}

impl Agent {
    async fn start(options: Run, log: LogLevel) -> Result<Self> {
        let turn = if options.standby.is_on() { Some(Turn::wait(&options).await?) } else { None };
        // Until when somebody else carries: then nothing is taken over without certificates.
        let covered = turn.as_ref().and_then(Turn::covered);
        let started = Instant::now();
        if let Err(error) = net::raise_file_limit() {
            warn!(%error, "the limit of open files stays as it is");
        }
        let telemetry = Telemetry::new(&telemetry::Options {
            access_log: options.access_log,
            series_limit: options.metrics_series_limit,
            series_linger: options.metrics_linger,
            cluster: options.cluster_name.as_str().into(),
            drop_labels: options.metrics_drop_labels.clone(),
        })?;
        let (mut control, mut shared) = (JoinSet::new(), JoinSet::new());

        let identities = identities::start(&options, covered.is_some(), &mut control).await?;
        let (source, snapshots) = Source::open(&options).await?;
        let namespaces = source.namespaces(&options)?;
        let owner = source.owner(&options).map(Arc::new);
        if let Some(owner) = &owner {
            control.spawn(Arc::clone(owner).follow());
        }
        let capture = Arc::new(Capture::start(&CaptureConfig {
            cgroup: options.cgroup.clone(),
            bpffs: options.bpffs.clone(),
            max_pods: options.max_pods,
            max_destinations: options.max_destinations,
            max_flows: options.max_flows,
            max_verdicts: options.max_verdicts,
            redirect_peer: options.redirect_peer.is_on(),
        })?);
        // Nothing is carried before the first snapshot but by an agent before this one.
        let left = |until: tokio::time::Instant| {
            until.saturating_duration_since(tokio::time::Instant::now())
        };
        capture.carries(covered.map_or(Duration::ZERO, left));
        capture.beat();
        if let Some(log) = capture.take_log() {
            shared.spawn(async move {
                if let Err(error) = log.follow().await {
                    error!(%error, stage = "capture", "what the programs tell is not followed");
                }
            });
        }

        let (drain, draining) = watch::channel(false);
        let (dismiss, dismissed) = watch::channel(false);
        let (wishes, wished) = queue::channel(WISHES);
        let node = Arc::new(Node {
            known: Known::new(Arc::clone(&snapshots.borrow()), source.demands()),
            pods: ArcSwap::new(Arc::new(HashMap::new())),
            loads: Mutex::new(Loads::default()),
            affinities: Mutex::default(),
            capture: Arc::clone(&capture),
            telemetry: telemetry.clone(),
            limits: Limits {
                connect_timeout: options.connect_timeout,
                attempts: Limits::ATTEMPTS,
                balance: options.balance.into(),
            },
            connections: Arc::new(Semaphore::new(options.max_connections.get())),
            opening: Arc::default(),
            draining,
            wishes,
        });

        let count = options.workers.map_or_else(available_cores, NonZeroUsize::get);
        let workers =
            Arc::new(Workers::start(count, options.poll).context("start worker threads")?);
        let stats = Arc::new(TunnelStats::default());
        let contexts = start_tunnels(&options, &workers, &node, &identities, &stats).await?;
        let mut tunnels = JoinSet::new();
        let mut doors = serve_tunnels(&options, &workers, &contexts, &dismissed, &mut tunnels)?;
        if covered.is_none() {
            doors.open().context("listen for tunnels")?;
        }

        let pods = Pods::new(
            (Arc::clone(&workers), contexts.clone()),
            Arc::clone(&identities),
            namespaces,
            covered,
        );
        let redirects = watch::Sender::default();
        let redirected = redirects.subscribe();
        if options.redirect_peer.is_on() {
            shared.spawn(redirects::survey(Arc::clone(&node), pods.shortfall(), redirects));
        }
        let skips = options.redirect_peer.is_on();
        control.spawn(policies::warn_of(source.network_policies(), skips));
        let no_kubelet = watch::Sender::new(false);
        let nothing = Snapshot::empty(options.node.as_str().into(), options.trust_domain.clone());
        let views = Arc::new(Views {
            started,
            options: options.clone(),
            node: Arc::clone(&node),
            identities,
            contexts: contexts.clone(),
            stats,
            problems: source.problems(),
            policies: source.network_policies(),
            confirmed: source.confirmed(),
            shortfall: pods.shortfall(),
            redirected,
            no_kubelet: no_kubelet.subscribe(),
            applied: ArcSwap::from_pointee(nothing),
            is_applied: AtomicBool::new(false),
            applied_at: Mutex::new(started),
            direct: OnceLock::new(),
        });
        telemetry.set_sources(Arc::clone(&views).telemetry_sources());
        serve_http(&options, &telemetry, &views, log, &mut shared).await?;
        let mut unknown = None;
        if let Some(demands) = source.demands() {
            unknown = Some(Unknown::start(unknown::Config {
                capture: Arc::clone(&capture),
                cgroup: options.cgroup.clone(),
                limit: options.unknown_pods,
                demands: demands.clone(),
            })?);
            shared.spawn(source::tell_used(contexts.clone(), demands));
            shared.spawn(kubelet::follow(
                Arc::clone(&capture),
                options.cgroup.clone(),
                options.kubelet_cgroup.clone(),
                no_kubelet,
            ));
        }
        control.spawn(forget_series(Arc::clone(&node)));
        let taken_back = source.taken_back();
        control.spawn(source.run(pods.outcomes(), owner.clone()));
        let heart = Heart::start(capture).context("start the heartbeat")?;
        if let Err(error) = net::give_back_memory() {
            debug!(%error, "what starting needed stays in memory");
        }
        info!(
            node = %options.node,
            version = env!("CARGO_PKG_VERSION"),
            workers = count,
            carrier = options.carrier.as_str(),
            "started"
        );
        Ok(Self {
            options,
            verdicts: Verdicts::new(Arc::clone(&node)),
            connections: None,
            node,
            workers,
            contexts,
            pods,
            wished,
            snapshots,
            views,
            drain,
            dismiss,
            heart: Some(heart),
            unknown,
            owner,
            taken_back,
            turn,
            doors,
            leads: false,
            tunnels,
            shared,
            control,
        })
    }

    /// Follows the snapshots until told to end.
    async fn carry_on(mut self) -> Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        'run: loop {
            let snapshot = Arc::clone(&self.snapshots.borrow_and_update());
            // Nothing is known before the first one: what an earlier agent left in the kernel stays.
            if snapshot.generation > 0 {
                self.apply(snapshot).await;
            }
            let pods = &self.pods;
            let mut due = pin!(pods.due());
            loop {
                tokio::select! {
                    biased; // A verdict must not be written from a snapshot that is no more.
                    _ = terminate.recv() => break 'run,
                    _ = interrupt.recv() => break 'run,
                    changed = self.snapshots.changed() => {
                        if changed.is_err() {
                            bail!("the state of the mesh is not followed any more");
                        }
                        break;
                    }
                    () = &mut due => break,
                    () = self.verdicts.due() => self.verdicts.write_again(),
                    Some(wish) = self.wished.recv() => self.verdicts.grant(&wish),
                }
            }
        }
        self.end().await;
        Ok(())
    }

    async fn apply(&mut self, snapshot: Arc<Snapshot>) {
        // First of all: what the kernel lets through by itself must not outlive what it was decided from.
        self.verdicts.follow(&snapshot);
        if let Some(connections) = &self.connections {
            connections.hear();
        }
        self.node.known.store(Arc::clone(&snapshot));
        if let Some(connections) = &self.connections {
            connections.judge(&snapshot);
        }
        self.tell_standings(&snapshot);
        let snapshots = &self.snapshots;
        // Ended is superseded: the caller then ends too.
        self.pods.follow(&snapshot, || snapshots.has_changed().unwrap_or(true)).await;
        self.tell_standings(&snapshot);
        self.follow_direct();
        let endpoints: HashSet<_> = snapshot.endpoints().map(|endpoint| endpoint.addr).collect();
        let is_live = |addr: &EndpointAddr| {
            endpoints.contains(addr) || snapshot.workload_at(addr.0.ip()).is_some()
        };
        self.node.loads().retain(is_live);
        let lives = |client: &Client| snapshot.workload(&client.pod).is_some();
        self.node.affinities().retain(Instant::now(), lives);
        self.node.telemetry.retain(&snapshot, self.node.known.reads_on_demand());
        if self.leads || !self.pods.wait_for_certificates() {
            self.lead();
            self.views.applied(snapshot);
        }
    }

    /// Takes new lanes and QUIC connections, once: an agent before this one has taken them until now, and keeps
    /// its own.
    fn lead(&mut self) {
        if std::mem::replace(&mut self.leads, true) {
            return;
        }
        self.node.capture.carries(Duration::MAX);
        self.node.capture.beat();
        self.pods.lead();
        if let Err(error) = self.doors.open() {
            error!(%error, stage = "tunnel", "lanes are not served");
        }
        if let Err(error) = self.doors.steering.take_over() {
            warn!(%error, stage = "tunnel", "QUIC connections may be reset until the agent before this one has ended");
        }
        let steering = self.doors.steering.clone();
        self.control.spawn(async move {
            if let Err(error) = steering.settle().await {
                warn!(%error, stage = "tunnel", "QUIC connections may be reset when the next agent starts");
            }
        });
    }

    /// Tells what is known of pods to whoever holds back those that are not captured yet.
    fn tell_standings(&self, snapshot: &Snapshot) {
        if let Some(unknown) = &self.unknown {
            unknown.tell(standings(snapshot, |workload| self.pods.has(workload)));
        }
    }

    /// Begins to follow direct connections, once: the pods have to be known whose they are.
    fn follow_direct(&mut self) {
        let Some(events) = self.node.capture.take_events() else { return };
        let limit = self.options.max_connections.get();
        let connections = Connections::start(Arc::clone(&self.node), events, limit);
        self.shared.spawn(connections.clone().follow());
        self.views.follow_direct(connections.clone());
        self.connections = Some(connections);
    }
}

fn available_cores() -> usize {
    thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// Each worker's tunnels, made on that worker: its sockets belong to its runtime.
async fn start_tunnels(
    options: &Run,
    workers: &Workers,
    node: &Arc<Node>,
    identities: &Arc<Identities>,
    stats: &Arc<TunnelStats>,
) -> Result<Vec<Arc<Worker>>> {
    let credentials = Arc::new(credentials(identities));
    let tickets = TicketKeys::new().context("make session ticket keys")?;
    let config = TunnelConfig {
        carrier: options.carrier,
        connect_timeout: options.connect_timeout,
        // The far side may use up its own timeout before it answers why.
        answer_timeout: options.connect_timeout * 2,
        quic_credit: Credit::new(u64::from(options.quic_memory_mib.get()) << 20),
        max_flows_per_peer: options.max_connections_per_peer.get(),
        ..TunnelConfig::default()
    };
    let mut contexts = Vec::new();
    for index in 0..workers.len() {
        let (config, tickets) = (config.clone(), tickets.clone());
        let (credentials, stats) = (Arc::clone(&credentials), Arc::clone(stats));
        let made =
            workers.spawn(index, async move { Tunnels::new(config, tickets, credentials, stats) });
        let tunnels = made.await?.context("start tunnels")?;
        contexts.push(Arc::new(Worker::new(Arc::clone(node), tunnels)));
    }
    Ok(contexts)
}

/// Lets go of series that nobody uses any more, also where no snapshot comes.
async fn forget_series(node: Arc<Node>) {
    const EVERY: Duration = Duration::from_secs(60);
    let mut every = tokio::time::interval(EVERY);
    loop {
        every.tick().await;
        node.telemetry.retain(&node.known.load(), node.known.reads_on_demand());
    }
}

fn credentials(identities: &Arc<Identities>) -> Credentials {
    let (certified, served, verify) =
        (Arc::clone(identities), Arc::clone(identities), Arc::clone(identities));
    Credentials {
        certified: Box::new(move |id| certified.certified(id)),
        served: Box::new(move |name| served.served(name)),
        verify: Box::new(move |chain, role, now| verify_peer(&verify.trust(), chain, role, now)),
        trusted: identities.trusted(),
    }
}
