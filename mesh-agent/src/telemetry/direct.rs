//! The two records of a connection between pods of this node that passes no agent: what the kernel tells
//! of it, in the same words as of any other.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mesh_core::addr::OrigDst;
use mesh_core::protocol::Protocol;
use mesh_core::snapshot::Service;

use super::Telemetry;
use super::connection::{
    Carrier, ConnectionFacts, Direction, Outcome, Party, Path, SecurityPolicy, Way,
};
use super::open::{Counters, Tracked};

/// Who talks to whom, directly.
#[derive(Clone, Debug)]
pub struct Neighbours {
    /// Who connected.
    pub source: Party,
    /// Who accepts.
    pub destination: Party,
    /// What the application dialled.
    pub orig_dst: OrigDst,
    /// The service meant, if it was one.
    pub service: Option<Arc<Service>>,
    /// What is spoken, if a service declares it.
    pub protocol: Option<Protocol>,
    /// The node of both.
    pub node: Arc<str>,
}

/// A direct connection's records, of the source and of the destination.
#[derive(Debug)]
#[must_use = "dropping it records the connection as aborted"]
pub struct DirectTracked {
    outbound: Tracked,
    inbound: Tracked,
}

impl Telemetry {
    /// A direct connection that began at `started`.
    pub fn open_direct(&self, neighbours: Neighbours, started: Instant) -> DirectTracked {
        let Neighbours { source, destination, orig_dst, service, protocol, node } = neighbours;
        // Both identities are this agent's own issuing, and nothing leaves the machine. Of a pod that was
        // gone when this was heard of, nobody knows which it had.
        let security = match (&source.identity, &destination.identity) {
            (Some(_), Some(_)) => SecurityPolicy::MutualTls,
            _ => SecurityPolicy::Unknown,
        };
        let facts = |direction, orig_dst, service, protocol| ConnectionFacts {
            destination: destination.clone(),
            orig_dst,
            service,
            protocol,
            peer_node: Some(Arc::clone(&node)),
            carrier: Some(Carrier::Local),
            way: Some(Way::Direct),
            security,
            ..ConnectionFacts::new(direction, source.clone())
        };
        let outbound = facts(Direction::Outbound, Some(orig_dst), service, protocol);
        let outbound = Tracked::new(self.clone(), outbound, Counters::default(), started);
        let shared = Counters::Mirrored(Arc::clone(outbound.live()));
        let inbound = facts(Direction::Inbound, None, None, None);
        let inbound = Tracked::new(self.clone(), inbound, shared, started);
        DirectTracked { outbound, inbound }
    }
}

impl DirectTracked {
    /// Bytes can flow; the handshake took `setup`.
    pub fn established(&mut self, setup: Duration) {
        self.outbound.established_after(setup);
        self.inbound.established_after(setup);
    }

    /// What the client has sent and received so far.
    pub fn carried(&self, sent: u64, received: u64) {
        let live = self.outbound.live();
        live.sent.store(sent, Ordering::Relaxed);
        live.received.store(received, Ordering::Relaxed);
    }

    /// What it has carried so far was counted by an agent before this one.
    pub fn skip_carried(&self) {
        self.outbound.skip_carried();
        self.inbound.skip_carried();
    }

    /// This agent ends, and the connection goes on: the next one records it.
    pub fn let_go(self) {
        self.inbound.let_go();
        self.outbound.let_go();
    }

    /// It has ended, `duration` after its begin.
    pub fn finish(self, outcome: Outcome, duration: Duration, path: Option<Path>) {
        for tracked in [self.inbound, self.outbound] {
            tracked.update(|facts| facts.path = path);
            tracked.finish_after(outcome.clone(), duration);
        }
    }
}
