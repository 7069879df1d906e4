//! What `deploy/daemonset.yaml` promises to whoever applies it: what its pods may do on a node, and what they
//! may not, and how they are replaced. That it works is for the tests in a cluster.

#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that goes wrong")]

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use clap::CommandFactory as _;
use mesh_agent::cli::Cli;
use serde_json::{Value, json};

const AGENT: &str = "DaemonSet";
const CA: &str = "Deployment";

fn objects() -> Vec<Value> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/daemonset.yaml");
    let text = fs::read_to_string(file).unwrap();
    serde_saphyr::from_multiple(&text).unwrap()
}

/// The object of a kind, of which there is one.
fn object(kind: &str) -> Value {
    let mut found = objects();
    found.retain(|object| object["kind"] == kind);
    assert_eq!(found.len(), 1, "{kind}");
    found.remove(0)
}

fn pod_of(kind: &str) -> Value {
    object(kind)["spec"]["template"]["spec"].clone()
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

fn texts(list: &Value) -> Vec<&str> {
    items(list).filter_map(Value::as_str).collect()
}

/// What has this key, however deep in `value`.
fn all<'a>(value: &'a Value, key: &str) -> Vec<&'a Value> {
    let mut found = Vec::new();
    let mut pending = vec![value];
    while let Some(value) = pending.pop() {
        pending.extend(items(value));
        for (name, inner) in value.as_object().into_iter().flatten() {
            if name == key {
                found.push(inner);
            }
            pending.push(inner);
        }
    }
    found
}

/// What holds for a container: what it says goes before what its pod says.
fn security<'a>(pod: &'a Value, container: &'a Value, key: &str) -> &'a Value {
    let own = &container["securityContext"][key];
    if own.is_null() { &pod["securityContext"][key] } else { own }
}

/// Where the command that a container runs serves something, by this flag, unless it is told otherwise.
fn served(container: &Value, flag: &str) -> SocketAddr {
    let cli = Cli::command();
    let words = texts(&container["args"]);
    let command = words.iter().fold(&cli, |command, word| command.find_subcommand(word).unwrap());
    let found = command.get_arguments().find(|arg| arg.get_long() == Some(flag)).unwrap();
    found.get_default_values()[0].as_os_str().to_str().unwrap().parse().unwrap()
}

/// What the other tests go by: each of both has a container, and there are no others.
#[test]
fn agent_and_ca_are_all_that_runs() {
    let mut found = Vec::new();
    for object in objects() {
        let lists = ["initContainers", "containers", "ephemeralContainers"];
        let lists = lists.iter().flat_map(|key| all(&object, key));
        let names = lists.flat_map(items).map(|container| container["name"].clone());
        found.extend(names.map(|name| (object["kind"].clone(), name)));
    }
    let expected = [(CA, "ca"), (AGENT, "agent")];
    assert_eq!(found, expected.map(|(kind, name)| (json!(kind), json!(name))));
}

/// Agents hear of it when all is deleted, in this order, and have something to take back.
#[test]
fn first_goes_the_namespace_and_what_lets_agents_write_goes_last() {
    let all = objects();
    let at = |kind: &str| {
        let is_it = |o: &Value| o["kind"] == kind && o["metadata"]["name"] != "malla-ca";
        all.iter().position(is_it).unwrap()
    };
    assert_eq!(at("Namespace"), 0);
    let is_cas = |object: &Value| object["metadata"]["name"] == "malla-ca";
    let (cas, last) = (all.iter().filter(|o| is_cas(o)).count(), all.iter().rposition(is_cas));
    assert!(
        cas >= 8 && Some(at("ServiceAccount")) > last,
        "their tokens are good until all of the CA's is deleted"
    );
    let rights = at("ClusterRole").min(at("ClusterRoleBinding"));
    assert!(at(AGENT) < rights && at("ServiceAccount") < rights);
    // And while it goes they are never without what limits them.
    assert!(
        at("ValidatingAdmissionPolicy") > rights && at("ValidatingAdmissionPolicyBinding") > rights
    );
}

