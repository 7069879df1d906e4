//! What is written into the API.

use std::sync::Arc;

use hyper::StatusCode;
use mesh_core::snapshot::Snapshot;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{Api, Followed, PODS, SOON, pod, until};
use crate::discovery::owner::Owner;
use crate::discovery::{Outcome, Outcomes};

/// A pod that asks to take part.
fn asking(name: &str, ip: &str) -> Value {
    let mut pod = pod(name, ip);
    pod["metadata"]["annotations"] = json!({"malla.dev/mesh": "enabled"});
    pod
}

#[tokio::test]
async fn what_became_of_a_pod_is_written_on_it_once() {
    let api = Api::start().await;
    let mut shared = asking("shared", "10.0.0.3");
    shared["spec"]["hostNetwork"] = json!(true);
    let mut left = pod("left", "10.0.0.4");
    left["metadata"]["annotations"] = json!({"malla.dev/redirection": "enabled"});
    let (one, two) = (asking("one", "10.0.0.1"), asking("two", "10.0.0.2"));
    api.has("/api/v1/namespaces", vec![json!({"metadata": {"name": "default"}})]);
    api.has(PODS, vec![one.clone(), two, shared, left, pod("never", "10.0.0.5")]);
    let mut followed = api.follow();
    followed.until_pods(&["left", "never", "one", "shared", "two"]).await;
    until("a watch", || api.asked("watch pods") == 1).await;
    let outcomes = Outcomes::from([
        ("uid-one".into(), Outcome::Enrolled),
        ("uid-two".into(), Outcome::Failing("no room".into())),
    ]);
    followed.outcomes.send_replace(Arc::new(outcomes.clone()));
    until("four annotations", || api.written("PATCH").len() == 4).await;
    let mut found: Vec<_> = api
        .written("PATCH")
        .into_iter()
        .map(|(path, body)| {
            let meta = &body["metadata"];
            let name = path.strip_prefix("/api/v1/namespaces/default/pods/").unwrap().to_owned();
            assert_eq!(meta["uid"], format!("uid-{name}"), "no other pod of the name");
            (name, meta["annotations"]["malla.dev/redirection"].clone())
        })
        .collect();
    found.sort_by(|(one, _), (other, _)| one.cmp(other));
    let expected = [
        ("left", json!(null)),
        ("one", json!("enabled")),
        ("shared", json!("refused: shares the node's network")),
        ("two", json!("failed: no room")),
    ];
    assert_eq!(found, expected.map(|(name, value)| (name.to_owned(), value)));
    until("an event", || !api.written("POST").is_empty()).await;
    let (path, event) = api.written("POST").remove(0);
    assert_eq!(path, "/api/v1/namespaces/default/events");
    assert_eq!((&event["reason"], &event["type"]), (&json!("NotEnrolled"), &json!("Warning")));
    assert_eq!(event["involvedObject"]["uid"], "uid-two");
    assert_eq!(event["message"], "not enrolled: no room; it is tried again");

    // What is there already is not written; somebody who takes it away gets it back.
    let mut annotated = one.clone();
    annotated["metadata"]["annotations"]["malla.dev/redirection"] = json!("enabled");
    api.event("MODIFIED", annotated);
    api.event("ADDED", pod("later", "10.0.0.9"));
    followed.until_pods(&["later", "left", "never", "one", "shared", "two"]).await;
    assert_eq!(api.written("PATCH").len(), 4);
    api.event("MODIFIED", one);
    until("it to be written again", || api.written("PATCH").len() == 5).await;
    assert_eq!(api.written("POST").len(), 1);
}

#[tokio::test]
async fn value_that_is_not_understood_is_told_where_it_stands() {
    let api = Api::start().await;
    let mut confused = asking("one", "10.0.0.1");
    confused["metadata"]["annotations"]["malla.dev/mode"] = json!("hard");
    let namespace = |name: &str| {
        let annotations = json!({"malla.dev/fail-open": "perhaps"});
        json!({"metadata": {"name": name, "uid": format!("uid-{name}"), "annotations": annotations}})
    };
    api.has("/api/v1/namespaces", vec![namespace("default"), namespace("nobody-here")]);
    let service = |namespace: &str| {
        let annotations = json!({"malla.dev/opaque-ports": "eighty"});
        let uid = format!("uid-service-{namespace}");
        json!({
            "metadata": {"name": "web", "namespace": namespace, "uid": uid, "annotations": annotations},
            "spec": {"clusterIP": if namespace == "default" { "10.96.0.1" } else { "10.96.0.2" }},
        })
    };
    api.has("/api/v1/services", vec![service("default"), service("nobody-here")]);
    api.has(PODS, vec![confused]);
    let mut followed = api.follow();
    followed.until_pods(&["one"]).await;
    until("three events", || api.written("POST").len() == 3).await;
    let events = api.written("POST");
    let of = |kind: &str| events.iter().find(|(_, event)| event["involvedObject"]["kind"] == kind);
    let (_, event) = of("Pod").unwrap();
    let message = event["message"].as_str().unwrap();
    assert!(message.contains("malla.dev/mode") && message.contains("`hard`"), "{message}");
    let (path, event) = of("Namespace").unwrap();
    assert_eq!(path, "/api/v1/namespaces/default/events");
    assert_eq!(event["involvedObject"]["name"], "default", "that with a pod of this node");
    assert!(event["involvedObject"].get("namespace").is_none());
    let (path, event) = of("Service").unwrap();
    assert_eq!(path, "/api/v1/namespaces/default/events");
    assert_eq!(event["involvedObject"]["uid"], "uid-service-default");
    let message = event["message"].as_str().unwrap();
    assert!(message.contains("malla.dev/opaque-ports"), "{message}");
}

