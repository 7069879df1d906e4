//! Authorize: who is let in, and how the others are told.

use std::time::Duration;

use anyhow::{Result, ensure};
use harness::{Family, Mesh, PodSpec, Serve, exchange, wait};

/// A refusal is an RST, not a wait.
const AT_ONCE: Duration = Duration::from_secs(2);

/// b1 with `mode`, and a pod beside the mesh on each node.
fn mesh(mode: &str) -> Result<Mesh> {
    let outsider = |name, node| PodSpec::new(name, node).annotation("malla.dev/mesh", "disabled");
    Mesh::two_nodes_builder()
        .pod(PodSpec::new("b1", "b").annotation("malla.dev/mode", mode))
        .pod(outsider("far", "a"))
        .pod(outsider("near", "b"))
        .start()
}

#[test]
fn strict_refuses_plaintext_at_once() -> Result<()> {
    harness::require!();
    let mesh = mesh("strict")?;
    let server = mesh.pod("b1").serve(8080, Serve::Greet("no"))?;
    for client in ["far", "near"] {
        for family in Family::BOTH {
            let took = mesh.pod(client).refused(mesh.pod("b1").addr(family, 8080))?;
            ensure!(took < AT_ONCE, "{client} was refused after {took:?}");
        }
    }
    assert!(server.clients().is_empty(), "the application must not hear of it");
    // The kernel refuses it, so no agent holds a socket for it: what is told is the number, and in the
    // log some of them, with both ends.
    let agent = mesh.agent("b");
    agent.wait_for_metric("mesh_capture_total", &[("event", "lookup_strict")], 4.0)?;
    let line = wait::until_some(wait::SOON, "a refusal in the log", || {
        let log = agent.log();
        log.lines().find(|line| line.contains("plain text to a strict pod")).map(str::to_owned)
    })?;
    ensure!(line.contains("stage=\"capture\"") && line.contains(":8080"), "{line}");
    Ok(())
}

#[test]
fn strict_lets_the_mesh_in() -> Result<()> {
    harness::require!();
    let mesh = mesh("strict")?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    // From another node through the tunnel, and from the same node.
    for client in ["a1", "b2"] {
        for family in Family::BOTH {
            let mut stream = mesh.pod(client).connect(mesh.service("b").addr(family, 80))?;
            exchange(&mut stream, b"hello")?;
        }
        mesh.agent("b").wait_for_record(&[
            ("direction", "inbound"),
            ("src.identity", &mesh.pod(client).identity()),
            ("response_flags", "-"),
        ])?;
    }
    Ok(())
}

#[test]
fn permissive_accepts_plaintext_without_an_identity() -> Result<()> {
    harness::require!();
    let mesh = mesh("permissive")?;
    let server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    for client in ["far", "near"] {
        for family in Family::BOTH {
            let mut stream = mesh.pod(client).connect(mesh.pod("b1").addr(family, 8080))?;
            exchange(&mut stream, b"hello")?;
            let seen = server.clients().pop().map(|client| client.ip());
            assert_eq!(seen, Some(stream.local_addr()?.ip()));
        }
    }
    let record =
        mesh.agent("b").wait_for_record(&[("direction", "inbound"), ("carrier", "plaintext")])?;
    assert_eq!(record.text("src.identity"), "", "an address proves nothing");
    mesh.agent("b").wait_for_metric(
        "istio_tcp_connections_opened_total",
        &[("reporter", "destination"), ("connection_security_policy", "unknown")],
        4.0,
    )
}

#[test]
fn mode_may_change_while_it_runs() -> Result<()> {
    harness::require!();
    let mesh = mesh("permissive")?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.pod("b1").v4(8080);
    let served = || exchange(&mut mesh.pod("far").connect(to)?, b"hello");
    served()?;
    mesh.annotate("b1", "malla.dev/mode", "strict")?;
    wait::until(wait::SOON, "the mode to be strict", || served().is_err())?;
    mesh.pod("far").refused(to)?;
    mesh.annotate("b1", "malla.dev/mode", "permissive")?;
    wait::until(wait::SOON, "the mode to be permissive", || served().is_ok())
}

#[test]
fn skipped_port_is_reached_in_any_mode() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .pod(
            PodSpec::new("b1", "b")
                .annotation("malla.dev/mode", "strict")
                .annotation("malla.dev/skip-inbound-ports", "9100"),
        )
        .pod(PodSpec::new("far", "a").annotation("malla.dev/mesh", "disabled"))
        .start()?;
    let server = mesh.pod("b1").serve(9100, Serve::Echo)?;
    let _other = mesh.pod("b1").serve(9101, Serve::Echo)?;
    for family in Family::BOTH {
        let mut stream = mesh.pod("far").connect(mesh.pod("b1").addr(family, 9100))?;
        exchange(&mut stream, b"scrape")?;
        let seen = server.clients().pop().map(|client| client.ip());
        assert_eq!(seen, Some(stream.local_addr()?.ip()));
        mesh.pod("far").refused(mesh.pod("b1").addr(family, 9101))?;
    }
    Ok(())
}

#[test]
fn own_list_of_skipped_ports_takes_the_place_of_the_namespaces() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .namespace(
            "default",
            &[("malla.dev/mode", "strict"), ("malla.dev/skip-inbound-ports", "9001")],
        )
        .pod(PodSpec::new("b2", "b").annotation("malla.dev/skip-inbound-ports", "9002"))
        .pod(PodSpec::new("far", "a").annotation("malla.dev/mesh", "disabled"))
        .start()?;
    for (pod, port, skipped) in
        [("b1", 9001, true), ("b1", 9002, false), ("b2", 9001, false), ("b2", 9002, true)]
    {
        let _server = mesh.pod(pod).serve(port, Serve::Echo)?;
        for family in Family::BOTH {
            let to = mesh.pod(pod).addr(family, port);
            if skipped {
                exchange(&mut mesh.pod("far").connect(to)?, b"plain")?;
            } else {
                mesh.pod("far").refused(to)?;
            }
        }
    }
    Ok(())
}

#[test]
fn flow_for_which_the_agent_has_no_place_is_refused_with_a_reason() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes()?;
    let b = mesh.agent_mut("b");
    b.kill()?;
    b.set_flag("--max-connections=1");
    b.restart()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.service("b").v4(80);
    let mut held = mesh.pod("a1").connect(to)?;
    exchange(&mut held, b"the only one")?;

    let took = mesh.pod("a2").refused(to)?;
    ensure!(took < AT_ONCE, "refused after {took:?}");
    for (node, direction) in [("a", "outbound"), ("b", "inbound")] {
        mesh.agent(node).wait_for_record(&[
            ("direction", direction),
            ("stage", "authorize"),
            ("reason", "overloaded"),
        ])?;
    }
    exchange(&mut held, b"is left alone")?;

    drop(held);
    wait::until(wait::SOON, "its place to be free", || {
        mesh.pod("a2").connect(to).and_then(|mut s| exchange(&mut s, b"next")).is_ok()
    })
}
