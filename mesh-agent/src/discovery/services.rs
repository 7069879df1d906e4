//! Services and their EndpointSlices into services with endpoints.

mod slices;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::addr::EndpointAddr;
use mesh_core::locality::{self, Facts, Here, InternalTraffic, Scope, State};
use mesh_core::networks::Networks;
use mesh_core::protocol::Protocol;
use mesh_core::snapshot::{Endpoint, Service, ServicePort, Workload};

use self::slices::{Candidate, Ports, Reader};
pub(super) use self::slices::{absent_at, absent_pod, pod_of};
use super::enrol::Wishes;
use super::kube::{
    EndpointSlice, Service as KubeService, ServicePort as KubeServicePort, ServiceSpec,
};
use super::objects::{NodeIps, ObjectKey};
use super::pods::Pods;
use super::policies::Policies;
use super::translate::missing;
use super::{Problems, Report, shown};

/// Says which service a slice is of.
pub(super) const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// Ports of a Service that count.
const MOST_PORTS: usize = 1024;
/// Endpoints of a Service that are taken, each counted once for each port. A Service of 5,000 pods has places for
/// twenty ports.
const MOST_ENDPOINTS: usize = 100_000;

const WRITE_THE_NAME: &str = "write the name of the Service that these endpoints are of";

/// Where the clients are, and what is around.
#[derive(Clone, Copy, Debug)]
pub(super) struct Around<'a> {
    /// The node of the clients.
    pub(super) node: &'a str,
    /// Each node's zone.
    pub(super) zones: &'a HashMap<&'a str, &'a str>,
    /// What namespaces say.
    pub(super) namespaces: &'a BTreeMap<&'a str, Wishes>,
    /// Whether hints that are missing follow from `trafficDistribution`: where nobody else writes them.
    pub(super) writes_hints: bool,
}

/// Services, and what is not known of them yet.
#[derive(Debug)]
pub(super) struct Services {
    pub(super) services: Vec<Arc<Service>>,
    /// Addresses of those, and of their endpoints, whose pods nobody has read yet; and of every pod whose
    /// namespace has to be known first.
    pub(super) unread: HashSet<IpAddr>,
}

/// What there may be besides the objects at hand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unread<'a> {
    /// Files that could not be read.
    pub(super) files: &'a [String],
    /// Set if pods are read when they are needed: those that were looked for and do not exist.
    pub(super) absent: Option<&'a HashSet<String>>,
    /// Addresses of nodes.
    pub(super) nodes: &'a NodeIps<'a>,
    /// Where pods of other nodes may be.
    pub(super) networks: &'a Networks,
}

/// Makes services of `services`, with the endpoints of `slices` behind them: one after the other, so that what it
/// takes on the way is as much as one service has, and not all of them.
pub(super) fn translate<'a>(
    services: impl Iterator<Item = (&'a ObjectKey, &'a KubeService)>,
    slices: impl Iterator<Item = (&'a ObjectKey, &'a EndpointSlice)>,
    pods: &Pods,
    unread: &Unread<'_>,
    around: &'a Around<'a>,
    problems: &mut Problems,
) -> Services {
    let mut with_slices: BTreeMap<_, _> = services
        .map(|(key, service)| ((&*key.namespace, &*key.name), (key, service, Vec::new())))
        .collect();
    for (key, slice) in slices {
        let label = slice.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME));
        let of = label.and_then(|name| with_slices.get_mut(&(&*key.namespace, name)));
        match of {
            Some((_, _, its)) => its.push((key, slice)),
            // Those of other controllers' services (Multi-Cluster Services) are right as they are, and of a Service that
            // is deleted they are there for a moment.
            None if unread.absent.is_some() => {}
            None => Report::of(key, problems).say(
                format_args!("metadata.labels[\"{SERVICE_NAME}\"]"),
                match label {
                    Some(name) => format!("no Service `{}` in this namespace", shown(name)),
                    None => "is missing, so the slice belongs to no Service".into(),
                },
                match label {
                    Some(_) => missing(unread.files, WRITE_THE_NAME),
                    None => WRITE_THE_NAME.to_owned(),
                },
            ),
        }
    }
    let mut owners = HashMap::new();
    let mut unread_addresses: HashSet<_> = pods.unread().collect();
    let translated = with_slices.into_values().filter_map(|(key, service, slices)| {
        let namespace = around.namespaces.get(&*key.namespace);
        let policies = Policies::read(service, namespace, &mut Report::of(key, problems));
        let spec = service.spec.as_ref()?;
        // A name for another name: DNS answers it, and no address of ours is involved.
        if spec.type_.as_deref() == Some("ExternalName") {
            return None;
        }
        let (mut ports_of_slices, mut left) = (Ports::new(), Some(MOST_ENDPOINTS));
        let declared = declared(spec).map(|port| port.name.as_deref().unwrap_or_default());
        let declared: HashSet<&str> = declared.collect();
        for (of_slice, slice) in slices {
            let mut reader = Reader {
                namespace: &key.namespace,
                hints: policies.distribution.filter(|_| around.writes_hints),
                around,
                is_api_server: (&*key.namespace, &*key.name) == ("default", "kubernetes"),
                pods: (pods, unread),
                declared: &declared,
                ports: &mut ports_of_slices,
                left: &mut left,
            };
            unread_addresses.extend(reader.read(slice, &mut Report::of(of_slice, problems)));
        }
        let mut report = Report::of(key, problems);
        if left.is_none() {
            report.say(
                "spec.ports",
                format_args!(
                    "with its endpoints has more than {MOST_ENDPOINTS}, and the rest is left out"
                ),
                "make several Services of it, each with some of the ports",
            );
        }
        let mut vips = vips(spec, &mut report);
        vips.retain(|vip| claim(*vip, key, &mut owners, pods, &mut report));
        let (ports, is_unread) = ports(spec, (&policies, &ports_of_slices, around), &mut report);
        if is_unread {
            unread_addresses.extend(&vips);
        }
        Some(Arc::new(Service {
            namespace: key.namespace.as_str().into(),
            name: key.name.as_str().into(),
            host: format!("{}.{}.svc.cluster.local", key.name, key.namespace).into(),
            vips,
            ports,
            selector: spec.selects,
            traffic: policies.traffic,
            distribution: policies.distribution,
            affinity: policies.affinity,
        }))
    });
    let services = translated.collect();
    Services { services, unread: unread_addresses }
}