#[tokio::test]
async fn setting_that_is_given_as_a_label_is_told_where_it_stands() {
    let api = Api::start().await;
    let labelled = |mut object: Value, labels: Value| {
        object["metadata"]["labels"] = labels;
        object
    };
    let namespace = json!({"metadata": {"name": "default", "uid": "uid-default"}});
    let labels = json!({"malla.dev/mesh": "enabled", "malla.dev/mode": "strict"});
    api.has("/api/v1/namespaces", vec![labelled(namespace, labels)]);
    let service = json!({
        "metadata": {"name": "web", "namespace": "default", "uid": "uid-web"},
        "spec": {"clusterIP": "10.96.0.1"},
    });
    let labels = json!({"app": "web", "malla.dev/mesh": "enabled", "malla.dev/opaque-ports": "80"});
    api.has("/api/v1/services", vec![labelled(service, labels)]);
    let labels = json!({"app": "web", "malla.dev/fail-open": "false"});
    api.has(PODS, vec![labelled(pod("one", "10.0.0.1"), labels)]);
    let mut followed = api.follow();
    followed.until_pods(&["one"]).await;
    until("three events", || api.written("POST").len() == 3).await;
    let events = api.written("POST");
    for (kind, label) in [
        ("Namespace", "malla.dev/mode=strict"),
        ("Pod", "malla.dev/fail-open=false"),
        ("Service", "malla.dev/opaque-ports=80"),
    ] {
        let about = events.iter().find(|(_, event)| event["involvedObject"]["kind"] == kind);
        let (_, event) = about.unwrap();
        let message = event["message"].as_str().unwrap();
        assert!(message.contains("metadata.labels") && message.contains(label), "{message}");
    }
}

const NAMESPACES: &str = "/api/v1/namespaces";
const DAEMON_SETS: &str = "/apis/apps/v1/namespaces/home/daemonsets";

/// An agent of the DaemonSet `agents` in the namespace `home`, which has written on two pods, and has seen that of one
/// of them.
async fn agent_that_has_written(api: &Api) -> Followed {
    api.has(NAMESPACES, ["default", "home"].map(|name| json!({"metadata": {"name": name}})).into());
    let mut elsewhere = asking("elsewhere", "10.0.1.1");
    elsewhere["metadata"]["annotations"]["malla.dev/redirection"] = json!("enabled");
    elsewhere["spec"]["nodeName"] = json!("b");
    let pods = [asking("one", "10.0.0.1"), asking("two", "10.0.0.2"), pod("never", "10.0.0.5")];
    api.has(PODS, pods.into_iter().chain([elsewhere]).collect());
    let owner = Arc::new(Owner::new(api.client(), "home/agents".parse().unwrap()));
    tokio::spawn(Arc::clone(&owner).follow());
    let followed = api.follow_of(Some(owner));
    for path in ["watch pods", "watch namespaces", "watch daemonsets"] {
        until(path, || api.asked(path) == 1).await;
    }
    api.event_at(DAEMON_SETS, "ADDED", json!({"metadata": {}}));
    let names = ["uid-one", "uid-two"];
    let outcomes = names.map(|uid| (uid.into(), Outcome::Enrolled));
    followed.outcomes.send_replace(Arc::new(outcomes.into()));
    until("two annotations", || api.written("PATCH").len() == 2).await;
    let mut seen = asking("one", "10.0.0.1");
    seen["metadata"]["annotations"]["malla.dev/redirection"] = json!("enabled");
    api.event("MODIFIED", seen);
    followed
}

/// The pods on which this was written, after the first so many writes.
fn told(api: &Api, after: usize, what: &Value) -> Vec<String> {
    let written = api.written("PATCH").into_iter().skip(after);
    let mut told: Vec<_> = written
        .map(|(path, body)| {
            assert_eq!(&body["metadata"]["annotations"]["malla.dev/redirection"], what, "{path}");
            path.rsplit('/').next().unwrap().to_owned()
        })
        .collect();
    told.sort();
    told
}

