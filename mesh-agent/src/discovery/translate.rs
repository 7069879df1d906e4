//! Objects into a snapshot: pure, and the same whatever the order in which objects came.
//!
//! Nothing here fails: what is wrong with one object is a [`Problem`], leaves that object or value
//! out, and touches no other.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::addr::{Cidr, PeerAddr};
use mesh_core::snapshot::{Node, Parts, Snapshot};
use mesh_core::spiffe::TrustDomain;

use super::enrol::{TUNNEL_PORT, Wishes, no_label, parsed, value};
use super::kube::Node as KubeNode;
use super::objects::{Kind, Object, ObjectKey, Objects};
use super::{Problem, Problems, Report, networks, pods, services, shown};

/// Says in which zone a node is.
const ZONE: &str = "topology.kubernetes.io/zone";

/// What a snapshot depends on besides the objects.
#[derive(Clone, Debug)]
pub struct Context {
    /// The node this agent runs on.
    pub node: Arc<str>,
    /// The trust domain of every workload's identity.
    pub trust_domain: TrustDomain,
    /// Where agents accept tunnels, unless their node says otherwise. Default 15019.
    pub tunnel_port: u16,
    /// How a pod's network namespace is found.
    pub netns: NetnsFrom,
    /// Where pods are, besides what nodes say of it; only where not every pod is known.
    pub pod_cidrs: Vec<Cidr>,
}

/// How a pod's network namespace is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetnsFrom {
    /// By the annotation `malla.dev/netns`: standalone, where whoever writes manifests is root.
    Annotation,
    /// By looking at this node's processes: in a cluster, where the annotation means nothing.
    Processes,
}

/// Makes a snapshot of `objects`, and says what is wrong with them, in order.
pub fn translate(
    objects: &Objects,
    context: &Context,
    generation: u64,
) -> (Snapshot, Vec<Problem>) {
    let mut problems = Problems::default();
    let mut namespaces = BTreeMap::new();
    let mut accounts = BTreeSet::new();
    let mut nodes = HashMap::new();
    let mut zones = HashMap::new();
    let (mut kube_pods, mut kube_services, mut slices) = (Vec::new(), Vec::new(), Vec::new());
    for (key, object) in objects.iter() {
        match object {
            Object::Namespace(namespace) => {
                let mut report = Report::of(key, &mut problems);
                let wishes = Wishes::of_namespace(&namespace.metadata, &mut report);
                namespaces.insert(key.name.as_str(), wishes);
            }
            Object::Node(node) => {
                let labels = node.metadata.labels.as_ref();
                if let Some(zone) = labels.and_then(|labels| labels.get(ZONE)) {
                    zones.insert(key.name.as_str(), zone);
                }
                nodes.insert(
                    key.name.as_str().into(),
                    self::node(key, node, context, &mut problems),
                );
            }
            Object::ServiceAccount(_) => {
                accounts.insert((key.namespace.as_str(), key.name.as_str()));
            }
            Object::Pod(pod) => kube_pods.push((key, &**pod)),
            Object::Service(service) => kube_services.push((key, &**service)),
            Object::EndpointSlice(slice) => slices.push((key, &**slice)),
        }
    }
    let pods = pods::translate(
        kube_pods.into_iter(),
        objects,
        &namespaces,
        &accounts,
        context,
        &mut problems,
    );
    let unread = objects.unread();
    let node_ips = objects.node_ips();
    let networks = networks::networks(objects, &context.node, &context.pod_cidrs);
    let services::Services { services, unread: unread_addresses } = services::translate(
        kube_services.into_iter(),
        slices.into_iter(),
        &pods,
        &services::Unread {
            files: unread,
            absent: objects.absent(),
            nodes: &node_ips,
            networks: &networks,
        },
        &services::Around {
            node: &context.node,
            zones: &zones,
            namespaces: &namespaces,
            // In a cluster the controller of slices does, and only what it says is what holds.
            writes_hints: context.netns == NetnsFrom::Annotation,
        },
        &mut problems,
    );
    let workloads = pods.workloads();
    unreachable_pods(&workloads, &nodes, context, unread, &mut problems);
    unknown_networks(objects, context, &mut problems);
    let read = networks::read(objects, &networks, &context.pod_cidrs);
    let parts = Parts { workloads, services, nodes, unread: unread_addresses, networks, read };
    let (node, trust_domain) = (Arc::clone(&context.node), context.trust_domain.clone());
    (Snapshot::new(generation, node, trust_domain, parts), problems.told())
}

