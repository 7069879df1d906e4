//! Source ports and ports of the pod's own: none keeps a connection out, none is taken for another's.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};

use anyhow::{Result, ensure};
use harness::{Family, Mesh, PodSpec, Serve, exchange, linger_zero};

use super::{LIMIT, stream};

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
                // A child that another test has just forked may still have the descriptor that was closed.
                let bind = || socket.bind(&pod.v4(port).into()).is_ok();
                harness::wait::until(harness::wait::SOON, "the port to be free", bind)?;
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