/// The ports that count.
fn declared(spec: &ServiceSpec) -> impl Iterator<Item = &KubeServicePort> {
    spec.ports.iter().flatten().take(MOST_PORTS)
}

fn vips(spec: &ServiceSpec, report: &mut Report<'_>) -> Vec<IpAddr> {
    let texts: Vec<_> = addresses(spec).collect();
    if texts.is_empty() {
        report.say(
            "spec.clusterIP",
            "is missing, so no client can be captured by the service's address",
            "write the address that its name resolves to, or None for a headless service",
        );
    }
    let mut vips = Vec::new();
    for text in texts.into_iter().filter(|text| *text != "None") {
        match text.parse::<IpAddr>() {
            Ok(ip) if vips.contains(&ip.to_canonical()) => {}
            Ok(ip) => vips.push(ip.to_canonical()),
            Err(_not_ip) => report.say(
                "spec.clusterIPs",
                format_args!("`{}` is no address and is left out", shown(text)),
                "write an IPv4 or IPv6 address, or None",
            ),
        }
    }
    vips
}

/// Its own addresses as they are written, or `None`, the text.
pub(super) fn addresses(spec: &ServiceSpec) -> impl Iterator<Item = &str> {
    let many = spec.cluster_ips.iter().flatten().map(String::as_str);
    many.chain(spec.cluster_ip.as_deref()).filter(|ip| !ip.is_empty())
}

/// Whether the service may have this address: the first by name has it alone, and goes before a pod.
fn claim<'a>(
    vip: IpAddr,
    key: &'a ObjectKey,
    owners: &mut HashMap<IpAddr, &'a ObjectKey>,
    pods: &Pods,
    report: &mut Report<'_>,
) -> bool {
    let remedy = "correct the address: it must mean one thing";
    if let Some(pod) = pods.at(vip) {
        let (namespace, name) = (&pod.workload.namespace, &pod.workload.name);
        report.say(
            "spec.clusterIPs",
            format_args!("{vip} is also Pod {namespace}/{name}'s, which is not reached by it"),
            remedy,
        );
    }
    let owner = *owners.entry(vip).or_insert(key);
    if owner != key {
        report.say(
            "spec.clusterIPs",
            format_args!("{vip} is also {owner}'s, which keeps it"),
            remedy,
        );
    }
    owner == key
}

