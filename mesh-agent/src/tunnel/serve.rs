//! Serving: takes lanes and QUIC connections from peers, and hands on what they ask for.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mesh_core::spiffe::SpiffeId;
use mesh_core::stage::Stage;
use mesh_core::wire::{Reason, Refusal, Role, encode_answer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::config::TunnelConfig;
use super::dial::{expiry, prepare, within};
use super::error::DialError;
use super::flow::{AnswerOn, Request, Slot};
use super::gate::Gate;
use super::lane::{Handshake, Lane, LaneError, LaneEvent};
use super::quic::{self, Head, QuicAnswer, QuicLink};
use super::session::Session;
use super::stats::{SessionKind, Side};
use super::tls::{self, Refusals, ServedBySni};
use super::tunnels::{Tunnels, lock};
use crate::identity::verify::{PeerRefused, PeerRole};

/// Long enough for a file descriptor to come free, short enough not to show as latency.
const ACCEPT_RETRY: Duration = Duration::from_millis(10);

/// A server refuses a carrier only when a certificate has ended: its age is for the client to mind.
const NO_AGE: Duration = Duration::from_secs(365 * 24 * 3600);

/// What all connections of a server share.
struct Server<H> {
    tunnels: Arc<Tunnels>,
    handler: H,
    drain: watch::Receiver<bool>,
    tls: rustls::ServerConfig,
    lanes: Mutex<HashMap<IpAddr, usize>>,
    gate: Gate,
}

/// Who is at the other end of a carrier, and whom it meant.
#[derive(Clone, Debug)]
struct Parties {
    caller: SpiffeId,
    served_as: SpiffeId,
    peer: SocketAddr,
    expires: Instant,
}

impl Tunnels {
    /// Serves lanes until `drain` turns true: then idle lanes are closed, and the others after their
    /// flow. Returns when all are; dropping the future cuts them.
    ///
    /// `handler` answers a request, relays, and returns when the flow has ended.
    ///
    /// # Errors
    ///
    /// Fails if the TLS configuration is refused.
    pub async fn serve_lanes<H, F>(
        self: Arc<Self>,
        listener: TcpListener,
        mut drain: watch::Receiver<bool>,
        handler: H,
    ) -> io::Result<()>
    where
        H: Fn(Request) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let server = Arc::new(Server::new(self, handler, drain.clone())?);
        let handshakes = Arc::new(Semaphore::new(server.tunnels.config.max_handshakes));
        let mut lanes = JoinSet::new();
        loop {
            let (permit, tcp, peer) = tokio::select! {
                biased; // A drain must win over peers that never stop connecting.
                () = turned(&mut drain) => break,
                // Reap, so that finished lanes do not pile up until the drain.
                Some(ended) = lanes.join_next() => {
                    if let Err(error) = ended {
                        warn!(%error, stage = "tunnel", "lane task panicked");
                    }
                    continue;
                }
                accepted = accept(&listener, &handshakes) => accepted,
            };
            lanes.spawn(Arc::clone(&server).lane(tcp, peer, permit));
        }
        drop(listener);
        while lanes.join_next().await.is_some() {}
        Ok(())
    }

    /// Serves QUIC connections in the same way, on a UDP socket that the caller has bound.
    ///
    /// # Errors
    ///
    /// Fails if the socket cannot be used or the TLS configuration is refused.
    pub async fn serve_quic<H, F>(
        self: Arc<Self>,
        socket: UdpSocket,
        mut drain: watch::Receiver<bool>,
        handler: H,
    ) -> io::Result<()>
    where
        H: Fn(Request) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let server = Arc::new(Server::new(self, handler, drain.clone())?);
        let transport = quic::transport(&server.tunnels.config);
        let first = quic::server_config(server.tls.clone(), &transport)?;
        let endpoint = quic::endpoint(socket, Some(first))?;
        let mut connections = JoinSet::new();
        loop {
            let incoming = tokio::select! {
                biased; // As above.
                () = turned(&mut drain) => break,
                Some(ended) = connections.join_next() => {
                    if let Err(error) = ended {
                        warn!(%error, stage = "tunnel", "connection task panicked");
                    }
                    continue;
                }
                incoming = endpoint.accept() => match incoming {
                    Some(incoming) => incoming,
                    None => break,
                },
            };
            if connections.len() >= server.tunnels.config.quic_max_connections {
                incoming.refuse();
                continue;
            }
            connections.spawn(Arc::clone(&server).connection(incoming, Arc::clone(&transport)));
        }
        endpoint.set_server_config(None);
        while connections.join_next().await.is_some() {}
        endpoint.wait_idle().await;
        Ok(())
    }
}

