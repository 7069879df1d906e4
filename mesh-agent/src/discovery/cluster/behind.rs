//! What has to be read to know what is at an address: by what Services, slices and pods say. No IO.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::demand::Wanted;
use crate::discovery::kube::{Endpoint, EndpointSlice};
use crate::discovery::networks::addresses;
use crate::discovery::objects::{Kind, NodeIps, Object, ObjectKey, Objects};
use crate::discovery::services::{self, SERVICE_NAME};

/// What has to be read to know what is at `ip`: the pods behind a service's address, or the one behind
/// an endpoint's. Nothing is walked through for an address that nothing names: of those a pod may dial thousands.
pub(super) fn behind(objects: &Objects, node: &str, ip: IpAddr) -> Vec<Wanted> {
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
    let nodes = objects.node_ips();
    let mut wanted = BTreeSet::new();
    for (key, slice) in slices(objects) {
        let of = service_of(slice).map(|name| (&*key.namespace, name));
        let is_of = of.is_some_and(|of| services.contains(&of));
        for endpoint in slice.endpoints.iter().flatten() {
            if is_of || endpoint.address.as_deref().is_some_and(is_ip) {
                wanted.extend(missing(objects, (node, &nodes), &key.namespace, endpoint));
            }
        }
    }
    wanted.into_iter().collect()
}

/// The pod of an endpoint, if it is not read, or not to have its address; those of this node are followed,
/// and those that share their node's network are never in the mesh.
pub(super) fn missing(
    objects: &Objects,
    (node, nodes): (&str, &NodeIps<'_>),
    namespace: &str,
    endpoint: &Endpoint,
) -> Option<Wanted> {
    let ip = endpoint.address.as_ref()?.parse::<IpAddr>().ok()?.to_canonical();
    let on = endpoint.node_name.as_deref();
    if on == Some(node) || on.is_some_and(|on| nodes.is_of(on, ip)) {
        return None;
    }
    let Some(key) = pod_key(endpoint, namespace) else {
        let wanted = Wanted::Address { ip, account: None, node: on.map(str::to_owned) };
        return (!knows(objects, ip) && !nodes.has(ip)).then_some(wanted);
    };
    let uid = endpoint.target_ref.as_ref().and_then(|target| target.uid.as_deref());
    let uid = uid.map(str::to_owned);
    let known = objects.get(&key).filter(|pod| uid.is_none() || uid.as_deref() == uid_of(pod));
    let at = match known {
        Some(pod) if has(pod, ip) => return None,
        Some(_) => Some(ip),
        None => None,
    };
    Some(Wanted::Pod { namespace: key.namespace, name: key.name, uid, at })
}

/// Whether a pod with this address was read.
pub(super) fn knows(objects: &Objects, ip: IpAddr) -> bool {
    objects.names(ip) && objects.of(Kind::Pod).any(|(_, object)| has(object, ip))
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
    let target = endpoint.target_ref.as_ref()?;
    let name = target.name.as_deref().filter(|_| target.kind.as_deref() == Some("Pod"))?;
    let namespace = target.namespace.as_deref().unwrap_or(namespace);
    Some(ObjectKey { kind: Kind::Pod, namespace: namespace.to_owned(), name: name.to_owned() })
}

fn uid_of(object: &Object) -> Option<&str> {
    match object {
        Object::Pod(pod) => pod.metadata.uid.as_deref(),
        _ => None,
    }
}
