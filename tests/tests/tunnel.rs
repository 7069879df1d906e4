//! Tunnel: bytes, ends and errors cross both carriers as they cross plain TCP.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Shutdown, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::{
    Carrier, Family, Mesh, Pattern, Serve, exchange, exchange_patterns, fill, is_reset,
    linger_zero, long, receive_pattern, send_pattern,
};
use socket2::SockRef;

/// Both directions at once, so twice this crosses the link.
fn bulk_bytes() -> u64 {
    long::either(100 << 20, 1 << 30)
}

fn mesh(carrier: Carrier) -> Result<Mesh> {
    Mesh::two_nodes_builder().carrier(carrier).start()
}

fn bulk(carrier: Carrier, family: Family) -> Result<()> {
    let (mesh, bytes) = (mesh(carrier)?, bulk_bytes());
    let server = mesh.pod("b1").serve(8080, Serve::Exchange(bytes))?;
    let stream = mesh.pod("a1").connect(mesh.service("b").addr(family, 80))?;
    exchange_patterns(&stream, bytes, Pattern::CLIENT, Pattern::SERVER)?;
    harness::wait::until(harness::wait::SOON, "the server to have seen it all", || {
        server.outcomes() == [Ok(())]
    })?;

    let (a1, b1) = (mesh.pod("a1").identity(), mesh.pod("b1").identity());
    for (agent, direction, peer) in [("a", "outbound", "b"), ("b", "inbound", "a")] {
        let record = mesh.agent(agent).wait_for_record(&[
            ("direction", direction),
            ("carrier", carrier.as_str()),
            ("way", "tunnel"),
            ("peer.node", peer),
            ("src.identity", &a1),
            ("dst.identity", &b1),
            ("response_flags", "-"),
        ])?;
        assert_eq!((record.number("bytes_sent"), record.number("bytes_recv")), (bytes, bytes));
    }
    Ok(())
}

/// As a receiver of plain TCP gets it that reads everything in its order (`SO_OOBINLINE`).
#[test]
fn urgent_byte_stays_where_it_is_in_the_stream() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mesh = mesh(carrier)?;
        let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
        let mut stream = mesh.pod("a1").connect(mesh.service("b").v4(80))?;
        stream.write_all(b"one ")?;
        SockRef::from(&stream).send_out_of_band(b"urgent ")?;
        stream.write_all(b"two")?;
        stream.shutdown(Shutdown::Write)?;
        let mut back = String::new();
        stream.read_to_string(&mut back)?;
        assert_eq!(back, "one urgent two", "{carrier:?}");
    }
    Ok(())
}

#[test]
fn lane_carries_bulk_both_ways_at_once_v4() -> Result<()> {
    harness::require!();
    bulk(Carrier::Lane, Family::V4)
}

#[test]
fn lane_carries_bulk_both_ways_at_once_v6() -> Result<()> {
    harness::require!();
    bulk(Carrier::Lane, Family::V6)
}

#[test]
fn quic_carries_bulk_both_ways_at_once_v4() -> Result<()> {
    harness::require!();
    bulk(Carrier::Quic, Family::V4)
}

#[test]
fn quic_carries_bulk_both_ways_at_once_v6() -> Result<()> {
    harness::require!();
    bulk(Carrier::Quic, Family::V6)
}