async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
) -> (OwnedSemaphorePermit, TcpStream, SocketAddr) {
    #[expect(clippy::expect_used, reason = "nothing closes this semaphore")]
    let permit = Arc::clone(permits).acquire_owned().await.expect("never closed");
    loop {
        match listener.accept().await {
            Ok((tcp, peer)) => return (permit, tcp, peer),
            // The peer went away between SYN and accept (accept(2)): nothing is wrong with us.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            // EMFILE and its kin persist until something closes: spinning would starve that.
            Err(error) => {
                warn!(%error, stage = "tunnel", "accept failed");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

impl<H, F> Server<H>
where
    H: Fn(Request) -> F + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    fn new(tunnels: Arc<Tunnels>, handler: H, drain: watch::Receiver<bool>) -> io::Result<Self> {
        let resolver = Arc::new(ServedBySni::new(&tunnels.credentials));
        let refusals = Refusals::default();
        let tls = tls::server_config(&tunnels.credentials, &tunnels.tickets, resolver, &refusals)
            .map_err(io::Error::other)?;
        Ok(Self { tunnels, handler, drain, tls, lanes: Mutex::default(), gate: Gate::default() })
    }

    fn config(&self) -> &TunnelConfig {
        &self.tunnels.config
    }

    /// One lane, from its handshake to its end.
    async fn lane(self: Arc<Self>, tcp: TcpStream, peer: SocketAddr, permit: OwnedSemaphorePermit) {
        let Some(_place) = self.place(peer.ip()) else {
            self.report(peer, &DialError::Overloaded, None);
            return;
        };
        let accepted = self.handshake(tcp, peer).await;
        drop(permit);
        match accepted {
            Ok((lane, parties, doubt)) => self.flows(lane, parties, doubt).await,
            Err(Some(handshake)) => handshake.linger().await,
            Err(None) => {}
        }
    }

    /// Ends with the lane and its parties, and with what is wrong with the caller's certificate if a
    /// resumed session kept that from the handshake. On failure everything is reported.
    async fn handshake(
        &self,
        tcp: TcpStream,
        peer: SocketAddr,
    ) -> Result<(Box<Lane>, Parties, Option<PeerRefused>), Option<Handshake>> {
        let resolver = Arc::new(ServedBySni::new(&self.tunnels.credentials));
        // A resolver for each connection is how rustls tells which workload was asked for.
        let mut tls = self.tls.clone();
        tls.cert_resolver = Arc::clone(&resolver) as Arc<dyn rustls::server::ResolvesServerCert>;
        let session = prepare(&tcp)
            .map_err(DialError::Network)
            .and_then(|()| Session::server(Arc::new(tls)).map_err(DialError::Tls));
        let session = match session {
            Ok(session) => session,
            Err(error) => {
                self.report(peer, &error, None);
                return Err(None);
            }
        };
        let mut handshake = Handshake::new(tcp, session, Role::Server);
        let result = within(self.config().handshake_timeout, &mut handshake).await;
        let served = resolver.found();
        if let Err(error) = result {
            self.report(peer, &error, served.map(|(id, _)| id));
            return Err(Some(handshake));
        }
        let Some((served_as, certified)) = served else { return Err(Some(handshake)) };
        let chain = handshake.session().state().peer_certificates();
        let not_after = chain.map_or(0, tls::not_after).min(tls::not_after(&certified.cert));
        let found = tls::identify(&self.tunnels.credentials, chain, PeerRole::Client);
        let expires = expiry(not_after, NO_AGE).unwrap_or_else(Instant::now);
        self.tunnels.stats.completed(Side::Server, handshake.kind());
        let (caller, doubt) = match found {
            Ok(caller) => (caller, None),
            Err(refused) => {
                self.report(peer, &DialError::Certificate(refused), Some(served_as));
                // Nobody: its requests are refused before anyone asks who it is.
                (served_as.clone(), Some(refused))
            }
        };
        let parties = Parties { caller, served_as: served_as.clone(), peer, expires };
        let lane = handshake.into_lane(expires, &self.tunnels.stats);
        Ok((Box::new(lane), parties, doubt))
    }

    /// One flow after the other.
    async fn flows(&self, mut lane: Box<Lane>, parties: Parties, doubt: Option<PeerRefused>) {
        let slot = Arc::new(Slot::default());
        let mut drain = self.drain.clone();
        loop {
            let event = tokio::select! {
                biased; // What has arrived is served, also while draining.
                event = lane.next_event() => event,
                () = turned(&mut drain) => return lane.close().await,
                () = tokio::time::sleep(2 * self.config().lane_idle) => return lane.close().await,
            };
            let open = match event {
                Ok(LaneEvent::Open(open)) => open,
                Ok(LaneEvent::Closed) => return lane.close_now(),
                Ok(LaneEvent::Unsupported) => return unsupported(lane).await,
                Ok(event) => {
                    debug!(peer = %parties.peer, ?event, stage = "tunnel", "lane ended");
                    return;
                }
                Err(error) => {
                    self.lane_failed(&parties, error);
                    return;
                }
            };
            let request = Request {
                open,
                caller: parties.caller.clone(),
                served_as: parties.served_as.clone(),
                peer: parties.peer,
                answer: AnswerOn::Lane {
                    lane,
                    slot: Arc::clone(&slot),
                    patience: self.config().answer_timeout,
                },
            };
            self.tunnels.stats.flows.fetch_add(1, Relaxed);
            match self.why_not(&parties, doubt) {
                Some(refusal) => {
                    self.tunnels.stats.flows_refused.fetch_add(1, Relaxed);
                    request.refuse(refusal).await;
                }
                None => (self.handler)(request).await,
            }
            match slot.take() {
                Some(back) => lane = back,
                None => return,
            }
        }
    }

    /// Whether the carrier itself forbids the flow.
    fn why_not(&self, parties: &Parties, doubt: Option<PeerRefused>) -> Option<Refusal> {
        let refuse = |reason| Some(Refusal::new(Stage::Tunnel, reason));
        if doubt.is_some() || parties.expires <= Instant::now() {
            return refuse(Reason::CallerCertificate);
        }
        if *self.drain.borrow() {
            return refuse(Reason::Draining);
        }
        None
    }

    /// A lane that ends between flows without `close_notify` is a peer that went away; an alert is a
    /// peer that does not trust us.
    fn lane_failed(&self, parties: &Parties, error: LaneError) {
        match error {
            LaneError::Tls(error) => {
                self.report(parties.peer, &error, Some(&parties.served_as));
            }
            LaneError::Wire(error) => self.refused(
                parties.peer,
                Reason::Protocol.as_str(),
                &error,
                Some(&parties.served_as),
            ),
            error => {
                debug!(peer = %parties.peer, %error, stage = "tunnel", "lane ended");
            }
        }
    }

    /// Counts a refused peer and logs it at a bounded rate.
    fn report(&self, peer: SocketAddr, error: &DialError, served_as: Option<&SpiffeId>) {
        let reason = match (error, served_as) {
            // rustls has no word for a server name that nobody here answers to.
            (DialError::Tls(rustls::Error::General(_)), None) => "unknown_workload",
            (DialError::TimedOut, _) => "handshake_timeout",
            _ => error.reason(),
        };
        self.refused(peer, reason, error, served_as);
    }

    fn refused(
        &self,
        peer: SocketAddr,
        reason: &'static str,
        error: &dyn std::error::Error,
        served_as: Option<&SpiffeId>,
    ) {
        self.tunnels.stats.refused(Side::Server, reason);
        if let Some(unlogged) = self.gate.pass(reason) {
            let served_as = served_as.map(ToString::to_string);
            let cause = error.source().map(ToString::to_string);
            warn!(
                %peer, served_as, reason, %error, cause, unlogged, stage = "tunnel",
                "peer refused",
            );
        }
    }

    /// One QUIC connection, from its handshake to its end.
    async fn connection(
        self: Arc<Self>,
        incoming: quinn::Incoming,
        transport: Arc<quinn::TransportConfig>,
    ) {
        let peer = incoming.remote_address();
        let Some((link, parties)) = self.quic_handshake(incoming, &transport).await else { return };
        let mut drain = self.drain.clone();
        let mut flows = JoinSet::new();
        loop {
            let (send, mut recv) = tokio::select! {
                biased; // As for lanes.
                stream = link.connection().accept_bi() => match stream {
                    Ok(stream) => stream,
                    Err(error) => {
                        debug!(%peer, %error, stage = "tunnel", "connection ended");
                        break;
                    }
                },
                () = turned(&mut drain) => break,
                Some(_ended) = flows.join_next() => continue,
            };
            let (server, link, parties) = (Arc::clone(&self), link.clone(), parties.clone());
            flows.spawn(async move {
                let claim = link.claim();
                let limit = server.config().handshake_timeout;
                let head = match timeout(limit, quic::read_open(&mut recv)).await {
                    Ok(Ok(head)) => head,
                    Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
                        let served_as = Some(&parties.served_as);
                        server.refused(peer, Reason::Protocol.as_str(), &error, served_as);
                        return link.close(Reason::Protocol);
                    }
                    // Given up by the client before OPEN was read, or by us: no other flow's concern.
                    _given_up => return drop(QuicAnswer::new(send, recv, claim)),
                };
                let answer = QuicAnswer::new(send, recv, claim);
                let Head::Open(open) = head else {
                    let refusal = Refusal::new(Stage::Tunnel, Reason::Version);
                    return answer.refuse(refusal).await;
                };
                let request = Request {
                    open,
                    caller: parties.caller.clone(),
                    served_as: parties.served_as.clone(),
                    peer: parties.peer,
                    answer: AnswerOn::Quic(answer),
                };
                server.tunnels.stats.flows.fetch_add(1, Relaxed);
                match server.why_not(&parties, None) {
                    Some(refusal) => {
                        server.tunnels.stats.flows_refused.fetch_add(1, Relaxed);
                        request.refuse(refusal).await;
                    }
                    None => (server.handler)(request).await,
                }
            });
        }
        link.retire();
        while flows.join_next().await.is_some() {}
        link.settle().await;
    }

    async fn quic_handshake(
        &self,
        incoming: quinn::Incoming,
        transport: &Arc<quinn::TransportConfig>,
    ) -> Option<(QuicLink, Parties)> {
        let tunnels = &self.tunnels;
        let peer = incoming.remote_address();
        let resolver = Arc::new(ServedBySni::new(&tunnels.credentials));
        let refusals = Refusals::default();
        let as_resolver = Arc::clone(&resolver) as Arc<dyn rustls::server::ResolvesServerCert>;
        let config =
            tls::server_config(&tunnels.credentials, &tunnels.tickets, as_resolver, &refusals)
                .map_err(DialError::Tls)
                .and_then(|tls| quic::server_config(tls, transport).map_err(DialError::Network));
        let config = match config {
            Ok(config) => config,
            Err(error) => {
                self.report(peer, &error, None);
                return None;
            }
        };
        let handshake = async {
            let connecting = incoming.accept_with(Arc::new(config))?;
            connecting.await
        };
        let connected = timeout(self.config().handshake_timeout, handshake).await;
        let served = resolver.found();
        let connection = match connected {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => {
                let error = quic::server_cause(&error, refusals.take(""), served.is_some());
                self.report(peer, &error, served.map(|(id, _)| id));
                return None;
            }
            Err(_elapsed) => {
                self.report(peer, &DialError::TimedOut, served.map(|(id, _)| id));
                return None;
            }
        };
        let (served_as, certified) = served?;
        let chain = quic::peer_chain(&connection);
        let chain = chain.as_deref();
        let not_after = chain.map_or(0, tls::not_after).min(tls::not_after(&certified.cert));
        let expires = expiry(not_after, NO_AGE);
        let link = QuicLink::new(connection, expires.unwrap_or_else(Instant::now), &tunnels.stats);
        tunnels.stats.completed(Side::Server, SessionKind::Full);
        match tls::identify(&tunnels.credentials, chain, PeerRole::Client) {
            Ok(caller) => {
                let served_as = served_as.clone();
                let expires = expires.unwrap_or_else(Instant::now);
                Some((link, Parties { caller, served_as, peer, expires }))
            }
            Err(refused) => {
                self.report(peer, &DialError::Certificate(refused), Some(served_as));
                link.close(Reason::CallerCertificate);
                None
            }
        }
    }

    /// A place among the lanes of one address, if there is one left.
    fn place(self: &Arc<Self>, address: IpAddr) -> Option<Place<H>> {
        let mut lanes = lock(&self.lanes);
        let taken = lanes.entry(address).or_default();
        if *taken >= self.config().max_lanes_per_address {
            return None;
        }
        *taken += 1;
        Some(Place { server: Arc::clone(self), address })
    }
}

/// Waits until the drain begins; a sender that is gone counts as that.
async fn turned(drain: &mut watch::Receiver<bool>) {
    drop(drain.wait_for(|on| *on).await);
}

/// A lane's place among those of its address.
struct Place<H> {
    server: Arc<Server<H>>,
    address: IpAddr,
}

impl<H> Drop for Place<H> {
    fn drop(&mut self) {
        let mut lanes = lock(&self.server.lanes);
        if let Some(taken) = lanes.get_mut(&self.address) {
            *taken -= 1;
            if *taken == 0 {
                lanes.remove(&self.address);
            }
        }
    }
}

/// Answers a client of another version, and ends the lane.
async fn unsupported(mut lane: Box<Lane>) {
    let refusal = Refusal::new(Stage::Tunnel, Reason::Version);
    if lane.codec.queue(&encode_answer(Err(refusal))).is_ok() {
        lane.close().await;
    }
}