#[test]
fn containers_have_these_capabilities_and_no_others_and_none_is_privileged() {
    for object in objects() {
        assert!(!all(&object, "privileged").contains(&&json!(true)), "{object}");
    }
    let agents = ["BPF", "NET_ADMIN", "PERFMON", "SYS_ADMIN", "SYS_PTRACE"];
    for (kind, expected) in [(AGENT, &agents[..]), (CA, &[])] {
        for container in items(&pod_of(kind)["containers"]) {
            let capabilities = &container["securityContext"]["capabilities"];
            assert_eq!(texts(&capabilities["drop"]), ["ALL"], "{kind}");
            let added: BTreeSet<_> = texts(&capabilities["add"]).into_iter().collect();
            let expected: BTreeSet<_> = expected.iter().copied().collect();
            assert_eq!(added, expected, "{kind}");
        }
    }
}

#[test]
fn containers_gain_no_privileges_and_write_to_no_root_file_system() {
    for kind in [AGENT, CA] {
        let pod = pod_of(kind);
        for container in items(&pod["containers"]) {
            let own = &container["securityContext"];
            assert_eq!(own["allowPrivilegeEscalation"], false, "{kind}");
            assert_eq!(own["readOnlyRootFilesystem"], true, "{kind}");
            let seccomp = security(&pod, container, "seccompProfile");
            assert_eq!(*seccomp, json!({"type": "RuntimeDefault"}), "{kind}");
        }
    }
    let pod = pod_of(CA);
    for container in items(&pod["containers"]) {
        assert_eq!(*security(&pod, container, "runAsNonRoot"), true);
        assert!(security(&pod, container, "runAsUser").as_u64().is_some_and(|user| user > 0));
    }
}

#[test]
fn agent_is_on_every_node_whatever_its_taints_and_the_last_to_be_evicted() {
    let pod = pod_of(AGENT);
    // Without a key, an effect and seconds: every taint, for ever.
    assert_eq!(pod["tolerations"], json!([{"operator": "Exists"}]));
    assert_eq!(pod["nodeSelector"], json!({"kubernetes.io/os": "linux"}));
    // But for what is no machine, and would never run it.
    let not_in =
        |key: &str, value: &str| json!({"key": key, "operator": "NotIn", "values": [value]});
    let no_machine =
        [not_in("eks.amazonaws.com/compute-type", "fargate"), not_in("type", "virtual-kubelet")];
    let required = json!({"nodeSelectorTerms": [{"matchExpressions": no_machine}]});
    let required = json!({"requiredDuringSchedulingIgnoredDuringExecution": required});
    assert_eq!(pod["affinity"], json!({"nodeAffinity": required}));
    assert_eq!(pod["priorityClassName"], "system-node-critical");
}

#[test]
fn new_agent_is_there_before_the_old_one_goes_and_no_port_keeps_it_from_the_node() {
    let agent = object(AGENT);
    let rolling = json!({"maxSurge": 1, "maxUnavailable": 0});
    let update = json!({"type": "RollingUpdate", "rollingUpdate": rolling});
    assert_eq!(agent["spec"]["updateStrategy"], update);
    let pod = pod_of(AGENT);
    assert_eq!(pod["hostNetwork"], true);
    // Whose cgroup a process is in, it reads of all processes of the node; of their memory it reads nothing.
    assert_eq!(pod["hostPID"], true);
    assert!(all(&pod, "hostIPC").is_empty());
    for container in items(&pod["containers"]) {
        let standby = json!({"name": "MESH_STANDBY", "value": "on"});
        assert!(items(&container["env"]).any(|variable| *variable == standby), "{container}");
        assert!(container["ports"].is_null(), "{container}");
    }
    // What shares nothing with its node declares ports as it likes, but none of the node's.
    let pod = pod_of(CA);
    for key in ["hostNetwork", "hostPID", "hostIPC", "hostPort"] {
        assert!(all(&pod, key).is_empty(), "{key}");
    }
}

#[test]
fn every_container_asks_for_what_it_takes() {
    for kind in [AGENT, CA] {
        for container in items(&pod_of(kind)["containers"]) {
            let requests = &container["resources"]["requests"];
            for what in ["cpu", "memory"] {
                let asked = requests[what].as_str().unwrap_or_default();
                assert!(asked.starts_with(|c: char| ('1'..='9').contains(&c)), "{kind}: {what}");
            }
        }
    }
}

