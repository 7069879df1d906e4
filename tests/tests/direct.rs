//! The direct way: pods of one node that the agent has let talk once talk without it.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::{Family, Mesh, Pod, PodSpec, Serve, Server, ServiceSpec, exchange, is_reset, wait};
use socket2::{Domain, Protocol, Socket, Type};

/// Whether the server sees the client's own socket: what the agent delivers comes from another port.
fn is_direct(server: &Server, stream: &TcpStream) -> Result<bool> {
    let local = stream.local_addr()?;
    let local = SocketAddr::new(local.ip().to_canonical(), local.port());
    Ok(server.clients().contains(&local))
}

/// Connects and exchanges a word; says whether that was direct.
fn connect(client: &Pod, to: SocketAddr, server: &Server) -> Result<(TcpStream, bool)> {
    let mut stream = client.connect(to)?;
    exchange(&mut stream, b"hello")?;
    let direct = is_direct(server, &stream)?;
    Ok((stream, direct))
}

/// Connects until the kernel lets a connection through by itself.
fn until_direct(client: &Pod, to: SocketAddr, server: &Server) -> Result<TcpStream> {
    let mut last = None;
    let found =
        wait::until_some(wait::SOON, "a direct connection", || match connect(client, to, server) {
            Ok((stream, true)) => Some(stream),
            Ok((_, false)) => None,
            Err(error) => {
                last = Some(error);
                None
            }
        });
    match (found, last) {
        (Err(error), Some(last)) => Err(error).context(format!("{last:#}")),
        (found, _) => found,
    }
}

fn mapped(addr: SocketAddr) -> Result<SocketAddr> {
    let SocketAddr::V4(v4) = addr else { anyhow::bail!("{addr} is not IPv4") };
    Ok((v4.ip().to_ipv6_mapped(), v4.port()).into())
}

fn kernel(mesh: &Mesh, event: &str) -> Result<f64> {
    mesh.agent("a").metric("mesh_capture_total", &[("event", event)])
}

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
        let mut stream = mesh.pod("a1").connect(mesh.service("a").v4(80))?;
        let client = stream.local_addr()?;
        stream.write_all(&vec![0; sent])?;
        stream.shutdown(std::net::Shutdown::Write)?;
        ensure!(stream.read_to_end(&mut Vec::new())? == 2 * sent);
        Ok((client, sent, is_direct(&server, &stream)?))
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
fn direct_off_at_either_end_is_carried() -> Result<()> {
    harness::require!();
    for off in ["a1", "a2"] {
        let mesh = Mesh::two_nodes_builder()
            .pod(PodSpec::new(off, "a").annotation("malla.dev/direct", "off"))
            .start()?;
        let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
        for _ in 0..10 {
            let (_, direct) = connect(mesh.pod("a1"), mesh.service("a").v4(80), &server)?;
            ensure!(!direct, "{off} is off");
        }
        mesh.annotate(off, "malla.dev/direct", "on")?;
        until_direct(mesh.pod("a1"), mesh.service("a").v4(80), &server)?;
    }
    Ok(())
}

#[test]
fn turning_direct_off_ends_verdicts_and_no_connection() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    let to = mesh.service("a").v4(80);
    let mut open = until_direct(mesh.pod("a1"), to, &server)?;
    for (pod, key, value) in [
        ("a2", "malla.dev/direct", "off"),
        ("a2", "malla.dev/direct", "on"),
        ("a2", "malla.dev/mode", "strict"),
        ("a1", "malla.dev/direct", "off"),
    ] {
        let stale = kernel(&mesh, "direct_stale")?;
        mesh.annotate(pod, key, value)?;
        wait::until(wait::SOON, "the verdict to end", || {
            let asked = connect(mesh.pod("a1"), to, &server);
            asked.is_ok_and(|(_, direct)| !direct || value != "off")
                && kernel(&mesh, "direct_stale").is_ok_and(|now| now > stale)
        })
        .with_context(|| format!("{pod} {key}: {value}"))?;
        exchange(&mut open, b"still here")?;
        if value != "off" {
            drop(until_direct(mesh.pod("a1"), to, &server)?);
        }
    }
    Ok(())
}

