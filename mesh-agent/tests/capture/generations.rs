//! Generations that the kernel does not take: what should have ended by them ends all the same.

use std::collections::HashMap;
use std::net::IpAddr;

use aya::Pod;
use aya::maps::{HashMap as KernelMap, MapData};
use mesh_agent::capture::{Capture, CaptureError, Generations, VerdictEntry, Written};
use mesh_common::addr::{WireIp, from_ip};
use mesh_common::direct::{Verdict, VerdictEndpoint, VerdictKey};
use mesh_common::maps::{PodInbound, PodOutbound, number};
use mesh_core::addr::{EndpointAddr, OrigDst};
use mesh_core::settings::Settings;
use socket2::Domain;

use crate::elements::pinned;
use crate::world::*;

/// Of the pod, and of both services.
fn generations(pod: u64, [v4, v6]: [u64; 2]) -> Generations {
    Generations {
        destinations: HashMap::from([(addr(SERVICE4).ip(), v4), (addr(SERVICE6).ip(), v6)]),
        pods: HashMap::from([(UID.to_owned(), pod)]),
    }
}

/// A verdict decided under these generations.
fn grant(
    world: &World,
    capture: &Capture,
    source: u64,
    (dst, destination): (&str, u64),
) -> Written {
    let entry = VerdictEntry::Agent(EndpointAddr(addr("10.90.0.3:80")));
    let dst = OrigDst::canonical(addr(dst));
    capture.set_verdict((world.pod.cookie(), source), (dst, destination), None, &[entry]).unwrap()
}

/// Whether the kernel has one.
fn has_verdict(world: &World, dst: &str) -> bool {
    let map = pinned::<VerdictKey, Verdict>(world, "VERDICTS");
    map.get(&VerdictKey::new(world.pod.cookie(), addr(dst).into()), 0).is_ok()
}

/// Gives the place of `key` to others, until there is none left: whoever writes it is told so. Returns who
/// has to go.
fn crowd_out<K: Pod, V: Pod>(
    map: &mut KernelMap<MapData, K, V>,
    key: &K,
    others: impl IntoIterator<Item = K>,
) -> Vec<K> {
    let value = map.get(key, 0).unwrap();
    map.remove(key).unwrap();
    others.into_iter().take_while(|other| map.insert(other, value, 0).is_ok()).collect()
}

fn service_key() -> WireIp {
    from_ip(addr(SERVICE4).ip())
}

#[test]
fn destination_that_cannot_be_written_ends_its_own_verdicts_and_is_written_later() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let _listeners = world.enrol(&capture, &Settings::default());
    capture.set_generations(generations(1, [2, 3])).unwrap();
    for dst in [(SERVICE4, 2), (SERVICE6, 3)] {
        assert_eq!(grant(&world, &capture, 1, dst), Written::Yes);
    }
    let mut destinations = pinned::<WireIp, u64>(&world, "DESTINATIONS");
    let others = (0..=u8::MAX).map(|last| from_ip(IpAddr::from([10, 99, 0, last])));
    let placed = crowd_out(&mut destinations, &service_key(), others);

    for refused in [capture.set_generations(generations(1, [20, 3])), capture.write_generations()] {
        let is_full = matches!(refused, Err(CaptureError::Full { map: "DESTINATIONS", .. }));
        assert!(is_full, "{refused:?}");
        assert_eq!([SERVICE4, SERVICE6].map(|dst| has_verdict(&world, dst)), [false, true]);
        for destination in [2, 20] {
            let granted = grant(&world, &capture, 1, (SERVICE4, destination));
            assert_eq!(granted, Written::Outdated);
        }
    }
    // A change back is one too: nobody knows what lies there.
    assert!(capture.set_generations(generations(1, [2, 3])).is_err());
    assert_eq!(grant(&world, &capture, 1, (SERVICE4, 2)), Written::Outdated);

    for other in &placed {
        destinations.remove(other).unwrap();
    }
    capture.write_generations().unwrap();
    assert_eq!(destinations.get(&service_key(), 0).unwrap(), 2);
    assert_eq!(grant(&world, &capture, 1, (SERVICE4, 2)), Written::Yes);
}

