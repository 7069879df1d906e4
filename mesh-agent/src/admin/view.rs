//! What the admin socket tells, as JSON. Keys are an interface: scripts read them, so a key is never
//! renamed or given another meaning; new ones may come.
//!
//! Views of workloads, services and connections are pure functions of the state; the others are
//! filled by whoever owns the state.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use mesh_core::settings::{Mode, Outbound};
use mesh_core::snapshot::{
    Distribution, Endpoint, Enrolment, Service, ServicePort, Snapshot, Workload,
};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::identity::bundle::Root;
use crate::identity::store::{CertState, CertView};
use crate::telemetry::{Direction, OpenConnection, Party};

/// `/status`: whether the agent works, and on what.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StatusView {
    /// Version of the agent.
    pub version: String,
    /// The node it runs on.
    pub node: String,
    /// The trust domain of its mesh.
    pub trust_domain: String,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// Whether it carries traffic.
    pub ready: bool,
    /// Why not, if it does not.
    pub not_ready_reason: Option<String>,
    /// Which state decisions are made from.
    pub snapshot: SnapshotView,
    /// What is wrong in the manifests now.
    pub problems: Vec<ProblemView>,
    /// Connections open now.
    pub connections: ConnectionCounts,
    /// Threads that carry connections.
    pub workers: usize,
    /// `auto`, `lane` or `quic`.
    pub carrier: String,
    /// Which carrier is in use to each node, `lane` or `quic`.
    pub carriers: BTreeMap<String, String>,
    /// Verdicts by which the kernel connects pods of this node directly.
    pub verdicts: usize,
    /// What the kernel programs counted, by event.
    pub kernel: BTreeMap<String, u64>,
    /// With `--redirect-peer on`: `on` or why not, by `namespace/name` of the enrolled pods of this node.
    #[serde(default)]
    pub redirect_peer: BTreeMap<String, String>,
    /// NetworkPolicies outside of system namespaces. They are not enforced on TCP between pods of the mesh.
    #[serde(default)]
    pub network_policies: usize,
}

/// The state that decisions are made from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SnapshotView {
    /// Grows with every new state.
    pub generation: u64,
    /// Seconds since this one came.
    pub age_s: u64,
    /// Pods that are known.
    pub workloads: usize,
    /// Pods of this node whose traffic is carried.
    pub enrolled_here: usize,
    /// Services that are known.
    pub services: usize,
    /// Nodes that are known.
    pub nodes: usize,
}

/// A problem in the manifests, as its reporter found it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProblemView {
    /// File, and document in it.
    pub place: String,
    /// The field.
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub remedy: String,
}

/// Connections open now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionCounts {
    /// From pods of this node.
    pub outbound: u64,
    /// To pods of this node.
    pub inbound: u64,
}

/// `/workloads`: a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadView {
    /// Namespace.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// UID of the pod.
    pub uid: String,
    /// Owner's name, as in metrics.
    pub workload: String,
    /// Where it runs.
    pub node: String,
    /// Its addresses, the primary one first.
    pub addresses: Vec<IpAddr>,
    /// Its SPIFFE ID.
    pub identity: String,
    /// Whether its traffic is carried.
    pub enrolled: bool,
    /// Why not.
    pub reason: Option<String>,
    /// `permissive` or `strict`.
    pub mode: String,
    /// `mesh` or `all`: what of its outbound traffic is captured.
    pub outbound: String,
    /// How a pod of this node reaches it: `direct` (after a first connection), `local`, `tunnel`, or
    /// `passthrough`.
    pub way: String,
}

/// `/services`: a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceView {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub service: String,
    /// Its DNS name.
    pub host: String,
    /// Cluster addresses; none if it is headless.
    pub vips: Vec<IpAddr>,
    /// Its ports, each as `80` or `80/http`.
    pub ports: Vec<String>,
    /// Ready endpoints, each address once.
    pub endpoints: usize,
    /// Those of them that are enrolled pods.
    pub enrolled: usize,
    /// Those of them that clients of this node may use, each address once.
    #[serde(default)]
    pub in_reach: usize,
    /// Those of which nobody has connected to the service lately, so that it is not known what is there: addresses, each
    /// once. They are read when somebody does.
    #[serde(default)]
    pub unread: usize,
    /// By which rule: `all`, `same-zone`, `same-node`, `local`; more than one if ports or families
    /// differ.
    #[serde(default)]
    pub reach: Vec<String>,
    /// `spec.trafficDistribution`, if it is given; whether it is followed is for the hints of the
    /// endpoints to say.
    #[serde(default)]
    pub distribution: Option<String>,
    /// Seconds for which a client keeps to an endpoint, if it does.
    #[serde(default)]
    pub affinity_s: Option<u64>,
    /// What is spoken at each of its ports: `80/http`, `81/opaque`.
    #[serde(default)]
    pub protocols: Vec<String>,
}

