//! What is known, by what comes in which order. No server.

use serde_json::Value;
use time::OffsetDateTime;
use tokio::time::Instant;

use super::*;
use crate::discovery::cluster::demand::{Found, Wanted};
use crate::discovery::cluster::feed::{News, What};
use crate::discovery::cluster::{KINDS, State};
use crate::discovery::objects::{Kind, Object, ObjectKey};
use crate::discovery::translate::{Context, NetnsFrom};

/// What nobody has used for so long is dropped, and what was not there is forgotten.
const LONG: Duration = Duration::from_secs(600);
/// What a snapshot takes.
const TOOK: Duration = Duration::from_millis(50);

pub(super) fn nothing() -> State {
    State::new(Context {
        node: "a".into(),
        trust_domain: cluster_local(),
        tunnel_port: 15019,
        netns: NetnsFrom::Processes,
        pod_cidrs: Vec::new(),
    })
}

fn object(pod: Value) -> Object {
    Object::Pod(Arc::new(serde_json::from_value(pod).unwrap()))
}

/// The pod `web-0`, which was read of another node, and now one of that name is listed of this.
struct Moved {
    state: State,
    key: ObjectKey,
    /// The one that was read.
    wanted: Wanted,
    /// The one that is listed.
    here: Object,
}

fn moved(now: Instant) -> Moved {
    let mut state = nothing();
    let mut there = pod("web-0", "10.0.1.1");
    there["spec"]["nodeName"] = json!("b");
    let mut here = pod("web-0", "10.0.0.1");
    here["metadata"]["uid"] = json!("uid-new");
    let here = object(here);
    let key = here.key();
    let wanted = Wanted::Pod {
        namespace: "default".into(),
        name: "web-0".into(),
        uid: Some("uid-web-0".into()),
        at: None,
    };
    state.read(wanted.clone(), Found::Pods(vec![object(there)]), now);
    assert!(state.remote.keeps(&key));
    state.take(News { kind: Kind::Pod, what: What::All(vec![here.clone()]) }, now);
    assert_eq!(state.objects.get(&key), Some(&here));
    Moved { state, key, wanted, here }
}

/// The one that was read is read again, and is gone.
#[test]
fn pod_of_this_node_outlives_the_one_of_its_name_that_was_read_of_another() {
    let now = Instant::now();
    let Moved { mut state, key, wanted, here } = moved(now);
    assert!(!state.remote.keeps(&key), "it is followed");
    state.read(wanted, Found::None, now + LONG / 2);
    assert_eq!(state.objects.get(&key), Some(&here));
    state.tidy(now + LONG);
    assert_eq!(state.objects.get(&key), Some(&here));
}

#[test]
fn pod_of_this_node_is_not_dropped_with_the_one_of_its_name_that_nobody_used() {
    let now = Instant::now();
    let Moved { mut state, key, here, .. } = moved(now);
    state.tidy(now + LONG);
    assert_eq!(state.objects.get(&key), Some(&here));
}

#[test]
fn pod_of_this_node_ends_when_the_api_says_so_whoever_had_its_name() {
    let Moved { mut state, key, .. } = moved(Instant::now());
    state.take(News { kind: Kind::Pod, what: What::Gone(key.clone()) }, Instant::now());
    assert!(!state.objects.contains(&key));
}

