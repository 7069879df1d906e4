//! The file that users apply, with the settings that it comes with and no other: all that they do with it.

use anyhow::{Context as _, Result, ensure};
use harness::{Agents, Cluster, SERVERS, Shop, enabled, long, service_of_pods, wait};
use serde_json::{Value, json};

use crate::rotation::{Rotation, requests};
use crate::scaling::deployment_grows_to_twenty_pods_and_shrinks;

/// All that people do with the file, by one deployment of it: the agents' settings are those that it comes with.
#[test]
fn what_is_in_deploy_works_as_it_is_and_deleted_leaves_plain_text_and_no_trace() -> Result<()> {
    if let Some(missing) = Cluster::missing() {
        harness::skip!("{missing}");
    }
    let mut agents = Agents::shipped()?;
    let shop = Shop::open(&json!({}))?;
    let strict = json!({"malla.dev/mesh": "enabled", "malla.dev/mode": "strict"});
    let routing = routing(&shop)?;
    let known = requests(&shop.cluster)?;
    // One that asks all the time while the root is replaced, whatever else is done meanwhile: seldom, since that takes
    // minutes of the machine.
    shop.cluster.client("asker", &shop.nodes[0])?;
    let answers = shop.cluster.under_load_of(10, "asker", "web", || {
        let rotation = Rotation::begin(&agents)?;
        running_pods_join_and_leave_twenty_times(&shop)?;
        shop.cluster.annotate(&enabled())?;
        shop.wait_until_told("enabled")?;
        // Nobody asks in plain text any more.
        shop.cluster.annotate(&strict)?;
        shop.wait_until_enrolled(&agents, true)?;
        shop.hear_both(&["web"])?;
        let prepared = self::routing(&shop)?;
        ensure!(
            !Cluster::is_ours() || prepared != routing,
            "nothing is seen of agents: {prepared:?}"
        );
        rotation.reaches_every_agent(&agents, &shop.nodes)?;
        deployment_grows_to_twenty_pods_and_shrinks(&agents, &shop)?;
        rotation.ends_and_both_are_trusted(&agents, &shop, "asker")
    })?;
    Rotation::check(&answers, &shop)?;

    let talks = Talks::begin(&shop, &agents)?;
    let directories = Directories::of(&shop)?;
    let before = shop.lives()?;
    let times = long::either(1, 5);
    let replace = || (0..times).try_for_each(|_| agents.replace());
    // Of somebody else's node a taint could stay, if this is killed.
    let tainted = Cluster::is_ours().then(|| Taint::of(&shop)).transpose()?;
    let asked = shop.cluster.under_load("client", "web", replace)?;
    drop(tainted);
    ensure!(asked.len() > 100, "hardly any traffic: {}", asked.len());
    shop.wait_until_enrolled(&agents, true)?;
    shop.hear_both_by_address()?;
    // What was open has gone on until its agent had drained, of both nodes, or for ever if none carried it.
    let ends = talks.check(2 * times)?;
    long::report(&format!(
        "all agents replaced {times} times: {} new connections, none failed; one that stayed open ended {ends} times",
        asked.len(),
    ));
    the_ca_that_signs_is_evicted_and_not_the_other_one_too(&agents, &shop)?;
    directories.are(&["/bpf/malla", "/run/malla"])?;
    agents.delete()?;
    directories.are(&[])?;
    shop.hear_both(&["web"])?;
    shop.hear_both_by_address()?;
    shop.hear_both(&SERVERS.map(|name| format!("{name}.headless")))?;
    assert_eq!(shop.lives()?, before, "no pod is another, or was restarted");
    talks.check(2 * times + 1)?;
    for (node, found) in agents.traces(&shop.cluster)? {
        // What its own pod has brought.
        let removed = ["/host/bpf", "/run/malla"];
        let nothing = json!({"removed": removed, "namespaces": [], "left": []});
        assert_eq!(found, nothing, "on {node}");
    }
    directories.are(&[])?;
    wait::until(wait::SOON, "pods' namespaces to be as they were", || {
        self::routing(&shop).is_ok_and(|now| now == routing)
    })
    .with_context(|| format!("{:?}, not {routing:?}", self::routing(&shop)))?;
    let kinds = "namespaces,clusterroles,clusterrolebindings,validatingadmissionpolicies,\
                 validatingadmissionpolicybindings,leases";
    let left = shop.cluster.kubectl(&["get", kinds, "--all-namespaces", "--output=name"])?;
    // Not what tests name.
    let ours = |name: &&str| name.contains("malla-") && !name.contains("malla-test-");
    let left: Vec<_> = left.lines().filter(ours).collect();
    ensure!(left.is_empty(), "left in the API: {left:?}");
    // Kubernetes itself removes requests that were answered, in an hour or two, and events.
    let all = shop.cluster.get(&["certificatesigningrequests"])?;
    let all = all["items"].as_array().context("no requests")?.iter();
    let is_new = |request: &&Value| {
        request["metadata"]["name"].as_str().is_some_and(|name| !known.contains(name))
    };
    let is_open = |request: &&Value| {
        let status = &request["status"];
        let verdict = status["conditions"].as_array().into_iter().flatten();
        request["spec"]["signerName"] == "malla.dev/workload"
            && status["certificate"].is_null()
            && !verdict.into_iter().any(|one| one["type"] == "Denied" || one["type"] == "Failed")
    };
    let open: Vec<_> = all.filter(is_new).filter(is_open).collect();
    ensure!(open.is_empty(), "nobody will answer {open:?}");
    // Agents have taken back what they had written: nobody else does, and nobody puts it back.
    let pods = shop.cluster.get(&["pods"])?;
    let pods = pods["items"].as_array().context("no pods")?;
    ensure!(pods.len() > SERVERS.len(), "hardly any pods: {pods:?}");
    let told = pods.iter().map(|pod| &pod["metadata"]);
    let told = told.filter(|pod| !pod["annotations"]["malla.dev/redirection"].is_null());
    let told: Vec<_> = told.map(|pod| &pod["name"]).collect();
    ensure!(told.is_empty(), "these still say something of the mesh: {told:?}");
    Ok(())
}

