//! What a pod connects before it is captured.
//!
//! The cgroup that a kubelet would have made for the pod is the one that this process is in.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use mesh_agent::capture::{Capture, Destinations, HeldBack};
use mesh_agent::net::{self, Netns};
use mesh_core::settings::Settings;

use crate::world::*;

/// The world with destinations of the mesh in it that no other test has: the cgroup is everybody's, and the
/// programs of one test are asked about the connections of all.
struct Pending {
    world: World,
    capture: Capture,
    cgroup: u64,
    /// In both families.
    mesh: [IpAddr; 2],
    listener: [TcpListener; 1],
}

const PORT: u16 = 8080;

impl Pending {
    fn new() -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let world = World::new();
        let mesh = [ip(&format!("10.91.0.{number}")), ip(&format!("fd91::{number}"))];
        for address in [format!("{}/32", mesh[0]), format!("{}/128 nodad", mesh[1])] {
            run(&format!("ip -n {} addr add dev eth0 {address}", world.names[1]));
        }
        let listener = world.listen_outside(&format!("[::]:{PORT}"));
        let cgroup = net::inode(&world.config.cgroup).unwrap();
        let capture = world.start();
        capture.set_destinations(&HashSet::from(mesh), &HashMap::new()).unwrap();
        Self { world, capture, cgroup, mesh, listener }
    }

    fn hold_back(&self) {
        let settings = Settings::default();
        self.capture.hold_back(self.cgroup, HeldBack::Waits(&settings)).unwrap();
    }

    fn dial(&self) -> io::Result<TcpStream> {
        self.world.dial(&SocketAddr::new(self.mesh[0], PORT).to_string())
    }

    fn is_refused(&self) -> bool {
        let refused = is_refused(&self.dial());
        assert!(nobody(&self.listener), "not one byte left");
        refused
    }

    /// Whether it gets out in plain text.
    fn passes(&self) -> bool {
        let passes = self.dial().is_ok();
        if passes {
            accept(&self.listener);
        }
        passes
    }
}

