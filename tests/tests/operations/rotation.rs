//! The root is replaced by deleting its Secret, with the times that the file comes with.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{
    Agents, Cluster, SERVERS, Shop, certificates, is_believed, service_of_pods, unbase64, wait,
};
use serde_json::{Value, json};

/// Until a kubelet that nobody tells has brought a ConfigMap to a pod: it looks once a minute, and at what it has
/// seen then.
const BROUGHT: Duration = Duration::from_secs(170);
/// Until a new root signs: 180 s after it was published (`--bundle-spread-s`).
const SIGNS: Duration = Duration::from_secs(240);

/// A new root that waits until it may sign.
pub(crate) struct Rotation {
    before: Vec<String>,
    after: Vec<String>,
}

impl Rotation {
    /// Deletes the Secret, and waits until another root is published beside the one that was.
    pub(crate) fn begin(agents: &Agents) -> Result<Self> {
        let system = agents.system();
        let before = certificates(&bundle(system)?);
        system.kubectl(&["delete", "secret", "malla-ca"])?;
        let after = wait::until_some(wait::SOON, "another root", || {
            let roots = certificates(&bundle(system).ok()?);
            (roots.len() > before.len()).then_some(roots)
        })?;
        Ok(Self { before, after })
    }

    /// Every agent trusts both, before the new one signs.
    pub(crate) fn reaches_every_agent(&self, agents: &Agents, nodes: &[String]) -> Result<()> {
        for node in nodes {
            wait::until(BROUGHT, "both roots at the agent", || {
                roots(agents, node) == self.after.len()
            })?;
        }
        Ok(())
    }

    /// The new one signs, and those that it has certified talk with those of the old one.
    pub(crate) fn ends_and_both_are_trusted(&self, agents: &Agents, shop: &Shop) -> Result<()> {
        let (system, cluster) = (agents.system(), &shop.cluster);
        let new: String =
            self.after.iter().filter(|root| !self.before.contains(root)).cloned().collect();
        let subject = new.lines().find_map(|line| line.strip_prefix("# ")).context("no subject")?;
        let signs = format!("root=\"{subject}\" waits=false");
        wait::until(SIGNS, "the new root to sign", || {
            let logs = ["logs", "--selector=app=malla-ca", "--tail=-1"];
            system.kubectl(&logs).unwrap_or_default().contains(&signs)
        })?;
        let known = requests(cluster)?;
        cluster.kubectl(&["create", "serviceaccount", "newcomer"])?;
        cluster.apply(&service_of_pods("newcomer", 80))?;
        let [_, node] = &shop.nodes;
        let container = json!([{"image": Cluster::load("nginx")?}]);
        let spec = json!({"serviceAccountName": "newcomer", "containers": container});
        cluster.start_as("newcomer", "newcomer", node, spec)?;
        cluster.ready("newcomer")?;
        agents.wait_until_carried(node, cluster.name(), "newcomer")?;
        let pem = wait::until_some(wait::SOON, "a certificate", || newest(cluster, &known))?;
        let chain = unbase64(&pem).context("no base64")?;
        ensure!(is_believed(&chain, &new)?, "not of the new root");

        // Of the old root's client and the new one's server, and of the old ones.
        for pod in [SERVERS[0], SERVERS[1], "newcomer"] {
            for host in cluster.hosts_of_pod(pod)? {
                let ask = ["curl", "--silent", "--show-error", "--fail", "--max-time", "5", &host];
                assert_eq!(cluster.exec("client", &ask)?.trim(), pod);
            }
        }
        cluster.kubectl(&["delete", "pod/newcomer", "service/newcomer"]).map(drop)
    }
}

/// What agents trust.
fn bundle(system: &Cluster) -> Result<String> {
    let map = system.get(&["configmap", "malla-trust"])?;
    Ok(map["data"]["bundle.pem"].as_str().context("no bundle")?.to_owned())
}

fn roots(agents: &Agents, node: &str) -> usize {
    let certs = agents.ask(node, &["certs"]).unwrap_or_default();
    certs.as_array().into_iter().flatten().filter(|one| one["kind"] == "Root").count()
}

/// All that there are, by their names.
fn requests(cluster: &Cluster) -> Result<BTreeSet<String>> {
    let all = cluster.get(&["certificatesigningrequests"])?;
    let all = all["items"].as_array().into_iter().flatten();
    Ok(all.filter_map(|one| one["metadata"]["name"].as_str()).map(str::to_owned).collect())
}

/// What the CA has signed since these were `known`.
fn newest(cluster: &Cluster, known: &BTreeSet<String>) -> Option<String> {
    let all = cluster.get(&["certificatesigningrequests"]).ok()?;
    let is_new = |request: &&Value| {
        request["spec"]["signerName"] == "malla.dev/workload"
            && request["metadata"]["name"].as_str().is_some_and(|name| !known.contains(name))
    };
    let signed = |request: &Value| request["status"]["certificate"].as_str().map(str::to_owned);
    all["items"].as_array()?.iter().filter(is_new).find_map(signed)
}
