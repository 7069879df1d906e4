//! Pods into workloads: names, identity, addresses, enrolment.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use mesh_core::snapshot::{Enrolment, Workload, WorkloadNames};
use mesh_core::spiffe::SpiffeId;

use super::enrol::{
    MESH, NETNS, Wishes, annotation, has_completed, left_alone, shares_the_nodes_network,
    takes_part,
};
use super::kube::{Namespace, ObjectMeta, Pod, PodStatus};
use super::objects::{ObjectKey, Objects};
use super::translate::{Context, NetnsFrom};
use super::{Problems, Report, shown};

/// Every pod, found by name, UID or address.
#[derive(Debug, Default)]
pub(super) struct Pods {
    found: Vec<Found>,
    by_name: HashMap<(String, String), usize>,
    by_ip: HashMap<IpAddr, usize>,
}

#[derive(Debug)]
pub(super) struct Found {
    pub(super) workload: Arc<Workload>,
    /// Where its endpoints may be: its own addresses, or the node's if it shares them.
    pub(super) addresses: Vec<IpAddr>,
    /// Set if its namespace has to be known first: it is no place outside the mesh before.
    pub(super) is_unread: bool,
}

impl Pods {
    pub(super) fn workloads(&self) -> Vec<Arc<Workload>> {
        self.found.iter().map(|found| Arc::clone(&found.workload)).collect()
    }

    pub(super) fn named(&self, namespace: &str, name: &str) -> Option<&Found> {
        let index = self.by_name.get(&(namespace.to_owned(), name.to_owned()))?;
        self.found.get(*index)
    }

    /// The pod that keeps this address.
    pub(super) fn at(&self, ip: IpAddr) -> Option<&Found> {
        self.found.get(*self.by_ip.get(&ip)?)
    }

    /// The addresses of those whose namespaces have to be known first.
    pub(super) fn unread(&self) -> impl Iterator<Item = IpAddr> {
        let unread = self.found.iter().filter(|found| found.is_unread);
        unread.flat_map(|found| found.addresses.iter().copied())
    }

    /// Gives the pod at `index` those of `addresses` that no other has.
    fn claim(
        &mut self,
        index: usize,
        addresses: &[IpAddr],
        report: &mut Report<'_>,
    ) -> Vec<IpAddr> {
        let mut own = Vec::new();
        for ip in addresses {
            if let Some(other) = self.at(*ip) {
                let (namespace, name) = (&other.workload.namespace, &other.workload.name);
                report.say(
                    "status.podIPs",
                    format_args!("{ip} is also Pod {namespace}/{name}'s, which keeps it"),
                    "remove the pod that has gone, or correct the address",
                );
            } else {
                self.by_ip.insert(*ip, index);
                own.push(*ip);
            }
        }
        own
    }
}

/// Makes workloads of `pods`.
pub(super) fn translate<'a>(
    pods: impl Iterator<Item = (&'a ObjectKey, &'a Pod)>,
    objects: &Objects,
    namespaces: &BTreeMap<&str, Wishes>,
    accounts: &BTreeSet<(&str, &str)>,
    context: &Context,
    problems: &mut Problems,
) -> Pods {
    let mut pods: Vec<_> = pods.collect();
    // Who is first keeps a contested address: one that was told before one that was only seen, a pod of this
    // node before one of another, one that stays before one that is going, then the younger, since addresses
    // are handed on; names only make it certain. Those of this node are told by its own kubelet, and followed;
    // others are read now and then, and their kubelets could write the address of any pod of this node to have
    // that one left alone.
    pods.sort_by_key(|(key, pod)| {
        let created = pod.metadata.creation_timestamp;
        let is_going = pod.metadata.deletion_timestamp.is_some();
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
        let is_elsewhere = node != Some(&*context.node);
        (!has_address(pod), is_elsewhere, is_going, Reverse(created), *key)
    });
    let mut this = Pods::default();
    let mut uids = HashMap::new();
    for (key, pod) in pods {
        let mut report = Report::of(key, problems);
        let namespace = namespaces.get(key.namespace.as_str());
        let Some(mut found) = workload(key, pod, namespace, accounts, context, &mut report) else {
            continue;
        };
        if let Some(other) = uids.insert(Arc::clone(&found.uid), key) {
            report.say(
                "metadata.uid",
                format!("is also {other}'s; this pod is left out"),
                "a UID means one pod: remove the copied one",
            );
            uids.insert(Arc::clone(&found.uid), other);
            continue;
        }
        let mut addresses = addresses(pod, &mut report);
        if addresses.is_empty() {
            addresses = objects.seen(&found.uid).to_vec();
            found.provisional = !addresses.is_empty();
        }
        let index = this.found.len();
        let addresses = if has_completed(pod) {
            Vec::new() // They may be another pod's by now.
        } else if shares_the_nodes_network(pod) {
            addresses
        } else {
            found.ips = this.claim(index, &addresses, &mut report);
            if found.ips.is_empty() && found.is_enrolled() {
                found.enrolment = Enrolment::LeftAlone(match addresses.is_empty() {
                    true => left_alone::NO_ADDRESS,
                    false => left_alone::ADDRESS_TAKEN,
                });
            }
            found.ips.clone()
        };
        netns(&mut found, pod, context, &mut report);
        // What is sent to one of this node leaves no node, and it is held back itself meanwhile.
        let is_unread = objects.absent().is_some()
            && found.node != context.node
            && found.enrolment == Enrolment::LeftAlone(left_alone::NAMESPACE_UNREAD)
            && may_take_part(&key.namespace, pod);
        this.by_name.insert((key.namespace.clone(), key.name.clone()), index);
        this.found.push(Found { workload: Arc::new(found), addresses, is_unread });
    }
    this
}

