//! What two agents say to each other: the tunnel's wire protocol, version 1.
//!
//! A *flow* is one TCP connection of an application, carried from the client's agent to the agent
//! of the destination's node. A *carrier* carries flows: a **lane** (TLS over TCP, one flow at a
//! time, used again for the next one) or a **QUIC** connection (a bidirectional stream per flow).
//! Who speaks is known from TLS alone: both ends show a workload's certificate, the client names
//! the workload meant in SNI ([`server_name`]), and ALPN is [`ALPN`]. Nothing here carries an
//! identity.
//!
//! # Frames
//!
//! A frame is a type (1 byte), a length (3 bytes) and that many bytes; integers are in network
//! order.
//!
//! | type | frame | body | sent by |
//! |---|---|---|---|
//! | `0x01` | OPEN | version 1, flags 1, flow id 8, trace id 16, destination 18, source 18 | client |
//! | `0x02` | ANSWER | verdict 1, stage 1, reason 1, highest version 1 | server |
//! | `0x03` | DATA | 1 to [`MAX_DATA`] bytes of payload | both |
//! | `0x04` | FIN | empty | both |
//! | `0x05` | RESET | reason 1 | both |
//! | `0x10`, `0x11` | reserved: CONTINUE, MOVED | flow id and offset, see *Later versions* | |
//!
//! An address is 16 bytes of IPv6, IPv4 being v4-mapped (RFC 4291 section 2.5.5.2), and 2 of port.
//!
//! # A flow on a lane
//!
//! ```text
//! client  OPEN DATA…           DATA… FIN           OPEN …      the next flow
//! server            ANSWER DATA…          DATA… FIN    ANSWER …
//! ```
//!
//! 1. The client sends OPEN and at once up to [`MAX_EARLY`] bytes of DATA: no round trip is spent.
//!    More than that waits for the answer, so that a refusal costs little and the same bytes can be
//!    sent to another endpoint: *a server that refuses has delivered nothing*.
//! 2. ANSWER accepts, or refuses with the stage and the [`Reason`]. After a refusal the client sends
//!    FIN, the server discards up to it, and the lane is free.
//! 3. FIN ends one direction; the other stays open (RFC 9293 section 3.6). When both have ended the
//!    lane is free, and the client may send the next OPEN; not before.
//! 4. RESET ends both directions at once, says why ([`ResetReason`]), and ends the lane.
//! 5. A lane that ends in any other way (TCP closes, `close_notify` inside a flow, a broken frame)
//!    resets its flow: an application never takes a crash for an end. `close_notify` *between* flows
//!    says that the server has read no further OPEN, and the client may use another lane.
//!
//! # A flow on QUIC
//!
//! The stream begins with the OPEN frame, the other direction with the ANSWER frame; what follows is
//! payload without frames. FIN is the end of the stream, RESET is `RESET_STREAM` together with
//! `STOP_SENDING`, the [`ResetReason`] being the error code (RFC 9000 sections 19.4 and 19.5). When
//! an agent closes the connection, the error code is [`Reason::code`].
//!
//! # Later versions
//!
//! The type and length of a frame, the first byte of OPEN (version) and the whole of ANSWER keep
//! their meaning in every version. A server that does not know the version answers
//! [`Reason::Version`] with the highest one that it knows, and ends the lane. Flags are zero in
//! version 1; a flag that the server does not know is answered in the same way.
//!
//! Reserved for moving a flow that turns out long to another carrier: flag `0x01` (the flow may
//! move), MOVED (this direction ends here, at this offset, and goes on elsewhere) and CONTINUE (the
//! first frame on the new carrier: flow id and offset). Version 1 takes them for unknown types.
//!
//! # Limits
//!
//! Every frame but DATA is at most [`MAX_CONTROL`] bytes; the [`Decoder`] keeps no payload and at
//! most one control frame, whatever a peer sends.

mod decoder;
mod open;
mod reason;
#[cfg(test)]
mod tests;

pub use decoder::{Decoder, Event, Role, WireError};
pub use open::{
    ANSWER_LEN, Answer, OPEN_LEN, Open, RESET_LEN, data_header, encode_answer, encode_reset,
};
pub use reason::{Reason, Refusal, ResetReason};

/// The version that this agent speaks.
pub const VERSION: u8 = 1;

/// The ALPN protocol of both carriers.
pub const ALPN: &[u8] = b"malla/1";

/// Bytes in front of a frame's body: type and length.
pub const HEADER_LEN: usize = 4;

/// The longest body of a DATA frame: four times what a relay reads at once.
pub const MAX_DATA: usize = 256 * 1024;

/// The longest body of any other frame. Version 1 needs 62 bytes; the rest is for later versions,
/// whose OPEN must still be skipped and answered.
pub const MAX_CONTROL: usize = 1024;

/// The most payload that a client sends before it has read the answer.
pub const MAX_EARLY: usize = 16 * 1024;

/// A whole FIN frame.
pub const FIN: [u8; HEADER_LEN] = [kind::FIN, 0, 0, 0];

/// Frame types.
mod kind {
    pub(super) const OPEN: u8 = 0x01;
    pub(super) const ANSWER: u8 = 0x02;
    pub(super) const DATA: u8 = 0x03;
    pub(super) const FIN: u8 = 0x04;
    pub(super) const RESET: u8 = 0x05;
}

/// The server name that stands for a workload in TLS: `label` is 16 bytes in lower hex, taken from
/// the SHA-256 of the SPIFFE ID by whoever has a hash function. Nothing about the workload can be
/// read from it.
pub fn server_name(label: &str) -> String {
    format!("{label}.malla")
}
