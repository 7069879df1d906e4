//! Pods of other nodes: read when somebody needs them, kept while they are used.
//!
//! An EndpointSlice names the pods behind a service; whether they are in the mesh, and as whom, only the
//! pods say. Watching all of them costs what the cluster has; this costs what the node talks to. No IO.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use mesh_core::snapshot::WorkloadUid;
use mesh_core::spiffe::SpiffeId;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::discovery::kube::{Endpoint, EndpointSlice};
use crate::discovery::networks::{addresses, node_of};
use crate::discovery::objects::{Kind, Object, ObjectKey, Objects};
use crate::discovery::services::{self, SERVICE_NAME};

/// A pod that no connection has used for so long is dropped.
const UNUSED: Duration = Duration::from_secs(600);
/// One that is used is read again: nobody tells when its annotations change.
const REFRESH: Duration = Duration::from_secs(300);
/// What was not there may come, or its address be another pod's.
const ABSENT: Duration = Duration::from_secs(60);
/// So many that do not exist are remembered; past it nothing more is looked for by address, since who
/// sends many addresses is up to no good.
const MOST_ABSENT: usize = 4096;
/// A server that failed is not asked for the same again before.
const FAILED: Duration = Duration::from_secs(5);

/// What is to be read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Wanted {
    /// A pod by name.
    Pod {
        namespace: String,
        name: String,
        /// Which one of that name, if the slice says so.
        uid: Option<String>,
    },
    /// Whatever pod has this address.
    Address {
        ip: IpAddr,
        /// The namespace and service account of one that has called from there.
        account: Option<(String, String)>,
        /// Among whose pods it is to be looked for if it cannot be found by the address.
        node: Option<String>,
    },
}

/// What came of it.
#[derive(Debug)]
pub(super) enum Found {
    Pods(Vec<Object>),
    /// There is none, or it is another one by now.
    None,
    Failed(String),
}

/// What was read of other nodes, and who waits for more.
#[derive(Debug, Default)]
pub(super) struct Remote {
    kept: BTreeMap<ObjectKey, Kept>,
    pending: BTreeSet<Wanted>,
    absent: BTreeMap<Wanted, Instant>,
    failed: BTreeMap<Wanted, Instant>,
    waiting: Vec<Waiting>,
}

#[derive(Debug)]
struct Kept {
    wanted: Wanted,
    used: Instant,
    read: Instant,
}

#[derive(Debug)]
struct Waiting {
    wanted: Vec<Wanted>,
    done: oneshot::Sender<u64>,
}

impl Remote {
    /// Somebody wants to know what is at `ip`: returns what is to be read for it now.
    pub(super) fn need(
        &mut self,
        objects: &Objects,
        node: &str,
        (ip, caller): (IpAddr, Option<&SpiffeId>),
        done: oneshot::Sender<u64>,
        now: Instant,
    ) -> Vec<Wanted> {
        let mut wanted: Vec<Wanted> = behind(objects, node, ip);
        // A pod that is gone says nothing of who has its address now.
        wanted.retain(|wanted| !self.absent.contains_key(wanted));
        let has_place = self.absent.len() + self.pending.len() < MOST_ABSENT;
        if wanted.is_empty() && has_place && !knows(objects, ip) {
            let account = |id: &SpiffeId| (id.namespace().into(), id.service_account().into());
            let node = node_of(objects, ip).map(str::to_owned);
            wanted.push(Wanted::Address { ip, account: caller.map(account), node });
        }
        let to_read = self.begin(wanted.iter().cloned(), now);
        wanted.retain(|wanted| self.pending.contains(wanted));
        self.waiting.push(Waiting { wanted, done });
        to_read
    }

    /// Those of `wanted` that are not being read, and have not just been asked for in vain.
    fn begin(&mut self, wanted: impl Iterator<Item = Wanted>, now: Instant) -> Vec<Wanted> {
        self.failed.retain(|_, since| now.duration_since(*since) < FAILED);
        wanted
            .filter(|wanted| {
                !self.absent.contains_key(wanted)
                    && !self.failed.contains_key(wanted)
                    && self.pending.insert(wanted.clone())
            })
            .collect()
    }

