//! Pods come in and leave, and their agent goes silent.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::mem;
use std::net::{SocketAddr, TcpListener};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use mesh_agent::capture::{Capture, CaptureError, Listeners, PodCapture};
use mesh_core::settings::Settings;
use socket2::Domain;

use crate::world::*;

/// What it delivers would be captured again, and again.
#[test]
fn agent_that_is_not_below_its_cgroup_does_not_start() {
    if !root() {
        return;
    }
    let mut world = World::new();
    let elsewhere = world.config.cgroup.join("pods");
    fs::create_dir(&elsewhere).unwrap();
    let below = mem::replace(&mut world.config.cgroup, elsewhere.clone());
    let error = Capture::start(&world.config).expect_err("it captures what it delivers");
    assert!(matches!(error, CaptureError::Outside { .. }), "{}", chain(&error));
    // Where it is below, it does.
    world.config.cgroup = below;
    drop(world.start());
    drop(world);
    fs::remove_dir(elsewhere).unwrap();
}

#[test]
fn fifty_toggles_fail_no_connection() {
    use std::sync::atomic::{AtomicBool, AtomicU64};

    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    capture.set_destinations(&HashSet::from([ip(WORLD4)]), &HashMap::new()).unwrap();
    let outside = world.listen_outside("10.90.0.1:8080");
    let enrolled: Mutex<Vec<Listeners>> = Mutex::default();
    let stop = AtomicBool::new(false);
    let (connected, accepted) = (AtomicU64::new(0), AtomicU64::new(0));
    // Two more have ended, so one has happened wholly in the present state.
    let one_more = || {
        let before = connected.load(Ordering::Relaxed);
        let deadline = Instant::now() + Duration::from_secs(10);
        while connected.load(Ordering::Relaxed) < before + 2 {
            if Instant::now() > deadline {
                stop.store(true, Ordering::Relaxed);
                panic!("nothing connects any more");
            }
            thread::yield_now();
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            // Closing is a reset, which must not meet a client that is still inside connect().
            let mut last = None;
            while !stop.load(Ordering::Relaxed) {
                let enrolled = enrolled.lock().unwrap();
                // Who left a moment ago may still get one.
                let inside = enrolled.iter().rev().take(2).flat_map(|pod| &pod.outbound);
                for stream in inside.chain(&outside).filter_map(|listener| listener.accept().ok()) {
                    last = Some(stream);
                    accepted.fetch_add(1, Ordering::Relaxed);
                }
                drop(enrolled);
                thread::yield_now();
            }
            drop(last);
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let stream = world.dial("10.90.0.1:8080").unwrap();
                let number = connected.fetch_add(1, Ordering::Relaxed) + 1;
                // In step, or the queues would fill up on a busy machine.
                while accepted.load(Ordering::Relaxed) < number && !stop.load(Ordering::Relaxed) {
                    thread::yield_now();
                }
                drop(stream);
            }
        });
        for _ in 0..50 {
            let listeners = world.enrol(&capture, &Settings::default());
            enrolled.lock().unwrap().push(listeners);
            one_more();
            capture.leave(UID).unwrap();
            one_more();
        }
        stop.store(true, Ordering::Relaxed);
    });
    let (captured, connected) = (count(&capture, "captured"), connected.load(Ordering::Relaxed));
    assert!(captured >= 50 && captured + 50 <= connected, "{captured} of {connected} captured");
}

#[test]
fn pod_that_leaves_is_left_alone_and_its_connections_live() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    capture.set_destinations(&HashSet::from([ip(WORLD4)]), &HashMap::new()).unwrap();
    let listeners = world.enrol(&capture, &Settings::default());
    let app = world.app(Domain::IPV4);
    app.connect(&sock_addr("10.90.0.1:8080")).unwrap();
    let (mut agent, _) = learn(&world, &capture, &listeners, &app);

    capture.leave(UID).unwrap();
    let outside = world.listen_outside("10.90.0.1:8080");
    let _direct = world.dial("10.90.0.1:8080").unwrap();
    accept(&outside);
    let own = world.listen("0.0.0.0:8080");
    let _into = world.dial_in("10.90.0.2:8080").unwrap();
    accept(&own);
    assert_eq!(peer(&app), "10.90.0.1:8080");
    io::Write::write_all(&mut agent, b"still").unwrap();
    let mut read = [0; 5];
    io::Read::read_exact(&mut &app, &mut read).unwrap();
    assert_eq!(&read, b"still");
    assert!(capture.leave(UID).is_err(), "not enrolled any more");
}

