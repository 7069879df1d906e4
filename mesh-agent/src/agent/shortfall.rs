//! What capture does not do as the manifests ask, why, and when it is tried again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mesh_core::snapshot::Workload;
use thiserror::Error;
use tokio::time::Instant;

use crate::admin::view::ProblemView;
use crate::capture::CaptureError;
use crate::processes::NotFound;

/// Soon, since most of what fails is a namespace that is just being made ...
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// ... and seldom enough that a pod which stays broken costs nothing.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Why a pod could not be enrolled.
#[derive(Debug, Error)]
pub(super) enum EnrolError {
    #[error("the manifest names no network namespace: set the annotation malla.dev/netns")]
    NoNetns,
    #[error("open network namespace {path}")]
    Netns { path: Arc<str>, source: std::io::Error },
    #[error("find its network namespace")]
    NotFound(#[from] NotFound),
    #[error("capture")]
    Capture(#[from] CaptureError),
}

impl EnrolError {
    /// The `reason` label: a closed set, stable across releases.
    fn reason(&self) -> &'static str {
        match self {
            Self::NoNetns => "no_netns",
            Self::Netns { .. } => "netns",
            Self::NotFound(error) => error.reason(),
            Self::Capture(error) => error.reason(),
        }
    }

    /// What to look at.
    fn field(&self) -> &'static str {
        match self {
            Self::NoNetns | Self::Netns { .. } => "annotation malla.dev/netns",
            Self::Capture(CaptureError::Full { .. }) => "--max-pods",
            Self::NotFound(_) | Self::Capture(_) => "",
        }
    }
}

/// A pod that should be enrolled and is not.
#[derive(Clone, Debug)]
pub(super) struct NotEnrolled {
    /// As it was when that was tried last.
    tried: Arc<Workload>,
    field: &'static str,
    reason: &'static str,
    pub(super) why: String,
    again: Instant,
    pause: Duration,
}

impl NotEnrolled {
    /// The first attempt failed.
    pub(super) fn new(workload: &Arc<Workload>, error: &EnrolError, now: Instant) -> Self {
        Self {
            tried: Arc::clone(workload),
            field: error.field(),
            reason: error.reason(),
            why: crate::telemetry::chain(error),
            again: now + FIRST_PAUSE,
            pause: FIRST_PAUSE,
        }
    }

    /// Whether it is this pod.
    pub(super) fn is(&self, pod: &Workload) -> bool {
        self.tried.uid == pod.uid
    }

    /// Another one did.
    pub(super) fn once_more(&mut self, workload: &Arc<Workload>, error: &EnrolError, now: Instant) {
        let pause = (self.pause * 2).min(LONGEST_PAUSE);
        *self = Self { pause, again: now + pause, ..Self::new(workload, error, now) };
    }

    /// When it is tried again, if nothing changes before.
    pub(super) fn again(&self) -> Instant {
        self.again
    }

    /// Whether to try now: it is time, or the manifest says something else.
    pub(super) fn is_due(&self, workload: &Workload, now: Instant) -> bool {
        let tried = &self.tried;
        self.again <= now
            || tried.netns != workload.netns
            || tried.ips != workload.ips
            || tried.settings != workload.settings
    }
}

