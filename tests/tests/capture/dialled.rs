//! The ways in which programs connect.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use harness::{Family, Mesh, Pod, PodSpec, Serve, exchange};
use socket2::{Domain, Protocol, Socket, Type};

use super::{LIMIT, stream};

/// sendto(2): opens the connection with the data, from linux/socket.h.
const MSG_FASTOPEN: i32 = 0x2000_0000;

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
