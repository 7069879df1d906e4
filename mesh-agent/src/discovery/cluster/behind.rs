//! What has to be read to know what is at an address: by what Services, slices and pods say. No IO.

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::net::IpAddr;

use mesh_core::addr::Cidr;
use mesh_core::networks::Networks;
use mesh_core::spiffe::SpiffeId;

use super::demand::Wanted;
use crate::discovery::kube::{Endpoint, EndpointSlice};
use crate::discovery::networks::{addresses, networks};
use crate::discovery::objects::{Kind, NodeIps, Object, ObjectKey, Objects};
use crate::discovery::services::{self, SERVICE_NAME};

/// Where this is, and where pods are besides what nodes say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Here<'a> {
    pub(super) node: &'a str,
    pub(super) pod_cidrs: &'a [Cidr],
}

/// What has to be read to know what is at `ip`: the pods behind a service's address, or the one behind
/// an endpoint's. Nothing is walked through for an address that nothing names: of those a pod may dial thousands.
pub(super) fn behind(objects: &Objects, here: Here<'_>, ip: IpAddr) -> Vec<Wanted> {
    if !objects.names(ip) {
        return Vec::new();
    }
    let is_ip = |text: &str| text.parse().is_ok_and(|other: IpAddr| other.to_canonical() == ip);
    let mut services = BTreeSet::new();
    for (key, object) in objects.of(Kind::Service) {
        if let Object::Service(service) = object
            && service.spec.as_ref().is_some_and(|spec| services::addresses(spec).any(is_ip))
        {
            services.insert((&*key.namespace, &*key.name));
        }
    }
    let look = Look::new(objects, here);
    let mut wanted = BTreeSet::new();
    for (key, slice) in slices(objects) {
        let of = service_of(slice).map(|name| (&*key.namespace, name));
        let is_of = of.is_some_and(|of| services.contains(&of));
        for endpoint in slice.endpoints.iter().flatten() {
            if is_of || endpoint.address.as_deref().is_some_and(is_ip) {
                wanted.extend(look.missing(&key.namespace, endpoint));
            }
        }
    }
    wanted.into_iter().collect()
}

/// What endpoints are looked at by.
pub(super) struct Look<'a> {
    objects: &'a Objects,
    here: Here<'a>,
    nodes: NodeIps<'a>,
    /// Seldom asked for, and all Nodes are walked through to know.
    networks: OnceCell<Networks>,
}

impl<'a> Look<'a> {
    pub(super) fn new(objects: &'a Objects, here: Here<'a>) -> Self {
        Self { objects, here, nodes: objects.node_ips(), networks: OnceCell::new() }
    }

    /// The pod of an endpoint, if it is not read, or not to have its address. Of whatever the snapshot takes for unread
    /// (`services/slices.rs`) this says what to read, or nobody ever does, and whoever connects to it is refused.
    pub(super) fn missing(&self, namespace: &str, endpoint: &Endpoint) -> Option<Wanted> {
        let ip = endpoint.address.as_ref()?.parse::<IpAddr>().ok()?.to_canonical();
        let on = endpoint.node_name.as_deref();
        let Some(key) = pod_key(endpoint, namespace) else {
            let wanted = Wanted::Address { ip, account: None, node: on.map(str::to_owned) };
            return (!knows(self.objects, ip) && !self.is_nodes(ip)).then_some(wanted);
        };
        // What shares its node's network is never in the mesh.
        if on.is_some_and(|on| self.nodes.is_of(on, ip)) {
            return None;
        }
        let uid = endpoint.target_ref.as_ref().and_then(|target| target.uid.as_deref());
        let uid = uid.filter(|uid| !uid.is_empty()).map(str::to_owned);
        let known = self.objects.get(&key);
        let known = known.filter(|pod| uid.is_none() || uid.as_deref() == uid_of(pod));
        let at = match known {
            Some(pod) if has(pod, ip) => return None,
            Some(_) => Some(ip),
            None => None,
        };
        Some(Wanted::Pod { namespace: key.namespace, name: key.name, uid, at })
    }

    /// Whether it is an address of a node, and of no pod.
    fn is_nodes(&self, ip: IpAddr) -> bool {
        let Here { node, pod_cidrs } = self.here;
        let networks = || self.networks.get_or_init(|| networks(self.objects, node, pod_cidrs));
        self.nodes.has(ip) && !networks().has(ip)
    }
}

/// Whether a pod with this address was read.
pub(super) fn knows(objects: &Objects, ip: IpAddr) -> bool {
    objects.names(ip) && objects.of(Kind::Pod).any(|(_, object)| has(object, ip))
}

/// Whether a pod of this caller's service account with this address was read.
pub(super) fn knows_caller(objects: &Objects, ip: IpAddr, caller: &SpiffeId) -> bool {
    let (namespace, account) = (caller.namespace(), caller.service_account());
    let is_it = |pod: &Object| has(pod, ip) && is_of_account(pod, namespace, account);
    objects.names(ip) && objects.of(Kind::Pod).any(|(_, object)| is_it(object))
}

/// Whether it is a pod of this service account.
pub(super) fn is_of_account(object: &Object, namespace: &str, account: &str) -> bool {
    let Object::Pod(pod) = object else { return false };
    let said = pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_deref());
    object.key().namespace == namespace && said.unwrap_or("default") == account
}

/// Whether this is a pod that has this address for itself: one that has completed has none any more.
pub(super) fn has(object: &Object, ip: IpAddr) -> bool {
    let Object::Pod(pod) = object else { return false };
    addresses(pod).any(|own| own == ip)
}

pub(super) fn slices(objects: &Objects) -> impl Iterator<Item = (&ObjectKey, &EndpointSlice)> {
    objects.of(Kind::EndpointSlice).filter_map(|(key, object)| match object {
        Object::EndpointSlice(slice) => Some((key, &**slice)),
        _ => None,
    })
}

pub(super) fn service_of(slice: &EndpointSlice) -> Option<&str> {
    slice.metadata.labels.as_ref()?.get(SERVICE_NAME)
}

pub(super) fn pod_key(endpoint: &Endpoint, namespace: &str) -> Option<ObjectKey> {
    let (name, target) = services::pod_of(endpoint)?;
    let namespace = target.namespace.as_deref().unwrap_or(namespace);
    Some(ObjectKey { kind: Kind::Pod, namespace: namespace.to_owned(), name: name.to_owned() })
}

fn uid_of(object: &Object) -> Option<&str> {
    match object {
        Object::Pod(pod) => pod.metadata.uid.as_deref(),
        _ => None,
    }
}
