//! Why an outbound connection was not carried.

use std::io;
use std::net::SocketAddr;

use mesh_core::addr::{EndpointAddr, OrigDst};
use mesh_core::route::RouteRefusal;
use mesh_core::stage::Stage;
use thiserror::Error;

use crate::inbound::InboundError;
use crate::telemetry::{Failure, ResponseFlags};
use crate::tunnel::{DialError, OpenError};

/// Why an outbound connection was not carried to its destination. In the order in which a
/// connection meets the stages; fields are what an operator needs to find the cause.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OutboundError {
    /// The kernel holds no original destination: somebody dialled the agent's own listener, or the
    /// entry was evicted under a flood of connections.
    #[error("no original destination for {peer}")]
    NotCaptured {
        /// The client's socket.
        peer: SocketAddr,
    },
    /// The application reset its connection before it was carried.
    #[error("the application at {client} reset its connection before it was carried")]
    ClientGone {
        /// The client's socket.
        client: SocketAddr,
    },
    /// The pod left the manifests while its connection waited.
    #[error("the pod is not known any more")]
    UnknownSource,
    /// The destination is in the mesh, and nobody serves it.
    #[error("{dst} cannot be served: {}", .refusal.reason())]
    Route {
        /// What the application dialled.
        dst: OrigDst,
        /// Why.
        refusal: RouteRefusal,
    },
    /// The endpoint's node is not in the manifests, or has no address.
    #[error("node {node} of endpoint {endpoint} is not known")]
    UnknownNode {
        /// The endpoint chosen.
        endpoint: EndpointAddr,
        /// What its pod names as its node.
        node: String,
    },
    /// No tunnel, or the far side refused.
    #[error("no flow to {endpoint}")]
    Tunnel {
        /// The endpoint chosen.
        endpoint: EndpointAddr,
        /// Why.
        source: OpenError,
    },
    /// The destination is on this node and did not let the connection in, or could not be reached.
    #[error("not delivered on this node")]
    Local(#[source] InboundError),
    /// A destination outside the mesh could not be reached.
    #[error("no plain connection to {endpoint}")]
    Passthrough {
        /// The destination.
        endpoint: EndpointAddr,
        /// Why.
        source: io::Error,
    },
}

impl OutboundError {
    /// The stage to blame.
    pub fn stage(&self) -> Stage {
        match self {
            Self::NotCaptured { .. } | Self::ClientGone { .. } => Stage::OrigDst,
            Self::UnknownSource | Self::Route { .. } => Stage::Route,
            Self::UnknownNode { .. } => Stage::Balance,
            Self::Tunnel { source, .. } => source.stage(),
            Self::Local(error) => error.stage(),
            Self::Passthrough { .. } => Stage::Deliver,
        }
    }

    /// The `reason` label: a closed set, stable across releases.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotCaptured { .. } => "not_captured",
            Self::ClientGone { .. } => "application_reset",
            Self::UnknownSource => "unknown_source",
            Self::Route { refusal, .. } => refusal.reason(),
            Self::UnknownNode { .. } => "unknown_node",
            Self::Tunnel { source, .. } => source.reason(),
            Self::Local(error) => error.reason(),
            Self::Passthrough { source, .. } => crate::inbound::connect_reason(source),
        }
    }

    /// Whether another endpoint may be tried: nothing of the payload has reached an application, and
    /// another endpoint could answer differently.
    pub fn may_retry(&self) -> bool {
        match self {
            Self::NotCaptured { .. }
            | Self::ClientGone { .. }
            | Self::UnknownSource
            | Self::Route { .. } => false,
            Self::UnknownNode { .. } | Self::Passthrough { .. } => true,
            Self::Tunnel { source, .. } => source.may_retry(),
            Self::Local(error) => error.may_retry(),
        }
    }

    /// Whether the same endpoint may answer differently in a moment, because this agent has heard of a
    /// pod before another part of the mesh has: its agent, the CA, or our own enrolling of it. Or because
    /// its agent is just being followed by another one, and a dial came between the two.
    pub fn may_settle(&self) -> bool {
        match self {
            Self::Tunnel { source, .. } => source.may_settle() || was_reset(source),
            Self::Local(error) => matches!(error, InboundError::NoNamespace { .. }),
            _ => false,
        }
    }

    /// Whether the endpoint's agent says that the pod is not there, or is another one.
    pub fn doubts_endpoint(&self) -> bool {
        match self {
            Self::Tunnel { source: OpenError::NoCertificate, .. } => false,
            Self::Tunnel { source, .. } => source.may_settle(),
            _ => false,
        }
    }

    /// Whether the endpoint is to blame, or what leads to it: others are preferred to it for a while. Not
    /// for what an application did, what this agent lacks, or what a policy says of one client.
    pub fn blames_endpoint(&self) -> bool {
        match self {
            Self::NotCaptured { .. }
            | Self::ClientGone { .. }
            | Self::UnknownSource
            | Self::Route { .. } => false,
            Self::UnknownNode { .. } | Self::Passthrough { .. } => true,
            Self::Tunnel { source, .. } => source.blames_peer(),
            Self::Local(error) => error.blames_application(),
        }
    }

    /// What telemetry records.
    pub fn failure(&self) -> Failure {
        let failure = Failure::new(self.stage(), self.reason(), crate::telemetry::chain(self));
        match self {
            Self::Tunnel { source, .. } if source.is_handshake() => {
                failure.with_flags(ResponseFlags::TlsFailure)
            }
            // The client's own way of ending, before there was anything to end.
            Self::ClientGone { .. } | Self::Tunnel { source: OpenError::Application(_), .. } => {
                failure.with_flags(ResponseFlags::None)
            }
            Self::Tunnel { source: OpenError::NoCertificate, .. } => {
                failure.with_flags(ResponseFlags::IdentityError)
            }
            _ => failure,
        }
    }
}

/// Whether a dial was reset. The kernel does that to who waits to be accepted when an agent's listener closes,
/// and whose listener is there by then takes the next dial. No carrier came about, so nothing of the flow has
/// left this agent.
fn was_reset(error: &OpenError) -> bool {
    let (OpenError::Dial(error) | OpenError::BackingOff(error)) = error else { return false };
    matches!(&**error, DialError::Network(why) if why.kind() == io::ErrorKind::ConnectionReset)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn tunnel(source: OpenError) -> OutboundError {
        OutboundError::Tunnel { endpoint: EndpointAddr(([10, 0, 0, 1], 80).into()), source }
    }

    #[test]
    fn dial_that_is_reset_is_made_again_and_a_flow_that_may_have_left_is_not() {
        let reset = || Arc::new(DialError::Network(io::ErrorKind::ConnectionReset.into()));
        assert!(tunnel(OpenError::Dial(reset())).may_settle());
        assert!(tunnel(OpenError::BackingOff(reset())).may_settle());
        let source = || io::Error::from(io::ErrorKind::ConnectionReset);
        for payload_sent in [false, true] {
            let lost = tunnel(OpenError::Lost { source: source(), payload_sent });
            assert!(!lost.may_settle(), "{payload_sent}");
        }
        for error in [
            DialError::Network(io::ErrorKind::HostUnreachable.into()),
            DialError::ConnectionRefused,
            DialError::TimedOut,
        ] {
            let told = format!("{error:?}");
            assert!(!tunnel(OpenError::Dial(Arc::new(error))).may_settle(), "{told}");
        }
    }
}
