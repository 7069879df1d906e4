//! Whom a direct connection lets in, and whom it does not.

use std::io::{ErrorKind, Read as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Family, Mesh, Pod, PodSpec, Serve, ServiceSpec, defer_connect, exchange, wait};
use socket2::{Domain, Protocol, Socket, Type};

use super::{connect, kernel, nft, until_direct};

/// A listener in the pod that accepts nobody, and which one connection fills.
fn full_listener(pod: &Pod) -> Result<Socket> {
    pod.run(|| {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_only_v6(false)?;
        // Connections of the listener before it may not have ended altogether.
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::from(([0u16; 8], 8080)).into())?;
        socket.listen(0)?;
        Ok(socket)
    })
}

/// A connection whose SYN has left and was dropped: it is sent again after one second, and two more.
fn waiting(mesh: &Mesh, to: SocketAddr) -> Result<(Socket, Vec<Socket>)> {
    let mut there = Vec::new();
    wait::until_some(wait::SOON, "a connection to wait", || {
        let taken = kernel(mesh, "direct_taken").ok()?;
        let socket = mesh.pod("a1").run(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
            Ok((socket.connect_timeout(&to.into(), Duration::from_millis(100)).is_ok(), socket))
        });
        let (is_there, socket) = socket.ok()?;
        if !is_there && kernel(mesh, "direct_taken").ok()? > taken {
            return Some(socket);
        }
        // Keeps the listener full.
        there.push(socket);
        None
    })
    .map(|waiting| (waiting, there))
}

/// Loses what the pod `a1` sends to an address, before its node looks for a way there, until let go.
struct Held<'a>(&'a Mesh);

impl<'a> Held<'a> {
    fn to(mesh: &'a Mesh, family: Family, to: SocketAddr) -> Result<Self> {
        let ip = if family == Family::V4 { "ip" } else { "ip6" };
        let (client, server) = (mesh.pod("a1").ip(family), to.ip());
        let rules = format!(
            "add table inet held; \
             add chain inet held early {{ type filter hook prerouting priority 0; }}; \
             add rule inet held early {ip} saddr {client} {ip} daddr {server} drop"
        );
        nft(mesh, &rules)?;
        Ok(Self(mesh))
    }

    fn let_go(self) -> Result<()> {
        nft(self.0, "delete table inet held").map(drop)
    }
}

/// Waits until another pod than the one that was described first is called `a2`, and captured.
fn until_succeeded(mesh: &Mesh) -> Result<()> {
    let first = mesh.pod("a2").uid();
    wait::until(wait::SOON, "the successor to be enrolled", || {
        let workloads = mesh.agent("a").ask(&["workloads"]).unwrap_or_default();
        let mut all = workloads.as_array().into_iter().flatten();
        all.any(|one| one["pod"] == "a2" && one["uid"] != first && one["enrolled"] == true)
    })
}

#[test]
fn syn_that_comes_late_reaches_no_successor() -> Result<()> {
    harness::require!("nft");
    for family in Family::BOTH {
        for mode in ["permissive", "strict"] {
            let mesh = Mesh::two_nodes_builder()
                .pod(PodSpec::new("a2", "a").annotation("malla.dev/mode", mode))
                .pod(PodSpec::new("a3", "a"))
                .start()?;
            // Every second, and not after ever longer pauses: from Linux 6.5 on.
            mesh.pod("a1").sysctl("net/ipv4/tcp_syn_linear_timeouts", "100").ok();
            let to = mesh.pod("a2").addr(family, 8080);
            let first = mesh.pod("a2").serve(8080, Serve::Greet("first"))?;
            until_direct_greeted(&mesh, to, "first")?;
            drop(first);
            let _full = full_listener(mesh.pod("a2"))?;
            let (waiting, _others) = waiting(&mesh, to)?;
            // Before the agent knows the successor, whoever has the address would get it.
            let held = Held::to(&mesh, family, to)?;
            let second = mesh.pod("a3").serve(8080, Serve::Greet("second"))?;
            mesh.succeed_pod("a2", "a2", "a3")?;
            until_succeeded(&mesh)?;
            let refused = kernel(&mesh, "lookup_another")?;
            held.let_go()?;
            // Long enough for the pauses of a kernel that makes them longer.
            wait::until(3 * wait::SOON, "the SYN to be refused", || {
                kernel(&mesh, "lookup_another").is_ok_and(|now| now > refused)
            })?;
            let client = waiting.local_addr()?.as_socket();
            let mut waiting = TcpStream::from(waiting);
            waiting.set_nonblocking(false)?;
            let answer = waiting.read(&mut [0; 8]).map_err(|error| error.kind());
            ensure!(answer == Err(ErrorKind::ConnectionRefused), "of somebody else: {answer:?}");
            let clients = second.clients();
            ensure!(!clients.iter().any(|one| Some(one.port()) == client.map(|me| me.port())));
            // Who means the successor reaches it.
            let greeted = |stream: &mut TcpStream| -> Result<bool> {
                let mut greeting = [0; 6];
                stream.read_exact(&mut greeting)?;
                Ok(&greeting == b"second")
            };
            wait::until(wait::SOON, "the successor", || {
                let connected = mesh.pod("a1").connect(to);
                connected.is_ok_and(|mut stream| greeted(&mut stream).unwrap_or(false))
            })?;
        }
    }
    Ok(())
}

