//! Pods, services and nodes, as a snapshot has them.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::addr::{EndpointAddr, PeerAddr};
use crate::locality::{InternalTraffic, Scope};
use crate::protocol::Protocol;
use crate::settings::Settings;
use crate::spiffe::SpiffeId;

/// The UID of a pod's API object: what tells a pod from another that got its name and address.
pub type WorkloadUid = Arc<str>;

/// A pod, in the mesh or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// `metadata.uid`.
    pub uid: WorkloadUid,
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
    /// Who it is.
    pub identity: SpiffeId,
    /// `spec.nodeName`.
    pub node: Arc<str>,
    /// `status.podIPs`, canonical, the primary one first. Empty for a pod whose address does not
    /// mean it alone: one that shares the node's network, has completed, or has none yet.
    pub ips: Vec<IpAddr>,
    /// Names for telemetry.
    pub names: WorkloadNames,
    /// Whether its traffic is carried.
    pub enrolment: Enrolment,
    /// How it takes part.
    pub settings: Settings,
    /// Its addresses are those that were seen in its namespace: the API does not tell any yet.
    pub provisional: bool,
    /// Where its network namespace is found: the annotation `malla.dev/netns` in standalone mode.
    pub netns: Option<Arc<str>>,
}

/// What Istio's metric labels call a workload. `unknown` where the manifests do not say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadNames {
    /// The owner's name (Deployment, StatefulSet, …), or the pod's.
    pub workload: Arc<str>,
    /// Label `app`, or `app.kubernetes.io/name`.
    pub app: Arc<str>,
    /// Label `version`, or `app.kubernetes.io/version`.
    pub version: Arc<str>,
    /// Label `service.istio.io/canonical-name`, or `app`, or the workload.
    pub canonical_service: Arc<str>,
    /// Label `service.istio.io/canonical-revision`, or `version`, or `latest`.
    pub canonical_revision: Arc<str>,
}

/// Whether a pod's traffic is carried, and why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Enrolment {
    /// Captured and reachable through the tunnel.
    Enrolled,
    /// Left alone, for the reason given: what `workloads` shows.
    LeftAlone(&'static str),
}

/// A Kubernetes Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
    /// `<name>.<namespace>.svc.cluster.local`: the `destination_service` label.
    pub host: Arc<str>,
    /// `spec.clusterIPs`, canonical. Empty for a headless service.
    pub vips: Vec<IpAddr>,
    /// `spec.ports`, TCP only.
    pub ports: Vec<ServicePort>,
    /// Whether `spec.selector` says which pods stand behind it. Without one, somebody else keeps its
    /// endpoints, and that there are none says nothing.
    pub selector: bool,
    /// `spec.internalTrafficPolicy`.
    pub traffic: InternalTraffic,
    /// `spec.trafficDistribution`, which its controller turns into hints.
    pub distribution: Option<Distribution>,
    /// `spec.sessionAffinity: ClientIP`: a client that comes back within this time is sent to where it
    /// was before.
    pub affinity: Option<Duration>,
}

/// `spec.trafficDistribution` of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Distribution {
    /// `PreferSameZone`, or `PreferClose`, its older name.
    SameZone,
    /// `PreferSameNode`, or else the zone.
    SameNode,
}

/// One port of a service, with what stands behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// `spec.ports[].port`.
    pub port: u16,
    /// `spec.ports[].name`, empty if the service has a single unnamed port.
    pub name: Arc<str>,
    /// Ready endpoints of every EndpointSlice of the service, both families, in address order.
    /// Where none is ready, those that still serve while their pods terminate.
    pub endpoints: Arc<[Endpoint]>,
    /// Those of them that clients of this node may use, in the same order.
    pub in_reach: Arc<[Endpoint]>,
    /// By which rules they are those: of each family that has endpoints, each rule once.
    pub scopes: Vec<Scope>,
    /// What is spoken, as declared.
    pub protocol: Protocol,
}

/// One endpoint of a service's port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it accepts connections.
    pub addr: EndpointAddr,
    /// The pod behind it; `None` if no manifest describes one at this address.
    pub workload: Option<Arc<Workload>>,
}

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Where its agent accepts tunnels, one per family, in the order of preference.
    pub peers: Vec<PeerAddr>,
}

impl Service {
    /// The port of this number.
    pub fn port(&self, number: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|port| port.port == number)
    }

    pub(super) fn is_captured(&self) -> bool {
        let is_enrolled =
            |endpoint: &Endpoint| endpoint.workload.as_ref().is_some_and(|w| w.is_enrolled());
        let mut in_reach = self.ports.iter().flat_map(|port| port.in_reach.iter()).peekable();
        if in_reach.peek().is_none() {
            // None at all, or none here where only those count: refused at once, with the reason.
            let mut all = self.ports.iter().flat_map(|port| port.endpoints.iter());
            return self.selector || all.any(is_enrolled);
        }
        in_reach.any(is_enrolled)
    }
}

impl ServicePort {
    /// A port of which every endpoint is in reach and nothing is declared.
    pub fn everywhere(port: u16, name: &str, endpoints: Arc<[Endpoint]>) -> Self {
        let in_reach = Arc::clone(&endpoints);
        let (scopes, protocol) = (vec![Scope::All], Protocol::default());
        Self { port, name: name.into(), endpoints, in_reach, scopes, protocol }
    }
}

impl Workload {
    /// Whether its traffic is carried.
    pub fn is_enrolled(&self) -> bool {
        self.enrolment == Enrolment::Enrolled
    }
}
