//! The stage: two nodes, the shop's services on both, and the pod from which people come.

use std::env;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Carrier, Interrupt, Mesh, PodSpec, Process, ServiceSpec, wait};

/// Every service of the shop listens there.
pub(crate) const PORT: u16 = 9080;
/// Where people come from.
pub(crate) const CLIENT: &str = "client";
/// The Kubernetes namespace of all pods.
pub(crate) const NAMESPACE: &str = "bookinfo";
/// The nodes; the first one is the one whose link is tapped.
pub(crate) const NODES: [&str; 2] = ["a", "b"];

/// Service, version, node: each service calls one on its own node and one on the other.
const PODS: [(&str, &str, &str); 6] = [
    ("productpage", "v1", "a"),
    ("reviews", "v1", "a"),
    ("reviews", "v3", "a"),
    ("reviews", "v2", "b"),
    ("details", "v1", "b"),
    ("ratings", "v1", "b"),
];
/// Every agent enters a pod, loads its programs and issues its certificates within it.
const ENROL_LIMIT: Duration = Duration::from_secs(20);

/// Nodes, pods, agents and programs; all of it ends when dropped, programs first.
#[derive(Debug)]
pub(crate) struct Shop {
    programs: Vec<Process>,
    mesh: Mesh,
}

impl Shop {
    /// Makes it, with agents that run and pods that are not enrolled.
    ///
    /// # Errors
    ///
    /// Fails when something cannot be made; what was made is removed.
    pub(crate) fn open(carrier: Carrier, interrupt: &Interrupt) -> Result<Self> {
        let mut builder = Mesh::builder()
            .carrier(carrier)
            .namespace(NAMESPACE, &[])
            .translated_services()
            .pod(PodSpec::new(CLIENT, NODES[0]).namespace(NAMESPACE));
        for node in NODES {
            builder = builder.node(node);
        }
        for service in ["productpage", "details", "reviews", "ratings"] {
            let pods: Vec<_> =
                PODS.iter().filter(|pod| pod.0 == service).map(|pod| name(*pod)).collect();
            let pods: Vec<_> = pods.iter().map(String::as_str).collect();
            let service = ServiceSpec::new(service).namespace(NAMESPACE);
            builder = builder.service(service.port(PORT, PORT).pods(&pods));
        }
        for pod @ (service, version, node) in PODS {
            let spec = PodSpec::new(&name(pod), node)
                .namespace(NAMESPACE)
                .service_account(&format!("bookinfo-{service}"))
                .label("app", service)
                .label("version", version);
            builder = builder.pod(spec);
        }
        let mut shop = Self { programs: Vec::new(), mesh: builder.start()? };
        for pod in PODS {
            ensure!(!interrupt.came(), "interrupted");
            shop.start(pod)?;
        }
        for pod in PODS {
            shop.mesh.pod(&name(pod)).wait_for_port(PORT)?;
        }
        Ok(shop)
    }

    fn start(&mut self, pod @ (service, version, _): (&str, &str, &str)) -> Result<()> {
        let mut command = Command::new(beside("malla-bookinfo")?);
        command.args([service, "--version", version]);
        command.env("HOSTNAME", name(pod)).env("CLUSTER_NAME", "malla-demo");
        for backend in ["details", "reviews", "ratings"] {
            // There is no name service in the pods: the cluster address takes the name's place.
            let address = self.mesh.service(backend).v4_ip().to_string();
            command.env(format!("{}_HOSTNAME", backend.to_uppercase()), address);
        }
        self.programs.push(self.mesh.pod(&name(pod)).spawn_command(&mut command)?);
        Ok(())
    }

    /// Takes the whole namespace into the mesh while everything runs: one annotation.
    ///
    /// # Errors
    ///
    /// Fails when an agent does not follow.
    pub(crate) fn enrol(&self) -> Result<()> {
        let manifest = format!(
            "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {NAMESPACE}\n  annotations:\n    \
             malla.dev/mesh: enabled\n"
        );
        self.mesh.manifests().write(&format!("namespace-{NAMESPACE}"), &manifest)?;
        for node in NODES {
            let agent = self.mesh.agent(node);
            wait::until(ENROL_LIMIT, "all pods to be enrolled", || {
                self.mesh.pods().iter().all(|pod| agent.is_enrolled(pod) == Some(true))
            })?;
        }
        Ok(())
    }

    /// What was made.
    pub(crate) fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// Where people find the page.
    pub(crate) fn page(&self) -> SocketAddr {
        self.mesh.service("productpage").v4(PORT)
    }

    /// Runs `f` as a program in the pod from which people come.
    ///
    /// # Errors
    ///
    /// Fails with the error of `f`.
    pub(crate) fn as_people<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.mesh.pod(CLIENT).run(f)
    }

    /// Starts a command on the first node.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be started.
    pub(crate) fn on_first_node(&self, command: &mut Command) -> Result<Child> {
        self.mesh.node(NODES[0]).netns().spawn(command)
    }

    /// The first node's link to the other, as `tcpdump` calls it.
    pub(crate) fn link(&self) -> String {
        self.mesh.node(NODES[0]).link_to(1)
    }

    /// The pods of a node, in order.
    pub(crate) fn pods_of(&self, node: &str) -> Vec<&str> {
        self.mesh.pods().iter().filter(|pod| pod.node() == node).map(|pod| pod.name()).collect()
    }
}

fn name((service, version, _): (&str, &str, &str)) -> String {
    format!("{service}-{version}")
}

/// A program that is built together with this one.
///
/// # Errors
///
/// Fails if it was not built.
pub(crate) fn beside(program: &str) -> Result<PathBuf> {
    let path = env::current_exe().context("find this program")?.with_file_name(program);
    ensure!(path.is_file(), "{program} is not built: run `cargo xtask build`");
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls of the shop, by service.
    const CALLS: [(&str, &str); 3] =
        [("productpage", "details"), ("productpage", "reviews"), ("reviews", "ratings")];

    #[test]
    fn calls_stay_on_a_node_and_cross() {
        let nodes = |service| PODS.iter().filter(move |pod| pod.0 == service).map(|pod| pod.2);
        let pairs = CALLS.iter().flat_map(|(from, to)| {
            nodes(*from).flat_map(move |from| nodes(*to).map(move |to| from == to))
        });
        let (same, across): (Vec<_>, Vec<_>) = pairs.partition(|same| *same);
        assert!(!same.is_empty() && !across.is_empty());
        assert!(PODS.iter().all(|pod| NODES.contains(&pod.2)));
    }
}
