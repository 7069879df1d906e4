//! What the agent's books say of direct connections that it could not follow.

use std::fs;
use std::io::Read as _;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use harness::{Mesh, Pod, Serve, Server, exchange, is_reset, wait};

use super::{Change, connect, until_direct};

/// More than the ring has room for: two records each, and room for some 6,000.
const TOO_MANY: usize = 3600;

/// A server that ends what comes, and one that echoes, both reached directly from `a1`.
fn servers(mesh: &Mesh) -> Result<[Server; 2]> {
    let brief = mesh.pod("a2").serve(8080, Serve::custom(|_closed_at_once| Ok(())))?;
    let echo = mesh.pod("a2").serve(8081, Serve::Echo)?;
    wait::until(wait::SOON, "a direct connection", || {
        let (to, before) = (mesh.pod("a2").v4(8080), brief.clients().len());
        let Ok(mut stream) = mesh.pod("a1").connect(to) else { return false };
        stream.read_to_end(&mut Vec::new()).is_ok()
            && super::is_direct(&brief, before, &stream).unwrap_or(false)
    })?;
    until_direct(mesh.pod("a1"), mesh.pod("a2").v4(8081), &echo)?;
    Ok([brief, echo])
}

/// Has the programs lose what they would tell.
fn fill_ring(mesh: &Mesh) -> Result<()> {
    let to = mesh.pod("a2").v4(8080);
    mesh.pod("a1").run(|| {
        for _ in 0..TOO_MANY {
            TcpStream::connect(to)?.read_to_end(&mut Vec::new())?;
        }
        Ok(())
    })
}

/// Whether the pod has no socket with this port at either end, but for one that waits in TIME_WAIT.
fn is_closed(pod: &Pod, port: u16) -> Result<bool> {
    const TIME_WAIT: &str = "06";
    let tables = pod.run(|| {
        let read = |name| fs::read_to_string(format!("/proc/thread-self/net/{name}"));
        Ok([read("tcp")?, read("tcp6")?])
    })?;
    let port = format!(":{port:04X}");
    let has = |line: &str| {
        // Number, local and remote ADDRESS:PORT, state (proc_pid_net(5)).
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields[1..3].iter().any(|addr| addr.ends_with(&port)) && fields[3] != TIME_WAIT
    };
    Ok(!tables.iter().any(|table| table.lines().skip(1).any(has)))
}

fn is_listed(mesh: &Mesh, client: SocketAddr) -> bool {
    let open = mesh.agent("a").ask(&["connections"]).unwrap_or_default();
    let of_it = open.as_array().into_iter().flatten();
    of_it.filter(|one| one["source"] == *client.to_string()).count() == 2
}

#[test]
fn connection_whose_begin_was_not_told_is_found_judged_and_ended() -> Result<()> {
    harness::require!();
    for is_found_first in [true, false] {
        let mut mesh = Mesh::two_nodes()?;
        let [_brief, echo] = servers(&mesh)?;
        mesh.agent_mut("a").signal(libc::SIGSTOP)?;
        let filled = fill_ring(&mesh);
        let opened = connect(mesh.pod("a1"), mesh.pod("a2").v4(8081), &echo);
        mesh.agent_mut("a").signal(libc::SIGCONT)?;
        filled?;
        let (mut held, is_direct) = opened?;
        ensure!(is_direct);
        let client = held.local_addr()?;
        if is_found_first {
            wait::until(wait::SOON, "it to be listed", || is_listed(&mesh, client))?;
            exchange(&mut held, b"it goes on")?;
        }
        mesh.delete_pod_manifest("a2")?;
        let deleted = Instant::now();
        ensure!(is_reset(&mut held), "its server is gone and the connection is not");
        // By the snapshot, and not by the look that comes every ten seconds.
        ensure!(deleted.elapsed() < Duration::from_secs(5), "{:?}", deleted.elapsed());
        let client = client.to_string();
        let denied = [("src.addr", client.as_str()), ("way", "direct"), ("reason", "denied")];
        mesh.agent("a").wait_for_record(&denied)?;
    }
    Ok(())
}

