//! Lets one log line per second and reason through: what a peer can repeat must not fill a disk, nor
//! hide what is wrong with another.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const EVERY: Duration = Duration::from_secs(1);

/// Says when to log, and how much was left out since the last time. Reasons are closed sets.
#[derive(Debug, Default)]
pub(crate) struct Gate(Mutex<HashMap<&'static str, Passed>>);

#[derive(Debug, Default)]
struct Passed {
    last: Option<Instant>,
    held_back: u64,
}

impl Gate {
    /// `Some` to log now, with the number of lines for this reason that were held back before.
    pub(crate) fn pass(&self, reason: &'static str) -> Option<u64> {
        self.pass_at(reason, Instant::now())
    }

    fn pass_at(&self, reason: &'static str, now: Instant) -> Option<u64> {
        let mut reasons = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = reasons.entry(reason).or_default();
        if passed.last.is_some_and(|last| now.saturating_duration_since(last) < EVERY) {
            passed.held_back += 1;
            return None;
        }
        passed.last = Some(now);
        Some(std::mem::take(&mut passed.held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_second_passes_and_says_how_many_did_not() {
        let gate = Gate::default();
        let now = Instant::now();
        assert_eq!(gate.pass_at("tls", now), Some(0));
        assert_eq!(gate.pass_at("tls", now + EVERY / 2), None);
        assert_eq!(gate.pass_at("tls", now + EVERY / 2), None);
        assert_eq!(gate.pass_at("tls", now + EVERY), Some(2));
        assert_eq!(gate.pass_at("tls", now + 2 * EVERY), Some(0));
    }

    #[test]
    fn one_reason_does_not_hide_another() {
        let gate = Gate::default();
        let now = Instant::now();
        assert_eq!(gate.pass_at("tls", now), Some(0));
        assert_eq!(gate.pass_at("certificate_expired", now), Some(0));
        assert_eq!(gate.pass_at("tls", now), None);
    }
}
