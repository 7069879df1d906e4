//! Identity: who is trusted, and certificates that change while traffic flows.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use harness::{Agent, Carrier, Load, Mesh, Serve, exchange, is_reset};
use serde_json::Value;

/// The serial numbers of the agent's certificates for workloads.
fn serials(agent: &Agent) -> Result<BTreeSet<String>> {
    let certificates = agent.ask(&["certs"])?;
    let certificates = certificates.as_array().context("a list")?.iter();
    let leaves = certificates.filter(|one| one["kind"] == "Leaf");
    Ok(leaves.filter_map(|one| one["serial"].as_str()).map(str::to_owned).collect())
}

/// Waits until the agent has counted a refused tunnel, and logged it.
fn wait_for_refusal(agent: &Agent, side: &str, reason: &str) -> Result<()> {
    let labels = [("side", side), ("reason", reason)];
    agent.wait_for_metric("mesh_tunnel_refusals_total", &labels, 1.0)?;
    harness::wait::until(harness::wait::SOON, &format!("{reason} in the log"), || {
        let log = agent.log();
        log.lines()
            .any(|line| line.contains(" WARN ") && line.contains(&format!("reason=\"{reason}\"")))
    })
}

#[test]
fn peer_that_another_root_signed_is_refused() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder().own_ca("b", "cluster.local").start()?;
    let server = mesh.pod("b1").serve(8080, Serve::Greet("never"))?;
    mesh.pod("a1").refused(mesh.service("b").v4(80))?;
    assert!(server.clients().is_empty());
    let refused = [("stage", "tunnel"), ("direction", "outbound"), ("reason", "unknown_issuer")];
    mesh.agent("a").wait_for_record(&refused)?;
    wait_for_refusal(mesh.agent("a"), "client", "unknown_issuer")?;
    wait_for_refusal(mesh.agent("b"), "server", "peer_refused_certificate")?;
    Ok(())
}

#[test]
fn peer_of_another_trust_domain_is_refused() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder().own_ca("b", "elsewhere.example").start()?;
    let server = mesh.pod("b1").serve(8080, Serve::Greet("never"))?;
    mesh.pod("a1").refused(mesh.service("b").v4(80))?;
    mesh.pod("b1").refused(mesh.pod("a1").v4(8080))?;
    assert!(server.clients().is_empty());
    // Who is meant has another name over there: nobody answers to it, and no certificate is shown.
    for node in ["a", "b"] {
        let agent = mesh.agent(node);
        agent.wait_for_record(&[("reason", "peer_serves_no_such_workload")])?;
        wait_for_refusal(agent, "client", "peer_serves_no_such_workload")?;
        wait_for_refusal(agent, "server", "unknown_workload")?;
        let log = agent.log();
        let told = log.lines().filter(|line| line.contains("or has another trust domain"));
        ensure!(told.count() >= 2, "both ends must say what to compare:\n{log}");
    }
    Ok(())
}

#[test]
fn root_that_is_added_to_the_bundle_is_trusted_without_a_restart() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder().own_ca("b", "cluster.local").start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.service("b").v4(80);
    mesh.pod("a1").refused(to)?;

    trust_both_roots(&mesh)?;
    harness::wait::until(harness::wait::SOON, "both roots to be trusted", || {
        mesh.pod("a1").connect(to).and_then(|mut s| exchange(&mut s, b"now")).is_ok()
    })?;
    for node in ["a", "b"] {
        let certificates = mesh.agent(node).ask(&["certs"])?;
        let is_root = |one: &&Value| one["kind"] == "Root";
        let roots = certificates.as_array().context("a list")?.iter().filter(is_root).count();
        assert_eq!(roots, 2);
    }
    Ok(())
}

/// Where each agent has a root of its own: both agents trust both roots.
fn trust_both_roots(mesh: &Mesh) -> Result<()> {
    let dirs = ["a", "b"].map(|node| mesh.agent(node).ca_dir());
    let [a, b] = dirs.map(|dir| fs::read_to_string(dir.join("root.pem")));
    let both = format!("{}{}", a?, b?);
    dirs.iter().try_for_each(|dir| replace(dir, "bundle.pem", &both))?;
    wait_for_roots(mesh, 2)
}

