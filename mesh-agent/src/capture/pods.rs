//! What is enrolled, and the order in which a pod goes in and out.
//!
//! In: listeners, then the inbound side, then `connect`: nothing is captured before somebody listens.
//! Out: `connect`, then the inbound side. Every step may be repeated, so an enrolment that failed half-way is
//! completed, or undone, by the next one.

mod generations;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use aya::maps::{LpmTrie, MapData};
use mesh_common::addr::{WireIp, from_ip};
use mesh_common::direct::VerdictKey;
use mesh_common::maps::PodOutbound;
use mesh_core::addr::Cidr;
use mesh_core::generation::Generation;
use mesh_core::settings::{Mode, Outbound, Settings};
use mesh_core::shares::Shares;

use self::generations::Undecided;
use super::direct::Generations;
use super::inherit::Nameless;
use super::listeners::{self, Ports, inbound_order, shards};
use super::maps::{self, Maps};
use super::networks::{Blocks, Networks};
use super::pins;
use super::routes::Routes;
use super::{CaptureError, Destinations, Listeners, PodCapture};
use crate::net::Netns;

/// A pod as the kernel knows it from us.
#[derive(Clone, Debug)]
struct Enrolled {
    /// Kept open: the cookie stays this pod's, and settings that need routes can come later.
    namespace: Arc<Netns>,
    netns: u64,
    /// Its addresses, and the ports of the outbound listeners on each.
    ports: Ports,
    /// Inbound listeners per address.
    shards: u32,
    settings: Settings,
    /// `None`: not all of its entries have the one that they should have.
    generation: Option<Generation>,
}

impl Enrolled {
    fn skips(&self) -> BTreeMap<Cidr, u32> {
        maps::skips(&self.settings.skip_outbound_cidrs)
    }
}

/// All enrolled pods, by UID.
#[derive(Debug)]
pub(super) struct Pods {
    pub(super) maps: Maps,
    pub(super) routes: Routes,
    pub(super) networks: Networks,
    enrolled: BTreeMap<String, Enrolled>,
    /// What lies in the map, with the generations there. `None`: not the one that should be there.
    destinations: HashMap<WireIp, Option<Generation>>,
    /// As they should be, also of what is not in the maps yet.
    generations: Generations,
    /// There was no room for all destinations: every pod captures everything. Read without the lock on the rest,
    /// which is held for as long as the kernel takes.
    everything: Arc<AtomicBool>,
    /// What lies in `VERDICTS`, by the cookie of the source's namespace, with the generations of source and
    /// destination.
    pub(super) verdicts: Shares<u64, VerdictKey, (Generation, Generation)>,
    /// Verdicts may be dead: a generation has changed since they were looked through.
    pub(super) may_be_dead: bool,
    /// Verdicts are to be removed that the kernel's refusal of a generation would leave in force.
    undecided: Undecided,
    /// The pods of this node have been enrolled, as far as they could be: before that a verdict of an earlier
    /// agent looks dead and is not.
    pub(super) is_settled: bool,
}

impl Pods {
    /// Begins with what an earlier agent left in the maps.
    pub(super) fn new(
        maps: Maps,
        networks: LpmTrie<MapData, WireIp, u32>,
        routes: Routes,
    ) -> Result<Self, CaptureError> {
        let networks = Networks::new(networks).map_err(maps.failed("NETWORKS"))?;
        let failed = maps.failed("DESTINATIONS");
        let found = maps.destinations.iter().map(|one| one.map(|(ip, there)| (ip, Some(there))));
        let destinations = found.collect::<Result<_, _>>().map_err(failed)?;
        let verdicts = super::direct::found(&maps)?;
        Ok(Self {
            maps,
            routes,
            networks,
            enrolled: BTreeMap::new(),
            destinations,
            generations: Generations::default(),
            everything: Arc::default(),
            verdicts,
            may_be_dead: true,
            undecided: Undecided::default(),
            is_settled: false,
        })
    }

    fn set_destination(&mut self, ip: WireIp, generation: Generation) -> Result<(), CaptureError> {
        self.maps.set_destination(ip, generation)?;
        self.destinations.insert(ip, Some(generation));
        Ok(())
    }