#[test]
fn pod_that_cannot_be_written_ends_all_verdicts_and_keeps_nothing_from_being_written() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let _listeners = world.enrol(&capture, &Settings::default());
    capture.set_generations(generations(1, [2, 3])).unwrap();
    for dst in [(SERVICE4, 2), (SERVICE6, 3)] {
        assert_eq!(grant(&world, &capture, 1, dst), Written::Yes);
    }
    let mut outbound = pinned::<u64, PodOutbound>(&world, "POD_OUTBOUND");
    let netns = world.pod.cookie();
    let placed = crowd_out(&mut outbound, &netns, (netns + 1000)..(netns + 2000));

    let refused = capture.set_generations(generations(10, [20, 3]));
    let is_full = matches!(refused, Err(CaptureError::Full { map: "POD_OUTBOUND", .. }));
    assert!(is_full, "{refused:?}");
    // The pod comes first, and the rest is written all the same.
    let destinations = pinned::<WireIp, u64>(&world, "DESTINATIONS");
    assert_eq!(destinations.get(&service_key(), 0).unwrap(), 20);
    let inbound = pinned::<WireIp, PodInbound>(&world, "POD_INBOUND");
    for pod in [POD4, POD6] {
        assert_eq!(number(inbound.get(&from_ip(ip(pod)), 0).unwrap().generation), 10);
    }
    // Which of them led to the pod is not known.
    assert_eq!([SERVICE4, SERVICE6].map(|dst| has_verdict(&world, dst)), [false, false]);
    for source in [1, 10] {
        assert_eq!(grant(&world, &capture, source, (SERVICE6, 3)), Written::Outdated);
    }
    assert_eq!(capture.pod_generation(UID), None, "no verdict leads to it");

    for other in &placed {
        outbound.remove(other).unwrap();
    }
    capture.write_generations().unwrap();
    assert_eq!(capture.pod_generation(UID), Some(10));
    assert_eq!(number(outbound.get(&netns, 0).unwrap().generation), 10);
    assert_eq!(grant(&world, &capture, 10, (SERVICE6, 3)), Written::Yes);
}

/// What lies in the map is no reason to refuse anybody, nor to connect somebody elsewhere.
#[test]
fn verdict_that_makes_no_sense_leaves_the_connection_to_the_agent() {
    if !root() {
        return;
    }
    let world = World::new();
    let capture = world.start();
    let listeners = world.enrol(&capture, &Settings::default());
    capture.set_generations(generations(1, [2, 3])).unwrap();
    assert_eq!(grant(&world, &capture, 1, (SERVICE4, 2)), Written::Yes);
    let mut verdicts = pinned::<VerdictKey, Verdict>(&world, "VERDICTS");
    let netns = world.pod.cookie();
    let key = VerdictKey::new(netns, addr(SERVICE4).into());
    let good = verdicts.get(&key, 0).unwrap();
    let direct = |generation, to: &str, nsid| {
        let mut endpoints = good.endpoints;
        endpoints[0] = VerdictEndpoint { generation, addr: addr(to).into(), nsid };
        Verdict { endpoints, ..good }
    };
    let others = VerdictKey::new(netns + 1, addr(SERVICE4).into());
    let endpoint = Some(EndpointAddr(addr("10.90.0.3:80")));
    for (what, verdict, chosen) in [
        ("as it was", good, endpoint),
        ("no endpoint", Verdict { len: 0, ..good }, None),
        ("more than there is room for", Verdict { len: 33, ..good }, None),
        ("more than there can be", Verdict { len: u32::MAX, ..good }, None),
        ("another pod's", Verdict { key: others, ..good }, None),
        ("to a pod that is not known", direct(7, "10.90.0.3:80", 1), None),
        ("to a pod of another generation", direct(7, "10.90.0.2:80", 1), None),
        ("to a namespace that the pod does not know", direct(1, "10.90.0.2:80", 12_345), None),
    ] {
        verdicts.insert(key, verdict, 0).unwrap();
        let app = world.app(Domain::IPV4);
        app.connect(&sock_addr(SERVICE4)).unwrap_or_else(|error| panic!("{what}: {error}"));
        let (accepted, peer) = accept(&listeners.outbound);
        let listener = accepted.local_addr().unwrap().port();
        let found = capture.orig_dst_table().take(netns, peer, listener);
        assert_eq!(found, Some((OrigDst::canonical(addr(SERVICE4)), chosen)), "{what}");
    }
}
