//! The tunnels of one worker.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::{BuildHasher as _, Hasher as _};
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use mesh_core::addr::PeerAddr;
use mesh_core::spiffe::SpiffeId;
use mesh_core::wire::Reason;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tracing::warn;

use super::config::{Carrier, TunnelConfig};
use super::credentials::Credentials;
use super::credit::LOOK;
use super::dial::Dialler;
use super::error::{DialError, OpenError};
use super::pool::{Acquired, DialOrder, PeerPool, Ready};
use super::proof::Proofs;
use super::quic::Links;
use super::stats::TunnelStats;
use crate::gate::Gate;

/// How often pools are looked through for lanes that are idle for too long or broken.
const REAP: Duration = Duration::from_secs(1);

/// How often a drain looks whether it is done.
const DRAIN_LOOK: Duration = Duration::from_millis(50);

/// Whom a client talks to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Our workload.
    pub from: SpiffeId,
    /// The workload meant.
    pub to: SpiffeId,
    /// The agent of its node.
    pub node: PeerAddr,
}

/// The keys of session tickets. One per agent, shared by its workers: a client may come back to
/// another worker.
#[derive(Clone, Debug)]
pub struct TicketKeys(Arc<dyn rustls::server::ProducesTickets>);

impl TicketKeys {
    /// Fresh random keys, replaced every six hours.
    ///
    /// # Errors
    ///
    /// Fails if the system has no randomness.
    pub fn new() -> io::Result<Self> {
        let tickets = rustls::crypto::aws_lc_rs::Ticketer::new().map_err(io::Error::other)?;
        Ok(Self(tickets))
    }

    pub(super) fn ticketer(&self) -> Arc<dyn rustls::server::ProducesTickets> {
        Arc::clone(&self.0)
    }
}

/// One peer's tunnels, for the admin interface.
#[derive(Clone, Debug)]
pub struct TunnelView {
    /// Whom.
    pub peer: Peer,
    /// How a new flow would be carried.
    pub carrier: Carrier,
    /// Lanes that wait for a flow.
    pub idle: usize,
    /// Lanes and streams in use.
    pub busy: usize,
    /// Handshakes made.
    pub handshakes: u64,
    /// Seconds since the peer was first needed.
    pub since_s: u64,
    /// Why the peer cannot be reached, if it cannot.
    pub failing: Option<&'static str>,
}

/// The tunnels of one worker: both the client's pools and what a server needs.
pub struct Tunnels {
    pub(super) config: TunnelConfig,
    pub(super) tickets: TicketKeys,
    pub(super) credentials: Arc<Credentials>,
    pub(super) stats: Arc<TunnelStats>,
    pub(super) dialler: Dialler,
    pub(super) proofs: Arc<Proofs>,
    pub(super) links: Arc<Links>,
    pools: Mutex<HashMap<Peer, Arc<PeerPool>>>,
    /// Dials and who looks after what there is: they end with this worker's tunnels.
    tasks: Mutex<JoinSet<()>>,
    draining: AtomicBool,
}

