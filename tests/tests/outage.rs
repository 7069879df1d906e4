//! The API server of a real cluster is stopped and started again, or has no time for the agents, while it is
//! needed. Nothing else can work there meanwhile: so these tests have a cluster of their own.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Agents, Cluster, Frozen, Outage, PodProcess, wait};
use serde_json::{Value, json};

/// A new snapshot is made of a server that is back within this: the longest wait between two attempts is
/// half a minute, or three quarters of one if the server asks for as much, and an attempt may have just been made.
const RESUMED: Duration = Duration::from_secs(60);

/// A new pod is ready within this, and its service known: kubelets (for the pods of their nodes, and what
/// those have mounted) and Kubernetes' controllers wait for up to a minute between two attempts (client-go's
/// reflector: half a minute, and as much again by jitter), and then it is the agents' turn.
const TOLD: Duration = Duration::from_secs(120);

/// How long the agents are watched without the API server. Short of the two minutes after which the
/// cluster takes nodes for dead.
const AWAY_S: u64 = 8;

/// How often it is asked, each time by a new connection: without a gap in which something could go wrong unseen, and
/// with most of the machine left for what is tested.
const RATE: &str = "50/s";

/// What the client says when it has been answered for the first time.
const BEGUN: &str = "begun";

fn missing() -> Option<String> {
    Cluster::missing().or_else(|| {
        (!Cluster::is_ours()).then(|| "stops the API server of a cluster made here".to_owned())
    })
}

/// A strict server on the second node, and a client on the first that asks it without an end.
struct World {
    cluster: Cluster,
    nodes: [String; 2],
}

impl World {
    fn begin(agents: &Agents) -> Result<Self> {
        let cluster = Cluster::namespace()?;
        let nodes = cluster.two_nodes()?;
        let this = Self { cluster, nodes };
        this.cluster.annotate(&json!({
            "malla.dev/mesh": "enabled",
            "malla.dev/mode": "strict",
        }))?;
        this.serve("web", "default")?;
        this.carried(agents, "web", 1)?;
        let url = this.url("web")?;
        let asks = format!(
            "exec curl --silent --show-error --fail --max-time 5 --rate {RATE} \
             --header 'Connection: close' '{url}?[1-1000000]' 2>&1"
        );
        let image = Cluster::load("curl")?;
        // What a pod connects before it is captured may be refused: that is `unknown`'s to test.
        let begin =
            format!("until curl --silent --show-error --fail --max-time 5 '{url}'; do :; done");
        let command = json!(["sh", "-c", format!("{begin}; echo {BEGUN}; {asks}")]);
        let containers = json!({"containers": [{"image": image, "command": command}]});
        this.cluster.start("asks", &this.nodes[0], containers)?;
        // `tail`: the process that shares its namespace sleeps.
        let command = json!(["tail", "-f", "/dev/null"]);
        let containers = json!({"containers": [{"image": image, "command": command}]});
        this.cluster.start("client", &this.nodes[0], containers)?;
        for pod in ["asks", "client"] {
            this.carried(agents, pod, 0)?;
        }
        Ok(this)
    }

    /// A service by its address: names are CoreDNS' to tell, which has its own trouble without an API server.
    fn url(&self, service: &str) -> Result<String> {
        let service = self.cluster.get(&["service", service])?;
        let address = service["spec"]["clusterIP"].as_str().context("no address")?;
        Ok(format!("http://{address}/"))
    }

    /// A server on the second node, behind a service of its name.
    fn serve(&self, name: &str, account: &str) -> Result<()> {
        let image = Cluster::load("nginx")?;
        self.cluster.apply(&json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"selector": {"app": name}, "ports": [{"port": 80}]},
        }))?;
        let spec = json!({"serviceAccountName": account, "containers": [{"image": image}]});
        self.cluster.start(name, &self.nodes[1], spec)
    }

    fn carried(&self, agents: &Agents, pod: &str, node: usize) -> Result<()> {
        agents.wait_until_in(&self.nodes[node], &self.cluster, pod)
    }

    /// Every request of `asks` was answered.
    fn no_request_has_failed(&self) -> Result<()> {
        let told = self.cluster.kubectl(&["logs", "asks", "--tail=-1"])?;
        let (_, told) = told.split_once(BEGUN).context("it has not begun")?;
        let (well, rest): (Vec<_>, Vec<_>) = told.trim().lines().partition(|line| *line == "web");
        assert_eq!(rest, [""; 0], "after {} connections", well.len());
        ensure!(well.len() > 400, "{}", well.len());
        Ok(())
    }

    /// A service and its server that are new, of a service account that is, and the client's answer.
    fn new_server_is_reached(&self) -> Result<()> {
        self.cluster.kubectl(&["create", "serviceaccount", "late"])?;
        self.serve("late", "late")?;
        self.cluster.ready_within(TOLD, "late")?;
        let url = self.url("late")?;
        let ask = ["curl", "--silent", "--show-error", "--fail", "--max-time", "3", &url];
        let mut said = String::new();
        wait::until(TOLD, "an answer of the new server", || {
            said = self.cluster.exec("client", &ask).unwrap_or_else(|error| format!("{error:#}"));
            said == "late\n"
        })
        .with_context(|| format!("the last thing that was said: {said}"))
    }
}

