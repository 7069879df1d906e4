//! Services that say more than which pods stand behind them: whose clients may use which endpoints, who
//! keeps to one, and what is spoken there.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Family, Mesh, PodSpec, Serve, Server, ServiceSpec, exchange, wait};
use serde_json::{Value, json};

/// Who greets at `to`.
fn greeting(mesh: &Mesh, client: &str, to: SocketAddr) -> Result<String> {
    let mut stream = mesh.pod(client).connect(to)?;
    let mut name = [0; 2];
    stream.read_exact(&mut name).with_context(|| format!("from {to}"))?;
    exchange(&mut stream, b"thanks")?;
    Ok(String::from_utf8(name.into())?)
}

/// Who greets in 12 connections in a row, of both families.
fn greeters(mesh: &Mesh, client: &str, service: &str) -> Result<BTreeSet<String>> {
    let ask = |family| greeting(mesh, client, mesh.service(service).addr(family, 80));
    (0..6).flat_map(|_| Family::BOTH).map(ask).collect()
}

/// Waits until just these greet: the agents learn of a change at slightly different times.
fn wait_for_greeters(mesh: &Mesh, client: &str, service: &str, expected: &[&str]) -> Result<()> {
    let expected: BTreeSet<String> = expected.iter().map(|name| (*name).to_owned()).collect();
    let mut last = None;
    wait::until(wait::SOON, "", || {
        last = Some(greeters(mesh, client, service));
        last.as_ref().is_some_and(|found| found.as_ref().is_ok_and(|found| *found == expected))
    })
    .with_context(|| format!("{client} to {service}: {expected:?} and not {last:?}"))
}

