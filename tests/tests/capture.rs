//! Capture and original destination: whatever way a program connects, the agent takes the connection
//! and carries it where the program meant, and the program cannot tell.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Family, Mesh, Pod, PodSpec, Serve, exchange, linger_zero};
use socket2::{Domain, Protocol, Socket, Type};

/// sendto(2): opens the connection with the data, from linux/socket.h.
const MSG_FASTOPEN: i32 = 0x2000_0000;

/// Long enough for a busy machine, short enough for a test that fails.
const LIMIT: Duration = Duration::from_secs(10);

/// Connects from the pod a1 by `dial` and checks all that a program and the agents see of it.
fn carried(
    mesh: &Mesh,
    to: SocketAddr,
    dial: impl FnOnce(&Pod, SocketAddr) -> Result<Socket> + Send,
) -> Result<Socket> {
    let (a1, b1) = (mesh.pod("a1"), mesh.pod("b1"));
    let server = b1.serve(8080, Serve::Echo)?;
    let before = mesh.agent("a").metric("istio_tcp_connections_opened_total", SOURCE_TLS)?;

    let mut socket = a1.run(|| dial(a1, to))?;
    socket.set_read_timeout(Some(LIMIT))?;
    socket.write_all(b"marker")?;
    let mut answer = [0; 6];
    socket.read_exact(&mut answer)?;
    assert_eq!(&answer, b"marker");

    let local = socket.local_addr()?.as_socket().context("no address")?;
    let local = SocketAddr::new(local.ip().to_canonical(), local.port());
    let canonical = SocketAddr::new(to.ip().to_canonical(), to.port());
    let family = if canonical.is_ipv4() { Family::V4 } else { Family::V6 };
    assert_eq!(local.ip(), a1.ip(family), "getsockname() must be the pod's own address");
    let clients: Vec<_> = server.clients().iter().map(SocketAddr::ip).collect();
    assert_eq!(clients, [local.ip()], "the server must see the client's address");
    assert_eq!(server.locals(), [b1.addr(family, 8080)], "and its own port");

    let connections = mesh.agent("a").ask(&["connections"])?;
    let open = connections.as_array().context("a list")?.iter();
    let ours = open.clone().find(|one| one["source"] == local.to_string());
    let ours = ours.with_context(|| format!("{local} is not among {connections:#}"))?;
    assert_eq!(ours["orig_dst"], canonical.to_string(), "what the program dialled");
    assert_eq!(ours["peer_identity"], b1.identity());
    mesh.agent("a").wait_for_metric(
        "istio_tcp_connections_opened_total",
        SOURCE_TLS,
        before + 1.0,
    )?;
    Ok(socket)
}

const SOURCE_TLS: &[(&str, &str)] =
    &[("reporter", "source"), ("connection_security_policy", "mutual_tls")];

fn stream(to: SocketAddr) -> Result<Socket> {
    Ok(Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?)
}

fn peer(socket: &Socket) -> Result<SocketAddr> {
    socket.peer_addr()?.as_socket().context("no address")
}

#[test]
fn v4_and_v6_are_carried_to_the_exact_destination() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    for to in [
        mesh.service("b").v4(80),
        mesh.service("b").v6(80),
        mesh.pod("b1").v4(8080),
        mesh.pod("b1").v6(8080),
    ] {
        let socket = carried(&mesh, to, |_, to| {
            let socket = stream(to)?;
            socket.connect_timeout(&to.into(), LIMIT)?;
            Ok(socket)
        })?;
        assert_eq!(peer(&socket)?, to, "getpeername() must be what was dialled");
    }
    Ok(())
}

