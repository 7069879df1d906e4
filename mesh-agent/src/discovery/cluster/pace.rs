//! When the next snapshot is made. No clock.
//!
//! One is made of everything that is known, so what it takes grows with the cluster, and in a large one something
//! changes all the time.
//!
//! # Guarantees
//!
//! - Making snapshots takes a tenth of a core at most, and half of one while connections wait for what was read for
//!   them.
//! - A change is in force within [`LONGEST`] and the time that a snapshot takes.

use std::time::Duration;

use tokio::time::Instant;

/// So many times as long as the last snapshot took is waited before the next one.
const PAUSE: u32 = 9;
/// The same while somebody waits for it.
const PAUSE_OF_WAITERS: u32 = 1;
/// Longest pause, however long a snapshot takes: what is not allowed any more must end within a second.
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
        let times = if is_waited_for { PAUSE_OF_WAITERS } else { PAUSE };
        Some(ready + took.saturating_mul(times).min(LONGEST))
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
        for (took_ms, pause_ms, of_waiters_ms) in
            [(0, 0, 0), (20, 180, 20), (300, 500, 300), (900, 500, 500)]
        {
            let ready = began + Duration::from_millis(took_ms);
            pace.made(began, ready);
            assert_eq!(pace.next(false), Some(ready + Duration::from_millis(pause_ms)));
            assert_eq!(pace.next(true), Some(ready + Duration::from_millis(of_waiters_ms)));
        }
    }
}
