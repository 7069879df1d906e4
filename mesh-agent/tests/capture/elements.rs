//! What the programs make of an element that becomes another pod's while they read it.

use std::fs;
use std::io;

use aya::Pod;
use aya::maps::{HashMap, Map, MapData};
use mesh_common::addr::{WireIp, from_ip};
use mesh_common::maps::{PodInbound, PodOutbound, number, words};
use mesh_core::settings::Mode;

use crate::world::*;

/// The agent's map of this name.
fn pinned<K: Pod, V: Pod>(world: &World, name: &str) -> HashMap<MapData, K, V> {
    let layout = fs::read_dir(&world.config.bpffs).unwrap().next().unwrap().unwrap().path();
    let map = MapData::from_pin(layout.join("maps").join(name)).unwrap();
    HashMap::try_from(Map::HashMap(map)).unwrap()
}

#[test]
fn connection_that_another_pods_settings_would_let_out_is_denied() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let open = settings(|settings| settings.skip_outbound_ports = "8080".parse().unwrap());
    let _listeners = world.enrol(&capture, &open);
    let outside = world.listen_outside("10.90.0.1:8080");
    let _out = world.dial("10.90.0.1:8080").unwrap();
    accept(&outside);

    // What a program finds whose element the kernel has given to another pod meanwhile.
    let mut map = pinned::<u64, PodOutbound>(&world, "POD_OUTBOUND");
    let netns = world.pod.cookie();
    let there = map.get(&netns, 0).unwrap();
    assert_eq!(number(there.netns), netns);
    map.insert(netns, PodOutbound { netns: words(netns + (1 << 32)), ..there }, 0).unwrap();
    let error = world.dial("10.90.0.1:8080").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    assert_eq!(count(&capture, "connect_changed"), 1);
    assert!(nobody(&outside));
}

#[test]
fn connection_that_another_pods_settings_would_let_in_is_refused() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let open = settings(|settings| {
        settings.mode = Mode::Strict;
        settings.skip_inbound_ports = "9090".parse().unwrap();
    });
    let _listeners = world.enrol(&capture, &open);
    let app = world.listen("[::]:9090");
    for (to, own) in [("10.90.0.2:9090", POD4), ("[fd90::2]:9090", POD6)] {
        let _into = world.dial_in(to).unwrap();
        accept(&app);

        let mut map = pinned::<WireIp, PodInbound>(&world, "POD_INBOUND");
        let key = from_ip(ip(own));
        let there = map.get(&key, 0).unwrap();
        assert_eq!(there.ip, key);
        // Of one that differs in the last bits.
        let other = [key[0], key[1], key[2], !key[3]];
        map.insert(key, PodInbound { ip: other, ..there }, 0).unwrap();
        let error = world.dial_in(to).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{to}");
    }
    assert_eq!(count(&capture, "lookup_changed"), 2);
    assert!(nobody(&app));
}
