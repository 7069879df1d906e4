//! Against a server that speaks as much of the Kubernetes API as is asked for.

mod api;
mod demand;
mod places;
mod policies;
mod report;
mod scan;
mod seen;
mod state;
mod waits;

use std::sync::Arc;
use std::time::Duration;

use hyper::StatusCode;
use mesh_core::snapshot::Snapshot;
use mesh_core::spiffe::SpiffeId;
use serde_json::json;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use self::api::{Api, PATHS, PODS, pod};
use super::ClusterSource;
use super::feed::EXPIRED_WAIT;
use crate::discovery::file::Settings;
use crate::discovery::owner::Owner;
use crate::discovery::{Demand, Outcomes, Problem};
use crate::identity::testing::cluster_local;

const SOON: Duration = Duration::from_secs(20);

impl Api {
    fn source(&self) -> (ClusterSource, watch::Receiver<Arc<Snapshot>>) {
        let settings =
            Settings { node: "a".into(), trust_domain: cluster_local(), tunnel_port: 15019 };
        ClusterSource::new(self.client(), settings, Vec::new())
    }

    fn follow(&self) -> Followed {
        self.follow_of(None)
    }

    /// As an agent of this DaemonSet.
    fn follow_of(&self, owner: Option<Arc<Owner>>) -> Followed {
        let (source, snapshots) = self.source();
        let (problems, confirmed) = (source.problems(), source.confirmed());
        let (demands, taken_back) = (source.demands(), source.taken_back());
        let outcomes = watch::Sender::default();
        let task = tokio::spawn(source.run(outcomes.subscribe(), owner));
        Followed { snapshots, problems, confirmed, demands, outcomes, taken_back, task }
    }
}

struct Followed {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    problems: watch::Receiver<Arc<[Problem]>>,
    confirmed: watch::Receiver<Option<tokio::time::Instant>>,
    demands: mpsc::Sender<Demand>,
    outcomes: watch::Sender<Arc<Outcomes>>,
    taken_back: watch::Receiver<bool>,
    task: JoinHandle<()>,
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Followed {
    async fn until(&mut self, is_so: impl Fn(&Snapshot) -> bool) -> Arc<Snapshot> {
        let waited = timeout(SOON, self.snapshots.wait_for(|snapshot| is_so(snapshot))).await;
        Arc::clone(&waited.expect("a snapshot that never came").unwrap())
    }

    async fn until_pods(&mut self, names: &[&str]) -> Arc<Snapshot> {
        let is_so = |snapshot: &Arc<Snapshot>| {
            let mut found: Vec<_> = snapshot.workloads().map(|w| w.name.to_string()).collect();
            found.sort();
            snapshot.generation > 0 && found == names
        };
        let waited = timeout(SOON, self.snapshots.wait_for(is_so)).await;
        Arc::clone(&waited.unwrap_or_else(|_| panic!("never {names:?}")).unwrap())
    }

    /// As a connection does; returns what is known then.
    async fn know(&mut self, ip: &str) -> Arc<Snapshot> {
        self.know_caller(ip, None).await
    }

    async fn know_caller(&mut self, at: &str, caller: Option<&str>) -> Arc<Snapshot> {
        let (done, answer) = oneshot::channel();
        let caller =
            caller.map(|account| SpiffeId::new(cluster_local(), "default", account).unwrap());
        self.demands.send(Demand::Know { ip: ip(at), caller, done }).await.unwrap();
        let generation = timeout(SOON, answer).await.expect("an answer").unwrap();
        let is_it = |snapshot: &Arc<Snapshot>| snapshot.generation >= generation;
        Arc::clone(&timeout(SOON, self.snapshots.wait_for(is_it)).await.unwrap().unwrap())
    }

    async fn until_problems(&mut self, is_so: impl Fn(&[Problem]) -> bool) -> Arc<[Problem]> {
        let waited = timeout(SOON, self.problems.wait_for(|all| is_so(all))).await;
        Arc::clone(&waited.expect("problems that never came").unwrap())
    }
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    let waiting = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, waiting).await.unwrap_or_else(|_| panic!("never {what}"));
}

fn ip(text: &str) -> std::net::IpAddr {
    text.parse().unwrap()
}

#[tokio::test]
async fn snapshot_waits_for_every_kind_and_then_follows_events() {
    let api = Api::start().await;
    api.has(PODS, vec![pod("one", "10.0.0.1")]);
    api.held.lock().unwrap().silent.push("nodes".into());
    let followed = api.follow();
    until("a list of every kind", || {
        ["namespaces", "nodes", "pods", "services", "endpointslices"]
            .iter()
            .all(|kind| api.asked(&format!("list {kind}")) > 0)
    })
    .await;
    until("the pods to be watched", || api.asked("watch pods") == 1).await;
    assert_eq!(followed.snapshots.borrow().generation, 0);
    assert!(followed.confirmed.borrow().is_none());
    drop(followed);

    api.held.lock().unwrap().silent.clear();
    let mut followed = api.follow();
    followed.until_pods(&["one"]).await;
    until("watches", || api.asked("watch pods") == 2).await;
    api.event("ADDED", pod("two", "10.0.0.2"));
    followed.until_pods(&["one", "two"]).await;
    api.event("DELETED", pod("one", "10.0.0.1"));
    let snapshot = followed.until_pods(&["two"]).await;
    assert_eq!(
        snapshot.workload("uid-two").unwrap().ips,
        ["10.0.0.2".parse::<std::net::IpAddr>().unwrap()]
    );
    assert!(followed.confirmed.borrow().is_some());
}

