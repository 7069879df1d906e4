//! Makes carriers: TCP and TLS for a lane, QUIC for all flows to a peer.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mesh_core::spiffe::SpiffeId;
use mesh_core::wire::Role;
use quinn::{ConnectError, Connecting, Connection, ConnectionError, Endpoint};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::sign::CertifiedKey;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout_at};
use tracing::{info, warn};

use super::config::{Carrier, CarrierChoice, TunnelConfig};
use super::credentials::Credentials;
use super::credit::Credit;
use super::error::DialError;
use super::lane::{Handshake, Lane};
use super::pool::{DialOrder, Ready};
use super::proof::{Proof, Proofs};
use super::quic::{self, Links, QuicLink};
use super::session::Session;
use super::stats::{SessionKind, Side, TunnelStats};
use super::tls::{self, Refusals};
use super::tunnels::{Peer, lock};
use crate::gate::Gate;
use crate::identity::sni_name;
use crate::identity::verify::PeerRole;

/// How long the other carrier is tried after the first one was refused.
const AFTER_REFUSAL: Duration = Duration::from_secs(1);

/// When a QUIC handshake that is not done yet is begun anew, beside the one under way. Not sooner: over the
/// slowest links, and with an overloaded peer, it should only happen once.
const ANEW: [Duration; 2] = [Duration::from_secs(1), Duration::from_millis(2500)];

/// What a worker needs to dial.
pub(super) struct Dialler {
    credentials: Arc<Credentials>,
    proofs: Arc<Proofs>,
    links: Arc<Links>,
    credit: Credit,
    initial_window: u32,
    stats: Arc<TunnelStats>,
    lane_max_age: Duration,
    transport: Arc<quinn::TransportConfig>,
    /// By the identity that calls. As many as this node has workloads.
    callers: Mutex<HashMap<SpiffeId, Caller>>,
    /// One socket for each family, from the first dial on.
    endpoints: Mutex<[Option<Endpoint>; 2]>,
    refusals: Refusals,
    failures: Gate,
    fallbacks: Gate,
}

/// How one workload calls, for as long as it has this certificate.
#[derive(Clone)]
struct Caller {
    certified: Arc<CertifiedKey>,
    lane: Arc<rustls::ClientConfig>,
    quic: quinn::ClientConfig,
    not_after: u64,
}

impl fmt::Debug for Dialler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dialler").finish_non_exhaustive()
    }
}

impl Dialler {
    pub(super) fn new(
        config: &TunnelConfig,
        credentials: &Arc<Credentials>,
        proofs: &Arc<Proofs>,
        links: &Arc<Links>,
        stats: &Arc<TunnelStats>,
    ) -> Self {
        Self {
            credentials: Arc::clone(credentials),
            proofs: Arc::clone(proofs),
            links: Arc::clone(links),
            credit: config.quic_credit.clone(),
            initial_window: config.quic_stream_window,
            stats: Arc::clone(stats),
            lane_max_age: config.lane_max_age,
            transport: quic::transport(config),
            callers: Mutex::default(),
            endpoints: Mutex::default(),
            refusals: Refusals::default(),
            failures: Gate::default(),
            fallbacks: Gate::default(),
        }
    }

    /// Whether the workload has a certificate to call with.
    pub(super) fn has_certificate(&self, from: &SpiffeId) -> bool {
        (self.credentials.certified)(from).is_some()
    }

    /// Forgets workloads that have no certificate any more.
    pub(super) fn forget(&self) {
        lock(&self.callers).retain(|from, _| self.has_certificate(from));
    }

    /// Forgets the sessions under which a workload calls: the next handshakes are full ones, in which
    /// both ends judge the present certificates.
    pub(super) fn forget_sessions(&self, from: &SpiffeId) {
        lock(&self.callers).remove(from);
    }

    /// Makes a carrier before the order's deadline, with `auto` over the other carrier if the network
    /// does not let the first one pass. Says whether that was so.
    pub(super) async fn dial(
        &self,
        peer: &Peer,
        config: &TunnelConfig,
        order: &DialOrder,
    ) -> Result<(Ready, bool), DialError> {
        let end = order.deadline;
        if config.carrier != CarrierChoice::Auto {
            return Ok((self.dial_by(peer, order.carrier, end).await?, false));
        }
        // Half of the time for each: both must fit into what the application waits.
        let half = end.saturating_duration_since(Instant::now()) / 2;
        let first = self.dial_by(peer, order.carrier, Instant::now() + half).await;
        let first = match first {
            Err(error) if error.is_network() => error,
            result => return result.map(|ready| (ready, false)),
        };
        let other = if order.carrier == Carrier::Lane { Carrier::Quic } else { Carrier::Lane };
        // Something there said no: most often a node without its agent, which answers QUIC with
        // silence. A firewall that rejects one protocol is found out within a round trip.
        let end = match first {
            DialError::ConnectionRefused => end.min(Instant::now() + AFTER_REFUSAL),
            _ => end,
        };
        match self.dial_by(peer, other, end).await {
            Ok(ready) => {
                self.stats.fallbacks.fetch_add(1, Relaxed);
                if let Some(unlogged) = self.fallbacks.pass(first.reason()) {
                    info!(
                        node = %peer.node, tried = %order.carrier, reason = first.reason(),
                        using = %other, unlogged, stage = "tunnel", "carrier does not pass",
                    );
                }
                Ok((ready, true))
            }
            // Neither passes: the preferred one's reason tells more.
            Err(error) if error.is_network() => Err(first),
            Err(error) => Err(error),
        }
    }

