//! Services and their EndpointSlices into services with endpoints.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::addr::EndpointAddr;
use mesh_core::snapshot::{Endpoint, Service, ServicePort, Workload};

use super::kube::{Endpoint as KubeEndpoint, EndpointSlice, Service as KubeService, ServiceSpec};
use super::objects::ObjectKey;
use super::pods::Pods;
use super::translate::missing;
use super::{Problem, Report, shown};

/// Says which service a slice is of.
pub(super) const SERVICE_NAME: &str = "kubernetes.io/service-name";

const WRITE_THE_NAME: &str = "write the name of the Service that these endpoints are of";

/// One address of one slice, resolved.
#[derive(Debug)]
struct Candidate {
    addr: EndpointAddr,
    workload: Option<Arc<Workload>>,
    is_unread: bool,
    ready: bool,
    /// Not ready, but still served while the pod terminates.
    leaving: bool,
}

/// Candidates by namespace, service and port name.
type Candidates<'a> = BTreeMap<(&'a str, &'a str, &'a str), Vec<Candidate>>;

/// Services, and what is not known of them yet.
#[derive(Debug)]
pub(super) struct Services {
    pub(super) services: Vec<Arc<Service>>,
    /// Addresses of those, and of their endpoints, whose pods nobody has read yet.
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
    pub(super) nodes: &'a HashSet<IpAddr>,
}

/// What is behind an endpoint.
enum Behind {
    Pod(Arc<Workload>),
    /// No pod, or not the one that is meant.
    Outside,
    /// A pod that is to be read first.
    Unread,
    /// A pod that does not exist any more.
    Gone,
}

/// Makes services of `services`, with the endpoints of `slices` behind them.
pub(super) fn translate<'a>(
    services: impl Iterator<Item = (&'a ObjectKey, &'a KubeService)>,
    slices: impl Iterator<Item = (&'a ObjectKey, &'a EndpointSlice)>,
    pods: &Pods,
    unread: &Unread<'_>,
    problems: &mut Vec<Problem>,
) -> Services {
    let mut unread_addresses = HashSet::new();
    let services: BTreeMap<_, _> =
        services.map(|(key, service)| ((&*key.namespace, &*key.name), (key, service))).collect();
    let mut candidates = Candidates::new();
    for (key, slice) in slices {
        let mut report = Report::of(key.to_string(), problems);
        let label = slice.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME));
        let of = label.and_then(|name| services.get_key_value(&(&*key.namespace, name.as_str())));
        let Some(((namespace, name), _)) = of else {
            report.say(
                format!("metadata.labels[\"{SERVICE_NAME}\"]"),
                match label {
                    Some(name) => format!("no Service `{}` in this namespace", shown(name)),
                    None => "is missing, so the slice belongs to no Service".into(),
                },
                match label {
                    Some(_) => missing(unread.files, WRITE_THE_NAME),
                    None => WRITE_THE_NAME.to_owned(),
                },
            );
            continue;
        };
        let of = (*namespace, *name);
        let pods = (pods, unread);
        for ip in read_slice(slice, &key.namespace, of, pods, &mut candidates, &mut report) {
            unread_addresses.insert(ip);
        }
    }
    let mut owners = HashMap::new();
    let translated = services.values().filter_map(|(key, service)| {
        let spec = service.spec.as_ref()?;
        // A name for another name: DNS answers it, and no address of ours is involved.
        if spec.type_.as_deref() == Some("ExternalName") {
            return None;
        }
        let mut report = Report::of(key.to_string(), problems);
        let mut vips = vips(spec, &mut report);
        vips.retain(|vip| claim(*vip, key, &mut owners, pods, &mut report));
        let (ports, is_unread) = ports(key, spec, &candidates, &mut report);
        if is_unread {
            unread_addresses.extend(&vips);
        }
        Some(Arc::new(Service {
            namespace: key.namespace.as_str().into(),
            name: key.name.as_str().into(),
            host: format!("{}.{}.svc.cluster.local", key.name, key.namespace).into(),
            vips,
            ports,
            selector: spec.selector.as_ref().is_some_and(|selector| !selector.is_empty()),
        }))
    });
    let services = translated.collect();
    Services { services, unread: unread_addresses }
}

