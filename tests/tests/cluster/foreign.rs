//! Certificates of somebody else's signer: a name of its own, a CA of its own, and whoever may approve.
//! Here that is the test, with the administrator's rights.

use std::collections::BTreeSet;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Agents, Cluster, base64, service_of_pods, unbase64, wait};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use serde_json::{Value, json};
use time::OffsetDateTime;

const SIGNER: &str = "signer.example/mesh";
/// Between two looks at what is asked.
const PAUSE: Duration = Duration::from_millis(100);

/// A CA that signs what this signer is asked for, and nothing else is known of. What signs is below the root that
/// is trusted.
struct Signer {
    issuer: Issuer<'static, KeyPair>,
    between: String,
    root: String,
    answered: BTreeSet<String>,
}

impl Signer {
    fn new() -> Result<Self> {
        let ca = |name: &str, length: u8| -> Result<CertificateParams> {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(length));
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            params.subject_alt_names =
                vec![SanType::URI("spiffe://cluster.local".try_into().context("a CA's name")?)];
            Ok(params)
        };
        let (root_params, params) = (ca("somebody else", 1)?, ca("who signs for them", 0)?);
        let (root_key, key) = (KeyPair::generate()?, KeyPair::generate()?);
        let root = root_params.self_signed(&root_key)?.pem();
        let between = params.signed_by(&key, &Issuer::from_params(&root_params, &root_key))?.pem();
        let issuer = Issuer::new(params, key);
        Ok(Self { issuer, between, root, answered: BTreeSet::new() })
    }

    /// Answers what is open: signs, denies the service account `unwanted`, and leaves `unheard` alone.
    fn answer(&mut self, admin: &Cluster) -> Result<()> {
        let all = admin.get(&["certificatesigningrequests"])?;
        for request in all["items"].as_array().into_iter().flatten() {
            let name = request["metadata"]["name"].as_str().unwrap_or_default();
            // Of a cluster that stays there are those of earlier runs.
            let is_signed = request["status"]["certificate"].is_string();
            let is_ours = request["spec"]["signerName"] == SIGNER;
            if !is_ours || is_signed || self.answered.contains(name) {
                continue;
            }
            let pem = request["spec"]["request"].as_str().and_then(unbase64);
            let mut asked = CertificateSigningRequestParams::from_pem(&pem.context("no PEM")?)?;
            let [SanType::URI(uri)] = asked.params.subject_alt_names.as_slice() else {
                anyhow::bail!("no URI alone in {request}");
            };
            match uri.as_str().rsplit('/').next() {
                Some("unheard") => {}
                Some("unwanted") => {
                    admin.kubectl(&["certificate", "deny", name])?;
                }
                _ => {
                    let seconds =
                        request["spec"]["expirationSeconds"].as_i64().context("no life")?;
                    let now = OffsetDateTime::now_utc();
                    asked.params.not_before = now - Duration::from_secs(60);
                    asked.params.not_after = now + time::Duration::seconds(seconds);
                    asked.params.is_ca = IsCa::ExplicitNoCa;
                    asked.params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
                    asked.params.extended_key_usages = vec![
                        ExtendedKeyUsagePurpose::ServerAuth,
                        ExtendedKeyUsagePurpose::ClientAuth,
                    ];
                    let chain = asked.signed_by(&self.issuer)?.pem() + &self.between;
                    admin.kubectl(&["certificate", "approve", name])?;
                    let status = json!({"status": {"certificate": base64(&chain)}});
                    let patch = ["patch", "csr", name, "--subresource=status", "--type=merge"];
                    let status = status.to_string();
                    admin.kubectl(&[&patch[..], &["--patch", &status]].concat())?;
                }
            }
            self.answered.insert(name.to_owned());
        }
        Ok(())
    }

    /// Answers as long as `work` runs.
    fn beside(mut self, admin: &Cluster, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let end = AtomicBool::new(false);
        thread::scope(|scope| {
            let answering = scope.spawn(|| -> Result<()> {
                while !end.load(Ordering::Acquire) {
                    self.answer(admin).context("the signer")?;
                    thread::sleep(PAUSE);
                }
                Ok(())
            });
            let worked = work();
            end.store(true, Ordering::Release);
            let answered = answering.join().unwrap_or_else(|panic| resume_unwind(panic));
            // Without answers the work comes to nothing.
            answered.and(worked)
        })
    }
}

#[test]
fn certificates_of_somebody_elses_signer_carry_and_what_it_does_not_sign_is_refused() -> Result<()>
{
    require_cluster!();
    let signer = Signer::new()?;
    let agents = Agents::alone_with(&[("MESH_SIGNER", SIGNER)], Some(&signer.root))?;
    let shop = Cluster::namespace()?;
    shop.annotate(&json!({"malla.dev/mesh": "enabled", "malla.dev/mode": "strict"}))?;
    let admin = agents.system();
    signer.beside(admin, || {
        let nodes = shop.two_nodes()?;
        let (nginx, curl) = (Cluster::load("nginx")?, Cluster::load("curl")?);
        shop.apply(&service_of_pods("web", 80))?;
        shop.start("web", &nodes[1], json!({"containers": [{"image": nginx}]}))?;
        for account in ["client", "unwanted", "unheard"] {
            shop.kubectl(&["create", "serviceaccount", account])?;
            let sleep = json!([{"image": curl, "command": ["sleep", "3600"]}]);
            let spec = json!({"serviceAccountName": account, "containers": sleep});
            shop.start(account, &nodes[0], spec)?;
        }
        for (pod, node) in [("web", 1), ("client", 0), ("unwanted", 0), ("unheard", 0)] {
            shop.ready(pod)?;
            agents.wait_until_enrolled(&nodes[node], shop.name(), pod, true)?;
            agents.wait_until_carried(&nodes[node], shop.name(), pod)?;
        }
        let ask = |pod: &str| {
            let ask = ["curl", "--silent", "--fail", "--max-time", "15", "http://web/"];
            shop.exec_output(pod, &ask)
        };
        wait::until(wait::SOON, "an answer", || {
            ask("client").is_ok_and(|output| output.stdout == b"web\n")
        })?;
        let identity =
            |account: &str| format!("spiffe://cluster.local/ns/{}/sa/{account}", shop.name());
        let (client, server) = (identity("client"), identity("default"));
        let carried = [
            ("src.identity", &*client),
            ("dst.identity", &*server),
            ("way", "tunnel"),
            ("response_flags", "-"),
        ];
        agents.wait_for_record(&nodes[0], &carried)?;
        agents.wait_for_record(&nodes[1], &carried)?;

        for (account, why) in [("unwanted", "the signer refused"), ("unheard", SIGNER)] {
            // It is waited for first: a request may be answered by hand.
            let told = || -> Option<Value> {
                let certs = agents.ask(&nodes[0], &["certs"]).ok()?;
                let mut all = certs.as_array()?.iter();
                let cert = all.find(|cert| cert["name"] == identity(account).as_str())?;
                cert["problem"].as_str()?.contains(why).then(|| cert.clone())
            };
            let cert = wait::until_some(Duration::from_secs(45), why, told)
                .with_context(|| format!("{:?}", agents.ask(&nodes[0], &["certs"])))?;
            assert_eq!(cert["valid"], false, "{cert}");
            let refused = ask(account)?;
            ensure!(!refused.status.success(), "{account} has no certificate and is answered");
            let record = [("src.workload", account), ("reason", "no_certificate")];
            agents.wait_for_record(&nodes[0], &record)?;
        }
        ensure!(ask("client")?.status.success(), "and harms no other");
        Ok(())
    })
}
