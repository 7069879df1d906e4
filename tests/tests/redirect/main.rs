//! `--redirect-peer on`: packets between two pods of a node skip it; and, without, do not.

mod cables;
mod packets;

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use harness::wait::{SOON, until};
use harness::{Builder, Mesh, PodSpec};

const ON: &str = "--redirect-peer=on";
/// What it is done with.
const TCX: (&str, (u32, u32)) = ("TCX", (6, 6));

/// A node with two pods that talk without the agent at the ports 8080 to 8089, so that what is seen
/// there is theirs.
fn one_node() -> Builder {
    let pod = |name| {
        PodSpec::new(name, "a")
            .annotation("malla.dev/skip-outbound-ports", "8080-8089")
            .annotation("malla.dev/skip-inbound-ports", "8080-8089")
    };
    Mesh::builder()
        .node("a")
        .namespace("default", &[("malla.dev/mesh", "enabled")])
        .pod(pod("a1"))
        .pod(pod("a2"))
}

fn redirected() -> Result<Mesh> {
    let mesh = one_node().flag(ON).start()?;
    wait_for(&mesh, &["a1", "a2"], "on")?;
    Ok(mesh)
}

/// Waits until `status` says this, or a sentence with it, of the pods.
fn wait_for(mesh: &Mesh, pods: &[&str], how: &str) -> Result<()> {
    let mut last = serde_json::Value::Null;
    until(SOON, "the pods' cables to be looked at", || {
        let status = mesh.agent("a").cli(&["status", "-o", "json"]);
        last = status.and_then(|cli| cli.json()).unwrap_or_default()["redirect_peer"].take();
        let is_so = |said: &str| if how == "on" { said == how } else { said.contains(how) };
        pods.iter().all(|pod| last[format!("default/{pod}")].as_str().is_some_and(is_so))
    })
    .with_context(|| format!("{pods:?} to be {how:?}: {last}"))
}

fn kernel(mesh: &Mesh, event: &str) -> Result<f64> {
    mesh.agent("a").metric("mesh_capture_total", &[("event", event)])
}

/// Gives the node nftables rules for what it forwards between the two pods.
fn rules(mesh: &Mesh, rules: &[&str]) -> Result<()> {
    let mut all = String::new();
    for (from, to) in [("a1", "a2"), ("a2", "a1")] {
        let (from, to) = (mesh.pod(from), mesh.pod(to));
        for rule in rules {
            all += &format!("ip saddr {} ip daddr {} {rule}\n", from.v4_ip(), to.v4_ip());
            all += &format!("ip6 saddr {} ip6 daddr {} {rule}\n", from.v6_ip(), to.v6_ip());
        }
    }
    let table = format!(
        "table inet seen {{\n counter pods_tcp {{}}\n counter pods_other {{}}\n chain forward {{\n \
         type filter hook forward priority filter; policy accept;\n{all} }}\n}}\n"
    );
    let file = mesh.state_dir().join("seen.nft");
    fs::write(&file, table)?;
    on_node(mesh, "nft", &["-f", &file.display().to_string()]).map(drop)
}

/// Counts what the node forwards between the two pods.
fn watch(mesh: &Mesh) -> Result<()> {
    rules(
        mesh,
        &["meta l4proto tcp counter name pods_tcp", "meta l4proto != tcp counter name pods_other"],
    )
}

/// How many packets the node has forwarded between the two pods.
fn forwarded(mesh: &Mesh, counter: &str) -> Result<u64> {
    let said = on_node(mesh, "nft", &["-j", "list", "counter", "inet", "seen", counter])?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    let all = said["nftables"].as_array().context("no list")?;
    let found = all.iter().find_map(|one| one["counter"]["packets"].as_u64());
    found.with_context(|| format!("no counter {counter}: {said}"))
}

/// Runs a program in the node's namespace.
fn on_node(mesh: &Mesh, program: &str, args: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(args);
    let output = mesh.node("a").netns().run(|| command.output().context("run"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{program} {args:?}: {said}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
