//! Shares, failures and turns, on a clock that moves by hand.

use proptest::prelude::*;

use super::*;
use crate::fixtures::endpoint;

const MS: Duration = Duration::from_millis(1);

fn endpoints(n: usize) -> Vec<Endpoint> {
    (0..n).map(|i| endpoint(&format!("10.0.0.{}:80", i + 1))).collect()
}

#[expect(clippy::disallowed_methods, reason = "any start will do; time then moves by hand")]
fn epoch() -> Instant {
    Instant::now()
}

/// A fixed generator (Knuth's MMIX constants): the same test fails the same way everywhere.
fn fixed_draws() -> impl FnMut(usize) -> usize {
    let mut state = 7u64;
    move |n| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % n
    }
}

#[test]
fn slow_endpoint_is_avoided_and_equals_share_evenly() {
    let (mut loads, all, mut draw) = (Loads::default(), endpoints(3), fixed_draws());
    let mut now = epoch();
    let rtt = [MS, MS, 50 * MS];
    let mut picked = [0u32; 3];
    for _ in 0..10_000 {
        let i = loads.pick(Policy::LeastLoaded, &all, &[], now, &mut draw).unwrap();
        picked[i] += 1;
        now += MS;
        loads.accepted(all[i].addr, &all, now, rtt[i]);
        loads.finished(all[i].addr);
    }
    assert!(picked[2] < 100, "1% of 10,000 at most, got {picked:?}");
    assert!(picked[0].abs_diff(picked[1]) < 500, "{picked:?}");
}

#[test]
fn far_endpoint_gets_its_share() {
    let (mut loads, all, mut draw) = (Loads::default(), endpoints(3), fixed_draws());
    let mut now = epoch();
    let rtt = [MS / 10, MS / 10, 2 * MS];
    let mut picked = [0u32; 3];
    for _ in 0..3_000 {
        let i = loads.pick(Policy::LeastLoaded, &all, &[], now, &mut draw).unwrap();
        picked[i] += 1;
        now += MS;
        loads.accepted(all[i].addr, &all, now, rtt[i]);
        loads.finished(all[i].addr);
    }
    assert!(picked.iter().all(|n| n.abs_diff(1_000) < 150), "{picked:?}");
}

#[test]
fn endpoint_with_open_connections_gets_fewer() {
    let (mut loads, all, mut draw) = (Loads::default(), endpoints(2), fixed_draws());
    let now = epoch();
    for _ in 0..100 {
        loads.pick(Policy::LeastLoaded, &all, &[], now, &mut draw).unwrap();
    }
    let open = [loads.outstanding(all[0].addr), loads.outstanding(all[1].addr)];
    assert!(open[0].abs_diff(open[1]) <= 1, "{open:?}");
}

#[test]
fn slow_endpoint_is_tried_again_once_its_sample_is_old() {
    let (mut loads, all) = (Loads::default(), endpoints(2));
    let now = epoch();
    loads.accepted(all[1].addr, &all, now, 50 * MS);
    loads.accepted(all[0].addr, &all, now, 2 * MS);
    assert_eq!(loads.pick(Policy::LeastLoaded, &all, &[], now, |_| 0), Some(0));
    loads.finished(all[0].addr);
    let later = now + 10 * DECAY;
    loads.accepted(all[0].addr, &all, later, 20 * MS);
    assert_eq!(loads.pick(Policy::LeastLoaded, &all, &[], later, |_| 0), Some(1));
}

#[test]
fn failed_endpoint_is_tried_last_and_returns_after_a_while() {
    let (mut loads, all, mut draw) = (Loads::default(), endpoints(3), fixed_draws());
    let now = epoch();
    for policy in [Policy::LeastLoaded, Policy::RoundRobin, Policy::Random] {
        loads.failed(all[1].addr, now, now);
        for _ in 0..50 {
            let i = loads.pick(policy, &all, &[], now, &mut draw).unwrap();
            assert_ne!(i, 1, "{policy:?}");
            loads.finished(all[i].addr);
        }
        let others = [all[0].addr, all[2].addr];
        assert_eq!(loads.pick(policy, &all, &others, now, &mut draw), Some(1), "the last resort");
        loads.finished(all[1].addr);
    }
    let later = now + AVOID_MAX;
    let back = (0..50).any(|_| loads.pick(Policy::Random, &all, &[], later, &mut draw) == Some(1));
    assert!(back);
}

#[test]
fn burst_of_failures_is_one_and_failing_again_afterwards_is_another() {
    let (mut loads, all) = (Loads::default(), endpoints(2));
    let (now, addr) = (epoch(), all[0].addr);
    for i in 0..100 {
        loads.take(addr, now);
        loads.failed(addr, now, now + i * MS);
    }
    assert_eq!(loads.outstanding(addr), 0);
    assert_eq!(loads.avoided_for(addr, now), Some(AVOID_FIRST + 99 * MS));
    // Tried all the same, since all are avoided.
    let now = now + 100 * MS;
    loads.failed(addr, now, now);
    assert_eq!(loads.avoided_for(addr, now), Some(AVOID_FIRST));
    let mut later = now + AVOID_FIRST;
    for doubled in [2, 4, 8, 16] {
        loads.failed(addr, later, later);
        assert_eq!(loads.avoided_for(addr, later), Some(doubled * AVOID_FIRST));
        later += doubled * AVOID_FIRST;
    }
    loads.accepted(addr, &all, later, MS);
    loads.failed(addr, later, later);
    assert_eq!(loads.avoided_for(addr, later), Some(AVOID_FIRST));
}

