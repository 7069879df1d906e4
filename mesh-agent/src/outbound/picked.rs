//! What becomes of an endpoint that was picked: balance hears of it, whatever way the connection takes.

use std::sync::Arc;
use std::time::Instant;

use mesh_core::addr::EndpointAddr;
use mesh_core::snapshot::Endpoint;

use crate::node::Node;

/// An endpoint that was picked: until this is dropped it counts as one connection more.
pub(super) struct Picked {
    node: Arc<Node>,
    pub(super) endpoint: EndpointAddr,
    /// When, as far as that is the endpoint's doing.
    pub(super) asked: Instant,
    failed: bool,
}

impl Picked {
    pub(super) fn new(node: &Arc<Node>, endpoint: EndpointAddr, asked: Instant) -> Self {
        Self { node: Arc::clone(node), endpoint, asked, failed: false }
    }

    /// It was one of `candidates`.
    pub(super) fn accepted(&self, candidates: &[Endpoint]) {
        let now = Instant::now();
        let rtt = now.saturating_duration_since(self.asked);
        self.node.loads().accepted(self.endpoint, candidates, now, rtt);
    }

    pub(super) fn failed(mut self) {
        self.failed = true;
        self.node.loads().failed(self.endpoint, self.asked, Instant::now());
    }
}

impl Drop for Picked {
    fn drop(&mut self) {
        if !self.failed {
            self.node.loads().finished(self.endpoint);
        }
    }
}
