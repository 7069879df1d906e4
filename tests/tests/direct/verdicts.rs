//! What begins and ends the direct way.

use std::fs;
use std::io::{ErrorKind, Read as _};
use std::net::TcpStream;
use std::panic::resume_unwind;
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use harness::{Family, Mesh, PodSpec, Serve, Server, ServiceSpec, exchange, is_reset, wait};

use super::{Change, connect, kernel, until_direct};

#[test]
fn direct_off_at_either_end_is_carried() -> Result<()> {
    harness::require!();
    for off in ["a1", "a2"] {
        let mesh = Mesh::two_nodes_builder()
            .pod(PodSpec::new(off, "a").annotation("malla.dev/direct", "off"))
            .start()?;
        let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
        for _ in 0..10 {
            let (_, direct) = connect(mesh.pod("a1"), mesh.service("a").v4(80), &server)?;
            ensure!(!direct, "{off} is off");
        }
        mesh.annotate(off, "malla.dev/direct", "on")?;
        until_direct(mesh.pod("a1"), mesh.service("a").v4(80), &server)?;
    }
    Ok(())
}

#[test]
fn namespace_that_is_off_is_carried_but_for_pods_that_say_on() -> Result<()> {
    harness::require!();
    let on = |name| PodSpec::new(name, "a").annotation("malla.dev/direct", "on");
    let mesh = Mesh::two_nodes_builder().pod(on("a3")).pod(on("a4")).start()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    let others = [8080, 8081].map(|port| mesh.pod("a4").serve(port, Serve::Echo));
    let others = others.into_iter().collect::<Result<Vec<_>>>()?;
    let to = mesh.service("a").v4(80);
    let mut open = until_direct(mesh.pod("a1"), to, &server)?;
    let mut others = others.iter().zip(8080..);
    let mut is_carried = |what: &str| -> Result<()> {
        let (other, port) = others.next().context("asked too often")?;
        for is_decided in [false, true] {
            for _ in 0..5 {
                let (_, direct) = connect(mesh.pod("a1"), to, &server)?;
                ensure!(!direct, "{what}");
            }
            if !is_decided {
                // What was wished for before this has been decided then.
                drop(until_direct(mesh.pod("a3"), mesh.pod("a4").v4(port), other)?);
            }
        }
        Ok(())
    };
    let snapshots = || mesh.agent("a").log().matches("new snapshot").count();
    let until_read = |before| wait::until(wait::SOON, "a snapshot", || snapshots() > before);

    let before = snapshots();
    let off = [("malla.dev/mesh", "enabled"), ("malla.dev/direct", "off")];
    mesh.annotate_namespace("default", &off)?;
    until_read(before)?;
    wait::until(wait::SOON, "connections to be carried", || {
        connect(mesh.pod("a1"), to, &server).is_ok_and(|(_, direct)| !direct)
    })?;
    is_carried("the namespace is off")?;
    exchange(&mut open, b"still here")?;
    let before = snapshots();
    mesh.annotate("a1", "malla.dev/direct", "on")?;
    until_read(before)?;
    is_carried("the server's namespace is off")?;
    mesh.annotate("a2", "malla.dev/direct", "on")?;
    drop(until_direct(mesh.pod("a1"), to, &server)?);
    Ok(())
}

#[test]
fn turning_direct_off_ends_verdicts_and_no_connection() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    let to = mesh.service("a").v4(80);
    let mut open = until_direct(mesh.pod("a1"), to, &server)?;
    for (pod, key, value) in [
        ("a2", "malla.dev/direct", "off"),
        ("a2", "malla.dev/direct", "on"),
        ("a2", "malla.dev/mode", "strict"),
        ("a1", "malla.dev/direct", "off"),
    ] {
        let stale = kernel(&mesh, "direct_stale")?;
        mesh.annotate(pod, key, value)?;
        wait::until(wait::SOON, "the verdict to end", || {
            let asked = connect(mesh.pod("a1"), to, &server);
            asked.is_ok_and(|(_, direct)| !direct || value != "off")
                && kernel(&mesh, "direct_stale").is_ok_and(|now| now > stale)
        })
        .with_context(|| format!("{pod} {key}: {value}"))?;
        exchange(&mut open, b"still here")?;
        if value != "off" {
            drop(until_direct(mesh.pod("a1"), to, &server)?);
        }
    }
    Ok(())
}

