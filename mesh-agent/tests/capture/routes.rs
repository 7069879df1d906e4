//! The routes for client addresses: there while a connection lives by them, and then gone.

use std::collections::HashSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};

use mesh_agent::capture::{Capture, Role};
use mesh_agent::net;
use mesh_core::settings::Settings;
use socket2::SockRef;

use crate::world::*;

/// A client that is no pod of this node.
const CLIENT: &str = "10.244.7.9:40000";

/// A connection that the agent delivers in its client's name, and the application's end of it.
fn delivered(world: &World, capture: &Capture, app: &[TcpListener]) -> (TcpStream, TcpStream) {
    let delivering = async {
        let to = addr("10.90.0.2:8080");
        let exempt = |socket: std::os::fd::BorrowedFd<'_>| capture.exempt(socket, Role::Deliver);
        let agent = net::deliver(&world.pod, to, Some(addr(CLIENT)), exempt).await.unwrap();
        agent.into_std().unwrap()
    };
    let agent = block_on(delivering);
    agent.set_nonblocking(false).unwrap();
    let (app, client) = accept(app);
    app.set_nonblocking(false).unwrap();
    assert_eq!(client.ip(), addr(CLIENT).ip());
    (agent, app)
}

fn exchanges((agent, app): &(TcpStream, TcpStream)) {
    for (mut from, mut to) in [(agent, app), (app, agent)] {
        from.write_all(b"still").unwrap();
        to.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
        to.read_exact(&mut [0; 5]).unwrap();
    }
}

/// Where the agent notes what it has to take away again.
fn notes(world: &World) -> usize {
    let layouts = fs::read_dir(&world.config.bpffs).unwrap();
    layouts.map(|layout| fs::read_dir(layout.unwrap().path().join("routes")).unwrap().count()).sum()
}

#[test]
fn routes_go_with_the_last_delivery_of_a_pod_that_has_left() {
    if !root() {
        return;
    }
    let world = World::new();
    let before = world.routing();
    let capture = world.start();
    let _listeners = world.enrol(&capture, &Settings::default());
    let prepared = world.routing();
    assert!(prepared.contains("fwmark 0x6d616c6c lookup 27745"), "{prepared}");
    let app = world.listen("10.90.0.2:8080");
    let open = [delivered(&world, &capture, &app), delivered(&world, &capture, &app)];

    assert!(!capture.retire_routes(), "the pod is enrolled");
    assert_eq!(world.routing(), prepared);
    capture.leave(UID).unwrap();
    assert!(capture.retire_routes());
    open.iter().for_each(exchanges);
    let [one, two] = open;
    drop(one);
    assert!(capture.retire_routes());
    exchanges(&two);
    assert_eq!((world.routing(), notes(&world)), (prepared, 1));

    drop(two);
    until("the routes to go", || !capture.retire_routes());
    assert_eq!((world.routing(), notes(&world)), (before, 0));
    // Who comes late is delivered all the same.
    let late = net::deliver(&world.pod, addr("10.90.0.2:8080"), Some(addr(CLIENT)), |_| Ok(()));
    let _late = block_on(late).unwrap();
    assert_eq!(accept(&app).1.ip(), ip(POD4));
}

/// The agent is done with a connection when it has handed the last byte to the kernel.
#[test]
fn last_bytes_of_a_closed_delivery_arrive_before_the_routes_go() {
    if !root() {
        return;
    }
    let world = World::new();
    let before = world.routing();
    let capture = world.start();
    let _listeners = world.enrol(&capture, &Settings::default());
    let app = world.listen("10.90.0.2:8080");
    let (agent, mut reader) = delivered(&world, &capture, &app);
    let mut sent = 0;
    agent.set_nonblocking(true).unwrap();
    while let Ok(more) = (&agent).write(&[7; 65_536]) {
        sent += more;
    }
    // As the relay does before a clean end.
    SockRef::from(&agent).set_linger(None).unwrap();
    drop(agent);
    capture.leave(UID).unwrap();
    assert!(capture.retire_routes(), "{sent} bytes are still to be read");
    let mut read = Vec::new();
    reader.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
    reader.read_to_end(&mut read).unwrap();
    assert_eq!(read.len(), sent);
    drop(reader);
    until("the routes to go", || !capture.retire_routes());
    assert_eq!(world.routing(), before);
}