#[test]
fn agent_has_three_directories_of_its_node_and_writes_to_two_and_the_ca_has_none() {
    let mut found = Vec::new();
    for object in objects() {
        let pod = &object["spec"]["template"]["spec"];
        let mounts =
            items(&pod["containers"]).flat_map(|container| items(&container["volumeMounts"]));
        for mount in mounts {
            let volume = items(&pod["volumes"]).find(|volume| volume["name"] == mount["name"]);
            let volume = volume.unwrap();
            let source = [&volume["hostPath"]["path"], &volume["configMap"]["name"]];
            let source = source.into_iter().find_map(Value::as_str).unwrap().to_owned();
            let is_writable = mount["readOnly"] != true;
            found.push((object["kind"].clone(), source, is_writable));
        }
        for key in ["mountPropagation", "subPath", "subPathExpr"] {
            assert!(all(pod, key).is_empty(), "{key}");
        }
    }
    found.sort_by(|(_, one, _), (_, other, _)| one.cmp(other));
    let expected = [
        ("/run/malla", true),
        ("/sys/fs/bpf/malla", true),
        ("/sys/fs/cgroup", false),
        ("malla-trust", false),
    ];
    assert_eq!(found, expected.map(|(source, writes)| (json!(AGENT), source.to_owned(), writes)));
    let sources = objects().iter().map(|object| all(object, "hostPath").len()).sum::<usize>();
    assert_eq!(sources, 3, "also those that nothing mounts");
}

#[test]
fn prometheus_and_kubelet_ask_where_agent_and_ca_answer() {
    for object in objects() {
        for flag in ["MESH_METRICS_ADDR", "MESH_READY_ADDR"] {
            assert!(!object.to_string().contains(flag), "the defaults hold");
        }
    }
    let probes = [
        ("livenessProbe", "/healthz/live"),
        ("readinessProbe", "/healthz/ready"),
        ("startupProbe", "/healthz/live"),
    ];
    // The CA starts at once.
    for (kind, probes) in [(AGENT, &probes[..]), (CA, &probes[..2])] {
        let workload = object(kind);
        let template = &workload["spec"]["template"];
        for container in items(&template["spec"]["containers"]) {
            let annotations = json!({
                "prometheus.io/scrape": "true",
                "prometheus.io/port": served(container, "metrics-addr").port().to_string(),
                "prometheus.io/path": "/metrics",
            });
            assert!(!served(container, "metrics-addr").ip().is_loopback(), "{kind}: nobody could");
            assert_eq!(template["metadata"]["annotations"], annotations, "{kind}");
            let ready = served(container, "ready-addr");
            let host = ready.ip().is_loopback().then(|| ready.ip().to_string());
            for (probe, path) in probes {
                let asked = &container[probe]["httpGet"];
                assert_eq!(asked["path"], *path, "{kind}: {probe}");
                assert_eq!(asked["host"].as_str(), host.as_deref(), "{kind}: {probe}");
                let named = items(&container["ports"]).find(|port| port["name"] == asked["port"]);
                let port = named.map_or(&asked["port"], |port| &port["containerPort"]);
                assert_eq!(*port, ready.port(), "{kind}: {probe}");
            }
        }
    }
}

#[test]
fn one_replica_of_the_ca_stays_and_only_its_metrics_are_reached() {
    let ca = object(CA);
    let labels = &ca["spec"]["template"]["metadata"]["labels"];
    assert!(labels.is_object(), "{ca}");
    let budget = object("PodDisruptionBudget");
    assert_eq!(budget["spec"], json!({"minAvailable": 1, "selector": {"matchLabels": labels}}));
    assert_eq!(ca["spec"]["replicas"], 2, "with one no node could be drained");

    let pod = pod_of(CA);
    let container = items(&pod["containers"]).next().unwrap();
    // Who probes is the kubelet, which is let in in any case.
    let ports = [json!({"protocol": "TCP", "port": served(container, "metrics-addr").port()})];
    let policy = object("NetworkPolicy");
    let expected = json!({
        "podSelector": {"matchLabels": labels},
        "policyTypes": ["Ingress"],
        "ingress": [{"ports": ports}],
    });
    assert_eq!(policy["spec"], expected);
    for other in [&budget, &policy] {
        assert_eq!(other["metadata"]["namespace"], ca["metadata"]["namespace"]);
    }
}