    /// Takes what was read into `objects`, and says whether that changes anything.
    pub(super) fn take(
        &mut self,
        objects: &mut Objects,
        node: &str,
        wanted: Wanted,
        found: Found,
        now: Instant,
    ) -> bool {
        self.pending.remove(&wanted);
        match found {
            Found::Failed(_why) => {
                self.failed.insert(wanted, now);
                false
            }
            Found::None => {
                self.absent.insert(wanted.clone(), now);
                let key = self.kept.iter().find(|(_, kept)| kept.wanted == wanted);
                let key = key.map(|(key, _)| key.clone());
                let was_there = key.is_some_and(|key| {
                    self.kept.remove(&key);
                    objects.remove(&key).is_some()
                });
                was_there | self.tell_absent(objects)
            }
            Found::Pods(pods) => {
                let mut changed = self.absent.remove(&wanted).is_some();
                changed |= self.replaced(objects, &wanted, &pods);
                for pod in pods {
                    let key = pod.key();
                    // Those of this node are followed, and what that tells is newer.
                    if is_on(&pod, node) {
                        continue;
                    }
                    let used = self.kept.get(&key).map_or(now, |kept| kept.used);
                    self.kept.insert(key, Kept { wanted: wanted.clone(), used, read: now });
                    changed |= objects.insert(pod.clone()).as_ref() != Some(&pod);
                }
                changed | self.tell_absent(objects)
            }
        }
    }

    /// Drops whoever had what was looked for, if somebody else has it now.
    fn replaced(&mut self, objects: &mut Objects, wanted: &Wanted, pods: &[Object]) -> bool {
        let stays: HashSet<ObjectKey> = pods.iter().map(Object::key).collect();
        let mut changed = false;
        let is_over =
            |key: &ObjectKey, kept: &mut Kept| kept.wanted == *wanted && !stays.contains(key);
        for (key, _) in self.kept.extract_if(.., is_over) {
            changed |= objects.remove(&key).is_some();
        }
        changed
    }

    fn tell_absent(&self, objects: &mut Objects) -> bool {
        let absent: HashSet<String> = self
            .absent
            .keys()
            .filter_map(|wanted| match wanted {
                Wanted::Pod { uid, .. } => uid.clone(),
                Wanted::Address { ip, .. } => Some(ip.to_string()),
            })
            .collect();
        let Some(before) = objects.absent_mut() else { return false };
        let changed = *before != absent;
        *before = absent;
        changed
    }

    /// Answers those who have waited for nothing that is still being read, now that `generation` says
    /// what there is.
    pub(super) fn answer(&mut self, generation: u64) {
        for waiting in self.waiting.extract_if(.., |waiting| {
            !waiting.wanted.iter().any(|wanted| self.pending.contains(wanted))
        }) {
            // Gone, and with it the need.
            waiting.done.send(generation).ok();
        }
    }

    /// These are used, and whoever has one of these addresses.
    pub(super) fn used(
        &mut self,
        objects: &Objects,
        uids: &[WorkloadUid],
        ips: &[IpAddr],
        now: Instant,
    ) {
        let uids: HashSet<&str> = uids.iter().map(|uid| &**uid).collect();
        let ips: HashSet<&IpAddr> = ips.iter().collect();
        for (key, kept) in &mut self.kept {
            let Some(Object::Pod(pod)) = objects.get(key) else { continue };
            let is_meant = pod.metadata.uid.as_deref().is_some_and(|uid| uids.contains(uid));
            if is_meant || addresses(pod).any(|ip| ips.contains(&ip)) {
                kept.used = now;
            }
        }
    }

    /// Drops what is not used any more, and says whether that changes anything.
    pub(super) fn expire(&mut self, objects: &mut Objects, now: Instant) -> bool {
        let unused = |_: &ObjectKey, kept: &mut Kept| now.duration_since(kept.used) >= UNUSED;
        let mut changed = false;
        for (key, _) in self.kept.extract_if(.., unused) {
            changed |= objects.remove(&key).is_some();
        }
        let before = self.absent.len();
        self.absent.retain(|_, since| now.duration_since(*since) < ABSENT);
        if self.absent.len() != before {
            changed |= self.tell_absent(objects);
        }
        changed
    }

