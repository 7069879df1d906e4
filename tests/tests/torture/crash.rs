//! Agents that die, sleep and run dry, and a link that is cut.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::{
    Carrier, Mesh, Pattern, Pod, Serve, ServiceSpec, exchange, exchange_patterns, receive_pattern,
    send_pattern, wait,
};

use crate::{fds, is_honest, mesh, wait_until_idle};

/// What each of the programs of an ordeal exchanges in each direction.
const BYTES: u64 = 300_000;

/// Programs that exchange [`BYTES`] over and over, across nodes and within them, while `change` does
/// its worst. Returns how often that succeeded and how often it failed honestly; anything else is an
/// error.
fn ordeal(
    mesh: &mut Mesh,
    change: impl FnOnce(&mut Mesh, &AtomicU64) -> Result<()>,
) -> Result<(u64, u64)> {
    // In turns, so that one thread uses a socket: the kernel tells a reset once, to whoever asks first.
    let serve = Serve::custom(|mut stream| {
        receive_pattern(&mut stream, BYTES, Pattern::CLIENT)?;
        send_pattern(&mut stream, BYTES, Pattern::SERVER)
    });
    let ask = |mut stream: TcpStream| -> Result<()> {
        send_pattern(&mut stream, BYTES, Pattern::CLIENT)?;
        stream.shutdown(Shutdown::Write).context("end sending")?;
        receive_pattern(&mut stream, BYTES, Pattern::SERVER)
    };
    let servers = ["b1", "b2", "a2"].map(|pod| mesh.pod(pod).serve(8080, serve.clone()));
    let servers = servers.into_iter().collect::<Result<Vec<_>>>()?;
    let routes = [("a1", "b1"), ("a1", "b2"), ("a1", "a2"), ("b2", "a2"), ("b2", "b1")];
    let routes = routes.map(|(from, to)| (mesh.shared_pod(from), mesh.pod(to).v4(8080)));
    let (stop, good, bad) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let (wrong, wrongs) = mpsc::channel();
    let run = |from: &Pod, to: SocketAddr, wrong: &mpsc::Sender<String>| {
        while !stop.load(Ordering::Acquire) {
            let done = from.connect(to).and_then(ask);
            match done {
                Ok(()) => _ = good.fetch_add(1, Ordering::AcqRel),
                Err(error) if is_honest(&error) => {
                    bad.fetch_add(1, Ordering::AcqRel);
                    thread::sleep(Duration::from_millis(5));
                }
                Err(error) => wrong.send(format!("to {to}: {error:#}")).unwrap_or_default(),
            }
        }
    };
    thread::scope(|scope| {
        for (from, to) in &routes {
            for _ in 0..2 {
                let (run, wrong) = (&run, wrong.clone());
                scope.spawn(move || run(from, *to, &wrong));
            }
        }
        let changed = change(mesh, &good);
        stop.store(true, Ordering::Release);
        changed
    })?;
    let mut wrong: Vec<_> = wrongs.try_iter().collect();
    for server in &servers {
        let ends = server.outcomes().into_iter().filter_map(Result::err);
        let is_reset = |end: &String| end.contains("os error 104") || end.contains("os error 32");
        wrong.extend(ends.filter(|end| !is_reset(end)));
    }
    ensure!(wrong.is_empty(), "{} like {:#?}", wrong.len(), &wrong[..wrong.len().min(5)]);
    Ok((good.into_inner(), bad.into_inner()))
}

fn killed(carrier: Carrier) -> Result<()> {
    let mut mesh = mesh(carrier)?;
    let (good, bad) = ordeal(&mut mesh, |mesh, good| {
        let started = Instant::now();
        let mut round: u32 = 0;
        while started.elapsed() < Duration::from_secs(5) {
            // At another moment each time.
            thread::sleep(Duration::from_millis(u64::from(50 + round * 137 % 450)));
            let node = ["a", "b"][round as usize % 2];
            mesh.agent_mut(node).kill()?;
            mesh.agent_mut(node).restart()?;
            round += 1;
        }
        let before = good.load(Ordering::Acquire);
        wait::until(wait::SOON, "the mesh to work again", || {
            good.load(Ordering::Acquire) > before + 20
        })?;
        Ok(())
    })?;
    ensure!(good > 20 && bad > 0, "{good} exchanges succeeded, {bad} failed");
    Ok(())
}

#[test]
fn killed_agent_never_forges_an_end_lane() -> Result<()> {
    harness::require!();
    killed(Carrier::Lane)
}

#[test]
fn killed_agent_never_forges_an_end_quic() -> Result<()> {
    harness::require!();
    killed(Carrier::Quic)
}

#[test]
fn peer_that_slept_is_used_again() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mut mesh =
            Mesh::two_nodes_builder().carrier(carrier).flag("--connect-timeout-s=1").start()?;
        let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
        let to = mesh.service("b").v4(80);
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

#[test]
fn link_that_is_cut_for_seconds_breaks_nothing() -> Result<()> {
    harness::require!("nft");
    for carrier in Carrier::BOTH {
        let mesh = mesh(carrier)?;
        let bytes = 20_000_000;
        let _server = mesh.pod("b1").serve(8080, Serve::Exchange(bytes))?;
        let stream = mesh.pod("a1").connect(mesh.service("b").v4(80))?;
        thread::scope(|scope| {
            let exchanging =
                scope.spawn(|| exchange_patterns(&stream, bytes, Pattern::CLIENT, Pattern::SERVER));
            thread::sleep(Duration::from_millis(100));
            cut(&mesh, true)?;
            thread::sleep(Duration::from_secs(3));
            ensure!(!exchanging.is_finished(), "{carrier:?}: too early to tell");
            cut(&mesh, false)?;
            exchanging.join().unwrap().with_context(|| format!("{carrier:?}"))
        })?;
    }
    Ok(())
}

#[test]
fn agent_without_descriptors_says_so_and_recovers() -> Result<()> {
    harness::require!("prlimit");
    let mesh = mesh(Carrier::Auto)?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.pod("b1").v4(8080);
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
        drop(open);
        limit(20_000)?;
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