/// `/certs`: a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateView {
    /// The SPIFFE ID, or for a root its trust domain.
    pub name: String,
    /// `Leaf` or `Root`.
    pub kind: String,
    /// `Available`, `Initializing` or `Unavailable`.
    pub status: String,
    /// Whether it is valid now.
    pub valid: bool,
    /// Serial number, lower hex.
    pub serial: String,
    /// RFC 3339, in UTC.
    pub not_after: String,
    /// RFC 3339, in UTC.
    pub not_before: String,
    /// Why it was not issued or renewed when that was last tried; empty if all is well.
    #[serde(default)]
    pub problem: String,
}

/// `/connections`: an open connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionView {
    /// Its number; the access log has it as `connection`.
    pub id: u64,
    /// Namespace of the pod of this node.
    pub namespace: String,
    /// The pod of this node.
    pub workload: String,
    /// `outbound` or `inbound`.
    pub direction: String,
    /// Who opened it.
    pub source: String,
    /// The endpoint; empty while none is chosen.
    pub destination: String,
    /// What the application dialled.
    pub orig_dst: String,
    /// The service meant, by DNS name.
    pub service: String,
    /// Who the other side proved to be.
    pub peer_identity: String,
    /// Node of the other agent.
    pub peer_node: String,
    /// `lane`, `quic`, `local`, `passthrough`, `plaintext`; empty while none is chosen.
    pub carrier: String,
    /// `tunnel`, `local`, `direct`, `passthrough`; empty while none is chosen.
    pub way: String,
    /// Milliseconds since it was accepted.
    pub age_ms: u64,
    /// Bytes that the pod of this node has sent.
    pub bytes_sent: u64,
    /// Bytes that it has received.
    pub bytes_received: u64,
}

/// `/tunnels`: a tunnel to or from another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelView {
    /// The other node, or its address if no manifest names it.
    pub node: String,
    /// Identity of the workload that opened it.
    pub from: String,
    /// Identity of the workload it leads to.
    pub to: String,
    /// `lane` or `quic`.
    pub carrier: String,
    /// `idle`, `busy`, or `failing` and why.
    pub state: String,
    /// Flows on it now.
    pub flows: u64,
    /// Seconds since it was made.
    pub age_s: u64,
}

/// Every pod, by namespace and name. `failing` tells of a pod that should be enrolled on this node why
/// it is not.
pub fn workloads(
    snapshot: &Snapshot,
    failing: impl Fn(&Workload) -> Option<String>,
) -> Vec<WorkloadView> {
    let view = |pod: &Arc<Workload>| workload(snapshot, pod, failing(pod));
    let mut views: Vec<_> = snapshot.workloads().map(view).collect();
    views.sort_by(|a, b| (&a.namespace, &a.pod, &a.uid).cmp(&(&b.namespace, &b.pod, &b.uid)));
    views
}

fn workload(snapshot: &Snapshot, pod: &Workload, failing: Option<String>) -> WorkloadView {
    let reason = match pod.enrolment {
        Enrolment::Enrolled => failing,
        Enrolment::LeftAlone(reason) => Some(reason.to_owned()),
    };
    let way = match (pod.is_enrolled(), pod.node == snapshot.node) {
        (false, _) => "passthrough",
        (true, true) if pod.settings.direct && pod.settings.preserve_client_address => "direct",
        (true, true) => "local",
        (true, false) => "tunnel",
    };
    WorkloadView {
        namespace: pod.namespace.to_string(),
        pod: pod.name.to_string(),
        uid: pod.uid.to_string(),
        workload: pod.names.workload.to_string(),
        node: pod.node.to_string(),
        addresses: pod.ips.clone(),
        identity: pod.identity.to_string(),
        enrolled: reason.is_none(),
        reason,
        mode: match pod.settings.mode {
            Mode::Permissive => "permissive".into(),
            Mode::Strict => "strict".into(),
        },
        outbound: match pod.settings.outbound {
            Outbound::Mesh => "mesh".into(),
            Outbound::All => "all".into(),
        },
        way: way.into(),
    }
}

/// Every service, by namespace and name.
pub fn services(snapshot: &Snapshot) -> Vec<ServiceView> {
    let mut views: Vec<_> = snapshot.services().map(|known| service(snapshot, known)).collect();
    views.sort_by(|a, b| (&a.namespace, &a.service).cmp(&(&b.namespace, &b.service)));
    views
}

