//! Where pods of other nodes may be that nothing names: no Service selects them, and nobody has read them.
//!
//! Only where pods of other nodes are read when somebody needs them; elsewhere every pod is known.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use mesh_core::addr::Cidr;
use mesh_core::networks::Networks;

use super::enrol::{has_completed, shares_the_nodes_network};
use super::kube::{Node, Pod};
use super::objects::{Kind, Object, Objects};

/// The blocks that a node's pods have their addresses from (`spec.podCIDRs`). A text that is none, which
/// the API does not let in, is left out.
fn blocks(node: &Node) -> impl Iterator<Item = Cidr> {
    let texts = node.spec.iter().flat_map(|spec| spec.pod_cidrs.iter().flatten());
    texts.filter_map(|text| text.parse().ok())
}

fn nodes(objects: &Objects) -> impl Iterator<Item = (&str, &Node)> {
    objects.of(Kind::Node).filter_map(|(key, object)| match object {
        Object::Node(node) => Some((key.name.as_str(), &**node)),
        _ => None,
    })
}

/// The networks of pods, but those of `node`, whose pods are followed: by what nodes say, and `more`, for
/// clusters where they say nothing.
pub(super) fn networks(objects: &Objects, node: &str, more: &[Cidr]) -> Networks {
    if objects.absent().is_none() {
        return Networks::default();
    }
    let of = |is_own: bool| {
        let nodes = nodes(objects).filter(move |(name, _)| (*name == node) == is_own);
        nodes.flat_map(|(_, node)| blocks(node))
    };
    // Where this node's pods are elsewhere, others may be in what it calls its own.
    let own = of(true).filter(|_| strays(objects, node, &[]).next().is_none());
    Networks::new(more.iter().copied().chain(of(false)), own)
}

/// A pod of `node` for each family in which no network of pods has its address, with that address: where this node's
/// are in none, those of others are not either. None while the node is not known.
pub(super) fn strays<'a>(
    objects: &'a Objects,
    node: &str,
    more: &[Cidr],
) -> impl Iterator<Item = (&'a Pod, IpAddr)> {
    let mut own = nodes(objects).filter(|(name, _)| *name == node);
    let own = own.next().filter(|_| objects.absent().is_some());
    let known: Option<Vec<_>> =
        own.map(|(_, own)| blocks(own).chain(more.iter().copied()).collect());
    let here =
        |pod: &Pod| pod.spec.as_ref().is_some_and(|spec| spec.node_name.as_deref() == Some(node));
    let found = |is_v4: bool| {
        let known = known.as_ref()?;
        objects.of(Kind::Pod).find_map(|(_, object)| {
            let Object::Pod(pod) = object else { return None };
            let mut ips = addresses(pod).filter(|ip| ip.is_ipv4() == is_v4 && here(pod));
            let stray = ips.find(|ip| !known.iter().any(|block| block.contains(*ip)))?;
            Some((&**pod, stray))
        })
    };
    [found(true), found(false)].into_iter().flatten()
}

/// The addresses in `networks` of which it is known who has them. Nothing that a node says counts in `more`.
pub(super) fn read(objects: &Objects, networks: &Networks, more: &[Cidr]) -> HashSet<IpAddr> {
    let Some(absent) = objects.absent() else { return HashSet::new() };
    let nobodys = absent.iter().filter_map(|text| text.parse::<IpAddr>().ok());
    let pods = objects.of(Kind::Pod).filter_map(|(_, object)| match object {
        Object::Pod(pod) => Some(&**pod),
        _ => None,
    });
    // A kubelet may also write the blocks of a Node that has none yet.
    let claims = Claims::of(objects);
    let own: HashSet<_> = nodes(objects).flat_map(|(_, node)| own_ips(node)).collect();
    let is_in_more = |ip: IpAddr| more.iter().any(|block| block.contains(ip));
    let own = own.into_iter().filter(|ip| !is_in_more(*ip) && claims.by_one(*ip));
    let all = nobodys.chain(own);
    all.chain(pods.flat_map(addresses)).filter(|ip| networks.has(*ip)).collect()
}

/// Who says that pods have their addresses from which block, for one look at each length of prefix.
struct Claims<'a> {
    /// `None`: several nodes.
    by_block: HashMap<Cidr, Option<&'a str>>,
    lengths: BTreeSet<u8>,
}

