//! The signer: answers every request that is addressed to it, with a certificate or with a reason.
//!
//! ```text
//! list, watch ──► request ──► check ──► ask the cluster ──► confirm ──► sign ──► approve, certificate
//!                               └───────────────────────────────┴──► deny with the reason
//! ```
//!
//! The decision is [`mesh_core::sign`]'s. What it is made from is asked for at that moment and not
//! remembered: a cache would say yes for a pod that has moved. Somebody else's approval makes no
//! difference: a request that should not be signed is then marked as failed.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use kube::Client;
use mesh_core::sign::{Claim, Denied, Facts, Grant, Placed, Request, Requester, Rules};
use mesh_core::spiffe::TrustDomain;
use rcgen::SubjectPublicKeyInfo;
use serde_json::{Value, json};
use tokio::sync::{Mutex, watch};
use tokio::time::sleep;
use tracing::{debug, info, warn};

use self::desk::Desk;
use super::api::{Api, NODE_NAME, Named, Pods, SigningRequest, request_path};
use super::roots::{Roots, Standing};
use super::{ApiError, pem};
use crate::discovery::client::escaped;
use crate::discovery::enrol;
use crate::discovery::kube::{Namespace, Pod, Time};
use crate::gate::Gate;
use crate::identity::authority::Authority;
use crate::identity::ca::CaError;
use crate::identity::request::{self, Read};
use crate::telemetry::{self, CaTelemetry, Verdict};

mod desk;

/// Between looks at the Secret.
const LOOK: Duration = Duration::from_secs(5);
/// After a failure.
const RETRY: Duration = Duration::from_secs(1);
/// At one request, before it waits for its turn to come again.
const ATTEMPTS: u32 = 3;
/// A pod that should have been gone for so long is none: Kubernetes takes no token that is bound to it any more
/// (the leeway in `pkg/serviceaccount/claims.go`).
const GONE: Duration = Duration::from_secs(60);

const NODE_UID: &str = "authentication.kubernetes.io/node-uid";

/// How a signer is set up.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Which requests it answers.
    pub signer: String,
    /// Where its Secret, ConfigMap and Lease are, and the agents' service account.
    pub namespace: String,
    /// The name of that service account.
    pub agent: String,
    /// Of every identity.
    pub trust_domain: TrustDomain,
    /// How long a root is published before it signs.
    pub spread: Duration,
}

/// Pods in one answer. Whoever may make them may make each as large as the API lets an object be, 1.5 MB, an answer is in
/// memory twice while it is read, and many requests are confirmed at once.
const PODS_AT_ONCE: usize = 2;
/// Pods of one service account on one node that are looked at: more than a node takes.
const MOST_PODS: usize = 512;

/// A signer.
#[derive(Debug)]
pub struct Signer {
    api: Api,
    settings: Settings,
    rules: Rules,
    telemetry: CaTelemetry,
    /// What it needs before it can answer, if that is missing.
    problem: watch::Sender<Option<String>>,
    /// From one term to the next: what has signed before may have to sign on.
    roots: Mutex<Roots>,
    told: Gate,
}

impl Signer {
    /// Asks nothing yet.
    pub fn new(client: Client, settings: Settings, telemetry: CaTelemetry) -> Self {
        let agent = format!("system:serviceaccount:{}:{}", settings.namespace, settings.agent);
        let rules = Rules { trust_domain: settings.trust_domain.clone(), agent };
        let problem = watch::Sender::new(None);
        let api = Api::new(client);
        let (namespace, trust_domain) = (settings.namespace.clone(), settings.trust_domain.clone());
        let roots = Mutex::new(Roots::new(api.clone(), namespace, trust_domain, settings.spread));
        Self { api, settings, rules, telemetry, problem, roots, told: Gate::default() }
    }

    /// Why it cannot answer, while it should.
    pub fn problem(&self) -> watch::Receiver<Option<String>> {
        self.problem.subscribe()
    }

    /// Answers whenever `leads` is true, for ever.
    ///
    /// Cancel-safe: a request that was not answered is, by the next signer.
    pub async fn run(self, mut leads: watch::Receiver<bool>) {
        let this = Arc::new(self);
        while leads.wait_for(|leads| *leads).await.is_ok() {
            this.telemetry.lead(true);
            tokio::select! {
                () = this.answer() => {}
                _ = leads.wait_for(|leads| !*leads) => {}
            }
            this.problem.send_replace(None);
            this.telemetry.lead(false);
        }
    }

    async fn answer(self: &Arc<Self>) {
        let standing = watch::Sender::new(None);
        let follow = self.follow_requests(standing.subscribe());
        tokio::join!(self.look(&standing), follow);
    }

