//! QUIC: one connection per peer. Its flows are in `stream`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use mesh_core::wire::Reason;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    Connection, ConnectionError, ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig,
    MtuDiscoveryConfig, TransportConfig, VarInt,
};
use rustls::AlertDescription;
use rustls::pki_types::CertificateDer;

use super::config::TunnelConfig;
use super::credit::{Loan, Reader, Window};
use super::error::DialError;
use super::proof::Proof;
use super::reset_key::ResetKey;
use super::stats::{Gauged, TunnelStats};
use super::steering::{ID_LEN, Tag};
use super::tls;
use crate::identity::verify::PeerRefused;

/// Between two stateless resets.
const BETWEEN_RESETS: Duration = Duration::from_millis(1);

/// Who was not heard for this long may be gone: the next flow asks before it sends payload.
const QUIET: Duration = Duration::from_secs(1);

/// How long after its last flow a connection is kept for what was sent last, and how long nothing may have come
/// before it is closed: while bytes are on their way, acknowledgements come. [`ROUND_TRIPS`] if that is longer.
const SETTLED: Duration = Duration::from_millis(300);
const ROUND_TRIPS: u32 = 4;

/// Ids of a server's connections: the agent's tag and 48 random bits. quinn's own have 24, and a check by a
/// key of the process: the next agent would take none of them for a connection's, or, knowing that key,
/// would soon give an id to two connections, whose reset tokens are then the same (RFC 9000 section
/// 10.3.2).
#[derive(Debug)]
struct TaggedIds(Tag);

impl ConnectionIdGenerator for TaggedIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; ID_LEN];
        let (tag, random) = id.split_at_mut(self.0.0.len());
        tag.copy_from_slice(&self.0.0);
        #[expect(clippy::expect_used, reason = "aws-lc ends the process rather than fail here")]
        aws_lc_rs::rand::fill(random).expect("randomness");
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        ID_LEN
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
    /// How much the peer may send before it is read.
    window: Mutex<Window>,
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
        loan: Loan,
        tunnels: &Links,
        stats: &Arc<TunnelStats>,
    ) -> Self {
        let this = Self(Arc::new(Link {
            connection,
            proof,
            expires,
            flows: AtomicUsize::new(0),
            idle_since: Mutex::new(Instant::now()),
            retiring: AtomicBool::new(false),
            heard: Mutex::new(Heard { datagrams: 0, at: Instant::now() }),
            accepted: AtomicBool::new(false),
            window: Mutex::new(Window::new(loan)),
            _open: Gauged::new(stats, |stats| &stats.quic_connections),
        }));
        tunnels.add(&this);
        this
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
        self.listen(now);
        let heard = self.0.heard.lock().unwrap_or_else(PoisonError::into_inner).at;
        let quiet = SETTLED.max(ROUND_TRIPS * self.0.connection.rtt());
        let settled = self.idle_for(now).is_some_and(|idle| idle >= quiet)
            && now.saturating_duration_since(heard) >= quiet;
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

/// The QUIC connections of one worker, on both ends.
#[derive(Debug, Default)]
pub(super) struct Links(Mutex<Vec<Weak<Link>>>);

impl Links {
    fn add(&self, link: &QuicLink) {
        let mut links = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        links.push(Arc::downgrade(&link.0));
    }

    /// Closes all, for a reason that the peers are told, and says how many there were.
    pub(super) fn close(&self, reason: Reason) -> usize {
        let links = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let links = links.iter().filter_map(Weak::upgrade);
        links.map(|link| close(&link.connection, reason)).count()
    }

    /// Lets the peers of each send as much as what is read, and what is not, needs. Returns how many
    /// flows were given up.
    pub(super) fn look(&self) -> usize {
        let mut given_up = 0;
        let mut links = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        links.retain(|link| {
            let Some(link) = link.upgrade() else { return false };
            // Without flows nothing lies unread.
            if link.flows.load(Relaxed) > 0 {
                let stats = link.connection.stats();
                let (asked, told) = (stats.frame_rx.data_blocked, stats.frame_tx.max_data);
                let mut window = link.window.lock().unwrap_or_else(PoisonError::into_inner);
                let (limit, gone) = window.look(asked, told);
                if let Some(limit) = limit.and_then(|limit| VarInt::try_from(limit).ok()) {
                    link.connection.set_receive_window(limit);
                }
                given_up += gone;
            }
            true
        });
        given_up
    }
}

/// One flow of a connection.
#[derive(Debug)]
pub(super) struct Claim(QuicLink);

impl Claim {
    /// What reads the flow, for as long as the flow lives.
    pub(super) fn reader(&self) -> Arc<Reader> {
        let reader = Arc::new(Reader::default());
        self.0.0.window.lock().unwrap_or_else(PoisonError::into_inner).add(&reader);
        reader
    }

    /// Who the peer is.
    pub(super) fn proof(&self) -> Arc<Proof> {
        Arc::clone(&self.0.0.proof)
    }

    /// How long the connection takes there and back.
    pub(super) fn rtt(&self) -> Duration {
        self.0.connection().rtt()
    }

    /// Whether the connection is going away.
    pub(super) fn is_retiring(&self) -> bool {
        self.0.0.retiring.load(Relaxed)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let link = &self.0.0;
        *link.idle_since.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        link.flows.fetch_sub(1, Relaxed);
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
    tag: Tag,
) -> io::Result<Endpoint> {
    let mut config = EndpointConfig::new(Arc::new(key.hmac()));
    config
        .cid_generator(move || Box::new(TaggedIds(tag)))
        // After a restart all peers ask within a keep-alive. A reset is smaller than what it answers, so
        // it amplifies nothing; the limit is for what it costs us.
        .min_reset_interval(BETWEEN_RESETS);
    endpoint(socket, Some(server), config)
}

/// Streams that a peer may have open at first.
pub(super) fn first_streams(config: &TunnelConfig) -> u32 {
    config.quic_first_streams.min(config.max_flows_per_peer)
}

/// How a connection behaves, on both ends.
pub(super) fn transport(config: &TunnelConfig) -> Arc<TransportConfig> {
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(first_streams(config)))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(config.quic_stream_window))
        // It grows: see `credit`.
        .receive_window(VarInt::from_u32(config.quic_stream_window))
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
