//! Where a pod is plugged into its node: the veth pair that carries its addresses.
//!
//! Found by what the kernel says of devices, never by their names. Whatever differs from a plain cable,
//! one end with the pod's addresses inside, the other one routed by the node, is not one: who bends,
//! shapes or watches what passes there wants to see it.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;

use thiserror::Error;

use super::Netns;
use super::links::{Device, Mac};
use super::netlink::Rtnetlink;

/// A veth pair between a pod and its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cable {
    /// Index of the node's end, in the node's namespace.
    pub ifindex: u32,
    /// Link-layer address of the node's end.
    pub node_mac: [u8; 6],
    /// Of the pod's end.
    pub pod_mac: [u8; 6],
}

/// Why a pod has no [`Cable`].
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NoCable {
    /// Nothing has it.
    #[error("no device of the pod has the address {0}")]
    NoDevice(IpAddr),
    /// They are on several devices.
    #[error("the pod's addresses are on several devices")]
    Scattered,
    /// Another kind of device.
    #[error("the pod's device is no veth but {0:?}")]
    NotVeth(String),
    /// The other end is not here.
    #[error("the other end of the pod's cable is not in the node's network namespace")]
    Elsewhere,
    /// One of the ends belongs to a bridge, a bond or a VRF.
    #[error("the pod's cable belongs to a bridge, a bond or a VRF, on the {0}'s side")]
    Enslaved(&'static str),
    /// One of the ends is down.
    #[error("the pod's cable is down")]
    Down,
    /// What goes to the pod is queued, by a bandwidth limit for example.
    #[error("what goes to the pod is queued by `{0}`")]
    Queued(String),
    /// An XDP program looks at what comes to the pod.
    #[error("an XDP program is attached in the pod")]
    Xdp,
    /// tc filters on the node's end.
    #[error("tc filters are attached to the node's end of the pod's cable")]
    Filters,
    /// The kernel did not answer.
    #[error("ask for the pod's devices")]
    Netlink(#[from] io::Error),
}

/// Finds the cable of the pod in `netns` with the addresses `ips`. The calling thread is in the node's
/// namespace.
///
/// # Errors
///
/// There is none, or it is not a plain one.
pub fn cable(netns: &Netns, ips: &[IpAddr]) -> Result<Cable, NoCable> {
    let inner = netns.run(|| inner_end(ips))??;
    let node = Rtnetlink::open()?;
    let outer = match (inner.link, inner.link_netns) {
        (Some(index), Some(_)) => node.device(index)?,
        // Both ends in the pod.
        _ => None,
    };
    // An index means something else in every namespace: it is the other end if its other end is this
    // one, in this pod's namespace.
    let outer = outer.ok_or(NoCable::Elsewhere)?;
    let number = node.namespace_id(netns.fd.as_raw_fd().cast_unsigned())?;
    let is_pair = outer.kind == "veth"
        && outer.link == Some(inner.index)
        && number.is_some()
        && outer.link_netns == number;
    if !is_pair {
        return Err(NoCable::Elsewhere);
    }
    for (end, side) in [(&inner, "pod"), (&outer, "node")] {
        if end.master.is_some() {
            return Err(NoCable::Enslaved(side));
        }
        if !end.is_up {
            return Err(NoCable::Down);
        }
    }
    if outer.qdisc != "noqueue" {
        return Err(NoCable::Queued(outer.qdisc));
    }
    // On the other end it sees what comes from the pod, before anything of ours.
    if inner.has_xdp {
        return Err(NoCable::Xdp);
    }
    if node.has_filters(outer.index)? {
        return Err(NoCable::Filters);
    }
    let mac = |mac: Option<Mac>| mac.ok_or(NoCable::Elsewhere);
    Ok(Cable { ifindex: outer.index, node_mac: mac(outer.mac)?, pod_mac: mac(inner.mac)? })
}

/// The device that has the pod's addresses.
fn inner_end(ips: &[IpAddr]) -> Result<Device, NoCable> {
    let netlink = Rtnetlink::open()?;
    let addresses = netlink.addresses()?;
    let mut indices = BTreeSet::new();
    for ip in ips {
        let on: Vec<_> = addresses.iter().filter(|(found, _)| found == ip).collect();
        if on.is_empty() {
            return Err(NoCable::NoDevice(*ip));
        }
        indices.extend(on.into_iter().map(|(_, index)| *index));
    }
    let mut indices = indices.into_iter();
    let (Some(index), None) = (indices.next(), indices.next()) else {
        return Err(NoCable::Scattered);
    };
    match netlink.device(index)? {
        Some(device) if device.kind == "veth" => Ok(device),
        Some(device) => Err(NoCable::NotVeth(device.kind)),
        None => Err(NoCable::Elsewhere),
    }
}
