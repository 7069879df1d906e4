//! Enrols and releases the pods of this node as the snapshot says.
//!
//! Established connections are never touched: enrolling decides about new ones only, and a pod that
//! leaves keeps its listeners for [`LINGER`], since a connection may be between the kernel's decision
//! and our accept.

mod leaving;
mod listening;

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::backoff::Backoff;
use mesh_core::settings::Settings;
use mesh_core::snapshot::{Enrolment, Snapshot, Workload, WorkloadUid};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use super::namespaces::Namespaces;
use super::shortfall::{EnrolError, NotEnrolled, Shortfall};
use super::uncertified::{Lacks, Uncertified};
use crate::capture::{Capture, CaptureError, Destinations, PodCapture};
use crate::discovery::enrol::left_alone;
use crate::discovery::{Outcome, Outcomes};
use crate::identity::store::Identities;
use crate::node::{LocalPod, Worker};
use crate::workers::Workers;

/// How long listeners outlive their pod's enrolment.
const LINGER: Duration = Duration::from_secs(1);
/// After which what is neither enrolling nor leaving a pod is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// What somebody else has put in the way may stay there.
const RETRY_MAX: Duration = Duration::from_secs(30);
/// Between looks at whether the last connection that needs a namespace's routes has ended: the first,
/// and in the end.
const RETIRE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How long the connections of a pod that has just started wait for its certificate: it is asked for when
/// the pod's object comes, and in a busy cluster may take longer than the sandbox.
const STARTING: Duration = Duration::from_secs(10);

/// The pods that are enrolled on this node.
#[derive(Debug)]
pub(super) struct Pods {
    workers: Arc<Workers>,
    contexts: Vec<Arc<Worker>>,
    identities: Arc<Identities>,
    namespaces: Namespaces,
    enrolled: HashMap<WorkloadUid, Enrolled>,
    /// What could not be enrolled.
    failing: HashMap<WorkloadUid, NotEnrolled>,
    uncertified: Uncertified,
    uncaptured: Option<String>,
    everything: Option<String>,
    /// Why what is gone may have left something.
    leftovers: Option<String>,
    /// Until that is tried again.
    clearing: Backoff,
    published: watch::Sender<Shortfall>,
    outcomes: watch::Sender<Arc<Outcomes>>,
    serving: JoinSet<()>,
}

#[derive(Debug)]
struct Enrolled {
    ips: Vec<IpAddr>,
    /// As the manifest has it.
    netns: Option<Arc<str>>,
    /// The namespace that it had then. It is held open, so no other gets this number.
    inode: u64,
    settings: Settings,
    stop: watch::Sender<bool>,
    /// The kernel refused to let go of it: nobody knows how much of it is still captured.
    is_stuck: bool,
}

impl Enrolled {
    /// Whether the pod has these addresses still, and perhaps others, in the namespace of that name.
    fn is_part_of(&self, workload: &Workload) -> bool {
        self.netns == workload.netns && self.ips.iter().all(|ip| workload.ips.contains(ip))
    }

    /// Whether the pod has the addresses and the namespace with which it was enrolled.
    fn is(&self, workload: &Workload) -> bool {
        // The API may tell them in another order than they were seen in.
        let has = |ip| self.ips.contains(ip);
        workload.ips.len() == self.ips.len()
            && workload.ips.iter().all(has)
            && workload.netns == self.netns
    }
}

/// Whether the pod is of this node, and is to take part now or as soon as it has an address.
fn is_to_take_part(snapshot: &Snapshot, workload: &Workload) -> bool {
    let starts = Enrolment::LeftAlone(left_alone::NO_ADDRESS);
    workload.node == snapshot.node && (workload.is_enrolled() || workload.enrolment == starts)
}

impl Pods {
    pub(super) fn new(
        (workers, contexts): (Arc<Workers>, Vec<Arc<Worker>>),
        identities: Arc<Identities>,
        namespaces: Namespaces,
        covered: Option<Instant>,
    ) -> Self {
        Self {
            workers,
            contexts,
            identities,
            namespaces,
            enrolled: HashMap::new(),
            failing: HashMap::new(),
            uncertified: Uncertified::new(covered),
            uncaptured: None,
            everything: None,
            leftovers: None,
            clearing: Backoff::new(RETRY, RETRY_MAX),
            published: watch::Sender::default(),
            outcomes: watch::Sender::default(),
            serving: JoinSet::new(),
        }
    }

