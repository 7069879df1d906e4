//! How many are read at once, and what becomes of those that do not get their turn.

use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use hyper::{Request, Response};
use kube::Client;
use mesh_core::addr::OrigDst;
use mesh_core::route::{Route, RouteRefusal, route};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::demand::{VIP, shop};
use super::state::nothing;
use super::*;
use crate::discovery::cluster::KINDS;
use crate::discovery::cluster::demand::{Found, Wanted};
use crate::discovery::cluster::feed::{News, What};
use crate::discovery::cluster::places::{Places, Reason};
use crate::discovery::objects::{Kind, Object};

/// A way to a server that answers nobody, and how often it was asked.
fn silent() -> (Client, Arc<AtomicUsize>) {
    let asked: Arc<AtomicUsize> = Arc::default();
    let asking = Arc::clone(&asked);
    let server = tower::service_fn(move |_request: Request<kube::client::Body>| {
        asking.fetch_add(1, Ordering::Relaxed);
        std::future::pending::<Result<Response<BoxBody<Bytes, Infallible>>, Infallible>>()
    });
    (Client::new(server, "default"), asked)
}

fn named(n: u32) -> Wanted {
    Wanted::Pod { namespace: "default".into(), name: format!("p{n}"), uid: None, at: None }
}

fn dialled(n: u32) -> Wanted {
    Wanted::Address { ip: Ipv4Addr::from_bits(n).into(), account: None, node: None }
}

fn callers(n: u32) -> Wanted {
    let account = Some(("default".into(), "caller".into()));
    Wanted::Address { ip: Ipv4Addr::from_bits(n).into(), account, node: None }
}

#[tokio::test(start_paused = true)]
async fn each_kind_is_read_in_places_of_its_own_and_what_gets_none_in_time_is_given_up() {
    let (client, asked) = silent();
    let places = Arc::new(Places::default());
    let mut expected = 0;
    let some = |wanted: fn(u32) -> Wanted| (0..100).map(wanted).collect::<Vec<_>>();
    let read = |wanted: Vec<Wanted>, reason: Reason| {
        let mut reads = JoinSet::new();
        for wanted in wanted {
            let (client, places) = (client.clone(), Arc::clone(&places));
            reads.spawn(async move { places.read(&client, &wanted, reason).await });
        }
        reads
    };
    let mut all = Vec::new();
    for (wanted, reason, at_once) in [
        (some(dialled), Reason::Dialled, 12),
        (some(callers), Reason::Called, 8),
        (some(named), Reason::Named, 16),
    ] {
        all.push(read(wanted, reason));
        sleep(Duration::from_millis(1)).await;
        expected += at_once;
        assert_eq!(asked.load(Ordering::Relaxed), expected);
    }
    let mut given_up = 0;
    for reads in all {
        let found = reads.join_all().await;
        given_up += found.iter().filter(|found| matches!(found, Found::GivenUp)).count();
    }
    // One after the other waits for the server for 3 s, and of those that wait for them some get their turn.
    assert_eq!(given_up, 3 * 100 - 2 * expected);
    assert_eq!(asked.load(Ordering::Relaxed), 2 * expected);

    let again = read(some(named), Reason::Again);
    sleep(Duration::from_millis(1)).await;
    assert_eq!(asked.load(Ordering::Relaxed), 2 * expected + 4);
    let found = again.join_all().await;
    assert!(!found.iter().any(|found| matches!(found, Found::GivenUp)), "nobody waits for them");
}

#[tokio::test]
async fn pod_that_dials_free_addresses_keeps_nobody_from_reaching_a_service() {
    let api = Api::start().await;
    shop(&api);
    let mut followed = api.follow();
    followed.until_pods(&["here"]).await;
    until("a watch", || api.asked("watch pods") == 1).await;
    // As a server for which it is much work to find a pod by its address.
    api.held.lock().unwrap().silent.push("pods".into());
    let before = api.asked("list pods");
    let mut scan = Vec::new();
    for n in 20..220 {
        let (done, answer) = oneshot::channel();
        let know = Demand::Know { ip: ip(&format!("10.0.1.{n}")), caller: None, done };
        followed.demands.send(know).await.unwrap();
        scan.push(answer);
    }
    until("every place taken", || api.asked("list pods") - before >= 12).await;
    let known = timeout(Duration::from_secs(2), followed.know(VIP)).await;
    let known = known.expect("an answer that waits for no other");
    assert!(!known.is_unread(ip(VIP)) && known.workload("uid-there").is_some());
}

#[test]
fn address_whose_read_is_given_up_stays_refused_and_is_read_when_somebody_asks_again() {
    let now = Instant::now();
    let mut state = nothing();
    let node = json!({"metadata": {"name": "b"}, "spec": {"podCIDRs": ["10.0.1.0/24"]}});
    let node = Object::Node(Arc::new(serde_json::from_value(node).unwrap()));
    for kind in KINDS {
        let all = if kind == Kind::Node { vec![node.clone()] } else { Vec::new() };
        state.take(News { kind, what: What::All(all) }, now);
    }
    assert!(state.snapshot_if_changed().is_some());
    let at = ip("10.0.1.77");
    let (done, mut answer) = oneshot::channel();
    let asked = state.demand(Demand::Know { ip: at, caller: None, done }, now);
    assert_eq!(asked.len(), 1);
    state.read(asked[0].clone(), Found::GivenUp, now);
    assert!(state.snapshot_if_changed().is_none());
    state.answer();
    assert_eq!(answer.try_recv(), Ok(state.snapshot.generation));
    let found = route(&state.snapshot, OrigDst((at, 80).into()));
    assert_eq!(found, Route::Refuse(RouteRefusal::Unread));
    let (done, _answer) = oneshot::channel();
    assert_eq!(state.demand(Demand::Know { ip: at, caller: None, done }, now), asked);
}

/// A slice need not say whose an address is.
#[test]
fn address_that_a_slice_names_is_no_scan() {
    let mut state = nothing();
    let endpoints = json!([{"addresses": ["10.0.1.5"], "nodeName": "b"}]);
    let slice = json!({"metadata": {"name": "by-hand"}, "endpoints": endpoints});
    let slice = Object::EndpointSlice(Arc::new(serde_json::from_value(slice).unwrap()));
    state.objects.insert(slice);
    let reason =
        |at: &str| state.reason(&Wanted::Address { ip: ip(at), account: None, node: None });
    assert_eq!(reason("10.0.1.5"), Reason::Named);
    assert_eq!(reason("10.0.1.6"), Reason::Dialled);
}
