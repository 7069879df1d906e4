//! What an end said in front of its reset: an answer to a request that it did not read to its end, or an error.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::task::{Context, Poll};

use socket2::SockRef;
use tokio::net::tcp::ReadHalf;

use super::{Arrived, Far, Outcome, Relay, application_reset, count};

/// At most so much is looked through for the last words of an end that has broken: more than its socket can have
/// received (`tcp_rmem`: 6 MiB by default).
const LAST_WORDS: usize = 8 << 20;

impl<F: Far> Relay<'_, F> {
    /// The application takes nothing more. What it wrote before lies in front of its reset, unread (Linux drops only
    /// what was on its way to it): as much of it crosses as the far end has room for at once.
    pub(super) fn last_of_application(
        &mut self,
        cx: &mut Context<'_>,
        error: &io::Error,
    ) -> Outcome {
        let mut left = LAST_WORDS;
        while left > 0
            && !self.up_ended
            && matches!(self.far.poll_send(cx, &mut self.up), Poll::Ready(Ok(())))
        {
            // Without asking the runtime, which has yet to hear from the kernel that there is something.
            let room = &mut self.up.room()[F::GAP..];
            let read = (&*SockRef::from(self.app_write.as_ref())).read(room);
            let Ok(len @ 1..) = read else {
                self.up.release();
                // The writing call was told of the reset, and after that the kernel tells of an end. There was one
                // if the call was told EPIPE (`tcp_reset()` in CLOSE_WAIT), and of `shutdown()`, which is told nothing.
                let before = [io::ErrorKind::BrokenPipe, io::ErrorKind::NotConnected];
                let has_ended = before.contains(&error.kind()) && read.is_ok();
                if has_ended && self.far.finish().is_ok() {
                    self.up_ended = true;
                    // What there is no room for is lost to the reset.
                    let _sent = self.far.poll_send(cx, &mut self.up);
                }
                break;
            };
            self.up.fill(F::GAP + len);
            count(&self.live.sent, len);
            left = left.saturating_sub(len);
        }
        application_reset(Some(error))
    }

    /// The far end takes nothing more, because of this `outcome`. What it sent before lies in front of that, unread,
    /// and behind it perhaps a reset, which says best why: the application gets as much of it as it takes at once.
    pub(super) fn last_of_far(&mut self, cx: &mut Context<'_>, outcome: Outcome) -> Outcome {
        let mut left = LAST_WORDS;
        let mut takes = !self.down_ended;
        while left > 0 {
            let waits = self.far.payload().len();
            if waits > 0 {
                // Nothing follows what it does not take, or it would miss bytes in between.
                let mut socket = &*SockRef::from(self.app_write.as_ref());
                let written = if takes { socket.write(self.far.payload()).unwrap_or(0) } else { 0 };
                takes = written == waits;
                count(&self.live.received, written);
                self.far.taken(waits);
                left = left.saturating_sub(waits);
            }
            match self.far.poll_last(cx) {
                Poll::Ready(Ok(Arrived::Data)) => {}
                Poll::Ready(Ok(Arrived::Fin)) if F::RECEIVES_AFTER_FIN => {
                    if takes {
                        // It is about to be told of a reset, whatever becomes of this.
                        let socket = SockRef::from(self.app_write.as_ref());
                        socket.shutdown(Shutdown::Write).unwrap_or_default();
                    }
                    takes = false;
                }
                Poll::Ready(Err(outcome)) => return outcome,
                Poll::Ready(Ok(Arrived::Fin)) | Poll::Pending => return outcome,
            }
        }
        outcome
    }
}

/// Reads what a socket has, also if the runtime has yet to hear from the kernel that there is something.
pub(super) fn read_unasked(socket: &ReadHalf<'_>, room: &mut [u8]) -> Poll<io::Result<usize>> {
    match (&*SockRef::from(socket.as_ref())).read(room) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
        read => Poll::Ready(read),
    }
}
