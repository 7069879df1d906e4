//! A signer, against a server that speaks as much of the Kubernetes API as it asks for.

use std::path::Path;

use k8s_openapi::ByteString;
use mesh_core::sign::USAGES;
use mesh_core::spiffe::SpiffeId;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, UnixTime};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::task::JoinHandle;

use super::*;
use crate::identity::bundle::{TrustBundles, parse_roots};
use crate::identity::kubernetes::api::REQUESTS;
use crate::identity::kubernetes::testing::{SECRET, Server, new_root};
use crate::identity::testing::{cluster_local, id};
use crate::identity::verify::{PeerRole, verify_peer};

const SIGNER: &str = "a.example/b";
const OTHER: &str = "a.example/c";

/// A signer in a cluster with one node, `a`, and an enrolled namespace.
struct World {
    server: Server,
    leads: watch::Sender<bool>,
    problem: watch::Receiver<Option<String>>,
    task: JoinHandle<()>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl World {
    async fn new() -> Self {
        let (server, client) = Server::start().await;
        server.put("/api/v1/nodes/a", json!({"metadata": {"name": "a", "uid": "uid-a"}}));
        let annotations = json!({"malla.dev/mesh": "enabled"});
        let namespace = json!({"metadata": {"name": "default", "annotations": annotations}});
        server.put("/api/v1/namespaces/default", namespace);
        let settings = Settings {
            signer: SIGNER.into(),
            namespace: "malla-system".into(),
            agent: "malla-agent".into(),
            trust_domain: cluster_local(),
            spread: Duration::from_secs(180),
        };
        let signer = Signer::new(client, settings, CaTelemetry::new());
        let (leads, problem) = (watch::Sender::new(false), signer.problem());
        let task = tokio::spawn(signer.run(leads.subscribe()));
        Self { server, leads, problem, task }
    }

    /// A pod of the node, of the service account `web`.
    fn pod(&self, metadata: Value) {
        let mut pod = json!({
            "metadata": metadata,
            "spec": {"nodeName": "a", "serviceAccountName": "web"},
        });
        pod["metadata"]["namespace"] = json!("default");
        self.server.put("/api/v1/namespaces/default/pods/web-1", pod);
    }

    /// The node's agent asks for a certificate of that service account.
    fn ask(&self, name: &str) {
        self.ask_of(SIGNER, name);
    }

    /// The same of this signer.
    fn ask_of(&self, signer: &str, name: &str) {
        self.server.put(&format!("{REQUESTS}/{name}"), request_of(signer, name, "1"));
    }

    /// Its `status`, when it is answered.
    async fn answer(&self, name: &str) -> Value {
        let path = format!("{REQUESTS}/{name}");
        let is_answered = |server: &Server| {
            let object = server.get(&path);
            let status = &object["status"];
            status["certificate"].is_string() || status["conditions"][0]["type"] == "Denied"
        };
        self.server.until("an answer", is_answered).await;
        self.server.get(&path)["status"].clone()
    }
}

/// What the node's agent asks of a signer.
fn request_of(signer: &str, name: &str, version: &str) -> Value {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let asked = request::make(&id("web"), &key).unwrap();
    let spec = json!({
        "request": ByteString(asked.into_bytes()),
        "signerName": signer,
        "usages": USAGES,
        "expirationSeconds": 3600,
        "username": "system:serviceaccount:malla-system:malla-agent",
        "extra": {NODE_NAME: ["a"], NODE_UID: ["uid-a"]},
    });
    json!({"metadata": {"name": name, "resourceVersion": version}, "spec": spec})
}

/// Whether the certificate in `status` was signed below this root.
fn is_signed_by(root: &str, status: &Value) -> bool {
    let ByteString(chain) = serde_json::from_value(status["certificate"].clone()).unwrap();
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&chain).map(Result::unwrap).collect();
    let (der, root) = parse_roots(Path::new("root"), root.as_bytes()).unwrap().remove(0);
    let trust = TrustBundles::of(&der, root, &cluster_local());
    verify_peer(&trust, &chain, PeerRole::Server, UnixTime::now()).is_ok()
}

