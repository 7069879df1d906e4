//! Against a server that speaks as much of the Kubernetes API as is asked for.

mod demand;
mod places;
mod policies;
mod report;
mod scan;
mod seen;
mod state;
mod waits;

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{HeaderValue, RETRY_AFTER};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use kube::{Client, Config};
use mesh_core::snapshot::Snapshot;
use mesh_core::spiffe::SpiffeId;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::ClusterSource;
use super::feed::EXPIRED_WAIT;
use crate::discovery::client::by_config;
use crate::discovery::file::Settings;
use crate::discovery::{Demand, Outcomes, Problem};
use crate::identity::testing::cluster_local;

const SOON: Duration = Duration::from_secs(20);

/// What the server holds. Versions are counted over all kinds.
#[derive(Default)]
struct Held {
    version: u64,
    lists: HashMap<String, Vec<Value>>,
    /// Open watches by path.
    watches: HashMap<String, Vec<mpsc::UnboundedSender<String>>>,
    /// What was asked, without the times.
    asked: Vec<String>,
    /// When.
    asked_at: Vec<tokio::time::Instant>,
    /// Answered to everything.
    down: Option<StatusCode>,
    /// Beside that, in its header.
    retry_after: Option<&'static str>,
    /// Kinds that are not answered.
    silent: Vec<String>,
    /// Paths that are refused.
    forbidden: Vec<String>,
    /// What is written is not answered.
    ignores_writes: bool,
    /// What was written: method, path and body.
    written: Vec<(String, String, Value)>,
    /// Pods that are only read, by path.
    elsewhere: BTreeMap<String, Value>,
}

#[derive(Clone)]
struct Api {
    held: Arc<Mutex<Held>>,
    addr: SocketAddr,
}

const PATHS: [&str; 5] = [
    "/api/v1/namespaces",
    "/api/v1/nodes",
    "/api/v1/pods",
    "/api/v1/services",
    "/apis/discovery.k8s.io/v1/endpointslices",
];
const PODS: &str = "/api/v1/pods";

fn pod(name: &str, ip: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}")},
        "spec": {"nodeName": "a", "containers": []},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}]},
    })
}