/// What a cluster of one family has, or one whose Nodes name addresses of one.
#[test]
fn nodes_of_one_family_carry_connections_of_both() -> Result<()> {
    harness::require!();
    for (family, carrier) in Family::BOTH.into_iter().flat_map(|f| Carrier::BOTH.map(|c| (f, c))) {
        let mesh = Mesh::two_nodes_builder().node_family(family).carrier(carrier).start()?;
        let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
        for of in Family::BOTH {
            for to in [mesh.service("b").addr(of, 80), mesh.pod("b1").addr(of, 8080)] {
                let done =
                    mesh.pod("a1").connect(to).and_then(|mut it| exchange(&mut it, b"hello"));
                done.with_context(|| format!("{to} by {carrier:?}, nodes have {family:?} alone"))?;
            }
        }
        let peer = mesh.node("b");
        let other: IpAddr = if family == Family::V4 { peer.v6().into() } else { peer.v4().into() };
        let reached = mesh
            .node("a")
            .netns()
            .run(|| Ok(TcpStream::connect_timeout(&(other, 9).into(), Duration::from_secs(1))))?;
        let told = reached.map_err(|error| error.kind());
        assert_eq!(told.err(), Some(io::ErrorKind::NetworkUnreachable), "by {other}");
    }
    Ok(())
}

#[test]
fn server_may_speak_first() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mesh = mesh(carrier)?;
        let _server = mesh.pod("b1").serve(8080, Serve::Greet("220 ready\r\n"))?;
        for family in Family::BOTH {
            let mut stream = mesh.pod("a1").connect(mesh.service("b").addr(family, 80))?;
            let mut greeting = [0; 11];
            stream.read_exact(&mut greeting)?;
            assert_eq!(&greeting, b"220 ready\r\n");
            exchange(&mut stream, b"HELO")?;
        }
    }
    Ok(())
}

#[test]
fn client_that_ends_sending_still_gets_its_answer() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mesh = mesh(carrier)?;
        let _server = mesh.pod("b1").serve(8080, Serve::Count)?;
        for family in Family::BOTH {
            let mut stream = mesh.pod("a1").connect(mesh.service("b").addr(family, 80))?;
            send_pattern(&mut stream, 1_000_000, Pattern::CLIENT)?;
            stream.shutdown(Shutdown::Write)?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            assert_eq!(answer, "1000000", "{carrier:?} {family:?}");
        }
    }
    Ok(())
}

#[test]
fn server_that_ends_sending_still_gets_the_rest() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mesh = mesh(carrier)?;
        let (counted, count) = mpsc::channel();
        let _server = mesh.pod("b1").serve(
            8080,
            Serve::custom(move |mut stream| {
                stream.write_all(b"bye")?;
                stream.shutdown(Shutdown::Write)?;
                counted.send(io::copy(&mut stream, &mut io::sink())?)?;
                Ok(())
            }),
        )?;
        for family in Family::BOTH {
            let mut stream = mesh.pod("a1").connect(mesh.service("b").addr(family, 80))?;
            let mut heard = String::new();
            stream.read_to_string(&mut heard)?;
            assert_eq!(heard, "bye");
            send_pattern(&mut stream, 1_000_000, Pattern::CLIENT)?;
            drop(stream);
            let counted = count.recv_timeout(harness::wait::SOON)?;
            assert_eq!(counted, 1_000_000, "{carrier:?} {family:?}");
        }
    }
    Ok(())
}

#[test]
fn reset_by_the_server_reaches_the_client() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mesh = mesh(carrier)?;
        let _server = mesh.pod("b1").serve(8080, Serve::ResetAfter(4))?;
        for family in Family::BOTH {
            let mut stream = mesh.pod("a1").connect(mesh.service("b").addr(family, 80))?;
            stream.write_all(b"over")?;
            let reset = is_reset(&mut stream);
            assert!(reset, "{carrier:?} {family:?}: a reset must not look like an end");
        }
    }
    Ok(())
}

#[test]
fn reset_by_the_client_reaches_the_server() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mesh = mesh(carrier)?;
        let (ended, end) = mpsc::channel();
        let _server = mesh.pod("b1").serve(
            8080,
            Serve::custom(move |mut stream| {
                stream.read_exact(&mut [0; 4])?;
                stream.write_all(b"here")?;
                ended.send(is_reset(&mut stream))?;
                Ok(())
            }),
        )?;
        for family in Family::BOTH {
            let mut stream = mesh.pod("a1").connect(mesh.service("b").addr(family, 80))?;
            stream.write_all(b"over")?;
            stream.read_exact(&mut [0; 4])?;
            linger_zero(&stream)?;
            drop(stream);
            assert!(end.recv_timeout(harness::wait::SOON)?, "{carrier:?} {family:?}");
        }
    }
    Ok(())
}

