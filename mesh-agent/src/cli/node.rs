//! What an agent needs of its node besides the kernel: ports, a kubelet that is recognised, and that
//! somebody says where pods are.

use std::io;
use std::path::Path;
use std::time::Duration;

use mesh_core::addr::Cidr;
use serde_json::Value;
use tokio::time::timeout;

use super::check::{Check, Finding, Verdict};
use super::problems::is_cgroup2;
use crate::admin;
use crate::agent::Port;
use crate::discovery::client::{ClientError, client, escaped};
use crate::processes::Kubelet;
use crate::telemetry::chain;

/// An API server that takes longer for one question tells nobody anything.
pub(super) const ANSWER_TIME: Duration = Duration::from_secs(10);

/// Result, what was found, and what to do.
type Judged = (Verdict, String, String);

/// Whether the node has it; `cgroup` is the cgroup v2 directory that `--cgroup` means.
pub async fn findings(check: &Check, cgroup: &Path) -> Vec<Finding> {
    let mut found = ports(check).await;
    // An agent that follows manifests lets no kubelet in, and knows every pod.
    if check.manifests.is_none() {
        found.push(kubelet(cgroup, &check.kubelet_cgroup));
        found.extend(networks(check).await);
    }
    found
}

fn finding(description: String, (result, detail, hint): Judged) -> Finding {
    Finding { description, result, detail, hint }
}

async fn ports(check: &Check) -> Vec<Finding> {
    let all = Port::all(check.tunnel_port, check.metrics_addr, check.ready_addr);
    // What an agent has that runs here is not tried: without `--standby on` it shares two of its ports with
    // nobody, and another UDP socket beside its own could take packets from it while a third one starts.
    let dump = admin::ask(&check.admin.socket, "/config_dump").await.unwrap_or_default();
    let is_agents = |port: &Port| port_of(&dump["config"], port.flag) == Some(port.addr.port());
    let tried = all.iter().map(|port| (port, (!is_agents(port)).then(|| port.rehearse())));
    tried.map(|(port, tried)| listening(port, tried)).collect()
}

/// Whether an agent can listen at `port`, as it was `tried`; not if it is that of one that runs here.
fn listening(port: &Port, tried: Option<io::Result<()>>) -> Finding {
    let Port { flag, transport, addr } = port;
    let number = addr.port();
    let judged = match tried {
        None => (Verdict::Success, "the agent that runs here has it".to_owned(), String::new()),
        Some(Ok(())) => (Verdict::Success, String::new(), String::new()),
        Some(Err(error)) if error.kind() != io::ErrorKind::AddrInUse => (
            Verdict::Error,
            format!("{transport} port {number} cannot be had: {error}"),
            format!("name another one with {flag}"),
        ),
        Some(Err(_)) => (
            Verdict::Error,
            format!("another program has {transport} port {number}"),
            format!(
                "name another one with {flag}, or end what has it (`ss -lntup 'sport = :{number}'`); \
                 if an agent has it, name its --admin-socket"
            ),
        ),
    };
    finding(format!("{transport} {addr} ({flag})"), judged)
}

/// The port that `flag` has in an agent's configuration.
fn port_of(config: &Value, flag: &str) -> Option<u16> {
    let value = config.get(flag.trim_start_matches('-').replace('-', "_"))?;
    let number = value.as_u64().and_then(|number| u16::try_from(number).ok());
    number.or_else(|| value.as_str()?.rsplit_once(':')?.1.parse().ok())
}

fn kubelet(cgroup: &Path, names: &[String]) -> Finding {
    // Elsewhere there may be no end of directories.
    let mut kubelet = is_cgroup2(cgroup).then(|| Kubelet::new(cgroup, names));
    let judged = match kubelet.as_mut().and_then(Kubelet::place) {
        Some(path) => (Verdict::Success, path.display().to_string(), String::new()),
        None => (
            Verdict::Warning,
            format!(
                "no cgroup below {} is called {} and has a process: in a cluster, strict pods would \
                 refuse the kubelet's probes",
                cgroup.display(),
                names.join(" or ")
            ),
            "name its own with --kubelet-cgroup: `cat /proc/$(pidof kubelet)/cgroup`".to_owned(),
        ),
    };
    finding("cgroup of the kubelet (--kubelet-cgroup)".to_owned(), judged)
}

/// Whether it is known where pods are; `None` if no node is named, or there is no cluster to ask.
async fn networks(check: &Check) -> Option<Finding> {
    let node = check.node.as_deref()?;
    let listed = list_node(check.kubeconfig.as_deref(), node).await?;
    let judged = judge_networks(node, &listed, &check.pod_cidrs);
    Some(finding("networks of pods (spec.podCIDRs, --pod-cidrs)".to_owned(), judged))
}

/// The list of Nodes that are called so. `None`: this is no pod, and no cluster was named.
async fn list_node(kubeconfig: Option<&Path>, name: &str) -> Option<Result<Value, String>> {
    let client = match client(kubeconfig).await {
        Ok(client) => client,
        Err(ClientError::NotInPod(_)) => return None,
        Err(error) => return Some(Err(chain(&error))),
    };
    let asked = async {
        let path = format!("/api/v1/nodes?fieldSelector=metadata.name%3D{}", escaped(name));
        let request = http::Request::get(path).body(Vec::new());
        let request = request.map_err(|error| error.to_string())?;
        client.request::<Value>(request).await.map_err(|error| chain(&error))
    };
    let answered = timeout(ANSWER_TIME, asked).await;
    Some(answered.unwrap_or_else(|_elapsed| Err("no answer in time".to_owned())))
}