fn running_pods_join_and_leave_twenty_times(shop: &Shop) -> Result<()> {
    let before = shop.lives()?;
    let asked = shop.cluster.under_load("client", "web", || {
        // By a word, and by none any more.
        let leaves = [json!({"malla.dev/mesh": "disabled"}), json!({})];
        for leaves in leaves.iter().cycle().take(20) {
            shop.cluster.annotate(&enabled())?;
            shop.wait_until_told("enabled")?;
            shop.cluster.annotate(leaves)?;
            shop.wait_until_told("")?;
        }
        Ok(())
    })?;
    ensure!(asked.len() > 200, "hardly any traffic: {}", asked.len());
    assert_eq!(shop.lives()?, before, "no pod is another, or was restarted");
    Ok(())
}

/// Rules, routes and settings of the shop's pods' network namespaces, where these are this machine's.
fn routing(shop: &Shop) -> Result<Vec<String>> {
    if !Cluster::is_ours() {
        return Ok(Vec::new());
    }
    // Without link-local addresses, which turn up some time after the rest.
    const SCRIPT: &str = "{ ip rule; ip -6 rule; ip route show table all; \
        ip -6 route show table all; } | grep -v fe80; \
        cat /proc/sys/net/ipv4/tcp_fwmark_accept /proc/sys/net/ipv*/fwmark_reflect";
    let of = |pod: &str| {
        // Of the sandbox: it is a script in clusters that are made here.
        let process = shop.cluster.process(pod, "/bin/sh")?;
        let output = process.run_beside(&["sh", "-c", SCRIPT])?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).context("read routes")
    };
    ["client"].into_iter().chain(SERVERS).map(of).collect()
}

/// What agents have mounted of their nodes, seen by pods that have mounted what that lies in.
struct Directories<'a>(&'a Shop);

impl<'a> Directories<'a> {
    fn of(shop: &'a Shop) -> Result<Self> {
        let image = Cluster::load("busybox")?;
        let volume = |name: &str, path: &str| json!({"name": name, "hostPath": {"path": path, "type": "Directory"}});
        let mount =
            |name: &str| json!({"name": name, "mountPath": format!("/{name}"), "readOnly": true});
        let spec = json!({
            "containers": [{
                "image": image,
                "command": ["sleep", "3600"],
                "volumeMounts": [mount("run"), mount("bpf")],
            }],
            "volumes": [volume("run", "/run"), volume("bpf", "/sys/fs/bpf")],
        });
        for node in &shop.nodes {
            shop.cluster.start(&Self::name(node), node, spec.clone())?;
        }
        shop.nodes.iter().try_for_each(|node| shop.cluster.ready(&Self::name(node)))?;
        Ok(Self(shop))
    }