/// As [`until_direct`], of a server that speaks first.
fn until_direct_greeted(mesh: &Mesh, to: SocketAddr, greeting: &str) -> Result<()> {
    wait::until(wait::SOON, "a direct connection", || {
        let Ok(taken) = kernel(mesh, "direct_taken") else { return false };
        let mut heard = vec![0; greeting.len()];
        let connected = mesh.pod("a1").connect(to);
        connected.is_ok_and(|mut stream| stream.read_exact(&mut heard).is_ok())
            && heard == greeting.as_bytes()
            && kernel(mesh, "direct_taken").is_ok_and(|now| now > taken)
    })
}

/// A program that hangs: its socket listens, and nobody accepts. The kernel chooses among endpoints by what it was
/// told, and who connects by it does not pass the agent, which has seen nobody fail.
#[test]
fn endpoint_that_does_not_answer_is_left_to_others() -> Result<()> {
    harness::require!();
    // The other one is one that the kernel may choose as well, the one that a client keeps to, or one that agents carry to.
    for (has_affinity, other) in [(false, "a3"), (true, "a3"), (false, "b1")] {
        let mut two = ServiceSpec::new("two").port(80, 8080).pods(&["a2", other]);
        if has_affinity {
            two = two.field("sessionAffinity", "ClientIP".into());
        }
        let mesh = Mesh::two_nodes_builder().pod(PodSpec::new("a3", "a")).service(two).start()?;
        let to = mesh.service("two").v4(80);
        let first = mesh.pod("a2").serve(8080, Serve::Greet("first."))?;
        let serve = || mesh.pod(other).serve(8080, Serve::Greet("second"));
        let early = if has_affinity { None } else { Some(serve()?) };
        until_direct_greeted(&mesh, to, "first.")?;
        let _second = early.map_or_else(serve, Ok)?;
        if !has_affinity && other == "a3" {
            until_direct_greeted(&mesh, to, "second")?;
            until_direct_greeted(&mesh, to, "first.")?;
        }
        drop(first);
        let _full = full_listener(mesh.pod("a2"))?;
        let (waiting, _others) = waiting(&mesh, to)?;
        let before = kernel(&mesh, "lookup_delivery")?;
        wait::until(wait::SOON, "the SYN to be sent again", || {
            kernel(&mesh, "lookup_delivery").is_ok_and(|now| now > before)
        })?;
        drop(waiting);
        let answers = |limit: Duration| {
            let socket = mesh.pod("a1").run(|| {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
                socket.connect_timeout(&to.into(), limit)?;
                Ok(socket)
            });
            let mut greeting = [0; 6];
            let mut read = |socket: Socket| TcpStream::from(socket).read_exact(&mut greeting);
            socket.is_ok_and(|socket| read(socket).is_ok()) && &greeting == b"second"
        };
        // What the agent tries takes as long as an application has to answer. By chance it would be one in a million.
        let all = || (0..20).all(|_| answers(Duration::from_secs(8)));
        let others = wait::until(2 * wait::SOON, "the other one to be asked alone", all);
        others.with_context(|| format!("{other}, affinity: {has_affinity}"))?;
    }
    Ok(())
}

#[test]
fn syns_that_are_sent_again_are_recorded() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let to = mesh.pod("a2").v4(8080);
    let first = mesh.pod("a2").serve(8080, Serve::Greet("first"))?;
    until_direct_greeted(&mesh, to, "first")?;
    drop(first);
    let full = full_listener(mesh.pod("a2"))?;
    for is_accepted in [false, true] {
        let (waiting, _others) = waiting(&mesh, to)?;
        let client = waiting.local_addr()?.as_socket().context("no address")?.to_string();
        let before = kernel(&mesh, "lookup_delivery")?;
        wait::until(wait::SOON, "the SYN to be sent again", || {
            kernel(&mesh, "lookup_delivery").is_ok_and(|now| now > before)
        })?;
        if is_accepted {
            let mut peers = Vec::new();
            wait::until(wait::SOON, "it to be accepted", || {
                full.set_nonblocking(true).ok();
                peers.extend(full.accept().map(|(peer, _)| peer));
                is_connected(&waiting)
            })?;
        }
        drop(waiting);
        let of_it = [("src.addr", client.as_str()), ("direction", "outbound")];
        let record = mesh.agent("a").wait_for_record(&of_it)?;
        ensure!(record.number("retransmits") > 0, "{record:?}");
        let reason = record.text("reason");
        ensure!(is_accepted == (reason != "connect_timeout"), "{record:?}");
    }
    Ok(())
}