fn serve(mesh: &Mesh, pods: &[&'static str]) -> Result<Vec<Server>> {
    pods.iter().map(|pod| mesh.pod(pod).serve(8080, Serve::Greet(pod))).collect()
}

/// What an agent's `services` says of one.
fn shown(mesh: &Mesh, node: &str, service: &str) -> Result<Value> {
    let services = mesh.agent(node).ask(&["services"])?;
    let mut services = services.as_array().context("a list")?.iter();
    services.find(|one| one["service"] == service).cloned().context("not listed")
}

fn kernel(mesh: &Mesh, event: &str) -> Result<f64> {
    mesh.agent("a").metric("mesh_capture_total", &[("event", event)])
}

#[test]
fn local_traffic_stays_on_the_node_or_is_refused() -> Result<()> {
    harness::require!();
    let local =
        ServiceSpec::new("near").port(80, 8080).field("internalTrafficPolicy", json!("Local"));
    let mesh = Mesh::two_nodes_builder().service(local.clone().pods(&["a2", "b1"])).start()?;
    let _servers = serve(&mesh, &["a2", "b1", "b2"])?;
    for (client, server) in [("a1", "a2"), ("b2", "b1")] {
        let found = greeters(&mesh, client, "near")?;
        assert_eq!(found, BTreeSet::from([server.to_owned()]), "{client}");
    }
    let near = shown(&mesh, "a", "near")?;
    assert_eq!((&near["endpoints"], &near["in_reach"]), (&json!(4), &json!(2)), "{near}");
    assert_eq!(near["reach"], json!(["local"]));

    mesh.endpoints("near", &["b1", "b2"])?;
    let to = mesh.service("near").v4(80);
    wait::until(wait::SOON, "nobody to be near", || mesh.pod("a1").refused(to).is_ok())?;
    for family in Family::BOTH {
        let took = mesh.pod("a1").refused(mesh.service("near").addr(family, 80))?;
        ensure!(took < Duration::from_secs(1), "refused after {took:?}");
    }
    let why = [("stage", "route"), ("reason", "no_local_endpoints")];
    mesh.agent("a").wait_for_record(&why)?;
    mesh.agent("a").wait_for_metric("mesh_refusals_total", &why, 3.0)?;
    wait_for_greeters(&mesh, "b1", "near", &["b1", "b2"])?;
    // Not near is not nowhere.
    mesh.endpoints("near", &[])?;
    wait::until(wait::SOON, "another reason", || {
        mesh.pod("a1").refused(to).is_ok()
            && mesh.agent("a").access_log().iter().any(|one| one.has(&[("reason", "no_endpoints")]))
    })?;
    mesh.endpoints("near", &["a2", "b1"])?;
    wait_for_greeters(&mesh, "a1", "near", &["a2"])
}

#[test]
fn same_zone_is_preferred_and_the_others_are_there_when_it_has_nobody() -> Result<()> {
    harness::require!();
    for (preferred, rule) in [
        ("PreferSameZone", "same-zone"),
        ("PreferClose", "same-zone"),
        ("PreferSameNode", "same-node"),
    ] {
        let service = ServiceSpec::new("close").port(80, 8080);
        let service = service.field("trafficDistribution", json!(preferred));
        // Of two that are far the one that was slow at first would wait for its turn.
        let mesh = Mesh::two_nodes_builder()
            .flag("--balance=random")
            .zone("a", "west")
            .zone("b", "east")
            .service(service.pods(&["a2", "b1", "b2"]))
            .start()?;
        let _servers = serve(&mesh, &["a2", "b1", "b2"])?;
        wait_for_greeters(&mesh, "a1", "close", &["a2"])?;
        for _ in 0..3 {
            assert_eq!(greeters(&mesh, "a1", "close")?, BTreeSet::from(["a2".to_owned()]));
        }
        assert_eq!(shown(&mesh, "a", "close")?["reach"], json!([rule]), "{preferred}");
        wait_for_greeters(&mesh, "b1", "close", &["b1", "b2"])?;

        mesh.endpoints("close", &["b1", "b2"])?;
        wait_for_greeters(&mesh, "a1", "close", &["b1", "b2"])
            .with_context(|| format!("{preferred}: from elsewhere rather than from nowhere"))?;
        assert_eq!(shown(&mesh, "a", "close")?["reach"], json!(["all"]), "{preferred}");
    }
    Ok(())
}

#[test]
fn same_node_goes_before_the_zone() -> Result<()> {
    harness::require!();
    let service = ServiceSpec::new("close").port(80, 8080);
    let service = service.field("trafficDistribution", json!("PreferSameNode"));
    let mesh = Mesh::two_nodes_builder()
        .zone("a", "west")
        .zone("b", "west")
        .service(service.pods(&["a2", "b1"]))
        .start()?;
    let _servers = serve(&mesh, &["a2", "b1"])?;
    wait_for_greeters(&mesh, "a1", "close", &["a2"])?;
    mesh.endpoints("close", &["b1"])?;
    wait_for_greeters(&mesh, "a1", "close", &["b1"])?;
    assert_eq!(shown(&mesh, "a", "close")?["reach"], json!(["same-zone"]));
    Ok(())
}

fn sticky(name: &str, timeout_s: Option<u32>) -> ServiceSpec {
    let service = ServiceSpec::new(name).port(80, 8080).field("sessionAffinity", json!("ClientIP"));
    match timeout_s {
        None => service,
        Some(seconds) => service
            .field("sessionAffinityConfig", json!({ "clientIP": { "timeoutSeconds": seconds } })),
    }
}

/// Ten connections at once, and over and over: whichever worker has them, all go to one endpoint.
#[test]
fn client_keeps_to_its_endpoint_on_every_worker() -> Result<()> {
    harness::require!();
    let pods = ["a2", "b1", "b2"];
    let mesh = Mesh::two_nodes_builder()
        .service(sticky("sticky", None).pods(&pods))
        .service(ServiceSpec::new("free").port(80, 8080).pods(&pods))
        .flag("--workers=2")
        .flag("--balance=random")
        .start()?;
    let _servers = serve(&mesh, &pods)?;
    assert_eq!(shown(&mesh, "a", "sticky")?["affinity_s"], 10_800);
    assert_eq!(shown(&mesh, "a", "free")?["affinity_s"], Value::Null);
    let at_once = |client: &str, service: &str| -> Result<BTreeSet<String>> {
        let to = mesh.service(service).v4(80);
        thread::scope(|scope| {
            let asking: Vec<_> =
                (0..10).map(|_| scope.spawn(|| greeting(&mesh, client, to))).collect();
            asking.into_iter().map(|one| one.join().expect("no panic")).collect()
        })
    };
    for client in ["a1", "b1"] {
        let first = at_once(client, "sticky")?;
        assert_eq!(first.len(), 1, "{client}: {first:?}");
        for _ in 0..4 {
            assert_eq!(at_once(client, "sticky")?, first, "{client}");
        }
        // Which is not for want of others. Ten that are drawn of three are the same now and then, and not five
        // times in a row.
        let drawn = (0..5).map(|_| at_once(client, "free")).collect::<Result<Vec<_>>>()?;
        ensure!(drawn.iter().any(|who| who.len() > 1), "{client}: {drawn:?}");
    }
    Ok(())
}

/// Asks until the kernel has let ten more through, and says who greeted them all.
fn greeted_directly(mesh: &Mesh, to: SocketAddr) -> Result<String> {
    let before = kernel(mesh, "direct_taken")?;
    let kept = greeting(mesh, "a1", to)?;
    wait::until(wait::SOON, "direct connections to the same", || {
        greeting(mesh, "a1", to).is_ok_and(|who| who == kept)
            && kernel(mesh, "direct_taken").is_ok_and(|taken| taken >= before + 10.0)
    })?;
    for _ in 0..20 {
        assert_eq!(greeting(mesh, "a1", to)?, kept);
    }
    Ok(kept)
}

#[test]
fn kernel_lets_a_client_through_to_the_endpoint_that_it_keeps_to() -> Result<()> {
    harness::require!();
    let pods = ["a2", "a3"];
    let mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("a3", "a"))
        .service(sticky("sticky", None).pods(&pods))
        .start()?;
    let mut servers = serve(&mesh, &pods)?;
    let to = mesh.service("sticky").v4(80);
    let kept = greeted_directly(&mesh, to)?;
    // It fails this client: from then on it is the other one.
    let index = pods.iter().position(|pod| *pod == kept).context("who?")?;
    drop(servers.remove(index));
    let moved = greeted_directly(&mesh, to)?;
    ensure!(moved != kept, "it does not listen any more");
    servers.push(mesh.pod(pods[index]).serve(8080, Serve::Greet(pods[index]))?);
    assert_eq!(greeted_directly(&mesh, to)?, moved, "{kept} is back, and nobody is sent back");
    Ok(())
}

