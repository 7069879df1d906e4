//! The source inside a cluster: the Kubernetes API, followed.
//!
//! ```text
//! feed × kind ──► News ──┐
//!  list, watch     queue  ├─► Objects ──► translate ──► Snapshot
//! read × demand ──────────┘   in memory    pure         watch channel
//! ```
//!
//! Pods of this node are followed; those of other nodes are read when a connection needs them
//! ([`demand`]).
//!
//! # Guarantees
//!
//! - No snapshot before every kind has been listed once: an agent that has seen half of the cluster
//!   would take the other half for gone.
//! - An API server that is slow, down, restarted or overloaded changes nothing: the last state holds, its
//!   age is told, and a problem says since when and why.
//! - What was not read yet is marked as such in the snapshot, and so is captured and never taken for a
//!   place outside the mesh.
//! - What objects say beyond what a snapshot is made from is dropped on arrival, and a change of it makes
//!   no snapshot.

mod behind;
mod demand;
mod feed;
mod find;
mod pace;
mod places;
mod policies;
mod report;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use mesh_core::addr::Cidr;
use mesh_core::snapshot::Snapshot;
use time::OffsetDateTime;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep_until, timeout, timeout_at};
use tracing::warn;

use self::behind::knows;
use self::demand::{Found, Remote, Wanted};
use self::feed::{News, What, follow};
use self::pace::Pace;
use self::places::{Places, Reason};
pub use self::policies::network_policies;
use self::report::{Known, Reports, Write};
use super::client::escaped;
use super::file::Settings;
use super::kube::{EndpointSlice, Namespace, Node, Pod, Service};
use super::objects::{Kind, Objects};
use super::translate::{Context, NetnsFrom, translate};
use super::{Demand, Outcomes, Problem};

/// News that wait to be read: then the feeds wait, and after them the server's buffers.
const QUEUE: usize = 1024;
/// A rollout changes hundreds of objects within moments: one snapshot for all that come meanwhile.
const BURST: Duration = Duration::from_millis(20);

/// Demands that wait to be read: then connections wait.
const DEMANDS: usize = 1024;
/// Writes at once. They have places of their own: no connection waits for what is only told.
const WRITES: usize = 4;
/// Nobody waits for what is written.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// How often what is kept is looked through.
const TIDY: Duration = Duration::from_secs(30);

/// The kinds that a snapshot is made from.
const KINDS: [Kind; 5] =
    [Kind::Namespace, Kind::Node, Kind::Pod, Kind::Service, Kind::EndpointSlice];

/// The followed cluster.
pub struct ClusterSource {
    client: Client,
    state: State,
    demands: (mpsc::Sender<Demand>, mpsc::Receiver<Demand>),
    snapshots: watch::Sender<Arc<Snapshot>>,
    problems: watch::Sender<Arc<[Problem]>>,
    confirmed: watch::Sender<Option<Instant>>,
    network_policies: watch::Sender<usize>,
}

impl fmt::Debug for ClusterSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterSource").field("state", &self.state).finish_non_exhaustive()
    }
}

impl ClusterSource {
    /// Asks nothing yet. Pods of other nodes may be in `pod_cidrs` too, besides what nodes say.
    pub fn new(
        client: Client,
        settings: Settings,
        pod_cidrs: Vec<Cidr>,
    ) -> (Self, watch::Receiver<Arc<Snapshot>>) {
        let Settings { node, trust_domain, tunnel_port } = settings;
        let nothing = Snapshot::empty(Arc::clone(&node), trust_domain.clone());
        let (snapshots, receiver) = watch::channel(Arc::new(nothing));
        let netns = NetnsFrom::Processes;
        let context = Context { node, trust_domain, tunnel_port, netns, pod_cidrs };
        let state = State::new(context);
        let problems = watch::Sender::new([].into());
        let confirmed = watch::Sender::new(None);
        let demands = mpsc::channel(DEMANDS);
        let network_policies = watch::Sender::new(0);
        (
            Self { client, state, demands, snapshots, problems, confirmed, network_policies },
            receiver,
        )
    }

