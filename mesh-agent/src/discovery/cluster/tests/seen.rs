//! Addresses that were seen in a pod before the API tells them.

use mesh_core::snapshot::{Enrolment, Workload};
use serde_json::Value;

use super::*;
use crate::discovery::enrol::left_alone;

const UID: &str = "uid-new";
const NAMESPACES: &str = "/api/v1/namespaces";

/// A pod of an enrolled namespace, which the kubelet has not told an address of.
fn starting() -> Value {
    let mut pod = pod("new", "10.0.0.9");
    pod["status"] = json!({"phase": "Pending"});
    pod
}

fn enrolled() -> Value {
    json!({"metadata": {"name": "default", "annotations": {"malla.dev/mesh": "enabled"}}})
}

impl Followed {
    async fn see(&self, address: &str) {
        let seen = Demand::Seen { uid: UID.into(), ips: vec![ip(address)] };
        self.demands.send(seen).await.unwrap();
    }

    async fn until_pod(&mut self, what: &str, is_so: impl Fn(&Workload) -> bool) {
        let is_so = |all: &Arc<Snapshot>| all.workload(UID).is_some_and(|pod| is_so(pod));
        let waited = timeout(SOON, self.snapshots.wait_for(is_so)).await;
        drop(waited.unwrap_or_else(|_| panic!("never {what}")).unwrap());
    }
}

#[tokio::test]
async fn pod_has_the_addresses_that_were_seen_until_the_api_tells_some() {
    let api = Api::start().await;
    api.has(NAMESPACES, vec![enrolled()]);
    api.has(PODS, vec![starting()]);
    let mut followed = api.follow();
    let none = Enrolment::LeftAlone(left_alone::NO_ADDRESS);
    followed.until_pod("without an address", |pod| pod.enrolment == none).await;
    followed.see("10.0.0.9").await;
    let is_at = |pod: &Workload, at: &str| pod.is_enrolled() && pod.ips == [ip(at)];
    followed.until_pod("seen", |pod| is_at(pod, "10.0.0.9") && pod.provisional).await;
    // Its sandbox was made anew.
    followed.see("10.0.0.10").await;
    followed.until_pod("seen again", |pod| is_at(pod, "10.0.0.10") && pod.provisional).await;
    until("a watch", || api.asked("watch pods") == 1).await;
    api.event("MODIFIED", pod("new", "10.0.0.11"));
    followed.until_pod("told", |pod| is_at(pod, "10.0.0.11") && !pod.provisional).await;
}

/// Whoever may change its own namespace could otherwise take another pod's place.
#[tokio::test]
async fn address_that_another_pod_has_by_the_api_stays_that_pods() {
    let api = Api::start().await;
    api.has(NAMESPACES, vec![enrolled()]);
    let mut younger = starting();
    younger["metadata"]["creationTimestamp"] = json!("2026-01-31T12:00:00Z");
    let mut older = pod("older", "10.0.0.9");
    older["metadata"]["creationTimestamp"] = json!("2026-01-31T11:00:00Z");
    api.has(PODS, vec![older, younger]);
    let mut followed = api.follow();
    followed.until_pods(&["new", "older"]).await;
    followed.see("10.0.0.9").await;
    let taken = Enrolment::LeftAlone(left_alone::ADDRESS_TAKEN);
    followed.until_pod("refused", |pod| pod.enrolment == taken).await;
    let snapshot = Arc::clone(&followed.snapshots.borrow());
    assert_eq!(&*snapshot.workload_at(ip("10.0.0.9")).unwrap().name, "older");
}

#[tokio::test]
async fn what_is_seen_before_the_pod_is_told_counts_when_it_is() {
    let api = Api::start().await;
    api.has(NAMESPACES, vec![enrolled()]);
    let mut followed = api.follow();
    followed.until_pods(&[]).await;
    followed.see("10.0.0.9").await;
    until("a watch", || api.asked("watch pods") == 1).await;
    api.event("ADDED", starting());
    followed.until_pod("seen", |pod| pod.is_enrolled() && pod.provisional).await;
}

#[tokio::test]
async fn pod_whose_namespace_is_not_read_yet_is_not_taken_for_one_that_takes_no_part() {
    let api = Api::start().await;
    api.has(PODS, vec![starting()]);
    let mut followed = api.follow();
    let unread = Enrolment::LeftAlone(left_alone::NAMESPACE_UNREAD);
    followed.until_pod("known", |pod| pod.enrolment == unread).await;
    until("a watch", || api.asked("watch namespaces") == 1).await;
    api.event_at(NAMESPACES, "ADDED", enrolled());
    let none = Enrolment::LeftAlone(left_alone::NO_ADDRESS);
    followed.until_pod("read", |pod| pod.enrolment == none).await;
}

/// As while namespaces cannot be followed: what is sent there must not leave in plain text.
#[tokio::test]
async fn pod_of_another_node_is_captured_and_unread_until_its_namespace_is_read() {
    let api = Api::start().await;
    let spec = json!({"podCIDRs": ["10.0.1.0/24"]});
    api.has("/api/v1/nodes", vec![json!({"metadata": {"name": "b"}, "spec": spec})]);
    let mut away = pod("away", "10.0.1.8");
    away["spec"]["nodeName"] = json!("b");
    api.held.lock().unwrap().elsewhere.insert("away".into(), away);
    let mut followed = api.follow();
    followed.until_pods(&[]).await;
    let (at, unread) = (ip("10.0.1.8"), Enrolment::LeftAlone(left_alone::NAMESPACE_UNREAD));
    let before = followed.know("10.0.1.8").await;
    assert_eq!(before.workload_at(at).unwrap().enrolment, unread);
    assert!(before.is_unread(at) && before.captured_destinations().contains(&at));
    until("a watch", || api.asked("watch namespaces") == 1).await;
    api.event_at(NAMESPACES, "ADDED", enrolled());
    let after = followed.until(|snapshot| !snapshot.is_unread(at)).await;
    assert!(after.workload_at(at).unwrap().is_enrolled());
}
