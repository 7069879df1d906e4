//! Agents' tokens on two nodes, workloads, and signers of their own.

use anyhow::{Context as _, Result, bail};
use harness::{Cluster, Deployment, SignerProcess, User, base64, unbase64, wait};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use serde_json::json;

/// What there is to ask for, and who asks. The pods need not run: what counts is what the API says.
pub(super) struct World {
    deployment: Deployment,
    signer: String,
    /// Enrolled: `web` on the first node, `far` on the second; but not `alone` on the first, which says so.
    pub(super) shop: Cluster,
    /// Not enrolled: `web` on the first node.
    pub(super) outside: Cluster,
    /// The agents of both nodes.
    pub(super) agents: Vec<User>,
}

/// A request, to be changed.
pub(super) struct Asked {
    pub(super) params: CertificateParams,
    pub(super) key: KeyPair,
    pub(super) usages: Vec<&'static str>,
    pub(super) lifetime_s: Option<u64>,
}

/// What becomes of a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The certificate, and what is above it.
    Signed(String),
    /// The reason.
    Denied(String),
    /// The reason, for one that somebody else has approved.
    Failed(String),
}

pub(super) fn uri(text: &str) -> SanType {
    #[expect(clippy::unwrap_used, reason = "every text of these tests is ASCII")]
    SanType::URI(text.try_into().unwrap())
}

impl Asked {
    /// For the workload that runs where the first agent does.
    #[expect(clippy::unwrap_used, reason = "making a key does not fail")]
    pub(super) fn web(world: &World) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![uri(&world.identity())];
        Self {
            params,
            key: KeyPair::generate().unwrap(),
            usages: vec!["digital signature", "client auth", "server auth"],
            lifetime_s: Some(3600),
        }
    }
}

impl World {
    pub(super) fn new(name: &str) -> Result<Self> {
        let signer = format!("malla.dev/{name}");
        let deployment = Deployment::read(Some(&signer))?;
        deployment.apply(&["DaemonSet", "Deployment"])?;
        let (shop, outside) = (Cluster::namespace()?, Cluster::namespace()?);
        shop.annotate(&json!({"malla.dev/mesh": "enabled"}))?;
        let image = Cluster::load("busybox")?;
        let pod = |cluster: &Cluster, name: &str, account: &str, node: &str| {
            let container = json!([{"image": image, "command": ["sleep", "3600"]}]);
            let spec = json!({"serviceAccountName": account, "containers": container});
            cluster.start(name, node, spec)
        };
        let nodes = shop.two_nodes()?;
        for (cluster, account, node) in [
            (&shop, "web", &nodes[0]),
            (&shop, "far", &nodes[1]),
            (&shop, "alone", &nodes[0]),
            (&outside, "web", &nodes[0]),
        ] {
            cluster.kubectl(&["create", "serviceaccount", account])?;
            pod(cluster, account, account, node)?;
        }
        shop.kubectl(&["annotate", "pod", "alone", "malla.dev/mesh=disabled"])?;
        let system = deployment.system();
        let mut agents = Vec::new();
        for node in &nodes {
            let name = format!("agent-on-{node}");
            pod(system, &name, "malla-agent", node)?;
            let token = system.token("malla-agent", Some(("Pod", &name)))?;
            agents.push(system.user(node, &token)?);
        }
        Ok(Self { deployment, signer, shop, outside, agents })
    }

    pub(super) fn system(&self) -> &Cluster {
        self.deployment.system()
    }

    pub(super) fn identity(&self) -> String {
        format!("spiffe://cluster.local/ns/{}/sa/web", self.shop.name())
    }

    /// A signer that answers.
    pub(super) fn signer(&self, name: &str, spread_s: u64) -> Result<SignerProcess> {
        let signer = SignerProcess::start(&self.deployment, name, &self.signer, spread_s)?;
        signer.wait_until_it_leads(wait::SOON)?;
        Ok(signer)
    }

