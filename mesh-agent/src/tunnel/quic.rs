//! QUIC: one connection per peer, a bidirectional stream per flow.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use mesh_core::wire::{
    Answer, Decoder, Event, HEADER_LEN, MAX_EARLY, Open, Reason, Refusal, ResetReason, Role,
    encode_answer,
};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    Connection, ConnectionError, ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig,
    MtuDiscoveryConfig, ReadError, ReadExactError, RecvStream, SendStream, TransportConfig, VarInt,
    WriteError,
};
use rustls::AlertDescription;
use rustls::pki_types::CertificateDer;
use tokio::time::timeout;

use super::config::TunnelConfig;
use super::error::DialError;
use super::pool::Lease;
use super::proof::Proof;
use super::reset_key::ResetKey;
use super::stats::{Gauged, TunnelStats};
use super::tls;
use crate::identity::verify::PeerRefused;

/// How long the last bytes of a flow may take to be acknowledged when its connection is going away.
const LAST_BYTES: Duration = Duration::from_secs(2);

/// Between two stateless resets.
const BETWEEN_RESETS: Duration = Duration::from_millis(1);

/// Who was not heard for this long may be gone: the next flow asks before it sends payload.
const QUIET: Duration = Duration::from_secs(1);

/// How long after its last flow a connection is kept for what was sent last: several round trips.
const SETTLED: Duration = Duration::from_millis(300);

/// Ids of a server's connections: 64 random bits. quinn's own have 24, and a check by a key of the
/// process: the next agent would take none of them for a connection's, or, knowing that key, would soon
/// give an id to two connections, whose reset tokens are then the same (RFC 9000 section 10.3.2).
#[derive(Debug)]
struct RandomIds;

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; size_of::<u64>()];
        #[expect(clippy::expect_used, reason = "aws-lc ends the process rather than fail here")]
        aws_lc_rs::rand::fill(&mut id).expect("randomness");
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        size_of::<u64>()
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// What had arrived from the peer when somebody looked.
#[derive(Debug)]
struct Heard {
    datagrams: u64,
    at: Instant,
}

/// A QUIC connection to a peer and how much it is used. Clones are the same connection.
#[derive(Clone, Debug)]
pub(super) struct QuicLink(Arc<Link>);

#[derive(Debug)]
struct Link {
    connection: Connection,
    /// Who the peer is, as long as it is trusted.
    proof: Arc<Proof>,
    /// After this no further flow begins: a certificate ends.
    expires: Instant,
    flows: AtomicUsize,
    /// When the last flow ended.
    idle_since: Mutex<Instant>,
    /// No further flow begins on it.
    retiring: AtomicBool,
    /// When the peer was last known to live.
    heard: Mutex<Heard>,
    /// The peer has accepted a flow on it.
    accepted: AtomicBool,
    _open: Gauged,
}

impl QuicLink {
    pub(super) fn new(
        connection: Connection,
        proof: Arc<Proof>,
        expires: Instant,
        stats: &Arc<TunnelStats>,
    ) -> Self {
        Self(Arc::new(Link {
            connection,
            proof,
            expires,
            flows: AtomicUsize::new(0),
            idle_since: Mutex::new(Instant::now()),
            retiring: AtomicBool::new(false),
            heard: Mutex::new(Heard { datagrams: 0, at: Instant::now() }),
            accepted: AtomicBool::new(false),
            _open: Gauged::new(stats, |stats| &stats.quic_connections),
        }))
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.0.connection
    }

    /// Whether a flow may begin on it.
    pub(super) fn is_usable(&self, now: Instant) -> bool {
        self.0.expires > now
            && !self.is_distrusted()
            && !self.0.retiring.load(Relaxed)
            && self.0.connection.close_reason().is_none()
    }

    /// Whether the peer is not trusted any more.
    pub(super) fn is_distrusted(&self) -> bool {
        self.0.proof.refused().is_some()
    }

    /// Flows on it now.
    pub(super) fn flows(&self) -> usize {
        self.0.flows.load(Relaxed)
    }

    /// Since when it has had no flow; `None` if it has one.
    pub(super) fn idle_for(&self, now: Instant) -> Option<Duration> {
        let since = *self.0.idle_since.lock().unwrap_or_else(PoisonError::into_inner);
        (self.flows() == 0).then(|| now.saturating_duration_since(since))
    }

    /// No further flow begins, and those that end from now on wait until the peer has all of them.
    pub(super) fn retire(&self) {
        self.0.retiring.store(true, Relaxed);
    }

    /// Looks whether anything has come from the peer since the last look. Called every second; a flow
    /// that begins looks too.
    pub(super) fn listen(&self, now: Instant) {
        let datagrams = self.0.connection.stats().udp_rx.datagrams;
        let mut heard = self.0.heard.lock().unwrap_or_else(PoisonError::into_inner);
        if heard.datagrams != datagrams {
            *heard = Heard { datagrams, at: now };
        }
    }