#[test]
fn close_with_data_in_flight_loses_none_of_it() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mesh = mesh(carrier)?;
        let bytes = 8 << 20;
        let _server = mesh.pod("b1").serve(8080, Serve::Source(bytes))?;
        for family in Family::BOTH {
            let stream = mesh.pod("a1").connect(mesh.service("b").addr(family, 80))?;
            // The server has closed long before the last byte is read.
            receive_pattern(&mut &stream, bytes, Pattern::SERVER)?;
        }
    }
    Ok(())
}

#[test]
fn client_that_goes_without_reading_is_an_error_to_the_server() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mesh = mesh(carrier)?;
        let server = mesh.pod("b1").serve(8080, Serve::Source(1 << 30))?;
        let mut stream = mesh.pod("a1").connect(mesh.service("b").v4(80))?;
        stream.read_exact(&mut [0; 1])?;
        drop(stream);
        harness::wait::until(harness::wait::SOON, "the server to fail", || {
            server.outcomes().iter().any(Result::is_err)
        })?;
    }
    Ok(())
}

#[test]
fn reader_that_stalls_holds_a_bounded_number_of_bytes() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mesh = mesh(carrier)?;
        let (release, released) = mpsc::channel::<()>();
        let released = std::sync::Mutex::new(released);
        let _server = mesh.pod("b1").serve(
            8080,
            Serve::custom(move |_stream| {
                released.lock().unwrap().recv().ok();
                Ok(())
            }),
        )?;
        let before = mesh.agent("a").rss_bytes()? + mesh.agent("b").rss_bytes()?;
        let mut stream = mesh.pod("a1").connect(mesh.service("b").v4(80))?;
        let sent = fill(&mut stream, 256 << 20)?;
        let after = mesh.agent("a").rss_bytes()? + mesh.agent("b").rss_bytes()?;
        ensure!(sent < 64 << 20, "{carrier:?}: {sent} bytes went to nobody");
        let grown = after.saturating_sub(before);
        ensure!(grown < 24 << 20, "{carrier:?}: the agents grew by {grown} bytes");
        release.send(()).ok();
    }
    Ok(())
}

#[test]
fn peer_that_does_not_answer_fails_all_who_wait_together() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes_builder().flag("--connect-timeout-s=2").start()?;
    mesh.agent_mut("b").signal(libc::SIGSTOP)?;
    let (mesh, to) = (&mesh, mesh.service("b").v4(80));
    let started = Instant::now();
    thread::scope(|scope| {
        let waiting: Vec<_> =
            (0..6).map(|_| scope.spawn(move || mesh.pod("a1").refused(to))).collect();
        waiting.into_iter().try_for_each(|one| one.join().unwrap().map(drop))
    })?;
    let took = started.elapsed();
    ensure!(took < Duration::from_secs(8), "six connections took {took:?}, one after another?");
    mesh.agent("a").wait_for_record(&[("stage", "tunnel"), ("reason", "connect_timeout")])?;
    Ok(())
}

