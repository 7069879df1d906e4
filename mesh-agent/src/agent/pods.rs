//! Enrols and releases the pods of this node as the snapshot says.
//!
//! Established connections are never touched: enrolling decides about new ones only, and a pod that
//! leaves keeps its listeners for [`LINGER`], since a connection may be between the kernel's decision
//! and our accept.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::settings::Settings;
use mesh_core::snapshot::{Snapshot, Workload, WorkloadUid};
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use crate::admin::view::ProblemView;
use crate::capture::{CaptureError, Destinations, Listeners, PodCapture};
use crate::identity::store::Identities;
use crate::net::Netns;
use crate::node::{LocalPod, Worker};
use crate::workers::Workers;
use crate::{inbound, outbound, serve};

/// How long listeners outlive their pod's enrolment.
const LINGER: Duration = Duration::from_secs(1);
/// How long enrolling waits for pods' certificates, all together: without one a pod's connections are
/// refused.
const CERTIFICATE_WAIT: Duration = Duration::from_secs(2);

/// How long a pod that was started anew, in a namespace of the same path, may be outside of the mesh.
const LOOK_AT_NAMESPACES: Duration = Duration::from_secs(1);

/// What the kernel's configuration of a pod has room for.
const MAX_LISTENERS: usize = 16;
/// So many that the source ports of one address (28,000 by default) are not the limit of a busy pod.
const MIN_OUTBOUND_LISTENERS: usize = 4;

/// Why a pod could not be enrolled. Tried again with each snapshot and every second.
#[derive(Debug, Error)]
enum EnrolError {
    #[error("the manifest names no network namespace: set the annotation malla.dev/netns")]
    NoNetns,
    #[error("open network namespace {path}")]
    Netns { path: Arc<str>, source: std::io::Error },
    #[error("capture")]
    Capture(#[from] CaptureError),
}

impl EnrolError {
    /// What to look at.
    fn field(&self) -> &'static str {
        match self {
            Self::NoNetns | Self::Netns { .. } => "annotation malla.dev/netns",
            Self::Capture(CaptureError::Full { .. }) => "--max-pods",
            Self::Capture(_) => "",
        }
    }
}

/// The pods that are enrolled on this node.
#[derive(Debug)]
pub(super) struct Pods {
    workers: Arc<Workers>,
    contexts: Vec<Arc<Worker>>,
    identities: Arc<Identities>,
    enrolled: HashMap<WorkloadUid, Enrolled>,
    /// Why a pod is not enrolled, as last reported.
    failing: HashMap<WorkloadUid, NotEnrolled>,
    uncaptured: Option<String>,
    everything: Option<String>,
    published: watch::Sender<Shortfall>,
    serving: JoinSet<()>,
}

/// A pod that should be enrolled and is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NotEnrolled {
    pub(super) namespace: Arc<str>,
    pub(super) name: Arc<str>,
    field: &'static str,
    pub(super) why: String,
}

/// What capture does not do as the manifests ask. Everything in it is tried again.
#[derive(Clone, Debug, Default)]
pub(super) struct Shortfall {
    pub(super) not_enrolled: Vec<NotEnrolled>,
    /// Why it is not certain that all destinations of the mesh are captured.
    pub(super) uncaptured: Option<String>,
    /// Why pods capture everything, although their settings do not say so.
    everything: Option<String>,
}

impl Shortfall {
    /// For people, with what to do.
    pub(super) fn problems(&self) -> impl Iterator<Item = ProblemView> {
        let capture = |message: String, remedy: &str| ProblemView {
            place: "capture".into(),
            field: "--max-destinations".into(),
            message,
            remedy: remedy.into(),
        };
        let uncaptured = self.uncaptured.iter().map(move |why| {
            let message = format!("destinations of the mesh may not be captured: {why}");
            capture(message, "it is tried again every second")
        });
        let everything = self.everything.iter().map(move |why| {
            let message = format!("every pod captures everything: {why}");
            capture(message, "start the agent with a higher --max-destinations")
        });
        let pods = self.not_enrolled.iter().map(|pod| ProblemView {
            place: format!("Pod {}/{}", pod.namespace, pod.name),
            field: pod.field.into(),
            message: format!("not enrolled: {}", pod.why),
            remedy: "it is tried again every second".into(),
        });
        uncaptured.chain(everything).chain(pods)
    }
}

#[derive(Debug)]
struct Enrolled {
    ips: Vec<IpAddr>,
    netns: Arc<str>,
    /// The namespace that was at that path. It is held open, so no other gets this number.
    inode: u64,
    settings: Settings,
    stop: watch::Sender<bool>,
}

impl Enrolled {
    /// Whether its namespace was made anew under the same path: what runs there now is not captured.
    /// One whose path is gone stays, since its programs may go on without a name.
    fn is_replaced(&self) -> bool {
        fs::metadata(&*self.netns).is_ok_and(|found| found.ino() != self.inode)
    }
}