    /// What is to be read although nobody waits for it: again what is used, and what has come to a
    /// service of which something is used.
    pub(super) fn prefetch(&mut self, objects: &Objects, node: &str, now: Instant) -> Vec<Wanted> {
        let old = self.kept.values().filter(|kept| now.duration_since(kept.read) >= REFRESH);
        let mut wanted: Vec<Wanted> = old.map(|kept| kept.wanted.clone()).collect();
        let is_kept = |endpoint: &Endpoint, namespace: &str| {
            pod_key(endpoint, namespace).is_some_and(|key| self.kept.contains_key(&key))
        };
        let nodes = objects.node_ips();
        let used: BTreeSet<_> = slices(objects)
            .filter(|(key, slice)| {
                let mut endpoints = slice.endpoints.iter().flatten();
                endpoints.any(|endpoint| is_kept(endpoint, &key.namespace))
            })
            .filter_map(|(key, slice)| Some((&*key.namespace, service_of(slice)?)))
            .collect();
        for (key, slice) in slices(objects) {
            if service_of(slice).is_some_and(|name| used.contains(&(&*key.namespace, name))) {
                let endpoints = slice.endpoints.iter().flatten();
                wanted.extend(
                    endpoints
                        .filter_map(|one| missing(objects, (node, &nodes), &key.namespace, one)),
                );
            }
        }
        self.begin(wanted.into_iter(), now)
    }

    /// Whether this pod is one that was read.
    pub(super) fn keeps(&self, key: &ObjectKey) -> bool {
        self.kept.contains_key(key)
    }

    /// It is followed from now on, or was replaced.
    pub(super) fn forget(&mut self, key: &ObjectKey) {
        self.kept.remove(key);
    }
}

/// What has to be read to know what is at `ip`: the pods behind a service's address, or the one behind
/// an endpoint's.
fn behind(objects: &Objects, node: &str, ip: IpAddr) -> Vec<Wanted> {
    let is_ip = |text: &str| text.parse().is_ok_and(|other: IpAddr| other.to_canonical() == ip);
    let mut services = BTreeSet::new();
    for (key, object) in objects.iter() {
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
            if is_of || endpoint.addresses.first().is_some_and(|address| is_ip(address)) {
                wanted.extend(missing(objects, (node, &nodes), &key.namespace, endpoint));
            }
        }
    }
    wanted.into_iter().collect()
}

/// The pod of an endpoint, if it is not read; those of this node are followed, and those that share
/// their node's network are never in the mesh.
fn missing(
    objects: &Objects,
    (node, nodes): (&str, &HashSet<IpAddr>),
    namespace: &str,
    endpoint: &Endpoint,
) -> Option<Wanted> {
    let ip = endpoint.addresses.first()?.parse::<IpAddr>().ok()?.to_canonical();
    if endpoint.node_name.as_deref() == Some(node) || nodes.contains(&ip) {
        return None;
    }
    let Some(key) = pod_key(endpoint, namespace) else {
        let wanted = Wanted::Address { ip, account: None, node: None };
        return (!knows(objects, ip)).then_some(wanted);
    };
    let uid = endpoint.target_ref.as_ref().and_then(|target| target.uid.clone());
    let known = uid_of(objects, &key);
    let is_it = known.is_some() && (uid.is_none() || uid.as_deref() == known);
    (!is_it).then_some(Wanted::Pod { namespace: key.namespace, name: key.name, uid })
}

/// Whether a pod with this address was read.
fn knows(objects: &Objects, ip: IpAddr) -> bool {
    objects.iter().any(|(_, object)| has(object, ip))
}

/// Whether this is a pod that has this address for itself: one that has completed has none any more.
pub(super) fn has(object: &Object, ip: IpAddr) -> bool {
    let Object::Pod(pod) = object else { return false };
    addresses(pod).any(|own| own == ip)
}

