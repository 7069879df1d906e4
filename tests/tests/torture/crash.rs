//! Agents that sleep and run dry, and a link that is cut.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::{Carrier, Family, Mesh, Serve, ServiceSpec, exchange, long, wait};

use crate::kill::{answer, ask};
use crate::{carriers, fds, is_honest, joined, mesh, wait_until_idle};

#[test]
fn peer_that_slept_is_used_again() -> Result<()> {
    harness::require!();
    for (carrier, family) in carriers() {
        let mut mesh =
            Mesh::two_nodes_builder().carrier(carrier).flag("--connect-timeout-s=1").start()?;
        let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
        let to = mesh.service("b").addr(family, 80);
        let mut held = mesh.pod("a1").connect(to)?;
        exchange(&mut held, b"before")?;
        mesh.agent_mut("b").signal(libc::SIGSTOP)?;
        let took: Vec<_> = thread::scope(|scope| {
            let all: Vec<_> = (0..20).map(|_| scope.spawn(|| mesh.pod("a1").refused(to))).collect();
            all.into_iter().map(|one| one.join().unwrap()).collect::<Result<_>>()
        })?;
        let slowest = took.iter().max().context("nobody asked")?;
        ensure!(*slowest < Duration::from_secs(4), "{carrier:?}: one after another? {took:?}");
        mesh.agent_mut("b").signal(libc::SIGCONT)?;
        exchange(&mut held, b"a pause is no end")?;
        let woken = Instant::now();
        wait::until(wait::SOON, "the peer to be used again", || {
            mesh.pod("a1").connect(to).and_then(|mut s| exchange(&mut s, b"after")).is_ok()
        })?;
        ensure!(woken.elapsed() < Duration::from_secs(7), "healed after {:?}", woken.elapsed());
    }
    Ok(())
}

/// Lets nothing pass between the nodes, or everything again.
fn cut(mesh: &Mesh, cut: bool) -> Result<()> {
    let script = if cut {
        "add table inet cut { \
         chain in { type filter hook input priority 0; iifname to-0 drop; }; \
         chain out { type filter hook output priority 0; oifname to-0 drop; }; }"
    } else {
        "delete table inet cut"
    };
    mesh.node("b").netns().run(|| {
        ensure!(Command::new("nft").arg(script).status()?.success(), "nft {script}");
        Ok(())
    })
}

/// What is between the two ends of a connection.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    /// Nothing passes between the nodes.
    Cut,
    /// The server's agent does nothing. Its kernel goes on: it acknowledges what comes, until its buffers are full.
    Sleep,
}

impl Trouble {
    fn set(self, mesh: &mut Mesh, is_on: bool) -> Result<()> {
        match self {
            Self::Cut => cut(mesh, is_on),
            Self::Sleep => {
                mesh.agent_mut("b").signal(if is_on { libc::SIGSTOP } else { libc::SIGCONT })
            }
        }
    }
}

#[test]
fn link_that_is_cut_breaks_nothing_or_says_so() -> Result<()> {
    harness::require!("nft");
    for (carrier, family) in carriers() {
        for seconds in long::either(&[1, 3][..], &[1, 10, 100]) {
            in_the_midst(Trouble::Cut, carrier, family, *seconds)?;
        }
    }
    Ok(())
}

#[test]
fn peer_that_sleeps_while_bytes_are_on_their_way_breaks_nothing_or_says_so() -> Result<()> {
    harness::require!();
    // Programs of these tests give up after half a minute. A lane would not: its peer's kernel answers.
    for (carrier, family) in carriers() {
        for seconds in long::either(&[1, 3][..], &[1, 12, 25]) {
            in_the_midst(Trouble::Sleep, carrier, family, *seconds)?;
        }
    }
    Ok(())
}

/// Bytes that are exchanged before, while and after there is trouble for so long.
fn in_the_midst(trouble: Trouble, carrier: Carrier, family: Family, seconds: u64) -> Result<()> {
    let all = exchange_in_the_midst(trouble, carrier, family, seconds);
    all.with_context(|| format!("{trouble:?}, {carrier:?}, {family:?}, {seconds} s"))
}

