//! The generations of what is in the maps: verdicts end by them.
//!
//! Guarantees: all that can be written is written, whatever cannot. What cannot counts as having none here, so
//! nothing is decided under it, and the verdicts that the write would have ended are removed instead: the kernel
//! needs memory to replace an element, and none to remove one. When to try again is the caller's affair.

use std::collections::HashMap;

use mesh_common::addr::WireIp;
use mesh_common::direct::VerdictKey;
use mesh_core::generation::Generation;

use super::{Enrolled, Pods, outbound_entry};
use crate::capture::CaptureError;
use crate::capture::direct::{self, Generations};

/// Why there may be verdicts that a write should have ended.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Undecided {
    /// A pod's generation was not taken.
    by_pods: bool,
    /// A destination's was not.
    by_destinations: bool,
}

impl Pods {
    /// Writes the generations of what is in the maps, and keeps those of what is going to be.
    pub(in crate::capture) fn set_generations(
        &mut self,
        wanted: Generations,
    ) -> Result<(), CaptureError> {
        self.generations = wanted;
        self.write_generations()
    }

    /// Writes those that are not in the maps as they should be. Returns the first error.
    pub(in crate::capture) fn write_generations(&mut self) -> Result<(), CaptureError> {
        self.may_be_dead = true;
        // Pods first: one of them ends more verdicts than any destination does.
        let uids: Vec<String> = self.enrolled.keys().cloned().collect();
        let pods = uids.iter().map(|uid| self.write_pod_generation(uid));
        let pods = pods.fold(Ok(()), Result::and);
        let destinations = self.write_destination_generations();
        let written = pods.and(destinations);
        if written.is_err() {
            self.remove_undecided();
        }
        written
    }

    /// As [`Self::set_generations`], of one pod.
    pub(in crate::capture) fn set_pod_generation(
        &mut self,
        uid: &str,
        generation: Generation,
    ) -> Result<(), CaptureError> {
        self.generations.pods.insert(uid.to_owned(), generation);
        self.may_be_dead = true;
        let written = self.write_pod_generation(uid);
        if written.is_err() {
            self.remove_undecided();
        }
        written
    }

    /// The generation in the maps of an enrolled pod, if it is the one that should be there.
    pub(in crate::capture) fn pod_generation(&self, uid: &str) -> Option<Generation> {
        self.enrolled.get(uid).and_then(|pod| pod.generation)
    }

    /// The generation in the map of an address, if it is the one that should be there.
    pub(in crate::capture) fn destination_generation(&self, ip: WireIp) -> Option<Generation> {
        self.destinations.get(&ip).copied().flatten()
    }

    /// By netns cookie, the generations of all enrolled pods that have those that they should have.
    pub(in crate::capture) fn generations_by_netns(&self) -> HashMap<u64, Generation> {
        self.enrolled.values().filter_map(|pod| Some((pod.netns, pod.generation?))).collect()
    }

    fn write_pod_generation(&mut self, uid: &str) -> Result<(), CaptureError> {
        let Some(before) = self.enrolled.get(uid) else {
            return Ok(());
        };
        let generation = Some(self.generations.of_pod(uid));
        if before.generation == generation {
            return Ok(());
        }
        let was_written = before.generation.is_some();
        let now = Enrolled { generation, ..before.clone() };
        let inbound = self.write_inbound(uid, &now);
        let entry = outbound_entry(uid, &now, self.captures_everything());
        let outbound = self.maps.set_outbound(now.netns, &entry);
        let written = inbound.and(outbound);
        let generation = generation.filter(|_| written.is_ok());
        self.undecided.by_pods |= was_written && written.is_err();
        self.enrolled.insert(uid.to_owned(), Enrolled { generation, ..now });
        written
    }

    fn write_destination_generations(&mut self) -> Result<(), CaptureError> {
        let stale = |(ip, there): (&WireIp, &Option<Generation>)| {
            let wanted = self.generations.of_destination(*ip);
            (*there != Some(wanted)).then_some((*ip, wanted))
        };
        let stale: Vec<_> = self.destinations.iter().filter_map(stale).collect();
        let mut all = Ok(());
        for (ip, wanted) in stale {
            let written = self.set_destination(ip, wanted);
            if written.is_err() {
                let before = self.destinations.insert(ip, None);
                self.undecided.by_destinations |= before.flatten().is_some();
            }
            all = all.and(written);
        }
        all
    }

    /// Removes the verdicts that may still hold by a generation that should not be there any more, also while
    /// `sweep` may not remove any. All of them if it is a pod's: which ones lead to that pod is not known here,
    /// and a pod's elements have their memory from the beginning, so this is rare. Once: until the generation is
    /// there, no further one is written.
    fn remove_undecided(&mut self) {
        let Undecided { by_pods, by_destinations } = self.undecided;
        if !by_pods && !by_destinations {
            return;
        }
        let stays = |_netns: &u64, key: &VerdictKey, _generations: &(Generation, Generation)| {
            !by_pods && self.destinations.get(&key.dst.ip) != Some(&None)
        };
        let undecided = self.verdicts.dead(stays);
        let removed =
            undecided.iter().map(|(netns, key)| direct::remove_verdict(self, *netns, key));
        match removed.fold(Ok(()), Result::and) {
            Ok(()) => self.undecided = Undecided::default(),
            Err(error) => {
                let error = crate::telemetry::chain(&error);
                tracing::warn!(error, stage = "capture", "verdicts may outlive a change");
            }
        }
    }
}
