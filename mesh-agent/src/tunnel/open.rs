//! Opening a flow: a carrier, OPEN, the application's first bytes, and the answer.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use mesh_core::spiffe::SpiffeId;
use mesh_core::wire::{HEADER_LEN, Open, Reason, Refusal, ResetReason, data_header};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout_at};

use super::buffers::Buf;
use super::error::{DialError, OpenError};
use super::flow::{Flow, Held, LaneFlow, Reuse};
use super::lane::{Lane, LaneError, LaneEvent, SCRAP};
use super::pool::{PeerPool, Ready};
use super::quic::{self, QuicLink};
use super::stream::{self, QuicFlow};
use super::tunnels::{Peer, Tunnels};

/// How often a lane from the pool may turn out to be closed before a new one is made.
const STALE: usize = 2;

/// How long new carriers are made to an agent that answers that it drains. It closes its listeners at that
/// moment, and its successor listens beside them already: soon the successor is reached, or nobody.
const HAND_OVER: Duration = Duration::from_secs(1);
/// Between two of them, doubling up to the second value.
const PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));

/// Why one attempt on one carrier failed.
enum Attempt {
    /// The flow was not taken, and not because of anything that this attempt did.
    NotTaken,
    /// The peer takes no further flow on a carrier that has carried some: it outlived what it was made
    /// under, and a new one may not.
    Outlived(Reason),
    Failed(OpenError),
}

impl From<OpenError> for Attempt {
    fn from(error: OpenError) -> Self {
        Self::Failed(error)
    }
}

impl Tunnels {
    /// Whether a workload of this node has a certificate to call with.
    pub fn has_certificate(&self, from: &SpiffeId) -> bool {
        self.dialler.has_certificate(from)
    }

    /// Opens a flow and returns when the peer has accepted it.
    ///
    /// Meanwhile at most [`MAX_EARLY`](mesh_core::wire::MAX_EARLY) bytes of what `app` sends go along, and stay in `held`: pass
    /// the same `held` on when trying another endpoint, and then to the relay.
    ///
    /// # Errors
    ///
    /// [`OpenError::may_retry`] says whether another endpoint may be tried with the same bytes.
    pub async fn open(
        self: &Arc<Self>,
        peer: &Peer,
        open: &Open,
        app: &TcpStream,
        held: &mut Held,
    ) -> Result<Flow, OpenError> {
        if !self.dialler.has_certificate(&peer.from) {
            return Err(OpenError::NoCertificate);
        }
        let pool = self.pool(peer);
        let opened = self.open_from(&pool, open, app, held).await;
        match &opened {
            Ok(_) => {
                self.stats.flows.fetch_add(1, Relaxed);
                pool.accepted();
            }
            Err(OpenError::Refused(refusal)) => {
                self.stats.flows_refused.fetch_add(1, Relaxed);
                match refusal.reason {
                    Reason::CallerCertificate => self.dialler.forget_sessions(&peer.from),
                    _ => pool.accepted(),
                }
            }
            // In TLS 1.3 the server judges our certificate when our end is done already: its alert
            // comes as the first thing that we read.
            Err(OpenError::Dial(error)) if matches!(**error, DialError::PeerRefused { .. }) => {
                self.rejected(&pool, error);
            }
            Err(_) => {}
        }
        opened
    }