/// By this node's alone: whoever gives out such blocks gives every node some.
fn judge_networks(name: &str, listed: &Result<Value, String>, given: &[Cidr]) -> Judged {
    if !given.is_empty() {
        let given: Vec<_> = given.iter().map(ToString::to_string).collect();
        return (Verdict::Success, format!("--pod-cidrs {}", given.join(",")), String::new());
    }
    let warn = |detail: String, hint: &str| (Verdict::Warning, detail, hint.to_owned());
    let node = match listed {
        Ok(list) => list["items"].get(0),
        Err(error) => {
            return warn(format!("the cluster: {error}"), "name a cluster with --kubeconfig");
        }
    };
    let Some(node) = node else {
        return warn(
            format!("the cluster has no Node {name}"),
            "--node is what pods have in spec.nodeName",
        );
    };
    let blocks = node["spec"]["podCIDRs"].as_array();
    let blocks: Vec<_> = blocks.into_iter().flatten().filter_map(Value::as_str).collect();
    if blocks.is_empty() {
        return warn(
            format!(
                "Node {name} has no spec.podCIDRs: pods of other nodes that no Service selects would be \
                 reached in plain text"
            ),
            "name the networks of pods, and no others, with --pod-cidrs",
        );
    }
    (Verdict::Success, blocks.join(","), String::new())
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use serde_json::json;

    use super::*;

    #[test]
    fn port_that_another_program_has_is_named_with_protocol_and_flag() {
        let (metrics, ready) =
            ("0.0.0.0:15020".parse().unwrap(), "127.0.0.1:15021".parse().unwrap());
        let all = Port::all(NonZeroU16::new(15019).unwrap(), metrics, ready);
        let found = all.map(|port| listening(&port, Some(Err(io::ErrorKind::AddrInUse.into()))));
        for (finding, protocol, port, flag) in [
            (&found[0], "TCP", "15019", "--tunnel-port"),
            (&found[1], "UDP", "15019", "--tunnel-port"),
            (&found[2], "TCP", "15020", "--metrics-addr"),
            (&found[3], "TCP", "15021", "--ready-addr"),
        ] {
            assert_eq!(finding.result, Verdict::Error);
            assert_eq!(finding.detail, format!("another program has {protocol} port {port}"));
            assert!(finding.description.starts_with(protocol), "{finding:?}");
            assert!(finding.description.ends_with(&format!(":{port} ({flag})")), "{finding:?}");
            assert!(finding.hint.contains(flag), "{finding:?}");
        }
        let elsewhere = listening(&all[0], Some(Err(io::ErrorKind::AddrNotAvailable.into())));
        assert_eq!(elsewhere.result, Verdict::Error);
        assert!(elsewhere.detail.contains("cannot be had"), "{elsewhere:?}");
        assert_eq!(listening(&all[0], None).result, Verdict::Success);
    }

    #[test]
    fn port_of_an_agent_is_what_its_configuration_says() {
        let running = json!({
            "tunnel_port": 15019,
            "metrics_addr": "[::]:15020",
            "ready_addr": "127.0.0.1:9",
        });
        let flags = ["--tunnel-port", "--metrics-addr", "--ready-addr"];
        assert_eq!(flags.map(|flag| port_of(&running, flag)), [Some(15019), Some(15020), Some(9)]);
        assert_eq!(port_of(&Value::Null, "--tunnel-port"), None);
    }

    #[test]
    fn absent_kubelet_is_a_warning_with_the_remedy() {
        let names = ["kubelet.service", "k3s.service"].map(str::to_owned);
        let found = kubelet(Path::new("/nowhere"), &names);
        assert_eq!(found.result, Verdict::Warning);
        assert!(found.detail.contains("/nowhere is called kubelet.service or k3s.service"));
        assert!(found.hint.contains("--kubelet-cgroup"));
    }

    #[test]
    fn networks_of_pods_are_what_the_node_says_or_a_flag() {
        let list = |items: Value| Ok(json!({"kind": "NodeList", "items": items}));
        let given: [Cidr; 2] = ["10.0.0.0/8", "fd00::/8"].map(|text| text.parse().unwrap());
        let says = list(json!([{"spec": {"podCIDRs": ["10.244.1.0/24", "fd00:1::/64"]}}]));
        let nothing = list(json!([{"spec": {}}]));
        let failed = Err("403".to_owned());
        for (listed, given, result, text) in [
            (&says, &given[..0], Verdict::Success, "10.244.1.0/24,fd00:1::/64"),
            (&nothing, &given[..], Verdict::Success, "--pod-cidrs 10.0.0.0/8,fd00::/8"),
            (&failed, &given[..], Verdict::Success, "--pod-cidrs 10.0.0.0/8,fd00::/8"),
            (&nothing, &given[..0], Verdict::Warning, "Node n1 has no spec.podCIDRs"),
            (&list(json!([])), &given[..0], Verdict::Warning, "the cluster has no Node n1"),
            (&failed, &given[..0], Verdict::Warning, "the cluster: 403"),
        ] {
            let (judged, detail, hint) = judge_networks("n1", listed, given);
            assert_eq!(judged, result, "{detail}");
            assert!(detail.contains(text), "{detail}");
            assert_eq!(hint.is_empty(), result == Verdict::Success, "{hint}");
        }
    }
}