/// Open flows are reset within a second when one end stops trusting the other's root, no further flow
/// begins, and both agents say why.
fn root_is_removed(carrier: Carrier, at: &str) -> Result<()> {
    let mesh = Mesh::two_nodes_builder().own_ca("b", "cluster.local").carrier(carrier).start()?;
    let server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.pod("b1").v4(8080);
    trust_both_roots(&mesh)?;
    let mut streams = Vec::new();
    for _ in 0..3 {
        let mut stream = mesh.pod("a1").connect(to)?;
        exchange(&mut stream, b"before")?;
        streams.push(stream);
    }

    let (agent, far) = (mesh.agent(at), mesh.agent(if at == "a" { "b" } else { "a" }));
    let own = fs::read_to_string(agent.ca_dir().join("root.pem"))?;
    let known = agent.log().len();
    replace(agent.ca_dir(), "bundle.pem", &own)?;
    for stream in &mut streams {
        assert!(is_reset(stream), "{carrier:?}, {at}: it goes on");
    }
    let ended = SystemTime::now();
    // From when the agent has read it: that comes first, by the order of its log.
    let took = ended.duration_since(agent.logged_at(known, "trust bundle replaced")?)?;
    ensure!(took < Duration::from_secs(1), "{carrier:?}, {at}: reset after {took:?}");
    harness::wait::until(harness::wait::SOON, "the server to see every reset", || {
        server.outcomes().iter().filter(|outcome| outcome.is_err()).count() == 3
    })?;

    let clients = server.clients().len();
    mesh.pod("a1").refused(to)?;
    assert_eq!(server.clients().len(), clients, "{carrier:?}, {at}");

    let (side, direction, other) = match at {
        "a" => ("client", "outbound", "inbound"),
        _ => ("server", "inbound", "outbound"),
    };
    wait_for_refusal(agent, side, "unknown_issuer")?;
    ensure!(agent.log().contains("peer is not trusted any more"), "{}", agent.log());
    let carried = [("carrier", carrier.as_str()), ("stage", "tunnel")];
    let with = |direction, reason| {
        [&carried[..], &[("direction", direction), ("reason", reason)]].concat()
    };
    agent.wait_for_record(&with(direction, "unknown_issuer"))?;
    far.wait_for_record(&with(other, "denied"))?;
    let labels = [("stage", "tunnel"), ("reason", "denied"), ("direction", other)];
    far.wait_for_metric("mesh_refusals_total", &labels, 3.0)?;
    Ok(())
}

#[test]
fn flows_end_when_the_servers_agent_removes_the_root_on_lanes() -> Result<()> {
    harness::require!();
    root_is_removed(Carrier::Lane, "b")
}

#[test]
fn flows_end_when_the_servers_agent_removes_the_root_on_quic() -> Result<()> {
    harness::require!();
    root_is_removed(Carrier::Quic, "b")
}

#[test]
fn flows_end_when_the_clients_agent_removes_the_root_on_lanes() -> Result<()> {
    harness::require!();
    root_is_removed(Carrier::Lane, "a")
}

#[test]
fn flows_end_when_the_clients_agent_removes_the_root_on_quic() -> Result<()> {
    harness::require!();
    root_is_removed(Carrier::Quic, "a")
}

#[test]
fn certificates_are_renewed_while_traffic_flows() -> Result<()> {
    harness::require!();
    let lifetime = Duration::from_secs(6);
    let mesh = Mesh::two_nodes_builder().cert_lifetime(lifetime).start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let mut held = mesh.pod("a1").connect(mesh.service("b").v4(80))?;
    exchange(&mut held, b"before")?;
    Load::during(mesh.pod("a1"), mesh.service("b").v4(80), |load| {
        for node in ["a", "b"] {
            for _ in 0..2 {
                let before = serials(mesh.agent(node))?;
                ensure!(!before.is_empty(), "node {node} holds no certificate");
                harness::wait::until(lifetime * 2, "every certificate to be renewed", || {
                    serials(mesh.agent(node)).is_ok_and(|now| now.is_disjoint(&before))
                })?;
                load.wait_for(2)?;
            }
        }
        Ok(())
    })?;
    exchange(&mut held, b"after")
}