/// What an agent says of a 410.
const EXPIRED: &str = "the API server has forgotten our version: listing again";
/// What an API server says with 429.
const TOO_MANY: &str = "Too many requests";

/// Kinds of objects that an agent follows.
const KINDS: usize = 5;

/// Connections that the agent of the client's node has carried.
fn carried(agent: &PodProcess) -> Result<f64> {
    Ok(agent.metrics()?.sum("istio_tcp_connections_opened_total", &[("reporter", "source")]))
}

fn age_s(agent: &PodProcess) -> u64 {
    let status = agent.ask(&["status"]).unwrap_or_default();
    status["snapshot"]["age_s"].as_u64().unwrap_or_default()
}

/// What an agent says of the API server that it cannot ask.
fn api_problems(agent: &PodProcess) -> Vec<Value> {
    let status = agent.ask(&["status"]).unwrap_or_default();
    let all = status["problems"].as_array().into_iter().flatten();
    all.filter(|problem| problem.to_string().contains("API")).cloned().collect()
}

/// An agent to which nothing is confirmed says for how long, stays ready, and carries as before.
fn goes_on_from_what_it_knows(agent: &PodProcess) -> Result<()> {
    let (before, confirmed) = (carried(agent)?, age_s(agent));
    wait::until(RESUMED, "the agent to say for how long nothing was confirmed", || {
        age_s(agent) >= confirmed + AWAY_S
    })?;
    let now = carried(agent)?;
    ensure!(now > before + 100.0, "hardly any traffic meanwhile: {before}, then {now}");
    ensure!(agent.is_ready(), "an agent that has a snapshot stays ready");
    Ok(())
}

#[test]
fn api_server_is_restarted_under_load_and_no_request_fails() -> Result<()> {
    if let Some(missing) = missing() {
        harness::skip!("{missing}");
    }
    let agents = Agents::last()?;
    let world = World::begin(&agents)?;
    let agent = agents.process(&world.nodes[0])?;
    wait::until(wait::SOON, "traffic", || carried(&agent).is_ok_and(|count| count > 20.0))?;
    assert_eq!(api_problems(&agent), [] as [Value; 0]);

    let frozen = Frozen::begin()?;
    let get = ["get", "pods", "--request-timeout=1s"];
    ensure!(world.cluster.kubectl(&get).is_err(), "it answers nothing");
    let before = carried(&agent)?;
    wait::until(RESUMED, "traffic while nothing is answered", || {
        carried(&agent).is_ok_and(|count| count > before + 100.0)
    })?;
    ensure!(agent.is_ready(), "an API server that is slow is no reason");
    drop(frozen);

    let outage = Outage::begin()?;
    ensure!(world.cluster.kubectl(&["get", "pods"]).is_err(), "it is away");
    goes_on_from_what_it_knows(&agent)?;
    ensure!(!api_problems(&agent).is_empty(), "{:?}", agent.ask(&["status"]));
    let before = age_s(&agent);
    let metrics = agent.metrics()?;
    let age = metrics.sum("mesh_snapshot_age_seconds", &[]);
    let after = age_s(&agent);
    // The metrics may be of a second ago, and `status` tells whole seconds.
    let told = before as f64 - 2.0..=after as f64 + 1.0;
    ensure!(told.contains(&age), "the metric says {age}, and status {before} and {after}");
    ensure!(metrics.sum("mesh_manifest_problems", &[]) > 0.0, "none is counted");
    outage.end()?;

    world.new_server_is_reached()?;
    for node in &world.nodes {
        let agent = agents.process(node)?;
        wait::until(RESUMED, "no problem any more", || api_problems(&agent).is_empty())?;
        // A server that has just started answers 410 to who goes on from before: what it can tell of began later.
        ensure!(agents.log(node).contains(EXPIRED), "{node} was told its version's end");
    }
    world.no_request_has_failed()
}

/// An API server that refuses all that the agents ask (429), until dropped: its own fairness gives them one
/// place, the least there is, and that is taken.
struct Overload<'a> {
    admin: &'a Cluster,
    name: String,
    request: Option<UnixStream>,
}

