//! What every connection of this node can see, and what each worker has for itself.
//!
//! Nothing here decides: a connection reads the snapshot once, and finds through this the pods'
//! namespaces, the loads that balancing shares, and its worker's tunnels.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use mesh_core::addr::{EndpointAddr, OrigDst};
use mesh_core::affinity::Affinities;
use mesh_core::balance::{Loads, Policy};
use mesh_core::snapshot::{Workload, WorkloadUid};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::capture::{Capture, OrigDstTable};
use crate::known::Known;
use crate::net::Netns;
use crate::opening::Opening;
use crate::telemetry::Telemetry;
use crate::tunnel::Tunnels;

/// How connections are treated, fixed at start.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For one TCP connection to an application or past the mesh. Default 5 s.
    pub connect_timeout: Duration,
    /// Endpoints that one connection tries. Default 3: enough to step around a dead one, too few to
    /// multiply the load of a service that refuses everybody.
    pub attempts: usize,
    /// How an endpoint is chosen.
    pub balance: Policy,
}

impl Limits {
    /// The default of [`Self::attempts`].
    pub const ATTEMPTS: usize = 3;
}

/// Shared by all workers.
#[derive(Debug)]
pub struct Node {
    /// What is known of the mesh now.
    pub known: Known,
    /// The pods of this node whose namespaces are open, by UID.
    pub pods: ArcSwap<HashMap<WorkloadUid, Arc<LocalPod>>>,
    /// Latency and outstanding connections by endpoint.
    pub loads: Mutex<Loads>,
    /// Which endpoints clients keep to, of services that ask for it.
    pub affinities: Mutex<Affinities>,
    /// The eBPF programs and their maps.
    pub capture: Arc<Capture>,
    /// Metrics, access log and the table of connections.
    pub telemetry: Telemetry,
    /// Times and numbers.
    pub limits: Limits,
    /// One permit a connection: the bound of what pods and peers can make this agent hold.
    pub connections: Arc<Semaphore>,
    /// What has been accepted from pods and is not established yet.
    pub opening: Arc<Opening>,
    /// Turns true when the agent is told to end.
    pub draining: watch::Receiver<bool>,
    /// To whoever writes verdicts of the direct way. A full queue means later.
    pub wishes: mpsc::Sender<Wish>,
}

/// A connection was carried that the kernel could let through by itself the next time.
#[derive(Clone, Debug)]
pub struct Wish {
    /// UID of the pod that connected.
    pub source: WorkloadUid,
    /// What it dialled.
    pub dst: OrigDst,
    /// An endpoint that has not answered it: to be left out for a while if there are others.
    pub without: Option<EndpointAddr>,
}

/// A pod of this node: its namespace stays open for as long as a connection uses it.
#[derive(Debug)]
pub struct LocalPod {
    /// `metadata.uid`.
    pub uid: WorkloadUid,
    /// Where its sockets live.
    pub netns: Netns,
    /// Until then its connections wait for its certificate.
    pub certificate_by: Instant,
}

/// What one worker has for itself.
#[derive(Debug)]
pub struct Worker {
    /// What it shares with the others.
    pub node: Arc<Node>,
    /// Its tunnels: no other worker touches them, so no flow changes threads.
    pub tunnels: Arc<Tunnels>,
    orig_dst: Mutex<OrigDstTable>,
    /// Pods of other nodes that it had to do with lately. Nobody else touches it but once a minute.
    used: Mutex<HashSet<WorkloadUid>>,
}

impl Node {
    /// The loads. Held for a decision, never across an await.
    pub fn loads(&self) -> MutexGuard<'_, Loads> {
        self.loads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which endpoints clients keep to. Taken before the loads where both are; held for a decision and
    /// for telling the kernel of it, never across an await.
    pub fn affinities(&self) -> MutexGuard<'_, Affinities> {
        self.affinities.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pod with this UID, if it is one of this node's that are or were just enrolled.
    pub fn pod(&self, uid: &str) -> Option<Arc<LocalPod>> {
        self.pods.load().get(uid).cloned()
    }

    /// Whether the agent takes no new connections any more.
    pub fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }
}

impl Worker {
    /// A worker's own part of `node`.
    pub fn new(node: Arc<Node>, tunnels: Arc<Tunnels>) -> Self {
        let orig_dst = Mutex::new(node.capture.orig_dst_table());
        Self { node, tunnels, orig_dst, used: Mutex::default() }
    }

    /// A connection to or from a pod of another node begins: what is known of it is kept.
    pub fn uses(&self, workload: &Workload) {
        if self.node.known.reads_on_demand() {
            let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
            if !used.contains(&workload.uid) {
                used.insert(Arc::clone(&workload.uid));
            }
        }
    }

    /// The pods for which that was said since the last time.
    pub fn take_used(&self) -> HashSet<WorkloadUid> {
        std::mem::take(&mut *self.used.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The table of original destinations. Never contended: the lock only tells the compiler what
    /// the design guarantees.
    pub fn orig_dst(&self) -> MutexGuard<'_, OrigDstTable> {
        self.orig_dst.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
