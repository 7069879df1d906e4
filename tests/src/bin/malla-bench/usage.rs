//! What the machine and a process have used, as `/proc` tells it (proc(5)), and whose it is.

use std::fs;

use anyhow::{Context as _, Result};

/// `USER_HZ`: 100 on every architecture that we build for.
const TICKS_PER_SECOND: f64 = 100.0;

/// Whose CPU is counted, in the order of the table. What the kernel does counts for whom it interrupts or works
/// for; the machine's is more than the sum of the others by what nobody here is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// All that any core was busy with.
    Machine,
    /// What sends and connects, in the client's pod.
    ClientProgram,
    /// What echoes and swallows, in the server's pod.
    ServerProgram,
    /// Both hops: threads of the bench itself, which does nothing else meanwhile.
    Hops,
    /// The agent of the client's node.
    ClientAgent,
    /// That of the server's node.
    ServerAgent,
    /// The only one, where both pods are on one node.
    NodeAgent,
}

impl Part {
    /// What its names in the JSON end with, and what the table calls it.
    pub(crate) fn spec(self) -> (&'static str, &'static str) {
        match self {
            Self::Machine => ("machine", "... whole machine"),
            Self::ClientProgram => ("client_program", "... client's program"),
            Self::ServerProgram => ("server_program", "... server's program"),
            Self::Hops => ("hops", "... both hops"),
            Self::ClientAgent => ("client_agent", "... client's agent"),
            Self::ServerAgent => ("server_agent", "... server's agent"),
            Self::NodeAgent => ("node_agent", "... the node's agent"),
        }
    }
}

/// CPU seconds by part: either the counters' state, or what was used between two states.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Used(Vec<(Part, f64)>);

impl Used {
    /// The counters of the machine and of these processes.
    ///
    /// # Errors
    ///
    /// Fails when one of the processes is gone.
    pub(crate) fn so_far(processes: &[(Part, u32)]) -> Result<Self> {
        let mut used = vec![(Part::Machine, machine_cpu_s()?)];
        for (part, pid) in processes {
            used.push((*part, process_cpu_s(*pid)?));
        }
        Ok(Self(used))
    }

    /// What was used since `before`, of the same processes.
    pub(crate) fn since(mut self, before: &Self) -> Self {
        for ((_, now_s), (_, then_s)) in self.0.iter_mut().zip(&before.0) {
            *now_s -= then_s;
        }
        self
    }

    /// With what a part says of itself.
    pub(crate) fn with(mut self, part: Part, used_s: f64) -> Self {
        self.0.push((part, used_s));
        self
    }

    /// Each part, and its seconds.
    pub(crate) fn by_part(self) -> Vec<(Part, f64)> {
        self.0
    }
}

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
    fn what_was_used_is_the_difference_of_each_part() {
        let counters =
            |machine, agent| Used(vec![(Part::Machine, machine), (Part::NodeAgent, agent)]);
        let used = counters(10.5, 3.25).since(&counters(10.0, 3.0));
        assert_eq!(
            used.with(Part::ClientProgram, 0.125).by_part(),
            [(Part::Machine, 0.5), (Part::NodeAgent, 0.25), (Part::ClientProgram, 0.125)]
        );
    }

    #[test]
    fn a_process_that_is_gone_is_an_error() {
        let here = (Part::NodeAgent, std::process::id());
        assert_eq!(Used::so_far(&[here]).unwrap().by_part().len(), 2);
        // No process has this id: it is the kernel's largest (2^22) and one more.
        assert!(Used::so_far(&[here, (Part::ServerProgram, 4_194_305)]).is_err());
    }

    #[test]
    fn resident_memory_is_read_in_kib() {
        assert_eq!(resident("VmPeak:\t 9 kB\nVmRSS:\t   17408 kB\n"), Some(17408.0));
        assert_eq!(resident("VmPeak:\t 9 kB\n"), None);
    }
}