fn service(snapshot: &Snapshot, service: &Service) -> ServiceView {
    let all = service.ports.iter().flat_map(|port| port.endpoints.iter());
    let all = all.map(|endpoint| endpoint.addr.0.ip());
    let unread: BTreeSet<_> = all.filter(|ip| snapshot.is_unread(*ip)).collect();
    // An endpoint stands behind each port of its service and counts once.
    let addresses = |of: fn(&ServicePort) -> &[Endpoint], keep: fn(&Endpoint) -> bool| {
        let endpoints = service.ports.iter().flat_map(of).filter(|endpoint| keep(endpoint));
        endpoints.map(|endpoint| endpoint.addr.0.ip()).collect::<BTreeSet<_>>().len()
    };
    let scopes: BTreeSet<_> = service.ports.iter().flat_map(|port| &port.scopes).collect();
    ServiceView {
        namespace: service.namespace.to_string(),
        service: service.name.to_string(),
        host: service.host.to_string(),
        vips: service.vips.clone(),
        ports: service
            .ports
            .iter()
            .map(|port| match &*port.name {
                "" => port.port.to_string(),
                name => format!("{}/{name}", port.port),
            })
            .collect(),
        endpoints: addresses(|port| &port.endpoints, |_| true),
        enrolled: addresses(
            |port| &port.endpoints,
            |e| e.workload.as_ref().is_some_and(|pod| pod.is_enrolled()),
        ),
        in_reach: addresses(|port| &port.in_reach, |_| true),
        unread: unread.len(),
        reach: scopes.into_iter().map(ToString::to_string).collect(),
        distribution: service.distribution.map(|distribution| match distribution {
            Distribution::SameZone => "PreferSameZone".into(),
            Distribution::SameNode => "PreferSameNode".into(),
        }),
        affinity_s: service.affinity.map(|timeout| timeout.as_secs()),
        protocols: service
            .ports
            .iter()
            .map(|port| format!("{}/{}", port.port, port.protocol.as_str()))
            .collect(),
    }
}

/// The state's size, for [`StatusView`]; `failing` pods of this node should be enrolled and are not.
pub fn snapshot(snapshot: &Snapshot, failing: usize, age_s: u64) -> SnapshotView {
    SnapshotView {
        generation: snapshot.generation,
        age_s,
        workloads: snapshot.workloads().count(),
        enrolled_here: snapshot.local_enrolled().count().saturating_sub(failing),
        services: snapshot.services().count(),
        nodes: snapshot.nodes().count(),
    }
}

/// A certificate of a workload of this node.
pub fn leaf(cert: &CertView) -> CertificateView {
    CertificateView {
        name: cert.identity.to_string(),
        kind: "Leaf".into(),
        status: cert.state.as_str().into(),
        valid: cert.state == CertState::Available,
        serial: cert.serial.clone().unwrap_or_default(),
        not_after: cert.not_after.map(rfc3339).unwrap_or_default(),
        not_before: cert.not_before.map(rfc3339).unwrap_or_default(),
        problem: cert.error.clone().unwrap_or_default(),
    }
}

/// A trusted root.
pub fn root(root: &Root, now: SystemTime) -> CertificateView {
    CertificateView {
        name: root.trust_domain.as_ref().map_or_else(|| root.subject.clone(), ToString::to_string),
        kind: "Root".into(),
        status: CertState::Available.as_str().into(),
        valid: root.not_before <= now && now < root.not_after,
        serial: root.serial.clone(),
        not_after: rfc3339(root.not_after),
        not_before: rfc3339(root.not_before),
        problem: String::new(),
    }
}

/// One open connection.
pub fn connection(open: &OpenConnection) -> ConnectionView {
    let facts = &open.facts;
    let (here, there) = match facts.direction {
        Direction::Outbound => (&facts.source, &facts.destination),
        Direction::Inbound => (&facts.destination, &facts.source),
    };
    let addr = |party: &Party| party.addr.map(|addr| addr.to_string()).unwrap_or_default();
    let pod = here.workload.as_deref();
    ConnectionView {
        id: open.id,
        namespace: pod.map(|pod| pod.namespace.to_string()).unwrap_or_default(),
        workload: pod.map(|pod| pod.name.to_string()).unwrap_or_default(),
        direction: facts.direction.as_str().into(),
        source: addr(&facts.source),
        destination: addr(&facts.destination),
        orig_dst: facts.orig_dst.map(|addr| addr.to_string()).unwrap_or_default(),
        service: facts.service.as_ref().map(|s| s.host.to_string()).unwrap_or_default(),
        peer_identity: there.identity.as_ref().map(ToString::to_string).unwrap_or_default(),
        peer_node: facts.peer_node.as_deref().unwrap_or_default().into(),
        carrier: facts.carrier.map(|carrier| carrier.as_str()).unwrap_or_default().into(),
        way: facts.way.map(|way| way.as_str()).unwrap_or_default().into(),
        age_ms: u64::try_from(open.age.as_millis()).unwrap_or(u64::MAX),
        bytes_sent: open.sent,
        bytes_received: open.received,
    }
}

