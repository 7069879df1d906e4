//! The agent's side: asks a signer for certificates, one for each service account of this node.
//!
//! # Guarantees
//!
//! - A request that was not answered is waited for, not made again: a signer that is away for an hour
//!   finds one request of each workload and node, and not a hundred.
//! - Agents that start together do not ask together, and none asks for everything at once.
//! - What comes back counts only if it is for the key and the identity that were asked for.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use kube::Client;
use mesh_core::sign::USAGES;
use mesh_core::spiffe::SpiffeId;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData as _};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, sleep_until};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};
use zeroize::{Zeroize as _, Zeroizing};

use super::api::{Api, REQUESTS, SigningRequest};
use crate::identity::authority::Signed;
use crate::identity::bundle::system_time;
use crate::identity::ca::{CaError, Issued};
use crate::identity::{hex, request};

/// Agents that start together begin to ask within so long: a thousand of them, with twenty
/// identities each, come to ten thousand requests in a second otherwise.
const SPREAD: Duration = Duration::from_secs(2);
/// Requests made at the same time, each until it is answered or for so long: one that nobody answers must
/// not keep others from being made.
const AT_ONCE: usize = 4;
const TURN: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(20);
const FIRST_LOOK: Duration = Duration::from_millis(50);
const LAST_LOOK: Duration = Duration::from_secs(2);
/// A request that was not answered for so long is not waited for any more.
const FORGET: Duration = Duration::from_secs(3600);
/// Of what a signer says, so much is shown.
const SHOWN: usize = 300;

/// Asks a signer.
#[derive(Debug)]
pub struct SigningRequests {
    api: Api,
    signer: String,
    begin: Instant,
    turns: Semaphore,
    /// How long an answer is waited for at a time.
    patience: Duration,
    open: Mutex<HashMap<SpiffeId, Open>>,
}

/// A request that waits for its answer.
struct Open {
    name: String,
    made: Instant,
    key: WipedKey,
}

struct WipedKey(KeyPair);

impl Drop for WipedKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

// By hand: the key must not reach a log.
impl std::fmt::Debug for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Open").field("name", &self.name).finish_non_exhaustive()
    }
}

impl SigningRequests {
    /// Will ask `signer`; `draw`, uniform from 0 to 1, says when to begin.
    pub fn new(client: Client, signer: &str, draw: f64) -> Self {
        Self {
            api: Api::new(client),
            signer: signer.to_owned(),
            begin: Instant::now() + SPREAD.mul_f64(draw.clamp(0.0, 1.0)),
            turns: Semaphore::new(AT_ONCE),
            patience: PATIENCE,
            open: Mutex::default(),
        }
    }

    /// A certificate for `id`.
    ///
    /// # Errors
    ///
    /// If the API or the signer refuses, or does not answer. In the latter case the next call goes on
    /// waiting.
    pub async fn issue(&self, id: &SpiffeId, lifetime: Duration) -> Result<Issued, CaError> {
        sleep_until(self.begin).await;
        let (open, mut turn) = match self.take_open(id) {
            Some(open) => (open, None),
            None => {
                let turn = self.turns.acquire().await.ok();
                (self.ask(id, lifetime).await?, turn)
            }
        };
        let asked = Instant::now();
        let until = asked + self.patience;
        let mut wait = FIRST_LOOK;
        loop {
            match self.look(&open, id).await {
                Ok(Some(issued)) => return Ok(issued),
                Ok(None) if Instant::now() < until => {}
                Ok(None) => {
                    let error = self.not_answered(&open.name);
                    self.keep(id, open);
                    return Err(error);
                }
                Err(error @ CaError::Api(_)) => {
                    self.keep(id, open);
                    return Err(error);
                }
                Err(error) => return Err(error),
            }
            sleep(wait).await;
            wait = (wait * 2).min(LAST_LOOK);
            if asked.elapsed() >= TURN {
                drop(turn.take());
            }
        }
    }

    fn not_answered(&self, name: &str) -> CaError {
        CaError::NotAnswered { name: name.to_owned(), signer: self.signer.clone() }
    }

    fn take_open(&self, id: &SpiffeId) -> Option<Open> {
        let mut open = self.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        open.retain(|_, open| open.made.elapsed() < FORGET);
        open.remove(id)
    }

    fn keep(&self, id: &SpiffeId, request: Open) {
        let mut open = self.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        open.insert(id.clone(), request);
    }

