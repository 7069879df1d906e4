//! Which endpoint takes a connection.
//!
//! The default is power of two choices over peak EWMA: draw two endpoints at random, take the less
//! loaded (Mitzenmacher, *The Power of Two Choices in Randomized Load Balancing*, IEEE TPDS 12(10),
//! 2001). Load is an estimate of the time to be accepted, times the connections outstanding, so a
//! stalled endpoint sheds traffic before its first time-out. The estimate jumps to any slower sample
//! at once and forgets it over [`DECAY`]: being slow to trust costs a little balance, being slow to
//! distrust costs user latency.
//!
//! An endpoint that refused or timed out is *tried last* for a while: still there when nobody else
//! is, because a wrong guess must never make a service unreachable. Where all endpoints of a service had
//! failed, the first of them that is back does not keep all connections: the others follow within
//! [`AVOID_FIRST`].

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::addr::EndpointAddr;
use crate::snapshot::Endpoint;

/// Time constant with which a latency estimate is forgotten.
pub const DECAY: Duration = Duration::from_secs(10);
/// Times to be accepted below this count as this: they tell the path (a pod of this node answers in
/// 0.1 ms, one of another zone in 2 ms) and nothing about load. Without it the farthest of the
/// endpoints would never win a comparison, and locality counts only where it is asked for. Also
/// stands in until the first sample.
pub const RTT_FLOOR: Duration = Duration::from_millis(5);
/// How long an endpoint is tried last after its first failure; doubles whenever it fails again after that.
pub const AVOID_FIRST: Duration = Duration::from_secs(2);
/// The longest time that an endpoint is tried last.
pub const AVOID_MAX: Duration = Duration::from_secs(60);

/// Endpoints that are remembered. Destinations outside the mesh are chosen by the pods; past this
/// number those without a connection are forgotten, which costs a little balance and no correctness.
pub const MAX_LOADS: usize = 65_536;

/// How an endpoint is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Policy {
    /// Power of two choices over peak EWMA and outstanding connections.
    #[default]
    LeastLoaded,
    /// The endpoint chosen longest ago.
    RoundRobin,
    /// Any, uniformly.
    Random,
}

/// What is known of every endpoint in use. One per agent; forgotten with [`Loads::retain`].
#[derive(Debug, Default)]
pub struct Loads {
    by_addr: HashMap<EndpointAddr, Load>,
    picks: u64,
}

#[derive(Debug)]
struct Load {
    rtt_s: f64,
    updated: Instant,
    outstanding: u32,
    failures: u32,
    avoid_until: Option<Instant>,
    /// Value of `Loads::picks` when last chosen.
    picked: u64,
}

impl Loads {
    /// The index of the endpoint to try next, or `None` if all have been tried. Counts as chosen:
    /// the caller reports the end with [`Loads::accepted`] or [`Loads::failed`], and after an
    /// acceptance [`Loads::finished`].
    ///
    /// `draw(n)` must return a number uniform in `0..n`.
    pub fn pick(
        &mut self,
        policy: Policy,
        candidates: &[Endpoint],
        tried: &[EndpointAddr],
        now: Instant,
        draw: impl FnMut(usize) -> usize,
    ) -> Option<usize> {
        let index = self.choose(policy, candidates, tried, now, draw)?;
        self.take(candidates[index].addr, now);
        Some(index)
    }

    /// As [`Loads::pick`], of an endpoint that somebody else has chosen.
    pub fn take(&mut self, addr: EndpointAddr, now: Instant) {
        self.picks += 1;
        let picks = self.picks;
        if self.by_addr.len() >= MAX_LOADS {
            self.by_addr.retain(|_, load| load.outstanding > 0);
        }
        let load = self.load_mut(addr, now);
        load.outstanding += 1;
        load.picked = picks;
    }

    /// The endpoint, one of `candidates`, accepted the connection `rtt` after it was asked.
    pub fn accepted(
        &mut self,
        addr: EndpointAddr,
        candidates: &[Endpoint],
        now: Instant,
        rtt: Duration,
    ) {
        self.recovered(addr, candidates, now);
        let load = self.load_mut(addr, now);
        let sample_s = rtt.as_secs_f64();
        let keep = load.keep(now);
        load.rtt_s = sample_s.max(load.rtt_s * keep + sample_s * (1.0 - keep));
        load.updated = now;
        load.failures = 0;
        load.avoid_until = None;
    }

    /// If every one of `candidates` had failed and `addr` is the first that serves again, what they had in
    /// common is over, and how long it has lasted says nothing of the others: each is soon tried, and those that
    /// fail again begin anew. Otherwise `addr` would have all connections for up to [`AVOID_MAX`].
    fn recovered(&mut self, addr: EndpointAddr, candidates: &[Endpoint], now: Instant) {
        // Its own first: nearly always it has not failed, and the others need not be looked at. One that has
        // failed once was out for a moment, and that says nothing of others that have failed for longer.
        let was_out = self.by_addr.get(&addr).is_some_and(|load| load.failures > 1);
        if !was_out || !candidates.iter().all(|one| self.has_failed(one.addr)) {
            return;
        }
        for one in candidates {
            if let Some(load) = self.by_addr.get_mut(&one.addr) {
                load.failures = 1;
                load.avoid_until = load.avoid_until.map(|until| until.min(now + AVOID_FIRST));
            }
        }
    }

    /// Whether the last that was heard of it is a failure.
    fn has_failed(&self, addr: EndpointAddr) -> bool {
        self.by_addr.get(&addr).is_some_and(|load| load.failures > 0)
    }