    /// Whether nothing has come from the peer for a while: its agent may have been killed, and whatever
    /// is sent now may be lost.
    pub(super) fn is_quiet(&self, now: Instant) -> bool {
        self.listen(now);
        let heard = self.0.heard.lock().unwrap_or_else(PoisonError::into_inner);
        now.saturating_duration_since(heard.at) > QUIET
    }

    /// Notes that the peer has accepted a flow.
    pub(super) fn accepted(&self) {
        self.0.accepted.store(true, Relaxed);
    }

    /// Whether the peer has ever accepted a flow: a connection that it never took anything from is not
    /// worth a second try.
    pub(super) fn has_accepted(&self) -> bool {
        self.0.accepted.load(Relaxed)
    }

    /// Closes a retired connection once its last bytes had time to arrive. Returns whether it has.
    pub(super) fn close_if_settled(&self, now: Instant) -> bool {
        let settled = self.idle_for(now).is_some_and(|idle| idle >= SETTLED);
        if settled {
            self.close(Reason::Draining);
        }
        settled || self.0.connection.close_reason().is_some()
    }

    /// Waits until the connection can be closed without loss, and closes it.
    pub(super) async fn settle(&self) {
        while !self.close_if_settled(Instant::now()) {
            tokio::time::sleep(SETTLED / 4).await;
        }
    }

    /// Closes at once, for a reason that the peer is told.
    pub(super) fn close(&self, reason: Reason) {
        close(&self.0.connection, reason);
    }

    pub(super) fn claim(&self) -> Claim {
        self.0.flows.fetch_add(1, Relaxed);
        Claim(self.clone())
    }
}

/// One flow of a connection.
#[derive(Debug)]
pub(super) struct Claim(QuicLink);

