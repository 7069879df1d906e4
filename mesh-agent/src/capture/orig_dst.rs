//! Where a captured connection was meant to go.

use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use mesh_common::WireAddr;
use mesh_common::direct::Flow;
use mesh_common::maps::FlowKey;
use mesh_core::addr::{EndpointAddr, OrigDst};

use super::sys;

/// A worker's view of the kernel's table of captured connections.
#[derive(Debug)]
pub struct OrigDstTable {
    flows: Arc<OwnedFd>,
}

impl OrigDstTable {
    pub(super) fn new(flows: Arc<OwnedFd>) -> Self {
        Self { flows }
    }

    /// The destination that the application asked for, of a connection accepted in the namespace with
    /// this cookie from `peer` by the listener at port `listener`: one source port may be in use towards
    /// several listeners at once.
    ///
    /// `None`: nobody was captured on its way here. The application dialled the listener itself, or so
    /// many others connected meanwhile that the entry was pushed out; reset the connection.
    ///
    /// With it comes the endpoint that a verdict of the direct way chose, if one did.
    ///
    /// The entry is gone afterwards, so that the next user of the port cannot inherit it.
    pub fn take(
        &mut self,
        netns_cookie: u64,
        peer: SocketAddr,
        listener: u16,
    ) -> Option<(OrigDst, Option<EndpointAddr>)> {
        let key = FlowKey {
            netns: netns_cookie,
            src: peer.into(),
            listener_be: listener.to_be(),
            reserved: 0,
        };
        // Other errors than "no such entry" would mean another map than the one that `start` checked,
        // and then too nobody knows where the connection was going.
        let nothing = Flow { orig: WireAddr::NONE, endpoint: WireAddr::NONE };
        let flow = sys::take(self.flows.as_fd(), &key, nothing).ok().flatten()?;
        let chosen = (flow.endpoint != WireAddr::NONE).then(|| EndpointAddr(flow.endpoint.into()));
        Some((OrigDst(flow.orig.into()), chosen))
    }
}
