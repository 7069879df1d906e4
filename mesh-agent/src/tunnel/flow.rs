//! A flow: what the relay copies to and from, and the request for one.

use std::io::Read as _;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_core::spiffe::SpiffeId;
use mesh_core::wire::{MAX_EARLY, Open, Reason, Refusal, encode_answer};
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::Carrier;
use super::buffers::Buf;
use super::lane::{Lane, LaneEvent};
use super::pool::Lease;
use super::stream::{QuicAnswer, QuicFlow};

/// The application's first payload, sent before the peer had answered. Kept until it is known that
/// the flow is accepted, so that another endpoint can be tried with the same bytes.
#[derive(Debug, Default)]
pub struct Held {
    /// At most [`MAX_EARLY`] bytes.
    bytes: Vec<u8>,
    /// The application has ended its direction behind these bytes.
    ended: bool,
}

impl Held {
    /// What was read so far.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether it makes sense to read more from the application before the answer.
    pub(super) fn wants_more(&self) -> bool {
        !self.ended && self.bytes.len() < MAX_EARLY
    }

    /// Reads what is there, without waiting. Returns the bytes that are new.
    pub(super) fn read(&mut self, app: &TcpStream) -> std::io::Result<&[u8]> {
        self.read_by(|room| app.try_read(room))
    }

    /// The same where the runtime does not know yet whether there is anything, since the connection has
    /// only just been accepted: most applications have written by then, and what goes along with OPEN
    /// is a packet less, and a turn of both agents.
    pub(super) fn read_unasked(&mut self, app: &TcpStream) -> std::io::Result<&[u8]> {
        self.read_by(|room| (&*SockRef::from(app)).read(room))
    }

    fn read_by(
        &mut self,
        read: impl FnOnce(&mut [u8]) -> std::io::Result<usize>,
    ) -> std::io::Result<&[u8]> {
        let old = self.bytes.len();
        // By way of a buffer that was written to before: room for all that may come would have to be
        // zeroed for each connection, and most send a few hundred bytes.
        let mut buffer = Buf::default();
        let room = &mut buffer.room()[..MAX_EARLY - old];
        let result = read(room);
        self.bytes.extend_from_slice(&room[..*result.as_ref().unwrap_or(&0)]);
        match result {
            Ok(0) => self.ended = true,
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
        Ok(&self.bytes[old..])
    }
}

/// A flow that both ends have accepted. Dropping it resets it: the far application gets RST.
#[derive(Debug)]
pub enum Flow {
    /// On a lane.
    Lane(LaneFlow),
    /// On a stream of a QUIC connection. Boxed: every task that passes a flow on holds it several times.
    Quic(Box<QuicFlow>),
    /// Source and destination are on this node: socket to socket.
    Local(TcpStream),
}

impl Flow {
    /// How it is carried.
    pub fn carrier(&self) -> Carrier {
        match self {
            Self::Lane(_) => Carrier::Lane,
            Self::Quic(_) => Carrier::Quic,
            Self::Local(_) => Carrier::Local,
        }
    }
}

/// A lane with a flow on it, and where the lane goes afterwards.
#[derive(Debug)]
pub struct LaneFlow {
    pub(crate) lane: Box<Lane>,
    home: Home,
}

#[derive(Debug)]
enum Home {
    /// The client's pool.
    Pool(Lease),
    /// The server's loop, which waits for the next OPEN.
    Server(Arc<Slot>),
}

impl LaneFlow {
    pub(super) fn of_client(lane: Box<Lane>, lease: Lease) -> Self {
        Self { lane, home: Home::Pool(lease) }
    }

    /// A reset is the last that was sent. With bytes of the peer's unread the kernel would close the lane with RST and
    /// drop what has not left yet, that reset and what lies before it.
    pub(crate) async fn reset_behind(self) {
        /// More than the socket can have received (`tcp_rmem`: 6 MiB by default), and some that is on its way.
        const UPLOAD: usize = 16 << 20;
        self.lane.linger(UPLOAD).await;
    }

    /// Both directions have ended cleanly: the lane can take another flow, a client's as `reuse` says. A server has read
    /// all that came before.
    pub(crate) fn finish(self, reuse: Reuse) {
        match self.home {
            Home::Pool(lease) => lease.give_back(self.lane, reuse),
            Home::Server(slot) => slot.put(self.lane),
        }
    }
}

/// Whether a client's lane can take another flow after one that has ended cleanly. The far agent may not have read all of
/// that one yet: its application took no more, and what the kernels had room for was sent all the same. Nothing tells
/// a client so, and another flow's OPEN would wait behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reuse {
    /// The next one: all that was sent has found room in the application's socket.
    Next,
    /// Before another one is made: all was acknowledged, and sent while the application had not ended its direction.
    Last,
    /// No other one.
    Never,
}

