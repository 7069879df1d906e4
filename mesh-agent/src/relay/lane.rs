//! A lane as the far end.

use std::future::pending;
use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Duration;

use mesh_core::wire::{HEADER_LEN, ResetReason};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::time::sleep;

use super::{Arrived, BUDGET, Far, Live, Outcome, RelayEnd, read_ready, read_unasked};
use crate::net;
use crate::tunnel::{Buf, Codec, Lane, LaneError, LaneEvent, LaneFlow, Reuse};

/// More than a FIN takes in its record: what is last on its way has just been sent.
const FIN_RECORD: usize = 64;

/// A socket and the bytes of its lane.
struct LaneEnd<'a> {
    read: ReadHalf<'a>,
    write: WriteHalf<'a>,
    codec: &'a mut Codec,
    /// The far direction has ended,
    fin: bool,
    /// and payload was sent after that.
    late: &'a mut bool,
}

pub(super) async fn run(
    app: &mut TcpStream,
    flow: &mut LaneFlow,
    live: &Live,
) -> (RelayEnd, Reuse) {
    let Lane { tcp, codec, proof, .. } = &mut *flow.lane;
    let fd = tcp.as_raw_fd();
    let (read, write) = tcp.split();
    let mut late = false;
    let far = LaneEnd { read, write, codec, fin: false, late: &mut late };
    // A lane is read as long as its flow lasts. While the application does not take what came, the
    // lane's end is of no interest: behind it may lie bytes that are still to be delivered.
    let cut = pin!(async {
        tokio::select! {
            reason = proof.withdrawn() => Outcome::Distrusted(reason),
            () = gone(fd) => Outcome::TunnelLost,
        }
    });
    let end = super::run(app, far, pending(), cut, Buf::default(), live).await;
    let is_acknowledged = || net::unacknowledged(fd).is_ok_and(|bytes| bytes <= FIN_RECORD);
    (end, Reuse::after(end.sent, late, is_acknowledged))
}

/// Completes when the peer's node has vanished with bytes on their way to it, 15 to 20 s after the first of them. The kernel would go on
/// sending them for a quarter of an hour, and without bytes its keepalive notices. `TCP_USER_TIMEOUT`
/// cannot tell: it counts also while the other side acknowledges and has no room (`tcp_probe_timer` in
/// Linux), which an application that does not read may make last for ever.
async fn gone(fd: RawFd) {
    const GONE: Duration = Duration::from_secs(15);
    const LOOK: Duration = Duration::from_secs(5);
    // So many looks in a row after the first one that finds it owing make that time too: an idle lane has heard
    // nothing for long when it begins to owe, and that counts for nothing.
    const LOOKS: u32 = 3;

    let mut owing = 0;
    loop {
        sleep(LOOK).await;
        let silence = net::silence(fd).ok().flatten();
        owing = if silence.is_some() { owing + 1 } else { 0 };
        if owing > LOOKS && silence.is_some_and(|time| time >= GONE) {
            return;
        }
    }
}

impl LaneEnd<'_> {
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Outcome>> {
        while !self.codec.outgoing().is_empty() {
            match self.write.try_write(self.codec.outgoing()) {
                Ok(len) => self.codec.sent(len),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    match self.write.as_ref().poll_write_ready(cx) {
                        Poll::Pending => return Poll::Pending,
                        Poll::Ready(Ok(())) => {}
                        Poll::Ready(Err(_)) => return Poll::Ready(Err(Outcome::TunnelLost)),
                    }
                }
                Err(_) => return Poll::Ready(Err(Outcome::TunnelLost)),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl LaneEnd<'_> {
    /// What the lane has next, of which about `most` bytes are received by `receive` if there is nothing yet.
    fn next(
        &mut self,
        most: usize,
        mut receive: impl FnMut(&mut ReadHalf<'_>, &mut [u8]) -> Poll<io::Result<usize>>,
    ) -> Poll<Result<Arrived, Outcome>> {
        loop {
            match self.codec.event() {
                Ok(Some(LaneEvent::Data)) => return Poll::Ready(Ok(Arrived::Data)),
                Ok(Some(LaneEvent::Fin)) => {
                    self.fin = true;
                    return Poll::Ready(Ok(Arrived::Fin));
                }
                Ok(Some(LaneEvent::Reset(reason))) => {
                    return Poll::Ready(Err(Outcome::PeerReset(reason)));
                }
                // An end without FIN is not an end.
                Ok(Some(LaneEvent::Closed)) => return Poll::Ready(Err(Outcome::TunnelLost)),
                Ok(Some(_)) => return Poll::Ready(Err(Outcome::Protocol)),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Err(broken(&error))),
            }
            let read = receive(&mut self.read, self.codec.room(most));
            let len = match read {
                Poll::Ready(Ok(len)) => len,
                _ => 0,
            };
            self.codec.received(len);
            match read {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(1..)) => {}
                Poll::Ready(_) => return Poll::Ready(Err(Outcome::TunnelLost)),
            }
        }
    }
}

impl Far for LaneEnd<'_> {
    const GAP: usize = HEADER_LEN;
    const RECEIVES_AFTER_FIN: bool = true;

    fn poll_send(&mut self, cx: &mut Context<'_>, up: &mut Buf) -> Poll<Result<(), Outcome>> {
        // What `up` holds is sealed when all before it has gone: one write takes all of its records.
        loop {
            if self.poll_flush(cx)?.is_pending() {
                return Poll::Pending;
            }
            if up.is_empty() {
                return Poll::Ready(Ok(()));
            }
            *self.late |= self.fin;
            if self.codec.queue_payload(up).is_err() {
                return Poll::Ready(Err(Outcome::TunnelLost));
            }
        }
    }

    fn finish(&mut self) -> Result<(), Outcome> {
        self.codec.queue_fin().map_err(|_closed| Outcome::TunnelLost)
    }

    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        most: usize,
    ) -> Poll<Result<Arrived, Outcome>> {
        self.next(most, |read, room| read_ready(read, cx, room))
    }

    fn poll_last(&mut self, _cx: &mut Context<'_>) -> Poll<Result<Arrived, Outcome>> {
        self.next(BUDGET, |read, room| read_unasked(read, room))
    }

    fn payload(&self) -> &[u8] {
        self.codec.payload()
    }

    fn taken(&mut self, len: usize) {
        self.codec.taken(len);
    }

    fn reset(&mut self, reason: ResetReason) {
        if self.codec.queue_reset(reason).is_ok() {
            // What the socket does not take now is lost with the lane, whose end is a reset too, only
            // without the reason.
            while let Ok(len @ 1..) = self.write.try_write(self.codec.outgoing()) {
                self.codec.sent(len);
            }
        }
    }
}

fn broken(error: &LaneError) -> Outcome {
    match error {
        LaneError::Wire(_) => Outcome::Protocol,
        _ => Outcome::TunnelLost,
    }
}
