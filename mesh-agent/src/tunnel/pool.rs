//! What one worker has to one peer: warm lanes, a QUIC connection, who waits for either, and when to
//! try again.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_core::backoff::Backoff;
use tokio::sync::oneshot;

use super::config::{Carrier, CarrierChoice, TunnelConfig};
use super::error::{DialError, OpenError};
use super::flow::Reuse;
use super::lane::{Lane, LaneError};
use super::quic::QuicLink;
use super::stats::{Gauged, Side, TunnelStats};
use super::tunnels::{Peer, TunnelView};

/// A carrier that can take a flow.
#[derive(Debug)]
pub(super) enum Ready {
    Lane(Box<Lane>),
    Quic(QuicLink),
}

/// What those who wait for a carrier get.
type Waiter = oneshot::Sender<Result<Ready, Arc<DialError>>>;

/// What [`PeerPool::acquire`] came to.
pub(super) enum Acquired {
    Now(Ready),
    /// Comes through the channel.
    Later(oneshot::Receiver<Result<Ready, Arc<DialError>>>),
}

/// One peer's carriers. The lock is held for a few pointer moves and never across an await.
#[derive(Debug)]
pub(super) struct PeerPool {
    pub(super) peer: Peer,
    stats: Arc<TunnelStats>,
    limits: Limits,
    state: Mutex<State>,
}

#[derive(Debug)]
struct Limits {
    choice: CarrierChoice,
    connect_timeout: Duration,
    max_flows: usize,
    max_dials: usize,
    max_idle: usize,
    spare: usize,
    idle: Duration,
    fallback_memory: Duration,
}

#[derive(Debug)]
struct State {
    idle: Vec<Idle>,
    busy: usize,
    quic: Option<QuicLink>,
    /// Connections that take no further flow and are closed when they have none.
    retired: Vec<QuicLink>,
    waiters: VecDeque<Waiter>,
    dialling: usize,
    /// When those who wait give up together: counted from the first attempt since a success.
    deadline: Option<Instant>,
    backoff: Backoff,
    failure: Option<Arc<DialError>>,
    /// The carrier that passed when the preferred one did not, and until when it is believed.
    fallback: Option<(Carrier, Instant)>,
    handshakes: u64,
    since: Instant,
    used: Instant,
    draining: bool,
}

#[derive(Debug)]
struct Idle {
    lane: Box<Lane>,
    since: Instant,
    _gauge: Gauged,
}

/// A dial that was counted and must be made.
#[derive(Debug)]
pub(super) struct DialOrder {
    pub(super) carrier: Carrier,
    pub(super) deadline: Instant,
}

impl State {
    fn retire(&mut self, link: QuicLink) {
        link.retire();
        self.retired.push(link);
    }
}