#[test]
fn who_is_back_first_after_an_outage_of_all_does_not_keep_all_connections() {
    let (mut loads, all, mut draw) = (Loads::default(), endpoints(3), fixed_draws());
    let mut now = epoch();
    // So long that each is avoided for as long as any is.
    for _ in 0..6 {
        for one in &all {
            loads.failed(one.addr, now, now);
        }
        now += AVOID_MAX;
    }
    // The first one's turn comes before the others'.
    loads.failed(all[0].addr, now, now);
    for one in &all[1..] {
        loads.failed(one.addr, now, now + AVOID_MAX / 2);
    }
    now += AVOID_MAX;
    assert_eq!(loads.avoided_for(all[1].addr, now), Some(AVOID_MAX / 2));
    loads.accepted(all[0].addr, &all, now, MS);
    assert_eq!(loads.avoided_for(all[0].addr, now), None);
    for one in &all[1..] {
        assert_eq!(loads.avoided_for(one.addr, now), Some(AVOID_FIRST));
    }
    now += AVOID_FIRST;
    let mut picked = [false; 3];
    for _ in 0..50 {
        picked[loads.pick(Policy::Random, &all, &[], now, &mut draw).unwrap()] = true;
    }
    assert_eq!(picked, [true; 3]);
    loads.failed(all[1].addr, now, now);
    let again = loads.avoided_for(all[1].addr, now);
    assert_eq!(again, Some(2 * AVOID_FIRST), "it begins anew");
}

#[test]
fn endpoint_that_fails_now_and_then_has_no_other_tried_that_is_dead() {
    let (mut loads, all, mut now) = (Loads::default(), endpoints(2), epoch());
    for _ in 0..6 {
        loads.failed(all[1].addr, now, now);
        now += AVOID_MAX;
    }
    loads.failed(all[1].addr, now, now);
    loads.failed(all[0].addr, now, now);
    loads.accepted(all[0].addr, &all, now, MS);
    assert_eq!(loads.avoided_for(all[1].addr, now), Some(AVOID_MAX));
}

#[test]
fn who_is_back_beside_one_that_served_meanwhile_says_nothing_of_others() {
    let (mut loads, all, now) = (Loads::default(), endpoints(3), epoch());
    for failing in [0, 1] {
        loads.failed(all[failing].addr, now, now);
        loads.failed(all[failing].addr, now + AVOID_FIRST, now + AVOID_FIRST);
    }
    let now = now + AVOID_FIRST;
    loads.accepted(all[0].addr, &all, now, MS);
    assert_eq!(loads.avoided_for(all[1].addr, now), Some(2 * AVOID_FIRST));
}

#[test]
fn round_robin_takes_turns() {
    let (mut loads, all) = (Loads::default(), endpoints(3));
    let now = epoch();
    let turns: Vec<_> =
        (0..6).map(|_| loads.pick(Policy::RoundRobin, &all, &[], now, |_| 0).unwrap()).collect();
    assert_eq!(turns[..3].iter().copied().collect::<std::collections::BTreeSet<_>>().len(), 3);
    assert_eq!(turns[..3], turns[3..]);
}

#[test]
fn endpoint_that_is_gone_is_forgotten_once_idle() {
    let (mut loads, all) = (Loads::default(), endpoints(1));
    loads.pick(Policy::Random, &all, &[], epoch(), |_| 0);
    loads.retain(|_| false);
    assert_eq!(loads.outstanding(all[0].addr), 1, "still open");
    loads.finished(all[0].addr);
    loads.retain(|_| false);
    assert!(loads.by_addr.is_empty());
}

proptest! {
    #[test]
    fn everyone_is_tried_exactly_once(
        n in 1usize..20,
        failing in proptest::collection::vec(any::<bool>(), 20),
        policy in prop_oneof![
            Just(Policy::LeastLoaded), Just(Policy::RoundRobin), Just(Policy::Random)
        ],
        seed in any::<usize>(),
    ) {
        let (mut loads, all) = (Loads::default(), endpoints(n));
        let now = epoch();
        for (i, endpoint) in all.iter().enumerate() {
            if failing[i] { loads.failed(endpoint.addr, now, now); }
        }
        let mut step = seed;
        let mut tried = Vec::new();
        while let Some(i) = loads.pick(policy, &all, &tried, now, |n| {
            step = step.wrapping_mul(31).wrapping_add(17);
            step % n
        }) {
            prop_assert!(!tried.contains(&all[i].addr));
            tried.push(all[i].addr);
        }
        prop_assert_eq!(tried.len(), n);
    }
}