/// What capture does not do as the manifests ask. Everything in it is tried again.
#[derive(Clone, Debug, Default)]
pub(super) struct Shortfall {
    pub(super) not_enrolled: Vec<NotEnrolled>,
    /// Why it is not certain that all destinations of the mesh are captured.
    pub(super) uncaptured: Option<String>,
    /// Why pods capture everything, although their settings do not say so.
    pub(super) everything: Option<String>,
    /// Why it is not certain that nothing is left of pods and agents that are gone.
    pub(super) leftovers: Option<String>,
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
        let leftovers = self.leftovers.iter().map(|why| ProblemView {
            place: "capture".into(),
            field: "--bpffs".into(),
            message: format!("what pods or agents have left that are gone is not removed: {why}"),
            remedy: "it is tried again within 30 s; remove what is not the agent's".into(),
        });
        let pods = self.not_enrolled.iter().map(|pod| ProblemView {
            place: format!("Pod {}/{}", pod.tried.namespace, pod.tried.name),
            field: pod.field.into(),
            message: format!("not enrolled: {}", pod.why),
            remedy: format!("it is tried again within {} s", pod.pause.as_secs()),
        });
        uncaptured.chain(everything).chain(leftovers).chain(pods)
    }

    /// How many pods are not enrolled, by reason.
    pub(super) fn not_enrolled_by_reason(&self) -> Vec<(&'static str, u64)> {
        let mut counts = BTreeMap::new();
        for pod in &self.not_enrolled {
            *counts.entry(pod.reason).or_default() += 1;
        }
        counts.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::PathBuf;

    use super::*;
    use crate::telemetry::fixture::workload;
    use crate::telemetry::{
        AccessLogFormat, Options, SnapshotState, Sources, Telemetry, TunnelNumbers,
    };

    /// What is scraped of an agent with this shortfall.
    fn metrics(shortfall: Shortfall) -> String {
        let quiet = Options { access_log: AccessLogFormat::Off, ..Options::default() };
        let telemetry = Telemetry::with_output(&quiet, io::sink()).unwrap();
        telemetry.set_sources(Sources {
            capture: Box::new(Vec::new),
            not_enrolled: Box::new(move || shortfall.not_enrolled_by_reason()),
            tunnels: Box::new(TunnelNumbers::default),
            certificates: Box::new(Vec::new),
            snapshot: Box::new(SnapshotState::default),
            look_at_direct: Box::new(|| {}),
            direct_events_lost: Box::new(|| 0),
        });
        telemetry.exposition()
    }

    #[test]
    fn pod_that_stays_broken_is_tried_ever_more_seldom() {
        let mut now = Instant::now();
        let pod = workload("web", "node-1", "10.0.1.5");
        let mut broken = NotEnrolled::new(&pod, &EnrolError::NoNetns, now);
        let mut pauses = Vec::new();
        for _ in 0..7 {
            pauses.push((broken.again() - now).as_secs());
            assert!(!broken.is_due(&pod, broken.again() - Duration::from_millis(1)));
            now = broken.again();
            assert!(broken.is_due(&pod, now));
            broken.once_more(&pod, &EnrolError::NoNetns, now);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
    }

    #[test]
    fn pod_whose_manifest_is_corrected_is_tried_at_once() {
        let now = Instant::now();
        let pod = workload("web", "node-1", "10.0.1.5");
        let broken = NotEnrolled::new(&pod, &EnrolError::NoNetns, now);
        let corrected = Workload { netns: Some("/run/netns/web".into()), ..Workload::clone(&pod) };
        assert!(!broken.is_due(&pod, now) && broken.is_due(&corrected, now));
    }

    /// The reason, and what `status`, the pod's annotation and its Event say.
    #[test]
    fn pod_that_is_not_in_the_namespace_of_its_processes_is_told() {
        let pod = workload("web", "node-1", "10.0.1.5");
        let cgroup = || PathBuf::from("/sys/fs/cgroup/kubepods/pod1");
        let found = |kind: io::ErrorKind| NotFound::Read { path: cgroup(), source: kind.into() };
        for (mismatch, reason, why) in [
            (
                NotFound::NoAddress { ip: pod.ips[0] },
                "no_address",
                "no process of this pod is in a network namespace that has 10.0.1.5",
            ),
            (
                NotFound::HostNetwork,
                "host_network",
                "its processes are in the node's network namespace",
            ),
            (
                NotFound::NoProcess { cgroup: cgroup() },
                "no_process",
                "no process of this pod in /sys/fs/cgroup/kubepods/pod1",
            ),
            (
                NotFound::NoCgroup { cgroup: cgroup() },
                "no_cgroup",
                "no cgroup of this pod below /sys/fs/cgroup/kubepods/pod1",
            ),
            (
                found(io::ErrorKind::PermissionDenied),
                "read",
                "read /sys/fs/cgroup/kubepods/pod1: permission denied",
            ),
        ] {
            let broken = NotEnrolled::new(&pod, &EnrolError::from(mismatch), Instant::now());
            let why = format!("find its network namespace: {why}");
            assert_eq!(broken.why, why);
            let shortfall = Shortfall { not_enrolled: vec![broken], ..Shortfall::default() };
            let problems: Vec<_> = shortfall.problems().collect();
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert_eq!(problems[0].place, "Pod shop/web-0");
            assert_eq!(problems[0].message, format!("not enrolled: {why}"));
            let metrics = metrics(shortfall);
            let told = format!("mesh_pods_not_enrolled{{reason=\"{reason}\"}} 1\n");
            assert!(metrics.contains(&told), "{told} is not in {metrics}");
        }
    }

    #[test]
    fn pods_are_counted_by_reason() {
        let now = Instant::now();
        let pod = workload("web", "node-1", "10.0.1.5");
        let full = CaptureError::Full { map: "POD_OUTBOUND", limit: 1, remedy: "" };
        let errors = [EnrolError::NoNetns, EnrolError::Capture(full), EnrolError::NoNetns];
        let not_enrolled = errors.iter().map(|error| NotEnrolled::new(&pod, error, now)).collect();
        let shortfall = Shortfall { not_enrolled, ..Shortfall::default() };
        assert_eq!(shortfall.not_enrolled_by_reason(), [("map_full", 1), ("no_netns", 2)]);
    }
}