#[test]
fn endpoints_come_and_go() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder().pod(PodSpec::new("a3", "a")).start()?;
    let (a2, a3) = (
        mesh.pod("a2").serve(8080, Serve::Greet("a2"))?,
        mesh.pod("a3").serve(8080, Serve::Greet("a3"))?,
    );
    let to = mesh.service("a").v4(80);
    let greeted = || -> Result<String> {
        let mut greeting = [0; 2];
        mesh.pod("a1").connect(to)?.read_exact(&mut greeting)?;
        Ok(String::from_utf8(greeting.into())?)
    };
    let is_taken = |more: f64| {
        wait::until(wait::SOON, "direct connections", || {
            greeted().is_ok() && kernel(&mesh, "direct_taken").is_ok_and(|taken| taken >= more)
        })
    };
    is_taken(3.0)?;
    assert_eq!(a3.clients().len(), 0);

    mesh.endpoints("a", &["a3"])?;
    wait::until(wait::SOON, "the new endpoint", || greeted().is_ok_and(|who| who == "a3"))?;
    let before = a2.clients().len();
    is_taken(kernel(&mesh, "direct_taken")? + 5.0)?;
    assert_eq!(a2.clients().len(), before, "nobody comes to the old one any more");

    mesh.endpoints("a", &["a2", "a3"])?;
    wait::until(wait::SOON, "both", || greeted().is_ok_and(|who| who == "a2"))?;
    let before = [a2.clients().len(), a3.clients().len()];
    for _ in 0..60 {
        greeted()?;
    }
    for (server, before) in [a2, a3].iter().zip(before) {
        ensure!(server.clients().len() - before >= 12, "no balance");
    }
    Ok(())
}

/// Connections for which the share of each endpoint is counted.
const DRAWN: u32 = 300;

/// How many of [`DRAWN`] connections of `a1` to this service came to each of its endpoints.
fn shares(mesh: &Mesh, service: &str, servers: &[&Server]) -> Result<Vec<f64>> {
    let to = mesh.service(service).v4(80);
    let before: Vec<usize> = servers.iter().map(|server| server.clients().len()).collect();
    for _ in 0..DRAWN {
        exchange(&mut mesh.pod("a1").connect(to)?, b"hello")?;
    }
    let now = servers.iter().map(|server| server.clients().len());
    let shares: Vec<f64> = now.zip(before).map(|(now, before)| (now - before) as f64).collect();
    assert_eq!(shares.iter().sum::<f64>(), f64::from(DRAWN));
    Ok(shares)
}

/// Waits until the kernel connects `a1` directly to one of this service's endpoints.
fn until_taken(mesh: &Mesh, service: &str) -> Result<()> {
    let (to, before) = (mesh.service(service).v4(80), kernel(mesh, "direct_taken")?);
    wait::until(wait::SOON, "a direct connection", || {
        let asked = mesh.pod("a1").connect(to).and_then(|mut one| exchange(&mut one, b"hello"));
        asked.is_ok() && kernel(mesh, "direct_taken").is_ok_and(|taken| taken > before)
    })
}