impl fmt::Debug for Tunnels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnels").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Tunnels {
    /// Tunnels for the worker whose runtime calls this.
    ///
    /// # Errors
    ///
    /// Fails if the TLS configuration is refused.
    pub fn new(
        config: TunnelConfig,
        tickets: TicketKeys,
        credentials: Arc<Credentials>,
        stats: Arc<TunnelStats>,
    ) -> io::Result<Arc<Self>> {
        let proofs = Arc::new(Proofs::new(&credentials, &stats));
        let links = Arc::new(Links::default());
        let dialler = Dialler::new(&config, &credentials, &proofs, &links, &stats);
        let trusted = credentials.trusted.clone();
        let tunnels = Arc::new(Self {
            config,
            tickets,
            credentials,
            stats,
            dialler,
            proofs,
            links,
            pools: Mutex::default(),
            tasks: Mutex::default(),
            draining: AtomicBool::new(false),
        });
        let mut tasks = lock(&tunnels.tasks);
        tasks.spawn(reap(Arc::downgrade(&tunnels)));
        tasks.spawn(mind_windows(Arc::downgrade(&tunnels)));
        tasks.spawn(follow_trust(Arc::downgrade(&tunnels), trusted));
        drop(tasks);
        Ok(tunnels)
    }

    /// What there is, by peer.
    pub fn view(&self) -> Vec<TunnelView> {
        let now = Instant::now();
        lock(&self.pools).values().map(|pool| pool.view(now)).collect()
    }

    /// Opens nothing more, closes what is idle, and returns when all flows have ended and their last
    /// bytes have arrived. That takes as long as the flows do: bound it with a time-out.
    pub async fn drain(&self) {
        self.draining.store(true, Relaxed);
        for pool in lock(&self.pools).values() {
            pool.drain();
        }
        loop {
            let now = Instant::now();
            if lock(&self.pools).values().all(|pool| pool.is_drained(now)) {
                return;
            }
            tokio::time::sleep(DRAIN_LOOK).await;
        }
    }

    /// Ends what still runs over QUIC, for good, and says how many connections there were. Their peers are told if this
    /// worker goes on for a moment.
    pub fn cut(&self) -> usize {
        self.links.close(Reason::Draining)
    }

    /// The pool of a peer, made at need.
    pub(super) fn pool(&self, peer: &Peer) -> Arc<PeerPool> {
        let mut pools = lock(&self.pools);
        if let Some(pool) = pools.get(peer) {
            return Arc::clone(pool);
        }
        let pool = PeerPool::new(peer.clone(), &self.config, &self.stats, Instant::now());
        let pool = Arc::new(pool);
        if self.draining.load(Relaxed) {
            pool.drain();
        }
        pools.insert(peer.clone(), Arc::clone(&pool));
        pool
    }

    /// A carrier to the peer, from its pool or new.
    pub(super) async fn acquire(
        self: &Arc<Self>,
        pool: &Arc<PeerPool>,
        fresh: bool,
    ) -> Result<Ready, OpenError> {
        let mut orders = Vec::new();
        let acquired = pool.acquire(Instant::now(), fresh, &mut orders);
        self.dial_all(pool, orders);
        match acquired? {
            Acquired::Now(ready) => Ok(ready),
            Acquired::Later(receiver) => match receiver.await {
                Ok(Ok(ready)) => Ok(ready),
                Ok(Err(error)) => Err(OpenError::Dial(error)),
                // The dial was cut with its worker.
                Err(_gone) => Err(OpenError::Dial(Arc::new(DialError::Draining))),
            },
        }
    }

    /// Makes every dial that was counted.
    fn dial_all(self: &Arc<Self>, pool: &Arc<PeerPool>, orders: Vec<DialOrder>) {
        if orders.is_empty() {
            return;
        }
        let mut tasks = lock(&self.tasks);
        while tasks.try_join_next().is_some() {}
        for order in orders {
            // Boxed, because a dial that ends may order the next one: the type would contain itself.
            let dial: Pin<Box<dyn Future<Output = ()> + Send>> =
                Box::pin(Arc::clone(self).dial(Arc::clone(pool), order));
            tasks.spawn(dial);
        }
    }

    async fn dial(self: Arc<Self>, pool: Arc<PeerPool>, order: DialOrder) {
        let dialled = self.dialler.dial(&pool.peer, &self.config, &order).await;
        let now = Instant::now();
        match dialled {
            Ok((ready, fell_back)) => {
                let mut orders = Vec::new();
                match pool.dialled(ready, fell_back, now, &mut orders) {
                    Some(Ready::Lane(lane)) => lane.close_now(),
                    Some(Ready::Quic(link)) => link.retire(),
                    None => {}
                }
                self.dial_all(&pool, orders);
            }
            Err(error) => {
                self.dialler.report(&pool.peer, &error);
                pool.failed(error, now, draw);
            }
        }
    }

    /// Counts and remembers that the peer does not accept us.
    pub(super) fn rejected(&self, pool: &PeerPool, error: &Arc<DialError>) {
        self.dialler.report(&pool.peer, error);
        self.dialler.forget_sessions(&pool.peer.from);
        pool.rejected(error, Instant::now(), draw);
    }
}

/// Looks through the pools until their worker's tunnels are gone.
async fn reap(tunnels: Weak<Tunnels>) {
    let mut every = tokio::time::interval(REAP);
    loop {
        every.tick().await;
        let Some(tunnels) = tunnels.upgrade() else { return };
        let now = Instant::now();
        lock(&tunnels.pools).retain(|_, pool| !pool.reap(now));
        tunnels.dialler.forget();
        tunnels.proofs.forget();
    }
}

/// Looks after what QUIC peers may send.
async fn mind_windows(tunnels: Weak<Tunnels>) {
    let mut every = tokio::time::interval(LOOK);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let told = Gate::default();
    loop {
        every.tick().await;
        let Some(tunnels) = tunnels.upgrade() else { return };
        let flows = tunnels.links.look();
        if flows == 0 {
            continue;
        }
        tunnels.stats.flows_given_up.fetch_add(u64::try_from(flows).unwrap_or(u64::MAX), Relaxed);
        if let Some(unlogged) = told.pass("overloaded") {
            warn!(
                flows,
                unlogged,
                limit_bytes = tunnels.config.quic_credit.bytes(),
                stage = "tunnel",
                "flows that nobody reads are reset, to keep room for the others",
            );
        }
    }
}

/// Judges all peers again whenever other roots are trusted, and closes what is idle of those that are
/// not trusted any more. Their flows end by themselves: each waits for the verdict.
async fn follow_trust(tunnels: Weak<Tunnels>, mut trusted: watch::Receiver<u64>) {
    while trusted.changed().await.is_ok() {
        let Some(tunnels) = tunnels.upgrade() else { return };
        tunnels.proofs.judge_all().await;
        for pool in lock(&tunnels.pools).values() {
            pool.distrust();
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Uniform enough for jitter: the standard library's randomly keyed hash.
fn draw(n: u32) -> u32 {
    let random = RandomState::new().build_hasher().finish();
    u32::try_from(random % u64::from(n.max(1))).unwrap_or(0)
}