#[test]
fn between_application_and_agent_nothing_is_paced() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("outsider", "b").annotation("malla.dev/mesh", "disabled"))
        .start()?;
    let a1 = mesh.pod("a1");
    let chosen = a1.run(|| Ok(fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control")?))?;
    if chosen.trim() == "reno" {
        harness::skip!(
            "needs another congestion control: sysctl net.ipv4.tcp_congestion_control=cubic"
        );
    }
    let control = |socket: &TcpStream| -> Result<String> {
        let name = socket2::SockRef::from(socket).tcp_congestion()?;
        Ok(String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned())
    };

    let _outsider = mesh.pod("outsider").serve(8080, Serve::Echo)?;
    let outside = a1.connect(mesh.pod("outsider").v4(8080))?;
    assert_eq!(control(&outside)?, chosen.trim(), "what leaves the pod is as the machine wants it");

    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    for to in [mesh.service("b").v4(80), mesh.service("b").v6(80)] {
        let mut captured = a1.connect(to)?;
        exchange(&mut captured, b"marker")?;
        assert_eq!(control(&captured)?, "reno", "{to}");
    }
    Ok(())
}

#[test]
fn v4_mapped_address_means_the_v4_destination() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let mapped = mesh.service("b").v4_ip().to_ipv6_mapped();
    let to = SocketAddr::from((mapped, 80));
    let socket = carried(&mesh, to, |_, to| {
        let socket = stream(to)?;
        socket.set_only_v6(false)?;
        socket.connect_timeout(&to.into(), LIMIT)?;
        Ok(socket)
    })?;
    assert_eq!(peer(&socket)?, to);
    Ok(())
}

#[test]
fn address_and_port_that_were_bound_first_are_kept() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    for family in Family::BOTH {
        let to = mesh.service("b").addr(family, 80);
        let socket = carried(&mesh, to, |pod, to| {
            let socket = stream(to)?;
            socket.bind(&pod.addr(family, 10_000).into())?;
            socket.connect_timeout(&to.into(), LIMIT)?;
            Ok(socket)
        })?;
        assert_eq!(peer(&socket)?, to);
        let local = socket.local_addr()?.as_socket().context("no address")?;
        assert_eq!(local.port(), 10_000);
    }
    Ok(())
}

#[test]
fn socket_that_is_bound_to_a_device_is_carried() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    for family in Family::BOTH {
        let to = mesh.service("b").addr(family, 80);
        let socket = carried(&mesh, to, |_, to| {
            let socket = stream(to)?;
            socket.bind_device(Some(b"eth0"))?;
            socket.connect_timeout(&to.into(), LIMIT)?;
            Ok(socket)
        })?;
        assert_eq!(peer(&socket)?, to);
    }
    Ok(())
}

#[test]
fn connection_that_is_opened_with_its_data_is_carried() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    for family in Family::BOTH {
        let to = mesh.service("b").addr(family, 80);
        let server = mesh.pod("b1").serve(8080, Serve::Echo)?;
        let socket = mesh.pod("a1").run(|| {
            let socket = stream(to)?;
            socket.send_to_with_flags(b"early", &to.into(), MSG_FASTOPEN)?;
            Ok(socket)
        })?;
        let mut socket = TcpStream::from(socket);
        socket.set_read_timeout(Some(LIMIT))?;
        let mut answer = [0; 5];
        socket.read_exact(&mut answer)?;
        assert_eq!(&answer, b"early");
        assert_eq!(socket.peer_addr()?, to);
        // One connection, from the client's address; its port is the delivering agent's to choose.
        let clients: Vec<_> = server.clients().iter().map(SocketAddr::ip).collect();
        assert_eq!(clients, [socket.local_addr()?.ip()]);
    }
    Ok(())
}

#[test]
fn mptcp_socket_is_carried() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    for family in Family::BOTH {
        let to = mesh.service("b").addr(family, 80);
        let available = mesh.pod("a1").run(|| {
            Ok(Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::MPTCP)).is_ok())
        })?;
        if !available {
            harness::skip!("this kernel has no MPTCP");
        }
        let socket = carried(&mesh, to, |_, to| {
            let domain = Domain::for_address(to);
            let socket = Socket::new(domain, Type::STREAM, Some(Protocol::MPTCP))?;
            socket.connect_timeout(&to.into(), LIMIT)?;
            Ok(socket)
        })?;
        // Before Linux 5.19, and without BTF, a program cannot find the MPTCP socket above a subflow.
        if Path::new("/sys/kernel/btf/vmlinux").exists() {
            assert_eq!(peer(&socket)?, to);
        }
    }
    Ok(())
}