#[test]
fn without_an_agent_connections_fail_at_once() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    drop(world.enrol(&capture, &Settings::default()));
    drop(capture);
    let _app = world.listen("0.0.0.0:8080");
    let started = Instant::now();
    let out = world.dial(SERVICE4).unwrap_err();
    let into = world.dial_in("10.90.0.2:8080").unwrap_err();
    assert_eq!(out.kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(into.kind(), io::ErrorKind::ConnectionRefused);
    assert!(started.elapsed() < Duration::from_millis(200), "{:?}", started.elapsed());
}

/// A connection that has the port which it goes to, at the same address, is TCP's simultaneous open: with itself.
#[test]
fn without_an_agent_no_connection_is_to_itself() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
    let ports: Vec<_> = listeners.outbound.iter().map(port).collect();
    assert!(ports.len() > 2, "of both families: {ports:?}");
    drop(listeners);
    drop(capture);
    let denied = |to: &str, domain: Domain, own: &str, port: u16| {
        let app = world.app(domain);
        app.set_reuse_address(true).unwrap();
        app.bind(&SocketAddr::new(ip(own), port).into()).unwrap();
        let refused = app.connect(&sock_addr(to)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "from {port}");
    };
    for port in ports {
        denied(SERVICE4, Domain::IPV4, POD4, port);
        denied(SERVICE6, Domain::IPV6, POD6, port);
    }
}

/// The kernel gives a dead agent's port to whoever asks for it, and any program of the pod may.
#[test]
fn whoever_has_a_dead_agents_port_gets_nothing_that_others_connect() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    let addrs: Vec<_> =
        listeners.outbound.iter().map(|listener| listener.local_addr().unwrap()).collect();
    assert_eq!(addrs.len(), 8, "four of each family: {addrs:?}");
    drop(listeners);
    // What is refused takes no turn: all ask for the same listener, so all of them are taken, at first at the very
    // address and then at all addresses of both families.
    let very: Vec<String> = addrs.iter().map(SocketAddr::to_string).collect();
    let all: HashSet<String> = addrs.iter().map(|addr| format!("[::]:{}", addr.port())).collect();
    for taken in [very, all.into_iter().collect()] {
        let others: Vec<_> = taken.iter().map(|addr| world.listen(addr)).collect();
        let before = count(&capture, "connect_no_listener");
        for service in [SERVICE4, SERVICE6, "[::ffff:10.96.0.10]:80"] {
            let refused = world.dial(service).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "{service}");
        }
        assert_eq!(count(&capture, "connect_no_listener"), before + 3);
        assert!(others.iter().all(|other| nobody(other)));
    }

    // The next agent's are its own again.
    let listeners = world.enrol(&capture, &Settings::default());
    let _served = world.dial(SERVICE4).unwrap();
    accept(&listeners.outbound);
}

#[test]
fn pod_that_fails_open_bypasses_a_silent_agent() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    capture.set_destinations(&HashSet::from([ip(WORLD4)]), &HashMap::new()).unwrap();
    let open = settings(|settings| settings.fail_open = true);
    drop(world.enrol(&capture, &open));
    let app = world.listen("0.0.0.0:8080");
    let outside = world.listen_outside("10.90.0.1:8080");
    // Of the start, it may be too old by now: tests beside this one load programs too.
    capture.beat();
    // Refused or not: while another test of this process starts a program, that has the agent's listeners open too
    // for a moment.
    drop(world.dial("10.90.0.1:8080"));
    outside[0].set_nonblocking(true).unwrap();
    assert!(outside[0].accept().is_err(), "the heartbeat is fresh");
    outside[0].set_nonblocking(false).unwrap();
    assert_eq!(count(&capture, "connect_fail_open"), 0);

    thread::sleep(Duration::from_millis(5100));
    let _out = world.dial("10.90.0.1:8080").unwrap();
    accept(&outside);
    let _into = world.dial_in("10.90.0.2:8080").unwrap();
    accept(&app);
    assert_eq!(count(&capture, "connect_fail_open"), 1);
    assert_eq!(count(&capture, "lookup_fail_open"), 1);
}

