//! A lane: TLS over TCP, carrying frames, one flow at a time.
//!
//! The socket and the bytes are apart ([`Lane::tcp`], [`Lane::codec`]), so that whoever drives the
//! lane decides when to read and to write: `open` and `serve` wait for one thing at a time, the relay
//! watches both sockets of a connection in one task.

mod handshake;

use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fmt, io};

use mesh_core::wire::{
    Answer, Decoder, Event, FIN, HEADER_LEN, MAX_DATA, Open, ResetReason, Role, WireError,
    data_header, encode_reset,
};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::buffers::{Buf, sealable};
use super::error::DialError;
use super::proof::Proof;
use super::records::{MAX_OPENED, MAX_PLAIN, OVERHEAD, Record, Records};
use super::stats::Gauged;
use super::tls;
use crate::polling;

pub(super) use self::handshake::Handshake;

/// A TLS connection between two agents, for two workloads.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) tcp: TcpStream,
    pub(crate) codec: Codec,
    /// Who the peer is, as long as it is trusted.
    pub(crate) proof: Arc<Proof>,
    /// After this no further flow begins: a certificate ends, or the lane is old.
    pub(super) expires: Instant,
    /// Whether a flow has ended on it before.
    pub(super) used: bool,
    _open: Gauged,
}

/// Why a lane can carry nothing more.
#[derive(Debug)]
#[non_exhaustive]
pub(crate) enum LaneError {
    /// TCP broke, or ended without `close_notify`.
    Io(io::Error),
    /// TLS broke; also an alert.
    Tls(DialError),
    /// The frames are wrong.
    Wire(WireError),
    /// What had begun did not go on.
    Late,
}

impl fmt::Display for LaneError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(_) => f.write_str("the lane broke"),
            Self::Tls(_) => f.write_str("the lane's TLS broke"),
            Self::Wire(_) => f.write_str("the peer broke the protocol"),
            Self::Late => f.write_str("the peer began a request and did not go on"),
        }
    }
}

impl std::error::Error for LaneError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(source) => Some(source),
            Self::Tls(source) => Some(source),
            Self::Wire(source) => Some(source),
            Self::Late => None,
        }
    }
}

impl From<io::Error> for LaneError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<LaneError> for io::Error {
    fn from(error: LaneError) -> Self {
        match error {
            LaneError::Io(error) => error,
            LaneError::Tls(error) => Self::other(error),
            LaneError::Wire(error) => Self::new(io::ErrorKind::InvalidData, error),
            LaneError::Late => io::ErrorKind::TimedOut.into(),
        }
    }
}

/// What arrived on a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LaneEvent {
    Open(Open),
    Unsupported,
    Answer(Answer),
    /// There is [`Codec::payload`].
    Data,
    Fin,
    Reset(ResetReason),
    /// `close_notify`: no further byte comes.
    Closed,
}

/// Everything of a lane but its socket: no IO happens here.
#[derive(Debug)]
pub(crate) struct Codec {
    records: Records,
    decoder: Decoder,
    /// Received and not decrypted: at most an incomplete record once all events are taken.
    inbox: Buf,
    /// Decrypted frames.
    plain: Buf,
    /// Bytes at the front of `plain` that are payload.
    payload: usize,
    /// Encrypted and not sent.
    outbox: Buf,
    /// The peer has sent `close_notify`.
    closed: bool,
}

impl Codec {
    /// `inbox` is what was received behind the handshake.
    fn new(records: Records, role: Role, inbox: Buf) -> Self {
        Self {
            records,
            decoder: Decoder::new(role),
            inbox,
            plain: Buf::default(),
            payload: 0,
            outbox: Buf::default(),
            closed: false,
        }
    }

    /// The next event, or `None` if more must be received first. After [`LaneEvent::Data`] the
    /// payload must be taken before this is called again.
    pub(crate) fn event(&mut self) -> Result<Option<LaneEvent>, LaneError> {
        debug_assert_eq!(self.payload, 0, "payload is taken before the next event");
        loop {
            let mut input = self.plain.bytes();
            let before = input.len();
            let event = self.decoder.next(&mut input).map_err(LaneError::Wire)?;
            let used = before - input.len();
            let event = match event {
                None => None,
                Some(Event::Data(data)) => {
                    self.payload = data.len();
                    Some(LaneEvent::Data)
                }
                Some(Event::Open(open)) => Some(LaneEvent::Open(open)),
                Some(Event::Unsupported { .. }) => Some(LaneEvent::Unsupported),
                Some(Event::Answer(answer)) => Some(LaneEvent::Answer(answer)),
                Some(Event::Fin) => Some(LaneEvent::Fin),
                Some(Event::Reset(reason)) => Some(LaneEvent::Reset(reason)),
            };
            self.plain.consume(used - self.payload);
            if event.is_some() {
                return Ok(event);
            }
            if !self.decrypt()? {
                return Ok(self.closed.then_some(LaneEvent::Closed));
            }
        }
    }

