//! What is captured on its way out, and what is left alone.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use mesh_agent::capture::{CaptureError, Destinations, Role};
use mesh_agent::net;
use mesh_core::settings::Settings;
use socket2::{Domain, Protocol, Socket, Type};

use crate::skip;
use crate::world::*;

/// A way to connect, from the matrix of cases that must be captured.
fn captures(domain: Domain, to: &str, connect: impl FnOnce(&World, &Socket)) {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    let app = world.app(domain);
    connect(&world, &app);
    let (_agent, orig) = learn(&world, &capture, &listeners, &app);
    let canonical = SocketAddr::new(addr(to).ip().to_canonical(), addr(to).port());
    assert_eq!(orig, canonical.to_string());
    assert_eq!(peer(&app), to, "getpeername is the destination");
    let own = if canonical.is_ipv4() { ip(POD4) } else { ip(POD6) };
    assert_eq!(local(&app).ip().to_canonical(), own, "getsockname is the pod");
}

#[test]
fn v4_is_captured() {
    captures(Domain::IPV4, SERVICE4, |_, app| app.connect(&sock_addr(SERVICE4)).unwrap());
}

#[test]
fn v6_is_captured() {
    captures(Domain::IPV6, SERVICE6, |_, app| app.connect(&sock_addr(SERVICE6)).unwrap());
}

#[test]
fn v4_mapped_is_captured() {
    let mapped = "[::ffff:10.96.0.10]:80";
    captures(Domain::IPV6, mapped, |_, app| app.connect(&sock_addr(mapped)).unwrap());
}

#[test]
fn bound_socket_is_captured_and_keeps_its_port() {
    captures(Domain::IPV4, SERVICE4, |_, app| {
        app.bind(&sock_addr("10.90.0.2:40123")).unwrap();
        app.connect(&sock_addr(SERVICE4)).unwrap();
        assert_eq!(local(app).port(), 40123);
    });
}

#[test]
fn socket_bound_to_its_device_is_captured() {
    captures(Domain::IPV4, SERVICE4, |_, app| {
        app.bind_device(Some(b"eth0")).unwrap();
        app.connect(&sock_addr(SERVICE4)).unwrap();
    });
}

#[test]
fn non_blocking_connect_is_captured() {
    captures(Domain::IPV4, SERVICE4, |_, app| {
        app.set_nonblocking(true).unwrap();
        let error = app.connect(&sock_addr(SERVICE4)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS));
        let end = Instant::now() + Duration::from_secs(2);
        while app.peer_addr().is_err() {
            assert!(Instant::now() < end, "never connected");
            thread::sleep(Duration::from_millis(1));
        }
        assert!(app.take_error().unwrap().is_none());
    });
}

#[test]
fn fast_open_is_captured() {
    captures(Domain::IPV4, SERVICE4, |_, app| {
        // `sendto(MSG_FASTOPEN)` connects and sends at once.
        let sent = app.send_to_with_flags(b"hello", &sock_addr(SERVICE4), libc::MSG_FASTOPEN);
        assert_eq!(sent.unwrap(), 5);
    });
}

#[test]
fn deferred_fast_open_is_captured() {
    captures(Domain::IPV4, SERVICE4, |_, app| {
        let on: libc::c_int = 1;
        // SAFETY: the kernel reads one `int`.
        let set = unsafe {
            libc::setsockopt(
                std::os::fd::AsRawFd::as_raw_fd(app),
                libc::IPPROTO_TCP,
                libc::TCP_FASTOPEN_CONNECT,
                (&raw const on).cast(),
                4,
            )
        };
        assert_eq!(set, 0);
        app.connect(&sock_addr(SERVICE4)).unwrap();
        app.send(b"hello").unwrap();
    });
}

#[test]
fn mptcp_is_captured() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    let app = world.pod.run(|| Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)));
    let Ok(app) = app.unwrap() else {
        skip::skipped("needs a kernel with MPTCP");
        return;
    };
    app.connect(&sock_addr(SERVICE4)).unwrap();
    let (_agent, orig) = learn(&world, &capture, &listeners, &app);
    assert_eq!(orig, SERVICE4);
    assert_eq!(peer(&app), SERVICE4, "getpeername is the destination (Linux 5.19 and newer)");
    assert_eq!(local(&app).ip(), ip(POD4));
}

#[test]
fn connections_to_one_destination_take_turns_on_the_listeners() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    let apps: Vec<_> = (0..4).map(|_| world.dial(SERVICE4).unwrap()).collect();
    // Listeners are in turns of v4 and v6.
    for (index, listener) in listeners.outbound.iter().enumerate() {
        assert_eq!(listener.accept().is_ok(), index % 2 == 0, "listener {index}");
    }
    assert_eq!(apps.len(), 4);
}

