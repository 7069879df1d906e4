//! The direct way and what else happens on its node.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::{Family, Mesh, Pod, PodSpec, Serve, Server, ServiceSpec, exchange, wait};
use socket2::{Domain, Protocol, Socket, Type};

use super::{connect, kernel, nft, until_direct};

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

/// Told to threads when dropped.
#[derive(Default)]
struct Over(Arc<AtomicBool>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
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
    // One of each family talks all the time, also while an agent starts.
    let over = Over::default();
    let mut talks = Vec::new();
    for family in Family::BOTH {
        let to = mesh.service("a").addr(family, 80);
        let (mut talking, is_over) =
            (until_direct(mesh.pod("a1"), to, &server)?, Arc::clone(&over.0));
        talks.push(thread::spawn(move || -> Result<u64> {
            let mut nth = 0_u64;
            while !is_over.load(Ordering::Acquire) {
                nth += 1;
                exchange(&mut talking, &nth.to_be_bytes().repeat(100))?;
                // Other tests run beside this one.
                thread::sleep(Duration::from_millis(2));
            }
            Ok(nth)
        }));
    }
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
    drop(over);
    for talk in talks {
        let times = talk.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        ensure!(times > 100, "hardly ever: {times}");
    }
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
fn direct_connection_passes_from_an_agent_that_ends_to_the_next() -> Result<()> {
    harness::require!();
    for standby in ["on", "off"] {
        let standby = format!("--standby={standby}");
        let mut mesh = Mesh::two_nodes_builder().flag(&standby).flag("--drain-s=1").start()?;
        let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
        let to = mesh.service("a").v4(80);
        let mut held = until_direct(mesh.pod("a1"), to, &server)?;
        exchange(&mut held, &[1; 20_000])?;
        if standby == "--standby=on" {
            // The old one asks how the new one is while that is starting.
            let mut old = mesh.agent_mut("a").start_beside()?;
            wait::until(wait::SOON, "the new one to wait", || {
                mesh.agent("a").log().contains("waiting for it to drain")
            })?;
            old.terminate()?;
            wait::until(wait::SOON, "the old one to end", || {
                exchange(&mut held, &[2; 10]).is_ok() && old.runs().is_ok_and(|runs| !runs)
            })?;
            mesh.agent_mut("a").wait_until_ready()?;
        } else {
            mesh.agent_mut("a").terminate()?;
            exchange(&mut held, &[2; 10])?;
            mesh.agent_mut("a").wait_until_gone(wait::SOON)?;
            exchange(&mut held, &[2; 10])?;
            mesh.agent_mut("a").restart()?;
        }
        exchange(&mut held, &[3; 20_000])?;
        let client = held.local_addr()?.to_string();
        wait::until(wait::SOON, "it to be listed", || {
            let open = mesh.agent("a").ask(&["connections"]).unwrap_or_default();
            let of_it = open.as_array().into_iter().flatten();
            of_it.filter(|one| one["source"] == *client && one["way"] == "direct").count() == 2
        })?;
        let counters = || -> Result<Vec<f64>> {
            let all = ["direct_stale", "direct_agent", "direct_no_listener", "direct_bound"];
            all.iter().map(|event| kernel(&mesh, event)).collect()
        };
        let before = counters()?;
        let (_, direct) = connect(mesh.pod("a1"), to, &server)?;
        ensure!(direct, "{standby}: {before:?} and now {:?}", counters()?);
        drop(held);
        let of_it = [("src.addr", client.as_str()), ("direction", "outbound")];
        let record = mesh.agent("a").wait_for_record(&of_it)?;
        assert_eq!(record.text("message"), "connection complete");
        ensure!(record.number("bytes_sent") > 40_000, "{record:?}");
        let all = mesh.agent("a").access_log();
        assert_eq!(all.iter().filter(|record| record.has(&of_it)).count(), 1, "one record");
    }
    Ok(())
}

#[test]
fn firewall_between_two_pods_holds() -> Result<()> {
    harness::require!("nft");
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    nft(
        &mesh,
        "add table inet wall; \
         add chain inet wall forward { type filter hook forward priority 0; }",
    )?;
    for (family, kind) in Family::BOTH.into_iter().zip(["ip", "ip6"]) {
        let to = mesh.service("a").addr(family, 80);
        until_direct(mesh.pod("a1"), to, &server)?;
        let [from, at] = ["a1", "a2"].map(|pod| mesh.pod(pod).ip(family));
        nft(
            &mesh,
            &format!(
                "add rule inet wall forward {kind} saddr {from} {kind} daddr {at} \
                 tcp flags syn reject with tcp reset"
            ),
        )?;
        let before = server.clients().len();
        mesh.pod("a1").refused(to)?;
        assert_eq!(server.clients().len(), before, "packets go the way that the node's rules see");
        let refused = [
            ("way", "direct"),
            ("reason", "connection_refused"),
            ("dst.orig_addr", &*to.to_string()),
        ];
        mesh.agent("a").wait_for_record(&refused)?;
    }
    Ok(())
}

/// Connects from this port and exchanges a word; the server ends first, so that the port is free again.
fn call(pod: &Pod, port: u16, to: SocketAddr) -> Result<()> {
    let mut stream = pod.run(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
        let family = if to.is_ipv6() { Family::V6 } else { Family::V4 };
        socket.bind(&pod.addr(family, port).into())?;
        socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        Ok(TcpStream::from(socket))
    })?;
    stream.write_all(b"hello")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    ensure!(answer == b"hello", "{answer:?}");
    Ok(())
}

