//! A new agent beside the old one, as when a DaemonSet surges.

use std::net::TcpListener;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Carrier, Family, Mesh, Predecessor, Serve, exchange, wait};

/// From SIGTERM of the old agent until it lets go.
const TAKEOVER: Duration = Duration::from_secs(40);

/// What a new agent says that stands by.
const WAITS: &str = "waiting for it to drain";

/// Starts a new agent of the first node that waits for the one that runs, and returns that one.
fn wait_beside(mesh: &mut Mesh) -> Result<Predecessor> {
    let old = mesh.agent_mut("a").start_beside()?;
    wait::until(wait::SOON, "the new one to wait", || mesh.agent("a").log().contains(WAITS))?;
    Ok(old)
}

/// Starts one that ends with `why`, and returns the one that runs on.
fn give_up_beside(mesh: &mut Mesh, why: &str) -> Result<Predecessor> {
    let mut old = mesh.agent_mut("a").start_beside()?;
    wait::until(wait::SOON, "the new one to give up", || mesh.agent("a").log().contains(why))?;
    ensure!(!mesh.agent("a").log().contains(WAITS), "it said that it could");
    ensure!(old.runs()?);
    Ok(old)
}

#[test]
fn agent_that_stands_by_is_ready_and_takes_over_when_the_old_one_drains() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        stands_by(carrier).with_context(|| format!("{carrier:?}"))?;
    }
    Ok(())
}

fn stands_by(carrier: Carrier) -> Result<()> {
    let mut mesh = Mesh::two_nodes_builder().carrier(carrier).flag("--standby=on").start()?;
    let _servers = ["a1", "b1"].map(|pod| mesh.pod(pod).serve(8080, Serve::Echo));
    let to = mesh.service("b").v4(80);
    // From the agent that is replaced, and to it.
    let mut held = [("a1", "b1"), ("b1", "a1")]
        .map(|(from, to)| mesh.pod(from).connect(mesh.pod(to).v4(8080)))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    held.iter_mut().try_for_each(|held| exchange(held, b"before"))?;

    let mut old = wait_beside(&mut mesh)?;
    // Whichever of the two answers.
    for _ in 0..20 {
        ensure!(mesh.agent("a").is_ready());
    }
    exchange(&mut mesh.pod("a1").connect(to)?, b"the old one carries")?;
    ensure!(!mesh.agent("a").log().contains("it is this agent's turn"));

    old.terminate()?;
    // Until then the old one, which may not have seen its signal yet, accepts and answers.
    wait::until(TAKEOVER, "the new one's turn", || {
        mesh.agent("a").log().contains("it is this agent's turn")
    })?;
    mesh.agent_mut("a").wait_until_ready()?;
    exchange(&mut mesh.pod("a1").connect(to)?, b"the new one carries")?;
    ensure!(old.runs()?, "it should still carry what it has accepted");
    for _ in 0..20 {
        // Beside connections that are the new one's.
        exchange(&mut mesh.pod("b1").connect(mesh.pod("a1").v4(8080))?, b"the new one carries")?;
        held.iter_mut().try_for_each(|held| exchange(held, &[7; 20_000]))?;
    }
    let status = mesh.agent("a").cli(&["status"])?;
    ensure!(status.code == 0, "{status:?}");

    drop(held);
    wait::until(wait::SOON, "the old one to end", || old.runs().is_ok_and(|runs| !runs))?;
    exchange(&mut mesh.pod("a1").connect(to)?, b"the new one goes on")
}

/// As with a version that this kernel does not take: whoever rolls it out must not lose the agent that works.
#[test]
fn agent_that_could_not_load_its_programs_is_never_ready_to_replace_one() -> Result<()> {
    harness::require!("setpriv");
    let mut mesh = Mesh::two_nodes_builder().flag("--standby=on").start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.service("b").v4(80);
    let rights = "--bounding-set=-bpf,-perfmon,-sys_admin";
    mesh.agent_mut("a").start_through(&["setpriv", rights, "--"]);
    let old = give_up_beside(&mut mesh, "this agent cannot replace the one that runs here")?;
    exchange(&mut mesh.pod("a1").connect(to)?, b"the old one carries")?;
    // The next one can.
    mesh.agent_mut("a").start_through(&[]);
    drop(old);
    mesh.agent_mut("a").kill()?;
    mesh.agent_mut("a").restart()?;
    exchange(&mut mesh.pod("a1").connect(to)?, b"another one carries")
}