/// The kernel was told of the endpoint before; of the one after, on another node, it is told nothing.
#[test]
fn client_that_moved_to_another_node_is_not_sent_back() -> Result<()> {
    harness::require!();
    let service = sticky("sticky", None);
    let mesh = Mesh::two_nodes_builder().service(service.clone().pods(&["a2"])).start()?;
    let here = mesh.pod("a2").serve(8080, Serve::Greet("a2"))?;
    let _there = mesh.pod("b1").serve(8080, Serve::Greet("b1"))?;
    let to = mesh.service("sticky").v4(80);
    assert_eq!(greeting(&mesh, "a1", to)?, "a2");
    mesh.endpoints("sticky", &["a2", "b1"])?;
    wait::until(wait::SOON, "both", || {
        shown(&mesh, "a", "sticky").is_ok_and(|sticky| sticky["endpoints"] == 4)
    })?;
    assert_eq!(greeted_directly(&mesh, to)?, "a2", "one more is no reason to move");
    drop(here);
    assert_eq!(greeting(&mesh, "a1", to)?, "b1");
    let _back = mesh.pod("a2").serve(8080, Serve::Greet("a2"))?;
    for _ in 0..20 {
        assert_eq!(greeting(&mesh, "a1", to)?, "b1");
    }
    Ok(())
}

/// With the kernel's verdicts, which end when the binding does and are prolonged as it is.
#[test]
fn client_that_stays_away_for_long_enough_is_free_again() -> Result<()> {
    harness::require!();
    let timeout = Duration::from_secs(2);
    let mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("a3", "a"))
        .service(sticky("sticky", Some(2)).pods(&["a2", "a3"]))
        .flag("--balance=random")
        .start()?;
    let _servers = serve(&mesh, &["a2", "a3"])?;
    let to = mesh.service("sticky").v4(80);
    let kept = greeting(&mesh, "a1", to)?;
    // Three times as long as it lasts without a connection.
    let mut asked = 0;
    let since = std::time::Instant::now();
    while since.elapsed() < 3 * timeout {
        assert_eq!(greeting(&mesh, "a1", to)?, kept, "after {:?}", since.elapsed());
        asked += 1;
        thread::sleep(timeout / 8);
    }
    ensure!(kernel(&mesh, "direct_taken")? > f64::from(asked) / 2.0, "most were direct");
    // Time has to pass, there is nothing to wait for. 25 times the same of two: once in 30 million.
    let other = (0..25).any(|_| {
        thread::sleep(timeout + timeout / 8);
        greeting(&mesh, "a1", to).is_ok_and(|who| who != kept)
    });
    ensure!(other, "{kept} for ever");
    Ok(())
}

