//! Direct connections: their records, made from what the kernel tells, and their end when they are no
//! longer allowed.
//!
//! Every connection is judged when it is heard of and with every snapshot, by the code that decides for
//! carried ones, so there is no moment at which one that is not allowed can go unseen.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_core::addr::{EndpointAddr, OrigDst, canonical};
use mesh_core::affinity::Client;
use mesh_core::authorize::AuthorizeRefusal;
use mesh_core::direct::{Open as Judged, still_allowed};
use mesh_core::protocol::Protocol;
use mesh_core::snapshot::{Endpoint, Snapshot, Workload, WorkloadUid};
use mesh_core::stage::Stage;
use tracing::{info, warn};

use crate::capture::{DirectFacts, DirectRecord, Ended, KernelEvents, PodTag};
use crate::net::{Ends, SockDiag};
use crate::node::Node;
use crate::telemetry::{DirectTracked, Failure, Neighbours, Outcome, Party, Path, ResponseFlags};

/// How often the kernel is asked what happened: the ring has room for ten times what a busy node tells in
/// this time.
pub(super) const INTERVAL: Duration = Duration::from_millis(100);
/// How often records of ends that the kernel could not tell are looked for, in intervals.
const SWEEP: u32 = 100;

/// All direct connections of this node, shared by the tasks of the control thread.
#[derive(Clone, Debug)]
pub(super) struct Connections(Arc<Mutex<Table>>);

#[derive(Debug)]
struct Table {
    node: Arc<Node>,
    events: KernelEvents,
    open: HashMap<u64, Open>,
    turn: u32,
}

#[derive(Debug)]
struct Open {
    facts: DirectFacts,
    /// UIDs of the client's and the server's pod; `None` if one was gone when it was heard of.
    pods: Option<(WorkloadUid, WorkloadUid)>,
    tracked: DirectTracked,
    /// Why this agent has ended it.
    refused: Option<AuthorizeRefusal>,
    /// The kernel did not know it when it was asked last.
    is_missing: bool,
}

impl Connections {
    /// Begins with the connections that are open already, of the time of an earlier agent.
    pub(super) fn start(node: Arc<Node>, events: KernelEvents) -> Self {
        let mut table = Table { node, events, open: HashMap::new(), turn: 0 };
        table.adopt();
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

    /// Judges every open connection by a new snapshot, which is in use already.
    pub(super) fn judge(&self, snapshot: &Snapshot) {
        let mut table = self.lock();
        table.drain();
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
        self.turn = self.turn.wrapping_add(1);
        if self.turn.is_multiple_of(SWEEP) {
            self.sweep();
        }
    }

    fn drain(&mut self) {
        while let Some(record) = self.events.next() {
            match record {
                DirectRecord::Opened(facts, setup) => self.opened(facts, setup),
                DirectRecord::Closed(facts, ended) => self.ended(facts, &ended, None),
                DirectRecord::Failed(facts, ended) => {
                    self.ended(facts, &ended, Some(failure_to_connect(&ended)));
                }
            }
        }
    }

    /// What is open since before this agent: its bytes so far were counted by another one.
    fn adopt(&mut self) {
        match self.node.capture.direct_connections() {
            Ok(found) => {
                for facts in found {
                    self.opened(facts, Duration::ZERO);
                }
                self.look();
                for open in self.open.values() {
                    open.tracked.skip_carried();
                }
            }
            Err(error) => {
                let error = crate::telemetry::chain(&error);
                warn!(error, stage = "telemetry", "direct connections of before are not known");
            }
        }
    }

    fn opened(&mut self, facts: DirectFacts, setup: Duration) {
        if self.open.contains_key(&facts.cookie) {
            return;
        }
        let snapshot = self.node.snapshot.load_full();
        let mut open = self.record(&snapshot, facts);
        self.keep_to(&snapshot, &open);
        open.tracked.established(setup);
        self.refuse_unless_allowed(&snapshot, &mut open);
        self.open.insert(facts.cookie, open);
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
        let client = pod(facts.src.ip(), facts.client);
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
            pods: client.map(uid).zip(server.map(uid)),
            tracked: self.node.telemetry.open_direct(neighbours, started),
            refused: None,
            is_missing: false,
        }
    }

