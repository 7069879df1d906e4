//! Very many connections, and readers that stall.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{
    Carrier, Family, Mesh, Pattern, Serve, exchange, linger_zero, long, receive_pattern, wait,
};

use crate::{carriers, fds, joined, mesh, wait_until_idle};

#[test]
fn readers_that_stall_hold_up_nobody_else() -> Result<()> {
    harness::require!("prlimit");
    let readers = long::either(24, 500);
    all_descriptors()?;
    for carrier in Carrier::BOTH {
        let mesh = mesh(carrier)?;
        let most = most_bytes(carrier, readers);
        stall(&mesh, "a1", readers, most).with_context(|| format!("{carrier:?}"))?;
    }
    // Nothing of it passes an agent, which keeps books only.
    stall(&mesh(Carrier::Lane)?, "b2", readers, 8 << 20).context("direct")
}

fn stall(mesh: &Mesh, client: &str, readers: u64, most: u64) -> Result<()> {
    let (client, server) = (mesh.pod(client), mesh.pod("b1"));
    let _source = server.serve(8080, Serve::Source(1 << 30))?;
    let _echo = server.serve(8081, Serve::Echo)?;
    let direct = || mesh.agent("b").metric("mesh_capture_total", &[("event", "direct_taken")]);
    if client.node() == server.node() {
        // The first one to each address is carried by the agent.
        for family in Family::BOTH {
            let before = direct()?;
            wait::until(wait::SOON, "the direct way", || {
                let to = server.addr(family, 8080);
                let asked = client.connect(to).and_then(|one| linger_zero(&one));
                asked.is_ok() && direct().is_ok_and(|taken| taken > before)
            })?;
        }
    }
    let rss = || anyhow::Ok(mesh.agent("a").rss_bytes()? + mesh.agent("b").rss_bytes()?);
    let before = rss()?;
    let families = Family::BOTH.into_iter().cycle();
    let connect = |(_, family)| client.connect(server.addr(family, 8080));
    let stalled = (0..readers).zip(families).map(connect).collect::<Result<Vec<_>>>()?;
    let (mut last, mut still) = (before, 0);
    // Until every buffer on the way is full, and nothing grows any more: three looks in a row, since on a
    // busy machine a relay may not have had its turn between two of them.
    wait::until(4 * wait::SOON, "the agents to hold what they will", || {
        thread::sleep(Duration::from_millis(500));
        let now = rss().unwrap_or_default();
        still = if now.saturating_sub(last) < 1 << 20 { still + 1 } else { 0 };
        last = now;
        still == 3
    })?;
    let mut over_time = Vec::new();
    for _ in 0..long::either(3, 12) {
        // Both workers, whichever the connection gets to.
        for _ in 0..4 {
            let mut other = client.connect(server.v4(8081))?;
            other.set_read_timeout(Some(Duration::from_secs(5)))?;
            exchange(&mut other, &[7; 100_000]).context("beside readers that stall")?;
        }
        over_time.push(rss()?.saturating_sub(before));
        thread::sleep(long::either(Duration::ZERO, Duration::from_secs(5)));
    }
    let mib: Vec<_> = over_time.iter().map(|bytes| bytes >> 20).collect();
    long::report(&format!("{readers} readers that stall: {} MiB, and {mib:?} more", before >> 20));
    // A QUIC connection's window grows as others need it, up to its bound: at first there may be some growth.
    let [first, .., last] = over_time[over_time.len() / 2..] else { unreachable!("three looks") };
    ensure!(last < most, "grown by {last} bytes");
    ensure!(last.saturating_sub(first) < 4 << 20, "it goes on growing: {over_time:?}");
    drop(stalled);
    Ok(())
}

/// What both agents may hold of flows that nobody reads: of a lane what lies in its relays, beside what
/// the kernel keeps; of a QUIC stream its window, and as much again that is not acknowledged, in pieces
/// that the allocator keeps apart; and of all of them what `--quic-memory-mib` says.
fn most_bytes(carrier: Carrier, readers: u64) -> u64 {
    match carrier {
        Carrier::Quic => (readers * (4 << 20)).min(3 << 29),
        _ => readers << 20,
    }
}

#[test]
fn reader_that_pauses_for_long_gets_every_byte() -> Result<()> {
    harness::require!();
    // More than lies in buffers, and longer than a node may be silent.
    let (bytes, pause) = (64 << 20, Duration::from_secs(20));
    let meshes = Carrier::BOTH.map(mesh);
    thread::scope(|scope| {
        let pausing = meshes.map(|mesh| {
            scope.spawn(move || {
                let mesh = mesh?;
                let _source = mesh.pod("b1").serve(8080, Serve::Source(bytes))?;
                let mut stream = mesh.pod("a1").connect(mesh.pod("b1").v4(8080))?;
                thread::sleep(pause);
                receive_pattern(&mut stream, bytes, Pattern::SERVER)
            })
        });
        let [lane, quic] = pausing.map(joined);
        lane.context("lane")?;
        quic.context("quic")
    })
}

/// Raises the number of descriptors of this process, and of the agents that it starts, as far as it may.
fn all_descriptors() -> Result<usize> {
    let limits = fs::read_to_string("/proc/self/limits")?;
    let line = limits.lines().find(|line| line.starts_with("Max open files"));
    let hard = line.and_then(|line| line.split_whitespace().nth(4)).context("no limit")?;
    let this = std::process::id().to_string();
    let limit = format!("--nofile={hard}:{hard}");
    let raised = Command::new("prlimit").args(["--pid", &this, &limit]).status();
    ensure!(raised.is_ok_and(|status| status.success()), "prlimit");
    Ok(hard.parse()?)
}

