//! EndpointSlices into what a service's ports have behind them, each endpoint joined to its pod.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::addr::EndpointAddr;
use mesh_core::locality::State;
use mesh_core::snapshot::{Distribution, Enrolment, Workload};

use super::{Around, Unread, is_tcp, port_number};
use crate::discovery::enrol::left_alone;
use crate::discovery::kube::{
    Endpoint as KubeEndpoint, EndpointPort, EndpointSlice, Hint, ObjectReference,
};
use crate::discovery::pods::{Found, Pods};
use crate::discovery::{Report, shown};

/// One address of one slice, resolved.
#[derive(Debug)]
pub(super) struct Candidate<'a> {
    pub(super) addr: EndpointAddr,
    pub(super) workload: Option<Arc<Workload>>,
    pub(super) is_unread: bool,
    pub(super) state: State,
    pub(super) node: Option<&'a str>,
    pub(super) for_nodes: Vec<String>,
    pub(super) for_zones: Vec<String>,
}

/// What the slices say of a port.
#[derive(Debug, Default)]
pub(super) struct Port<'a> {
    pub(super) candidates: Vec<Candidate<'a>>,
    /// `appProtocol` of the first slice that has one.
    pub(super) app_protocol: Option<&'a str>,
}

/// The ports of a service by their names.
pub(super) type Ports<'a> = BTreeMap<&'a str, Port<'a>>;

/// What is behind an endpoint.
enum Behind {
    Pod(Arc<Workload>),
    /// No pod, or not the one that is meant.
    Outside,
    /// A pod that is to be read first, or whose namespace is.
    Unread,
    /// A pod that does not exist any more.
    Gone,
}

impl Behind {
    fn of(found: &Found) -> Self {
        match found.is_unread {
            true => Self::Unread,
            false => Self::Pod(Arc::clone(&found.workload)),
        }
    }
}

/// Reads the slices of a service.
pub(super) struct Reader<'a, 'b> {
    /// The service's.
    pub(super) namespace: &'a str,
    /// What hints are made from that a slice does not have.
    pub(super) hints: Option<Distribution>,
    pub(super) around: &'a Around<'a>,
    /// It is the API server's own service: who is behind it is never read from it first.
    pub(super) is_api_server: bool,
    pub(super) pods: (&'b Pods, &'b Unread<'b>),
    /// Names of the ports that the service has: others are of no use.
    pub(super) declared: &'b HashSet<&'b str>,
    pub(super) ports: &'b mut Ports<'a>,
    /// How many more endpoints may be taken, each counted once for each port; `None` when there were more.
    pub(super) left: &'b mut Option<usize>,
}

impl<'a> Reader<'a, '_> {
    /// Returns the addresses whose pods are not read yet.
    pub(super) fn read(
        &mut self,
        slice: &'a EndpointSlice,
        report: &mut Report<'_>,
    ) -> Vec<IpAddr> {
        let mut unread = Vec::new();
        if slice.address_type == "FQDN" {
            return unread; // Names of elsewhere: nothing to carry.
        }
        let declared = self.declared;
        let is_used = |port: &&EndpointPort| {
            is_tcp(port.protocol.as_deref())
                && declared.contains(port.name.as_deref().unwrap_or_default())
        };
        for port in slice.ports.iter().flatten().filter(is_used) {
            let found = self.port(port.name.as_deref());
            let said = port.app_protocol.as_deref().filter(|text| !text.is_empty());
            found.app_protocol = found.app_protocol.or(said);
        }
        for (index, endpoint) in slice.endpoints.iter().flatten().enumerate() {
            let Some(text) = &endpoint.address else { continue };
            let Ok(ip) = text.parse::<IpAddr>() else {
                report.say(
                    format_args!("endpoints[{index}].addresses[0]"),
                    format_args!("`{}` is no address; the endpoint is left out", shown(text)),
                    "write an IPv4 or IPv6 address without port",
                );
                continue;
            };
            let ip = ip.to_canonical();
            let found = behind((index, endpoint), ip, self.namespace, self.pods, report);
            let (workload, is_unread) = match found {
                Behind::Pod(workload) => (Some(workload), false),
                Behind::Outside => (None, false),
                Behind::Unread => (None, !self.is_api_server),
                Behind::Gone => continue,
            };
            if is_unread {
                unread.push(ip);
            }
            let (for_nodes, for_zones) = self.hints(endpoint, workload.as_deref());
            for port in slice.ports.iter().flatten().filter(is_used) {
                let Some(number) = port.port.and_then(port_number) else { continue };
                *self.left = self.left.and_then(|left| left.checked_sub(1));
                if self.left.is_none() {
                    break;
                }
                self.port(port.name.as_deref()).candidates.push(Candidate {
                    addr: EndpointAddr((ip, number).into()),
                    workload: workload.clone(),
                    is_unread,
                    state: state(endpoint),
                    node: endpoint.node_name.as_deref(),
                    for_nodes: for_nodes.clone(),
                    for_zones: for_zones.clone(),
                });
            }
        }
        unread
    }

