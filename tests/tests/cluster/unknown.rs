//! What a pod connects in its first milliseconds, before the API knows its address.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::ops::Deref;
use std::panic::resume_unwind;
use std::thread;

use anyhow::{Context as _, Result, bail, ensure};
use harness::{Agents, Cluster, PodProcess, host, service_of_pods, wait};
use serde_json::{Value, json};

/// Pods that start one after the other, in so many rows beside each other.
const PODS: usize = 20;
const ROWS: usize = 4;
/// Connections of each.
const CONNECTIONS: usize = 10;

/// A strict server on one node, and clients on the other one that call it with their first command.
struct Rush<A> {
    agents: A,
    servers: Cluster,
    clients: Cluster,
    nodes: [String; 2],
    image: String,
    /// The server's addresses, of each family.
    addresses: Vec<String>,
}

/// What became of a pod that has ended.
struct Run {
    /// Its addresses, in the order of those that it has asked.
    addresses: Vec<String>,
    answers: Vec<String>,
}

impl<A: Deref<Target = Agents>> Rush<A> {
    fn begin(agents: A, unknown_pods: Option<&str>) -> Result<Self> {
        let (servers, clients) = (Cluster::namespace()?, Cluster::namespace()?);
        let nodes = clients.two_nodes()?;
        servers.annotate(&json!({"malla.dev/mesh": "enabled", "malla.dev/mode": "strict"}))?;
        servers.apply(&service_of_pods("web", 80))?;
        let nginx = Cluster::load("nginx")?;
        servers.start("web", &nodes[1], json!({"containers": [{"image": nginx}]}))?;
        servers.ready("web")?;
        agents.wait_until_carried(&nodes[1], servers.name(), "web")?;
        let mut annotations = json!({"malla.dev/mesh": "enabled"});
        if let Some(unknown_pods) = unknown_pods {
            annotations["malla.dev/unknown-pods"] = json!(unknown_pods);
        }
        clients.annotate(&annotations)?;
        let addresses = servers.get(&["service", "web"])?["spec"]["clusterIPs"].clone();
        let addresses: Vec<String> = serde_json::from_value(addresses).context("no addresses")?;
        ensure!(!Cluster::is_ours() || addresses.len() == 2, "of both families: {addresses:?}");
        let image = Cluster::load("busybox")?;
        let this = Self { agents, servers, clients, nodes, image, addresses };
        // Until then the service's address is none of the mesh on the clients' node.
        let known = || {
            let all = this.agents.ask(&this.nodes[0], &["services", "-n", this.servers.name()]);
            all.is_ok_and(|all| all.as_array().is_some_and(|all| !all.is_empty()))
        };
        wait::until(wait::SOON, "the service to be known", known)?;
        Ok(this)
    }

    /// Runs pods until one has connected before it was captured, and returns how often that one was not
    /// answered: on a busy machine the agent may be quicker than the pod's program.
    fn run_one_that_is_early(&self, name: &str, first: usize) -> Result<(Run, usize)> {
        const PODS: usize = 24;
        for nth in 0..PODS {
            let run = self.run(&format!("{name}-{first}-{nth}"), first)?;
            let answers = &run.answers;
            let refused = answers.iter().take_while(|answer| *answer == "none").count();
            if refused > 0 {
                return Ok((run, refused));
            }
            ensure!(answers.iter().all(|answer| answer == "web"), "{answers:?}");
        }
        bail!("the first connections of {PODS} pods were carried")
    }

