//! The Kubernetes cluster that tests run on is a real one: pods on every node, services by address and
//! name across nodes, images loaded, and nothing left when it is gone.

/// Skips the test where there is no cluster, loudly and counted.
macro_rules! require_cluster {
    () => {
        if let Some(missing) = Cluster::missing() {
            harness::skip!("{missing}");
        }
    };
}

mod admission;
mod agents;
mod certificates;
mod endpoints;
mod families;
mod foreign;
mod load;
mod operations;
mod programs;
mod ready;
mod scale;
mod services;
mod unknown;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use anyhow::{Context as _, Result, ensure};
use harness::{Cluster, wait, xtask};
use serde_json::{Value, json};

fn service(name: &str, port: u16) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "selector": {"app": name},
            "ipFamilyPolicy": "PreferDualStack",
            "ports": [{"port": port}],
        },
    })
}

/// The addresses of a service, as URLs have them: of both families in a cluster that is made here.
fn hosts(cluster: &Cluster, service: &str) -> Result<Vec<String>> {
    let service = cluster.get(&["service", service])?;
    let addresses = service["spec"]["clusterIPs"].as_array().context("no addresses")?;
    ensure!(!Cluster::is_ours() || addresses.len() == 2, "of both families: {service}");
    Ok(addresses.iter().filter_map(Value::as_str).map(host).collect())
}

/// The addresses of a pod, as URLs have them.
fn hosts_of_pod(cluster: &Cluster, pod: &str) -> Result<Vec<String>> {
    let pod = cluster.get(&["pod", pod])?;
    let addresses = pod["status"]["podIPs"].as_array().context("no addresses")?;
    Ok(addresses.iter().filter_map(|one| one["ip"].as_str()).map(host).collect())
}

fn host(address: &str) -> String {
    if address.contains(':') { format!("[{address}]") } else { address.to_owned() }
}

/// Asks until a server answers: a new service is known on a node a moment later.
fn fetch(cluster: &Cluster, from: &str, url: &str) -> Result<String> {
    let ask = ["curl", "--silent", "--fail", "--max-time", "2", url];
    wait::until_some(wait::SOON, &format!("an answer from {url}"), || cluster.exec(from, &ask).ok())
}

#[test]
fn pod_runs_on_each_node_and_can_be_entered_and_read() -> Result<()> {
    require_cluster!();
    let cluster = Cluster::namespace()?;
    let image = Cluster::load("busybox")?;
    let nodes = cluster.two_nodes()?;
    for node in &nodes {
        let command = json!(["sh", "-c", "echo it runs; exec sleep 3600"]);
        let pod = format!("on-{node}");
        cluster.start(&pod, node, json!({"containers": [{"image": image, "command": command}]}))?;
    }
    let mut addresses = Vec::new();
    for node in &nodes {
        let pod = format!("on-{node}");
        cluster.ready(&pod)?;
        assert_eq!(cluster.kubectl(&["logs", &pod])?, "it runs\n");
        assert_eq!(cluster.exec(&pod, &["hostname"])?.trim(), pod);
        let status = &cluster.get(&["pod", &pod])?["status"];
        let address = status["podIP"].as_str().context("no address")?.to_owned();
        ensure!(status["hostIP"].as_str() != Some(address.as_str()), "{status}");
        let inside = cluster.exec(&pod, &["ip", "address"])?;
        ensure!(inside.contains(&address), "{address} is not in the pod:\n{inside}");
        addresses.push(address);
    }
    assert_ne!(addresses[0], addresses[1]);
    Ok(())
}

