//! A pod's listeners: which there are, in which order, and how they are opened.

use std::net::{IpAddr, TcpListener};

use mesh_common::maps::{MAX_PORTS, MAX_SHARDS};

use super::{CaptureError, Listeners, PodCapture};
use crate::net::{self, Bind};

/// Inbound listeners per address.
pub(super) fn shards(pod: &PodCapture<'_>) -> usize {
    pod.inbound_listeners.clamp(1, MAX_SHARDS)
}

/// The inbound listeners' order: every address with shard 0, then every address with shard 1, ...
pub(super) fn inbound_order(pod: &PodCapture<'_>) -> impl Iterator<Item = (IpAddr, usize)> {
    (0..shards(pod)).flat_map(|shard| pod.ips.iter().map(move |ip| (*ip, shard)))
}

/// Ports of the outbound listeners per address.
pub(super) type Ports = Vec<(IpAddr, Vec<u16>)>;

/// Opens all of a pod's listeners in its namespace.
pub(super) fn open(pod: &PodCapture<'_>) -> Result<(Listeners, Ports), CaptureError> {
    let listen = |ip: IpAddr, bind: Bind| {
        let failed = |source| CaptureError::Listen { uid: pod.uid.to_owned(), ip, source };
        let listener = net::listen(bind).map_err(failed)?;
        let port = listener.local_addr().map_err(failed)?.port();
        Ok((listener, port))
    };
    let per_family = pod.outbound_listeners.clamp(1, MAX_PORTS);
    let open_all = || {
        let mut outbound: Vec<TcpListener> = Vec::new();
        let mut ports: Ports = pod.ips.iter().map(|ip| (*ip, Vec::new())).collect();
        for _ in 0..per_family {
            for (ip, ports) in &mut ports {
                let (listener, port) = listen(*ip, Bind::To(*ip))?;
                outbound.push(listener);
                ports.push(port);
            }
        }
        let mut inbound = Vec::new();
        for (ip, _shard) in inbound_order(pod) {
            inbound.push(listen(ip, Bind::Unreachable(ip))?.0);
        }
        Ok((Listeners { outbound, inbound }, ports))
    };
    pod.netns
        .run(open_all)
        .map_err(|source| CaptureError::Netns { uid: pod.uid.to_owned(), source })?
}