/// Also of the pod of which it is not known yet that it says something; of no other node's, and never again.
#[tokio::test]
async fn what_pods_say_is_taken_back_when_the_daemonset_or_its_namespace_goes() {
    let going = |name: &str| json!({"metadata": {"name": name, "deletionTimestamp": "2026-01-01T00:00:00Z"}});
    for (path, kind, object) in [
        (DAEMON_SETS, "DELETED", json!({"metadata": {}})),
        (DAEMON_SETS, "MODIFIED", going("agents")),
        (NAMESPACES, "MODIFIED", going("home")),
    ] {
        let api = Api::start().await;
        let mut followed = agent_that_has_written(&api).await;
        // Somebody else's going is nothing to it.
        api.event_at(NAMESPACES, "MODIFIED", going("default"));
        api.event("ADDED", asking("later", "10.0.0.9"));
        followed.until_pods(&["elsewhere", "later", "never", "one", "two"]).await;
        assert_eq!(api.written("PATCH").len(), 2, "nothing yet");
        assert!(!*followed.taken_back.borrow());

        api.event_at(path, kind, object);
        timeout(SOON, followed.taken_back.wait_for(|is_done| *is_done)).await.unwrap().unwrap();
        assert_eq!(told(&api, 2, &Value::Null), ["one", "two"], "{kind} {path}");
        // What becomes of pods is told to nobody any more.
        let failing = Outcome::Failing("no room".into());
        let outcomes = Outcomes::from([("uid-one".into(), failing)]);
        followed.outcomes.send_replace(Arc::new(outcomes));
        api.event("ADDED", pod("last", "10.0.0.10"));
        followed.until_pods(&["elsewhere", "last", "later", "never", "one", "two"]).await;
        assert_eq!((api.written("PATCH").len(), api.written("POST").len()), (4, 0));
        // Nor when all of that is gone in the end.
        api.event_at(NAMESPACES, "DELETED", going("home"));
        for (name, ip) in [("a", "10.0.0.21"), ("b", "10.0.0.22")] {
            api.event("ADDED", pod(name, ip));
            let is_there =
                |snapshot: &Snapshot| snapshot.workload(&format!("uid-{name}")).is_some();
            followed.until(is_there).await;
        }
        assert_eq!((api.written("PATCH").len(), *followed.taken_back.borrow()), (4, true));
    }
}

#[tokio::test]
async fn pods_say_it_again_when_the_daemonset_is_made_again() {
    let api = Api::start().await;
    let mut followed = agent_that_has_written(&api).await;
    api.event_at(DAEMON_SETS, "DELETED", json!({"metadata": {}}));
    timeout(SOON, followed.taken_back.wait_for(|is_done| *is_done)).await.unwrap().unwrap();
    api.event("MODIFIED", asking("one", "10.0.0.1"));
    api.event_at(DAEMON_SETS, "ADDED", json!({"metadata": {}}));
    until("both to be told again", || api.written("PATCH").len() == 6).await;
    assert_eq!(told(&api, 4, &json!("enabled")), ["one", "two"]);
    assert!(!*followed.taken_back.borrow_and_update());
}

/// A server that is busy is asked again; one that lets nobody write any more is not waited for.
#[tokio::test]
async fn taking_back_is_tried_again_unless_the_right_to_it_is_gone() {
    let api = Api::start().await;
    let mut followed = agent_that_has_written(&api).await;
    let refuse = |status| api.held.lock().unwrap().refuses_writes = status;
    refuse(Some(StatusCode::INTERNAL_SERVER_ERROR));
    api.event_at(DAEMON_SETS, "DELETED", json!({"metadata": {}}));
    until("four more", || api.written("PATCH").len() >= 6).await;
    assert!(!*followed.taken_back.borrow());
    refuse(None);
    timeout(SOON, followed.taken_back.wait_for(|is_done| *is_done)).await.unwrap().unwrap();

    let api = Api::start().await;
    let mut followed = agent_that_has_written(&api).await;
    api.held.lock().unwrap().refuses_writes = Some(StatusCode::FORBIDDEN);
    api.event_at(DAEMON_SETS, "DELETED", json!({"metadata": {}}));
    timeout(SOON, followed.taken_back.wait_for(|is_done| *is_done)).await.unwrap().unwrap();
    assert_eq!(told(&api, 2, &Value::Null), ["one", "two"], "each tried once");
}

/// It may have gone while the agent started, and its namespace before that.
#[tokio::test]
async fn agent_that_starts_too_late_takes_back_what_others_have_written() {
    for (is_told, namespaces) in [(true, &["default", "home"][..]), (false, &["default"])] {
        let api = Api::start().await;
        let namespaces = namespaces.iter().map(|name| json!({"metadata": {"name": name}}));
        api.has(NAMESPACES, namespaces.collect());
        let mut left = asking("left", "10.0.0.4");
        left["metadata"]["annotations"]["malla.dev/redirection"] = json!("enabled");
        api.has(PODS, vec![left]);
        let owner = Arc::new(Owner::new(api.client(), "home/agents".parse().unwrap()));
        tokio::spawn(Arc::clone(&owner).follow());
        until("a watch", || api.asked("watch daemonsets") == 1).await;
        if is_told {
            api.event_at(DAEMON_SETS, "DELETED", json!({"metadata": {}}));
            timeout(SOON, owner.heard().wait_for(|is_gone| *is_gone)).await.unwrap().unwrap();
        }
        let mut followed = api.follow_of(Some(owner));
        timeout(SOON, followed.taken_back.wait_for(|is_done| *is_done)).await.unwrap().unwrap();
        assert_eq!(told(&api, 0, &Value::Null), ["left"]);
    }
}