    pub(super) fn set_destinations(
        &mut self,
        wanted: &HashSet<IpAddr>,
        blocks: &Blocks,
        hold_back_everything: impl Fn(bool) -> Result<(), CaptureError>,
    ) -> Result<Destinations, CaptureError> {
        let wanted: HashSet<WireIp> = wanted.iter().map(|ip| from_ip(*ip)).collect();
        let failed = self.maps.failed("NETWORKS");
        self.networks.end_exceptions(blocks, &failed)?;
        let add = |this: &mut Self| {
            this.add_destinations(&wanted)?;
            this.networks.add(blocks, &failed)
        };
        let mut added = add(self);
        if added.is_err() {
            // Before anything is removed: what has no place must not leave in plain text.
            self.everything.store(true, Ordering::Relaxed);
            let held_back = hold_back_everything(true);
            self.capture_everything(true)?;
            held_back?;
        }
        let gone: Vec<_> =
            self.destinations.keys().filter(|ip| !wanted.contains(*ip)).copied().collect();
        self.may_be_dead |= !gone.is_empty();
        for ip in gone {
            self.maps.remove_destination(ip)?;
            self.destinations.remove(&ip);
        }
        self.networks.retain(blocks, &failed)?;
        if added.is_err() {
            added = add(self);
        }
        match added {
            Ok(()) => {
                self.capture_everything(false)?;
                hold_back_everything(false)?;
                Ok(Destinations::Listed)
            }
            Err(why) => Ok(Destinations::Everything(why)),
        }
    }

    fn add_destinations(&mut self, wanted: &HashSet<WireIp>) -> Result<(), CaptureError> {
        for ip in wanted {
            if !self.destinations.contains_key(ip) {
                self.set_destination(*ip, self.generations.of_destination(*ip))?;
            }
        }
        Ok(())
    }

    /// Whether pods capture everything, for want of room.
    pub(super) fn captures_everything(&self) -> bool {
        self.everything.load(Ordering::Relaxed)
    }

