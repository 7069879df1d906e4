//! Why a pod is left alone: what `workloads` shows.

use super::is_system;
use crate::discovery::kube::Pod;

/// Nobody asked.
pub const NOT_ENROLLED: &str = "not enrolled";
/// The pod or its namespace says `disabled`.
pub const DISABLED: &str = "disabled";
/// `hostNetwork: true`: it has no namespace of its own to capture in.
pub const HOST_NETWORK: &str = "shares the node's network";
/// Succeeded or failed: its address may be another pod's by now.
pub const COMPLETED: &str = "completed";
/// A namespace that a cluster cannot do without.
pub const SYSTEM: &str = "system namespace";
/// It has an Istio sidecar.
pub const ISTIO_SIDECAR: &str = "has an Istio sidecar";
/// Istio's ambient mode redirects it.
pub const ISTIO_AMBIENT: &str = "in Istio's ambient mesh";
/// It has a Linkerd proxy.
pub const LINKERD: &str = "has a Linkerd proxy";
/// Its kubelet runs it from a file, and the API has a picture of it only, with another UID than its
/// cgroup's.
pub const STATIC: &str = "static pod";
/// gVisor, or a virtual machine: the node's kernel sees none of its sockets.
pub const OWN_KERNEL: &str = "its runtime class has a kernel of its own";
/// Not scheduled, or no sandbox yet.
pub const NO_ADDRESS: &str = "has no address yet";
/// What its namespace says has not been read yet.
pub const NAMESPACE_UNREAD: &str = "its namespace is not read yet";
/// Two pods claim one address, and another keeps it.
pub const ADDRESS_TAKEN: &str = "its address is another pod's";
/// Standalone: nothing says where its network namespace is.
pub const NO_NETNS: &str = "no network namespace named";

/// Whether a pod that asked may be carried later: it is one of the mesh whose address is not known.
pub(in crate::discovery) fn is_passing(reason: &str) -> bool {
    [NO_ADDRESS, NAMESPACE_UNREAD, ADDRESS_TAKEN].contains(&reason)
}

/// Why a pod that asked cannot be carried.
pub(super) fn unfit(namespace: &str, pod: &Pod) -> Option<&'static str> {
    let annotation = |key: &str| pod.metadata.annotations.as_ref().and_then(|map| map.get(key));
    if is_system(namespace) {
        Some(SYSTEM)
    } else if shares_the_nodes_network(pod) {
        Some(HOST_NETWORK)
    } else if has_completed(pod) {
        Some(COMPLETED)
    } else if has_its_own_kernel(pod) {
        Some(OWN_KERNEL)
    } else if annotation("kubernetes.io/config.mirror").is_some() {
        Some(STATIC)
    } else if annotation("sidecar.istio.io/status").is_some() {
        Some(ISTIO_SIDECAR)
    } else if annotation("ambient.istio.io/redirection").is_some_and(|v| v == "enabled") {
        Some(ISTIO_AMBIENT)
    } else if annotation("linkerd.io/proxy-version").is_some()
        || has_container(pod, "linkerd-proxy")
    {
        Some(LINKERD)
    } else {
        None
    }
}

pub(in crate::discovery) fn shares_the_nodes_network(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false)
}

/// Whether sockets of the pod are not the node's kernel's. By the name of its runtime class, which is all that the pod
/// says of that: those that gVisor and Kata, and the clouds that offer them, give their classes.
fn has_its_own_kernel(pod: &Pod) -> bool {
    let class = pod.spec.as_ref().and_then(|spec| spec.runtime_class_name.as_deref());
    let mut words = class.unwrap_or_default().split(|char: char| !char.is_ascii_alphanumeric());
    words.any(|word| ["gvisor", "runsc", "kata"].contains(&word))
}

pub(in crate::discovery) fn has_completed(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn has_container(pod: &Pod, name: &str) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let init = spec.init_containers.iter().flatten();
    spec.containers.iter().chain(init).any(|container| container.name == name)
}
