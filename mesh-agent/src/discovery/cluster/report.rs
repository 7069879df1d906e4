//! What the agent writes into the API: on each of its pods how taking part went, and an Event where
//! somebody asked for what cannot be done. No IO.
//!
//! A pod that never asked is never written to. Nothing here is needed by anybody but people: what cannot
//! be written is tried again a minute later, and nothing waits for it. Where there is to be no agent any
//! more, what was written on pods is taken back, and an agent that ends waits a moment for that.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Duration;

use mesh_core::snapshot::{Enrolment, Snapshot, Workload};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::Instant;

use crate::discovery::client::escaped;
use crate::discovery::enrol::{REDIRECTION, left_alone};
use crate::discovery::kube::Pod;
use crate::discovery::objects::{Kind, Object, ObjectKey, Objects};
use crate::discovery::{Outcome, Outcomes, Problem, shown_long};

/// After a write that failed.
const AGAIN: Duration = Duration::from_secs(60);
/// What still holds is told again, by another name: the API keeps an Event for an hour after it was made
/// (apiserver's `--event-ttl`), and whoever tells it by the same name prolongs nothing.
const EVENT_AGAIN: Duration = Duration::from_secs(2700);
/// Of an object's name in that of an Event, which has 253 (RFC 1123, as Kubernetes has it).
const NAMED: usize = 200;

/// What keys of writes to pods begin with.
const ANNOTATION: &str = "annotation ";

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Write {
    /// What it is about: at most one at a time.
    pub(super) key: String,
    pub(super) method: http::Method,
    pub(super) path: String,
    pub(super) content_type: &'static str,
    pub(super) body: Value,
}

/// Why something was not written.
#[derive(Debug)]
pub(super) struct NotWritten {
    pub(super) why: String,
    /// The agent may not, and will not if it tries again.
    pub(super) is_refused: bool,
}

/// What was written, and what could not be.
#[derive(Debug, Default)]
pub(super) struct Reports {
    /// By key: what a pod was last told to say.
    told: HashMap<String, String>,
    /// By key, which is another one when it is time to tell it again: what the API was told.
    events: HashSet<String>,
    failed: HashMap<String, Instant>,
    /// By key: what is under way. Two writes to a pod could arrive the other way round.
    writing: HashSet<String>,
    takes_back: bool,
}

/// What is known when something is to be written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known<'a> {
    pub(super) objects: &'a Objects,
    pub(super) snapshot: &'a Snapshot,
    pub(super) outcomes: &'a Outcomes,
    pub(super) problems: &'a [Problem],
    /// The time of day, which all agents share.
    pub(super) at: OffsetDateTime,
}

impl Reports {
    /// What is to be written now.
    pub(super) fn due(&mut self, known: Known<'_>, now: Instant) -> Vec<Write> {
        self.takes_back = false;
        self.failed.retain(|_, since| now.duration_since(*since) < AGAIN);
        let mut writes = Vec::new();
        let local = known.snapshot.workloads().filter(|pod| pod.node == known.snapshot.node);
        let mut events = BTreeMap::new();
        let mut annotations = HashSet::new();
        for pod in local {
            annotations.insert(annotation_key(&pod.uid));
            let Some(wanted) = state(pod, known.outcomes) else { continue };
            if let Some(write) = self.annotation(known.objects, pod, wanted.as_deref()) {
                writes.push(write);
            }
            if let Some(Outcome::Failing(why)) = known.outcomes.get(&pod.uid) {
                let message = format!("not enrolled: {why}; it is tried again");
                let key = pod_key(pod);
                events.extend(event(known, &key, "NotEnrolled", &message));
            }
        }
        for problem in known.problems {
            if let Some(key) = whose(known, problem) {
                let message = format!("{}: {}; {}", problem.field, problem.message, problem.remedy);
                events.extend(event(known, &key, "NotUnderstood", &message));
            }
        }
        self.told.retain(|key, _| annotations.contains(key));
        // What is over may come again, and is told again then.
        self.events.retain(|key| events.contains_key(key));
        for (key, write) in events {
            if self.failed.contains_key(&key) || !self.events.insert(key.clone()) {
                continue;
            }
            if self.writing.insert(key) {
                writes.push(write);
            }
        }
        writes
    }

    /// What is to be written now so that pods of this node say nothing of the mesh any more.
    pub(super) fn take_back(&mut self, objects: &Objects, node: &str) -> Vec<Write> {
        if !std::mem::replace(&mut self.takes_back, true) {
            self.failed.clear();
        }
        let mut writes = Vec::new();
        for (at, object) in objects.of(Kind::Pod) {
            let Object::Pod(pod) = object else { continue };
            let is_local = pod.spec.as_ref().is_some_and(|s| s.node_name.as_deref() == Some(node));
            let Some(uid) = pod.metadata.uid.as_deref().filter(|_| is_local) else { continue };
            let told = self.told.get(&annotation_key(uid));
            if present(pod).is_some() || told.is_some_and(|told| !told.is_empty()) {
                writes.extend(self.tell(at, uid, None));
            }
        }
        writes
    }

