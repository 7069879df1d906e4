//! Tests that cannot run here say so, and are counted as skipped: see [`require!`](crate::require).

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::thread;

use crate::cgroup;

/// Skips the test unless this is root with what namespaces and eBPF need, and the programs named are
/// installed. The first line of every end-to-end test.
#[macro_export]
macro_rules! require {
    ($($program:literal),*) => {
        if let Some(missing) = $crate::missing(&[$($program),*]) {
            $crate::skip!("{missing}");
        }
    };
}

/// Ends the test as skipped, for the reason given.
#[macro_export]
macro_rules! skip {
    ($($why:tt)*) => {{
        $crate::skipped(&format!($($why)*));
        return Ok(());
    }};
}

/// Skips the test on a kernel that is older than what it needs: its name, and the version that brought it.
#[macro_export]
macro_rules! require_kernel {
    ($feature:expr) => {
        if let Some(missing) = $crate::missing_in_kernel($feature) {
            $crate::skip!("{missing}");
        }
    };
}

/// CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_BPF: capabilities(7).
const CAPABILITIES: &[(u32, &str)] =
    &[(12, "CAP_NET_ADMIN"), (21, "CAP_SYS_ADMIN"), (39, "CAP_BPF")];

/// The first thing that this machine or process lacks.
pub fn missing(programs: &[&str]) -> Option<String> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    let effective = effective.unwrap_or_default();
    for (bit, name) in CAPABILITIES {
        if effective & (1 << bit) == 0 {
            return Some(format!("needs {name}: run as root"));
        }
    }
    if let Err(error) = cgroup::root() {
        return Some(format!("{error:#}"));
    }
    let absent = programs.iter().chain(&["ip", "kill"]).find(|program| !installed(program));
    absent.map(|program| format!("needs {program}: run cargo xtask setup"))
}

/// That this kernel does not have `feature`, which came with the version beside it.
pub fn missing_in_kernel((feature, since): (&str, (u32, u32))) -> Option<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    let this = (numbers.next()?, numbers.next()?);
    let why =
        || format!("needs {feature}, of Linux {}.{}: this is {}", since.0, since.1, release.trim());
    (this < since).then(why)
}

/// Records that the running test was skipped: a line for the reader, and one in the file that
/// `cargo xtask test` counts.
#[expect(clippy::print_stderr, reason = "a test runner's output")]
#[expect(clippy::panic, reason = "what is not recorded as skipped would be counted as passed")]
pub fn skipped(why: &str) {
    // Rust's runner names a test's thread after the test.
    let name = thread::current().name().unwrap_or("?").to_owned();
    eprintln!("SKIPPED {name}: {why}");
    let Some(list) = std::env::var_os("MALLA_SKIPPED") else {
        return;
    };
    let line = format!("{name}\t{}\n", why.replace('\n', " "));
    let written = OpenOptions::new()
        .append(true)
        .open(&list)
        .and_then(|mut file| file.write_all(line.as_bytes()));
    if let Err(error) = written {
        panic!("write {}: {error}", list.display());
    }
}

fn installed(program: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    let places = path.split(':').chain(["/usr/sbin", "/sbin"]);
    places.into_iter().any(|place| Path::new(place).join(program).is_file())
}