    /// The way to the API.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// What is wrong at present: for `status` and metrics.
    pub fn problems(&self) -> watch::Receiver<Arc<[Problem]>> {
        self.problems.subscribe()
    }

    /// Where to say what connections need to know.
    pub fn demands(&self) -> mpsc::Sender<Demand> {
        self.demands.0.clone()
    }

    /// Until when it is certain that the snapshot is what the API says; `None` before the first one.
    pub fn confirmed(&self) -> watch::Receiver<Option<Instant>> {
        self.confirmed.subscribe()
    }

    /// How many NetworkPolicies there are. They are counted only if this is asked before
    /// [`run`](Self::run).
    pub fn network_policies(&self) -> watch::Receiver<usize> {
        self.network_policies.subscribe()
    }

    /// Follows the cluster, for ever, and writes into it what became of the node's pods.
    pub async fn run(self, mut outcomes: watch::Receiver<Arc<Outcomes>>) {
        let Self { client, mut state, demands, snapshots, problems, confirmed, network_policies } =
            self;
        let (sender, mut news) = mpsc::channel(QUEUE);
        let mut feeds = JoinSet::new();
        let own = format!("fieldSelector=spec.nodeName%3D{}", escaped(&state.context.node));
        feeds.spawn(follow::<Namespace>(client.clone(), String::new(), sender.clone()));
        feeds.spawn(follow::<Node>(client.clone(), String::new(), sender.clone()));
        feeds.spawn(follow::<Pod>(client.clone(), own, sender.clone()));
        feeds.spawn(follow::<Service>(client.clone(), String::new(), sender.clone()));
        feeds.spawn(follow::<EndpointSlice>(client.clone(), String::new(), sender));
        if network_policies.receiver_count() > 0 {
            feeds.spawn(policies::count(client.clone(), network_policies));
        }
        let (_kept, mut demands) = demands;
        let read_places = Arc::new(Places::default());
        let write_places = Arc::new(Semaphore::new(WRITES));
        let (mut reads, mut writes) = (JoinSet::new(), JoinSet::new());
        let mut tidy = interval(TIDY);
        loop {
            let mut to_read_again = Vec::new();
            let due = state.due();
            let mut to_read = tokio::select! {
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => Vec::new(),
                Some(first) = news.recv() => {
                    state.take(first, Instant::now());
                    // Who waits for what was read does not wait for a burst too.
                    let until = Instant::now() + BURST;
                    while reads.is_empty()
                        && !state.remote.is_waited_for()
                        && let Ok(Some(next)) = timeout_at(until, news.recv()).await {
                        state.take(next, Instant::now());
                    }
                    Vec::new()
                }
                Some(demand) = demands.recv() => state.demand(demand, Instant::now()),
                Some(first) = reads.join_next() => {
                    // All that have come meanwhile: one snapshot.
                    let rest = std::iter::from_fn(|| reads.try_join_next());
                    // A read that panicked is as good as one that failed, and its waiters time out.
                    for (wanted, found) in std::iter::once(first).chain(rest).flatten() {
                        state.read(wanted, found, Instant::now());
                    }
                    Vec::new()
                }
                Some(written) = writes.join_next() => {
                    if let Ok((key, Err(why))) = written {
                        state.not_written(key, why, Instant::now());
                    }
                    Vec::new()
                }
                Ok(()) = outcomes.changed() => {
                    state.is_reportable = true;
                    Vec::new()
                }
                _ = tidy.tick() => {
                    let missing = state.tidy(Instant::now());
                    to_read_again = state.refresh(Instant::now());
                    missing
                }
            };
            confirmed.send_replace(state.confirmed());
            // Who need not wait for a snapshot is not why one is made.
            state.answer();
            let began = Instant::now();
            if state.due().is_some_and(|due| due <= began) {
                if let Some(snapshot) = state.snapshot_if_changed() {
                    to_read.extend(state.prefetch(Instant::now()));
                    snapshots.send_replace(snapshot);
                }
                state.pace.made(began, Instant::now());
            }
            if let Some(found) = state.problems_if_changed() {
                problems.send_replace(found);
            }
            state.answer();
            let at = OffsetDateTime::now_utc();
            for write in state.reports(&outcomes.borrow(), Instant::now(), at) {
                let (client, places) = (client.clone(), Arc::clone(&write_places));
                writes.spawn(async move {
                    let _place = places.acquire_owned().await;
                    let key = write.key.clone();
                    (key, put(&client, write).await)
                });
            }
            let asked = to_read.into_iter().map(|wanted| (state.reason(&wanted), wanted));
            let again = to_read_again.into_iter().map(|wanted| (Reason::Again, wanted));
            for (reason, wanted) in asked.chain(again) {
                let (client, places) = (client.clone(), Arc::clone(&read_places));
                reads.spawn(async move {
                    let found = places.read(&client, &wanted, reason).await;
                    (wanted, found)
                });
            }
        }
    }
}