/// Who gets its address next is not in that namespace.
#[test]
fn pods_that_were_read_of_a_namespace_are_forgotten_with_it() {
    let now = Instant::now();
    let namespace = |uid: &str| {
        let namespace = json!({"metadata": {"name": "default", "uid": uid}});
        Object::Namespace(Arc::new(serde_json::from_value(namespace).unwrap()))
    };
    let mut there = pod("there", "10.0.1.1");
    there["spec"]["nodeName"] = json!("b");
    let there = object(there);
    for (how, what, is_kept) in [
        ("it is told", What::Gone(namespace("one").key()), false),
        // Nobody tells what happened between two watches.
        ("it is listed no more", What::All(Vec::new()), false),
        ("another one of its name is", What::All(vec![namespace("two")]), false),
        ("it is listed again", What::All(vec![namespace("one")]), true),
    ] {
        let mut state = nothing();
        let at = Wanted::Address { ip: ip("10.0.1.1"), account: None, node: None };
        state.take(News { kind: Kind::Namespace, what: What::Is(namespace("one")) }, now);
        state.read(at, Found::Pods(vec![there.clone()]), now);
        assert!(state.objects.contains(&there.key()));
        state.take(News { kind: Kind::Namespace, what }, now);
        assert_eq!(state.objects.contains(&there.key()), is_kept, "{how}");
        assert_eq!(state.remote.keeps(&there.key()), is_kept, "{how}");
    }
}

#[test]
fn address_that_was_nobodys_is_forgotten_unless_pods_cannot_be_read() {
    for (kind, is_kept) in [
        (Kind::Namespace, true),
        (Kind::Node, false),
        (Kind::Pod, true),
        (Kind::Service, false),
        (Kind::EndpointSlice, false),
    ] {
        let now = Instant::now();
        let mut state = nothing();
        let at = ip("10.0.1.77");
        state.read(Wanted::Address { ip: at, account: None, node: None }, Found::None, now);
        state.take(News { kind, what: What::Failing("refused".into()) }, now);
        state.tidy(now + LONG);
        let is_absent = state.objects.absent().unwrap().contains("10.0.1.77");
        assert_eq!(is_absent, is_kept, "{kind:?}");
        let (done, _answer) = oneshot::channel();
        let asked = state.demand(Demand::Know { ip: at, caller: None, done }, now + LONG);
        assert_eq!(asked.is_empty(), is_kept, "{kind:?}");
    }
}

/// Everything was listed, and there is a first snapshot, which took that long.
fn listed(took: Duration, now: Instant) -> State {
    let mut state = nothing();
    for kind in KINDS {
        state.take(News { kind, what: What::All(Vec::new()) }, now - took);
    }
    assert!(state.due().is_some_and(|due| due <= now), "the first one is due at once");
    assert!(state.snapshot_if_changed().is_some());
    state.pace.made(now - took, now);
    state
}

#[tokio::test(start_paused = true)]
async fn next_snapshot_of_a_cluster_that_takes_long_is_not_made_at_once() {
    let now = Instant::now() + LONG;
    let mut state = listed(TOOK, now);
    assert_eq!(state.due(), None, "nothing is new");
    let service = json!({"metadata": {"name": "web"}, "spec": {"clusterIP": "10.96.0.1"}});
    let service = Object::Service(Arc::new(serde_json::from_value(service).unwrap()));
    state.take(News { kind: Kind::Service, what: What::Is(service) }, now);
    assert_eq!(state.due(), Some(now + 9 * TOOK));
    // Somebody comes whose question is answered by what is not in force yet.
    let (done, mut answer) = oneshot::channel();
    let know = Demand::Know { ip: ip("10.96.0.1"), caller: None, done };
    assert_eq!(state.demand(know, now).len(), 1);
    let by_address = Wanted::Address { ip: ip("10.96.0.1"), account: None, node: None };
    state.read(by_address, Found::GivenUp, now);
    assert_eq!(state.due(), Some(now + TOOK));
    state.answer();
    assert!(answer.try_recv().is_err(), "not with the snapshot before");
    assert!(state.snapshot_if_changed().is_some());
    state.answer();
    assert_eq!(answer.try_recv(), Ok(2));
}