    /// Whether nothing is on its way to a pod. For an Event nobody waits.
    pub(super) fn is_idle(&self) -> bool {
        !self.writing.iter().any(|key| key.starts_with(ANNOTATION))
    }

    fn annotation(
        &mut self,
        objects: &Objects,
        pod: &Workload,
        wanted: Option<&str>,
    ) -> Option<Write> {
        let at = pod_key(pod);
        let Some(Object::Pod(object)) = objects.get(&at) else { return None };
        let key = annotation_key(&pod.uid);
        if present(object) == wanted && !self.writing.contains(&key) {
            self.told.remove(&key);
            return None;
        }
        self.tell(&at, &pod.uid, wanted)
    }

    /// Writes that on a pod, unless it was, or something is on its way.
    fn tell(&mut self, at: &ObjectKey, uid: &str, wanted: Option<&str>) -> Option<Write> {
        let key = annotation_key(uid);
        let text = wanted.unwrap_or_default();
        let is_told = self.told.get(&key).is_some_and(|told| told == text);
        if is_told || self.failed.contains_key(&key) || !self.writing.insert(key.clone()) {
            return None;
        }
        self.told.insert(key.clone(), text.to_owned());
        let (namespace, name) = (escaped(&at.namespace), escaped(&at.name));
        Some(Write {
            key,
            method: http::Method::PATCH,
            path: format!("/api/v1/namespaces/{namespace}/pods/{name}"),
            content_type: "application/merge-patch+json",
            // Another pod of the name refuses it by the UID.
            body: json!({"metadata": {"uid": uid, "annotations": {REDIRECTION: wanted}}}),
        })
    }

    /// It was written.
    pub(super) fn written(&mut self, key: &str) {
        self.writing.remove(key);
    }

    /// It could not be written, and may be at once.
    pub(super) fn not_yet(&mut self, key: &str) {
        self.writing.remove(key);
        self.told.remove(key);
        self.events.remove(key);
    }

    /// It could not be written, and is not for a while.
    pub(super) fn failed(&mut self, key: String, now: Instant) {
        self.not_yet(&key);
        self.failed.insert(key, now);
    }
}

/// What a pod is to say of itself: `None` if that stays as it is, `Some(None)` if nothing.
#[expect(clippy::option_option, reason = "not to be changed, to be removed, to be this")]
fn state(pod: &Workload, outcomes: &Outcomes) -> Option<Option<String>> {
    match (&pod.enrolment, outcomes.get(&pod.uid)) {
        (Enrolment::Enrolled, Some(Outcome::Enrolled)) => Some(Some("enabled".into())),
        (Enrolment::Enrolled, Some(Outcome::Failing(why))) => {
            Some(Some(format!("failed: {}", shown_long(why))))
        }
        (Enrolment::Enrolled, None) => None,
        (Enrolment::LeftAlone(left_alone::NOT_ENROLLED | left_alone::DISABLED), _) => Some(None),
        // It has none yet, or needs none any more.
        (
            Enrolment::LeftAlone(
                left_alone::NO_ADDRESS | left_alone::COMPLETED | left_alone::NAMESPACE_UNREAD,
            ),
            _,
        ) => None,
        (Enrolment::LeftAlone(reason), _) => Some(Some(format!("refused: {reason}"))),
    }
}

fn annotation_key(uid: &str) -> String {
    format!("{ANNOTATION}{uid}")
}

/// What it says of itself.
fn present(pod: &Pod) -> Option<&str> {
    pod.metadata.annotations.as_ref()?.get(REDIRECTION)
}

