//! What a direct connection is, and what is told of it.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::{Family, Mesh, Pattern, PodSpec, Serve, exchange, exchange_patterns, long, wait};
use socket2::{Domain, Protocol, Socket, Type};

use super::{connect, is_direct, kernel, mapped, until_direct};

#[test]
fn second_connection_goes_from_pod_to_pod() -> Result<()> {
    harness::require!();
    for mode in ["permissive", "strict"] {
        let mesh = Mesh::two_nodes_builder()
            .pod(PodSpec::new("a2", "a").annotation("malla.dev/mode", mode))
            .start()?;
        let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
        let service = mesh.service("a");
        let destinations = [
            service.v4(80),
            mapped(service.v4(80))?,
            service.v6(80),
            mesh.pod("a2").v4(8080),
            mesh.pod("a2").v6(8080),
        ];
        for (nth, to) in destinations.into_iter().enumerate() {
            let (_, direct) = connect(mesh.pod("a1"), to, &server)?;
            // The v4-mapped form of an address that was dialled before is the same destination.
            ensure!(nth == 1 || !direct, "{mode} {to}: direct before the agent had decided");
            let stream = until_direct(mesh.pod("a1"), to, &server)?;
            assert_eq!(stream.peer_addr()?, to, "{mode}: the application sees whom it dialled");
            assert_eq!(server.locals().pop().map(|at| at.port()), Some(8080));
        }
        for direction in ["outbound", "inbound"] {
            let record =
                mesh.agent("a").wait_for_record(&[("direction", direction), ("way", "direct")])?;
            assert_eq!(record.text("src.identity"), mesh.pod("a1").identity());
            assert_eq!(record.text("dst.identity"), mesh.pod("a2").identity());
        }
        // A stranger is treated as before.
        let outside = mesh.node("a").netns().run(|| {
            Ok(TcpStream::connect_timeout(&mesh.pod("a2").v4(8080), Duration::from_secs(2)).is_ok())
        })?;
        assert_eq!(outside, mode == "permissive");
    }
    Ok(())
}

#[test]
fn metrics_and_records_are_those_of_a_carried_connection() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let serve = Serve::custom(|mut stream| {
        let mut sent = Vec::new();
        stream.read_to_end(&mut sent)?;
        stream.write_all(&vec![0; 2 * sent.len()])?;
        Ok(())
    });
    let server = mesh.pod("a2").serve(8080, serve)?;
    let agent = mesh.agent("a");
    let mut sent = 1000;
    let mut ask = || -> Result<(SocketAddr, usize, bool)> {
        sent += 1;
        let before = server.clients().len();
        let mut stream = mesh.pod("a1").connect(mesh.service("a").v4(80))?;
        let client = stream.local_addr()?;
        stream.write_all(&vec![0; sent])?;
        stream.shutdown(std::net::Shutdown::Write)?;
        ensure!(stream.read_to_end(&mut Vec::new())? == 2 * sent);
        Ok((client, sent, is_direct(&server, before, &stream)?))
    };
    let carried = ask()?;
    ensure!(!carried.2, "direct before the agent had decided");
    let direct = wait::until_some(wait::SOON, "a direct connection", || {
        ask().ok().filter(|(_, _, direct)| *direct)
    })?;

    for direction in ["outbound", "inbound"] {
        let mut seen = Vec::new();
        for (client, sent, _) in [carried, direct] {
            let client = client.to_string();
            let record =
                agent.wait_for_record(&[("direction", direction), ("src.addr", &client)])?;
            let (up, down) = (sent as u64, 2 * sent as u64);
            let (up, down) = if direction == "outbound" { (up, down) } else { (down, up) };
            assert_eq!(record.number("bytes_sent"), up, "{record:?}");
            assert_eq!(record.number("bytes_recv"), down, "{record:?}");
            let same = agent
                .access_log()
                .into_iter()
                .filter(|one| one.text("src.addr") == client && one.text("direction") == direction);
            assert_eq!(same.count(), 1, "one record on each side");
            seen.push(record);
        }
        for key in [
            "message",
            "src.workload",
            "src.namespace",
            "src.identity",
            "dst.addr",
            "dst.orig_addr",
            "dst.service",
            "dst.workload",
            "dst.namespace",
            "dst.identity",
            "carrier",
            "peer.node",
            "response_flags",
        ] {
            assert_eq!(seen[0].text(key), seen[1].text(key), "{direction}: {key}");
        }
        assert_eq!((seen[0].text("way"), seen[1].text("way")), ("local", "direct"));
        ensure!(!seen[1].text("rtt").is_empty(), "{:?}", seen[1]);
    }
    let metrics = agent.metrics()?;
    let clients = server.clients().len() as f64;
    // One record for each of the requests that this test made, and nothing twice.
    let total: u64 = agent
        .access_log()
        .iter()
        .filter(|one| one.text("direction") == "outbound")
        .map(|one| one.number("bytes_sent"))
        .sum();
    for reporter in ["source", "destination"] {
        let labels = [("reporter", reporter), ("connection_security_policy", "mutual_tls")];
        assert_eq!(metrics.count("istio_tcp_connections_opened_total", &labels), 1, "one series");
        assert_eq!(metrics.sum("istio_tcp_connections_opened_total", &labels), clients);
        assert_eq!(metrics.sum("istio_tcp_connections_closed_total", &labels), clients);
        assert_eq!(metrics.sum("istio_tcp_received_bytes_total", &labels), total as f64);
        assert_eq!(metrics.sum("istio_tcp_sent_bytes_total", &labels), 2.0 * total as f64);
    }
    Ok(())
}