/// Each may be 1.5 MB, and whoever may make requests can make many.
#[tokio::test]
async fn requests_are_listed_a_few_at_a_time() {
    let world = World::new().await;
    world.server.put(SECRET, new_root().1);
    world.leads.send_replace(true);
    let listed = |server: &Server| {
        let is_list = |asked: &String| asked.starts_with(REQUESTS) && !asked.contains("watch=1");
        server.asked().into_iter().find(is_list)
    };
    world.server.until("a list", |server| listed(server).is_some()).await;
    let listed = listed(&world.server).unwrap();
    assert!(listed.contains("&limit=8&"), "{listed}");
}

/// Each may be 1.5 MB, and whoever may make pods can make many with one service account.
#[tokio::test]
async fn pods_are_listed_a_few_at_a_time_until_one_takes_part() {
    let world = World::new().await;
    world.server.put(SECRET, new_root().1);
    for number in 0..9 {
        let name = format!("web-{number}");
        // The sixth takes part, and some others that nobody needs to look at.
        let mesh = if number < 5 { "disabled" } else { "enabled" };
        let annotations = json!({"malla.dev/mesh": mesh});
        let metadata = json!({"name": name, "namespace": "default", "annotations": annotations});
        let spec = json!({"nodeName": "a", "serviceAccountName": "web"});
        let pod = json!({"metadata": metadata, "spec": spec});
        world.server.put(&format!("/api/v1/namespaces/default/pods/{name}"), pod);
    }
    world.ask("asked");
    world.leads.send_replace(true);
    let status = world.answer("asked").await;
    assert!(status["certificate"].is_string(), "{status}");
    let asked = world.server.asked();
    let pods: Vec<_> = asked.iter().filter(|asked| asked.contains("/pods")).collect();
    let pages: Vec<_> = pods.iter().filter_map(|asked| asked.split("continue=").nth(1)).collect();
    assert_eq!(pages, ["", "2", "4"], "{pods:?}");
    for asked in pods {
        assert!(asked.contains("status.phase!=Succeeded,status.phase!=Failed&limit=2&"), "{asked}");
    }
}

/// What one request has that cannot be of use keeps nobody else waiting.
#[tokio::test]
async fn request_with_nothing_where_a_list_may_be_stops_no_other() {
    let world = World::new().await;
    world.server.put(SECRET, new_root().1);
    world.pod(json!({"name": "web-1"}));
    let mut odd = request_of(SIGNER, "a-first", "1");
    odd["spec"]["extra"] = json!({"groups": null});
    odd["spec"]["usages"] = json!(null);
    odd["status"] = json!({"conditions": null});
    world.server.put(&format!("{REQUESTS}/a-first"), odd);
    world.ask("later");
    world.leads.send_replace(true);
    assert!(world.answer("later").await["certificate"].is_string());
    assert_eq!(world.answer("a-first").await["conditions"][0]["type"], "Denied");
}

/// The lists and the watches of requests that were asked for.
fn followed(server: &Server) -> (Vec<String>, Vec<String>) {
    let all = format!("{REQUESTS}?");
    let asked = server.asked().into_iter().filter(|asked| asked.starts_with(&all));
    asked.partition(|asked| !asked.contains("watch=1"))
}

/// With 20,000 requests that are answered, whoever asks while they are listed waits for 20 s.
#[tokio::test]
async fn watch_goes_on_from_where_the_last_one_has_ended() {
    let world = World::new().await;
    world.server.put(SECRET, new_root().1);
    let kind = ("certificates.k8s.io/v1", "CertificateSigningRequest");
    let metadata = json!({"resourceVersion": "7"});
    let mark = json!({"apiVersion": kind.0, "kind": kind.1, "metadata": metadata});
    world.server.tell(&[json!({"type": "BOOKMARK", "object": mark})]);
    world.server.tell(&[]);
    world.leads.send_replace(true);
    world.server.until("three watches", |server| followed(server).1.len() == 3).await;
    let (lists, watches) = followed(&world.server);
    assert_eq!(lists.len(), 1, "{lists:?}");
    for (watch, version) in watches.iter().zip([1, 7, 7]) {
        assert!(watch.contains(&format!("&resourceVersion={version}&")), "{watches:?}");
        assert!(watch.contains("&allowWatchBookmarks=true&"), "{watch}");
    }
}