    async fn ask(&self, id: &SpiffeId, lifetime: Duration) -> Result<Open, CaError> {
        let key = WipedKey(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?);
        let pem = request::make(id, &key.0)?;
        let object = json!({
            "apiVersion": "certificates.k8s.io/v1",
            "kind": "CertificateSigningRequest",
            "metadata": {"generateName": "malla-"},
            "spec": {
                "request": k8s_openapi::ByteString(pem.into_bytes()),
                "signerName": self.signer,
                "usages": USAGES,
                "expirationSeconds": lifetime.as_secs(),
            },
        });
        let made = self.api.create::<SigningRequest>(REQUESTS, &object).await?;
        Ok(Open { name: made.name().to_owned(), made: Instant::now(), key })
    }

    /// The certificate, if it is there.
    async fn look(&self, open: &Open, id: &SpiffeId) -> Result<Option<Issued>, CaError> {
        let path = format!("{REQUESTS}/{}", open.name);
        let gone = || CaError::Answer { what: "never came: the request was deleted" };
        let request = self.api.get::<SigningRequest>(&path).await?.ok_or_else(gone)?;
        for kind in ["Denied", "Failed"] {
            if let Some(condition) = request.condition(kind) {
                let text = |key: &str| condition[key].as_str().unwrap_or_default().to_owned();
                let why = format!("{}: {}", text("reason"), text("message"));
                return Err(CaError::Denied { why: why.chars().take(SHOWN).collect() });
            }
        }
        let pem = &request.status.certificate.0;
        if pem.is_empty() {
            return Ok(None);
        }
        let signed = answer(pem, id, open.key.0.der_bytes())?;
        Ok(Some(Issued::new(signed, Zeroizing::new(open.key.0.serialize_der()))))
    }
}

