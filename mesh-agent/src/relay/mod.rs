//! Relay: copies payload between an application's connection and a flow.
//!
//! ```text
//! application ══ up ══►  far end: lane | QUIC stream | another application's connection
//!             ◄═ down ═
//! ```
//!
//! # Guarantees
//!
//! - *One task.* Both directions of a connection are one state machine in one task, so that all that
//!   follows from one event happens in one wake-up.
//! - *Fair.* After [`BUDGET`] bytes in a direction the task gives way, even if more is ready: without
//!   that a small flow beside bulk waits for milliseconds. The only bulk flow of a worker has more, in
//!   longer system calls; and the last words of an end that has broken are looked through at once.
//! - *Bounded.* At most one buffer of each direction holds bytes, and an idle connection holds
//!   none: what the slower end does not take stays in the other end's kernel.
//! - *Ends cross faithfully.* FIN crosses alone (RFC 9293 section 3.6); RST crosses as reset, also
//!   when a direction has ended or nothing flows, and behind what was written before it, as far as there is
//!   room for that (an answer to a request that nobody reads to its end); a carrier that breaks is RST to the
//!   application and never an end.
//! - *Only among the trusted.* A flow whose peer is not trusted any more is reset at once, also when
//!   nothing flows.
//!
//! # Not here
//!
//! Where the flow came from, and what its end means for balance and telemetry.

mod lane;
mod last_words;
mod local;
mod outcome;
mod quic;
#[cfg(test)]
mod tests;
mod turn;

use std::future::poll_fn;
use std::io::{self, Write as _};
use std::mem;
use std::net::Shutdown;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use mesh_core::wire::ResetReason;
use socket2::SockRef;
use tokio::io::{AsyncRead as _, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use self::last_words::read_unasked;
pub use self::outcome::{Outcome, RelayEnd};
pub use self::turn::BUDGET;
use self::turn::Turn;
use crate::polling;
use crate::telemetry::Live;
use crate::tunnel::{Buf, Flow, Held};

/// Copies in both directions until both have ended, or one breaks.
///
/// `held` is what was read from `app` while the flow was being opened; empty where the flow was
/// accepted from a peer. Dropping the future resets both ends.
///
/// A box for each kind of flow: none has to hold the place of the largest, and what moves into a block
/// has one place, where the arguments of an `async fn` have two.
pub fn relay<'a>(
    mut app: TcpStream,
    flow: Flow,
    held: Held,
    live: &'a Live,
) -> Pin<Box<dyn Future<Output = RelayEnd> + Send + 'a>> {
    // From here on whatever ends this process is an RST to the application.
    reset_on_close(&app, true);
    match flow {
        Flow::Lane(mut flow) => {
            sent_early(held, live);
            Box::pin(async move {
                let (end, reuse) = lane::run(&mut app, &mut flow, live).await;
                match end.outcome {
                    Outcome::Clean => {
                        reset_on_close(&app, false);
                        flow.finish(reuse);
                    }
                    Outcome::ApplicationReset(_) => {
                        drop(app);
                        Box::pin(flow.reset_behind()).await;
                    }
                    _ => {}
                }
                end
            })
        }
        Flow::Quic(mut flow) => {
            sent_early(held, live);
            Box::pin(async move {
                let end = quic::run(&mut app, &mut flow, live).await;
                // The application is done then; only the agent's connection has to wait.
                match end.outcome {
                    Outcome::Clean => {
                        reset_on_close(&app, false);
                        drop(app);
                        Box::pin(flow.finish()).await;
                    }
                    Outcome::ApplicationReset(reason) => {
                        drop(app);
                        Box::pin(flow.reset_behind(reason)).await;
                    }
                    _ => {}
                }
                end
            })
        }
        Flow::Local(mut far) => {
            reset_on_close(&far, true);
            Box::pin(async move {
                let end = local::run(&mut app, &mut far, held, live).await;
                if end.outcome == Outcome::Clean {
                    reset_on_close(&app, false);
                    reset_on_close(&far, false);
                }
                end
            })
        }
    }
}

/// Counts what went along with OPEN, and forgets it: kept, it would be the largest part of an idle
/// connection's memory.
fn sent_early(held: Held, live: &Live) {
    count(&live.sent, held.bytes().len());
}

/// `SO_LINGER` {1, 0} or off. With it, closing sends RST and drops what was not sent.
fn reset_on_close(socket: &TcpStream, on: bool) {
    // Fails on a socket that is broken already, which the application knows by RST.
    SockRef::from(socket).set_linger(on.then_some(Duration::ZERO)).unwrap_or_default();
}

/// What arrived from the far end.
enum Arrived {
    /// There is [`Far::payload`].
    Data,
    /// Its direction has ended.
    Fin,
}

/// The end that is not the application. An error is how the connection ends.
trait Far {
    /// Bytes in front of the payload that [`Far::poll_send`] wants to write on.
    const GAP: usize;
    /// Whether a reset can be seen by receiving after the far end's direction has ended.
    const RECEIVES_AFTER_FIN: bool;

