//! Agents in a real cluster: they learn from its API who takes part, find the pods' namespaces from the
//! node's processes, and carry.

use anyhow::{Context as _, Result, ensure};
use harness::{Agents, Cluster, SERVERS, Shop, enabled, host, wait};
use serde_json::{Value, json};

#[test]
fn annotated_namespace_is_carried_between_nodes_and_on_one_until_it_leaves() -> Result<()> {
    require_cluster!();
    let agents = Agents::deployed()?;
    let shop = Shop::open(&enabled())?;
    let [here, there] = &shop.nodes;
    shop.wait_until_enrolled(&agents, true)?;
    // Nobody here has asked for a pod of the other node yet, so nothing of it is known here.
    let unknown = agents.workload(here, shop.cluster.name(), SERVERS[1])?;
    ensure!(unknown.is_null(), "{unknown}");
    shop.hear_both(&["web"])?;
    let known = agents.workload(here, shop.cluster.name(), SERVERS[1])?;
    assert_eq!(known["way"], "tunnel", "{known}");
    shop.hear_both(&SERVERS.map(|name| format!("{name}.headless")))?;
    let namespace = shop.cluster.name();
    let identity = format!("spiffe://cluster.local/ns/{namespace}/sa/default");
    let common = [
        ("src.workload", "client"),
        ("src.identity", &identity),
        ("dst.identity", &identity),
        ("response_flags", "-"),
    ];
    let by_service = format!("web.{namespace}.svc.cluster.local");
    for service in [by_service.as_str(), ""] {
        let [far, near] = [there, here].map(|node| server_on(&shop, node));
        let texts = [("direction", "outbound"), ("dst.service", service)];
        let tunnel = [("dst.workload", &*far), ("way", "tunnel"), ("peer.node", there)];
        agents.wait_for_record(here, &[&common[..], &texts, &tunnel].concat())?;
        let local = [("dst.workload", &*near), ("carrier", "local")];
        agents.wait_for_record(here, &[&common[..], &texts, &local].concat())?;
    }
    let inbound = [("direction", "inbound"), ("way", "tunnel"), ("peer.node", here)];
    agents.wait_for_record(there, &[&common[..], &inbound].concat())?;

    // What comes to a service in use is read before anybody asks for it.
    let spec = json!({"containers": [{"image": Cluster::load("nginx")?}]});
    shop.cluster.start_as("later", "web", there, spec)?;
    wait::until(wait::SOON, "what has come to the service", || {
        agents.workload(here, namespace, "later").is_ok_and(|found| found["enrolled"] == true)
    })?;
    shop.cluster.kubectl(&["delete", "pod", "later"])?;

    shop.cluster.annotate(&json!({"malla.dev/mesh": "disabled"}))?;
    shop.wait_until_enrolled(&agents, false)?;
    let of_client = |node: &str| {
        let records = agents.records(node);
        records.iter().filter(|record| record.text("src.namespace") == namespace).count()
    };
    // Direct connections are told of when they have ended; none is open.
    let before = [of_client(here), of_client(there)];
    shop.hear_both(&["web"])?;
    shop.hear_both_by_address()?;
    assert_eq!([of_client(here), of_client(there)], before, "nobody carries it any more");
    Ok(())
}

fn server_on(shop: &Shop, node: &str) -> String {
    let index = usize::from(shop.nodes[1] == *node);
    SERVERS[index].to_owned()
}