    async fn open_from(
        self: &Arc<Self>,
        pool: &Arc<PeerPool>,
        open: &Open,
        app: &TcpStream,
        held: &mut Held,
    ) -> Result<Flow, OpenError> {
        let mut attempts = 0;
        let mut patience = Patience::default();
        loop {
            let is_fresh = attempts >= STALE;
            attempts += 1;
            let ready = self.acquire(pool, is_fresh);
            let ready = tokio::select! {
                ready = ready => ready?,
                error = broken(app) => return Err(OpenError::Application(error)),
            };
            let deadline = Instant::now() + self.config.answer_timeout;
            let is_lane = matches!(ready, Ready::Lane(_));
            let answered = match ready {
                Ready::Lane(lane) => {
                    let opening = open_lane(pool, lane, open, app, held);
                    timeout_at(deadline.into(), opening).await
                }
                Ready::Quic(link) => {
                    let opening = open_quic(pool, &link, open, app, held);
                    timeout_at(deadline.into(), opening).await
                }
            };
            match answered {
                Ok(Ok(flow)) => return Ok(flow),
                Ok(Err(Attempt::NotTaken)) => {}
                Ok(Err(Attempt::Outlived(reason))) => {
                    // A session made under that certificate would only bring back what it was.
                    if reason == Reason::CallerCertificate {
                        self.dialler.forget_sessions(&pool.peer.from);
                    }
                }
                Ok(Err(Attempt::Failed(error))) => return Err(error),
                Err(_elapsed) => {
                    if is_lane {
                        pool.close_idle();
                    }
                    return Err(OpenError::TimedOut { payload_sent: !held.bytes().is_empty() });
                }
            }
            if is_fresh {
                let Some(pause) = patience.next(Instant::now()) else {
                    return Err(OpenError::Dial(Arc::new(DialError::Draining)));
                };
                tokio::select! {
                    () = sleep(pause) => {}
                    error = broken(app) => return Err(OpenError::Application(error)),
                }
            }
        }
    }
}

/// How long a peer may go on saying that it drains.
#[derive(Debug, Default)]
struct Patience(Option<(Instant, Duration)>);

impl Patience {
    /// What to wait before the next carrier; `None` if there is to be none.
    fn next(&mut self, now: Instant) -> Option<Duration> {
        let (until, pause) = self.0.unwrap_or((now + HAND_OVER, PAUSE.0));
        self.0 = Some((until, (pause * 2).min(PAUSE.1)));
        (now < until).then_some(pause)
    }
}

async fn open_lane(
    pool: &Arc<PeerPool>,
    mut lane: Box<Lane>,
    open: &Open,
    app: &TcpStream,
    held: &mut Held,
) -> Result<Flow, Attempt> {
    // Counted before the first wait: whoever looks for a place must see this one taken.
    let lease = pool.lease();
    if held.wants_more() {
        held.read_unasked(app).map_err(OpenError::Application)?;
    }
    let sent = queue_open(&mut lane, open, held.bytes());
    if let Err(error) = match sent {
        Ok(()) => lane.flush().await,
        Err(error) => Err(error),
    } {
        // What the peer said before it closed is worth more than that we cannot write.
        return Err(match lane.next_event().await {
            Ok(LaneEvent::Closed) => Attempt::NotTaken,
            Ok(LaneEvent::Reset(_)) if lane.used => Attempt::NotTaken,
            Err(said @ LaneError::Tls(_)) => lost(said, held).into(),
            _ => stale(&lane, error, held),
        });
    }
    loop {
        tokio::select! {
            biased; // The answer first: what the application sends after it is the relay's.
            event = lane.next_event() => match event {
                Ok(LaneEvent::Answer(answer)) => match answer.verdict {
                    Ok(()) => return Ok(Flow::Lane(LaneFlow::of_client(lane, lease))),
                    Err(refusal) => {
                        // After these the lane ends: the peer closes it, and another one is needed.
                        let over = matches!(
                            refusal.reason,
                            Reason::Draining | Reason::CallerCertificate | Reason::Version
                        );
                        if has_outlived(refusal.reason, lane.used) {
                            return Err(Attempt::Outlived(refusal.reason));
                        }
                        if !over && lane.codec.queue_fin().is_ok() && lane.flush().await.is_ok() {
                            lease.give_back(lane, Reuse::Next);
                        }
                        return Err(OpenError::Refused(refusal).into());
                    }
                },
                // `close_notify` before the answer: the server has not read our OPEN.
                Ok(LaneEvent::Closed) => return Err(Attempt::NotTaken),
                // Nor has one that resets before it answers: that was the flow before, which both had ended when
                // its application turned out to be gone. A server answers a flow before it resets it.
                Ok(LaneEvent::Reset(_)) if lane.used => return Err(Attempt::NotTaken),
                Ok(_) => return Err(lost(io::Error::from(io::ErrorKind::InvalidData).into(), held).into()),
                Err(LaneError::Io(error)) => return Err(stale(&lane, error, held)),
                Err(error) => return Err(lost(error, held).into()),
            },
            ready = app.readable(), if held.wants_more() => {
                let early = ready.and_then(|()| held.read(app).map(<[u8]>::len));
                match early {
                    Ok(0) => {}
                    Ok(len) => {
                        let payload = &held.bytes()[held.bytes().len() - len..];
                        let sent = queue_payload(&mut lane, payload);
                        if let Err(error) = sent.and(lane.flush().await) {
                            return Err(lost(error.into(), held).into());
                        }
                    }
                    Err(error) => {
                        abandon(lane).await;
                        return Err(OpenError::Application(error).into());
                    }
                }
            }
            error = broken(app) => {
                abandon(lane).await;
                return Err(OpenError::Application(error).into());
            }
        }
    }
}

