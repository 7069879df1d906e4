//! NetworkPolicies are counted, for those who ask.

use serde_json::Value;

use super::*;
use crate::discovery::cluster::network_policies;

const POLICIES: &str = "/apis/networking.k8s.io/v1/networkpolicies";

fn policies(count: usize, namespace: &str) -> Vec<Value> {
    let policy = |n| json!({"metadata": {"name": format!("p{n}"), "namespace": namespace}});
    (0..count).map(policy).collect()
}

#[tokio::test]
async fn network_policies_are_counted_page_by_page_without_those_of_system_namespaces() {
    let api = Api::start().await;
    for (count, pages) in [(0, 1), (1, 1), (500, 2), (1001, 3)] {
        let before = api.asked("list networkpolicies");
        api.has(POLICIES, [policies(1, "malla-system"), policies(count, "shop")].concat());
        assert_eq!(network_policies(&api.client()).await.unwrap(), count);
        assert_eq!(api.asked("list networkpolicies") - before, pages);
    }
    api.set_down(Some(StatusCode::FORBIDDEN));
    let refused = network_policies(&api.client()).await.unwrap_err();
    assert!(matches!(refused, kube::Error::Api(status) if status.code == 403));
}

#[tokio::test]
async fn network_policies_are_not_asked_for_unless_somebody_wants_to_know() {
    let api = Api::start().await;
    api.has(POLICIES, policies(3, "shop"));
    let mut followed = api.follow();
    let listed = |all: &Arc<Snapshot>| all.generation > 0;
    drop(timeout(SOON, followed.snapshots.wait_for(listed)).await.expect("no snapshot").unwrap());
    assert_eq!(api.asked("list networkpolicies"), 0);

    let (source, _snapshots) = api.source();
    let mut counts = source.network_policies();
    let outcomes = watch::Sender::default();
    let task = tokio::spawn(source.run(outcomes.subscribe(), None));
    let counted = timeout(SOON, counts.wait_for(|count| *count == 3)).await;
    drop(counted.expect("not counted").unwrap());
    task.abort();
}
