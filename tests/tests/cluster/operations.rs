//! What those who run a cluster do to it while it is used.

use anyhow::{Context as _, Result, ensure};
use harness::{Agents, Cluster, wait};
use serde_json::{Value, json};

use crate::agents::{SERVERS, Shop, enabled};
use crate::load::under_load;

#[test]
fn running_pods_join_and_leave_twenty_times_under_load_and_no_request_fails() -> Result<()> {
    require_cluster!();
    let agents = Agents::deployed()?;
    let shop = Shop::open(&json!({}))?;
    let before = shop.lives()?;
    let asked = under_load(&shop.cluster, "client", "http://web/", || {
        for _ in 0..20 {
            shop.cluster.annotate(&enabled())?;
            shop.wait_until_told("enabled")?;
            shop.cluster.annotate(&json!({"malla.dev/mesh": "disabled"}))?;
            shop.wait_until_told("")?;
        }
        Ok(())
    })?;
    ensure!(asked > 200, "hardly any traffic: {asked}");
    assert_eq!(shop.lives()?, before, "no pod is another, or was restarted");
    let carried =
        [("src.namespace", shop.cluster.name()), ("way", "tunnel"), ("response_flags", "-")];
    agents.wait_for_record(&shop.nodes[1], &carried)?;
    Ok(())
}

#[test]
fn agents_are_replaced_under_load_and_no_request_fails() -> Result<()> {
    require_cluster!();
    let mut agents = Agents::alone()?;
    let shop = Shop::open(&json!({"malla.dev/mesh": "enabled", "malla.dev/mode": "strict"}))?;
    shop.wait_until_enrolled(&agents, true)?;
    let asked = under_load(&shop.cluster, "client", "http://web/", || {
        agents.replace()?;
        agents.replace()
    })?;
    ensure!(asked > 100, "hardly any traffic: {asked}");
    shop.wait_until_enrolled(&agents, true)?;
    shop.hear_both(&["web"])
}

#[test]
fn deployment_grows_to_twenty_pods_and_shrinks_under_load_and_no_request_fails() -> Result<()> {
    require_cluster!();
    let agents = Agents::deployed()?;
    let cluster = Cluster::namespace()?;
    cluster.annotate(&enabled())?;
    let [here, _] = cluster.two_nodes()?;
    let image = Cluster::load("nginx")?;
    cluster.apply(&crate::service("web", 80))?;
    cluster.apply(&json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web"},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{
                    "name": "main",
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "readinessProbe": {"tcpSocket": {"port": 80}, "periodSeconds": 1},
                    // As without a mesh: who still sends to it has not heard yet that it goes.
                    "lifecycle": {"preStop": {"sleep": {"seconds": 4}}},
                }]},
            },
        },
    }))?;
    let settled = || {
        cluster.kubectl(&["rollout", "status", "deployment/web", "--timeout=120s"])?;
        // Those that go have gone.
        wait::until(wait::SOON, "the pods that are too many to go", || {
            let wanted = cluster.get(&["deployment", "web"]).unwrap_or_default();
            let pods = cluster.get(&["pods", "--selector=app=web"]).unwrap_or_default();
            pods["items"].as_array().map(Vec::len)
                == wanted["spec"]["replicas"].as_u64().and_then(|many| many.try_into().ok())
        })
    };
    settled()?;
    cluster.client("client", &here)?;
    agents.wait_until_carried(&here, cluster.name(), "client")?;
    let asked = under_load(&cluster, "client", "http://web/", || {
        for replicas in ["20", "1"] {
            cluster.kubectl(&["scale", "deployment/web", "--replicas", replicas])?;
            settled()?;
        }
        Ok(())
    })?;
    ensure!(asked > 200, "hardly any traffic: {asked}");
    let answered: std::collections::BTreeSet<_> = agents
        .records(&here)
        .iter()
        .filter(|record| {
            record.has(&[("src.namespace", cluster.name()), ("direction", "outbound")])
        })
        .map(|record| record.text("dst.workload").to_owned())
        .collect();
    ensure!(answered.len() > 5, "many of them were asked: {answered:?}");
    Ok(())
}

#[test]
fn deployment_that_is_deleted_leaves_plain_text_and_no_trace() -> Result<()> {
    require_cluster!();
    let agents = Agents::alone()?;
    let shop = Shop::open(&json!({"malla.dev/mesh": "enabled", "malla.dev/mode": "strict"}))?;
    shop.wait_until_enrolled(&agents, true)?;
    shop.hear_both(&["web"])?;
    let before = shop.lives()?;
    agents.delete()?;
    shop.hear_both(&["web"])?;
    shop.hear_both(&SERVERS.map(|name| format!("{name}.headless")))?;
    assert_eq!(shop.lives()?, before);
    for (node, found) in agents.traces(&shop.cluster)? {
        let nothing = json!({"removed": [], "namespaces": [], "left": []});
        assert_eq!(found, nothing, "on {node}");
    }
    Ok(())
}

impl Shop {
    /// Who the pods are, and how often their programs were started.
    fn lives(&self) -> Result<Vec<(Value, Value)>> {
        let pods = self.cluster.get(&["pods"])?;
        let pods = pods["items"].as_array().context("no pods")?.iter();
        let life = |pod: &Value| {
            let started = &pod["status"]["containerStatuses"][0]["restartCount"];
            (pod["metadata"]["uid"].clone(), started.clone())
        };
        Ok(pods.map(life).collect())
    }

    /// Waits until every pod says this of itself: then it is so in the kernel.
    fn wait_until_told(&self, says: &str) -> Result<()> {
        let told = |pod: &Value| {
            let told = &pod["metadata"]["annotations"]["malla.dev/redirection"];
            told.as_str().unwrap_or_default() == says
        };
        wait::until(wait::SOON, &format!("all pods to say `{says}`"), || {
            let pods = self.cluster.get(&["pods"]).unwrap_or_default();
            pods["items"].as_array().is_some_and(|pods| !pods.is_empty() && pods.iter().all(told))
        })
    }
}
