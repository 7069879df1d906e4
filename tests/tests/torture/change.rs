//! What the manifests and the roots say changes under traffic.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use harness::{Carrier, Family, Load, Mesh, PodSpec, Serve, exchange, wait};

use crate::{mesh, wait_until_idle};

#[test]
fn address_that_another_pod_takes_over_means_the_new_one() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mesh = mesh(carrier)?;
        let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
        let to = Family::BOTH.map(|family| mesh.pod("b1").addr(family, 8080));
        let agent = mesh.agent("a");
        for to in to {
            exchange(&mut mesh.pod("a1").connect(to)?, b"to the old one")?;
        }
        let old = fs::read_to_string(mesh.manifests().dir().join("pod-default-b1.yaml"))?;
        let new = old
            .replace(mesh.pod("b1").uid(), "successor")
            .replace("name: \"b1\"", "name: \"successor\"")
            .replace("serviceAccountName: \"b1\"", "serviceAccountName: \"successor\"");
        mesh.delete_pod_manifest("b1")?;
        mesh.manifests().write("pod-default-successor", &new)?;
        let ours = |identity: &str| identity.ends_with("/sa/successor");
        wait::until(wait::SOON, "the successor to be called", || {
            let call = |to| mesh.pod("a1").connect(to).and_then(|mut s| exchange(&mut s, b"hello"));
            to.into_iter().all(|to| call(to).is_ok())
                && agent.access_log().iter().any(|record| ours(record.text("dst.identity")))
        })?;
        wait_until_idle(&mesh)?;
        let before = agent.access_log().len();
        for to in to.repeat(10) {
            exchange(&mut mesh.pod("a1").connect(to)?, b"hello")?;
        }
        wait::until(wait::SOON, "20 records", || agent.access_log().len() >= before + 20)?;
        for record in &agent.access_log()[before..] {
            ensure!(ours(record.text("dst.identity")), "{carrier:?}: {record:?}");
        }
    }
    Ok(())
}

#[test]
fn pod_in_strict_mode_reaches_itself_through_its_service() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .pod(PodSpec::new("b1", "b").annotation("malla.dev/mode", "strict"))
        .start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    for family in Family::BOTH {
        for to in [mesh.service("b").addr(family, 80), mesh.pod("b1").addr(family, 8080)] {
            exchange(&mut mesh.pod("b1").connect(to)?, b"it is me")
                .with_context(|| to.to_string())?;
        }
    }
    Ok(())
}

#[test]
fn server_enrols_and_leaves_under_quic_without_a_failed_request() -> Result<()> {
    harness::require!();
    let mesh = mesh(Carrier::Quic)?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.pod("b1").v4(8080);
    let mut held = mesh.pod("a1").connect(to)?;
    exchange(&mut held, b"before")?;
    Load::during(mesh.pod("a1"), to, |load| {
        for toggle in 0..20 {
            mesh.enrol("b1", toggle % 2 == 1)?;
            load.wait_for(3)?;
            exchange(&mut held, b"an open connection is left as it is")?;
        }
        Ok(())
    })?;
    Ok(())
}

#[test]
fn agent_in_a_time_namespace_is_heard_by_the_kernel() -> Result<()> {
    harness::require!("unshare");
    let open = PodSpec::new("a1", "a").annotation("malla.dev/fail-open", "true");
    let mut mesh = Mesh::two_nodes_builder().pod(open).start()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.pod("b1").v4(8080);
    // A heartbeat that the programs take for a minute old would let a1 out past the agent; one that is a
    // minute ahead would hold it back for a minute after the agent's death.
    for offset in ["-60", "60"] {
        let through = [&format!("--boottime={offset}")[..], &format!("--monotonic={offset}")[..]];
        let agent = mesh.agent_mut("a");
        agent.kill()?;
        agent.start_through(&["unshare", "--time", through[0], through[1], "--"]);
        agent.restart()?;
        let mut stream = mesh.pod("a1").connect(to)?;
        let client = stream.local_addr()?.to_string();
        exchange(&mut stream, b"by the mesh")?;
        drop(stream);
        mesh.agent("a").wait_for_record(&[("src.addr", &client), ("response_flags", "-")])?;
    }
    mesh.agent_mut("a").kill()?;
    wait::until(wait::SOON, "the pod to be let out", || {
        mesh.pod("a1").connect(to).and_then(|mut s| exchange(&mut s, b"past it")).is_ok()
    })
}