    fn port(&mut self, name: Option<&'a str>) -> &mut Port<'a> {
        self.ports.entry(name.unwrap_or_default()).or_default()
    }

    /// Whom an endpoint is meant for: as the slice says, or else as the controller of slices would
    /// (`staging/src/k8s.io/endpointslice/trafficdist` in Kubernetes 1.36).
    fn hints(
        &self,
        endpoint: &KubeEndpoint,
        workload: Option<&Workload>,
    ) -> (Vec<String>, Vec<String>) {
        if let Some(hints) = &endpoint.hints {
            let names = |hints: &[Hint]| hints.iter().map(|h| h.name.clone()).collect();
            return (names(&hints.for_nodes), names(&hints.for_zones));
        }
        let Some(wanted) = self.hints else { return Default::default() };
        let node = endpoint.node_name.as_deref().or_else(|| workload.map(|pod| &*pod.node));
        let of_node = node.and_then(|node| self.around.zones.get(node).copied());
        let zone = endpoint.zone.as_deref().or(of_node);
        let owned = |name: Option<&str>| name.map(str::to_owned).into_iter().collect();
        (owned(node.filter(|_| wanted == Distribution::SameNode)), owned(zone))
    }
}

fn state(endpoint: &KubeEndpoint) -> State {
    let conditions = endpoint.conditions.as_ref();
    let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
    let serving = conditions.and_then(|c| c.serving).unwrap_or(ready);
    let terminating = conditions.and_then(|c| c.terminating).unwrap_or(false);
    match (ready, serving && terminating) {
        (true, _) => State::Ready,
        (false, true) => State::Leaving,
        (false, false) => State::Unready,
    }
}

/// The pod that an endpoint names. One without a name is none: nobody could read it.
pub(in crate::discovery) fn pod_of(endpoint: &KubeEndpoint) -> Option<(&str, &ObjectReference)> {
    let target = endpoint.target_ref.as_ref()?;
    let name = target.name.as_deref().filter(|name| !name.is_empty())?;
    (target.kind.as_deref() == Some("Pod")).then_some((name, target))
}

/// Says that this pod was looked for and is not there: by its UID, or where an endpoint does not say that, by its name.
pub(in crate::discovery) fn absent_pod<'a>(
    uid: Option<&'a str>,
    namespace: &str,
    name: &str,
) -> Cow<'a, str> {
    uid.map_or_else(|| format!("{namespace}/{name}").into(), Cow::Borrowed)
}

/// Says that this pod ([`absent_pod`]) was read and does not have this address.
pub(in crate::discovery) fn absent_at(pod: &str, ip: IpAddr) -> String {
    format!("{pod} {ip}")
}

/// The pod behind an endpoint: the one that it names, if that one has the address, and otherwise the
/// one that has the address if it names none. A pod is never joined by name alone: its certificate
/// would be demanded from whoever has the address.
fn behind(
    (index, endpoint): (usize, &KubeEndpoint),
    ip: IpAddr,
    namespace: &str,
    (pods, not_read): (&Pods, &Unread<'_>),
    report: &mut Report<'_>,
) -> Behind {
    let absent = not_read.absent;
    let target = pod_of(endpoint);
    // What shares its node's network is never in the mesh.
    let is_nodes = match target {
        Some(_) => endpoint.node_name.as_deref().is_some_and(|node| not_read.nodes.is_of(node, ip)),
        None => not_read.nodes.has(ip) && !not_read.networks.has(ip),
    };
    let unless_absent = |what: &str| match absent {
        None => Behind::Outside,
        Some(_) if is_nodes => Behind::Outside,
        Some(absent) if absent.contains(what) => Behind::Gone,
        Some(_) => Behind::Unread,
    };
    let Some((target_name, target)) = target else {
        return match (pods.at(ip), unless_absent(&ip.to_string())) {
            (Some(found), _) => Behind::of(found),
            // Nothing says that it is a pod, and it is none.
            (None, Behind::Gone) => Behind::Outside,
            (None, other) => other,
        };
    };
    let target_namespace = target.namespace.as_deref().unwrap_or(namespace);
    let uid = target.uid.as_deref().filter(|uid| !uid.is_empty());
    let meant = absent_pod(uid, target_namespace, target_name);
    let Some(found) = pods.named(target_namespace, target_name) else {
        return unless_absent(&meant);
    };
    if absent.is_some() && uid.is_some_and(|uid| uid != &*found.workload.uid) {
        return unless_absent(&meant);
    }
    if uid.is_some_and(|uid| uid != &*found.workload.uid) {
        report.say(
            format_args!("endpoints[{index}].targetRef.uid"),
            "is not the UID of the pod of that name; the endpoint counts as outside the mesh",
            "the slice or the pod is out of date: read both again",
        );
        return Behind::Outside;
    }
    // Its address may be another pod's by now.
    if found.workload.enrolment == Enrolment::LeftAlone(left_alone::COMPLETED) {
        return Behind::Gone;
    }
    if absent.is_some() && !found.addresses.contains(&ip) {
        // The pod or the slice is the older one: whose sandbox was made anew has another address.
        return match &found.workload.enrolment {
            Enrolment::LeftAlone(reason) if !left_alone::is_passing(reason) => Behind::Outside,
            _ => unless_absent(&absent_at(&meant, ip)),
        };
    }
    if !found.addresses.contains(&ip) {
        report.say(
            format_args!("endpoints[{index}].targetRef"),
            format_args!(
                "the pod {}/{} does not have the address {ip}; the endpoint counts as outside the mesh",
                found.workload.namespace, found.workload.name
            ),
            "correct the endpoint's address or the pod's status.podIPs",
        );
        return Behind::Outside;
    }
    Behind::of(found)
}