/// What is in a signer's answer, if it certifies `public_key` as `id`. Whether peers believe it is
/// asked where all certificates are asked that.
pub(super) fn answer(pem: &[u8], id: &SpiffeId, public_key: &[u8]) -> Result<Signed, CaError> {
    let wrong = |what| CaError::Answer { what };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let chain = chain.map_err(|_not_pem| wrong("is not PEM"))?;
    let leaf = chain.first().ok_or_else(|| wrong("holds no certificate"))?;
    let Ok((_, cert)) = X509Certificate::from_der(leaf) else {
        return Err(wrong("is no certificate"));
    };
    if &*cert.public_key().subject_public_key.data != public_key {
        return Err(wrong("is for another key"));
    }
    let names = cert.subject_alternative_name().ok().flatten();
    let mut names = names.iter().flat_map(|names| &names.value.general_names);
    let is_ours =
        |name: &GeneralName<'_>| matches!(name, GeneralName::URI(uri) if *uri == id.to_string());
    if !names.any(is_ours) {
        return Err(wrong("is for another identity"));
    }
    let (serial, validity) = (hex(cert.raw_serial()), cert.validity());
    let not_before = system_time(validity.not_before.timestamp());
    let not_after = system_time(validity.not_after.timestamp());
    Ok(Signed { serial, not_before, not_after, chain })
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::time::SystemTime;

    use bytes::Bytes;
    use http_body_util::{BodyExt as _, Full};
    use hyper::body::Incoming;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use k8s_openapi::ByteString;
    use mesh_core::sign::{Name, Unread};
    use serde_json::Value;
    use tokio::net::TcpListener;
    use tokio::task::JoinSet;
    use tokio::time::timeout;

    use super::*;
    use crate::dirwatch::testing::TempDir;
    use crate::discovery::client;
    use crate::identity::authority::Authority;
    use crate::identity::bundle::TrustBundles;
    use crate::identity::ca;
    use crate::identity::kubernetes::testing::kubeconfig;
    use crate::identity::store::{Identities, Issuer, Lifetimes};
    use crate::identity::testing::{cluster_local, id};

    /// An API server with requests, which a test answers.
    #[derive(Debug, Default)]
    struct Api(Mutex<Vec<Value>>);

    impl Api {
        fn requests(&self) -> Vec<Value> {
            self.0.lock().unwrap().clone()
        }

        fn answer(&self, nth: usize, status: Value) {
            self.0.lock().unwrap()[nth]["status"] = status;
        }

        /// What the `nth` request asks for.
        fn asked(&self, nth: usize) -> Result<request::Read, Unread> {
            let request = self.requests()[nth]["spec"]["request"].clone();
            request::read(&serde_json::from_value::<ByteString>(request).unwrap().0)
        }

        async fn serve(self: Arc<Self>, listener: TcpListener) {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let this = Arc::clone(&self);
                connections.spawn(async move {
                    let service = service_fn(|request: http::Request<Incoming>| {
                        let this = Arc::clone(&this);
                        async move { Ok::<_, Infallible>(this.one(request).await) }
                    });
                    let http = hyper::server::conn::http1::Builder::new();
                    http.serve_connection(TokioIo::new(stream), service).await.ok();
                });
            }
        }

        async fn one(&self, request: http::Request<Incoming>) -> http::Response<Full<Bytes>> {
            let path = request.uri().path().to_owned();
            let is_new = request.method() == http::Method::POST;
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let mut requests = self.0.lock().unwrap();
            let found = if is_new {
                let mut object: Value = serde_json::from_slice(&body).unwrap();
                object["metadata"]["name"] = json!(format!("malla-{}", requests.len()));
                requests.push(object.clone());
                object
            } else {
                let name = path.rsplit('/').next().unwrap();
                requests.iter().find(|one| one["metadata"]["name"] == name).cloned().unwrap()
            };
            http::Response::new(Full::new(Bytes::from(found.to_string())))
        }
    }

    struct World {
        api: Arc<Api>,
        requests: SigningRequests,
        dir: TempDir,
        serving: JoinSet<()>,
    }

    impl World {
        async fn new() -> Self {
            let (api, dir) = (Arc::<Api>::default(), TempDir::new());
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let path = dir.path().join("config");
            let text = kubeconfig(&format!("http://{}", listener.local_addr().unwrap()));
            std::fs::write(&path, text).unwrap();
            let client = client::client(Some(&path)).await.unwrap();
            let mut requests = SigningRequests::new(client, "a.example/b", 0.0);
            requests.patience = Duration::from_millis(100);
            let mut serving = JoinSet::new();
            serving.spawn(Arc::clone(&api).serve(listener));
            Self { api, requests, dir, serving }
        }

        async fn issue(&self) -> Result<Issued, CaError> {
            self.requests.issue(&id("web"), Duration::from_secs(3600)).await
        }

        fn sign(&self, nth: usize, name: &str) -> Value {
            sign(&self.dir, &self.api, nth, name)
        }
    }

    /// The directory of a CA.
    fn authority(dir: &TempDir) -> PathBuf {
        let dir = dir.path().join("ca");
        if !dir.exists() {
            ca::init(&dir, &cluster_local(), SystemTime::now()).unwrap();
        }
        dir
    }

    /// A certificate for the key of the `nth` request.
    fn sign(dir: &TempDir, api: &Api, nth: usize, name: &str) -> Value {
        let dir = authority(dir);
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
        let (cert, key) = (read(ca::ROOT_CERT), read(ca::ROOT_KEY));
        let authority = Authority::new(&dir, cert.as_bytes(), &dir, &key).unwrap();
        let public_key = api.asked(nth).unwrap().public_key;
        let public_key = rcgen::SubjectPublicKeyInfo::from_der(&public_key).unwrap();
        let (hour, now) = (Duration::from_secs(3600), SystemTime::now());
        let signed = authority.sign(&id(name), &public_key, hour, now).unwrap();
        let pem = crate::identity::kubernetes::pem(&signed.chain[0]);
        json!({"certificate": ByteString(pem.into_bytes())})
    }

    #[tokio::test]
    async fn request_that_is_not_answered_is_waited_for_and_not_made_again() {
        let world = World::new().await;
        for _ in 0..3 {
            assert_eq!(world.issue().await.unwrap_err().reason(), "not_answered");
        }
        let requests = world.api.requests();
        assert_eq!(requests.len(), 1, "{requests:?}");
        let spec = &requests[0]["spec"];
        assert_eq!(spec["signerName"], "a.example/b");
        assert_eq!(spec["expirationSeconds"], 3600);
        assert_eq!(spec["usages"], json!(USAGES));

        world.api.answer(0, world.sign(0, "web"));
        let issued = world.issue().await.unwrap();
        issued.certified().unwrap();
        assert_eq!(world.api.requests().len(), 1);
        // The next one is for another key.
        assert_eq!(world.issue().await.unwrap_err().reason(), "not_answered");
        let [first, second] = [0, 1].map(|nth| world.api.asked(nth).unwrap().public_key);
        assert_ne!(first, second);
    }

    #[tokio::test]
    async fn requests_that_nobody_answers_keep_no_other_from_being_made() {
        let mut world = World::new().await;
        world.requests.patience = Duration::from_secs(600);
        let names: Vec<_> = (0..=AT_ONCE).map(|n| id(&format!("web{n}"))).collect();
        let hour = Duration::from_secs(3600);
        let all = names.iter().map(|id| world.requests.issue(id, hour));
        let all = futures_util::future::join_all(all);
        let began = Instant::now();
        let made = async {
            let mut most_at_once = 0;
            while world.api.requests().len() <= AT_ONCE {
                most_at_once = world.api.requests().len();
                sleep(FIRST_LOOK).await;
            }
            assert_eq!(most_at_once, AT_ONCE);
            // Not before the turn of another one was over.
            assert!(began.elapsed() >= TURN, "{:?}", began.elapsed());
        };
        tokio::select! {
            _ = all => panic!("nobody answers"),
            made = timeout(Duration::from_secs(20), made) => made.expect("every request"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn agents_that_start_together_do_not_ask_together() {
        let dir = TempDir::new();
        let path = dir.path().join("config");
        std::fs::write(&path, kubeconfig("http://127.0.0.1:1")).unwrap();
        let begin = async |draw| {
            let client = client::client(Some(&path)).await.unwrap();
            SigningRequests::new(client, "a.example/b", draw).begin - Instant::now()
        };
        assert_eq!(begin(0.0).await, Duration::ZERO);
        assert_eq!(begin(0.5).await, SPREAD / 2);
        assert_eq!(begin(1.0).await, SPREAD);
    }

    #[tokio::test]
    async fn nothing_is_asked_before_it_is_this_agents_turn() {
        let mut world = World::new().await;
        let begin = Instant::now() + Duration::from_millis(300);
        world.requests.begin = begin;
        world.issue().await.unwrap_err();
        assert_eq!(world.api.requests().len(), 1);
        assert!(Instant::now() >= begin, "not waited for");
    }

    #[tokio::test]
    async fn denial_is_told_and_the_next_request_is_a_new_one() {
        let world = World::new().await;
        world.issue().await.unwrap_err();
        let condition = json!({"type": "Denied", "reason": "no_pod", "message": "no such pod"});
        world.api.answer(0, json!({"conditions": [condition]}));
        let denied = world.issue().await.unwrap_err();
        assert_eq!(denied.reason(), "denied");
        assert!(denied.to_string().contains("no_pod: no such pod"), "{denied}");
        world.issue().await.unwrap_err();
        assert_eq!(world.api.requests().len(), 2);
    }

    #[tokio::test]
    async fn identity_that_is_not_answered_delays_no_other() {
        let World { api, mut requests, dir, mut serving } = World::new().await;
        requests.patience = Duration::from_secs(3600);
        let bundle = authority(&dir).join(ca::BUNDLE);
        let bundles = TrustBundles::load(&bundle, &cluster_local()).unwrap();
        let identities = Arc::new(Identities::new(bundles));
        identities.wanted([id("slow"), id("quick")].into());
        let issuer = Issuer::Kubernetes(Box::new(requests));
        let lifetimes = Lifetimes::default();
        serving.spawn(Arc::clone(&identities).maintain(issuer, lifetimes, SystemTime::now));
        let until = async |holds: &dyn Fn() -> bool| {
            let wait = async {
                while !holds() {
                    sleep(Duration::from_millis(5)).await;
                }
            };
            timeout(Duration::from_secs(10), wait).await.expect("did not come true in time");
        };
        until(&|| api.requests().len() == 2).await;
        let is_quick = |nth: &usize| {
            api.asked(*nth).unwrap().asked.names == [Name::Uri(id("quick").to_string())]
        };
        let nth = (0..2).find(is_quick).unwrap();
        api.answer(nth, sign(&dir, &api, nth, "quick"));
        until(&|| identities.certified(&id("quick")).is_some()).await;
        assert!(identities.certified(&id("slow")).is_none());
    }

    #[tokio::test]
    async fn certificate_for_another_key_or_identity_is_refused() {
        let world = World::new().await;
        world.issue().await.unwrap_err();
        world.api.answer(0, world.sign(0, "other"));
        let error = world.issue().await.unwrap_err();
        assert!(error.to_string().contains("another identity"), "{error}");
        world.issue().await.unwrap_err();
        world.api.answer(1, world.sign(0, "web"));
        let error = world.issue().await.unwrap_err();
        assert!(error.to_string().contains("another key"), "{error}");
    }
}
