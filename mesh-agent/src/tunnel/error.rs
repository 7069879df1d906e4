//! Why a flow did not come about.

use std::sync::Arc;
use std::{error, fmt, io};

use mesh_core::spiffe::SpiffeId;
use mesh_core::stage::Stage;
use mesh_core::wire::{Reason, Refusal, WireError};

use crate::identity::verify::PeerRefused;

/// Why no carrier to a peer could be made. Shared by all that waited for it.
#[derive(Debug)]
#[non_exhaustive]
pub enum DialError {
    /// The peer did not answer in time.
    TimedOut,
    /// No agent listens there.
    ConnectionRefused,
    /// There is no way to the peer, or the connection broke in the handshake.
    Network(io::Error),
    /// The peer's certificate was not accepted.
    Certificate(PeerRefused),
    /// The peer proved to be another workload than the one meant.
    WrongWorkload {
        /// Who it is.
        found: SpiffeId,
    },
    /// The peer ended the handshake, or did not accept our certificate: the TLS alert's name.
    PeerRefused {
        /// RFC 9846 section 6.
        alert: &'static str,
    },
    /// The peer, our client, meant a workload that is not here.
    UnknownName,
    /// TLS failed in another way.
    Tls(rustls::Error),
    /// QUIC failed in another way.
    Quic(String),
    /// Our workload has no certificate (any more).
    NoCertificate,
    /// A limit of this agent is reached.
    Overloaded,
    /// This agent is going away.
    Draining,
}

impl DialError {
    /// Metric label and log field.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TimedOut => "connect_timeout",
            Self::ConnectionRefused => "connection_refused",
            Self::Network(_) => "unreachable",
            Self::Certificate(refused) => refused.reason(),
            Self::WrongWorkload { .. } => "wrong_workload",
            Self::PeerRefused { alert: "access_denied" } => "peer_serves_no_such_workload",
            Self::PeerRefused { .. } => "peer_refused_certificate",
            Self::UnknownName => "unknown_workload",
            Self::Tls(_) => "tls",
            Self::Quic(_) => "quic",
            Self::NoCertificate => "no_certificate",
            Self::Overloaded => "overloaded",
            Self::Draining => "draining",
        }
    }

    /// Whether the network, and not TLS, is the cause: another carrier may pass.
    pub fn is_network(&self) -> bool {
        matches!(self, Self::TimedOut | Self::ConnectionRefused | Self::Network(_))
    }
}

impl fmt::Display for DialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TimedOut => f.write_str("the peer did not answer in time"),
            Self::ConnectionRefused => f.write_str("no agent listens at the peer"),
            Self::Network(_) => f.write_str("the peer cannot be reached"),
            Self::Certificate(_) => f.write_str("the peer's certificate was not accepted"),
            Self::WrongWorkload { found } => write!(f, "the peer proved to be {found}"),
            // What a server name stands for cannot be said by who does not answer to it, and what the
            // peer's trust domain is not by who sees no certificate: both are told what to compare.
            Self::PeerRefused { alert: "access_denied" } => f.write_str(
                "the peer's agent serves no such workload: it does not know the pod (yet), has no \
                 certificate for it, or has another trust domain than the identity meant",
            ),
            Self::UnknownName => f.write_str(
                "no workload of this node answers to the server name: the caller's agent knows other \
                 pods than this one (yet), or has another trust domain",
            ),
            Self::PeerRefused { alert } => write!(f, "the peer refused the handshake: {alert}"),
            Self::Tls(_) => f.write_str("the handshake failed"),
            Self::Quic(why) => write!(f, "the QUIC connection failed: {why}"),
            Self::NoCertificate => f.write_str("the workload has no certificate"),
            Self::Overloaded => f.write_str("too many connections to the peer"),
            Self::Draining => f.write_str("the agent is draining"),
        }
    }
}

impl error::Error for DialError {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Self::Network(source) => Some(source),
            Self::Certificate(source) => Some(source),
            Self::Tls(source) => Some(source),
            _ => None,
        }
    }
}