    async fn dial_by(
        &self,
        peer: &Peer,
        carrier: Carrier,
        deadline: Instant,
    ) -> Result<Ready, DialError> {
        self.stats.dials.fetch_add(1, Relaxed);
        let dial = async {
            match carrier {
                Carrier::Quic => self.quic(peer).await.map(Ready::Quic),
                _ => self.lane(peer).await.map(|lane| Ready::Lane(Box::new(lane))),
            }
        };
        timeout_at(deadline.into(), dial).await.unwrap_or(Err(DialError::TimedOut))
    }

    /// Counts a failure and logs it at a bounded rate.
    pub(super) fn report(&self, peer: &Peer, error: &DialError) {
        self.stats.refused(Side::Client, error.reason());
        if let Some(unlogged) = self.failures.pass(error.reason()) {
            let cause = std::error::Error::source(error).map(ToString::to_string);
            warn!(
                from = %peer.from, to = %peer.to, node = %peer.node, reason = error.reason(), %error,
                cause, unlogged, stage = "tunnel", "no tunnel to the peer",
            );
        }
    }

    async fn lane(&self, peer: &Peer) -> Result<Lane, DialError> {
        match self.lane_once(peer).await {
            // What a resumed session remembers of the peer no longer holds: the peer may have
            // renewed its certificate since. A full handshake shows the present one.
            Err((DialError::Certificate(_), SessionKind::Resumed)) => {
                self.forget_sessions(&peer.from);
                self.lane_once(peer).await.map_err(|(error, _)| error)
            }
            result => result.map_err(|(error, _)| error),
        }
    }

    /// The error comes with how the session came about.
    async fn lane_once(&self, peer: &Peer) -> Result<Lane, (DialError, SessionKind)> {
        let full = |error| (error, SessionKind::Full);
        let caller = self.caller(&peer.from).map_err(full)?;
        let tcp = TcpStream::connect(peer.node.0).await.map_err(|e| full(network(e)))?;
        prepare(&tcp).map_err(|e| full(DialError::Network(e)))?;

        let name = ServerName::try_from(sni_name(&peer.to))
            .map_err(|_name| full(DialError::Tls(rustls::Error::General("server name".into()))))?;
        let session =
            Session::client(Arc::clone(&caller.lane), name).map_err(|e| full(DialError::Tls(e)))?;
        let mut handshake = Handshake::new(tcp, session, Role::Client);
        if let Err(error) = handshake.complete().await {
            return Err(full(error));
        }
        let kind = handshake.kind();
        let chain = handshake.session().state().peer_certificates();
        let (expires, proof) = match self.prove(peer, chain, &caller) {
            Ok(proven) => proven,
            Err(error) => return Err((error, kind)),
        };
        self.stats.completed(Side::Client, kind);
        handshake.into_lane(proof, expires, &self.stats).map_err(|error| (error, kind))
    }

    async fn quic(&self, peer: &Peer) -> Result<QuicLink, DialError> {
        match self.quic_once(peer).await {
            // As for lanes.
            Err((DialError::Certificate(_), SessionKind::Resumed)) => {
                self.quic_once(peer).await.map_err(|(error, _)| error)
            }
            result => result.map_err(|(error, _)| error),
        }
    }

    /// With an error, whether the handshake was a resumed one.
    async fn quic_once(&self, peer: &Peer) -> Result<QuicLink, (DialError, SessionKind)> {
        let full = |error| (error, SessionKind::Full);
        let caller = self.caller(&peer.from).map_err(full)?;
        let endpoint = self.endpoint(peer.node.0).map_err(full)?;
        // What the handshake promises the peer.
        let loan = self.credit.lend(self.initial_window.into());
        let loan = loan.ok_or(full(DialError::Overloaded))?;
        let name = sni_name(&peer.to);
        let connect = || endpoint.connect_with(caller.quic.clone(), peer.node.0, &name);
        let connection = first_connected(connect)
            .await
            .map_err(|error| full(DialError::Quic(error.to_string())))?
            .map_err(|error| full(quic::cause(&error, self.refusals.take(&name))))?;
        let chain = quic::peer_chain(&connection);
        match self.prove(peer, chain.as_deref(), &caller) {
            Ok((expires, proof)) => {
                // quinn does not say whether it resumed.
                self.stats.completed(Side::Client, SessionKind::Full);
                Ok(QuicLink::new(connection, proof, expires, loan, &self.links, &self.stats))
            }
            Err(error) => {
                // A full handshake would have failed by itself: what a resumed session remembers of the peer no longer
                // holds. The next one is not resumed.
                self.forget_sessions(&peer.from);
                connection.close(0u32.into(), b"");
                Err((error, SessionKind::Resumed))
            }
        }
    }

