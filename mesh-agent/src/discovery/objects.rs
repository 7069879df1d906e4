//! The objects that a snapshot is made from, by kind and name.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::kube::{EndpointSlice, Namespace, Node, ObjectMeta, Pod, Service, ServiceAccount};
use super::{networks, services};

/// The kinds that are understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `v1` Namespace.
    Namespace,
    /// `v1` Node.
    Node,
    /// `v1` Pod.
    Pod,
    /// `v1` ServiceAccount.
    ServiceAccount,
    /// `v1` Service.
    Service,
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlice,
}

impl Kind {
    /// The kind of that name in that API, if it is understood.
    pub fn of(api_version: &str, kind: &str) -> Option<Self> {
        Some(match (api_version, kind) {
            ("v1", "Namespace") => Self::Namespace,
            ("v1", "Node") => Self::Node,
            ("v1", "Pod") => Self::Pod,
            ("v1", "ServiceAccount") => Self::ServiceAccount,
            ("v1", "Service") => Self::Service,
            ("discovery.k8s.io/v1", "EndpointSlice") => Self::EndpointSlice,
            _ => return None,
        })
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::Pod => "Pod",
            Self::ServiceAccount => "ServiceAccount",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
        }
    }
}

/// Which object: two objects of one key are the same object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// What it is.
    pub kind: Kind,
    /// Empty for what is in no namespace.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.kind.as_str())?;
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)
    }
}

/// One object, typed. Cheap to clone.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// A namespace: carries annotations for its pods.
    Namespace(Arc<Namespace>),
    /// A node: where its agent is reached.
    Node(Arc<Node>),
    /// A pod.
    Pod(Arc<Pod>),
    /// A service account: checks that pods name one that exists.
    ServiceAccount(Arc<ServiceAccount>),
    /// A service.
    Service(Arc<Service>),
    /// Endpoints of a service.
    EndpointSlice(Arc<EndpointSlice>),
}

impl Object {
    /// Which object it is. Without a namespace it is in `default`, as `kubectl` has it.
    pub fn key(&self) -> ObjectKey {
        let (kind, meta, namespaced) = match self {
            Self::Namespace(o) => (Kind::Namespace, &o.metadata, false),
            Self::Node(o) => (Kind::Node, &o.metadata, false),
            Self::Pod(o) => (Kind::Pod, &o.metadata, true),
            Self::ServiceAccount(o) => (Kind::ServiceAccount, &o.metadata, true),
            Self::Service(o) => (Kind::Service, &o.metadata, true),
            Self::EndpointSlice(o) => (Kind::EndpointSlice, &o.metadata, true),
        };
        let namespace = if namespaced { namespace_of(meta).to_owned() } else { String::new() };
        ObjectKey { kind, namespace, name: meta.name.clone().unwrap_or_default() }
    }
}

/// The namespace of a namespaced object.
fn namespace_of(meta: &ObjectMeta) -> &str {
    meta.namespace.as_deref().filter(|name| !name.is_empty()).unwrap_or("default")
}

/// A set of objects, at most one of each key.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Objects {
    all: BTreeMap<ObjectKey, Object>,
    named: Named,
    /// Where there may be more, which could not be read.
    unread: Vec<String>,
    /// Set if pods of other nodes are read when somebody needs them: what was looked for and does not
    /// exist, by UID or address.
    absent: Option<HashSet<String>>,
    /// Addresses that were seen inside of pods of this node, by UID.
    seen: BTreeMap<String, Vec<IpAddr>>,
}

impl Objects {
    /// The pod with this UID was seen to have these addresses. Says whether that is news.
    pub fn see(&mut self, uid: String, ips: Vec<IpAddr>) -> bool {
        let before = self.seen.insert(uid.clone(), ips);
        before.as_ref() != self.seen.get(&uid)
    }

    /// Forgets what was seen of pods that are not here any more.
    pub fn forget_seen(&mut self) {
        let uid = |object: &Object| match object {
            Object::Pod(pod) => pod.metadata.uid.clone(),
            _ => None,
        };
        let here: HashSet<String> = self.all.values().filter_map(uid).collect();
        self.seen.retain(|uid, _ips| here.contains(uid));
    }

    /// What addresses the pod with this UID was seen to have.
    pub fn seen(&self, uid: &str) -> &[IpAddr] {
        self.seen.get(uid).map_or(&[], Vec::as_slice)
    }

    /// Without pods of other nodes, which come when they are needed.
    pub fn on_demand() -> Self {
        Self { absent: Some(HashSet::new()), ..Self::default() }
    }

    /// What was looked for and does not exist, by UID or address; `None` if what is not here does not
    /// exist.
    pub fn absent(&self) -> Option<&HashSet<String>> {
        self.absent.as_ref()
    }

