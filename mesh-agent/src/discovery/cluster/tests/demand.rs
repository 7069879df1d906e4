//! Pods of other nodes.

use std::net::IpAddr;
use std::time::Duration;

use hyper::StatusCode;
use mesh_core::addr::OrigDst;
use mesh_core::networks::Block;
use mesh_core::route::{Route, route};
use mesh_core::snapshot::Snapshot;
use serde_json::json;
use tokio::time::{advance, pause, resume};

use super::{Api, PATHS, PODS, ip, pod, until};

pub(super) const VIP: &str = "10.96.0.10";
const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";

/// A service with two pods of another node and one of this.
pub(super) fn shop(api: &Api) {
    let remote = |name: &str, ip: &str| {
        let mut pod = pod(name, ip);
        pod["spec"]["nodeName"] = json!("b");
        pod["metadata"]["annotations"] = json!({"malla.dev/mesh": "enabled"});
        pod
    };
    let endpoint = |name: &str, ip: &str, node: &str| {
        json!({
            "addresses": [ip], "nodeName": node,
            "targetRef": {"kind": "Pod", "name": name, "uid": format!("uid-{name}")},
        })
    };
    api.has(PODS, vec![pod("here", "10.0.0.1")]);
    let spec = json!({"clusterIP": VIP, "ports": [{"port": 80}], "selector": {"app": "web"}});
    let service = json!({"metadata": {"name": "web", "namespace": "default"}, "spec": spec});
    api.has("/api/v1/services", vec![service]);
    let slice = json!({
        "metadata": {
            "name": "web-1", "namespace": "default",
            "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4",
        "ports": [{"port": 8080}],
        "endpoints": [
            endpoint("here", "10.0.0.1", "a"),
            endpoint("there", "10.0.1.1", "b"),
            endpoint("gone", "10.0.1.2", "b"),
            endpoint("exporter", "192.0.2.2", "b"),
        ],
    });
    api.has(SLICES, vec![slice]);
    // The last one shares its node's network.
    let address = json!({"type": "InternalIP", "address": "192.0.2.2"});
    let spec = json!({"podCIDRs": ["10.0.1.0/24", "fd00::/64"]});
    let node = json!({"metadata": {"name": "b"}, "spec": spec, "status": {"addresses": [address]}});
    api.has("/api/v1/nodes", vec![node]);
    let mut held = api.held.lock().unwrap();
    let there = remote("there", "10.0.1.1");
    held.elsewhere.insert("/api/v1/namespaces/default/pods/there".into(), there);
    let mut bare = remote("bare", "10.0.1.9");
    bare["spec"]["serviceAccountName"] = json!("lonely");
    bare["status"]["podIPs"].as_array_mut().unwrap().push(json!({"ip": "fd00::9"}));
    held.elsewhere.insert("elsewhere".into(), bare);
}

/// Where connections to the service go.
fn behind_service(snapshot: &Snapshot) -> Vec<String> {
    match route(snapshot, OrigDst((ip(VIP), 80).into())) {
        Route::Service { candidates, .. } => {
            candidates.as_slice().iter().map(|one| one.addr.to_string()).collect()
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn pods_of_other_nodes_are_read_when_they_are_needed_and_captured_before() {
    let api = Api::start().await;
    shop(&api);
    let mut followed = api.follow();
    let before = followed.until_pods(&["here"]).await;
    for unread in [VIP, "10.0.1.1", "10.0.1.2"] {
        assert!(before.is_unread(ip(unread)), "{unread}");
        assert!(before.captured_destinations().contains(&ip(unread)), "{unread}");
    }
    for known in ["10.0.0.1", "192.0.2.2"] {
        assert!(!before.is_unread(ip(known)), "{known}");
    }
    assert_eq!(api.asked("list there"), 0);

    let after = followed.know(VIP).await;
    let there = after.workload("uid-there").unwrap();
    assert!(there.is_enrolled() && &*there.node == "b");
    let service = after.service("default", "web").unwrap();
    let endpoints: Vec<_> = service.ports[0].endpoints.iter().map(|e| e.addr.0.ip()).collect();
    let expected = [ip("10.0.0.1"), ip("10.0.1.1"), ip("192.0.2.2")];
    assert_eq!(endpoints, expected, "the pod that is gone is left out");
    for read in [VIP, "10.0.1.1"] {
        assert!(!after.is_unread(ip(read)), "{read}");
    }
    followed.know(VIP).await;
    assert!(after.is_unread(ip("10.0.1.2")), "the pod is gone, somebody else may have its address");
    assert!(!followed.know("10.0.1.2").await.is_unread(ip("10.0.1.2")));
    assert_eq!(api.asked("list there"), 1, "once for all");
    assert_eq!(api.asked("list gone"), 1, "also in vain");
}

#[tokio::test]
async fn client_that_is_behind_no_service_is_found_by_its_address() {
    let api = Api::start().await;
    shop(&api);
    let mut followed = api.follow();
    followed.until_pods(&["here"]).await;
    let after = followed.know("10.0.1.9").await;
    assert_eq!(&*after.workload_at(ip("10.0.1.9")).unwrap().name, "bare");
    // The API finds a pod by its first address only. Which node this one may be of nobody says.
    let node = json!({"metadata": {"name": "b"}});
    api.has("/api/v1/nodes", vec![node]);
    let mut other = api.follow();
    other.until_pods(&["here"]).await;
    assert!(other.know("fd00::9").await.workload_at(ip("fd00::9")).is_none());
    let after = other.know_caller("fd00::9", Some("lonely")).await;
    assert_eq!(&*after.workload_at(ip("fd00::9")).unwrap().name, "bare");
    let nobody = followed.know("10.0.1.77").await;
    assert!(nobody.workload_at(ip("10.0.1.77")).is_none());
    let asked = api.asked("list pods");
    followed.know("10.0.1.77").await;
    assert_eq!(api.asked("list pods"), asked, "not again at once");
}

/// So many pods of one service account, all on the other node, before those that are there.
fn crowd(api: &Api, many: u16) {
    let mut held = api.held.lock().unwrap();
    for n in 0..many {
        let [high, low] = n.to_be_bytes();
        let mut pod = pod(&format!("p{n:05}"), &format!("10.9.{high}.{low}"));
        pod["spec"] = json!({"nodeName": "b", "serviceAccountName": "lonely", "containers": []});
        held.elsewhere.insert(format!("crowd-{n:05}"), pod);
    }
}

/// The API finds a pod by its first address only.
#[tokio::test]
async fn pod_is_found_on_any_page_and_no_other_of_its_account_or_node_is_kept() {
    // One page of what has that address, which is empty, and then as many as come until it is found.
    for (many, pages) in [(0, 2), (98, 2), (100, 3), (250, 4)] {
        let api = Api::start().await;
        shop(&api);
        crowd(&api, many);
        let mut by_node = api.follow();
        by_node.until_pods(&["here"]).await;
        let before = api.asked("list pods");
        let after = by_node.know("fd00::9").await;
        assert_eq!(&*after.workload_at(ip("fd00::9")).unwrap().name, "bare", "{many}");
        assert_eq!(after.workloads().count(), 2, "{many}");
        assert_eq!(api.asked("list pods") - before, pages, "{many}");

        api.has("/api/v1/nodes", vec![json!({"metadata": {"name": "b"}})]);
        let mut by_account = api.follow();
        by_account.until_pods(&["here"]).await;
        let before = api.asked("list pods");
        let after = by_account.know_caller("fd00::9", Some("lonely")).await;
        assert_eq!(&*after.workload_at(ip("fd00::9")).unwrap().name, "bare", "{many}");
        assert_eq!(after.workloads().count(), 2, "{many}");
        assert_eq!(api.asked("list pods") - before, pages, "{many}");
    }
}

#[tokio::test]
async fn pod_is_looked_for_no_further_than_to_the_page_that_has_it() {
    let api = Api::start().await;
    shop(&api);
    crowd(&api, 250);
    let both = json!([{"ip": "10.9.0.9"}, {"ip": "fd00::8"}]);
    let path = "crowd-00009";
    api.held.lock().unwrap().elsewhere.get_mut(path).unwrap()["status"]["podIPs"] = both;
    let mut followed = api.follow();
    followed.until_pods(&["here"]).await;
    let before = api.asked("list pods");
    let after = followed.know("fd00::8").await;
    assert_eq!(&*after.workload_at(ip("fd00::8")).unwrap().name, "p00009");
    assert_eq!(api.asked("list pods") - before, 2);
}

/// It is captured as long as nobody knows.
#[tokio::test]
async fn address_that_is_none_of_the_first_thousands_of_pods_stays_unread() {
    let api = Api::start().await;
    shop(&api);
    crowd(&api, 5000);
    let mut followed = api.follow();
    followed.until_pods(&["here"]).await;
    for caller in [None, Some("lonely")] {
        // Those of a caller's account, and then those of the node.
        let most = if caller.is_some() { 1 + 50 + 50 } else { 1 + 50 };
        let at = if caller.is_some() { "fd00::78" } else { "fd00::77" };
        let before = api.asked("list pods");
        let after = followed.know_caller(at, caller).await;
        assert_eq!(api.asked("list pods") - before, most, "{at}");
        assert!(after.is_unread(ip(at)) && is_captured(&after, at), "{at}");
        assert_eq!(after.workloads().count(), 1, "{at}");
    }
}

/// Whether the kernel captures connections to this address.
fn is_captured(snapshot: &Snapshot, at: &str) -> bool {
    let block = |at: IpAddr| {
        let blocks = snapshot.captured_blocks().into_iter();
        let around = blocks.filter(|(cidr, _)| cidr.contains(at));
        around.max_by_key(|(cidr, _)| cidr.prefix_len()).map(|(_, block)| block)
    };
    snapshot.captured_destinations().contains(&ip(at)) || block(ip(at)) == Some(Block::Unread)
}

#[tokio::test]
async fn pod_that_no_slice_names_is_captured_and_read_by_either_address() {
    let api = Api::start().await;
    shop(&api);
    let mut followed = api.follow();
    let before = followed.until_pods(&["here"]).await;
    for at in ["10.0.1.9", "fd00::9", "10.0.1.77"] {
        assert!(before.is_unread(ip(at)) && is_captured(&before, at), "{at}");
    }
    assert!(!is_captured(&before, "10.0.2.9"), "no pod's");
    for at in ["10.0.1.9", "fd00::9"] {
        let mut followed = api.follow();
        followed.until_pods(&["here"]).await;
        let after = followed.know(at).await;
        assert!(after.workload_at(ip(at)).unwrap().is_enrolled(), "{at}");
        assert!(is_captured(&after, at), "{at}");
    }
}

#[tokio::test]
async fn address_that_is_nobodys_or_outside_the_mesh_is_left_alone_when_it_was_read() {
    let api = Api::start().await;
    shop(&api);
    // A pod whose namespace nobody has read might be in the mesh.
    api.has("/api/v1/namespaces", vec![json!({"metadata": {"name": "default"}})]);
    let mut outside = pod("outside", "10.0.1.8");
    outside["spec"]["nodeName"] = json!("b");
    let mut done = pod("done", "10.0.1.7");
    done["spec"]["nodeName"] = json!("b");
    done["status"]["phase"] = json!("Succeeded");
    for pod in [outside, done] {
        let name = pod["metadata"]["name"].to_string();
        api.held.lock().unwrap().elsewhere.insert(name, pod);
    }
    let mut followed = api.follow();
    let before = followed.until_pods(&["here"]).await;
    for at in ["10.0.1.8", "10.0.1.7", "10.0.1.77"] {
        assert!(is_captured(&before, at), "{at}");
        let after = followed.know(at).await;
        assert!(!after.is_unread(ip(at)) && !is_captured(&after, at), "{at}");
    }
    let after = followed.know("10.0.1.8").await;
    assert_eq!(&*after.workload_at(ip("10.0.1.8")).unwrap().name, "outside");
    assert!(after.workload_at(ip("10.0.1.7")).is_none(), "it has that address no more");
}

/// What goes back there must not leave in plain text.
#[tokio::test]
async fn address_from_which_somebody_has_called_stays_captured_though_nobody_is_found_there() {
    let api = Api::start().await;
    shop(&api);
    let mut followed = api.follow();
    followed.until_pods(&["here"]).await;
    let known = followed.know_caller("10.0.1.77", Some("lonely")).await;
    assert!(known.workload_at(ip("10.0.1.77")).is_none());
    assert!(known.is_unread(ip("10.0.1.77")) && is_captured(&known, "10.0.1.77"));
}

#[tokio::test]
async fn address_that_cannot_be_read_is_answered_at_once_and_stays_captured() {
    let api = Api::start().await;
    shop(&api);
    let mut followed = api.follow();
    followed.until_pods(&["here"]).await;
    until("a watch", || api.asked("watch pods") == 1).await;
    followed.know("10.0.1.77").await;
    api.set_down(Some(StatusCode::SERVICE_UNAVAILABLE));
    followed.until_problems(|all| all.len() == PATHS.len()).await;
    let away = followed.know("10.0.1.9").await;
    assert!(away.is_unread(ip("10.0.1.9")) && is_captured(&away, "10.0.1.9"));
    assert!(!is_captured(&away, "10.0.1.77"), "what is known stays so");
    api.set_down(None);
    followed.until_problems(|all| all.is_empty()).await;
    let back = followed.know("10.0.1.9").await;
    assert!(back.workload_at(ip("10.0.1.9")).unwrap().is_enrolled());
}

/// More is to be written than could be, by as many as read at once, in the time that this waits.
#[tokio::test]
async fn who_needs_to_know_does_not_wait_for_what_is_written() {
    let api = Api::start().await;
    shop(&api);
    let confused = |n: u32| {
        let mut confused = pod(&format!("p{n}"), &format!("10.0.0.{}", n + 2));
        confused["metadata"]["annotations"] = json!({"malla.dev/mode": "hard"});
        confused
    };
    let here = pod("here", "10.0.0.1");
    api.has(PODS, std::iter::once(here).chain((0..100).map(confused)).collect());
    api.held.lock().unwrap().ignores_writes = true;
    let mut followed = api.follow();
    followed.until(|snapshot| snapshot.generation > 0).await;
    until("a write", || !api.written("POST").is_empty()).await;
    assert!(!followed.know(VIP).await.is_unread(ip(VIP)));
}

#[tokio::test]
async fn list_of_this_nodes_pods_leaves_those_of_others() {
    let api = Api::start().await;
    shop(&api);
    let mut followed = api.follow();
    followed.until_pods(&["here"]).await;
    until("a watch", || api.asked("watch pods") == 1).await;
    followed.know(VIP).await;
    api.has(PODS, vec![pod("here", "10.0.0.1"), pod("new", "10.0.0.2")]);
    api.event("ERROR", json!({"kind": "Status", "metadata": {}, "code": 410, "message": "too old", "reason": "Expired", "status": "Failure"}));
    followed.until_pods(&["here", "new", "there"]).await;
}

#[tokio::test]
async fn what_cannot_be_read_is_answered_at_once_and_stays_unread() {
    let api = Api::start().await;
    shop(&api);
    let mut followed = api.follow();
    followed.until_pods(&["here"]).await;
    until("a watch", || api.asked("watch pods") == 1).await;
    api.set_down(Some(StatusCode::SERVICE_UNAVAILABLE));
    followed.until_problems(|all| all.len() == PATHS.len()).await;
    let known = followed.know(VIP).await;
    assert!(known.is_unread(ip(VIP)));
    // Nobody is refused for the sake of those that cannot be read.
    assert_eq!(behind_service(&known), ["10.0.0.1:8080", "192.0.2.2:8080"]);
    assert_eq!(api.asked("list there"), 0, "a server that is down is not asked by connections too");
    api.set_down(None);
    followed.until_problems(|all| all.is_empty()).await;
    assert!(!followed.know(VIP).await.is_unread(ip(VIP)));
}

/// As for an agent that has lost the right to services: it must not take every address along.
#[tokio::test]
async fn kind_that_says_nothing_of_pods_keeps_none_from_being_read() {
    let api = Api::start().await;
    shop(&api);
    let mut followed = api.follow();
    followed.until_pods(&["here"]).await;
    until("a watch", || api.asked("watch services") == 1).await;
    assert!(!followed.know("10.0.1.77").await.is_unread(ip("10.0.1.77")));
    api.forbid("/api/v1/services");
    let problems = followed.until_problems(|all| !all.is_empty()).await;
    assert!(problems.len() == 1 && problems[0].object == "Service", "{problems:?}");
    // Somebody may have come to where nobody was. Nothing is being read, and so nothing is late by this.
    pause();
    advance(Duration::from_secs(61)).await;
    resume();
    followed.until(|snapshot| snapshot.is_unread(ip("10.0.1.77"))).await;

    assert!(!followed.know(VIP).await.is_unread(ip(VIP)));
    assert_eq!(api.asked("list there"), 1);
    let bare = followed.know("10.0.1.9").await;
    assert!(bare.workload_at(ip("10.0.1.9")).unwrap().is_enrolled());
    let is_refused = followed.problems.borrow().iter().any(|one| one.object == "Service");
    assert!(is_refused, "it is refused still");
}

/// Whether a pod takes part may be said by its namespace alone.
#[tokio::test]
async fn nothing_is_read_while_namespaces_are_refused() {
    let api = Api::start().await;
    shop(&api);
    let mut followed = api.follow();
    followed.until_pods(&["here"]).await;
    until("a watch", || api.asked("watch namespaces") == 1).await;
    api.forbid("/api/v1/namespaces");
    let problems = followed.until_problems(|all| !all.is_empty()).await;
    assert!(problems.len() == 1 && problems[0].object == "Namespace", "{problems:?}");
    let pods = api.asked("list pods");
    for at in [VIP, "10.0.1.9"] {
        let known = followed.know(at).await;
        assert!(known.is_unread(ip(at)) && is_captured(&known, at), "{at}");
    }
    assert_eq!((api.asked("list there"), api.asked("list pods")), (0, pods));
}

/// As after a reboot of its node: the same pod, another address.
#[tokio::test]
async fn pod_that_has_another_address_is_read_again_before_anybody_talks_to_it() {
    let api = Api::start().await;
    shop(&api);
    let mut followed = api.follow();
    followed.until_pods(&["here"]).await;
    assert!(!followed.know(VIP).await.is_unread(ip(VIP)));

    let moves = |to: &str| {
        let mut there = pod("there", to);
        there["spec"]["nodeName"] = json!("b");
        there["metadata"]["annotations"] = json!({"malla.dev/mesh": "enabled"});
        let path = "/api/v1/namespaces/default/pods/there";
        api.held.lock().unwrap().elsewhere.insert(path.into(), there);
        let mut slice = api.held.lock().unwrap().lists[SLICES][0].clone();
        slice["endpoints"][1]["addresses"] = json!([to]);
        api.event_at(SLICES, "MODIFIED", slice);
    };
    until("a watch", || api.asked("watch endpointslices") == 1).await;
    // The service is in use: nobody has to ask.
    moves("10.0.1.5");
    let read = followed.until(|snapshot| snapshot.workload_at(ip("10.0.1.5")).is_some()).await;
    assert!(read.workload_at(ip("10.0.1.5")).unwrap().is_enrolled());
    assert!(!read.is_unread(ip(VIP)));
    // Until it is read, it is no place outside the mesh.
    api.held.lock().unwrap().silent.push("there".into());
    moves("10.0.1.6");
    let moved = followed.until(|snapshot| snapshot.is_unread(ip(VIP))).await;
    assert!(is_captured(&moved, "10.0.1.6"));
    assert_eq!(behind_service(&moved), ["10.0.0.1:8080", "192.0.2.2:8080"]);
}

/// As when a StatefulSet has replaced a pod, and the slice is the older one of the two.
#[tokio::test]
async fn pod_of_the_name_that_has_another_uid_is_not_taken_for_the_one_that_is_meant() {
    let api = Api::start().await;
    shop(&api);
    let mut other = pod("there", "10.0.1.1");
    other["metadata"]["uid"] = json!("uid-other");
    other["metadata"]["annotations"] = json!({"malla.dev/mesh": "enabled"});
    other["spec"]["nodeName"] = json!("b");
    let path = "/api/v1/namespaces/default/pods/there";
    api.held.lock().unwrap().elsewhere.insert(path.into(), other);
    let mut followed = api.follow();
    followed.until_pods(&["here"]).await;
    let is_left_out = |snapshot: &Snapshot| {
        let endpoints = &snapshot.service("default", "web").unwrap().ports[0].endpoints;
        endpoints.iter().all(|endpoint| endpoint.addr.0.ip() != ip("10.0.1.1"))
    };
    let after = followed.know(VIP).await;
    assert_eq!(api.asked("list there"), 1, "it was read");
    assert!(after.workload("uid-there").is_none() && after.workload("uid-other").is_none());
    assert!(is_left_out(&after) && !after.is_unread(ip(VIP)), "the pod that is meant is gone");
    assert!(after.is_unread(ip("10.0.1.1")), "somebody else may have its address");
    // As whoever is there it is found by the address, and is not behind the service then either.
    let after = followed.know("10.0.1.1").await;
    assert_eq!(&*after.workload_at(ip("10.0.1.1")).unwrap().uid, "uid-other");
    assert!(is_left_out(&after));
}

/// A kubelet writes what its node says: who has taken one over must not have others' pods left alone.
#[tokio::test]
async fn node_that_says_others_pods_are_its_own_addresses_takes_nobody_out_of_the_mesh() {
    let api = Api::start().await;
    shop(&api);
    let claims = ["192.0.2.3", "10.0.1.1", "10.0.1.9", "fd00::9"];
    let claims = claims.map(|address| json!({"type": "InternalIP", "address": address}));
    let liar = json!({"metadata": {"name": "c"}, "status": {"addresses": claims}});
    let mut nodes = api.held.lock().unwrap().lists["/api/v1/nodes"].clone();
    nodes.push(liar);
    api.has("/api/v1/nodes", nodes);
    let mut followed = api.follow();
    let before = followed.until_pods(&["here"]).await;
    for at in [VIP, "10.0.1.1", "10.0.1.9", "fd00::9"] {
        assert!(before.is_unread(ip(at)) && is_captured(&before, at), "{at}");
    }
    let after = followed.know(VIP).await;
    let endpoints = &after.service("default", "web").unwrap().ports[0].endpoints;
    let there = endpoints.iter().find(|endpoint| endpoint.addr.0.ip() == ip("10.0.1.1"));
    assert!(there.unwrap().workload.as_ref().unwrap().is_enrolled());
    let bare = followed.know("10.0.1.9").await;
    assert!(bare.workload_at(ip("10.0.1.9")).unwrap().is_enrolled());
}
