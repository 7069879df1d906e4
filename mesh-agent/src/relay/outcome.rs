//! How a connection that was relayed ended: every end has one reason, and its record says at which stage.

use mesh_core::stage::Stage;
use mesh_core::wire::ResetReason;

use crate::identity::verify::PeerRefused;
use crate::telemetry::{self, Failure, ResponseFlags};

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// Both directions ended with FIN.
    Clean,
    /// The application reset its connection, or it broke: for this reason the flow was reset.
    ApplicationReset(ResetReason),
    /// The peer reset the flow.
    PeerReset(ResetReason),
    /// The peer's agent is not trusted any more, for this reason: both ends were reset.
    Distrusted(PeerRefused),
    /// The application did not read, and what had arrived for it could be kept no longer: both ends
    /// were reset.
    Overloaded,
    /// The carrier broke: the application got RST.
    TunnelLost,
    /// The peer broke the protocol: the application got RST.
    Protocol,
}

impl Outcome {
    /// Metric label and log field.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::ApplicationReset(_) => "application_reset",
            Self::PeerReset(ResetReason::Denied) => "denied",
            Self::PeerReset(_) => "peer_reset",
            Self::Distrusted(refused) => refused.reason(),
            Self::Overloaded => "overloaded",
            Self::TunnelLost => "tunnel_lost",
            Self::Protocol => "protocol",
        }
    }
}

/// What a connection came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayEnd {
    /// Bytes of the application that entered the flow.
    pub sent: u64,
    /// Bytes of the flow that reached the application.
    pub received: u64,
    /// How it ended.
    pub outcome: Outcome,
}

impl RelayEnd {
    /// The same as the other end of a connection within a node sees it.
    pub fn mirrored(self) -> Self {
        let outcome = match self.outcome {
            Outcome::ApplicationReset(reason) => Outcome::PeerReset(reason),
            Outcome::PeerReset(reason) => Outcome::ApplicationReset(reason),
            outcome => outcome,
        };
        Self { sent: self.received, received: self.sent, outcome }
    }
}

/// What a relay's end means in a connection's record.
impl From<RelayEnd> for telemetry::Outcome {
    fn from(end: RelayEnd) -> Self {
        let stage = match end.outcome {
            Outcome::Distrusted(_)
            | Outcome::Overloaded
            | Outcome::PeerReset(ResetReason::Denied) => Stage::Tunnel,
            _ => Stage::Telemetry,
        };
        let detail = match end.outcome {
            Outcome::Clean => return Self::Complete,
            Outcome::ApplicationReset(why) => format!("the application on this side: {why}"),
            Outcome::PeerReset(why) => format!("the far side reset the flow: {why}"),
            Outcome::Distrusted(why) => format!("not trusted any more: {why}"),
            Outcome::Overloaded => {
                "the application did not read, and others needed the room (--quic-memory-mib)"
                    .into()
            }
            Outcome::TunnelLost => "the tunnel broke: bytes may be lost".into(),
            Outcome::Protocol => "the far agent broke the wire protocol".into(),
        };
        let failure = Failure::new(stage, end.outcome.reason(), detail);
        Self::Failed(match end.outcome {
            Outcome::Distrusted(_) => failure.with_flags(ResponseFlags::IdentityError),
            Outcome::PeerReset(ResetReason::Denied) => failure.with_flags(ResponseFlags::Deny),
            // An application's own way of ending: nothing failed in between.
            Outcome::ApplicationReset(_) | Outcome::PeerReset(_) => {
                failure.with_flags(ResponseFlags::None)
            }
            _ => failure,
        })
    }
}
