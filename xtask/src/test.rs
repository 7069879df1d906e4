//! `cargo xtask test` and `cargo xtask e2e`: runs every test binary and adds the results up.
//!
//! A test that cannot run here passes as far as its runner knows; it appends `name<TAB>why` to the
//! file named by `MALLA_SKIPPED`, and is counted as skipped.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;

use crate::build::{self, Executable};
use crate::check;
use crate::cluster::tested::{self, Tested};
use crate::process::{self, Finished};
use crate::{image, privilege, say, setup};

/// No test binary is allowed to take longer, and those on a cluster no longer than twice that.
const BINARY_LIMIT: Duration = Duration::from_secs(900);
/// With `--long`.
const LONG_BINARY_LIMIT: Duration = Duration::from_secs(3 * 3600);

/// The package whose tests need privileges and make nodes and pods.
const E2E_PACKAGE: &str = "mesh-tests";

/// Everything is built by one command, so that every crate is built with one set of features.
const BUILD: &str = "build --workspace --all-targets";

/// The test binaries that run on a Kubernetes cluster. The last ones do things to all of it: its agents are removed,
/// and its API server is taken away.
const ON_CLUSTER: [&str; 3] = ["cluster", "operations", "outage"];

/// Tests on a cluster that run at the same time on each core: they wait for what others do, and a third of them for
/// the agents to be theirs alone.
const ON_CLUSTER_PER_CORE: usize = 3;

#[derive(Debug, Default, Args)]
pub(crate) struct E2e {
    /// Only tests whose name contains this.
    filter: Option<String>,

    /// Only this file of tests, for example `capture`.
    #[arg(long)]
    file: Option<String>,

    /// Tests that run at the same time. Default: the number of cores, 2 to 4, and three times as many on a
    /// cluster.
    #[arg(long)]
    threads: Option<usize>,

    /// The long form of the tortures: minutes instead of seconds, one at a time, and what they found
    /// out. `MALLA_SEED=N` repeats what was random.
    #[arg(long)]
    long: bool,

    /// The profile of cargo that the agent's image on clusters is built in: `release` is what users have, and takes
    /// ten minutes more. Default: tested.
    #[arg(long, value_parser = [image::TESTED, image::RELEASE])]
    profile: Option<String>,

    /// Run the tests that need a cluster on this one, and not on one that is made for them.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,

    /// The command that loads an image into the nodes of that cluster; the path of an OCI archive is
    /// added to it. For example `kind load image-archive`.
    #[arg(long, requires = "kubeconfig")]
    load_image: Option<String>,
}

/// Results so far.
#[derive(Debug, Default)]
struct Tally {
    passed: usize,
    failed: Vec<String>,
    skipped: usize,
}

/// Everything that can be tested. The last line printed is `N passed, N failed, N skipped`.
pub(crate) fn everything() -> ExitCode {
    let mut tally = Tally::default();
    match setup::run(setup::Say::Everything) {
        Ok(toolchain) => {
            for step in check::STEPS {
                tally.step(step.name, (step.run)(&toolchain));
            }
            tally.binaries(&E2e::default(), |_| true);
            let doc = process::cargo("test --workspace --doc")
                .and_then(|command| process::watch("doc tests", command, BINARY_LIMIT));
            tally.record("doc tests", doc);
        }
        Err(error) => tally.fail("setup", &format!("{error:#}")),
    }
    tally.finish()
}

impl E2e {
    /// Runs the end-to-end tests.
    pub(crate) fn run(&self) -> Result<ExitCode> {
        setup::run(setup::Say::Changes)?;
        let mut tally = Tally::default();
        tally.binaries(self, |binary| {
            binary.package == E2E_PACKAGE
                && binary.kind == "test"
                && self.file.as_ref().is_none_or(|file| *file == binary.name)
        });
        Ok(tally.finish())
    }

    fn profile(&self) -> &str {
        self.profile.as_deref().unwrap_or(image::TESTED)
    }

    fn threads(&self, test: &Executable) -> usize {
        let cores = thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let many = cores.clamp(2, 4) * if is_on_cluster(test) { ON_CLUSTER_PER_CORE } else { 1 };
        // What takes minutes wants the machine for itself.
        self.threads.unwrap_or(if self.long { 1 } else { many })
    }
}

