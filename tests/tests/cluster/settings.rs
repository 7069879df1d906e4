//! The annotations that say how a pod takes part, on a cluster: `skip-*`, `outbound`, `direct`, `opaque-ports` (of
//! a Service) and `fail-open`. A strict server tells what came to it: through the mesh it answers, and in plain
//! text it does not.

use std::fmt::Debug;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Agents, Cluster, Record, service_of_pods, wait};
use serde_json::{Value, json};

/// Ports that every server has.
const PORTS: [u16; 2] = [7000, 7001];

/// After five seconds without a heartbeat a pod that fails open is on its own; an agent that has not answered for
/// twenty is killed by the kubelet.
const FAILS_OPEN: Duration = Duration::from_secs(12);

/// How long an answer is waited for, in seconds; and where there may be none, since the agent does nothing.
const PATIENCE_S: u8 = 5;
const LITTLE_PATIENCE_S: u8 = 2;

/// Servers that answer with their names, and pods that ask them.
struct World {
    nodes: [String; 2],
    image: String,
}

impl World {
    fn new(cluster: &Cluster) -> Result<Self> {
        Ok(Self { nodes: cluster.two_nodes()?, image: Cluster::load("busybox")? })
    }

    /// A pod on the node with this number that runs `script`, with these annotations from its first moment on.
    fn start(
        &self,
        cluster: &Cluster,
        name: &str,
        node: usize,
        script: &str,
        annotations: &Value,
    ) -> Result<()> {
        cluster.apply(&json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"app": name}, "annotations": annotations},
            "spec": {
                "nodeName": self.nodes[node],
                "terminationGracePeriodSeconds": 1,
                "containers": [{
                    "name": "main",
                    "image": self.image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["sh", "-c", script],
                }],
            },
        }))
    }

    fn serve(&self, cluster: &Cluster, name: &str, node: usize, with: &Value) -> Result<()> {
        // It may be known by its Service alone: not everywhere do Nodes say where pods are.
        cluster.apply(&service_of_pods(name, PORTS[0]))?;
        let listen = PORTS.map(|port| format!("nc -ll -p {port} -e echo {name} & ")).concat();
        self.start(cluster, name, node, &format!("{listen}wait"), with)
    }

    fn client(&self, cluster: &Cluster, name: &str, with: &Value) -> Result<()> {
        self.start(cluster, name, 0, "exec sleep 3600", with)
    }

    /// Waits until these pods, of the node with this number, are in the mesh.
    fn carried(
        &self,
        agents: &Agents,
        cluster: &Cluster,
        node: usize,
        pods: &[&str],
    ) -> Result<()> {
        pods.iter().try_for_each(|pod| agents.wait_until_in(&self.nodes[node], cluster, pod))
    }
}

/// Who asks, from which namespace, and whom.
#[derive(Clone, Copy)]
struct Question<'a> {
    from: &'a Cluster,
    client: &'a str,
    of: &'a Cluster,
    server: &'a str,
    port: u16,
}

impl Debug for Question<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} to {}:{}", self.client, self.server, self.port)
    }
}

impl Question<'_> {
    /// Whether the server answers, at each of its addresses, all asked at once.
    fn answers(&self, patience_s: u8) -> Result<Vec<bool>> {
        let hosts = self.of.addresses_of_pod(self.server)?;
        let script = format!(
            "for host in {}; do echo $host $(timeout {patience_s} nc $host {}) & done; wait",
            hosts.join(" "),
            self.port
        );
        let said = self.from.exec(self.client, &["sh", "-c", &script])?;
        let answer = |host: &String| {
            let told = said.lines().find_map(|line| line.strip_prefix(host.as_str()));
            let told = told.with_context(|| format!("{self:?}: nothing of {host}: {said}"))?.trim();
            ensure!(told.is_empty() || told == self.server, "{self:?} at {host}: {told}");
            Ok(!told.is_empty())
        };
        hosts.iter().map(answer).collect()
    }

    /// Fails unless the server answers at each of its addresses, if that `is` so, or else at none.
    fn check(&self, is: bool) -> Result<()> {
        self.check_with(PATIENCE_S, is)
    }

    fn check_with(&self, patience_s: u8, is: bool) -> Result<()> {
        let found = self.answers(patience_s)?;
        ensure!(found.iter().all(|answered| *answered == is), "{self:?}: {found:?}, not {is}");
        Ok(())
    }

    /// Waits until the same is so.
    fn becomes(&self, is: bool) -> Result<()> {
        wait::until(wait::SOON, &format!("{self:?} to be {is}"), || self.check(is).is_ok())
    }

    /// What was so all along, if it is not: nobody may be answered once. Who is may have to wait for the first time.
    fn holds(&self, is: bool) -> Result<()> {
        if is { self.becomes(true) } else { self.check(false) }
    }
}