#[test]
fn endpoints_come_and_go() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder().pod(PodSpec::new("a3", "a")).start()?;
    let (a2, a3) = (
        mesh.pod("a2").serve(8080, Serve::Greet("a2"))?,
        mesh.pod("a3").serve(8080, Serve::Greet("a3"))?,
    );
    let to = mesh.service("a").v4(80);
    let greeted = || -> Result<String> {
        let mut greeting = [0; 2];
        mesh.pod("a1").connect(to)?.read_exact(&mut greeting)?;
        Ok(String::from_utf8(greeting.into())?)
    };
    let is_taken = |more: f64| {
        wait::until(wait::SOON, "direct connections", || {
            greeted().is_ok() && kernel(&mesh, "direct_taken").is_ok_and(|taken| taken >= more)
        })
    };
    is_taken(3.0)?;
    assert_eq!(a3.clients().len(), 0);

    mesh.endpoints("a", &["a3"])?;
    wait::until(wait::SOON, "the new endpoint", || greeted().is_ok_and(|who| who == "a3"))?;
    let before = a2.clients().len();
    is_taken(kernel(&mesh, "direct_taken")? + 5.0)?;
    assert_eq!(a2.clients().len(), before, "nobody comes to the old one any more");

    mesh.endpoints("a", &["a2", "a3"])?;
    wait::until(wait::SOON, "both", || greeted().is_ok_and(|who| who == "a2"))?;
    let before = [a2.clients().len(), a3.clients().len()];
    for _ in 0..60 {
        greeted()?;
    }
    for (server, before) in [a2, a3].iter().zip(before) {
        ensure!(server.clients().len() - before >= 12, "no balance");
    }
    Ok(())
}

#[test]
fn endpoints_here_and_elsewhere_have_the_same_share() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .service(ServiceSpec::new("all").port(80, 8080).pods(&["a2", "b1", "b2"]))
        .start()?;
    let servers = ["a2", "b1", "b2"].map(|pod| mesh.pod(pod).serve(8080, Serve::Echo));
    let servers = servers.into_iter().collect::<Result<Vec<_>>>()?;
    let to = mesh.service("all").v4(80);
    let ask = || exchange(&mut mesh.pod("a1").connect(to)?, b"hello");
    wait::until(wait::SOON, "a direct connection", || {
        ask().is_ok() && kernel(&mesh, "direct_taken").is_ok_and(|taken| taken > 0.0)
    })?;
    let before: Vec<usize> = servers.iter().map(|server| server.clients().len()).collect();
    let agent_before = kernel(&mesh, "direct_agent")?;
    for _ in 0..300 {
        ask()?;
    }
    let share: Vec<f64> =
        servers.iter().zip(before).map(|(s, n)| (s.clients().len() - n) as f64).collect();
    assert_eq!(share.iter().sum::<f64>(), 300.0);
    // Chi square with two degrees of freedom: one run in 10,000 exceeds 18.4.
    let chi: f64 = share.iter().map(|n| (n - 100.0).powi(2) / 100.0).sum();
    ensure!(chi < 18.4, "{share:?}");
    // What the kernel chose elsewhere, the agent carried there.
    assert_eq!(kernel(&mesh, "direct_agent")? - agent_before, share[1] + share[2]);
    Ok(())
}