impl Api {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let api = Self { held: Arc::default(), addr };
        let serving = api.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let api = serving.clone();
                let service = service_fn(move |request| {
                    let api = api.clone();
                    async move { Ok::<_, Infallible>(api.take(request).await) }
                });
                let serve = hyper::server::conn::http1::Builder::new();
                tokio::spawn(serve.serve_connection(TokioIo::new(stream), service));
            }
        });
        api
    }

    async fn take(&self, request: Request<Incoming>) -> Response<BoxBody<Bytes, Infallible>> {
        if request.method() == hyper::Method::GET {
            return self.answer(&request);
        }
        let (method, path) = (request.method().to_string(), request.uri().path().to_owned());
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let name = serde_json::from_slice::<Value>(&body).unwrap();
        let (exists, is_ignored) = {
            let mut held = self.held.lock().unwrap();
            let exists = held.written.iter().any(|(verb, _, body)| {
                verb == "POST" && method == "POST" && body["metadata"] == name["metadata"]
            });
            held.written.push((method, path, name));
            (exists, held.ignores_writes)
        };
        if is_ignored {
            return std::future::pending().await;
        }
        if exists {
            refuse(StatusCode::CONFLICT)
        } else {
            Response::new(BodyExt::boxed(Full::from("{}")))
        }
    }

    fn written(&self, method: &str) -> Vec<(String, Value)> {
        let held = self.held.lock().unwrap();
        let of = held.written.iter().filter(|(verb, _, _)| verb == method);
        of.map(|(_, path, body)| (path.clone(), body.clone())).collect()
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<BoxBody<Bytes, Infallible>> {
        let mut held = self.held.lock().unwrap();
        let path = request.uri().path().to_owned();
        let query: HashMap<String, String> = request
            .uri()
            .query()
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        let kind = path.rsplit('/').next().unwrap().to_owned();
        let what = if query.contains_key("watch") { "watch" } else { "list" };
        held.asked.push(format!("{what} {kind}"));
        held.asked_at.push(tokio::time::Instant::now());
        if let Some(status) = held.down {
            let mut response = refuse(status);
            if let Some(seconds) = held.retry_after {
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static(seconds));
            }
            return response;
        }
        // A large cluster's are not for every node: only those of one, or at one address, may be asked for.
        let are_few = query.get("fieldSelector").is_some_and(|selector| {
            ["spec.nodeName%3D", "status.podIP%3D"].iter().any(|few| selector.starts_with(few))
        });
        if path == PODS && !are_few {
            return refuse(StatusCode::BAD_REQUEST);
        }
        if held.forbidden.contains(&path) {
            return refuse(StatusCode::FORBIDDEN);
        }
        if held.silent.contains(&kind) {
            let never = stream::pending::<Result<Frame<Bytes>, Infallible>>();
            return Response::new(BodyExt::boxed(StreamBody::new(never)));
        }
        if let Some(at) = query.get("fieldSelector").and_then(|s| s.strip_prefix("status.podIP%3D"))
        {
            let is_at = |pod: &&Value| pod["status"]["podIPs"][0]["ip"] == *at;
            return page(&held.elsewhere.values().filter(is_at).collect::<Vec<_>>(), &query, 0);
        }
        let on = query.get("fieldSelector").and_then(|s| s.strip_prefix("spec.nodeName%3D"));
        if let Some(node) = on.filter(|node| **node != *"a") {
            let is_on = |pod: &&Value| pod["spec"]["nodeName"] == *node;
            return page(&held.elsewhere.values().filter(is_on).collect::<Vec<_>>(), &query, 0);
        }
        let of =
            query.get("fieldSelector").and_then(|s| s.strip_prefix("spec.serviceAccountName%3D"));
        if let Some(account) = of {
            let is_of = |pod: &&Value| pod["spec"]["serviceAccountName"] == *account;
            return page(&held.elsewhere.values().filter(is_of).collect::<Vec<_>>(), &query, 0);
        }
        if path.starts_with("/api/v1/namespaces/") {
            return match held.elsewhere.get(&path) {
                Some(pod) => Response::new(BodyExt::boxed(Full::from(pod.to_string()))),
                None => refuse(StatusCode::NOT_FOUND),
            };
        }
        if what == "watch" {
            let (sender, events) = mpsc::unbounded_channel();
            held.watches.entry(path).or_default().push(sender);
            let lines = stream::unfold(events, |mut events| async move {
                let line: String = events.recv().await?;
                Some((Ok(Frame::data(Bytes::from(line + "\n"))), events))
            });
            return Response::new(BodyExt::boxed(StreamBody::new(lines)));
        }
        let all: Vec<_> = held.lists.get(&path).into_iter().flatten().collect();
        page(&all, &query, held.version)
    }

    fn has(&self, path: &str, objects: Vec<Value>) {
        self.held.lock().unwrap().lists.insert(path.into(), objects);
    }

    /// An event of everybody who watches pods.
    fn event(&self, kind: &str, object: Value) {
        self.event_at(PODS, kind, object);
    }

    fn event_at(&self, path: &str, kind: &str, mut object: Value) {
        let mut held = self.held.lock().unwrap();
        held.version += 1;
        object["metadata"]["resourceVersion"] = json!(held.version.to_string());
        let line = json!({"type": kind, "object": object}).to_string();
        for watch in held.watches.entry(path.into()).or_default() {
            watch.send(line.clone()).ok();
        }
    }

    /// Ends every watch, and answers like this from now on.
    fn set_down(&self, down: Option<StatusCode>) {
        let mut held = self.held.lock().unwrap();
        held.down = down;
        held.watches.clear();
    }

    /// Ends every watch of this path, and refuses it from now on, as without the right to it.
    fn forbid(&self, path: &str) {
        let mut held = self.held.lock().unwrap();
        held.forbidden.push(path.into());
        held.watches.remove(path);
    }

    fn asked(&self, what: &str) -> usize {
        self.held.lock().unwrap().asked.iter().filter(|asked| *asked == what).count()
    }

    fn asked_at(&self, what: &str) -> Vec<tokio::time::Instant> {
        let held = self.held.lock().unwrap();
        let all = held.asked.iter().zip(&held.asked_at);
        all.filter(|(asked, _)| *asked == what).map(|(_, at)| *at).collect()
    }

    fn client(&self) -> Client {
        let config = Config::new(format!("http://{}", self.addr).parse().unwrap());
        by_config(config).unwrap()
    }

    fn source(&self) -> (ClusterSource, watch::Receiver<Arc<Snapshot>>) {
        let settings =
            Settings { node: "a".into(), trust_domain: cluster_local(), tunnel_port: 15019 };
        ClusterSource::new(self.client(), settings, Vec::new())
    }

    fn follow(&self) -> Followed {
        let (source, snapshots) = self.source();
        let (problems, confirmed) = (source.problems(), source.confirmed());
        let demands = source.demands();
        let outcomes = watch::Sender::default();
        let task = tokio::spawn(source.run(outcomes.subscribe()));
        Followed { snapshots, problems, confirmed, demands, outcomes, task }
    }
}

/// So many of them as are asked for.
fn page(
    all: &[&Value],
    query: &HashMap<String, String>,
    version: u64,
) -> Response<BoxBody<Bytes, Infallible>> {
    // Without one it is all of them.
    let limit: usize = query.get("limit").map_or(usize::MAX, |limit| limit.parse().unwrap());
    let from: usize = query.get("continue").map_or(0, |at| at.parse().unwrap());
    let items: Vec<_> = all.iter().skip(from).take(limit).collect();
    let next = from + items.len();
    let next = if next < all.len() { next.to_string() } else { String::new() };
    let metadata = json!({"resourceVersion": version.to_string(), "continue": next});
    let list = json!({"metadata": metadata, "items": items});
    Response::new(BodyExt::boxed(Full::from(list.to_string())))
}

fn refuse(status: StatusCode) -> Response<BoxBody<Bytes, Infallible>> {
    let body = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "metadata": {},
        "message": "as the test wants", "reason": "Test", "code": status.as_u16(),
    });
    let mut response = Response::new(BodyExt::boxed(Full::from(body.to_string())));
    *response.status_mut() = status;
    response
}

struct Followed {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    problems: watch::Receiver<Arc<[Problem]>>,
    confirmed: watch::Receiver<Option<tokio::time::Instant>>,
    demands: mpsc::Sender<Demand>,
    outcomes: watch::Sender<Arc<Outcomes>>,
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
