//! Pods of other nodes: read when somebody needs them, kept while they are used.
//!
//! An EndpointSlice names the pods behind a service; whether they are in the mesh, and as whom, only the
//! pods say. Watching all of them costs what the cluster has; this costs what the node talks to. No IO.

mod absent;
mod counted;

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use mesh_core::snapshot::WorkloadUid;
use mesh_core::spiffe::SpiffeId;
use tokio::sync::oneshot;
use tokio::time::Instant;

use self::absent::{Absences, MOST_ABSENT, MOST_CALLERS};
use self::counted::Counted;
use super::behind::{
    Here, Look, behind, has, is_of_account, knows, knows_caller, pod_key, service_of, slices,
};
use crate::discovery::kube::Endpoint;
use crate::discovery::networks::{addresses, node_of};
use crate::discovery::objects::{Object, ObjectKey, Objects};

/// A pod that no connection has used for so long is dropped.
const UNUSED: Duration = Duration::from_secs(600);
/// One that is used is read again: nobody tells when its annotations change.
const REFRESH: Duration = Duration::from_secs(300);
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
        /// Set if it is known, but not to have this address, which the slice says it has.
        at: Option<IpAddr>,
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

impl Wanted {
    /// The same, whatever address it has.
    fn anywhere(self) -> Self {
        match self {
            Self::Pod { namespace, name, uid, at: _ } => {
                Self::Pod { namespace, name, uid, at: None }
            }
            Self::Address { .. } => self,
        }
    }

    /// Whether it is an address from which somebody says to have called.
    fn is_callers(&self) -> bool {
        matches!(self, Self::Address { account: Some(_), .. })
    }
}

/// What came of it.
#[derive(Debug)]
pub(super) enum Found {
    Pods(Vec<Object>),
    /// There is none, or it is another one by now.
    None,
    Failed(String),
    /// Too much else was to be read: nobody was asked.
    GivenUp,
}

/// What was read of other nodes, and who waits for more.
#[derive(Debug, Default)]
pub(super) struct Remote {
    kept: BTreeMap<ObjectKey, Kept>,
    /// What is being read, and who waits for it: those of `waiting` that want it.
    pending: Counted<Vec<Asked>>,
    absent: Absences,
    failed: Counted<Instant>,
    waiting: HashMap<Asked, Waiting>,
    /// Those of `waiting` for which nothing is being read.
    over: Vec<Asked>,
    /// Who asked while nothing could be read.
    unread: Vec<(Asked, oneshot::Sender<u64>)>,
}

/// What somebody waits to know of: an address, and whether it is because of a call that says to come from there. Who
/// dials it does not wait for what is read for a caller, who may have made it up.
pub(super) type Asked = (IpAddr, bool);

#[derive(Debug)]
struct Kept {
    wanted: Wanted,
    used: Instant,
    read: Instant,
}

/// Who waits to know what is at an address.
#[derive(Debug, Default)]
struct Waiting {
    /// What is still being read for it,
    wanted: BTreeSet<Wanted>,
    /// by what was known after so many changes.
    changes: u64,
    done: Vec<oneshot::Sender<u64>>,
}

impl Waiting {
    fn add(&mut self, done: oneshot::Sender<u64>) {
        // Who has given up is not kept for as long as others come: looked for now and then.
        if self.done.len().is_power_of_two() {
            self.done.retain(|done| !done.is_closed());
        }
        self.done.push(done);
    }
}

impl Remote {
    /// Somebody wants to know what is at `ip`: returns what is to be read for it now. `changes` says how often
    /// `objects` have changed: the answer to the same question may be another one by now.
    pub(super) fn need(
        &mut self,
        (objects, changes): (&Objects, u64),
        here: Here<'_>,
        (ip, caller): (IpAddr, Option<&SpiffeId>),
        done: oneshot::Sender<u64>,
        now: Instant,
    ) -> Vec<Wanted> {
        let asked: Asked = (ip, caller.is_some());
        if let Some(waiting) = self.waiting.get_mut(&asked).filter(|one| one.changes == changes) {
            waiting.add(done);
            return Vec::new();
        }
        let at_address = || {
            let account = |id: &SpiffeId| (id.namespace().into(), id.service_account().into());
            let node = node_of(objects, ip).map(str::to_owned);
            Wanted::Address { ip, account: caller.map(account), node }
        };
        let is_absent = |wanted: &Wanted| self.absent.has(wanted, now);
        // Peers make addresses up: a caller that is known, or was looked for in vain just now, costs little.
        let is_settled = match caller {
            Some(caller) => knows_caller(objects, ip, caller) || is_absent(&at_address()),
            None => false,
        };
        let mut wanted: Vec<Wanted> =
            if is_settled { Vec::new() } else { behind(objects, here, ip) };
        // A pod that is gone says nothing of who has its address now.
        wanted.retain(|wanted| !is_absent(wanted));
        let is_known = is_settled || (caller.is_none() && knows(objects, ip));
        if wanted.is_empty() && !is_known && self.has_place(caller.is_some()) {
            wanted.push(at_address());
        }
        let to_read = self.begin(wanted.iter().cloned(), now);
        let waiting = self.waiting.entry(asked).or_default();
        waiting.changes = changes;
        waiting.add(done);
        for wanted in wanted {
            if let Some(who) = self.pending.get_mut(&wanted)
                && waiting.wanted.insert(wanted)
            {
                who.push(asked);
            }
        }
        if waiting.wanted.is_empty() {
            self.over.push(asked);
        }
        to_read
    }

