//! What comes in is steered, refused or delivered.

use std::io;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use mesh_agent::capture::Role;
use mesh_agent::net;
use mesh_core::settings::Settings;
use socket2::{Domain, Socket, Type};

use crate::world::*;

#[test]
fn what_comes_in_is_steered_with_both_addresses() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    for (to, from) in [("10.90.0.2:8080", WORLD4), ("[fd90::2]:9999", WORLD6)] {
        let client = world.dial_in(to).unwrap();
        let (agent, peer) = accept(&listeners.inbound);
        assert_eq!(agent.local_addr().unwrap(), addr(to));
        assert_eq!(peer, client.local_addr().unwrap());
        assert_eq!(peer.ip(), ip(from));
    }
    assert_eq!(count(&capture, "lookup_steered"), 2);
}

#[test]
fn plain_text_in_strict_mode_is_refused_at_once() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let strict = settings(|settings| {
        settings.mode = mesh_core::settings::Mode::Strict;
        settings.skip_inbound_ports = "9090".parse().unwrap();
    });
    let listeners = world.enrol(&capture, &strict);
    let app = world.listen("0.0.0.0:8080");
    let started = Instant::now();
    for to in ["10.90.0.2:8080", "[fd90::2]:8080"] {
        let error = world.dial_in(to).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
    assert!(nobody(&app) && nobody(&listeners.inbound));
    assert_eq!(count(&capture, "lookup_strict"), 2);

    let metrics = world.listen("0.0.0.0:9090");
    let _scrape = world.dial_in("10.90.0.2:9090").unwrap();
    accept(&metrics);
}

/// The API tells one address of each family, and a pod may have more.
#[test]
fn strict_pod_gets_no_plain_text_at_its_other_addresses_either() {
    if !root() {
        return;
    }
    let world = World::new();
    let [pod, outside] = &world.names;
    run(&format!("ip -n {pod} addr add 10.90.0.7/24 dev eth0"));
    run(&format!("ip -n {pod} addr add fe80::2/64 dev eth0 nodad"));
    run(&format!("ip -n {outside} addr add fe80::1/64 dev eth0 nodad"));
    let others = ["10.90.0.7:8080".to_owned(), format!("[fe80::2%{}]:8080", eth0_of(outside))];
    let capture = world.start();
    let listeners = world.enrol(&capture, &strict());
    let app = world.listen("[::]:8080");
    let refuses = || {
        for to in &others {
            let error = world.dial_in(to).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{to}");
        }
    };
    refuses();
    assert_eq!(count(&capture, "lookup_strict_elsewhere"), 2);
    // The pod itself gets there.
    let client = world.app(Domain::IPV4);
    client.bind(&sock_addr("10.90.0.7:0")).unwrap();
    client.connect(&sock_addr("10.90.0.7:8080")).unwrap();
    accept(&app);

    capture.update(UID, &Settings::default()).unwrap();
    for to in &others {
        let _client = world.dial_in(to).unwrap();
        accept(&app);
    }
    capture.update(UID, &strict()).unwrap();
    refuses();
    assert_eq!(count(&capture, "lookup_strict_elsewhere"), 4);
    assert!(nobody(&app) && nobody(&listeners.inbound));
}

/// The agent is told an address a moment before it enrols the pod with it.
#[test]
fn strict_pod_gets_deliveries_at_an_address_that_it_is_not_enrolled_with_yet() {
    if !root() {
        return;
    }
    let world = World::new();
    run(&format!("ip -n {} addr add 10.90.0.7/24 dev eth0", world.names[0]));
    let capture = world.start();
    let _listeners = world.enrol(&capture, &strict());
    let app = world.listen("10.90.0.7:8080");
    let client = Some(SocketAddr::new(ip(WORLD4), 40000));
    let delivered = block_on(net::deliver(&world.pod, addr("10.90.0.7:8080"), client, |socket| {
        capture.exempt(socket, Role::Deliver)
    }))
    .unwrap();
    let (taken, peer) = accept(&app);
    assert_eq!(peer, delivered.local_addr().unwrap());
    assert_eq!(peer.ip(), ip(WORLD4), "with the client's address");
    assert_eq!(count(&capture, "lookup_delivery"), 1);

    // What it announced lets nobody else in: from no other port, and not later.
    let refused = || {
        let error = world.dial_in("10.90.0.7:8080").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    };
    refused();
    drop((delivered, taken));
    thread::sleep(Duration::from_millis(1200));
    refused();
    let same = world.world.run(|| Socket::new(Domain::IPV4, Type::STREAM, None)).unwrap().unwrap();
    same.bind(&peer.into()).unwrap();
    let error = same.connect(&sock_addr("10.90.0.7:8080")).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(count(&capture, "lookup_strict_elsewhere"), 3);
}

/// The index of `eth0` in the namespace of this name.
fn eth0_of(name: &str) -> u32 {
    let shown = Command::new("ip").args(["-n", name, "-o", "link", "show", "eth0"]).output();
    let shown = String::from_utf8(shown.unwrap().stdout).unwrap();
    shown.split(':').next().unwrap().trim().parse().unwrap()
}