/// Addresses of a node that are tried, one after the other.
const MOST_PEERS: usize = 4;

/// Where a node's agent is: its first `InternalIP` addresses, in the order of its status.
fn node(key: &ObjectKey, node: &KubeNode, context: &Context, problems: &mut Problems) -> Node {
    let mut report = Report::of(key, problems);
    let own = value(&node.metadata, TUNNEL_PORT, "a port from 1 to 65535", &mut report, |text| {
        parsed(text).filter(|port| *port != 0)
    });
    let labels = node.metadata.labels.as_ref();
    // Others with our prefix may be there to select nodes by.
    if let Some(text) = labels.and_then(|labels| labels.get(TUNNEL_PORT)) {
        no_label(TUNNEL_PORT, text, &mut report);
    }
    let port = own.unwrap_or(context.tunnel_port);
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let mut peers = Vec::new();
    for address in addresses.filter(|address| address.type_ == "InternalIP") {
        match address.address.parse::<IpAddr>().map(|ip| ip.to_canonical()) {
            // Another agent is at none of these: they mean whoever dials.
            Ok(ip) if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() => report.say(
                "status.addresses",
                format_args!("{ip} is the address of no node and is left out"),
                "write the address at which other nodes reach this one",
            ),
            // Each may cost whoever dials a time-out.
            Ok(_) if peers.len() == MOST_PEERS => {}
            Ok(ip) => peers.push(PeerAddr((ip, port).into())),
            Err(_not_ip) => report.say(
                "status.addresses",
                format_args!("`{}` is no address and is left out", shown(&address.address)),
                "write an IPv4 or IPv6 address without prefix length",
            ),
        }
    }
    if peers.is_empty() {
        report.say(
            "status.addresses",
            "has no InternalIP, so no tunnel leads to this node",
            "add an address of type InternalIP under which its agent is reached",
        );
    }
    Node { peers }
}

/// Enrolled pods of a node that is not described cannot be reached from here.
fn unreachable_pods(
    workloads: &[Arc<mesh_core::snapshot::Workload>],
    nodes: &HashMap<Arc<str>, Node>,
    context: &Context,
    unread: &[String],
    problems: &mut Problems,
) {
    for workload in workloads {
        let here = workload.node == context.node;
        if workload.is_enrolled() && !here && !nodes.contains_key(&workload.node) {
            let (namespace, name) = (workload.namespace.to_string(), workload.name.to_string());
            let key = ObjectKey { kind: Kind::Pod, namespace, name };
            Report::of(&key, problems).say(
                "spec.nodeName",
                format_args!("no Node `{}`, so no tunnel leads to this pod", shown(&workload.node)),
                missing(unread, "add the Node, with an address of type InternalIP"),
            );
        }
    }
}

/// Pods of other nodes are captured by where they may be, if nobody has read them: that has to be known.
fn unknown_networks(objects: &Objects, context: &Context, problems: &mut Problems) {
    let (namespace, name) = (String::new(), context.node.to_string());
    let key = ObjectKey { kind: Kind::Node, namespace, name };
    let mut report = Report::of(&key, problems);
    for (pod, ip) in networks::strays(objects, &context.node, &context.pod_cidrs) {
        let (namespace, name) = (&pod.metadata.namespace, &pod.metadata.name);
        report.say(
            "spec.podCIDRs",
            format_args!(
                "pod {}/{} has the address {ip}, which is in none of the networks of pods: what dials pods of other \
                 nodes by their addresses leaves in plain text until they are known",
                namespace.as_deref().unwrap_or_default(),
                name.as_deref().unwrap_or_default(),
            ),
            "name the networks of all pods in --pod-cidrs (MESH_POD_CIDRS)",
        );
    }
}

/// What to do about an object that is not there: `remedy`, unless it may be in a file that could not be
/// read. Its author would look for a mistake where there is none.
pub(super) fn missing(unread: &[String], remedy: &str) -> String {
    match unread.first() {
        None => remedy.to_owned(),
        Some(place) => format!("correct {place}, which is not read and may hold it, or {remedy}"),
    }
}

#[cfg(test)]
mod policy_tests;
#[cfg(test)]
mod property_tests;
#[cfg(test)]
mod service_tests;
#[cfg(test)]
mod tests;
