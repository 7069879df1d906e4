//! What can be set about the tunnel.

use std::fmt;
use std::time::Duration;

use clap::ValueEnum;

use super::credit::Credit;

/// How a flow is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Carrier {
    /// TLS over TCP, one flow at a time.
    Lane,
    /// A stream of a QUIC connection.
    Quic,
    /// Source and destination are on this node: no wire, no encryption.
    Local,
}

impl Carrier {
    /// The word, as label and log field.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Lane => "lane",
            Self::Quic => "quic",
            Self::Local => "local",
        }
    }
}

impl fmt::Display for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which carrier a client uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, ValueEnum)]
pub enum CarrierChoice {
    /// Lanes, and QUIC where they do not pass.
    #[default]
    Auto,
    /// TLS over TCP, pooled.
    Lane,
    /// QUIC.
    Quic,
}

impl CarrierChoice {
    /// The word, as on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Lane => "lane",
            Self::Quic => "quic",
        }
    }
}

/// Limits and times of the tunnel. Every limit holds per worker unless it says otherwise.
#[derive(Clone, Debug)]
pub struct TunnelConfig {
    /// Which carrier a client uses. Both are always served.
    pub carrier: CarrierChoice,
    /// From the first attempt to reach a peer until all that wait for it fail. Default 5 s. Longer
    /// makes applications wait on a dead node, shorter fails peers behind a slow path.
    pub connect_timeout: Duration,
    /// From OPEN to ANSWER, which includes the peer's own connection to the application.
    /// Default 10 s; must be longer than the peer's time for that (5 s), or its reason gets lost.
    pub answer_timeout: Duration,
    /// How long a server waits for a handshake to end. Default 10 s.
    pub handshake_timeout: Duration,
    /// How long a server waits for the rest of an OPEN whose first byte has come. Default 5 s. Longer lets
    /// a peer hold a lane or a stream without asking for anything, shorter fails peers behind a lossy
    /// path.
    pub open_timeout: Duration,
    /// Handshakes that a server has under way at once, of each carrier. Default 256; more wait in the
    /// kernel's backlog, or ask again (QUIC), and the address that has the most loses its longest one after
    /// a second, or five if it has less than a quarter ([`mesh_core::places`]). From a quarter on, QUIC clients have to show their address
    /// first, which costs them a round trip.
    pub max_handshakes: usize,
    /// Flows that a client has to one peer, on either carrier: further ones are refused with `overloaded`.
    /// Also lanes that a server keeps open for one remote address: further ones are closed before their
    /// handshake; and streams that a QUIC peer may have open on one connection. Default 16,384.
    pub max_flows_per_peer: u32,
    /// Lanes that are dialled to one peer at once. Default 32: a burst of connections shares the
    /// handshakes of those before it instead of starting one each.
    pub max_dials_per_peer: usize,
    /// Idle lanes that a client keeps to one peer. Default 64.
    pub max_idle_lanes: usize,
    /// Idle lanes that a client dials ahead to a peer in use. Default 1; 0 makes a new connection
    /// wait for a handshake whenever every lane is taken.
    pub spare_lanes: usize,
    /// After which a client closes an idle lane. Default 60 s. A server waits twice as long, so that
    /// the client, who would otherwise send into a closing lane, closes first.
    pub lane_idle: Duration,
    /// The oldest that a lane is used again, whatever its certificates say. Default 1 h.
    pub lane_max_age: Duration,
    /// The first back-off after a peer could not be reached; doubles up to `backoff_max`, but where nobody
    /// listens.
    /// Default 100 ms.
    pub backoff_min: Duration,
    /// The longest back-off. Default 5 s: what heals is used again within that time.
    pub backoff_max: Duration,
    /// How long `carrier: auto` keeps to the carrier that passed when the preferred one did not.
    /// Default 60 s.
    pub fallback_memory: Duration,
    /// QUIC connections that a server has at once. Default 4,096; further ones are refused.
    pub quic_max_connections: usize,
    /// Streams that a QUIC peer may have open at first: quinn holds some 50 bytes for each that may be.
    /// Whenever half of them carry flows it is twice as many, up to `max_flows_per_peer`. Default 1,024.
    pub quic_first_streams: u32,
    /// Bytes that a QUIC peer may send on one stream before they are read: the bound of a flow's
    /// memory. Default 1 MiB.
    pub quic_stream_window: u32,
    /// Bytes that all QUIC peers of this agent together may send before they are read, one of them half
    /// of that at most. Default 1 GiB. Each connection takes a stream's window of it, and more when it
    /// is needed; with less, fewer connections are made, and flows that nobody reads are reset sooner.
    pub quic_credit: Credit,
    /// The most that we send unacknowledged on all streams of a QUIC connection. The peer acknowledges
    /// what it holds, read or not. Default 8 MiB.
    pub quic_send_window: u32,
    /// After which a QUIC connection that hears nothing is dead. Default 10 s: how long applications wait to
    /// learn that the other node's agent was killed.
    pub quic_idle: Duration,
    /// How often an otherwise silent QUIC connection with flows says that it lives. Default 3 s; must
    /// be shorter than `quic_idle`.
    pub quic_keep_alive: Duration,
}

impl Default for TunnelConfig {
    fn default() -> Self {
        Self {
            carrier: CarrierChoice::Auto,
            connect_timeout: Duration::from_secs(5),
            answer_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(10),
            open_timeout: Duration::from_secs(5),
            max_handshakes: 256,
            max_flows_per_peer: 16_384,
            max_dials_per_peer: 32,
            max_idle_lanes: 64,
            spare_lanes: 1,
            lane_idle: Duration::from_secs(60),
            lane_max_age: Duration::from_secs(3600),
            backoff_min: Duration::from_millis(100),
            backoff_max: Duration::from_secs(5),
            fallback_memory: Duration::from_secs(60),
            quic_max_connections: 4096,
            quic_first_streams: 1024,
            quic_stream_window: 1 << 20,
            quic_credit: Credit::new(1 << 30),
            quic_send_window: 8 << 20,
            quic_idle: Duration::from_secs(10),
            quic_keep_alive: Duration::from_secs(3),
        }
    }
}
