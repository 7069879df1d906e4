//! An API server for tests: objects by their path, which are read, listed, made and patched.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use k8s_openapi::ByteString;
use kube::Client;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};

use crate::dirwatch::testing::TempDir;
use crate::discovery::client;
use crate::identity::authority::make_root;
use crate::identity::testing::cluster_local;

/// Where the CA's Secret is.
pub(super) const SECRET: &str = "/api/v1/namespaces/malla-system/secrets/malla-ca";

type Answer = http::Response<BoxBody<Bytes, Infallible>>;

/// The server. Whoever has a clone has the same one.
#[derive(Clone, Debug, Default)]
pub(super) struct Server(Arc<Mutex<Held>>);

#[derive(Debug, Default)]
struct Held {
    objects: BTreeMap<String, Value>,
    /// What was read, by path and query.
    asked: Vec<String>,
    /// What the next watches are told before they end; the one after these is told nothing, for ever.
    watches: VecDeque<String>,
    /// What is written is, and nobody is told so.
    loses_answers: bool,
}

impl Server {
    /// Answers until the test ends.
    pub(super) async fn start() -> (Self, Client) {
        let (server, dir) = (Self::default(), TempDir::new());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let path = dir.path().join("config");
        let address = format!("http://{}", listener.local_addr().unwrap());
        std::fs::write(&path, kubeconfig(&address)).unwrap();
        let client = client::client(Some(&path)).await.unwrap();
        let serving = server.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let server = serving.clone();
                let service = service_fn(move |request: http::Request<Incoming>| {
                    let server = server.clone();
                    async move { Ok::<_, Infallible>(server.answer(request).await) }
                });
                let serve = hyper::server::conn::http1::Builder::new();
                tokio::spawn(serve.serve_connection(TokioIo::new(stream), service));
            }
        });
        (server, client)
    }

    pub(super) fn put(&self, path: &str, object: Value) {
        self.0.lock().unwrap().objects.insert(path.to_owned(), object);
    }

    /// The object at `path`; null if there is none.
    pub(super) fn get(&self, path: &str) -> Value {
        self.0.lock().unwrap().objects.get(path).cloned().unwrap_or_default()
    }

    pub(super) fn asked(&self) -> Vec<String> {
        self.0.lock().unwrap().asked.clone()
    }

    /// The next watch is told of these events, and ends.
    pub(super) fn tell(&self, events: &[Value]) {
        let lines = events.iter().map(|event| format!("{event}\n")).collect();
        self.0.lock().unwrap().watches.push_back(lines);
    }

    /// Whether who writes is told, from now on, that it may have been done or not.
    pub(super) fn lose_answers(&self, loses: bool) {
        self.0.lock().unwrap().loses_answers = loses;
    }

    pub(super) async fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let waiting = async {
            while !is_so(self) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        let waited = timeout(Duration::from_secs(20), waiting).await;
        waited.unwrap_or_else(|_| panic!("never {what}: {:?}", self.asked()));
    }

    async fn answer(&self, request: http::Request<Incoming>) -> Answer {
        let (method, uri) = (request.method().to_string(), request.uri().clone());
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let sent = || serde_json::from_slice::<Value>(&body).unwrap();
        let mut held = self.0.lock().unwrap();
        let found = match method.as_str() {
            "GET" => {
                held.asked.push(uri.to_string());
                let query = uri.query().unwrap_or_default();
                if query.contains("watch=1") {
                    if let Some(lines) = held.watches.pop_front() {
                        return http::Response::new(BodyExt::boxed(Full::from(lines)));
                    }
                    let never = stream::pending::<Result<Frame<Bytes>, Infallible>>();
                    return http::Response::new(BodyExt::boxed(StreamBody::new(never)));
                }
                match query.contains("fieldSelector=") {
                    true => Some(held.list(uri.path(), query)),
                    false => held.objects.get(uri.path()).cloned(),
                }
            }
            "POST" => {
                let object = sent();
                let name = object["metadata"]["name"].as_str().unwrap();
                held.objects.insert(format!("{}/{name}", uri.path()), object.clone());
                Some(object)
            }
            _ => {
                let parts = ["/approval", "/status"];
                let whole = parts.iter().find_map(|part| uri.path().strip_suffix(part));
                let object = held.objects.get_mut(whole.unwrap_or_else(|| uri.path()));
                object.map(|object| {
                    merge(object, sent());
                    object.clone()
                })
            }
        };
        let refused = |code: http::StatusCode, message| {
            let body = json!({
                "kind": "Status", "apiVersion": "v1", "status": "Failure", "metadata": {},
                "message": message, "reason": "Test", "code": code.as_u16(),
            });
            (code, body)
        };
        let (status, body) = match found {
            Some(_) if held.loses_answers && method != "GET" => {
                let code = http::StatusCode::INTERNAL_SERVER_ERROR;
                refused(code, "etcdserver: request timed out")
            }
            Some(object) => (http::StatusCode::OK, object),
            None => refused(http::StatusCode::NOT_FOUND, "there is none"),
        };
        let mut response = http::Response::new(BodyExt::boxed(Full::from(body.to_string())));
        *response.status_mut() = status;
        response
    }
}

impl Held {
    /// Those of a page, whose number goes on from the one before.
    fn list(&self, path: &str, query: &str) -> Value {
        let said = |name: &str| {
            let mut words = query.split('&').filter_map(|word| word.split_once('='));
            words.find(|(key, _)| *key == name).and_then(|(_, value)| value.parse::<usize>().ok())
        };
        let of = format!("{path}/");
        let all: Vec<_> = self.objects.iter().filter(|(at, _)| at.starts_with(&of)).collect();
        let (from, most) = (said("continue").unwrap_or(0), said("limit").unwrap_or(usize::MAX));
        let items: Vec<_> = all.iter().skip(from).take(most).map(|(_, object)| object).collect();
        let next = from + items.len();
        let next = if next < all.len() { next.to_string() } else { String::new() };
        json!({"metadata": {"resourceVersion": "1", "continue": next}, "items": items})
    }
}

/// RFC 7396 section 2, but that nothing is taken away.
fn merge(into: &mut Value, patch: Value) {
    let Value::Object(fields) = patch else {
        *into = patch;
        return;
    };
    if !into.is_object() {
        *into = json!({});
    }
    for (key, value) in fields {
        merge(&mut into[key], value);
    }
}

/// One that leads to the server at this address.
pub(super) fn kubeconfig(server: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: here\n\
         clusters: [{{name: c, cluster: {{server: '{server}'}}}}]\n\
         users: [{{name: u, user: {{}}}}]\n\
         contexts: [{{name: here, context: {{cluster: c, user: u}}}}]\n"
    )
}

/// A new root in PEM, and the Secret that holds it.
pub(super) fn new_root() -> (String, Value) {
    let (cert, key) = make_root(&cluster_local(), SystemTime::now()).unwrap();
    let bytes = |text: &str| ByteString(text.as_bytes().to_vec());
    let data = json!({"tls.crt": bytes(&cert.pem()), "tls.key": bytes(&key.serialize_pem())});
    (cert.pem(), json!({"metadata": {"name": "malla-ca"}, "data": data}))
}