    /// Returns when [`Self::follow`] has something to try again, and meanwhile looks after what pods that
    /// have left still need. Cancel-safe.
    pub(super) async fn due(&self) {
        let again = self.failing.values().map(NotEnrolled::again);
        let stuck = self.uncaptured.is_some() || self.enrolled.values().any(|pod| pod.is_stuck);
        let clear = self.leftovers.is_some().then(|| {
            let wait = self.clearing.wait(std::time::Instant::now());
            Instant::now() + wait.unwrap_or_default()
        });
        let next = again.chain(stuck.then(|| Instant::now() + RETRY)).chain(clear).min();
        let try_again = async {
            match next {
                Some(next) => sleep_until(next).await,
                None => std::future::pending().await,
            }
        };
        let replaced = async {
            let is_replaced =
                |(uid, pod): (&WorkloadUid, &Enrolled)| !pod.is_stuck && self.is_replaced(uid, pod);
            while !self.enrolled.iter().any(is_replaced) {
                sleep(self.namespaces.audit()).await;
            }
        };
        let retire = async {
            let mut pause = RETIRE.0;
            while self.capture().retire_routes() {
                sleep(pause).await;
                pause = (pause * 2).min(RETIRE.1);
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = try_again => {}
            () = replaced => {}
            () = retire => {}
        }
    }

    /// Whether the pod has another namespace by now: one that is made anew changes no manifest.
    fn is_replaced(&self, uid: &str, pod: &Enrolled) -> bool {
        self.namespaces.is_replaced(uid, pod.netns.as_deref(), pod.inode)
    }

    /// Whether the pod is captured as it is described, and is to stay so.
    pub(super) fn has(&self, workload: &Workload) -> bool {
        let is_it = |pod: &Enrolled| !pod.is_stuck && pod.is(workload);
        self.enrolled.get(&workload.uid).is_some_and(is_it)
    }

    /// What is not as it should be.
    pub(super) fn shortfall(&self) -> watch::Receiver<Shortfall> {
        self.published.subscribe()
    }

    /// What became of each pod that is to take part.
    pub(super) fn outcomes(&self) -> watch::Receiver<Arc<Outcomes>> {
        self.outcomes.subscribe()
    }

    fn publish_outcomes(&self) {
        let failing = self
            .failing
            .iter()
            .map(|(uid, failed)| (Arc::clone(uid), Outcome::Failing(failed.why.clone())));
        let enrolled = self.enrolled.keys().map(|uid| (Arc::clone(uid), Outcome::Enrolled));
        let outcomes: Outcomes = enrolled.chain(failing).collect();
        self.outcomes.send_if_modified(|before| {
            let changed = **before != outcomes;
            if changed {
                *before = Arc::new(outcomes);
            }
            changed
        });
    }

    /// Brings kernel and listeners in line with `snapshot`. If another one comes while pods wait for their
    /// certificates, which `is_superseded` says, they are left to that: pods that start must not wait too.
    pub(super) async fn follow(&mut self, snapshot: &Snapshot, is_superseded: impl Fn() -> bool) {
        while self.serving.try_join_next().is_some() {}
        let wanted: HashMap<WorkloadUid, Arc<Workload>> = snapshot
            .local_enrolled()
            .map(|workload| (Arc::clone(&workload.uid), Arc::clone(workload)))
            .collect();
        // Also of pods that are about to start: a certificate takes longer than a sandbox.
        let needed = snapshot.workloads().filter(|workload| is_to_take_part(snapshot, workload));
        self.identities.wanted(needed.map(|workload| workload.identity.clone()).collect());
        self.give_up(&wanted);

        let node = Arc::clone(&self.contexts[0].node);
        // Destinations first: a pod enrolled before them would talk in plain text for a moment.
        let (addresses, blocks) = (snapshot.captured_destinations(), snapshot.captured_blocks());
        self.note_destinations(node.capture.set_destinations(&addresses, &blocks));
        // Nobody waits for certificates of others: what comes to it is sent to it as it is from now on.
        let alone = self.release_alone(&wanted);
        self.certificates(&wanted, is_superseded).await;
        // Not before: who takes over an address would talk in plain text while its certificate is made.
        let (released, mut predecessors) = self.release(&wanted);
        let released = released || alone;
        let now = Instant::now();
        for (uid, workload) in &wanted {
            // What has left may have been what was in the way.
            let is_due = |failed: &NotEnrolled| released || failed.is_due(workload, now);
            if !self.failing.get(uid).is_none_or(is_due) || self.uncertified.has(uid) {
                continue;
            }
            match self.enrol(workload, &mut predecessors) {
                Ok(()) => {
                    self.failing.remove(uid);
                }
                Err(error) => self.report(workload, &error),
            }
        }
        for (uid, mut enrolled) in predecessors.into_values() {
            // What takes over from it is still to be enrolled, and until then nothing leaves from there.
            enrolled.is_stuck = true;
            self.enrolled.insert(uid, enrolled);
        }
        // A pod that has left stays reachable while it exists: peers hear of it later than we do.
        // One that has completed has no address, and the namespace is to go with its sandbox.
        let is_there = |pod: &&Arc<Workload>| !pod.ips.is_empty() || pod.is_enrolled();
        let there = snapshot.workloads().filter(is_there);
        let known: HashSet<_> = there.map(|pod| Arc::clone(&pod.uid)).collect();
        let mut pods = HashMap::clone(&node.pods.load());
        pods.retain(|uid, _| known.contains(uid));
        node.pods.store(Arc::new(pods));
        let uids = wanted.keys().map(|uid| uid.to_string()).collect();
        let failing = wanted.iter().filter(|(uid, _)| self.failing.contains_key(*uid));
        let open = |(_, workload): (_, &Arc<Workload>)| self.namespaces.open(workload).ok();
        let namespaces = failing.filter_map(open).map(|netns| netns.cookie()).collect();
        let leftovers = if self.wait_for_certificates() {
            // What an agent before this one captures by another layout it can carry still.
            self.leftovers.clone()
        } else {
            let retained = node.capture.retain(&uids, &namespaces);
            retained.err().map(|error| crate::telemetry::chain(&error))
        };
        if let Some(error) = leftovers.as_ref().filter(|_| leftovers != self.leftovers) {
            warn!(error, stage = "capture", "leftovers not removed");
        }
        match leftovers {
            Some(_) => self.clearing.failed(std::time::Instant::now(), |n| fastrand::u32(..n)),
            None => self.clearing.succeeded(),
        }
        self.leftovers = leftovers;
        self.published.send_replace(Shortfall {
            not_enrolled: self.failing.values().cloned().collect(),
            uncaptured: self.uncaptured.clone(),
            everything: self.everything.clone(),
            leftovers: self.leftovers.clone(),
        });
        self.publish_outcomes();
    }

    /// Ends the listeners of every pod; what is established goes on. The kernel keeps sending new
    /// connections here, where they are refused, until a successor takes over.
    pub(super) async fn close(mut self) {
        for enrolled in self.enrolled.values() {
            enrolled.stop.send_replace(true);
        }
        while self.serving.join_next().await.is_some() {}
    }

    fn capture(&self) -> &Arc<Capture> {
        &self.contexts[0].node.capture
    }

    fn enrol(
        &mut self,
        workload: &Arc<Workload>,
        predecessors: &mut HashMap<u64, (WorkloadUid, Enrolled)>,
    ) -> Result<(), EnrolError> {
        let node = Arc::clone(&self.contexts[0].node);
        if let Some(enrolled) = self.enrolled.get_mut(&workload.uid) {
            if enrolled.settings != workload.settings && !enrolled.is_stuck {
                node.capture.update(&workload.uid, &workload.settings)?;
                enrolled.settings = workload.settings.clone();
            }
            return Ok(());
        }
        let netns = self.namespaces.open(workload)?;
        let patience = if workload.provisional { STARTING } else { Duration::ZERO };
        let certificate_by = Instant::now().into_std() + patience;
        let pod = Arc::new(LocalPod { uid: Arc::clone(&workload.uid), netns, certificate_by });
        // Known before captured: its first connection may come at once.
        let mut pods = HashMap::clone(&node.pods.load());
        pods.insert(Arc::clone(&pod.uid), Arc::clone(&pod));
        node.pods.store(Arc::new(pods));
        let generation = node.capture.generation_key().of_pod(workload, pod.netns.cookie());
        node.capture.set_pod_generation(&workload.uid, generation)?;
        let inode = pod.netns.inode();
        let itself = predecessors.iter().find(|(_, (uid, _))| *uid == workload.uid);
        // It may have another namespace by now.
        let itself = itself.map(|(inode, _)| *inode);
        let predecessor = predecessors.get(&inode).or_else(|| predecessors.get(&itself?));
        let listeners = node.capture.enrol(&PodCapture {
            uid: &workload.uid,
            ips: &workload.ips,
            netns: &pod.netns,
            settings: &workload.settings,
            predecessor: predecessor.map(|(uid, _)| &**uid),
            outbound_listeners: listening::outbound_per_address(self.workers.len()),
            inbound_listeners: listening::inbound_per_address(self.workers.len()),
        })?;
        for inode in [Some(inode), itself].into_iter().flatten() {
            if let Some((uid, predecessor)) = predecessors.remove(&inode) {
                self.linger(&uid, &predecessor);
            }
        }
        let stop = self.serve(&pod, listeners, workload.ips.len().max(1));
        let enrolled = Enrolled {
            ips: workload.ips.clone(),
            netns: workload.netns.clone(),
            inode,
            settings: workload.settings.clone(),
            stop,
            is_stuck: false,
        };
        info!(
            pod = %workload.uid,
            namespace = %workload.namespace,
            name = %workload.name,
            netns = pod.netns.cookie(),
            "enrolled"
        );
        if self.identities.certified(&workload.identity).is_none() {
            warn!(identity = %workload.identity, stage = "tunnel", "enrolled without a certificate");
        }
        self.enrolled.insert(Arc::clone(&workload.uid), enrolled);
        Ok(())
    }

    /// Waits for the certificates of pods that are to be enrolled.
    async fn certificates(
        &mut self,
        wanted: &HashMap<WorkloadUid, Arc<Workload>>,
        is_superseded: impl Fn() -> bool,
    ) {
        // One that is about to start is captured first: its connections wait.
        let is_new = |(uid, workload): &(&WorkloadUid, &Arc<Workload>)| {
            let is_known = self.enrolled.contains_key(*uid) || self.failing.contains_key(*uid);
            !workload.provisional && !is_known
        };
        let new = wanted.iter().filter(is_new).map(|(uid, _workload)| Arc::clone(uid));
        let lacks = |uid: &WorkloadUid| {
            let Some(workload) = wanted.get(uid) else { return Lacks::Nothing };
            match self.identities.certified(&workload.identity) {
                Some(_) => Lacks::Nothing,
                None if self.identities.is_denied(&workload.identity) => Lacks::Approval,
                None => Lacks::Certificate,
            }
        };
        self.uncertified.wait(new, lacks, is_superseded).await;
    }

    /// There is no agent before this one any more.
    pub(super) fn lead(&mut self) {
        self.uncertified.lead();
    }

    /// Whether pods wait for certificates while an agent before this one carries.
    pub(super) fn wait_for_certificates(&self) -> bool {
        self.uncertified.keeps_waiting()
    }

    /// Keeps, and logs once, what setting the destinations came to.
    fn note_destinations(&mut self, set: Result<Destinations, CaptureError>) {
        let why = |error| Some(crate::telemetry::chain(error));
        let (everything, uncaptured) = match &set {
            Ok(Destinations::Listed) => (None, None),
            Ok(Destinations::Everything(error)) => (why(error), None),
            Err(error) => (None, why(error)),
        };
        if everything != self.everything
            && let Some(error) = &everything
        {
            warn!(error, stage = "capture", "every pod captures everything");
        }
        if uncaptured != self.uncaptured
            && let Some(error) = &uncaptured
        {
            warn!(error, stage = "capture", "destinations of the mesh may not be captured");
        }
        (self.everything, self.uncaptured) = (everything, uncaptured);
    }

    /// Keeps why a pod is not enrolled, and logs it once for each reason.
    fn report(&mut self, workload: &Arc<Workload>, error: &EnrolError) {
        let now = Instant::now();
        let logged = self.failing.get(&workload.uid).map(|failed| failed.why.clone());
        let failed = match self.failing.entry(Arc::clone(&workload.uid)) {
            Entry::Occupied(known) => {
                let known = known.into_mut();
                known.once_more(workload, error, now);
                known
            }
            Entry::Vacant(new) => new.insert(NotEnrolled::new(workload, error, now)),
        };
        if logged.as_ref() != Some(&failed.why) {
            warn!(
                error = %failed.why,
                pod = %workload.uid,
                namespace = %workload.namespace,
                name = %workload.name,
                stage = "capture",
                "not enrolled; will be tried again"
            );
        }
    }
}
