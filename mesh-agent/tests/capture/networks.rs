//! Blocks of addresses where somebody of the mesh may be, and what is left alone in them.

use std::collections::{HashMap, HashSet};

use mesh_agent::capture::{CaptureError, Destinations, HeldBack};
use mesh_agent::net;
use mesh_core::addr::Cidr;
use mesh_core::networks::Block;
use mesh_core::settings::Settings;
use socket2::Domain;

use crate::world::*;

fn blocks(texts: &[(&str, Block)]) -> HashMap<Cidr, Block> {
    texts.iter().map(|(text, block)| (text.parse().unwrap(), *block)).collect()
}

/// Blocks in which the world is, and in which it is left alone.
fn around_the_world() -> HashMap<Cidr, Block> {
    blocks(&[
        ("10.90.0.0/24", Block::Unread),
        ("fd90::/64", Block::Unread),
        (WORLD4, Block::LeftAlone),
        (WORLD6, Block::LeftAlone),
    ])
}

#[test]
fn whoever_is_in_an_unread_block_is_captured_and_an_exception_is_not() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    assert_listed(capture.set_destinations(&HashSet::new(), &around_the_world()));
    for (domain, to, orig) in [
        (Domain::IPV4, "10.90.0.77:8080", "10.90.0.77:8080"),
        (Domain::IPV6, "[fd90::77]:8080", "[fd90::77]:8080"),
        (Domain::IPV6, "[::ffff:10.90.0.77]:8080", "10.90.0.77:8080"),
    ] {
        let app = world.app(domain);
        app.connect(&sock_addr(to)).unwrap();
        assert_eq!(learn(&world, &capture, &listeners, &app).1, orig);
    }
    let outside = world.listen_outside("[::]:8080");
    for to in ["10.90.0.1:8080", "[fd90::1]:8080", "[::ffff:10.90.0.1]:8080"] {
        let app = world.dial(to).unwrap();
        assert_eq!(app.peer_addr().unwrap().ip().to_canonical(), addr(to).ip().to_canonical());
        accept(&outside);
    }
    assert!(nobody(&listeners.outbound));
    assert_eq!(count(&capture, "connect_not_mesh"), 3);

    // A destination is one wherever it lies, and an exception that has ended is captured again.
    for (wanted, blocks) in [
        (HashSet::from([ip(WORLD4)]), around_the_world()),
        (HashSet::new(), blocks(&[("10.90.0.0/24", Block::Unread)])),
    ] {
        assert_listed(capture.set_destinations(&wanted, &blocks));
        let app = world.app(Domain::IPV4);
        app.connect(&sock_addr("10.90.0.1:8080")).unwrap();
        assert_eq!(learn(&world, &capture, &listeners, &app).1, "10.90.0.1:8080");
    }
    assert_listed(capture.set_destinations(&HashSet::new(), &HashMap::new()));
    world.dial("10.90.0.1:8080").unwrap();
    accept(&outside);
}

fn assert_listed(set: Result<Destinations, CaptureError>) {
    assert!(matches!(set, Ok(Destinations::Listed)), "{set:?}");
}

#[test]
fn exceptions_that_are_used_are_told_once() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let _listeners = world.enrol(&capture, &Settings::default());
    assert_listed(capture.set_destinations(&HashSet::new(), &around_the_world()));
    assert!(capture.take_used().is_empty());
    let _outside = world.listen_outside("[::]:8080");
    for to in ["10.90.0.1:8080", "10.90.0.1:8080", "[fd90::1]:8080"] {
        world.dial(to).unwrap();
    }
    let mut used = capture.take_used();
    used.sort();
    assert_eq!(used, [ip(WORLD4), ip(WORLD6)]);
    assert!(capture.take_used().is_empty(), "not since");
    world.dial("10.90.0.1:8080").unwrap();
    assert_eq!(capture.take_used(), [ip(WORLD4)]);
}

#[test]
fn what_the_pod_skips_is_skipped_in_an_unread_block_too() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let skips = settings(|settings| {
        settings.skip_outbound_cidrs = vec!["10.90.0.0/24".parse().unwrap()];
    });
    let listeners = world.enrol(&capture, &skips);
    let unread = blocks(&[("10.90.0.0/24", Block::Unread)]);
    assert_listed(capture.set_destinations(&HashSet::new(), &unread));
    let outside = world.listen_outside("10.90.0.1:8080");
    world.dial("10.90.0.1:8080").unwrap();
    accept(&outside);
    assert!(nobody(&listeners.outbound));
}

#[test]
fn blocks_that_do_not_fit_are_captured_with_everything_else() {
    if !root() {
        return;
    }
    let mut world = World::new();
    world.config.max_destinations = 2;
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    let three = ["10.1.0.0/24", "10.2.0.0/24", "10.3.0.0/24"].map(|text| (text, Block::Unread));
    match capture.set_destinations(&HashSet::new(), &blocks(&three)).unwrap() {
        Destinations::Everything(CaptureError::Full { map, limit: 2, remedy }) => {
            assert_eq!((map, remedy), ("NETWORKS", "raise --max-destinations"));
        }
        other => panic!("{other:?}"),
    }
    for to in ["10.1.0.1:80", "10.2.0.1:80", "10.3.0.1:80"] {
        let app = world.app(Domain::IPV4);
        app.connect(&sock_addr(to)).unwrap();
        assert_eq!(learn(&world, &capture, &listeners, &app).1, to);
    }
    assert_listed(capture.set_destinations(&HashSet::new(), &blocks(&three[..2])));
    let outside = world.listen_outside("10.90.0.1:8080");
    world.dial("10.90.0.1:8080").unwrap();
    accept(&outside);
}

#[test]
fn blocks_outlive_the_agent_and_the_next_one_knows_them() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    assert_listed(capture.set_destinations(&HashSet::new(), &around_the_world()));
    drop((capture, listeners));
    // Its listeners are gone, so what it would have captured is refused.
    let _outside = world.listen_outside("[::]:8080");
    assert!(world.dial("10.90.0.77:8080").is_err());
    world.dial("10.90.0.1:8080").unwrap();

    // It begins with the addresses of `World::start` and without blocks: none of the old ones is left.
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    let app = world.dial("10.90.0.1:8080").unwrap();
    assert_eq!(app.peer_addr().unwrap(), addr("10.90.0.1:8080"));
    assert_listed(
        capture.set_destinations(&HashSet::new(), &blocks(&[("10.90.0.0/24", Block::Unread)])),
    );
    let app = world.app(Domain::IPV4);
    app.connect(&sock_addr("10.90.0.1:8080")).unwrap();
    assert_eq!(learn(&world, &capture, &listeners, &app).1, "10.90.0.1:8080");
}

#[test]
fn pod_that_waits_reaches_nobody_in_an_unread_block() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    assert_listed(capture.set_destinations(&HashSet::new(), &around_the_world()));
    let cgroup = net::inode(&world.config.cgroup).unwrap();
    let settings = Settings::default();
    let _outside = world.listen_outside("[::]:8080");
    capture.hold_back(cgroup, HeldBack::Waits(&settings)).unwrap();
    let refused = world.dial("10.90.0.77:8080").unwrap_err();
    world.dial("10.90.0.1:8080").unwrap();
    capture.let_go(cgroup).unwrap();
    let kinds = [std::io::ErrorKind::ConnectionRefused, std::io::ErrorKind::PermissionDenied];
    assert!(kinds.contains(&refused.kind()), "{refused}");
    assert_eq!(count(&capture, "connect_pending"), 1);
}
