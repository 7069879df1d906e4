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
mod command;
mod endpoints;
mod families;
mod foreign;
mod left_alone;
mod programs;
mod ready;
mod scale;
mod services;
mod settings;
mod unknown;

use anyhow::{Context as _, Result, ensure};
use harness::{Cluster, service_of_pods, wait};
use serde_json::json;

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
    cluster.apply(&service_of_pods("web", 80))?;
    cluster.start("web", &nodes[0], json!({"containers": [{"image": image}]}))?;
    cluster.client("same-node", &nodes[0])?;
    cluster.client("other-node", &nodes[1])?;
    cluster.ready("web")?;

    for from in ["same-node", "other-node"] {
        for host in cluster.hosts("web")? {
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
