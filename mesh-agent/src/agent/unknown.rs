//! Pods from the first moment that they can be told, until they are captured or left alone.
//!
//! ```text
//! cgroups ──► held back in the kernel ──► addresses in its namespace ──► source ──► captured
//!  inotify      by the pod's settings         by its processes          snapshot   no longer held back
//! ```
//!
//! On a thread of its own: a pod must not get out because the control thread is busy with a snapshot.
//!
//! # Guarantees
//!
//! - A pod that was here when the agent started is not held back, unless the agent before did so.
//! - Nothing is held back longer than its cgroup is there.
//! - Of a pod that nobody has known nothing is refused for longer than `--unknown-pods-s`. One that was known to
//!   take part, and is forgotten before it was captured (deleted by force), stays refused until its cgroup goes.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use mesh_core::pending::{Standing, Treatment, treat};
use mesh_core::snapshot::{Enrolment, Snapshot, Workload};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};
use tracing::{debug, error, warn};

use super::namespaces::PROC;
use crate::capture::{Capture, HeldBack};
use crate::discovery::Demand;
use crate::discovery::enrol::left_alone;
use crate::net::Netns;
use crate::pod_cgroups::{PodCgroup, PodCgroups, Seen};
use crate::processes::Processes;

/// Between looks for the addresses of a pod that has a container's cgroup: a process follows within
/// milliseconds, and the first one of an application some tens of milliseconds after that.
const LOOK: Duration = Duration::from_millis(4);
/// For so long; then, as something is in the way, every [`LOOK_SELDOM`].
const LOOK_EAGERLY: Duration = Duration::from_secs(2);
const LOOK_SELDOM: Duration = Duration::from_secs(1);

/// How it stands with the pods of this node, by UID.
pub(super) type Standings = HashMap<String, Standing>;

/// What the thread needs.
pub(super) struct Config {
    pub(super) capture: Arc<Capture>,
    /// Root of the node's cgroup2 tree.
    pub(super) cgroup: PathBuf,
    /// How long what a pod connects is refused that the agent does not know; zero: not at all.
    pub(super) limit: Duration,
    /// Where to tell the addresses of pods.
    pub(super) demands: mpsc::Sender<Demand>,
}

/// Follows the pods of this node until dropped.
pub(super) struct Unknown {
    standings: watch::Sender<Arc<Standings>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Unknown {
    pub(super) fn start(config: Config) -> Result<Self> {
        let (standings, known) = watch::channel(Arc::default());
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let watching = {
            let _inside = runtime.enter();
            Watching::open(config, known)?
        };
        let run = move || {
            runtime.block_on(async {
                tokio::select! {
                    () = watching.follow() => {}
                    _ = stopped => {}
                }
            });
        };
        let thread = thread::Builder::new().name("new-pods".into()).spawn(run)?;
        Ok(Self { standings, stop: Some(stop), thread: Some(thread) })
    }

    /// Tells how it stands with the pods of this node.
    pub(super) fn tell(&self, standings: Standings) {
        self.standings.send_if_modified(|before| {
            let is_new = **before != standings;
            if is_new {
                *before = Arc::new(standings);
            }
            is_new
        });
    }
}

impl Drop for Unknown {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(Err(_panic)) = self.thread.take().map(thread::JoinHandle::join) {
            error!("what follows new pods panicked");
        }
    }
}

/// How it stands with each pod of this node, of which `is_captured` says whether it is.
pub(super) fn standings(snapshot: &Snapshot, is_captured: impl Fn(&Workload) -> bool) -> Standings {
    let here = snapshot.workloads().filter(|workload| workload.node == snapshot.node);
    let stand = |workload: &Arc<Workload>| {
        let standing = standing(workload, is_captured(workload))?;
        Some((workload.uid.to_string(), standing))
    };
    here.filter_map(stand).collect()
}