#[test]
fn payload_cannot_be_read_on_the_link() -> Result<()> {
    harness::require!("tcpdump");
    const MARKER: &[u8] = b"the-marker-that-must-not-be-read";
    /// Where nobody listens (RFC 863).
    const DISCARD: u16 = 9;
    const LAST: &[u8] = b"what-is-on-the-link-after-all-else";
    let seen = |mesh: &Mesh| -> Result<bool> {
        let file = mesh.state_dir().join("link.pcap");
        let mut tcpdump = Command::new("tcpdump");
        // As root it would become another user, who may not write here.
        tcpdump.args(["-U", "-n", "-Z", "root", "-i", &mesh.node("a").link_to(1), "-w"]).arg(&file);
        let mut capturing =
            mesh.node("a").netns().spawn(tcpdump.stderr(std::process::Stdio::null()))?;
        let length = || fs::metadata(&file).map_or(0, |file| file.len());
        // The header of the file comes when the capture has begun.
        harness::wait::until(harness::wait::SOON, "tcpdump", || length() >= 24)?;
        let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
        let mut stream = mesh.pod("a1").connect(mesh.service("b").v4(80))?;
        for _ in 0..8 {
            exchange(&mut stream, MARKER)?;
        }
        // Packets are read in their order: with this one all that was before it is in the file.
        let last = mesh.node("b").v4();
        mesh.node("a").netns().run(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            Ok(socket.send_to(LAST, (last, DISCARD))?)
        })?;
        let has = |marker: &[u8]| -> Result<bool> {
            Ok(fs::read(&file)?.windows(marker.len()).any(|bytes| bytes == marker))
        };
        harness::wait::until(harness::wait::SOON, "the last packet in the capture", || {
            has(LAST).unwrap_or(false)
        })?;
        capturing.kill()?;
        capturing.wait()?;
        has(MARKER)
    };
    // Without the mesh the capture shows it: so it would show it with the mesh, too.
    assert!(seen(&Mesh::two_nodes_builder().plain().start()?)?);
    for carrier in Carrier::BOTH {
        assert!(!seen(&mesh(carrier)?)?, "{carrier:?}");
    }
    Ok(())
}

#[test]
fn carrier_that_does_not_pass_is_replaced_by_the_other() -> Result<()> {
    harness::require!("nft");
    let mesh = Mesh::two_nodes_builder().flag("--connect-timeout-s=2").start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    // TCP to the tunnel port is dropped on the way, as by a firewall that nobody remembers.
    let rules = "add table inet block { chain in { type filter hook input priority 0; tcp dport 15019 drop; }; }";
    mesh.node("b").netns().run(|| {
        let status = Command::new("nft").arg(rules).status()?;
        ensure!(status.success(), "nft: {status}");
        Ok(())
    })?;
    let mut stream = mesh.pod("a1").connect(mesh.service("b").v4(80))?;
    exchange(&mut stream, b"by the other way")?;
    drop(stream);
    mesh.agent("a").wait_for_record(&[("carrier", "quic"), ("response_flags", "-")])?;
    // And says so, in all the places where one would look.
    let agent = mesh.agent("a");
    let log = agent.log();
    let said = log.lines().find(|line| line.contains("carrier does not pass"));
    let said = said.with_context(|| format!("the agent must say so:\n{log}"))?;
    ensure!(said.contains("tried=lane") && said.contains("using=quic"), "{said}");
    agent.wait_for_metric("mesh_tunnel_events_total", &[("event", "fallback")], 1.0)?;
    assert_eq!(agent.ask(&["status"])?["carriers"]["b"], "quic");
    Ok(())
}

#[test]
fn agent_that_was_killed_and_started_again_is_reached_by_quic_at_once() -> Result<()> {
    harness::require!();
    let mut mesh = mesh(Carrier::Quic)?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.pod("b1").v4(8080);
    exchange(&mut mesh.pod("a1").connect(to)?, b"before")?;
    mesh.agent_mut("b").kill()?;
    let killed = Instant::now();
    mesh.agent_mut("b").restart()?;
    // Since then nothing can have come from the one that was killed.
    harness::wait::until(harness::wait::SOON, "silence", || {
        killed.elapsed() > Duration::from_secs(2)
    })?;
    let asked = Instant::now();
    exchange(&mut mesh.pod("a1").connect(to)?, b"after")?;
    let took = asked.elapsed();
    ensure!(took < Duration::from_secs(1), "it took {took:?}");
    Ok(())
}