impl<'a> Overload<'a> {
    const KINDS: [&'static str; 2] = ["flowschema", "prioritylevelconfiguration"];

    fn begin(admin: &'a Cluster, agents: &Agents) -> Result<Self> {
        let system = agents.system().name();
        let name = format!("{system}-overload");
        let mut this = Self { admin, name, request: None };
        admin.apply(&json!({
            "apiVersion": "flowcontrol.apiserver.k8s.io/v1",
            "kind": "PriorityLevelConfiguration",
            "metadata": {"name": this.name},
            "spec": {"type": "Limited", "limited": {
                "nominalConcurrencyShares": 0,
                "lendablePercent": 0,
                "borrowingLimitPercent": 0,
                "limitResponse": {"type": "Reject"},
            }},
        }))?;
        let account = json!({"name": "malla-agent", "namespace": system});
        admin.apply(&json!({
            "apiVersion": "flowcontrol.apiserver.k8s.io/v1",
            "kind": "FlowSchema",
            "metadata": {"name": this.name},
            "spec": {
                "priorityLevelConfiguration": {"name": this.name},
                // Before any of the server's own.
                "matchingPrecedence": 2,
                "rules": [{
                    "subjects": [{"kind": "ServiceAccount", "serviceAccount": account}],
                    "resourceRules": [{
                        "verbs": ["*"],
                        "apiGroups": ["*"],
                        "resources": ["*"],
                        "clusterScope": true,
                        "namespaces": ["*"],
                    }],
                }],
            },
        }))?;
        // Said when it is in force.
        admin.kubectl(&["wait", "--for=condition=Dangling=False", "flowschema", &this.name])?;
        wait::until(wait::SOON, "the only place", || {
            this.request = agents.system().unfinished_request("malla-agent").ok().flatten();
            this.request.is_some()
        })?;
        Ok(this)
    }
}

impl Drop for Overload<'_> {
    fn drop(&mut self) {
        for kind in Self::KINDS {
            self.admin.kubectl(&["delete", kind, &self.name]).ok();
        }
    }
}

#[test]
fn agents_that_the_api_server_refuses_go_on_from_the_last_snapshot_and_catch_up() -> Result<()> {
    if let Some(missing) = missing() {
        harness::skip!("{missing}");
    }
    let agents = Agents::last()?;
    let world = World::begin(&agents)?;
    let (here, namespace) = (&world.nodes[0], world.cluster.name());
    let agent = agents.process(here)?;
    assert_eq!(api_problems(&agent), [] as [Value; 0]);

    let overload = Overload::begin(&world.cluster, &agents)?;
    // A watch that is open keeps no place: it is the next one that is refused.
    agent.disconnect_from_api()?;
    wait::until(RESUMED, "every kind to be refused", || {
        let problems = api_problems(&agent);
        let refused = problems.iter().filter(|problem| problem.to_string().contains(TOO_MANY));
        refused.count() == KINDS
    })
    .with_context(|| format!("{:?}", agent.ask(&["status"])))?;
    let change = |value: &str| {
        let set = format!("malla.dev/mesh={value}");
        world.cluster.kubectl(&["annotate", "--overwrite", "pod", "client", &set])
    };
    change("disabled")?;
    goes_on_from_what_it_knows(&agent)?;
    let client = agents.workload(here, namespace, "client")?;
    assert_eq!(client["enrolled"], true, "it cannot have heard of the change: {client}");
    ensure!(agent.metrics()?.sum("mesh_manifest_problems", &[]) >= KINDS as f64, "all are counted");
    drop(overload);

    wait::until(RESUMED, "the change to arrive", || {
        let client = agents.workload(here, namespace, "client").unwrap_or_default();
        client["enrolled"] == false
    })?;
    change("enabled")?;
    world.carried(&agents, "client", 0)?;
    wait::until(RESUMED, "no problem any more", || api_problems(&agent).is_empty())?;
    world.new_server_is_reached()?;
    world.no_request_has_failed()
}

/// A snapshot is in memory: an agent that starts while the API is away has none, and nothing is carried
/// or let through meanwhile.
#[test]
fn agent_that_dies_while_the_api_server_is_away_refuses_until_it_is_back() -> Result<()> {
    if let Some(missing) = missing() {
        harness::skip!("{missing}");
    }
    let agents = Agents::last()?;
    let world = World::begin(&agents)?;
    let url = world.url("web")?;
    let client = world.cluster.process("client", "tail")?;
    let ask = || client.run(&["curl", "--silent", "--fail", "--max-time", "15", &url]);
    let answered = || ask().is_ok_and(|output| output.stdout == b"web\n");
    let refused = || -> Result<()> {
        let code = ask()?.status.code().unwrap_or_default();
        ensure!(
            Cluster::REFUSED.contains(&code),
            "refused, and not answered or waited for: {code}"
        );
        Ok(())
    };
    ensure!(answered(), "{:?}", ask());
    let mut agent = agents.process(&world.nodes[0])?;

    let outage = Outage::begin()?;
    ensure!(answered(), "from the last snapshot: {:?}", ask());
    agent.kill()?;
    refused()?;
    wait::until(wait::SOON, "the new agent to say what it waits for", || {
        !api_problems(&agent).is_empty()
    })?;
    refused()?;
    ensure!(!agent.is_ready(), "{:?}", agent.ask(&["status"]));
    outage.end()?;

    wait::until(RESUMED, "an answer", answered).with_context(|| agents.log(&world.nodes[0]))?;
    wait::until(RESUMED, "the agent to be ready", || agent.is_ready())?;
    world.new_server_is_reached()
}