/// Puts `text` into `dir/name` at once.
fn replace(dir: &Path, name: &str, text: &str) -> Result<()> {
    let staged = dir.join(format!(".{name}.new"));
    fs::write(&staged, text)?;
    Ok(fs::rename(staged, dir.join(name))?)
}

/// Waits until both agents trust this number of roots.
fn wait_for_roots(mesh: &Mesh, number: usize) -> Result<()> {
    for node in ["a", "b"] {
        harness::wait::until(harness::wait::SOON, &format!("{number} roots"), || {
            let certificates = mesh.agent(node).ask(&["certs"]).unwrap_or_default();
            let roots = certificates.as_array().into_iter().flatten();
            roots.filter(|one| one["kind"] == "Root").count() == number
        })?;
    }
    Ok(())
}

#[test]
fn root_is_replaced_while_traffic_flows() -> Result<()> {
    harness::require!();
    Carrier::BOTH.into_iter().try_for_each(replace_root)
}

fn replace_root(carrier: Carrier) -> Result<()> {
    let lifetime = Duration::from_secs(4);
    let mesh = Mesh::two_nodes_builder().carrier(carrier).cert_lifetime(lifetime).start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let (dir, next) = (mesh.ca_dir(), mesh.state_dir().join("next-ca"));
    harness::init_ca(&next, "cluster.local")?;
    let [old, new] = [dir, &next].map(|dir| fs::read_to_string(dir.join("root.pem")));
    let (old, new) = (old?, new?);
    let mut held = mesh.pod("a1").connect(mesh.service("b").v4(80))?;
    exchange(&mut held, b"before")?;
    Load::during(mesh.pod("a1"), mesh.service("b").v4(80), |load| {
        replace(dir, "bundle.pem", &format!("{old}{new}"))?;
        wait_for_roots(&mesh, 2)?;

        let before = [serials(mesh.agent("a"))?, serials(mesh.agent("b"))?];
        replace(dir, "root.key", &fs::read_to_string(next.join("root.key"))?)?;
        replace(dir, "root.pem", &new)?;
        for (node, before) in ["a", "b"].iter().zip(before) {
            harness::wait::until(harness::wait::SOON, "certificates of the new root", || {
                serials(mesh.agent(node)).is_ok_and(|now| now.is_disjoint(&before))
            })?;
        }
        let renewed = Instant::now();
        harness::wait::until(lifetime * 2, "the last certificate of the old root to end", || {
            renewed.elapsed() > lifetime
        })?;
        load.wait_for(2)?;
        exchange(&mut held, b"both roots are trusted")?;

        replace(dir, "bundle.pem", &new)?;
        wait_for_roots(&mesh, 1)?;
        load.wait_for(20)
    })?;
    // What began under the old root was proven by it alone.
    assert!(is_reset(&mut held), "{carrier:?}: the old root counts still");
    Ok(())
}

#[test]
fn agents_hold_certificates_of_their_own_pods_only() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    for (node, pods) in [("a", ["a1", "a2"]), ("b", ["b1", "b2"])] {
        let wanted: BTreeSet<String> = pods.map(|pod| mesh.pod(pod).identity()).into();
        harness::wait::until(harness::wait::SOON, "the node's own identities", || {
            let Ok(certificates) = mesh.agent(node).ask(&["certs"]) else {
                return false;
            };
            let leaves = certificates.as_array().into_iter().flatten();
            let leaves = leaves.filter(|one| one["kind"] == "Leaf" && one["valid"] == true);
            let held: BTreeSet<String> =
                leaves.filter_map(|one| one["name"].as_str()).map(str::to_owned).collect();
            held == wanted
        })?;
    }
    Ok(())
}