impl Pods {
    pub(super) fn new(
        workers: Arc<Workers>,
        contexts: Vec<Arc<Worker>>,
        identities: Arc<Identities>,
    ) -> Self {
        Self {
            workers,
            contexts,
            identities,
            enrolled: HashMap::new(),
            failing: HashMap::new(),
            uncaptured: None,
            everything: None,
            published: watch::Sender::default(),
            serving: JoinSet::new(),
        }
    }

    /// Whether something waits for another try.
    pub(super) fn has_failing(&self) -> bool {
        !self.failing.is_empty() || self.uncaptured.is_some()
    }

    /// Waits until a pod's namespace is another one than when it was enrolled. No event tells: looked at
    /// once a second, which costs a microsecond a pod.
    pub(super) async fn replaced(&self) {
        while !self.enrolled.values().any(Enrolled::is_replaced) {
            tokio::time::sleep(LOOK_AT_NAMESPACES).await;
        }
    }

    /// What is not as it should be.
    pub(super) fn shortfall(&self) -> watch::Receiver<Shortfall> {
        self.published.subscribe()
    }

    /// Brings kernel and listeners in line with `snapshot`.
    pub(super) async fn follow(&mut self, snapshot: &Snapshot) {
        while self.serving.try_join_next().is_some() {}
        let wanted: HashMap<WorkloadUid, Arc<Workload>> = snapshot
            .local_enrolled()
            .map(|workload| (Arc::clone(&workload.uid), Arc::clone(workload)))
            .collect();
        self.identities.wanted(wanted.values().map(|w| w.identity.clone()).collect());
        self.failing.retain(|uid, _| wanted.contains_key(uid));

        let node = Arc::clone(&self.contexts[0].node);
        // Destinations first: a pod enrolled before them would talk in plain text for a moment.
        let set = node.capture.set_destinations(&snapshot.captured_destinations());
        self.note_destinations(set);
        self.release(&wanted);
        self.certificates(&wanted).await;
        for (uid, workload) in &wanted {
            match self.enrol(workload).await {
                Ok(()) => {
                    self.failing.remove(uid);
                }
                Err(error) => self.report(workload, &error),
            }
        }
        self.published.send_replace(Shortfall {
            not_enrolled: self.failing.values().cloned().collect(),
            uncaptured: self.uncaptured.clone(),
            everything: self.everything.clone(),
        });
        // A pod that has left stays reachable while it exists: peers hear of it later than we do.
        let known: HashSet<_> = snapshot.workloads().map(|w| Arc::clone(&w.uid)).collect();
        let mut pods = HashMap::clone(&node.pods.load());
        pods.retain(|uid, _| known.contains(uid));
        node.pods.store(Arc::new(pods));
        let uids = wanted.keys().map(|uid| uid.to_string()).collect();
        if let Err(error) = node.capture.retain(&uids) {
            warn!(error = %crate::telemetry::chain(&error), stage = "capture", "leftovers not removed");
        }
    }

    /// Ends the listeners of every pod; what is established goes on. The kernel keeps sending new
    /// connections here, where they are refused, until a successor takes over.
    pub(super) async fn close(mut self) {
        for enrolled in self.enrolled.values() {
            enrolled.stop.send_replace(true);
        }
        while self.serving.join_next().await.is_some() {}
    }

    fn release(&mut self, wanted: &HashMap<WorkloadUid, Arc<Workload>>) {
        let capture = Arc::clone(&self.contexts[0].node.capture);
        self.enrolled.retain(|uid, enrolled| {
            let stays = wanted.get(uid).is_some_and(|workload| {
                workload.ips == enrolled.ips
                    && workload.netns.as_ref() == Some(&enrolled.netns)
                    && !enrolled.is_replaced()
            });
            if !stays {
                if let Err(error) = capture.leave(uid) {
                    warn!(error = %crate::telemetry::chain(&error), pod = %uid, stage = "capture", "not released");
                    // Its listeners stay, or what the kernel still sends there would be refused. Released
                    // with the next snapshot.
                    return true;
                }
                info!(pod = %uid, "left");
                let stop = enrolled.stop.clone();
                self.serving.spawn(async move {
                    tokio::time::sleep(LINGER).await;
                    stop.send_replace(true);
                });
            }
            stays
        });
    }