fn ports(
    spec: &ServiceSpec,
    (policies, found, around): (&Policies, &Ports<'_>, &Around<'_>),
    report: &mut Report<'_>,
) -> (Vec<ServicePort>, bool) {
    let mut is_unread = false;
    let not_ready_too = spec.publish_not_ready_addresses.unwrap_or(false);
    let mut ports = Vec::new();
    let beyond = spec.ports.iter().flatten().count().saturating_sub(MOST_PORTS);
    if beyond > 0 {
        report.say(
            "spec.ports",
            format_args!("has {beyond} more than {MOST_PORTS}, which are left out"),
            "make several Services of it",
        );
    }
    for (index, port) in declared(spec).enumerate() {
        if !is_tcp(port.protocol.as_deref()) {
            continue;
        }
        let Some(number) = port_number(port.port) else {
            report.say(
                format_args!("spec.ports[{index}].port"),
                format_args!("{} is no port and is left out", port.port),
                "write a number from 1 to 65535",
            );
            continue;
        };
        let name = port.name.as_deref().unwrap_or_default();
        // The slice's own port number is the answer to `targetPort`, by name or by number.
        let of_port = found.get(name);
        let candidates = of_port.map_or(&[][..], |found| &found.candidates);
        let chosen = choose(candidates, not_ready_too, policies.traffic, around);
        is_unread |= chosen.is_unread;
        let declared = port.app_protocol.as_deref().filter(|text| !text.is_empty());
        let declared = declared.or_else(|| of_port.and_then(|found| found.app_protocol));
        let protocol = match policies.opaque.contains(number) {
            true => Protocol::Opaque,
            false => Protocol::declared(declared, name),
        };
        let Chosen { endpoints, in_reach, scopes, .. } = chosen;
        let name = name.into();
        ports.push(ServicePort { port: number, name, endpoints, in_reach, scopes, protocol });
    }
    (ports, is_unread)
}

/// The endpoints of a port.
struct Chosen {
    endpoints: Arc<[Endpoint]>,
    in_reach: Arc<[Endpoint]>,
    scopes: Vec<Scope>,
    /// One in reach is of a pod that is not read yet.
    is_unread: bool,
}

/// Those that take connections, and of them those that clients here may use: in address order, each
/// address once, since a pod may be in two slices while one is replaced. Who is not read yet counts for
/// how far clients reach, and is not among those that they may use.
fn choose(
    candidates: &[Candidate<'_>],
    not_ready_too: bool,
    traffic: InternalTraffic,
    around: &Around<'_>,
) -> Chosen {
    let here = Here { node: around.node, zone: around.zones.get(around.node).copied() };
    let (mut all, mut in_reach, mut scopes) = (Merged::new(), Merged::new(), Vec::new());
    let (v4, v6): (Vec<_>, Vec<_>) =
        candidates.iter().partition(|candidate| candidate.addr.0.is_ipv4());
    for family in [v4, v6].iter().filter(|family| !family.is_empty()) {
        let facts: Vec<_> = family.iter().map(|one| facts(one, not_ready_too)).collect();
        merge(&mut all, locality::in_service(&facts).into_iter().map(|index| family[index]));
        let (scope, found) = locality::in_reach(&facts, here, traffic);
        merge(&mut in_reach, found.into_iter().map(|index| family[index]));
        if !scopes.contains(&scope) {
            scopes.push(scope);
        }
    }
    let is_unread = in_reach.values().any(|(_, is_unread)| *is_unread);
    in_reach.retain(|_, (_, is_unread)| !*is_unread);
    let is_all = !is_unread && scopes.iter().all(|scope| *scope == Scope::All);
    let endpoints: Arc<[Endpoint]> = endpoints(all);
    let in_reach = if is_all { Arc::clone(&endpoints) } else { self::endpoints(in_reach) };
    Chosen { endpoints, in_reach, scopes, is_unread }
}

fn facts<'a>(candidate: &'a Candidate<'_>, not_ready_too: bool) -> Facts<'a> {
    Facts {
        state: if not_ready_too { State::Ready } else { candidate.state },
        node: candidate.node.or_else(|| candidate.workload.as_deref().map(|pod| &*pod.node)),
        for_nodes: &candidate.for_nodes,
        for_zones: &candidate.for_zones,
    }
}

/// The pod at each address, and whether it is to be read first.
type Merged = BTreeMap<EndpointAddr, (Option<Arc<Workload>>, bool)>;

fn merge<'a>(into: &mut Merged, candidates: impl Iterator<Item = &'a Candidate<'a>>) {
    for candidate in candidates {
        let (workload, is_unread) = into.entry(candidate.addr).or_insert((None, false));
        // Whichever of them knows the pod: the order of slices must not matter.
        *workload = workload.take().or_else(|| candidate.workload.clone());
        *is_unread |= candidate.is_unread;
    }
}

fn endpoints(merged: Merged) -> Arc<[Endpoint]> {
    merged.into_iter().map(|(addr, (workload, _))| Endpoint { addr, workload }).collect()
}

fn is_tcp(protocol: Option<&str>) -> bool {
    protocol.is_none_or(|protocol| protocol == "TCP")
}

fn port_number(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port != 0)
}