fn is_connected(socket: &Socket) -> bool {
    socket.peer_addr().is_ok() && socket.take_error().is_ok_and(|error| error.is_none())
}

#[test]
fn syn_of_a_pod_that_has_left_meanwhile_is_a_strangers() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("a2", "a").annotation("malla.dev/mode", "strict"))
        .start()?;
    let server = mesh.pod("a2").serve(8080, Serve::Greet("hello"))?;
    let to = mesh.pod("a2").v4(8080);
    until_direct_greeted(&mesh, to, "hello")?;
    // Data in the SYN, with a cookie or without.
    mesh.pod("a1").sysctl("net/ipv4/tcp_fastopen", "5")?;
    for is_leaving in [false, true] {
        let (taken, seen) = (kernel(&mesh, "direct_taken")?, server.clients().len());
        let socket = mesh.pod("a1").run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
            defer_connect(&socket)?;
            socket.set_read_timeout(Some(Duration::from_secs(5)))?;
            socket.connect(&to.into())?;
            Ok(socket)
        })?;
        assert_eq!(kernel(&mesh, "direct_taken")?, taken + 1.0);
        assert_eq!(server.clients().len(), seen, "no SYN has left");
        if is_leaving {
            mesh.enrol("a1", false)?;
        }
        let refused = kernel(&mesh, "lookup_strict")?;
        let mut stream = TcpStream::from(socket);
        let sent = exchange_after_greeting(&mut stream);
        assert_eq!(sent.is_ok(), !is_leaving, "{sent:?}");
        assert_eq!(server.clients().len() > seen, !is_leaving);
        assert_eq!(kernel(&mesh, "lookup_strict")? > refused, is_leaving);
    }
    Ok(())
}

fn exchange_after_greeting(stream: &mut TcpStream) -> Result<()> {
    use std::io::Write as _;
    stream.write_all(b"word")?;
    let mut answer = [0; 9];
    stream.read_exact(&mut answer)?;
    ensure!(&answer == b"helloword", "{answer:?}");
    Ok(())
}

#[test]
fn pod_that_fails_open_goes_on_directly_without_an_agent() -> Result<()> {
    harness::require!();
    let open = |name| PodSpec::new(name, "a").annotation("malla.dev/fail-open", "true");
    let mut mesh = Mesh::two_nodes_builder()
        .pod(open("a1"))
        .pod(PodSpec::new("a2", "a").annotation("malla.dev/mode", "strict"))
        .pod(open("a3"))
        .start()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    let other = mesh.pod("a3").serve(8080, Serve::Echo)?;
    let service = mesh.service("a").v4(80);
    until_direct(mesh.pod("a1"), service, &server)?;
    mesh.agent_mut("a").kill()?;
    // What no verdict allows passes in plain text when the agent has been silent for 5 s.
    wait::until(wait::SOON, "the agent to be bypassed", || {
        connect(mesh.pod("a1"), mesh.pod("a3").v4(8080), &other).is_ok()
    })?;
    let (mut stream, is_direct) = connect(mesh.pod("a1"), service, &server)?;
    ensure!(is_direct);
    let client = stream.local_addr()?.to_string();
    exchange(&mut stream, b"without an agent")?;
    drop(stream);
    mesh.pod("a1").refused(mesh.pod("a2").v4(8081))?;
    mesh.agent_mut("a").restart()?;
    mesh.agent("a").wait_for_record(&[("src.addr", &client), ("way", "direct")])?;
    Ok(())
}

#[test]
fn connection_that_its_pod_keeps_out_of_the_mesh_is_let_in_by_no_other() -> Result<()> {
    harness::require!();
    let skip = |name, key| {
        PodSpec::new(name, "a").annotation("malla.dev/mode", "strict").annotation(key, "8080")
    };
    let mesh = Mesh::two_nodes_builder()
        .pod(skip("a1", "malla.dev/skip-outbound-ports"))
        .pod(PodSpec::new("a2", "a").annotation("malla.dev/mode", "strict"))
        .start()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    for family in Family::BOTH {
        let service = mesh.service("a").addr(family, 80);
        until_direct(mesh.pod("a1"), service, &server)?;
        let refused = kernel(&mesh, "lookup_strict")?;
        // Within the seconds in which a direct connection may come from any port.
        let (_, is_direct) = connect(mesh.pod("a1"), service, &server)?;
        ensure!(is_direct);
        mesh.pod("a1").refused(mesh.pod("a2").addr(family, 8080))?;
        assert_eq!(kernel(&mesh, "lookup_strict")?, refused + 1.0);
    }
    Ok(())
}
