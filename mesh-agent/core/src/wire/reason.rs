//! Why a flow was refused or reset, as codes that are stable across releases.

use std::fmt;

use crate::stage::Stage;

/// A closed set of codes with names: each table is written once.
macro_rules! codes {
    (
        $(#[$doc:meta])*
        $name:ident, unknown = $unknown:ident {
            $($(#[$variant_doc:meta])* $variant:ident = $code:literal $text:literal,)*
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum $name {
            $($(#[$variant_doc])* $variant = $code,)*
        }

        impl $name {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The code on the wire. Stable: a released code never changes its meaning.
            pub fn code(self) -> u8 {
                self as u8
            }

            /// What a code means. A code of a later release is not an error of the peer's.
            pub fn from_code(code: u8) -> Self {
                match code {
                    $($code => Self::$variant,)*
                    _ => Self::$unknown,
                }
            }

            /// The word: metric label and log field.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

codes! {
    /// Why a server did not take a flow.
    Reason, unknown = Other {
        /// A reason that this release does not know.
        Other = 0 "other",
        /// The peer broke the protocol.
        Protocol = 1 "protocol",
        /// The server does not speak the client's version, or not a flag of it.
        Version = 2 "version",
        /// A defect or a lack of resources in the server's agent.
        Internal = 3 "internal",
        /// The server's agent is going away.
        Draining = 4 "draining",
        /// A limit of the server's agent is reached.
        Overloaded = 5 "overloaded",
        /// No pod of this node has the destination's address.
        UnknownWorkload = 6 "unknown_workload",
        /// The pod at the destination's address does not have the identity that the client meant.
        WrongWorkload = 7 "wrong_workload",
        /// The pod at the destination's address is not part of the mesh.
        NotEnrolled = 8 "not_enrolled",
        /// The source address is not one of the caller's.
        SourceMismatch = 9 "source_mismatch",
        /// A policy does not let the caller in.
        Denied = 10 "denied",
        /// Nothing listens at the destination.
        ConnectionRefused = 11 "connection_refused",
        /// The destination did not answer in time.
        ConnectTimeout = 12 "connect_timeout",
        /// There is no way to the destination.
        Unreachable = 13 "unreachable",
        /// The caller's certificate, shown in an earlier session, no longer holds.
        CallerCertificate = 14 "caller_certificate",
    }
}

codes! {
    /// Why a flow ended at once.
    ResetReason, unknown = Other {
        /// A reason that this release does not know.
        Other = 0 "other",
        /// The application reset its connection.
        Application = 1 "application",
        /// The application's connection timed out (its host is gone).
        TimedOut = 2 "timed_out",
        /// The agent is going away and the time for draining is over.
        Draining = 3 "draining",
        /// The peer broke the protocol.
        Protocol = 4 "protocol",
        /// A defect or a lack of resources in the agent.
        Internal = 5 "internal",
        /// The flow is no longer allowed.
        Denied = 6 "denied",
    }
}

/// Why a flow was refused: which stage decided, and for what reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Refusal {
    /// The stage of the server's agent.
    pub stage: Stage,
    /// Its reason.
    pub reason: Reason,
}

impl Refusal {
    /// A refusal by `stage`.
    pub fn new(stage: Stage, reason: Reason) -> Self {
        Self { stage, reason }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "refused at {}: {}", self.stage, self.reason)
    }
}
