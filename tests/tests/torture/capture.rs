//! Pods with the same ports, and pods that take over others' addresses.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use harness::{
    Carrier, Family, Load, Mesh, Pod, PodSpec, Serve, exchange, linger_zero, long, wait,
};
use socket2::{Domain, Socket, Type};

use crate::{is_honest, joined, mesh};

/// A connection of `pod` from a port of the test's choice.
fn connect_from(pod: &Pod, port: u16, to: SocketAddr) -> Result<TcpStream> {
    let connected = pod.run(|| {
        let (domain, family) =
            if to.is_ipv4() { (Domain::IPV4, Family::V4) } else { (Domain::IPV6, Family::V6) };
        let socket = Socket::new(domain, Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&pod.addr(family, port).into())?;
        socket.connect(&to.into())?;
        socket.set_read_timeout(Some(wait::SOON))?;
        Ok(TcpStream::from(socket))
    });
    connected.with_context(|| format!("{} from port {port} to {to}", pod.name()))
}

#[test]
fn one_source_port_leads_to_several_destinations_at_once() -> Result<()> {
    harness::require!();
    let mut mesh = mesh(Carrier::Auto)?;
    let served = [("b1", "b1"), ("b2", "b2"), ("a2", "a2")];
    let _servers = served.map(|(pod, name)| mesh.pod(pod).serve(8080, Serve::Greet(name)).unwrap());
    // All of them wait to be accepted at the same moment.
    mesh.agent_mut("a").signal(libc::SIGSTOP)?;
    let mut streams = Vec::new();
    for from in ["a1", "a2"] {
        for to in ["b1", "b2"] {
            for family in Family::BOTH {
                let addr = mesh.pod(to).addr(family, 8080);
                streams.push((to, connect_from(mesh.pod(from), 11_000, addr)?));
            }
        }
    }
    mesh.agent_mut("a").signal(libc::SIGCONT)?;
    for (to, mut stream) in streams {
        let mut name = [0; 2];
        stream.read_exact(&mut name).context(to)?;
        assert_eq!(&name, to.as_bytes(), "another destination than the one that was asked for");
    }
    Ok(())
}

/// Tells its name, what it was sent, and from which address, for as long as it is asked.
fn introduce(name: &'static str) -> Serve {
    Serve::custom(move |mut stream| {
        let IpAddr::V6(from) = stream.peer_addr()?.ip() else {
            anyhow::bail!("the listener is of both families");
        };
        let mut token = [0; 8];
        // Whoever asked ends it.
        while stream.read_exact(&mut token).is_ok() {
            stream.write_all(&[name.as_bytes(), &token, &from.octets()].concat())?;
        }
        Ok(())
    })
}

#[test]
fn ten_thousand_connections_with_the_same_source_ports_are_never_mixed_up() -> Result<()> {
    harness::require!();
    never_mixed_up(&mesh(Carrier::Lane)?, ["a1", "a2"], ["b1", "b2"], 5000)
}

#[test]
fn connections_with_the_same_source_ports_are_never_mixed_up_over_quic_and_directly() -> Result<()>
{
    harness::require!();
    let quic = mesh(Carrier::Quic)?;
    never_mixed_up(&quic, ["a1", "a2"], ["b1", "b2"], long::either(700, 5000))?;
    let pods = ["b3", "b4"].map(|name| PodSpec::new(name, "b"));
    let builder = pods.into_iter().fold(Mesh::two_nodes_builder(), |builder, pod| builder.pod(pod));
    let mesh = builder.start()?;
    let ports = long::either(1200, 5000);
    never_mixed_up(&mesh, ["b1", "b2"], ["b3", "b4"], ports)?;
    let direct = mesh.agent("b").metric("mesh_capture_total", &[("event", "direct_taken")])?;
    ensure!(direct > f64::from(ports) * 5.0 / 3.0, "hardly any went directly: {direct}");
    Ok(())
}

