//! Verdicts and generations of the direct way, as [`super::Capture`] writes them.
//!
//! Guarantees: a verdict is written only under the generations that lie in the kernel at that moment, and
//! only if those are what the caller decided from; a full map is swept once and then refuses.

use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use mesh_common::WireAddr;
use mesh_common::addr::from_ip;
use mesh_common::direct::{MAX_ENDPOINTS, Verdict, VerdictEndpoint, VerdictKey};
use mesh_common::maps::Secrets;
use mesh_core::addr::{EndpointAddr, OrigDst};
use mesh_core::generation::{Generation, GenerationKey};

use super::maps::absent_is_ok;
use super::pods::{Generations, Pods};
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
    /// The kernel refuses a change: verdicts that should have ended may not have.
    pub fn set_generations(&self, wanted: Generations) -> Result<(), CaptureError> {
        lock(&self.pods).set_generations(wanted)
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

    /// The generation under which the kernel knows an enrolled pod.
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
        let failed = pods.maps.failed("VERDICTS");
        let inserted = pods.maps.verdicts.insert(key, verdict, 0).map_err(&failed);
        match inserted {
            Err(CaptureError::Full { .. }) => {
                sweep(&mut pods)?;
                pods.maps.verdicts.insert(key, verdict, 0).map_err(failed)?;
            }
            other => other?,
        }
        Ok(Written::Yes)
    }

    /// Ends what the kernel may do with connections to `dst` from the namespace with the cookie `netns`:
    /// it asks again.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn remove_verdict(&self, netns: u64, dst: OrigDst) -> Result<(), CaptureError> {
        let mut pods = lock(&self.pods);
        let failed = pods.maps.failed("VERDICTS");
        let key = VerdictKey::new(netns, dst.0.into());
        absent_is_ok(pods.maps.verdicts.remove(&key)).map_err(failed)
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

fn sweep(pods: &mut Pods) -> Result<usize, CaptureError> {
    let failed = pods.maps.failed("VERDICTS");
    let sources = pods.generations_by_netns();
    let mut held = 0;
    let mut dead = Vec::new();
    for found in pods.maps.verdicts.iter() {
        let (key, verdict) = found.map_err(&failed)?;
        let holds = sources.get(&key.netns) == Some(&verdict.source)
            && pods.destination_generation(key.dst.ip) == Some(verdict.destination)
            && verdict.source != 0
            && verdict.destination != 0;
        if holds {
            held += 1;
        } else {
            dead.push(key);
        }
    }
    for key in dead {
        absent_is_ok(pods.maps.verdicts.remove(&key)).map_err(&failed)?;
    }
    Ok(held)
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
