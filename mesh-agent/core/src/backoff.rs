//! Exponential back-off with jitter.
//!
//! The n-th failure in a row waits between half and all of `min × 2ⁿ`, at most `max`. The jitter
//! keeps many clients of a peer that comes back from arriving at once; half of the wait is certain,
//! so that a failing peer is never hammered. A peer that says itself how long it is to be left alone is
//! left alone for that long, and jitter comes on top: it has said the same to everybody.

use std::time::{Duration, Instant};

/// When a peer that failed may be tried again.
#[derive(Clone, Debug)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    failures: u32,
    retry_at: Option<Instant>,
}

impl Backoff {
    /// No failure yet; the first one waits at most `min`, none longer than `max`, and where the peer asks
    /// for that much, none longer than half as long again.
    pub fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, failures: 0, retry_at: None }
    }

    /// An attempt has failed at `now`. `draw(n)` must return a number uniform in `0..n`.
    pub fn failed(&mut self, now: Instant, draw: impl FnMut(u32) -> u32) {
        self.failed_for_at_least(now, Duration::ZERO, draw);
    }

    /// As [`failed`](Self::failed), and the peer asks for no attempt within `asked`. What exceeds `max`
    /// does not count: a peer must not silence us for long.
    pub fn failed_for_at_least(
        &mut self,
        now: Instant,
        asked: Duration,
        mut draw: impl FnMut(u32) -> u32,
    ) {
        const STEPS: u32 = 1024;
        let factor = 1u32.checked_shl(self.failures).unwrap_or(u32::MAX);
        let half = self.min.saturating_mul(factor).min(self.max) / 2;
        let asked = asked.min(self.max);
        let wait = half.max(asked) + half.max(asked / 2) * draw(STEPS) / STEPS;
        self.failures = (self.failures + 1).min(u32::BITS);
        self.retry_at = now.checked_add(wait);
    }

    /// An attempt has failed at `now` that has cost nobody anything: as if it were the first one.
    pub fn refused(&mut self, now: Instant, draw: impl FnMut(u32) -> u32) {
        self.failures = 0;
        self.failed(now, draw);
    }

    /// An attempt has succeeded.
    pub fn succeeded(&mut self) {
        self.failures = 0;
        self.retry_at = None;
    }

    /// How long to wait still; `None` if an attempt may be made now.
    pub fn wait(&self, now: Instant) -> Option<Duration> {
        self.retry_at?.checked_duration_since(now).filter(|wait| !wait.is_zero())
    }

    /// Failures since the last success.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[expect(clippy::disallowed_methods, reason = "any start will do; time then moves by hand")]
    fn epoch() -> Instant {
        Instant::now()
    }

    #[test]
    fn what_was_refused_is_tried_again_soon_however_often() {
        let now = epoch();
        let mut backoff = Backoff::new(100 * MS, 1000 * MS);
        for _ in 0..5 {
            backoff.failed(now, |_| 0);
        }
        for _ in 0..5 {
            backoff.refused(now, |n| n - 1);
            assert!(backoff.wait(now).unwrap() <= 100 * MS);
        }
        backoff.failed(now, |_| 0);
        assert_eq!(backoff.wait(now), Some(100 * MS), "the second one of a row");
    }

    #[test]
    fn waits_double_up_to_the_limit() {
        let now = epoch();
        let mut backoff = Backoff::new(100 * MS, 1000 * MS);
        assert_eq!(backoff.wait(now), None);
        let mut waits = Vec::new();
        for _ in 0..40 {
            backoff.failed(now, |_| 0);
            waits.push(backoff.wait(now).unwrap());
        }
        assert_eq!(waits[..5], [50 * MS, 100 * MS, 200 * MS, 400 * MS, 500 * MS]);
        assert!(waits[5..].iter().all(|wait| *wait == 500 * MS));
    }

    #[test]
    fn jitter_is_the_upper_half() {
        let now = epoch();
        let mut backoff = Backoff::new(100 * MS, 1000 * MS);
        backoff.failed(now, |n| n - 1);
        let wait = backoff.wait(now).unwrap();
        assert!(wait > 99 * MS && wait < 100 * MS, "{wait:?}");
    }

    #[test]
    fn peer_that_asks_to_be_left_alone_is() {
        let now = epoch();
        let mut backoff = Backoff::new(100 * MS, 1000 * MS);
        backoff.failed_for_at_least(now, 300 * MS, |_| 0);
        assert_eq!(backoff.wait(now), Some(300 * MS));
        // It has said so to everybody.
        backoff.failed_for_at_least(now, 300 * MS, |n| n - 1);
        let wait = backoff.wait(now).unwrap();
        assert!(wait > 449 * MS && wait < 450 * MS, "{wait:?}");
        // These were failures as others are: this is the third.
        backoff.failed(now, |_| 0);
        assert_eq!(backoff.wait(now), Some(200 * MS));
    }

    #[test]
    fn peer_that_asks_for_less_than_the_wait_changes_nothing() {
        let now = epoch();
        for draw in [0, 500, 1023] {
            let (mut asked, mut other) =
                (Backoff::new(100 * MS, 1000 * MS), Backoff::new(100 * MS, 1000 * MS));
            for _ in 0..6 {
                asked.failed_for_at_least(now, 50 * MS, |_| draw);
                other.failed(now, |_| draw);
                assert_eq!(asked.wait(now), other.wait(now));
            }
        }
    }

    #[test]
    fn no_peer_silences_us_for_long() {
        let now = epoch();
        let mut backoff = Backoff::new(100 * MS, 1000 * MS);
        for asked in [1001 * MS, Duration::from_secs(86_400), Duration::MAX] {
            backoff.failed_for_at_least(now, asked, |_| 0);
            assert_eq!(backoff.wait(now), Some(1000 * MS));
            backoff.failed_for_at_least(now, asked, |n| n - 1);
            assert!(backoff.wait(now).unwrap() < 1500 * MS);
        }
    }

    #[test]
    fn an_attempt_is_due_when_the_wait_is_over() {
        let now = epoch();
        let mut backoff = Backoff::new(100 * MS, 1000 * MS);
        backoff.failed(now, |_| 0);
        assert_eq!(backoff.wait(now + 49 * MS), Some(MS));
        assert_eq!(backoff.wait(now + 50 * MS), None);
        assert_eq!(backoff.wait(now + 51 * MS), None);
    }

    #[test]
    fn success_forgets_every_failure() {
        let now = epoch();
        let mut backoff = Backoff::new(100 * MS, 1000 * MS);
        for _ in 0..5 {
            backoff.failed(now, |_| 0);
        }
        backoff.succeeded();
        assert_eq!((backoff.wait(now), backoff.failures()), (None, 0));
        backoff.failed(now, |_| 0);
        assert_eq!(backoff.wait(now), Some(50 * MS));
    }
}
