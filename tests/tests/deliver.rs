//! Deliver: what the application in the destination pod sees of a connection.

use std::io::Read as _;
use std::time::Duration;

use anyhow::{Result, ensure};
use harness::{Carrier, Family, Mesh, PodSpec, Serve, Server, exchange, fill, linger_zero, wait};

#[test]
fn application_sees_the_client_and_its_own_address() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mesh = Mesh::two_nodes_builder().carrier(carrier).start()?;
        let server = mesh.pod("b1").serve(8080, Serve::Echo)?;
        for family in Family::BOTH {
            // b2 lives on the same node, a1 on the other.
            for client in ["a1", "b2"] {
                let mut stream = mesh.pod(client).connect(mesh.service("b").addr(family, 80))?;
                exchange(&mut stream, b"hello")?;
                let seen = server.clients().pop().map(|client| client.ip());
                assert_eq!(seen, Some(stream.local_addr()?.ip()), "from {client}");
                assert_eq!(server.locals().pop(), Some(mesh.pod("b1").addr(family, 8080)));
            }
        }
    }
    Ok(())
}

#[test]
fn application_sees_its_own_pod_where_the_client_is_not_preserved() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mesh = Mesh::two_nodes_builder()
            .carrier(carrier)
            .pod(PodSpec::new("b1", "b").annotation("malla.dev/preserve-client-address", "false"))
            .pod(PodSpec::new("far", "a").annotation("malla.dev/mesh", "disabled"))
            .start()?;
        let server = mesh.pod("b1").serve(8080, Serve::Echo)?;
        // Through a tunnel, on one node, and in plain text.
        for (client, came) in [("a1", carrier.as_str()), ("b2", "local"), ("far", "plaintext")] {
            for family in Family::BOTH {
                let mut stream = mesh.pod(client).connect(mesh.pod("b1").addr(family, 8080))?;
                exchange(&mut stream, b"hello")?;
                let seen = server.clients().pop().map(|client| client.ip());
                assert_eq!(seen, Some(mesh.pod("b1").ip(family)), "{client}, {carrier:?}");
            }
            mesh.agent("b").wait_for_record(&[("direction", "inbound"), ("carrier", came)])?;
        }
    }
    Ok(())
}

#[test]
fn reader_that_stalls_holds_a_bounded_number_of_bytes_without_a_tunnel() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .namespace("default", &[("malla.dev/outbound", "all")])
        .pod(PodSpec::new("out", "a").annotation("malla.dev/mesh", "disabled"))
        .start()?;
    for (server, way) in [("a2", "local"), ("out", "passthrough")] {
        // Nobody accepts, and so nobody reads.
        let _listener = mesh.pod(server).listen(8080)?;
        let before = mesh.agent("a").rss_bytes()?;
        let mut stream = mesh.pod("a1").connect(mesh.pod(server).v4(8080))?;
        let sent = fill(&mut stream, 256 << 20)?;
        let grown = mesh.agent("a").rss_bytes()?.saturating_sub(before);
        ensure!(sent < 64 << 20, "{way}: {sent} bytes went to nobody");
        ensure!(grown < 12 << 20, "{way}: the agent grew by {grown} bytes");
        linger_zero(&stream)?;
        drop(stream);
        mesh.agent("a").wait_for_record(&[("direction", "outbound"), ("way", way)])?;
    }
    Ok(())
}

#[test]
fn pod_that_calls_itself_reaches_itself() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    for family in Family::BOTH {
        for to in [mesh.pod("b1").addr(family, 8080), mesh.service("b").addr(family, 80)] {
            let before = server.clients().len();
            let mut stream = mesh.pod("b1").connect(to)?;
            exchange(&mut stream, b"it is me")?;
            assert_eq!(server.clients().len(), before + 1, "{to}: once, and no loop");
        }
    }
    Ok(())
}

#[test]
fn pods_of_one_node_are_joined_without_a_wire() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    for family in Family::BOTH {
        let mut stream = mesh.pod("b2").connect(mesh.service("b").addr(family, 80))?;
        exchange(&mut stream, b"neighbour")?;
    }
    for direction in ["outbound", "inbound"] {
        let record = mesh.agent("b").wait_for_record(&[
            ("direction", direction),
            ("way", "local"),
            ("carrier", "local"),
        ])?;
        assert_eq!(record.text("src.identity"), mesh.pod("b2").identity());
        assert_eq!(record.text("dst.identity"), mesh.pod("b1").identity());
    }
    assert_eq!(mesh.agent("b").metric("mesh_tunnels", &[])?, 0.0, "nothing was encrypted");
    Ok(())
}

#[test]
fn port_that_nobody_listens_at_is_refused_at_once() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mesh = Mesh::two_nodes_builder().carrier(carrier).start()?;
        for family in Family::BOTH {
            let took = mesh.pod("a1").refused(mesh.service("b").addr(family, 80))?;
            ensure!(took < Duration::from_secs(2), "{carrier:?}: refused after {took:?}");
        }
        for agent in ["a", "b"] {
            let failed = &[("stage", "deliver"), ("reason", "connection_refused")];
            mesh.agent(agent).wait_for_record(failed)?;
        }
    }
    Ok(())
}

#[test]
fn endpoint_that_refuses_is_passed_over() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    // Only one of the two endpoints of the service works.
    let _server = mesh.pod("b2").serve(8080, Serve::Greet("b2"))?;
    for _ in 0..20 {
        let mut stream = mesh.pod("a1").connect(mesh.service("both").v4(80))?;
        let mut greeting = [0; 2];
        stream.read_exact(&mut greeting)?;
        assert_eq!(&greeting, b"b2");
    }
    Ok(())
}

#[test]
fn service_is_balanced_over_its_pods() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let servers =
        [mesh.pod("b1").serve(8080, Serve::Echo)?, mesh.pod("b2").serve(8080, Serve::Echo)?];
    let mut asked = 0;
    let share = |server: &Server| server.clients().len();
    // On a busy machine one slow answer turns the balancer away from a pod until it has half forgotten
    // it, in some seconds: both have a share in the end, not among any forty connections.
    wait::until(2 * wait::SOON, "both pods to have a share", || {
        let one = mesh.pod("a1").connect(mesh.service("both").v4(80));
        let answered = one.and_then(|mut stream| exchange(&mut stream, b"hello"));
        asked += 1;
        answered.is_ok() && servers.iter().all(|server| share(server) >= 16)
    })?;
    assert_eq!(servers.iter().map(share).sum::<usize>(), asked, "each asked one pod, once");
    Ok(())
}