#[test]
fn pods_that_cannot_take_part_are_left_alone_with_the_reason() -> Result<()> {
    require_cluster!();
    let agents = Agents::deployed()?;
    let cluster = Cluster::namespace()?;
    cluster.annotate(&enabled())?;
    let nodes = cluster.two_nodes()?;
    let image = Cluster::load("busybox")?;
    let sleep = |seconds: &str| json!([{"image": image, "command": ["sleep", seconds]}]);
    let on_host = json!({"hostNetwork": true, "containers": sleep("3600")});
    cluster.start("on-host", &nodes[0], on_host)?;
    let ends = json!({"restartPolicy": "Never", "containers": sleep("0")});
    cluster.start("ends", &nodes[0], ends)?;
    cluster.start("alone", &nodes[0], json!({"containers": sleep("3600")}))?;
    cluster.kubectl(&["annotate", "pod", "alone", "malla.dev/mesh=disabled"])?;
    cluster.start("member", &nodes[0], json!({"containers": sleep("3600")}))?;
    // Of another mesh, by what its injector, its agent or a user writes.
    for (pod, verb, word) in [
        ("istio", "annotate", "sidecar.istio.io/status={}"),
        ("ambient", "annotate", "ambient.istio.io/redirection=enabled"),
        ("to-be-ambient", "label", "istio.io/dataplane-mode=ambient"),
        ("linkerd", "annotate", "linkerd.io/proxy-version=edge"),
        ("labelled", "label", "malla.dev/mesh=disabled"),
    ] {
        cluster.start(pod, &nodes[0], json!({"containers": sleep("3600")}))?;
        cluster.kubectl(&[verb, "pod", pod, word])?;
    }
    for (pod, reason) in [
        ("istio", "has an Istio sidecar"),
        ("ambient", "in Istio's ambient mesh"),
        ("to-be-ambient", "in Istio's ambient mesh"),
        ("linkerd", "has a Linkerd proxy"),
        ("on-host", "shares the node's network"),
        ("ends", "completed"),
        ("alone", "disabled"),
        ("labelled", "disabled"),
        ("member", ""),
    ] {
        let is_so = || {
            let found = agents.workload(&nodes[0], cluster.name(), pod);
            found.is_ok_and(|found| {
                found["reason"].as_str().unwrap_or_default() == reason
                    && found["enrolled"] == reason.is_empty()
            })
        };
        wait::until(wait::SOON, "", is_so).with_context(|| {
            let found = agents.workload(&nodes[0], cluster.name(), pod);
            format!("{pod} is not `{reason}`: {found:?}\n{}", agents.log(&nodes[0]))
        })?;
    }
    for (pod, says) in [
        ("on-host", "refused: shares the node's network"),
        ("alone", ""),
        ("member", "enabled"),
        ("linkerd", "refused: has a Linkerd proxy"),
    ] {
        let said = || {
            let found = cluster.get(&["pod", pod]).unwrap_or_default();
            let found = &found["metadata"]["annotations"]["malla.dev/redirection"];
            found.as_str().unwrap_or_default() == says
        };
        wait::until(wait::SOON, &format!("{pod} to say `{says}`"), said)?;
    }
    // On the other node: while there is a problem `status` ends with 1, and other tests ask for it here.
    cluster.start("confused", &nodes[1], json!({"containers": sleep("3600")}))?;
    cluster.kubectl(&["annotate", "pod", "confused", "malla.dev/mode=hard"])?;
    wait::until(wait::SOON, "an event on the pod", || {
        let about = "involvedObject.name=confused,reason=NotUnderstood";
        let events = cluster.get(&["events", "--field-selector", about]).unwrap_or_default();
        let message = &events["items"][0]["message"];
        message.as_str().is_some_and(|message| message.contains("`hard` is not understood"))
    })?;
    if Cluster::is_ours() {
        let counted = || agents.process(&nodes[1])?.metrics();
        wait::until(wait::SOON, "the mistake to be counted", || {
            counted().is_ok_and(|metrics| metrics.sum("mesh_manifest_problems", &[]) > 0.0)
        })?;
    }
    let status = agents.ask_by_exec(&nodes[0], &["status"])?;
    assert_eq!(status["ready"], true, "{status}");
    Ok(())
}

/// A policy for a place that packets do not pass.
#[test]
fn network_policies_are_warned_of_where_a_setting_skips_them() -> Result<()> {
    require_cluster!();
    let agents = Agents::deployed()?;
    let cluster = Cluster::namespace()?;
    let nodes = cluster.two_nodes()?;
    let warned_of = || -> Result<usize> {
        let check = agents.ask_by_exec(&nodes[0], &["check", "--redirect-peer", "on"])?;
        let mut categories = check["categories"].as_array().into_iter().flatten();
        let found = categories.find(|category| category["categoryName"] == "redirect");
        let found = &found.with_context(|| check.to_string())?["checks"][0];
        if found["result"] == "success" {
            return Ok(0);
        }
        let count = found["detail"].as_str().and_then(|text| text.split_once(" in the cluster"));
        count.and_then(|(count, _)| count.parse().ok()).with_context(|| found.to_string())
    };
    // Deployments have one too, and may come and go beside this.
    let there_are = || -> Result<usize> {
        let namespaces = "jsonpath={range .items[*]}{.metadata.namespace}{'\\n'}{end}";
        let all = ["get", "networkpolicies", "--all-namespaces", "--output", namespaces];
        let all = cluster.kubectl(&all)?;
        Ok(all.lines().filter(|of| !["kube-system", "malla-system"].contains(of)).count())
    };
    let told = || -> Option<usize> {
        let count = there_are().ok()?;
        warned_of().is_ok_and(|told| told == count).then_some(count)
    };
    wait::until_some(wait::SOON, "as many as there are", told)
        .with_context(|| format!("{:?} of {:?}", warned_of(), there_are()))?;
    cluster.apply(&json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "nobody"},
        "spec": {"podSelector": {"matchLabels": {"app": "nobody"}}},
    }))?;
    let now = wait::until_some(wait::SOON, "one that is new among them", told)
        .with_context(|| format!("{:?} of {:?}", warned_of(), there_are()))?;
    ensure!(now > 0, "this test's own");
    Ok(())
}