#[test]
fn skip_lists_and_outbound_hold_for_pods_and_namespaces_and_change_while_they_run() -> Result<()> {
    require_cluster!();
    let agents = Agents::deployed()?;
    let (servers, clients) = (Cluster::namespace()?, Cluster::namespace()?);
    let outside = Cluster::namespace()?;
    let world = World::new(&servers)?;
    let skip = |ports: &str| json!({"malla.dev/skip-outbound-ports": ports});
    servers.annotate(&json!({"malla.dev/mesh": "enabled", "malla.dev/mode": "strict"}))?;
    clients.annotate(&json!({
        "malla.dev/mesh": "enabled",
        "malla.dev/skip-outbound-ports": "7000",
    }))?;
    world.serve(&servers, "closed", 1, &json!({}))?;
    world.serve(&servers, "open", 1, &json!({"malla.dev/skip-inbound-ports": "7001-7009"}))?;
    world.serve(&outside, "plain", 1, &json!({}))?;
    world.client(&outside, "stranger", &json!({}))?;
    // Who takes part by a label of its namespace, and by its own word.
    let labelled = Cluster::namespace()?;
    labelled.kubectl(&["label", "namespace", labelled.name(), "malla.dev/mesh=enabled"])?;
    world.client(&labelled, "by-label", &json!({}))?;
    world.client(&outside, "by-itself", &json!({"malla.dev/mesh": "enabled"}))?;
    world.client(&clients, "inherits", &json!({}))?;
    world.client(&clients, "own", &skip("7001"))?;
    let mut all = skip("1");
    all["malla.dev/outbound"] = json!("all");
    world.client(&clients, "all", &all)?;
    world.carried(&agents, &servers, 1, &["closed", "open"])?;
    for pod in ["plain", "stranger"] {
        outside.ready(pod)?;
    }
    let closed = servers.addresses_of_pod("closed")?;
    let block = |address: &String| {
        let length = if address.contains(':') { 128 } else { 32 };
        format!("{address}/{length}")
    };
    let mut elsewhere = skip("1");
    let blocks: Vec<_> = closed.iter().map(block).collect();
    elsewhere["malla.dev/skip-outbound-cidrs"] = json!(blocks.join(","));
    world.client(&clients, "elsewhere", &elsewhere)?;
    world.carried(&agents, &clients, 0, &["inherits", "own", "all", "elsewhere"])?;
    world.carried(&agents, &labelled, 0, &["by-label"])?;
    world.carried(&agents, &outside, 0, &["by-itself"])?;

    let [first, second] = PORTS;
    let asks =
        |client, server, port| Question { from: &clients, client, of: &servers, server, port };
    for (client, server, port, is) in [
        // Plain text, or not, by what the namespace says, and by what the pod says instead.
        ("inherits", "closed", first, false),
        ("inherits", "closed", second, true),
        ("own", "closed", first, true),
        ("own", "closed", second, false),
        ("all", "closed", first, true),
        // By addresses.
        ("elsewhere", "closed", first, false),
        ("elsewhere", "open", first, true),
        // Plain text to a port that is left to the program; nothing else is.
        ("own", "open", second, true),
        ("inherits", "open", first, false),
    ] {
        asks(client, server, port).holds(is)?;
    }
    for (from, client) in [(&labelled, "by-label"), (&outside, "by-itself")] {
        Question { from, client, of: &servers, server: "closed", port: first }.holds(true)?;
    }
    let stranger =
        |server, port| Question { from: &outside, client: "stranger", of: &servers, server, port };
    stranger("open", second).holds(true)?;
    stranger("open", first).check(false)?;
    stranger("closed", second).check(false)?;

    // Beyond the mesh: told of where everything is captured, and otherwise none of ours.
    let plain =
        |client| Question { from: &clients, client, of: &outside, server: "plain", port: second };
    let here = &world.nodes[0];
    let passed = |client: &str| {
        let of = [
            ("src.namespace", clients.name()),
            ("src.workload", client),
            ("way", "passthrough"),
            ("response_flags", "-"),
        ];
        agents.records(here).iter().filter(|record| record.has(&of)).count()
    };
    // For the first time it has to be read who that is, and meanwhile everybody is captured.
    for client in ["all", "inherits"] {
        plain(client).becomes(true)?;
    }
    let addresses = outside.addresses_of_pod("plain")?.len();
    let mut of_inherits = Vec::new();
    for _ in 0..3 {
        let known = passed("all");
        plain("all").check(true)?;
        wait::until(wait::SOON, "a record of each", || passed("all") >= known + addresses)
            .with_context(|| format!("{known}, then {}", passed("all")))?;
        // Those of the round before would be there, before these.
        of_inherits.push(passed("inherits"));
        plain("inherits").check(true)?;
    }
    assert_eq!(of_inherits[1..], [of_inherits[0]; 2]);

    // Of pods that run.
    let set = |pod: &str, ports: &str| {
        let set = format!("malla.dev/skip-outbound-ports={ports}");
        clients.kubectl(&["annotate", "--overwrite", "pod", pod, &set])
    };
    set("inherits", "1")?;
    asks("inherits", "closed", first).becomes(true)?;
    set("own", "7000")?;
    asks("own", "closed", first).becomes(false)?;
    asks("own", "closed", second).becomes(true)?;
    let unset = ["annotate", "pod", "open", "malla.dev/skip-inbound-ports-"];
    servers.kubectl(&unset)?;
    stranger("open", second).becomes(false)
}