    /// Keeps what signs current.
    async fn look(&self, standing: &watch::Sender<Option<Standing>>) {
        // One term ends before the next one begins.
        let mut roots = self.roots.lock().await;
        roots.begin_term();
        loop {
            match roots.look(SystemTime::now()).await {
                Ok(now) => {
                    self.tell(None);
                    self.telemetry.ends(now.authority.root().not_after);
                    let before = standing.send_replace(Some(now.clone()));
                    if before.is_none_or(|before| before.waits != now.waits) {
                        let root = &now.authority.root().subject;
                        info!(root, waits = now.waits, "this signs; the Secret's may have to wait");
                    }
                }
                Err(error) => self.tell(Some(telemetry::chain(&error))),
            }
            sleep(LOOK).await;
        }
    }

    fn tell(&self, problem: Option<String>) {
        self.problem.send_if_modified(|told| {
            let is_new = *told != problem;
            if let (true, Some(error)) = (is_new, &problem) {
                warn!(error, "what should sign cannot");
            }
            *told = problem;
            is_new
        });
    }

    async fn follow_requests(self: &Arc<Self>, mut standing: watch::Receiver<Option<Standing>>) {
        if standing.wait_for(Option::is_some).await.is_err() {
            return;
        }
        Desk::new(self, &standing).follow().await;
    }

    /// Answers a request that waits for it. Says whether nobody waits for it any more: if not, its turn
    /// is to come again.
    async fn answer_one(&self, mut request: SigningRequest, authority: &Authority) -> bool {
        for _ in 0..ATTEMPTS {
            match self.decide(&request, authority).await {
                Ok(()) => return true,
                Err(CaError::Api(error)) if error.is_conflict() => {
                    debug!(request = request.name(), "somebody else was there");
                }
                Err(error) => {
                    let why = telemetry::chain(&error);
                    warn!(request = request.name(), error = why, "not answered");
                    self.telemetry.answered(Verdict::Failed, error.reason());
                    sleep(RETRY).await;
                }
            }
            // As it is now: it may have been answered, or approved and no more.
            match self.api.get::<SigningRequest>(&request.path()).await {
                Ok(Some(now)) if self.is_to_answer(&now) => request = now,
                Ok(_) => return true,
                Err(error) => debug!(error = telemetry::chain(&error), "not read again"),
            }
        }
        false
    }

    /// The same for one that could not be answered before: it may have been answered since, or be gone.
    async fn answer_again(&self, name: &str, authority: &Authority) -> bool {
        match self.api.get::<SigningRequest>(&request_path(name)).await {
            Ok(Some(now)) if self.is_to_answer(&now) => self.answer_one(now, authority).await,
            Ok(_) => true,
            Err(error) => {
                debug!(request = name, error = telemetry::chain(&error), "not read again");
                false
            }
        }
    }

    /// Whether a request, as it is now, waits for this signer: another one may have its name by now, and be
    /// somebody else's to answer.
    fn is_to_answer(&self, request: &SigningRequest) -> bool {
        !request.is_answered() && request.spec.signer_name == self.settings.signer
    }

    async fn decide(&self, request: &SigningRequest, authority: &Authority) -> Result<(), CaError> {
        let read = request::read(&request.spec.request.0);
        let verdict = match claim(request, read.as_ref(), &self.rules) {
            Ok(claim) => self.confirm(claim).await?,
            Err(denied) => Err(denied),
        };
        match (verdict, read) {
            (Ok(grant), Ok(read)) => self.sign(request, &grant, &read, authority).await,
            (Err(denied), _) => Ok(self.deny(request, denied).await?),
            (Ok(_), Err(_)) => Ok(self.deny(request, Denied::Malformed).await?),
        }
    }

    /// Asks the cluster. A claim's names are of characters that need no escape in a path.
    async fn confirm(&self, claim: Claim) -> Result<Result<Grant, Denied>, ApiError> {
        let id = claim.identity();
        let node = self.api.get::<Named>(&format!("/api/v1/nodes/{}", claim.node())).await?;
        let namespace = format!("/api/v1/namespaces/{}", id.namespace());
        let placed = match self.api.get::<Namespace>(&namespace).await? {
            Some(namespace) => self.placed(&claim, &namespace).await?,
            None => Vec::new(),
        };
        let node_uid = node.and_then(|node| node.metadata.uid);
        Ok(claim.confirm(&Facts { node_uid: node_uid.as_deref(), pods: &placed }))
    }

    /// The pods of a claim's service account on its node, until one of them takes part: that is enough.
    async fn placed(&self, claim: &Claim, namespace: &Namespace) -> Result<Vec<Placed>, ApiError> {
        let id = claim.identity();
        let is_meant = |pod: &Placed| {
            pod.namespace == id.namespace()
                && pod.service_account == id.service_account()
                && pod.node == claim.node()
        };
        let query = format!(
            "/api/v1/namespaces/{}/pods?fieldSelector=spec.nodeName={},spec.serviceAccountName={},\
             status.phase!=Succeeded,status.phase!=Failed&limit={PODS_AT_ONCE}&continue=",
            id.namespace(),
            claim.node(),
            id.service_account()
        );
        let (now, mut next, mut placed) = (SystemTime::now(), String::new(), Vec::new());
        for _ in 0..MOST_PODS / PODS_AT_ONCE {
            let page = self.api.get::<Pods>(&format!("{query}{}", escaped(&next))).await?;
            let Some(page) = page else { break };
            for pod in page.items.into_iter().filter(|pod| !is_gone(pod, now)) {
                let pod = place(namespace, pod);
                if is_meant(&pod) {
                    let is_enough = pod.is_enrolled;
                    placed.push(pod);
                    if is_enough {
                        return Ok(placed);
                    }
                }
            }
            next = page.metadata.next;
            if next.is_empty() {
                break;
            }
        }
        Ok(placed)
    }