#[test]
fn non_blocking_connect_is_carried() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    for family in Family::BOTH {
        let to = mesh.service("b").addr(family, 80);
        let socket = carried(&mesh, to, |_, to| {
            let socket = stream(to)?;
            socket.set_nonblocking(true)?;
            if let Err(error) = socket.connect(&to.into()) {
                ensure!(error.raw_os_error() == Some(libc::EINPROGRESS), "connect: {error}");
            }
            harness::wait::until(LIMIT, "the connection", || socket.peer_addr().is_ok())?;
            assert!(socket.take_error()?.is_none(), "SO_ERROR must be 0");
            socket.set_nonblocking(false)?;
            Ok(socket)
        })?;
        assert_eq!(peer(&socket)?, to);
    }
    Ok(())
}

#[test]
fn what_is_not_in_the_mesh_is_left_alone() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("outsider", "b").annotation("malla.dev/mesh", "disabled"))
        .start()?;
    let _server = mesh.pod("outsider").serve(8080, Serve::Echo)?;
    let before = mesh.agent("a").metric("istio_tcp_connections_opened_total", &[])?;
    // The node itself: known to no manifest as a pod or a service.
    let outside =
        mesh.node("b").netns().run(|| Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, 9))?))?;
    let dialled = mesh.pod("a1").connect((mesh.node("b").v4(), 9).into())?;
    let (_accepted, client) = outside.accept()?;
    assert_eq!(client, dialled.local_addr()?, "nothing stands between them");

    // Programs talk to themselves and over UDP as ever.
    let inside = mesh.pod("a1").serve(7000, Serve::Echo)?;
    let mut stream = mesh.pod("a1").connect((Ipv6Addr::LOCALHOST, 7000).into())?;
    exchange(&mut stream, b"loopback")?;
    assert_eq!(inside.clients(), [stream.local_addr()?]);
    let receiver = mesh.pod("b1").run(|| Ok(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 53))?))?;
    receiver.set_read_timeout(Some(LIMIT))?;
    let sender = mesh.pod("a1").run(|| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect(mesh.pod("b1").v4(53))?;
        socket.send(b"query")?;
        Ok(socket)
    })?;
    let (n, from) = receiver.recv_from(&mut [0; 16])?;
    assert_eq!((n, from.port()), (5, sender.local_addr()?.port()));

    let after = mesh.agent("a").metric("istio_tcp_connections_opened_total", &[])?;
    assert_eq!(after, before, "the agent carried none of these");
    Ok(())
}

#[test]
fn everything_is_captured_where_the_namespace_asks_for_it() -> Result<()> {
    harness::require!();
    let mesh =
        Mesh::two_nodes_builder().namespace("default", &[("malla.dev/outbound", "all")]).start()?;
    let outside =
        mesh.node("b").netns().run(|| Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, 9))?))?;
    let to = SocketAddr::from((mesh.node("b").v4(), 9));
    let mut dialled = mesh.pod("a1").connect(to)?;
    let (mut accepted, client) = outside.accept()?;
    assert_eq!(client.ip(), mesh.pod("a1").v4_ip(), "it leaves from inside the pod");
    dialled.write_all(b"out")?;
    let mut heard = [0; 3];
    accepted.read_exact(&mut heard)?;
    assert_eq!(&heard, b"out");
    assert_eq!(dialled.peer_addr()?, to);
    drop((dialled, accepted));

    let record = mesh.agent("a").wait_for_record(&[("way", "passthrough")])?;
    assert_eq!(record.text("dst.addr"), to.to_string());
    assert_eq!(record.number("bytes_sent"), 3);
    Ok(())
}

#[test]
fn skip_lists_are_left_alone() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("a1", "a").annotation("malla.dev/skip-outbound-ports", "8081,9000-9010"))
        .start()?;
    let (a1, b1) = (mesh.pod("a1"), mesh.pod("b1"));
    let opened = || mesh.agent("a").metric("istio_tcp_connections_opened_total", &[]);
    for (port, captured) in
        [(8080, true), (8081, false), (9000, false), (9010, false), (9011, true)]
    {
        let _server = b1.serve(port, Serve::Echo)?;
        let before = opened()?;
        let mut stream = a1.connect(b1.v4(port))?;
        exchange(&mut stream, b"hello")?;
        drop(stream);
        if captured {
            mesh.agent("a").wait_for_metric(
                "istio_tcp_connections_opened_total",
                &[],
                before + 1.0,
            )?;
        } else {
            assert_eq!(opened()?, before, "port {port} is not for the mesh");
        }
    }
    Ok(())
}

