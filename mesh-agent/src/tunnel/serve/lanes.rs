//! Lanes: a handshake, then one flow after the other.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use mesh_core::stage::Stage;
use mesh_core::wire::{Reason, Refusal, Role, encode_answer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::handshakes::{Handshakes, Handshaking};
use super::{Arrivals, NO_AGE, Parties, Server, take, turned};
use crate::gate::Gate;
use crate::identity::verify::PeerRole;
use crate::tunnel::dial::{expiry, prepare};
use crate::tunnel::error::DialError;
use crate::tunnel::flow::{AnswerOn, Request, Slot};
use crate::tunnel::lane::{Handshake, Lane, LaneError, LaneEvent};
use crate::tunnel::session::Session;
use crate::tunnel::stats::Side;
use crate::tunnel::tls::{self, ServedBySni};
use crate::tunnel::tunnels::{Tunnels, lock};

/// Long enough for a file descriptor to come free, short enough not to show as latency.
const ACCEPT_RETRY: Duration = Duration::from_millis(10);

/// Every worker listens, and all of them lack descriptors together.
static TOLD: LazyLock<Gate> = LazyLock::new(Gate::default);

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
        drain: watch::Receiver<bool>,
        handler: H,
    ) -> io::Result<()>
    where
        H: Fn(Request) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let server = Arc::new(Server::new(self, handler, drain.clone())?);
        let handshakes = Handshakes::new(server.tunnels.config.max_handshakes);
        let listening = Listening { listener, handshakes, waits: Mutex::default() };
        let mut lanes = take(&listening, drain, |(handshaking, tcp, peer), _| {
            Some(Arc::clone(&server).lane(tcp, peer, handshaking))
        })
        .await;
        // Whoever is in the queue has seen its connection succeed, and is told to go elsewhere: a close would reset
        // it. The queue is no longer than the backlog.
        while let Ok(Some((place, tcp, peer))) = timeout(Duration::ZERO, listening.next()).await {
            lanes.spawn(Arc::clone(&server).lane(tcp, peer, place));
        }
        drop(listening);
        while lanes.join_next().await.is_some() {}
        Ok(())
    }
}

/// A listener, and places for handshakes.
struct Listening {
    listener: TcpListener,
    handshakes: Arc<Handshakes>,
    /// Who waits for a place. Nothing more is accepted meanwhile: the rest waits in the kernel's backlog.
    waits: Mutex<Option<(TcpStream, SocketAddr)>>,
}

impl Arrivals for Listening {
    type Carrier = (Handshaking, TcpStream, SocketAddr);

    async fn next(&self) -> Option<Self::Carrier> {
        loop {
            let waiting = lock(&self.waits).take();
            let (tcp, peer) = match waiting {
                Some(waiting) => waiting,
                None => accept(&self.listener).await,
            };
            match self.handshakes.take(peer.ip()) {
                Ok(handshaking) => return Some((handshaking, tcp, peer)),
                Err(wait) => {
                    // Kept here, since this future may be dropped while it waits.
                    *lock(&self.waits) = Some((tcp, peer));
                    self.handshakes.wait(wait).await;
                }
            }
        }
    }
}

