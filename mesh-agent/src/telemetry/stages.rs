//! `mesh_stage_duration_seconds`: how long each stage took, counted without a lock.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mesh_core::stage::Stage;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use super::connection::Direction;

/// 20 us to 5.2 s in factors of 4: a decision in memory sits in the first bucket, a pooled lane in
/// the next ones, a handshake across a zone in the middle, the connect timeout (5 s) in the last.
const BOUNDS_S: [f64; 10] =
    [0.00002, 0.00008, 0.00032, 0.00128, 0.00512, 0.02048, 0.08192, 0.32768, 1.31072, 5.24288];

/// One histogram for each stage and direction.
#[derive(Debug, Default)]
pub(super) struct StageDurations {
    histograms: [[Histogram; Stage::ALL.len()]; Direction::ALL.len()],
}

#[derive(Debug, Default)]
struct Histogram {
    buckets: [AtomicU64; BOUNDS_S.len() + 1],
    sum_ns: AtomicU64,
}

impl StageDurations {
    pub(super) fn observe(&self, direction: Direction, stage: Stage, took: Duration) {
        let histogram = &self.histograms[direction as usize][index(stage)];
        let seconds = took.as_secs_f64();
        let bucket = BOUNDS_S.partition_point(|bound| *bound < seconds);
        histogram.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        histogram.sum_ns.fetch_add(nanoseconds, Ordering::Relaxed);
    }
}

fn index(stage: Stage) -> usize {
    stage as usize - 1
}

impl Collector for StageDurations {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut encoder = encoder.encode_descriptor(
            "mesh_stage_duration_seconds",
            "Time that connections spent in a stage",
            None,
            MetricType::Histogram,
        )?;
        for direction in Direction::ALL {
            for stage in Stage::ALL {
                let histogram = &self.histograms[direction as usize][index(stage)];
                let bounds = BOUNDS_S.into_iter().chain([f64::INFINITY]);
                let counts = histogram.buckets.iter().map(|count| count.load(Ordering::Relaxed));
                let buckets: Vec<_> = bounds.zip(counts).collect();
                let count = buckets.iter().map(|(_, count)| count).sum();
                if count == 0 {
                    continue;
                }
                let sum = Duration::from_nanos(histogram.sum_ns.load(Ordering::Relaxed));
                encoder
                    .encode_family(&[("stage", stage.as_str()), ("direction", direction.as_str())])?
                    .encode_histogram::<NoLabelSet>(sum.as_secs_f64(), count, &buckets, None)?;
            }
        }
        Ok(())
    }
}