    /// Checks that the peer is the workload meant, whether or not the handshake did (a resumed one
    /// does not), and says until when that holds.
    fn prove(
        &self,
        peer: &Peer,
        chain: Option<&[CertificateDer<'_>]>,
        caller: &Caller,
    ) -> Result<(Instant, Arc<Proof>), DialError> {
        let (found, proof) =
            self.proofs.take(chain, PeerRole::Server).map_err(DialError::Certificate)?;
        if found != peer.to {
            return Err(DialError::WrongWorkload { found });
        }
        let not_after = chain.map_or(0, tls::not_after).min(caller.not_after);
        // Whether our own certificate still holds is for the peer to judge: its clock decides.
        let expires = expiry(not_after, self.lane_max_age).unwrap_or_else(Instant::now);
        Ok((expires, proof))
    }

    /// How a workload calls at present.
    fn caller(&self, from: &SpiffeId) -> Result<Caller, DialError> {
        let certified = (self.credentials.certified)(from).ok_or(DialError::NoCertificate)?;
        let mut callers = lock(&self.callers);
        if let Some(caller) = callers.get(from)
            && Arc::ptr_eq(&caller.certified, &certified)
        {
            return Ok(caller.clone());
        }
        let config = || tls::client_config(&self.credentials, &certified, &self.refusals);
        let quic = quic::client_config(config().map_err(DialError::Tls)?, &self.transport)
            .map_err(|error| DialError::Quic(error.to_string()))?;
        let caller = Caller {
            lane: Arc::new(config().map_err(DialError::Tls)?),
            quic,
            not_after: tls::not_after(&certified.cert),
            certified,
        };
        callers.insert(from.clone(), caller.clone());
        Ok(caller)
    }

    fn endpoint(&self, to: SocketAddr) -> Result<Endpoint, DialError> {
        let mut endpoints = lock(&self.endpoints);
        let slot = &mut endpoints[usize::from(to.is_ipv6())];
        if let Some(endpoint) = slot {
            return Ok(endpoint.clone());
        }
        let endpoint = quic::client_endpoint(to).map_err(DialError::Network)?;
        Ok(slot.insert(endpoint).clone())
    }
}

/// The first of several handshakes to come to an end.
///
/// An agent that is killed in the middle of one leaves a client that has the keys of the handshake and waits
/// for the rest. The agent after it knows nothing of that, and answers it with nothing: stateless resets
/// are for what comes after a handshake (RFC 9000 section 10.3).
async fn first_connected(
    connect: impl Fn() -> Result<Connecting, ConnectError>,
) -> Result<Result<Connection, ConnectionError>, ConnectError> {
    let begun = Instant::now();
    let mut under_way = JoinSet::new();
    let mut anew = ANEW.iter();
    loop {
        under_way.spawn(connect()?.into_future());
        let next = async {
            match anew.next() {
                Some(after) => sleep_until((begun + *after).into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased; // Done is done.
            Some(Ok(done)) = under_way.join_next() => return Ok(done),
            () = next => {}
        }
    }
}

/// When a carrier may take its last flow: `max_age` from now, or when a certificate ends. `None` if
/// that is over.
pub(super) fn expiry(not_after: u64, max_age: Duration) -> Option<Instant> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let left = Duration::from_secs(not_after).checked_sub(now)?;
    Instant::now().checked_add(left.min(max_age))
}

/// Options of a lane's socket, on both ends.
pub(super) fn prepare(tcp: &TcpStream) -> std::io::Result<()> {
    // A node that vanished is noticed within half a minute, unless bytes are on their way: whoever sends
    // them looks after that (`relay::lane`). Not TCP_USER_TIMEOUT: it also ends connections whose other
    // side is there, and takes nothing for now. Three probes, and lanes not all in the same second: thousands
    // that were opened together must not probe in one burst, of which packets may be dropped.
    const PROBE: Duration = Duration::from_secs(5);
    let idle = Duration::from_secs(fastrand::u64(10..15));

    tcp.set_nodelay(true)?;
    let socket = SockRef::from(tcp);
    socket.set_tcp_keepalive(
        &TcpKeepalive::new().with_time(idle).with_interval(PROBE).with_retries(3),
    )
}

fn network(error: std::io::Error) -> DialError {
    match error.kind() {
        std::io::ErrorKind::ConnectionRefused => DialError::ConnectionRefused,
        std::io::ErrorKind::TimedOut => DialError::TimedOut,
        _ => DialError::Network(error),
    }
}
