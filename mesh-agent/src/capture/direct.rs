//! Verdicts and generations of the direct way, as [`super::Capture`] writes them.
//!
//! Guarantees: a verdict is written only under the generations that lie in the kernel at that moment, and
//! only if those are what the caller decided from. Where the map is full, the pod that has the most verdicts
//! gives way ([`mesh_core::shares`]); who that is, and which verdicts do not hold any more, is known here and
//! not asked of the kernel.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use mesh_common::WireAddr;
use mesh_common::addr::{WireIp, from_ip, to_ip};
use mesh_common::direct::{MAX_ENDPOINTS, Verdict, VerdictEndpoint, VerdictKey};
use mesh_common::maps::Secrets;
use mesh_core::addr::{EndpointAddr, OrigDst};
use mesh_core::generation::{Generation, GenerationKey};
use mesh_core::shares::{Full, Shares};

use super::maps::{Maps, absent_is_ok};
use super::pods::Pods;
use super::{Capture, CaptureError, lock, sys};

const _: () = assert!(MAX_ENDPOINTS == mesh_core::direct::MAX_ENDPOINTS);

/// One endpoint of a verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VerdictEntry {
    /// The kernel sends connections straight there.
    Direct {
        /// The endpoint.
        addr: EndpointAddr,
        /// Generation of its pod.
        generation: Generation,
        /// Its namespace, as the source pod's numbers it.
        nsid: u32,
    },
    /// The agent carries them there.
    Agent(EndpointAddr),
}

/// What became of a verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// It holds from now on.
    Yes,
    /// It was decided from something else than what holds in the kernel now: decide again later.
    Outdated,
}

/// Generations of everything that verdicts are about.
#[derive(Clone, Debug, Default)]
pub struct Generations {
    /// By address.
    pub destinations: HashMap<IpAddr, Generation>,
    /// By the pod's UID.
    pub pods: HashMap<String, Generation>,
}

impl Generations {
    pub(super) fn of_destination(&self, ip: WireIp) -> Generation {
        self.destinations.get(&to_ip(ip)).copied().unwrap_or(0)
    }

    pub(super) fn of_pod(&self, uid: &str) -> Generation {
        self.pods.get(uid).copied().unwrap_or(0)
    }
}

impl Capture {
    /// The key of generations, the same for every agent that uses these maps.
    pub fn generation_key(&self) -> GenerationKey {
        self.generation_key
    }

    /// Makes these the generations of the destinations that are set and of the pods that are enrolled,
    /// and of those that will be. Verdicts of other generations end with it.
    ///
    /// # Errors
    ///
    /// The kernel refuses a change; all others are made. Until [`Self::write_generations`] has made it too,
    /// there is no verdict on what it is about.
    pub fn set_generations(&self, wanted: Generations) -> Result<(), CaptureError> {
        lock(&self.pods).set_generations(wanted)
    }

    /// Writes what could not be written of them. Nothing to do is no error.
    ///
    /// # Errors
    ///
    /// As of [`Self::set_generations`].
    pub fn write_generations(&self) -> Result<(), CaptureError> {
        lock(&self.pods).write_generations()
    }

    /// As [`Self::set_generations`], of one pod.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn set_pod_generation(
        &self,
        uid: &str,
        generation: Generation,
    ) -> Result<(), CaptureError> {
        lock(&self.pods).set_pod_generation(uid, generation)
    }

    /// The generation under which the kernel knows an enrolled pod, if it is the one that was set.
    pub fn pod_generation(&self, uid: &str) -> Option<Generation> {
        lock(&self.pods).pod_generation(uid)
    }

    /// Writes what the kernel may do with connections to `dst` from the namespace with the cookie
    /// `netns`, decided when these were the generations of source and destination. After `until`, if
    /// there is one, it asks again.
    ///
    /// # Errors
    ///
    /// There is no room, or the kernel refuses: the agent goes on carrying.
    pub fn set_verdict(
        &self,
        (netns, source): (u64, Generation),
        (dst, destination): (OrigDst, Generation),
        until: Option<Duration>,
        entries: &[VerdictEntry],
    ) -> Result<Written, CaptureError> {
        let mut pods = lock(&self.pods);
        let holds = pods.generations_by_netns().get(&netns) == Some(&source)
            && pods.destination_generation(from_ip(dst.0.ip())) == Some(destination);
        if !holds || entries.len() > MAX_ENDPOINTS {
            return Ok(Written::Outdated);
        }
        let key = VerdictKey::new(netns, dst.0.into());
        let mut endpoints = [VerdictEndpoint::NONE; MAX_ENDPOINTS];
        let mut len = 0;
        for (to, entry) in endpoints.iter_mut().zip(entries) {
            *to = endpoint(entry);
            len += 1;
        }
        let until_ns = until.map_or(0, |until| {
            sys::boot_ns().saturating_add(u64::try_from(until.as_nanos()).unwrap_or(u64::MAX))
        });
        let verdict = Verdict { key, source, destination, until_ns, endpoints, len, reserved: 0 };
        let now = Instant::now();
        make_room(&mut pods, netns, &key, now)?;
        let failed = pods.maps.failed("VERDICTS");
        pods.maps.verdicts.insert(key, verdict, 0).map_err(failed)?;
        pods.verdicts.insert(netns, key, (source, destination), now);
        Ok(Written::Yes)
    }

    /// Ends what the kernel may do with connections to `dst` from the namespace with the cookie `netns`:
    /// it asks again.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn remove_verdict(&self, netns: u64, dst: OrigDst) -> Result<(), CaptureError> {
        remove_verdict(&mut lock(&self.pods), netns, &VerdictKey::new(netns, dst.0.into()))
    }

    /// Removes verdicts that do not hold any more, and says how many do. They take up room and nothing
    /// else.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn sweep_verdicts(&self) -> Result<usize, CaptureError> {
        sweep(&mut lock(&self.pods))
    }
}