/// Between pods of one node the agent carries everything where one of them wants it to.
#[test]
fn direct_way_is_off_where_a_namespace_says_so_and_opaque_ports_are_as_a_service_says() -> Result<()>
{
    require_cluster!();
    let agents = Agents::deployed()?;
    let (servers, clients) = (Cluster::namespace()?, Cluster::namespace()?);
    let world = World::new(&servers)?;
    servers.annotate(&json!({"malla.dev/mesh": "enabled"}))?;
    let direct = |word: &str| json!({"malla.dev/mesh": "enabled", "malla.dev/direct": word});
    clients.annotate(&direct("off"))?;
    world.serve(&servers, "beside", 0, &json!({}))?;
    world.client(&clients, "asks", &json!({}))?;
    world.carried(&agents, &servers, 0, &["beside"])?;
    world.carried(&agents, &clients, 0, &["asks"])?;
    let asks =
        Question { from: &clients, client: "asks", of: &servers, server: "beside", port: PORTS[0] };
    let here = &world.nodes[0];
    let records = |way: &str| {
        let texts = [("src.namespace", clients.name()), ("direction", "outbound"), ("way", way)];
        agents.records(here).iter().filter(|record| record.has(&texts)).count()
    };
    const TIMES: usize = 4;
    let mut asked = 0;
    for _ in 0..TIMES {
        asked += asks.answers(PATIENCE_S)?.iter().filter(|is| **is).count();
    }
    ensure!(asked >= TIMES, "answered {asked} times");
    let all = wait::until(wait::SOON, "a record of each", || records("local") == asked);
    all.with_context(|| format!("{} of {asked}, {} direct", records("local"), records("direct")))?;
    assert_eq!(records("direct"), 0);
    clients.annotate(&direct("on"))?;
    wait::until(wait::SOON, "a direct one", || asks.check(true).is_ok() && records("direct") > 0)?;

    let spoken = |expected: &str| {
        let protocols = || -> Result<Value> {
            let all = agents.ask(here, &["services", "-n", servers.name()])?;
            Ok(all[0]["protocols"].clone())
        };
        let is_so = || protocols().is_ok_and(|found| found == json!([expected]));
        wait::until(wait::SOON, "", is_so)
            .with_context(|| format!("{:?}, not {expected}", protocols()))
    };
    servers.apply(&json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "beside"},
        "spec": {
            "selector": {"app": "beside"},
            "ports": [{"port": 80, "targetPort": PORTS[0], "appProtocol": "http"}],
        },
    }))?;
    spoken("80/http")?;
    servers.kubectl(&["annotate", "service", "beside", "malla.dev/opaque-ports=80"])?;
    spoken("80/opaque")
}

/// An agent that is there and does nothing: stopped, as by a debugger.
#[test]
fn pod_that_fails_open_bypasses_an_agent_that_is_silent_and_no_other_does() -> Result<()> {
    require_cluster!();
    if !Cluster::is_ours() {
        harness::skip!("stops the agent of a node that was made here");
    }
    let agents = Agents::alone()?;
    let (servers, clients) = (Cluster::namespace()?, Cluster::namespace()?);
    let world = World::new(&servers)?;
    for namespace in [&servers, &clients] {
        namespace.annotate(&json!({"malla.dev/mesh": "enabled"}))?;
    }
    world.serve(&servers, "far", 1, &json!({}))?;
    world.client(&clients, "open", &json!({"malla.dev/fail-open": "true"}))?;
    world.client(&clients, "shut", &json!({}))?;
    world.carried(&agents, &servers, 1, &["far"])?;
    world.carried(&agents, &clients, 0, &["open", "shut"])?;
    let [first, second] = PORTS;
    let asks =
        |client, port| Question { from: &clients, client, of: &servers, server: "far", port };
    let carried = |client: &str, port: u16| {
        let of = [("src.namespace", clients.name()), ("src.workload", client), ("way", "tunnel")];
        let is_there = |record: &&Record| {
            record.has(&of) && record.text("dst.addr").ends_with(&format!(":{port}"))
        };
        agents.records(&world.nodes[0]).iter().filter(is_there).count()
    };
    for client in ["open", "shut"] {
        asks(client, first).becomes(true)?;
        wait::until(wait::SOON, "a record", || carried(client, first) > 0)?;
    }

    let agent = agents.process(&world.nodes[0])?;
    let stopped = agent.stop()?;
    wait::until(FAILS_OPEN, "the pod to bypass the mesh", || {
        asks("open", first).check_with(LITTLE_PATIENCE_S, true).is_ok()
    })?;
    asks("shut", first).check_with(LITTLE_PATIENCE_S, false)?;
    drop(stopped);

    // What waits for it still is for the first port.
    for client in ["open", "shut"] {
        assert_eq!(carried(client, second), 0);
        wait::until(wait::SOON, "to be carried again", || {
            asks(client, second).check(true).is_ok() && carried(client, second) > 0
        })?;
    }
    Ok(())
}
