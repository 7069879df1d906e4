//! What is read when.

use std::sync::Arc;

use serde_json::{Value, json};

use super::absent::{ABSENT, CALLER_ABSENT};
use super::*;
use crate::discovery::services::SERVICE_NAME;
use crate::identity::testing::cluster_local;

const HERE: Here<'_> = Here { node: "a", pod_cidrs: &[] };

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

fn pod_at(name: &str, ip: &str) -> Object {
    let meta = json!({"name": name, "uid": format!("uid-{name}")});
    let status = json!({"podIPs": [{"ip": ip}]});
    let pod = json!({"metadata": meta, "spec": {"nodeName": "b"}, "status": status});
    Object::Pod(Arc::new(serde_json::from_value(pod).unwrap()))
}

fn pod(name: &str) -> Object {
    pod_at(name, "10.0.1.1")
}

/// Another one of that name, on this node.
fn here(name: &str) -> Object {
    let meta = json!({"name": name, "uid": format!("uid-new-{name}")});
    let status = json!({"podIPs": [{"ip": "10.0.0.1"}]});
    let pod = json!({"metadata": meta, "spec": {"nodeName": "a"}, "status": status});
    Object::Pod(Arc::new(serde_json::from_value(pod).unwrap()))
}

fn wanted(name: &str) -> Wanted {
    let uid = Some(format!("uid-{name}"));
    Wanted::Pod { namespace: "default".into(), name: name.into(), uid, at: None }
}

fn at(ip: &str) -> Wanted {
    Wanted::Address { ip: ip.parse().unwrap(), account: None, node: None }
}

struct World {
    remote: Remote,
    objects: Objects,
    generation: u64,
    now: Instant,
}

impl World {
    fn with(names: &[&str]) -> Self {
        let mut objects = Objects::on_demand();
        objects.insert(slice(names));
        Self { remote: Remote::default(), objects, generation: 1, now: Instant::now() }
    }

    fn read(&mut self, name: &str) {
        self.remote.pending.insert(wanted(name), Vec::new());
        assert!(self.take(&wanted(name), Found::Pods(vec![pod(name)])));
    }

    /// Somebody dials it.
    fn need(&mut self, ip: &str) -> (Vec<Wanted>, oneshot::Receiver<u64>) {
        self.need_for(ip, None)
    }

    /// The same, or `caller` says to have called from there.
    fn need_for(
        &mut self,
        ip: &str,
        caller: Option<&SpiffeId>,
    ) -> (Vec<Wanted>, oneshot::Receiver<u64>) {
        let (done, answer) = oneshot::channel();
        let at = (ip.parse().unwrap(), caller);
        let known = (&self.objects, self.generation);
        (self.remote.need(known, HERE, at, done, self.now), answer)
    }

    fn take(&mut self, wanted: &Wanted, found: Found) -> bool {
        self.generation += 1;
        self.remote.take(&mut self.objects, "a", wanted.clone(), found, self.now)
    }

    fn prefetch(&mut self) -> Vec<Wanted> {
        self.remote.prefetch(&self.objects, HERE, self.now)
    }

    fn refresh(&mut self) -> Vec<Wanted> {
        self.remote.refresh(&self.objects, self.now)
    }

    fn doubt(&mut self, name: &str) -> Vec<Wanted> {
        self.remote.doubt(&self.objects, &format!("uid-{name}"), self.now)
    }

