//! Direct connections: their records, made from what the kernel tells, and their end when they are no
//! longer allowed.
//!
//! Every connection is judged when it is heard of and with every snapshot, by the code that decides for
//! carried ones. What the ring had no room to tell is found in the kernel's list of open connections:
//! before the next snapshot judges, and otherwise within a second. What has ended already is recorded and
//! not judged.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_core::addr::{EndpointAddr, OrigDst, canonical};
use mesh_core::affinity::Client;
use mesh_core::authorize::AuthorizeRefusal;
use mesh_core::direct::{Open as Judged, is_full, still_allowed};
use mesh_core::protocol::Protocol;
use mesh_core::snapshot::{Endpoint, Snapshot, Workload, WorkloadUid};
use mesh_core::stage::Stage;
use tracing::warn;

use super::ending::Fate;
use crate::capture::{DirectFacts, DirectRecord, Ended, KernelEvents, PodTag};
use crate::net::{Ends, SockDiag};
use crate::node::{LocalPod, Node, Wish};
use crate::telemetry::{DirectTracked, Failure, Neighbours, Outcome, Party, Path, ResponseFlags};

/// How often the kernel is asked what happened: the ring has room for ten times what a busy node tells in
/// this time.
pub(super) const INTERVAL: Duration = Duration::from_millis(100);
/// How often the kernel's list is compared with what is known here.
const SWEEP: Duration = Duration::from_secs(10);
/// The same while they are known to differ.
const SWEEP_SOON: Duration = Duration::from_secs(1);

/// Connections that are followed at most. The kernel's list has room for 65,536: for these, and for what
/// begins before the next look.
const MOST: usize = 61_440;
/// From so many connections of one pod on, the kernel is asked for all of its sockets at once.
const CROWD: usize = 32;

/// All direct connections of this node, shared by the tasks of the control thread.
#[derive(Clone, Debug)]
pub(super) struct Connections(Arc<Mutex<Table>>);

#[derive(Debug)]
struct Table {
    node: Arc<Node>,
    events: KernelEvents,
    open: HashMap<u64, Open>,
    /// What the ring had no room for, as it was counted when the list was read last.
    lost: u64,
    swept: Instant,
    /// As many are followed.
    limit: usize,
    /// So many are open that no further one may begin.
    is_full: bool,
    /// What is known here is not what the kernel knows, as far as anybody can tell.
    differs: bool,
}

#[derive(Debug)]
struct Open {
    facts: DirectFacts,
    /// When `connect()` was called.
    started: Instant,
    /// UIDs of the client's and the server's pod; `None` if one was gone when it was heard of.
    pods: Option<(WorkloadUid, WorkloadUid)>,
    tracked: DirectTracked,
    fate: Fate,
    /// Since when the kernel does not know it.
    missing: Option<Instant>,
}

impl Connections {
    /// Begins with the connections that are open already, of the time of an earlier agent.
    pub(super) fn start(node: Arc<Node>, events: KernelEvents, limit: usize) -> Self {
        let lost = node.capture.direct_events_lost();
        let (open, swept, limit) = (HashMap::new(), Instant::now(), limit.min(MOST));
        let (is_full, differs) = (false, false);
        let mut table = Table { node, events, open, lost, swept, limit, is_full, differs };
        let (adopted, _listed) = table.adopt();
        table.look();
        for cookie in &adopted {
            if let Some(open) = table.open.get(cookie) {
                // Its bytes so far were counted by another one.
                open.tracked.skip_carried();
            }
        }
        table.judge_some(&adopted);
        Self(Arc::new(Mutex::new(table)))
    }

    /// Follows what the kernel tells until dropped.
    pub(super) async fn follow(self) {
        let mut interval = tokio::time::interval(INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            self.lock().turn();
        }
    }

    /// Hears what has happened until now. For the last moment in which the snapshot is in use under which
    /// it has: pods that are gone are not to be named any more.
    pub(super) fn hear(&self) {
        self.lock().hear();
    }

    /// Judges every open connection by a new snapshot, which is in use already.
    pub(super) fn judge(&self, snapshot: &Snapshot) {
        let mut table = self.lock();
        table.hear();
        table.judge(snapshot);
    }

    /// Brings byte counters up to date.
    pub(super) fn look(&self) {
        let mut table = self.lock();
        table.drain();
        table.look();
    }