#[test]
fn pod_that_takes_over_an_address_inherits_nothing() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    for to in [mesh.service("a").v4(80), mesh.pod("a2").v4(8080)] {
        until_direct(mesh.pod("a1"), to, &server)?;
    }
    let mut open = until_direct(mesh.pod("a1"), mesh.pod("a2").v4(8080), &server)?;
    // The same namespace and address under another UID: all that a successor could have in common.
    let successor = mesh.manifests().dir().join("pod-default-a2.yaml");
    let text = std::fs::read_to_string(&successor)?;
    let uid = mesh.pod("a2").uid();
    ensure!(text.contains(uid), "{text}");
    mesh.manifests().write("pod-default-a2", &text.replace(uid, "5ucce550-0000"))?;
    let replaced = Instant::now();
    ensure!(is_reset(&mut open), "the connection to the pod before is ended");
    let took = replaced.elapsed();
    ensure!(took < Duration::from_secs(2), "ended after {took:?}");
    let denied = [("way", "direct"), ("reason", "denied"), ("response_flags", "DENY")];
    mesh.agent("a").wait_for_record(&denied)?;
    wait::until(wait::SOON, "the server to see it", || {
        server.outcomes().iter().any(Result::is_err)
    })?;
    let slice = std::fs::read_to_string(mesh.manifests().dir().join("service-default-a.yaml"))?;
    mesh.manifests().write("service-default-a", &slice.replace(uid, "5ucce550-0000"))?;
    let stale = kernel(&mesh, "direct_stale")?;
    for to in [mesh.service("a").v4(80), mesh.pod("a2").v4(8080)] {
        let mut first = None;
        wait::until(wait::SOON, "the successor", || {
            let asked = connect(mesh.pod("a1"), to, &server).ok();
            first = asked.map(|(_, direct)| direct);
            first.is_some()
        })?;
        assert_eq!(first, Some(false), "{to}: decided anew");
        until_direct(mesh.pod("a1"), to, &server)?;
    }
    ensure!(kernel(&mesh, "direct_stale")? > stale, "the old verdict did not hold");
    Ok(())
}

#[test]
fn connection_of_a_deleted_pod_is_ended() -> Result<()> {
    harness::require!();
    for gone in ["a1", "a2"] {
        let mesh = Mesh::two_nodes()?;
        let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
        let mut open = until_direct(mesh.pod("a1"), mesh.service("a").v4(80), &server)?;
        mesh.delete_pod_manifest(gone)?;
        let deleted = Instant::now();
        ensure!(is_reset(&mut open), "{gone} is gone and its connection is not");
        ensure!(deleted.elapsed() < Duration::from_secs(2), "{gone}: {:?}", deleted.elapsed());
        mesh.agent("a").wait_for_record(&[("way", "direct"), ("reason", "denied")])?;
    }
    Ok(())
}

#[test]
fn leaving_the_mesh_cuts_nothing() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    let mut open = until_direct(mesh.pod("a1"), mesh.service("a").v4(80), &server)?;
    for pod in ["a1", "a2"] {
        mesh.enrol(pod, false)?;
        exchange(&mut open, b"still here")?;
    }
    Ok(())
}

#[test]
fn listener_that_is_gone_is_as_without_the_direct_way() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("a3", "a"))
        .service(ServiceSpec::new("two").port(80, 8080).pods(&["a2", "a3"]))
        .start()?;
    let a2 = mesh.pod("a2").serve(8080, Serve::Echo)?;
    until_direct(mesh.pod("a1"), mesh.service("a").v4(80), &a2)?;
    let a3 = mesh.pod("a3").serve(8080, Serve::Echo)?;
    for server in [&a2, &a3] {
        until_direct(mesh.pod("a1"), mesh.service("two").v4(80), server)?;
    }
    drop(a2);
    let probed = kernel(&mesh, "direct_no_listener")?;
    // Nobody else: refused, with the agent's reason.
    mesh.pod("a1").refused(mesh.service("a").v4(80))?;
    mesh.agent("a")
        .wait_for_record(&[("direction", "outbound"), ("reason", "connection_refused")])?;
    ensure!(kernel(&mesh, "direct_no_listener")? > probed, "the kernel has not asked");
    // Somebody else: no client notices.
    for _ in 0..30 {
        exchange(&mut mesh.pod("a1").connect(mesh.service("two").v4(80))?, b"hello")?;
    }
    Ok(())
}