impl Tally {
    /// Builds everything and runs the test binaries that `wanted` picks.
    fn binaries(&mut self, options: &E2e, wanted: impl Fn(&Executable) -> bool) {
        let _alone = match alone() {
            Ok(alone) => alone,
            Err(error) => return self.fail("another run", &format!("{error:#}")),
        };
        if let Err(error) = empty_logs() {
            return self.fail("logs", &format!("{error:#}"));
        }
        say("building tests");
        let built = match build::executables("building tests", BUILD) {
            Ok(built) => built,
            Err(error) => return self.fail("build", &format!("{error:#}")),
        };
        let agent = match named_agent() {
            Ok(Some(named)) => Some(named),
            Ok(None) => {
                let built = built.iter().find(|e| e.name == "mesh-agent" && !e.is_test);
                built.map(|agent| agent.path.clone())
            }
            Err(error) => return self.fail("agent", &format!("{error:#}")),
        };
        let is_test = |e: &&Executable| e.is_test && e.kind != "bench" && wanted(e);
        let mut tests: Vec<_> = built.iter().filter(is_test).collect();
        // What is quick and needs nothing fails first.
        tests.sort_by_key(|e| {
            (e.package == E2E_PACKAGE, is_on_cluster(e), e.package.clone(), e.name.clone())
        });
        let (on_cluster, others): (Vec<&Executable>, _) =
            tests.into_iter().partition(|test| is_on_cluster(test));
        let agent = agent.as_deref();
        for test in others {
            self.record(&name(test), run_binary(test, options, agent, &[]));
        }
        let on_cluster: Vec<_> =
            on_cluster.into_iter().filter(|test| has_tests(test, options)).collect();
        if !on_cluster.is_empty()
            && let Err(error) = self.on_clusters(&on_cluster, options, agent)
        {
            self.fail("the cluster of the tests", &format!("{error:#}"));
        }
    }

    /// Runs test binaries one after the other on a cluster that is there, or else each on one of its own, at the
    /// same time: for half of it they wait for what Kubernetes does.
    fn on_clusters(
        &mut self,
        tests: &[&Executable],
        options: &E2e,
        agent: Option<&Path>,
    ) -> Result<()> {
        let run =
            |test: &Executable, on: &Tested| run_binary(test, options, agent, &on.environment);
        let theirs = options.kubeconfig.as_deref();
        if let Some(given) =
            Tested::given(theirs, options.load_image.as_deref(), options.profile())?
        {
            for test in tests {
                self.record(&name(test), run(test, &given));
            }
            return Ok(());
        }
        let agent_image = tested::prepare(options.profile())?;
        if options.long {
            // What takes minutes wants the machine for itself.
            let cluster = Tested::start(None, &agent_image)?;
            for test in tests {
                self.record(&name(test), run(test, &cluster));
            }
            self.step("the cluster of the tests is gone", cluster.end());
            return Ok(());
        }
        let on_its_own = |nth: usize, test: &Executable| {
            let which = (nth > 0).then_some(test.name.as_str());
            let cluster = Tested::start(which, &agent_image)?;
            Ok((run(test, &cluster), cluster.end()))
        };
        let ran: Vec<Result<_>> = thread::scope(|scope| {
            let start = |(nth, test)| {
                let test: &Executable = test;
                scope.spawn(move || on_its_own(nth, test))
            };
            let running: Vec<_> = tests.iter().copied().enumerate().map(start).collect();
            running.into_iter().map(|one| one.join().unwrap_or_else(|p| resume_unwind(p))).collect()
        });
        for (test, ran) in tests.iter().zip(ran) {
            let name = name(test);
            match ran {
                Ok((finished, end)) => {
                    self.record(&name, finished);
                    self.step(&format!("the cluster of {name} is gone"), end);
                }
                Err(error) => self.fail(&name, &format!("{error:#}")),
            }
        }
        Ok(())
    }

    fn step(&mut self, name: &str, outcome: Result<()>) {
        match outcome {
            Ok(()) => {
                self.passed += 1;
                say(&format!("ok      {name}"));
            }
            Err(error) => self.fail(name, &format!("{error:#}")),
        }
    }

    fn fail(&mut self, name: &str, why: &str) {
        say(&format!("FAILED  {name}: {why}"));
        self.failed.push(name.to_owned());
    }

