//! When the next snapshot is made. No clock.
//!
//! One is made of everything that is known, so what it takes grows with the cluster, and in a large one something
//! changes all the time.
//!
//! # Guarantees
//!
//! - Making snapshots because Services, Nodes and endpoints change takes a tenth of a core as long as one takes less than
//!   50 ms, more after that, and never more than half of one.
//! - Half of a core at most for what somebody may wait for: a pod of this node that begins, a namespace whose mode
//!   changes, connections that need to know something, and all that was read, also of what has come to a service in use.
//! - What comes is in force within [`LONGEST`] and the time that a snapshot takes, or three times that time if it is
//!   more than half of [`LONGEST`].

use std::time::Duration;

use tokio::time::Instant;

/// So many times as long as the last snapshot took is waited before the next one, if nobody waits for it.
const PAUSE: u32 = 9;
/// From the beginning of one to the beginning of the next, unless it takes more than half of that: what is not allowed
/// any more must end within a second.
const LONGEST: Duration = Duration::from_millis(500);

/// What the last snapshot took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    last: Option<(Instant, Duration)>,
}

impl Pace {
    /// A snapshot was begun and ready then.
    pub(super) fn made(&mut self, began: Instant, ready: Instant) {
        self.last = Some((ready, ready.duration_since(began)));
    }

    /// From when on another one is made; `None` if none was made yet.
    pub(super) fn next(&self, is_waited_for: bool) -> Option<Instant> {
        let (ready, took) = self.last?;
        if is_waited_for {
            return Some(ready + took);
        }
        let pause = took.saturating_mul(PAUSE).min(LONGEST.saturating_sub(took));
        Some(ready + pause.max(took))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn pause_grows_with_what_a_snapshot_takes_up_to_a_limit() {
        let mut pace = Pace::default();
        assert_eq!(pace.next(false), None, "the first one is not waited for");
        let began = Instant::now();
        for (took_ms, pause_ms) in [(0, 0), (20, 180), (100, 400), (300, 300), (900, 900)] {
            let ready = began + Duration::from_millis(took_ms);
            pace.made(began, ready);
            assert_eq!(pace.next(false), Some(ready + Duration::from_millis(pause_ms)));
            assert_eq!(pace.next(true), Some(ready + Duration::from_millis(took_ms)));
        }
    }
}
