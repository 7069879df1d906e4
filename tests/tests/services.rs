//! Services that say more than which pods stand behind them: whose clients may use which
//! endpoints.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Family, Mesh, Serve, Server, ServiceSpec, exchange, wait};
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
        let mesh = Mesh::two_nodes_builder()
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