#[test]
fn open_connection_is_listed_with_its_bytes() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    let mut stream = until_direct(mesh.pod("a1"), mesh.service("a").v4(80), &server)?;
    exchange(&mut stream, &[7; 5000])?;
    let client = stream.local_addr()?.to_string();
    for (direction, workload) in [("outbound", "a1"), ("inbound", "a2")] {
        wait::until(wait::SOON, "the connection to be listed", || {
            let Ok(open) = mesh.agent("a").ask(&["connections"]) else { return false };
            open.as_array().into_iter().flatten().any(|one| {
                one["source"] == *client
                    && one["direction"] == direction
                    && one["workload"] == workload
                    && one["way"] == "direct"
                    && one["bytes_sent"] == 5005
                    && one["bytes_received"] == 5005
            })
        })?;
    }
    let bytes = [("reporter", "source"), ("destination_workload", "a2")];
    mesh.agent("a").wait_for_metric("istio_tcp_sent_bytes_total", &bytes, 5005.0)?;
    let workloads = mesh.agent("a").ask(&["workloads"])?;
    let way = |pod: &str| {
        let mut all = workloads.as_array().into_iter().flatten();
        all.find(|one| one["pod"] == pod).map(|one| one["way"].clone())
    };
    assert_eq!(way("a2"), Some("direct".into()));
    assert_eq!(way("b1"), Some("tunnel".into()));
    Ok(())
}

#[test]
fn callbacks_that_another_program_takes_away_are_made_up_for() -> Result<()> {
    harness::require!();
    const PORT: u16 = 18_011;
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("a2").serve(PORT, Serve::Echo)?;
    let _other = mesh.take_callbacks(PORT)?;
    for family in Family::BOTH {
        let to = mesh.pod("a2").addr(family, PORT);
        let mut stream = until_direct(mesh.pod("a1"), to, &server)?;
        exchange(&mut stream, &[1; 95])?;
        let client = stream.local_addr()?.to_string();
        drop(stream);
        let ended = [("way", "direct"), ("src.addr", client.as_str()), ("direction", "outbound")];
        let record = mesh.agent("a").wait_for_record(&ended)?;
        assert_eq!((record.number("bytes_sent"), record.number("bytes_recv")), (100, 100));
        assert_eq!(record.text("message"), "connection complete");
    }
    Ok(())
}

