//! What tests on a cluster have in it: services, and pods behind them that tell who answered.

use std::collections::BTreeSet;
use std::fmt::Debug;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{Agents, Cluster};
use crate::wait;

/// The pods that answer for a [`Shop`]'s services, with these words: of its first node, and of the other.
pub const SERVERS: [&str; 2] = ["near", "other"];

/// What a namespace says to be in the mesh.
pub fn enabled() -> Value {
    json!({"malla.dev/mesh": "enabled"})
}

/// A Service of this name for the pods with the label `app: <name>`.
pub fn service_of_pods(name: &str, port: u16) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "selector": {"app": name},
            "ipFamilyPolicy": "PreferDualStack",
            "ports": [{"port": port}],
        },
    })
}

/// An address as URLs have it.
pub fn host(address: &str) -> String {
    if address.contains(':') { format!("[{address}]") } else { address.to_owned() }
}

impl Cluster {
    /// The addresses of a service, as URLs have them: of both families in a cluster that is made here.
    ///
    /// # Errors
    ///
    /// Fails if it has none, or of one family where there are two.
    pub fn hosts(&self, service: &str) -> Result<Vec<String>> {
        let service = self.get(&["service", service])?;
        let addresses = service["spec"]["clusterIPs"].as_array().context("no addresses")?;
        ensure!(!Self::is_ours() || addresses.len() == 2, "of both families: {service}");
        Ok(addresses.iter().filter_map(Value::as_str).map(host).collect())
    }

    /// The addresses of a pod, as URLs have them.
    ///
    /// # Errors
    ///
    /// Fails if it has none.
    pub fn hosts_of_pod(&self, pod: &str) -> Result<Vec<String>> {
        Ok(self.addresses_of_pod(pod)?.iter().map(|address| host(address)).collect())
    }

    /// The same as others write them.
    ///
    /// # Errors
    ///
    /// Fails if it has none.
    pub fn addresses_of_pod(&self, pod: &str) -> Result<Vec<String>> {
        let pod = self.get(&["pod", pod])?;
        let addresses = pod["status"]["podIPs"].as_array().context("no addresses")?;
        Ok(addresses.iter().filter_map(|one| one["ip"].as_str()).map(str::to_owned).collect())
    }
}

/// A server on either node behind a Service and a headless one, and a client on the first.
#[derive(Debug)]
pub struct Shop {
    /// Its namespace.
    pub cluster: Cluster,
    /// Where its pods are: the client and one server on the first.
    pub nodes: [String; 2],
}

impl Shop {
    /// Opens one in a new namespace that is annotated so, and waits until its servers are ready.
    ///
    /// # Errors
    ///
    /// Fails if they do not become so.
    pub fn open(annotations: &Value) -> Result<Self> {
        let cluster = Cluster::namespace()?;
        let image = Cluster::load("nginx")?;
        let nodes = cluster.two_nodes()?;
        cluster.annotate(annotations)?;
        cluster.apply(&service_of_pods("web", 80))?;
        let mut headless = service_of_pods("web", 80);
        headless["metadata"]["name"] = json!("headless");
        headless["spec"]["clusterIP"] = json!("None");
        cluster.apply(&headless)?;
        for (node, name) in nodes.iter().zip(SERVERS) {
            // A headless service gives its pods names, such as `near.headless`.
            let spec = json!({
                "hostname": name,
                "subdomain": "headless",
                "containers": [{"image": image}],
            });
            cluster.start_as(name, "web", node, spec)?;
        }
        cluster.client("client", &nodes[0])?;
        for name in SERVERS {
            cluster.ready(name)?;
        }
        Ok(Self { cluster, nodes })
    }

    /// Waits until the agents say so of all its pods, and have taken them in.
    ///
    /// # Errors
    ///
    /// Fails, with what they say, if that does not come true.
    pub fn wait_until_enrolled(&self, agents: &Agents, is_so: bool) -> Result<()> {
        for (pod, home) in [("client", 0), (SERVERS[0], 0), (SERVERS[1], 1)] {
            let node = &self.nodes[home];
            agents.wait_until_enrolled(node, self.cluster.name(), pod, is_so)?;
            if is_so {
                agents.wait_until_carried(node, self.cluster.name(), pod)?;
            }
        }
        Ok(())
    }

    /// Asks `hosts` until both servers have answered.
    ///
    /// # Errors
    ///
    /// Fails if one of them is not heard, or somebody else is.
    pub fn hear_both(&self, hosts: &[impl AsRef<str> + Debug]) -> Result<()> {
        self.hear_both_by(&[], hosts)
    }

    /// The same by addresses, of each family: the service's, and the pods' own.
    ///
    /// # Errors
    ///
    /// Fails if one of them is not heard, or somebody else is.
    pub fn hear_both_by_address(&self) -> Result<()> {
        for host in self.cluster.hosts("web")? {
            self.hear_both(&[host])?;
        }
        let [near, other] = SERVERS.map(|name| self.cluster.hosts_of_pod(name));
        for pair in near?.into_iter().zip(other?) {
            self.hear_both(&<[String; 2]>::from(pair))?;
        }
        Ok(())
    }

    /// The same with options of `curl`.
    ///
    /// # Errors
    ///
    /// Fails if one of them is not heard, or somebody else is.
    pub fn hear_both_by(&self, options: &[&str], hosts: &[impl AsRef<str> + Debug]) -> Result<()> {
        // Several by one `kubectl exec`, which costs ten times what a request does.
        let ask = |host: &str| {
            let options = options.join(" ");
            format!("curl --silent --fail --max-time 3 {options} 'http://{host}/' || :; ")
        };
        let once: String = hosts.iter().map(|host| ask(host.as_ref())).collect();
        let script = once.repeat(SERVERS.len() + 1);
        let mut heard = BTreeSet::new();
        wait::until(wait::SOON, &format!("both behind {hosts:?}"), || {
            let said = self.cluster.exec("client", &["sh", "-c", &script]).unwrap_or_default();
            heard.extend(said.lines().map(str::to_owned));
            heard.len() >= SERVERS.len()
        })?;
        ensure!(heard.iter().eq(&SERVERS), "{heard:?}");
        Ok(())
    }

    /// Who the pods are, and how often their programs were started.
    ///
    /// # Errors
    ///
    /// Fails with what `kubectl` says.
    pub fn lives(&self) -> Result<Vec<(Value, Value)>> {
        let pods = self.cluster.get(&["pods"])?;
        let pods = pods["items"].as_array().context("no pods")?.iter();
        let life = |pod: &Value| {
            let started = &pod["status"]["containerStatuses"][0]["restartCount"];
            (pod["metadata"]["uid"].clone(), started.clone())
        };
        Ok(pods.map(life).collect())
    }

    /// Waits until every pod says this of itself: then it is so in the kernel.
    ///
    /// # Errors
    ///
    /// Fails if one of them does not.
    pub fn wait_until_told(&self, says: &str) -> Result<()> {
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