impl Reuse {
    /// So much finds room in the application's socket, whether it reads or not: less than a sender's buffer of a
    /// connection within a node has at first (`tcp_init_buffer_space()` in Linux).
    const UNQUESTIONED: u64 = 64 << 10;
    /// A handshake costs less than this much payload.
    const MOST: u64 = 1 << 20;

    /// After a flow that has `sent` so many bytes; `late` if some of them came after the far application had ended its
    /// direction, as one does that has an answer already.
    pub(crate) fn after(sent: u64, late: bool, is_acknowledged: impl FnOnce() -> bool) -> Self {
        match sent {
            ..=Self::UNQUESTIONED => Self::Next,
            ..=Self::MOST if !late && is_acknowledged() => Self::Last,
            _ => Self::Never,
        }
    }
}

/// Where a server's lane comes back to after its flow. Empty means that the lane is gone.
#[derive(Debug, Default)]
pub(super) struct Slot(Mutex<Option<Box<Lane>>>);

impl Slot {
    pub(super) fn put(&self, lane: Box<Lane>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(lane);
    }

    pub(super) fn take(&self) -> Option<Box<Lane>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A flow that a peer asks for. Answer it with [`Request::accept`] or [`Request::refuse`]; dropping
/// it unanswered ends its carrier, and the peer takes it for lost.
#[derive(Debug)]
pub struct Request {
    /// What it asks for.
    pub open: Open,
    /// Who asks, from the certificate.
    pub caller: SpiffeId,
    /// Which workload of this node it meant.
    pub served_as: SpiffeId,
    /// Where the carrier comes from.
    pub peer: SocketAddr,
    pub(super) answer: AnswerOn,
}

/// Where a request is answered.
#[derive(Debug)]
pub(super) enum AnswerOn {
    Lane { lane: Box<Lane>, slot: Arc<Slot>, patience: Duration },
    Quic(QuicAnswer),
}

impl Request {
    /// How it is carried.
    pub fn carrier(&self) -> Carrier {
        match self.answer {
            AnswerOn::Lane { .. } => Carrier::Lane,
            AnswerOn::Quic(_) => Carrier::Quic,
        }
    }

    /// Tells the peer that the flow is taken; on a lane when the relay first sends, so that the
    /// application has the flow's first bytes before. `None` if the carrier has broken meanwhile.
    pub async fn accept(self) -> Option<Flow> {
        match self.answer {
            AnswerOn::Lane { mut lane, slot, .. } => {
                lane.codec.queue(&encode_answer(Ok(()))).ok()?;
                Some(Flow::Lane(LaneFlow { lane, home: Home::Server(slot) }))
            }
            AnswerOn::Quic(answer) => answer.accept().await.map(|flow| Flow::Quic(Box::new(flow))),
        }
    }

    /// Tells the peer why the flow is not taken, and frees the carrier for the next one.
    pub async fn refuse(self, refusal: Refusal) {
        match self.answer {
            AnswerOn::Lane { lane, slot, patience } => {
                let reason = refusal.reason;
                // In case of doubt the lane is dropped: the peer makes another one.
                if let Ok(Some(lane)) = timeout(patience, refuse_on_lane(lane, refusal)).await {
                    match reason {
                        Reason::Draining | Reason::CallerCertificate => lane.close().await,
                        _ => slot.put(lane),
                    }
                }
            }
            AnswerOn::Quic(answer) => answer.refuse(refusal).await,
        }
    }
}

/// Sends the refusal and discards the payload that was sent with the request.
async fn refuse_on_lane(mut lane: Box<Lane>, refusal: Refusal) -> Option<Box<Lane>> {
    lane.codec.queue(&encode_answer(Err(refusal))).ok()?;
    lane.flush().await.ok()?;
    let mut discarded = 0;
    loop {
        match lane.next_event().await.ok()? {
            LaneEvent::Data => {
                let len = lane.codec.payload().len();
                lane.codec.taken(len);
                discarded += len;
                if discarded > MAX_EARLY {
                    return None;
                }
            }
            LaneEvent::Fin => return Some(lane),
            _ => return None,
        }
    }
}
