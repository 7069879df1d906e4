//! What the agent knows of the mesh, as one immutable value.
//!
//! A connection takes one `Arc<Snapshot>` when it starts and decides everything from it, so a
//! decision can be replayed from its inputs and no lock is held anywhere. A new state is a new
//! snapshot; a state that is wrong never becomes one.

mod members;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use crate::addr::{Cidr, EndpointAddr, OrigDst};
use crate::networks::{Block, Networks};
use crate::spiffe::TrustDomain;

pub use self::members::{
    Distribution, Endpoint, Enrolment, Node, Service, ServicePort, Workload, WorkloadNames,
    WorkloadUid,
};

/// Everything that decisions are made from.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Grows with every snapshot of this process.
    pub generation: u64,
    /// The node this agent runs on.
    pub node: Arc<str>,
    /// The trust domain of this mesh.
    pub trust_domain: TrustDomain,
    workloads: HashMap<WorkloadUid, Arc<Workload>>,
    by_ip: HashMap<IpAddr, Arc<Workload>>,
    services: HashMap<(Arc<str>, Arc<str>), Arc<Service>>,
    by_vip: HashMap<IpAddr, Arc<Service>>,
    nodes: HashMap<Arc<str>, Node>,
    unread: HashSet<IpAddr>,
    networks: Networks,
    read: HashSet<IpAddr>,
}

/// The parts of a [`Snapshot`], checked by whoever read them.
#[derive(Clone, Debug, Default)]
pub struct Parts {
    /// Every pod.
    pub workloads: Vec<Arc<Workload>>,
    /// Every service.
    pub services: Vec<Arc<Service>>,
    /// Every node by name.
    pub nodes: HashMap<Arc<str>, Node>,
    /// Addresses of services and pods of which nobody has read yet whether they are in the mesh.
    pub unread: HashSet<IpAddr>,
    /// Where pods of other nodes may be that nothing else names. Empty if every pod is known.
    pub networks: Networks,
    /// Addresses in them of which it is known who has them: pods, nodes, or nobody.
    pub read: HashSet<IpAddr>,
}

impl Snapshot {
    /// Indexes `parts`. Where two workloads claim one address the first one keeps it: the caller
    /// reports such a conflict, and an address never means two pods at once.
    pub fn new(generation: u64, node: Arc<str>, trust_domain: TrustDomain, parts: Parts) -> Self {
        let mut by_ip = HashMap::new();
        let mut workloads = HashMap::new();
        for workload in parts.workloads {
            for ip in &workload.ips {
                by_ip.entry(*ip).or_insert_with(|| Arc::clone(&workload));
            }
            workloads.insert(Arc::clone(&workload.uid), workload);
        }
        let mut by_vip = HashMap::new();
        let mut services = HashMap::new();
        for service in parts.services {
            for vip in &service.vips {
                by_vip.entry(*vip).or_insert_with(|| Arc::clone(&service));
            }
            let key = (Arc::clone(&service.namespace), Arc::clone(&service.name));
            services.insert(key, service);
        }
        Self {
            generation,
            node,
            trust_domain,
            workloads,
            by_ip,
            services,
            by_vip,
            nodes: parts.nodes,
            unread: parts.unread,
            networks: parts.networks,
            read: parts.read,
        }
    }

    /// A snapshot in which nothing is known.
    pub fn empty(node: Arc<str>, trust_domain: TrustDomain) -> Self {
        Self::new(0, node, trust_domain, Parts::default())
    }

    /// The pod with this UID.
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The pod at this address.
    pub fn workload_at(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.by_ip.get(&ip.to_canonical())
    }

    /// Every pod, in no order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// The enrolled pods of this node, in no order.
    pub fn local_enrolled(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values().filter(|w| w.node == self.node && w.is_enrolled())
    }

    /// The service with this cluster address.
    pub fn service_at(&self, vip: IpAddr) -> Option<&Arc<Service>> {
        self.by_vip.get(&vip.to_canonical())
    }

    /// The service of this name.
    pub fn service(&self, namespace: &str, name: &str) -> Option<&Arc<Service>> {
        self.services.get(&(namespace.into(), name.into()))
    }