/// The other side of [`call`].
fn answer_once() -> Serve {
    Serve::custom(|mut stream| {
        let mut word = [0; 5];
        stream.read_exact(&mut word)?;
        Ok(stream.write_all(&word)?)
    })
}

/// Ports from which `a1` has connected by its service before the pods were enrolled, so that the node tracks them.
const TRACKED: Range<u16> = 10_000..10_050;

/// A mesh in which `a1` reaches the strict `a2` by the direct way, from [`TRACKED`] with another port than its own.
fn translating() -> Result<(Mesh, Server)> {
    let off = |name| PodSpec::new(name, "a").annotation("malla.dev/mesh", "disabled");
    let mesh = Mesh::two_nodes_builder()
        .pod(off("a1"))
        .pod(off("a2").annotation("malla.dev/mode", "strict"))
        .translated_services()
        .start()?;
    let server = mesh.pod("a2").serve(8080, answer_once())?;
    let (a1, to) = (mesh.pod("a1"), mesh.service("a").v4(80));
    for port in TRACKED {
        call(a1, port, to)?;
    }
    for pod in ["a1", "a2"] {
        mesh.enrol(pod, true)?;
    }
    wait::until(wait::SOON, "the direct way", || {
        call(a1, 0, to).is_ok() && kernel(&mesh, "direct_taken").is_ok_and(|taken| taken > 0.0)
    })?;
    Ok((mesh, server))
}

#[test]
fn source_port_that_the_node_translates_is_let_in_all_the_same() -> Result<()> {
    harness::require!("nft");
    let (mesh, server) = translating()?;
    let (a1, to) = (mesh.pod("a1"), mesh.service("a").v4(80));
    let (before, refused) = (kernel(&mesh, "direct_taken")?, kernel(&mesh, "lookup_strict")?);
    let seen = server.clients().len();
    for port in TRACKED {
        call(a1, port, to).with_context(|| format!("from port {port}"))?;
    }
    assert!(kernel(&mesh, "direct_taken")? >= before + 50.0);
    assert_eq!(kernel(&mesh, "lookup_strict")?, refused, "plain text to a strict pod");
    let others = server.clients().split_off(seen).into_iter().map(|client| client.port());
    let changed = others.filter(|port| !TRACKED.contains(port)).count();
    ensure!(changed > 0, "the node changed no port");
    #[expect(clippy::cast_precision_loss, reason = "at most fifty")]
    let changed = changed as f64;
    assert_eq!(kernel(&mesh, "lookup_translated")?, changed);
    Ok(())
}