/// The workload without its addresses; `None` if it cannot have an identity.
fn workload(
    key: &ObjectKey,
    pod: &Pod,
    namespace: Option<&Wishes>,
    accounts: &BTreeSet<(&str, &str)>,
    context: &Context,
    report: &mut Report<'_>,
) -> Option<Workload> {
    let spec = pod.spec.as_ref();
    let named = spec
        .and_then(|spec| spec.service_account_name.as_deref().or(spec.service_account.as_deref()));
    let account = named.filter(|name| !name.is_empty()).unwrap_or("default");
    let Ok(identity) = SpiffeId::new(context.trust_domain.clone(), &key.namespace, account) else {
        report.say(
            "spec.serviceAccountName",
            format!("`{}` cannot be part of a SPIFFE ID; the pod is left out", shown(account)),
            "use letters, digits, `.`, `-` and `_` in the names of namespace and service account",
        );
        return None;
    };
    // Sources that do not read service accounts have none, and nothing to compare with.
    let declared = accounts.iter().any(|(namespace, _)| *namespace == key.namespace);
    if account != "default" && declared && !accounts.contains(&(&*key.namespace, account)) {
        report.say(
            "spec.serviceAccountName",
            format!("no ServiceAccount `{}` in this namespace", shown(account)),
            "correct the name or add the ServiceAccount: policies go by it",
        );
    }
    let wishes = Wishes::of_pod(&pod.metadata, report);
    let nothing = Wishes::default();
    // In a cluster there is one, and news of it may come after those of its pod.
    let is_unread = namespace.is_none() && context.netns == NetnsFrom::Processes;
    let namespace = namespace.unwrap_or(&nothing);
    let mut enrolment = wishes.enrolment(namespace, &key.namespace, pod);
    if is_unread && enrolment == Enrolment::LeftAlone(left_alone::NOT_ENROLLED) {
        enrolment = Enrolment::LeftAlone(left_alone::NAMESPACE_UNREAD);
    }
    // A hand-written manifest has no UID, and its name stands in.
    let uid = pod.metadata.uid.clone().filter(|uid| !uid.is_empty());
    let uid = uid.unwrap_or_else(|| format!("{}/{}", key.namespace, key.name));
    Some(Workload {
        uid: uid.into(),
        namespace: key.namespace.as_str().into(),
        name: key.name.as_str().into(),
        identity,
        node: spec.and_then(|spec| spec.node_name.as_deref()).unwrap_or_default().into(),
        ips: Vec::new(),
        names: names(key, pod),
        enrolment,
        settings: wishes.settings(namespace),
        provisional: false,
        netns: None,
    })
}

/// Whether a pod that says nothing of it takes part if its namespace asks for it.
fn may_take_part(namespace: &str, pod: &Pod) -> bool {
    let metadata = ObjectMeta {
        name: Some(namespace.to_owned()),
        annotations: Some([(MESH, "enabled")].into_iter().collect()),
        ..ObjectMeta::default()
    };
    takes_part(&Namespace { metadata }, pod)
}