/// Who dials a service while another state of it is known and not in force yet asks for that one's pods.
#[tokio::test(start_paused = true)]
async fn pod_that_has_come_since_the_last_snapshot_is_read_by_who_asks_now() {
    let now = Instant::now() + LONG;
    let mut state = listed(TOOK, now);
    let ask = |state: &mut State| {
        let (done, answer) = oneshot::channel();
        let know = Demand::Know { ip: ip("10.96.0.1"), caller: None, done };
        (state.demand(know, now), answer)
    };
    let service = json!({"metadata": {"name": "web"}, "spec": {"clusterIP": "10.96.0.1"}});
    let service = Object::Service(Arc::new(serde_json::from_value(service).unwrap()));
    let slice = |pod: &str, ip: &str| {
        let slice = json!({
            "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
            "endpoints": [{"addresses": [ip], "nodeName": "b", "targetRef": {"kind": "Pod", "name": pod}}],
        });
        Object::EndpointSlice(Arc::new(serde_json::from_value(slice).unwrap()))
    };
    let is = |kind, object| News { kind, what: What::Is(object) };
    state.take(is(Kind::Service, service), now);
    state.take(is(Kind::EndpointSlice, slice("p1", "10.0.1.1")), now);
    let (first, mut answer) = ask(&mut state);
    let named = |wanted: &[Wanted]| match wanted {
        [Wanted::Pod { name, .. }] => name.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(named(&first), "p1");
    assert_eq!(ask(&mut state).0, [], "it is being read");
    state.take(is(Kind::EndpointSlice, slice("p2", "10.0.1.2")), now);
    let (second, _answer) = ask(&mut state);
    assert_eq!(named(&second), "p2");
    // Both wait for both.
    state.read(first[0].clone(), Found::None, now);
    assert!(state.snapshot_if_changed().is_some());
    state.answer();
    assert!(answer.try_recv().is_err());
    state.read(second[0].clone(), Found::None, now);
    assert!(state.snapshot_if_changed().is_some_and(|known| !known.is_unread(ip("10.96.0.1"))));
    state.answer();
    assert_eq!(answer.try_recv(), Ok(state.snapshot.generation));
}

#[tokio::test(start_paused = true)]
async fn what_somebody_may_wait_for_is_in_force_sooner_than_what_changes_all_the_time() {
    let now = Instant::now() + LONG;
    let service = json!({"metadata": {"name": "web"}, "spec": {"clusterIP": "10.96.0.1"}});
    let service = Object::Service(Arc::new(serde_json::from_value(service).unwrap()));
    let namespace = json!({"metadata": {"name": "default"}});
    let namespace = Object::Namespace(Arc::new(serde_json::from_value(namespace).unwrap()));
    let own = object(pod("one", "10.0.0.1"));
    for (kind, news, is_urgent) in [
        (Kind::Service, service, false),
        (Kind::Namespace, namespace, true),
        (Kind::Pod, own, true),
    ] {
        let mut state = listed(TOOK, now);
        state.take(News { kind, what: What::Is(news) }, now);
        assert_eq!(state.due(), Some(now + if is_urgent { TOOK } else { 9 * TOOK }), "{kind:?}");
    }
    let mut state = listed(TOOK, now);
    let seen = Demand::Seen { uid: "uid-new".into(), ips: vec![ip("10.0.0.9")] };
    assert_eq!(state.demand(seen, now), []);
    assert_eq!(state.due(), Some(now + TOOK));
    // A caller of whom nothing will be known waits for nothing.
    let (done, mut answer) = oneshot::channel();
    let caller = Some(SpiffeId::new(cluster_local(), "default", "lonely").unwrap());
    let know = Demand::Know { ip: ip("10.0.1.77"), caller, done };
    let asked = state.demand(know, now);
    state.read(asked[0].clone(), Found::None, now);
    let (done, mut later) = oneshot::channel();
    let caller = Some(SpiffeId::new(cluster_local(), "default", "lonely").unwrap());
    let know = Demand::Know { ip: ip("10.0.1.77"), caller, done };
    assert_eq!(state.demand(know, now), []);
    state.answer();
    assert_eq!((answer.try_recv(), later.try_recv()), (Ok(1), Ok(1)));
}

/// Another state is known than the snapshot that was just made says: it takes `TOOK`, and one of a Service is due.
fn due(now: Instant) -> State {
    let mut state = listed(TOOK, now);
    let service = json!({"metadata": {"name": "other"}, "spec": {"clusterIP": "10.96.0.99"}});
    let service = Object::Service(Arc::new(serde_json::from_value(service).unwrap()));
    state.take(News { kind: Kind::Service, what: What::Is(service) }, now);
    assert_eq!(state.due(), Some(now + 9 * TOOK));
    state
}

fn elsewhere(name: &str, ip: &str) -> Object {
    let mut there = pod(name, ip);
    there["spec"]["nodeName"] = json!("b");
    object(there)
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_what_was_read_gets_the_snapshot_that_has_it() {
    let now = Instant::now() + LONG;
    for caller in [None, Some("lonely")] {
        let mut state = due(now);
        let (done, mut answer) = oneshot::channel();
        let caller = caller.map(|name| SpiffeId::new(cluster_local(), "default", name).unwrap());
        let asked = state.demand(Demand::Know { ip: ip("10.0.1.7"), caller, done }, now);
        state.read(asked[0].clone(), Found::Pods(vec![elsewhere("there", "10.0.1.7")]), now);
        state.answer();
        assert!(answer.try_recv().is_err(), "it is known, and not in force");
        assert_eq!(state.due(), Some(now + TOOK));
        assert!(state.snapshot_if_changed().is_some());
        state.answer();
        assert_eq!(answer.try_recv(), Ok(2));
        assert!(state.snapshot.workload("uid-there").is_some());
    }
}

/// Somebody may have been answered in vain, and waits for the next snapshot.
#[tokio::test(start_paused = true)]
async fn what_was_read_is_urgent_also_if_nobody_waits() {
    let now = Instant::now() + LONG;
    let mut state = due(now);
    let wanted = Wanted::Address { ip: ip("10.0.1.7"), account: None, node: None };
    state.read(wanted, Found::Pods(vec![elsewhere("there", "10.0.1.7")]), now);
    assert_eq!(state.due(), Some(now + TOOK));
}

#[tokio::test(start_paused = true)]
async fn who_asks_while_nothing_can_be_read_gets_all_that_is_known() {
    let now = Instant::now() + LONG;
    let mut state = due(now);
    state.take(News { kind: Kind::Pod, what: What::Failing("refused".into()) }, now);
    let ask = |state: &mut State| {
        let (done, answer) = oneshot::channel();
        let know = Demand::Know { ip: ip("10.96.0.99"), caller: None, done };
        assert_eq!(state.demand(know, now), []);
        state.answer();
        answer
    };
    let mut answer = ask(&mut state);
    assert!(answer.try_recv().is_err(), "another snapshot is due");
    assert_eq!(state.due(), Some(now + TOOK));
    assert!(state.snapshot_if_changed().is_some());
    state.answer();
    assert_eq!((answer.try_recv(), ask(&mut state).try_recv()), (Ok(2), Ok(2)));
}

#[tokio::test(start_paused = true)]
async fn what_is_written_back_waits_for_the_snapshot_that_it_belongs_to() {
    let now = Instant::now() + LONG;
    let mut state = nothing();
    for kind in KINDS {
        let all = if kind == Kind::Pod { vec![object(wrong())] } else { Vec::new() };
        state.take(News { kind, what: What::All(all) }, now);
    }
    let at = OffsetDateTime::UNIX_EPOCH;
    state.is_reportable = true;
    assert!(state.reports(&Outcomes::default(), now, at).is_empty(), "a snapshot is due");
    assert!(state.snapshot_if_changed().is_some());
    assert!(!state.reports(&Outcomes::default(), now, at).is_empty());
}

/// A pod of this node that says something that is not understood.
fn wrong() -> Value {
    let mut wrong = pod("one", "10.0.0.1");
    wrong["metadata"]["annotations"] = json!({"malla.dev/mode": "hard"});
    wrong
}
