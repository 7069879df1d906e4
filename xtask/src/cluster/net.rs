//! The cluster's networks: a namespace for the control plane with a bridge in it, one per node with
//! a link into that bridge, and routes to each other's pods. Nothing of it touches the machine's own.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::cluster::state::Cluster;

/// Where the API server listens, for nodes and pods.
pub(crate) const CONTROL: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const CONTROL_6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, 1);
/// The name of its namespace.
pub(crate) const CONTROL_NETNS: &str = "control";

pub(crate) const PODS: &str = "10.244.0.0/16,fd00:10:244::/48";
pub(crate) const SERVICES: &str = "10.96.0.0/16,fd00:10:96::/112";
/// The first of [`SERVICES`]: the API server, as pods see it.
pub(crate) const API_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// Where pods ask for names.
pub(crate) const DNS_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);

/// Every node has a number from 1 on, and its addresses end with ten more.
pub(crate) const MAX_NODES: usize = 9;

/// The node's address.
pub(crate) fn node(number: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, low(number) + 10)
}

pub(crate) fn node_6(number: usize) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, u16::from(low(number)) + 0x10)
}

/// The addresses of the node's pods.
pub(crate) fn pods(number: usize) -> String {
    format!("10.244.{number}.0/24")
}

pub(crate) fn pods_6(number: usize) -> String {
    format!("fd00:10:244:{number}::/64")
}

#[expect(clippy::cast_possible_truncation, reason = "at most MAX_NODES")]
fn low(number: usize) -> u8 {
    number.min(MAX_NODES) as u8
}

/// Makes all of it.
///
/// # Errors
///
/// Fails with what `ip` says.
pub(crate) fn build(cluster: &Cluster) -> Result<()> {
    let nodes = 1..=cluster.nodes;
    let control = cluster.name(CONTROL_NETNS);
    let names: Vec<String> = nodes.clone().map(|n| cluster.name(&format!("node-{n}"))).collect();

    let mut add = format!("netns add {control}\n");
    for name in &names {
        writeln!(add, "netns add {name}")?;
    }
    ip(None, &add)?;
    for name in names.iter().chain([&control]) {
        settings(cluster, name)?;
    }

    let mut batch = format!(
        "link set lo up\nlink add br0 type bridge\n\
         addr add {CONTROL}/24 dev br0\naddr add {CONTROL_6}/64 dev br0\nlink set br0 up\n"
    );
    for (n, name) in nodes.clone().zip(&names) {
        write!(
            batch,
            "link add node-{n} type veth peer name eth0 netns {name}\n\
             link set node-{n} master br0 up\n"
        )?;
    }
    batch.push_str(&routes(nodes.clone()));
    ip(Some(&control), &batch)?;

    for (n, name) in nodes.clone().zip(&names) {
        let mut batch = format!(
            "link set lo up\naddr add {}/24 dev eth0\naddr add {}/64 dev eth0\nlink set eth0 up\n\
             route add default via {CONTROL}\nroute add default via {CONTROL_6}\n",
            node(n),
            node_6(n),
        );
        batch.push_str(&routes(nodes.clone().filter(|other| *other != n)));
        ip(Some(name), &batch)?;
    }
    Ok(())
}

/// The way to the pods of some nodes.
fn routes(nodes: impl Iterator<Item = usize>) -> String {
    let mut batch = String::new();
    for n in nodes {
        let (v4, v6) = (node(n), node_6(n));
        batch.push_str(&format!("route add {} via {v4}\n", pods(n)));
        batch.push_str(&format!("route add {} via {v6}\n", pods_6(n)));
    }
    batch
}

/// An address that waits a second for duplicates is a second that everybody waits.
fn settings(cluster: &Cluster, name: &str) -> Result<()> {
    let script = "cd /proc/sys/net
        for each in all default; do echo 0 >ipv6/conf/$each/accept_dad; done
        echo 1 >ipv4/ip_forward
        echo 1 >ipv6/conf/all/forwarding";
    let suffix = name.strip_prefix(&cluster.name("")).unwrap_or(name);
    let mut command = enter(&cluster.netns(suffix));
    let output = command.args(["sh", "-ec", script]).output().context("start nsenter")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "set up {name}: {}", said.trim());
    Ok(())
}

/// A command in the network namespace; the program and its arguments are still to be added. Not by
/// `ip netns exec`, which mounts a new `/sys` and so hides the cgroups.
pub(crate) fn enter(netns: &Path) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", netns.display())).arg("--");
    command
}

fn ip(netns: Option<&str>, batch: &str) -> Result<()> {
    use std::io::Write as _;
    use std::process::Stdio;

    let mut command = Command::new("ip");
    if let Some(netns) = netns {
        command.args(["-n", netns]);
    }
    command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = command.stderr(Stdio::piped()).spawn().context("start ip")?;
    let written = child.stdin.take().context("no stdin")?.write_all(batch.as_bytes());
    let output = child.wait_with_output().context("wait for ip")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip: {}\n{batch}", said.trim());
    written.context("write to ip")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_nodes_and_pods_do_not_overlap() {
        let all: Vec<_> =
            (1..=MAX_NODES).map(|n| (node(n), node_6(n), pods(n), pods_6(n))).collect();
        for (n, one) in all.iter().enumerate() {
            for other in &all[..n] {
                assert!(
                    one.0 != other.0 && one.1 != other.1 && one.2 != other.2 && one.3 != other.3
                );
            }
            assert!(one.0 != CONTROL && one.1 != CONTROL_6);
        }
    }
}