/// Why [`Tunnels::open`](super::Tunnels::open) returned no flow.
#[derive(Debug)]
#[non_exhaustive]
pub enum OpenError {
    /// Our workload has no certificate (yet).
    NoCertificate,
    /// No carrier could be made.
    Dial(Arc<DialError>),
    /// The last attempt failed a moment ago, for this reason; the next one is not due yet.
    BackingOff(Arc<DialError>),
    /// The peer refused: nothing was delivered.
    Refused(Refusal),
    /// The carrier broke before the answer.
    Lost {
        /// How it broke.
        source: io::Error,
        /// Whether payload had been sent: it may have been delivered.
        payload_sent: bool,
    },
    /// The peer broke the wire protocol.
    Protocol(WireError),
    /// The peer did not answer in time.
    TimedOut {
        /// Whether payload had been sent: it may have been delivered.
        payload_sent: bool,
    },
    /// The application gave up while it waited.
    Application(io::Error),
}

impl OpenError {
    /// Metric label and log field.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::Dial(error) | Self::BackingOff(error) => error.reason(),
            Self::Refused(refusal) => refusal.reason.as_str(),
            Self::Lost { .. } => "tunnel_lost",
            Self::Protocol(_) => "protocol",
            Self::TimedOut { .. } => "answer_timeout",
            Self::Application(_) => "application_reset",
        }
    }

    /// The stage that failed: the peer's own when it refused.
    pub fn stage(&self) -> Stage {
        match self {
            Self::Refused(refusal) => refusal.stage,
            _ => Stage::Tunnel,
        }
    }

    /// Whether there is no way to this address of the peer, or no agent at it: another address of it
    /// may pass. Not after a time-out, which has taken all the time that the application can be asked
    /// to wait.
    pub fn is_unreachable(&self) -> bool {
        let (Self::Dial(error) | Self::BackingOff(error)) = self else {
            return false;
        };
        matches!(**error, DialError::ConnectionRefused | DialError::Network(_))
    }

    /// Whether TLS is the cause, at either end.
    pub fn is_handshake(&self) -> bool {
        let (Self::Dial(error) | Self::BackingOff(error)) = self else {
            return false;
        };
        matches!(
            **error,
            DialError::Certificate(_)
                | DialError::WrongWorkload { .. }
                | DialError::PeerRefused { .. }
                | DialError::Tls(_)
        )
    }

    /// Whether the peer may only not know *yet* what this agent knows already: a pod that has just
    /// come, or whose certificate is being issued.
    pub fn may_settle(&self) -> bool {
        match self {
            Self::NoCertificate => true,
            Self::Dial(error) | Self::BackingOff(error) => {
                matches!(**error, DialError::PeerRefused { alert: "access_denied" })
            }
            Self::Refused(refusal) => {
                matches!(refusal.reason, Reason::UnknownWorkload | Reason::WrongWorkload)
            }
            _ => false,
        }
    }

    /// Whether the peer, or what is behind it or on the way there, is to blame.
    pub fn blames_peer(&self) -> bool {
        match self {
            Self::NoCertificate | Self::Application(_) => false,
            Self::Dial(error) | Self::BackingOff(error) => {
                !matches!(**error, DialError::NoCertificate)
            }
            Self::Refused(refusal) => refusal.reason != Reason::Denied,
            Self::Lost { .. } | Self::Protocol(_) | Self::TimedOut { .. } => true,
        }
    }

    /// Whether another endpoint may be tried with the same bytes: only if none of them can have
    /// reached an application, and if another endpoint could answer differently.
    pub fn may_retry(&self) -> bool {
        match self {
            Self::Dial(_) | Self::BackingOff(_) => true,
            // A policy is about the service, not about this endpoint.
            Self::Refused(refusal) => refusal.reason != Reason::Denied,
            Self::Lost { payload_sent, .. } | Self::TimedOut { payload_sent } => !payload_sent,
            Self::NoCertificate | Self::Protocol(_) | Self::Application(_) => false,
        }
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCertificate => f.write_str("the workload has no certificate"),
            Self::Dial(_) => f.write_str("no tunnel to the peer"),
            Self::BackingOff(_) => f.write_str("no tunnel to the peer a moment ago"),
            Self::Refused(refusal) => refusal.fmt(f),
            Self::Lost { .. } => f.write_str("the tunnel broke before the answer"),
            Self::Protocol(_) => f.write_str("the peer broke the protocol"),
            Self::TimedOut { .. } => f.write_str("the peer did not answer in time"),
            Self::Application(_) => f.write_str("the application gave up"),
        }
    }
}

impl error::Error for OpenError {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Self::Dial(source) | Self::BackingOff(source) => Some(source.as_ref()),
            Self::Lost { source, .. } | Self::Application(source) => Some(source),
            Self::Protocol(source) => Some(source),
            Self::NoCertificate | Self::Refused(_) | Self::TimedOut { .. } => None,
        }
    }
}
