//! What the programs are told of the agent's life.

use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use mesh_common::maps::Control;
use mesh_common::verdict::STALE_NS;

use super::{Capture, lock, sys};

/// When the agent last carried what it is sent, as far as it has said so.
#[derive(Debug)]
pub(super) struct Heartbeat {
    /// Both by `CLOCK_BOOTTIME`.
    carries_until_ns: AtomicU64,
    carried_ns: AtomicU64,
}

impl Heartbeat {
    /// Of an agent that does not carry yet, after one that was last heard then.
    pub(super) fn after(heard_ns: u64) -> Self {
        Self { carries_until_ns: AtomicU64::new(0), carried_ns: AtomicU64::new(heard_ns) }
    }

    fn carries(&self, now_ns: u64, time: Duration) {
        let time_ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let until_ns = if time.is_zero() { 0 } else { now_ns.saturating_add(time_ns) };
        self.carries_until_ns.store(until_ns, Relaxed);
    }

    /// What to write at this time: never so old that the agent would count for gone.
    pub(super) fn at(&self, now_ns: u64) -> u64 {
        if now_ns <= self.carries_until_ns.load(Relaxed) {
            self.carried_ns.store(now_ns, Relaxed);
        }
        let silent_ns = now_ns.saturating_sub(STALE_NS + 1);
        self.carried_ns.load(Relaxed).max(silent_ns)
    }
}

impl Capture {
    /// What is sent to the agent is carried from now on for so long, [`Duration::MAX`] being as long as it lives; or not
    /// ([`Duration::ZERO`], as at the start): it has yet to learn of its pods, or takes nothing new. Then the programs
    /// hear of it what they would of a silent one, as soon as they would: pods that fail open bypass it, and no other.
    pub fn carries(&self, time: Duration) {
        self.heartbeat.carries(sys::boot_ns(), time);
    }

    /// Tells the programs that the agent lives. Once a second: after 5 s of silence pods that fail open
    /// bypass it, after a day all do.
    pub fn beat(&self) {
        self.tell(&mut lock(&self.told));
    }

    /// Tells the programs `told`, and that the agent lives.
    pub(super) fn tell(&self, told: &mut Control) {
        told.heartbeat_ns = self.heartbeat.at(sys::boot_ns());
        // Writing the one element of an array cannot fail; were it to, silence is what it means.
        drop(sys::update(self.control.as_fd(), &0u32, told));
    }
}

#[cfg(test)]
mod tests {
    use mesh_common::verdict::{Agent, GONE_NS};

    use super::*;

    #[test]
    fn agent_that_does_not_carry_is_silent_after_a_while_and_never_gone() {
        let start = 3 * GONE_NS;
        let heart = Heartbeat::after(start);
        let seen = |after_ns: u64| Agent::at(heart.at(start + after_ns), start + after_ns);
        assert_eq!(seen(STALE_NS), Agent::Alive, "the one before was there a moment ago");
        assert_eq!(seen(STALE_NS + 1), Agent::Silent);
        assert_eq!(seen(2 * GONE_NS), Agent::Silent);
        heart.carries(start + 2 * GONE_NS, Duration::MAX);
        assert_eq!(seen(2 * GONE_NS), Agent::Alive);
        heart.carries(start + 2 * GONE_NS, Duration::ZERO);
        assert_eq!(seen(2 * GONE_NS + STALE_NS), Agent::Alive);
        assert_eq!(seen(2 * GONE_NS + STALE_NS + 1), Agent::Silent);
        // As long as another one does.
        heart.carries(start + 3 * GONE_NS, Duration::from_secs(10));
        assert_eq!(seen(3 * GONE_NS + 10_000_000_000), Agent::Alive);
        assert_eq!(seen(3 * GONE_NS + 20_000_000_000), Agent::Silent);
        assert_eq!(Agent::at(Heartbeat::after(0).at(start), start), Agent::Silent, "the first");
    }
}