    /// Leaves what is open to the next agent.
    pub(super) fn let_go(&self) {
        let mut table = self.lock();
        table.drain();
        for (_cookie, open) in table.open.drain() {
            open.tracked.let_go();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn turn(&mut self) {
        self.drain();
        for open in self.open.values_mut() {
            open.fate.end(&self.node, &open.facts);
        }
        let is_full = is_full(self.is_full, self.open.len(), self.limit);
        if is_full != std::mem::replace(&mut self.is_full, is_full) {
            self.node.capture.let_direct_begin(!is_full);
        }
        self.differs |= self.lost != self.node.capture.direct_events_lost();
        if self.swept.elapsed() >= if self.differs { SWEEP_SOON } else { SWEEP } {
            self.sweep();
        }
    }

    /// Reads what the kernel tells, and what it could not tell.
    fn hear(&mut self) {
        self.drain();
        if self.lost != self.node.capture.direct_events_lost() {
            let (adopted, _listed) = self.adopt();
            self.judge_some(&adopted);
            // Of ends that were not told nothing is known yet.
            self.differs = true;
        }
    }

    fn drain(&mut self) {
        // The programs go on writing meanwhile. What is left is read the next time, and what the ring has no room
        // for is found in the kernel.
        const AT_ONCE: usize = 8192;
        let mut heard = Vec::new();
        for _ in 0..AT_ONCE {
            let Some(record) = self.events.next() else { break };
            match record {
                DirectRecord::Opened(facts, setup) => heard.extend(self.opened(facts, setup)),
                DirectRecord::Closed(facts, ended) => self.ended(facts, &ended, None),
                DirectRecord::Failed(facts, ended) => {
                    self.ended(facts, &ended, Some(failure_to_connect(&ended)));
                }
            }
        }
        self.judge_some(&heard);
    }

    /// Takes in what is open and was not told of. Returns the cookies of these, to be judged, and of all
    /// that are listed.
    fn adopt(&mut self) -> (Vec<u64>, HashSet<u64>) {
        let lost = self.node.capture.direct_events_lost();
        let found = match self.node.capture.direct_connections() {
            Ok(found) => found,
            Err(error) => {
                let error = crate::telemetry::chain(&error);
                warn!(error, stage = "telemetry", "not all direct connections are known");
                return Default::default();
            }
        };
        self.lost = lost;
        let listed = found.iter().map(|(facts, _setup)| facts.cookie).collect();
        let new = found.into_iter().filter_map(|(facts, setup)| self.opened(facts, setup));
        (new.collect(), listed)
    }

    /// Returns the cookie of one that was not known.
    fn opened(&mut self, facts: DirectFacts, setup: Duration) -> Option<u64> {
        if self.open.contains_key(&facts.cookie) {
            return None;
        }
        let snapshot = self.node.known.load_full();
        let mut open = self.record(&snapshot, facts);
        self.keep_to(&snapshot, &open);
        open.tracked.established(setup);
        self.open.insert(facts.cookie, open);
        Some(facts.cookie)
    }

    /// A client whose connections pass no agent goes on keeping to its endpoint.
    fn keep_to(&self, snapshot: &Snapshot, open: &Open) {
        let Some((pod, _)) = &open.pods else { return };
        let dst = OrigDst::canonical(open.facts.orig_dst.0);
        if snapshot.service_at(dst.0.ip()).is_some_and(|service| service.affinity.is_some()) {
            let client = Client { pod: Arc::clone(pod), dst };
            self.node.affinities().seen(&client, open.facts.to, Instant::now());
        }
    }

    /// The records of a connection that is heard of for the first time.
    fn record(&self, snapshot: &Snapshot, facts: DirectFacts) -> Open {
        // The kernel noted which pods they are; that the addresses still mean those pods says so twice.
        let pod = |ip, tag| snapshot.workload_at(ip).filter(|pod| PodTag::of(&pod.uid) == tag);
        // The client may have used another of its addresses: then its namespace says which of our pods it is.
        let pods = self.node.pods.load();
        let in_its_namespace = || {
            let is_it = |pod: &&Arc<LocalPod>| {
                pod.netns.cookie() == facts.netns && PodTag::of(&pod.uid) == facts.client
            };
            snapshot.workload(&pods.values().find(is_it)?.uid)
        };
        let client = pod(facts.src.ip(), facts.client).or_else(in_its_namespace);
        let server = pod(facts.to.0.ip(), facts.server);
        let party = |addr, workload: Option<&Arc<Workload>>| match workload {
            Some(workload) => Party::proven(addr, workload),
            None => Party::unproven(addr, None),
        };
        let neighbours = Neighbours {
            source: party(canonical(facts.src), client),
            destination: party(canonical(facts.to.0), server),
            orig_dst: facts.orig_dst,
            service: snapshot.service_at(facts.orig_dst.0.ip()).cloned(),
            protocol: protocol(snapshot, &facts, server),
            node: Arc::clone(&snapshot.node),
        };
        let started = Instant::now().checked_sub(facts.age).unwrap_or_else(Instant::now);
        let uid = |workload: &Arc<Workload>| Arc::clone(&workload.uid);
        Open {
            facts,
            started,
            pods: client.map(uid).zip(server.map(uid)),
            tracked: self.node.telemetry.open_direct(neighbours, started),
            fate: Fate::Allowed,
            missing: None,
        }
    }

    fn ended(&mut self, facts: DirectFacts, ended: &Ended, failure: Option<Failure>) {
        let known = self.open.remove(&facts.cookie);
        let open = known.unwrap_or_else(|| {
            let mut open = self.record(&self.node.known.load_full(), facts);
            if failure.is_none() {
                open.tracked.established(Duration::ZERO);
            }
            open
        });
        if failure.is_some() && ended.retransmits > 0 {
            self.leave_out(&open);
        }
        open.tracked.carried(ended.sent, ended.received);
        let path = Path { rtt: ended.rtt, retransmits: ended.retransmits };
        let outcome = match (failure, open.fate.refusal()) {
            (Some(failure), _) => Outcome::Failed(failure),
            (None, Some(refusal)) => Outcome::Failed(denied(refusal)),
            (None, None) if ended.clean => Outcome::Complete,
            (None, None) => Outcome::Failed(
                Failure::new(Stage::Telemetry, "application_reset", "reset by an application")
                    .with_flags(ResponseFlags::None),
            ),
        };
        open.tracked.finish(outcome, ended.duration, Some(path));
    }

    /// Its endpoint listens and has not answered, and of such the kernel knows nothing: the client's next connections
    /// go to others, if there are any, as they do where an agent has tried. Nobody else's: it may be this client
    /// that is not let through.
    fn leave_out(&self, open: &Open) {
        let Some((pod, _)) = &open.pods else { return };
        let (to, dst) = (open.facts.to, OrigDst::canonical(open.facts.orig_dst.0));
        let client = Client { pod: Arc::clone(pod), dst };
        self.node.affinities().forsake(&client, to);
        let wish = Wish { source: client.pod, dst, without: Some(to) };
        // Full: the next one that fails says it again.
        drop(self.node.wishes.try_send(wish));
    }

    fn judge(&mut self, snapshot: &Snapshot) {
        for open in self.open.values_mut() {
            open.refuse_unless_allowed(&self.node, snapshot);
        }
    }

    /// Judges those of `cookies` that are still open.
    fn judge_some(&mut self, cookies: &[u64]) {
        let snapshot = self.node.known.load_full();
        for cookie in cookies {
            if let Some(open) = self.open.get_mut(cookie) {
                open.refuse_unless_allowed(&self.node, &snapshot);
            }
        }
    }

    /// Returns of those that the kernel was asked about whether it knows them.
    fn look(&mut self) -> HashMap<u64, bool> {
        let mut seen = HashMap::new();
        let mut by_netns: HashMap<u64, Vec<u64>> = HashMap::new();
        for (cookie, open) in &self.open {
            by_netns.entry(open.facts.netns).or_default().push(*cookie);
        }
        let pods = self.node.pods.load();
        for (netns, cookies) in by_netns {
            let Some(pod) = pods.values().find(|pod| pod.netns.cookie() == netns) else {
                continue;
            };
            let looked = pod.netns.run(|| {
                if cookies.len() >= CROWD {
                    SockDiag::all(|info| {
                        let open = self.open.get(&info.cookie);
                        if let Some(open) = open.filter(|open| open.facts.netns == netns) {
                            open.tracked.carried(info.payload_sent(), info.payload_received());
                            seen.insert(info.cookie, true);
                        }
                    })?;
                }
                let diag = SockDiag::open()?;
                for cookie in cookies {
                    let Some(open) = self.open.get(&cookie) else { continue };
                    // A list that changes while it is read may lack one.
                    if seen.contains_key(&cookie) {
                        continue;
                    }
                    let facts = &open.facts;
                    let ends = Ends { local: canonical(facts.src), remote: canonical(facts.to.0) };
                    let found = diag.look(ends, Some(cookie))?;
                    seen.insert(cookie, found.is_some());
                    if let Some(info) = found {
                        open.tracked.carried(info.payload_sent(), info.payload_received());
                    }
                }
                Ok::<_, std::io::Error>(())
            });
            if let Err(error) = looked.and_then(|done| done) {
                tracing::debug!(%error, pod = %pod.uid, stage = "telemetry", "bytes are not known");
            }
        }
        seen
    }

    /// Compares what is known with what the kernel knows: takes in what is open, and finishes what it did
    /// not know twice in a row, whose end could not be told.
    fn sweep(&mut self) {
        self.swept = Instant::now();
        if let Err(error) = self.node.capture.sweep_verdicts() {
            let error = crate::telemetry::chain(&error);
            warn!(error, stage = "capture", "old verdicts are not removed");
        }
        let (adopted, listed) = self.adopt();
        self.judge_some(&adopted);
        let looked = self.look();
        self.differs = false;
        let now = Instant::now();
        let mut gone = Vec::new();
        for (cookie, open) in &mut self.open {
            // The list has no room for all that is open, and keeps one whose end the program missed.
            if looked.get(cookie).copied().unwrap_or_else(|| listed.contains(cookie)) {
                open.missing = None;
            } else if let Some(since) = open.missing {
                gone.push((*cookie, since));
            } else {
                open.missing = Some(now);
                self.differs = true;
            }
        }
        for (cookie, since) in gone {
            if listed.contains(&cookie) {
                self.node.capture.forget_direct(cookie);
            }
            if let Some(open) = self.open.remove(&cookie) {
                let outcome = Outcome::Failed(open.fate.refusal().map_or_else(untold, denied));
                let duration = since.saturating_duration_since(open.started);
                open.tracked.finish(outcome, duration, None);
            }
        }
    }
}

impl Open {
    fn refuse_unless_allowed(&mut self, node: &Node, snapshot: &Snapshot) {
        if self.fate.refusal().is_some() {
            return;
        }
        let verdict = match &self.pods {
            None => Err(AuthorizeRefusal::UnknownWorkload),
            Some((client_uid, server_uid)) => {
                let (client, to) = (self.facts.src, self.facts.to);
                still_allowed(snapshot, &Judged { client_uid, client, server_uid, to })
            }
        };
        if let Err(refusal) = verdict {
            self.fate.refuse(node, &self.facts, refusal);
        }
    }
}

/// What is spoken, if a service declares it.
fn protocol(
    snapshot: &Snapshot,
    facts: &DirectFacts,
    server: Option<&Arc<Workload>>,
) -> Option<Protocol> {
    let port = snapshot.service_at(facts.orig_dst.0.ip())?.port(facts.orig_dst.0.port())?;
    let addr = EndpointAddr(canonical(facts.to.0));
    Some(Protocol::of(port, &Endpoint { addr, workload: server.cloned() }))
}

/// The kernel does not tell why, but who was refused has not waited.
fn failure_to_connect(ended: &Ended) -> Failure {
    if ended.retransmits == 0 {
        Failure::new(Stage::Deliver, "connection_refused", "refused, or given up by the client")
    } else {
        Failure::new(Stage::Deliver, "connect_timeout", "no answer")
    }
}

/// In the words of a connection that a policy ends.
fn denied(refusal: AuthorizeRefusal) -> Failure {
    let detail = format!("no longer allowed: {}", refusal.reason());
    Failure::new(Stage::Authorize, "denied", detail)
}

/// It has ended, and the kernel had no room to tell how.
fn untold() -> Failure {
    Failure::new(Stage::Telemetry, "end_unknown", "how it ended was not told")
        .with_flags(ResponseFlags::None)
}