/// Writes it; that the same is there already is as good.
async fn put(client: &Client, write: Write) -> Result<(), String> {
    let Write { key: _, method, path, content_type, body } = write;
    let request = http::Request::builder()
        .method(method)
        .uri(path)
        .header(http::header::CONTENT_TYPE, content_type)
        .body(body.to_string().into_bytes())
        .map_err(|error| error.to_string())?;
    match timeout(WRITE_LIMIT, client.request_text(request)).await {
        Ok(Ok(_now)) => Ok(()),
        // The pod is gone, or another one has its name.
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => Ok(()),
        Ok(Err(error)) => Err(crate::telemetry::chain(&error)),
        Err(_elapsed) => Err("no answer in time".into()),
    }
}

/// What is known of the cluster. No IO.
#[derive(Debug)]
struct State {
    context: Context,
    objects: Objects,
    remote: Remote,
    reports: Reports,
    /// Something came that may have to be written into the API.
    is_reportable: bool,
    /// That something cannot be written was said.
    is_write_told: bool,
    kinds: BTreeMap<Kind, KindState>,
    /// Something came that may make another snapshot.
    is_stale: bool,
    /// Somebody may wait for that one: a pod of this node that begins, or who was refused for what was not read.
    is_urgent: bool,
    /// So many times something came that may make another one.
    changes: u64,
    pace: Pace,
    snapshot: Arc<Snapshot>,
    found: Vec<Problem>,
    told: Arc<[Problem]>,
    /// Something came that may have to be told.
    is_tellable: bool,
    /// Reads that did not get their turn and were not told of.
    given_up: usize,
}

/// How it stands with one kind.
#[derive(Debug)]
struct KindState {
    /// When the server last said something of it; `None` before its first list.
    confirmed: Option<Instant>,
    /// Why the server cannot be asked.
    failing: Option<String>,
}

impl State {
    fn new(context: Context) -> Self {
        let nothing = Snapshot::empty(Arc::clone(&context.node), context.trust_domain.clone());
        let kinds = KINDS.map(|kind| (kind, KindState { confirmed: None, failing: None }));
        Self {
            context,
            objects: Objects::on_demand(),
            remote: Remote::default(),
            reports: Reports::default(),
            is_reportable: false,
            is_write_told: false,
            kinds: BTreeMap::from(kinds),
            is_stale: false,
            is_urgent: false,
            changes: 0,
            pace: Pace::default(),
            snapshot: Arc::new(nothing),
            found: Vec::new(),
            told: [].into(),
            is_tellable: false,
            given_up: 0,
        }
    }

