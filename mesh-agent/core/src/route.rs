//! Which service or workload an original destination means.
//!
//! A service address stands for the service's endpoints, a pod address for that pod alone, anything
//! else for a place outside the mesh. The decision needs no name resolution: what the application
//! passed to `connect()` is all that is asked.

use std::net::IpAddr;
use std::sync::Arc;

use crate::addr::{EndpointAddr, OrigDst, PeerAddr};
use crate::locality::InternalTraffic;
use crate::snapshot::{Endpoint, Service, Snapshot, Workload};

/// What an original destination means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// A port of a service; at least one endpoint stands behind it.
    Service {
        /// The service.
        service: Arc<Service>,
        /// Its endpoints in reach of the family the application dialled, or all if that family has
        /// none.
        candidates: Candidates,
    },
    /// A pod, dialled by its own address, as behind a headless service.
    Workload {
        /// The pod.
        workload: Arc<Workload>,
        /// What the application dialled.
        addr: EndpointAddr,
    },
    /// Nothing the mesh knows: goes on from inside the client's pod, in plain text.
    Passthrough,
    /// Cannot be served by anyone.
    Refuse(RouteRefusal),
}

/// A range of a service port's endpoints: shared, so that routing to a service of a thousand
/// endpoints copies none of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidates {
    endpoints: Arc<[Endpoint]>,
    from: usize,
    to: usize,
}

impl Candidates {
    /// The endpoints to choose from.
    pub fn as_slice(&self) -> &[Endpoint] {
        &self.endpoints[self.from..self.to]
    }
}

/// Why a destination in the mesh cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouteRefusal {
    /// The service has no ready endpoint.
    NoEndpoints,
    /// The service means endpoints of the client's node alone, and none is there.
    NoLocalEndpoints,
    /// The service has no TCP port of this number.
    NoSuchPort,
    /// Nobody could tell yet whether it is in the mesh, so it is not reached in plain text either.
    Unread,
}

impl RouteRefusal {
    /// The `reason` label.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NoEndpoints => "no_endpoints",
            Self::NoLocalEndpoints => "no_local_endpoints",
            Self::NoSuchPort => "no_such_port",
            Self::Unread => "unread",
        }
    }
}

/// How an endpoint is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// Through the tunnel to the agent of the endpoint's node, as the workload given.
    Tunnel {
        /// Who must be at the far end.
        workload: Arc<Workload>,
        /// Where its node's agent accepts tunnels, in the order of preference.
        peers: Vec<PeerAddr>,
    },
    /// On this node: authorized and delivered by this agent, without a wire.
    Local {
        /// The destination.
        workload: Arc<Workload>,
    },
    /// Not in the mesh: plain TCP from inside the client's pod.
    Plain,
    /// In the mesh, but its node is not known: never carried in plain text instead.
    NoNode,
}

/// What `dst` means in `snapshot`. A service of which some endpoints are not read yet is those that are:
/// who can wait for the others asks [`Snapshot::is_unread`].
pub fn route(snapshot: &Snapshot, dst: OrigDst) -> Route {
    let ip = dst.0.ip().to_canonical();
    let is_unread = snapshot.is_unread(ip);
    if let Some(service) = snapshot.service_at(ip) {
        let Some(port) = service.port(dst.0.port()) else {
            return Route::Refuse(RouteRefusal::NoSuchPort);
        };
        let is_elsewhere = service.traffic == InternalTraffic::Local && !port.endpoints.is_empty();
        return match candidates(&port.in_reach, ip) {
            Some(candidates) => Route::Service { service: Arc::clone(service), candidates },
            None if is_unread => Route::Refuse(RouteRefusal::Unread),
            None if is_elsewhere => Route::Refuse(RouteRefusal::NoLocalEndpoints),
            None => Route::Refuse(RouteRefusal::NoEndpoints),
        };
    }
    match snapshot.workload_at(ip) {
        _ if is_unread => Route::Refuse(RouteRefusal::Unread),
        Some(workload) => Route::Workload {
            workload: Arc::clone(workload),
            addr: EndpointAddr(crate::addr::canonical(dst.0)),
        },
        None => Route::Passthrough,
    }
}

/// How the node of `snapshot` reaches `workload`; `None` is an address that no pod is known at.
pub fn way(snapshot: &Snapshot, workload: Option<&Arc<Workload>>) -> Way {
    let Some(workload) = workload.filter(|workload| workload.is_enrolled()) else {
        return Way::Plain;
    };
    if workload.node == snapshot.node {
        return Way::Local { workload: Arc::clone(workload) };
    }
    match snapshot.node(&workload.node) {
        Some(node) if !node.peers.is_empty() => {
            Way::Tunnel { workload: Arc::clone(workload), peers: node.peers.clone() }
        }
        _ => Way::NoNode,
    }
}

