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

/// A policy for a place that packets do not pass.
#[test]
fn network_policies_are_warned_of_and_where_a_setting_skips_them() -> Result<()> {
    require_cluster!();
    let agents = Agents::deployed()?;
    let cluster = Cluster::namespace()?;
    let nodes = cluster.two_nodes()?;
    let warned_of = |arguments: &[&str], name: &str| -> Result<usize> {
        let check = agents.ask_by_exec(&nodes[0], &[&["check"], arguments].concat())?;
        let mut categories = check["categories"].as_array().into_iter().flatten();
        let found = categories.find(|category| category["categoryName"] == name);
        let found = &found.with_context(|| check.to_string())?["checks"][0];
        if found["result"] == "success" {
            return Ok(0);
        }
        let count = found["error"].as_str().and_then(|text| text.split_once(" in the cluster"));
        count.and_then(|(count, _)| count.parse().ok()).with_context(|| found.to_string())
    };
    // Deployments have one too, and may come and go beside this.
    let there_are = || -> Result<usize> {
        let namespaces = "jsonpath={range .items[*]}{.metadata.namespace}{'\\n'}{end}";
        let all = ["get", "networkpolicies", "--all-namespaces", "--output", namespaces];
        let all = cluster.kubectl(&all)?;
        Ok(all.lines().filter(|of| !["kube-system", "malla-system"].contains(of)).count())
    };
    // One question at a time, which takes seconds itself.
    let told = |what: &str| -> Result<usize> {
        let asked = [(&["--redirect-peer", "on"][..], "redirect"), (&[], "policies")];
        let mut count = 0;
        for (arguments, name) in asked {
            let told = || -> Option<usize> {
                let before = there_are().ok()?;
                let told = warned_of(arguments, name).ok()?;
                (told == before || told == there_are().ok()?).then_some(told)
            };
            count = wait::until_some(wait::SOON, what, told).with_context(|| {
                format!("{name}: {:?} of {:?}", warned_of(arguments, name), there_are())
            })?;
        }
        Ok(count)
    };
    told("as many as there are")?;
    cluster.apply(&json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "nobody"},
        "spec": {"podSelector": {"matchLabels": {"app": "nobody"}}},
    }))?;
    let now = told("one that is new among them")?;
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
fn metrics_of_agents_and_ca_are_read_from_a_pod_by_what_their_annotations_say() -> Result<()> {
    require_cluster!();
    let agents = Agents::deployed()?;
    let cluster = Cluster::namespace()?;
    let nodes = cluster.two_nodes()?;
    cluster.client("prometheus", &nodes[0])?;
    let own = cluster.addresses_of_pod("prometheus")?;
    let own: Vec<_> = own.iter().map(|address| address.contains(':')).collect();
    let all = |app: &str| -> Result<Vec<Value>> {
        let pods = agents.system().get(&["pods", &format!("--selector=app={app}")])?;
        Ok(pods["items"].as_array().with_context(|| format!("no {app}"))?.clone())
    };
    let agent = all("malla-agent")?.into_iter().map(|pod| (pod, "mesh_snapshot_age_seconds"));
    let authority = all("malla-ca")?.into_iter().map(|pod| (pod, "mesh_ca_leads"));
    for (pod, metric) in agent.chain(authority) {
        let says = |key: &str| {
            let annotations = &pod["metadata"]["annotations"];
            let text = annotations[format!("prometheus.io/{key}")].as_str();
            text.map(str::to_owned).with_context(|| format!("no {key} in {annotations}"))
        };
        assert_eq!(says("scrape")?, "true");
        let (port, path) = (says("port")?, says("path")?);
        let addresses = pod["status"]["podIPs"].as_array().context("no addresses")?;
        ensure!(!Cluster::is_ours() || addresses.len() == 2, "of both families: {addresses:?}");
        let addresses = addresses.iter().filter_map(|one| one["ip"].as_str());
        // Nodes may have a family that pods do not have.
        for address in addresses.filter(|address| own.contains(&address.contains(':'))) {
            let url = format!("http://{}:{port}{path}", host(address));
            let ask = ["curl", "--silent", "--show-error", "--fail", "--globoff", &url];
            let page = cluster.exec("prometheus", &ask)?;
            ensure!(page.contains(&format!("\n{metric} ")), "no {metric} at {url}: {page}");
        }
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
    // Never answered, and seen by the kernel: on a busy machine a program may give up before it has asked.
    let is_refused = |what: String, is_answered: &dyn Fn() -> Result<bool>| -> Result<()> {
        let now = || kernel_counter(&agents, &nodes[0], "lookup_strict");
        let (before, mut answered) = (now()?, false);
        wait::until(wait::SOON, &format!("{what} to be refused in the kernel"), || {
            answered |= is_answered().unwrap_or_default();
            answered || now().is_ok_and(|now| now > before)
        })?;
        ensure!(!answered, "{what} is answered");
        Ok(())
    };
    for name in ["http", "tcp"] {
        let pod = cluster.get(&["pod", name])?;
        let ready = &pod["status"]["conditions"].as_array().context("no conditions")?;
        let ready = ready.iter().find(|condition| condition["type"] == "Ready");
        assert_eq!(ready.context("not said")?["status"], "True", "{name} stays ready");

        for ip in cluster.hosts_of_pod(name)? {
            let url = format!("http://{ip}/");
            let ask = ["curl", "--silent", "--max-time", "3", &url];
            is_refused(format!("{ip} from the node's address"), &|| {
                Ok(cluster.exec_output("stranger", &ask)?.status.success())
            })?;
            assert_eq!(cluster.exec("member", &ask)?.trim(), name);
        }
    }
    if Cluster::is_ours() {
        // Nor a program of the node that is in no pod, with what is the kubelet's network too.
        let node = agents.process(&nodes[0])?;
        for name in ["http", "tcp"] {
            for ip in cluster.addresses_of_pod(name)? {
                let ask = format!(
                    "exec 3<>/dev/tcp/{ip}/80 && echo >&3 && head --bytes=1 <&3 | grep -q ."
                );
                is_refused(format!("{ip} from a program of the node"), &|| {
                    Ok(node.run_beside(&["timeout", "3", "bash", "-c", &ask])?.status.success())
                })?;
            }
        }
    }
    Ok(())
}

fn kernel_counter(agents: &Agents, node: &str, name: &str) -> Result<u64> {
    let status = agents.ask(node, &["status"])?;
    status["kernel"][name].as_u64().with_context(|| format!("no {name} in {status}"))
}
