//! Serving: takes lanes and QUIC connections from peers, and hands on what they ask for.
//!
//! What both carriers have in common is here: the loop that takes carriers until the drain, who may
//! have a flow, and what is counted and logged of those who may not.

mod handshakes;
mod lanes;
mod quic;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mesh_core::spiffe::SpiffeId;
use mesh_core::stage::Stage;
use mesh_core::wire::{Reason, Refusal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::warn;

use super::config::TunnelConfig;
use super::error::DialError;
use super::flow::Request;
use super::lane::LaneError;
use super::proof::Proof;
use super::stats::Side;
use super::tls::{self, Refusals, ServedBySni};
use super::tunnels::{Tunnels, lock};
use crate::gate::Gate;

/// A server refuses a carrier only when a certificate has ended: its age is for the client to mind.
const NO_AGE: Duration = Duration::from_secs(365 * 24 * 3600);

/// What all connections of a server share.
struct Server<H> {
    tunnels: Arc<Tunnels>,
    handler: H,
    drain: watch::Receiver<bool>,
    tls: rustls::ServerConfig,
    /// By the address from where they come.
    carriers: Mutex<HashMap<IpAddr, u32>>,
    gate: Gate,
}

/// Who is at the other end of a carrier, and whom it meant.
#[derive(Clone, Debug)]
struct Parties {
    caller: SpiffeId,
    /// What shows that it is the caller.
    proof: Arc<Proof>,
    served_as: SpiffeId,
    peer: SocketAddr,
    expires: Instant,
}

/// Where carriers come from.
trait Arrivals {
    /// A carrier that has not begun.
    type Carrier;

    /// The next one; `None` if there will be none any more. Cancel-safe.
    fn next(&self) -> impl Future<Output = Option<Self::Carrier>> + Send;
}

/// Takes carriers until the drain begins, each with the task that `begin` makes of it, and returns
/// the tasks that run still.
async fn take<A: Arrivals, T: Future<Output = ()> + Send + 'static>(
    arrivals: &A,
    mut drain: watch::Receiver<bool>,
    mut begin: impl FnMut(A::Carrier, usize) -> Option<T>,
) -> JoinSet<()> {
    let mut carriers = JoinSet::new();
    loop {
        let arrived = tokio::select! {
            biased; // A drain must win over peers that never stop connecting.
            () = turned(&mut drain) => break,
            // Reap, so that finished carriers do not pile up until the drain.
            Some(ended) = carriers.join_next() => {
                if let Err(error) = ended {
                    warn!(%error, stage = "tunnel", "carrier task panicked");
                }
                continue;
            }
            arrived = arrivals.next() => arrived,
        };
        let Some(arrived) = arrived else { break };
        if let Some(task) = begin(arrived, carriers.len()) {
            carriers.spawn(task);
        }
    }
    carriers
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
        Ok(Self { tunnels, handler, drain, tls, carriers: Mutex::default(), gate: Gate::default() })
    }

    fn config(&self) -> &TunnelConfig {
        &self.tunnels.config
    }

    /// Whether the carrier itself forbids the flow.
    fn why_not(&self, parties: &Parties) -> Option<Refusal> {
        let refuse = |reason| Some(Refusal::new(Stage::Tunnel, reason));
        if parties.proof.refused().is_some() || parties.expires <= Instant::now() {
            return refuse(Reason::CallerCertificate);
        }
        if *self.drain.borrow() {
            return refuse(Reason::Draining);
        }
        None
    }

    /// A place among the `most` carriers of one address, if there is one left.
    fn place(self: &Arc<Self>, address: IpAddr, most: u32) -> Option<Place<H>> {
        // One node may come from both a v4 address and its mapped form.
        let address = address.to_canonical();
        let mut carriers = lock(&self.carriers);
        if carriers.get(&address).is_some_and(|taken| *taken >= most) {
            return None;
        }
        *carriers.entry(address).or_default() += 1;
        Some(Place { server: Arc::clone(self), address })
    }

    /// A request that has begun and does not go on.
    fn unfinished(&self, parties: &Parties) {
        self.refused(parties.peer, "open_timeout", &LaneError::Late, Some(&parties.served_as));
    }

    /// Counts a refused peer and logs it at a bounded rate.
    fn report(&self, peer: SocketAddr, error: &DialError, served_as: Option<&SpiffeId>) {
        let reason = match (error, served_as) {
            // rustls has no word for a server name that nobody here answers to.
            (DialError::Tls(rustls::Error::General(_)), None) => {
                return self.report(peer, &DialError::UnknownName, None);
            }
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
}

/// A carrier's place among those of its address.
struct Place<H> {
    server: Arc<Server<H>>,
    address: IpAddr,
}

impl<H> Drop for Place<H> {
    fn drop(&mut self) {
        let mut carriers = lock(&self.server.carriers);
        if let Some(taken) = carriers.get_mut(&self.address) {
            *taken -= 1;
            if *taken == 0 {
                carriers.remove(&self.address);
            }
        }
    }
}

/// Waits until the drain begins; a sender that is gone counts as that.
async fn turned(drain: &mut watch::Receiver<bool>) {
    drop(drain.wait_for(|on| *on).await);
}
