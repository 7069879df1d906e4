//! Certificates through the API: real requests by real tokens, answered by the real signer with the
//! rights of the deployment.

mod rotation;
mod world;

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Cluster, is_believed, wait};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, PKCS_ECDSA_P384_SHA384, SanType,
};
use serde_json::json;

use self::world::{Answer, Asked, World, uri};

#[test]
fn workload_of_the_askers_node_gets_a_certificate_that_openssl_believes() -> Result<()> {
    require_cluster!();
    let world = World::new("signs")?;
    let _signer = world.signer("one", 0)?;
    let Answer::Signed(chain) = world.ask(&world.agents[0], &Asked::web(&world))? else {
        anyhow::bail!("denied");
    };
    ensure!(is_believed(&chain, &world.bundle()?)?, "{chain}");
    let mut show = Command::new("openssl");
    show.args(["x509", "-noout", "-text"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut show = show.spawn().context("openssl")?;
    show.stdin.take().context("no stdin")?.write_all(chain.as_bytes())?;
    let text = String::from_utf8(show.wait_with_output()?.stdout)?;
    ensure!(text.contains(&format!("URI:{}", world.identity())), "{text}");
    for part in ["CA:FALSE", "TLS Web Server Authentication, TLS Web Client Authentication"] {
        ensure!(text.contains(part), "no {part} in\n{text}");
    }
    Ok(())
}

/// Each is tried by whoever is most likely to get away with it.
#[test]
fn whatever_is_not_exactly_right_is_denied_with_the_reason() -> Result<()> {
    require_cluster!();
    let world = World::new("denies")?;
    // Somebody else's approval, before the signer could say a word.
    let approved = world.request(&world.agents[1], &Asked::web(&world))?;
    world.system().kubectl(&["certificate", "approve", &approved])?;
    let signer = world.signer("one", 0)?;
    let web = || Asked::web(&world);
    let shop = world.shop.name();
    let (here, there) = (&world.agents[0], &world.agents[1]);

    let of = |namespace: &str, account: &str| {
        let mut asked = web();
        let id = format!("spiffe://cluster.local/ns/{namespace}/sa/{account}");
        asked.params.subject_alt_names = vec![uri(&id)];
        asked
    };
    // The workload runs on the other node.
    world.is_denied(there, &web(), "no_pod")?;
    world.is_denied(here, &of(shop, "far"), "no_pod")?;
    // Its namespace takes no part, or it does not itself; there is no such account; nothing may be the agent itself.
    world.is_denied(here, &of(world.outside.name(), "web"), "not_enrolled")?;
    world.is_denied(here, &of(shop, "alone"), "not_enrolled")?;
    world.is_denied(here, &of(shop, "nobody"), "no_pod")?;
    world.is_denied(here, &of(world.system().name(), "malla-agent"), "not_enrolled")?;
    let mut elsewhere = web();
    let id = format!("spiffe://elsewhere/ns/{shop}/sa/web");
    elsewhere.params.subject_alt_names = vec![uri(&id)];
    world.is_denied(here, &elsewhere, "trust_domain")?;

    let mut two = web();
    two.params.subject_alt_names.push(uri(&format!("spiffe://cluster.local/ns/{shop}/sa/far")));
    world.is_denied(here, &two, "names")?;
    let mut dns = web();
    dns.params.subject_alt_names.push(SanType::DnsName("web".try_into()?));
    world.is_denied(here, &dns, "names")?;
    let mut ca = web();
    ca.params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    world.is_denied(here, &ca, "ca")?;
    let mut named = web();
    named.params.distinguished_name.push(DnType::CommonName, "system:admin");
    world.is_denied(here, &named, "more_than_a_name")?;
    world.is_denied(here, &Asked { lifetime_s: Some(86_401), ..web() }, "lifetime")?;
    world.is_denied(here, &Asked { lifetime_s: None, ..web() }, "lifetime")?;
    let usages = vec!["digital signature", "server auth"];
    world.is_denied(here, &Asked { usages, ..web() }, "usages")?;
    let usages = vec!["digital signature", "server auth", "client auth", "cert sign"];
    world.is_denied(here, &Asked { usages, ..web() }, "usages")?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384)?;
    world.is_denied(here, &Asked { key, ..web() }, "key_type")?;

    // The agent's own account, from nowhere; another account of the node; the administrator.
    let loose = world.system().user("loose", &world.system().token("malla-agent", None)?)?;
    world.is_denied(&loose, &web(), "no_node")?;
    let workload = world.shop.token("web", Some(("Pod", "web")))?;
    let workload = world.shop.user("workload", &workload)?;
    world.let_ask(&world.shop, "web")?;
    world.is_denied(&workload, &web(), "not_an_agent")?;
    world.is_denied(&world.admin()?, &web(), "not_an_agent")?;

    let failed = world.answer(&approved)?;
    ensure!(failed == Answer::Failed("no_pod".into()), "{failed:?}");

    let metrics = signer.metrics()?;
    assert_eq!(metrics.sum("mesh_ca_requests_total", &[("verdict", "signed")]), 0.0);
    assert!(metrics.sum("mesh_ca_requests_total", &[("reason", "no_pod")]) >= 4.0);
    Ok(())
}

#[test]
fn signer_that_ends_or_dies_is_succeeded_and_no_request_is_lost() -> Result<()> {
    require_cluster!();
    let world = World::new("succeeds")?;
    let mut first = world.signer("first", 0)?;
    let second = world.signer_that_waits("second")?;
    ensure!(first.leads() && !second.leads(), "one of them");
    let is_signed = || -> Result<()> {
        let answer = world.ask(&world.agents[0], &Asked::web(&world))?;
        ensure!(matches!(answer, Answer::Signed(_)), "{answer:?}");
        Ok(())
    };
    is_signed()?;
    // Given up, it need not run out.
    first.terminate()?;
    let name = world.request(&world.agents[0], &Asked::web(&world))?;
    second.wait_until_it_leads(Duration::from_secs(8))?;
    ensure!(matches!(world.answer(&name)?, Answer::Signed(_)), "left unanswered");

    let third = world.signer_that_waits("third")?;
    let mut second = second;
    second.kill()?;
    let name = world.request(&world.agents[0], &Asked::web(&world))?;
    third.wait_until_it_leads(Duration::from_secs(30))?;
    ensure!(matches!(world.answer(&name)?, Answer::Signed(_)), "left unanswered");
    // All of them had one root.
    assert_eq!(world.bundle()?.matches("BEGIN CERTIFICATE").count(), 1);
    Ok(())
}

#[test]
fn operators_intermediate_signs_and_its_root_is_what_is_trusted() -> Result<()> {
    require_cluster!();
    let world = World::new("between")?;
    let ca = |name: &str, length: u8| {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(length));
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        params
    };
    let (root_key, key) = (KeyPair::generate()?, KeyPair::generate()?);
    let root_params = ca("their root", 1);
    let root = root_params.self_signed(&root_key)?;
    let between =
        ca("theirs", 0).signed_by(&key, &rcgen::Issuer::from_params(&root_params, &root_key))?;
    let secret = |roots: &str| {
        json!({
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "kubernetes.io/tls",
            "metadata": {"name": "malla-ca"},
            "stringData": {"tls.crt": between.pem(), "tls.key": key.serialize_pem(), "ca.crt": roots},
        })
    };
    // Without its root nobody could believe it, and so it does not sign.
    world.system().apply(&secret(""))?;
    let signer = world.signer("one", 0)?;
    wait::until(wait::SOON, "the signer to say what is missing", || {
        signer.log().contains("put the root that is above it into ca.crt")
    })?;
    world.system().apply(&secret(&root.pem()))?;
    let Answer::Signed(chain) = world.ask(&world.agents[0], &Asked::web(&world))? else {
        anyhow::bail!("denied");
    };
    assert_eq!(chain.matches("BEGIN CERTIFICATE").count(), 2, "the leaf and what is above it");
    let bundle = world.bundle()?;
    let body = |pem: &str| -> Vec<String> {
        pem.lines().filter(|line| !line.contains(['-', '#'])).map(str::to_owned).collect()
    };
    assert_eq!(body(&bundle), body(&root.pem()), "the root, and not the intermediate");
    ensure!(is_believed(&chain, &bundle)?, "{chain}");
    Ok(())
}