    fn expire(&mut self) -> bool {
        self.remote.expire(&mut self.objects, "a", self.now)
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

/// Of other nodes' pods nobody tells that they are gone, and addresses are soon another one's.
#[tokio::test]
async fn caller_at_an_address_that_another_pod_had_is_looked_for() {
    let caller = |account: &str| SpiffeId::new(cluster_local(), "default", account).unwrap();
    let known = || {
        let mut world = World::with(&[]);
        world.read("one");
        world
    };
    assert_eq!(known().need_for("10.0.1.1", Some(&caller("default"))).0, [], "it is that one");
    let mut world = known();
    assert_eq!(world.need("10.0.1.1").0, [], "who dials it has no other word for it");
    let (asked, _answer) = world.need_for("10.0.1.1", Some(&caller("job")));
    let account = Some(("default".into(), "job".into()));
    let ip = "10.0.1.1".parse().unwrap();
    assert_eq!(asked, [Wanted::Address { ip, account, node: None }]);
    // That one is there still, or the API has not heard of another.
    world.take(&asked[0], Found::Pods(vec![pod("one")]));
    assert_eq!(world.need_for("10.0.1.1", Some(&caller("job"))).0, [], "not again at once");
    world.now += CALLER_ABSENT;
    world.generation += 1;
    assert_eq!(world.need_for("10.0.1.1", Some(&caller("job"))).0, asked);
    world.take(&asked[0], Found::None);
    world.now += CALLER_ABSENT;
    assert_eq!(world.need_for("10.0.1.1", Some(&caller("job"))).0, [], "and ever more seldom");
}

#[tokio::test]
async fn used_pod_is_read_again_and_unused_one_is_dropped() {
    let mut world = World::with(&["one", "two"]);
    world.read("one");
    world.read("two");
    world.now += UNUSED / 2;
    world.remote.used(&world.objects, &["uid-one".into()], &[], world.now);
    assert!(!world.expire());
    assert_eq!(world.refresh(), [wanted("one"), wanted("two")], "older than {REFRESH:?}");
    world.now += UNUSED / 2;
    assert!(world.expire());
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
    let (asked, mut answer) = world.need("10.0.1.1");
    assert_eq!(asked.len(), 1);
    world.remote.answer(1, |_| true);
    assert!(answer.try_recv().is_err(), "not before it was read");
    world.take(&asked[0], Found::None);
    world.remote.answer(2, |_| true);
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
    assert_eq!(behind(&world.objects, HERE, "10.0.1.1".parse().unwrap()), []);
}

#[tokio::test]
async fn who_wants_what_was_given_up_is_answered_and_may_ask_again_at_once() {
    let mut world = World::with(&["one"]);
    for ip in ["10.0.1.1", "10.0.1.77"] {
        let (asked, mut answer) = world.need(ip);
        assert_eq!(asked.len(), 1);
        world.remote.answer(world.generation, |_| true);
        assert!(answer.try_recv().is_err(), "not before it was given up");
        assert!(!world.take(&asked[0], Found::GivenUp), "nothing is known by that");
        world.remote.answer(world.generation, |_| true);
        assert_eq!(answer.try_recv(), Ok(world.generation));
        assert_eq!(world.need(ip).0, asked);
    }
    assert!(world.objects.absent().unwrap().is_empty());
}

/// Both names for it are told as one.
#[tokio::test]
async fn address_is_nobodys_as_long_as_it_was_looked_for_in_vain_in_one_way() {
    let mut world = World::with(&[]);
    let by_node =
        Wanted::Address { ip: "10.0.1.77".parse().unwrap(), account: None, node: Some("b".into()) };
    assert!(world.take(&at("10.0.1.77"), Found::None));
    world.now += ABSENT / 2;
    assert!(!world.take(&by_node, Found::None), "that is known");
    world.now += ABSENT / 2;
    world.expire();
    assert!(world.objects.absent().unwrap().contains("10.0.1.77"));
    world.now += ABSENT / 2;
    assert!(world.expire());
    assert!(world.objects.absent().unwrap().is_empty());
}

#[tokio::test]
async fn places_for_addresses_are_free_again_when_what_was_absent_is_forgotten() {
    let caller = SpiffeId::parse("spiffe://cluster.local/ns/a/sa/caller").unwrap();
    for (caller, most) in [(None, MOST_ABSENT), (Some(&caller), MOST_CALLERS)] {
        let mut world = World::with(&[]);
        for round in 0..2 {
            let mut asked = 0;
            for n in 0..2 * u32::try_from(MOST_ABSENT).unwrap() {
                let ip = std::net::Ipv4Addr::from_bits(n).to_string();
                for wanted in world.need_for(&ip, caller).0 {
                    world.take(&wanted, Found::None);
                    asked += 1;
                }
                world.remote.answer(world.generation, |_| true);
            }
            assert_eq!(asked, most, "{round}");
            world.now += ABSENT;
            world.expire();
        }
    }
}

#[tokio::test]
async fn flood_of_addresses_is_not_passed_on_to_the_api() {
    let mut world = World::with(&[]);
    let mut asked = 0;
    for n in 0..2 * u32::try_from(MOST_ABSENT).unwrap() {
        asked += world.need(&std::net::Ipv4Addr::from_bits(n).to_string()).0.len();
    }
    assert_eq!(asked, MOST_ABSENT);
}

/// An API that says no at once is asked as rarely as one that takes its time.
#[tokio::test]
async fn flood_of_addresses_is_not_passed_on_to_an_api_that_refuses() {
    let mut world = World::with(&[]);
    let mut asked = 0;
    for n in 0..2 * u32::try_from(MOST_ABSENT).unwrap() {
        let ip = std::net::Ipv4Addr::from_bits(n).to_string();
        for wanted in world.need(&ip).0 {
            world.take(&wanted, Found::Failed("429".into()));
            asked += 1;
        }
        world.remote.answer(world.generation, |_| true);
    }
    assert_eq!(asked, MOST_ABSENT);
    world.now += FAILED;
    world.expire();
    assert_eq!(world.need("192.0.2.77").0, [at("192.0.2.77")], "it may be well again");
}

/// Slices may name as many as they like.
#[tokio::test]
async fn pods_that_do_not_exist_take_no_places_from_addresses() {
    let mut world = World::with(&[]);
    for n in 0..=MOST_ABSENT {
        world.remote.pending.insert(wanted(&n.to_string()), Vec::new());
        world.take(&wanted(&n.to_string()), Found::None);
    }
    assert_eq!(world.need("192.0.2.77").0, [at("192.0.2.77")]);
}

#[tokio::test]
async fn flood_of_callers_addresses_keeps_no_pod_of_this_node_from_asking() {
    let caller = SpiffeId::parse("spiffe://cluster.local/ns/a/sa/caller").unwrap();
    let mut world = World::with(&[]);
    let mut asked = 0;
    for n in 0..2 * u32::try_from(MOST_ABSENT).unwrap() {
        let ip = std::net::Ipv4Addr::from_bits(n).to_string();
        asked += world.need_for(&ip, Some(&caller)).0.len();
    }
    assert_eq!(asked, MOST_CALLERS);
    assert_eq!(world.need("192.0.2.77").0, [at("192.0.2.77")]);
}

/// It is there, and the API is about to tell of it.
#[tokio::test]
async fn callers_address_is_never_said_to_be_nobodys_and_soon_looked_for_again() {
    let caller = SpiffeId::parse("spiffe://cluster.local/ns/a/sa/caller").unwrap();
    let mut world = World::with(&[]);
    let look = |world: &mut World| {
        let asked = world.need_for("10.0.1.77", Some(&caller)).0;
        for wanted in &asked {
            assert!(!world.take(wanted, Found::None), "there is nothing to tell");
        }
        world.remote.answer(world.generation, |_| true);
        asked.len()
    };
    assert_eq!((look(&mut world), look(&mut world)), (1, 0), "not again at once");
    world.now += CALLER_ABSENT;
    assert_eq!((look(&mut world), look(&mut world)), (1, 0));
    // Somebody may make it up.
    world.now += CALLER_ABSENT;
    assert_eq!(look(&mut world), 0);
    world.now += CALLER_ABSENT;
    assert_eq!(look(&mut world), 1);
    assert!(world.objects.absent().unwrap().is_empty());
    assert_eq!(world.need("10.0.1.77").0, [at("10.0.1.77")], "a pod of this node may ask");
}

#[tokio::test]
async fn pod_that_is_left_alone_is_kept_while_somebody_connects_to_it() {
    let mut world = World::with(&[]);
    let read =
        |world: &mut World, name: &str| world.take(&at("10.0.1.1"), Found::Pods(vec![pod(name)]));
    read(&mut world, "one");
    world.now += UNUSED / 2;
    world.remote.used(&world.objects, &[], &["10.0.1.1".parse().unwrap()], world.now);
    world.now += UNUSED / 2;
    assert!(!world.expire());
    assert_eq!(world.refresh(), [at("10.0.1.1")], "its annotations may have changed");
    // Somebody else has the address by now.
    assert!(read(&mut world, "two"));
    assert!(world.has("two") && !world.has("one"));
    world.now += UNUSED;
    assert!(world.expire());
    assert!(!world.has("two"));
}

/// A database outside of the cluster, say.
#[tokio::test]
async fn that_an_endpoint_is_no_pods_is_known_for_as_long_as_it_is_one() {
    let mut world = World::with(&[]);
    let endpoints = json!([{"addresses": ["192.0.2.5"]}]);
    let slice = |endpoints: &Value| {
        let meta = json!({"name": "db-1", "labels": {SERVICE_NAME: "db"}});
        let slice = json!({"metadata": meta, "endpoints": endpoints});
        Object::EndpointSlice(Arc::new(serde_json::from_value(slice).unwrap()))
    };
    world.objects.insert(slice(&endpoints));
    assert_eq!(world.need("192.0.2.5").0, [at("192.0.2.5")]);
    assert!(world.take(&at("192.0.2.5"), Found::None));
    let (mut asked, began) = (Vec::new(), world.now);
    while world.now < began + REFRESH * 4 {
        world.now += ABSENT / 2;
        assert!(!world.expire());
        assert!(
            world.objects.absent().unwrap().contains("192.0.2.5"),
            "it would be captured again"
        );
        for wanted in world.refresh() {
            asked.push(world.now - began);
            // The API is away, now and then.
            let found = if asked.len() == 2 { Found::Failed("gone".into()) } else { Found::None };
            assert!(!world.take(&wanted, found));
        }
    }
    assert_eq!(asked[0], ABSENT, "soon at first");
    assert!(asked.len() <= 7, "and then seldom: {asked:?}");
    assert!(world.objects.absent().unwrap().contains("192.0.2.5"));
    // A pod has it.
    world.now += REFRESH;
    assert_eq!(world.refresh(), [at("192.0.2.5")]);
    assert!(world.take(&at("192.0.2.5"), Found::Pods(vec![pod_at("one", "192.0.2.5")])));
    assert!(world.objects.absent().unwrap().is_empty() && world.has("one"));
    // It is no endpoint any more.
    let mut world = World::with(&[]);
    world.objects.insert(slice(&endpoints));
    world.take(&at("192.0.2.5"), Found::None);
    world.objects.insert(slice(&json!([])));
    world.now += ABSENT;
    assert!(world.expire() && world.objects.absent().unwrap().is_empty());
}

#[tokio::test]
async fn pod_that_is_not_where_it_was_is_read_again_when_its_agent_says_so() {
    let mut world = World::with(&[]);
    world.take(&at("10.0.1.1"), Found::Pods(vec![pod("one")]));
    world.now += FAILED / 2;
    assert_eq!(world.doubt("one"), [], "it was read a moment ago");
    world.now += FAILED / 2;
    assert_eq!(world.doubt("one"), [at("10.0.1.1")]);
    assert_eq!(world.doubt("one"), [], "it is being read");
    assert!(world.take(&at("10.0.1.1"), Found::Pods(vec![pod("two")])));
    assert!(world.has("two") && !world.has("one"));
    assert_eq!(world.doubt("one"), [], "nobody has heard of it");
}

#[tokio::test]
async fn pod_whose_slice_says_another_address_is_read_again_once() {
    let mut world = World::with(&["one"]);
    let elsewhere = || Found::Pods(vec![pod_at("one", "10.0.1.9")]);
    world.take(&wanted("one"), elsewhere());
    let at = Some("10.0.1.1".parse().unwrap());
    let again = Wanted::Pod {
        namespace: "default".into(),
        name: "one".into(),
        uid: Some("uid-one".into()),
        at,
    };
    let (asked, mut answer) = world.need("10.0.1.1");
    assert_eq!(asked, std::slice::from_ref(&again));
    world.remote.answer(2, |_| true);
    assert!(answer.try_recv().is_err(), "not before it was read");
    // The slice is the older one.
    assert!(world.take(&again, elsewhere()));
    world.remote.answer(3, |_| true);
    assert_eq!(answer.try_recv(), Ok(3));
    let absent = world.objects.absent().unwrap();
    assert!(absent.contains("uid-one 10.0.1.1") && !absent.contains("uid-one"));
    assert_eq!(world.prefetch(), []);
    // The pod was.
    world.now += ABSENT;
    world.remote.used(&world.objects, &["uid-one".into()], &[], world.now);
    assert!(world.expire());
    assert_eq!(world.prefetch(), std::slice::from_ref(&again));
    assert!(world.take(&again, Found::Pods(vec![pod("one")])));
    assert!(world.objects.absent().unwrap().is_empty() && world.has("one"));
    world.now += REFRESH;
    assert_eq!(world.refresh(), [wanted("one")], "wherever it is");
}

#[tokio::test]
async fn those_who_wait_for_the_same_are_one_and_who_gave_up_is_forgotten() {
    let names: Vec<String> = (0..500).map(|n| n.to_string()).collect();
    let mut world = World::with(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let (asked, mut first) = world.need("10.0.1.1");
    assert_eq!(asked.len(), 500);
    for _ in 0..10_000 {
        assert_eq!(world.need("10.0.1.1").0, []);
    }
    let waiting = &world.remote.waiting[&("10.0.1.1".parse::<IpAddr>().unwrap(), false)];
    assert!(waiting.wanted.len() == 500 && waiting.done.len() < 10, "{}", waiting.done.len());
    for wanted in asked {
        world.remote.answer(world.generation, |_| true);
        assert!(first.try_recv().is_err());
        world.take(&wanted, Found::None);
    }
    world.remote.answer(world.generation, |_| true);
    assert_eq!(first.try_recv(), Ok(world.generation));
    assert!(world.remote.waiting.is_empty());
}

/// Only what a node says of itself counts.
#[test]
fn pod_whose_address_another_node_claims_is_read() {
    let mut world = World::with(&["one"]);
    let address = json!({"type": "Hostname", "address": "10.0.1.1"});
    let node = json!({"metadata": {"name": "c"}, "status": {"addresses": [address]}});
    world.objects.insert(Object::Node(Arc::new(serde_json::from_value(node).unwrap())));
    assert_eq!(world.need("10.0.1.1").0, [wanted("one")]);
}

#[test]
fn pod_of_this_node_is_not_taken_from_a_list() {
    let mut world = World::with(&[]);
    let ip = at("10.0.1.1");
    let found = Found::Pods(vec![pod("one")]);
    world.remote.take(&mut world.objects, "b", ip, found, world.now);
    assert!(!world.has("one"));
}

/// As when a StatefulSet's pod has come here while it was being read elsewhere.
#[test]
fn late_answer_does_not_take_the_place_of_a_pod_of_this_node() {
    let mut world = World::with(&["one"]);
    world.remote.pending.insert(wanted("one"), Vec::new());
    world.objects.insert(here("one"));
    assert!(!world.take(&wanted("one"), Found::Pods(vec![pod("one")])), "nothing has changed");
    assert_eq!(world.objects.get(&pod("one").key()), Some(&here("one")));
    assert!(!world.remote.keeps(&pod("one").key()));
}

/// It is none, another pod has its address, or nobody has used it.
#[test]
fn end_of_what_was_read_takes_no_pod_of_this_node_of_its_name_along() {
    let ends: [fn(&mut World); 3] = [
        |world| {
            world.take(&at("10.0.1.1"), Found::None);
        },
        |world| {
            world.take(&at("10.0.1.1"), Found::Pods(vec![pod("two")]));
        },
        |world| {
            world.now += UNUSED;
            world.expire();
        },
    ];
    for (n, end) in ends.into_iter().enumerate() {
        let mut world = World::with(&[]);
        world.take(&at("10.0.1.1"), Found::Pods(vec![pod("one")]));
        world.objects.insert(here("one"));
        end(&mut world);
        assert_eq!(world.objects.get(&pod("one").key()), Some(&here("one")), "{n}");
        assert!(!world.remote.keeps(&pod("one").key()), "{n}");
    }
}

#[tokio::test]
async fn who_dials_an_address_waits_for_no_read_of_one_who_says_to_have_called_from_there() {
    let caller = SpiffeId::parse("spiffe://cluster.local/ns/a/sa/caller").unwrap();
    for is_later in [false, true] {
        let mut world = World::with(&[]);
        let (for_caller, mut called) = world.need_for("10.0.1.77", Some(&caller));
        world.generation += u64::from(is_later);
        let (asked, mut dialled) = world.need("10.0.1.77");
        assert_eq!((for_caller.len(), asked.clone()), (1, vec![at("10.0.1.77")]));
        world.take(&asked[0], Found::None);
        world.remote.answer(world.generation, |_| true);
        assert!(dialled.try_recv().is_ok() && called.try_recv().is_err());
        world.take(&for_caller[0], Found::GivenUp);
        world.remote.answer(world.generation, |_| true);
        assert!(called.try_recv().is_ok());
        assert!(world.remote.waiting.is_empty());
    }
}

/// Whatever comes of it, and whoever has begun to read it: each is answered once, when all is read that was wanted
/// for it.
#[tokio::test]
async fn everybody_is_answered_when_nothing_is_read_for_them_any_more() {
    type What = fn(&Wanted) -> Found;
    let whats: [What; 4] = [
        |_| Found::None,
        |_| Found::GivenUp,
        |_| Found::Failed("no".into()),
        |wanted| match wanted {
            Wanted::Pod { name, .. } => Found::Pods(vec![pod(name)]),
            Wanted::Address { .. } => Found::None,
        },
    ];
    for what in whats {
        let mut world = World::with(&["one", "two"]);
        world.read("one");
        // Begun by nobody.
        let ahead = world.prefetch();
        assert_eq!(ahead, [wanted("two")]);
        let (asked, mut first) = world.need("10.0.1.1");
        assert_eq!(asked, []);
        // By what is known later one more is wanted for the same address.
        world.objects.insert(slice(&["one", "two", "three"]));
        world.generation += 1;
        let (more, mut second) = world.need("10.0.1.1");
        assert_eq!(more, [wanted("three")]);
        let (nothing, mut third) = world.need("10.0.1.1");
        assert_eq!(nothing, []);
        let answered = |world: &mut World, answers: &mut [&mut oneshot::Receiver<u64>]| {
            world.remote.answer(world.generation, |_| true);
            answers.iter_mut().map(|answer| usize::from(answer.try_recv().is_ok())).sum::<usize>()
        };
        let waiters = &mut [&mut first, &mut second, &mut third];
        world.take(&ahead[0], what(&ahead[0]));
        assert_eq!(answered(&mut world, waiters), 0, "three is still being read");
        world.take(&more[0], what(&more[0]));
        assert_eq!(answered(&mut world, waiters), 3);
        assert!(world.remote.waiting.is_empty() && world.remote.over.is_empty());
    }
}
