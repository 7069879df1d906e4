//! A flow on a stream of a QUIC connection: its first frames, its payload, and how it ends.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use mesh_core::wire::{
    Answer, Decoder, Event, HEADER_LEN, MAX_EARLY, Open, Refusal, ResetReason, Role, encode_answer,
};
use quinn::{ReadError, RecvStream, SendStream, VarInt, WriteError};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::time::{sleep, timeout};

use super::credit::Reader;
use super::pool::Lease;
use super::proof::Proof;
use super::quic::Claim;

/// How long the last bytes of a flow may take to be acknowledged when its connection is going away.
const LAST_BYTES: Duration = Duration::from_secs(2);

/// The least and the most that bytes in front of a reset are given to arrive.
const ARRIVES: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// Why a stream carries nothing more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamError {
    /// The peer reset the flow.
    Reset(ResetReason),
    /// The connection is gone.
    Lost,
}

/// A flow on a stream.
#[derive(Debug)]
pub struct QuicFlow {
    pub(super) send: SendStream,
    pub(super) recv: RecvStream,
    claim: Claim,
    reader: Arc<Reader>,
    _lease: Option<Lease>,
    /// When something was written last, or the end.
    pub(super) written: Option<Instant>,
    /// Neither direction needs to be reset any more.
    over: bool,
}

impl QuicFlow {
    pub(super) fn new(
        send: SendStream,
        recv: RecvStream,
        claim: Claim,
        lease: Option<Lease>,
    ) -> Self {
        let reader = claim.reader();
        Self { send, recv, claim, reader, _lease: lease, written: None, over: false }
    }

    /// Completes when what nobody reads of it can be kept no longer.
    pub(crate) fn given_up(&self) -> impl Future<Output = ()> + Send + use<> {
        let reader = Arc::clone(&self.reader);
        poll_fn(move |cx| reader.poll_given_up(cx))
    }

    /// Who the peer is.
    pub(crate) fn proof(&self) -> Arc<Proof> {
        self.claim.proof()
    }

    /// Both directions have ended. What was sent last is in flight still; that matters only if the
    /// connection goes away with this flow.
    pub(crate) async fn finish(mut self) {
        self.over = true;
        if self.claim.is_retiring() {
            drop(timeout(LAST_BYTES, self.send.stopped()).await);
        }
    }

    /// Ends both directions at once.
    pub(crate) fn reset(&mut self, reason: ResetReason) {
        self.over = true;
        let code = VarInt::from_u32(reason.code().into());
        // Fails for a direction that has ended: nothing to reset there.
        self.send.reset(code).unwrap_or_default();
        self.recv.stop(code).unwrap_or_default();
    }

    /// Ends both directions behind what was written a moment ago. RESET_STREAM drops at both ends what the far
    /// application has not read (RFC 9000 sections 3.1 and 3.2), and TCP's RST does not: an answer in front of it
    /// gets the time that it needs to arrive, unless it is lost on its way.
    pub(crate) async fn reset_behind(mut self, reason: ResetReason) {
        if let Some(written) = self.written {
            let arrives = (2 * self.claim.rtt()).clamp(ARRIVES.0, ARRIVES.1);
            let left = arrives.saturating_sub(written.elapsed());
            // Even nothing at all would be a millisecond.
            if !left.is_zero() {
                sleep(left).await;
            }
        }
        self.reset(reason);
    }

    /// The peer refused the flow, and has said all it had to say.
    pub(super) fn refused(mut self) {
        self.over = true;
        self.send.finish().unwrap_or_default();
    }

    /// Writes all of `bytes`.
    pub(super) async fn write_all(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        self.send.write_all(bytes).await?;
        self.written = Some(Instant::now());
        Ok(())
    }

    pub(crate) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, StreamError>> {
        let written = Pin::new(&mut self.send).poll_write(cx, bytes);
        if matches!(written, Poll::Ready(Ok(_))) {
            self.written = Some(Instant::now());
        }
        written.map_err(|error| match error {
            WriteError::Stopped(code) => StreamError::Reset(reset_reason(code)),
            _ => StreamError::Lost,
        })
    }

    pub(crate) fn finish_sending(&mut self) -> Result<(), StreamError> {
        self.written = Some(Instant::now());
        self.send.finish().map_err(|_closed| StreamError::Lost)
    }

    /// Zero bytes are the end.
    pub(crate) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        room: &mut [u8],
    ) -> Poll<Result<usize, StreamError>> {
        let read = self.recv.poll_read(cx, room);
        // Neither after the end, which is read once, is anything left lying.
        self.reader.read(!matches!(read, Poll::Ready(Ok(1..))));
        read.map_err(|error| match error {
            ReadError::Reset(code) => StreamError::Reset(reset_reason(code)),
            _ => StreamError::Lost,
        })
    }

    /// Completes when the peer wants no more of us, or has all of it (`None`).
    pub(crate) fn stopped(&self) -> impl Future<Output = Option<StreamError>> + Send + use<> {
        let stopped = self.send.stopped();
        async move {
            match stopped.await {
                Ok(code) => code.map(|code| StreamError::Reset(reset_reason(code))),
                Err(_lost) => Some(StreamError::Lost),
            }
        }
    }
}