    /// The same for who must not wait.
    pub(super) fn everything(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.everything)
    }

    /// Makes pods capture everything, or again what their settings say.
    fn capture_everything(&mut self, everything: bool) -> Result<(), CaptureError> {
        if !everything && !self.captures_everything() {
            return Ok(());
        }
        self.everything.store(everything, Ordering::Relaxed);
        let written = self.enrolled.iter().try_for_each(|(uid, pod)| {
            self.maps.set_outbound(pod.netns, &outbound_entry(uid, pod, everything))
        });
        // In case of doubt too much is captured, and written again with the next change.
        self.everything.fetch_or(written.is_err(), Ordering::Relaxed);
        written
    }

    /// Everything but the link to the namespace, which `attach` makes between the two sides and `detach`
    /// removes. `was_linked`: there was one before.
    ///
    /// A pod that failed half-way and that nobody had enrolled before is left alone again: half of it
    /// would refuse what it should not. One that was, by us or by an earlier agent, stays as it is, since
    /// what was captured a moment ago must not leave in plain text. The same holds for a namespace that
    /// a predecessor leaves.
    pub(super) fn enrol(
        &mut self,
        pod: &PodCapture<'_>,
        was_linked: bool,
        attach: impl FnOnce() -> Result<(), CaptureError>,
        detach: impl Fn(&str) -> Result<(), CaptureError>,
    ) -> Result<Listeners, CaptureError> {
        self.check(pod)?;
        let was_captured = was_linked
            || self.enrolled.contains_key(pod.uid)
            || self.maps.outbound_of(pod.netns.cookie()).is_some();
        self.enrol_all(pod, attach, &detach).inspect_err(|_error| {
            if !was_captured
                && self.enrolled.contains_key(pod.uid)
                && let Err(error) = self.leave(pod.uid, || detach(pod.uid))
            {
                let error = crate::telemetry::chain(&error);
                tracing::warn!(error, pod = pod.uid, stage = "capture", "left half enrolled");
            }
        })
    }

    fn enrol_all(
        &mut self,
        pod: &PodCapture<'_>,
        attach: impl FnOnce() -> Result<(), CaptureError>,
        detach: impl Fn(&str) -> Result<(), CaptureError>,
    ) -> Result<Listeners, CaptureError> {
        let enter = |source| CaptureError::Netns { uid: pod.uid.to_owned(), source };
        let namespace = Arc::new(pod.netns.try_clone().map_err(enter)?);
        let (listeners, ports) = listeners::open(pod)?;
        let shards = u32::try_from(shards(pod)).unwrap_or(u32::MAX);
        let now = Enrolled {
            namespace,
            netns: pod.netns.cookie(),
            ports,
            shards,
            settings: pod.settings.clone(),
            generation: Some(self.generations.of_pod(pod.uid)),
        };
        let before = self.enrolled.insert(pod.uid.to_owned(), now.clone());
        self.may_be_dead = true;
        self.prepare_routes(pod.uid, &now)?;

        for (listener, (ip, shard)) in listeners.inbound.iter().zip(inbound_order(pod)) {
            self.maps.set_listener(ip, u32::try_from(shard).unwrap_or(u32::MAX), listener)?;
        }
        for listener in &listeners.outbound {
            self.maps.mark_listener(listener)?;
        }
        self.write_inbound(pod.uid, &now)?;
        attach()?;
        self.write_outbound(pod.uid, &now)?;
        if let Some(before) = before {
            self.remove_remains(&before, &now)?;
        }
        if let Some(uid) = pod.predecessor.filter(|uid| *uid != pod.uid)
            && let Some(before) = self.enrolled.get(uid).cloned()
        {
            self.remove_remains(&before, &now)?;
            detach(uid)?;
            self.forget(uid);
        }
        Ok(listeners)
    }

    fn forget(&mut self, uid: &str) {
        self.may_be_dead = true;
        self.enrolled.remove(uid);
        self.generations.pods.remove(uid);
    }

    pub(super) fn update(&mut self, uid: &str, settings: &Settings) -> Result<(), CaptureError> {
        let before = self.enrolled.get(uid).cloned();
        let before = before.ok_or_else(|| CaptureError::NotEnrolled { uid: uid.to_owned() })?;
        let now = Enrolled { settings: settings.clone(), ..before.clone() };
        self.prepare_routes(uid, &now)?;
        self.write_inbound(uid, &now)?;
        self.write_outbound(uid, &now)?;
        self.remove_remains(&before, &now)?;
        self.enrolled.insert(uid.to_owned(), now);
        Ok(())
    }

    /// `detach` removes the link to the namespace, after the outbound side.
    pub(super) fn leave(
        &mut self,
        uid: &str,
        detach: impl FnOnce() -> Result<(), CaptureError>,
    ) -> Result<(), CaptureError> {
        let Some(pod) = self.enrolled.get(uid).cloned() else {
            return Err(CaptureError::NotEnrolled { uid: uid.to_owned() });
        };
        // A predecessor's that this pod has not come to replace stays until the predecessor leaves.
        let is_another =
            |(other, one): (&String, &Enrolled)| other != uid && one.netns == pod.netns;
        if !self.enrolled.iter().any(is_another) {
            self.maps.remove_outbound(pod.netns)?;
        }
        // Before the entries: without them its program would refuse all that comes to a strict pod, deliveries
        // that are under way too.
        detach()?;
        for (ip, _ports) in &pod.ports {
            self.maps.remove_inbound(from_ip(*ip))?;
        }
        for block in pod.skips().keys() {
            self.maps.remove_skip(pod.netns, block)?;
        }
        for (ip, _ports) in &pod.ports {
            for shard in 0..pod.shards {
                self.maps.remove_listener(*ip, shard)?;
            }
        }
        self.forget(uid);
        self.routes.release(&pod.namespace);
        Ok(())
    }

    /// Before the first delivery that could need them.
    fn prepare_routes(&mut self, uid: &str, pod: &Enrolled) -> Result<(), CaptureError> {
        if !pod.settings.preserve_client_address {
            return Ok(());
        }
        let ips: Vec<_> = pod.ports.iter().map(|(ip, _ports)| *ip).collect();
        self.routes.add(uid, &pod.namespace, &ips)
    }

    /// Removes the entries of pods that are neither enrolled nor in `uids` nor in one of the `namespaces`,
    /// those that are `nameless` if these are to go, and blocks that enrolled ones do not skip. `owners` are
    /// those of [`Maps::owners`].
    pub(super) fn retain(
        &mut self,
        uids: &HashSet<String>,
        namespaces: &HashSet<u64>,
        owners: &[(u64, [u32; 2])],
        nameless: Nameless,
    ) -> Result<(), CaptureError> {
        self.is_settled = true;
        let mut keep: HashSet<[u32; 2]> =
            uids.iter().chain(self.enrolled.keys()).map(|uid| maps::pod_hash(uid)).collect();
        if nameless == Nameless::Stay {
            keep.insert(maps::NAMELESS);
        }
        let mut netns = HashSet::new();
        for (cookie, pod) in owners {
            if keep.contains(pod) || namespaces.contains(cookie) {
                netns.insert(*cookie);
            } else {
                self.maps.remove_outbound(*cookie)?;
            }
        }
        let inbound = maps::pairs(&self.maps.inbound).map_err(self.maps.failed("POD_INBOUND"))?;
        for (ip, pod) in inbound {
            if !keep.contains(&pod.pod) {
                self.maps.remove_inbound(ip)?;
            }
        }
        // An earlier agent may have written blocks that the pod's settings do not have any more.
        let known = self.enrolled.values().map(|pod| (pod.netns, pod.skips())).collect();
        self.maps.keep_skips(&netns, &known)?;
        let shows = self.enrolled.values().filter(|pod| pod.settings.preserve_client_address);
        let needed = shows.map(|pod| pod.namespace.inode()).collect();
        // Of those that are enrolled it is known.
        let expected =
            uids.iter().filter(|uid| !self.enrolled.contains_key(*uid)).cloned().collect();
        self.routes.adopt(&needed, &expected)
    }

    pub(super) fn uids(&self) -> impl Iterator<Item = &str> {
        self.enrolled.keys().map(String::as_str)
    }

    pub(super) fn is_enrolled(&self, uid: &str) -> bool {
        self.enrolled.contains_key(uid)
    }

    /// The UIDs of those that accept plain text.
    pub(super) fn permissive(&self) -> HashSet<String> {
        let accepts = |pod: &Enrolled| pod.settings.mode == Mode::Permissive;
        let permissive = self.enrolled.iter().filter(|(_uid, pod)| accepts(pod));
        permissive.map(|(uid, _pod)| uid.clone()).collect()
    }

    /// The addresses and the namespace of every enrolled pod.
    pub(super) fn places(&self) -> Vec<(String, Vec<IpAddr>, Arc<Netns>)> {
        let place = |(uid, pod): (&String, &Enrolled)| {
            let ips = pod.ports.iter().map(|(ip, _ports)| *ip).collect();
            (uid.clone(), ips, Arc::clone(&pod.namespace))
        };
        self.enrolled.iter().map(place).collect()
    }

    /// At all of its addresses, also when one fails.
    fn write_inbound(&mut self, uid: &str, pod: &Enrolled) -> Result<(), CaptureError> {
        let generation = pod.generation.unwrap_or(0);
        let written = pod.ports.iter().map(|(ip, ports)| {
            let entry = maps::inbound(uid, &pod.settings, ports, pod.shards, generation);
            self.maps.set_inbound(*ip, &entry)
        });
        written.fold(Ok(()), Result::and)
    }

    /// The exceptions first: without them too much would be captured for a moment.
    fn write_outbound(&mut self, uid: &str, pod: &Enrolled) -> Result<(), CaptureError> {
        for (block, skipped) in pod.skips() {
            self.maps.add_skip(pod.netns, &block, skipped)?;
        }
        self.maps.set_outbound(pod.netns, &outbound_entry(uid, pod, self.captures_everything()))
    }

    /// Removes what `before` had in the maps and `now` has not.
    fn remove_remains(&mut self, before: &Enrolled, now: &Enrolled) -> Result<(), CaptureError> {
        if before.netns != now.netns {
            self.maps.remove_outbound(before.netns)?;
        }
        if before.netns != now.netns || !now.settings.preserve_client_address {
            self.routes.release(&before.namespace);
        }
        for (ip, _ports) in &before.ports {
            let stays = now.ports.iter().any(|(still, _)| still == ip);
            if !stays {
                self.maps.remove_inbound(from_ip(*ip))?;
            }
            for shard in if stays { now.shards } else { 0 }..before.shards {
                self.maps.remove_listener(*ip, shard)?;
            }
        }
        let now_skipped = now.skips();
        for block in maps::in_order_of_removal(before.skips()) {
            if before.netns != now.netns || !now_skipped.contains_key(&block) {
                self.maps.remove_skip(before.netns, &block)?;
            }
        }
        Ok(())
    }

    /// Whether the pod could be enrolled, as far as the others and the programs are concerned.
    pub(super) fn check(&self, pod: &PodCapture<'_>) -> Result<(), CaptureError> {
        let uid = || pod.uid.to_owned();
        if !pins::fits(pod.uid) {
            return Err(CaptureError::Uid { uid: pod.uid.chars().take(200).collect() });
        }
        let v4 = pod.ips.iter().filter(|ip| ip.is_ipv4()).count();
        if pod.ips.is_empty() || v4 > 1 || pod.ips.len() - v4 > 1 {
            return Err(CaptureError::Addresses { uid: uid() });
        }
        for (other, enrolled) in &self.enrolled {
            let shares_ip = enrolled.ports.iter().any(|(ip, _)| pod.ips.contains(ip));
            let is_meant = other == pod.uid || Some(&**other) == pod.predecessor;
            if !is_meant && (shares_ip || enrolled.netns == pod.netns.cookie()) {
                return Err(CaptureError::Shared { uid: uid(), other: other.clone() });
            }
        }
        Ok(())
    }
}

/// The value of `POD_OUTBOUND` for a pod.
fn outbound_entry(uid: &str, pod: &Enrolled, everything: bool) -> PodOutbound {
    let outbound = if everything { Outbound::All } else { pod.settings.outbound };
    maps::outbound(uid, &pod.settings, outbound, &pod.ports, pod.generation.unwrap_or(0))
}