    async fn enrol(&mut self, workload: &Arc<Workload>) -> Result<(), EnrolError> {
        let node = Arc::clone(&self.contexts[0].node);
        if let Some(enrolled) = self.enrolled.get_mut(&workload.uid) {
            if enrolled.settings != workload.settings {
                node.capture.update(&workload.uid, &workload.settings)?;
                enrolled.settings = workload.settings.clone();
            }
            return Ok(());
        }
        let path = workload.netns.clone().ok_or(EnrolError::NoNetns)?;
        let netns = Netns::open(Path::new(&*path))
            .map_err(|source| EnrolError::Netns { path: Arc::clone(&path), source })?;
        let pod = Arc::new(LocalPod { uid: Arc::clone(&workload.uid), netns });
        // Known before captured: its first connection may come at once.
        let mut pods = HashMap::clone(&node.pods.load());
        pods.insert(Arc::clone(&pod.uid), Arc::clone(&pod));
        node.pods.store(Arc::new(pods));
        let listeners = node.capture.enrol(&PodCapture {
            uid: &workload.uid,
            ips: &workload.ips,
            netns: &pod.netns,
            settings: &workload.settings,
            outbound_listeners: listeners_per_address(self.workers.len()),
            inbound_listeners: self.workers.len().min(MAX_LISTENERS),
        })?;
        let stop = self.serve(&pod, listeners, workload.ips.len().max(1));
        let enrolled = Enrolled {
            ips: workload.ips.clone(),
            netns: path,
            inode: pod.netns.inode(),
            settings: workload.settings.clone(),
            stop,
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

    /// Waits for the certificates of pods that are to be enrolled: without one a pod would be refused
    /// everywhere. After the wait they are enrolled all the same, which fails closed.
    async fn certificates(&self, wanted: &HashMap<WorkloadUid, Arc<Workload>>) {
        let deadline = tokio::time::Instant::now() + CERTIFICATE_WAIT;
        let lacks_one = |(uid, workload): (&WorkloadUid, &Arc<Workload>)| {
            let is_new = !self.enrolled.contains_key(uid) && !self.failing.contains_key(uid);
            is_new && self.identities.certified(&workload.identity).is_none()
        };
        while wanted.iter().any(lacks_one) && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
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

    /// Spreads the pod's listeners over the workers.
    fn serve(
        &mut self,
        pod: &Arc<LocalPod>,
        listeners: Listeners,
        addresses: usize,
    ) -> watch::Sender<bool> {
        let (stop, stopped) = watch::channel(false);
        // The list has all addresses with their first listener, then all with their second.
        let workers = self.contexts.len();
        let worker_of = |index: usize| (index / addresses) % workers;
        for (index, listener) in listeners.outbound.into_iter().enumerate() {
            let worker = worker_of(index);
            let (context, pod) = (Arc::clone(&self.contexts[worker]), Arc::clone(pod));
            self.listen(worker, listener, &stopped, move |app, from| {
                let (context, pod) = (Arc::clone(&context), Arc::clone(&pod));
                async move { outbound::carry(&context, &pod, app, from).await }
            });
        }
        for (index, listener) in listeners.inbound.into_iter().enumerate() {
            let worker = worker_of(index);
            let (context, pod) = (Arc::clone(&self.contexts[worker]), Arc::clone(pod));
            self.listen(worker, listener, &stopped, move |peer, from| {
                let (context, pod) = (Arc::clone(&context), Arc::clone(&pod));
                async move { inbound::serve_plain(&context, &pod, peer, from).await }
            });
        }
        stop
    }

    fn listen<H, F>(
        &mut self,
        worker: usize,
        listener: std::net::TcpListener,
        stopped: &watch::Receiver<bool>,
        handle: H,
    ) where
        H: Fn(tokio::net::TcpStream, std::net::SocketAddr) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let permits = Arc::clone(&self.contexts[worker].node.connections);
        let stopped = stopped.clone();
        // Registered with the worker's own runtime, whose thread alone then wakes for it.
        let serving = self.workers.spawn(worker, async move {
            match TcpListener::from_std(listener) {
                Ok(listener) => serve::serve(listener, permits, stopped, handle).await,
                Err(error) => error!(%error, stage = "capture", "a pod's listener is lost"),
            }
        });
        self.serving.spawn(async move {
            if let Err(error) = serving.await {
                error!(%error, "a pod's listener ended early");
            }
        });
    }

    /// Logs why a pod is not enrolled, once for each reason.
    fn report(&mut self, workload: &Workload, error: &EnrolError) {
        let why = crate::telemetry::chain(error);
        if self.failing.get(&workload.uid).is_some_and(|known| known.why == why) {
            return;
        }
        warn!(
            error = %why,
            pod = %workload.uid,
            namespace = %workload.namespace,
            name = %workload.name,
            stage = "capture",
            "not enrolled; will be tried again"
        );
        let failing = NotEnrolled {
            namespace: Arc::clone(&workload.namespace),
            name: Arc::clone(&workload.name),
            field: error.field(),
            why,
        };
        self.failing.insert(Arc::clone(&workload.uid), failing);
    }
}

/// The same number for every worker, since connections take turns over them.
fn listeners_per_address(workers: usize) -> usize {
    let each = MIN_OUTBOUND_LISTENERS.div_ceil(workers);
    (workers * each).min(MAX_LISTENERS)
}