#[test]
fn agent_whose_port_another_program_has_is_never_ready_to_replace_one() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes_builder().flag("--standby=on").start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let theirs = mesh.node("a").netns().run(|| Ok(TcpListener::bind("[::]:9100")?))?;
    mesh.agent_mut("a").set_flag("--metrics-addr=[::]:9100");
    let _old = give_up_beside(&mut mesh, "--metrics-addr: listen on [::]:9100, in place of")?;
    let to = mesh.service("b").v4(80);
    exchange(&mut mesh.pod("a1").connect(to)?, b"the old one carries")?;
    drop(theirs);
    Ok(())
}

/// It has been accepted when its agent is told to end, and waits for the other node's.
#[test]
fn connection_that_is_being_opened_survives_the_hand_over() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        is_opened(carrier).with_context(|| format!("{carrier:?}"))?;
    }
    Ok(())
}

fn is_opened(carrier: Carrier) -> Result<()> {
    let builder = Mesh::two_nodes_builder().carrier(carrier);
    let mut mesh = builder.flag("--standby=on").flag("--connect-timeout-s=20").start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let old = wait_beside(&mut mesh)?;
    mesh.agent_mut("b").signal(libc::SIGSTOP)?;
    let mut opens = mesh.pod("a1").connect(mesh.service("b").v4(80))?;
    opens.set_read_timeout(Some(wait::SOON))?;
    old.terminate()?;
    wait::until(TAKEOVER, "the old one to drain", || mesh.agent("a").log().contains("draining"))?;
    mesh.agent_mut("b").signal(libc::SIGCONT)?;
    exchange(&mut opens, b"as if nothing had happened")
}

#[test]
fn no_connection_is_refused_while_one_agent_follows_the_other() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        is_followed(carrier).with_context(|| format!("{carrier:?}"))?;
    }
    Ok(())
}

fn is_followed(carrier: Carrier) -> Result<()> {
    let builder = Mesh::two_nodes_builder().carrier(carrier);
    let mut mesh = builder.flag("--standby=on").flag("--drain-s=2").start()?;
    let _there = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let _here = mesh.pod("a1").serve(8080, Serve::Echo)?;
    let old = wait_beside(&mut mesh)?;
    let end = AtomicBool::new(false);
    let mesh = RwLock::new(mesh);
    let dialled = thread::scope(|scope| {
        let dial = |family: Family, from: &'static str, to: &'static str| {
            let (mesh, end) = (&mesh, &end);
            scope.spawn(move || keep_dialling(mesh, family, from, to, end))
        };
        let dialling =
            Family::BOTH.map(|family| [dial(family, "a1", "b1"), dial(family, "b1", "a1")]);
        let replaced = replace(&mesh, old);
        end.store(true, Ordering::Release);
        let joined = dialling.into_iter().flatten().map(|one| one.join());
        let dialled = joined.map(|one| one.unwrap_or_else(|panic| resume_unwind(panic)));
        let dialled = dialled.collect::<Result<Vec<_>>>();
        replaced.and(dialled)
    })?;
    ensure!(dialled.iter().all(|times| *times > 20), "hardly any traffic: {dialled:?}");
    Ok(())
}

/// Ends the old agent, and waits until the new one is alone.
fn replace(mesh: &RwLock<Mesh>, mut old: Predecessor) -> Result<()> {
    old.terminate()?;
    wait::until(TAKEOVER, "the old one to end", || old.runs().is_ok_and(|runs| !runs))?;
    let mut mesh = mesh.write().unwrap_or_else(PoisonError::into_inner);
    ensure!(mesh.agent("a").log().contains("it is this agent's turn"));
    mesh.agent_mut("a").wait_until_ready()
}

fn keep_dialling(
    mesh: &RwLock<Mesh>,
    family: Family,
    from: &str,
    to: &str,
    end: &AtomicBool,
) -> Result<usize> {
    let mut dialled = 0;
    while !end.load(Ordering::Acquire) {
        let mesh = mesh.read().unwrap_or_else(PoisonError::into_inner);
        let told = || format!("{from} to {to}, {family:?}, after {dialled} connections");
        let addr = mesh.pod(to).addr(family, 8080);
        let mut stream = mesh.pod(from).connect(addr).with_context(told)?;
        stream.set_read_timeout(Some(wait::SOON))?;
        exchange(&mut stream, b"here?").with_context(told)?;
        dialled += 1;
    }
    Ok(dialled)
}

#[test]
fn agent_that_does_not_stand_by_refuses_to_start_beside_another() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes()?;
    let mut old = mesh.agent_mut("a").start_beside()?;
    let status = mesh.agent_mut("a").wait_until_gone(wait::SOON)?;
    ensure!(!status.success());
    ensure!(old.runs()?);
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    exchange(&mut mesh.pod("a1").connect(mesh.service("b").v4(80))?, b"nothing has happened")
}