fn exchange_in_the_midst(
    trouble: Trouble,
    carrier: Carrier,
    family: Family,
    seconds: u64,
) -> Result<()> {
    // After that a lane is dead whose peer's kernel does not answer; a QUIC connection after ten seconds.
    const SILENCE: Duration = Duration::from_secs(15);
    let mut mesh = mesh(carrier)?;
    // More than passes before the link is cut, whatever the machine.
    let bytes = 200_000_000;
    let to = mesh.service("b").addr(family, 80);
    let _server = mesh.pod("b1").serve(8080, Serve::custom(answer))?;
    let _echo = mesh.pod("b1").serve(8081, Serve::Echo)?;
    let stream = mesh.pod("a1").connect(to)?;
    thread::scope(|scope| {
        let exchanging = scope.spawn(move || {
            let done = ask(stream, bytes, bytes);
            (done, Instant::now())
        });
        thread::sleep(Duration::from_millis(50));
        let began = Instant::now();
        trouble.set(&mut mesh, true)?;
        let until = began + Duration::from_secs(seconds);
        // Who comes meanwhile is told within the connect timeout, or within twice that from OPEN on.
        if seconds >= 10 {
            let took = mesh.pod("a1").refused(to)?;
            ensure!(took < Duration::from_secs(12), "refused after {took:?}");
        }
        thread::sleep(until.saturating_duration_since(Instant::now()));
        trouble.set(&mut mesh, false)?;
        let healed = Instant::now();
        let echo = mesh.pod("b1").addr(family, 8081);
        wait::until(wait::SOON, "the link to be used again", || {
            mesh.pod("a1").connect(echo).and_then(|mut s| exchange(&mut s, b"after")).is_ok()
        })?;
        let back = healed.elapsed();
        let (done, at) = joined(exchanging);
        let ended = at.saturating_duration_since(began);
        long::report(&format!(
            "{carrier:?}, {trouble:?} for {seconds} s: {done:?} after {ended:?}, back after {back:?}"
        ));
        match done {
            Ok(()) => {
                ensure!(ended >= Duration::from_secs(seconds), "it was over too early to tell");
                Ok(())
            }
            Err(error) if seconds >= 10 => {
                ensure!(is_honest(&error), "{error:#}");
                ensure!(ended < SILENCE + Duration::from_secs(10), "told after {ended:?}");
                Ok(())
            }
            Err(error) => Err(error),
        }
    })
}

#[test]
fn agent_without_descriptors_says_so_and_recovers() -> Result<()> {
    harness::require!("prlimit");
    carriers().into_iter().try_for_each(|(carrier, family)| {
        run_out_of_descriptors(carrier, family).with_context(|| format!("{carrier:?}, {family:?}"))
    })
}

fn run_out_of_descriptors(carrier: Carrier, family: Family) -> Result<()> {
    let mesh = mesh(carrier)?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.pod("b1").addr(family, 8080);
    exchange(&mut mesh.pod("a1").connect(to)?, b"before")?;
    for node in ["a", "b"] {
        let agent = mesh.agent(node);
        let limit = |most: usize| -> Result<()> {
            let mut prlimit = Command::new("prlimit");
            prlimit.arg(format!("--pid={}", agent.pid())).arg(format!("--nofile={most}:20000"));
            ensure!(prlimit.status()?.success(), "prlimit");
            Ok(())
        };
        // What the round before still holds would come free under the limit.
        wait_until_idle(&mesh)?;
        let mut held = mesh.pod("a1").connect(to)?;
        exchange(&mut held, b"there before")?;
        limit(fds(agent)? + 6)?;
        let mut open = Vec::new();
        // In its log where it cannot accept, in the access log where it cannot deliver. Again and again:
        // what the other agent lacked a moment ago still keeps it from dialling for a while.
        wait::until(wait::SOON, "the agent to say what it lacks", || {
            let further = 40.min(2_000 - open.len());
            open.extend((0..further).map(|_| mesh.pod("a1").connect(to)));
            let lacks = |told: &str| told.contains("Too many open files");
            lacks(&agent.log()) || lacks(&agent.output())
        })?;
        exchange(&mut held, b"goes on")?;
        drop(held);
        limit(20_000)?;
        // Whoever came meanwhile is answered by now, or was told that nobody will be.
        for mut stream in open.into_iter().flatten() {
            if let Err(error) = exchange(&mut stream, b"meanwhile") {
                ensure!(is_honest(&error), "{error:#}");
            }
        }
        wait::until(wait::SOON, "the agent to work again", || {
            mesh.pod("a1").connect(to).and_then(|mut s| exchange(&mut s, b"after")).is_ok()
        })?;
    }
    Ok(())
}

#[test]
fn service_goes_on_when_one_of_its_nodes_dies() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        for signal in [libc::SIGKILL, libc::SIGSTOP] {
            let mut mesh = Mesh::two_nodes_builder()
                .service(ServiceSpec::new("s").port(80, 8080).pods(&["a2", "b1"]))
                .carrier(carrier)
                .flag("--connect-timeout-s=1")
                .start()?;
            let servers = ["a2", "b1"].map(|pod| mesh.pod(pod).serve(8080, Serve::Echo).unwrap());
            let to = mesh.service("s").v4(80);
            wait::until(wait::SOON, "both to be called", || {
                mesh.pod("a1").connect(to).and_then(|mut s| exchange(&mut s, b"both")).is_ok()
                    && servers.iter().all(|server| !server.clients().is_empty())
            })?;
            mesh.agent_mut("b").signal(signal)?;
            let asked =
                (0..20).map(|_| exchange(&mut mesh.pod("a1").connect(to)?, b"still there?"));
            let failed = asked.filter(Result::is_err).count();
            // A carrier that was open already is found out by one connection of each worker; what
            // that one has sent may not be sent again.
            ensure!(failed <= 2, "{carrier:?}, signal {signal}: {failed} of 20 failed");
            mesh.agent_mut("b").signal(libc::SIGCONT)?;
        }
    }
    Ok(())
}