#[test]
fn pod_that_does_not_fit_is_left_alone() {
    if !root() {
        return;
    }
    let [mut one, two] = [World::new(), World::new()];
    one.config.max_pods = 1;
    let capture = one.start();
    let mesh = HashSet::from([ip(WORLD4)]);
    capture.set_destinations(&mesh, &HashMap::new()).unwrap();
    run(&format!("ip -n {} addr add 10.90.0.3/24 dev eth0", two.names[0]));
    let settings = Settings::default();
    let enrol = |world: &World, uid, own| {
        let ips = [ip(own)];
        let pod = world.pod_capture(uid, &ips, &settings);
        capture.enrol(&pod)
    };
    let _listeners = enrol(&one, "one", POD4).unwrap();
    let before = two.routing();
    let error = enrol(&two, "two", "10.90.0.3").unwrap_err();
    assert!(error.to_string().contains("POD_OUTBOUND is full at 1"), "{error}");

    // Neither direction is touched by the half that had been done.
    let app = two.listen("0.0.0.0:8080");
    let _into = two.dial_in("10.90.0.3:8080").unwrap();
    accept(&app);
    let outside = two.listen_outside("10.90.0.1:8080");
    let _out = two.dial("10.90.0.1:8080").unwrap();
    accept(&outside);
    until("the routes to go", || !capture.retire_routes());
    assert_eq!(two.routing(), before);

    // Nor is its address kept from others.
    capture.leave("one").unwrap();
    let _listeners = enrol(&two, "three", "10.90.0.3").unwrap();
}

#[test]
fn pod_that_was_captured_and_does_not_fit_any_more_stays_refused() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    drop(world.enrol(&capture, &Settings::default()));
    drop(capture);
    let capture = world.start();
    let many = too_many_blocks();
    let ips = [ip(POD4), ip(POD6)];
    let pod = world.pod_capture(UID, &ips, &many);
    assert_eq!(capture.enrol(&pod).unwrap_err().reason(), "map_full");
    assert_eq!(world.dial(SERVICE4).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    // Until nobody wants it to be enrolled any more.
    capture.leave(UID).unwrap();
    let app = world.listen("0.0.0.0:8080");
    let _into = world.dial_in("10.90.0.2:8080").unwrap();
    accept(&app);
}

#[test]
fn successor_in_a_namespace_takes_over_without_a_gap() {
    use std::sync::atomic::AtomicU64;

    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    capture.set_destinations(&HashSet::from([ip(WORLD4)]), &HashMap::new()).unwrap();
    let outside = world.listen_outside("10.90.0.1:8080");
    let (settings, too_much) = (Settings::default(), too_many_blocks());
    let enrol = |uid, settings, predecessor| {
        let ips = [ip(POD4)];
        let pod = world.pod_capture(uid, &ips, settings);
        let pod = PodCapture { predecessor, outbound_listeners: 2, inbound_listeners: 2, ..pod };
        capture.enrol(&pod)
    };
    let uids = ["even", "odd"];
    let mut listeners = vec![enrol(uids[0], &settings, None).unwrap()];
    let dialled = AtomicU64::new(0);
    thread::scope(|scope| {
        let turns = scope.spawn(|| {
            for turn in 1..=100 {
                let (now, before) = (uids[turn % 2], uids[(turn + 1) % 2]);
                // While there is no room for it, its predecessor stays.
                assert!(enrol(now, &too_much, Some(before)).is_err());
                listeners.push(enrol(now, &settings, Some(before)).unwrap());
                let seen = dialled.load(Ordering::Relaxed);
                until("a connection", || dialled.load(Ordering::Relaxed) > seen);
            }
        });
        while !turns.is_finished() {
            drop(world.dial("10.90.0.1:8080"));
            dialled.fetch_add(1, Ordering::Relaxed);
        }
    });
    for listener in &outside {
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
    // Nothing of the other one is left: neither its link nor its claim to the namespace.
    capture.leave("even").unwrap();
    assert!(capture.leave("odd").is_err());
    let _out = world.dial("10.90.0.1:8080").unwrap();
    accept(&outside);
}

#[test]
fn full_map_is_said_with_its_limit() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let _listeners = world.enrol(&capture, &Settings::default());
    let many = too_many_blocks();
    let error = capture.update(UID, &many).unwrap_err();
    assert_eq!(error.reason(), "map_full");
    assert!(error.to_string().contains("SKIP_CIDRS is full at 528"), "{error}");
}