/// From as many ports of two pods at once, with hundreds of them open at a time.
fn never_mixed_up(
    mesh: &Mesh,
    clients: [&str; 2],
    servers: [&'static str; 2],
    ports: u16,
) -> Result<()> {
    /// Below the ports that the kernel gives to listeners and connections.
    const FIRST: u16 = 10_000;
    const THREADS: usize = 3;
    const OPEN: usize = 200;
    let _servers = servers
        .map(|name| mesh.pod(name).serve(8080, introduce(name)))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let run = |from: &Pod, number: usize, first: usize| -> Result<()> {
        let mut open = VecDeque::new();
        for port in (FIRST..FIRST + ports).skip(first).step_by(THREADS) {
            // One port leads each pod elsewhere at the same time, and the next one the other way round.
            let to = servers[(usize::from(port) + number) % 2];
            let family = Family::BOTH[usize::from(port) / 2 % 2];
            let mut stream = connect_from(from, port, mesh.pod(to).addr(family, 8080))?;
            let mut token = [0; 8];
            token[0] = u8::try_from(number)?;
            token[1..3].copy_from_slice(&port.to_be_bytes());
            let client = match from.ip(family) {
                IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                IpAddr::V6(v6) => v6,
            };
            let expected = [to.as_bytes(), &token, &client.octets()].concat();
            is_as_expected(&mut stream, token, &expected)
                .with_context(|| from.name().to_owned())?;
            open.push_back((stream, token, expected));
            // When many others have come since.
            if open.len() > OPEN
                && let Some((mut stream, token, expected)) = open.pop_front()
            {
                is_as_expected(&mut stream, token, &expected)
                    .with_context(|| from.name().to_owned())?;
            }
        }
        Ok(())
    };
    let run = &run;
    thread::scope(|scope| {
        let all = (0..2 * THREADS).map(|thread| {
            let pod = mesh.pod(clients[thread % 2]);
            scope.spawn(move || run(pod, thread % 2, thread / 2))
        });
        let all: Vec<_> = all.collect();
        all.into_iter().try_for_each(joined)
    })
}

fn is_as_expected(stream: &mut TcpStream, token: [u8; 8], expected: &[u8]) -> Result<()> {
    stream.write_all(&token)?;
    let mut answer = [0; 26];
    stream.read_exact(&mut answer).with_context(|| format!("{token:?}"))?;
    ensure!(answer[..] == *expected, "{answer:?} and not {expected:?}");
    Ok(())
}

/// Two pods on node b take turns at being the one with b1's address: each has a namespace, a server and
/// an identity of its own.
#[test]
fn address_that_changes_hands_under_load_is_never_another_pods() -> Result<()> {
    harness::require!();
    for carrier in Carrier::BOTH {
        let mesh = mesh(carrier)?;
        let (to, agent) = (mesh.pod("b1").v4(8080), mesh.agent("a"));
        let _servers =
            ["b1", "b2"].map(|name| mesh.pod(name).serve(8080, introduce(name)).unwrap());
        for family in ["-4", "-6"] {
            let ip = if family == "-4" { to.ip() } else { mesh.pod("b1").v6_ip().into() };
            let add = [family, "addr", "add", &ip.to_string(), "dev", "lo"];
            mesh.pod("b2").succeed("ip", &add)?;
        }
        let file = |pod: &str| mesh.manifests().dir().join(format!("pod-default-{pod}.yaml"));
        let one = fs::read_to_string(file("b1"))?;
        // b2's identity, UID and namespace with b1's address.
        let other = fs::read_to_string(file("b2"))?
            .replace(&mesh.pod("b2").v4(0).ip().to_string(), &to.ip().to_string())
            .replace(&mesh.pod("b2").v6_ip().to_string(), &mesh.pod("b1").v6_ip().to_string());
        mesh.delete_pod_manifest("b2")?;

        let (stop, next) = (AtomicBool::new(false), AtomicU16::new(10_000));
        // Who answered whom, by the client's source port, which is used once.
        let answers = Mutex::new(HashMap::new());
        let ask = || -> Result<()> {
            while !stop.load(Ordering::Acquire) {
                let port = next.fetch_add(1, Ordering::AcqRel);
                ensure!(port < 32_000, "more connections than ports");
                let answer = connect_from(mesh.pod("a1"), port, to).and_then(|mut stream| {
                    let mut answer = [0; 26];
                    stream.write_all(&u64::from(port).to_be_bytes())?;
                    stream.read_exact(&mut answer)?;
                    linger_zero(&stream)?;
                    Ok(answer)
                });
                match answer {
                    Ok(answer) => {
                        ensure!(answer[2..10] == u64::from(port).to_be_bytes(), "another's bytes");
                        let name = String::from_utf8(answer[..2].to_vec())?;
                        answers.lock().unwrap().insert(port, name);
                    }
                    Err(error) => ensure!(is_honest(&error), "{carrier:?}: {error:#}"),
                }
            }
            Ok(())
        };
        thread::scope(|scope| {
            let asking: Vec<_> = (0..3).map(|_| scope.spawn(ask)).collect();
            let changed = (0..24).try_for_each(|turn| {
                let (name, manifest) = [("b2", &other), ("b1", &one)][turn % 2];
                mesh.manifests().write("pod-default-b1", manifest)?;
                // Until that one answers, and a few times more.
                let count = |name: &str| {
                    let answers = answers.lock().unwrap();
                    answers.values().filter(|answer| *answer == name).count()
                };
                let before = count(name);
                wait::until(wait::SOON, name, || count(name) > before + 5)
            });
            stop.store(true, Ordering::Release);
            asking.into_iter().try_for_each(|one| one.join().unwrap())?;
            changed
        })?;

        let answers = answers.into_inner()?;
        wait::until(wait::SOON, "every connection's record", || {
            agent.access_log().len() >= answers.len()
        })?;
        let mut compared = 0;
        for record in agent.access_log() {
            let from: SocketAddr = record.text("src.addr").parse()?;
            if let Some(name) = answers.get(&from.port()) {
                let identity = record.text("dst.identity");
                ensure!(identity.ends_with(&format!("/sa/{name}")), "{name} as {record:?}");
                compared += 1;
            }
        }
        ensure!(compared == answers.len(), "{compared} of {} records", answers.len());
    }
    Ok(())
}

#[test]
fn two_hundred_toggles_of_both_ends_fail_no_request() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.pod("b1").v4(8080);
    let mut held = mesh.pod("a1").connect(to)?;
    exchange(&mut held, b"before")?;
    let held = Mutex::new(held);
    Load::during(mesh.pod("a1"), to, |load| {
        // Each at its own pace, so that one is in and out while the other is in, out, and on its way.
        let toggle = &|pod: &str| {
            (0..100).try_for_each(|n| {
                mesh.enrol(pod, n % 2 == 1)?;
                exchange(&mut held.lock().unwrap(), b"an open connection is left as it is")?;
                load.wait_for(1)
            })
        };
        thread::scope(|scope| {
            let both = ["a1", "b1"].map(|pod| scope.spawn(move || toggle(pod)));
            both.into_iter().try_for_each(|one| one.join().unwrap())
        })
    })?;
    for node in ["a", "b"] {
        let refused = mesh.agent(node).metric("mesh_refusals_total", &[])?;
        ensure!(refused == 0.0, "{node}: {refused} refused");
    }
    Ok(())
}