impl Drop for Claim {
    fn drop(&mut self) {
        let link = &self.0.0;
        *link.idle_since.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        link.flows.fetch_sub(1, Relaxed);
    }
}

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
    _lease: Option<Lease>,
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
        Self { send, recv, claim, _lease: lease, over: false }
    }

    /// Who the peer is.
    pub(crate) fn proof(&self) -> Arc<Proof> {
        Arc::clone(&self.claim.0.0.proof)
    }

    /// Both directions have ended. What was sent last is in flight still; that matters only if the
    /// connection goes away with this flow.
    pub(crate) async fn finish(mut self) {
        self.over = true;
        if self.claim.0.0.retiring.load(Relaxed) {
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

    /// The peer refused the flow, and has said all it had to say.
    pub(super) fn refused(mut self) {
        self.over = true;
        self.send.finish().unwrap_or_default();
    }

    pub(crate) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, StreamError>> {
        Pin::new(&mut self.send).poll_write(cx, bytes).map_err(|error| match error {
            WriteError::Stopped(code) => StreamError::Reset(reset_reason(code)),
            _ => StreamError::Lost,
        })
    }

    pub(crate) fn finish_sending(&mut self) -> Result<(), StreamError> {
        self.send.finish().map_err(|_closed| StreamError::Lost)
    }

    /// Zero bytes are the end.
    pub(crate) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        room: &mut [u8],
    ) -> Poll<Result<usize, StreamError>> {
        self.recv.poll_read(cx, room).map_err(|error| match error {
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

    pub(super) async fn accept(mut self) -> Option<QuicFlow> {
        self.0.send.write_all(&encode_answer(Ok(()))).await.ok()?;
        Some(self.0)
    }

    pub(super) async fn refuse(self, refusal: Refusal) {
        let mut flow = self.0;
        if flow.send.write_all(&encode_answer(Err(refusal))).await.is_ok() {
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
pub(super) async fn read_open(recv: &mut RecvStream) -> Result<Head, io::Error> {
    let mut decoder = Decoder::new(Role::Server);
    match read_frame(recv, &mut decoder).await? {
        FrameHead::Open(open) => Ok(Head::Open(open)),
        FrameHead::Unsupported => Ok(Head::Unsupported),
        FrameHead::Answer(_) => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Reads ANSWER from the beginning of a stream.
pub(super) async fn read_answer(recv: &mut RecvStream) -> Result<Answer, io::Error> {
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
async fn read_frame(recv: &mut RecvStream, decoder: &mut Decoder) -> Result<FrameHead, io::Error> {
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
fn cut_short(error: ReadExactError) -> io::Error {
    match error {
        ReadExactError::FinishedEarly(_) => io::Error::new(io::ErrorKind::InvalidData, error),
        ReadExactError::ReadError(error) => io::Error::other(error),
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

/// A socket for dialling, of the family of `to`. Made when first needed: a node may have one family
/// only.
pub(super) fn client_endpoint(to: SocketAddr) -> io::Result<Endpoint> {
    let any: IpAddr = match to {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    endpoint(UdpSocket::bind((any, 0))?, None, EndpointConfig::default())
}

/// An endpoint on a socket that the caller has bound.
pub(super) fn endpoint(
    socket: UdpSocket,
    server: Option<quinn::ServerConfig>,
    config: EndpointConfig,
) -> io::Result<Endpoint> {
    let runtime = Arc::new(quinn::TokioRuntime);
    Endpoint::new(config, server, socket, runtime)
}

/// A serving endpoint on a socket that the caller has bound. It tells peers that connections are dead
/// of which only the agent before this one knew.
pub(super) fn server_endpoint(
    socket: UdpSocket,
    server: quinn::ServerConfig,
    key: &ResetKey,
) -> io::Result<Endpoint> {
    let mut config = EndpointConfig::new(Arc::new(key.hmac()));
    config
        .cid_generator(|| Box::new(RandomIds))
        // After a restart all peers ask within a keep-alive. A reset is smaller than what it answers, so
        // it amplifies nothing; the limit is for what it costs us.
        .min_reset_interval(BETWEEN_RESETS);
    endpoint(socket, Some(server), config)
}

/// How a connection behaves, on both ends.
pub(super) fn transport(config: &TunnelConfig) -> Arc<TransportConfig> {
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(config.quic_max_streams))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(config.quic_stream_window))
        .receive_window(VarInt::MAX)
        .send_window(config.quic_send_window.into())
        // UDP of applications is not carried yet.
        .datagram_receive_buffer_size(None)
        .keep_alive_interval(Some(config.quic_keep_alive))
        .max_idle_timeout(config.quic_idle.try_into().ok())
        .enable_segmentation_offload(true)
        .mtu_discovery_config(Some(MtuDiscoveryConfig::default()));
    Arc::new(transport)
}

/// rustls' client configuration as quinn wants it.
pub(super) fn client_config(
    tls: rustls::ClientConfig,
    transport: &Arc<TransportConfig>,
) -> io::Result<quinn::ClientConfig> {
    let crypto = QuicClientConfig::try_from(tls).map_err(io::Error::other)?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::clone(transport));
    Ok(config)
}

/// rustls' server configuration as quinn wants it.
pub(super) fn server_config(
    tls: rustls::ServerConfig,
    transport: &Arc<TransportConfig>,
) -> io::Result<quinn::ServerConfig> {
    let crypto = QuicServerConfig::try_from(tls).map_err(io::Error::other)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    // Workers share the port and the kernel picks one by the client's address: a connection that
    // moved would reach a worker that does not know it.
    config.transport_config(Arc::clone(transport)).migration(false);
    Ok(config)
}

/// Closes a connection for a reason that the peer is told.
pub(super) fn close(connection: &Connection, reason: Reason) {
    connection.close(VarInt::from_u32(reason.code().into()), b"");
}

/// Who is at the other end.
pub(super) fn peer_chain(connection: &Connection) -> Option<Vec<CertificateDer<'static>>> {
    connection.peer_identity()?.downcast().ok().map(|chain| *chain)
}

/// Why a connection failed, in the tunnel's own words. `refused` is what our own verifier said.
pub(super) fn cause(error: &ConnectionError, refused: Option<PeerRefused>) -> DialError {
    match error {
        ConnectionError::TimedOut => DialError::TimedOut,
        ConnectionError::Reset => DialError::Network(io::ErrorKind::ConnectionReset.into()),
        ConnectionError::TransportError(error) => match refused {
            Some(refused) => DialError::Certificate(refused),
            None => DialError::Quic(error.code.to_string()),
        },
        ConnectionError::ConnectionClosed(close) => match alert(close.error_code) {
            Some(alert) => DialError::PeerRefused { alert },
            None => DialError::Quic(close.error_code.to_string()),
        },
        ConnectionError::ApplicationClosed(close) => {
            let code = u8::try_from(close.error_code.into_inner());
            match code.map_or(Reason::Other, Reason::from_code) {
                Reason::CallerCertificate => {
                    DialError::PeerRefused { alert: "certificate_expired" }
                }
                Reason::Overloaded => DialError::Overloaded,
                reason => DialError::Quic(reason.to_string()),
            }
        }
        other => DialError::Quic(other.to_string()),
    }
}

/// The same at the server's end, where no certificate for the server name is a cause of its own.
pub(super) fn server_cause(
    error: &ConnectionError,
    refused: Option<PeerRefused>,
    served: bool,
) -> DialError {
    match (error, refused) {
        (ConnectionError::TransportError(_), None) if !served => DialError::UnknownName,
        (ConnectionError::TransportError(error), None)
            if alert(error.code) == Some("certificate_required") =>
        {
            DialError::Certificate(PeerRefused::Missing)
        }
        _ => cause(error, refused),
    }
}

/// RFC 9001 section 4.8: a TLS alert is carried as `0x100` plus its code.
fn alert(code: quinn::TransportErrorCode) -> Option<&'static str> {
    let code = u64::from(code).checked_sub(0x100)?;
    u8::try_from(code).ok().map(|code| tls::alert_name(AlertDescription::from(code)))
}
