//! Programs that nobody wrote for a mesh, and the four services of the demo, in the images that are made for them.

use anyhow::Result;
use harness::{Agents, Cluster, service_of_pods, wait};
use serde_json::json;

/// A strict namespace whose servers are on the second node.
struct Shop {
    agents: harness::SharedAgents,
    cluster: Cluster,
    nodes: [String; 2],
}

impl Shop {
    fn open() -> Result<Self> {
        let agents = Agents::deployed()?;
        let cluster = Cluster::namespace()?;
        cluster.annotate(&json!({"malla.dev/mesh": "enabled", "malla.dev/mode": "strict"}))?;
        let nodes = cluster.two_nodes()?;
        Ok(Self { agents, cluster, nodes })
    }

    /// A pod of this image, behind a service if it has a port.
    fn start(
        &self,
        name: &str,
        node: usize,
        image: &str,
        command: &[&str],
        port: Option<u16>,
    ) -> Result<()> {
        let mut container = json!({"image": image});
        if !command.is_empty() {
            container["command"] = json!(command);
        }
        if let Some(port) = port {
            self.cluster.apply(&service_of_pods(name, port))?;
        }
        self.cluster.start(name, &self.nodes[node], json!({"containers": [container]}))
    }

    fn carried(&self, pods: &[(&str, usize)]) -> Result<()> {
        for (pod, node) in pods {
            self.cluster.ready(pod)?;
            self.agents.wait_until_carried(&self.nodes[*node], self.cluster.name(), pod)?;
        }
        Ok(())
    }

    /// Waits until `pod` is answered so.
    fn says(&self, pod: &str, command: &[&str], answer: impl Fn(&str) -> bool) -> Result<()> {
        // A server is ready as soon as its process runs, and listens later.
        wait::until(wait::SOON, &format!("the answer to {command:?}"), || {
            self.cluster.exec(pod, command).is_ok_and(|said| answer(said.trim()))
        })
    }

    /// Waits for a connection between these pods, over mutual TLS.
    fn went_from(&self, client: (&str, usize), server: &str) -> Result<()> {
        let texts = [
            ("src.namespace", self.cluster.name()),
            ("src.workload", client.0),
            ("dst.workload", server),
            ("way", "tunnel"),
            ("direction", "outbound"),
            ("response_flags", "-"),
        ];
        self.agents.wait_for_record(&self.nodes[client.1], &texts).map(drop)
    }
}

#[test]
fn ordinary_programs_are_carried_between_nodes_in_strict_mode() -> Result<()> {
    require_cluster!();
    let shop = Shop::open()?;
    for (program, port) in [("nginx", 80), ("redis", 6379), ("postgres", 5432)] {
        shop.start(program, 1, &Cluster::load(program)?, &[], Some(port))?;
    }
    let sleep = ["sleep", "3600"];
    for program in ["curl", "redis", "postgres"] {
        shop.start(&format!("{program}-client"), 0, &Cluster::load(program)?, &sleep, None)?;
    }
    shop.carried(&[("nginx", 1), ("redis", 1), ("postgres", 1)])?;
    shop.carried(&[("curl-client", 0), ("redis-client", 0), ("postgres-client", 0)])?;
    shop.says("curl-client", &["curl", "--silent", "http://nginx/"], |said| said == "nginx")?;
    shop.says("redis-client", &["redis-cli", "-h", "redis", "set", "a", "1"], |said| said == "OK")?;
    let psql = "exec /usr/lib/postgresql/*/bin/psql -At -U postgres -h postgres -c 'select 6 * 7'";
    shop.says("postgres-client", &["sh", "-c", psql], |said| said == "42")?;
    for (client, server) in
        [("curl-client", "nginx"), ("redis-client", "redis"), ("postgres-client", "postgres")]
    {
        shop.went_from((client, 0), server)?;
    }
    Ok(())
}

#[test]
fn services_of_the_demo_ask_each_other_across_nodes_in_strict_mode() -> Result<()> {
    require_cluster!();
    let shop = Shop::open()?;
    let image = Cluster::load("bookinfo")?;
    // Whoever asks is on another node than whom it asks.
    let services = [("productpage", 0), ("details", 1), ("reviews", 1), ("ratings", 0)];
    for (service, node) in services {
        let command = ["/malla-bookinfo", service, "--version", "v2"];
        shop.start(service, node, &image, &command, Some(9080))?;
    }
    shop.start("client", 1, &Cluster::load("curl")?, &["sleep", "3600"], None)?;
    shop.carried(&services)?;
    shop.carried(&[("client", 1)])?;
    let ask = |path: &str| format!("http://productpage:9080/api/v1/products/0{path}");
    for (path, has) in [("", "pages"), ("/reviews", "stars"), ("/ratings", "ratings")] {
        let url = ask(path);
        let get = ["curl", "--silent", "--fail", "--max-time", "5", &url];
        shop.says("client", &get, |said| said.contains(has))?;
    }
    shop.went_from(("client", 1), "productpage")?;
    shop.went_from(("productpage", 0), "details")?;
    shop.went_from(("productpage", 0), "reviews")?;
    shop.went_from(("reviews", 1), "ratings")
}