/// The endpoints of `dialled`'s family, as kube-proxy chooses them; all if there are none of it.
///
/// Endpoints are in address order and every IPv4 address sorts before every IPv6 address
/// (`Ord for IpAddr`), so each family is one range.
fn candidates(endpoints: &Arc<[Endpoint]>, dialled: IpAddr) -> Option<Candidates> {
    let first_v6 = endpoints.partition_point(|endpoint| endpoint.addr.0.is_ipv4());
    let (v4, v6) = ((0, first_v6), (first_v6, endpoints.len()));
    let (own, other) = if dialled.is_ipv4() { (v4, v6) } else { (v6, v4) };
    let (from, to) = if own.0 < own.1 { own } else { other };
    (from < to).then(|| Candidates { endpoints: Arc::clone(endpoints), from, to })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{endpoint, node, service, snapshot, workload};
    use crate::networks::Networks;
    use crate::snapshot::{Parts, ServicePort};

    fn dst(text: &str) -> OrigDst {
        OrigDst(text.parse().unwrap())
    }

    fn addrs(route: &Route) -> Vec<String> {
        match route {
            Route::Service { candidates, .. } => {
                candidates.as_slice().iter().map(|e| e.addr.to_string()).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn service_address_means_its_endpoints_of_the_same_family() {
        let endpoints =
            vec![endpoint("10.0.1.1:80"), endpoint("10.0.1.2:80"), endpoint("[fd00::1]:80")];
        let snapshot = snapshot(
            vec![],
            vec![service("web", &["10.96.0.1", "fd96::1"], 80, endpoints)],
            vec![],
        );

        let v4 = route(&snapshot, dst("10.96.0.1:80"));
        assert_eq!(addrs(&v4), ["10.0.1.1:80", "10.0.1.2:80"]);
        let mapped = route(&snapshot, dst("[::ffff:10.96.0.1]:80"));
        assert_eq!(mapped, v4);
        assert_eq!(addrs(&route(&snapshot, dst("[fd96::1]:80"))), ["[fd00::1]:80"]);
    }

    #[test]
    fn service_of_one_family_serves_the_other() {
        let snapshot = snapshot(
            vec![],
            vec![service("web", &["fd96::1"], 80, vec![endpoint("10.0.1.1:80")])],
            vec![],
        );
        assert_eq!(addrs(&route(&snapshot, dst("[fd96::1]:80"))), ["10.0.1.1:80"]);
    }

    #[test]
    fn service_without_endpoints_or_port_is_refused() {
        let snapshot = snapshot(vec![], vec![service("web", &["10.96.0.1"], 80, vec![])], vec![]);
        let refused = route(&snapshot, dst("10.96.0.1:80"));
        assert_eq!(refused, Route::Refuse(RouteRefusal::NoEndpoints));
        let refused = route(&snapshot, dst("10.96.0.1:81"));
        assert_eq!(refused, Route::Refuse(RouteRefusal::NoSuchPort));
    }

    #[test]
    fn only_endpoints_in_reach_are_meant() {
        let all = vec![endpoint("10.0.1.1:80"), endpoint("10.0.1.2:80"), endpoint("[fd00::1]:80")];
        let mut web = Service::clone(&service("web", &["10.96.0.1", "fd96::1"], 80, all));
        web.ports[0].in_reach = vec![endpoint("10.0.1.2:80")].into();
        let near = snapshot(vec![], vec![Arc::new(web.clone())], vec![]);
        for to in ["10.96.0.1:80", "[fd96::1]:80"] {
            assert_eq!(addrs(&route(&near, dst(to))), ["10.0.1.2:80"], "{to}");
        }
        web.ports[0].in_reach = Arc::new([]);
        web.traffic = InternalTraffic::Local;
        let nobody = snapshot(vec![], vec![Arc::new(web.clone())], vec![]);
        let refused = route(&nobody, dst("10.96.0.1:80"));
        assert_eq!(refused, Route::Refuse(RouteRefusal::NoLocalEndpoints));
        web.ports[0].endpoints = Arc::new([]);
        let nobody_at_all = snapshot(vec![], vec![Arc::new(web)], vec![]);
        let refused = route(&nobody_at_all, dst("10.96.0.1:80"));
        assert_eq!(refused, Route::Refuse(RouteRefusal::NoEndpoints));
    }

    #[test]
    fn pod_address_means_that_pod_and_a_stranger_passes_through() {
        let pod = workload("a", "node-1", &["10.0.1.1"]);
        let snapshot = snapshot(vec![Arc::clone(&pod)], vec![], vec![]);
        let Route::Workload { workload, addr } = route(&snapshot, dst("[::ffff:10.0.1.1]:5432"))
        else {
            panic!("not routed to the pod");
        };
        assert_eq!((workload, addr.to_string()), (pod, "10.0.1.1:5432".to_owned()));
        assert_eq!(route(&snapshot, dst("203.0.113.1:443")), Route::Passthrough);
    }

    #[test]
    fn what_nobody_has_read_yet_is_refused_whatever_else_is_known_of_it() {
        let known = workload("web", "node-1", &["10.0.1.5"]);
        let unread = ["10.96.0.10", "10.0.1.5"].map(|ip| ip.parse().unwrap());
        let trust_domain = known.identity.trust_domain().clone();
        let parts = Parts {
            workloads: vec![known],
            services: vec![service("web", &["10.96.0.10"], 80, vec![])],
            unread: unread.into(),
            ..Parts::default()
        };
        let snapshot = Snapshot::new(1, "node-1".into(), trust_domain, parts);
        for to in ["10.96.0.10:80", "10.0.1.5:80", "[::ffff:10.0.1.5]:80"] {
            let found = route(&snapshot, dst(to));
            assert_eq!(found, Route::Refuse(RouteRefusal::Unread), "{to}");
        }
    }

    #[test]
    fn service_that_is_read_in_part_means_what_is_read() {
        let mut web =
            Service::clone(&service("web", &["10.96.0.1"], 80, vec![endpoint("10.0.1.1:80")]));
        let other = ServicePort { port: 81, in_reach: [].into(), ..web.ports[0].clone() };
        web.ports.push(other);
        let trust_domain = workload("any", "node-1", &[]).identity.trust_domain().clone();
        let parts = Parts {
            services: vec![Arc::new(web)],
            unread: ["10.96.0.1".parse().unwrap()].into(),
            ..Parts::default()
        };
        let snapshot = Snapshot::new(1, "node-1".into(), trust_domain, parts);
        assert_eq!(addrs(&route(&snapshot, dst("10.96.0.1:80"))), ["10.0.1.1:80"]);
        let unread = Route::Refuse(RouteRefusal::Unread);
        assert_eq!(route(&snapshot, dst("10.96.0.1:81")), unread, "none of its endpoints is read");
    }

    #[test]
    fn what_nobody_has_read_in_a_network_of_pods_is_refused_and_what_is_nobodys_passes() {
        let known = workload("web", "node-2", &["10.0.1.5"]);
        let trust_domain = known.identity.trust_domain().clone();
        let parts = Parts {
            workloads: vec![known],
            networks: Networks::new(["10.0.1.0/24".parse().unwrap()], []),
            read: ["10.0.1.7".parse().unwrap()].into(),
            ..Parts::default()
        };
        let snapshot = Snapshot::new(1, "node-1".into(), trust_domain, parts);
        let unread = Route::Refuse(RouteRefusal::Unread);
        assert_eq!(route(&snapshot, dst("10.0.1.6:80")), unread);
        assert_eq!(route(&snapshot, dst("[::ffff:10.0.1.6]:80")), unread);
        assert_eq!(route(&snapshot, dst("10.0.1.7:80")), Route::Passthrough, "nobody's");
        let pod = route(&snapshot, dst("10.0.1.5:80"));
        assert!(matches!(pod, Route::Workload { .. }), "{pod:?}");
    }

    #[test]
    fn way_follows_node_and_enrolment() {
        let here = workload("here", "node-1", &["10.0.1.1"]);
        let there = workload("there", "node-2", &["10.0.2.1"]);
        let lost = workload("lost", "node-3", &["10.0.3.1"]);
        let mut outside = Workload::clone(&workload("outside", "node-2", &["10.0.2.2"]));
        outside.enrolment = crate::snapshot::Enrolment::LeftAlone("not asked for");
        let outside = Arc::new(outside);
        let snapshot = snapshot(vec![], vec![], vec![node("node-2", "192.0.2.2:15019")]);

        assert_eq!(way(&snapshot, Some(&here)), Way::Local { workload: here });
        let peers = vec![PeerAddr("192.0.2.2:15019".parse().unwrap())];
        assert_eq!(way(&snapshot, Some(&there)), Way::Tunnel { workload: there, peers });
        assert_eq!(way(&snapshot, Some(&lost)), Way::NoNode, "never in plain text instead");
        assert_eq!(way(&snapshot, Some(&outside)), Way::Plain);
        assert_eq!(way(&snapshot, None), Way::Plain);
    }
}