#[test]
fn address_blocks_of_the_skip_list_are_left_alone() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .namespace("default", &[("malla.dev/skip-outbound-cidrs", "10.0.0.0/8")])
        .start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let before = mesh.agent("a").metric("istio_tcp_connections_opened_total", &[])?;
    exchange(&mut mesh.pod("a1").connect(mesh.pod("b1").v4(8080))?, b"plain")?;
    assert_eq!(mesh.agent("a").metric("istio_tcp_connections_opened_total", &[])?, before);
    exchange(&mut mesh.pod("a1").connect(mesh.pod("b1").v6(8080))?, b"carried")?;
    mesh.agent("a").wait_for_metric("istio_tcp_connections_opened_total", &[], before + 1.0)
}

#[test]
fn block_of_all_ipv6_addresses_leaves_ipv4_in_the_mesh() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .namespace("default", &[("malla.dev/skip-outbound-cidrs", "::/0")])
        .start()?;
    let server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    // Dialled as IPv4 and as IPv6: the address is an IPv4 one in either case.
    let v4 = mesh.pod("b1").v4(8080);
    for to in [v4, (mesh.pod("b1").v4_ip().to_ipv6_mapped(), 8080).into()] {
        let mut stream = mesh.pod("a1").connect(to)?;
        exchange(&mut stream, b"carried")?;
        let source = SocketAddr::from((mesh.pod("a1").v4_ip(), stream.local_addr()?.port()));
        drop(stream);
        let source = source.to_string();
        mesh.agent("a").wait_for_record(&[("src.addr", &source), ("way", "tunnel")])?;
    }
    let before = mesh.agent("a").metric("istio_tcp_connections_opened_total", &[])?;
    let mut stream = mesh.pod("a1").connect(mesh.pod("b1").v6(8080))?;
    exchange(&mut stream, b"plain")?;
    assert_eq!(server.clients().pop().map(|seen| seen.ip()), Some(mesh.pod("a1").ip(Family::V6)));
    assert_eq!(mesh.agent("a").metric("istio_tcp_connections_opened_total", &[])?, before);
    Ok(())
}

#[test]
fn source_ports_in_time_wait_do_not_keep_the_pod_out() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("a1", "a").annotation("malla.dev/mesh", "disabled"))
        .start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let a1 = mesh.pod("a1");
    // All ports that the kernel would choose from, as those of a busy client.
    let ports = 10_000..10_016;
    let range = format!("{} {}", ports.start, ports.end - 1);
    a1.sysctl("net/ipv4/ip_local_port_range", &range)?;
    // A server whose FIN crosses our ACK, on a machine that is busy, sends it again and answers the second ACK
    // with RST, which ends TIME_WAIT (RFC 1337).
    a1.sysctl("net/ipv4/tcp_rfc1337", "1")?;
    for family in Family::BOTH {
        for _ in ports.clone() {
            let mut stream = a1.connect(mesh.pod("b1").addr(family, 8080))?;
            // Who ends first is in TIME_WAIT.
            stream.shutdown(Shutdown::Write)?;
            ensure!(stream.read(&mut [0])? == 0, "the server ends, too");
        }
    }
    let none_is_free = |to| a1.connect(to).is_err();
    ensure!(none_is_free(mesh.pod("b1").v4(8080)), "there is no TIME_WAIT");
    mesh.enrol("a1", true)?;
    for family in Family::BOTH {
        exchange(&mut a1.connect(mesh.service("b").addr(family, 80))?, b"in the mesh")?;
    }
    mesh.agent("a").wait_for_record(&[("src.workload", "a1"), ("way", "tunnel")])?;
    Ok(())
}