/// What the record of a connection to a service says that is spoken, when bytes that are no HTTP went
/// both ways.
fn spoken(mesh: &Mesh, service: &str) -> Result<String> {
    let before = mesh.agent("a").access_log().len();
    let mut stream = mesh.pod("a1").connect(mesh.service(service).v4(80))?;
    exchange(&mut stream, b"\x00\xff\r\n\r\nHTTP/9.9 \x16\x03\x01")?;
    drop(stream);
    let host = format!("{service}.default.svc.cluster.local");
    let found = wait::until_some(wait::SOON, "the record", || {
        let records = mesh.agent("a").access_log();
        let new = records.get(before..)?.iter();
        new.clone().find(|one| one.has(&[("dst.service", &host), ("response_flags", "-")])).cloned()
    })?;
    Ok(found.text("protocol").to_owned())
}

#[test]
fn app_protocol_says_what_is_spoken() -> Result<()> {
    harness::require!();
    let web = ServiceSpec::new("web").port(80, 8080).pods(&["b1"]);
    let mesh = Mesh::two_nodes_builder().service(web.clone()).start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    assert_eq!(spoken(&mesh, "web")?, "opaque", "nothing is said");
    for (app_protocol, expected) in [
        ("http", "http"),
        ("kubernetes.io/h2c", "h2c"),
        ("kubernetes.io/ws", "ws"),
        ("https", "opaque"),
        ("tls", "opaque"),
        ("tcp", "opaque"),
    ] {
        mesh.change_service(&web.clone().app_protocol(app_protocol))?;
        let is_shown = json!([format!("80/{expected}")]);
        wait::until(wait::SOON, app_protocol, || {
            shown(&mesh, "a", "web").is_ok_and(|web| web["protocols"] == is_shown)
        })?;
        assert_eq!(spoken(&mesh, "web")?, expected, "{app_protocol}");
    }
    Ok(())
}

#[test]
fn opaque_ports_of_namespace_pod_and_service_are_opaque() -> Result<()> {
    harness::require!();
    const OPAQUE: &str = "malla.dev/opaque-ports";
    let service = |name: &str| ServiceSpec::new(name).port(80, 8080).app_protocol("http");
    let mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("b2", "b").annotation(OPAQUE, "1000, 8000-8100"))
        .service(service("plain").pods(&["b1"]))
        .service(service("of-pod").pods(&["b2"]))
        .service(service("of-service").pods(&["b1"]).annotation(OPAQUE, "80"))
        .service(service("wrong").pods(&["b1"]).annotation(OPAQUE, "eighty"))
        .start()?;
    let _servers = ["b1", "b2"].map(|pod| mesh.pod(pod).serve(8080, Serve::Echo));
    for (name, expected) in
        [("plain", "http"), ("of-pod", "opaque"), ("of-service", "opaque"), ("wrong", "http")]
    {
        assert_eq!(spoken(&mesh, name)?, expected, "{name}");
    }
    let cli = mesh.agent("a").cli(&["status", "-o", "json"])?;
    let status: Value = serde_json::from_str(&cli.stdout)?;
    let problems = status["problems"].as_array().context("a list")?;
    let about = problems.iter().filter(|one| {
        let field = one["field"].as_str().unwrap_or_default();
        let message = one["message"].as_str().unwrap_or_default();
        field.contains(OPAQUE) && message.contains("`eighty` is not understood")
    });
    assert_eq!(about.count(), 1, "{problems:?}");

    // A namespace's list is its pods' and Services', unless they have their own.
    let enabled = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: default\n  annotations:\n    \
                   malla.dev/mesh: enabled\n    malla.dev/opaque-ports: \"80\"\n";
    mesh.manifests().write("namespace-default", enabled)?;
    wait::until(wait::SOON, "the namespace", || {
        shown(&mesh, "a", "plain").is_ok_and(|plain| plain["protocols"] == json!(["80/opaque"]))
    })?;
    assert_eq!(spoken(&mesh, "plain")?, "opaque");
    Ok(())
}
