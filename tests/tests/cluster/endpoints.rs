//! Which pods are behind a Service is the same for a client in the mesh as for one that kube-proxy
//! serves: both ask the same Services at the same time.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use harness::{Agents, Cluster, SharedAgents, service_of_pods, wait};
use serde_json::{Value, json};

/// Servers of a namespace in the mesh on the second node; a client there and one outside of the mesh, both
/// on the first.
struct Both {
    agents: SharedAgents,
    shop: Cluster,
    outside: Cluster,
    nodes: [String; 2],
    image: String,
}

impl Both {
    fn begin() -> Result<Self> {
        let agents = Agents::deployed()?;
        let (shop, outside) = (Cluster::namespace()?, Cluster::namespace()?);
        let nodes = shop.two_nodes()?;
        shop.annotate(&json!({"malla.dev/mesh": "enabled"}))?;
        for cluster in [&shop, &outside] {
            cluster.client("client", &nodes[0])?;
        }
        agents.wait_until_carried(&nodes[0], shop.name(), "client")?;
        Ok(Self { agents, shop, outside, nodes, image: Cluster::load("nginx")? })
    }

    fn offer(&self, name: &str, app: &str, fields: &Value) -> Result<()> {
        let mut service = service_of_pods(app, 80);
        service["metadata"]["name"] = json!(name);
        for (field, value) in fields.as_object().into_iter().flatten() {
            service["spec"][field] = value.clone();
        }
        self.shop.apply(&service)
    }

    fn host(&self, name: &str) -> String {
        format!("{name}.{}.svc.cluster.local", self.shop.name())
    }

    /// Who answers a client in four connections; nobody where one of them is not answered.
    fn heard(client: &Cluster, host: &str) -> BTreeSet<String> {
        let each = "for i in 1 2 3 4; do curl --silent --fail --max-time 3 \"$0\" || exit 1; done";
        let said = client.exec("client", &["sh", "-c", each, &format!("http://{host}/")]);
        said.unwrap_or_default().lines().map(str::to_owned).collect()
    }

    /// Waits until both clients hear just these behind a Service.
    fn hear(&self, host: &str, servers: &[&str]) -> Result<()> {
        let expected: BTreeSet<String> = servers.iter().map(|&name| name.to_owned()).collect();
        for (client, which) in [(&self.outside, "outside"), (&self.shop, "in the mesh")] {
            let mut last = BTreeSet::new();
            wait::until(wait::SOON, "", || {
                last = Self::heard(client, host);
                last == expected
            })
            .with_context(|| format!("{host} from {which} is {last:?} and not {expected:?}"))?;
        }
        Ok(())
    }

    fn tunnelled(&self, service: &str, server: &str) -> Result<()> {
        let host = self.host(service);
        let service = [("dst.service", &*host), ("dst.workload", server), ("way", "tunnel")];
        self.agents.wait_for_record(&self.nodes[0], &service).map(drop)
    }
}

#[test]
fn pods_that_are_not_ready_are_served_where_the_service_says_so_and_nowhere_else() -> Result<()> {
    require_cluster!();
    let world = Both::begin()?;
    let shop = &world.shop;
    world.offer("always", "unready", &json!({"publishNotReadyAddresses": true}))?;
    world.offer(
        "headless",
        "unready",
        &json!({
            "publishNotReadyAddresses": true,
            "clusterIP": "None",
        }),
    )?;
    world.offer("ready-only", "unready", &json!({}))?;
    let spec = json!({
        "hostname": "unready",
        "subdomain": "headless",
        "containers": [{
            "image": world.image,
            "readinessProbe": {"exec": {"command": ["false"]}, "periodSeconds": 1},
        }],
    });
    shop.start("unready", &world.nodes[1], spec)?;
    world.agents.wait_until_carried(&world.nodes[1], shop.name(), "unready")?;
    for name in ["always", "headless", "unready.headless"] {
        world.hear(&world.host(name), &["unready"])?;
    }
    world.tunnelled("always", "unready")?;
    world.hear(&world.host("ready-only"), &[])?;
    let refused = [("src.namespace", shop.name()), ("reason", "no_endpoints")];
    world.agents.wait_for_record(&world.nodes[0], &refused)?;
    Ok(())
}

/// A name for another name: what is dialled is that one's address.
#[test]
fn external_names_lead_where_they_lead_without_the_mesh() -> Result<()> {
    require_cluster!();
    let world = Both::begin()?;
    let server = json!({"containers": [{"image": world.image}]});
    for cluster in [&world.shop, &world.outside] {
        cluster.apply(&service_of_pods("web", 80))?;
        cluster.start("web", &world.nodes[1], server.clone())?;
    }
    for cluster in [&world.shop, &world.outside] {
        cluster.ready("web")?;
    }
    world.agents.wait_until_carried(&world.nodes[1], world.shop.name(), "web")?;
    let to = |name: &str, cluster: &Cluster| {
        let target = format!("web.{}.svc.cluster.local", cluster.name());
        world.shop.apply(&json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"type": "ExternalName", "externalName": target},
        }))
    };
    to("to-the-mesh", &world.shop)?;
    to("out-of-it", &world.outside)?;
    for name in ["to-the-mesh", "out-of-it"] {
        world.hear(&world.host(name), &["web"])?;
    }
    // By its address, which is that of a service in the mesh, or of one that is not.
    world.tunnelled("web", "web")?;
    let carried = world.agents.records(&world.nodes[0]).into_iter().find(|record| {
        record.text("dst.namespace") == world.outside.name()
            && record.text("src.namespace") == world.shop.name()
            && record.text("way") != "passthrough"
    });
    ensure!(carried.is_none(), "{carried:?}");
    Ok(())
}

#[test]
fn pod_that_is_going_is_served_while_it_is_the_last_and_not_beside_another() -> Result<()> {
    require_cluster!();
    let world = Both::begin()?;
    let shop = &world.shop;
    world.offer("leaving", "leaving", &json!({}))?;
    shop.apply(&json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "going", "labels": {"app": "leaving"}},
        "spec": {
            "nodeName": world.nodes[1],
            "terminationGracePeriodSeconds": 60,
            "containers": [{
                "name": "main",
                "image": world.image,
                "imagePullPolicy": "IfNotPresent",
                "lifecycle": {"preStop": {"sleep": {"seconds": 50}}},
            }],
        },
    }))?;
    shop.ready("going")?;
    world.agents.wait_until_carried(&world.nodes[1], shop.name(), "going")?;
    let host = world.host("leaving");
    world.hear(&host, &["going"])?;
    world.tunnelled("leaving", "going")?;

    shop.kubectl(&["delete", "pod", "going", "--wait=false"])?;
    let is_going = || {
        let slices = ["endpointslices", "--selector=kubernetes.io/service-name=leaving"];
        let slices = shop.get(&slices).unwrap_or_default();
        let all = slices["items"].as_array().into_iter().flatten();
        let mut all = all.flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
        all.any(|endpoint| {
            let conditions = &endpoint["conditions"];
            conditions["serving"] == true
                && conditions["terminating"] == true
                && conditions["ready"] == false
        })
    };
    wait::until(wait::SOON, "the endpoint to be going", is_going)?;
    world.hear(&host, &["going"])?;

    let server = json!({"containers": [{"image": world.image}]});
    shop.start_as("fresh", "leaving", &world.nodes[1], server)?;
    shop.ready("fresh")?;
    world.hear(&host, &["fresh"])?;
    world.tunnelled("leaving", "fresh")?;
    ensure!(is_going(), "it was there all the time");
    Ok(())
}