    async fn sign(
        &self,
        request: &SigningRequest,
        grant: &Grant,
        read: &Read,
        authority: &Authority,
    ) -> Result<(), CaError> {
        let key = SubjectPublicKeyInfo::from_der(&read.public_key)?;
        let signed = authority.sign(&grant.identity, &key, grant.lifetime, SystemTime::now())?;
        let mut version = request.metadata.resource_version.clone();
        if request.condition("Approved").is_none() {
            let condition = condition("Approved", "signed", "the node runs such a pod");
            let approved = self.update(request, "approval", json!([condition])).await?;
            version = approved.metadata.resource_version;
        }
        let chain: String = signed.chain.iter().map(|der| pem(der)).collect();
        let path = format!("{}/status", request.path());
        let certificate = k8s_openapi::ByteString(chain.into_bytes());
        let patch = json!({
            "metadata": {"resourceVersion": version},
            "status": {"certificate": certificate},
        });
        self.api.patch::<Named>(&path, &patch).await?;
        self.telemetry.answered(Verdict::Signed, "signed");
        info!(
            request = request.name(),
            identity = %grant.identity,
            requester = request.spec.username,
            serial = signed.serial,
            "signed"
        );
        Ok(())
    }

    async fn deny(&self, request: &SigningRequest, denied: Denied) -> Result<(), ApiError> {
        let why = denied.to_string();
        if request.condition("Approved").is_some() {
            // By somebody else, and that cannot be taken back; but nothing is signed for it.
            let mut conditions = request.status.conditions.clone();
            conditions.push(condition("Failed", denied.reason(), &why));
            self.update(request, "status", Value::Array(conditions)).await?;
        } else {
            let denial = condition("Denied", denied.reason(), &why);
            self.update(request, "approval", json!([denial])).await?;
        }
        self.telemetry.answered(Verdict::Denied, denied.reason());
        // Each says why itself, and all are counted.
        if let Some(unlogged) = self.told.pass(denied.reason()) {
            warn!(
                request = request.name(),
                requester = request.spec.username,
                reason = denied.reason(),
                unlogged,
                "denied"
            );
        }
        Ok(())
    }

    async fn update(
        &self,
        request: &SigningRequest,
        part: &str,
        conditions: Value,
    ) -> Result<Named, ApiError> {
        let path = format!("{}/{part}", request.path());
        let patch = json!({
            "metadata": {"resourceVersion": request.metadata.resource_version},
            "status": {"conditions": conditions},
        });
        self.api.patch(&path, &patch).await
    }
}

/// What is claimed by a request, in which that was read.
pub(super) fn claim(
    request: &SigningRequest,
    read: Result<&Read, &mesh_core::sign::Unread>,
    rules: &Rules,
) -> Result<Claim, Denied> {
    let extra =
        |key: &str| request.spec.extra.get(key).and_then(Option::as_deref).unwrap_or_default();
    let asked = Request {
        asked: read.map(|read| read.asked.clone()).map_err(|unread| *unread),
        usages: &request.spec.usages,
        expiration_s: request.spec.expiration_seconds,
        requester: Requester {
            username: &request.spec.username,
            node_names: extra(NODE_NAME),
            node_uids: extra(NODE_UID),
        },
    };
    asked.check(rules)
}

fn condition(kind: &str, reason: &str, message: &str) -> Value {
    json!({"type": kind, "status": "True", "reason": reason, "message": message})
}

fn place(namespace: &Namespace, pod: Pod) -> Placed {
    let spec = pod.spec.as_ref();
    Placed {
        is_enrolled: enrol::takes_part(namespace, &pod),
        service_account: spec
            .and_then(|spec| spec.service_account_name.clone())
            .unwrap_or_default(),
        node: spec.and_then(|spec| spec.node_name.clone()).unwrap_or_default(),
        namespace: pod.metadata.namespace.unwrap_or_default(),
    }
}

/// Whether `pod` should have been gone long ago: something, such as a finalizer, may keep its object for ever.
fn is_gone(pod: &Pod, now: SystemTime) -> bool {
    let due = pod.metadata.deletion_timestamp.map(|Time(due)| SystemTime::from(due));
    due.is_some_and(|due| now.duration_since(due).is_ok_and(|since| since > GONE))
}

#[cfg(test)]
mod tests;
