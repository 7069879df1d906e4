//! The eight stages of a connection, and who is to blame when one fails.
//!
//! The same words name modules, error variants, the `stage` label, the log field, tests and benches.

use std::fmt;

/// A stage in a connection's life, in the order a connection meets them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Stage {
    /// The kernel redirects the application's `connect()`.
    Capture = 1,
    /// The agent learns where the application meant to go.
    OrigDst = 2,
    /// Which service or workload that is.
    Route = 3,
    /// Which endpoint takes the connection.
    Balance = 4,
    /// Mutual TLS to the agent of the endpoint's node.
    Tunnel = 5,
    /// Whether the destination's agent lets the caller in.
    Authorize = 6,
    /// A connection to the application inside its pod.
    Deliver = 7,
    /// Bytes flow and are counted; a failure here is one in mid-stream.
    Telemetry = 8,
}

impl Stage {
    /// All of them, in order.
    pub const ALL: [Self; 8] = [
        Self::Capture,
        Self::OrigDst,
        Self::Route,
        Self::Balance,
        Self::Tunnel,
        Self::Authorize,
        Self::Deliver,
        Self::Telemetry,
    ];

    /// The word, as label and log field.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Capture => "capture",
            Self::OrigDst => "orig_dst",
            Self::Route => "route",
            Self::Balance => "balance",
            Self::Tunnel => "tunnel",
            Self::Authorize => "authorize",
            Self::Deliver => "deliver",
            Self::Telemetry => "telemetry",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
