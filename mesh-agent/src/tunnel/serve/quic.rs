//! QUIC connections: a handshake, then a task per stream.

use std::io;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use mesh_core::stage::Stage;
use mesh_core::wire::{Reason, Refusal};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::handshakes::{Handshakes, Handshaking};
use super::{Arrivals, NO_AGE, Parties, Server, take, turned};
use crate::identity::verify::PeerRole;
use crate::tunnel::config::TunnelConfig;
use crate::tunnel::credit::Loan;
use crate::tunnel::dial::expiry;
use crate::tunnel::error::DialError;
use crate::tunnel::flow::{AnswerOn, Request};
use crate::tunnel::quic::{self, QuicLink};
use crate::tunnel::reset_key::ResetKey;
use crate::tunnel::stats::{SessionKind, Side};
use crate::tunnel::steering::Tag;
use crate::tunnel::stream::{self, Head, QuicAnswer};
use crate::tunnel::tls::{self, Refusals, ServedBySni};
use crate::tunnel::tunnels::Tunnels;

/// Streams of a connection that are taken and have not said yet what they want.
const MOST_OPENING: usize = 64;

/// The part of all connections, by what they take of the credit, that one address may have.
const OF_ONE_ADDRESS: u64 = 2;

/// From this part of all handshakes on, whoever wants another one has to show first that it receives
/// what is sent to its address (RFC 9000 section 8.1.2): senders that do not cannot take the rest.
const UNVALIDATED: usize = 4;

impl Tunnels {
    /// Serves QUIC connections in the same way, on a UDP socket that the caller has bound. With the
    /// `key` of the agent before this one, peers of that one learn that it is gone; with a `tag` of its own
    /// both can have the port ([`Steering`](super::super::Steering)).
    ///
    /// # Errors
    ///
    /// Fails if the socket cannot be used or the TLS configuration is refused.
    pub async fn serve_quic<H, F>(
        self: Arc<Self>,
        socket: UdpSocket,
        key: &ResetKey,
        tag: Tag,
        drain: watch::Receiver<bool>,
        handler: H,
    ) -> io::Result<()>
    where
        H: Fn(Request) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let server = Arc::new(Server::new(self, handler, drain.clone())?);
        let transport = quic::transport(&server.tunnels.config);
        let first = quic::server_config(server.tls.clone(), &transport)?;
        let endpoint = quic::server_endpoint(socket, first, key, tag)?;
        let most = server.config().max_handshakes;
        let handshakes = Handshakes::new(most);
        let mut connections = take(&endpoint, drain, |incoming: quinn::Incoming, open| {
            if open >= server.config().quic_max_connections {
                incoming.refuse();
                return None;
            }
            let is_busy = handshakes.under_way() >= most / UNVALIDATED;
            if !incoming.remote_address_validated() && is_busy {
                server.tunnels.stats.retries.fetch_add(1, Relaxed);
                // Fails for an address that is validated, which this one is not.
                incoming.retry().unwrap_or_default();
                return None;
            }
            let window = server.config().quic_stream_window;
            let Some(loan) = server.config().quic_credit.lend(window.into()) else {
                server.report(incoming.remote_address(), &DialError::Overloaded, None);
                incoming.refuse();
                return None;
            };
            let Ok(place) = handshakes.take(incoming.remote_address().ip()) else {
                // The client asks again, as one that waits in a lane's backlog.
                incoming.ignore();
                return None;
            };
            Some(Arc::clone(&server).connection(incoming, Arc::clone(&transport), loan, place))
        })
        .await;
        // Without a word the peers that still come would wait for their time-out.
        loop {
            tokio::select! {
                ended = connections.join_next() => if ended.is_none() { break },
                Some(late) = endpoint.accept() => late.refuse(),
            }
        }
        endpoint.set_server_config(None);
        endpoint.wait_idle().await;
        Ok(())
    }
}

impl Arrivals for quinn::Endpoint {
    type Carrier = quinn::Incoming;

    async fn next(&self) -> Option<quinn::Incoming> {
        self.accept().await
    }
}