/// quinn ends a stream that is dropped as if all had been sent; a flow that is dropped was cut.
impl Drop for QuicFlow {
    fn drop(&mut self) {
        if !self.over {
            self.reset(ResetReason::Draining);
        }
    }
}

/// What an error code of the peer's means.
fn reset_reason(code: VarInt) -> ResetReason {
    u8::try_from(code.into_inner()).map_or(ResetReason::Other, ResetReason::from_code)
}

/// Where a request on a stream is answered.
#[derive(Debug)]
pub(super) struct QuicAnswer(QuicFlow);

impl QuicAnswer {
    pub(super) fn new(send: SendStream, recv: RecvStream, claim: Claim) -> Self {
        Self(QuicFlow::new(send, recv, claim, None))
    }

    /// `None` if the client has gone, or lets nothing be said to it.
    pub(super) async fn accept(mut self) -> Option<QuicFlow> {
        let answer = encode_answer(Ok(()));
        let said = timeout(LAST_BYTES, self.0.write_all(&answer)).await;
        said.is_ok_and(|said| said.is_ok()).then_some(self.0)
    }

    pub(super) async fn refuse(self, refusal: Refusal) {
        let mut flow = self.0;
        let answer = encode_answer(Err(refusal));
        let said = timeout(LAST_BYTES, flow.send.write_all(&answer)).await;
        if said.is_ok_and(|said| said.is_ok()) {
            flow.finish_sending().unwrap_or_default();
            flow.over = true;
            // The client sends no more than this before it reads the answer; reading it frees the
            // stream without a reset that could overtake the answer.
            drop(timeout(LAST_BYTES, flow.recv.read_to_end(MAX_EARLY)).await);
            drop(timeout(LAST_BYTES, flow.send.stopped()).await);
        }
    }
}

/// How a stream's first frame was.
#[derive(Debug)]
pub(super) enum Head {
    Open(Open),
    /// Of a version or with a flag that we do not know.
    Unsupported,
}

/// Reads OPEN from the beginning of a stream.
pub(super) async fn read_open(recv: &mut (impl AsyncRead + Unpin)) -> Result<Head, io::Error> {
    let mut decoder = Decoder::new(Role::Server);
    match read_frame(recv, &mut decoder).await? {
        FrameHead::Open(open) => Ok(Head::Open(open)),
        FrameHead::Unsupported => Ok(Head::Unsupported),
        FrameHead::Answer(_) => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Reads ANSWER from the beginning of a stream.
pub(super) async fn read_answer(recv: &mut (impl AsyncRead + Unpin)) -> Result<Answer, io::Error> {
    let mut decoder = Decoder::new(Role::Client);
    match read_frame(recv, &mut decoder).await? {
        FrameHead::Answer(answer) => Ok(answer),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

enum FrameHead {
    Open(Open),
    Unsupported,
    Answer(Answer),
}

/// Reads exactly one control frame: what follows it is payload and stays in the stream.
async fn read_frame(
    recv: &mut (impl AsyncRead + Unpin),
    decoder: &mut Decoder,
) -> Result<FrameHead, io::Error> {
    let mut header = [0; HEADER_LEN];
    recv.read_exact(&mut header).await.map_err(cut_short)?;
    let [_, high, mid, low] = header;
    let mut left = u32::from_be_bytes([0, high, mid, low]);
    let mut event = control(decoder, &header)?;
    // Piece by piece, so that the future stays small. The decoder has refused what is too long.
    while event.is_none() && left > 0 {
        let mut piece = [0; 64];
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
        recv.read_exact(&mut piece[..len]).await.map_err(cut_short)?;
        event = control(decoder, &piece[..len])?;
        left -= u32::try_from(len).unwrap_or(left);
    }
    // What a later version has behind the part that we know.
    while left > 0 {
        let mut piece = [0; 64];
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(piece.len());
        recv.read_exact(&mut piece[..len]).await.map_err(cut_short)?;
        left -= u32::try_from(len).unwrap_or(left);
    }
    event.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// A stream that ends within a frame breaks the protocol; one that is reset there was given up.
fn cut_short(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::new(io::ErrorKind::InvalidData, error),
        _ => io::Error::other(error),
    }
}

/// The control frame that ends with `piece`, if one does.
fn control(decoder: &mut Decoder, piece: &[u8]) -> io::Result<Option<FrameHead>> {
    let event = decoder
        .next(&mut &piece[..])
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    match event {
        None => Ok(None),
        Some(Event::Open(open)) => Ok(Some(FrameHead::Open(open))),
        Some(Event::Unsupported { .. }) => Ok(Some(FrameHead::Unsupported)),
        Some(Event::Answer(answer)) => Ok(Some(FrameHead::Answer(answer))),
        Some(_) => Err(io::ErrorKind::InvalidData.into()),
    }
}
