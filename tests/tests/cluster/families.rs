//! Both families of addresses: what holds for IPv4 holds for IPv6.

use anyhow::{Context as _, Result, ensure};
use harness::{Agents, Cluster};
use serde_json::{Value, json};

use crate::agents::{SERVERS, Shop};

/// The first of these addresses that is of IPv6, as a URL has it.
fn v6(addresses: &Value, key: &str) -> Option<String> {
    let mut all = addresses.as_array()?.iter();
    let text = |one: &Value| one.as_str().or_else(|| one[key].as_str()).map(str::to_owned);
    all.find_map(|one| text(one).filter(|text| text.contains(':'))).map(|text| format!("[{text}]"))
}

#[test]
fn v6_is_carried_between_nodes_and_on_one_by_address_service_and_name_in_strict_mode() -> Result<()>
{
    require_cluster!();
    let agents = Agents::deployed()?;
    let shop = Shop::open(&json!({"malla.dev/mesh": "enabled", "malla.dev/mode": "strict"}))?;
    let service = shop.cluster.get(&["service", "web"])?;
    let Some(service) = v6(&service["spec"]["clusterIPs"], "") else {
        harness::skip!("the cluster gives no IPv6 address to a Service");
    };
    let mut pods = Vec::new();
    for pod in SERVERS {
        let pod = shop.cluster.get(&["pod", pod])?;
        pods.push(v6(&pod["status"]["podIPs"], "ip").context("a pod without IPv6")?);
    }
    let outside = Cluster::namespace()?;
    for (node, name) in shop.nodes.iter().zip(["here", "there"]) {
        outside.client(name, node)?;
    }
    shop.wait_until_enrolled(&agents, true)?;

    // Names have addresses of both: `-6` takes the other one away.
    let names = SERVERS.map(|name| format!("{name}.headless"));
    for hosts in [&[service.clone()][..], &pods, &["web".to_owned()], &names] {
        shop.hear_both_by(&["-6"], hosts)?;
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
            ensure!([7, 56].contains(&code), "refused, from {client} to {pod}: {code}");
        }
    }
    Ok(())
}
