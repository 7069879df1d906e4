//! The bodies of frames, and how each is written.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use super::{HEADER_LEN, MAX_DATA, Refusal, ResetReason, VERSION, kind};
use crate::addr::EndpointAddr;
use crate::stage::Stage;
use crate::wire::Reason;

/// Body of an OPEN frame: version, flags, flow, trace, two addresses.
pub(super) const OPEN_BODY: usize = 1 + 1 + 8 + 16 + 2 * ADDR_LEN;
/// Body of an ANSWER frame.
pub(super) const ANSWER_BODY: usize = 4;
const ADDR_LEN: usize = 18;

/// A whole OPEN frame.
pub const OPEN_LEN: usize = HEADER_LEN + OPEN_BODY;
/// A whole ANSWER frame.
pub const ANSWER_LEN: usize = HEADER_LEN + ANSWER_BODY;
/// A whole RESET frame.
pub const RESET_LEN: usize = HEADER_LEN + 1;

/// What a client asks for: a connection to a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    /// Names the flow in the logs of both agents; unique for the client's agent.
    pub flow: u64,
    /// Names the connection across agents: a W3C trace id, or zeros.
    pub trace: [u8; 16],
    /// The pod's address and port. Decoded without v4-mapped addresses.
    pub destination: EndpointAddr,
    /// Where the application's connection comes from. Claimed by the client's agent: the server
    /// checks it against the caller's certificate before it believes it.
    pub source: SocketAddr,
}

/// What the server said to an [`Open`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Whether it takes the flow.
    pub verdict: Result<(), Refusal>,
    /// The highest version that the server speaks.
    pub version: u8,
}

impl Open {
    /// The whole frame.
    pub fn encode(&self) -> [u8; OPEN_LEN] {
        let mut frame = [0; OPEN_LEN];
        put(&mut frame, 0, &header(kind::OPEN, OPEN_BODY));
        frame[4] = VERSION;
        // frame[5]: no flags.
        put(&mut frame, 6, &self.flow.to_be_bytes());
        put(&mut frame, 14, &self.trace);
        put(&mut frame, 30, &encode_addr(self.destination.0));
        put(&mut frame, 48, &encode_addr(self.source));
        frame
    }

    /// Reads a body whose version and flags have been looked at.
    pub(super) fn decode(body: &[u8; OPEN_BODY]) -> Self {
        Self {
            flow: u64::from_be_bytes(take(body, 2)),
            trace: take(body, 10),
            destination: EndpointAddr(decode_addr(take(body, 26))),
            source: decode_addr(take(body, 44)),
        }
    }
}

impl Answer {
    /// Reads a body; `None` if its verdict or its stage means nothing.
    pub(super) fn decode(body: [u8; ANSWER_BODY]) -> Option<Self> {
        let [verdict, stage, reason, version] = body;
        let verdict = match verdict {
            0 => Ok(()),
            1 => {
                let stage = Stage::ALL.into_iter().find(|known| *known as u8 == stage)?;
                Err(Refusal { stage, reason: Reason::from_code(reason) })
            }
            _ => return None,
        };
        Some(Self { verdict, version })
    }
}

/// A whole ANSWER frame.
pub fn encode_answer(verdict: Result<(), Refusal>) -> [u8; ANSWER_LEN] {
    let [kind, high, mid, low] = header(kind::ANSWER, ANSWER_BODY);
    let (verdict, stage, reason) = match verdict {
        Ok(()) => (0, 0, 0),
        Err(refusal) => (1, refusal.stage as u8, refusal.reason.code()),
    };
    [kind, high, mid, low, verdict, stage, reason, VERSION]
}

/// A whole RESET frame.
pub fn encode_reset(reason: ResetReason) -> [u8; RESET_LEN] {
    let [kind, high, mid, low] = header(kind::RESET, 1);
    [kind, high, mid, low, reason.code()]
}

/// The header of a DATA frame with `len` bytes of payload; longer payload is cut to [`MAX_DATA`].
pub fn data_header(len: usize) -> [u8; HEADER_LEN] {
    debug_assert!((1..=MAX_DATA).contains(&len), "a DATA frame of {len} bytes");
    header(kind::DATA, len.min(MAX_DATA))
}

fn header(kind: u8, len: usize) -> [u8; HEADER_LEN] {
    let len = u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
    [kind, len[1], len[2], len[3]]
}

fn encode_addr(addr: SocketAddr) -> [u8; ADDR_LEN] {
    let ip = match addr.ip() {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    let mut bytes = [0; ADDR_LEN];
    put(&mut bytes, 0, &ip.octets());
    put(&mut bytes, 16, &addr.port().to_be_bytes());
    bytes
}

fn decode_addr(bytes: [u8; ADDR_LEN]) -> SocketAddr {
    let ip = Ipv6Addr::from(take::<16>(&bytes, 0)).to_canonical();
    SocketAddr::new(ip, u16::from_be_bytes(take(&bytes, 16)))
}

/// Copies `part` to `at`; both come from constants of this file.
fn put(into: &mut [u8], at: usize, part: &[u8]) {
    into[at..at + part.len()].copy_from_slice(part);
}

/// `N` bytes from `at`; both come from constants of this file.
fn take<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&from[at..at + N]);
    part
}
