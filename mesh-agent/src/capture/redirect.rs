//! `--redirect-peer on`: hands packets between two pods of the node over from cable to cable.
//!
//! A program hangs on the node's end of each pod's cable, as a pinned TCX link, and the map `PEERS` says
//! which addresses are plugged in where. In: the program, then the addresses, so that whoever is sent
//! something straight also answers straight. Out: the other way round.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use aya::Ebpf;
use aya::programs::SchedClassifier;
use mesh_common::addr::from_ip;
use mesh_common::redirect::Peer;
use thiserror::Error;

use super::maps::{Maps, pod_hash};
use super::pins::{Pins, failed, open_link};
use super::sys::{self, AttachType, Target};
use super::{CaptureError, attach};
use crate::net::{self, Cable, Netns, NoCable};

/// Why a pod's packets go through the node.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NotRedirected {
    /// It is not plugged in as it should be.
    #[error(transparent)]
    Cable(#[from] NoCable),
    /// Whoever attached a program there wants to see what passes.
    #[error("somebody else's TC program is attached to the node's end of the pod's cable")]
    Foreign,
    /// The kernel is too old.
    #[error("this kernel has no TCX: Linux 6.6 is the first")]
    NoTcx,
    /// The kernel refuses.
    #[error("capture")]
    Capture(#[from] CaptureError),
}

/// The program.
#[derive(Debug)]
pub(super) struct Redirect {
    program: OwnedFd,
    id: u32,
}

impl Redirect {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, CaptureError> {
        let what = "mesh_redirect";
        let program = attach::load(ebpf, what, SchedClassifier::load, SchedClassifier::fd)?;
        let id = sys::program_id(program.as_fd())
            .map_err(|source| CaptureError::Load { what, source: source.into() })?;
        Ok(Self { program, id })
    }

    /// Redirects what comes from the pod and what goes to it, if it is plugged in as it should be; if it
    /// is not, nothing of it is redirected any more. May be repeated: nothing changes, then, for
    /// connections that are open.
    pub(super) fn plug_in(
        &self,
        maps: &mut Maps,
        pins: &Pins,
        uid: &str,
        ips: &[IpAddr],
        netns: &Netns,
    ) -> Result<(), NotRedirected> {
        let cable = net::cable(netns, ips).map_err(NotRedirected::from).and_then(|cable| {
            self.attach(&pins.redirect(uid), cable.ifindex)?;
            Ok(cable)
        });
        match cable {
            Ok(cable) => Ok(set_peers(maps, uid, ips, &cable)?),
            Err(why) => {
                unplug(maps, pins, uid)?;
                Err(why)
            }
        }
    }

    fn attach(&self, path: &Path, ifindex: u32) -> Result<(), NotRedirected> {
        let what = "mesh_redirect";
        let refused = |source| CaptureError::Attach { what, source };
        let link = open_link(path, AttachType::TcxIngress)?;
        let link = link.filter(|(_, info)| info.target == Target::Device { index: ifindex });
        let own = link.as_ref().map(|(_, info)| info.program);
        for hook in [AttachType::TcxIngress, AttachType::TcxEgress] {
            match sys::device_programs(ifindex, hook) {
                Ok(found) if found.iter().all(|program| Some(*program) == own) => {}
                Ok(_) => return Err(NotRedirected::Foreign),
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                    return Err(NotRedirected::NoTcx);
                }
                Err(error) => return Err(refused(error).into()),
            }
        }
        if let Some((link, info)) = link {
            if info.program != self.id {
                sys::update_link(link.as_fd(), self.program.as_fd()).map_err(refused)?;
            }
            return Ok(());
        }
        // Of a cable that is gone.
        remove_link(path)?;
        let link = sys::create_device_link(self.program.as_fd(), ifindex, AttachType::TcxIngress)
            .map_err(refused)?;
        Ok(sys::pin(link.as_fd(), path).map_err(failed("pin", path))?)
    }
}

/// Leaves what comes from the pod and goes to it to the node.
pub(super) fn unplug(maps: &mut Maps, pins: &Pins, uid: &str) -> Result<(), CaptureError> {
    let pod = pod_hash(uid);
    maps.keep_peers(|_ip, peer| peer.pod != pod)?;
    remove_link(&pins.redirect(uid))
}

/// Leaves all pods but these to the node.
pub(super) fn retain(
    maps: &mut Maps,
    pins: &Pins,
    uids: &HashSet<String>,
) -> Result<(), CaptureError> {
    let keep: HashSet<_> = uids.iter().map(|uid| pod_hash(uid)).collect();
    maps.keep_peers(|_ip, peer| keep.contains(&peer.pod))?;
    for (uid, path) in pins.redirects()? {
        if !uids.contains(&uid) {
            remove_link(&path)?;
        }
    }
    Ok(())
}

fn set_peers(
    maps: &mut Maps,
    uid: &str,
    ips: &[IpAddr],
    cable: &Cable,
) -> Result<(), CaptureError> {
    let wanted: Vec<_> = ips.iter().map(|ip| from_ip(*ip)).collect();
    let pod = pod_hash(uid);
    maps.keep_peers(|ip, peer| peer.pod != pod || wanted.contains(ip))?;
    let now = Peer {
        ifindex: cable.ifindex,
        #[expect(clippy::cast_possible_truncation, reason = "wraps; only equality counts")]
        since: (sys::boot_ns() >> 10) as u32,
        pod,
        pod_mac: cable.pod_mac,
        node_mac: cable.node_mac,
    };
    for ip in wanted {
        let before = maps.peer(ip);
        // Of an earlier agent too: connections go on that were open then.
        let same = before.filter(|peer| peer.pod == pod && peer.ifindex == now.ifindex);
        let entry = Peer { since: same.map_or(now.since, |peer| peer.since), ..now };
        if before != Some(entry) {
            maps.set_peer(ip, &entry)?;
        }
    }
    Ok(())
}

/// Ends a link, whether its device is there or not, and removes its pin.
fn remove_link(path: &Path) -> Result<(), CaptureError> {
    let Some((link, _info)) = open_link(path, AttachType::TcxIngress)? else {
        return Ok(());
    };
    // Its device may be gone, and the link with it.
    drop(sys::detach_link(link.as_fd()));
    fs::remove_file(path).map_err(failed("remove", path))
}
