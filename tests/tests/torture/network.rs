//! Links between the nodes that lose, delay, shorten and swallow packets.

use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use fastrand::Rng;
use harness::{
    Carrier, Family, Fate, Hop, Mesh, Pattern, Serve, exchange, exchange_patterns, long,
};

use crate::{carriers, is_honest, joined};

/// Bulk in both directions at once and small exchanges beside it, all of them to the byte.
fn all_is_well(mesh: &Mesh, family: Family, bytes: u64, small: usize) -> Result<()> {
    let _bulk = mesh.pod("b1").serve(8080, Serve::Exchange(bytes))?;
    let _echo = mesh.pod("b2").serve(8080, Serve::Echo)?;
    let began = Instant::now();
    thread::scope(|scope| {
        let bulk = scope.spawn(|| {
            let stream = mesh.pod("a1").connect(mesh.pod("b1").addr(family, 8080))?;
            exchange_patterns(&stream, bytes, Pattern::CLIENT, Pattern::SERVER).context("bulk")
        });
        for size in (0..small).map(|nth| 1 + nth * 977 % 20_000) {
            let mut stream = mesh.pod("a2").connect(mesh.pod("b2").addr(family, 8080))?;
            exchange(&mut stream, &vec![7; size]).with_context(|| format!("{size} bytes"))?;
        }
        joined(bulk)
    })?;
    long::report(&format!("{bytes} bytes both ways and {small} times few: {:?}", began.elapsed()));
    Ok(())
}

#[test]
fn packets_of_any_size_carry_the_mesh() -> Result<()> {
    harness::require!();
    for mtu in [1280, 9000] {
        for (carrier, family) in carriers() {
            let mesh = Mesh::two_nodes_builder().carrier(carrier).mtu(mtu).start()?;
            all_is_well(&mesh, family, long::either(20_000_000, 1 << 30), 20)
                .with_context(|| format!("{carrier:?} with {mtu} bytes"))?;
        }
    }
    Ok(())
}

/// One packet in a hundred is lost, and one in twenty comes after those that were sent behind it.
fn lossy(seed: u64) -> impl FnMut(&[u8]) -> Fate + Send + use<> {
    let mut rng = Rng::with_seed(seed);
    move |_packet| match rng.u32(..100) {
        0 => Fate::Lose,
        1..=5 => Fate::Keep(Duration::from_micros(rng.u64(500..5_000))),
        _ => Fate::Pass,
    }
}

#[test]
fn packets_that_are_lost_and_late_change_no_byte() -> Result<()> {
    harness::require!("nft");
    let seed = long::seed();
    for (carrier, family) in carriers() {
        let mesh = Mesh::two_nodes_builder().carrier(carrier).start()?;
        let hops = [
            Hop::behind(mesh.node("a"), 1, lossy(seed))?,
            Hop::behind(mesh.node("b"), 0, lossy(!seed))?,
        ];
        all_is_well(&mesh, family, long::either(3_000_000, 300_000_000), long::either(30, 3_000))
            .with_context(|| format!("{carrier:?}"))?;
        for hop in &hops {
            let [passed, lost, late] = hop.judged();
            ensure!(lost > 0 && late > 0, "{carrier:?}: {passed} passed, {lost} lost, {late} late");
        }
    }
    Ok(())
}

/// Packets that the link's own size allows, and that vanish all the same: a tunnel on the way, and a
/// firewall that drops what ICMP would say.
fn swallow(packet: &[u8]) -> Fate {
    if packet.len() > 1_300 { Fate::Lose } else { Fate::Pass }
}

fn swallowing(carrier: Carrier) -> Result<(Mesh, [Hop; 2])> {
    // A handshake is larger than a packet of this path, and the kernel finds that out by one to three of
    // its retransmission time-outs: with the default of 5 s one handshake was given up.
    let builder = Mesh::two_nodes_builder().carrier(carrier).flag("--connect-timeout-s=15");
    let mesh = builder.start()?;
    let hops = [Hop::behind(mesh.node("a"), 1, swallow)?, Hop::behind(mesh.node("b"), 0, swallow)?];
    Ok((mesh, hops))
}

#[test]
fn quic_finds_out_what_a_path_swallows() -> Result<()> {
    harness::require!("nft");
    let (mesh, hops) = swallowing(Carrier::Quic)?;
    all_is_well(&mesh, Family::V4, long::either(5_000_000, 300_000_000), 20)?;
    ensure!(hops.iter().any(|hop| hop.judged()[1] > 0), "nothing was swallowed");
    Ok(())
}

#[test]
fn lane_on_a_path_that_swallows_is_what_the_kernel_makes_of_it() -> Result<()> {
    harness::require!("nft");
    let (mesh, hops) = swallowing(Carrier::Lane)?;
    for node in ["a", "b"] {
        // From small packets on: 1 begins with large ones, and finds out after seconds, for each lane.
        mesh.node(node).sysctl("net/ipv4/tcp_mtu_probing", "2")?;
    }
    all_is_well(&mesh, Family::V4, long::either(500_000, 300_000_000), 3)
        .context("with tcp_mtu_probing")?;
    if !long::is_long() {
        return Ok(());
    }
    drop((hops, mesh));
    // Without it plain TCP waits for a quarter of an hour. The agent gives up, and says so. Another mesh: lanes that
    // have found out keep what they know.
    let (mesh, _hops) = swallowing(Carrier::Lane)?;
    for node in ["a", "b"] {
        mesh.node(node).sysctl("net/ipv4/tcp_mtu_probing", "0")?;
    }
    let _bulk = mesh.pod("b1").serve(8081, Serve::Exchange(1_000_000))?;
    let began = Instant::now();
    let ask =
        |stream: TcpStream| exchange_patterns(&stream, 1_000_000, Pattern::CLIENT, Pattern::SERVER);
    let ended = mesh.pod("a1").connect(mesh.pod("b1").v4(8081)).and_then(ask);
    let (ended, took) = (ended.err().context("it went through")?, began.elapsed());
    long::report(&format!("without tcp_mtu_probing: {ended:#} after {took:?}"));
    ensure!(is_honest(&ended) && took < Duration::from_secs(25), "{ended:#} after {took:?}");
    Ok(())
}