#[test]
fn as_many_as_the_agent_may_follow_are_direct_and_all_are_counted() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder().flag("--max-connections=96").start()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    let mut held = vec![until_direct(mesh.pod("a1"), mesh.service("a").v4(80), &server)?];
    wait::until(wait::SOON, "the agent to follow no more", || {
        for family in Family::BOTH {
            let asked = connect(mesh.pod("a1"), mesh.service("a").addr(family, 80), &server);
            if let Ok((stream, true)) = asked {
                held.push(stream);
            }
        }
        kernel(&mesh, "direct_full").is_ok_and(|full| full > 0.0)
    })?;
    ensure!(held.len() >= 96, "{}", held.len());
    let mut bytes = 0;
    for (stream, n) in held.iter_mut().zip(1..) {
        exchange(stream, &vec![1; n])?;
        bytes += n + 5;
    }
    let told = || -> Option<Vec<u64>> {
        let open = mesh.agent("a").ask(&["connections"]).ok()?;
        let direct = open.as_array()?.iter().filter(|one| one["way"] == "direct");
        let sent = direct.filter(|one| one["direction"] == "outbound");
        sent.map(|one| one["bytes_sent"].as_u64()).collect()
    };
    let is_all = |told: Vec<u64>| told.iter().sum::<u64>() == bytes as u64;
    wait::until(wait::SOON, "all bytes to be told", || told().is_some_and(is_all))
        .with_context(|| format!("{} of {} bytes: {:?}", held.len(), bytes, told()))?;
    drop(held);
    drop(until_direct(mesh.pod("a1"), mesh.service("a").v4(80), &server)?);
    Ok(())
}

#[test]
fn every_family_is_counted_alike() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    for family in Family::BOTH {
        let mut stream = until_direct(mesh.pod("a1"), mesh.service("a").addr(family, 80), &server)?;
        exchange(&mut stream, &[1; 95])?;
        let client = stream.local_addr()?.to_string();
        drop(stream);
        let ended = [("way", "direct"), ("src.addr", client.as_str()), ("direction", "outbound")];
        let record = mesh.agent("a").wait_for_record(&ended)?;
        assert_eq!((record.number("bytes_sent"), record.number("bytes_recv")), (100, 100));
        assert_eq!(record.text("message"), "connection complete");
    }
    Ok(())
}

/// Both ways at once, and every byte is counted.
#[test]
fn bulk_is_to_the_byte_and_so_is_what_is_told_of_it() -> Result<()> {
    harness::require!();
    let bytes = long::either(20_000_000, 1 << 30);
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("a2").serve(8080, Serve::Exchange(bytes))?;
    for family in Family::BOTH {
        let to = mesh.service("a").addr(family, 80);
        let direct = || {
            let before = server.clients().len();
            let stream = mesh.pod("a1").connect(to).ok()?;
            // It has been accepted when it gets something.
            stream.peek(&mut [0]).ok()?;
            is_direct(&server, before, &stream).ok()?.then_some(stream)
        };
        let stream = wait::until_some(wait::SOON, "a direct connection", direct)?;
        let began = Instant::now();
        exchange_patterns(&stream, bytes, Pattern::CLIENT, Pattern::SERVER)?;
        long::report(&format!("{bytes} bytes both ways: {:?}", began.elapsed()));
        let client = stream.local_addr()?.to_string();
        drop(stream);
        let ended = [("way", "direct"), ("src.addr", client.as_str()), ("direction", "outbound")];
        let record = mesh.agent("a").wait_for_record(&ended)?;
        assert_eq!((record.number("bytes_sent"), record.number("bytes_recv")), (bytes, bytes));
    }
    Ok(())
}

#[test]
fn socket_bound_to_another_address_is_carried() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    let to = mesh.service("a").v4(80);
    let bound_to = |from: Ipv4Addr| -> Result<bool> {
        let before = server.clients().len();
        let mut stream = mesh.pod("a1").run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
            socket.bind(&SocketAddr::from((from, 0)).into())?;
            socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
            Ok(TcpStream::from(socket))
        })?;
        exchange(&mut stream, b"hello")?;
        is_direct(&server, before, &stream)
    };
    until_direct(mesh.pod("a1"), to, &server)?;
    ensure!(bound_to(mesh.pod("a1").v4_ip())?, "its own address is no other");
    ensure!(!bound_to(Ipv4Addr::LOCALHOST)?, "no packet from loopback leaves a pod");
    Ok(())
}

