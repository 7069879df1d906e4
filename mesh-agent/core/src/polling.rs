//! Whether a worker that has nothing to do looks for work a little longer before it sleeps.
//!
//! Waking a sleeping core costs more than all else that a small exchange costs a mesh, and an exchange
//! crosses two agents twice. A worker whose work comes in short intervals therefore goes on looking
//! for the next piece, for as long as such an interval may last. One whose work comes seldom sleeps at
//! once: looking would only burn CPU. Linux' `haltpoll` decides the same about idle virtual cores
//! (`Documentation/virt/guest-halt-polling.rst`).

use std::time::{Duration, Instant};

/// Short intervals in a row after which the next one is expected to be short too.
const STEADY: u8 = 8;
/// The most that short intervals count for: so many long ones end the polling.
const MOST: u8 = 16;
/// What any other interval takes away.
const PENALTY: u8 = 4;
/// Tasks with work at once that are one connection: what accepts it, and what carries it. Where there
/// are more, there is always some work, and who looks for it only keeps others from making it.
const FEW: u8 = 2;
/// A look that takes longer was interrupted: somebody else had the core.
const INTERRUPTED: Duration = Duration::from_micros(50);
/// How long the core is left to others then.
const RESPITE: Duration = Duration::from_millis(2);

/// What one worker knows of its work.
#[derive(Clone, Copy, Debug)]
pub struct Polling {
    /// The longest interval that is worth waiting for without sleep; zero: none.
    most: Duration,
    /// When there was work last, before and since the worker has run out of it.
    worked: Instant,
    working: Instant,
    looked: Instant,
    /// How many tasks have had some since the worker has run out of it.
    tasks: u8,
    /// Short intervals seen lately.
    credit: u8,
    crowded_until: Instant,
}

impl Polling {
    /// A worker that has not worked yet.
    pub fn new(most: Duration, now: Instant) -> Self {
        Self {
            most,
            worked: now,
            working: now,
            looked: now,
            tasks: 0,
            credit: 0,
            crowded_until: now,
        }
    }

    /// There was work, perhaps for another task than the last. Returns whether to look for more of it
    /// before sleeping.
    pub fn worked(&mut self, now: Instant, is_another: bool) -> bool {
        self.working = now;
        self.looked = now;
        if self.tasks == 0 || is_another {
            self.tasks = self.tasks.saturating_add(1);
        }
        self.is_worthwhile(now)
    }

    /// There is no more work for now: what there was counts as one piece.
    pub fn ran_out(&mut self) {
        if self.tasks > 0 {
            let interval = self.working.saturating_duration_since(self.worked);
            self.worked = self.working;
            let is_short = interval <= self.most && self.tasks <= FEW;
            self.credit = if is_short {
                (self.credit + 1).min(MOST)
            } else {
                self.credit.saturating_sub(PENALTY)
            };
            self.tasks = 0;
        }
    }

    /// There was none at this look. Returns whether to look again.
    pub fn looked(&mut self, now: Instant) -> bool {
        self.ran_out();
        if now.saturating_duration_since(self.looked) > INTERRUPTED {
            self.crowded_until = now + RESPITE;
        }
        self.looked = now;
        self.is_worthwhile(now)
    }

    fn is_worthwhile(&self, now: Instant) -> bool {
        self.credit >= STEADY
            && now >= self.crowded_until
            && now.saturating_duration_since(self.working) < self.most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST_WAIT: Duration = Duration::from_micros(50);
    const SHORT: Duration = Duration::from_micros(20);
    const LONG: Duration = Duration::from_millis(1);

    #[expect(clippy::disallowed_methods, reason = "any start will do; time then moves by hand")]
    fn start() -> Instant {
        Instant::now()
    }

    struct Clock {
        polling: Polling,
        now: Instant,
    }

    impl Clock {
        fn new() -> Self {
            let now = start();
            Self { polling: Polling::new(MOST_WAIT, now), now }
        }

        /// Works `times` times, `interval` apart; whether the last one is worth waiting after.
        fn work(&mut self, times: u8, interval: Duration) -> bool {
            (0..times).fold(false, |_, _| {
                self.now += interval;
                self.work_of(1);
                self.polling.worked(self.now, false)
            })
        }

        /// One piece, of so many tasks.
        fn work_of(&mut self, tasks: u8) {
            for _ in 0..tasks {
                self.polling.worked(self.now, true);
            }
            self.polling.ran_out();
        }

        fn look(&mut self, after: Duration) -> bool {
            self.now += after;
            self.polling.looked(self.now)
        }
    }

    #[test]
    fn only_steady_work_in_short_intervals_is_waited_for() {
        let mut worker = Clock::new();
        assert!(!worker.work(STEADY - 1, SHORT), "too early to tell");
        assert!(worker.work(1, SHORT));
        assert!(!worker.work(u8::MAX, LONG), "an idle worker sleeps");
        assert!(!worker.work(1, SHORT), "a pair is not steady");
    }

    #[test]
    fn it_looks_no_longer_than_an_interval_is_short() {
        let mut worker = Clock::new();
        worker.work(MOST, SHORT);
        assert!(worker.look(SHORT));
        assert!(worker.look(SHORT));
        assert!(!worker.look(SHORT), "60 us are over");
        assert!(!worker.look(SHORT));
        assert!(worker.work(1, SHORT), "one long interval among many changes nothing");
    }

    #[test]
    fn a_few_long_intervals_end_it() {
        let mut worker = Clock::new();
        worker.work(u8::MAX, SHORT);
        let long = (MOST - STEADY) / PENALTY + 1;
        assert!(worker.work(long - 1, LONG));
        assert!(!worker.work(1, LONG));
    }

    #[test]
    fn work_that_is_always_there_is_not_waited_for() {
        let mut worker = Clock::new();
        let mut work_of = |tasks| {
            (0..MOST).for_each(|_| {
                worker.now += SHORT;
                worker.work_of(tasks);
            });
            worker.polling.worked(worker.now, false)
        };
        assert!(work_of(FEW));
        assert!(!work_of(FEW + 1), "there is more of it than one connection's");
        assert!(work_of(FEW));
    }

    #[test]
    fn a_core_that_others_want_is_left_to_them() {
        let mut worker = Clock::new();
        worker.work(MOST, SHORT);
        let most = Polling::new(LONG, worker.now);
        worker.polling = Polling { credit: MOST, ..most };
        assert!(worker.look(INTERRUPTED));
        assert!(!worker.look(INTERRUPTED + SHORT), "somebody else ran in between");
        assert!(!worker.work(1, SHORT));
        worker.now += RESPITE;
        assert!(worker.work(1, SHORT), "not for ever");
    }

    #[test]
    fn zero_never_looks() {
        let now = start();
        let mut polling = Polling::new(Duration::ZERO, now);
        for _ in 0..u8::MAX {
            assert!(!polling.worked(now, true));
            polling.ran_out();
        }
        assert!(!polling.looked(now));
    }
}