#[tokio::test]
async fn change_of_what_is_not_read_makes_no_snapshot() {
    let api = Api::start().await;
    api.has(PODS, vec![pod("one", "10.0.0.1")]);
    let mut followed = api.follow();
    let before = followed.until_pods(&["one"]).await.generation;
    until("a watch", || api.asked("watch pods") == 1).await;
    let mut beating = pod("one", "10.0.0.1");
    beating["status"]["conditions"] = json!([{"type": "Ready", "lastProbeTime": "now"}]);
    for _ in 0..10 {
        api.event("MODIFIED", beating.clone());
    }
    api.event("ADDED", pod("two", "10.0.0.2"));
    assert_eq!(followed.until_pods(&["one", "two"]).await.generation, before + 1);
}

#[tokio::test]
async fn what_is_wrong_with_a_change_is_told_with_it() {
    let api = Api::start().await;
    api.has(PODS, vec![pod("one", "10.0.0.1")]);
    let mut followed = api.follow();
    followed.until_pods(&["one"]).await;
    until("a watch", || api.asked("watch pods") == 1).await;
    let mut wrong = pod("one", "10.0.0.1");
    wrong["metadata"]["annotations"] = json!({"malla.dev/mode": "hard"});
    api.event("MODIFIED", wrong);
    // Nothing else comes, and what is kept is looked through twice a minute.
    let is_told = |all: &Arc<[Problem]>| all.iter().any(|problem| problem.message.contains("hard"));
    let told = timeout(Duration::from_secs(5), followed.problems.wait_for(is_told)).await;
    told.expect("with the change").unwrap();
}

#[tokio::test]
async fn server_that_is_down_leaves_the_last_state_and_is_told() {
    let api = Api::start().await;
    api.has(PODS, vec![pod("one", "10.0.0.1")]);
    let mut followed = api.follow();
    followed.until_pods(&["one"]).await;
    until("a watch", || api.asked("watch pods") == 1).await;
    for status in [StatusCode::SERVICE_UNAVAILABLE, StatusCode::TOO_MANY_REQUESTS] {
        api.set_down(Some(status));
        let problems = followed.until_problems(|all| all.len() == PATHS.len()).await;
        assert!(problems[0].message.contains("the last state stays in force"), "{}", problems[0]);
        assert_eq!(followed.snapshots.borrow().workloads().count(), 1);
        api.has(PODS, vec![pod("one", "10.0.0.1"), pod("three", "10.0.0.3")]);
        api.set_down(None);
        followed.until_problems(|all| all.is_empty()).await;
    }
    // It went on from where it was: what it missed comes with the events, not with a list.
    assert_eq!(api.asked("list pods"), 1);
    api.event("ADDED", pod("three", "10.0.0.3"));
    followed.until_pods(&["one", "three"]).await;
}

#[tokio::test]
async fn version_that_is_forgotten_is_listed_again() {
    let api = Api::start().await;
    api.has(PODS, vec![pod("one", "10.0.0.1")]);
    let mut followed = api.follow();
    followed.until_pods(&["one"]).await;
    until("a watch", || api.asked("watch pods") == 1).await;
    // As an event of the watch, and as the answer to it.
    api.has(PODS, vec![pod("two", "10.0.0.2")]);
    api.event("ERROR", json!({"kind": "Status", "metadata": {}, "code": 410, "message": "too old", "reason": "Expired", "status": "Failure"}));
    followed.until_pods(&["two"]).await;
    api.has(PODS, vec![pod("three", "10.0.0.3")]);
    api.set_down(Some(StatusCode::GONE));
    until("a watch", || api.asked("watch pods") >= 3).await;
    api.set_down(None);
    followed.until_pods(&["three"]).await;
}

/// A server that has just started tells it to everybody at once.
#[tokio::test]
async fn agents_whose_version_is_forgotten_together_do_not_list_together() {
    const MANY: usize = 16;
    let api = Api::start().await;
    let _all: Vec<_> = (0..MANY).map(|_| api.follow()).collect();
    until("a watch of each", || api.asked("watch pods") == MANY).await;
    assert_eq!(api.asked("list pods"), MANY);
    api.event("ERROR", json!({"kind": "Status", "metadata": {}, "code": 410, "message": "too old", "reason": "Expired", "status": "Failure"}));
    until("a list of each", || api.asked("list pods") == 2 * MANY).await;
    let again = api.asked_at("list pods").split_off(MANY);
    let took = again[MANY - 1] - again[0];
    // So many that are spread evenly are within a tenth of it once in 10^14 times.
    assert!(took > EXPIRED_WAIT / 10, "all of them within {took:?}");
}

#[tokio::test]
async fn long_list_comes_in_pages() {
    let api = Api::start().await;
    let names: Vec<_> = (0..1_201).map(|n| format!("pod-{n:04}")).collect();
    let pods = names.iter().enumerate().map(|(n, name)| {
        let [_, _, high, low] = u32::try_from(n).unwrap().to_be_bytes();
        pod(name, &format!("10.1.{high}.{low}"))
    });
    api.has(PODS, pods.collect());
    let mut followed = api.follow();
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    followed.until_pods(&names).await;
    assert_eq!(api.asked("list pods"), 3);
}
