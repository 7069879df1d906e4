//! Pods of other nodes.

use hyper::StatusCode;
use serde_json::json;

use super::{Api, PATHS, PODS, ip, pod, until};

const VIP: &str = "10.96.0.10";

/// A service with two pods of another node and one of this.
fn shop(api: &Api) {
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
    api.has("/apis/discovery.k8s.io/v1/endpointslices", vec![slice]);
    // The last one shares its node's network.
    let address = json!({"type": "InternalIP", "address": "192.0.2.2"});
    let node = json!({"metadata": {"name": "b"}, "status": {"addresses": [address]}});
    api.has("/api/v1/nodes", vec![node]);
    let mut held = api.held.lock().unwrap();
    let there = remote("there", "10.0.1.1");
    held.elsewhere.insert("/api/v1/namespaces/default/pods/there".into(), there);
    let mut bare = remote("bare", "10.0.1.9");
    bare["spec"]["serviceAccountName"] = json!("lonely");
    bare["status"]["podIPs"].as_array_mut().unwrap().push(json!({"ip": "fd00::9"}));
    held.elsewhere.insert("elsewhere".into(), bare);
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
    for read in [VIP, "10.0.1.1", "10.0.1.2"] {
        assert!(!after.is_unread(ip(read)), "{read}");
    }
    followed.know(VIP).await;
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
    // The API finds a pod by its first address only.
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
    assert!(followed.know(VIP).await.is_unread(ip(VIP)));
    assert_eq!(api.asked("list there"), 0, "a server that is down is not asked by connections too");
    api.set_down(None);
    followed.until_problems(|all| all.is_empty()).await;
    assert!(!followed.know(VIP).await.is_unread(ip(VIP)));
}