#[tokio::test]
async fn request_that_a_watch_tells_of_is_answered_and_the_next_watch_begins_after_it() {
    let world = World::new().await;
    world.server.put(SECRET, new_root().1);
    world.pod(json!({"name": "web-1"}));
    // As if it had been made after the list.
    world.ask_of(OTHER, "new");
    let new = json!({"type": "ADDED", "object": request_of(SIGNER, "new", "7")});
    let gone = json!({"type": "DELETED", "object": request_of(SIGNER, "gone", "9")});
    world.server.tell(&[new, gone]);
    world.leads.send_replace(true);
    let status = world.answer("new").await;
    assert!(status["certificate"].is_string(), "{status}");
    world.server.until("two watches", |server| followed(server).1.len() == 2).await;
    let (lists, watches) = followed(&world.server);
    assert_eq!(lists.len(), 1, "{lists:?}");
    assert!(watches[1].contains("&resourceVersion=9&"), "{watches:?}");
}

/// Also by a server that does not honour the selector, as this one.
#[tokio::test]
async fn request_to_another_signer_is_left_alone() {
    let world = World::new().await;
    world.server.put(SECRET, new_root().1);
    world.pod(json!({"name": "web-1"}));
    world.ask_of(OTHER, "a-theirs");
    world.ask("b-ours");
    world.leads.send_replace(true);
    let status = world.answer("b-ours").await;
    assert!(status["certificate"].is_string(), "{status}");
    let asked = world.server.asked();
    assert_eq!(asked.iter().filter(|asked| *asked == "/api/v1/nodes/a").count(), 1, "{asked:?}");
    assert!(world.server.get(&format!("{REQUESTS}/a-theirs"))["status"].is_null());
    let selector = "?fieldSelector=spec.signerName%3Da.example%2Fb&";
    let (lists, watches) = followed(&world.server);
    assert!(lists.iter().chain(&watches).all(|asked| asked.contains(selector)), "{asked:?}");
}

/// The API lets whoever has made a request delete it, and make another one of that name.
#[tokio::test]
async fn request_that_has_become_another_signers_is_left_alone() {
    let world = World::new().await;
    world.server.put(SECRET, new_root().1);
    // The API says something that is none.
    let pods = "/api/v1/namespaces/default/pods";
    let pod = json!({"metadata": {"name": "web-1", "namespace": "default"}, "spec": 5});
    world.server.put(&format!("{pods}/web-1"), pod);
    world.ask("a");
    world.ask("b");
    world.leads.send_replace(true);
    let list = format!("{pods}?");
    let attempts =
        |server: &Server| server.asked().iter().filter(|asked| asked.starts_with(&list)).count();
    world.server.until("both attempts", |server| attempts(server) == 2).await;
    // Each is read again a second after its attempt.
    world.ask_of(OTHER, "a");
    world.pod(json!({"name": "web-1"}));
    let status = world.answer("b").await;
    assert!(status["certificate"].is_string(), "{status}");
    assert_eq!(attempts(&world.server), 3);
    assert!(world.server.get(&format!("{REQUESTS}/a"))["status"].is_null());
}

#[tokio::test]
async fn requests_are_listed_again_when_the_server_has_forgotten_their_version() {
    let world = World::new().await;
    world.server.put(SECRET, new_root().1);
    let gone = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "metadata": {},
        "message": "too old resource version", "reason": "Expired", "code": 410,
    });
    world.server.tell(&[json!({"type": "ERROR", "object": gone})]);
    world.leads.send_replace(true);
    world.server.until("two watches", |server| followed(server).1.len() == 2).await;
    assert_eq!(followed(&world.server).0.len(), 2);
}

#[tokio::test]
async fn request_that_could_not_be_answered_is_answered_later_without_a_list() {
    let world = World::new().await;
    world.server.put(SECRET, new_root().1);
    // The API says something that is none.
    let pods = "/api/v1/namespaces/default/pods";
    let pod = json!({"metadata": {"name": "web-1", "namespace": "default"}, "spec": 5});
    world.server.put(&format!("{pods}/web-1"), pod);
    world.ask("one");
    (0..10).for_each(|_| world.server.tell(&[]));
    world.leads.send_replace(true);
    let list = format!("{pods}?");
    let attempts =
        |server: &Server| server.asked().iter().filter(|asked| asked.starts_with(&list)).count();
    world.server.until("all attempts", |server| attempts(server) == 3).await;
    world.pod(json!({"name": "web-1"}));
    let status = world.answer("one").await;
    assert!(status["certificate"].is_string(), "{status}");
    assert_eq!(followed(&world.server).0.len(), 1);
}