    /// Adds what a test runner printed.
    fn record(&mut self, name: &str, ran: Result<Finished>) {
        let ran = match ran {
            Ok(ran) => ran,
            Err(error) => return self.fail(name, &format!("{error:#}")),
        };
        let results = Results::read(&ran.lines);
        for (test, why) in &results.skipped {
            say(&format!("SKIPPED {name} {test}: {why}"));
        }
        ran.lines.iter().filter(|line| line.starts_with(FOUND_OUT)).for_each(|line| say(line));
        self.passed += results.passed;
        self.skipped += results.skipped.len();
        if ran.success && results.failed.is_empty() && results.complete {
            let took = ran.took.as_secs_f32();
            return say(&format!("ok      {name}: {} passed, {took:.1} s", results.passed));
        }
        // A runner that died took its other results along: it is one more failure itself.
        if results.failed.is_empty() {
            return self.fail(name, &format!("{}\n{}", ran.how, ran.tail()));
        }
        say(&format!("FAILED  {name}: {}\n{}", ran.how, failures(&ran.lines)));
        self.failed.extend(results.failed.iter().map(|test| format!("{name} {test}")));
        if !results.complete {
            self.fail(name, &ran.how);
        }
    }

    fn finish(self) -> ExitCode {
        for name in &self.failed {
            say(&format!("failed: {name}"));
        }
        let failed = self.failed.len();
        match logs() {
            Ok(logs) if failed == 0 => drop(fs::remove_dir_all(logs)),
            Ok(logs) if fs::read_dir(&logs).is_ok_and(|mut logs| logs.next().is_some()) => {
                say(&format!("the agents' logs: {}", logs.display()));
            }
            _ => {}
        }
        say(&format!("{} passed, {failed} failed, {} skipped", self.passed, self.skipped));
        if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

fn is_on_cluster(test: &Executable) -> bool {
    test.package == E2E_PACKAGE && ON_CLUSTER.contains(&test.name.as_str())
}

fn name(test: &Executable) -> String {
    match test.kind.as_str() {
        "test" => format!("{} {}", test.package, test.name),
        kind => format!("{} ({kind})", test.package),
    }
}

/// The agent that whoever calls names, such as a release build: it is the one that is tested outside of clusters.
fn named_agent() -> Result<Option<PathBuf>> {
    let Some(named) = env::var_os("MALLA_AGENT").filter(|named| !named.is_empty()) else {
        return Ok(None);
    };
    let named = Path::new(&named);
    let found = named.canonicalize();
    let found = found.with_context(|| format!("MALLA_AGENT names {}", named.display()))?;
    say(&format!("the agent of the tests is {}, as MALLA_AGENT says", found.display()));
    Ok(Some(found))
}

/// Whether the filter leaves any test of a binary.
fn has_tests(test: &Executable, options: &E2e) -> bool {
    let mut args = vec!["--list"];
    args.extend(options.filter.as_deref());
    let list = process::answer(&test.path.display().to_string(), &args);
    list.is_none_or(|list| list.lines().any(|line| line.ends_with(": test")))
}

fn run_binary(
    test: &Executable,
    options: &E2e,
    agent: Option<&Path>,
    environment: &[(&str, OsString)],
) -> Result<Finished> {
    // Unit tests need nothing; what lies in `tests/` loads eBPF and makes namespaces.
    // Where root cannot be had, those that need it skip themselves, and are counted.
    let mut command = if test.kind == "test" && privilege::available() {
        privilege::command(&test.path)?
    } else {
        std::process::Command::new(&test.path)
    };
    command.current_dir(&test.dir).arg("--color=never");
    // Of each program, since two may run at the same time.
    let program = test.path.file_name().context("a program without a name")?.display();
    let skipped = format!("target/skipped-{}-{program}", std::process::id());
    let skipped = crate::root()?.join(skipped);
    fs::write(&skipped, "").context("create the list of skipped tests")?;
    command.env("MALLA_SKIPPED", &skipped).env("CARGO_MANIFEST_DIR", &test.dir);
    // An error that a test returns tells where it was by its context.
    command.env("RUST_LIB_BACKTRACE", "0");
    if test.package == E2E_PACKAGE {
        command.arg(format!("--test-threads={}", options.threads(test)));
        command.args(&options.filter).env("MALLA_LOGS", logs()?);
        if options.long {
            command.arg("--show-output").env("MALLA_LONG", "1");
        }
        if let Some(agent) = agent {
            command.env("MALLA_AGENT", agent);
        }
    }
    let limit = match is_on_cluster(test) {
        _ if options.long => LONG_BINARY_LIMIT,
        true => 2 * BINARY_LIMIT,
        false => BINARY_LIMIT,
    };
    command.envs(environment.iter().map(|(key, value)| (key, value)));
    let finished = process::watch(&name(test), command, limit);
    let list = fs::read_to_string(&skipped).context("read the list of skipped tests")?;
    fs::remove_file(&skipped).context("remove the list of skipped tests")?;
    let mut finished = finished?;
    finished.lines.extend(list.lines().map(|line| format!("{SKIPPED}{line}")));
    Ok(finished)
}

/// Where the agents' logs of every end-to-end test are kept until all of them pass.
fn logs() -> Result<PathBuf> {
    Ok(crate::root()?.join("target/e2e-logs"))
}

/// Waits until no other run of this checkout's tests is there: both would use the same clusters and logs.
fn alone() -> Result<File> {
    // Which is not where cargo builds if `CARGO_TARGET_DIR` says so, and then not there yet.
    let dir = crate::root()?.join("target");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let path = dir.join("e2e.lock");
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(error)) => Err(error).context("lock target/e2e.lock")?,
    }
    say("another run of this checkout's tests is there: waiting for its end");
    file.lock().context("lock target/e2e.lock")?;
    Ok(file)
}