fn slices(objects: &Objects) -> impl Iterator<Item = (&ObjectKey, &EndpointSlice)> {
    objects.iter().filter_map(|(key, object)| match object {
        Object::EndpointSlice(slice) => Some((key, &**slice)),
        _ => None,
    })
}

fn service_of(slice: &EndpointSlice) -> Option<&str> {
    slice.metadata.labels.as_ref()?.get(SERVICE_NAME).map(String::as_str)
}

fn pod_key(endpoint: &Endpoint, namespace: &str) -> Option<ObjectKey> {
    let target = endpoint.target_ref.as_ref()?;
    let name = target.name.clone().filter(|_| target.kind.as_deref() == Some("Pod"))?;
    let namespace = target.namespace.clone().unwrap_or_else(|| namespace.to_owned());
    Some(ObjectKey { kind: Kind::Pod, namespace, name })
}

fn uid_of<'a>(objects: &'a Objects, key: &ObjectKey) -> Option<&'a str> {
    match objects.get(key)? {
        Object::Pod(pod) => pod.metadata.uid.as_deref(),
        _ => None,
    }
}

/// Whether a pod is on this node.
pub(super) fn is_on(object: &Object, node: &str) -> bool {
    let Object::Pod(pod) = object else { return false };
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(node)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;

    fn slice(names: &[&str]) -> Object {
        let endpoint = |name: &&str| {
            json!({
                "addresses": ["10.0.1.1"], "nodeName": "b",
                "targetRef": {"kind": "Pod", "name": name, "uid": format!("uid-{name}")},
            })
        };
        let endpoints: Vec<Value> = names.iter().map(endpoint).collect();
        let slice = json!({
            "metadata": {"name": "web-1", "labels": {SERVICE_NAME: "web"}},
            "endpoints": endpoints,
        });
        Object::EndpointSlice(Arc::new(serde_json::from_value(slice).unwrap()))
    }

    fn pod(name: &str) -> Object {
        let meta = json!({"name": name, "uid": format!("uid-{name}")});
        let pod = json!({"metadata": meta, "spec": {"nodeName": "b"}});
        Object::Pod(Arc::new(serde_json::from_value(pod).unwrap()))
    }

    fn wanted(name: &str) -> Wanted {
        let uid = Some(format!("uid-{name}"));
        Wanted::Pod { namespace: "default".into(), name: name.into(), uid }
    }

    fn at(ip: &str) -> Wanted {
        Wanted::Address { ip: ip.parse().unwrap(), account: None, node: None }
    }

    struct World {
        remote: Remote,
        objects: Objects,
        now: Instant,
    }

    impl World {
        fn with(names: &[&str]) -> Self {
            let mut objects = Objects::on_demand();
            objects.insert(slice(names));
            Self { remote: Remote::default(), objects, now: Instant::now() }
        }

        fn read(&mut self, name: &str) {
            let found = Found::Pods(vec![pod(name)]);
            self.remote.pending.insert(wanted(name));
            assert!(self.remote.take(&mut self.objects, "a", wanted(name), found, self.now));
        }

        fn prefetch(&mut self) -> Vec<Wanted> {
            self.remote.prefetch(&self.objects, "a", self.now)
        }

        fn has(&self, name: &str) -> bool {
            self.objects.contains(&pod(name).key())
        }
    }

    #[test]
    fn what_comes_to_a_used_service_is_read_before_anybody_needs_it() {
        let mut world = World::with(&["one", "two"]);
        assert_eq!(world.prefetch(), [], "nobody uses the service");
        world.read("one");
        assert_eq!(world.prefetch(), [wanted("two")]);
        assert_eq!(world.prefetch(), [], "it is being read");
    }

    #[tokio::test]
    async fn used_pod_is_read_again_and_unused_one_is_dropped() {
        let mut world = World::with(&["one", "two"]);
        world.read("one");
        world.read("two");
        world.now += UNUSED / 2;
        world.remote.used(&world.objects, &["uid-one".into()], &[], world.now);
        assert!(!world.remote.expire(&mut world.objects, world.now));
        assert_eq!(world.prefetch(), [wanted("one"), wanted("two")], "older than {REFRESH:?}");
        world.now += UNUSED / 2;
        assert!(world.remote.expire(&mut world.objects, world.now));
        assert!(world.has("one") && !world.has("two"));
    }

    #[tokio::test]
    async fn pod_that_was_replaced_is_read_and_the_old_one_never_meant() {
        let mut world = World::with(&["one"]);
        world.read("one");
        let mut newer = slice(&["one"]);
        if let Object::EndpointSlice(slice) = &mut newer {
            let slice = Arc::make_mut(slice);
            let target = &mut slice.endpoints.as_mut().unwrap()[0].target_ref;
            target.as_mut().unwrap().uid = Some("uid-newer".into());
        }
        world.objects.insert(newer);
        let ip = "10.0.1.1".parse().unwrap();
        let (done, mut answer) = oneshot::channel();
        let asked = world.remote.need(&world.objects, "a", (ip, None), done, world.now);
        assert_eq!(asked.len(), 1);
        world.remote.answer(1);
        assert!(answer.try_recv().is_err(), "not before it was read");
        let gone = asked[0].clone();
        world.remote.take(&mut world.objects, "a", gone, Found::None, world.now);
        world.remote.answer(2);
        assert_eq!(answer.try_recv(), Ok(2));
        assert!(world.objects.absent().unwrap().contains("uid-newer"));
    }

    #[test]
    fn pod_that_shares_its_nodes_network_is_never_read() {
        let mut world = World::with(&["one", "two"]);
        world.read("one");
        let address = json!({"type": "InternalIP", "address": "10.0.1.1"});
        let node = json!({"metadata": {"name": "b"}, "status": {"addresses": [address]}});
        world.objects.insert(Object::Node(Arc::new(serde_json::from_value(node).unwrap())));
        assert_eq!(world.prefetch(), []);
        assert_eq!(behind(&world.objects, "a", "10.0.1.1".parse().unwrap()), []);
    }

    #[tokio::test]
    async fn flood_of_addresses_is_not_passed_on_to_the_api() {
        let mut world = World::with(&[]);
        let mut asked = 0;
        for n in 0..2 * u32::try_from(MOST_ABSENT).unwrap() {
            let ip = std::net::Ipv4Addr::from_bits(n).into();
            let (done, _answer) = oneshot::channel();
            let wanted = world.remote.need(&world.objects, "a", (ip, None), done, world.now);
            asked += wanted.len();
        }
        assert_eq!(asked, MOST_ABSENT);
    }

    #[tokio::test]
    async fn pod_that_is_left_alone_is_kept_while_somebody_connects_to_it() {
        let pod = |name: &str| {
            let Object::Pod(pod) = pod(name) else { panic!() };
            let mut pod = Arc::unwrap_or_clone(pod);
            let status = json!({"podIPs": [{"ip": "10.0.1.1"}]});
            pod.status = Some(serde_json::from_value(status).unwrap());
            Object::Pod(Arc::new(pod))
        };
        let mut world = World::with(&[]);
        let read = |world: &mut World, name: &str| {
            let found = Found::Pods(vec![pod(name)]);
            world.remote.take(&mut world.objects, "a", at("10.0.1.1"), found, world.now)
        };
        read(&mut world, "one");
        world.now += UNUSED / 2;
        world.remote.used(&world.objects, &[], &["10.0.1.1".parse().unwrap()], world.now);
        world.now += UNUSED / 2;
        assert!(!world.remote.expire(&mut world.objects, world.now));
        assert_eq!(world.prefetch(), [at("10.0.1.1")], "its annotations may have changed");
        // Somebody else has the address by now.
        assert!(read(&mut world, "two"));
        assert!(world.has("two") && !world.has("one"));
        world.now += UNUSED;
        assert!(world.remote.expire(&mut world.objects, world.now));
        assert!(!world.has("two"));
    }

    #[test]
    fn pod_of_this_node_is_not_taken_from_a_list() {
        let mut world = World::with(&[]);
        let ip = at("10.0.1.1");
        let found = Found::Pods(vec![pod("one")]);
        world.remote.take(&mut world.objects, "b", ip, found, world.now);
        assert!(!world.has("one"));
    }
}