/// A second address of the pod, which its route names as the source of what leaves.
#[test]
fn pod_whose_route_prefers_another_address_is_still_that_pod() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("a2", "a").annotation("malla.dev/mode", "strict"))
        .start()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    let client = mesh.pod("a1");
    let (v4, v6) = (client.v4_ip(), client.ip(Family::V6));
    mesh.node("a")
        .netns()
        .ip(&format!("route add 198.18.0.7/32 via {v4}\nroute add 2001:db8:7::7/128 via {v6}\n"))?;
    client.netns().ip("addr add 198.18.0.7/32 dev eth0\n\
         addr add 2001:db8:7::7/128 dev eth0 nodad\n\
         route replace default via 169.254.1.1 dev eth0 src 198.18.0.7\n\
         route replace default via fe80::1 dev eth0 src 2001:db8:7::7\n")?;
    for (family, from) in [(Family::V4, "198.18.0.7"), (Family::V6, "2001:db8:7::7")] {
        let to = mesh.service("a").addr(family, 80);
        // None of them is refused until then.
        let mut stream = wait::until_some(wait::SOON, "a direct connection", || {
            connect(client, to, &server)
                .map(|(stream, direct)| direct.then_some(stream))
                .transpose()
        })??;
        assert_eq!(stream.local_addr()?.ip().to_string(), from);
        // Nor is it ended by a change that does not touch it.
        let known = mesh.agent("a").log().len();
        mesh.annotate(
            "b1",
            "malla.dev/mode",
            if family == Family::V4 { "strict" } else { "permissive" },
        )?;
        mesh.agent("a").logged_at(known, "new snapshot")?;
        exchange(&mut stream, b"again")?;
        let from = stream.local_addr()?.to_string();
        let ended =
            [("way", "direct"), ("src.addr", from.as_str()), ("message", "connection complete")];
        drop(stream);
        let record = mesh.agent("a").wait_for_record(&ended)?;
        assert_eq!(record.text("src.identity"), client.identity());
    }
    Ok(())
}

#[test]
fn what_the_kernel_could_not_tell_is_counted_and_forgotten() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes()?;
    let server = mesh.pod("a2").serve(8080, Serve::custom(|_closed_at_once| Ok(())))?;
    let to = mesh.service("a").v4(80);
    let ask = |mesh: &Mesh| -> Result<()> {
        mesh.pod("a1").connect(to)?.read_to_end(&mut Vec::new())?;
        Ok(())
    };
    wait::until(wait::SOON, "a direct connection", || {
        ask(&mesh).is_ok() && kernel(&mesh, "direct_taken").is_ok_and(|taken| taken > 0.0)
    })?;
    mesh.agent_mut("a").signal(libc::SIGSTOP)?;
    // Two records each, and room for some 6,500.
    let pod = mesh.pod("a1");
    let asked = pod.run(|| {
        for _ in 0..3600 {
            TcpStream::connect(to)?.read_to_end(&mut Vec::new())?;
        }
        Ok(())
    });
    mesh.agent_mut("a").signal(libc::SIGCONT)?;
    asked?;
    mesh.agent("a").wait_for_metric("mesh_direct_events_lost_total", &[], 100.0)?;
    let lost = mesh.agent("a").metric("mesh_direct_events_lost_total", &[])?;
    assert_eq!(lost, kernel(&mesh, "direct_event_lost")?);
    drop(server);
    // None stays open in the agent's books.
    wait::until(Duration::from_secs(60), "the books to be balanced", || {
        mesh.agent("a").metric("mesh_connections_open", &[]).is_ok_and(|open| open == 0.0)
    })
}
