//! Medians, percentiles and spreads of what was measured.

use serde::{Deserialize, Serialize};

/// Round trips of one client, to the nanosecond, up to 4.3 s each.
#[derive(Debug, Default)]
pub(crate) struct Latencies(Vec<u32>);

impl Latencies {
    /// Adds one.
    pub(crate) fn add(&mut self, took: std::time::Duration) {
        self.0.push(u32::try_from(took.as_nanos()).unwrap_or(u32::MAX));
    }

    /// Adds those of another.
    pub(crate) fn merge(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// The `percent`th percentile in microseconds, by nearest rank; 0 of none.
    pub(crate) fn percentile_us(&mut self, percent: usize) -> f64 {
        let rank = (self.0.len() * percent).div_ceil(100).max(1) - 1;
        if rank >= self.0.len() {
            return 0.0;
        }
        let (_, nanos, _) = self.0.select_nth_unstable(rank);
        f64::from(*nanos) / 1e3
    }
}

/// Several runs of one measure on one side.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Spread {
    /// The middle one; the mean of the middle two of an even number.
    pub(crate) median: f64,
    /// The least.
    pub(crate) min: f64,
    /// The greatest.
    pub(crate) max: f64,
    /// How many.
    pub(crate) runs: usize,
}

impl Spread {
    /// Of `values`, unless there are none.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let half = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[half]
        } else {
            f64::midpoint(sorted[half - 1], sorted[half])
        };
        Some(Self { median, min, max, runs: sorted.len() })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_percentile_is_the_nearest_rank() {
        let mut latencies = Latencies::default();
        for us in (1..=100).rev() {
            latencies.add(Duration::from_micros(us));
        }
        assert_eq!(latencies.percentile_us(50), 50.0);
        assert_eq!(latencies.percentile_us(99), 99.0);
        assert_eq!(latencies.percentile_us(100), 100.0);
    }

    #[test]
    fn of_one_latency_every_percentile_is_it_and_of_none_zero() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.percentile_us(99), 0.0);
        latencies.add(Duration::from_micros(7));
        assert_eq!(latencies.percentile_us(50), 7.0);
        assert_eq!(latencies.percentile_us(99), 7.0);
    }

    #[test]
    fn a_latency_beyond_four_seconds_is_kept_as_the_greatest() {
        let mut latencies = Latencies::default();
        latencies.add(Duration::from_secs(10));
        assert!(latencies.percentile_us(50) > 4e6);
    }

    #[test]
    fn a_spread_has_the_middle_and_the_ends() {
        let odd = Spread::of(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!(odd, Spread { median: 2.0, min: 1.0, max: 3.0, runs: 3 });
        assert_eq!(Spread::of(&[1.0, 2.0]).unwrap().median, 1.5);
        assert_eq!(Spread::of(&[]), None);
    }
}
