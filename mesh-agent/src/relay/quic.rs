//! A QUIC stream as the far end.

use std::future::pending;
use std::pin::pin;
use std::task::{Context, Poll};

use mesh_core::wire::ResetReason;
use tokio::net::TcpStream;

use super::{Arrived, Far, Live, Outcome, RelayEnd, up_to};
use crate::tunnel::{Buf, QuicFlow, StreamError};

struct QuicEnd<'a> {
    flow: &'a mut QuicFlow,
    down: Buf,
}

pub(super) async fn run(app: &mut TcpStream, flow: &mut QuicFlow, live: &Live) -> RelayEnd {
    let stopped = flow.stopped();
    // Once the far end has finished its stream, a reset can only come as STOP_SENDING.
    let broken = async {
        match stopped.await {
            Some(error) => outcome(error),
            None => pending().await,
        }
    };
    let (proof, given_up) = (flow.proof(), flow.given_up());
    let cut = pin!(async {
        tokio::select! {
            refused = proof.withdrawn() => Outcome::Distrusted(refused),
            () = given_up => Outcome::Overloaded,
        }
    });
    let far = QuicEnd { flow, down: Buf::default() };
    super::run(app, far, broken, cut, Buf::default(), live).await
}

impl Far for QuicEnd<'_> {
    const GAP: usize = 0;
    const RECEIVES_AFTER_FIN: bool = false;

    fn poll_send(&mut self, cx: &mut Context<'_>, up: &mut Buf) -> Poll<Result<(), Outcome>> {
        while !up.is_empty() {
            match self.flow.poll_write(cx, up.bytes()) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(len)) => up.consume(len),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(outcome(error))),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn finish(&mut self) -> Result<(), Outcome> {
        self.flow.finish_sending().map_err(outcome)
    }

    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        most: usize,
    ) -> Poll<Result<Arrived, Outcome>> {
        let read = self.flow.poll_read(cx, up_to(most, self.down.room()));
        self.down.fill(match read {
            Poll::Ready(Ok(len)) => len,
            _ => 0,
        });
        self.down.release();
        read.map_ok(|len| if len == 0 { Arrived::Fin } else { Arrived::Data }).map_err(outcome)
    }

    fn payload(&self) -> &[u8] {
        self.down.bytes()
    }

    fn taken(&mut self, len: usize) {
        self.down.consume(len);
    }

    /// Not yet: [`QuicFlow::reset_behind`].
    fn reset(&mut self, _reason: ResetReason) {}

    fn cut(&mut self, reason: ResetReason) {
        self.flow.reset(reason);
    }
}

fn outcome(error: StreamError) -> Outcome {
    match error {
        StreamError::Reset(reason) => Outcome::PeerReset(reason),
        StreamError::Lost => Outcome::TunnelLost,
    }
}