/// Queues OPEN, and DATA if there is any, in one record and so in one packet.
fn queue_open(lane: &mut Lane, open: &Open, payload: &[u8]) -> io::Result<()> {
    let mut frames = Buf::default();
    let mut fits = frames.push(&open.encode());
    if !payload.is_empty() {
        fits = fits && frames.push(&data_header(payload.len())) && frames.push(payload);
    }
    if fits { lane.codec.queue(frames.bytes()) } else { Err(io::ErrorKind::FileTooLarge.into()) }
}

fn queue_payload(lane: &mut Lane, payload: &[u8]) -> io::Result<()> {
    let mut frame = Buf::default();
    let fits = frame.push(&[0; HEADER_LEN]) && frame.push(payload);
    if fits {
        lane.codec.queue_data(frame.bytes_mut())
    } else {
        Err(io::ErrorKind::FileTooLarge.into())
    }
}

/// The application has gone: the peer is told, once.
async fn abandon(mut lane: Box<Lane>) {
    if lane.codec.queue_reset(ResetReason::Application).is_ok() && lane.flush().await.is_ok() {
        lane.linger(SCRAP).await;
    }
}

/// Whether the refusal is about the carrier, and another one may be better. An agent that drains may have
/// a successor already, which takes what is dialled now, also if this carrier came just before it; a
/// certificate that was refused in a fresh handshake is not taken the next time either.
fn has_outlived(reason: Reason, used: bool) -> bool {
    reason == Reason::Draining || (used && reason == Reason::CallerCertificate)
}

/// The lane broke without a word. A lane that had been idle may have been closed by a peer that went
/// away; if no payload went along, another one is tried.
fn stale(lane: &Lane, error: io::Error, held: &Held) -> Attempt {
    if lane.used && held.bytes().is_empty() {
        return Attempt::NotTaken;
    }
    lost(error.into(), held).into()
}

fn lost(error: LaneError, held: &Held) -> OpenError {
    match error {
        LaneError::Tls(error @ DialError::PeerRefused { .. }) => OpenError::Dial(Arc::new(error)),
        LaneError::Wire(error) => OpenError::Protocol(error),
        error => OpenError::Lost { source: error.into(), payload_sent: !held.bytes().is_empty() },
    }
}

/// Waits until the application's connection breaks.
async fn broken(app: &TcpStream) -> io::Error {
    match app.ready(Interest::ERROR).await {
        Ok(_) => match app.take_error() {
            Ok(Some(error)) | Err(error) => error,
            Ok(None) => io::ErrorKind::ConnectionReset.into(),
        },
        Err(error) => error,
    }
}

