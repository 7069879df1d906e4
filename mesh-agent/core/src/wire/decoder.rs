//! Takes frames out of a byte stream that arrives in pieces of any size.

use std::fmt;

use super::open::{ANSWER_BODY, OPEN_BODY};
use super::{Answer, HEADER_LEN, MAX_CONTROL, MAX_DATA, Open, ResetReason, VERSION, kind};

/// Which end of the tunnel reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Reads answers.
    Client,
    /// Reads requests.
    Server,
}

/// What arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// The client asks for a flow.
    Open(Open),
    /// The client asks in a version, or with a flag, that this release does not know. Nothing that
    /// follows can be understood: answer, then end the carrier.
    Unsupported {
        /// The version asked for.
        version: u8,
    },
    /// The server's answer.
    Answer(Answer),
    /// Payload, never empty. One frame may come as several of these.
    Data(&'a [u8]),
    /// The peer's direction has ended.
    Fin,
    /// Both directions have ended.
    Reset(ResetReason),
}

/// How a peer broke the protocol. Nothing that follows on the carrier can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum WireError {
    /// A frame type that this version does not have.
    UnknownType(u8),
    /// A length that this frame type cannot have.
    Length(u8),
    /// A frame where it cannot be: DATA before OPEN, or after FIN.
    OutOfOrder(u8),
    /// An ANSWER whose verdict or stage means nothing.
    Answer,
}

impl WireError {
    /// Log field.
    pub fn reason(self) -> &'static str {
        match self {
            Self::UnknownType(_) => "unknown_type",
            Self::Length(_) => "length",
            Self::OutOfOrder(_) => "out_of_order",
            Self::Answer => "answer",
        }
    }
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownType(kind) => write!(f, "unknown frame type {kind:#04x}"),
            Self::Length(kind) => write!(f, "impossible length of frame type {kind:#04x}"),
            Self::OutOfOrder(kind) => write!(f, "frame type {kind:#04x} out of order"),
            Self::Answer => f.write_str("an answer that means nothing"),
        }
    }
}

impl std::error::Error for WireError {}

/// Where the peer's side of the conversation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No flow: OPEN or ANSWER comes next.
    Between,
    /// DATA, FIN or RESET.
    Flowing,
    /// The peer has sent FIN: RESET, or the next flow's first frame.
    Ended,
    /// After RESET or an unknown version: nothing.
    Over,
}

/// What of the current frame is still to come.
#[derive(Clone, Copy, Debug)]
enum Want {
    /// The header, and perhaps a control frame's body, is being collected.
    Frame,
    /// This much payload of a DATA frame.
    Payload(usize),
    /// This much of an OPEN that is longer than ours, to be skipped.
    Skip(usize),
}

/// Turns bytes into [`Event`]s, checks their order, and stops at the first error.
///
/// Of fixed size: payload is handed through and never kept.
#[derive(Clone, Debug)]
pub struct Decoder {
    role: Role,
    phase: Phase,
    want: Want,
    /// Header and body of a control frame that has come in pieces.
    partial: [u8; HEADER_LEN + OPEN_BODY],
    partial_len: usize,
    failure: Option<WireError>,
}

impl Decoder {
    /// A decoder at the start of a carrier.
    pub fn new(role: Role) -> Self {
        Self {
            role,
            phase: Phase::Between,
            want: Want::Frame,
            partial: [0; HEADER_LEN + OPEN_BODY],
            partial_len: 0,
            failure: None,
        }
    }