impl<H, F> Server<H>
where
    H: Fn(Request) -> F + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    /// One QUIC connection, from its handshake to its end.
    async fn connection(
        self: Arc<Self>,
        incoming: quinn::Incoming,
        transport: Arc<quinn::TransportConfig>,
        loan: Loan,
        mut place: Handshaking,
    ) {
        let peer = incoming.remote_address();
        let handshake = self.quic_handshake(incoming, &transport, loan, &mut place).await;
        drop(place);
        let Some((link, parties)) = handshake else { return };
        // Not before: until then anybody may say to be there.
        let Some(_place) = self.place(peer.ip(), self.of_one_address()) else {
            self.report(peer, &DialError::Overloaded, Some(&parties.served_as));
            return link.close(Reason::Overloaded);
        };
        let mut drain = self.drain.clone();
        let mut flows = JoinSet::new();
        let mut ending = false;
        let mut may_be_open = quic::first_streams(self.config());
        let opening = Arc::new(Semaphore::new(MOST_OPENING));
        loop {
            // One frame may open all streams that are allowed, and costs nothing: no more are taken than say soon why.
            let next = async {
                let place = Arc::clone(&opening).acquire_owned().await;
                (place, link.connection().accept_bi().await)
            };
            let (place, (send, mut recv)) = tokio::select! {
                biased; // As for lanes.
                (place, stream) = next => match stream {
                    Ok(stream) => (place, stream),
                    Err(error) => {
                        debug!(%peer, %error, stage = "tunnel", "connection ended");
                        break;
                    }
                },
                // What runs goes on, or is reset by its relay when the proof has gone; who asks for more
                // is told why not.
                () = turned(&mut drain), if !ending => {
                    ending = true;
                    link.retire();
                    continue;
                }
                _ = parties.proof.withdrawn(), if !ending => {
                    ending = true;
                    link.retire();
                    continue;
                }
                () = link.settle(), if ending => break,
                () = self.unused(&link), if !ending => {
                    link.close(Reason::Draining);
                    break;
                }
                Some(_ended) = flows.join_next() => continue,
            };
            // Also where there is always a further stream: one that has ended takes its memory until then.
            while flows.try_join_next().is_some() {}
            let waiting = MOST_OPENING - 1 - opening.available_permits();
            let open = flows.len().saturating_sub(waiting);
            may_be_open = self.allow_more(&link, open, may_be_open);
            // Before the task begins: what is accepted is used.
            let claim = link.claim();
            let (server, link, parties) = (Arc::clone(&self), link.clone(), parties.clone());
            flows.spawn(async move {
                let limit = server.config().open_timeout;
                let head = timeout(limit, stream::read_open(&mut recv)).await;
                drop(place);
                let head = match head {
                    Ok(Ok(head)) => head,
                    Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
                        let served_as = Some(&parties.served_as);
                        server.refused(peer, Reason::Protocol.as_str(), &error, served_as);
                        return link.close(Reason::Protocol);
                    }
                    Err(_elapsed) => {
                        server.unfinished(&parties);
                        return drop(QuicAnswer::new(send, recv, claim));
                    }
                    // Given up by the client before OPEN was read, or by us: no other flow's concern.
                    Ok(Err(_given_up)) => return drop(QuicAnswer::new(send, recv, claim)),
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
                match server.why_not(&parties) {
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

    /// Connections that one address may have: a part of as many as there may be, and as there is credit for.
    fn of_one_address(&self) -> u32 {
        let TunnelConfig { quic_credit, quic_stream_window, quic_max_connections, .. } =
            self.config();
        let all = quic_credit.bytes() / u64::from(*quic_stream_window).max(1);
        let all = all.min(u64::try_from(*quic_max_connections).unwrap_or(u64::MAX));
        u32::try_from(all / OF_ONE_ADDRESS).unwrap_or(u32::MAX).max(1)
    }

    /// Completes when no flow has been on the connection for so long that its client, which closes it before, has gone
    /// astray: it takes a part of what all peers share.
    async fn unused(&self, link: &QuicLink) {
        let limit = 2 * self.config().lane_idle;
        loop {
            let idle = link.idle_for(Instant::now()).unwrap_or_default();
            if idle >= limit {
                return;
            }
            sleep(limit - idle).await;
        }
    }

    /// How many streams the peer may have open, now that so many flows are: before it has to wait for us.
    fn allow_more(&self, link: &QuicLink, open: usize, may_be_open: u32) -> u32 {
        let most = self.config().max_flows_per_peer;
        if may_be_open >= most || open < may_be_open as usize / 2 {
            return may_be_open;
        }
        let more = may_be_open.saturating_mul(2).min(most);
        link.connection().set_max_concurrent_bi_streams(more.into());
        more
    }

    async fn quic_handshake(
        &self,
        incoming: quinn::Incoming,
        transport: &Arc<quinn::TransportConfig>,
        loan: Loan,
        place: &mut Handshaking,
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
        let connected = place.within(self.config().handshake_timeout, handshake).await;
        let served = resolver.found();
        let connection = match connected {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => {
                let error = quic::server_cause(&error, refusals.take(""), served.is_some());
                self.report(peer, &error, served.map(|(id, _)| id));
                return None;
            }
            Err(error) => {
                self.report(peer, &error, served.map(|(id, _)| id));
                return None;
            }
        };
        let (served_as, certified) = served?;
        let chain = quic::peer_chain(&connection);
        let chain = chain.as_deref();
        let not_after = chain.map_or(0, tls::not_after).min(tls::not_after(&certified.cert));
        let expires = expiry(not_after, NO_AGE).unwrap_or_else(Instant::now);
        tunnels.stats.completed(Side::Server, SessionKind::Full);
        match tunnels.proofs.take(chain, PeerRole::Client) {
            Ok((caller, proof)) => {
                let served_as = served_as.clone();
                let (links, stats) = (&tunnels.links, &tunnels.stats);
                let link =
                    QuicLink::new(connection, Arc::clone(&proof), expires, loan, links, stats);
                Some((link, Parties { caller, proof, served_as, peer, expires }))
            }
            Err(refused) => {
                self.report(peer, &DialError::Certificate(refused), Some(served_as));
                quic::close(&connection, Reason::CallerCertificate);
                None
            }
        }
    }
}