async fn open_quic(
    pool: &Arc<PeerPool>,
    link: &QuicLink,
    open: &Open,
    app: &TcpStream,
    held: &mut Held,
) -> Result<Flow, Attempt> {
    let (lease, claim) = (pool.lease(), link.claim());
    // No kernel says of a QUIC connection that its other end was killed. What could be lost with it waits
    // for a sign of life: then the flow may go to another connection.
    let asks_first = link.is_quiet(Instant::now());
    // Whether payload can have reached the peer.
    let sent = |held: &Held| !asks_first && !held.bytes().is_empty();
    let gone = |held: &Held| {
        let error = link.connection().close_reason()?;
        Some(match quic::cause(&error, None) {
            error @ (DialError::PeerRefused { .. } | DialError::Overloaded) => {
                OpenError::Dial(Arc::new(error))
            }
            _ => OpenError::Lost { source: io::Error::other(error), payload_sent: sent(held) },
        })
    };
    // Waits while the peer's limit of streams is reached.
    let Ok((send, recv)) = link.connection().open_bi().await else {
        return Err(match gone(held) {
            Some(error @ OpenError::Dial(_)) => error.into(),
            // Nothing was sent on it: another connection may be made.
            _ => Attempt::NotTaken,
        });
    };
    let mut flow = QuicFlow::new(send, recv, claim, Some(lease));
    if !asks_first && held.wants_more() {
        held.read_unasked(app).map_err(OpenError::Application)?;
    }
    let broke = |error: io::Error, held: &Held| match gone(held) {
        // A connection that has carried flows, and took nothing of this one with it.
        Some(OpenError::Lost { payload_sent: false, .. }) if link.has_accepted() => {
            Attempt::NotTaken
        }
        Some(error) => error.into(),
        None => OpenError::Lost { source: error, payload_sent: sent(held) }.into(),
    };
    // Nothing is sent before this task waits: both writes leave in one packet.
    let mut written = flow.write_all(&open.encode()).await;
    if written.is_ok() && !asks_first {
        written = flow.write_all(held.bytes()).await;
    }
    if let Err(error) = written {
        return Err(broke(io::Error::other(error), held));
    }
    let opened = answer_on_stream(&mut flow, app, held, !asks_first).await;
    match opened {
        Ok(Ok(())) => {
            link.accepted();
            // What an earlier attempt has read.
            if asks_first && let Err(error) = flow.write_all(held.bytes()).await {
                let source = io::Error::other(error);
                return Err(OpenError::Lost { source, payload_sent: true }.into());
            }
            Ok(Flow::Quic(Box::new(flow)))
        }
        Ok(Err(refusal)) => {
            flow.refused();
            if matches!(refusal.reason, Reason::Draining | Reason::CallerCertificate) {
                link.retire();
            }
            if has_outlived(refusal.reason, link.has_accepted()) {
                return Err(Attempt::Outlived(refusal.reason));
            }
            Err(OpenError::Refused(refusal).into())
        }
        Err(Broken::Application(error)) => {
            flow.reset_behind(ResetReason::Application).await;
            Err(OpenError::Application(error).into())
        }
        Err(Broken::Carrier(error)) => Err(broke(error, held)),
    }
}

/// Which side of a flow broke while it was being opened.
enum Broken {
    Application(io::Error),
    Carrier(io::Error),
}

/// Waits for the answer and, if `forwards`, sends on what comes from the application meanwhile.
async fn answer_on_stream(
    flow: &mut QuicFlow,
    app: &TcpStream,
    held: &mut Held,
    forwards: bool,
) -> Result<Result<(), Refusal>, Broken> {
    // Kept across the loop: reading the answer is not cancel-safe.
    let QuicFlow { send, recv, written, .. } = flow;
    let mut answer = std::pin::pin!(stream::read_answer(recv));
    loop {
        tokio::select! {
            biased; // As on a lane.
            answer = &mut answer => {
                return answer.map(|answer| answer.verdict).map_err(Broken::Carrier);
            }
            ready = app.readable(), if forwards && held.wants_more() => {
                let early = ready.and_then(|()| held.read(app).map(<[u8]>::len));
                let len = early.map_err(Broken::Application)?;
                let payload = &held.bytes()[held.bytes().len() - len..];
                if let Err(error) = send.write_all(payload).await {
                    return Err(Broken::Carrier(io::Error::other(error)));
                }
                *written = Some(Instant::now());
            }
            error = broken(app) => return Err(Broken::Application(error)),
        }
    }
}
