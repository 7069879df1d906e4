//! Workloads and services for tests of telemetry and of the admin socket.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use mesh_core::addr::{EndpointAddr, PeerAddr};
use mesh_core::locality::InternalTraffic;
use mesh_core::settings::Settings;
use mesh_core::snapshot::{
    Endpoint, Enrolment, Node, Parts, Service, ServicePort, Snapshot, Workload, WorkloadNames,
};
use mesh_core::spiffe::{SpiffeId, TrustDomain};

use super::logging::reloadable;
use super::{Carrier, ConnectionFacts, Direction, LogLevel, Party, SecurityPolicy, Way};

/// A pod `<name>-0` of Deployment `<name>`, version `v1`.
pub(crate) fn workload(name: &str, node: &str, ip: &str) -> Arc<Workload> {
    let trust_domain = TrustDomain::new("cluster.local").unwrap();
    Arc::new(Workload {
        uid: format!("uid-{name}").into(),
        namespace: "shop".into(),
        name: format!("{name}-0").into(),
        identity: SpiffeId::new(trust_domain, "shop", name).unwrap(),
        node: node.into(),
        ips: vec![ip.parse().unwrap()],
        names: WorkloadNames {
            workload: name.into(),
            app: format!("{name}-app").into(),
            version: "v1".into(),
            canonical_service: format!("{name}-canonical").into(),
            canonical_revision: "v1".into(),
        },
        enrolment: Enrolment::Enrolled,
        settings: Settings::default(),
        provisional: false,
        netns: None,
    })
}

/// Service `<name>` on port 80 with `pods` behind port 8080.
pub(crate) fn service(name: &str, vip: &str, pods: &[&Arc<Workload>]) -> Arc<Service> {
    let endpoint = |pod: &&Arc<Workload>| Endpoint {
        addr: EndpointAddr((pod.ips[0], 8080).into()),
        workload: Some(Arc::clone(pod)),
    };
    Arc::new(Service {
        namespace: "shop".into(),
        name: name.into(),
        host: format!("{name}.shop.svc.cluster.local").into(),
        vips: vec![vip.parse().unwrap()],
        selector: true,
        ports: vec![ServicePort::everywhere(80, "http", pods.iter().map(endpoint).collect())],
        traffic: InternalTraffic::Cluster,
        distribution: None,
        affinity: None,
    })
}

/// `web` on node-1 talks to `api` on node-2.
pub(crate) struct Shop {
    pub(crate) web: Arc<Workload>,
    pub(crate) api: Arc<Workload>,
    pub(crate) service: Arc<Service>,
}

impl Shop {
    pub(crate) fn new() -> Self {
        let web = workload("web", "node-1", "10.0.1.5");
        let api = workload("api", "node-2", "10.0.2.7");
        let service = service("api", "10.96.0.7", &[&api]);
        Self { web, api, service }
    }

    /// What both agents know of a connection through a lane.
    pub(crate) fn facts(&self, direction: Direction) -> ConnectionFacts {
        let source = Party::proven("10.0.1.5:40000".parse().unwrap(), &self.web);
        ConnectionFacts {
            destination: Party::proven("10.0.2.7:8080".parse().unwrap(), &self.api),
            orig_dst: Some(mesh_core::addr::OrigDst("10.96.0.7:80".parse().unwrap())),
            service: Some(Arc::clone(&self.service)),
            peer_node: Some(match direction {
                Direction::Outbound => "node-2".into(),
                Direction::Inbound => "node-1".into(),
            }),
            carrier: Some(Carrier::Lane),
            way: Some(Way::Tunnel),
            security: SecurityPolicy::MutualTls,
            trace_id: 0xfeed,
            path: None,
            ..ConnectionFacts::new(direction, source)
        }
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        snapshot(
            vec![Arc::clone(&self.web), Arc::clone(&self.api)],
            vec![Arc::clone(&self.service)],
        )
    }
}

/// A state seen from node-1.
pub(crate) fn snapshot(workloads: Vec<Arc<Workload>>, services: Vec<Arc<Service>>) -> Snapshot {
    let peer = |text: &str| Node { peers: vec![PeerAddr(text.parse().unwrap())] };
    let nodes = HashMap::from([
        ("node-1".into(), peer("192.0.2.1:15019")),
        ("node-2".into(), peer("192.0.2.2:15019")),
    ]);
    let trust_domain = TrustDomain::new("cluster.local").unwrap();
    let parts = Parts { workloads, services, nodes, ..Parts::default() };
    Snapshot::new(1, "node-1".into(), trust_domain, parts)
}

/// A log level that no subscriber uses. Its filter lives as long as the process, as in production.
pub(crate) fn log_level(level: &str) -> LogLevel {
    let (filter, log_level) = reloadable(level);
    std::mem::forget(filter);
    log_level
}

/// What a thread has written, for another to read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Written(Arc<Mutex<Vec<u8>>>);

impl Written {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl std::io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