async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            // The peer went away between SYN and accept (accept(2)): nothing is wrong with us.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            // EMFILE and its kin persist until something closes: spinning would starve that.
            Err(error) => {
                if let Some(unlogged) = TOLD.pass("accept") {
                    warn!(%error, unlogged, stage = "tunnel", "accept failed");
                }
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
    /// One lane, from its handshake to its end.
    async fn lane(self: Arc<Self>, tcp: TcpStream, peer: SocketAddr, handshaking: Handshaking) {
        let Some(_place) = self.place(peer.ip(), self.config().max_flows_per_peer) else {
            self.report(peer, &DialError::Overloaded, None);
            return;
        };
        // Boxed: what a handshake needs is given back before the long part begins.
        let accepted = Box::pin(self.handshake(tcp, peer, handshaking)).await;
        match accepted {
            Ok((lane, parties)) => self.flows(lane, parties).await,
            Err(Some(handshake)) => Box::pin(handshake.linger()).await,
            Err(None) => {}
        }
    }

    /// Ends with the lane and its parties. What is wrong with the caller's certificate may have been
    /// kept from the handshake by a resumed session: then the caller is nobody, and its requests are
    /// refused. What fails is reported.
    async fn handshake(
        &self,
        tcp: TcpStream,
        peer: SocketAddr,
        mut place: Handshaking,
    ) -> Result<(Box<Lane>, Box<Parties>), Option<Handshake>> {
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
        let limit = self.config().handshake_timeout;
        let result = place.within(limit, handshake.complete()).await.flatten();
        drop(place);
        let served = resolver.found();
        if let Err(error) = result {
            self.report(peer, &error, served.map(|(id, _)| id));
            return Err(Some(handshake));
        }
        let Some((served_as, certified)) = served else { return Err(Some(handshake)) };
        let chain = handshake.session().state().peer_certificates();
        let not_after = chain.map_or(0, tls::not_after).min(tls::not_after(&certified.cert));
        let found = self.tunnels.proofs.take(chain, PeerRole::Client);
        let expires = expiry(not_after, NO_AGE).unwrap_or_else(Instant::now);
        self.tunnels.stats.completed(Side::Server, handshake.kind());
        let (caller, proof) = match found {
            Ok(proven) => proven,
            Err(refused) => {
                self.report(peer, &DialError::Certificate(refused), Some(served_as));
                // Nobody: its requests are refused before anyone asks who it is.
                let nobody = served_as.clone();
                (nobody.clone(), self.tunnels.proofs.none(nobody, refused))
            }
        };
        match handshake.into_lane(Arc::clone(&proof), expires, &self.tunnels.stats) {
            Ok(lane) => {
                let served_as = served_as.clone();
                let parties = Parties { caller, proof, served_as, peer, expires };
                Ok((Box::new(lane), Box::new(parties)))
            }
            Err(error) => {
                self.report(peer, &error, Some(served_as));
                Err(None)
            }
        }
    }

    /// One flow after the other.
    async fn flows(&self, mut lane: Box<Lane>, parties: Box<Parties>) {
        let slot = Arc::new(Slot::default());
        // Who proved nothing from the beginning is told so when it asks for a flow.
        let proven = parties.proof.refused().is_none();
        loop {
            // Boxed: what waiting needs is given back before the long part begins.
            let Some(event) = Box::pin(self.next_request(&mut lane, &parties, proven)).await else {
                return Box::pin(lane.close()).await;
            };
            let open = match event {
                Ok(LaneEvent::Open(open)) => open,
                Ok(LaneEvent::Closed) => return lane.close_now(),
                Ok(LaneEvent::Unsupported) => return Box::pin(unsupported(lane)).await,
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
            match self.why_not(&parties) {
                Some(refusal) => {
                    self.tunnels.stats.flows_refused.fetch_add(1, Relaxed);
                    Box::pin(request.refuse(refusal)).await;
                }
                None => (self.handler)(request).await,
            }
            match slot.take() {
                Some(back) => lane = back,
                None => return,
            }
        }
    }

    /// What comes between two flows; `None` when it is time to close the lane.
    async fn next_request(
        &self,
        lane: &mut Lane,
        parties: &Parties,
        proven: bool,
    ) -> Option<Result<LaneEvent, LaneError>> {
        let mut drain = self.drain.clone();
        tokio::select! {
            biased; // What has arrived is served, also while draining.
            event = lane.next_event_within(self.config().open_timeout) => Some(event),
            () = turned(&mut drain) => None,
            _ = parties.proof.withdrawn(), if proven => None,
            () = tokio::time::sleep(2 * self.config().lane_idle) => None,
        }
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
            LaneError::Late => self.unfinished(parties),
            error => {
                debug!(peer = %parties.peer, %error, stage = "tunnel", "lane ended");
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
