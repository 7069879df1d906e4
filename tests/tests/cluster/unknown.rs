//! What a pod connects in its first milliseconds, before the API knows its address.

use std::fmt::Write as _;
use std::panic::resume_unwind;
use std::thread;

use anyhow::{Context as _, Result, bail, ensure};
use harness::{Agents, Cluster, SharedAgents, wait};
use serde_json::{Value, json};

use crate::service;

/// Pods that start one after the other, in so many rows beside each other.
const PODS: usize = 20;
const ROWS: usize = 4;
/// Connections of each.
const CONNECTIONS: usize = 10;

/// A strict server on one node, and clients on the other one that call it with their first command.
struct Rush {
    agents: SharedAgents,
    servers: Cluster,
    clients: Cluster,
    nodes: [String; 2],
    image: String,
    server: String,
}

impl Rush {
    fn begin(unknown_pods: Option<&str>) -> Result<Self> {
        let agents = Agents::deployed()?;
        let (servers, clients) = (Cluster::namespace()?, Cluster::namespace()?);
        let nodes = clients.two_nodes()?;
        servers.annotate(&json!({"malla.dev/mesh": "enabled", "malla.dev/mode": "strict"}))?;
        servers.apply(&service("web", 80))?;
        let nginx = Cluster::load("nginx")?;
        servers.start("web", &nodes[1], json!({"containers": [{"image": nginx}]}))?;
        servers.ready("web")?;
        agents.wait_until_carried(&nodes[1], servers.name(), "web")?;
        let mut annotations = json!({"malla.dev/mesh": "enabled"});
        if let Some(unknown_pods) = unknown_pods {
            annotations["malla.dev/unknown-pods"] = json!(unknown_pods);
        }
        clients.annotate(&annotations)?;
        let web = servers.get(&["service", "web"])?;
        let server = web["spec"]["clusterIP"].as_str().context("no address")?.to_owned();
        let this =
            Self { agents, servers, clients, nodes, image: Cluster::load("busybox")?, server };
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
    fn run_one_that_is_early(&self, name: &str) -> Result<(String, Vec<String>, usize)> {
        const PODS: usize = 8;
        for nth in 0..PODS {
            let (address, answers) = self.run(&format!("{name}-{nth}"))?;
            let refused = answers.iter().take_while(|answer| *answer == "none").count();
            if refused > 0 {
                return Ok((address, answers, refused));
            }
            ensure!(answers.iter().all(|answer| answer == "web"), "{answers:?}");
        }
        bail!("the first connections of {PODS} pods were carried")
    }

    /// Starts a pod whose first command asks the server, `CONNECTIONS` times in vain or not, and then until
    /// it is answered; waits for its end, and returns its address and what became of each connection.
    fn run(&self, name: &str) -> Result<(String, Vec<String>)> {
        // The programs are one file, so the first connection comes some milliseconds after the shell.
        let ask = format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {} 80", self.server);
        let mut script = String::from("n=0; a=; ");
        write!(
            script,
            "while [ $n -lt {CONNECTIONS} ] || [ \"$a\" != web ] && [ $n -lt 3000 ]; do \
             a=$({ask} 2>/dev/null | tail -n 1); echo \"${{a:-none}}\"; n=$((n + 1)); done"
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
        let address = self.clients.get(&["pod", name])?;
        let address = address["status"]["podIP"].as_str().context("no address")?.to_owned();
        let log = self.clients.log(name)?;
        Ok((address, log.lines().map(str::to_owned).collect()))
    }

    /// Connections of a pod that its agent has carried to the server.
    fn carried(&self, pod: &str) -> usize {
        let texts = [
            ("direction", "outbound"),
            ("src.namespace", self.clients.name()),
            ("src.workload", pod),
            ("way", "tunnel"),
            ("response_flags", "-"),
        ];
        self.agents.records(&self.nodes[0]).iter().filter(|record| record.has(&texts)).count()
    }

    /// Whether the server's node has seen plain text from this address.
    fn saw_plain_text(&self, address: &str) -> bool {
        let told = format!("plain text to a strict pod: [::ffff:{address}]:");
        self.agents.log(&self.nodes[1]).contains(&told)
    }
}

#[test]
fn first_connections_of_new_pods_are_held_and_none_is_plain_text() -> Result<()> {
    require_cluster!();
    let rush = Rush::begin(None)?;
    let held = |nth: usize| -> Result<()> {
        let pod = format!("held-{nth}");
        let (address, answers) = rush.run(&pod)?;
        ensure!(
            answers == vec!["web"; CONNECTIONS],
            "{pod} was not always answered: {answers:?}\n{}",
            rush.agents.log(&rush.nodes[0])
        );
        wait::until(wait::SOON, &format!("{CONNECTIONS} records of {pod}"), || {
            rush.carried(&pod) == CONNECTIONS
        })?;
        ensure!(!rush.saw_plain_text(&address), "plain text from {pod}");
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
    let rush = Rush::begin(Some("deny"))?;
    let before = pending(&rush)?;
    let (address, answers, refused) = rush.run_one_that_is_early("denied")?;
    ensure!(answers[refused..].iter().all(|answer| answer == "web"), "{answers:?}");
    ensure!(pending(&rush)? >= before + u64::try_from(refused)?, "refused in the kernel");
    ensure!(!rush.saw_plain_text(&address), "plain text");
    Ok(())
}

#[test]
fn pod_that_is_allowed_talks_in_plain_text_until_it_is_captured() -> Result<()> {
    require_cluster!();
    let rush = Rush::begin(Some("allow"))?;
    let (address, answers, refused) = rush.run_one_that_is_early("allowed")?;
    ensure!(answers[refused..].iter().all(|answer| answer == "web"), "{answers:?}");
    wait::until(wait::SOON, "the strict server to have seen plain text", || {
        rush.saw_plain_text(&address)
    })
}

fn pending(rush: &Rush) -> Result<u64> {
    let status: Value = rush.agents.ask(&rush.nodes[0], &["status"])?;
    status["kernel"]["connect_pending"].as_u64().context("no such counter")
}
