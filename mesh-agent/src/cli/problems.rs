//! What is wrong with the flags of `run` that clap cannot see: values that do not go together, and
//! directories that are not there. All at once, each with its remedy.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_core::names::is_subdomain;

use super::Run;

/// A flag whose value cannot work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlagProblem {
    /// The flag.
    pub flag: &'static str,
    /// What is wrong with its value.
    pub problem: String,
    /// What to do.
    pub remedy: String,
}

impl fmt::Display for FlagProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { flag, problem, remedy } = self;
        write!(f, "{flag}: {problem}: {remedy}")
    }
}

impl Run {
    /// Everything that clap cannot see, all at once: values that do not go together, directories
    /// that are not there.
    pub fn problems(&self) -> Vec<FlagProblem> {
        let mut found = Vec::new();
        let mut note = |flag, problem: String, remedy: &str| {
            found.push(FlagProblem { flag, problem, remedy: remedy.to_owned() });
        };
        if !is_subdomain(&self.node) {
            let problem = format!("`{}` is not the name of a Kubernetes node", self.node);
            note("--node", problem, "lower-case letters, digits, - and ., 253 characters at most");
        }
        if let Some(dir) = self.manifests.as_ref().filter(|dir| !dir.is_dir()) {
            let problem = format!("{} is not a directory", dir.display());
            note("--manifests", problem, "create it; it may be empty");
        }
        if let Some(dir) = &self.ca_dir
            && let Err(error) = fs::metadata(dir.join("root.pem"))
        {
            let problem = format!("no root.pem in {} ({error})", dir.display());
            note("--ca-dir", problem, "make one with `mesh-agent ca init --dir DIR`");
        }
        if self
            .signer
            .split_once('/')
            .is_none_or(|(domain, name)| domain.is_empty() || name.is_empty())
        {
            let problem = format!("`{}` is not the name of a signer", self.signer);
            note("--signer", problem, "a domain, a slash and a name, such as malla.dev/workload");
        }
        if !is_cgroup2(&self.cgroup) {
            let problem = format!("{} is not a cgroup v2 directory", self.cgroup.display());
            note("--cgroup", problem, "`findmnt -t cgroup2` shows where there is one");
        }
        let ports = [
            ("--tunnel-port", self.tunnel_port.get()),
            ("--metrics-addr", self.metrics_addr.port()),
            ("--ready-addr", self.ready_addr.port()),
        ];
        for (index, (flag, port)) in ports.iter().enumerate() {
            if let Some((other, _)) = ports[..index].iter().find(|(_, taken)| taken == port)
                && *port != 0
            {
                note(flag, format!("port {port} is that of {other} too"), "choose another port");
            }
        }
        let within = |value: Duration, range: std::ops::RangeInclusive<u64>| {
            range.contains(&value.as_secs())
        };
        if !within(self.connect_timeout, 1..=300) {
            let problem = format!("{} s", self.connect_timeout.as_secs());
            note("--connect-timeout-s", problem, "1 to 300");
        }
        if !within(self.drain, 0..=86_400) {
            note("--drain-s", format!("{} s", self.drain.as_secs()), "0 to 86400, a day");
        }
        if !within(self.metrics_linger, 0..=86_400) {
            let problem = format!("{} s", self.metrics_linger.as_secs());
            note("--metrics-linger-s", problem, "0 to 86400, a day");
        }
        // What the API and our own signer allow, when certificates are asked for there.
        let lifetimes = if self.ca_dir.is_some() { 2..=31_536_000 } else { 600..=86_400 };
        if !within(self.cert_lifetime, lifetimes.clone()) {
            let problem = format!("{} s", self.cert_lifetime.as_secs());
            let remedy = format!("{} to {}", lifetimes.start(), lifetimes.end());
            note("--cert-lifetime-s", problem, &remedy);
        }
        if self.poll > MAX_POLL {
            note("--poll-us", format!("{} us", self.poll.as_micros()), "0 to 1000");
        }
        if self.workers.is_some_and(|workers| workers.get() > MAX_WORKERS) {
            note("--workers", "too many".into(), "1 to 1024, one for each CPU is best");
        }
        if self.metrics_series_limit == 0 {
            let remedy = "at least 1; to save series leave labels out with --metrics-drop-labels";
            note("--metrics-series-limit", "no series at all".into(), remedy);
        }
        found
    }
}