/// An Event on the object, by the key under which it is told.
fn event(known: Known<'_>, of: &ObjectKey, reason: &str, message: &str) -> Option<(String, Write)> {
    let (kind, uid) = match known.objects.get(of)? {
        Object::Pod(pod) => ("Pod", pod.metadata.uid.clone()?),
        Object::Namespace(namespace) => ("Namespace", namespace.metadata.uid.clone()?),
        Object::Service(service) => ("Service", service.metadata.uid.clone()?),
        _ => return None,
    };
    // The same on every node and after every restart, so that it is there once: the API refuses a
    // second one of the name. And another one in time, at a moment that is not that of all others.
    let mut hasher = DefaultHasher::new();
    (&uid, reason, message).hash(&mut hasher);
    let again_s = EVENT_AGAIN.as_secs();
    let at_s = u64::try_from(known.at.unix_timestamp()).unwrap_or_default();
    ((at_s + hasher.finish() % again_s) / again_s).hash(&mut hasher);
    let whose: String = of.name.chars().take(NAMED).collect();
    // Each part of a name ends with a letter or digit.
    let whose = whose.trim_end_matches(['-', '.']);
    let name = format!("{whose}.malla.{:016x}", hasher.finish());
    // Events of what is in no namespace are in this one.
    let namespace = if of.namespace.is_empty() { "default" } else { &of.namespace };
    let now = known.at.replace_nanosecond(0).ok()?.format(&Rfc3339).ok()?;
    let mut involved = json!({"apiVersion": "v1", "kind": kind, "name": of.name, "uid": uid});
    if !of.namespace.is_empty() {
        involved["namespace"] = json!(of.namespace);
    }
    let node = &*known.snapshot.node;
    let key = format!("event {name}");
    let write = Write {
        key: key.clone(),
        method: http::Method::POST,
        path: format!("/api/v1/namespaces/{}/events", escaped(namespace)),
        content_type: "application/json",
        body: json!({
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "involvedObject": involved,
            "type": "Warning",
            "reason": reason,
            "message": message,
            "count": 1,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "source": {"component": "malla", "host": node},
            "reportingComponent": "malla.dev/agent",
            "reportingInstance": node,
        }),
    };
    Some((key, write))
}

/// The object that a problem is about, if it is for this agent to tell it: a pod of this node, a
/// namespace that has one, or a Service of such a namespace, and something that they ask of the mesh.
fn whose(known: Known<'_>, problem: &Problem) -> Option<ObjectKey> {
    if !problem.field.contains("malla.dev/") {
        return None;
    }
    let mut local = known.snapshot.workloads().filter(|pod| pod.node == known.snapshot.node);
    let (kind, name) = problem.object.split_once(' ')?;
    match kind {
        "Pod" => {
            let (namespace, name) = name.split_once('/')?;
            let pod = local.find(|pod| &*pod.namespace == namespace && &*pod.name == name)?;
            Some(pod_key(pod))
        }
        "Namespace" => local.any(|pod| &*pod.namespace == name).then(|| ObjectKey {
            kind: Kind::Namespace,
            namespace: String::new(),
            name: name.to_owned(),
        }),
        "Service" => {
            let (namespace, name) = name.split_once('/')?;
            local.any(|pod| &*pod.namespace == namespace).then(|| ObjectKey {
                kind: Kind::Service,
                namespace: namespace.to_owned(),
                name: name.to_owned(),
            })
        }
        _ => None,
    }
}

