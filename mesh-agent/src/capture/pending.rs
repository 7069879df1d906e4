//! Pods that have a cgroup and are not captured yet, as the programs know them.
//!
//! # Guarantees
//!
//! - What a pod connects before it is captured is refused as long as it is held back here, if it would be
//!   captured a moment later; everything else passes.
//! - While no pod is held back, nobody pays for it but with one comparison.
//! - What an earlier agent left stays until [`Capture::retain_held_back`] is told what of it is still there;
//!   after a change of layout for a short time only, unless the agent comes to know it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use aya::maps::{HashMap, MapData, MapError};
use mesh_common::maps::{OUTBOUND_ALL, PendingPod, PortRanges, UNKNOWN};
use mesh_core::settings::Settings;

use super::maps::{absent_is_ok, io_error, pending};
use super::{Capture, CaptureError, inherit, lock, sys};
use crate::net::Netns;

/// How long what an agent of another layout held back stays so unless ours comes to know it. Of its entries
/// only the keys can be read, and one may have no limit of its own. Twice what an unknown pod has by default:
/// the API is still to be listed when this begins.
const INHERITED: Duration = Duration::from_secs(10);

/// Why a pod is held back, and for how long.
#[derive(Clone, Copy, Debug)]
pub enum HeldBack<'a> {
    /// It takes part like this, and is captured soon.
    Waits(&'a Settings),
    /// The agent does not know it: for so long from now on.
    Unknown(Duration),
}

/// The map `PENDING`.
#[derive(Debug)]
pub(super) struct Pending {
    map: HashMap<MapData, u64, PendingPod>,
    /// The cgroups in it.
    cgroups: HashSet<u64>,
    /// Those of them that reach nothing at all for want of room, and would otherwise.
    closed: HashSet<u64>,
    limit: u32,
}

impl Pending {
    /// Begins with what an earlier agent left in the map, which has room for `limit` pods, or in those of
    /// `older` layouts: what their programs hold back now, ours will.
    pub(super) fn new(
        map: HashMap<MapData, u64, PendingPod>,
        limit: u32,
        older: &[PathBuf],
    ) -> Result<Self, CaptureError> {
        let cgroups = map.keys().collect::<Result<_, _>>().map_err(failed(limit))?;
        let mut pending = Self { map, cgroups, closed: HashSet::new(), limit };
        for layout in older {
            if let Err(error) = pending.inherit(layout) {
                let error = crate::telemetry::chain(&error);
                tracing::warn!(error, stage = "capture", "new pods may talk in plain text");
            }
        }
        Ok(pending)
    }

    fn inherit(&mut self, layout: &Path) -> Result<(), CaptureError> {
        for cgroup in inherit::keys::<u64>(layout, "PENDING") {
            if !self.cgroups.contains(&cgroup) {
                self.map.insert(cgroup, unknown(INHERITED), 0).map_err(failed(self.limit))?;
                self.cgroups.insert(cgroup);
            }
        }
        Ok(())
    }

    pub(super) fn count(&self) -> u64 {
        self.cgroups.len() as u64
    }
}

/// The entry of a pod that the agent does not know.
fn unknown(limit: Duration) -> PendingPod {
    let limit_ns = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
    let until_ns = sys::boot_ns().saturating_add(limit_ns);
    PendingPod { until_ns, skip: PortRanges::NONE, flags: UNKNOWN }
}

fn failed(limit: u32) -> impl Fn(MapError) -> CaptureError {
    const MAP: &str = "PENDING";
    move |error| {
        let source = io_error(error);
        match source.raw_os_error() {
            Some(libc::E2BIG | libc::ENOSPC) => {
                CaptureError::Full { map: MAP, limit, remedy: "raise --max-pods" }
            }
            _ => CaptureError::Map { map: MAP, source },
        }
    }
}