#[tokio::test]
async fn root_that_has_signed_signs_on_in_another_term_until_its_successor_is_known() {
    let mut world = World::new().await;
    let ((old, old_secret), (new, new_secret)) = (new_root(), new_root());
    world.server.put(SECRET, old_secret);
    world.pod(json!({"name": "web-1"}));
    world.ask("one");
    world.leads.send_replace(true);
    assert!(is_signed_by(&old, &world.answer("one").await));

    world.leads.send_replace(false);
    // It tells at the end of each term.
    world.problem.changed().await.unwrap();
    world.server.put(SECRET, new_secret);
    world.ask("two");
    world.leads.send_replace(true);
    let answer = world.answer("two").await;
    assert!(is_signed_by(&old, &answer) && !is_signed_by(&new, &answer));
}

/// A finalizer, or a node that is away, may keep its object for ever.
#[tokio::test]
async fn pod_that_should_have_been_gone_for_a_minute_is_none() {
    for (late_s, expected) in [(20, "signed"), (100, "no_pod")] {
        let world = World::new().await;
        world.server.put(SECRET, new_root().1);
        let due = OffsetDateTime::now_utc() - Duration::from_secs(late_s);
        let due = due.format(&Rfc3339).unwrap();
        world.pod(json!({"name": "web-1", "deletionTimestamp": due}));
        world.ask("one");
        world.leads.send_replace(true);
        let condition = world.answer("one").await["conditions"][0].clone();
        assert_eq!(condition["reason"], expected, "{condition}");
    }
}

/// Its agent's token lets it ask as often as it likes.
#[tokio::test]
async fn node_that_asks_a_lot_keeps_no_other_waiting() {
    let world = World::new().await;
    world.server.put(SECRET, new_root().1);
    world.server.put("/api/v1/nodes/b", json!({"metadata": {"name": "b", "uid": "uid-b"}}));
    let metadata = json!({"name": "web-1", "namespace": "default"});
    let spec = json!({"nodeName": "b", "serviceAccountName": "web"});
    let pod = json!({"metadata": metadata, "spec": spec});
    world.server.put("/api/v1/namespaces/default/pods/web-1", pod);
    // What takes long: the API says something that is none, and is asked again.
    let annotations = json!({"malla.dev/mesh": "enabled"});
    let slow = json!({"metadata": {"name": "slow", "annotations": annotations}});
    world.server.put("/api/v1/namespaces/slow", slow);
    let pods = "/api/v1/namespaces/slow/pods";
    let odd = json!({"metadata": {"name": "web-1", "namespace": "slow"}, "spec": 5});
    world.server.put(&format!("{pods}/web-1"), odd);
    let ask = |name: &str, node: &str, namespace: &str| {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let asks = SpiffeId::new(cluster_local(), namespace, "web").unwrap();
        let asked = ByteString(request::make(&asks, &key).unwrap().into_bytes());
        let mut request = request_of(SIGNER, name, "1");
        request["spec"]["request"] = json!(asked);
        request["spec"]["extra"] = json!({NODE_NAME: [node], NODE_UID: [format!("uid-{node}")]});
        world.server.put(&format!("{REQUESTS}/{name}"), request);
    };
    for number in 10..50 {
        ask(&format!("a-{number}"), "a", "slow");
    }
    ask("b", "b", "default");
    world.leads.send_replace(true);
    let status = world.answer("b").await;
    assert!(status["certificate"].is_string(), "{status}");
    let list = format!("{pods}?");
    let of_a = world.server.asked().iter().filter(|asked| asked.starts_with(&list)).count();
    // Eight, or sixteen if a second went by; without their share sixteen, three times each.
    assert!((1..32).contains(&of_a), "{of_a} questions for them before");
}