/// Returns the addresses whose pods are not read yet.
fn read_slice<'a>(
    slice: &'a EndpointSlice,
    namespace: &str,
    (of_namespace, of_name): (&'a str, &'a str),
    (pods, not_read): (&Pods, &Unread<'_>),
    candidates: &mut Candidates<'a>,
    report: &mut Report<'_>,
) -> Vec<IpAddr> {
    let mut unread = Vec::new();
    if slice.address_type == "FQDN" {
        return unread; // Names of elsewhere: nothing to carry.
    }
    for (index, endpoint) in slice.endpoints.iter().flatten().enumerate() {
        // The API says of more than the first: "consumers should only use the first".
        let Some(text) = endpoint.addresses.first() else { continue };
        let field = format!("endpoints[{index}]");
        let Ok(ip) = text.parse::<IpAddr>() else {
            report.say(
                format!("{field}.addresses[0]"),
                format!("`{}` is no address; the endpoint is left out", shown(text)),
                "write an IPv4 or IPv6 address without port",
            );
            continue;
        };
        let ip = ip.to_canonical();
        let (workload, is_unread) =
            match behind(endpoint, ip, namespace, &field, (pods, not_read), report) {
                Behind::Pod(workload) => (Some(workload), false),
                Behind::Outside => (None, false),
                Behind::Unread => (None, true),
                Behind::Gone => continue,
            };
        if is_unread {
            unread.push(ip);
        }
        let conditions = endpoint.conditions.as_ref();
        let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
        let serving = conditions.and_then(|c| c.serving).unwrap_or(ready);
        let terminating = conditions.and_then(|c| c.terminating).unwrap_or(false);
        for port in slice.ports.iter().flatten().filter(|port| is_tcp(port.protocol.as_deref())) {
            let Some(number) = port.port.and_then(port_number) else { continue };
            let name = port.name.as_deref().unwrap_or_default();
            candidates.entry((of_namespace, of_name, name)).or_default().push(Candidate {
                addr: EndpointAddr((ip, number).into()),
                workload: workload.clone(),
                is_unread,
                ready,
                leaving: serving && terminating,
            });
        }
    }
    unread
}

/// The pod behind an endpoint: the one that it names, if that one has the address, and otherwise the
/// one that has the address if it names none. A pod is never joined by name alone: its certificate
/// would be demanded from whoever has the address.
fn behind(
    endpoint: &KubeEndpoint,
    ip: IpAddr,
    namespace: &str,
    field: &str,
    (pods, not_read): (&Pods, &Unread<'_>),
    report: &mut Report<'_>,
) -> Behind {
    let absent = not_read.absent;
    let unless_absent = |what: &str| match absent {
        None => Behind::Outside,
        // A pod that shares its node's network, which is never in the mesh.
        Some(_) if not_read.nodes.contains(&ip) => Behind::Outside,
        Some(absent) if absent.contains(what) => Behind::Gone,
        Some(_) => Behind::Unread,
    };
    let target =
        endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"));
    let Some(target) = target else {
        return match (pods.at(ip), unless_absent(&ip.to_string())) {
            (Some(found), _) => Behind::Pod(Arc::clone(&found.workload)),
            // Nothing says that it is a pod, and it is none.
            (None, Behind::Gone) => Behind::Outside,
            (None, other) => other,
        };
    };
    let target_namespace = target.namespace.as_deref().unwrap_or(namespace);
    let uid = target.uid.as_deref().filter(|uid| !uid.is_empty());
    let Some(found) = pods.named(target_namespace, target.name.as_deref().unwrap_or_default())
    else {
        return unless_absent(uid.unwrap_or_default());
    };
    if absent.is_some() && uid.is_some_and(|uid| uid != &*found.workload.uid) {
        return unless_absent(uid.unwrap_or_default());
    }
    if uid.is_some_and(|uid| uid != &*found.workload.uid) {
        report.say(
            format!("{field}.targetRef.uid"),
            "is not the UID of the pod of that name; the endpoint counts as outside the mesh",
            "the slice or the pod is out of date: read both again",
        );
        return Behind::Outside;
    }
    if !found.addresses.contains(&ip) {
        report.say(
            format!("{field}.targetRef"),
            format!(
                "the pod {}/{} does not have the address {ip}; the endpoint counts as outside the mesh",
                found.workload.namespace, found.workload.name
            ),
            "correct the endpoint's address or the pod's status.podIPs",
        );
        return Behind::Outside;
    }
    Behind::Pod(Arc::clone(&found.workload))
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
                format!("`{}` is no address and is left out", shown(text)),
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
        let message = format!("{vip} is also Pod {namespace}/{name}'s, which is not reached by it");
        report.say("spec.clusterIPs", message, remedy);
    }
    let owner = *owners.entry(vip).or_insert(key);
    if owner != key {
        let message = format!("{vip} is also {owner}'s, which keeps it");
        report.say("spec.clusterIPs", message, remedy);
    }
    owner == key
}

