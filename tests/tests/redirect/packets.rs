//! Which packets between two pods skip the node, and which stay with it.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::wait::{SOON, until};
use harness::{
    Family, Mesh, Pattern, Pod, PodSpec, Serve, ServiceSpec, exchange, exchange_patterns, is_reset,
    linger_zero,
};

use super::{ON, TCX, forwarded, kernel, one_node, redirected, rules, wait_for, watch};

#[test]
fn connections_between_pods_of_a_node_skip_it_when_asked() -> Result<()> {
    harness::require!("nft");
    harness::require_kernel!(TCX);
    let mesh = redirected()?;
    watch(&mesh)?;
    let (client, server) = (mesh.pod("a1"), mesh.pod("a2"));
    let _bulk = server.serve(8080, Serve::Exchange(32 << 20))?;
    let _count = server.serve(8081, Serve::Count)?;
    let reset = server.serve(8082, Serve::ResetAfter(5))?;
    let echo = server.serve(8083, Serve::Echo)?;
    for family in Family::BOTH {
        let before = kernel(&mesh, "redirected")?;
        let stream = client.connect(server.addr(family, 8080))?;
        exchange_patterns(&stream, 32 << 20, Pattern::CLIENT, Pattern::SERVER)?;

        let mut stream = client.connect(server.addr(family, 8081))?;
        stream.write_all(b"seven b")?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        assert_eq!(answer, "7", "the other direction stays open");

        let mut stream = client.connect(server.addr(family, 8082))?;
        stream.write_all(b"reset")?;
        assert!(is_reset(&mut stream), "a reset arrives as one");

        let mut stream = client.connect(server.addr(family, 8083))?;
        exchange(&mut stream, b"hello")?;
        assert_eq!(echo.clients().pop(), Some(stream.local_addr()?));
        linger_zero(&stream)?;
        drop(stream);
        until(SOON, "the server to see the client's reset", || {
            echo.outcomes().last().is_some_and(Result::is_err)
        })?;
        let took = client.refused(server.addr(family, 8089))?;
        ensure!(took < Duration::from_secs(1), "refused after {took:?}");

        let packets = kernel(&mesh, "redirected")? - before;
        ensure!(packets > 64.0, "{family:?}: only {packets} packets of 64 MiB were redirected");
    }
    drop(reset);
    assert_eq!(forwarded(&mesh, "pods_tcp")?, 0, "nothing went through the node");
    Ok(())
}

#[test]
fn direct_connections_skip_the_node_too() -> Result<()> {
    harness::require!("nft");
    harness::require_kernel!(TCX);
    let mesh = Mesh::builder()
        .node("a")
        .namespace("default", &[("malla.dev/mesh", "enabled")])
        .pod(PodSpec::new("a1", "a"))
        .pod(PodSpec::new("a2", "a"))
        .service(ServiceSpec::new("a").port(80, 8080).pods(&["a2"]))
        .flag(ON)
        .start()?;
    wait_for(&mesh, &["a1", "a2"], "on")?;
    watch(&mesh)?;
    let _server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    for family in Family::BOTH {
        let (taken, before) = (kernel(&mesh, "direct_taken")?, kernel(&mesh, "redirected")?);
        let to = mesh.service("a").addr(family, 80);
        until(SOON, "a direct connection", || {
            let reached =
                mesh.pod("a1").connect(to).and_then(|mut stream| exchange(&mut stream, b"hello"));
            reached.is_ok() && kernel(&mesh, "direct_taken").is_ok_and(|now| now > taken)
        })?;
        ensure!(kernel(&mesh, "redirected")? > before, "{family:?}");
    }
    assert_eq!(forwarded(&mesh, "pods_tcp")?, 0);
    Ok(())
}

#[test]
fn rule_of_the_node_between_two_pods_holds_unless_asked_otherwise() -> Result<()> {
    harness::require!("nft");
    harness::require_kernel!(TCX);
    let mut mesh = one_node().start()?;
    let _server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    let reach = |mesh: &Mesh, family| -> Result<()> {
        exchange(&mut mesh.pod("a1").connect(mesh.pod("a2").addr(family, 8080))?, b"hello")
    };
    for family in Family::BOTH {
        reach(&mesh, family)?;
    }
    rules(&mesh, &["tcp flags & (syn | ack) == syn reject with tcp reset"])?;
    for family in Family::BOTH {
        mesh.pod("a1").refused(mesh.pod("a2").addr(family, 8080))?;
    }
    assert_eq!(kernel(&mesh, "redirected")?, 0.0);

    // What the flag's first sentence says.
    mesh.agent_mut("a").kill()?;
    mesh.agent_mut("a").set_flag(ON);
    mesh.agent_mut("a").restart()?;
    wait_for(&mesh, &["a1", "a2"], "on")?;
    for family in Family::BOTH {
        reach(&mesh, family)?;
    }
    Ok(())
}