impl PeerPool {
    pub(super) fn new(
        peer: Peer,
        config: &TunnelConfig,
        stats: &Arc<TunnelStats>,
        now: Instant,
    ) -> Self {
        Self {
            peer,
            stats: Arc::clone(stats),
            limits: Limits {
                choice: config.carrier,
                connect_timeout: config.connect_timeout,
                max_flows: config.max_flows_per_peer as usize,
                max_dials: config.max_dials_per_peer,
                max_idle: config.max_idle_lanes,
                spare: config.spare_lanes,
                idle: config.lane_idle,
                fallback_memory: config.fallback_memory,
            },
            state: Mutex::new(State {
                idle: Vec::new(),
                busy: 0,
                quic: None,
                retired: Vec::new(),
                waiters: VecDeque::new(),
                dialling: 0,
                deadline: None,
                backoff: Backoff::new(config.backoff_min, config.backoff_max),
                failure: None,
                fallback: None,
                handshakes: 0,
                since: now,
                used: now,
                draining: false,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A carrier, or a place in the queue for one. `fresh` passes over what waits in the pool.
    pub(super) fn acquire(
        &self,
        now: Instant,
        fresh: bool,
        orders: &mut Vec<DialOrder>,
    ) -> Result<Acquired, OpenError> {
        let mut state = self.lock();
        state.used = now;
        if state.draining {
            return Err(OpenError::Dial(Arc::new(DialError::Draining)));
        }
        if state.busy + state.waiters.len() >= self.limits.max_flows {
            return Err(OpenError::Dial(Arc::new(DialError::Overloaded)));
        }
        let carrier = self.carrier(&state, now);
        if carrier == Carrier::Quic {
            if let Some(link) = state.quic.as_ref().filter(|link| link.is_usable(now)) {
                return Ok(Acquired::Now(Ready::Quic(link.clone())));
            }
        } else if !fresh {
            while let Some(Idle { mut lane, .. }) = state.idle.pop() {
                match lane.check() {
                    Ok(()) if lane.expires > now && lane.proof.refused().is_none() => {
                        self.order_spare(&mut state, now, orders);
                        return Ok(Acquired::Now(Ready::Lane(lane)));
                    }
                    Ok(()) => lane.close_now(),
                    Err(error) => self.broken(&error),
                }
            }
        }
        if let (Some(_), Some(failure)) = (state.backoff.wait(now), &state.failure) {
            return Err(OpenError::BackingOff(Arc::clone(failure)));
        }
        let (sender, receiver) = oneshot::channel();
        state.waiters.push_back(sender);
        self.order_for_waiters(&mut state, now, orders);
        Ok(Acquired::Later(receiver))
    }

    /// Counts a flow on a carrier of this peer.
    pub(super) fn lease(self: &Arc<Self>) -> Lease {
        self.lock().busy += 1;
        Lease { pool: Arc::clone(self) }
    }

    /// Which carrier a new flow takes.
    fn carrier(&self, state: &State, now: Instant) -> Carrier {
        match (self.limits.choice, state.fallback) {
            (CarrierChoice::Lane, _) => Carrier::Lane,
            (CarrierChoice::Quic, _) => Carrier::Quic,
            (CarrierChoice::Auto, Some((carrier, until))) if until > now => carrier,
            (CarrierChoice::Auto, _) => Carrier::Lane,
        }
    }

    fn order_for_waiters(&self, state: &mut State, now: Instant, orders: &mut Vec<DialOrder>) {
        let carrier = self.carrier(state, now);
        let most = if carrier == Carrier::Quic { 1 } else { self.limits.max_dials };
        while state.dialling < state.waiters.len().min(most) {
            orders.push(self.order(state, carrier, now));
        }
    }

    /// One lane ahead of a peer in use, so that the next flow need not wait for a handshake.
    fn order_spare(&self, state: &mut State, now: Instant, orders: &mut Vec<DialOrder>) {
        let total = state.busy + state.idle.len() + 1;
        if state.dialling == 0
            && state.idle.len() < self.limits.spare
            && total < self.limits.max_flows
            && state.backoff.wait(now).is_none()
        {
            orders.push(self.order(state, Carrier::Lane, now));
        }
    }

    fn order(&self, state: &mut State, carrier: Carrier, now: Instant) -> DialOrder {
        state.dialling += 1;
        let deadline = *state.deadline.get_or_insert(now + self.limits.connect_timeout);
        DialOrder { carrier, deadline }
    }

    /// The peer has accepted a flow: only then it has accepted us. A client's end of a handshake is done before the
    /// server has judged its certificate.
    pub(super) fn accepted(&self) {
        self.lock().backoff.succeeded();
    }

    /// A dial has succeeded over `carrier`; `fell_back` if that was not the preferred one. Returns
    /// what the pool has no room for.
    pub(super) fn dialled(
        &self,
        ready: Ready,
        fell_back: bool,
        now: Instant,
        orders: &mut Vec<DialOrder>,
    ) -> Option<Ready> {
        let mut state = self.lock();
        state.dialling = state.dialling.saturating_sub(1);
        state.handshakes += 1;
        state.deadline = None;
        state.failure = None;
        if fell_back {
            let carrier = match ready {
                Ready::Lane(_) => Carrier::Lane,
                Ready::Quic(_) => Carrier::Quic,
            };
            state.fallback = Some((carrier, now + self.limits.fallback_memory));
        }
        let left = self.hand_over(&mut state, ready, now);
        self.order_for_waiters(&mut state, now, orders);
        left
    }

    /// A dial has failed: all who wait fail with it, and for a while everyone who comes.
    pub(super) fn failed(&self, error: DialError, now: Instant, draw: impl FnMut(u32) -> u32) {
        let error = Arc::new(error);
        let mut state = self.lock();
        state.dialling = state.dialling.saturating_sub(1);
        Self::back_off(&mut state, &error, now, draw);
    }

    /// The peer did not accept us on a carrier that had been made: like a failed dial, so that a
    /// refused certificate does not cost a handshake per connection.
    pub(super) fn rejected(
        &self,
        error: &Arc<DialError>,
        now: Instant,
        draw: impl FnMut(u32) -> u32,
    ) {
        Self::back_off(&mut self.lock(), error, now, draw);
    }

    fn back_off(
        state: &mut State,
        error: &Arc<DialError>,
        now: Instant,
        draw: impl FnMut(u32) -> u32,
    ) {
        state.deadline = None;
        state.fallback = None;
        // Several dials of one group fail together and are one failure.
        if state.backoff.wait(now).is_none() {
            match **error {
                // Mostly an agent that is about to be there again: who asks knows within a round trip, and
                // the node only says no.
                DialError::ConnectionRefused => state.backoff.refused(now, draw),
                _ => state.backoff.failed(now, draw),
            }
        }
        state.failure = Some(Arc::clone(error));
        for waiter in state.waiters.drain(..) {
            // Who has gone meanwhile needs no answer.
            waiter.send(Err(Arc::clone(error))).unwrap_or_default();
        }
    }

    /// Gives a carrier to those who wait, or keeps it.
    fn hand_over(&self, state: &mut State, ready: Ready, now: Instant) -> Option<Ready> {
        match ready {
            Ready::Quic(link) => {
                for waiter in state.waiters.drain(..) {
                    drop(waiter.send(Ok(Ready::Quic(link.clone()))));
                }
                if let Some(old) = state.quic.replace(link) {
                    state.retire(old);
                }
                None
            }
            Ready::Lane(mut lane) => {
                if lane.proof.refused().is_some() {
                    return Some(Ready::Lane(lane));
                }
                while let Some(waiter) = state.waiters.pop_front() {
                    match waiter.send(Ok(Ready::Lane(lane))) {
                        Ok(()) => return None,
                        Err(Ok(Ready::Lane(back))) => lane = back,
                        Err(_) => return None,
                    }
                }
                let last = state.idle.len();
                self.keep(state, lane, last, now).map(Ready::Lane)
            }
        }
    }

    /// Keeps an idle lane, before those that are taken earlier; or returns it.
    fn keep(
        &self,
        state: &mut State,
        lane: Box<Lane>,
        index: usize,
        now: Instant,
    ) -> Option<Box<Lane>> {
        if state.draining || state.idle.len() >= self.limits.max_idle || lane.expires <= now {
            return Some(lane);
        }
        let gauge = Gauged::new(&self.stats, |stats| &stats.lanes_idle);
        state.idle.insert(index, Idle { lane, since: now, _gauge: gauge });
        None
    }

    /// An idle lane has ended. An alert means that the peer refused it, which only shows now.
    fn broken(&self, error: &LaneError) {
        if let LaneError::Tls(error) = error {
            self.stats.refused(Side::Client, error.reason());
        }
    }

    /// Closes what has been idle for too long or has broken. Returns whether the peer can be
    /// forgotten.
    pub(super) fn reap(&self, now: Instant) -> bool {
        let mut state = self.lock();
        let mut gone = Vec::new();
        let mut kept = Vec::with_capacity(state.idle.len());
        for mut idle in state.idle.drain(..) {
            let old = now.duration_since(idle.since) >= self.limits.idle;
            match idle.lane.check() {
                Ok(()) if old || idle.lane.expires <= now => gone.push(idle.lane),
                Ok(()) => kept.push(idle),
                Err(error) => self.broken(&error),
            }
        }
        state.idle = kept;
        if let Some(link) = &state.quic {
            link.listen(now);
        }
        if let Some(link) = state.quic.take_if(|link| {
            !link.is_usable(now) || link.idle_for(now).is_some_and(|idle| idle >= self.limits.idle)
        }) {
            state.retire(link);
        }
        state.retired.retain(|link| !link.close_if_settled(now));
        let forgotten = state.idle.is_empty()
            && state.busy == 0
            && state.dialling == 0
            && state.waiters.is_empty()
            && state.quic.is_none()
            && state.retired.is_empty()
            && state.backoff.wait(now).is_none()
            && state.fallback.is_none_or(|(_, until)| until <= now)
            && now.duration_since(state.used) >= self.limits.idle;
        drop(state);
        for lane in gone {
            lane.close_now();
        }
        forgotten
    }

    /// Closes what is idle to a peer that is not trusted any more, and begins no flow on the rest.
    pub(super) fn distrust(&self) {
        let mut state = self.lock();
        let (kept, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut state.idle)
            .into_iter()
            .partition(|idle| idle.lane.proof.refused().is_none());
        state.idle = kept;
        if let Some(link) = state.quic.take_if(|link| link.is_distrusted()) {
            state.retire(link);
        }
        drop(state);
        for Idle { lane, .. } in gone {
            lane.close_now();
        }
    }

    /// Closes all idle lanes: the peer did not answer on one of them, and each of the others would cost a
    /// further application its connection. Whether the peer is there, the next dial finds out for all.
    pub(super) fn close_idle(&self) {
        let idle = std::mem::take(&mut self.lock().idle);
        for Idle { lane, .. } in idle {
            lane.close_now();
        }
    }

    /// Closes what is idle and refuses whatever is asked for from now on.
    pub(super) fn drain(&self) {
        let mut state = self.lock();
        state.draining = true;
        let idle = std::mem::take(&mut state.idle);
        if let Some(link) = state.quic.take() {
            state.retire(link);
        }
        let error = Arc::new(DialError::Draining);
        for waiter in state.waiters.drain(..) {
            drop(waiter.send(Err(Arc::clone(&error))));
        }
        drop(state);
        for Idle { lane, .. } in idle {
            lane.close_now();
        }
    }

    /// Whether, after [`PeerPool::drain`], every flow has ended and reached its peer.
    pub(super) fn is_drained(&self, now: Instant) -> bool {
        let mut state = self.lock();
        state.retired.retain(|link| !link.close_if_settled(now));
        state.busy == 0 && state.retired.is_empty()
    }

    pub(super) fn view(&self, now: Instant) -> TunnelView {
        let state = self.lock();
        TunnelView {
            peer: self.peer.clone(),
            carrier: self.carrier(&state, now),
            idle: state.idle.len(),
            busy: state.busy,
            handshakes: state.handshakes,
            since_s: now.duration_since(state.since).as_secs(),
            failing: state.failure.as_ref().map(|failure| failure.reason()),
        }
    }
}

/// A flow's claim on its peer: counted as long as it lives.
#[derive(Debug)]
pub(crate) struct Lease {
    pool: Arc<PeerPool>,
}

impl Lease {
    /// The flow has ended cleanly.
    pub(super) fn give_back(self, mut lane: Box<Lane>, reuse: Reuse) {
        let now = Instant::now();
        if lane.expires <= now || reuse == Reuse::Never {
            // Who waits for one has a dial of its own under way.
            return lane.close_now();
        }
        lane.used = true;
        let mut state = self.pool.lock();
        let left = match reuse {
            Reuse::Last => self.pool.keep(&mut state, lane, 0, now).map(Ready::Lane),
            _ => self.pool.hand_over(&mut state, Ready::Lane(lane), now),
        };
        drop(state);
        if let Some(Ready::Lane(lane)) = left {
            lane.close_now();
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        state.busy = state.busy.saturating_sub(1);
    }
}
