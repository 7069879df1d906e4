//! Writes the verdicts of the direct way, and the generations by which they end.
//!
//! Everything is decided from the snapshot in [`mesh_core::direct`]; what is written is only what the
//! kernel's generations agree with. Whatever goes wrong here, the agent carries; generations that the kernel
//! does not take are written again, also when no other snapshot comes.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::addr::{EndpointAddr, OrigDst};
use mesh_core::affinity::Client;
use mesh_core::backoff::Backoff;
use mesh_core::direct::{self, Choice};
use mesh_core::generation::Generation;
use mesh_core::route::{Route, route};
use mesh_core::snapshot::{Snapshot, Workload, WorkloadUid};
use thiserror::Error;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use crate::capture::{CaptureError, Generations, VerdictEntry, Written};
use crate::net;
use crate::node::{Node, Wish};

/// Wishes that may wait. Each is a connection that was carried all the same.
pub(super) const WISHES: usize = 1024;

/// Pauses between attempts to write generations. Memory may be short for a moment, and meanwhile what is
/// carried costs more of it; an attempt that has little to write looks through all destinations.
const RETRY: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// How long a client's verdict goes without an endpoint that has not answered it: as long as the agent puts one off at most.
const SILENT: Duration = Duration::from_secs(60);

/// So many of these are remembered; past it none is left out until some are over.
const MOST_SILENT: usize = 4096;

/// Why there is no verdict.
#[derive(Debug, Error)]
enum VerdictError {
    #[error("the kernel cannot be told where pod {uid} listens")]
    NamespaceId { uid: Arc<str>, source: std::io::Error },
    #[error("capture")]
    Capture(#[from] CaptureError),
}

/// Writes verdicts, one after the other, on the thread that also follows the snapshot.
#[derive(Debug)]
pub(super) struct Verdicts {
    node: Arc<Node>,
    /// The number of a pod's namespace as another's sees it, by both cookies.
    numbers: HashMap<(u64, u64), u32>,
    /// Endpoints that have not answered a pod that dialled this, and until when it goes without them.
    silent: HashMap<(WorkloadUid, OrigDst, EndpointAddr), Instant>,
    /// Why the last one was not written: told once.
    failing: Option<String>,
    /// Until generations are written again that the kernel did not take. No failure: it has taken all.
    unwritten: Backoff,
}

impl Verdicts {
    pub(super) fn new(node: Arc<Node>) -> Self {
        let unwritten = Backoff::new(RETRY, RETRY_MAX);
        let (numbers, silent) = (HashMap::new(), HashMap::new());
        Self { node, numbers, silent, failing: None, unwritten }
    }

    /// Ends every verdict that `snapshot` touches. Before anything else that follows it: a verdict must
    /// not outlive what it was decided from.
    pub(super) fn follow(&mut self, snapshot: &Snapshot) {
        let pods = self.node.pods.load();
        let cookies: HashSet<u64> = pods.values().map(|pod| pod.netns.cookie()).collect();
        self.numbers.retain(|(from, to), _| cookies.contains(from) && cookies.contains(to));
        let key = self.node.capture.generation_key();
        let of_pod = |workload: &Arc<Workload>| {
            let pod = pods.get(&workload.uid)?;
            Some((workload.uid.to_string(), key.of_pod(workload, pod.netns.cookie())))
        };
        let policy = self.node.limits.balance;
        let of_destination = |ip| Some((ip, key.of_destination(snapshot, ip, policy)?));
        let generations = Generations {
            destinations: snapshot
                .captured_destinations()
                .into_iter()
                .filter_map(of_destination)
                .collect(),
            pods: snapshot.local_enrolled().filter_map(of_pod).collect(),
        };
        let written = self.node.capture.set_generations(generations);
        self.note(written);
    }

    /// Returns when generations are to be written again. Cancel-safe.
    pub(super) async fn due(&self) {
        if self.unwritten.failures() == 0 {
            std::future::pending::<()>().await;
        }
        // What is due is so at the first look: others that are looked at with this may always be ready.
        if let Some(wait) = self.unwritten.wait(Instant::now()) {
            sleep(wait).await;
        }
    }

    /// Writes the generations that the kernel did not take.
    pub(super) fn write_again(&mut self) {
        let written = self.node.capture.write_generations();
        self.note(written);
    }

    /// Has generations written again if need be. Told once until all are written.
    fn note(&mut self, written: Result<(), CaptureError>) {
        let is_first = self.unwritten.failures() == 0;
        match written {
            Ok(()) if is_first => {}
            Ok(()) => {
                self.unwritten.succeeded();
                info!(stage = "capture", "verdicts follow every change again");
            }
            Err(error) => {
                if is_first {
                    let error = crate::telemetry::chain(&error);
                    warn!(
                        error,
                        stage = "capture",
                        "a change is not in the kernel yet: the agent carries what it is about"
                    );
                }
                self.unwritten.failed(Instant::now(), |n| fastrand::u32(..n));
            }
        }
    }

    /// Decides what the kernel may do by itself the next time, and tells it.
    pub(super) fn grant(&mut self, wish: &Wish) {
        let snapshot = self.node.known.load_full();
        match self.write(&snapshot, wish) {
            Ok(Some(Written::Yes)) => {
                self.failing = None;
                debug!(pod = %wish.source, dst = %wish.dst, stage = "capture", "a verdict holds");
            }
            Ok(Some(Written::Outdated) | None) => {}
            Err(error) => self.report(&error),
        }
    }