#[test]
fn service_is_reached_by_address_and_name_from_both_nodes() -> Result<()> {
    require_cluster!();
    let cluster = Cluster::namespace()?;
    let image = Cluster::load("nginx")?;
    let nodes = cluster.two_nodes()?;
    cluster.apply(&service("web", 80))?;
    cluster.start("web", &nodes[0], json!({"containers": [{"image": image}]}))?;
    cluster.client("same-node", &nodes[0])?;
    cluster.client("other-node", &nodes[1])?;
    cluster.ready("web")?;

    for from in ["same-node", "other-node"] {
        for host in hosts(&cluster, "web")? {
            assert_eq!(fetch(&cluster, from, &format!("http://{host}/"))?, "web\n");
        }
        let name = format!("http://web.{}.svc.cluster.local/", cluster.name());
        assert_eq!(fetch(&cluster, from, &name)?, "web\n");
        assert_eq!(fetch(&cluster, from, "http://web/")?, "web\n", "by the search list");
    }
    Ok(())
}

/// What an agent in a pod of the host's namespaces counts on.
#[test]
fn node_is_a_machine_of_its_own() -> Result<()> {
    require_cluster!();
    let cluster = Cluster::namespace()?;
    let image = Cluster::load("busybox")?;
    let nodes = cluster.two_nodes()?;
    for node in &nodes {
        let spec = json!({
            "hostNetwork": true,
            "hostPID": true,
            "containers": [{
                "image": image,
                "command": ["sleep", "3600"],
                "securityContext": {"capabilities": {"add": ["SYS_PTRACE"]}},
                "volumeMounts": [{"name": "bpf", "mountPath": "/sys/fs/bpf"}],
            }],
            "volumes": [{"name": "bpf", "hostPath": {"path": "/sys/fs/bpf"}}],
        });
        cluster.start(&format!("on-{node}"), node, spec)?;
    }
    let mut namespaces = Vec::new();
    for node in &nodes {
        let pod = format!("on-{node}");
        cluster.ready(&pod)?;
        let sh = |script: &str| cluster.exec(&pod, &["sh", "-c", script]);
        let own = sh("readlink /proc/self/ns/net")?;
        assert_eq!(sh("readlink /proc/1/ns/net")?, own, "process 1 is the node's");
        namespaces.push(own);

        let mounts = sh("cat /proc/self/mounts")?;
        ensure!(mounts.lines().any(|line| line.contains(" /sys/fs/bpf bpf ")), "{mounts}");

        let kubelets = sh("pidof kubelet")?;
        let kubelets: Vec<_> = kubelets.split_whitespace().collect();
        assert_eq!(kubelets.len(), 1, "only this node's processes are seen");
        let cgroups = sh(&format!("cat /proc/{}/cgroup", kubelets[0]))?;
        let unified = cgroups.lines().find(|line| line.starts_with("0::")).context("no cgroup2")?;
        // Alone there, and not where its pods are: its probes are recognised by it.
        ensure!(unified.ends_with("/kubelet.service"), "{cgroups}");

        // A container's is told by its pod's UID, as an agent finds it.
        let uid = cluster.get(&["pod", &pod])?["metadata"]["uid"].clone();
        let uid = uid.as_str().context("no UID")?.to_owned();
        let cgroups = sh("cat /proc/self/cgroup")?;
        let unified = cgroups.lines().find(|line| line.starts_with("0::")).context("no cgroup2")?;
        let is_there = [uid.clone(), uid.replace('-', "_")].iter().any(|uid| unified.contains(uid));
        // Version 2 alone shows a container its own cgroup as the root of all.
        ensure!(is_there || unified == "0::/", "{uid} is not in {unified}");
    }
    assert_ne!(namespaces[0], namespaces[1]);
    Ok(())
}

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
        let name = format!("malla-{}-", self.0.id());
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
    let before = settings();
    let mut cluster = Keeper::start()?;
    let name = format!("malla-{}-", cluster.0.id());
    wait::until(wait::SOON, "the node's kubelet", || {
        processes(&name).is_ok_and(|found| found.iter().any(|line| line.contains(" kubelet ")))
    })?;
    cluster.0.kill()?;
    cluster.0.wait()?;
    // Nobody but the kernel ends them.
    wait::until(wait::SOON, "every process to end", || {
        processes(&name).is_ok_and(|found| found.is_empty())
    })?;
    ensure!(!cluster.traces()?.is_empty(), "otherwise nothing is removed");
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