#[test]
fn network_policies_that_would_be_skipped_are_warned_of() -> Result<()> {
    harness::require!();
    harness::require_kernel!(TCX);
    let mesh = redirected()?;
    let dir = mesh.manifests().dir().display().to_string();
    let check = |args: &[&str]| -> Result<String> {
        let cli = mesh.agent("a").cli(&[&["check", "--manifests", &dir], args].concat())?;
        ensure!(cli.code == 0, "a warning is no error: {}{}", cli.stdout, cli.stderr);
        Ok(cli.stdout)
    };
    let warning = "NetworkPolicies";
    ensure!(!check(&[ON])?.contains("‼ NetworkPol"));
    ensure!(!mesh.agent("a").log().contains(warning));
    mesh.manifests().write(
        "policy",
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
         metadata: {name: deny, namespace: default}\nspec: {podSelector: {}}\n",
    )?;
    until(SOON, "the agent to warn", || mesh.agent("a").log().contains(warning))?;
    let said = check(&[ON])?;
    ensure!(said.contains("‼ NetworkPol"), "{said}");
    ensure!(said.contains("do not hold between enrolled pods of one node"), "{said}");
    let said = check(&[])?;
    ensure!(said.contains("‼ NetworkPol"), "{said}");
    ensure!(said.contains("not enforced on TCP between pods of the mesh"), "{said}");
    Ok(())
}

#[test]
fn what_is_not_tcp_goes_through_the_node() -> Result<()> {
    harness::require!("nft");
    harness::require_kernel!(TCX);
    let mesh = redirected()?;
    watch(&mesh)?;
    let (client, server) = (mesh.pod("a1"), mesh.pod("a2"));
    for family in Family::BOTH {
        let bound = |pod: &Pod| {
            pod.run(|| {
                let socket = UdpSocket::bind(pod.addr(family, 0))?;
                socket.set_read_timeout(Some(SOON))?;
                Ok(socket)
            })
        };
        let (from, to) = (bound(client)?, bound(server)?);
        let before = forwarded(&mesh, "pods_other")?;
        let mut buffer = [0; 8];
        from.send_to(b"datagram", to.local_addr()?)?;
        assert_eq!(to.recv_from(&mut buffer)?, (8, from.local_addr()?));
        // Nobody there: the answer is ICMP.
        from.connect(server.addr(family, 9))?;
        from.send(b"nobody")?;
        let error = from.recv(&mut buffer).expect_err("an answer of nobody");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
        ensure!(forwarded(&mesh, "pods_other")? >= before + 3, "two datagrams, one ICMP");
    }
    assert_eq!(kernel(&mesh, "redirected")?, 0.0);
    Ok(())
}

/// kube-proxy translates a service's address on the node, and the answer back: an answer that went
/// another way would come from an address that the client never dialled.
#[test]
fn connection_by_a_translated_address_stays_with_the_node() -> Result<()> {
    harness::require!("nft");
    harness::require_kernel!(TCX);
    let pod = |name| PodSpec::new(name, "a").annotation("malla.dev/mesh", "disabled");
    let mesh = one_node()
        .pod(pod("a1").annotation("malla.dev/skip-outbound-ports", "80,8080"))
        .pod(pod("a2").annotation("malla.dev/skip-inbound-ports", "8080"))
        .service(ServiceSpec::new("a").port(80, 8080).pods(&["a2"]))
        .translated_services()
        .flag(ON)
        .start()?;
    let client = mesh.pod("a1");
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    for family in Family::BOTH {
        let (service, endpoint) =
            (mesh.service("a").addr(family, 80), mesh.pod("a2").addr(family, 8080));
        let mut before_enrolment = client.connect(service)?;
        exchange(&mut before_enrolment, b"before")?;
        let mut straight = client.connect(endpoint)?;
        exchange(&mut straight, b"before")?;

        mesh.enrol("a1", true)?;
        mesh.enrol("a2", true)?;
        wait_for(&mesh, &["a1", "a2"], "on")?;
        let before = kernel(&mesh, "redirected")?;
        exchange(&mut before_enrolment, b"after")?;
        exchange(&mut straight, b"after")?;
        let mut after_enrolment = client.connect(service)?;
        exchange(&mut after_enrolment, b"new")?;
        assert_eq!(
            kernel(&mesh, "redirected")?,
            before,
            "{family:?}: all of it went through the node"
        );
        ensure!(kernel(&mesh, "redirect_unknown")? > 0.0, "and was seen");

        // One source port, straight and then by the service's address: the same two ends to the server.
        let from = pick_port(client, family)?;
        exchange(&mut connect_from(client, from, endpoint)?, b"straight")?;
        ensure!(kernel(&mesh, "redirected")? > before, "this one was redirected");
        exchange(&mut connect_from(client, from, service)?, b"translated")?;
        let seen = server.clients();
        assert_eq!(
            seen[seen.len() - 2..].iter().map(|addr| addr.port()).collect::<Vec<_>>(),
            [from.port(); 2]
        );

        mesh.enrol("a1", false)?;
        mesh.enrol("a2", false)?;
        exchange(&mut before_enrolment, b"left")?;
        exchange(&mut straight, b"left")?;
        exchange(&mut after_enrolment, b"left")?;
    }
    Ok(())
}

/// An address of the pod with a port that nothing uses.
fn pick_port(pod: &Pod, family: Family) -> Result<std::net::SocketAddr> {
    pod.run(|| Ok(std::net::TcpListener::bind(pod.addr(family, 0))?.local_addr()?))
}

/// Connects from this very port; its end is a reset, so that the port is free again at once.
fn connect_from(
    pod: &Pod,
    from: std::net::SocketAddr,
    to: std::net::SocketAddr,
) -> Result<std::net::TcpStream> {
    pod.run(|| {
        let domain = socket2::Domain::for_address(from);
        let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_linger(Some(Duration::ZERO))?;
        socket.set_read_timeout(Some(SOON))?;
        socket.bind(&from.into())?;
        socket.connect_timeout(&to.into(), SOON).with_context(|| format!("{from} to {to}"))?;
        Ok(socket.into())
    })
}