impl<'a> Claims<'a> {
    fn of(objects: &'a Objects) -> Self {
        let mut by_block = HashMap::new();
        for (name, node) in nodes(objects) {
            for block in blocks(node) {
                let one = by_block.entry(block).or_insert(Some(name));
                *one = one.filter(|known| *known == name);
            }
        }
        let lengths = by_block.keys().map(Cidr::prefix_len).collect();
        Self { by_block, lengths }
    }

    /// Whether all blocks that `ip` is in are one node's.
    fn by_one(&self, ip: IpAddr) -> bool {
        let lengths = self.lengths.iter();
        let mut found = lengths.filter_map(|length| self.by_block.get(&Cidr::new(ip, *length)));
        found.next().is_some_and(|first| first.is_some() && found.all(|other| other == first))
    }
}

/// The addresses that a node has among those of its pods, such as a bridge's. What it says of others' blocks
/// does not count: see [`NodeIps`](super::objects::NodeIps).
fn own_ips(node: &Node) -> impl Iterator<Item = IpAddr> {
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let ips = addresses.filter_map(|address| address.address.parse::<IpAddr>().ok());
    ips.map(|ip| ip.to_canonical()).filter(|ip| blocks(node).any(|block| block.contains(*ip)))
}

/// The addresses that are this pod's alone.
pub(super) fn addresses(pod: &Pod) -> impl Iterator<Item = IpAddr> {
    let has_own = !has_completed(pod) && !shares_the_nodes_network(pod);
    let status = pod.status.iter().filter(move |_| has_own);
    let ips = status.flat_map(|status| status.pod_ips.iter().flatten());
    ips.filter_map(|ip| ip.ip.parse::<IpAddr>().ok()).map(|ip| ip.to_canonical())
}

