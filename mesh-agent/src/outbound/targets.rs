//! Where a connection may go, and which endpoint is tried next: balance, as [`mesh_core`] decides it, with
//! what this agent remembers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::addr::{EndpointAddr, OrigDst};
use mesh_core::affinity::Client;
use mesh_core::protocol::Protocol;
use mesh_core::route::Candidates;
use mesh_core::snapshot::{Endpoint, Service, Snapshot, Workload};

use crate::node::Node;

/// Where a connection may go.
pub(super) enum Targets {
    Service(Arc<Service>, Candidates),
    One(Endpoint),
}

/// A client that keeps to an endpoint, for so long without a connection.
pub(super) struct Sticky {
    client: Client,
    timeout: Duration,
}

impl Targets {
    pub(super) fn as_slice(&self) -> &[Endpoint] {
        match self {
            Self::Service(_, candidates) => candidates.as_slice(),
            Self::One(endpoint) => std::slice::from_ref(endpoint),
        }
    }

    /// Whether `source` keeps to one of these.
    pub(super) fn sticky(&self, source: &Workload, dst: OrigDst) -> Option<Sticky> {
        let Self::Service(service, _) = self else { return None };
        let timeout = service.affinity?;
        let client = Client { pod: Arc::clone(&source.uid), dst: OrigDst::canonical(dst.0) };
        Some(Sticky { client, timeout })
    }

    /// What is spoken with `endpoint`, as declared; of what is no service's nothing is.
    pub(super) fn protocol(&self, dst: OrigDst, endpoint: &Endpoint) -> Option<Protocol> {
        let Self::Service(service, _) = self else { return None };
        service.port(dst.0.port()).map(|port| Protocol::of(port, endpoint))
    }
}

/// Finds the endpoints that one connection tries.
pub(super) struct Picker<'a> {
    pub(super) node: &'a Node,
    /// What `endpoints` are of.
    pub(super) snapshot: &'a Snapshot,
    /// Cookie of the client's namespace.
    pub(super) netns: u64,
    pub(super) endpoints: &'a [Endpoint],
    /// What the kernel drew.
    pub(super) drawn: Option<EndpointAddr>,
    pub(super) sticky: Option<Sticky>,
}

impl Picker<'_> {
    /// The one to try next, or `None` if all have been tried.
    pub(super) fn next(&self, tried: &[EndpointAddr], now: Instant) -> Option<usize> {
        match &self.sticky {
            None => self.balanced(tried, now),
            Some(sticky) => self.kept(sticky, tried, now),
        }
    }

    /// First the one that the kernel drew, if it is still there.
    fn balanced(&self, tried: &[EndpointAddr], now: Instant) -> Option<usize> {
        let first = self.drawn.filter(|_drawn| tried.is_empty());
        let drawn = first.and_then(|addr| self.endpoints.iter().position(|one| one.addr == addr));
        let mut loads = self.node.loads();
        if let Some(index) = drawn {
            loads.take(self.endpoints[index].addr, now);
            return drawn;
        }
        let policy = self.node.limits.balance;
        loads.pick(policy, self.endpoints, tried, now, |n| fastrand::usize(..n))
    }

    /// First the one that the client keeps to, and then the one that has stood in for it. From then on it
    /// keeps to the one that is returned, unless that fails, or only stands in for one that is not read.
    fn kept(&self, sticky: &Sticky, tried: &[EndpointAddr], now: Instant) -> Option<usize> {
        let Sticky { client, timeout } = sticky;
        // Held until it is decided: of two first connections the second one follows the first.
        let mut affinities = self.node.affinities();
        if let Some(index) = affinities.keep(client, *timeout, self.endpoints, tried, now) {
            self.node.loads().take(self.endpoints[index].addr, now);
            return Some(index);
        }
        let may_return = |to| self.snapshot.has_unread_endpoint(client.dst, to);
        let waits = affinities.waits(client, *timeout, tried, now, may_return);
        let index = match affinities.stand_in(client, *timeout, self.endpoints, tried, now) {
            Some(index) => {
                self.node.loads().take(self.endpoints[index].addr, now);
                index
            }
            None => self.balanced(tried, now)?,
        };
        let to = self.endpoints[index].addr;
        if waits {
            affinities.stands_in(client, to);
            return Some(index);
        }
        let has_moved = affinities.bind(client, to, now).is_some();
        drop(affinities);
        if has_moved {
            // What the kernel was told of the endpoint before must not outlive the move.
            if let Err(error) = self.node.capture.remove_verdict(self.netns, client.dst) {
                let error = crate::telemetry::chain(&error);
                tracing::warn!(error, stage = "capture", "a client may be sent to where it was");
            }
        }
        Some(index)
    }
}
