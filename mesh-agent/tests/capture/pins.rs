//! What outlives an agent, and what the next one makes of it.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use mesh_agent::capture::probe::{self, Feature, FeatureState};
use mesh_agent::capture::{Capture, CaptureConfig};
use mesh_common::maps::SPECS;
use mesh_core::settings::{Mode, Settings};
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

/// An agent enrols the pod and ends, and the next one's maps will be laid out differently.
fn enrol_by_another_layout(world: &mut World, settings: &Settings) {
    let old = world.start();
    drop(world.enrol(&old, settings));
    drop(old);
    world.config.max_flows *= 2;
}

/// Has the pod dial a destination of the mesh all the while: it is carried or refused, and nothing of it leaves.
fn without_a_gap<T>(world: &World, work: impl FnOnce() -> T) -> T {
    /// Set however the work ends, or its panic would wait for the other thread.
    struct Ended<'a>(&'a AtomicBool);
    impl Drop for Ended<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let destination = addr(SERVICE4);
    run(&format!("ip -n {} addr add {}/32 dev lo", world.names[1], destination.ip()));
    let outside = world.listen_outside(SERVICE4);
    let (ended, dialled) = (AtomicBool::new(false), AtomicUsize::new(0));
    let done = thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                if let Err(error) = world.dial(SERVICE4) {
                    assert_ne!(error.kind(), io::ErrorKind::TimedOut, "neither");
                }
                dialled.fetch_add(1, Ordering::Relaxed);
            }
        });
        let _ended = Ended(&ended);
        until("the first connection", || dialled.load(Ordering::Relaxed) > 0);
        let done = work();
        let before = dialled.load(Ordering::Relaxed);
        until("one more", || dialled.load(Ordering::Relaxed) > before + 1);
        done
    });
    assert!(nobody(&outside), "plain text");
    done
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

    let (capture, listeners) = without_a_gap(&world, || {
        drop(capture);
        let capture = world.start();
        assert_eq!(world.dial(SERVICE4).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let listeners = world.enrol(&capture, &Settings::default());
        (capture, listeners)
    });
    while !nobody(&listeners.outbound) {}
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
    enrol_by_another_layout(&mut world, &Settings::default());
    let before = link_ids(&world);

    let (capture, listeners) = without_a_gap(&world, || {
        let capture = world.start();
        let now = link_ids(&world);
        assert_eq!(now, before, "the old programs stay until the new maps know the pods");
        assert_eq!(world.dial(SERVICE4).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let listeners = world.enrol(&capture, &Settings::default());
        (capture, listeners)
    });
    while !nobody(&listeners.outbound) {}
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
    enrol_by_another_layout(&mut world, &Settings::default());
    let capture = world.start();
    let before = link_ids(&world);
    let (ips, settings) = ([ip(POD4), ip(POD6)], Settings::default());
    let pod = world.pod_capture(UID, &ips, &settings);
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
    enrol_by_another_layout(&mut world, &strict());
    let capture = world.start();
    let plain = world.listen("0.0.0.0:8080");
    let (ips, many) = ([ip(POD4), ip(POD6)], Settings { mode: Mode::Strict, ..too_many_blocks() });
    let pod = world.pod_capture(UID, &ips, &many);
    assert_eq!(capture.enrol(&pod).unwrap_err().reason(), "map_full");
    let into = || world.dial_in("10.90.0.2:8080").unwrap_err().kind();
    assert_eq!(into(), io::ErrorKind::ConnectionRefused);
    capture.retain(&HashSet::from([UID.to_owned()]), &HashSet::new()).unwrap();
    assert_eq!(fs::read_dir(&world.config.bpffs).unwrap().count(), 1, "the old layout is gone");
    assert_eq!(world.dial(SERVICE4).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    assert_eq!(into(), io::ErrorKind::ConnectionRefused);
    assert_eq!(count(&capture, "lookup_strict"), 1, "by our programs, as its settings say");
    assert!(nobody(&plain));
    // Until it can be, or nobody wants it any more.
    let app = world.app(Domain::IPV4);
    let listeners = world.enrol(&capture, &Settings::default());
    app.connect(&sock_addr(SERVICE4)).unwrap();
    assert_eq!(learn(&world, &capture, &listeners, &app).1, SERVICE4);
}

/// Its certificate is not there yet, or its namespace is not to be found just now.
#[test]
fn pod_of_another_layout_is_refused_until_it_is_enrolled_again() {
    if !root() {
        return;
    }
    let mut world = World::new();
    enrol_by_another_layout(&mut world, &strict());
    run(&format!("ip -n {} addr add 10.90.0.7/24 dev eth0", world.names[0]));
    let plain = world.listen("0.0.0.0:8080");
    let wanted = HashSet::from([UID.to_owned()]);
    // Once more by an agent that begins where one has ended before it had enrolled the pod.
    for _ in 0..2 {
        let capture = world.start();
        capture.retain(&wanted, &HashSet::new()).unwrap();
        assert_eq!(fs::read_dir(&world.config.bpffs).unwrap().count(), 1, "the old layout is gone");
        assert!(world.is_refused());
        let elsewhere = world.dial_in("10.90.0.7:8080").unwrap_err();
        assert_eq!(elsewhere.kind(), io::ErrorKind::ConnectionRefused);
    }
    assert!(nobody(&plain));

    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    let app = world.app(Domain::IPV4);
    app.connect(&sock_addr(SERVICE4)).unwrap();
    assert_eq!(learn(&world, &capture, &listeners, &app).1, SERVICE4);
    let _into = world.dial_in("10.90.0.2:8080").unwrap();
    accept(&listeners.inbound);
    let _elsewhere = world.dial_in("10.90.0.7:8080").unwrap();
    accept(&plain);
}

#[test]
fn pod_of_another_layout_is_left_alone_when_nobody_wants_it_any_more() {
    if !root() {
        return;
    }
    let mut world = World::new();
    enrol_by_another_layout(&mut world, &strict());
    let plain = world.listen("0.0.0.0:8080");
    let outside = world.listen_outside("10.90.0.1:8080");
    let capture = world.start();
    capture.retain(&HashSet::from([UID.to_owned()]), &HashSet::new()).unwrap();
    assert!(world.is_refused());
    // A successor in its namespace could not be enrolled yet.
    capture.retain(&HashSet::new(), &HashSet::from([world.pod.cookie()])).unwrap();
    assert_eq!(world.dial(SERVICE4).unwrap_err().kind(), io::ErrorKind::PermissionDenied);

    capture.retain(&HashSet::new(), &HashSet::new()).unwrap();
    assert_eq!(link_ids(&world).len(), 5);
    let _into = world.dial_in("10.90.0.2:8080").unwrap();
    accept(&plain);
    capture.set_destinations(&HashSet::from([ip(WORLD4)]), &HashMap::new()).unwrap();
    let _out = world.dial("10.90.0.1:8080").unwrap();
    accept(&outside);
}

#[test]
fn what_left_the_mesh_during_an_upgrade_is_free_when_the_others_are_enrolled_again() {
    if !root() {
        return;
    }
    let [mut world, gone] = [World::new(), World::new()];
    run(&format!("ip -n {} addr add 10.90.0.3/24 dev eth0", gone.names[0]));
    let old = world.start();
    drop(world.enrol(&old, &Settings::default()));
    let (ips, settings) = ([ip("10.90.0.3")], strict());
    drop(old.enrol(&gone.pod_capture("gone", &ips, &settings)).unwrap());
    drop(old);
    let plain = gone.listen("0.0.0.0:8080");
    let outside = gone.listen_outside("10.90.0.1:8080");

    world.config.max_flows *= 2;
    let capture = world.start();
    let mesh = HashSet::from([addr(SERVICE4).ip(), ip(WORLD4)]);
    capture.set_destinations(&mesh, &HashMap::new()).unwrap();
    capture.retain(&HashSet::from([UID.to_owned()]), &HashSet::new()).unwrap();
    assert!(world.is_refused());
    // Nobody can tell whose namespace is whose.
    let error = gone.dial("10.90.0.1:8080").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    let _into = gone.dial_in("10.90.0.3:8080").unwrap();
    accept(&plain);

    let _listeners = world.enrol(&capture, &Settings::default());
    let _out = gone.dial("10.90.0.1:8080").unwrap();
    accept(&outside);
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
    let version = |text: &str| -> Vec<u32> {
        text.split(['.', '-']).map_while(|number| number.parse().ok()).take(2).collect()
    };
    let this = version(&fs::read_to_string("/proc/sys/kernel/osrelease").unwrap());
    // What an older kernel cannot have, and the mesh does without.
    let is_newer =
        |feature: &Feature| feature.state == FeatureState::Warning && version(feature.since) > this;
    let wrong: Vec<_> = features
        .iter()
        .filter(|feature| feature.state != FeatureState::Ok && !is_newer(feature))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(!world.config.bpffs.exists(), "probing changes nothing");
}