    /// Decrypts what fits into `plain`, so that one write to the application takes several records.
    /// Returns whether there was anything.
    fn decrypt(&mut self) -> Result<bool, LaneError> {
        let mut taken = false;
        while !self.closed && self.plain.room_len() >= MAX_OPENED {
            let record = self.records.open(&mut self.inbox, &mut self.plain, &mut self.outbox);
            match record.map_err(|error| LaneError::Tls(tls::cause(error)))? {
                Record::Taken => taken = true,
                Record::Closed => self.closed = true,
                Record::Incomplete => break,
            }
        }
        Ok(taken)
    }

    /// What [`LaneEvent::Data`] announced and [`Codec::taken`] has not removed.
    pub(crate) fn payload(&self) -> &[u8] {
        &self.plain.bytes()[..self.payload]
    }

    /// Removes payload from the front.
    pub(crate) fn taken(&mut self, len: usize) {
        let len = len.min(self.payload);
        self.payload -= len;
        self.plain.consume(len);
    }

    /// Where to receive a frame of `most` bytes into, or what one record takes if that is more;
    /// [`Codec::received`] follows, also if nothing came.
    pub(crate) fn room(&mut self, most: usize) -> &mut [u8] {
        let frame = HEADER_LEN + most;
        let most = frame + frame.div_ceil(MAX_PLAIN) * OVERHEAD;
        let room = self.inbox.room();
        let most = room.len().min(most.max(MAX_PLAIN + OVERHEAD));
        &mut room[..most]
    }

    /// Says how much of [`Codec::room`] was filled.
    pub(crate) fn received(&mut self, len: usize) {
        self.inbox.fill(len);
        self.inbox.release();
    }

    /// What is to be sent.
    pub(crate) fn outgoing(&self) -> &[u8] {
        self.outbox.bytes()
    }

    /// Says how much of [`Codec::outgoing`] was sent.
    pub(crate) fn sent(&mut self, len: usize) {
        self.outbox.consume(len);
    }

    /// Queues frames.
    pub(crate) fn queue(&mut self, frames: &[u8]) -> io::Result<()> {
        self.records.seal(frames, &mut self.outbox).map_err(io::Error::other)
    }

    /// Queues a DATA frame: `frame` is room for the header, then the payload.
    pub(crate) fn queue_data(&mut self, frame: &mut [u8]) -> io::Result<()> {
        let len = frame.len().saturating_sub(HEADER_LEN);
        if let Some(header) = frame.first_chunk_mut::<HEADER_LEN>() {
            *header = data_header(len);
        }
        self.queue(frame)
    }

    /// Queues a DATA frame of what `up` holds, which is room for the header and then payload, as far
    /// as there is room to seal it. What is left has such room in front of it again.
    pub(crate) fn queue_payload(&mut self, up: &mut Buf) -> io::Result<()> {
        let most = sealable(self.outbox.room().len()).min(HEADER_LEN + MAX_DATA);
        let frame = up.bytes_mut();
        let len = frame.len().min(most);
        self.queue_data(&mut frame[..len])?;
        if up.len() > len {
            // The next header takes the place of payload that has been sealed.
            up.consume(len - HEADER_LEN);
        } else {
            up.clear();
        }
        Ok(())
    }

    /// Queues FIN.
    pub(crate) fn queue_fin(&mut self) -> io::Result<()> {
        self.queue(&FIN)
    }

    /// Queues RESET.
    pub(crate) fn queue_reset(&mut self, reason: ResetReason) -> io::Result<()> {
        self.queue(&encode_reset(reason))
    }

    /// Queues `close_notify`.
    pub(super) fn queue_close(&mut self) {
        self.records.close(&mut self.outbox);
    }

    /// Whether a part of an event has arrived.
    fn has_begun(&self) -> bool {
        !self.inbox.is_empty() || !self.plain.is_empty() || !self.decoder.at_boundary()
    }

    /// Whether nothing has arrived that belongs to a next flow, and nothing waits to be sent.
    fn is_quiet(&self) -> bool {
        self.plain.is_empty() && self.outbox.is_empty() && self.decoder.at_boundary()
    }

    /// Whether any buffer is held.
    #[cfg(test)]
    pub(crate) fn holds_memory(&self) -> bool {
        self.inbox.holds_memory() || self.plain.holds_memory() || self.outbox.holds_memory()
    }
}