#[test]
fn endpoints_here_and_elsewhere_have_the_same_share() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .service(ServiceSpec::new("all").port(80, 8080).pods(&["a2", "b1", "b2"]))
        .start()?;
    let servers = ["a2", "b1", "b2"].map(|pod| mesh.pod(pod).serve(8080, Serve::Echo));
    let servers = servers.into_iter().collect::<Result<Vec<_>>>()?;
    until_taken(&mesh, "all")?;
    let agent_before = kernel(&mesh, "direct_agent")?;
    let share = shares(&mesh, "all", &servers.iter().collect::<Vec<_>>())?;
    // Chi square with two degrees of freedom: one run in 10,000 exceeds 18.4.
    let chi: f64 = share.iter().map(|n| (n - 100.0).powi(2) / 100.0).sum();
    ensure!(chi < 18.4, "{share:?}");
    // What the kernel chose elsewhere, the agent carried there.
    assert_eq!(kernel(&mesh, "direct_agent")? - agent_before, share[1] + share[2]);
    Ok(())
}

/// Who draws changes, the kernel or the agent, and the weights do not. With `--balance random`: the default
/// prefers whoever answers soonest, which the agent measures where it carries, and the kernel does not.
#[test]
fn share_of_an_endpoint_is_that_without_the_direct_way() -> Result<()> {
    harness::require!();
    // Each endpoint has a third of the connections: a binomial distribution, of which one number in
    // 1.7 million is further from the mean than five standard deviations.
    let (all, third) = (f64::from(DRAWN), 1.0 / 3.0);
    let (mean, deviation) = (all * third, (all * third * (1.0 - third)).sqrt());
    for direct in ["on", "off"] {
        let mesh = Mesh::two_nodes_builder()
            .pod(PodSpec::new("a1", "a").annotation("malla.dev/direct", direct))
            .pod(PodSpec::new("a3", "a"))
            .service(ServiceSpec::new("one-here").port(80, 8080).pods(&["a2", "b1", "b2"]))
            .service(ServiceSpec::new("two-here").port(80, 8080).pods(&["a2", "a3", "b1"]))
            .flag("--balance=random")
            .start()?;
        let serve = |pod: &str| mesh.pod(pod).serve(8080, Serve::Echo);
        let (a2, a3, b1, b2) = (serve("a2")?, serve("a3")?, serve("b1")?, serve("b2")?);
        let counters = || -> Result<[f64; 2]> {
            Ok([kernel(&mesh, "direct_taken")?, kernel(&mesh, "direct_agent")?])
        };
        for (service, servers, here) in
            [("one-here", [&a2, &b1, &b2], 1), ("two-here", [&a2, &a3, &b1], 2)]
        {
            if direct == "on" {
                until_taken(&mesh, service)?;
            }
            let before = counters()?;
            let share = shares(&mesh, service, &servers)?;
            let now = counters()?;
            ensure!(
                share.iter().all(|n| (n - mean).abs() <= 5.0 * deviation),
                "{service}, direct {direct}: {share:?}, and not {mean} +- {deviation}"
            );
            let near: f64 = share[..here].iter().sum();
            let drawn = if direct == "on" { [near, all - near] } else { [0.0, 0.0] };
            assert_eq!([now[0] - before[0], now[1] - before[1]], drawn, "{service}, {direct}");
        }
    }
    Ok(())
}