/// By then what its first SYN was admitted by has ended.
#[test]
fn syn_that_is_sent_again_is_let_in_from_the_port_that_the_node_gives_it() -> Result<()> {
    harness::require!("nft");
    let (mesh, _server) = translating()?;
    let (a1, to) = (mesh.pod("a1"), mesh.service("a").v4(80));
    let [from, at] = ["a1", "a2"].map(|pod| mesh.pod(pod).ip(Family::V4));
    nft(
        &mesh,
        &format!(
            "add table inet wall; \
             add chain inet wall forward {{ type filter hook forward priority 0; }}; \
             add rule inet wall forward ip saddr {from} ip daddr {at} tcp flags syn counter drop"
        ),
    )?;
    let dropped = || -> Result<usize> {
        let rules = nft(&mesh, "list table inet wall")?;
        let (_, packets) = rules.split_once("packets ").context("no counter")?;
        Ok(packets.split(' ').next().unwrap_or_default().parse()?)
    };
    let translated = kernel(&mesh, "lookup_translated")?;
    thread::scope(|scope| {
        let calls = TRACKED.take(8).map(|port| scope.spawn(move || (port, call(a1, port, to))));
        let calls: Vec<_> = calls.collect();
        // The second time after one second, and the third one or two seconds later.
        wait::until(wait::SOON, "SYNs that are sent again", || dropped().is_ok_and(|n| n >= 16))?;
        nft(&mesh, "delete table inet wall")?;
        calls.into_iter().try_for_each(|call| {
            let (port, done) = call.join().unwrap_or_else(|panic| resume_unwind(panic));
            done.with_context(|| format!("from port {port}"))
        })
    })?;
    ensure!(kernel(&mesh, "lookup_translated")? > translated, "the node changed no port");
    Ok(())
}

/// What lets changed source ports in is about a pod: whoever has its address next is a stranger.
#[test]
fn pod_that_leaves_is_let_in_no_longer_whatever_port_it_comes_from() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("a2", "a").annotation("malla.dev/mode", "strict"))
        .pod(PodSpec::new("b1", "b").annotation("malla.dev/mode", "strict"))
        .start()?;
    let near = mesh.pod("a2").serve(8080, answer_once())?;
    let other = mesh.pod("b1").serve(8080, answer_once())?;
    // Agents deliver from ports of their own choice.
    let last_port = |server: &Server| -> Result<u16> {
        Ok(server.clients().last().context("nobody came")?.port())
    };
    let a1 = mesh.pod("a1");
    let strict = [("event", "lookup_strict")];
    let refused_there = || mesh.agent("b").metric("mesh_capture_total", &strict);
    // Where the change takes longer than that second, on a busy machine, nothing is shown.
    let tried = |family: Family, port: u16| -> Result<bool> {
        let [to, far] = ["a2", "b1"].map(|pod| mesh.pod(pod).addr(family, 8080));
        mesh.enrol("a1", true)?;
        call(a1, 0, to)?; // Delivered by the agent, the first time.
        let delivered = last_port(&near)?;
        let taken = kernel(&mesh, "direct_taken")?;
        wait::until(wait::SOON, "the direct way", || {
            call(a1, 0, to).is_ok() && kernel(&mesh, "direct_taken").is_ok_and(|now| now > taken)
        })?;
        let before = refused_there()?;
        let began = Instant::now();
        call(a1, 0, far)?;
        let delivered_there = last_port(&other)?;
        call(a1, port, to)?;
        mesh.enrol("a1", false)?;
        let refused = kernel(&mesh, "lookup_strict")?;
        let is_in_time = began.elapsed() < Duration::from_millis(900);
        // All within the second in which the last ACK of the handshake from there would pass. At once: a
        // server that ended a connection from there takes its time (TIME_WAIT) to refuse another.
        let there = (delivered_there, far);
        let calls = [there, (delivered, to), (port, to), (0, to), (0, to), (0, to)];
        thread::scope(|scope| {
            let calls = calls.map(|(port, to)| scope.spawn(move || (call(a1, port, to), port, to)));
            calls.into_iter().try_for_each(|call| {
                let (done, port, to) = call.join().unwrap_or_else(|panic| resume_unwind(panic));
                ensure!(done.is_err(), "plain text to a strict pod, {to} from {port}");
                Ok(())
            })
        })?;
        ensure!(kernel(&mesh, "lookup_strict")? >= refused + 5.0, "refused by somebody else");
        ensure!(refused_there()? >= before + 1.0, "refused by somebody else");
        Ok(is_in_time)
    };
    for family in Family::BOTH {
        let mut ports = 20_000..20_020;
        while !tried(family, ports.next().context("never in time")?)? {}
    }
    Ok(())
}
