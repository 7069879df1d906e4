//! What an agent of another layout had captured, as far as ours can know it: by the keys of its maps.
//!
//! Its values have another form and are not read. So nobody knows whose an address or a namespace is, nor
//! how that pod takes part, and until it is enrolled again nothing of it may get into the mesh or out of
//! it in plain text. That much a key is enough for: our maps get an entry without a name
//! ([`super::maps::NAMELESS`]), which refuses. It stays while a pod that is wanted may be behind it
//! ([`Nameless`]), also when the agent starts anew meanwhile, and it is the pod's own as soon as that one is
//! enrolled.
//!
//! Not here: the pods' links, which are taken over as they are (`attach`).

use std::collections::HashSet;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;

use aya::Pod;
use aya::maps::MapData;
use mesh_common::addr::{WireIp, to_ip};
use mesh_core::settings::Outbound;

use super::maps::{Maps, io_error, nameless_inbound, nameless_outbound, pairs, pod_hash};
use super::{CaptureError, sys};

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
    /// their namespaces have its link. Whoever is enrolled, or refused by its own name, has an entry.
    pub(super) fn of<'a>(
        maps: &Maps,
        captured: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, CaptureError> {
        let entries = pairs(&maps.outbound).map_err(maps.failed("POD_OUTBOUND"))?;
        let named: HashSet<[u32; 2]> = entries.into_iter().map(|(_netns, pod)| pod.pod).collect();
        let is_missing = |uid: &str| !named.contains(&pod_hash(uid));
        Ok(if captured.into_iter().any(is_missing) { Self::Stay } else { Self::Go })
    }
}

/// Has our programs refuse what those of the layout in this directory captured and our maps do not know. To
/// be called before anything is moved to them, so that it is captured at any time.
///
/// Also if nothing nameless stays, that holds for what leaves `namespaces` (cookies), where a successor could
/// not be enrolled yet.
pub(super) fn refuse(
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