    /// A signer beside one that answers.
    pub(super) fn signer_that_waits(&self, name: &str) -> Result<SignerProcess> {
        let signer = SignerProcess::start(&self.deployment, name, &self.signer, 0)?;
        wait::until(wait::SOON, "another signer", || signer.metrics().is_ok())?;
        Ok(signer)
    }

    /// The administrator, who may do everything but this.
    pub(super) fn admin(&self) -> Result<User> {
        let system = self.system();
        system.kubectl(&["create", "serviceaccount", "admin"])?;
        let binding = format!("{}-admin", system.name());
        let account = format!("--serviceaccount={}:admin", system.name());
        let role = ["create", "clusterrolebinding", &binding, "--clusterrole=cluster-admin"];
        system.kubectl(&[&role[..], &[&account]].concat())?;
        system.user("admin", &system.token("admin", None)?)
    }

    /// Lets a service account make requests, which by itself it may not.
    pub(super) fn let_ask(&self, cluster: &Cluster, account: &str) -> Result<()> {
        let role = format!("{}-malla-agent", self.system().name());
        let account = format!("--serviceaccount={}:{account}", cluster.name());
        let role = format!("--clusterrole={role}");
        let name = format!("{}-asks", self.system().name());
        cluster.kubectl(&["create", "clusterrolebinding", &name, &role, &account]).map(drop)
    }

    /// Makes a request, and returns its name.
    pub(super) fn request(&self, who: &User, asked: &Asked) -> Result<String> {
        let pem = asked.params.serialize_request(&asked.key)?.pem()?;
        let mut object = json!({
            "apiVersion": "certificates.k8s.io/v1",
            "kind": "CertificateSigningRequest",
            "metadata": {"generateName": "malla-test-"},
            "spec": {
                "request": base64(&pem),
                "signerName": self.signer,
                "usages": asked.usages,
            },
        });
        if let Some(seconds) = asked.lifetime_s {
            object["spec"]["expirationSeconds"] = json!(seconds);
        }
        let made = who.create(&object)?;
        Ok(made["metadata"]["name"].as_str().context("no name")?.to_owned())
    }

    /// What becomes of a request.
    pub(super) fn answer(&self, name: &str) -> Result<Answer> {
        wait::until_some(wait::SOON, &format!("an answer to {name}"), || {
            let request = self.system().get(&["certificatesigningrequest", name]).ok()?;
            let status = &request["status"];
            if let Some(certificate) = status["certificate"].as_str() {
                return Some(Answer::Signed(unbase64(certificate)?));
            }
            let conditions = status["conditions"].as_array()?;
            let reason = |kind: &str| {
                let found = conditions.iter().find(|condition| condition["type"] == kind)?;
                found["reason"].as_str().map(str::to_owned)
            };
            let failed = reason("Failed").map(Answer::Failed);
            failed.or_else(|| reason("Denied").map(Answer::Denied))
        })
    }

    pub(super) fn ask(&self, who: &User, asked: &Asked) -> Result<Answer> {
        self.answer(&self.request(who, asked)?)
    }

    pub(super) fn is_denied(&self, who: &User, asked: &Asked, reason: &str) -> Result<()> {
        let answer = self.ask(who, asked)?;
        if answer != Answer::Denied(reason.to_owned()) {
            bail!("should be denied for {reason}: {answer:?}");
        }
        Ok(())
    }

    /// The roots that agents trust.
    pub(super) fn bundle(&self) -> Result<String> {
        let map = self.system().get(&["configmap", "malla-trust"])?;
        Ok(map["data"]["bundle.pem"].as_str().context("no bundle")?.to_owned())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for name in ["admin", "asks"] {
            let name = format!("{}-{name}", self.system().name());
            let delete = ["delete", "--ignore-not-found", "clusterrolebinding", &name];
            self.system().kubectl(&delete).ok();
        }
    }
}