    /// The same, to change it.
    pub fn absent_mut(&mut self) -> Option<&mut HashSet<String>> {
        self.absent.as_mut()
    }

    /// Which addresses nodes say are theirs.
    pub fn node_ips(&self) -> NodeIps<'_> {
        let mut nodes = HashMap::<IpAddr, Vec<&str>>::new();
        for (key, object) in self.of(Kind::Node) {
            let Object::Node(node) = object else { continue };
            let status = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
            for ip in status.filter_map(|address| address.address.parse::<IpAddr>().ok()) {
                nodes.entry(ip.to_canonical()).or_default().push(&key.name);
            }
        }
        NodeIps(nodes)
    }

    /// The object of this key.
    pub fn get(&self, key: &ObjectKey) -> Option<&Object> {
        self.all.get(key)
    }

    /// Adds `object`, and gives back the one of the same key that it replaces.
    pub fn insert(&mut self, object: Object) -> Option<Object> {
        self.named.add(&object);
        let before = self.all.insert(object.key(), object)?;
        self.named.take_away(&before);
        Some(before)
    }

    /// Makes `objects` all that there is of a kind, and says whether that changes anything.
    pub fn replace_all(&mut self, kind: Kind, objects: Vec<Object>) -> bool {
        let wanted: BTreeMap<ObjectKey, Object> =
            objects.into_iter().map(|object| (object.key(), object)).collect();
        let before: Vec<ObjectKey> =
            self.all.keys().filter(|key| key.kind == kind).cloned().collect();
        let mut changed = false;
        for key in before.iter().filter(|key| !wanted.contains_key(key)) {
            self.remove(key);
            changed = true;
        }
        for (key, object) in wanted {
            if self.all.get(&key) != Some(&object) {
                self.insert(object);
                changed = true;
            }
        }
        changed
    }

    /// Takes the object of this key away.
    pub fn remove(&mut self, key: &ObjectKey) -> Option<Object> {
        let object = self.all.remove(key)?;
        self.named.take_away(&object);
        Some(object)
    }

    /// Whether there is one of this key.
    pub fn contains(&self, key: &ObjectKey) -> bool {
        self.all.contains_key(key)
    }

    /// Every object, by kind, namespace and name.
    pub fn iter(&self) -> impl Iterator<Item = (&ObjectKey, &Object)> {
        #[cfg(test)]
        testing::walked();
        self.all.iter()
    }

    /// Those of one kind, by namespace and name.
    pub fn of(&self, kind: Kind) -> impl Iterator<Item = (&ObjectKey, &Object)> {
        #[cfg(test)]
        if kind != Kind::Node {
            testing::walked();
        }
        let first = ObjectKey { kind, namespace: String::new(), name: String::new() };
        self.all.range(first..).take_while(move |(key, _)| key.kind == kind)
    }

    /// Whether any Service, endpoint or pod has this address. Takes as long however many there are.
    pub fn names(&self, ip: IpAddr) -> bool {
        self.named.0.contains_key(&ip.to_canonical())
    }

    /// `place`, a file, could not be read: what is missing may be there.
    pub fn add_unread(&mut self, place: String) {
        self.unread.push(place);
    }

    /// Where there may be more objects, in the order in which it was said.
    pub fn unread(&self) -> &[String] {
        &self.unread
    }
}

/// Which nodes say that an address is theirs. A node's kubelet writes that, so it must not count for what is
/// on another node: who has taken one over would name the pods of others, and have them talked to in plain
/// text.
#[derive(Clone, Debug, Default)]
pub struct NodeIps<'a>(HashMap<IpAddr, Vec<&'a str>>);

impl NodeIps<'_> {
    /// Whether this node says that it has this address.
    pub fn is_of(&self, node: &str, ip: IpAddr) -> bool {
        self.0.get(&ip).is_some_and(|nodes| nodes.contains(&node))
    }

    /// Whether any says so.
    pub fn has(&self, ip: IpAddr) -> bool {
        self.0.contains_key(&ip)
    }
}

impl FromIterator<Object> for Objects {
    fn from_iter<T: IntoIterator<Item = Object>>(objects: T) -> Self {
        let mut all = Self::default();
        for object in objects {
            all.insert(object);
        }
        all
    }
}

/// How often each address is named. Not by which objects: a cluster may have 100,000 endpoints, and only the
/// few that are asked for are looked up.
#[derive(Clone, Debug, Default, PartialEq)]
struct Named(HashMap<IpAddr, u32>);

impl Named {
    fn add(&mut self, object: &Object) {
        for ip in addresses(object) {
            *self.0.entry(ip).or_default() += 1;
        }
    }

    fn take_away(&mut self, object: &Object) {
        for ip in addresses(object) {
            if let Entry::Occupied(mut count) = self.0.entry(ip) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
        }
    }
}

