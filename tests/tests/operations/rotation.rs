//! The root is replaced by deleting its Secret, with the times that the file comes with.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::{ANSWERS, Agents, Cluster, SERVERS, Shop, certificates, is_believed, unbase64, wait};
use serde_json::{Value, json};

/// How long a new root waits before it signs (`--bundle-spread-s`): kubelets, which nobody tells, have brought it to
/// every agent by then.
const SPREAD: Duration = Duration::from_secs(180);
/// Until it is seen to sign after that.
const SIGNS: Duration = Duration::from_secs(60);
/// The pod that is certified by the new root.
const NEWCOMER: &str = "newcomer";

/// A new root that waits until it may sign.
pub(crate) struct Rotation {
    before: Vec<String>,
    after: Vec<String>,
    /// Seen by us, and so a moment later.
    published: Instant,
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
        Ok(Self { before, after, published: Instant::now() })
    }

    /// Every agent trusts both before the new one signs: whatever was certified by now is of the old one.
    pub(crate) fn reaches_every_agent(&self, agents: &Agents, nodes: &[String]) -> Result<()> {
        let gone = self.published.elapsed();
        ensure!(gone < SPREAD, "what came before took too long: {gone:?}");
        for node in nodes {
            let left = SPREAD.saturating_sub(self.published.elapsed());
            wait::until(left, &format!("both roots at the agent of {node}"), || {
                roots(agents, node) == self.after.len()
            })?;
        }
        ensure!(
            !self.signs(agents)?,
            "the new one signs too early: {:?}",
            self.published.elapsed()
        );
        Ok(())
    }

    /// The root that is new.
    fn new_root(&self) -> String {
        self.after.iter().filter(|root| !self.before.contains(root)).cloned().collect()
    }

    fn signs(&self, agents: &Agents) -> Result<bool> {
        let new = self.new_root();
        let subject = new.lines().find_map(|line| line.strip_prefix("# ")).context("no subject")?;
        let logs = ["logs", "--selector=app=malla-ca", "--tail=-1"];
        let log = agents.system().kubectl(&logs)?;
        Ok(log.contains(&format!("root=\"{subject}\" waits=false")))
    }

    /// The new one signs, and a server that it has certified, the last one behind `web`, talks with the client and
    /// the servers of the old one.
    pub(crate) fn ends_and_both_are_trusted(
        &self,
        agents: &Agents,
        shop: &Shop,
        asker: &str,
    ) -> Result<()> {
        let cluster = &shop.cluster;
        let left = SPREAD.saturating_sub(self.published.elapsed()) + SIGNS;
        wait::until(left, "the new root to sign", || self.signs(agents).unwrap_or_default())?;
        let known = requests(cluster)?;
        cluster.kubectl(&["create", "serviceaccount", NEWCOMER])?;
        let [_, node] = &shop.nodes;
        let container = json!([{"image": Cluster::load("nginx")?}]);
        let spec = json!({"serviceAccountName": NEWCOMER, "containers": container});
        cluster.start_as(NEWCOMER, "web", node, spec)?;
        cluster.ready(NEWCOMER)?;
        agents.wait_until_carried(node, cluster.name(), NEWCOMER)?;
        let pem = wait::until_some(wait::SOON, "a certificate", || newest(cluster, &known))?;
        let (chain, new) = (unbase64(&pem).context("no base64")?, self.new_root());
        ensure!(is_believed(&chain, &new)?, "not of the new root");
        let old = self.before.concat();
        ensure!(!is_believed(&chain, &old)?, "who has only the old one does not believe this");

        // Of the old root's client and the new one's server, and of the old ones.
        for pod in [SERVERS[0], SERVERS[1], NEWCOMER] {
            for host in cluster.hosts_of_pod(pod)? {
                let ask = ["curl", "--silent", "--show-error", "--fail", "--max-time", "5", &host];
                assert_eq!(cluster.exec("client", &ask)?.trim(), pod);
            }
        }
        let heard = format!(
            "while read -r pod; do [ $pod != {NEWCOMER} ] || exit 0; done <{ANSWERS}; exit 1"
        );
        wait::until(wait::SOON, "the new one to be asked by who asks all the time", || {
            cluster.exec(asker, &["sh", "-c", &heard]).is_ok()
        })
    }

    /// What was asked meanwhile was answered, in the end by all three of them. The third one goes.
    pub(crate) fn check(answers: &[String], shop: &Shop) -> Result<()> {
        ensure!(answers.len() > 1000, "hardly any traffic: {}", answers.len());
        for pod in [SERVERS[0], SERVERS[1], NEWCOMER] {
            ensure!(answers.iter().any(|answer| answer == pod), "{pod} was not asked");
        }
        shop.cluster.kubectl(&["delete", "pod", NEWCOMER]).map(drop)
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
pub(crate) fn requests(cluster: &Cluster) -> Result<BTreeSet<String>> {
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