    /// The endpoint refused what was `asked` of it then, or did not answer in time.
    pub fn failed(&mut self, addr: EndpointAddr, asked: Instant, now: Instant) {
        let load = self.load_mut(addr, now);
        load.outstanding = load.outstanding.saturating_sub(1);
        // What was under way together fails together and is one failure, and so is what came after it for want of
        // anybody else: a burst would keep an endpoint out for a minute that was away for a moment.
        if let Some(until) = load.avoid_until.filter(|until| asked < *until) {
            // Who hears of it late has waited: nobody is sent to wait there at once.
            load.avoid_until = Some(until.max(now + AVOID_FIRST));
            return;
        }
        let avoid = AVOID_FIRST.saturating_mul(1 << load.failures.min(10)).min(AVOID_MAX);
        load.failures = load.failures.saturating_add(1);
        load.avoid_until = Some(now + avoid);
    }

    /// A connection that was accepted has ended, or one that was chosen was not tried after all.
    pub fn finished(&mut self, addr: EndpointAddr) {
        if let Some(load) = self.by_addr.get_mut(&addr) {
            load.outstanding = load.outstanding.saturating_sub(1);
        }
    }

    /// Forgets endpoints that are gone, unless a connection to them is still open.
    pub fn retain(&mut self, live: impl Fn(&EndpointAddr) -> bool) {
        self.by_addr.retain(|addr, load| load.outstanding > 0 || live(addr));
    }

    /// How long `addr` is still tried last; `None` if it is not.
    pub fn avoided_for(&self, addr: EndpointAddr, now: Instant) -> Option<Duration> {
        let until = self.by_addr.get(&addr).and_then(|load| load.avoid_until)?;
        let left = until.saturating_duration_since(now);
        (!left.is_zero()).then_some(left)
    }

    /// Connections open or being opened to `addr`.
    pub fn outstanding(&self, addr: EndpointAddr) -> u32 {
        self.by_addr.get(&addr).map_or(0, |load| load.outstanding)
    }

    fn choose(
        &self,
        policy: Policy,
        candidates: &[Endpoint],
        tried: &[EndpointAddr],
        now: Instant,
        mut draw: impl FnMut(usize) -> usize,
    ) -> Option<usize> {
        let untried = |&i: &usize| !tried.contains(&candidates[i].addr);
        let preferred = |&i: &usize| untried(&i) && !self.is_avoided(candidates[i].addr, now);
        if policy == Policy::RoundRobin {
            let oldest = |i: &usize| self.by_addr.get(&candidates[*i].addr).map_or(0, |l| l.picked);
            let all = || 0..candidates.len();
            return all()
                .filter(preferred)
                .min_by_key(oldest)
                .or_else(|| all().filter(untried).min_by_key(oldest));
        }
        // Two draws nearly always find two good ones; only then is the list of a large service walked.
        if candidates.len() > 2 && policy == Policy::LeastLoaded {
            let first = draw(candidates.len());
            let second = (first + 1 + draw(candidates.len() - 1)) % candidates.len();
            if preferred(&first) && preferred(&second) {
                return Some(self.lighter(candidates, first, second, now));
            }
        }
        let mut eligible: Vec<usize> = (0..candidates.len()).filter(preferred).collect();
        if eligible.is_empty() {
            eligible = (0..candidates.len()).filter(untried).collect();
        }
        match (eligible.len(), policy) {
            (0, _) => None,
            (1, _) => Some(eligible[0]),
            (n, Policy::Random) => Some(eligible[draw(n)]),
            (n, _) => {
                let first = draw(n);
                // Draw the second from the others, so that the choice is always between two.
                let second = (first + 1 + draw(n - 1)) % n;
                Some(self.lighter(candidates, eligible[first], eligible[second], now))
            }
        }
    }

    fn lighter(&self, candidates: &[Endpoint], a: usize, b: usize, now: Instant) -> usize {
        let load = |i: usize| match self.by_addr.get(&candidates[i].addr) {
            Some(load) => load.in_seconds(now),
            None => RTT_FLOOR.as_secs_f64(),
        };
        if load(b) < load(a) { b } else { a }
    }

    fn is_avoided(&self, addr: EndpointAddr, now: Instant) -> bool {
        self.avoided_for(addr, now).is_some()
    }

    fn load_mut(&mut self, addr: EndpointAddr, now: Instant) -> &mut Load {
        self.by_addr.entry(addr).or_insert_with(|| Load {
            rtt_s: RTT_FLOOR.as_secs_f64(),
            updated: now,
            outstanding: 0,
            failures: 0,
            avoid_until: None,
            picked: 0,
        })
    }
}

impl Load {
    /// Seconds of work in front of a new connection: to compare endpoints, not to report.
    ///
    /// Fades while the endpoint is unused, down to the floor. Without that, one slow
    /// sample would exclude it for ever, since nothing would be sent there to correct it.
    fn in_seconds(&self, now: Instant) -> f64 {
        let rtt_s = (self.rtt_s * self.keep(now)).max(RTT_FLOOR.as_secs_f64());
        rtt_s * (f64::from(self.outstanding) + 1.0)
    }

    /// Share of the estimate that is still believed at `now`.
    fn keep(&self, now: Instant) -> f64 {
        let idle = now.saturating_duration_since(self.updated);
        (-idle.as_secs_f64() / DECAY.as_secs_f64()).exp()
    }
}

#[cfg(test)]
mod tests;
