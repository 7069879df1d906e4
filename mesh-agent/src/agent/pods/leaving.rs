//! Pods that leave: which of them may at once, and what those keep that another one takes over from.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use mesh_core::snapshot::{Workload, WorkloadUid};
use tokio::time::sleep;
use tracing::{info, warn};

use super::{Enrolled, LINGER, Pods};
use crate::capture::CaptureError;

impl Pods {
    /// Forgets what could not be enrolled and need not be any more, with the half of it that was done.
    pub(super) fn give_up(&mut self, wanted: &HashMap<WorkloadUid, Arc<Workload>>) {
        let capture = Arc::clone(self.capture());
        self.failing.retain(|uid, _failed| {
            if wanted.contains_key(uid) {
                return true;
            }
            match capture.leave(uid) {
                Ok(()) | Err(CaptureError::NotEnrolled { .. }) => false,
                Err(error) => {
                    warn!(error = %crate::telemetry::chain(&error), pod = %uid, stage = "capture", "not released");
                    true
                }
            }
        });
    }

    /// Lets go of pods that are not wanted and whose address and namespace nobody takes over, and says whether there
    /// were any.
    pub(super) fn release_alone(&mut self, wanted: &HashMap<WorkloadUid, Arc<Workload>>) -> bool {
        let leaving = |uid: &&WorkloadUid| !wanted.contains_key(*uid);
        let leaving: Vec<_> = self.enrolled.keys().filter(leaving).map(Arc::clone).collect();
        if leaving.is_empty() {
            return false;
        }
        let addresses: HashSet<_> = wanted.values().flat_map(|workload| &workload.ips).collect();
        let inodes = wanted.values().filter_map(|workload| self.namespaces.named_inode(workload));
        let inodes: HashSet<u64> = inodes.collect();
        let is_alone = |enrolled: &Enrolled| {
            !inodes.contains(&enrolled.inode)
                && !enrolled.ips.iter().any(|ip| addresses.contains(ip))
        };
        let leaving =
            leaving.into_iter().filter(|uid| self.enrolled.get(uid).is_some_and(is_alone));
        let leaving: Vec<_> = leaving.collect();
        let mut released = false;
        for uid in leaving {
            released |= self.let_go(uid);
        }
        released
    }

    /// Lets go of a pod, and says whether it is gone.
    fn let_go(&mut self, uid: WorkloadUid) -> bool {
        let Some(mut enrolled) = self.enrolled.remove(&uid) else { return false };
        match self.capture().leave(&uid) {
            Ok(()) | Err(CaptureError::NotEnrolled { .. }) => {
                self.linger(&uid, &enrolled);
                true
            }
            Err(error) => {
                warn!(error = %crate::telemetry::chain(&error), pod = %uid, stage = "capture", "not released");
                // Its listeners stay, or what the kernel still sends there would be refused.
                enrolled.is_stuck = true;
                self.enrolled.insert(uid, enrolled);
                false
            }
        }
    }

    /// Lets go of pods that are not wanted, or not as they were enrolled, and says whether there were any.
    ///
    /// Those that get further addresses, and those whose namespace another pod is to have, stay captured until that
    /// is done ([`Self::enrol`]): by the namespace's inode. Those that give an address up do not: another pod may
    /// be waiting for it.
    pub(super) fn release(
        &mut self,
        wanted: &HashMap<WorkloadUid, Arc<Workload>>,
    ) -> (bool, HashMap<u64, (WorkloadUid, Enrolled)>) {
        let stays = |(uid, enrolled): &(&WorkloadUid, &Enrolled)| {
            let is_wanted = wanted.get(*uid).is_some_and(|workload| enrolled.is(workload));
            is_wanted && !enrolled.is_stuck && !self.is_replaced(uid, enrolled)
        };
        let leaving: Vec<WorkloadUid> = self
            .enrolled
            .iter()
            .filter(|pod| !stays(pod))
            .map(|(uid, _)| Arc::clone(uid))
            .collect();
        let mut predecessors = HashMap::new();
        if leaving.is_empty() {
            return (false, predecessors);
        }
        let is_new = |uid: &WorkloadUid| !self.enrolled.contains_key(uid) || leaving.contains(uid);
        let successors: HashSet<u64> = wanted
            .iter()
            .filter(|(uid, _)| is_new(uid))
            .filter_map(|(_, workload)| self.namespaces.named_inode(workload))
            .collect();
        let mut released = false;
        for uid in leaving {
            let Some(enrolled) = self.enrolled.get(&uid) else { continue };
            let now = wanted.get(&uid).filter(|_| !self.is_replaced(&uid, enrolled));
            if now.is_some_and(|now| enrolled.is_part_of(now))
                || successors.contains(&enrolled.inode)
            {
                let inode = enrolled.inode;
                let enrolled = self.enrolled.remove(&uid);
                predecessors.extend(enrolled.map(|enrolled| (inode, (uid, enrolled))));
            } else {
                released |= self.let_go(uid);
            }
        }
        (released, predecessors)
    }

    /// The pod is not captured any more: its listeners end a little later.
    pub(super) fn linger(&mut self, uid: &WorkloadUid, enrolled: &Enrolled) {
        info!(pod = %uid, "left");
        let stop = enrolled.stop.clone();
        self.serving.spawn(async move {
            sleep(LINGER).await;
            stop.send_replace(true);
        });
    }
}