/// The cgroup v2 directory that `dir` means: itself or, where v1 is mounted there, `unified` in it, as
/// systemd has both (its "hybrid" hierarchy).
pub fn cgroup2(dir: &Path) -> PathBuf {
    let unified = dir.join("unified");
    if !is_cgroup2(dir) && is_cgroup2(&unified) { unified } else { dir.to_owned() }
}

/// Every cgroup v2 directory has this file, and no v1 directory does.
pub(super) fn is_cgroup2(dir: &Path) -> bool {
    dir.join("cgroup.controllers").exists()
}

const MAX_WORKERS: usize = 1024;
/// Longer than it takes to wake a core, looking for work saves nothing.
const MAX_POLL: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};
    use crate::dirwatch::testing::TempDir;

    fn run(line: &str) -> Box<Run> {
        match Cli::try_parse_from(line.split_whitespace()).unwrap().command {
            Command::Run(run) => run,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn all_problems_of_run_are_told_at_once_with_flag_and_remedy() {
        let run = run("mesh-agent run --node N_1 --manifests /nowhere --ca-dir /nowhere \
                       --cgroup /nowhere --metrics-addr 127.0.0.1:15019 --connect-timeout-s 0 \
                       --drain-s 90000 --metrics-linger-s 90000 --cert-lifetime-s 1 --workers 2000 --poll-us 1001 --metrics-series-limit 0");
        let flags: Vec<_> = run.problems().iter().map(|problem| problem.flag).collect();
        let expected = [
            "--node",
            "--manifests",
            "--ca-dir",
            "--cgroup",
            "--metrics-addr",
            "--connect-timeout-s",
            "--drain-s",
            "--metrics-linger-s",
            "--cert-lifetime-s",
            "--poll-us",
            "--workers",
            "--metrics-series-limit",
        ];
        assert_eq!(flags, expected);
        assert!(run.problems().iter().all(|problem| !problem.remedy.is_empty()));
    }

    #[test]
    fn cgroup_v2_is_found_beside_v1() {
        let dir = TempDir::new();
        let unified = dir.path().join("unified");
        assert_eq!(cgroup2(dir.path()), dir.path());
        fs::create_dir(&unified).unwrap();
        fs::write(unified.join("cgroup.controllers"), "").unwrap();
        assert_eq!(cgroup2(dir.path()), unified);
        fs::write(dir.path().join("cgroup.controllers"), "").unwrap();
        assert_eq!(cgroup2(dir.path()), dir.path());
    }

    #[test]
    fn signer_and_lifetime_are_what_the_api_takes() {
        let flags = |line: &str| -> Vec<_> {
            let line = format!("mesh-agent run --node n1 --manifests / {line}");
            let problems = run(&line).problems();
            let flags = problems.iter().map(|problem| problem.flag);
            flags.filter(|flag| matches!(*flag, "--signer" | "--cert-lifetime-s")).collect()
        };
        let none: [&str; 0] = [];
        assert_eq!(flags(""), none);
        assert_eq!(flags("--signer example.com/mesh --cert-lifetime-s 600"), none);
        assert_eq!(flags("--signer mesh"), ["--signer"]);
        assert_eq!(flags("--cert-lifetime-s 599"), ["--cert-lifetime-s"]);
        assert_eq!(flags("--cert-lifetime-s 86401"), ["--cert-lifetime-s"]);
        assert_eq!(flags("--cert-lifetime-s 86401 --ca-dir /c"), none);
    }

    #[test]
    fn node_names_are_those_of_kubernetes() {
        for (name, is_one) in [
            ("node-1", true),
            ("ip-10-0-0-1.eu-west-1.compute.internal", true),
            ("", false),
            ("Node", false),
            ("-a", false),
            ("a..b", false),
            ("a_b", false),
        ] {
            assert_eq!(is_subdomain(name), is_one, "{name}");
        }
    }
}
