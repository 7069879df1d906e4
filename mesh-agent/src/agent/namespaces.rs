//! Where the pods of this node have their network namespaces.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use mesh_core::snapshot::Workload;

use super::shortfall::EnrolError;
use crate::net::{self, Netns};
use crate::processes::Processes;

/// The processes of the node that the agent is on; its pod shares the node's.
pub(super) const PROC: &str = "/proc";

/// How a pod's namespace is found.
#[derive(Debug)]
pub(super) enum Namespaces {
    /// The manifest names a path.
    Named,
    /// By the processes in the pod's cgroup.
    Processes(Mutex<Processes>),
}

impl Namespaces {
    /// `cgroup` is the root of the node's cgroup2 tree.
    pub(super) fn of_processes(cgroup: &Path) -> Result<Self> {
        let processes = Processes::new(cgroup, Path::new(PROC))
            .context("see the node's processes: the agent's pod needs hostPID and SYS_PTRACE")?;
        Ok(Self::Processes(Mutex::new(processes)))
    }

    /// Opens the pod's namespace.
    pub(super) fn open(&self, workload: &Workload) -> Result<Netns, EnrolError> {
        match self {
            Self::Named => {
                let path = workload.netns.clone().ok_or(EnrolError::NoNetns)?;
                Netns::open(Path::new(&*path)).map_err(|source| EnrolError::Netns { path, source })
            }
            Self::Processes(processes) => {
                Ok(locked(processes).netns(&workload.uid, &workload.ips)?)
            }
        }
    }

    /// The inode of the namespace that a manifest names. A namespace that a pod's processes have is that
    /// pod's alone, so there nobody asks.
    pub(super) fn named_inode(&self, workload: &Workload) -> Option<u64> {
        match self {
            Self::Named => net::inode(Path::new(workload.netns.as_deref()?)),
            Self::Processes(_) => None,
        }
    }

    /// Whether the pod is in another namespace than that with `inode` by now. One that is nowhere proves
    /// nothing: it may be alive, and just not to be seen from here.
    pub(super) fn is_replaced(&self, uid: &str, named: Option<&str>, inode: u64) -> bool {
        match self {
            Self::Named => {
                let found = named.and_then(|path| net::inode(Path::new(path)));
                found.is_some_and(|found| found != inode)
            }
            Self::Processes(processes) => locked(processes).is_in(uid, inode) == Some(false),
        }
    }

    /// How often to compare: a path costs a microsecond, a look for a pod's processes a hundred.
    pub(super) fn audit(&self) -> Duration {
        match self {
            Self::Named => Duration::from_secs(1),
            Self::Processes(_) => Duration::from_secs(5),
        }
    }
}

fn locked(processes: &Mutex<Processes>) -> MutexGuard<'_, Processes> {
    processes.lock().unwrap_or_else(PoisonError::into_inner)
}