    /// Sends `up`, which is gap and payload, or what an earlier call left of it.
    fn poll_send(&mut self, cx: &mut Context<'_>, up: &mut Buf) -> Poll<Result<(), Outcome>>;
    /// Ends the direction; a [`Far::poll_send`] follows.
    fn finish(&mut self) -> Result<(), Outcome>;
    /// Receives about `most` bytes, after all payload has been taken.
    fn poll_receive(&mut self, cx: &mut Context<'_>, most: usize)
    -> Poll<Result<Arrived, Outcome>>;
    /// The same of an end that has broken: whatever has arrived, also if the runtime has yet to hear of it.
    fn poll_last(&mut self, cx: &mut Context<'_>) -> Poll<Result<Arrived, Outcome>> {
        self.poll_receive(cx, BUDGET)
    }
    /// What was received and not taken.
    fn payload(&self) -> &[u8];
    /// Removes payload from the front.
    fn taken(&mut self, len: usize);
    /// Ends both directions because the application's connection broke.
    fn reset(&mut self, reason: ResetReason);
    /// The same because nothing more may cross.
    fn cut(&mut self, reason: ResetReason) {
        self.reset(reason);
    }
}

/// What a direction stands at after a poll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    /// Waits for bytes.
    Starved,
    /// Waits for the end that is to take them.
    Blocked,
    /// Has used its budget.
    Tired,
    /// Its end has crossed.
    Ended,
}

/// A connection that is being relayed.
struct Relay<'a, F> {
    app_read: ReadHalf<'a>,
    app_write: &'a WriteHalf<'a>,
    far: F,
    up: Buf,
    up_ended: bool,
    down_ended: bool,
    /// Something was written to the application: from then on the runtime knows whether it takes more.
    written: bool,
    up_turn: Turn,
    down_turn: Turn,
    live: &'a Live,
}

/// Runs a relay. `far_broken` completes when the far end broke in a way that receiving does not show,
/// `cut` with what has happened when nothing more may cross.
async fn run<F: Far>(
    app: &mut TcpStream,
    far: F,
    far_broken: impl Future<Output = Outcome>,
    mut cut: impl Future<Output = Outcome> + Unpin,
    up: Buf,
    live: &Live,
) -> RelayEnd {
    let (app_read, app_write) = app.split();
    let mut app_broken = pin!(app_write.as_ref().ready(Interest::ERROR));
    let mut far_broken = pin!(far_broken);
    let mut relay = Relay {
        app_read,
        app_write: &app_write,
        far,
        up,
        up_ended: false,
        down_ended: false,
        written: false,
        up_turn: Turn::default(),
        down_turn: Turn::default(),
        live,
    };
    let outcome = poll_fn(|cx| {
        // First: not a byte of a peer that is not trusted any more.
        if let Poll::Ready(outcome) = Pin::new(&mut cut).poll(cx) {
            return Poll::Ready(outcome);
        }
        // Before up: an application begins with what came along with the request while the answer, which
        // the flow still holds, is on its way.
        let down = match relay.poll_down(cx) {
            Ok(direction) => direction,
            Err(outcome) => return Poll::Ready(outcome),
        };
        let up = match relay.poll_up(cx) {
            Ok(direction) => direction,
            Err(outcome) => return Poll::Ready(outcome),
        };
        if relay.up_turn.copied + relay.down_turn.copied > 0 {
            polling::worked();
        }
        if (up, down) == (Direction::Ended, Direction::Ended) {
            return Poll::Ready(Outcome::Clean);
        }
        // A socket that is being read shows its reset there; one that is not must be watched.
        if matches!(up, Direction::Ended | Direction::Blocked)
            && app_broken.as_mut().poll(cx).is_ready()
        {
            let error = app_write.as_ref().take_error().ok().flatten();
            return Poll::Ready(application_reset(error.as_ref()));
        }
        if matches!(down, Direction::Ended | Direction::Blocked)
            && let Poll::Ready(outcome) = far_broken.as_mut().poll(cx)
        {
            return Poll::Ready(outcome);
        }
        if up == Direction::Tired || down == Direction::Tired {
            give_way(cx);
        }
        Poll::Pending
    })
    .await;
    match outcome {
        Outcome::ApplicationReset(reason) => relay.far.reset(reason),
        Outcome::Distrusted(_) => relay.far.cut(ResetReason::Denied),
        Outcome::Overloaded => relay.far.cut(ResetReason::Internal),
        _ => {}
    }
    RelayEnd { sent: live.sent.load(Relaxed), received: live.received.load(Relaxed), outcome }
}