#[test]
fn refusal_in_the_kernel_is_told_with_both_ends_and_at_a_bounded_rate() {
    if !root() {
        return;
    }
    let world = World::new();
    // The ring is the last agent's: one that reads its own must not hear the one before.
    drop(world.start());
    let capture = world.start();
    let strict = settings(|settings| settings.mode = mesh_core::settings::Mode::Strict);
    let _listeners = world.enrol(&capture, &strict);

    let said = Said::default();
    let writer = said.clone();
    let events = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
    let _here = tracing::subscriber::set_default(events);
    let (log, again) = (capture.take_log().unwrap(), capture.take_log());
    assert!(again.is_none(), "one reader");
    block_on(async {
        let follow = std::pin::pin!(log.follow());
        let told = async {
            world.dial_in("[fd90::2]:8080").unwrap_err();
            while !said.text().contains("fd90::2") {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            for _ in 0..100 {
                world.dial_in("10.90.0.2:8080").unwrap_err();
            }
            while !said.text().contains("10.90.0.2") {
                world.dial_in("10.90.0.2:8080").unwrap_err();
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            ended = follow => panic!("{ended:?}"),
            done = tokio::time::timeout(Duration::from_secs(10), told) => {
                done.unwrap_or_else(|_late| panic!("{}", said.text()));
            }
        }
    });
    let text = said.text();
    assert!(text.contains("plain text to a strict pod"), "{text}");
    assert!(text.contains("[fd90::1]:") && text.contains("to [fd90::2]:8080"), "{text}");
    assert!(text.contains("10.90.0.1") && text.contains("10.90.0.2]:8080"), "{text}");
    let refused = usize::try_from(count(&capture, "lookup_strict")).unwrap();
    assert!(refused > 100 && text.lines().count() < refused / 2, "{refused} refused:\n{text}");
}

/// What the agent's log says.
#[derive(Clone, Default)]
struct Said(std::sync::Arc<Mutex<Vec<u8>>>);

impl Said {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl io::Write for Said {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Delivers to an application at `to`, with `client`'s address, and exchanges bytes.
fn delivers(to: &str, client: Option<&str>, seen: &str) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let strict = settings(|settings| settings.mode = mesh_core::settings::Mode::Strict);
    let listeners = world.enrol(&capture, &strict);
    // Enrolment has done it; once more must be fine.
    net::add_client_address_routes(&world.pod, &[ip(POD4), ip(POD6)]).unwrap();
    let app = world.listen(to);
    block_on(async {
        let client = client.map(|client| SocketAddr::new(ip(client), 40000));
        let deliver = net::deliver(&world.pod, addr(to), client, |socket| {
            capture.exempt(socket, Role::Deliver)
        });
        let limit = Duration::from_secs(2);
        let mut agent = tokio::time::timeout(limit, deliver).await.expect("in time").unwrap();
        let (mut app, peer) = accept(&app);
        assert_eq!(peer.ip(), ip(seen));
        io::Write::write_all(&mut app, b"pong").unwrap();
        let mut read = [0; 4];
        tokio::time::timeout(limit, agent.read_exact(&mut read)).await.unwrap().unwrap();
        agent.write_all(b"ping").await.unwrap();
        io::Read::read_exact(&mut app, &mut read).unwrap();
        assert_eq!(&read, b"ping");
    });
    assert!(nobody(&listeners.inbound) && nobody(&listeners.outbound));
    assert_eq!(count(&capture, "lookup_delivery") + count(&capture, "lookup_self"), 1);

    net::remove_client_address_routes(&world.pod).unwrap();
    let rules = Command::new("ip").args(["-n", &world.names[0], "rule"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&rules.stdout).contains("fwmark"));
}

#[test]
fn delivery_keeps_the_clients_v4_address() {
    delivers("10.90.0.2:8080", Some("10.244.7.9"), "10.244.7.9");
}

#[test]
fn delivery_keeps_the_clients_v6_address() {
    delivers("[fd90::2]:8080", Some("fd44:7::9"), "fd44:7::9");
}

#[test]
fn delivery_without_the_clients_address_comes_from_the_pod() {
    delivers("10.90.0.2:8080", None, POD4);
}

#[test]
fn delivery_as_the_pod_itself_reaches_the_application() {
    delivers("10.90.0.2:8080", Some(POD4), POD4);
}

#[test]
fn announced_tuple_does_not_let_others_in() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let strict = settings(|settings| settings.mode = mesh_core::settings::Mode::Strict);
    let _listeners = world.enrol(&capture, &strict);
    let app = world.listen("10.90.0.2:8080");
    let client = Some(SocketAddr::new(ip(WORLD4), 40000));
    let delivered = block_on(net::deliver(&world.pod, addr("10.90.0.2:8080"), client, |socket| {
        capture.exempt(socket, Role::Deliver)
    }))
    .unwrap();
    let from = delivered.local_addr().unwrap();
    drop((delivered, accept(&app)));
    // The grace after the handshake.
    thread::sleep(Duration::from_millis(1200));

    let client =
        world.world.run(|| Socket::new(Domain::IPV4, Type::STREAM, None)).unwrap().unwrap();
    client.bind(&from.into()).unwrap();
    let error = client.connect(&sock_addr("10.90.0.2:8080")).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(count(&capture, "lookup_strict"), 1);
}