    fn ended(&mut self, facts: DirectFacts, ended: &Ended, failure: Option<Failure>) {
        let known = self.open.remove(&facts.cookie);
        let open = known.unwrap_or_else(|| {
            let mut open = self.record(&self.node.snapshot.load_full(), facts);
            if failure.is_none() {
                open.tracked.established(Duration::ZERO);
            }
            open
        });
        open.tracked.carried(ended.sent, ended.received);
        let path = Path { rtt: ended.rtt, retransmits: ended.retransmits };
        let outcome = match (failure, open.refused) {
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

    fn judge(&mut self, snapshot: &Snapshot) {
        let mut open = std::mem::take(&mut self.open);
        for open in open.values_mut() {
            self.refuse_unless_allowed(snapshot, open);
        }
        self.open = open;
    }

    fn refuse_unless_allowed(&self, snapshot: &Snapshot, open: &mut Open) {
        if open.refused.is_some() {
            return;
        }
        let verdict = match &open.pods {
            None => Err(AuthorizeRefusal::UnknownWorkload),
            Some((client_uid, server_uid)) => {
                let judged =
                    Judged { client_uid, client: open.facts.src, server_uid, to: open.facts.to };
                still_allowed(snapshot, &judged)
            }
        };
        if let Err(refusal) = verdict {
            open.refused = Some(refusal);
            info!(
                client = %open.facts.src,
                to = %open.facts.to,
                reason = refusal.reason(),
                stage = Stage::Authorize.as_str(),
                "a direct connection is no longer allowed"
            );
            self.destroy(open);
        }
    }

    /// Ends both ends. Each tells the other with a reset, so one would do, were it not that somebody
    /// between them may drop it.
    fn destroy(&self, open: &Open) {
        let (src, to) = (canonical(open.facts.src), canonical(open.facts.to.0));
        let pods = self.node.pods.load();
        let client = pods.values().find(|pod| pod.netns.cookie() == open.facts.netns);
        let server = pods.values().find(|pod| PodTag::of(&pod.uid) == open.facts.server);
        let ends = [
            (client, Ends { local: src, remote: to }, Some(open.facts.cookie)),
            (server, Ends { local: to, remote: src }, None),
        ];
        // The server first: its end has to be found by its addresses, while it is there.
        for (pod, ends, cookie) in ends.into_iter().rev() {
            let Some(pod) = pod else { continue };
            let destroyed = pod.netns.run(|| {
                let diag = SockDiag::open()?;
                match diag.look(ends, cookie)? {
                    Some(found) => diag.destroy(ends, found.cookie).map(drop),
                    None => Ok(()),
                }
            });
            if let Err(error) = destroyed.and_then(|done| done) {
                let pod = &pod.uid;
                warn!(%error, %pod, stage = "authorize", "a direct connection is not ended");
            }
        }
    }

    /// Returns the cookies of those that the kernel has told of.
    fn look(&mut self) -> HashSet<u64> {
        let mut seen = HashSet::new();
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
                let diag = SockDiag::open()?;
                for cookie in cookies {
                    let Some(open) = self.open.get(&cookie) else { continue };
                    let facts = &open.facts;
                    let ends = Ends { local: canonical(facts.src), remote: canonical(facts.to.0) };
                    if let Some(info) = diag.look(ends, Some(cookie))? {
                        open.tracked.carried(info.payload_sent(), info.payload_received());
                        seen.insert(cookie);
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

    /// Finishes connections whose end could not be told: the kernel did not know them twice in a row.
    fn sweep(&mut self) {
        if let Err(error) = self.node.capture.sweep_verdicts() {
            let error = crate::telemetry::chain(&error);
            warn!(error, stage = "capture", "old verdicts are not removed");
        }
        if self.open.is_empty() {
            return;
        }
        let Ok(listed) = self.node.capture.direct_connections() else { return };
        let mut there: HashSet<u64> = listed.into_iter().map(|facts| facts.cookie).collect();
        // The list has no room for all that is open.
        there.extend(self.look());
        let mut gone = Vec::new();
        for (cookie, open) in &mut self.open {
            let was_missing = std::mem::replace(&mut open.is_missing, !there.contains(cookie));
            if was_missing && open.is_missing {
                gone.push(*cookie);
            }
        }
        for cookie in gone {
            if let Some(open) = self.open.remove(&cookie) {
                open.tracked.finish(Outcome::Complete, open.facts.age, None);
            }
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
