//! What outlives an agent, and what the next one makes of it.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::Path;

use mesh_agent::capture::probe::{self, FeatureState};
use mesh_agent::capture::{Capture, CaptureConfig, PodCapture};
use mesh_common::maps::SPECS;
use mesh_core::settings::Settings;
use socket2::Domain;

use crate::world::*;

/// The pins below the bpffs, and the kernel's ID of each link.
fn link_ids(world: &World) -> Vec<(String, String)> {
    let mut ids = Vec::new();
    for layout in fs::read_dir(&world.config.bpffs).unwrap() {
        for link in fs::read_dir(layout.unwrap().path().join("links")).unwrap() {
            let path = link.unwrap().path();
            let info = probe::link(&path).unwrap();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            ids.push((name, format!("link {} program {}", info.0, info.1)));
        }
    }
    ids.sort();
    ids
}

#[test]
fn restart_moves_the_links_to_the_new_programs() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    drop(world.enrol(&capture, &Settings::default()));
    let before = link_ids(&world);
    assert_eq!(before.len(), 6, "{before:?}");
    drop(capture);

    let capture = world.start();
    assert_eq!(world.dial(SERVICE4).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    let listeners = world.enrol(&capture, &Settings::default());
    let after = link_ids(&world);
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        let (link, program) = before.split_once(" program ").unwrap();
        assert_eq!(after.split_once(" program ").unwrap().0, link, "{name} is the same link");
        assert_ne!(after.split_once(" program ").unwrap().1, program, "{name} has a new program");
    }
    let app = world.app(Domain::IPV4);
    app.connect(&sock_addr(SERVICE4)).unwrap();
    assert_eq!(learn(&world, &capture, &listeners, &app).1, SERVICE4);
}

#[test]
fn another_layout_is_taken_over_without_a_gap() {
    if !root() {
        return;
    }
    let mut world = World::new();
    let old = world.start();
    drop(world.enrol(&old, &Settings::default()));
    let before = link_ids(&world);
    drop(old);

    world.config.max_flows *= 2;
    let capture = world.start();
    assert_eq!(link_ids(&world), before, "the old programs stay until the new maps know the pods");
    assert_eq!(world.dial(SERVICE4).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    let listeners = world.enrol(&capture, &Settings::default());
    let after = link_ids(&world);
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        let link = |text: &str| text.split_once(" program ").unwrap().0.to_owned();
        assert_eq!(link(after), link(before), "{name} is the same link");
        assert_ne!(after, before, "{name} has a new program");
    }
    assert_eq!(fs::read_dir(&world.config.bpffs).unwrap().count(), 1, "the old layout is gone");
    let app = world.app(Domain::IPV4);
    app.connect(&sock_addr(SERVICE4)).unwrap();
    assert_eq!(learn(&world, &capture, &listeners, &app).1, SERVICE4);
}

/// What the older `sock_ops` announces, the newer `sk_lookup` would not find.
#[test]
fn lookup_of_another_layout_is_moved_with_the_hooks_and_not_before() {
    if !root() {
        return;
    }
    let mut world = World::new();
    let old = world.start();
    drop(world.enrol(&old, &Settings::default()));
    drop(old);
    world.config.max_flows *= 2;
    let capture = world.start();
    let before = link_ids(&world);
    let pod = PodCapture {
        uid: UID,
        ips: &[ip(POD4), ip(POD6)],
        netns: &world.pod,
        settings: &Settings::default(),
        predecessor: None,
        outbound_listeners: 1,
        inbound_listeners: 1,
    };
    let _listeners = capture.enrol(&pod).unwrap();
    assert_eq!(link_ids(&world), before, "all programs are the old ones");
    capture.retain(&HashSet::from([UID.to_owned()]), &HashSet::new()).unwrap();
    let after = link_ids(&world);
    assert_eq!(after.len(), before.len());
    assert!(before.iter().zip(&after).all(|(before, after)| before.1 != after.1), "{after:?}");
}