    /// Takes the next event from the front of `input`, which shrinks by what was used. `None` means
    /// that all of `input` was used and more is needed.
    ///
    /// # Errors
    ///
    /// Fails when the peer broke the protocol, and from then on always, in the same way.
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Event<'a>>, WireError> {
        if let Some(error) = self.failure {
            return Err(error);
        }
        let event = self.advance(input);
        self.failure = event.as_ref().err().copied();
        event
    }

    /// Whether the last frame has ended, so that an end of the stream here cuts nothing.
    pub fn at_boundary(&self) -> bool {
        matches!(self.want, Want::Frame) && self.partial_len == 0
    }

    fn advance<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Event<'a>>, WireError> {
        loop {
            match self.want {
                Want::Payload(left) => {
                    let Some(data) = take_some(input, left) else { return Ok(None) };
                    self.want = match left - data.len() {
                        0 => Want::Frame,
                        left => Want::Payload(left),
                    };
                    return Ok(Some(Event::Data(data)));
                }
                Want::Skip(left) => {
                    let Some(skipped) = take_some(input, left) else { return Ok(None) };
                    if skipped.len() < left {
                        self.want = Want::Skip(left - skipped.len());
                        return Ok(None);
                    }
                    self.want = Want::Frame;
                }
                Want::Frame => {
                    if !self.collect(input, HEADER_LEN) {
                        return Ok(None);
                    }
                    let kind = self.partial[0];
                    let [_, high, mid, low] = take(&self.partial);
                    let len = u32::from_be_bytes([0, high, mid, low]) as usize;
                    self.check(kind, len)?;
                    if kind == kind::DATA {
                        self.partial_len = 0;
                        self.want = Want::Payload(len);
                        continue;
                    }
                    // An OPEN of a later version may be longer than ours: what we do not know of it
                    // is skipped.
                    let kept = len.min(OPEN_BODY);
                    if !self.collect(input, HEADER_LEN + kept) {
                        return Ok(None);
                    }
                    self.partial_len = 0;
                    if len > kept {
                        self.want = Want::Skip(len - kept);
                    }
                    return self.control(kind, len).map(Some);
                }
            }
        }
    }

    /// Whether a frame of this type and length may come now.
    fn check(&self, kind: u8, len: usize) -> Result<(), WireError> {
        let (length_fits, phase_fits) = match (kind, self.role) {
            (kind::OPEN, Role::Server) => (
                (1..=MAX_CONTROL).contains(&len),
                matches!(self.phase, Phase::Between | Phase::Ended),
            ),
            (kind::ANSWER, Role::Client) => {
                (len == ANSWER_BODY, matches!(self.phase, Phase::Between | Phase::Ended))
            }
            (kind::OPEN | kind::ANSWER, _) => return Err(WireError::OutOfOrder(kind)),
            (kind::DATA, _) => ((1..=MAX_DATA).contains(&len), self.phase == Phase::Flowing),
            (kind::FIN, _) => (len == 0, self.phase == Phase::Flowing),
            (kind::RESET, _) => (len == 1, matches!(self.phase, Phase::Flowing | Phase::Ended)),
            _ => return Err(WireError::UnknownType(kind)),
        };
        if !phase_fits {
            return Err(WireError::OutOfOrder(kind));
        }
        if !length_fits {
            return Err(WireError::Length(kind));
        }
        Ok(())
    }

    /// Reads the control frame that lies in `partial`.
    fn control(&mut self, kind: u8, len: usize) -> Result<Event<'static>, WireError> {
        let body: [u8; OPEN_BODY] = take(&self.partial[HEADER_LEN..]);
        let (event, phase) = match kind {
            kind::OPEN => {
                let (version, flags) = (body[0], body.get(1).copied().unwrap_or(0));
                if version != VERSION || (len == OPEN_BODY && flags != 0) {
                    (Event::Unsupported { version }, Phase::Over)
                } else if len == OPEN_BODY {
                    (Event::Open(Open::decode(&body)), Phase::Flowing)
                } else {
                    return Err(WireError::Length(kind));
                }
            }
            kind::ANSWER => {
                let answer = Answer::decode(take(&body)).ok_or(WireError::Answer)?;
                let taken = answer.verdict.is_ok();
                (Event::Answer(answer), if taken { Phase::Flowing } else { Phase::Between })
            }
            kind::FIN => (Event::Fin, Phase::Ended),
            _ => (Event::Reset(ResetReason::from_code(body[0])), Phase::Over),
        };
        self.phase = phase;
        Ok(event)
    }

    /// Fills `partial` up to `len` from `input`; `false` if there is not enough yet.
    fn collect(&mut self, input: &mut &[u8], len: usize) -> bool {
        let missing = len.saturating_sub(self.partial_len);
        if let Some(part) = take_some(input, missing) {
            self.partial[self.partial_len..self.partial_len + part.len()].copy_from_slice(part);
            self.partial_len += part.len();
        }
        self.partial_len >= len
    }
}

/// Up to `most` bytes from the front of `input`; `None` if that is nothing.
fn take_some<'a>(input: &mut &'a [u8], most: usize) -> Option<&'a [u8]> {
    let (some, rest) = input.split_at(most.min(input.len()));
    *input = rest;
    (!some.is_empty()).then_some(some)
}

/// The first `N` bytes of `from`, which has at least as many.
fn take<const N: usize>(from: &[u8]) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&from[..N]);
    part
}
