//! Balance: which endpoint of a service takes a connection, by each of the policies.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use harness::{Carrier, Family, Mesh, Serve, ServiceSpec, exchange, linger_zero, wait};

/// Three endpoints, one of them on the client's own node.
const PODS: [&str; 3] = ["a2", "b1", "b2"];

fn mesh(policy: &str) -> Result<Mesh> {
    Mesh::two_nodes_builder()
        .service(ServiceSpec::new("all").port(80, 8080).pods(&PODS))
        .flag(&format!("--balance={policy}"))
        .start()
}

/// Who greeted, connection by connection, each ended before the next.
fn greeted(mesh: &Mesh, family: Family, times: usize) -> Result<Vec<String>> {
    let ask = |_| {
        let mut stream = mesh.pod("a1").connect(mesh.service("all").addr(family, 80))?;
        let mut name = [0; 2];
        stream.read_exact(&mut name)?;
        exchange(&mut stream, b"thanks")?;
        Ok(String::from_utf8(name.into())?)
    };
    (0..times).map(ask).collect()
}

#[test]
fn round_robin_takes_turns() -> Result<()> {
    harness::require!();
    let mesh = mesh("round-robin")?;
    let _servers = PODS.map(|pod| mesh.pod(pod).serve(8080, Serve::Greet(pod)).unwrap());
    for family in Family::BOTH {
        let who = greeted(&mesh, family, 12)?;
        for round in who.chunks(PODS.len()) {
            let different: BTreeSet<_> = round.iter().collect();
            ensure!(different.len() == PODS.len(), "{family:?}: {who:?}");
        }
    }
    Ok(())
}

#[test]
fn random_reaches_all_and_takes_no_turns() -> Result<()> {
    harness::require!();
    let mesh = mesh("random")?;
    let _servers = PODS.map(|pod| mesh.pod(pod).serve(8080, Serve::Greet(pod)).unwrap());
    let who = greeted(&mesh, Family::V4, 60)?;
    for pod in PODS {
        // Less than 6 of 60 come about once in 10,000 times.
        let times = who.iter().filter(|name| *name == pod).count();
        ensure!(times >= 6, "{pod} greeted {times} times: {who:?}");
    }
    // Without a repetition in 60: once in 10^10 times.
    ensure!(who.windows(2).any(|two| two[0] == two[1]), "these are turns: {who:?}");
    Ok(())
}

/// How long an endpoint that has failed once is tried last.
const AVOIDED: Duration = Duration::from_secs(2);

/// How often what depends on being quick is tried.
const ATTEMPTS: usize = 5;

/// Gives up a connection that waits for its endpoint; returns whether what came next was in time to tell whom
/// the agent blames.
fn is_told_of_who_gave_up(mesh: &mut Mesh, carrier: Carrier) -> Result<bool> {
    mesh.agent_mut("b").signal(libc::SIGSTOP)?;
    let stream = mesh.pod("a1").connect(mesh.service("all").v4(80))?;
    let client = stream.local_addr()?.to_string();
    wait::until(wait::SOON, "the connection to be opened", || {
        let open = mesh.agent("a").ask(&["connections"]).unwrap_or_default();
        open.as_array().into_iter().flatten().any(|one| one["source"] == *client)
    })?;
    let gave_up = Instant::now();
    linger_zero(&stream)?;
    drop(stream);
    mesh.agent("a")
        .wait_for_record(&[("reason", "application_reset"), ("src.addr", client.as_str())])?;
    mesh.agent_mut("b").signal(libc::SIGCONT)?;
    let who = greeted(mesh, Family::V4, 2)?;
    if gave_up.elapsed() >= AVOIDED {
        return Ok(false);
    }
    ensure!(who[0] != who[1], "{carrier:?}: {who:?}");
    Ok(true)
}

#[test]
fn application_that_gives_up_does_not_blame_the_endpoint() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mut mesh = Mesh::two_nodes_builder()
            .service(ServiceSpec::new("all").port(80, 8080).pods(&["b1", "b2"]))
            .carrier(carrier)
            .flag("--balance=round-robin")
            .start()?;
        let _servers = ["b1", "b2"].map(|pod| mesh.pod(pod).serve(8080, Serve::Greet(pod)));
        // So that there are carriers, and nobody is new.
        greeted(&mesh, Family::V4, 4)?;
        // On a busy machine it may take so long that nothing is told.
        let told = (0..ATTEMPTS).try_fold(false, |told, _| match told {
            true => Ok(true),
            false => is_told_of_who_gave_up(&mut mesh, carrier),
        })?;
        ensure!(told, "too slow to tell, {ATTEMPTS} times");
    }
    Ok(())
}