    /// Somebody wants to know what is there, and nothing can be read.
    pub(super) fn ask_nothing(&mut self, asked: Asked, done: oneshot::Sender<u64>) {
        self.unread.push((asked, done));
    }

    /// Whether another address may be looked for, for a caller or for a pod of this node.
    fn has_place(&self, for_caller: bool) -> bool {
        match for_caller {
            true => {
                let unknown = self.absent.callers() + self.failed.callers();
                unknown + self.pending.callers() < MOST_CALLERS
            }
            false => {
                let unknown = self.absent.dialled() + self.failed.dialled();
                unknown + self.pending.dialled() < MOST_ABSENT
            }
        }
    }

    /// Those of `wanted` that are not being read, and have not just been asked for in vain.
    fn begin(&mut self, wanted: impl Iterator<Item = Wanted>, now: Instant) -> Vec<Wanted> {
        let mut begun = Vec::new();
        for wanted in wanted {
            if self.pending.get(&wanted).is_none()
                && !self.absent.has(&wanted, now)
                && self.failed.get(&wanted).is_none_or(|since| is_forgiven(*since, now))
            {
                self.pending.insert(wanted.clone(), Vec::new());
                begun.push(wanted);
            }
        }
        begun
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
        for asked in self.pending.remove(&wanted).unwrap_or_default() {
            let Some(waiting) = self.waiting.get_mut(&asked) else { continue };
            waiting.wanted.remove(&wanted);
            if waiting.wanted.is_empty() {
                self.over.push(asked);
            }
        }
        match found {
            Found::Failed(_why) => {
                self.absent.unanswered(objects, &wanted, now);
                self.failed.insert(wanted, now);
                // What is forgiven is not kept for as long as others fail: looked for now and then.
                if self.failed.len().is_power_of_two() {
                    self.failed.retain(|_, since| !is_forgiven(*since, now));
                }
                false
            }
            // The server has done nothing wrong: it is wanted anew when somebody asks again.
            Found::GivenUp => false,
            Found::None => {
                let wanted = wanted.anywhere();
                let is_news = self.absent.missed(objects, wanted.clone(), now);
                let key = self.kept.iter().find(|(_, kept)| kept.wanted == wanted);
                let key = key.map(|(key, _)| key.clone());
                let was_there = key.is_some_and(|key| {
                    self.kept.remove(&key);
                    remove(objects, &key, node)
                });
                was_there | is_news
            }
            Found::Pods(pods) => {
                let mut changed = false;
                if let Wanted::Pod { at: Some(ip), .. } = &wanted
                    && !pods.iter().any(|pod| has(pod, *ip))
                {
                    changed |= self.absent.missed(objects, wanted.clone(), now);
                }
                let wanted = wanted.anywhere();
                // Somebody else is where a caller says to be.
                let is_another = match &wanted {
                    Wanted::Address { account: Some((namespace, name)), .. } => {
                        !pods.iter().any(|pod| is_of_account(pod, namespace, name))
                    }
                    _ => false,
                };
                if is_another {
                    self.absent.missed(objects, wanted.clone(), now);
                } else {
                    changed |= self.absent.found(objects, &wanted);
                }
                changed |= self.replaced(objects, node, &wanted, &pods);
                for pod in pods {
                    let key = pod.key();
                    // Those of this node are followed, and what that tells is newer: also if this is
                    // another one that had the name before.
                    if is_on(&pod, node) || is_followed(objects, &key, node) {
                        continue;
                    }
                    let used = self.kept.get(&key).map_or(now, |kept| kept.used);
                    self.kept.insert(key, Kept { wanted: wanted.clone(), used, read: now });
                    changed |= objects.insert(pod.clone()).as_ref() != Some(&pod);
                }
                changed
            }
        }
    }

    /// Drops whoever had what was looked for, if somebody else has it now.
    fn replaced(
        &mut self,
        objects: &mut Objects,
        node: &str,
        wanted: &Wanted,
        pods: &[Object],
    ) -> bool {
        let stays: HashSet<ObjectKey> = pods.iter().map(Object::key).collect();
        let mut changed = false;
        let is_over =
            |key: &ObjectKey, kept: &mut Kept| kept.wanted == *wanted && !stays.contains(key);
        for (key, _) in self.kept.extract_if(.., is_over) {
            changed |= remove(objects, &key, node);
        }
        changed
    }

