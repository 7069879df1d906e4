//! `process_*`: what this process uses, under the names every Prometheus client library exports.

use std::fmt;
use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

/// Linux reports CPU time to user space in hundredths of a second, whatever `CONFIG_HZ` is:
/// `USER_HZ`, proc(5).
const TICKS_PER_SECOND: f64 = 100.0;
const KIB: u64 = 1024;

/// Reads `/proc/self` at each scrape. What cannot be read is left out.
#[derive(Debug)]
pub(super) struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut gauge = |name, help, value: Option<u64>| match value {
            Some(value) => encoder
                .encode_descriptor(name, help, None, MetricType::Gauge)?
                .encode_gauge(&i64::try_from(value).unwrap_or(i64::MAX)),
            None => Ok(()),
        };
        gauge("process_open_fds", "Open file descriptors", open_fds())?;
        gauge("process_max_fds", "Limit of open file descriptors", max_fds())?;
        gauge("process_resident_memory_bytes", "Resident memory", status_bytes("VmRSS:"))?;
        gauge("process_virtual_memory_bytes", "Virtual memory", status_bytes("VmSize:"))?;
        gauge("process_threads", "Threads", status_field("Threads:"))?;
        if let Some(seconds) = cpu_seconds() {
            encoder
                .encode_descriptor(
                    "process_cpu_seconds",
                    "User and system CPU time",
                    None,
                    MetricType::Counter,
                )?
                .encode_counter::<NoLabelSet, _, u64>(&seconds, None)?;
        }
        Ok(())
    }
}

fn open_fds() -> Option<u64> {
    // One of them is the directory that is being read.
    let count = fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1);
    u64::try_from(count).ok()
}

fn max_fds() -> Option<u64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn status_field(key: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}

fn status_bytes(key: &str) -> Option<u64> {
    status_field(key).map(|kib| kib * KIB)
}

fn cpu_seconds() -> Option<f64> {
    parse_cpu_seconds(&fs::read_to_string("/proc/self/stat").ok()?)
}

/// `utime` and `stime`, fields 14 and 15 of proc(5). The name in field 2 may hold anything, also
/// blanks and brackets, so fields count from its last bracket.
fn parse_cpu_seconds(stat: &str) -> Option<f64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_a_strange_process_name() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 91 0 0 0 250 50 0 0 20 0 1 0 5 6 7";
        assert_eq!(parse_cpu_seconds(stat), Some(3.0));
        // After years on many cores.
        let stat = "7 (a) S 1 7 7 0 -1 4194560 91 0 0 0 5000000000 0 0 0 20 0 1 0 5 6 7";
        assert_eq!(parse_cpu_seconds(stat), Some(50_000_000.0));
    }

    #[test]
    fn this_process_has_memory_descriptors_and_threads() {
        assert!(open_fds().is_some_and(|count| count >= 3));
        assert!(max_fds().is_some_and(|count| count >= 3));
        assert!(status_bytes("VmRSS:").is_some_and(|bytes| bytes > 100 * KIB));
        assert!(status_field("Threads:").is_some_and(|count| count >= 1));
        assert!(cpu_seconds().is_some());
    }
}
