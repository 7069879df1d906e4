//! A Deployment that people scale while it is used.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use harness::{Agents, Cluster, Shop, service_of_pods, wait};
use serde_json::json;

/// No request fails, many of the pods are asked, and all of them are of one service account: a certificate for each
/// node that has one, and not for each pod.
pub(crate) fn deployment_grows_to_twenty_pods_and_shrinks(
    agents: &Agents,
    shop: &Shop,
) -> Result<()> {
    const NAME: &str = "many";
    let cluster = &shop.cluster;
    let image = Cluster::load("nginx")?;
    cluster.kubectl(&["create", "serviceaccount", NAME])?;
    cluster.apply(&service_of_pods(NAME, 80))?;
    cluster.apply(&json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": NAME},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": {"app": NAME}},
            "template": {
                "metadata": {"labels": {"app": NAME}},
                "spec": {"serviceAccountName": NAME, "containers": [{
                    "name": "main",
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "readinessProbe": {"tcpSocket": {"port": 80}, "periodSeconds": 1},
                    // As without a mesh: who still sends to it has not heard yet that it goes.
                    "lifecycle": {"preStop": {"sleep": {"seconds": 10}}},
                }]},
            },
        },
    }))?;
    let settled = || {
        let rollout = ["rollout", "status", "deployment", NAME, "--timeout=120s"];
        cluster.kubectl(&rollout)?;
        // Those that go have gone.
        wait::until(wait::SOON, "the pods that are too many to go", || {
            let wanted = cluster.get(&["deployment", NAME]).unwrap_or_default();
            let pods = cluster.get(&["pods", "--selector", &format!("app={NAME}")]);
            pods.unwrap_or_default()["items"].as_array().map(Vec::len)
                == wanted["spec"]["replicas"].as_u64().and_then(|many| many.try_into().ok())
        })
    };
    settled()?;
    let answers = cluster.under_load("client", NAME, || {
        for replicas in ["20", "1"] {
            cluster.kubectl(&["scale", "deployment", NAME, "--replicas", replicas])?;
            settled()?;
        }
        Ok(())
    })?;
    ensure!(answers.len() > 200, "hardly any traffic: {}", answers.len());
    let answered: BTreeSet<_> = answers.iter().collect();
    ensure!(answered.len() > 5, "many of them were asked: {answered:?}");

    let logs = ["logs", "--selector=app=malla-ca", "--tail=-1"];
    let signed = agents.system().kubectl(&logs)?;
    let identity = format!("identity=spiffe://cluster.local/ns/{}/sa/{NAME} ", cluster.name());
    let signed = signed.lines().filter(|line| line.contains(&identity)).count();
    ensure!((1..=cluster.nodes()?.len()).contains(&signed), "signed {signed} times");
    Ok(())
}