/// With what the file gives it, and its own rights: beside an agent that has the ports.
#[test]
fn check_in_an_agents_pod_finds_what_it_needs_of_its_node() -> Result<()> {
    require_cluster!();
    let agents = Agents::deployed()?;
    let cluster = Cluster::namespace()?;
    let nodes = cluster.two_nodes()?;
    let check = agents.ask_by_exec(&nodes[0], &["check"])?;
    let categories = check["categories"].as_array().context("no categories")?;
    let checks = categories.iter().filter_map(|category| category["checks"].as_array()).flatten();
    let checks: Vec<_> = checks.collect();
    let found = |flag: &str| -> Vec<&Value> {
        let names = |one: &&&Value| {
            one["description"].as_str().is_some_and(|description| description.contains(flag))
        };
        checks.iter().filter(names).copied().collect()
    };
    // Over both transports, and for both of its other ports.
    for (flag, many) in [
        ("--tunnel-port", 2),
        ("--ready-addr", 1),
        ("--metrics-addr", 1),
        ("--kubelet-cgroup", 1),
        ("--pod-cidrs", 1),
    ] {
        assert_eq!(found(flag).len(), many, "{flag}: {check}");
    }
    for flag in ["--tunnel-port", "--ready-addr", "--metrics-addr", "--kubelet-cgroup"] {
        for one in found(flag) {
            assert_eq!(one["result"], "success", "{one}");
        }
    }
    // Where nobody says so of nodes, that is what is warned of.
    let node = cluster.get(&["node", &nodes[0]])?;
    let blocks = node["spec"]["podCIDRs"].as_array().map_or(&[][..], Vec::as_slice);
    ensure!(!Cluster::is_ours() || blocks.len() == 2, "of both families: {node}");
    let networks = found("--pod-cidrs")[0];
    let expected = if blocks.is_empty() { "warning" } else { "success" };
    assert_eq!(networks["result"], expected, "{networks}");
    for block in blocks.iter().filter_map(Value::as_str) {
        let said = networks["detail"].as_str().unwrap_or_default();
        ensure!(said.contains(block), "no {block} in {networks}");
    }
    Ok(())
}

/// Where its annotations say, as Prometheus asks that runs in a pod.
#[test]
fn agents_metrics_are_read_from_a_pod_by_what_its_annotations_say() -> Result<()> {
    require_cluster!();
    let agents = Agents::deployed()?;
    let cluster = Cluster::namespace()?;
    let nodes = cluster.two_nodes()?;
    cluster.client("prometheus", &nodes[0])?;
    let pods = agents.system().get(&["pods", "--selector=app=malla-agent"])?;
    for agent in pods["items"].as_array().context("no agents")? {
        let says = |key: &str| {
            let annotations = &agent["metadata"]["annotations"];
            let text = annotations[format!("prometheus.io/{key}")].as_str();
            text.map(str::to_owned).with_context(|| format!("no {key} in {annotations}"))
        };
        assert_eq!(says("scrape")?, "true");
        let address = agent["status"]["podIP"].as_str().context("no address")?;
        let url = format!("http://{}:{}{}", host(address), says("port")?, says("path")?);
        let page =
            cluster.exec("prometheus", &["curl", "--silent", "--fail", "--globoff", &url])?;
        ensure!(page.contains("\nmesh_snapshot_age_seconds "), "{url}: {page}");
    }
    Ok(())
}