#[test]
fn pods_with_the_same_addresses_and_ports_do_not_mix() {
    if !root() {
        return;
    }
    let [one, two] = [World::new(), World::new()];
    let capture = one.start();
    let services = ["10.96.0.10:80", "10.96.0.11:80"];
    let wanted = services.map(|service| addr(service).ip());
    capture.set_destinations(&HashSet::from(wanted), &HashMap::new()).unwrap();
    let settings = Settings::default();
    // Addresses of pods differ on a node; what a socket is bound to need not. The key is the namespace.
    let enrol = |world: &World, uid, own| {
        let ips = [ip(own)];
        let pod = world.pod_capture(uid, &ips, &settings);
        capture.enrol(&pod).unwrap()
    };
    run(&format!("ip -n {} addr add 10.90.0.3/24 dev eth0", two.names[0]));
    let listeners = [enrol(&one, "one", POD4), enrol(&two, "two", "10.90.0.3")];
    let mut table = capture.orig_dst_table();
    for ((world, listeners), service) in [&one, &two].into_iter().zip(&listeners).zip(services) {
        let app = world.app(Domain::IPV4);
        app.bind(&sock_addr("10.90.0.2:40999")).unwrap();
        app.connect(&sock_addr(service)).unwrap();
        let (stream, peer) = accept(&listeners.outbound);
        assert_eq!(peer, addr("10.90.0.2:40999"));
        let listener = stream.local_addr().unwrap().port();
        let (orig, _) = table.take(world.pod.cookie(), peer, listener).unwrap();
        assert_eq!(orig.to_string(), service);
    }
    let ips = [ip(POD4)];
    let shared = two.pod_capture("three", &ips, &settings);
    assert_eq!(capture.enrol(&shared).unwrap_err().reason(), "shared_address");
}

#[test]
fn what_is_not_of_the_mesh_is_left_alone() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    let outside = world.listen_outside("10.90.0.1:8080");
    let app = world.dial("10.90.0.1:8080").unwrap();
    assert_eq!(app.peer_addr().unwrap(), addr("10.90.0.1:8080"));
    accept(&outside);
    assert!(nobody(&listeners.outbound));
    assert_eq!(count(&capture, "connect_not_mesh"), 1);
    assert_eq!(count(&capture, "captured"), 0);
}

#[test]
fn pod_that_is_not_enrolled_is_left_alone() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    capture.set_destinations(&HashSet::from([ip(WORLD4)]), &HashMap::new()).unwrap();
    let outside = world.listen_outside("10.90.0.1:8080");
    // The agent has tried itself.
    let before = capture.counters();
    let _app = world.dial("10.90.0.1:8080").unwrap();
    accept(&outside);
    assert_eq!(capture.counters(), before);
}

#[test]
fn outbound_all_captures_what_is_not_of_the_mesh() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let all = settings(|settings| settings.outbound = mesh_core::settings::Outbound::All);
    let listeners = world.enrol(&capture, &all);
    let app = world.app(Domain::IPV4);
    app.connect(&sock_addr("203.0.113.9:443")).unwrap();
    assert_eq!(learn(&world, &capture, &listeners, &app).1, "203.0.113.9:443");
}

#[test]
fn destinations_that_do_not_fit_are_captured_with_everything_else() {
    if !root() {
        return;
    }
    let mut world = World::new();
    world.config.max_destinations = 2;
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    let third = "10.96.0.11:80";
    let three = [SERVICE4, SERVICE6, third].map(|service| addr(service).ip());
    match capture.set_destinations(&HashSet::from(three), &HashMap::new()).unwrap() {
        Destinations::Everything(CaptureError::Full { map, limit: 2, remedy }) => {
            assert_eq!((map, remedy), ("DESTINATIONS", "raise --max-destinations"));
        }
        other => panic!("{other:?}"),
    }
    for to in [SERVICE4, third, "203.0.113.9:443"] {
        let app = world.app(Domain::IPV4);
        app.connect(&sock_addr(to)).unwrap();
        assert_eq!(learn(&world, &capture, &listeners, &app).1, to);
    }

    // The new ones take the places of those that go.
    let two = HashSet::from([ip("10.96.0.11"), ip("10.96.0.12")]);
    assert!(matches!(
        capture.set_destinations(&two, &HashMap::new()).unwrap(),
        Destinations::Listed
    ));
    let app = world.app(Domain::IPV4);
    app.connect(&sock_addr(third)).unwrap();
    assert_eq!(learn(&world, &capture, &listeners, &app).1, third);
    let outside = world.listen_outside("10.90.0.1:8080");
    let _app = world.dial("10.90.0.1:8080").unwrap();
    accept(&outside);
}

