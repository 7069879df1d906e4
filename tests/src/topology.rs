//! What a mesh under test consists of.

use std::time::Duration;

use anyhow::Result;
use serde_json::Value;

use crate::mesh::Mesh;

/// An IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];
}

/// What carries tunnels: the agents' `--carrier`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Carrier {
    /// The agents choose.
    #[default]
    Auto,
    /// TLS over TCP.
    Lane,
    /// QUIC.
    Quic,
}

impl Carrier {
    /// The two that bytes can take.
    pub const BOTH: [Self; 2] = [Self::Lane, Self::Quic];

    /// The word, as flag and label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Lane => "lane",
            Self::Quic => "quic",
        }
    }
}

/// A pod to be.
#[derive(Clone, Debug)]
pub struct PodSpec {
    pub(crate) name: String,
    pub(crate) node: String,
    pub(crate) namespace: String,
    pub(crate) service_account: String,
    pub(crate) labels: Vec<(String, String)>,
    pub(crate) annotations: Vec<(String, String)>,
}

impl PodSpec {
    /// The pod `name` on `node`, in the namespace `default`, with a service account of its own name
    /// and the label `app` of the same name.
    pub fn new(name: &str, node: &str) -> Self {
        Self {
            name: name.to_owned(),
            node: node.to_owned(),
            namespace: "default".to_owned(),
            service_account: name.to_owned(),
            labels: vec![("app".to_owned(), name.to_owned())],
            annotations: Vec::new(),
        }
    }

    /// In another namespace.
    #[must_use]
    pub fn namespace(mut self, namespace: &str) -> Self {
        namespace.clone_into(&mut self.namespace);
        self
    }

    /// With another service account, and with it another identity.
    #[must_use]
    pub fn service_account(mut self, name: &str) -> Self {
        name.clone_into(&mut self.service_account);
        self
    }

    /// With a label more, or another value of one.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        set(&mut self.labels, key, value);
        self
    }

    /// With an annotation more, or another value of one.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        set(&mut self.annotations, key, value);
        self
    }
}

/// A service to be.
#[derive(Clone, Debug)]
pub struct ServiceSpec {
    pub(crate) name: String,
    pub(crate) namespace: String,
    pub(crate) ports: Vec<(u16, u16)>,
    pub(crate) pods: Vec<String>,
    pub(crate) headless: bool,
    pub(crate) fields: Vec<(String, Value)>,
    pub(crate) annotations: Vec<(String, String)>,
    pub(crate) app_protocol: Option<String>,
}

impl ServiceSpec {
    /// The service `name` in the namespace `default`, without a port and without a pod behind it.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            namespace: "default".to_owned(),
            ports: Vec::new(),
            pods: Vec::new(),
            headless: false,
            fields: Vec::new(),
            annotations: Vec::new(),
            app_protocol: None,
        }
    }

    /// With a further field of its `spec`.
    #[must_use]
    pub fn field(mut self, name: &str, value: Value) -> Self {
        self.fields.retain(|(known, _)| known != name);
        self.fields.push((name.to_owned(), value));
        self
    }

    /// With an annotation more, or another value of one.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        set(&mut self.annotations, key, value);
        self
    }

    /// With this `appProtocol` of each of its ports.
    #[must_use]
    pub fn app_protocol(mut self, name: &str) -> Self {
        self.app_protocol = Some(name.to_owned());
        self
    }

    /// In another namespace.
    #[must_use]
    pub fn namespace(mut self, namespace: &str) -> Self {
        namespace.clone_into(&mut self.namespace);
        self
    }

    /// With a port, and the pods' port behind it.
    #[must_use]
    pub fn port(mut self, port: u16, target: u16) -> Self {
        self.ports.push((port, target));
        self
    }

    /// With pods behind it.
    #[must_use]
    pub fn pods(mut self, names: &[&str]) -> Self {
        self.pods.extend(names.iter().map(|name| (*name).to_owned()));
        self
    }

    /// Without a cluster address.
    #[must_use]
    pub fn headless(mut self) -> Self {
        self.headless = true;
        self
    }
}