/// The node among whose pods one with this address has to be looked for, since the API does not find it
/// by the address: of a pod's addresses it knows the first one alone, which is of the family of the
/// node's first (`sortPodIPs` of the kubelet).
pub(super) fn node_of(objects: &Objects, ip: IpAddr) -> Option<&str> {
    let mut nodes = nodes(objects);
    let (name, node) = nodes.find(|(_, node)| blocks(node).any(|block| block.contains(ip)))?;
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let internal = addresses.filter(|address| address.type_ == "InternalIP");
    let first = internal.filter_map(|address| address.address.parse::<IpAddr>().ok()).next()?;
    (first.to_canonical().is_ipv4() != ip.is_ipv4()).then_some(name)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn node(name: &str, cidrs: &[&str], addresses: &[&str]) -> Object {
        let internal = |address: &&str| json!({"type": "InternalIP", "address": address});
        let addresses: Vec<Value> = addresses.iter().map(internal).collect();
        let node = json!({
            "metadata": {"name": name},
            "spec": {"podCIDR": cidrs.first(), "podCIDRs": cidrs},
            "status": {"addresses": addresses},
        });
        Object::Node(Arc::new(serde_json::from_value(node).unwrap()))
    }

    fn cluster() -> Objects {
        let mut objects = Objects::on_demand();
        objects.insert(node("a", &["10.244.1.0/24", "fd00:1::/64"], &["192.0.2.1", "fd00::1"]));
        let strange = ["10.244.2.0/24", "fd00:2::/64", "none"];
        objects.insert(node("b", &strange, &["192.0.2.2", "fd00::2", "10.244.2.1"]));
        objects.insert(node("c", &[], &["192.0.2.3", "10.244.2.9"]));
        objects
    }

    #[test]
    fn pods_of_other_nodes_may_be_anywhere_in_their_networks_and_those_of_this_node_are_known() {
        let has = |more: &[Cidr], address: &str| networks(&cluster(), "a", more).has(ip(address));
        for address in ["10.244.2.9", "::ffff:10.244.2.9", "fd00:2::9"] {
            assert!(has(&[], address), "{address}");
        }
        for address in ["10.244.1.9", "fd00:1::9", "10.244.3.9", "192.0.2.2"] {
            assert!(!has(&[], address), "{address}");
        }
        let all = ["10.244.0.0/16".parse().unwrap()];
        assert!(has(&all, "10.244.3.9"), "of a node that says nothing");
        assert!(!has(&all, "10.244.1.9"), "this node's");
    }

    #[test]
    fn pod_of_this_node_in_no_network_shows_that_others_are_in_none_either() {
        let mut objects = cluster();
        let stray = |objects: &Objects, more: &[Cidr]| -> Vec<IpAddr> {
            strays(objects, "a", more).map(|(_, ip)| ip).collect()
        };
        for (name, node, ips) in [
            ("known", "a", ["10.244.1.7", "fd00:1::7"]),
            ("stray", "a", ["172.16.0.7", "fd00:1::8"]),
            ("other", "b", ["172.16.0.8", "fd00:9::8"]),
        ] {
            let ips = ips.map(|ip| json!({"ip": ip}));
            let pod = json!({
                "metadata": {"name": name},
                "spec": {"nodeName": node},
                "status": {"phase": "Running", "podIPs": ips},
            });
            objects.insert(Object::Pod(Arc::new(serde_json::from_value(pod).unwrap())));
        }
        assert_eq!(stray(&objects, &[]), [ip("172.16.0.7")]);
        let all = ["172.16.0.0/12", "10.244.0.0/16"].map(|text| text.parse().unwrap());
        assert_eq!(stray(&objects, &all), [] as [IpAddr; 0]);
        assert!(
            networks(&objects, "a", &all).has(ip("10.244.1.9")),
            "it is no block of this node's"
        );
        let all: Objects = objects.iter().map(|(_, object)| object.clone()).collect();
        assert_eq!(stray(&all, &[]), [] as [IpAddr; 0], "every pod is known");
    }

    #[test]
    fn where_every_pod_is_known_there_is_nothing_to_read() {
        let objects: Objects = cluster().iter().map(|(_, object)| object.clone()).collect();
        let networks = networks(&objects, "a", &["10.0.0.0/8".parse().unwrap()]);
        assert_eq!(networks, Networks::default());
    }

    #[test]
    fn who_is_known_is_a_pod_that_still_has_its_address_a_node_or_nobody() {
        let mut objects = cluster();
        for (name, address, phase) in
            [("web", "10.244.2.6", "Running"), ("job", "10.244.2.8", "Succeeded")]
        {
            let pod = json!({
                "metadata": {"name": name},
                "spec": {"nodeName": "b"},
                "status": {"phase": phase, "podIPs": [{"ip": address}]},
            });
            objects.insert(Object::Pod(Arc::new(serde_json::from_value(pod).unwrap())));
        }
        let absent = ["10.244.2.7", "203.0.113.7", "uid-of-a-pod"].map(str::to_owned);
        objects.absent_mut().unwrap().extend(absent);
        let read = read(&objects, &networks(&objects, "a", &[]), &[]);
        // Not what a node says of another's block.
        assert_eq!(read, ["10.244.2.6", "10.244.2.7", "10.244.2.1"].map(ip).into());
    }

    /// Where Nodes have no blocks a kubelet may write some into its own.
    #[test]
    fn block_that_a_node_has_given_itself_makes_no_others_addresses_known() {
        let mut objects = cluster();
        let claimed = ["10.0.0.0/8"];
        objects.insert(node("d", &claimed, &["10.244.2.9", "10.99.0.9", "10.1.0.1"]));
        let known = |more: &[Cidr]| read(&objects, &networks(&objects, "a", more), more);
        let bridge = "10.244.2.1";
        // Its neighbour's bridge is in what it claims, and nobody's word counts there.
        assert_eq!(known(&[]), ["10.99.0.9", "10.1.0.1"].map(ip).into());
        let all: [Cidr; 1] = ["10.99.0.0/16".parse().unwrap()];
        assert_eq!(known(&all), [ip("10.1.0.1")].into());
        assert!(networks(&objects, "a", &all).has(ip(bridge)), "so it is asked about");
    }

    #[test]
    fn second_address_of_a_pod_is_looked_for_on_its_node() {
        let objects = cluster();
        assert_eq!(node_of(&objects, ip("fd00:2::9")), Some("b"));
        assert_eq!(node_of(&objects, ip("10.244.2.9")), None, "the API finds it");
        assert_eq!(node_of(&objects, ip("fd00:3::9")), None, "nobody knows where that is");
    }
}
