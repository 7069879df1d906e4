//! The source inside a cluster: the Kubernetes API, followed.
//!
//! ```text
//! feed × kind ──► News ──► Objects ──► translate ──► Snapshot
//!  list, watch     queue    in memory    pure         watch channel
//! ```
//!
//! # Guarantees
//!
//! - No snapshot before every kind has been listed once: an agent that has seen half of the cluster
//!   would take the other half for gone.
//! - An API server that is slow, down, restarted or overloaded changes nothing: the last state holds, its
//!   age is told, and a problem says since when and why.
//! - What objects say beyond what a snapshot is made from is dropped on arrival, and a change of it makes
//!   no snapshot.

mod feed;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use mesh_core::snapshot::Snapshot;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tracing::info;

use self::feed::{News, What, follow};
use super::Problem;
use super::file::Settings;
use super::kube::{EndpointSlice, Namespace, Node, Pod, Service};
use super::objects::{Kind, Objects};
use super::translate::{Context, NetnsFrom, translate};

/// News that wait to be read: then the feeds wait, and after them the server's buffers.
const QUEUE: usize = 1024;
/// A rollout changes hundreds of objects within moments: one snapshot for all that come meanwhile.
const BURST: Duration = Duration::from_millis(20);

/// The kinds that a snapshot is made from.
const KINDS: [Kind; 5] =
    [Kind::Namespace, Kind::Node, Kind::Pod, Kind::Service, Kind::EndpointSlice];

/// The followed cluster.
pub struct ClusterSource {
    client: Client,
    state: State,
    snapshots: watch::Sender<Arc<Snapshot>>,
    problems: watch::Sender<Arc<[Problem]>>,
    confirmed: watch::Sender<Option<Instant>>,
}

impl fmt::Debug for ClusterSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterSource").field("state", &self.state).finish_non_exhaustive()
    }
}

impl ClusterSource {
    /// Asks nothing yet.
    pub fn new(client: Client, settings: Settings) -> (Self, watch::Receiver<Arc<Snapshot>>) {
        let Settings { node, trust_domain, tunnel_port } = settings;
        let nothing = Snapshot::empty(Arc::clone(&node), trust_domain.clone());
        let (snapshots, receiver) = watch::channel(Arc::new(nothing));
        let context = Context { node, trust_domain, tunnel_port, netns: NetnsFrom::Processes };
        let state = State::new(context);
        let problems = watch::Sender::new([].into());
        let confirmed = watch::Sender::new(None);
        (Self { client, state, snapshots, problems, confirmed }, receiver)
    }

    /// What is wrong at present: for `status` and metrics.
    pub fn problems(&self) -> watch::Receiver<Arc<[Problem]>> {
        self.problems.subscribe()
    }

    /// Until when it is certain that the snapshot is what the API says; `None` before the first one.
    pub fn confirmed(&self) -> watch::Receiver<Option<Instant>> {
        self.confirmed.subscribe()
    }

    /// Follows the cluster, for ever.
    pub async fn run(self) {
        let Self { client, mut state, snapshots, problems, confirmed } = self;
        let (sender, mut news) = mpsc::channel(QUEUE);
        let mut feeds = JoinSet::new();
        feeds.spawn(follow::<Namespace>(client.clone(), "", sender.clone()));
        feeds.spawn(follow::<Node>(client.clone(), "", sender.clone()));
        feeds.spawn(follow::<Pod>(client.clone(), "", sender.clone()));
        feeds.spawn(follow::<Service>(client.clone(), "", sender.clone()));
        feeds.spawn(follow::<EndpointSlice>(client, "", sender));
        while let Some(first) = news.recv().await {
            state.take(first, Instant::now());
            let until = Instant::now() + BURST;
            while let Ok(Some(next)) = timeout_at(until, news.recv()).await {
                state.take(next, Instant::now());
            }
            confirmed.send_replace(state.confirmed());
            if let Some(found) = state.problems_if_changed() {
                problems.send_replace(found);
            }
            if let Some(snapshot) = state.snapshot_if_changed() {
                snapshots.send_replace(snapshot);
            }
        }
    }
}

/// What is known of the cluster. No IO.
#[derive(Debug)]
struct State {
    context: Context,
    objects: Objects,
    kinds: BTreeMap<Kind, KindState>,
    /// Something came that may make another snapshot.
    is_stale: bool,
    snapshot: Arc<Snapshot>,
    found: Vec<Problem>,
    told: Arc<[Problem]>,
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
            objects: Objects::default(),
            kinds: BTreeMap::from(kinds),
            is_stale: false,
            snapshot: Arc::new(nothing),
            found: Vec::new(),
            told: [].into(),
        }
    }

    fn take(&mut self, news: News, now: Instant) {
        let Some(kind) = self.kinds.get_mut(&news.kind) else { return };
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
        self.is_stale |= is_first
            | match news.what {
                What::All(objects) => self.objects.replace_all(news.kind, objects),
                What::Is(object) => {
                    let before = self.objects.insert(object.clone());
                    before.as_ref() != Some(&object)
                }
                What::Gone(key) => self.objects.remove(&key).is_some(),
                What::Current | What::Answered | What::Failing(_) => false,
            };
    }

    /// The state of the kind of which the server has been silent for longest.
    fn confirmed(&self) -> Option<Instant> {
        // `None` comes before every moment.
        self.kinds.values().map(|kind| kind.confirmed).min().flatten()
    }

    fn snapshot_if_changed(&mut self) -> Option<Arc<Snapshot>> {
        if !self.is_stale || self.confirmed().is_none() {
            return None;
        }
        self.is_stale = false;
        let generation = self.snapshot.generation + 1;
        let (snapshot, found) = translate(&self.objects, &self.context, generation);
        self.found = found;
        if generation > 1 && snapshot.same_state(&self.snapshot) {
            return None;
        }
        info!(
            generation,
            workloads = snapshot.workloads().count(),
            services = snapshot.services().count(),
            nodes = snapshot.nodes().count(),
            "new snapshot"
        );
        self.snapshot = Arc::new(snapshot);
        Some(Arc::clone(&self.snapshot))
    }

    fn problems_if_changed(&mut self) -> Option<Arc<[Problem]>> {
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