    /// Every service, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// Every endpoint of every service.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.services().flat_map(|service| &service.ports).flat_map(|port| port.endpoints.iter())
    }

    /// The node of this name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// Every node with its name, in no order.
    pub fn nodes(&self) -> impl Iterator<Item = (&Arc<str>, &Node)> {
        self.nodes.iter()
    }

    /// Whether it has still to be read if this address is in the mesh, and where: until then nothing may
    /// be sent there.
    pub fn is_unread(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        self.unread.contains(&ip) || (!self.knows(ip) && self.networks.has(ip))
    }

    /// Whether `to` is an endpoint of the service that `dst` means and only has to be read first: no connection
    /// may be sent there yet, and it is not gone.
    pub fn has_unread_endpoint(&self, dst: OrigDst, to: EndpointAddr) -> bool {
        // Not [`Self::is_unread`]: of what a block has in it no service says anything. And where nothing in reach
        // of this node is unread, nobody reads the rest.
        let is_named = |ip: IpAddr| self.unread.contains(&ip.to_canonical());
        let port = self.service_at(dst.0.ip()).and_then(|service| service.port(dst.0.port()));
        let is_its = port.is_some_and(|port| port.endpoints.iter().any(|one| one.addr == to));
        is_its && is_named(dst.0.ip()) && is_named(to.0.ip())
    }

    fn knows(&self, ip: IpAddr) -> bool {
        self.by_ip.contains_key(&ip) || self.by_vip.contains_key(&ip) || self.read.contains(&ip)
    }

    /// The destinations that belong to the mesh, for the kernel to capture. Anything else stays on
    /// its own path, at no cost.
    ///
    /// - Addresses of enrolled pods, on any node.
    /// - Addresses of services with an enrolled endpoint in this node's reach, and of services that
    ///   select pods and have none in reach: their clients are to be refused at once, with a reason.
    /// - Addresses that services and slices name and that may turn out to be one of these
    ///   ([`Self::is_unread`]); what only a block has in it is in [`Self::captured_blocks`].
    /// - Never the API server's: the mesh must not stand between a pod and what it is configured
    ///   from.
    pub fn captured_destinations(&self) -> HashSet<IpAddr> {
        let pods = self.workloads.values().filter(|w| w.is_enrolled()).flat_map(|w| &w.ips);
        let services = self.services.values().filter(|s| s.is_captured()).flat_map(|s| &s.vips);
        let api_server = self.service("default", "kubernetes").map(|s| s.vips.as_slice());
        let mut all: HashSet<_> = pods.chain(services).chain(&self.unread).copied().collect();
        for vip in api_server.unwrap_or_default() {
            all.remove(vip);
        }
        all
    }

    /// The blocks whose addresses the kernel captures although they are no [`Self::captured_destinations`],
    /// and what it leaves alone in them: what is known, and not of the mesh.
    pub fn captured_blocks(&self) -> HashMap<Cidr, Block> {
        let mut blocks: HashMap<Cidr, Block> = self.networks.blocks().collect();
        if blocks.is_empty() {
            return blocks;
        }
        // In the kernel IPv4 is a part of IPv6, and `::/0` must not mean it.
        let mapped = Ipv4Addr::UNSPECIFIED.to_ipv6_mapped();
        if blocks.keys().any(|block| block.has_v6(mapped)) {
            blocks.entry(Cidr::ALL_V4).or_insert(Block::LeftAlone);
        }
        let captured = self.captured_destinations();
        let known = self.by_ip.keys().chain(self.by_vip.keys()).chain(&self.read);
        let left_alone = known.filter(|ip| !captured.contains(ip) && self.networks.has(**ip));
        blocks.extend(left_alone.map(|ip| (Cidr::from(*ip), Block::LeftAlone)));
        blocks
    }

    /// Whether `other` says the same of the mesh, whatever its generation.
    pub fn same_state(&self, other: &Self) -> bool {
        // `by_vip` and `by_ip` too: they also say who keeps an address that two claim.
        self.node == other.node
            && self.trust_domain == other.trust_domain
            && self.workloads == other.workloads
            && self.by_ip == other.by_ip
            && self.services == other.services
            && self.by_vip == other.by_vip
            && self.nodes == other.nodes
            && self.unread == other.unread
            && self.networks == other.networks
            && self.read == other.read
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::locality::InternalTraffic;
    use crate::settings::Settings;
    use crate::spiffe::SpiffeId;

    fn workload(name: &str, ip: &str, enrolment: Enrolment) -> Arc<Workload> {
        let trust_domain = TrustDomain::new("cluster.local").unwrap();
        Arc::new(Workload {
            uid: name.into(),
            namespace: "default".into(),
            name: name.into(),
            identity: SpiffeId::new(trust_domain, "default", name).unwrap(),
            node: "a".into(),
            ips: vec![ip.parse().unwrap()],
            names: WorkloadNames {
                workload: name.into(),
                app: name.into(),
                version: "unknown".into(),
                canonical_service: name.into(),
                canonical_revision: "latest".into(),
            },
            enrolment,
            settings: Settings::default(),
            provisional: false,
            netns: None,
        })
    }

    fn service(name: &str, vip: &str, selector: bool, pods: &[&Arc<Workload>]) -> Arc<Service> {
        let endpoint = |pod: &&Arc<Workload>| Endpoint {
            addr: EndpointAddr((pod.ips[0], 80).into()),
            workload: Some(Arc::clone(pod)),
        };
        Arc::new(Service {
            namespace: "default".into(),
            name: name.into(),
            host: format!("{name}.default.svc.cluster.local").into(),
            vips: vec![vip.parse().unwrap()],
            ports: vec![ServicePort::everywhere(80, "", pods.iter().map(endpoint).collect())],
            selector,
            traffic: InternalTraffic::Cluster,
            distribution: None,
            affinity: None,
        })
    }

    fn snapshot(workloads: &[&Arc<Workload>], services: Vec<Arc<Service>>) -> Snapshot {
        let workloads = workloads.iter().map(|w| Arc::clone(w)).collect();
        let parts = Parts { workloads, services, ..Parts::default() };
        Snapshot::new(1, "a".into(), TrustDomain::new("cluster.local").unwrap(), parts)
    }

    #[test]
    fn only_what_belongs_to_the_mesh_is_captured() {
        let enrolled = workload("in", "10.0.0.1", Enrolment::Enrolled);
        let outside = workload("out", "10.0.0.2", Enrolment::LeftAlone("not enrolled"));
        let services = vec![
            service("mixed", "10.1.0.1", true, &[&outside, &enrolled]),
            service("outside", "10.1.0.2", true, &[&outside]),
            service("empty", "10.1.0.3", true, &[]),
            service("external", "10.1.0.4", false, &[]),
            service("kubernetes", "10.1.0.5", true, &[&enrolled]),
        ];
        let captured = snapshot(&[&enrolled, &outside], services).captured_destinations();
        let expected = ["10.0.0.1", "10.1.0.1", "10.1.0.3"].map(|ip| ip.parse().unwrap());
        assert_eq!(captured, HashSet::from(expected));
    }

    #[test]
    fn what_is_in_reach_decides_whether_a_service_is_captured() {
        let enrolled = workload("in", "10.0.0.1", Enrolment::Enrolled);
        let outside = workload("out", "10.0.0.2", Enrolment::LeftAlone("not enrolled"));
        let reach = |name, vip, selector, all: &[&Arc<Workload>], near: &[&Arc<Workload>]| {
            let mut found = Service::clone(&service(name, vip, selector, all));
            let near = service(name, vip, selector, near);
            found.ports[0].in_reach = Arc::clone(&near.ports[0].endpoints);
            Arc::new(found)
        };
        let services = vec![
            reach("outside-is-near", "10.1.0.1", true, &[&outside, &enrolled], &[&outside]),
            reach("enrolled-is-near", "10.1.0.2", true, &[&outside, &enrolled], &[&enrolled]),
            reach("nobody-is-near", "10.1.0.3", true, &[&outside], &[]),
            reach("by-hand", "10.1.0.4", false, &[&enrolled], &[]),
            reach("external", "10.1.0.5", false, &[&outside], &[]),
        ];
        let captured = snapshot(&[], services).captured_destinations();
        let expected = ["10.1.0.2", "10.1.0.3", "10.1.0.4"].map(|ip| ip.parse().unwrap());
        assert_eq!(captured, HashSet::from(expected));
    }

    #[test]
    fn what_is_not_read_yet_is_captured_but_for_the_api_server() {
        let api_server = service("kubernetes", "10.1.0.5", false, &[]);
        let unread = ["10.1.0.5", "10.1.0.6", "10.0.0.7"].map(|ip| ip.parse().unwrap());
        let parts = Parts { services: vec![api_server], unread: unread.into(), ..Parts::default() };
        let trust_domain = TrustDomain::new("cluster.local").unwrap();
        let snapshot = Snapshot::new(1, "a".into(), trust_domain.clone(), parts);
        assert_eq!(snapshot.captured_destinations(), HashSet::from([unread[1], unread[2]]));
        assert!(snapshot.is_unread("::ffff:10.0.0.7".parse().unwrap()));
        let read = Snapshot::new(1, "a".into(), trust_domain, Parts::default());
        assert!(!read.is_unread(unread[1]) && !read.same_state(&snapshot));
    }

    #[test]
    fn endpoint_that_is_to_be_read_is_told_from_one_that_is_gone() {
        let [read, unread, other] = ["10.0.0.1", "10.0.0.2", "10.0.0.3"];
        let pods = [read, unread].map(|ip| workload(ip, ip, Enrolment::Enrolled));
        let web = service("web", "10.1.0.1", true, &[&pods[0], &pods[1]]);
        let has = |named: &[&str], dst: &str, to: &str| {
            let parts = Parts {
                services: vec![Arc::clone(&web)],
                unread: named.iter().map(|ip| ip.parse().unwrap()).collect(),
                networks: Networks::new(["10.0.0.0/16".parse().unwrap()], []),
                ..Parts::default()
            };
            let domain = TrustDomain::new("cluster.local").unwrap();
            let snapshot = Snapshot::new(1, "a".into(), domain, parts);
            let to = EndpointAddr((to.parse::<IpAddr>().unwrap(), 80).into());
            snapshot.has_unread_endpoint(OrigDst(dst.parse().unwrap()), to)
        };
        let named = ["10.1.0.1", unread, other];
        assert!(has(&named, "10.1.0.1:80", unread));
        assert!(has(&named, "[::ffff:10.1.0.1]:80", unread));
        assert!(!has(&named, "10.1.0.1:80", read));
        assert!(!has(&named, "10.1.0.1:80", other), "another service's");
        assert!(!has(&named, "10.1.0.1:81", unread), "no port of it");
        assert!(!has(&["10.1.0.1"], "10.1.0.1:80", read), "in a block, and read");
        assert!(!has(&[unread], "10.1.0.1:80", unread), "nobody is going to read it");
    }

    #[test]
    fn whoever_is_in_a_network_of_pods_is_captured_until_it_is_known_to_be_outside() {
        let enrolled = workload("in", "10.0.0.1", Enrolment::Enrolled);
        let outside = workload("out", "10.0.0.2", Enrolment::LeftAlone("not enrolled"));
        let services = vec![
            service("outside", "10.0.9.1", true, &[&outside]),
            service("kubernetes", "10.0.9.2", true, &[&enrolled]),
            service("mesh", "10.0.9.3", true, &[&enrolled]),
        ];
        let cidr = |text: &str| text.parse::<Cidr>().unwrap();
        let networks = || Networks::new([cidr("10.0.0.0/16")], [cidr("10.0.5.0/24")]);
        let parts = |read: &[&str]| Parts {
            workloads: vec![Arc::clone(&enrolled), Arc::clone(&outside)],
            services: services.clone(),
            networks: networks(),
            read: read.iter().map(|ip| ip.parse().unwrap()).collect(),
            ..Parts::default()
        };
        let domain = || TrustDomain::new("cluster.local").unwrap();
        let new = |read: &[&str]| Snapshot::new(1, "a".into(), domain(), parts(read));
        let snapshot = new(&["10.0.0.3", "10.0.5.3"]);
        let unread = |snapshot: &Snapshot, ip: &str| snapshot.is_unread(ip.parse().unwrap());
        for ip in ["10.0.0.4", "::ffff:10.0.0.4"] {
            assert!(unread(&snapshot, ip), "{ip}");
        }
        for ip in ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.5.4", "10.0.9.1", "10.1.0.1"] {
            assert!(!unread(&snapshot, ip), "{ip}");
        }
        let left_alone = ["10.0.5.0/24", "10.0.0.2", "10.0.0.3", "10.0.9.1", "10.0.9.2"];
        let left_alone = left_alone.map(|text| (cidr(text), Block::LeftAlone));
        let mut expected = HashMap::from(left_alone);
        expected.insert(cidr("10.0.0.0/16"), Block::Unread);
        assert_eq!(snapshot.captured_blocks(), expected);
        assert!(!snapshot.same_state(&new(&[])), "who has been read is a part of the state");
        let all = Networks::new([cidr("::/0")], []);
        let all = Parts { networks: all, ..Parts::default() };
        let all = Snapshot::new(1, "a".into(), domain(), all).captured_blocks();
        assert_eq!(all.get(&Cidr::ALL_V4), Some(&Block::LeftAlone), "IPv6 has no IPv4 in it");
    }

    #[test]
    fn same_state_ignores_the_generation_and_nothing_else() {
        let one = workload("one", "10.0.0.1", Enrolment::Enrolled);
        let before = snapshot(&[&one], vec![service("s", "10.1.0.1", true, &[&one])]);
        let mut after = before.clone();
        after.generation += 1;
        assert!(after.same_state(&before));
        let other = snapshot(&[&one], vec![service("s", "10.1.0.1", true, &[])]);
        assert!(!other.same_state(&before));
    }
}