fn standing(workload: &Workload, is_captured: bool) -> Option<Standing> {
    let settings = || workload.settings.clone();
    match workload.enrolment {
        Enrolment::Enrolled if is_captured && workload.provisional => {
            Some(Standing::Provisional(settings()))
        }
        Enrolment::Enrolled if is_captured => Some(Standing::Carried),
        Enrolment::Enrolled
        | Enrolment::LeftAlone(left_alone::NO_ADDRESS | left_alone::ADDRESS_TAKEN) => {
            Some(Standing::Waits(settings()))
        }
        Enrolment::LeftAlone(left_alone::NAMESPACE_UNREAD) => None,
        Enrolment::LeftAlone(_reason) => Some(Standing::LeftAlone),
    }
}

struct Watching {
    capture: Arc<Capture>,
    cgroups: PodCgroups,
    processes: Processes,
    limit: Duration,
    demands: mpsc::Sender<Demand>,
    standings: watch::Receiver<Arc<Standings>>,
    /// Those of which it is not settled what becomes of them, by UID.
    pods: HashMap<String, Tracked>,
}

struct Tracked {
    cgroup: PodCgroup,
    /// When it came.
    since: Instant,
    is_held_back: bool,
    /// When its first container's cgroup was there, and when to look for its addresses.
    looking: Option<(Instant, Instant)>,
}

impl Watching {
    fn open(config: Config, standings: watch::Receiver<Arc<Standings>>) -> Result<Self> {
        let Config { capture, cgroup, limit, demands } = config;
        let processes = Processes::new(&cgroup, PROC.as_ref())
            .context("see the node's processes: the agent's pod needs hostPID and SYS_PTRACE")?;
        let (cgroups, there) = PodCgroups::open(&cgroup)
            .context("watch the cgroups of pods (too many: the sysctls fs.inotify.max_user_*)")?;
        let node = Netns::current().context("find the node's namespace")?;
        let ids: HashSet<u64> = there.iter().map(|pod| pod.id).collect();
        let held_back = capture.retain_held_back(&node, &ids)?;
        let pods = HashMap::new();
        let mut this = Self { capture, cgroups, processes, limit, demands, standings, pods };
        for pod in there.into_iter().filter(|pod| held_back.contains(&pod.id)) {
            this.track(pod, true);
        }
        Ok(this)
    }