    /// Starts a pod whose first command asks the server, `CONNECTIONS` times in vain or not, and then until
    /// it is answered, by its addresses in turns from the `first` on; and waits for its end.
    fn run(&self, name: &str, first: usize) -> Result<Run> {
        let turned = |mut all: Vec<String>| {
            let many = all.len().max(1);
            all.rotate_left(first % many);
            all
        };
        let servers = turned(self.addresses.clone());
        // The programs are one file, so the first connection comes some milliseconds after the shell.
        let ask = "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 $1 80";
        let mut script = format!("set -- {}; n=0; a=; ", servers.join(" "));
        write!(
            script,
            "while [ $n -lt {CONNECTIONS} ] || [ \"$a\" != web ] && [ $n -lt 1000 ]; do \
             [ $n -lt {CONNECTIONS} ] || sleep 0.05; \
             a=$({ask} 2>/dev/null | tail -n 1); echo \"${{a:-none}}\"; n=$((n + 1)); \
             set -- \"$@\" $1; shift; done"
        )?;
        let command = json!(["sh", "-c", script]);
        let spec = json!({
            "restartPolicy": "Never",
            "containers": [{"image": self.image, "command": command}],
        });
        self.clients.start(name, &self.nodes[0], spec)?;
        let phase = "--for=jsonpath={.status.phase}=Succeeded";
        let ended = self.clients.kubectl(&["wait", phase, "--timeout=60s", "pod", name]);
        ended.with_context(|| self.agents.log(&self.nodes[0]))?;
        let pod = self.clients.get(&["pod", name])?;
        let own = pod["status"]["podIPs"].as_array().context("no addresses")?;
        let own: Vec<_> = own.iter().filter_map(|one| one["ip"].as_str()).collect();
        // Of the family of what it has asked, which may be the only one of a Service.
        let from = |server: &String| {
            let is_v6 = server.contains(':');
            own.iter().find(|own| own.contains(':') == is_v6).map(|own| (*own).to_owned())
        };
        let addresses = servers.iter().map(from).collect::<Option<_>>();
        let log = self.clients.log(name)?;
        Ok(Run {
            addresses: addresses.with_context(|| format!("{servers:?} from {own:?}"))?,
            answers: log.lines().map(str::to_owned).collect(),
        })
    }

    /// Kills the agent of a pod that starts: when it has told the kernel of the pod's cgroup, which is before
    /// there is a process in it.
    fn kill_when_it_knows(&self, pod: &str, agent: &mut PodProcess) -> Result<()> {
        let uid = wait::until_some(wait::SOON, &format!("{pod} to be there"), || {
            let pod = self.clients.get(&["pod", pod]).ok()?;
            pod["metadata"]["uid"].as_str().map(str::to_owned)
        })?;
        wait::until(wait::SOON, &format!("{pod} to be held back"), || {
            let log = self.agents.log(&self.nodes[0]);
            log.lines().any(|line| line.contains("a pod's cgroup") && line.contains(&uid))
        })?;
        agent.kill()
    }

    /// Connections of a pod that its agent has carried to the server, to each of the server's addresses.
    fn carried(&self, pod: &str) -> Vec<usize> {
        let texts = [
            ("direction", "outbound"),
            ("src.namespace", self.clients.name()),
            ("src.workload", pod),
            ("way", "tunnel"),
            ("response_flags", "-"),
        ];
        let mut records = self.agents.records(&self.nodes[0]);
        records.retain(|record| record.has(&texts));
        let to = |address: &String| {
            let dialled = format!("{}:80", host(address));
            records.iter().filter(|record| record.text("dst.orig_addr") == dialled).count()
        };
        self.addresses.iter().map(to).collect()
    }