fn pod_key(pod: &Workload) -> ObjectKey {
    let (namespace, name) = (pod.namespace.to_string(), pod.name.to_string());
    ObjectKey { kind: Kind::Pod, namespace, name }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::discovery::translate::{Context, NetnsFrom, translate};
    use crate::identity::testing::cluster_local;

    fn known(name: &str) -> (Objects, Snapshot) {
        let pod = json!({
            "metadata": {
                "name": name, "uid": "uid-1", "annotations": {"malla.dev/mesh": "enabled"},
            },
            "spec": {"nodeName": "a"},
            "status": {"podIPs": [{"ip": "10.0.0.1"}]},
        });
        let mut objects = Objects::on_demand();
        objects.insert(Object::Pod(Arc::new(serde_json::from_value(pod).unwrap())));
        let namespace = json!({"metadata": {"name": "default"}});
        objects.insert(Object::Namespace(Arc::new(serde_json::from_value(namespace).unwrap())));
        let context = Context {
            node: "a".into(),
            trust_domain: cluster_local(),
            tunnel_port: 15019,
            netns: NetnsFrom::Processes,
            pod_cidrs: Vec::new(),
        };
        let (snapshot, _problems) = translate(&objects, &context, 1);
        (objects, snapshot)
    }

    /// Of the API server, from when an Event was made.
    const EVENT_TTL: Duration = Duration::from_secs(3600);

    #[test]
    fn event_is_told_again_before_the_api_forgets_it_and_what_is_gone_is_forgotten() {
        let long = format!("{}-{}", "a".repeat(NAMED - 1), "b".repeat(52));
        let (objects, snapshot) = known(&long);
        let outcomes = Outcomes::from([("uid-1".into(), Outcome::Failing("no room".into()))]);
        let (start, noon) = (Instant::now(), OffsetDateTime::UNIX_EPOCH + EVENT_TTL * 12);
        // The second one comes 20 minutes later, as another node's or after a restart.
        let mut agents = [(0, Reports::default()), (1200, Reports::default())];
        // Until when the API has which: what is told by a name that it has changes nothing.
        let mut kept: HashMap<String, OffsetDateTime> = HashMap::new();
        let (mut told, mut made) = (0, 0);
        for passed in (0..4 * 3600).step_by(30) {
            let since = Duration::from_secs(passed);
            let (now, at) = (start + since, noon + since);
            let known = Known {
                objects: &objects,
                snapshot: &snapshot,
                outcomes: &outcomes,
                problems: &[],
                at,
            };
            kept.retain(|_, until| *until > at);
            assert!(passed == 0 || !kept.is_empty(), "forgotten after {passed} s");
            for (_, agent) in agents.iter_mut().filter(|(from, _)| *from <= passed) {
                let writes = agent.due(known, now).into_iter();
                for write in writes.filter(|write| write.method == http::Method::POST) {
                    let name = write.body["metadata"]["name"].as_str().unwrap().to_owned();
                    assert!(name.len() < 253 && name.contains("a.malla."), "{name}");
                    told += 1;
                    made += usize::from(!kept.contains_key(&name));
                    kept.entry(name).or_insert(at + EVENT_TTL);
                }
            }
        }
        assert!((6..=7).contains(&made), "by the first that tells it, every 45 minutes: {made}");
        assert!(told > made && told <= 2 * made, "by each of them once: {told}, {made}");

        let nothing = Snapshot::empty("a".into(), cluster_local());
        let (objects, none) = (Objects::on_demand(), Outcomes::default());
        let known = Known {
            objects: &objects,
            snapshot: &nothing,
            outcomes: &none,
            problems: &[],
            at: noon,
        };
        let [(_, mut reports), _] = agents;
        assert!(!reports.told.is_empty() && !reports.events.is_empty());
        reports.due(known, start);
        assert!(reports.told.is_empty() && reports.events.is_empty());
    }

    #[test]
    fn pod_is_told_one_thing_after_the_other() {
        let (objects, snapshot) = known("one");
        let (now, at) = (Instant::now(), OffsetDateTime::UNIX_EPOCH);
        let mut reports = Reports::default();
        let told = |reports: &mut Reports, outcome: Outcome| {
            let outcomes = Outcomes::from([("uid-1".into(), outcome)]);
            let known = Known {
                objects: &objects,
                snapshot: &snapshot,
                outcomes: &outcomes,
                problems: &[],
                at,
            };
            let writes = reports.due(known, now).into_iter();
            let writes = writes.filter(|write| write.method == http::Method::PATCH);
            writes
                .map(|write| {
                    (write.key, write.body["metadata"]["annotations"][REDIRECTION].clone())
                })
                .collect::<Vec<_>>()
        };
        let failing = || Outcome::Failing("no room".into());
        let first = told(&mut reports, Outcome::Enrolled);
        let [(key, what)] = &first[..] else { panic!("{first:?}") };
        assert_eq!(*what, "enabled");
        assert_eq!(told(&mut reports, failing()), [], "the first one could come after it");
        reports.written(key);
        assert_eq!(told(&mut reports, failing()), [(key.clone(), json!("failed: no room"))]);
        assert_eq!(reports.take_back(&objects, "a"), [], "nor this one before it");
        assert!(!reports.is_idle());
        reports.written(key);
        let [write] = &reports.take_back(&objects, "a")[..] else { panic!("nothing") };
        assert_eq!(write.body["metadata"]["annotations"][REDIRECTION], Value::Null);
        reports.written(key);
        assert_eq!(reports.take_back(&objects, "a"), []);
        assert!(reports.is_idle());
    }

    #[test]
    fn event_that_is_over_and_comes_again_is_not_on_its_way_twice() {
        let (objects, snapshot) = known("one");
        let (now, at) = (Instant::now(), OffsetDateTime::UNIX_EPOCH);
        let mut reports = Reports::default();
        let events = |reports: &mut Reports, outcome: Outcome| {
            let outcomes = Outcomes::from([("uid-1".into(), outcome)]);
            let (objects, snapshot) = (&objects, &snapshot);
            let known = Known { objects, snapshot, outcomes: &outcomes, problems: &[], at };
            let writes = reports.due(known, now).into_iter();
            let events = writes.filter(|write| write.method == http::Method::POST);
            events.map(|write| write.key).collect::<Vec<_>>()
        };
        let failing = || Outcome::Failing("no room".into());
        let first = events(&mut reports, failing());
        let [key] = &first[..] else { panic!("{first:?}") };
        assert_eq!(events(&mut reports, Outcome::Enrolled), [""; 0]);
        assert_eq!(events(&mut reports, failing()), [""; 0], "it is on its way");
        reports.written(key);
        assert_eq!(events(&mut reports, failing()), [""; 0], "and has arrived");
        assert_eq!(events(&mut reports, Outcome::Enrolled), [""; 0]);
        assert_eq!(events(&mut reports, failing()), first, "told again");
    }
}