    async fn follow(mut self) {
        loop {
            let next = self.pods.values().filter_map(|pod| Some(pod.looking?.1)).min();
            let look = async {
                match next {
                    Some(next) => sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                seen = self.cgroups.next() => {
                    for seen in seen {
                        self.take(seen);
                    }
                }
                known = self.standings.changed() => {
                    if known.is_err() {
                        return;
                    }
                    let uids: Vec<String> = self.pods.keys().cloned().collect();
                    for uid in uids {
                        self.treat(&uid);
                    }
                }
                () = look => self.look(),
            }
        }
    }

    fn take(&mut self, seen: Seen) {
        match seen {
            Seen::Came(cgroup) => self.track(cgroup, false),
            Seen::Grew(uid) => {
                let now = Instant::now();
                if let Some(pod) = self.pods.get_mut(&uid)
                    && pod.looking.is_none()
                {
                    pod.looking = Some((now, now));
                }
            }
            Seen::Went(uid, id) => {
                self.let_go(id);
                self.pods.retain(|other, pod| *other != uid || pod.cgroup.id != id);
            }
        }
    }

    fn track(&mut self, cgroup: PodCgroup, is_held_back: bool) {
        let uid = cgroup.uid.clone();
        debug!(pod = uid, cgroup = cgroup.id, "a pod's cgroup");
        let pod = Tracked { cgroup, since: Instant::now(), is_held_back, looking: None };
        self.pods.insert(uid.clone(), pod);
        // First of all: a process may follow.
        self.treat(&uid);
        if self.pods.contains_key(&uid) {
            for seen in self.cgroups.watch(&uid) {
                self.take(seen);
            }
        }
    }

    /// Does about a pod what is to be done as things stand.
    fn treat(&mut self, uid: &str) {
        let standings = Arc::clone(&self.standings.borrow());
        let Some(pod) = self.pods.get_mut(uid) else { return };
        let id = pod.cgroup.id;
        let why = match treat(uid, standings.get(uid)) {
            Treatment::Refused { settings, look: _ } => HeldBack::Waits(settings),
            Treatment::Unknown if pod.is_held_back => return, // Its time runs.
            Treatment::Unknown => {
                let left = self.limit.saturating_sub(pod.since.elapsed());
                if left.is_zero() {
                    return;
                }
                HeldBack::Unknown(left)
            }
            Treatment::Settled => {
                debug!(pod = uid, after = ?pod.since.elapsed(), "settled");
                self.pods.remove(uid);
                self.cgroups.unwatch(uid);
                return self.let_go(id);
            }
        };
        match self.capture.hold_back(id, why) {
            Ok(()) => pod.is_held_back = true,
            Err(error) => {
                let error = crate::telemetry::chain(&error);
                warn!(
                    error,
                    pod = uid,
                    stage = "capture",
                    "may talk in plain text until it is captured"
                );
            }
        }
    }

    fn let_go(&self, id: u64) {
        if let Err(error) = self.capture.let_go(id) {
            // Nobody is harmed for long who is captured, and the others are told.
            let error = crate::telemetry::chain(&error);
            warn!(error, cgroup = id, stage = "capture", "a pod's cgroup is still held back");
        }
    }

    /// Looks for the addresses of pods that are to be captured as soon as they have any.
    fn look(&mut self) {
        let now = Instant::now();
        let standings = Arc::clone(&self.standings.borrow());
        for (uid, pod) in &mut self.pods {
            let Some((first, next)) = &mut pod.looking else { continue };
            if now < *next {
                continue;
            }
            let is_eager = now.duration_since(*first) < LOOK_EAGERLY;
            *next = now + if is_eager { LOOK } else { LOOK_SELDOM };
            let wanted = treat(uid, standings.get(uid));
            if !matches!(wanted, Treatment::Refused { look: true, .. }) {
                continue;
            }
            let Some(ips) = self.processes.addresses(uid, &pod.cgroup.path) else { continue };
            let (after, container) = (pod.since.elapsed(), first.elapsed());
            debug!(pod = uid, ?ips, ?after, ?container, "addresses seen");
            // A sandbox may be made anew before the API has told anything.
            *next = now + LOOK_SELDOM;
            let seen = Demand::Seen { uid: uid.clone(), ips };
            if self.demands.try_send(seen).is_err() {
                *next = now + LOOK;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::fixture;

    #[test]
    fn only_what_takes_part_and_is_not_captured_waits() {
        let pod = Workload::clone(&fixture::workload("web", "node-a", "10.1.0.1"));
        let waits = Some(Standing::Waits(pod.settings.clone()));
        assert_eq!(standing(&pod, false), waits);
        assert_eq!(standing(&pod, true), Some(Standing::Carried));
        let provisional = Workload { provisional: true, ..pod.clone() };
        let confirmed_later = Some(Standing::Provisional(pod.settings.clone()));
        assert_eq!(standing(&provisional, true), confirmed_later);
        let left = |reason| {
            let enrolment = Enrolment::LeftAlone(reason);
            standing(&Workload { enrolment, ..pod.clone() }, false)
        };
        assert_eq!(left(left_alone::NO_ADDRESS), waits);
        assert_eq!(left(left_alone::ADDRESS_TAKEN), waits);
        assert_eq!(left(left_alone::NAMESPACE_UNREAD), None);
        for reason in [left_alone::NOT_ENROLLED, left_alone::HOST_NETWORK, left_alone::COMPLETED] {
            assert_eq!(left(reason), Some(Standing::LeftAlone));
        }
    }
}