/// Without `bpf_set_retval` (before Linux 6.1) it is `PermissionDenied`.
fn is_refused(result: &io::Result<TcpStream>) -> bool {
    result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

#[test]
fn pod_that_waits_reaches_nothing_of_the_mesh_until_it_is_captured() {
    if !root() {
        return;
    }
    let pod = Pending::new();
    assert!(pod.passes(), "nobody holds it back");
    pod.hold_back();
    let [v4, v6] = pod.mesh;
    for to in [format!("{v4}:{PORT}"), format!("[{v6}]:{PORT}"), format!("[::ffff:{v4}]:{PORT}")] {
        assert!(is_refused(&pod.world.dial(&to)), "{to}");
    }
    assert!(nobody(&pod.listener), "not one byte left");
    assert_eq!(count(&pod.capture, "connect_pending"), 3);

    // Elsewhere it goes as it does when it is captured.
    pod.capture.set_destinations(&HashSet::from([v6]), &HashMap::new()).unwrap();
    assert!(pod.passes(), "no destination of the mesh");
    pod.capture.set_destinations(&HashSet::from([v4]), &HashMap::new()).unwrap();

    let listeners = pod.world.enrol(&pod.capture, &Settings::default());
    let app = pod.dial().expect("captured, though still held back");
    assert_eq!(accept(&listeners.outbound).1.port(), app.local_addr().unwrap().port());
    pod.capture.leave(UID).unwrap();
    assert!(pod.is_refused(), "its capture has ended");
    pod.capture.let_go(pod.cgroup).unwrap();
    assert!(pod.passes());
}

#[test]
fn pod_that_nobody_knows_is_free_in_time() {
    if !root() {
        return;
    }
    let pod = Pending::new();
    let limit = Duration::from_millis(500);
    let began = Instant::now();
    pod.capture.hold_back(pod.cgroup, HeldBack::Unknown(limit)).unwrap();
    assert!(pod.is_refused());
    assert_eq!(count(&pod.capture, "connect_unknown"), 1);
    until("to be let through", || pod.passes());
    assert!(began.elapsed() >= limit, "too early");
    assert_eq!(count(&pod.capture, "connect_still_unknown"), 1);
}

#[test]
fn node_and_other_pods_are_not_held_back() {
    if !root() {
        return;
    }
    let pod = Pending::new();
    let settings = Settings::default();
    let another = pod.cgroup + 1_000_000;
    pod.capture.hold_back(another, HeldBack::Waits(&settings)).unwrap();
    assert!(pod.passes(), "another pod's cgroup");
    pod.hold_back();
    assert!(pod.is_refused());
    // A pod that shares the node's namespace.
    let there = HashSet::from([pod.cgroup]);
    assert_eq!(pod.capture.retain_held_back(&pod.world.pod, &there).unwrap(), there);
    assert!(pod.passes(), "in the node's namespace");
}

#[test]
fn what_was_held_back_stays_so_over_a_restart_while_it_is_there() {
    if !root() {
        return;
    }
    let mut pod = Pending::new();
    pod.hold_back();
    pod.capture.hold_back(7, HeldBack::Unknown(Duration::MAX)).unwrap();
    // An agent ends without a word, and the next one has not looked yet.
    pod.capture = Capture::start(&pod.world.config).unwrap();
    assert!(pod.is_refused());
    let node = Netns::current().unwrap();
    let there = HashSet::from([pod.cgroup, 8]);
    let left = pod.capture.retain_held_back(&node, &there).unwrap();
    assert_eq!(left, HashSet::from([pod.cgroup]), "7 is gone, and 8 was not held back");
    assert!(pod.is_refused());
    pod.capture.let_go(pod.cgroup).unwrap();
    assert!(pod.passes());
}

#[test]
fn what_was_held_back_stays_so_over_a_change_of_layout() {
    if !root() {
        return;
    }
    let mut pod = Pending::new();
    pod.hold_back();
    pod.capture.hold_back(7, HeldBack::Unknown(Duration::MAX)).unwrap();
    pod.world.config.max_flows *= 2;
    pod.capture = Capture::start(&pod.world.config).unwrap();
    assert!(pod.is_refused(), "by the programs of before");
    pod.capture.set_destinations(&HashSet::from(pod.mesh), &HashMap::new()).unwrap();
    let node = Netns::current().unwrap();
    let there = HashSet::from([pod.cgroup, 8]);
    let left = pod.capture.retain_held_back(&node, &there).unwrap();
    assert_eq!(left, HashSet::from([pod.cgroup]), "7 is gone, and 8 was not held back");
    pod.capture.retain(&HashSet::new(), &HashSet::new()).unwrap();
    assert_eq!(count(&pod.capture, "connect_unknown"), 0);
    assert!(pod.is_refused(), "by ours");
    assert_eq!(count(&pod.capture, "connect_unknown"), 1, "nobody knows how it takes part");
    pod.capture.let_go(pod.cgroup).unwrap();
    assert!(pod.passes());
}

#[test]
fn pod_for_which_there_is_no_room_is_told_of() {
    if !root() {
        return;
    }
    let pod = Pending::new();
    let settings = Settings::default();
    let room = u64::from(pod.world.config.max_pods);
    for other in 0..room {
        let another = pod.cgroup + 1_000_000 + other;
        pod.capture.hold_back(another, HeldBack::Waits(&settings)).unwrap();
    }
    let error = pod.capture.hold_back(pod.cgroup, HeldBack::Waits(&settings)).unwrap_err();
    assert!(chain(&error).contains("PENDING"), "{}", chain(&error));
    assert!(pod.passes(), "not held back");
}

/// What the agent captures a pod by before the API tells its addresses.
/// Addresses of the mesh stop fitting while it waits.
#[test]
fn pod_that_is_held_back_reaches_nothing_that_has_no_place() {
    if !root() {
        return;
    }
    let mut pending = Pending::new();
    pending.world.config.max_destinations = 1;
    let Pending { world, capture, mesh, .. } = &mut pending;
    // Of another layout by its sizes: only one of the two addresses fits.
    drop(Capture::detach(&world.config.bpffs));
    *capture = Capture::start(&world.config).unwrap();
    capture.set_destinations(&HashSet::from([mesh[1]]), &HashMap::new()).unwrap();
    pending.hold_back();
    assert!(pending.passes(), "the first one is not of the mesh yet");
    let all = HashSet::from(pending.mesh);
    let set = pending.capture.set_destinations(&all, &HashMap::new()).unwrap();
    assert!(matches!(set, Destinations::Everything(_)), "{set:?}");
    assert!(pending.is_refused());
}

#[test]
fn addresses_of_a_pod_are_those_of_its_eth0_if_they_are_clear() {
    if !root() {
        return;
    }
    let world = World::new();
    let pod = &world.names[0];
    assert_eq!(net::pod_addresses(&world.pod), Some(vec![ip(POD4), ip(POD6)]));
    // What a second network attaches, and what every device has, is not the pod's.
    run(&format!("ip -n {pod} link add net1 type veth peer name net2"));
    run(&format!("ip -n {pod} addr add 10.92.0.2/24 dev net1"));
    run(&format!("ip -n {pod} addr add fe80::2/64 dev eth0 nodad"));
    assert_eq!(net::pod_addresses(&world.pod), Some(vec![ip(POD4), ip(POD6)]));
    run(&format!("ip -n {pod} addr add 10.90.0.3/24 dev eth0"));
    assert_eq!(net::pod_addresses(&world.pod), None, "which of them, only its runtime knows");
    run(&format!("ip -n {pod} addr flush dev eth0"));
    assert_eq!(net::pod_addresses(&world.pod), None, "none yet");
    run(&format!("ip -n {pod} link del eth0"));
    assert_eq!(net::pod_addresses(&world.pod), None, "no device");
}