impl Lane {
    /// Waits for the next event.
    pub(super) async fn next_event(&mut self) -> Result<LaneEvent, LaneError> {
        loop {
            if let Some(event) = self.codec.event()? {
                polling::worked();
                return Ok(event);
            }
            flush(&self.tcp, &mut self.codec.outbox).await?;
            if receive(&self.tcp, &mut self.codec.inbox).await? == 0 {
                return Err(LaneError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }

    /// Waits for the next event: as long as it takes to begin, and then at most `limit`.
    pub(super) async fn next_event_within(
        &mut self,
        limit: Duration,
    ) -> Result<LaneEvent, LaneError> {
        loop {
            if let Some(event) = self.codec.event()? {
                polling::worked();
                return Ok(event);
            }
            if self.codec.has_begun() {
                break;
            }
            flush(&self.tcp, &mut self.codec.outbox).await?;
            if receive(&self.tcp, &mut self.codec.inbox).await? == 0 {
                return Err(LaneError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        timeout(limit, self.next_event()).await.unwrap_or(Err(LaneError::Late))
    }

    /// Sends what is queued.
    pub(super) async fn flush(&mut self) -> io::Result<()> {
        flush(&self.tcp, &mut self.codec.outbox).await
    }

    /// Whether the lane, which has no flow, can take one: nothing came but session tickets.
    pub(super) fn check(&mut self) -> Result<(), LaneError> {
        loop {
            match self.codec.event()? {
                None => {}
                Some(LaneEvent::Closed) => {
                    return Err(LaneError::Io(io::ErrorKind::ConnectionAborted.into()));
                }
                Some(_) => return Err(LaneError::Io(io::ErrorKind::InvalidData.into())),
            }
            match try_receive(&self.tcp, &mut self.codec.inbox) {
                Ok(0) => return Err(LaneError::Io(io::ErrorKind::UnexpectedEof.into())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        if self.codec.is_quiet() {
            Ok(())
        } else {
            Err(LaneError::Io(io::ErrorKind::InvalidData.into()))
        }
    }

    /// Ends the lane between two flows: the peer learns that nothing was lost.
    pub(super) async fn close(mut self) {
        self.codec.queue_close();
        if self.flush().await.is_ok() {
            self.linger(SCRAP).await;
        }
    }

    /// Ends our direction behind what was sent, and waits a little for the peer to end its own, while `most` bytes that
    /// still come from it are thrown away.
    pub(super) async fn linger(self, most: usize) {
        let tcp = self.tcp;
        // Buffers go at once.
        drop(self.codec);
        linger(tcp, most).await;
    }

    /// Ends the lane between two flows without waiting for the peer.
    pub(super) fn close_now(mut self) {
        self.codec.queue_close();
        // One attempt: an idle lane's send buffer is empty.
        let sent = self.tcp.try_write(self.codec.outgoing()).unwrap_or(0);
        self.codec.sent(sent);
    }
}

/// What may still come from a peer that has nothing more to say.
pub(super) const SCRAP: usize = 256 * 1024;

/// Ends our direction and waits a little for the peer to end its own.
async fn linger(tcp: TcpStream, most: usize) {
    const PATIENCE: Duration = Duration::from_secs(1);

    if socket2::SockRef::from(&tcp).shutdown(std::net::Shutdown::Write).is_err() {
        return;
    }
    let drain = async {
        let mut scrap = Buf::default();
        let mut left = most;
        while left > 0 && tcp.readable().await.is_ok() {
            match tcp.try_read(scrap.room()) {
                Ok(0) => break,
                Ok(len) => {
                    left = left.saturating_sub(len);
                    tokio::task::yield_now().await;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => scrap.release(),
                Err(_) => break,
            }
        }
    };
    // The peer may keep its end open; then the time is over and RST is right.
    drop(timeout(PATIENCE, drain).await);
}

async fn flush(tcp: &TcpStream, outbox: &mut Buf) -> io::Result<()> {
    while !outbox.is_empty() {
        match tcp.try_write(outbox.bytes()) {
            Ok(len) => outbox.consume(len),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => tcp.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Receives at least one byte; zero means the end.
async fn receive(tcp: &TcpStream, inbox: &mut Buf) -> io::Result<usize> {
    loop {
        tcp.readable().await?;
        match try_receive(tcp, inbox) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
    }
}

fn try_receive(tcp: &TcpStream, inbox: &mut Buf) -> io::Result<usize> {
    let result = tcp.try_read(inbox.room());
    inbox.fill(*result.as_ref().unwrap_or(&0));
    inbox.release();
    result
}