    /// Whether somebody waits for nothing but to be answered.
    pub(super) fn is_waited_for(&self) -> bool {
        !self.over.is_empty() || !self.unread.is_empty()
    }

    /// Answers those who have waited for nothing that is still being read, and of whom `generation` says
    /// what there is.
    pub(super) fn answer(&mut self, generation: u64, says: impl Fn(&Asked) -> bool) {
        for (_, done) in self.unread.extract_if(.., |(asked, _)| says(asked)) {
            done.send(generation).ok();
        }
        for asked in self.over.extract_if(.., |asked| says(asked)) {
            // Something more may be wanted since.
            if let Entry::Occupied(waiting) = self.waiting.entry(asked)
                && waiting.get().wanted.is_empty()
            {
                for done in waiting.remove().done {
                    // Gone, and with it the need.
                    done.send(generation).ok();
                }
            }
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

    /// Drops what is not used any more, and says whether that changes anything. That nobody is at an address which an
    /// endpoint has is not forgotten, but looked at again ([`Self::refresh`]): a database outside of the cluster must
    /// not have to be captured, or refused where the API is away, now and then.
    pub(super) fn expire(&mut self, objects: &mut Objects, node: &str, now: Instant) -> bool {
        let unused = |_: &ObjectKey, kept: &mut Kept| now.duration_since(kept.used) >= UNUSED;
        let mut changed = false;
        for (key, _) in self.kept.extract_if(.., unused) {
            changed |= remove(objects, &key, node);
        }
        self.failed.retain(|_, since| !is_forgiven(*since, now));
        changed |= self.absent.expire(objects, now);
        changed
    }

    /// What is used, and to be read again.
    pub(super) fn refresh(&mut self, objects: &Objects, now: Instant) -> Vec<Wanted> {
        let old = self.kept.values().filter(|kept| now.duration_since(kept.read) >= REFRESH);
        let old = old.map(|kept| kept.wanted.clone());
        let again: Vec<Wanted> = old.chain(self.absent.due(objects, now).cloned()).collect();
        self.begin(again.into_iter(), now)
    }

    /// A peer says that this pod is not where it was: it is read again now, and not when its time has come. Not more
    /// often than every few seconds: what is told may be an agent's that has not heard of the pod yet.
    pub(super) fn doubt(&mut self, objects: &Objects, uid: &str, now: Instant) -> Vec<Wanted> {
        let is_it = |key: &ObjectKey| match objects.get(key) {
            Some(Object::Pod(pod)) => pod.metadata.uid.as_deref() == Some(uid),
            _ => false,
        };
        let found = self.kept.iter_mut().find(|(key, _)| is_it(key));
        let Some((_, kept)) = found.filter(|(_, kept)| now.duration_since(kept.read) >= FAILED)
        else {
            return Vec::new();
        };
        let wanted = kept.wanted.clone();
        self.begin([wanted].into_iter(), now)
    }

    /// What is to be read before anybody needs it: what has come to a service of which something is used.
    pub(super) fn prefetch(
        &mut self,
        objects: &Objects,
        here: Here<'_>,
        now: Instant,
    ) -> Vec<Wanted> {
        let mut wanted = Vec::new();
        let is_kept = |endpoint: &Endpoint, namespace: &str| {
            pod_key(endpoint, namespace).is_some_and(|key| self.kept.contains_key(&key))
        };
        let look = Look::new(objects, here);
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
                wanted.extend(endpoints.filter_map(|one| look.missing(&key.namespace, one)));
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

    /// Nothing that was read of this namespace is any more.
    pub(super) fn forget_all_of(&mut self, objects: &mut Objects, node: &str, namespace: &str) {
        let of_it = |key: &ObjectKey, _: &mut Kept| key.namespace == namespace;
        for (key, _) in self.kept.extract_if(.., of_it) {
            remove(objects, &key, node);
        }
    }
}

/// Whether what has failed then may be asked for again.
fn is_forgiven(since: Instant, now: Instant) -> bool {
    now.duration_since(since) >= FAILED
}

/// Whether the pod of this name is one of this node.
fn is_followed(objects: &Objects, key: &ObjectKey, node: &str) -> bool {
    objects.get(key).is_some_and(|pod| is_on(pod, node))
}

/// Takes a pod away that was read, but none of this node that has its name by now, and says whether there
/// was one.
fn remove(objects: &mut Objects, key: &ObjectKey, node: &str) -> bool {
    !is_followed(objects, key, node) && objects.remove(key).is_some()
}

/// Whether a pod is on this node.
pub(super) fn is_on(object: &Object, node: &str) -> bool {
    let Object::Pod(pod) = object else { return false };
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(node)
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod unread;
