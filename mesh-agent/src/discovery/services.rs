//! Services and their EndpointSlices into services with endpoints.

use std::collections::{BTreeMap, HashMap};
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
const SERVICE_NAME: &str = "kubernetes.io/service-name";

const WRITE_THE_NAME: &str = "write the name of the Service that these endpoints are of";

/// One address of one slice, resolved.
#[derive(Debug)]
struct Candidate {
    addr: EndpointAddr,
    workload: Option<Arc<Workload>>,
    ready: bool,
    /// Not ready, but still served while the pod terminates.
    leaving: bool,
}

/// Candidates by namespace, service and port name.
type Candidates<'a> = BTreeMap<(&'a str, &'a str, &'a str), Vec<Candidate>>;

/// Makes services of `services`, with the endpoints of `slices` behind them.
pub(super) fn translate<'a>(
    services: impl Iterator<Item = (&'a ObjectKey, &'a KubeService)>,
    slices: impl Iterator<Item = (&'a ObjectKey, &'a EndpointSlice)>,
    pods: &Pods,
    unread: &[String],
    problems: &mut Vec<Problem>,
) -> Vec<Arc<Service>> {
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
                    Some(_) => missing(unread, WRITE_THE_NAME),
                    None => WRITE_THE_NAME.to_owned(),
                },
            );
            continue;
        };
        read_slice(slice, &key.namespace, (namespace, name), pods, &mut candidates, &mut report);
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
        Some(Arc::new(Service {
            namespace: key.namespace.as_str().into(),
            name: key.name.as_str().into(),
            host: format!("{}.{}.svc.cluster.local", key.name, key.namespace).into(),
            vips,
            ports: ports(key, spec, &candidates, &mut report),
            selector: spec.selector.as_ref().is_some_and(|selector| !selector.is_empty()),
        }))
    });
    translated.collect()
}

fn read_slice<'a>(
    slice: &'a EndpointSlice,
    namespace: &str,
    (of_namespace, of_name): (&'a str, &'a str),
    pods: &Pods,
    candidates: &mut Candidates<'a>,
    report: &mut Report<'_>,
) {
    if slice.address_type == "FQDN" {
        return; // Names of elsewhere: nothing to carry.
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
        let workload = behind(endpoint, ip, namespace, &field, pods, report);
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
                ready,
                leaving: serving && terminating,
            });
        }
    }
}

/// The pod behind an endpoint: the one that it names, if that one has the address, and otherwise the
/// one that has the address if it names none. A pod is never joined by name alone: its certificate
/// would be demanded from whoever has the address.
fn behind(
    endpoint: &KubeEndpoint,
    ip: IpAddr,
    namespace: &str,
    field: &str,
    pods: &Pods,
    report: &mut Report<'_>,
) -> Option<Arc<Workload>> {
    let target =
        endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"));
    let Some(target) = target else {
        return pods.at(ip).map(|found| Arc::clone(&found.workload));
    };
    let target_namespace = target.namespace.as_deref().unwrap_or(namespace);
    let found = pods.named(target_namespace, target.name.as_deref().unwrap_or_default())?;
    let uid = target.uid.as_deref().filter(|uid| !uid.is_empty());
    if uid.is_some_and(|uid| uid != &*found.workload.uid) {
        report.say(
            format!("{field}.targetRef.uid"),
            "is not the UID of the pod of that name; the endpoint counts as outside the mesh",
            "the slice or the pod is out of date: read both again",
        );
        return None;
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
        return None;
    }
    Some(Arc::clone(&found.workload))
}

fn vips(spec: &ServiceSpec, report: &mut Report<'_>) -> Vec<IpAddr> {
    let many = spec.cluster_ips.iter().flatten().map(String::as_str);
    let texts: Vec<_> =
        many.chain(spec.cluster_ip.as_deref()).filter(|ip| !ip.is_empty()).collect();
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
) -> Vec<ServicePort> {
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
        let endpoints = choose(of_port.map_or(&[], Vec::as_slice), not_ready_too);
        ports.push(ServicePort { port: number, name: name.into(), endpoints });
    }
    ports
}

/// Ready ones; where there is none, those that still serve while they terminate (as kube-proxy does,
/// KEP-1669). In address order, each address once: a pod may be in two slices while one is replaced.
fn choose(candidates: &[Candidate], not_ready_too: bool) -> Arc<[Endpoint]> {
    let among = |usable: &dyn Fn(&Candidate) -> bool| {
        let mut chosen = BTreeMap::new();
        for candidate in candidates.iter().filter(|candidate| usable(candidate)) {
            let workload = chosen.entry(candidate.addr).or_insert(None);
            // Whichever of them knows the pod: the order of slices must not matter.
            *workload = workload.take().or_else(|| candidate.workload.clone());
        }
        chosen
    };
    let mut chosen = among(&|candidate| candidate.ready || not_ready_too);
    if chosen.is_empty() {
        chosen = among(&|candidate| candidate.leaving);
    }
    chosen.into_iter().map(|(addr, workload)| Endpoint { addr, workload }).collect()
}

fn is_tcp(protocol: Option<&str>) -> bool {
    protocol.is_none_or(|protocol| protocol == "TCP")
}

fn port_number(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port != 0)
}