    fn write(&mut self, snapshot: &Snapshot, wish: &Wish) -> Result<Option<Written>, VerdictError> {
        let node = Arc::clone(&self.node);
        let key = node.capture.generation_key();
        let found = (snapshot.workload(&wish.source), node.pod(&wish.source));
        let (Some(source), Some(pod)) = found else {
            return Ok(None);
        };
        let dst = OrigDst::canonical(wish.dst.0);
        let policy = node.limits.balance;
        let Some(destination) = key.of_destination(snapshot, dst.0.ip(), policy) else {
            return Ok(None);
        };
        let (now, mut until) = (Instant::now(), None::<Duration>);
        if let Some(addr) = wish.without {
            self.note_silent(&wish.source, dst, addr, now);
        }
        let mut is_avoided = |addr: EndpointAddr| {
            let silent = self.silent.get(&(Arc::clone(&wish.source), dst, addr));
            let silent = silent.and_then(|until| until.checked_duration_since(now));
            let left = node.loads().avoided_for(addr, now).max(silent);
            until = until.into_iter().chain(left).min();
            left.is_some()
        };
        // Held until it is written: a client that moves meanwhile would be sent back.
        let affinities = node.affinities();
        let mut kept_for = None;
        let bound = |timeout| {
            let client = Client { pod: Arc::clone(&source.uid), dst };
            let (to, left) = affinities.bound(&client, timeout, now)?;
            kept_for = Some(left);
            Some(to)
        };
        let choices = direct::verdict(snapshot, source, dst, policy, &mut is_avoided, bound);
        let Some(choices) = choices else {
            // Without it there is nothing that the kernel may do by itself: the agent tries, and goes on to the next.
            // Where it is the only one a firewall may have its reasons, past which the agent would carry.
            if wish.without.is_some() && has_others(snapshot, dst) {
                node.capture.remove_verdict(pod.netns.cookie(), dst)?;
            }
            return Ok(None);
        };
        until = until.into_iter().chain(kept_for).min();
        let mut entries = Vec::with_capacity(choices.len());
        for choice in &choices {
            entries.push(self.entry(pod.netns.cookie(), &pod.netns, choice)?);
        }
        let is_put_off = |(choice, entry): (&Choice, &VerdictEntry)| {
            matches!((choice, entry), (Choice::Direct { .. }, VerdictEntry::Agent(_)))
        };
        if choices.iter().zip(&entries).any(is_put_off) {
            // Its pod's generation is not in the kernel yet, and that it is then is no change that ends this.
            until = until.into_iter().chain([RETRY_MAX]).min();
        }
        let source = (pod.netns.cookie(), key.of_pod(source, pod.netns.cookie()));
        Ok(Some(node.capture.set_verdict(source, (dst, destination), until, &entries)?))
    }

    fn note_silent(
        &mut self,
        source: &WorkloadUid,
        dst: OrigDst,
        addr: EndpointAddr,
        now: Instant,
    ) {
        if self.silent.len() >= MOST_SILENT {
            self.silent.retain(|_, until| *until > now);
        }
        if self.silent.len() < MOST_SILENT {
            self.silent.insert((Arc::clone(source), dst, addr), now + SILENT);
        }
    }

    fn entry(
        &mut self,
        from: u64,
        netns: &net::Netns,
        choice: &Choice,
    ) -> Result<VerdictEntry, VerdictError> {
        let (addr, workload) = match choice {
            Choice::Agent(addr) => return Ok(VerdictEntry::Agent(*addr)),
            Choice::Direct { addr, workload } => (*addr, workload),
        };
        let enrolled = self.node.capture.pod_generation(&workload.uid);
        let (Some(server), Some(generation)) = (self.node.pod(&workload.uid), enrolled) else {
            return Ok(VerdictEntry::Agent(addr));
        };
        if generation != self.generation_of(workload, server.netns.cookie()) {
            return Ok(VerdictEntry::Agent(addr));
        }
        let key = (from, server.netns.cookie());
        let nsid = match self.numbers.get(&key) {
            Some(nsid) => *nsid,
            None => {
                let nsid = net::namespace_id(netns, &server.netns).map_err(|source| {
                    VerdictError::NamespaceId { uid: Arc::clone(&workload.uid), source }
                })?;
                self.numbers.insert(key, nsid);
                nsid
            }
        };
        Ok(VerdictEntry::Direct { addr, generation, nsid })
    }

    fn generation_of(&self, workload: &Workload, netns: u64) -> Generation {
        self.node.capture.generation_key().of_pod(workload, netns)
    }

    /// Logs why connections go on being carried, once for each reason.
    fn report(&mut self, error: &VerdictError) {
        let why = crate::telemetry::chain(error);
        if self.failing.as_ref() != Some(&why) {
            warn!(error = %why, stage = "capture", "no verdict: the agent carries");
            self.failing = Some(why);
        }
    }
}

/// Whether a connection to `dst` may come to several endpoints.
fn has_others(snapshot: &Snapshot, dst: OrigDst) -> bool {
    match route(snapshot, dst) {
        Route::Service { candidates, .. } => candidates.as_slice().len() > 1,
        _ => false,
    }
}
