//! Wall clocks that jump: what is open goes on, and certificates follow the clock.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Agent, Carrier, Mesh, Serve, exchange, wait};

use crate::is_honest;

const HOUR: i64 = 3_600;

/// The wall clock of one node's agent, which alone sees it: its libc's answers are changed, and the
/// machine's clock is not touched.
struct Clock(PathBuf);

impl Clock {
    fn of(mesh: &mut Mesh, node: &str) -> Result<Self> {
        let dir = mesh.state_dir().to_owned();
        let (source, shim) = (dir.join("clock.c"), dir.join("clock.so"));
        if !shim.exists() {
            fs::write(&source, include_str!("clock.c"))?;
            let cc = Command::new("cc")
                .args(["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o"])
                .arg(&shim)
                .arg(&source)
                .output()?;
            ensure!(cc.status.success(), "{}", String::from_utf8_lossy(&cc.stderr));
        }
        let clock = Self(dir.join(format!("clock-{node}")));
        clock.is_ahead(0)?;
        let [preload, file] = [("LD_PRELOAD", &shim), ("MALLA_CLOCK", &clock.0)]
            .map(|(name, path)| format!("{name}={}", path.display()));
        let agent = mesh.agent_mut(node);
        agent.kill()?;
        agent.start_through(&["env", &preload, &file]);
        agent.restart()?;
        Ok(clock)
    }

    /// Sets it so many seconds ahead of the machine's, or behind.
    fn is_ahead(&self, seconds: i64) -> Result<()> {
        let new = self.0.with_extension("new");
        fs::write(&new, seconds.to_string())?;
        Ok(fs::rename(new, &self.0)?)
    }
}

/// Processor time of the agent so far.
fn cpu(agent: &Agent) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", agent.pid()))?;
    // proc_pid_stat(5): the 14th and 15th field, in hundredths of a second; the name is the second.
    let fields = stat.rsplit_once(") ").context("no name")?.1.split_whitespace().skip(11).take(2);
    let ticks: u64 = fields.filter_map(|field| field.parse::<u64>().ok()).sum();
    Ok(Duration::from_millis(ticks * 10))
}

/// The serial numbers of both agents' certificates.
fn serials(mesh: &Mesh) -> Result<BTreeSet<String>> {
    let mut serials = BTreeSet::new();
    for node in mesh.nodes() {
        let certificates = mesh.agent(node.name()).ask(&["certs"])?;
        let all = certificates.as_array().context("no list")?.iter();
        let leaves = all.filter(|one| one["kind"] == "Leaf");
        serials.extend(leaves.filter_map(|one| one["serial"].as_str()).map(str::to_owned));
    }
    ensure!(serials.len() == 4, "{serials:?}");
    Ok(serials)
}

/// A connection of two pods, and its bytes.
fn talk(mesh: &Mesh, from: &str, to: &str) -> Result<()> {
    exchange(&mut mesh.pod(from).connect(mesh.pod(to).v4(8080))?, b"new")
}

#[test]
fn clocks_that_jump_together_end_no_open_connection_and_certificates_follow() -> Result<()> {
    harness::require!("cc", "env");
    for carrier in Carrier::BOTH {
        let mut mesh = Mesh::two_nodes_builder().carrier(carrier).start()?;
        let clocks = [Clock::of(&mut mesh, "a")?, Clock::of(&mut mesh, "b")?];
        let _servers = ["b1", "b2"].map(|pod| mesh.pod(pod).serve(8080, Serve::Echo));
        let mut held = mesh.pod("a1").connect(mesh.pod("b1").v4(8080))?;
        exchange(&mut held, b"before")?;
        // Beyond all certificates, before the time of their making, and beyond again. Nobody has a carrier
        // for the pods that talk then.
        for (hours, from, to) in [(30, "a1", "b2"), (4, "a2", "b1"), (54, "a2", "b2")] {
            let before = serials(&mesh)?;
            for clock in &clocks {
                clock.is_ahead(hours * HOUR)?;
            }
            exchange(&mut held, b"an open connection is left as it is")?;
            wait::until(wait::SOON, "certificates of the new time", || {
                serials(&mesh).is_ok_and(|now| now.is_disjoint(&before))
            })?;
            talk(&mesh, from, to).with_context(|| format!("{carrier:?}, {hours} h"))?;
            talk(&mesh, "a1", "b1").with_context(|| format!("{carrier:?}, {hours} h"))?;
            exchange(&mut held, b"an open connection is left as it is")?;
        }
        is_quiet(&mesh)?;
    }
    Ok(())
}

#[test]
fn clock_of_one_node_that_jumps_is_told_as_such_and_heals() -> Result<()> {
    harness::require!("cc", "env");
    for carrier in Carrier::BOTH {
        let mut mesh = Mesh::two_nodes_builder().carrier(carrier).start()?;
        let clock = Clock::of(&mut mesh, "a")?;
        let _servers = ["b1", "b2", "a2"].map(|pod| mesh.pod(pod).serve(8080, Serve::Echo));
        let mut held = mesh.pod("a1").connect(mesh.pod("b1").v4(8080))?;
        exchange(&mut held, b"before")?;
        for (hours, to, reason) in
            [(30, "b1", "certificate_expired"), (-30, "b2", "certificate_not_yet_valid")]
        {
            clock.is_ahead(hours * HOUR)?;
            let Err(error) = talk(&mesh, "a2", to) else {
                anyhow::bail!("{carrier:?}, {hours} h: a certificate of another time was taken")
            };
            ensure!(is_honest(&error), "{error:#}");
            let addr = mesh.pod(to).v4(8080).to_string();
            mesh.agent("a").wait_for_record(&[("dst.addr", &addr), ("reason", reason)])?;
            talk(&mesh, "a1", "a2").context("on one node no clock is compared with another one")?;
            exchange(&mut held, b"an open connection is left as it is")?;
            clock.is_ahead(0)?;
            wait::until(wait::SOON, "the mesh to heal", || talk(&mesh, "a2", to).is_ok())
                .with_context(|| format!("{carrier:?} after {hours} h"))?;
            exchange(&mut held, b"an open connection is left as it is")?;
        }
        is_quiet(&mesh)?;
    }
    Ok(())
}

/// Nothing panicked, and nobody is busy with a time that does not come.
fn is_quiet(mesh: &Mesh) -> Result<()> {
    for node in mesh.nodes() {
        let agent = mesh.agent(node.name());
        ensure!(!agent.log().contains("panicked"), "{}", node.name());
        let before = cpu(agent)?;
        std::thread::sleep(Duration::from_secs(2));
        let used = cpu(agent)?.saturating_sub(before);
        ensure!(used < Duration::from_millis(600), "node {} used {used:?} of 2 s", node.name());
    }
    Ok(())
}
