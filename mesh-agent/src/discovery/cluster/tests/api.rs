//! A server that speaks as much of the Kubernetes API as is asked for.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

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
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use crate::discovery::client::by_config;

/// What the server holds. Versions are counted over all kinds.
#[derive(Default)]
pub(super) struct Held {
    version: u64,
    pub(super) lists: HashMap<String, Vec<Value>>,
    /// Open watches by path.
    watches: HashMap<String, Vec<mpsc::UnboundedSender<String>>>,
    /// What was asked, without the times.
    asked: Vec<String>,
    /// When.
    asked_at: Vec<tokio::time::Instant>,
    /// Answered to everything.
    pub(super) down: Option<StatusCode>,
    /// Beside that, in its header.
    pub(super) retry_after: Option<&'static str>,
    /// Kinds that are not answered.
    pub(super) silent: Vec<String>,
    /// Paths that are refused.
    pub(super) forbidden: Vec<String>,
    /// What is written is not answered.
    pub(super) ignores_writes: bool,
    /// What is written is refused like this.
    pub(super) refuses_writes: Option<StatusCode>,
    /// What was written, or was to be: method, path and body.
    written: Vec<(String, String, Value)>,
    /// Pods that are only read, by path.
    pub(super) elsewhere: BTreeMap<String, Value>,
}

#[derive(Clone)]
pub(super) struct Api {
    pub(super) held: Arc<Mutex<Held>>,
    addr: SocketAddr,
}

pub(super) const PATHS: [&str; 5] = [
    "/api/v1/namespaces",
    "/api/v1/nodes",
    "/api/v1/pods",
    "/api/v1/services",
    "/apis/discovery.k8s.io/v1/endpointslices",
];
pub(super) const PODS: &str = "/api/v1/pods";

pub(super) fn pod(name: &str, ip: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}")},
        "spec": {"nodeName": "a", "containers": []},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}]},
    })
}

impl Api {
    pub(super) async fn start() -> Self {
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
        let (exists, is_ignored, refused) = {
            let mut held = self.held.lock().unwrap();
            let exists = held.written.iter().any(|(verb, _, body)| {
                verb == "POST" && method == "POST" && body["metadata"] == name["metadata"]
            });
            held.written.push((method, path, name));
            (exists, held.ignores_writes, held.refuses_writes)
        };
        if is_ignored {
            return std::future::pending().await;
        }
        if let Some(status) = refused.or_else(|| exists.then_some(StatusCode::CONFLICT)) {
            refuse(status)
        } else {
            Response::new(BodyExt::boxed(Full::from("{}")))
        }
    }

    pub(super) fn written(&self, method: &str) -> Vec<(String, Value)> {
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

    pub(super) fn has(&self, path: &str, objects: Vec<Value>) {
        self.held.lock().unwrap().lists.insert(path.into(), objects);
    }

    /// An event of everybody who watches pods.
    pub(super) fn event(&self, kind: &str, object: Value) {
        self.event_at(PODS, kind, object);
    }

    pub(super) fn event_at(&self, path: &str, kind: &str, mut object: Value) {
        let mut held = self.held.lock().unwrap();
        held.version += 1;
        object["metadata"]["resourceVersion"] = json!(held.version.to_string());
        let line = json!({"type": kind, "object": object}).to_string();
        for watch in held.watches.entry(path.into()).or_default() {
            watch.send(line.clone()).ok();
        }
    }

    /// Ends every watch, and answers like this from now on.
    pub(super) fn set_down(&self, down: Option<StatusCode>) {
        let mut held = self.held.lock().unwrap();
        held.down = down;
        held.watches.clear();
    }

    /// Ends every watch of this path, and refuses it from now on, as without the right to it.
    pub(super) fn forbid(&self, path: &str) {
        let mut held = self.held.lock().unwrap();
        held.forbidden.push(path.into());
        held.watches.remove(path);
    }

    pub(super) fn asked(&self, what: &str) -> usize {
        self.held.lock().unwrap().asked.iter().filter(|asked| *asked == what).count()
    }

    pub(super) fn asked_at(&self, what: &str) -> Vec<tokio::time::Instant> {
        let held = self.held.lock().unwrap();
        let all = held.asked.iter().zip(&held.asked_at);
        all.filter(|(asked, _)| *asked == what).map(|(_, at)| *at).collect()
    }

    pub(super) fn client(&self) -> Client {
        let config = Config::new(format!("http://{}", self.addr).parse().unwrap());
        by_config(config).unwrap()
    }
}

/// So many of them as are asked for.
pub(super) fn page(
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

pub(super) fn refuse(status: StatusCode) -> Response<BoxBody<Bytes, Infallible>> {
    let body = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "metadata": {},
        "message": "as the test wants", "reason": "Test", "code": status.as_u16(),
    });
    let mut response = Response::new(BodyExt::boxed(Full::from(body.to_string())));
    *response.status_mut() = status;
    response
}