/// Makes the directory of logs anew. Before the tests do, for they may be root, and whoever calls this
/// must be able to remove it.
fn empty_logs() -> Result<()> {
    let logs = logs()?;
    if logs.is_dir() {
        fs::remove_dir_all(&logs).with_context(|| format!("remove {}", logs.display()))?;
    }
    fs::create_dir_all(&logs).with_context(|| format!("create {}", logs.display()))
}

/// Marks a line of the list of skipped tests among a runner's output.
const SKIPPED: &str = "\u{1}skipped ";

/// What a long test says of itself (`harness::long::report`); shown only with `--show-output`, or if the
/// test fails.
const FOUND_OUT: &str = "long: ";

/// What one test runner did.
#[derive(Debug, Default, PartialEq, Eq)]
struct Results {
    passed: usize,
    failed: Vec<String>,
    skipped: Vec<(String, String)>,
    /// Whether the runner came to its end.
    complete: bool,
}

impl Results {
    /// Reads the output of Rust's test runner, of one binary or (doc tests) of several.
    fn read(lines: &[String]) -> Self {
        let mut this = Self::default();
        for line in lines {
            if let Some(skipped) = line.strip_prefix(SKIPPED) {
                let (test, why) = skipped.split_once('\t').unwrap_or((skipped, "no reason"));
                this.skipped.push((test.to_owned(), why.to_owned()));
                // The runner takes it for passed.
                this.passed = this.passed.saturating_sub(1);
            } else if line.starts_with("test result: ") {
                this.complete = true;
            } else if let Some((test, result)) =
                line.strip_prefix("test ").and_then(|rest| rest.rsplit_once(" ... "))
            {
                match result {
                    "ok" => this.passed += 1,
                    "FAILED" => this.failed.push(test.to_owned()),
                    _ if result.starts_with("ignored") => {
                        let why = result.strip_prefix("ignored, ").unwrap_or("marked #[ignore]");
                        this.skipped.push((test.to_owned(), why.to_owned()));
                    }
                    _ => {}
                }
            }
        }
        // A package without doc tests prints no results at all, and that is no failure.
        this.complete |= lines.iter().any(|line| line.contains("Doc-tests"));
        this
    }
}

/// The part of a runner's output that tells why tests failed.
fn failures(lines: &[String]) -> String {
    let from = lines.iter().position(|line| line == "failures:").unwrap_or(0);
    lines[from..]
        .iter()
        .filter(|line| !line.starts_with(SKIPPED))
        .map(|line| format!("    {line}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn results_of_a_runner_are_added_up() {
        let mut output = lines(
            "running 4 tests\ntest a ... ok\ntest m::b ... FAILED\ntest c ... ignored, slow\n\
             test d - should panic ... ok\n\ntest result: FAILED. 2 passed; 1 failed; 1 ignored",
        );
        output.push(format!("{SKIPPED}a\tneeds root"));
        let results = Results::read(&output);
        assert_eq!(results.passed, 1);
        assert_eq!(results.failed, ["m::b"]);
        assert_eq!(
            results.skipped,
            [("c".to_owned(), "slow".to_owned()), ("a".to_owned(), "needs root".to_owned())]
        );
        assert!(results.complete);
    }

    #[test]
    fn runner_that_dies_is_not_complete() {
        assert!(!Results::read(&lines("running 2 tests\ntest a ... ok\n")).complete);
    }
}