#[test]
fn pod_of_another_layout_that_cannot_be_enrolled_is_refused() {
    if !root() {
        return;
    }
    let mut world = World::new();
    let old = world.start();
    drop(world.enrol(&old, &Settings::default()));
    drop(old);
    world.config.max_flows *= 2;
    let capture = world.start();
    let pod = PodCapture {
        uid: UID,
        ips: &[ip(POD4), ip(POD6)],
        netns: &world.pod,
        settings: &too_many_blocks(),
        predecessor: None,
        outbound_listeners: 1,
        inbound_listeners: 1,
    };
    assert_eq!(capture.enrol(&pod).unwrap_err().reason(), "map_full");
    capture.retain(&HashSet::from([UID.to_owned()]), &HashSet::new()).unwrap();
    assert_eq!(fs::read_dir(&world.config.bpffs).unwrap().count(), 1, "the old layout is gone");
    assert_eq!(world.dial(SERVICE4).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    // Until it can be, or nobody wants it any more.
    let app = world.app(Domain::IPV4);
    let listeners = world.enrol(&capture, &Settings::default());
    app.connect(&sock_addr(SERVICE4)).unwrap();
    assert_eq!(learn(&world, &capture, &listeners, &app).1, SERVICE4);
}

#[test]
fn pods_that_are_gone_after_a_restart_leave_no_pin() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    drop(world.enrol(&capture, &Settings::default()));
    drop(capture);
    let capture = world.start();
    capture.retain(&HashSet::new(), &HashSet::new()).unwrap();
    assert_eq!(link_ids(&world).len(), 5);
    let app = world.listen("0.0.0.0:8080");
    let _into = world.dial_in("10.90.0.2:8080").unwrap();
    accept(&app);
}

#[test]
fn foreign_pins_are_refused_by_name() {
    if !root() {
        return;
    }
    let world = World::new();
    drop(world.start());
    let layout = fs::read_dir(&world.config.bpffs).unwrap().next().unwrap().unwrap().path();
    let refused = |path: &Path| {
        let error = Capture::start(&world.config).unwrap_err();
        assert_eq!(error.reason(), "foreign_pin", "{}", chain(&error));
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    };

    // A map of another kind under our name.
    let control = layout.join("maps/CONTROL");
    let kept = layout.join("kept");
    fs::rename(&control, &kept).unwrap();
    fs::rename(layout.join("maps/FLOWS"), &control).unwrap();
    refused(&control);
    fs::rename(&control, layout.join("maps/FLOWS")).unwrap();
    fs::rename(&kept, &control).unwrap();

    // A link of another hook under our name.
    let connect4 = layout.join("links/connect4");
    fs::rename(&connect4, &kept).unwrap();
    fs::rename(layout.join("links/sockops"), &connect4).unwrap();
    refused(&connect4);
    fs::rename(&connect4, layout.join("links/sockops")).unwrap();
    fs::rename(&kept, &connect4).unwrap();

    // A directory that no agent makes.
    let stranger = world.config.bpffs.join("stranger");
    fs::create_dir(&stranger).unwrap();
    refused(&stranger);
    fs::remove_dir(&stranger).unwrap();
    drop(world.start());
}

#[test]
fn detach_leaves_nothing() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let _listeners = world.enrol(&capture, &Settings::default());
    drop(capture);

    let detached = Capture::detach(&world.config.bpffs).unwrap();
    assert_eq!(detached.removed.len(), SPECS.len() + 6 + 1 + 4 + 1, "{detached:#?}");
    assert_eq!(detached.namespaces.len(), 1, "{detached:#?}");
    assert!(!world.config.bpffs.exists());
    assert!(
        world.dial(SERVICE4).is_err_and(|error| error.kind() != io::ErrorKind::ConnectionRefused)
    );
    let app = world.listen("0.0.0.0:8080");
    let _into = world.dial_in("10.90.0.2:8080").unwrap();
    accept(&app);
    assert_eq!(Capture::detach(&world.config.bpffs).unwrap(), Default::default(), "twice is fine");
}

#[test]
fn missing_bpffs_is_said_with_the_remedy() {
    if !root() {
        return;
    }
    let world = World::new();
    let config = CaptureConfig { bpffs: "/tmp/malla-no-bpffs".into(), ..world.config.clone() };
    let error = Capture::start(&config).unwrap_err();
    assert_eq!(error.reason(), "no_bpffs");
    assert!(error.to_string().contains("mount -t bpf bpf /tmp"), "{error}");
    let config = CaptureConfig { cgroup: "/tmp".into(), ..world.config.clone() };
    assert_eq!(Capture::start(&config).unwrap_err().reason(), "not_cgroup2");
}

#[test]
fn this_kernel_has_all_that_capture_needs() {
    if !root() {
        return;
    }
    let world = World::new();
    let features = probe::run(&world.config.cgroup, &world.config.bpffs);
    let wrong: Vec<_> =
        features.iter().filter(|feature| feature.state != FeatureState::Ok).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(!world.config.bpffs.exists(), "probing changes nothing");
}