#[test]
fn idle_connections_cost_little_and_stay_usable() -> Result<()> {
    harness::require!("prlimit");
    // Each is two descriptors of this process and of each agent. From two pods: one has fewer ports.
    let each: usize = long::either(500, 5_000).min(all_descriptors()?.saturating_sub(1_000) / 4);
    for (carrier, family) in carriers() {
        let mesh = mesh(carrier)?;
        let to = mesh.pod("b1").addr(family, 8080);
        let listener = mesh.pod("b1").listen(8080)?;
        let memory = || anyhow::Ok([mesh.agent("a").rss_bytes()?, mesh.agent("b").rss_bytes()?]);
        let mut pairs = Vec::new();
        let talk = |pairs: &mut Vec<(TcpStream, TcpStream)>| {
            pairs.iter_mut().try_for_each(|(client, server)| {
                client.write_all(b"?")?;
                server.read_exact(&mut [0])?;
                server.write_all(b"!")?;
                client.read_exact(&mut [0])
            })
        };
        let mut before = memory()?;
        for number in 0..2 * each {
            // The first ones are for what is there only once.
            if number == 100 {
                before = memory()?;
            }
            let client = mesh.pod(["a1", "a2"][number % 2]).connect(to)?;
            let (server, _) = listener.accept()?;
            server.set_read_timeout(Some(wait::SOON))?;
            pairs.push((client, server));
        }
        talk(&mut pairs).context("right away")?;
        let after = memory()?;
        let kib =
            |nth: usize| after[nth].saturating_sub(before[nth]) / (2 * each as u64 - 100) / 1024;
        let number = pairs.len();
        long::report(&format!(
            "{carrier:?}: {number} idle ones: {} and {} KiB each",
            kib(0),
            kib(1)
        ));
        ensure!(kib(0) < 32 && kib(1) < 32, "{carrier:?}: {before:?}, then {after:?}");
        // Longer than a lane or a QUIC connection may be silent.
        thread::sleep(long::either(Duration::from_secs(1), Duration::from_secs(70)));
        talk(&mut pairs).context("after a while")?;
        drop(pairs);
        wait_until_idle(&mesh)?;
    }
    Ok(())
}

/// What an agent may keep open for later: idle lanes, of every worker to every peer.
const SPARE: usize = 2 * 2 * 2 * 64;

#[test]
fn crowd_is_served_and_leaves_nothing_behind() -> Result<()> {
    harness::require!();
    const EACH: usize = 1000;
    for (carrier, family) in carriers() {
        let mesh = mesh(carrier)?;
        let _server = mesh.pod("b1").serve(8080, Serve::Greet("x"))?;
        let to = mesh.pod("b1").addr(family, 8080);
        let before = [fds(mesh.agent("a"))?, fds(mesh.agent("b"))?];
        let crowd = |pod: &str| {
            mesh.pod(pod).run(|| {
                let mut open = Vec::new();
                for n in 0..EACH {
                    open.push(TcpStream::connect(to).with_context(|| format!("number {n}"))?);
                }
                for (n, stream) in open.iter_mut().enumerate() {
                    stream.set_read_timeout(Some(wait::SOON))?;
                    stream.read_exact(&mut [0]).with_context(|| format!("number {n}"))?;
                }
                Ok(open)
            })
        };
        // All of them are open before the first ends.
        let open = thread::scope(|scope| {
            let dialling = ["a1", "a2"].map(|pod| scope.spawn(move || crowd(pod)));
            dialling.map(|one| one.join().unwrap()).into_iter().collect::<Result<Vec<_>>>()
        });
        drop(open.with_context(|| format!("{carrier:?}"))?);
        wait_until_idle(&mesh)?;
        for (node, before) in ["a", "b"].into_iter().zip(before) {
            let after = fds(mesh.agent(node))?;
            ensure!(after < before + SPARE, "{carrier:?}: {before} descriptors, then {after}");
        }
    }
    Ok(())
}

#[test]
fn many_short_connections_leave_nothing_behind() -> Result<()> {
    harness::require!();
    const EACH: usize = 600;
    for (carrier, family) in carriers() {
        let mesh = mesh(carrier)?;
        let _servers = ["b1", "a2"].map(|pod| mesh.pod(pod).serve(8080, Serve::Echo).unwrap());
        let agents = ["a", "b"].map(|node| mesh.agent(node));
        let before = agents.map(|agent| fds(agent).unwrap());
        let run = |to: SocketAddr| {
            mesh.pod("a1").run(|| {
                for _ in 0..EACH {
                    let mut stream = TcpStream::connect(to)?;
                    stream.set_read_timeout(Some(wait::SOON))?;
                    exchange(&mut stream, b"x")?;
                }
                Ok(())
            })
        };
        let run = &run;
        thread::scope(|scope| {
            let targets = ["b1", "a2", "b1", "a2"].map(|to| mesh.pod(to).addr(family, 8080));
            let running = targets.map(|to| scope.spawn(move || run(to)));
            running.into_iter().try_for_each(|one| one.join().unwrap())
        })?;
        wait_until_idle(&mesh)?;
        for (agent, before) in agents.into_iter().zip(before) {
            let after = fds(agent)?;
            ensure!(after < before + SPARE, "{carrier:?}: {before} descriptors, then {after}");
            ensure!(agent.metric("mesh_refusals_total", &[])? == 0.0, "{carrier:?}: refused");
        }
    }
    Ok(())
}