/// A time as [`CertificateView`] shows it, to the second.
pub fn rfc3339(at: SystemTime) -> String {
    let at = OffsetDateTime::from(at);
    let at = at.replace_nanosecond(0).unwrap_or(at);
    at.format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::telemetry::fixture::{self, Shop};

    #[test]
    fn workload_tells_way_and_reason() {
        let shop = Shop::new();
        let mut plain = (*fixture::workload("db", "node-2", "10.0.2.9")).clone();
        plain.enrolment = Enrolment::LeftAlone("host network");
        plain.settings.mode = Mode::Strict;
        plain.settings.outbound = Outbound::All;
        let pods = vec![Arc::clone(&shop.web), Arc::new(plain), Arc::clone(&shop.api)];

        let views = workloads(&fixture::snapshot(pods, Vec::new()), |_| None);

        let shown: Vec<_> = views
            .iter()
            .map(|v| (&*v.pod, &*v.way, v.enrolled, v.reason.as_deref(), &*v.mode, &*v.outbound))
            .collect();
        let expected = [
            ("api-0", "tunnel", true, None, "permissive", "mesh"),
            ("db-0", "passthrough", false, Some("host network"), "strict", "all"),
            ("web-0", "direct", true, None, "permissive", "mesh"),
        ];
        assert_eq!(shown, expected);
        assert_eq!(views[2].identity, "spiffe://cluster.local/ns/shop/sa/web");
    }

    #[test]
    fn workload_whose_enrolment_fails_is_not_enrolled() {
        let shop = Shop::new();
        let failing = |pod: &Workload| (*pod.name == *"web-0").then(|| "no namespace".to_owned());

        let views = workloads(&shop.snapshot(), failing);

        let shown: Vec<_> =
            views.iter().map(|v| (&*v.pod, v.enrolled, v.reason.as_deref())).collect();
        assert_eq!(shown, [("api-0", true, None), ("web-0", false, Some("no namespace"))]);
        assert_eq!(snapshot(&shop.snapshot(), 1, 0).enrolled_here, 0);
    }

    #[test]
    fn endpoint_behind_two_ports_counts_once() {
        let shop = Shop::new();
        let mut plain = (*fixture::workload("db", "node-2", "10.0.2.9")).clone();
        plain.enrolment = Enrolment::LeftAlone("host network");
        let both = fixture::service("api", "10.96.0.7", &[&shop.api, &Arc::new(plain)]);
        let mut both = (*both).clone();
        let mut second = both.ports[0].clone();
        second.port = 81;
        second.name = "".into();
        both.ports.push(second);

        let views = services(&fixture::snapshot(Vec::new(), vec![Arc::new(both)]));

        assert_eq!((views[0].endpoints, views[0].enrolled), (2, 1));
        assert_eq!(views[0].ports, ["80/http", "81"]);
        assert_eq!(views[0].host, "api.shop.svc.cluster.local");
    }

    #[test]
    fn connection_is_shown_from_the_pod_of_this_node() {
        let open = |direction| OpenConnection {
            id: 7,
            facts: Shop::new().facts(direction),
            age: Duration::from_millis(1234),
            sent: 5,
            received: 6,
        };
        let outbound = connection(&open(Direction::Outbound));
        assert_eq!((&*outbound.workload, &*outbound.peer_node), ("web-0", "node-2"));
        assert_eq!(outbound.peer_identity, "spiffe://cluster.local/ns/shop/sa/api");
        assert_eq!((outbound.age_ms, outbound.bytes_sent, outbound.bytes_received), (1234, 5, 6));
        let inbound = connection(&open(Direction::Inbound));
        assert_eq!((&*inbound.workload, &*inbound.peer_node), ("api-0", "node-1"));
        assert_eq!(inbound.peer_identity, "spiffe://cluster.local/ns/shop/sa/web");
        assert_eq!(inbound.source, outbound.source);
    }

    #[test]
    fn time_is_shown_to_the_second() {
        let at = UNIX_EPOCH + Duration::from_millis(1_767_323_045_678);
        assert_eq!(rfc3339(at), "2026-01-02T03:04:05Z");
    }
}