#[test]
fn pod_reaches_itself_without_the_agent() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let all = Settings { outbound: mesh_core::settings::Outbound::All, ..strict() };
    let listeners = world.enrol(&capture, &all);
    for on in ["127.0.0.1:8080", "10.90.0.2:8081", "[::1]:8080", "[fd90::2]:8081"] {
        let app = world.listen(on);
        let _client = world.dial(on).unwrap();
        accept(&app);
    }
    // An application that binds to loopback and dials the pod's address, and the other way round, as does what
    // a pod's own rules redirect.
    for (from, to) in [
        ("127.0.0.1:0", "10.90.0.2:8082"),
        ("[::1]:0", "[fd90::2]:8082"),
        ("10.90.0.2:0", "127.0.0.1:8083"),
        ("[fd90::2]:0", "[::1]:8083"),
    ] {
        let app = world.listen(to);
        let client = world.app(Domain::for_address(addr(to)));
        client.bind(&sock_addr(from)).unwrap();
        client.connect(&sock_addr(to)).unwrap();
        assert_eq!(accept(&app).1.ip(), addr(from).ip());
    }
    assert!(nobody(&listeners.outbound) && nobody(&listeners.inbound));
}

#[test]
fn listeners_of_the_agent_cannot_be_dialled() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    for listener in &listeners.outbound {
        let to = listener.local_addr().unwrap().to_string();
        let error = world.dial(&to).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{to} from inside");
        let error = world.dial_in(&to).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "{to} from outside");
    }
    assert_eq!(count(&capture, "connect_own_listener"), 8);
    assert_eq!(count(&capture, "lookup_own_listener"), 8);
}

#[test]
fn skipped_ports_and_blocks_are_left_alone() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    capture.set_destinations(&HashSet::from([ip(WORLD4), ip(WORLD6)]), &HashMap::new()).unwrap();
    let skip = settings(|settings| {
        settings.skip_outbound_ports = "1,2,3306,9000-9100".parse().unwrap();
        settings.skip_outbound_cidrs = vec!["fd90::/64".parse().unwrap()];
    });
    let listeners = world.enrol(&capture, &skip);
    for to in ["10.90.0.1:9050", "10.90.0.1:3306", "[fd90::1]:80"] {
        let outside = world.listen_outside(to);
        let _app = world.dial(to).unwrap();
        accept(&outside);
    }
    assert!(nobody(&listeners.outbound));
    assert_eq!(count(&capture, "connect_skipped_port"), 2);
    assert_eq!(count(&capture, "connect_skipped_cidr"), 1);
    let app = world.app(Domain::IPV4);
    app.connect(&sock_addr("10.90.0.1:9101")).unwrap();
    assert_eq!(learn(&world, &capture, &listeners, &app).1, "10.90.0.1:9101");

    capture.update(UID, &Settings::default()).unwrap();
    let app = world.app(Domain::IPV6);
    app.connect(&sock_addr("[fd90::1]:80")).unwrap();
    assert_eq!(learn(&world, &capture, &listeners, &app).1, "[fd90::1]:80");
}

#[test]
fn blocks_of_an_earlier_agent_end_with_its_settings() {
    if !root() {
        return;
    }
    let world = World::new();
    let start = |block: &str| {
        let capture = world.start();
        capture
            .set_destinations(&HashSet::from([ip(WORLD4), ip(WORLD6)]), &HashMap::new())
            .unwrap();
        let skip = settings(|settings| {
            settings.skip_outbound_cidrs = vec![block.parse().unwrap()];
        });
        let listeners = world.enrol(&capture, &skip);
        (capture, listeners)
    };
    drop(start("10.90.0.0/24"));
    // The manifest has changed while no agent ran.
    let (capture, listeners) = start("::/0");
    let app = world.app(Domain::IPV4);
    app.connect(&sock_addr("10.90.0.1:80")).unwrap();
    assert_eq!(learn(&world, &capture, &listeners, &app).1, "10.90.0.1:80");
    let outside = world.listen_outside("[fd90::1]:80");
    let _app = world.dial("[fd90::1]:80").unwrap();
    accept(&outside);
    assert!(nobody(&listeners.outbound));
}

#[test]
fn sockets_of_the_agent_are_not_captured() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    capture.set_destinations(&HashSet::from([ip(WORLD4)]), &HashMap::new()).unwrap();
    let listeners = world.enrol(&capture, &Settings::default());
    let outside = world.listen_outside("10.90.0.1:8080");
    let to = addr("10.90.0.1:8080");
    let before = count(&capture, "connect_agent");
    let _stream =
        block_on(net::pass_through(&world.pod, to, |socket| capture.exempt(socket, Role::Agent)))
            .unwrap();
    accept(&outside);
    assert!(nobody(&listeners.outbound));
    assert_eq!(count(&capture, "connect_agent"), before + 1);
}