/// A Service's own addresses, those of a slice's endpoints, or a pod's own; one may be there twice.
fn addresses(object: &Object) -> Vec<IpAddr> {
    let ip = |text: &str| Some(text.parse::<IpAddr>().ok()?.to_canonical());
    match object {
        Object::Service(service) => {
            service.spec.iter().flat_map(services::addresses).filter_map(ip).collect()
        }
        Object::EndpointSlice(slice) => {
            let endpoints = slice.endpoints.iter().flatten();
            endpoints.filter_map(|endpoint| ip(endpoint.address.as_deref()?)).collect()
        }
        Object::Pod(pod) => networks::addresses(pod).collect(),
        Object::Namespace(_) | Object::Node(_) | Object::ServiceAccount(_) => Vec::new(),
    }
}

/// What an answer costs, in numbers that are the same on every machine.
#[cfg(test)]
pub(super) mod testing {
    use std::cell::Cell;

    thread_local! {
        static WALKS: Cell<usize> = const { Cell::new(0) };
    }

    pub(super) fn walked() {
        WALKS.set(WALKS.get() + 1);
    }

    /// How often all objects of a kind, other than nodes, were walked through on this thread.
    pub(crate) fn walks() -> usize {
        WALKS.get()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn service(ip: &str) -> Object {
        let spec = json!({"clusterIP": ip, "clusterIPs": [ip]});
        let service = json!({"metadata": {"name": "web"}, "spec": spec});
        Object::Service(Arc::new(serde_json::from_value(service).unwrap()))
    }

    fn slice(ip: &str) -> Object {
        let endpoints = json!([{"addresses": [ip, "10.0.0.99"]}, {"addresses": ["no address"]}]);
        let slice = json!({"metadata": {"name": "web-1"}, "endpoints": endpoints});
        Object::EndpointSlice(Arc::new(serde_json::from_value(slice).unwrap()))
    }

    fn pod(ip: &str, phase: &str) -> Object {
        let status = json!({"phase": phase, "podIPs": [{"ip": ip}]});
        let pod = json!({"metadata": {"name": "one"}, "status": status});
        Object::Pod(Arc::new(serde_json::from_value(pod).unwrap()))
    }

    fn names(objects: &Objects, ip: &str) -> bool {
        objects.names(ip.parse().unwrap())
    }

    #[test]
    fn address_is_named_as_long_as_an_object_has_it() {
        let kinds: [fn(&str) -> Object; 3] = [service, slice, |ip| pod(ip, "Running")];
        for object in kinds {
            let mut objects = Objects::default();
            let first = object("10.0.0.1");
            let kind = first.key().kind;
            objects.insert(first.clone());
            objects.insert(first.clone());
            assert!(names(&objects, "10.0.0.1"), "{kind:?}");
            objects.insert(object("::ffff:10.0.0.2"));
            assert!(!names(&objects, "10.0.0.1"), "{kind:?}");
            assert!(names(&objects, "10.0.0.2") && names(&objects, "::ffff:10.0.0.2"), "{kind:?}");
            assert!(objects.replace_all(kind, vec![first.clone()]));
            assert!(!objects.replace_all(kind, vec![first.clone()]), "{kind:?}");
            assert!(names(&objects, "10.0.0.1") && !names(&objects, "10.0.0.2"), "{kind:?}");
            assert!(objects.replace_all(kind, Vec::new()));
            assert!(!names(&objects, "10.0.0.1"), "{kind:?}");
            let mut collected: Objects = [first.clone(), first.clone()].into_iter().collect();
            assert!(names(&collected, "10.0.0.1"), "{kind:?}");
            collected.remove(&first.key());
            assert_eq!(collected, Objects::default());
        }
    }

    #[test]
    fn address_that_two_have_is_named_until_both_are_gone() {
        let mut objects = Objects::default();
        for object in [slice("10.0.0.1"), pod("10.0.0.1", "Running")] {
            objects.insert(object);
        }
        objects.insert(pod("10.0.0.1", "Succeeded"));
        assert!(names(&objects, "10.0.0.1"), "the endpoint has it");
        assert!(!names(&objects, "10.0.0.99"), "only the first address of an endpoint counts");
        objects.remove(&slice("10.0.0.1").key());
        assert!(!names(&objects, "10.0.0.1"), "it has ended");
    }

    #[test]
    fn objects_of_a_kind_are_all_and_only_those() {
        let at = "10.0.0.1";
        let objects = [service(at), slice(at), pod(at, "Running")];
        let objects: Objects = objects.into_iter().collect();
        for kind in [Kind::Service, Kind::EndpointSlice, Kind::Pod] {
            let found: Vec<Kind> = objects.of(kind).map(|(key, _)| key.kind).collect();
            assert_eq!(found, [kind]);
        }
        assert_eq!(objects.of(Kind::Node).count(), 0);
    }
}
