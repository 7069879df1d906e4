//! What an agent of another layout had captured, as far as ours can know it: by the keys of its maps.
//!
//! Its values have another form and are not read. So nobody knows whose an address or a namespace is, nor
//! how that pod takes part, and until it is enrolled again nothing of it may get into the mesh or out of
//! it in plain text. That much a key is enough for: our maps get an entry without a name
//! ([`super::maps::NAMELESS`]), which refuses. It stays while a pod that is wanted may be behind it
//! ([`Nameless`]), also when the agent starts anew meanwhile, and it is the pod's own as soon as that one is
//! enrolled. A pod that is known and cannot be enrolled is refused by its own name ([`refuse_pod`]).
//!
//! Not here: the pods' links, which are taken over as they are (`attach`).

use std::collections::HashSet;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use aya::Pod;
use aya::maps::MapData;
use mesh_common::addr::{WireIp, to_ip};
use mesh_core::settings::Outbound;

use super::listeners::Ports;
use super::maps::{self, Maps, io_error, nameless_inbound, nameless_outbound, pod_hash};
use super::pods::Pods;
use super::{CaptureError, PodCapture, sys};

/// What becomes of entries without a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Nameless {
    /// A pod that is wanted was captured, and our maps do not have it: any of them may be its.
    Stay,
    /// They are nobody's any more.
    Go,
}

impl Nameless {
    /// `captured` are the UIDs of pods that are wanted and that an agent, of whatever layout, had captured:
    /// their namespaces have its link. Whoever is enrolled, or refused by its own name, is among the `owners`
    /// ([`Maps::owners`]).
    pub(super) fn of<'a>(
        owners: &[(u64, [u32; 2])],
        captured: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let named: HashSet<[u32; 2]> = owners.iter().map(|(_netns, pod)| *pod).collect();
        let is_missing = |uid: &str| !named.contains(&pod_hash(uid));
        if captured.into_iter().any(is_missing) { Self::Stay } else { Self::Go }
    }
}

/// Has the kernel refuse what comes to the pod and what it would send into the mesh, if our maps have
/// nothing that does: an earlier agent had captured it, and we cannot. `attach` sees to its link.
pub(super) fn refuse_pod(
    pods: &mut Pods,
    pod: &PodCapture<'_>,
    attach: impl FnOnce() -> Result<(), CaptureError>,
) -> Result<(), CaptureError> {
    let netns = pod.netns.cookie();
    let is_refused =
        pods.maps.outbound_of(netns).is_some_and(|there| there.pod == pod_hash(pod.uid));
    // What is another pod's stays that one's.
    let is_followed = pod.predecessor.is_some_and(|uid| pods.is_enrolled(uid));
    if is_refused || is_followed || pods.check(pod).is_err() {
        return Ok(());
    }
    let outbound = if pods.captures_everything() { Outbound::All } else { pod.settings.outbound };
    let none: Ports = pod.ips.iter().map(|ip| (*ip, Vec::new())).collect();
    let leaving = maps::outbound(pod.uid, pod.settings, outbound, &none, 0);
    let coming = maps::inbound(pod.uid, pod.settings, &[], 0, 0);
    // All of them, also when one fails.
    let entered = pod.ips.iter().map(|ip| pods.maps.set_inbound(*ip, &coming));
    let entered = entered.fold(Ok(()), Result::and);
    let linked = attach();
    let left = pods.maps.set_outbound(netns, &leaving);
    entered.and(linked).and(left)
}

/// Before any program of the `older` layouts, in these directories, is replaced: has ours refuse what those
/// captured and our maps do not know.
pub(super) fn refuse_nameless(
    pods: &mut Pods,
    older: &[PathBuf],
    nameless: Nameless,
    namespaces: &HashSet<u64>,
) {
    let outbound = if pods.captures_everything() { Outbound::All } else { Outbound::Mesh };
    for layout in older {
        // Without room for it the other pods of the node must not wait.
        if let Err(error) = refuse(&mut pods.maps, layout, nameless, namespaces, outbound) {
            let error = crate::telemetry::chain(&error);
            tracing::warn!(error, stage = "capture", "pods may talk in plain text");
        }
    }
}

/// Has our programs refuse what those of the layout in this directory captured and our maps do not know. To
/// be called before anything is moved to them, so that it is captured at any time.
///
/// Also if nothing nameless stays, that holds for what leaves `namespaces` (cookies), where a successor could
/// not be enrolled yet.
fn refuse(
    maps: &mut Maps,
    layout: &Path,
    nameless: Nameless,
    namespaces: &HashSet<u64>,
    outbound: Outbound,
) -> Result<(), CaptureError> {
    let stay = nameless == Nameless::Stay;
    let left = keys::<u64>(layout, "POD_OUTBOUND").into_iter().try_for_each(|netns| {
        if maps.outbound_of(netns).is_some() || !(stay || namespaces.contains(&netns)) {
            return Ok(());
        }
        maps.set_outbound(netns, &nameless_outbound(outbound))
    });
    let entered = keys::<WireIp>(layout, "POD_INBOUND").into_iter().try_for_each(|ip| {
        if maps.has_inbound(ip) || !stay {
            return Ok(());
        }
        maps.set_inbound(to_ip(ip), &nameless_inbound())
    });
    left.and(entered)
}

/// The keys of a hash map of another layout; none if it has no such map, or keys of another size.
pub(super) fn keys<K: Pod + Default>(layout: &Path, map: &'static str) -> Vec<K> {
    let path = layout.join("maps").join(map);
    if !path.exists() {
        return Vec::new();
    }
    read(&path).unwrap_or_else(|error| {
        tracing::warn!(
            %error,
            map,
            stage = "capture",
            "pods of an older agent may talk in plain text until they are enrolled"
        );
        Vec::new()
    })
}

fn read<K: Pod + Default>(path: &Path) -> io::Result<Vec<K>> {
    let map = MapData::from_pin(path).map_err(io_error)?;
    let info = map.info().map_err(io_error)?;
    let (found, wanted) = (info.key_size() as usize, size_of::<K>());
    if found != wanted {
        return Err(io::Error::other(format!("its keys have {found} bytes, and ours {wanted}")));
    }
    sys::keys(map.fd().as_fd(), info.max_entries())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_without_a_name_stay_while_a_wanted_pod_has_none_of_its_own() {
        let owners = [(7, pod_hash("enrolled")), (8, maps::NAMELESS)];
        assert_eq!(Nameless::of(&owners, ["enrolled"]), Nameless::Go);
        assert_eq!(Nameless::of(&owners, ["enrolled", "late"]), Nameless::Stay);
        assert_eq!(Nameless::of(&owners, []), Nameless::Go, "nobody is wanted");
        assert_eq!(Nameless::of(&[], ["late"]), Nameless::Stay);
    }
}
