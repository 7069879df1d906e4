//! What the machine and a process have used, as `/proc` tells it (proc(5)).

use std::fs;

use anyhow::{Context as _, Result};

/// `USER_HZ`: 100 on every architecture that we build for.
const TICKS_PER_SECOND: f64 = 100.0;

/// Busy seconds of all cores together since the machine started. Waiting for a disk is not busy,
/// and what the hypervisor took (steal) is not ours.
///
/// # Errors
///
/// Fails when `/proc/stat` is not as proc(5) says.
pub(crate) fn machine_cpu_s() -> Result<f64> {
    let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    busy_s(&stat).context("no cpu line in /proc/stat")
}

fn busy_s(stat: &str) -> Option<f64> {
    let fields = stat.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<f64> = fields.split_whitespace().filter_map(|one| one.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = ticks[..] else {
        return None;
    };
    Some((user + nice + system + irq + softirq) / TICKS_PER_SECOND)
}

/// CPU seconds that process `pid` has used, all its threads.
///
/// # Errors
///
/// Fails when there is no such process.
pub(crate) fn process_cpu_s(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    process_s(&stat).with_context(|| format!("no times in {path}"))
}

fn process_s(stat: &str) -> Option<f64> {
    // The name is in brackets and may hold anything, brackets too: count from the last one.
    let (_, fields) = stat.rsplit_once(") ")?;
    // Fields 14 and 15 of proc(5); the first one here is number 3.
    let mut times = fields.split_whitespace().skip(11);
    let user: f64 = times.next()?.parse().ok()?;
    let system: f64 = times.next()?.parse().ok()?;
    Some((user + system) / TICKS_PER_SECOND)
}

/// Resident memory of process `pid` in KiB.
///
/// # Errors
///
/// Fails when there is no such process.
pub(crate) fn resident_kib(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    resident(&status).with_context(|| format!("no VmRSS in {path}"))
}

fn resident(status: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_waiting_and_stolen_time_are_not_busy() {
        let stat = "cpu  100 10 200 9999 8888 30 40 7777 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        assert_eq!(busy_s(stat), Some(3.8));
        assert_eq!(busy_s("intr 1 2\n"), None);
    }

    #[test]
    fn a_name_with_brackets_does_not_shift_the_times() {
        let stat = "42 (a) S (b) R 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 1 0 99";
        assert_eq!(process_s(stat), Some(2.0));
    }

    #[test]
    fn our_own_usage_is_there_and_grows() {
        let pid = std::process::id();
        let before = process_cpu_s(pid).unwrap();
        let mut sum = 0_u64;
        while process_cpu_s(pid).unwrap() < before + 0.02 {
            sum = sum.wrapping_mul(31).wrapping_add(1);
        }
        assert!(std::hint::black_box(sum) != 1);
        assert!(resident_kib(pid).unwrap() > 100.0);
        assert!(machine_cpu_s().unwrap() > 0.0);
    }

    #[test]
    fn resident_memory_is_read_in_kib() {
        assert_eq!(resident("VmPeak:\t 9 kB\nVmRSS:\t   17408 kB\n"), Some(17408.0));
        assert_eq!(resident("VmPeak:\t 9 kB\n"), None);
    }
}