#[test]
fn pod_that_comes_back_keeps_its_routes() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let _listeners = world.enrol(&capture, &Settings::default());
    let prepared = world.routing();
    let app = world.listen("10.90.0.2:8080");
    let open = delivered(&world, &capture, &app);
    capture.leave(UID).unwrap();
    assert!(capture.retire_routes());
    let _listeners = world.enrol(&capture, &Settings::default());
    drop(open);
    assert!(!capture.retire_routes(), "nothing is to go");
    assert_eq!(world.routing(), prepared);
    exchanges(&delivered(&world, &capture, &app));
}

#[test]
fn routes_come_and_go_with_the_setting() {
    if !root() {
        return;
    }
    let world = World::new();
    let before = world.routing();
    let capture = world.start();
    let plain = settings(|settings| settings.preserve_client_address = false);
    let _listeners = world.enrol(&capture, &plain);
    assert_eq!(world.routing(), before);
    capture.update(UID, &Settings::default()).unwrap();
    let app = world.listen("10.90.0.2:8080");
    exchanges(&delivered(&world, &capture, &app));
    capture.update(UID, &plain).unwrap();
    until("the routes to go", || !capture.retire_routes());
    assert_eq!(world.routing(), before);
}

#[test]
fn next_agent_takes_away_what_nothing_needs_any_more() {
    if !root() {
        return;
    }
    let mut world = World::new();
    let before = world.routing();
    let capture = world.start();
    let _listeners = world.enrol(&capture, &Settings::default());
    let prepared = world.routing();
    let app = world.listen("10.90.0.2:8080");
    let open = delivered(&world, &capture, &app);
    capture.leave(UID).unwrap();
    assert!(capture.retire_routes());
    // The agent is killed.
    drop((capture, open));

    // A pod that is to be enrolled and could not be yet keeps them.
    let capture = world.start();
    capture.retain(&HashSet::from([UID.to_owned()]), &HashSet::new()).unwrap();
    assert!(!capture.retire_routes());
    assert_eq!(world.routing(), prepared);
    drop(capture);

    // Also one whose maps are laid out differently.
    world.config.max_flows *= 2;
    let capture = world.start();
    capture.retain(&HashSet::new(), &HashSet::new()).unwrap();
    until("the routes to go", || !capture.retire_routes());
    assert_eq!((world.routing(), notes(&world)), (before, 0));
}

/// Who turns the setting off while no agent runs does it because the pod has marks of its own.
#[test]
fn next_agent_takes_away_what_an_enrolled_pod_does_not_want_any_more() {
    if !root() {
        return;
    }
    let world = World::new();
    let before = world.routing();
    let capture = world.start();
    let _listeners = world.enrol(&capture, &Settings::default());
    assert_ne!(world.routing(), before);
    drop(capture);

    let capture = world.start();
    let plain = settings(|settings| settings.preserve_client_address = false);
    let _listeners = world.enrol(&capture, &plain);
    capture.retain(&HashSet::from([UID.to_owned()]), &HashSet::new()).unwrap();
    until("the routes to go", || !capture.retire_routes());
    assert_eq!((world.routing(), notes(&world)), (before, 0));
}

#[test]
fn detach_takes_away_the_routes_of_a_pod_that_had_left() {
    if !root() {
        return;
    }
    let world = World::new();
    let before = world.routing();
    let capture = world.start();
    let _listeners = world.enrol(&capture, &Settings::default());
    let app = world.listen("10.90.0.2:8080");
    let open = delivered(&world, &capture, &app);
    capture.leave(UID).unwrap();
    assert!(capture.retire_routes());
    drop((capture, open));
    let detached = Capture::detach(&world.config.bpffs).unwrap();
    assert_eq!(detached.namespaces.len(), 1, "{detached:#?}");
    assert_eq!(world.routing(), before);
}

#[test]
fn namespace_that_is_gone_leaves_no_note() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let _listeners = world.enrol(&capture, &Settings::default());
    drop(capture);
    let layout = fs::read_dir(&world.config.bpffs).unwrap().next().unwrap().unwrap().path();
    // No namespace has this inode.
    std::os::unix::fs::symlink("gone", layout.join("routes/7")).unwrap();
    let capture = world.start();
    let _listeners = world.enrol(&capture, &Settings::default());
    assert_eq!(notes(&world), 1, "the pod's own");
}
