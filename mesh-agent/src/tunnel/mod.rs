//! Tunnel: carries flows between the agents of two nodes over mutual TLS.
//!
//! ```text
//!  outbound                                                             inbound
//!  open() ─► peer ─► lane ═════ TLS 1.3 over TCP, one flow at a time ═════ serve_lanes() ─► Request
//!            │       warm pool, used again after a clean end
//!            └─────► quic ═════ one connection per peer, a stream per flow ═ serve_quic() ─► Request
//! ```
//!
//! A *peer* is (identity of our workload, agent of the remote node, identity of the remote workload).
//! Both ends present the workload's certificate; the client names the workload meant in SNI and
//! checks the SPIFFE ID that it finds, the server takes the caller from the certificate and from
//! nowhere else. The wire protocol is [`mesh_core::wire`].
//!
//! # Guarantees
//!
//! - *Nobody unproven.* A flow exists only between two identities that were verified when its
//!   carrier was made, also when the TLS session was resumed. A lane does not outlive either
//!   certificate. When the trusted roots change, all of this is judged again: a peer for which they no
//!   longer vouch gets no further flow, and those that run are reset.
//! - *At most once.* [`OpenError::may_retry`] is true only where no payload reached an application.
//! - *Together.* What waits for a peer that does not answer fails together, within
//!   [`TunnelConfig::connect_timeout`] of the first; then at once, until a back-off has passed.
//! - *Bounded.* Lanes, handshakes, streams, windows and buffers have limits, see [`TunnelConfig`];
//!   an idle flow holds no buffer.
//!
//! # Not here
//!
//! Which endpoint was chosen, whether the caller may come in, and the copying of payload
//! ([`crate::relay`]).

mod buffers;
mod config;
mod credentials;
mod credit;
mod dial;
#[cfg(any(feature = "bench", fuzzing, test))]
pub mod ends;
mod error;
mod flow;
#[cfg(any(fuzzing, test))]
pub mod fuzzing;
mod keys;
mod lane;
mod open;
mod pool;
mod proof;
mod quic;
mod records;
mod reset_key;
mod serve;
mod session;
mod stats;
mod steering;
mod stream;
#[cfg(test)]
mod tests;
mod tls;
mod tunnels;

pub use config::{Carrier, CarrierChoice, TunnelConfig};
pub use credentials::{Certified, Credentials, Served, Verify};
pub use credit::Credit;
pub use error::{DialError, OpenError};
pub use flow::{Flow, Held, LaneFlow, Request};
pub use reset_key::ResetKey;
pub use stats::{SessionKind, Side, TunnelStats};
pub use steering::{Steering, Tag};
pub use stream::QuicFlow;
pub use tunnels::{Peer, TicketKeys, TunnelView, Tunnels};

pub(crate) use buffers::Buf;
pub(crate) use flow::Reuse;
pub(crate) use lane::{Codec, Lane, LaneError, LaneEvent};
pub(crate) use stream::StreamError;