fn endpoint(entry: &VerdictEntry) -> VerdictEndpoint {
    let wire = |addr: &EndpointAddr| WireAddr::from(SocketAddr::new(addr.0.ip(), addr.0.port()));
    match entry {
        VerdictEntry::Direct { addr, generation, nsid } => {
            VerdictEndpoint { generation: *generation, addr: wire(addr), nsid: *nsid }
        }
        VerdictEntry::Agent(addr) => VerdictEndpoint { addr: wire(addr), ..VerdictEndpoint::NONE },
    }
}

/// Has somebody give way to a verdict of the pod in `netns`, if that is necessary.
fn make_room(
    pods: &mut Pods,
    netns: u64,
    key: &VerdictKey,
    now: Instant,
) -> Result<(), CaptureError> {
    if pods.verdicts.yields(netns, key, now) == Ok(None) {
        return Ok(());
    }
    sweep(pods)?;
    match pods.verdicts.yields(netns, key, now) {
        Ok(None) => Ok(()),
        Ok(Some((victim, oldest))) => remove_verdict(pods, victim, &oldest),
        Err(Full) => Err(pods.maps.full("VERDICTS")),
    }
}

pub(super) fn remove_verdict(
    pods: &mut Pods,
    netns: u64,
    key: &VerdictKey,
) -> Result<(), CaptureError> {
    let failed = pods.maps.failed("VERDICTS");
    absent_is_ok(pods.maps.verdicts.remove(key)).map_err(failed)?;
    pods.verdicts.remove(netns, key);
    Ok(())
}

fn sweep(pods: &mut Pods) -> Result<usize, CaptureError> {
    if pods.may_be_dead && pods.is_settled {
        let sources = pods.generations_by_netns();
        let holds = |netns: &u64, key: &VerdictKey, (source, destination): &(u64, u64)| {
            sources.get(netns) == Some(source)
                && pods.destination_generation(key.dst.ip) == Some(*destination)
                && *source != 0
                && *destination != 0
        };
        for (netns, key) in pods.verdicts.dead(holds) {
            remove_verdict(pods, netns, &key)?;
        }
        pods.may_be_dead = false;
    }
    Ok(pods.verdicts.len())
}

/// The verdicts of an earlier agent.
pub(super) fn found(maps: &Maps) -> Result<Shares<u64, VerdictKey, (u64, u64)>, CaptureError> {
    let mut found = Shares::new(maps.verdicts_room());
    let now = Instant::now();
    for one in maps.verdicts.iter() {
        let (key, verdict) = one.map_err(maps.failed("VERDICTS"))?;
        found.insert(key.netns, key, (verdict.source, verdict.destination), now);
    }
    Ok(found)
}

/// The key of generations that lies beside the maps. The first agent makes it.
pub(super) fn generation_key(secrets: &OwnedFd) -> Result<GenerationKey, CaptureError> {
    let failed = |source| CaptureError::Map { map: "SECRETS", source };
    let nothing = Secrets { generation_key: [0; 2] };
    let found = sys::lookup(secrets.as_fd(), &0u32, nothing).map_err(failed)?;
    if let Some(Secrets { generation_key }) = found
        && generation_key != [0; 2]
    {
        return Ok(GenerationKey(generation_key));
    }
    let generation_key = sys::random_words().map_err(failed)?;
    sys::update(secrets.as_fd(), &0u32, &Secrets { generation_key }).map_err(failed)?;
    Ok(GenerationKey(generation_key))
}
