//! `cargo xtask cluster` itself: what it makes is there as it says, and is removed whole, also after a crash.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use harness::{Cluster, wait, xtask};
use serde_json::Value;

/// What is left of one cluster goes when the next one is started, or another one is ended.
static ONE_AFTER_THE_OTHER: Mutex<()> = Mutex::new(());

/// A cluster that is being made: killed, with all of it, when dropped.
struct Keeper(Child);

impl Drop for Keeper {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
        if let Ok(mut clean) = xtask() {
            let pid = self.0.id().to_string();
            clean.args(["clean", "--pid", &pid]).stdout(Stdio::null()).status().ok();
        }
    }
}

impl Keeper {
    /// Starts a cluster of one node, and returns when that node's kubelet is about to start.
    fn start() -> Result<Self> {
        let mut command = xtask()?;
        command.args(["cluster", "keep", "--nodes", "1", "--bound"]);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut this = Self(child);
        let said = BufReader::new(this.0.stdout.take().context("no output")?);
        for line in said.lines() {
            if line?.contains("the API server is ready") {
                return Ok(this);
            }
        }
        anyhow::bail!("it ended")
    }

    fn traces(&self) -> Result<Vec<String>> {
        traces(self.0.id())
    }
}

/// What everything of the cluster that this process keeps is called.
fn name_of(keeper: u32) -> String {
    format!("malla-{keeper}-")
}

/// Waits until every process of a cluster has ended whose keeper was killed: nobody but the kernel ends them. The
/// rest is there then.
fn dies_as_a_whole(keeper: u32) -> Result<()> {
    let name = name_of(keeper);
    wait::until(wait::SOON, "every process to end", || {
        processes(&name).is_ok_and(|found| found.is_empty())
    })?;
    ensure!(!traces(keeper)?.is_empty(), "otherwise nothing is removed");
    Ok(())
}

/// What is on this machine of the cluster that this process keeps.
fn traces(keeper: u32) -> Result<Vec<String>> {
    let name = name_of(keeper);
    let mut found = Vec::new();
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let targets = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    found.extend(targets.clone().filter(|mount| mount.contains(&name)).map(str::to_owned));
    let cgroups = mounts.lines().filter(|line| line.split(' ').nth(2).is_some_and(is_cgroup));
    let cgroups = cgroups.filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    let others = [PathBuf::from("/run/netns"), std::env::temp_dir()];
    for dir in cgroups.chain(others) {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(&name) {
                found.push(entry.path().display().to_string());
            }
        }
    }
    found.extend(processes(&name)?);
    Ok(found)
}

fn is_cgroup(kind: &str) -> bool {
    kind.starts_with("cgroup")
}

/// Processes that have `name` in their command line, environment or cgroup.
fn processes(name: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let dir = entry.path();
        let has = |file: &str| {
            let text = fs::read(dir.join(file)).unwrap_or_default();
            String::from_utf8_lossy(&text).contains(name)
        };
        // What has ended and was not asked about yet is in a cgroup too.
        let stat = fs::read_to_string(dir.join("stat")).unwrap_or_default();
        let is_over = stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with('Z'));
        if !is_over && ["cmdline", "environ", "cgroup"].iter().any(|file| has(file)) {
            let line = fs::read(dir.join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            found.push(format!("{} {line}", dir.display()));
        }
    }
    Ok(found)
}

/// The settings of the whole machine that a kubelet would change.
fn settings() -> Vec<String> {
    let keys = ["vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops"];
    keys.map(|key| fs::read_to_string(Path::new("/proc/sys").join(key)).unwrap_or_default()).into()
}

fn require_own_cluster() -> Option<String> {
    Cluster::missing().or_else(|| {
        (!Cluster::is_ours()).then(|| "is about clusters that are made here".to_owned())
    })
}

