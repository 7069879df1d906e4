//! What the programs are told of the agent's life.

use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use mesh_common::maps::Control;
use mesh_common::verdict::STALE_NS;

use super::{Capture, lock, sys};

/// When the agent last carried what it is sent, as far as it has said so.
#[derive(Debug)]
pub(super) struct Heartbeat {
    carries: AtomicBool,
    /// `CLOCK_BOOTTIME`.
    carried_ns: AtomicU64,
}

impl Heartbeat {
    pub(super) fn new() -> Self {
        Self { carries: AtomicBool::new(true), carried_ns: AtomicU64::new(0) }
    }

    pub(super) fn carries(&self, carries: bool) {
        self.carries.store(carries, Relaxed);
    }

    /// What to write at this time: never so old that the agent would count for gone.
    pub(super) fn at(&self, now_ns: u64) -> u64 {
        if self.carries.load(Relaxed) {
            self.carried_ns.store(now_ns, Relaxed);
        }
        let silent_ns = now_ns.saturating_sub(STALE_NS + 1);
        self.carried_ns.load(Relaxed).max(silent_ns)
    }
}

impl Capture {
    /// From now on the agent carries what it is sent, or does not: it has yet to learn of its pods, or takes
    /// nothing new. Then the programs hear of it what they would of a silent one, as soon as they would: pods that
    /// fail open bypass it, and no other does.
    pub fn carries(&self, carries: bool) {
        self.heartbeat.carries(carries);
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
        let (heart, start) = (Heartbeat::new(), 3 * GONE_NS);
        let seen = |after_ns: u64| Agent::at(heart.at(start + after_ns), start + after_ns);
        assert_eq!(seen(0), Agent::Alive);
        heart.carries(false);
        assert_eq!(seen(STALE_NS), Agent::Alive, "it may be back in a moment");
        assert_eq!(seen(STALE_NS + 1), Agent::Silent);
        assert_eq!(seen(2 * GONE_NS), Agent::Silent);
        heart.carries(true);
        assert_eq!(seen(2 * GONE_NS), Agent::Alive);
    }
}