impl<F: Far> Relay<'_, F> {
    fn poll_up(&mut self, cx: &mut Context<'_>) -> Result<Direction, Outcome> {
        self.up_turn.begin();
        let direction = self.copy_up(cx);
        self.up_turn.end();
        direction
    }

    fn copy_up(&mut self, cx: &mut Context<'_>) -> Result<Direction, Outcome> {
        loop {
            match self.far.poll_send(cx, &mut self.up) {
                Poll::Pending => return Ok(Direction::Blocked),
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(outcome)) => return Err(self.last_of_far(cx, outcome)),
            }
            if self.up_ended {
                return Ok(Direction::Ended);
            }
            let most = self.up_turn.left();
            if most == 0 {
                return Ok(Direction::Tired);
            }
            let room = up_to(most, &mut self.up.room()[F::GAP..]);
            match read_ready(&mut self.app_read, cx, room) {
                Poll::Ready(Ok(len @ 1..)) => {
                    self.up.fill(F::GAP + len);
                    count(&self.live.sent, len);
                    self.up_turn.copied(len);
                }
                Poll::Ready(Ok(_)) => {
                    self.up.release();
                    if let Err(outcome) = self.far.finish() {
                        return Err(self.last_of_far(cx, outcome));
                    }
                    self.up_ended = true;
                }
                Poll::Ready(Err(error)) => {
                    self.up.release();
                    return Err(application_reset(Some(&error)));
                }
                Poll::Pending => {
                    self.up.release();
                    return Ok(Direction::Starved);
                }
            }
        }
    }

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Result<Direction, Outcome> {
        self.down_turn.begin();
        let direction = self.copy_down(cx);
        self.down_turn.end();
        direction
    }

    fn copy_down(&mut self, cx: &mut Context<'_>) -> Result<Direction, Outcome> {
        loop {
            while !self.far.payload().is_empty() {
                match self.write() {
                    Ok(len) => {
                        self.far.taken(len);
                        count(&self.live.received, len);
                        self.down_turn.copied(len);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        match self.app_write.as_ref().poll_write_ready(cx) {
                            Poll::Pending => return Ok(Direction::Blocked),
                            Poll::Ready(Ok(())) => {}
                            Poll::Ready(Err(error)) => {
                                return Err(self.last_of_application(cx, &error));
                            }
                        }
                    }
                    Err(error) => return Err(self.last_of_application(cx, &error)),
                }
            }
            if self.down_ended && (self.up_ended || !F::RECEIVES_AFTER_FIN) {
                return Ok(Direction::Ended);
            }
            let most = self.down_turn.left();
            if most == 0 {
                return Ok(Direction::Tired);
            }
            match self.far.poll_receive(cx, most) {
                Poll::Ready(Ok(Arrived::Data)) => {}
                Poll::Ready(Ok(Arrived::Fin)) => {
                    let socket = SockRef::from(self.app_write.as_ref());
                    if let Err(error) = socket.shutdown(Shutdown::Write) {
                        return Err(self.last_of_application(cx, &error));
                    }
                    self.down_ended = true;
                }
                Poll::Ready(Err(outcome)) => return Err(outcome),
                Poll::Pending if self.down_ended => return Ok(Direction::Ended),
                Poll::Pending => return Ok(Direction::Starved),
            }
        }
    }

    /// Writes payload to the application. At first without asking the runtime, which has yet to hear from
    /// the kernel that a connection takes bytes: one that was just made does.
    fn write(&mut self) -> io::Result<usize> {
        if mem::replace(&mut self.written, true) {
            self.app_write.try_write(self.far.payload())
        } else {
            (&*SockRef::from(self.app_write.as_ref())).write(self.far.payload())
        }
    }
}

/// Reads what a socket has if the runtime knows that it has something.
fn read_ready(
    socket: &mut ReadHalf<'_>,
    cx: &mut Context<'_>,
    room: &mut [u8],
) -> Poll<io::Result<usize>> {
    let mut room = ReadBuf::new(room);
    Pin::new(socket).poll_read(cx, &mut room).map_ok(|()| room.filled().len())
}

/// The front of `room`.
fn up_to(most: usize, room: &mut [u8]) -> &mut [u8] {
    let most = room.len().min(most);
    &mut room[..most]
}

/// Lets everything else that is ready run first, and looks for what has become ready: a plain wake-up
/// would put this task behind those that are known to be ready, and before the sockets that are not
/// looked at meanwhile.
fn give_way(cx: &mut Context<'_>) {
    let yielded = pin!(tokio::task::yield_now());
    // Pending at its first poll, after which the runtime wakes this task.
    if yielded.poll(cx).is_ready() {
        cx.waker().wake_by_ref();
    }
}

fn application_reset(error: Option<&io::Error>) -> Outcome {
    Outcome::ApplicationReset(match error.map(io::Error::kind) {
        Some(io::ErrorKind::TimedOut) => ResetReason::TimedOut,
        _ => ResetReason::Application,
    })
}

fn count(counter: &AtomicU64, len: usize) {
    counter.fetch_add(u64::try_from(len).unwrap_or(u64::MAX), Relaxed);
}