fn has_address(pod: &Pod) -> bool {
    let told = |status: &PodStatus| status.pod_ips.is_some() || status.pod_ip.is_some();
    pod.status.as_ref().is_some_and(told)
}

/// `status.podIPs`, or the older `status.podIP`, each once.
fn addresses(pod: &Pod, report: &mut Report<'_>) -> Vec<IpAddr> {
    let Some(status) = &pod.status else { return Vec::new() };
    let many = status.pod_ips.iter().flatten().map(|pod_ip| pod_ip.ip.as_str());
    let texts: Vec<_> = many.chain(status.pod_ip.as_deref()).filter(|ip| !ip.is_empty()).collect();
    let mut addresses = Vec::new();
    for text in texts {
        match text.parse::<IpAddr>() {
            Ok(ip) if addresses.contains(&ip.to_canonical()) => {}
            Ok(ip) => addresses.push(ip.to_canonical()),
            Err(_not_ip) => report.say(
                "status.podIPs",
                format_args!("`{}` is no address and is left out", shown(text)),
                "write an IPv4 or IPv6 address without prefix length",
            ),
        }
    }
    addresses
}

/// Standalone, a pod of this node must say where its network namespace is. In a cluster the same
/// annotation would let whoever creates a pod point the agent anywhere, so it means nothing there.
fn netns(workload: &mut Workload, pod: &Pod, context: &Context, report: &mut Report<'_>) {
    if context.netns != NetnsFrom::Annotation || workload.node != context.node {
        return;
    }
    let path = pod.metadata.annotations.as_ref().and_then(|map| map.get(NETNS));
    match path {
        Some(path) if path.starts_with('/') => workload.netns = Some(path.into()),
        _ if !workload.is_enrolled() => {}
        wrong => {
            let message = match wrong {
                Some(path) => {
                    format!("`{}` is no absolute path; the pod is left alone", shown(path))
                }
                None => "is missing; the pod is left alone".into(),
            };
            report.say(annotation(NETNS), message, "name it, such as /run/netns/web");
            workload.enrolment = Enrolment::LeftAlone(left_alone::NO_NETNS);
        }
    }
}

fn names(key: &ObjectKey, pod: &Pod) -> WorkloadNames {
    let labels = pod.metadata.labels.as_ref();
    let label = |names: &[&str]| {
        let found = names.iter().find_map(|name| labels?.get(name).filter(|v| !v.is_empty()));
        found.map(Arc::from)
    };
    let workload: Arc<str> = owner(key, pod).into();
    let app = label(&["app", "app.kubernetes.io/name"]);
    let version = label(&["version", "app.kubernetes.io/version"]);
    WorkloadNames {
        canonical_service: label(&["service.istio.io/canonical-name"])
            .or_else(|| app.clone())
            .unwrap_or_else(|| Arc::clone(&workload)),
        canonical_revision: label(&["service.istio.io/canonical-revision"])
            .or_else(|| version.clone())
            .unwrap_or_else(|| "latest".into()),
        app: app.unwrap_or_else(|| "unknown".into()),
        version: version.unwrap_or_else(|| "unknown".into()),
        workload,
    }
}

/// What people call the workload: the Deployment, not its ReplicaSet of this week; the CronJob, not
/// the Job of this minute.
fn owner(key: &ObjectKey, pod: &Pod) -> String {
    let owners = || pod.metadata.owner_references.iter().flatten();
    let controller = owners().find(|owner| owner.controller == Some(true));
    let Some(owner) = controller.filter(|owner| !owner.name.is_empty()) else {
        return key.name.clone();
    };
    let hash = pod.metadata.labels.as_ref().and_then(|labels| labels.get("pod-template-hash"));
    let stripped = match owner.kind.as_str() {
        "ReplicaSet" => hash.and_then(|hash| owner.name.strip_suffix(hash)?.strip_suffix('-')),
        // A CronJob appends the minute of the epoch.
        "Job" => owner.name.rsplit_once('-').and_then(|(name, minute)| {
            let is_minute = minute.len() >= 8 && minute.bytes().all(|byte| byte.is_ascii_digit());
            is_minute.then_some(name)
        }),
        _ => None,
    };
    stripped.filter(|name| !name.is_empty()).unwrap_or(&owner.name).to_owned()
}