/// Probes reach a strict pod because they are the kubelet's, not because they come from the node.
#[test]
fn probes_reach_a_strict_pod_and_other_processes_of_the_node_do_not() -> Result<()> {
    require_cluster!();
    // What the kernel counts is the whole node's.
    let agents = Agents::alone()?;
    let cluster = Cluster::namespace()?;
    cluster.annotate(&json!({"malla.dev/mesh": "enabled", "malla.dev/mode": "strict"}))?;
    let nodes = cluster.two_nodes()?;
    let (nginx, curl) = (Cluster::load("nginx")?, Cluster::load("curl")?);
    let asked = |how: Value| {
        let probe = json!({"periodSeconds": 1, "failureThreshold": 1});
        let mut probe = probe.as_object().cloned().unwrap_or_default();
        probe.extend(how.as_object().cloned().unwrap_or_default());
        Value::from(probe)
    };
    for (name, probe) in [
        ("http", asked(json!({"httpGet": {"port": 80, "path": "/"}}))),
        ("tcp", asked(json!({"tcpSocket": {"port": 80}}))),
        ("exec", asked(json!({"exec": {"command": ["true"]}}))),
    ] {
        let spec = json!({"containers": [{"image": nginx, "readinessProbe": probe}]});
        cluster.start(name, &nodes[0], spec)?;
    }
    let sleep = json!([{"image": curl, "command": ["sleep", "3600"]}]);
    cluster.start("stranger", &nodes[0], json!({"hostNetwork": true, "containers": sleep}))?;
    cluster.client("member", &nodes[0])?;
    cluster.ready("stranger")?;
    for name in ["http", "tcp", "exec"] {
        agents.wait_until_enrolled(&nodes[0], cluster.name(), name, true)?;
        let line = format!("namespace={} name={name} netns=", cluster.name());
        wait::until(wait::SOON, "", || agents.log(&nodes[0]).contains(&line))
            .with_context(|| format!("{name} is not enrolled\n{}", agents.log(&nodes[0])))?;
    }
    // From here on all that asks these pods asks strict ones.
    let before = kernel_counter(&agents, &nodes[0], "connect_kubelet")?;
    let strict = kernel_counter(&agents, &nodes[0], "lookup_strict")?;
    for name in ["http", "tcp", "exec"] {
        cluster.ready(name)?;
    }
    wait::until(wait::SOON, "several probes of each", || {
        kernel_counter(&agents, &nodes[0], "connect_kubelet").is_ok_and(|now| now >= before + 6)
    })?;
    assert_eq!(kernel_counter(&agents, &nodes[0], "lookup_strict")?, strict, "none was refused");
    for name in ["http", "tcp"] {
        let pod = cluster.get(&["pod", name])?;
        let ready = &pod["status"]["conditions"].as_array().context("no conditions")?;
        let ready = ready.iter().find(|condition| condition["type"] == "Ready");
        assert_eq!(ready.context("not said")?["status"], "True", "{name} stays ready");

        let ip = pod["status"]["podIP"].as_str().context("no address")?;
        let ask = ["curl", "--silent", "--max-time", "3", &format!("http://{ip}/")];
        assert!(cluster.exec("stranger", &ask).is_err(), "the node's address lets nobody in");
        assert_eq!(cluster.exec("member", &ask)?.trim(), name);
    }
    let mut refused = 2;
    if Cluster::is_ours() {
        // Nor a program of the node that is in no pod, with what is the kubelet's network too.
        let node = agents.process(&nodes[0])?;
        for name in ["http", "tcp"] {
            let ip = cluster.get(&["pod", name])?["status"]["podIP"].clone();
            let ip = ip.as_str().context("no address")?;
            let ask =
                format!("exec 3<>/dev/tcp/{ip}/80 && echo >&3 && head --bytes=1 <&3 | grep -q .");
            let asked = node.run_beside(&["timeout", "3", "bash", "-c", &ask])?;
            ensure!(!asked.status.success(), "{name} answers a program of the node");
        }
        refused += 2;
    }
    let now = kernel_counter(&agents, &nodes[0], "lookup_strict")?;
    ensure!(now >= strict + refused, "refused in the kernel: {strict}, then {now}");
    Ok(())
}

fn kernel_counter(agents: &Agents, node: &str, name: &str) -> Result<u64> {
    let status = agents.ask(node, &["status"])?;
    status["kernel"][name].as_u64().with_context(|| format!("no {name} in {status}"))
}