#[test]
fn direct_connections_outlive_ten_agents() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes()?;
    let (server, other) =
        (mesh.pod("a2").serve(8080, Serve::Echo)?, mesh.pod("a2").serve(8081, Serve::Echo)?);
    let to = mesh.service("a").v4(80);
    let mut held = until_direct(mesh.pod("a1"), to, &server)?;
    let client = held.local_addr()?.to_string();
    let mut sent = 5;
    for round in 0u8..10 {
        mesh.agent_mut("a").kill()?;
        for _ in 0..3 {
            exchange(&mut held, &[round; 10_000])?;
            sent += 10_000;
            let (_, direct) = connect(mesh.pod("a1"), to, &server)?;
            ensure!(direct, "round {round}: new connections go on without an agent");
        }
        // What was never decided is refused, as ever.
        mesh.pod("a1").refused(mesh.pod("a2").v4(8081))?;
        mesh.agent_mut("a").restart()?;
        let (_, direct) = connect(mesh.pod("a1"), to, &server)?;
        ensure!(direct, "round {round}: the same manifests, the same verdicts");
    }
    drop(other);
    // Every agent found it again, and the last one knows all of it.
    wait::until(wait::SOON, "the connection to be listed", || {
        let Ok(open) = mesh.agent("a").ask(&["connections"]) else { return false };
        open.as_array().into_iter().flatten().any(|one| {
            one["source"] == *client && one["direction"] == "outbound" && one["bytes_sent"] == sent
        })
    })?;
    drop(held);
    let record =
        mesh.agent("a").wait_for_record(&[("direction", "outbound"), ("src.addr", &client)])?;
    assert_eq!((record.number("bytes_sent"), record.number("bytes_recv")), (sent, sent));
    assert_eq!(record.text("response_flags"), "-");
    Ok(())
}

#[test]
fn firewall_between_two_pods_holds() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    let to = mesh.service("a").v4(80);
    until_direct(mesh.pod("a1"), to, &server)?;
    let [from, at]: [Ipv4Addr; 2] = ["a1", "a2"].map(|pod| mesh.pod(pod).v4_ip());
    let rule = format!(
        "add table ip wall; add chain ip wall forward {{ type filter hook forward priority 0; }}; \
         add rule ip wall forward ip saddr {from} ip daddr {at} tcp flags syn reject with tcp reset"
    );
    let nft = mesh
        .node("a")
        .netns()
        .run(|| std::process::Command::new("nft").arg(&rule).output().context("nft"))?;
    ensure!(nft.status.success(), "{}", String::from_utf8_lossy(&nft.stderr));
    let before = server.clients().len();
    mesh.pod("a1").refused(to)?;
    assert_eq!(server.clients().len(), before, "packets go the way that the node's rules see");
    mesh.agent("a").wait_for_record(&[("way", "direct"), ("reason", "connection_refused")])?;
    Ok(())
}

#[test]
fn verdict_that_does_not_fit_is_carried() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder().flag("--max-verdicts=1").start()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    until_direct(mesh.pod("a1"), mesh.service("a").v4(80), &server)?;
    for _ in 0..10 {
        let (_, direct) = connect(mesh.pod("a1"), mesh.pod("a2").v4(8080), &server)?;
        ensure!(!direct, "one verdict has room");
    }
    wait::until(wait::SOON, "the log", || mesh.agent("a").log().contains("--max-verdicts"))?;
    // One that does not hold any more makes room.
    mesh.endpoints("a", &["b1"])?;
    until_direct(mesh.pod("a1"), mesh.pod("a2").v4(8080), &server)?;
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

#[test]
fn socket_bound_to_another_address_is_carried() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    let to = mesh.service("a").v4(80);
    let bound_to = |from: Ipv4Addr| -> Result<bool> {
        let mut stream = mesh.pod("a1").run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
            socket.bind(&SocketAddr::from((from, 0)).into())?;
            socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
            Ok(TcpStream::from(socket))
        })?;
        exchange(&mut stream, b"hello")?;
        is_direct(&server, &stream)
    };
    until_direct(mesh.pod("a1"), to, &server)?;
    ensure!(bound_to(mesh.pod("a1").v4_ip())?, "its own address is no other");
    ensure!(!bound_to(Ipv4Addr::LOCALHOST)?, "no packet from loopback leaves a pod");
    Ok(())
}