impl Capture {
    /// Refuses what processes in the cgroup with this ID, and below it, connect from a namespace that is
    /// neither an enrolled pod's nor the node's.
    ///
    /// # Errors
    ///
    /// There are more pods than the map has room for: then this one is not held back.
    pub fn hold_back(&self, cgroup: u64, why: HeldBack<'_>) -> Result<(), CaptureError> {
        let mut entry = match why {
            HeldBack::Waits(settings) => pending(settings),
            HeldBack::Unknown(limit) => unknown(limit),
        };
        {
            let mut pending = lock(&self.pending);
            // Under the lock: what is written here after the other look must know.
            let is_closed =
                self.everything.load(Ordering::Relaxed) && entry.flags & OUTBOUND_ALL == 0;
            if is_closed {
                entry.flags |= OUTBOUND_ALL;
            }
            // Written anew it would be given to the next pod's at once, under a program that reads it.
            let is_there = pending.map.get(&cgroup, 0).is_ok_and(|there| there == entry);
            if !is_there {
                let failed = failed(pending.limit);
                pending.map.insert(cgroup, entry, 0).map_err(failed)?;
                pending.cgroups.insert(cgroup);
            }
            match is_closed {
                true => pending.closed.insert(cgroup),
                false => pending.closed.remove(&cgroup),
            };
            if is_there {
                return Ok(());
            }
        }
        self.tell_pending();
        Ok(())
    }

    /// Whatever pods connect to that are held back already is refused from now on, for want of room for the addresses
    /// of the mesh; or again what is of the mesh alone.
    pub(super) fn hold_back_everything(&self, everything: bool) -> Result<(), CaptureError> {
        let mut pending = lock(&self.pending);
        let failed = failed(pending.limit);
        let all = if everything { &pending.cgroups } else { &pending.closed };
        for cgroup in all.clone() {
            let mut entry = match pending.map.get(&cgroup, 0) {
                Ok(entry) => entry,
                Err(MapError::KeyNotFound) => continue,
                Err(error) => return Err(failed(error)),
            };
            if everything && entry.flags & OUTBOUND_ALL != 0 {
                continue;
            }
            match everything {
                true => entry.flags |= OUTBOUND_ALL,
                false => entry.flags &= !OUTBOUND_ALL,
            }
            pending.map.insert(cgroup, entry, 0).map_err(&failed)?;
            match everything {
                true => pending.closed.insert(cgroup),
                false => pending.closed.remove(&cgroup),
            };
        }
        Ok(())
    }

    /// The pod is captured, or left alone, or gone.
    ///
    /// # Errors
    ///
    /// The kernel refuses it: then it stays held back.
    pub fn let_go(&self, cgroup: u64) -> Result<(), CaptureError> {
        {
            let mut pending = lock(&self.pending);
            if !pending.cgroups.contains(&cgroup) {
                return Ok(());
            }
            let failed = failed(pending.limit);
            absent_is_ok(pending.map.remove(&cgroup)).map_err(failed)?;
            pending.cgroups.remove(&cgroup);
            pending.closed.remove(&cgroup);
        }
        self.tell_pending();
        Ok(())
    }

    /// Nothing is held back any more.
    pub fn let_all_go(&self) {
        let all = lock(&self.pending).cgroups.clone();
        for cgroup in all {
            if let Err(error) = self.let_go(cgroup) {
                let error = crate::telemetry::chain(&error);
                tracing::warn!(
                    error,
                    cgroup,
                    stage = "capture",
                    "a pod's cgroup is still held back"
                );
            }
        }
    }

    /// Lets go of what an earlier agent held back and that is not among these cgroups any more, and says
    /// which are left. What shares the namespace `node` is not held back at any time.
    ///
    /// # Errors
    ///
    /// As [`Self::let_go`].
    pub fn retain_held_back(
        &self,
        node: &Netns,
        there: &HashSet<u64>,
    ) -> Result<HashSet<u64>, CaptureError> {
        lock(&self.told).node_netns = node.cookie();
        let gone: Vec<u64> = lock(&self.pending).cgroups.difference(there).copied().collect();
        for cgroup in gone {
            self.let_go(cgroup)?;
        }
        self.tell_pending();
        Ok(lock(&self.pending).cgroups.clone())
    }

    fn tell_pending(&self) {
        // The lock is held over both, or an older number could be written last.
        let mut told = lock(&self.told);
        told.pending = lock(&self.pending).count();
        self.tell(&mut told);
    }
}