    /// Whether the server's node has seen plain text from this address.
    fn saw_plain_text(&self, address: &str) -> Result<bool> {
        let address = match address.parse()? {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        let told = format!("plain text to a strict pod: [{address}]:");
        Ok(self.agents.log(&self.nodes[1]).contains(&told))
    }
}

#[test]
fn first_connections_of_new_pods_are_held_and_none_is_plain_text() -> Result<()> {
    require_cluster!();
    let rush = Rush::begin(Agents::deployed()?, None)?;
    let held = |nth: usize| -> Result<()> {
        let pod = format!("held-{nth}");
        let run = rush.run(&pod, nth / ROWS)?;
        let answers = &run.answers;
        ensure!(
            *answers == vec!["web"; CONNECTIONS],
            "{pod} was not always answered: {answers:?}\n{}",
            rush.agents.log(&rush.nodes[0])
        );
        let many = rush.addresses.len();
        wait::until(wait::SOON, &format!("{CONNECTIONS} records of {pod}"), || {
            rush.carried(&pod) == vec![CONNECTIONS / many; many]
        })
        .with_context(|| format!("{:?} to {:?}", rush.carried(&pod), rush.addresses))?;
        for address in &run.addresses {
            ensure!(!rush.saw_plain_text(address)?, "plain text from {pod}, {address}");
        }
        Ok(())
    };
    let row = |first: usize| (first..PODS).step_by(ROWS).try_for_each(held);
    thread::scope(|scope| {
        let rows: Vec<_> = (0..ROWS).map(|first| scope.spawn(move || row(first))).collect();
        let ends =
            rows.into_iter().map(|row| row.join().unwrap_or_else(|panic| resume_unwind(panic)));
        ends.collect::<Vec<Result<()>>>().into_iter().collect()
    })
}

#[test]
fn pod_that_is_denied_is_refused_until_the_api_tells_its_address() -> Result<()> {
    require_cluster!();
    let rush = Rush::begin(Agents::deployed()?, Some("deny"))?;
    for first in 0..rush.addresses.len() {
        let before = pending(&rush)?;
        let (run, refused) = rush.run_one_that_is_early("denied", first)?;
        let answers = &run.answers;
        ensure!(answers[refused..].iter().all(|answer| answer == "web"), "{answers:?}");
        ensure!(pending(&rush)? >= before + u64::try_from(refused)?, "refused in the kernel");
        for address in &run.addresses {
            ensure!(!rush.saw_plain_text(address)?, "plain text from {address}");
        }
    }
    Ok(())
}

#[test]
fn pod_that_is_allowed_talks_in_plain_text_until_it_is_captured() -> Result<()> {
    require_cluster!();
    let rush = Rush::begin(Agents::deployed()?, Some("allow"))?;
    for first in 0..rush.addresses.len() {
        let (run, refused) = rush.run_one_that_is_early("allowed", first)?;
        let answers = &run.answers;
        ensure!(answers[refused..].iter().all(|answer| answer == "web"), "{answers:?}");
        let address = &run.addresses[0];
        wait::until(wait::SOON, &format!("plain text from {address} to be seen"), || {
            rush.saw_plain_text(address).is_ok_and(|saw| saw)
        })?;
    }
    Ok(())
}

/// Without an agent nobody tells the kernel of the pod any more: what it was told before holds.
#[test]
fn pod_that_starts_while_its_agent_is_killed_is_refused_until_there_is_one_again() -> Result<()> {
    require_cluster!();
    if !Cluster::is_ours() {
        harness::skip!("kills the agent of a node that was made here");
    }
    let rush = Rush::begin(Agents::last()?, None)?;
    let mut agent = rush.agents.process(&rush.nodes[0])?;
    // What has been killed twice is not started again at once.
    agent.kill()?;
    wait::until(wait::SOON, "the agent to be ready again", || agent.is_ready())?;
    let before = pending(&rush)?;
    let run = thread::scope(|scope| {
        let starting = scope.spawn(|| rush.run("orphan", 0));
        let killed = rush.kill_when_it_knows("orphan", &mut agent);
        let run = starting.join().unwrap_or_else(|panic| resume_unwind(panic));
        killed.and(run)
    })?;
    let answers = &run.answers;
    let refused = answers.iter().take_while(|answer| *answer == "none").count();
    // By each of the server's addresses several times.
    ensure!(refused >= CONNECTIONS, "it has not asked meanwhile: {answers:?}");
    ensure!(answers[refused..].iter().all(|answer| answer == "web"), "{answers:?}");
    ensure!(pending(&rush)? >= before + u64::try_from(refused)?, "refused in the kernel");
    for address in &run.addresses {
        ensure!(!rush.saw_plain_text(address)?, "plain text from {address}");
    }
    Ok(())
}

fn pending<A: Deref<Target = Agents>>(rush: &Rush<A>) -> Result<u64> {
    let status: Value = rush.agents.ask(&rush.nodes[0], &["status"])?;
    status["kernel"]["connect_pending"].as_u64().context("no such counter")
}
