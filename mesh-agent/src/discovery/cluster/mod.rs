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
#[cfg(any(fuzzing, test))]
pub mod fuzzing;
mod pace;
mod places;
mod policies;
mod report;
mod state;
#[cfg(test)]
mod tests;

use std::fmt;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use mesh_core::addr::Cidr;
use mesh_core::snapshot::Snapshot;
use time::OffsetDateTime;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep, sleep_until, timeout, timeout_at};

use self::feed::follow;
use self::places::{Places, Reason};
pub use self::policies::network_policies;
use self::report::{NotWritten, Write};
use self::state::State;
use super::client::escaped;
use super::file::Settings;
use super::kube::{EndpointSlice, Namespace, Node, Pod, Service};
use super::objects::Kind;
use super::owner::Owner;
use super::translate::{Context, NetnsFrom};
use super::{Demand, Outcomes, Problem};

/// News that wait to be read: then the feeds wait, and after them the server's buffers.
const QUEUE: usize = 1024;
/// A rollout changes hundreds of objects within moments: one snapshot for all that come meanwhile.
const BURST: Duration = Duration::from_millis(20);

/// Demands that wait to be read: then connections wait.
const DEMANDS: usize = 1024;
/// Writes at once. They have places of their own: no connection waits for what is only told.
const WRITES: usize = 4;
/// As many more while what pods say is taken back: the rights to it may be gone within moments.
const LEAVE_WRITES: usize = 12;
/// So long from then on no snapshot is made, which takes tens of milliseconds in a large cluster.
const LEAVE_FIRST: Duration = Duration::from_millis(500);
/// After one of those that failed, in its place: a server that is busy gets no more than that.
const LEAVE_AGAIN: Duration = Duration::from_secs(1);
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
    taken_back: watch::Sender<bool>,
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
        let taken_back = watch::Sender::new(false);
        let source = Self {
            client,
            state,
            demands,
            snapshots,
            problems,
            confirmed,
            network_policies,
            taken_back,
        };
        (source, receiver)
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

    /// Whether there is to be no agent any more, and what pods of this node say of the mesh is taken back, as far as
    /// the agent may.
    pub fn taken_back(&self) -> watch::Receiver<bool> {
        self.taken_back.subscribe()
    }

    /// Follows the cluster, for ever, and writes into it what became of the node's pods, until `owner` is gone:
    /// then it takes that back.
    pub async fn run(
        self,
        mut outcomes: watch::Receiver<Arc<Outcomes>>,
        owner: Option<Arc<Owner>>,
    ) {
        let Self {
            client,
            mut state,
            demands,
            snapshots,
            problems,
            confirmed,
            network_policies,
            taken_back,
        } = self;
        state.home = owner.as_ref().map(|owner| owner.namespace().to_owned());
        let mut gone = owner.as_ref().map(|owner| owner.heard());
        // It was followed before, and may be gone already.
        state.is_gone = gone.as_mut().is_some_and(|gone| *gone.borrow_and_update());
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
        let mut was_leaving = false;
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
                        && !state.is_leaving()
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
                    if let Ok((key, result)) = written {
                        state.written(key, result, Instant::now());
                    }
                    Vec::new()
                }
                is_gone = changed(&mut gone) => {
                    state.is_gone = is_gone;
                    state.is_reportable = true;
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
            let is_leaving = state.is_leaving();
            if is_leaving && !std::mem::replace(&mut was_leaving, true) {
                write_places.add_permits(LEAVE_WRITES);
                state.held = Some(Instant::now() + LEAVE_FIRST);
            }
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
                    let result = put(&client, write).await;
                    if is_leaving && result.as_ref().is_err_and(|why| !why.is_refused) {
                        sleep(LEAVE_AGAIN).await;
                    }
                    (key, result)
                });
            }
            taken_back.send_if_modified(|known| {
                let is_taken_back = state.is_taken_back();
                std::mem::replace(known, is_taken_back) != is_taken_back
            });
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

/// What is heard next of the agent's DaemonSet: whether it is gone. Never where there is none.
async fn changed(gone: &mut Option<watch::Receiver<bool>>) -> bool {
    if let Some(gone) = gone
        && gone.changed().await.is_ok()
    {
        return *gone.borrow_and_update();
    }
    pending().await
}

/// Writes it; that the same is there already is as good.
async fn put(client: &Client, write: Write) -> Result<(), NotWritten> {
    let Write { key: _, method, path, content_type, body } = write;
    let request = http::Request::builder()
        .method(method)
        .uri(path)
        .header(http::header::CONTENT_TYPE, content_type)
        .body(body.to_string().into_bytes())
        .map_err(|error| NotWritten { why: error.to_string(), is_refused: true })?;
    match timeout(WRITE_LIMIT, client.request_text(request)).await {
        Ok(Ok(_now)) => Ok(()),
        // The pod is gone, or another one has its name.
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => Ok(()),
        Ok(Err(error)) => {
            // Not of a server that is too busy (RFC 9110 section 15.5.9, RFC 6585 section 4).
            let is_final = |code: u16| (400..500).contains(&code) && !matches!(code, 408 | 429);
            let is_refused = matches!(&error, kube::Error::Api(status) if is_final(status.code));
            Err(NotWritten { why: crate::telemetry::chain(&error), is_refused })
        }
        Err(_elapsed) => Err(NotWritten { why: "no answer in time".into(), is_refused: false }),
    }
}