fn ports(
    key: &ObjectKey,
    spec: &ServiceSpec,
    candidates: &Candidates<'_>,
    report: &mut Report<'_>,
) -> (Vec<ServicePort>, bool) {
    let mut is_unread = false;
    let not_ready_too = spec.publish_not_ready_addresses.unwrap_or(false);
    let mut ports = Vec::new();
    for (index, port) in spec.ports.iter().flatten().enumerate() {
        if !is_tcp(port.protocol.as_deref()) {
            continue;
        }
        let Some(number) = port_number(port.port) else {
            report.say(
                format!("spec.ports[{index}].port"),
                format!("{} is no port and is left out", port.port),
                "write a number from 1 to 65535",
            );
            continue;
        };
        let name = port.name.as_deref().unwrap_or_default();
        // The slice's own port number is the answer to `targetPort`, by name or by number.
        let of_port = candidates.get(&(&*key.namespace, &*key.name, name));
        let (endpoints, some_unread) = choose(of_port.map_or(&[], Vec::as_slice), not_ready_too);
        is_unread |= some_unread;
        ports.push(ServicePort { port: number, name: name.into(), endpoints });
    }
    (ports, is_unread)
}

/// Ready ones; where there is none, those that still serve while they terminate (as kube-proxy does,
/// KEP-1669). In address order, each address once: a pod may be in two slices while one is replaced.
///
/// And whether one of them is of a pod that is not read yet.
fn choose(candidates: &[Candidate], not_ready_too: bool) -> (Arc<[Endpoint]>, bool) {
    let among = |usable: &dyn Fn(&Candidate) -> bool| {
        let mut chosen = BTreeMap::new();
        for candidate in candidates.iter().filter(|candidate| usable(candidate)) {
            let (workload, is_unread) = chosen.entry(candidate.addr).or_insert((None, false));
            // Whichever of them knows the pod: the order of slices must not matter.
            *workload = workload.take().or_else(|| candidate.workload.clone());
            *is_unread |= candidate.is_unread;
        }
        chosen
    };
    let mut chosen = among(&|candidate| candidate.ready || not_ready_too);
    if chosen.is_empty() {
        chosen = among(&|candidate| candidate.leaving);
    }
    let is_unread = chosen.values().any(|(_, is_unread)| *is_unread);
    let endpoints = chosen.into_iter().map(|(addr, (workload, _))| Endpoint { addr, workload });
    (endpoints.collect(), is_unread)
}

fn is_tcp(protocol: Option<&str>) -> bool {
    protocol.is_none_or(|protocol| protocol == "TCP")
}

fn port_number(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port != 0)
}
