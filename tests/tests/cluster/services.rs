//! What a Service says about where its connections go means in the mesh what it means without: kube-proxy
//! is asked first, with the same Services, pods and client.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use harness::{Agents, Cluster, service_of_pods, wait};
use serde_json::{Value, json};

struct Shop {
    cluster: Cluster,
}

/// A zone of its own for each node, until dropped.
struct Zones<'a> {
    admin: &'a Cluster,
    nodes: &'a [String],
}

impl<'a> Zones<'a> {
    const LABEL: &'static str = "topology.kubernetes.io/zone";

    fn of(admin: &'a Cluster, nodes: &'a [String]) -> Result<Self> {
        let this = Self { admin, nodes };
        for (nth, node) in nodes.iter().enumerate() {
            let label = format!("{}=malla-{nth}", Self::LABEL);
            admin.kubectl(&["label", "node", node, &label])?;
        }
        Ok(this)
    }
}

impl Drop for Zones<'_> {
    fn drop(&mut self) {
        for node in self.nodes {
            self.admin.kubectl(&["label", "node", node, &format!("{}-", Self::LABEL)]).ok();
        }
    }
}

impl Shop {
    /// The names of the servers that answer in eight connections.
    fn heard(&self, service: &str) -> Result<BTreeSet<String>> {
        let url = format!("http://{service}/");
        let each = "for i in 1 2 3 4 5 6 7 8; do curl --silent --fail --max-time 3 \"$0\"; done";
        let said = self.cluster.exec("client", &["sh", "-c", each, &url])?;
        let said: Vec<&str> = said.lines().collect();
        ensure!(said.len() == 8, "{service}: {said:?}");
        Ok(said.into_iter().map(str::to_owned).collect())
    }

    /// A Service that says `fields`, of the pods with this label.
    fn offer(&self, name: &str, app: &str, fields: &Value) -> Result<()> {
        let mut service = service_of_pods(app, 80);
        service["metadata"]["name"] = json!(name);
        for (field, value) in fields.as_object().into_iter().flatten() {
            service["spec"][field] = value.clone();
        }
        self.cluster.apply(&service)
    }

    /// Whatever carries: the node's own for those that are `near`, both for `free`, one of two for `sticky`,
    /// nobody for `elsewhere`.
    fn check(&self, near: &[&str]) -> Result<()> {
        let both = BTreeSet::from(["near".to_owned(), "far".to_owned()]);
        wait::until(wait::SOON, "both servers behind the Service that says nothing", || {
            self.heard("free").is_ok_and(|heard| heard == both)
        })?;
        for service in near {
            let expected = BTreeSet::from(["near".to_owned()]);
            let mut last = None;
            wait::until(wait::SOON, "", || {
                last = Some(self.heard(service));
                last.as_ref()
                    .is_some_and(|heard| heard.as_ref().is_ok_and(|heard| *heard == expected))
            })
            .with_context(|| format!("{service}: {last:?}"))?;
        }
        let kept = self.heard("sticky")?;
        ensure!(kept.len() == 1, "{kept:?}");
        assert_eq!(self.heard("sticky")?, kept, "and the same again");
        let ask = ["curl", "--silent", "--max-time", "2", "http://elsewhere/"];
        let output = self.cluster.exec_output("client", &ask)?;
        ensure!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        Ok(())
    }
}

#[test]
fn services_mean_in_the_mesh_what_they_mean_to_kube_proxy() -> Result<()> {
    require_cluster!();
    let agents = Agents::deployed()?;
    let cluster = Cluster::namespace()?;
    let image = Cluster::load("nginx")?;
    let nodes = cluster.two_nodes()?;
    let shop = Shop { cluster };
    let cluster = &shop.cluster;
    // Where somebody else's nodes are, they say.
    let _zones = Cluster::is_ours().then(|| Zones::of(cluster, &nodes)).transpose()?;
    let mut near = vec!["local", "close"];
    if Cluster::is_ours() {
        near.push("zonal");
    }
    for (name, app, fields) in [
        ("free", "web", json!({})),
        ("local", "web", json!({"internalTrafficPolicy": "Local"})),
        ("close", "web", json!({"trafficDistribution": "PreferSameNode"})),
        ("zonal", "web", json!({"trafficDistribution": "PreferClose"})),
        ("sticky", "web", json!({"sessionAffinity": "ClientIP"})),
        ("elsewhere", "far-only", json!({"internalTrafficPolicy": "Local"})),
    ] {
        shop.offer(name, app, &fields)?;
    }
    let server = json!({"containers": [{"image": image}]});
    cluster.start_as("near", "web", &nodes[0], server.clone())?;
    cluster.start_as("far", "web", &nodes[1], server.clone())?;
    cluster.start_as("far-only", "far-only", &nodes[1], server)?;
    cluster.client("client", &nodes[0])?;
    for pod in ["near", "far", "far-only"] {
        cluster.ready(pod)?;
    }
    shop.check(&near).context("without the mesh")?;

    cluster.annotate(&json!({"malla.dev/mesh": "enabled"}))?;
    for (pod, node) in [("client", 0), ("near", 0), ("far", 1), ("far-only", 1)] {
        agents.wait_until_enrolled(&nodes[node], cluster.name(), pod, true)?;
        agents.wait_until_carried(&nodes[node], cluster.name(), pod)?;
    }
    shop.check(&near).context("in the mesh")?;

    let ask = ["curl", "--silent", "--max-time", "2", "http://elsewhere/"];
    let output = cluster.exec_output("client", &ask)?;
    let code = output.status.code().unwrap_or_default();
    // Without the mesh packets to nobody are dropped.
    ensure!(Cluster::REFUSED.contains(&code), "refused at once and not waited for: {code}");
    let host = |name: &str| format!("{name}.{}.svc.cluster.local", cluster.name());
    let why = [("stage", "route"), ("reason", "no_local_endpoints"), ("src.workload", "client")];
    agents.wait_for_record(&nodes[0], &why)?;
    // Carried, and not what kube-proxy did.
    let local = near.iter().map(|name| (*name, "local"));
    for (name, way) in local.chain([("free", "tunnel")]) {
        let texts = [("dst.service", &*host(name)), ("way", way), ("response_flags", "-")];
        agents.wait_for_record(&nodes[0], &texts)?;
    }
    let shown = agents.ask(&nodes[0], &["services", "-n", cluster.name()])?;
    let shown = shown.as_array().context("a list")?;
    for (name, key, value) in [
        ("free", "reach", json!(["all"])),
        ("local", "reach", json!(["local"])),
        ("close", "reach", json!(["same-node"])),
        ("close", "distribution", json!("PreferSameNode")),
        ("sticky", "affinity_s", json!(10_800)),
    ] {
        let found = shown.iter().find(|one| one["service"] == name).context("not listed")?;
        assert_eq!(found[key], value, "{found}");
    }
    if Cluster::is_ours() {
        let zonal = shown.iter().find(|one| one["service"] == "zonal").context("not listed")?;
        // By its newer name.
        assert_eq!(
            (&zonal["reach"], &zonal["distribution"]),
            (&json!(["same-zone"]), &json!("PreferSameZone"))
        );
    }
    Ok(())
}