#[test]
fn ports_that_the_pod_uses_itself_do_not_keep_it_out() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("a1", "a").annotation("malla.dev/mesh", "disabled"))
        .start()?;
    // Ports that meshes are known to want for themselves, in use before it is enrolled.
    let mut own = Vec::new();
    for port in [15_000, 15_001, 15_006, 15_008, 15_019, 15_020, 15_021, 15_053] {
        own.push(mesh.pod("a1").serve(port, Serve::Echo)?);
    }
    mesh.enrol("a1", true)?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    exchange(&mut mesh.pod("a1").connect(mesh.service("b").v4(80))?, b"out")?;
    // And they are reached like any other port.
    exchange(&mut mesh.pod("b1").connect(mesh.pod("a1").v4(15_001))?, b"in")?;
    mesh.agent("b").wait_for_record(&[("dst.addr", &mesh.pod("a1").v4(15_001).to_string())])?;
    Ok(())
}

#[test]
fn same_source_port_of_two_pods_is_never_mixed_up() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let _b1 = mesh.pod("b1").serve(8080, Serve::Greet("b1"))?;
    let _b2 = mesh.pod("b2").serve(8080, Serve::Greet("b2"))?;
    // The same source port at the same time, and destinations that differ.
    for port in 10_000..10_050 {
        let mut streams = Vec::new();
        for (client, server) in [("a1", "b1"), ("a2", "b2")] {
            let pod = mesh.pod(client);
            let family = Family::BOTH[usize::from(port) % 2];
            let to = mesh.pod(server).addr(family, 8080);
            let socket = pod.run(|| {
                let socket = stream(to)?;
                socket.bind(&pod.addr(family, port).into())?;
                socket.connect_timeout(&to.into(), LIMIT)?;
                Ok(socket)
            })?;
            socket.set_read_timeout(Some(LIMIT))?;
            streams.push((server, TcpStream::from(socket)));
        }
        for (server, stream) in &mut streams {
            let mut greeting = [0; 2];
            stream.read_exact(&mut greeting)?;
            assert_eq!(&greeting, server.as_bytes(), "source port {port}");
        }
    }
    Ok(())
}

#[test]
fn reset_connection_is_not_taken_for_the_next_user_of_its_port() -> Result<()> {
    harness::require!();
    // Four listeners that take turns: the fifth connection meets the listener of the first.
    let mut mesh = Mesh::two_nodes_builder().flag("--workers=1").start()?;
    let heard = Arc::new(Mutex::new(Vec::new()));
    let _b1 = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let _b2 = mesh.pod("b2").serve(8080, {
        let heard = Arc::clone(&heard);
        Serve::custom(move |mut stream| {
            let mut message = [0; 5];
            stream.read_exact(&mut message)?;
            heard.lock().unwrap().push(message);
            Ok(stream.write_all(&message)?)
        })
    })?;
    let (b1, b2) = (mesh.pod("b1").v4(8080), mesh.pod("b2").v4(8080));
    let from = |mesh: &Mesh, port: u16, to: SocketAddr| {
        let pod = mesh.pod("a1");
        pod.run(|| {
            let socket = stream(to)?;
            if port != 0 {
                socket.bind(&pod.v4(port).into())?;
            }
            socket.connect_timeout(&to.into(), LIMIT)?;
            socket.set_read_timeout(Some(LIMIT))?;
            Ok(TcpStream::from(socket))
        })
    };

    mesh.agent_mut("a").signal(libc::SIGSTOP)?;
    let mut waiting = Vec::new();
    for port in 11_000..11_008 {
        let mut first = from(&mesh, port, b1)?;
        first.write_all(b"secret of the first")?;
        linger_zero(&first)?;
        drop(first);
        for _ in 0..3 {
            waiting.push((from(&mesh, 0, b1)?, *b"other"));
        }
        waiting.push((from(&mesh, port, b2)?, *b"hello"));
    }
    mesh.agent_mut("a").signal(libc::SIGCONT)?;

    for (stream, message) in &mut waiting {
        exchange(stream, message)?;
    }
    let heard = heard.lock().unwrap();
    assert!(heard.iter().all(|message| message == b"hello"), "{heard:?}");
    assert_eq!(heard.len(), 8);
    Ok(())
}
