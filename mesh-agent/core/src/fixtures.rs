//! Small snapshots for this crate's tests.

use std::collections::HashMap;
use std::sync::Arc;

use crate::addr::{EndpointAddr, PeerAddr};
use crate::locality::InternalTraffic;
use crate::settings::Settings;
use crate::snapshot::{
    Endpoint, Enrolment, Node, Parts, Service, ServicePort, Snapshot, Workload, WorkloadNames,
};
use crate::spiffe::{SpiffeId, TrustDomain};

pub(crate) fn domain() -> TrustDomain {
    TrustDomain::new("cluster.local").unwrap()
}

/// An enrolled pod of this name, UID and service account.
pub(crate) fn workload(name: &str, node: &str, ips: &[&str]) -> Arc<Workload> {
    Arc::new(Workload {
        uid: name.into(),
        namespace: "default".into(),
        name: name.into(),
        identity: SpiffeId::new(domain(), "default", name).unwrap(),
        node: node.into(),
        ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        names: WorkloadNames {
            workload: name.into(),
            app: name.into(),
            version: "v1".into(),
            canonical_service: name.into(),
            canonical_revision: "v1".into(),
        },
        enrolment: Enrolment::Enrolled,
        settings: Settings::default(),
        provisional: false,
        netns: None,
    })
}

/// An endpoint without a known pod.
pub(crate) fn endpoint(addr: &str) -> Endpoint {
    Endpoint { addr: EndpointAddr(addr.parse().unwrap()), workload: None }
}

pub(crate) fn service(
    name: &str,
    vips: &[&str],
    port: u16,
    endpoints: Vec<Endpoint>,
) -> Arc<Service> {
    Arc::new(Service {
        namespace: "default".into(),
        name: name.into(),
        host: format!("{name}.default.svc.cluster.local").into(),
        vips: vips.iter().map(|vip| vip.parse().unwrap()).collect(),
        selector: true,
        ports: vec![ServicePort::everywhere(port, "", endpoints.into())],
        traffic: InternalTraffic::Cluster,
        distribution: None,
        affinity: None,
    })
}

pub(crate) fn node(name: &str, peer: &str) -> (Arc<str>, Node) {
    (name.into(), Node { peers: vec![PeerAddr(peer.parse().unwrap())] })
}

/// What `node-1` knows.
pub(crate) fn snapshot(
    workloads: Vec<Arc<Workload>>,
    services: Vec<Arc<Service>>,
    nodes: Vec<(Arc<str>, Node)>,
) -> Snapshot {
    let nodes = nodes.into_iter().collect::<HashMap<_, _>>();
    let parts = Parts { workloads, services, nodes, ..Parts::default() };
    Snapshot::new(1, "node-1".into(), domain(), parts)
}