    fn take(&mut self, news: News, now: Instant) {
        let Some(kind) = self.kinds.get_mut(&news.kind) else { return };
        self.is_tellable = true;
        match news.what {
            What::Failing(why) => {
                kind.failing = Some(why);
                return;
            }
            What::Answered => {
                kind.failing = None;
                return;
            }
            _ => kind.failing = None,
        }
        let is_first = kind.confirmed.replace(now).is_none();
        let is_news = is_first
            | match news.what {
                What::All(mut objects) => {
                    if news.kind == Kind::Pod {
                        // They are followed from now on, whoever had their names before.
                        for object in &objects {
                            self.remote.forget(&object.key());
                        }
                        let kept = self.objects.iter().filter(|(key, _)| self.remote.keeps(key));
                        let kept: Vec<_> = kept.map(|(_, object)| object.clone()).collect();
                        objects.splice(0..0, kept);
                    }
                    self.objects.replace_all(news.kind, objects)
                }
                What::Is(object) => {
                    self.remote.forget(&object.key());
                    let before = self.objects.insert(object.clone());
                    before.as_ref() != Some(&object)
                }
                // Its pods are about to go, and what takes their addresses is not theirs.
                What::Gone(key) if key.kind == Kind::Namespace => {
                    self.remote.forget_all_of(&mut self.objects, &self.context.node, &key.name);
                    self.objects.remove(&key).is_some()
                }
                // One of that name may be on another node by now.
                What::Gone(key) if self.remote.keeps(&key) => false,
                What::Gone(key) => self.objects.remove(&key).is_some(),
                What::Current | What::Answered | What::Failing(_) => false,
            };
        // Of pods only this node's are followed. Services and endpoints are what changes all the time.
        self.note(is_news, matches!(news.kind, Kind::Pod | Kind::Namespace));
    }

    /// Something came, which may make another snapshot if it `is_news`.
    fn note(&mut self, is_news: bool, is_urgent: bool) {
        self.is_stale |= is_news;
        self.is_urgent |= is_news && is_urgent;
        self.changes += u64::from(is_news);
    }

    /// Returns what is to be read for it.
    fn demand(&mut self, demand: Demand, now: Instant) -> Vec<Wanted> {
        match demand {
            Demand::Know { ip, caller, done } if self.cannot_read() => {
                // What is not known now will not be in time, and a queue helps nobody.
                self.remote.ask_nothing((ip.to_canonical(), caller.is_some()), done);
                Vec::new()
            }
            Demand::Know { ip, caller, done } => {
                let at = (ip.to_canonical(), caller.as_ref());
                let known = (&self.objects, self.changes);
                self.remote.need(known, &self.context.node, at, done, now)
            }
            Demand::Used { pods, addresses } => {
                self.remote.used(&self.objects, &pods, &addresses, now);
                Vec::new()
            }
            Demand::Seen { uid, ips } => {
                let is_news = self.objects.see(uid, ips);
                self.note(is_news, true);
                Vec::new()
            }
        }
    }

    fn read(&mut self, wanted: Wanted, found: Found, now: Instant) {
        match &found {
            Found::Failed(why) => {
                warn!(?wanted, error = why, "a pod of another node cannot be read");
            }
            Found::GivenUp => self.given_up += 1,
            Found::Pods(_) | Found::None => {}
        }
        let node = Arc::clone(&self.context.node);
        let is_news = self.remote.take(&mut self.objects, &node, wanted, found, now);
        self.note(is_news, true);
    }

    /// Not while pods cannot be read: what is dropped could not be had again.
    fn tidy(&mut self, now: Instant) -> Vec<Wanted> {
        // Not each by itself: a pod that dials free addresses could fill the log.
        let given_up = std::mem::take(&mut self.given_up);
        if given_up > 0 {
            warn!(reads = given_up, "more is asked of other nodes' pods than can be read in time");
        }
        if self.cannot_read() {
            return Vec::new();
        }
        self.objects.forget_seen();
        let is_news = self.remote.expire(&mut self.objects, &self.context.node, now);
        self.note(is_news, false);
        self.is_reportable = true;
        self.prefetch(now)
    }

    /// Not while pods cannot be read, either: each would be a failure to tell of.
    fn refresh(&mut self, now: Instant) -> Vec<Wanted> {
        if self.cannot_read() { Vec::new() } else { self.remote.refresh(now) }
    }

    /// Why this is read that somebody needs.
    fn reason(&self, wanted: &Wanted) -> Reason {
        match wanted {
            Wanted::Pod { .. } => Reason::Named,
            Wanted::Address { account: Some(_), .. } => Reason::Called,
            // A slice may name an address and not say whose it is.
            Wanted::Address { ip, account: None, .. } if self.objects.names(*ip) => Reason::Named,
            Wanted::Address { account: None, .. } => Reason::Dialled,
        }
    }

