//! Why a connection was not delivered to a pod of this node.

use std::io;

use mesh_core::addr::EndpointAddr;
use mesh_core::authorize::AuthorizeRefusal;
use mesh_core::stage::Stage;
use mesh_core::wire::{Reason, Refusal};
use thiserror::Error;

use crate::telemetry::Failure;

/// Why a connection was not delivered, in the order of the stages.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum InboundError {
    /// The agent is about to end.
    #[error("the agent is draining")]
    Draining,
    /// As many connections are open as this agent may hold.
    #[error("the agent holds as many connections as it may")]
    Overloaded,
    /// The destination was not opened to the caller.
    #[error("not authorized: {}", .0.reason())]
    Refused(AuthorizeRefusal),
    /// The pod is known but its network namespace is not open: it is just starting or ending.
    #[error("the network namespace of the pod at {to} is not open")]
    NoNamespace {
        /// The destination.
        to: EndpointAddr,
    },
    /// The application did not take the connection.
    #[error("no connection to the application at {to}")]
    Deliver {
        /// The destination.
        to: EndpointAddr,
        /// Why.
        source: io::Error,
    },
}

impl InboundError {
    /// The stage to blame.
    pub fn stage(&self) -> Stage {
        match self {
            Self::Draining | Self::Overloaded | Self::Refused(_) => Stage::Authorize,
            Self::NoNamespace { .. } | Self::Deliver { .. } => Stage::Deliver,
        }
    }

    /// The `reason` label: a closed set, stable across releases.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Draining => "draining",
            Self::Overloaded => "overloaded",
            Self::Refused(refusal) => refusal.reason(),
            Self::NoNamespace { .. } => "no_namespace",
            Self::Deliver { source, .. } => connect_reason(source),
        }
    }

    /// Whether the caller may try another endpoint: nothing was delivered in any case.
    pub fn may_retry(&self) -> bool {
        !matches!(self, Self::Refused(AuthorizeRefusal::PlaintextInStrict))
    }

    /// Whether it is the pod that cannot be reached, and not the caller that may not, or this agent that
    /// cannot.
    pub fn blames_application(&self) -> bool {
        matches!(self, Self::NoNamespace { .. } | Self::Deliver { .. })
    }

    /// What the caller's agent is told.
    pub fn refusal(&self) -> Refusal {
        let reason = match self {
            Self::Draining => Reason::Draining,
            Self::Overloaded => Reason::Overloaded,
            Self::Refused(AuthorizeRefusal::UnknownWorkload) | Self::NoNamespace { .. } => {
                Reason::UnknownWorkload
            }
            Self::Refused(AuthorizeRefusal::WrongWorkload) => Reason::WrongWorkload,
            Self::Refused(_) => Reason::Denied,
            Self::Deliver { source, .. } => match connect_reason(source) {
                "connection_refused" => Reason::ConnectionRefused,
                "connect_timeout" => Reason::ConnectTimeout,
                _ => Reason::Unreachable,
            },
        };
        Refusal::new(self.stage(), reason)
    }

    /// What telemetry records.
    pub fn failure(&self) -> Failure {
        Failure::new(self.stage(), self.reason(), crate::telemetry::chain(self))
    }
}

/// The `reason` label of a failed `connect()`.
pub fn connect_reason(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection_refused",
        io::ErrorKind::ConnectionReset => "connection_reset",
        io::ErrorKind::TimedOut => "connect_timeout",
        io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse => "no_local_port",
        _ => "unreachable",
    }
}
