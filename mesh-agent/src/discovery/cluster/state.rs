//! What is known of the cluster, and what follows from what comes. No IO.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use mesh_core::snapshot::Snapshot;
use time::OffsetDateTime;
use tokio::time::Instant;
use tracing::warn;

use super::KINDS;
use super::behind::Here;
use super::demand::{Found, Remote, Wanted};
use super::feed::{News, What};
use super::pace::Pace;
use super::places::Reason;
use super::report::{Known, NotWritten, Reports, Write};
use crate::discovery::objects::{Kind, Object, ObjectKey, Objects};
use crate::discovery::translate::{Context, translate};
use crate::discovery::{Demand, Outcomes, Problem, tell_of};
use crate::gate::Gate;

/// What is known of the cluster.
#[derive(Debug)]
pub(super) struct State {
    pub(super) context: Context,
    pub(super) objects: Objects,
    pub(super) remote: Remote,
    reports: Reports,
    /// Something came that may have to be written into the API.
    pub(super) is_reportable: bool,
    /// That something cannot be written was said.
    is_write_told: bool,
    kinds: BTreeMap<Kind, KindState>,
    /// Something came that may make another snapshot.
    is_stale: bool,
    /// Somebody may wait for that one: a pod of this node that begins, or who was refused for what was not read.
    is_urgent: bool,
    /// So many times something came that may make another one.
    changes: u64,
    pub(super) pace: Pace,
    pub(super) snapshot: Arc<Snapshot>,
    found: Vec<Problem>,
    told: Arc<[Problem]>,
    /// Something came that may have to be told.
    is_tellable: bool,
    /// Reads that did not get their turn and were not told of.
    given_up: usize,
    failures: Gate,
    /// Where the agent's DaemonSet is, if that is known.
    pub(super) home: Option<String>,
    /// There is to be no agent any more.
    pub(super) is_gone: bool,
    /// That namespace is about to go, or has.
    is_home_going: bool,
    /// What was written on a pod and stays was told of.
    is_stay_told: bool,
    /// No snapshot is made before.
    pub(super) held: Option<Instant>,
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
    pub(super) fn new(context: Context) -> Self {
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
            failures: Gate::default(),
            home: None,
            is_gone: false,
            is_home_going: false,
            is_stay_told: false,
            held: None,
        }
    }

    pub(super) fn take(&mut self, news: News, now: Instant) {
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
                    if news.kind == Kind::Namespace {
                        self.forget_namespaces_but(&objects);
                    }
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
        if news.kind == Kind::Namespace {
            self.is_home_going = self.home.as_ref().is_some_and(|home| self.is_going(home));
        }
        // Of pods only this node's are followed. Services and endpoints are what changes all the time.
        self.note(is_news, matches!(news.kind, Kind::Pod | Kind::Namespace));
    }

    /// Of a namespace that is not among `now`, or another one of its name, nobody has told that it was gone.
    fn forget_namespaces_but(&mut self, now: &[Object]) {
        let uid = |object: &Object| match object {
            Object::Namespace(namespace) => namespace.metadata.uid.clone(),
            _ => None,
        };
        let now: HashMap<_, _> = now.iter().map(|now| (now.key(), uid(now))).collect();
        let is_gone = |(key, before): &(&ObjectKey, &Object)| now.get(*key) != Some(&uid(before));
        let gone = self.objects.of(Kind::Namespace).filter(is_gone);
        let gone: Vec<_> = gone.map(|(key, _)| key.name.clone()).collect();
        for name in gone {
            self.remote.forget_all_of(&mut self.objects, &self.context.node, &name);
        }
    }

    /// Something came, which may make another snapshot if it `is_news`.
    fn note(&mut self, is_news: bool, is_urgent: bool) {
        self.is_stale |= is_news;
        self.is_urgent |= is_news && is_urgent;
        self.changes += u64::from(is_news);
    }

    /// Returns what is to be read for it.
    pub(super) fn demand(&mut self, demand: Demand, now: Instant) -> Vec<Wanted> {
        match demand {
            Demand::Know { ip, caller, done } if self.cannot_read() => {
                // What is not known now will not be in time, and a queue helps nobody.
                self.remote.ask_nothing((ip.to_canonical(), caller.is_some()), done);
                Vec::new()
            }
            Demand::Know { ip, caller, done } => {
                let at = (ip.to_canonical(), caller.as_ref());
                let known = (&self.objects, self.changes);
                self.remote.need(known, here(&self.context), at, done, now)
            }
            Demand::Used { pods, addresses } => {
                self.remote.used(&self.objects, &pods, &addresses, now);
                Vec::new()
            }
            Demand::Doubt { .. } if self.cannot_read() => Vec::new(),
            Demand::Doubt { pod } => self.remote.doubt(&self.objects, &pod, now),
            Demand::Seen { uid, ips } => {
                let is_news = self.objects.see(uid, ips);
                self.note(is_news, true);
                Vec::new()
            }
        }
    }

    pub(super) fn read(&mut self, wanted: Wanted, found: Found, now: Instant) {
        match &found {
            Found::Failed(why) => {
                // A pod that dials free addresses while the API refuses could fill the log.
                if let Some(unlogged) = self.failures.pass("read") {
                    warn!(?wanted, error = why, unlogged, "a pod of another node cannot be read");
                }
            }
            Found::GivenUp => self.given_up += 1,
            Found::Pods(_) | Found::None => {}
        }
        let node = Arc::clone(&self.context.node);
        let is_news = self.remote.take(&mut self.objects, &node, wanted, found, now);
        self.note(is_news, true);
    }

    /// Not while pods cannot be read: what is dropped could not be had again.
    pub(super) fn tidy(&mut self, now: Instant) -> Vec<Wanted> {
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
    pub(super) fn refresh(&mut self, now: Instant) -> Vec<Wanted> {
        if self.cannot_read() { Vec::new() } else { self.remote.refresh(&self.objects, now) }
    }

    /// Why this is read that somebody needs.
    pub(super) fn reason(&self, wanted: &Wanted) -> Reason {
        match wanted {
            Wanted::Pod { .. } => Reason::Named,
            Wanted::Address { account: Some(_), .. } => Reason::Called,
            // A slice may name an address and not say whose it is.
            Wanted::Address { ip, account: None, .. } if self.objects.names(*ip) => Reason::Named,
            Wanted::Address { account: None, .. } => Reason::Dialled,
        }
    }

    pub(super) fn prefetch(&mut self, now: Instant) -> Vec<Wanted> {
        self.remote.prefetch(&self.objects, here(&self.context), now)
    }

    /// What is to be written into the API now, which is `at` by the time of day.
    pub(super) fn reports(
        &mut self,
        outcomes: &Outcomes,
        now: Instant,
        at: OffsetDateTime,
    ) -> Vec<Write> {
        if self.is_leaving() {
            return self.reports.take_back(&self.objects, &self.context.node);
        }
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

    /// What became of a write.
    pub(super) fn written(&mut self, key: String, result: Result<(), NotWritten>, now: Instant) {
        // Something else may have been to be told meanwhile.
        self.is_reportable = true;
        let Err(NotWritten { why, is_refused }) = result else {
            return self.reports.written(&key);
        };
        let is_leaving = self.is_leaving();
        if is_leaving && !is_refused {
            return self.reports.not_yet(&key);
        }
        let (is_told, then) = if is_leaving {
            (&mut self.is_stay_told, "what pods say of the mesh may stay")
        } else {
            (&mut self.is_write_told, "tried again every minute")
        };
        if !std::mem::replace(is_told, true) {
            warn!(what = key, error = why, "not written into the API; {then}");
        }
        self.reports.failed(key, now);
    }

    /// Whether what was written on pods is to be taken back. A namespace that is to be deleted never comes back, and
    /// is the first that goes of what a manifest names: before the agent's rights, which go next.
    pub(super) fn is_leaving(&self) -> bool {
        self.is_gone || self.is_home_going
    }

    /// Whether this namespace is about to go, or has. All are followed.
    fn is_going(&self, namespace: &str) -> bool {
        let (kind, name) = (Kind::Namespace, namespace.to_owned());
        match self.objects.get(&ObjectKey { kind, namespace: String::new(), name }) {
            Some(Object::Namespace(found)) => found.metadata.deletion_timestamp.is_some(),
            _ => true,
        }
    }

    /// Whether nothing more is to be taken back of what is known, or may be.
    pub(super) fn is_taken_back(&self) -> bool {
        self.is_leaving() && self.confirmed().is_some() && self.reports.is_idle()
    }

    /// While another snapshot is due, what was read for who waits may be in that one alone. But no snapshot says of a
    /// caller that it was looked for in vain: for that there is none to wait for.
    pub(super) fn answer(&mut self) {
        let (is_due, objects) = (self.due().is_some(), &self.objects);
        self.remote.answer(self.snapshot.generation, |(ip, is_callers)| {
            !is_due || (*is_callers && !objects.names(*ip))
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
    pub(super) fn confirmed(&self) -> Option<Instant> {
        // `None` comes before every moment.
        self.kinds.values().map(|kind| kind.confirmed).min().flatten()
    }

    /// From when on another snapshot is to be made, if one is; a moment that has passed if at once.
    pub(super) fn due(&self) -> Option<Instant> {
        let listed = self.confirmed().filter(|_| self.is_stale)?;
        let due = self.pace.next(self.is_waited_for()).unwrap_or(listed);
        Some(self.held.map_or(due, |held| due.max(held)))
    }

    fn is_waited_for(&self) -> bool {
        self.is_urgent || self.remote.is_waited_for()
    }

    pub(super) fn snapshot_if_changed(&mut self) -> Option<Arc<Snapshot>> {
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
        tell_of(&snapshot);
        self.snapshot = Arc::new(snapshot);
        Some(Arc::clone(&self.snapshot))
    }

    pub(super) fn problems_if_changed(&mut self) -> Option<Arc<[Problem]>> {
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

fn here(context: &Context) -> Here<'_> {
    Here { node: &context.node, pod_cidrs: &context.pod_cidrs }
}