#[test]
fn pod_that_takes_over_an_address_inherits_nothing() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    for to in [mesh.service("a").v4(80), mesh.pod("a2").v4(8080)] {
        until_direct(mesh.pod("a1"), to, &server)?;
    }
    let mut open = until_direct(mesh.pod("a1"), mesh.pod("a2").v4(8080), &server)?;
    // The same namespace and address under another UID: all that a successor could have in common.
    let successor = mesh.manifests().dir().join("pod-default-a2.yaml");
    let text = fs::read_to_string(&successor)?;
    let uid = mesh.pod("a2").uid();
    ensure!(text.contains(uid), "{text}");
    let change = Change::begin(&mesh);
    mesh.manifests().write("pod-default-a2", &text.replace(uid, "5ucce550-0000"))?;
    ensure!(is_reset(&mut open), "the connection to the pod before is ended");
    let took = change.since_read(&mesh, SystemTime::now())?;
    ensure!(took < Duration::from_secs(1), "ended after {took:?}");
    let denied = [("way", "direct"), ("reason", "denied"), ("response_flags", "DENY")];
    mesh.agent("a").wait_for_record(&denied)?;
    wait::until(wait::SOON, "the server to see it", || {
        server.outcomes().iter().any(Result::is_err)
    })?;
    let slice = fs::read_to_string(mesh.manifests().dir().join("service-default-a.yaml"))?;
    mesh.manifests().write("service-default-a", &slice.replace(uid, "5ucce550-0000"))?;
    // Until then the service is one of a stranger, and its address no destination of the mesh.
    wait::until(wait::SOON, "the successor behind the service", || {
        let services = mesh.agent("a").ask(&["services"]).unwrap_or_default();
        let mut all = services.as_array().into_iter().flatten();
        all.any(|one| one["service"] == "a" && one["enrolled"] == 2)
    })?;
    let stale = kernel(&mesh, "direct_stale")?;
    for to in [mesh.service("a").v4(80), mesh.pod("a2").v4(8080)] {
        let (_, direct) = connect(mesh.pod("a1"), to, &server)?;
        assert!(!direct, "{to}: decided anew");
        until_direct(mesh.pod("a1"), to, &server)?;
    }
    ensure!(kernel(&mesh, "direct_stale")? > stale, "the old verdict did not hold");
    Ok(())
}

/// Exchanges until the connection is reset; says when that was.
fn talk(mut stream: TcpStream) -> Result<SystemTime> {
    loop {
        if let Err(error) = exchange(&mut stream, &[7; 30_000]) {
            let ended = SystemTime::now();
            let error = error.downcast::<std::io::Error>()?;
            let kind = error.kind();
            ensure!(matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
            return Ok(ended);
        }
    }
}

#[test]
fn connection_of_a_deleted_pod_is_ended() -> Result<()> {
    harness::require!();
    for gone in ["a1", "a2"] {
        let mesh = Mesh::two_nodes()?;
        let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
        let dial =
            |family| until_direct(mesh.pod("a1"), mesh.service("a").addr(family, 80), &server);
        let mut idle = Family::BOTH.map(dial).into_iter().collect::<Result<Vec<_>>>()?;
        let busy = Family::BOTH.map(dial).into_iter().collect::<Result<Vec<_>>>()?;
        let clients = idle.iter().chain(&busy).map(TcpStream::local_addr);
        let clients = clients.collect::<Result<Vec<_>, _>>()?;
        let busy: Vec<_> = busy.into_iter().map(|stream| thread::spawn(|| talk(stream))).collect();
        let change = Change::begin(&mesh);
        mesh.delete_pod_manifest(gone)?;
        let was_reset = idle.iter_mut().all(is_reset);
        let mut took = vec![change.since_read(&mesh, SystemTime::now())?];
        ensure!(was_reset, "{gone} is gone and a connection is not");
        for busy in busy {
            let ended = busy.join().unwrap_or_else(|panic| resume_unwind(panic))?;
            took.push(change.since_read(&mesh, ended)?);
        }
        ensure!(took.iter().all(|took| *took < Duration::from_secs(1)), "{gone}: {took:?}");
        for client in clients {
            let client = client.to_string();
            let denied = [("src.addr", client.as_str()), ("way", "direct"), ("reason", "denied")];
            mesh.agent("a").wait_for_record(&denied)?;
        }
    }
    Ok(())
}

#[test]
fn leaving_the_mesh_cuts_nothing() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    let mut open = until_direct(mesh.pod("a1"), mesh.service("a").v4(80), &server)?;
    for pod in ["a1", "a2"] {
        mesh.enrol(pod, false)?;
        exchange(&mut open, b"still here")?;
    }
    Ok(())
}

