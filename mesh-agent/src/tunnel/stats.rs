//! What the tunnel counts. Plain atomics, shared by all workers; telemetry gives them names.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Which end of the tunnel counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// We dialled.
    Client,
    /// We were dialled.
    Server,
}

impl Side {
    const ALL: [Self; 2] = [Self::Client, Self::Server];

    /// The word, as label and log field.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

/// How the session of a complete handshake came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SessionKind {
    /// By a full key exchange, and certificates.
    Full,
    /// Resumed from an earlier one.
    Resumed,
}

impl SessionKind {
    const ALL: [Self; 2] = [Self::Full, Self::Resumed];

    /// The word, as label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Resumed => "resumed",
        }
    }
}

/// Every reason for which a handshake can fail, at either end, and for which a carrier is ended after
/// it; `other` takes what is not listed.
const REASONS: [&str; 27] = [
    "certificate_missing",
    "certificate_malformed",
    "no_spiffe_id",
    "many_sans",
    "untrusted_domain",
    "unknown_issuer",
    "certificate_expired",
    "certificate_not_yet_valid",
    "bad_signature",
    "wrong_usage",
    "bad_path",
    "wrong_workload",
    "unknown_workload",
    "peer_refused_certificate",
    "peer_serves_no_such_workload",
    "connect_timeout",
    "connection_refused",
    "unreachable",
    "handshake_timeout",
    "tls",
    "quic",
    "open_timeout",
    "protocol",
    "no_certificate",
    "overloaded",
    "draining",
    "other",
];

/// Counters and gauges of all workers' tunnels.
#[derive(Debug, Default)]
pub struct TunnelStats {
    /// Carriers that we began to make, lanes and QUIC connections.
    pub dials: AtomicU64,
    /// Lanes open now, both ends.
    pub lanes_open: AtomicU64,
    /// Lanes of our pools that wait for a flow now.
    pub lanes_idle: AtomicU64,
    /// QUIC connections open now, both ends.
    pub quic_connections: AtomicU64,
    /// Flows that began, both ends.
    pub flows: AtomicU64,
    /// Flows that a server refused, seen from either end.
    pub flows_refused: AtomicU64,
    /// Flows that were reset because nobody read them and others needed the room.
    pub flows_given_up: AtomicU64,
    /// QUIC handshakes whose client had to show its address first.
    pub retries: AtomicU64,
    /// Times that `carrier: auto` went to the other carrier.
    pub fallbacks: AtomicU64,
    handshakes: [[AtomicU64; SessionKind::ALL.len()]; Side::ALL.len()],
    refusals: [[AtomicU64; REASONS.len()]; Side::ALL.len()],
}

impl TunnelStats {
    /// Counts a handshake that is complete.
    pub fn completed(&self, side: Side, kind: SessionKind) {
        self.handshakes[side as usize][kind as usize].fetch_add(1, Relaxed);
    }

    /// How many handshakes of this kind were completed.
    pub fn handshakes(&self, side: Side, kind: SessionKind) -> u64 {
        self.handshakes[side as usize][kind as usize].load(Relaxed)
    }

    /// Complete handshakes by side and kind: every series.
    pub fn all_handshakes(&self) -> impl Iterator<Item = (Side, SessionKind, u64)> {
        Side::ALL.into_iter().flat_map(move |side| {
            SessionKind::ALL.map(|kind| (side, kind, self.handshakes(side, kind)))
        })
    }

    /// Counts a handshake that failed.
    pub fn refused(&self, side: Side, reason: &str) {
        let known = REASONS.iter().position(|known| *known == reason);
        let index = known.unwrap_or(REASONS.len() - 1);
        self.refusals[side as usize][index].fetch_add(1, Relaxed);
    }

    /// Failed handshakes by side and reason: every series, also those at zero.
    pub fn refusals(&self) -> impl Iterator<Item = (Side, &'static str, u64)> {
        Side::ALL.into_iter().flat_map(move |side| {
            let counts = &self.refusals[side as usize];
            REASONS
                .iter()
                .zip(counts)
                .map(move |(reason, count)| (side, *reason, count.load(Relaxed)))
        })
    }

    /// How often a handshake failed for one reason.
    pub fn refusals_for(&self, side: Side, reason: &str) -> u64 {
        self.refusals().filter(|(s, r, _)| *s == side && *r == reason).map(|(_, _, n)| n).sum()
    }
}

/// Adds one to a gauge for as long as it lives.
#[derive(Debug)]
pub(crate) struct Gauged {
    stats: std::sync::Arc<TunnelStats>,
    gauge: fn(&TunnelStats) -> &AtomicU64,
}

impl Gauged {
    pub(crate) fn new(
        stats: &std::sync::Arc<TunnelStats>,
        gauge: fn(&TunnelStats) -> &AtomicU64,
    ) -> Self {
        gauge(stats).fetch_add(1, Relaxed);
        Self { stats: std::sync::Arc::clone(stats), gauge }
    }
}

impl Drop for Gauged {
    fn drop(&mut self) {
        (self.gauge)(&self.stats).fetch_sub(1, Relaxed);
    }
}
