//! Another application's connection as the far end: both pods are on this node.

use std::future::pending;
use std::io;
use std::net::Shutdown;
use std::task::{Context, Poll};

use mesh_core::wire::ResetReason;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use super::{
    Arrived, BUDGET, Far, Live, Outcome, RelayEnd, count, read_ready, read_unasked, up_to,
};
use crate::tunnel::{Buf, Held};

struct LocalEnd<'a> {
    read: ReadHalf<'a>,
    write: &'a WriteHalf<'a>,
    down: Buf,
}

/// `held` was read from `app` before there was a far end.
pub(super) async fn run(
    app: &mut TcpStream,
    far: &mut TcpStream,
    held: Held,
    live: &Live,
) -> RelayEnd {
    let mut up = Buf::default();
    if up.push(held.bytes()) {
        count(&live.sent, held.bytes().len());
    }
    drop(held);
    let (read, write) = far.split();
    let end = LocalEnd { read, write: &write, down: Buf::default() };
    let broken = async {
        // Which error it was does not matter: the application gets RST.
        drop(write.as_ref().ready(Interest::ERROR).await);
        Outcome::PeerReset(ResetReason::Application)
    };
    // Both are pods of this node: its own word for it.
    super::run(app, end, broken, pending(), up, live).await
}

/// The far application's connection broke.
fn far_reset(error: &io::Error) -> Outcome {
    Outcome::PeerReset(match error.kind() {
        io::ErrorKind::TimedOut => ResetReason::TimedOut,
        _ => ResetReason::Application,
    })
}

impl LocalEnd<'_> {
    /// Up to `most` bytes that `receive` receives.
    fn next(
        &mut self,
        most: usize,
        receive: impl FnOnce(&mut ReadHalf<'_>, &mut [u8]) -> Poll<io::Result<usize>>,
    ) -> Poll<Result<Arrived, Outcome>> {
        let read = receive(&mut self.read, up_to(most, self.down.room()));
        self.down.fill(match read {
            Poll::Ready(Ok(len)) => len,
            _ => 0,
        });
        self.down.release();
        let arrived = |len| if len == 0 { Arrived::Fin } else { Arrived::Data };
        read.map_ok(arrived).map_err(|error| far_reset(&error))
    }
}

impl Far for LocalEnd<'_> {
    const GAP: usize = 0;
    const RECEIVES_AFTER_FIN: bool = false;

    fn poll_send(&mut self, cx: &mut Context<'_>, up: &mut Buf) -> Poll<Result<(), Outcome>> {
        while !up.is_empty() {
            match self.write.try_write(up.bytes()) {
                Ok(len) => up.consume(len),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    match self.write.as_ref().poll_write_ready(cx) {
                        Poll::Pending => return Poll::Pending,
                        Poll::Ready(Ok(())) => {}
                        Poll::Ready(Err(error)) => return Poll::Ready(Err(far_reset(&error))),
                    }
                }
                Err(error) => return Poll::Ready(Err(far_reset(&error))),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn finish(&mut self) -> Result<(), Outcome> {
        let ended = SockRef::from(self.write.as_ref()).shutdown(Shutdown::Write);
        ended.map_err(|error| far_reset(&error))
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
        self.down.bytes()
    }

    fn taken(&mut self, len: usize) {
        self.down.consume(len);
    }

    /// Dropping the socket is the reset: it closes with RST.
    fn reset(&mut self, _reason: ResetReason) {}
}
