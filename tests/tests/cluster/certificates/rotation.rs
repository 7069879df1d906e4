//! The root is replaced by deleting it: both are trusted, and nobody notices.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::{Agents, Cluster, service_of_pods, wait};
use serde_json::{Value, json};

use super::world::{Answer, Asked, World, certificates, is_believed};

/// Enough for the signer to see that a Secret is another, and to wait until its root may sign.
const ROTATION: Duration = Duration::from_secs(40);

fn signed(world: &World) -> Result<String> {
    match world.ask(&world.agents[0], &Asked::web(world))? {
        Answer::Signed(chain) => Ok(chain),
        other => anyhow::bail!("{other:?}"),
    }
}

#[test]
fn new_root_signs_when_it_is_everywhere_and_the_old_one_is_trusted_on() -> Result<()> {
    require_cluster!();
    const SPREAD: Duration = Duration::from_secs(15);
    let world = World::new("rotates")?;
    let mut signer = world.signer("one", SPREAD.as_secs())?;
    // The first one signs at once: nobody is there who trusts less.
    let first = signed(&world)?;
    let old = world.bundle()?;
    ensure!(is_believed(&first, &old)?);

    world.system().kubectl(&["delete", "secret", "malla-ca"])?;
    let both = wait::until_some(wait::SOON, "both roots", || {
        world.bundle().ok().filter(|bundle| certificates(bundle).len() == 2)
    })?;
    let published = Instant::now();
    let chain = signed(&world)?;
    ensure!(published.elapsed() < SPREAD, "too slow to tell");
    ensure!(is_believed(&chain, &old)?, "who has only the old one does not believe this");
    // Put back as it was: both roots, and the new one is not taken for one that was always there.
    world.system().kubectl(&["delete", "configmap", "malla-trust"])?;
    wait::until(wait::SOON, "the bundle again", || world.bundle().is_ok_and(|now| now == both))?;

    let new = certificates(&both).into_iter().find(|root| !old.contains(root.trim()));
    let new = new.context("no new root")?;
    let by_new = || signed(&world).ok().filter(|chain| is_believed(chain, &new).unwrap_or(false));
    let chain = wait::until_some(ROTATION, "the new root to sign", by_new)?;
    // The moment of publication is known to a second, and the test saw it a moment later.
    ensure!(published.elapsed() + Duration::from_secs(2) > SPREAD, "{:?}", published.elapsed());
    ensure!(!is_believed(&chain, &old)? && is_believed(&chain, &both)?);

    // Another signer knows as much: what the old one has signed still lives.
    signer.terminate()?;
    let _second = world.signer("two", SPREAD.as_secs())?;
    ensure!(is_believed(&signed(&world)?, &new)?);
    assert_eq!(world.bundle()?, both);
    ensure!(is_believed(&first, &world.bundle()?)?);
    Ok(())
}

fn roots(agents: &Agents, node: &str) -> usize {
    let certs = agents.ask(node, &["certs"]).unwrap_or_default();
    certs.as_array().into_iter().flatten().filter(|one| one["kind"] == "Root").count()
}

/// What the CA has signed for a service account last.
fn newest(cluster: &Cluster, since: &[Value]) -> Option<String> {
    let requests = cluster.get(&["certificatesigningrequests"]).ok()?;
    let requests = requests["items"].as_array()?.iter();
    // Other tests have signers of their own.
    let new = requests.filter(|request| {
        request["spec"]["signerName"] == "malla.dev/workload"
            && !since.contains(&request["metadata"]["name"])
    });
    new.filter_map(|request| request["status"]["certificate"].as_str()).next().map(str::to_owned)
}

#[test]
fn root_is_replaced_under_traffic_and_no_connection_fails() -> Result<()> {
    require_cluster!();
    let agents = Agents::deployed()?;
    let shop = Cluster::namespace()?;
    shop.annotate(&json!({"malla.dev/mesh": "enabled", "malla.dev/mode": "strict"}))?;
    let nodes = shop.two_nodes()?;
    shop.apply(&service_of_pods("web", 80))?;
    let nginx = Cluster::load("nginx")?;
    let server = |name: &str, account: &str| {
        let spec = json!({"serviceAccountName": account, "containers": [{"image": nginx}]});
        shop.start_as(name, "web", &nodes[1], spec)
    };
    server("web", "default")?;
    shop.client("client", &nodes[0])?;
    shop.ready("web")?;
    for (pod, node) in [("client", &nodes[0]), ("web", &nodes[1])] {
        agents.wait_until_enrolled(node, shop.name(), pod, true)?;
        agents.wait_until_carried(node, shop.name(), pod)?;
    }
    let asked = shop.under_load("client", "web", || rotate(&agents, &shop, &nodes, &server))?;
    ensure!(asked.len() > 100, "hardly any traffic: {}", asked.len());
    Ok(())
}

fn rotate(
    agents: &Agents,
    shop: &Cluster,
    nodes: &[String; 2],
    server: &dyn Fn(&str, &str) -> Result<()>,
) -> Result<()> {
    let system = agents.system();
    let bundle = || -> Result<String> {
        let map = system.get(&["configmap", "malla-trust"])?;
        Ok(map["data"]["bundle.pem"].as_str().context("no bundle")?.to_owned())
    };
    let before = certificates(&bundle()?);
    system.kubectl(&["delete", "secret", "malla-ca"])?;
    let after = wait::until_some(ROTATION, "another root", || {
        let roots = certificates(&bundle().ok()?);
        (roots.len() > before.len()).then_some(roots)
    })?;
    // A kubelet looks at what it has mounted once a minute, or when a pod changes.
    let all = ["annotate", "pods", "--selector=app=malla-agent", "--overwrite"];
    system.kubectl(&[&all[..], &[&format!("test={}", after.len())]].concat())?;
    for node in nodes {
        wait::until(ROTATION, "both roots at the agent", || roots(agents, node) == after.len())?;
    }
    let new: String = after.iter().filter(|root| !before.contains(root)).cloned().collect();

    // A workload that comes now is certified by the old root or the new one; until it is the new one.
    let names = |requests: &Value| -> Vec<Value> {
        let items = requests["items"].as_array().into_iter().flatten();
        items.map(|request| request["metadata"]["name"].clone()).collect()
    };
    let subject = new.lines().find_map(|line| line.strip_prefix("# ")).context("no subject")?;
    let signs = format!("root=\"{subject}\" waits=false");
    wait::until(ROTATION, "the new root to sign", || {
        let logs = ["logs", "--selector=app=malla-ca", "--tail=-1"];
        system.kubectl(&logs).unwrap_or_default().contains(&signs)
    })?;
    let known = names(&shop.get(&["certificatesigningrequests"])?);
    shop.kubectl(&["create", "serviceaccount", "newcomer"])?;
    server("new-web", "newcomer")?;
    shop.ready("new-web")?;
    agents.wait_until_carried(&nodes[1], shop.name(), "new-web")?;
    let pem = wait::until_some(wait::SOON, "a certificate", || newest(shop, &known))?;
    let chain = super::world::unbase64(&pem).context("no base64")?;
    ensure!(is_believed(&chain, &new)?, "not of the new root");

    // Of the old root's client and the new one's server, and of the old ones.
    for pod in ["web", "new-web"] {
        for host in shop.hosts_of_pod(pod)? {
            let ask = ["curl", "--silent", "--show-error", "--fail", "--max-time", "5", &host];
            assert_eq!(shop.exec("client", &ask)?.trim(), pod);
        }
    }
    Ok(())
}