/// Describes a [`Mesh`] before it is made.
#[derive(Clone, Debug)]
pub struct Builder {
    pub(crate) nodes: Vec<String>,
    pub(crate) zones: Vec<(String, String)>,
    pub(crate) namespaces: Vec<(String, Vec<(String, String)>)>,
    pub(crate) pods: Vec<PodSpec>,
    pub(crate) services: Vec<ServiceSpec>,
    pub(crate) carrier: Carrier,
    pub(crate) cert_lifetime: Duration,
    pub(crate) flags: Vec<String>,
    pub(crate) agents: bool,
    pub(crate) plain_services: bool,
    pub(crate) mtu: u32,
    pub(crate) node_family: Option<Family>,
    pub(crate) own_ca: Vec<(String, String)>,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self {
            nodes: Vec::new(),
            zones: Vec::new(),
            namespaces: Vec::new(),
            pods: Vec::new(),
            services: Vec::new(),
            carrier: Carrier::default(),
            cert_lifetime: Duration::from_secs(86_400),
            flags: Vec::new(),
            agents: true,
            plain_services: false,
            mtu: 1500,
            node_family: None,
            own_ca: Vec::new(),
        }
    }

    /// A node. Pods name theirs; two nodes are joined by a link of their own.
    #[must_use]
    pub fn node(mut self, name: &str) -> Self {
        self.nodes.push(name.to_owned());
        self
    }

    /// Puts a node into a zone.
    #[must_use]
    pub fn zone(mut self, node: &str, zone: &str) -> Self {
        set(&mut self.zones, node, zone);
        self
    }

    /// A namespace with these annotations, or further ones for a namespace named before. Only what
    /// is enrolled by one (`malla.dev/mesh`) or by its pod's own is in the mesh.
    #[must_use]
    pub fn namespace(mut self, name: &str, annotations: &[(&str, &str)]) -> Self {
        if !self.namespaces.iter().any(|(known, _)| known == name) {
            self.namespaces.push((name.to_owned(), Vec::new()));
        }
        for (known, all) in &mut self.namespaces {
            if known == name {
                for (key, value) in annotations {
                    set(all, key, value);
                }
            }
        }
        self
    }

    /// A pod. One of the same name is replaced.
    #[must_use]
    pub fn pod(mut self, pod: PodSpec) -> Self {
        self.pods.retain(|known| known.name != pod.name);
        self.pods.push(pod);
        self
    }

    /// A service. One of the same name is replaced.
    #[must_use]
    pub fn service(mut self, service: ServiceSpec) -> Self {
        self.services.retain(|known| known.name != service.name);
        self.services.push(service);
        self
    }

    /// Gives a node's agent a certificate authority that no other agent trusts.
    #[must_use]
    pub fn own_ca(mut self, node: &str, trust_domain: &str) -> Self {
        self.own_ca.push((node.to_owned(), trust_domain.to_owned()));
        self
    }

    /// What carries tunnels.
    #[must_use]
    pub fn carrier(mut self, carrier: Carrier) -> Self {
        self.carrier = carrier;
        self
    }

    /// How long workloads' certificates are valid: 24 hours if nothing else is said.
    #[must_use]
    pub fn cert_lifetime(mut self, lifetime: Duration) -> Self {
        self.cert_lifetime = lifetime;
        self
    }

    /// A further flag of every agent, as one argument: `--drain-s=2`. It replaces the one of that
    /// name that agents have here anyway.
    #[must_use]
    pub fn flag(mut self, flag: &str) -> Self {
        self.flags.push(flag.to_owned());
        self
    }

    /// The largest packet of every link: 1500 bytes if nothing else is said.
    #[must_use]
    pub fn mtu(mut self, bytes: u32) -> Self {
        self.mtu = bytes;
        self
    }

    /// Nodes have addresses of this family alone; pods and services have both.
    #[must_use]
    pub fn node_family(mut self, family: Family) -> Self {
        self.node_family = Some(family);
        self
    }

    /// The same nodes and pods with nothing of the mesh; services as in
    /// [`translated_services`](Self::translated_services).
    #[must_use]
    pub fn plain(mut self) -> Self {
        self.agents = false;
        self.translated_services()
    }

    /// Services are reachable without the mesh too: the nodes translate their addresses with
    /// nftables, as kube-proxy does.
    #[must_use]
    pub fn translated_services(mut self) -> Self {
        self.plain_services = true;
        self
    }

    /// Makes everything, starts the agents and waits until they are ready.
    ///
    /// # Errors
    ///
    /// Fails if something cannot be made; what was made is removed.
    pub fn start(self) -> Result<Mesh> {
        Mesh::start(self)
    }
}

fn set(pairs: &mut Vec<(String, String)>, key: &str, value: &str) {
    pairs.retain(|(known, _)| known != key);
    pairs.push((key.to_owned(), value.to_owned()));
}