#[test]
fn killed_cluster_dies_as_a_whole_and_is_removed_by_clean() -> Result<()> {
    if let Some(missing) = require_own_cluster() {
        harness::skip!("{missing}");
    }
    let _one = ONE_AFTER_THE_OTHER.lock().unwrap_or_else(PoisonError::into_inner);
    let before = settings();
    let mut cluster = Keeper::start()?;
    let name = name_of(cluster.0.id());
    wait::until(wait::SOON, "the node's kubelet", || {
        processes(&name).is_ok_and(|found| found.iter().any(|line| line.contains(" kubelet ")))
    })?;
    cluster.0.kill()?;
    cluster.0.wait()?;
    dies_as_a_whole(cluster.0.id())?;
    let pid = cluster.0.id().to_string();
    let output = xtask()?.args(["clean", "--pid", &pid]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(cluster.traces()?, [] as [String; 0]);
    assert_eq!(settings(), before, "the machine's settings are not the cluster's");
    Ok(())
}

#[test]
fn cluster_removes_itself_when_nobody_wants_it_any_more() -> Result<()> {
    if let Some(missing) = require_own_cluster() {
        harness::skip!("{missing}");
    }
    let mut cluster = Keeper::start()?;
    ensure!(!cluster.traces()?.is_empty(), "otherwise nothing is removed");
    drop(cluster.0.stdin.take());
    cluster.0.wait()?;
    assert_eq!(cluster.traces()?, [] as [String; 0]);
    Ok(())
}

/// Where what builds Kubernetes is missing.
#[test]
fn machine_without_go_is_told_and_its_tests_are_counted_as_skipped() -> Result<()> {
    if let Some(missing) = require_own_cluster() {
        harness::skip!("{missing}");
    }
    let output = xtask()?.args(["cluster", "up"]).env("PATH", "/nonexistent").output()?;
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    ensure!(!output.status.success(), "a cluster without Go");
    ensure!(said.contains("SKIPPED: no cluster here: needs Go 1.26"), "{said}");

    // What xtask tells the tests then, and what it counts of them.
    let list = std::env::temp_dir().join(format!("malla-{}-skipped", std::process::id()));
    fs::write(&list, "")?;
    const TEST: &str = "service_is_reached_by_address_and_name_from_both_nodes";
    let mut test = Command::new(std::env::current_exe()?);
    test.args(["--exact", TEST]).env("MALLA_NO_CLUSTER", "no Go").env("MALLA_SKIPPED", &list);
    let output = test.output().context("run a test")?;
    let counted = fs::read_to_string(&list)?;
    fs::remove_file(&list)?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success() && said.contains("1 passed"), "{said}");
    assert_eq!(counted, format!("{TEST}\tno Go\n"));
    Ok(())
}

/// A cluster as people start one to look at, beside those of the tests. Ended when dropped.
struct Up;

impl Up {
    fn cluster(command: &[&str]) -> Result<String> {
        // One of several of this checkout.
        let output = xtask()?.arg("cluster").args(command).env("MALLA_CLUSTER", "up").output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{command:?}: {}\n{said}{error}", output.status);
        Ok(said)
    }

    /// The process that keeps it.
    fn keeper() -> Result<u32> {
        let status = Self::cluster(&["status"])?;
        let (keeper, _) = after("kept by process ", &status)?.split_once(',').context("no end")?;
        keeper.parse().context("the number of a process")
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        Self::cluster(&["down"]).ok();
    }
}

/// What follows `word` in one of the lines.
fn after<'a>(word: &str, said: &'a str) -> Result<&'a str> {
    let found = said.lines().find_map(|line| Some(line.split_once(word)?.1));
    found.with_context(|| format!("no `{word}` in:\n{said}"))
}

#[test]
fn cluster_that_is_started_to_look_at_is_as_it_says_until_it_is_ended() -> Result<()> {
    if let Some(missing) = require_own_cluster() {
        harness::skip!("{missing}");
    }
    let _one = ONE_AFTER_THE_OTHER.lock().unwrap_or_else(PoisonError::into_inner);
    let up = Up;
    // What a run that was killed has left.
    Up::cluster(&["down"])?;
    let said = Up::cluster(&["status"])?;
    ensure!(said.contains("this checkout has none"), "{said}");

    let said = Up::cluster(&["up", "--nodes", "1"])?;
    let kubeconfig = Path::new(after("export KUBECONFIG=", &said)?);
    let programs = after("export PATH=", &said)?.trim_end_matches(":$PATH");
    let mut kubectl = Command::new(Path::new(programs).join("kubectl"));
    kubectl.env("KUBECONFIG", kubeconfig).args(["get", "nodes", "--output", "json"]);
    let nodes = kubectl.output().context("run the kubectl that it names")?;
    let nodes: Value = serde_json::from_slice(&nodes.stdout).context("the nodes")?;
    assert_eq!(nodes["items"].as_array().map(Vec::len), Some(1), "{nodes}");

    let status = Up::cluster(&["status"])?;
    assert_eq!(Path::new(after("export KUBECONFIG=", &status)?), kubeconfig, "{status}");
    let keeper = Up::keeper()?;
    ensure!(!traces(keeper)?.is_empty(), "otherwise nothing is removed");
    let again = Up::cluster(&["up"])?;
    ensure!(again.contains("one runs already"), "{again}");
    assert_eq!(Up::keeper()?, keeper, "the same one");

    // Killed, it leaves mounts and cgroups, which the next one removes.
    let kill = Command::new("kill").args(["-KILL", &keeper.to_string()]).status()?;
    ensure!(kill.success(), "kill the process that keeps it");
    dies_as_a_whole(keeper)?;
    Up::cluster(&["up", "--nodes", "1"])?;
    assert_eq!(traces(keeper)?, [] as [String; 0]);
    let keeper = Up::keeper()?;

    let said = Up::cluster(&["down"])?;
    ensure!(said.contains("removed"), "{said}");
    assert_eq!(traces(keeper)?, [] as [String; 0]);
    ensure!(!kubeconfig.exists(), "{}", kubeconfig.display());
    drop(up);
    let said = Up::cluster(&["status"])?;
    ensure!(said.contains("this checkout has none"), "{said}");
    Ok(())
}