    fn prefetch(&mut self, now: Instant) -> Vec<Wanted> {
        self.remote.prefetch(&self.objects, &self.context.node, now)
    }

    /// What is to be written into the API now, which is `at` by the time of day.
    fn reports(&mut self, outcomes: &Outcomes, now: Instant, at: OffsetDateTime) -> Vec<Write> {
        // What is known and what is in force belong together: with the snapshot that is due.
        if self.due().is_some() || !std::mem::take(&mut self.is_reportable) || self.is_failing() {
            return Vec::new();
        }
        let known = Known {
            objects: &self.objects,
            snapshot: &self.snapshot,
            outcomes,
            problems: &self.found,
            at,
        };
        self.reports.due(known, now)
    }

    fn not_written(&mut self, key: String, why: String, now: Instant) {
        if !std::mem::replace(&mut self.is_write_told, true) {
            warn!(what = key, error = why, "not written into the API; tried again every minute");
        }
        self.reports.failed(key, now);
    }

    /// While another snapshot is due, what was read for who waits may be in that one alone. But no snapshot says of a
    /// caller that it was looked for in vain: for that there is none to wait for.
    fn answer(&mut self) {
        let (is_due, objects) = (self.due().is_some(), &self.objects);
        self.remote.answer(self.snapshot.generation, |(ip, is_callers)| {
            !is_due || (*is_callers && !knows(objects, *ip))
        });
    }

    fn is_failing(&self) -> bool {
        self.kinds.values().any(|kind| kind.failing.is_some())
    }

    /// Whether pods of other nodes cannot be had, or what their namespaces say of them. The other kinds say
    /// nothing of a pod: one of them may be refused for ever, and pods must be read all the same.
    fn cannot_read(&self) -> bool {
        let needed = [Kind::Namespace, Kind::Pod].map(|kind| self.kinds.get(&kind));
        needed.into_iter().flatten().any(|kind| kind.failing.is_some())
    }

    /// The state of the kind of which the server has been silent for longest.
    fn confirmed(&self) -> Option<Instant> {
        // `None` comes before every moment.
        self.kinds.values().map(|kind| kind.confirmed).min().flatten()
    }

    /// From when on another snapshot is to be made, if one is; a moment that has passed if at once.
    fn due(&self) -> Option<Instant> {
        let listed = self.confirmed().filter(|_| self.is_stale)?;
        Some(self.pace.next(self.is_waited_for()).unwrap_or(listed))
    }

    fn is_waited_for(&self) -> bool {
        self.is_urgent || self.remote.is_waited_for()
    }

    fn snapshot_if_changed(&mut self) -> Option<Arc<Snapshot>> {
        if !self.is_stale || self.confirmed().is_none() {
            return None;
        }
        self.is_stale = false;
        self.is_urgent = false;
        self.is_reportable = true;
        let generation = self.snapshot.generation + 1;
        let (snapshot, found) = translate(&self.objects, &self.context, generation);
        self.found = found;
        self.is_tellable = true;
        if generation > 1 && snapshot.same_state(&self.snapshot) {
            return None;
        }
        super::tell_of(&snapshot);
        self.snapshot = Arc::new(snapshot);
        Some(Arc::clone(&self.snapshot))
    }

    fn problems_if_changed(&mut self) -> Option<Arc<[Problem]>> {
        if !std::mem::take(&mut self.is_tellable) {
            return None;
        }
        let failing = self.kinds.iter().filter_map(|(kind, state)| {
            let why = state.failing.as_ref()?;
            Some(Problem {
                at: "Kubernetes API".into(),
                object: format!("{kind:?}"),
                field: String::new(),
                message: format!("not followed: {why}; the last state stays in force"),
                remedy: "it is tried again; check the API server and the agent's permissions"
                    .into(),
            })
        });
        let mut problems: Vec<Problem> = failing.collect();
        problems.extend(self.found.iter().cloned());
        if *problems == *self.told {
            return None;
        }
        self.told = problems.into();
        Some(Arc::clone(&self.told))
    }
}
