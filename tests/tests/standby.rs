//! A new agent beside the old one, as when a DaemonSet surges.

use std::time::Duration;

use anyhow::{Result, ensure};
use harness::{Mesh, Serve, exchange, wait};

/// From SIGTERM of the old agent until it lets go.
const TAKEOVER: Duration = Duration::from_secs(10);

#[test]
fn agent_that_stands_by_is_ready_and_takes_over_when_the_old_one_drains() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes_builder().flag("--standby=on").start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.service("b").v4(80);
    let mut held = mesh.pod("a1").connect(to)?;
    exchange(&mut held, b"before")?;

    let mut old = mesh.agent_mut("a").start_beside()?;
    wait::until(wait::SOON, "the new one to wait", || {
        mesh.agent("a").log().contains("waiting for it to drain")
    })?;
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
    exchange(&mut held, b"by the old one")?;
    let status = mesh.agent("a").cli(&["status"])?;
    ensure!(status.code == 0, "{status:?}");

    drop(held);
    wait::until(wait::SOON, "the old one to end", || old.runs().is_ok_and(|runs| !runs))?;
    exchange(&mut mesh.pod("a1").connect(to)?, b"the new one goes on")
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