#[test]
fn end_that_was_not_told_is_recorded_as_such_and_with_its_time() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes()?;
    let [_brief, echo] = servers(&mesh)?;
    let began = Instant::now();
    let mut held = until_direct(mesh.pod("a1"), mesh.pod("a2").v4(8081), &echo)?;
    let client = held.local_addr()?;
    wait::until(wait::SOON, "it to be listed", || is_listed(&mesh, client))?;
    exchange(&mut held, &[7; 1000])?;
    mesh.agent_mut("a").signal(libc::SIGSTOP)?;
    let filled = fill_ring(&mesh);
    let lasted = began.elapsed();
    drop(held);
    // What ends only when the agent runs again it is told.
    let gone = wait::until(wait::SOON, "both ends to be closed", || {
        ["a1", "a2"].iter().all(|pod| is_closed(mesh.pod(pod), client.port()).unwrap_or(false))
    });
    mesh.agent_mut("a").signal(libc::SIGCONT)?;
    gone?;
    filled?;
    // One of the many may have had the same port.
    let (client, to) = (client.to_string(), mesh.pod("a2").v4(8081).to_string());
    for direction in ["outbound", "inbound"] {
        let of_it = [("src.addr", &*client), ("dst.addr", &*to), ("direction", direction)];
        let record = mesh.agent("a").wait_for_record(&of_it)?;
        assert_eq!(record.text("reason"), "end_unknown", "{record:?}");
        assert_eq!(record.text("response_flags"), "-");
        let duration = record.text("duration");
        let ms: u128 = duration.strip_suffix("ms").context("no ms")?.parse()?;
        ensure!(ms + 500 >= lasted.as_millis(), "{duration} of {lasted:?}");
    }
    assert_eq!(mesh.agent("a").metric("mesh_refusals_total", &[])?, 0.0);
    Ok(())
}

#[test]
fn connections_of_another_layouts_agent_are_followed() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes()?;
    let [_brief, echo] = servers(&mesh)?;
    let to = mesh.pod("a2").v4(8081);
    let mut held = until_direct(mesh.pod("a1"), to, &echo)?;
    let mut brief = until_direct(mesh.pod("a1"), to, &echo)?;
    exchange(&mut brief, &[7; 1000])?;
    let clients = [held.local_addr()?, brief.local_addr()?];
    mesh.agent_mut("a").kill()?;
    mesh.agent_mut("a").set_flag("--max-verdicts=1000");
    mesh.agent_mut("a").restart()?;
    for client in clients {
        wait::until(wait::SOON, "it to be listed", || is_listed(&mesh, client))?;
    }
    exchange(&mut held, &[7; 1000])?;
    drop(brief);
    let brief = clients[1].to_string();
    let record = mesh.agent("a").wait_for_record(&[("src.addr", &brief)])?;
    assert_eq!(record.text("reason"), "end_unknown");
    assert_eq!(record.text("src.identity"), mesh.pod("a1").identity());
    assert_eq!(record.number("bytes_sent"), 1005);
    let change = Change::begin(&mesh);
    mesh.delete_pod_manifest("a2")?;
    ensure!(is_reset(&mut held), "its server is gone and the connection is not");
    let took = change.since_read(&mesh, SystemTime::now())?;
    ensure!(took < Duration::from_secs(1), "{took:?}");
    Ok(())
}

#[test]
fn what_has_ended_before_its_pod_is_not_taken_for_refused() -> Result<()> {
    harness::require!();
    for is_killed in [false, true] {
        let mut mesh = Mesh::two_nodes()?;
        let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
        let to = mesh.service("a").v4(80);
        until_direct(mesh.pod("a1"), to, &server)?;
        let identity = mesh.pod("a1").identity();
        if is_killed {
            mesh.agent_mut("a").kill()?;
        } else {
            mesh.agent_mut("a").signal(libc::SIGSTOP)?;
        }
        let (stream, is_direct) = connect(mesh.pod("a1"), to, &server)?;
        ensure!(is_direct);
        let client = stream.local_addr()?.to_string();
        drop(stream);
        let ended = server.clients().len();
        wait::until(wait::SOON, "its end", || server.outcomes().len() == ended)?;
        mesh.delete_pod_manifest("a1")?;
        if is_killed {
            mesh.agent_mut("a").restart()?;
        } else {
            mesh.agent_mut("a").signal(libc::SIGCONT)?;
        }
        for direction in ["outbound", "inbound"] {
            let of_it = [("src.addr", client.as_str()), ("direction", direction)];
            let record = mesh.agent("a").wait_for_record(&of_it)?;
            assert_eq!(record.text("message"), "connection complete", "{record:?}");
            assert_eq!(record.number("bytes_sent"), 5);
            // Nobody can say any more who a pod was that the next agent has never heard of.
            let known = if is_killed { "" } else { identity.as_str() };
            assert_eq!(record.text("src.identity"), known);
        }
        assert_eq!(mesh.agent("a").metric("mesh_refusals_total", &[])?, 0.0);
        if is_killed {
            let proven = [("connection_security_policy", "mutual_tls")];
            assert_eq!(mesh.agent("a").metric("istio_tcp_connections_opened_total", &proven)?, 0.0);
        }
    }
    Ok(())
}
