//! Both families of addresses: what holds for IPv4 holds for IPv6.

use anyhow::{Context as _, Result, ensure};
use harness::{Agents, Cluster, SERVERS, Shop, host};
use serde_json::json;

/// Options of `curl` that leave a name one of its addresses.
const FAMILIES: [&str; 2] = ["-4", "-6"];

/// Which of these is of this family.
fn of(family: &str, hosts: Vec<String>) -> Option<String> {
    let is_v6 = family == "-6";
    hosts.into_iter().find(|host| host.starts_with('[') == is_v6)
}

#[test]
fn both_families_are_carried_by_address_service_and_name_in_strict_mode() -> Result<()> {
    require_cluster!();
    let agents = Agents::deployed()?;
    let shop = Shop::open(&json!({"malla.dev/mesh": "enabled", "malla.dev/mode": "strict"}))?;
    if shop.cluster.hosts("web")?.len() < FAMILIES.len() {
        harness::skip!("the cluster gives addresses of one family to a Service");
    }
    let outside = Cluster::namespace()?;
    for (node, name) in shop.nodes.iter().zip(["here", "there"]) {
        outside.client(name, node)?;
    }
    shop.wait_until_enrolled(&agents, true)?;
    for family in FAMILIES {
        is_carried(family, &agents, &shop, &outside).with_context(|| format!("by {family}"))?;
    }
    pods_that_no_service_selects_are_carried_by_address(&agents, &shop, &outside)
}

/// Between nodes and on one, and nothing else comes in.
fn is_carried(family: &str, agents: &Agents, shop: &Shop, outside: &Cluster) -> Result<()> {
    let service = of(family, shop.cluster.hosts("web")?).context("a Service without it")?;
    let mut pods = Vec::new();
    for pod in SERVERS {
        pods.push(of(family, shop.cluster.hosts_of_pod(pod)?).context("a pod without it")?);
    }
    let names = SERVERS.map(|name| format!("{name}.headless"));
    for hosts in [&[service.clone()][..], &pods, &["web".to_owned()], &names] {
        shop.hear_both_by(&[family], hosts)?;
    }
    let namespace = shop.cluster.name();
    let identity = format!("spiffe://cluster.local/ns/{namespace}/sa/default");
    let [here, there] = &shop.nodes;
    let proven = [
        ("src.workload", "client"),
        ("src.identity", &identity),
        ("dst.identity", &identity),
        ("response_flags", "-"),
    ];
    // What was dialled, where it went, and that the other node's agent was shown the same certificate.
    let by_service = format!("{service}:80");
    let to = |pod: usize| format!("{}:80", pods[pod]);
    // Where both are one, a record has the one.
    for (pod, dialled) in [(0, &*by_service), (0, ""), (1, &by_service), (1, "")] {
        let addr = to(pod);
        let to = [
            ("direction", "outbound"),
            ("dst.workload", SERVERS[pod]),
            ("dst.addr", &addr),
            ("dst.orig_addr", dialled),
            // What the kernel carries on the node, it does for one that was carried before.
            [("carrier", "local"), ("way", "tunnel")][pod],
        ];
        agents.wait_for_record(here, &[&proven[..], &to].concat())?;
    }
    let addr = to(1);
    let inbound =
        [("direction", "inbound"), ("way", "tunnel"), ("peer.node", here), ("dst.addr", &addr)];
    agents.wait_for_record(there, &[&proven[..], &inbound].concat())?;

    // Plain text is let in by neither node's pod, from neither node.
    for client in ["here", "there"] {
        for pod in &pods {
            let ask = ["curl", "--silent", "--max-time", "3", &format!("http://{pod}/")];
            let output = outside.exec_output(client, &ask)?;
            let code = output.status.code().unwrap_or_default();
            ensure!(Cluster::REFUSED.contains(&code), "refused, from {client} to {pod}: {code}");
        }
    }
    Ok(())
}

/// Nothing but their addresses names them; one is in the mesh and strict, one outside of it.
fn pods_that_no_service_selects_are_carried_by_address(
    agents: &Agents,
    shop: &Shop,
    outside: &Cluster,
) -> Result<()> {
    let [here, there] = &shop.nodes;
    let node = shop.cluster.get(&["node", there])?;
    if node["spec"]["podCIDRs"].is_null() && !Cluster::is_ours() {
        return Ok(()); // It would have to be told to the agents, and by whom?
    }
    let image = Cluster::load("nginx")?;
    let all = [(&shop.cluster, "tunnel"), (outside, "passthrough")];
    for (cluster, _) in all {
        cluster.start("lonely", there, json!({"containers": [{"image": image}]}))?;
    }
    let identity = format!("spiffe://cluster.local/ns/{}/sa/default", shop.cluster.name());
    for (cluster, way) in all {
        cluster.ready("lonely")?;
        let pod = cluster.get(&["pod", "lonely"])?;
        if way == "tunnel" {
            agents.wait_until_enrolled(there, cluster.name(), "lonely", true)?;
            agents.wait_until_carried(there, cluster.name(), "lonely")?;
        }
        let addresses = pod["status"]["podIPs"].as_array().context("no addresses")?;
        ensure!(addresses.len() == 2, "of both families: {addresses:?}");
        for (index, address) in addresses.iter().filter_map(|one| one["ip"].as_str()).enumerate() {
            let host = host(address);
            // The first of them; the next one may go past the agent.
            for _ in 0..2 {
                let ask = ["curl", "--silent", "--fail", "--max-time", "5", &host];
                assert_eq!(shop.cluster.exec("client", &ask)?.trim(), "lonely", "{host}");
            }
            if way == "passthrough" && index > 0 {
                continue; // Who is known by one address is known by the other, and left alone.
            }
            let addr = format!("{host}:80");
            let to = [("src.workload", "client"), ("dst.addr", &addr), ("response_flags", "-")];
            let out = [("direction", "outbound"), ("way", way), ("dst.workload", "lonely")];
            agents.wait_for_record(here, &[&to[..], &out].concat())?;
            if way == "tunnel" {
                let proven = [("direction", "inbound"), ("src.identity", &identity), ("way", way)];
                agents.wait_for_record(there, &[&to[..], &proven].concat())?;
            }
        }
    }
    Ok(())
}