    fn name(node: &str) -> String {
        format!("look-{node}")
    }

    fn are(&self, expected: &[&str]) -> Result<()> {
        for node in &self.0.nodes {
            let look = ["find", "/bpf", "/run", "-maxdepth", "1", "-name", "malla"];
            let found = self.0.cluster.exec(&Self::name(node), &look)?;
            assert_eq!(found.lines().collect::<Vec<_>>(), expected, "on {node}");
        }
        Ok(())
    }
}

/// A node that takes no pods but those that tolerate everything, until dropped.
struct Taint<'a>(&'a Shop);

impl<'a> Taint<'a> {
    fn of(shop: &'a Shop) -> Result<Self> {
        let this = Self(shop);
        this.set("malla-test=1:NoSchedule").map(|()| this)
    }

    fn set(&self, taint: &str) -> Result<()> {
        let [_, node] = &self.0.nodes;
        self.0.cluster.kubectl(&["taint", "node", node, taint, "--overwrite"]).map(drop)
    }
}

impl Drop for Taint<'_> {
    fn drop(&mut self) {
        self.set("malla-test-").ok();
    }
}

/// Who drains the nodes of both has one wait until the other one's successor is ready. Whoever is new meanwhile is
/// certified by another one: by whichever takes over.
fn the_ca_that_signs_is_evicted_and_not_the_other_one_too(
    agents: &Agents,
    shop: &Shop,
) -> Result<()> {
    const NAME: &str = "meanwhile";
    let system = agents.system();
    wait::until(wait::SOON, "the budget to allow one", || {
        let budget = system.get(&["poddisruptionbudget", "malla-ca"]).unwrap_or_default();
        budget["status"]["disruptionsAllowed"] == 1
    })?;
    let holder = || -> Result<String> {
        let lease = system.get(&["lease", "malla-ca"])?;
        Ok(lease["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned())
    };
    let pods = system.get(&["pods", "--selector=app=malla-ca"])?;
    let pods = pods["items"].as_array().context("no pods")?;
    let names = pods.iter().map(|pod| pod["metadata"]["name"].as_str().context("no name"));
    let mut names = names.collect::<Result<Vec<_>>>()?;
    let signs = holder()?;
    names.sort_by_key(|name| !signs.starts_with(*name));
    let [one, other] = names[..] else {
        anyhow::bail!("not two replicas: {pods:?}");
    };
    ensure!(signs.starts_with(one), "{signs} signs, and is none of {names:?}");
    system.evict(one)?;
    let refused = system.evict(other).err().context("both were evicted")?;
    let why = format!("{refused:#}");
    ensure!(why.contains("disruption budget"), "{why}");
    let successor = wait::until_some(wait::SOON, "another one to sign", || {
        let signs = holder().ok().filter(|signs| !signs.is_empty() && !signs.starts_with(one))?;
        let pods = system.get(&["pods", "--selector=app=malla-ca"]).ok()?;
        let mut names = pods["items"].as_array()?.iter();
        let named = names.find_map(|pod| {
            pod["metadata"]["name"].as_str().filter(|name| signs.starts_with(*name))
        });
        named.map(str::to_owned)
    })
    .with_context(|| format!("it is {:?}", holder()))?;

    shop.cluster.kubectl(&["create", "serviceaccount", NAME])?;
    let container = json!([{"image": Cluster::load("nginx")?}]);
    let spec = json!({"serviceAccountName": NAME, "containers": container});
    let [_, there] = &shop.nodes;
    shop.cluster.start(NAME, there, spec)?;
    shop.cluster.ready(NAME)?;
    let identity = format!("identity=spiffe://cluster.local/ns/{}/sa/{NAME} ", shop.cluster.name());
    wait::until(wait::SOON, &format!("{successor} to certify {NAME}"), || {
        system.log(&successor).is_ok_and(|log| log.contains(&identity))
    })?;
    agents.wait_until_carried(there, shop.cluster.name(), NAME)?;
    for host in shop.cluster.hosts_of_pod(NAME)? {
        let ask = ["curl", "--silent", "--show-error", "--fail", "--max-time", "5", &host];
        wait::until(wait::SOON, &format!("an answer from {host}"), || {
            shop.cluster.exec("client", &ask).is_ok_and(|said| said.trim() == NAME)
        })?;
    }
    shop.cluster.kubectl(&["delete", "pod", NAME]).map(drop)
}

/// Connections that stay open while the mesh is removed, of a pod that counts aloud to an echo: to one on
/// the other node, which an agent carries, and to one on its own, which the kernel does.
struct Talks<'a> {
    shop: &'a Cluster,
}

/// What a talker writes when its connection is over.
const OVER: &str = "over";

impl<'a> Talks<'a> {
    const PODS: [(&'static str, &'static str); 2] =
        [("talk-far", "echo-far"), ("talk-near", "echo-near")];

    fn begin(shop: &'a Shop, agents: &Agents) -> Result<Self> {
        let this = Self { shop: &shop.cluster };
        let [here, there] = &shop.nodes;
        let image = Cluster::load("busybox")?;
        let run = |script: &str| {
            let command = json!(["sh", "-c", script]);
            json!({"containers": [{"image": image, "command": command}]})
        };
        for (name, node) in [("echo-far", there), ("echo-near", here)] {
            this.shop.apply(&service_of_pods(name, 7000))?;
            this.shop.start(name, node, run("exec nc -ll -p 7000 -e cat"))?;
            this.shop.ready(name)?;
            agents.wait_until_carried(node, this.shop.name(), name)?;
        }
        for (name, echo) in Self::PODS {
            let service = this.shop.get(&["service", echo])?;
            let address = service["spec"]["clusterIP"].as_str().context("no address")?;
            let count = "n=0; while echo $n; do n=$((n + 1)); sleep 0.1; done";
            // On the first ones to a server of its node the kernel has no verdict. What `nc` says of an end
            // is its own affair: a write that meets a reset, or nothing.
            let few = if echo == "echo-near" { "1 2 3" } else { "" };
            let script = format!(
                "for i in {few}; do echo hello | nc {address} 7000 >/dev/null; sleep 1; done
                 while :; do ( {count} ) 2>/dev/null | nc {address} 7000 2>/dev/null; echo {OVER}; done"
            );
            this.shop.start(name, here, run(&script))?;
            this.shop.ready(name)?;
        }
        for (name, way) in [("talk-far", "tunnel"), ("talk-near", "direct")] {
            let is_open = || {
                let open = agents.ask(here, &["connections", "-n", this.shop.name()]);
                let open = open.unwrap_or_default();
                open.as_array().into_iter().flatten().any(|open| {
                    open["workload"] == name
                        && open["way"] == way
                        && open["direction"] == "outbound"
                })
            };
            wait::until(wait::SOON, "", is_open).with_context(|| {
                let open = agents.ask(here, &["connections"]);
                let log = this.shop.kubectl(&["logs", name, "--tail=20"]);
                format!("{name} is not {way}: {open:?}\n{log:?}\n{}", agents.log(here))
            })?;
            this.heard(name, |heard| heard.len() > 20)?;
        }
        Ok(this)
    }

    /// Waits until what has come back to a talker is so.
    fn heard(&self, talker: &str, is_so: impl Fn(&[String]) -> bool) -> Result<Vec<String>> {
        wait::until_some(wait::SOON, &format!("{talker}'s connection"), || {
            let log = self.shop.log(talker).ok()?;
            let lines: Vec<_> = log.lines().map(str::to_owned).collect();
            is_so(&lines).then_some(lines)
        })
    }

    /// The one that agents carried has ended with each of them, so often at most, and the next one goes on;
    /// the other one has not noticed. How often it ended.
    fn check(&self, most: usize) -> Result<usize> {
        let counts =
            |from: &[String]| from.iter().enumerate().all(|(n, line)| *line == n.to_string());
        // Agents have drained by now.
        let far = self.heard("talk-far", |heard| {
            let over = heard.iter().rposition(|line| line == OVER);
            over.is_some_and(|over| heard.len() > over + 20)
        })?;
        let lives: Vec<_> = far.split(|line| line == OVER).collect();
        ensure!(lives.iter().all(|life| counts(life)), "what came back is what was sent: {far:?}");
        let ends = lives.len() - 1;
        ensure!(ends <= most, "it ended {ends} times");

        let begun = self.heard("talk-near", |_| true)?.len();
        let near = self.heard("talk-near", |heard| heard.len() > begun + 20)?;
        ensure!(counts(&near), "one connection all the time: {near:?}");
        Ok(ends)
    }
}