#[test]
fn server_that_leaves_the_mesh_is_connected_to_by_no_verdict() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    // Without the mesh a service's address leads nowhere here.
    for to in Family::BOTH.map(|family| mesh.pod("a2").addr(family, 8080)) {
        drop(until_direct(mesh.pod("a1"), to, &server)?);
    }
    mesh.enrol("a2", false)?;
    let taken = kernel(&mesh, "direct_taken")?;
    for to in Family::BOTH.map(|family| mesh.pod("a2").addr(family, 8080)) {
        for _ in 0..5 {
            exchange(&mut mesh.pod("a1").connect(to)?, b"not of the mesh any more")?;
        }
    }
    assert_eq!(kernel(&mesh, "direct_taken")?, taken);
    Ok(())
}

/// What is open was allowed to the one that its pod was then.
#[test]
fn verdict_ends_with_the_identity_of_either_end() -> Result<()> {
    harness::require!();
    for pod in ["a1", "a2"] {
        let mesh = Mesh::two_nodes()?;
        let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
        let to = mesh.service("a").v4(80);
        let mut open = until_direct(mesh.pod("a1"), to, &server)?;
        let stale = kernel(&mesh, "direct_stale")?;
        let name = format!("pod-default-{pod}");
        let manifest = fs::read_to_string(mesh.manifests().dir().join(format!("{name}.yaml")))?;
        let account = |name: &str| format!("serviceAccountName: \"{name}\"");
        mesh.manifests().write(&name, &manifest.replace(&account(pod), &account("other")))?;
        wait::until(wait::SOON, "the verdict to end", || {
            connect(mesh.pod("a1"), to, &server).is_ok()
                && kernel(&mesh, "direct_stale").is_ok_and(|now| now > stale)
        })?;
        exchange(&mut open, b"still here")?;
        drop(until_direct(mesh.pod("a1"), to, &server)?);
        let identity = mesh.pod(pod).identity().replace(&format!("/sa/{pod}"), "/sa/other");
        let key = if pod == "a1" { "src.identity" } else { "dst.identity" };
        mesh.agent("a").wait_for_record(&[("way", "direct"), (key, &identity)])?;
    }
    Ok(())
}

#[test]
fn pod_that_takes_all_verdicts_gives_way_to_others() -> Result<()> {
    harness::require!();
    let mesh =
        Mesh::two_nodes_builder().pod(PodSpec::new("a3", "a")).flag("--max-verdicts=4").start()?;
    let pod = mesh.pod("a2");
    let servers: Vec<_> =
        (8080..8086).map(|port| pod.serve(port, Serve::Echo)).collect::<Result<_>>()?;
    let ports = 8080u16..;
    for (port, server) in ports.zip(&servers).take(4) {
        until_direct(mesh.pod("a1"), pod.v4(port), server)?;
    }
    for _ in 0..10 {
        let (_, direct) = connect(mesh.pod("a1"), pod.v4(8084), &servers[4])?;
        ensure!(!direct, "its own gives no way");
    }
    until_direct(mesh.pod("a3"), pod.v4(8085), &servers[5])?;
    // The one that gave way was its oldest.
    for (port, server) in (8081..8084).zip(&servers[1..]) {
        let (_, direct) = connect(mesh.pod("a1"), pod.v4(port), server)?;
        ensure!(direct, "{port}");
    }
    assert_eq!(mesh.agent("a").ask(&["status"])?["verdicts"], 4);
    Ok(())
}

#[test]
fn verdict_that_does_not_fit_is_carried() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder().flag("--max-verdicts=1").start()?;
    let server = mesh.pod("a2").serve(8080, Serve::Echo)?;
    until_direct(mesh.pod("a1"), mesh.service("a").v4(80), &server)?;
    for _ in 0..10 {
        let (_, direct) = connect(mesh.pod("a1"), mesh.pod("a2").v4(8080), &server)?;
        ensure!(!direct, "one verdict has room");
    }
    wait::until(wait::SOON, "the log", || mesh.agent("a").log().contains("--max-verdicts"))?;
    // One that does not hold any more makes room.
    mesh.endpoints("a", &["b1"])?;
    until_direct(mesh.pod("a1"), mesh.pod("a2").v4(8080), &server)?;
    Ok(())
}
