//! The decisions against their rules, told once more in other words.

use std::net::{IpAddr, SocketAddr};

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::addr::from_ip;
use crate::maps::{MAX_RANGES, PortRange, PortRanges};

const ALIVE: u64 = 100 * 3_600 * 1_000_000_000;

/// A pod in words that the programs do not use, so that the model below shares nothing with them.
#[derive(Clone, Debug)]
struct Pod {
    ip4: Option<IpAddr>,
    ip6: Option<IpAddr>,
    ports: Vec<u16>,
    skip: Vec<(u16, u16)>,
    flags: u32,
    turn: u32,
}

impl Pod {
    fn outbound(&self) -> PodOutbound {
        let (ports, ports_len) = self.own_ports();
        PodOutbound {
            ip4: self.ip4.map_or([0; 4], from_ip),
            ip6: self.ip6.map_or([0; 4], from_ip),
            ports4: ports,
            ports6: ports,
            skip: self.skip(),
            ports_len,
            flags: self.flags,
            turn: self.turn,
            pod: [0; 2],
            generation: [0; 2],
            written: 0,
        }
    }

    fn inbound(&self, listeners: u32) -> PodInbound {
        let (own_ports, own_ports_len) = self.own_ports();
        let flags = self.flags;
        PodInbound {
            skip: self.skip(),
            own_ports,
            own_ports_len,
            listeners,
            flags,
            pod: [0; 2],
            generation: [0; 2],
            written: 0,
        }
    }

    fn own_ports(&self) -> ([u16; MAX_PORTS], u32) {
        let mut ports = [0; MAX_PORTS];
        ports[..self.ports.len()].copy_from_slice(&self.ports);
        (ports, u32::try_from(self.ports.len()).unwrap())
    }

    fn skip(&self) -> PortRanges {
        let mut ranges = PortRanges::NONE;
        for (to, (first, last)) in ranges.ranges.iter_mut().zip(&self.skip) {
            *to = PortRange { first: *first, last: *last };
            ranges.len += 1;
        }
        ranges
    }

    fn skips(&self, port: u16) -> bool {
        self.skip.iter().any(|(first, last)| (*first..=*last).contains(&port))
    }
}

/// Few enough values that every rule is met often.
fn ip() -> impl Strategy<Value = IpAddr> {
    let known = [
        "10.1.0.2",
        "10.1.0.3",
        "10.96.0.1",
        "127.0.0.1",
        "127.255.0.9",
        "0.0.0.0",
        "0.0.0.1",
        "169.254.169.254",
        "169.255.0.1",
        "::1",
        "::",
        "::2",
        "fd00::2",
        "fd00::3",
        "fe80::1",
        "febf::1",
        "fec0::1",
        "fd96::1",
        "::ffff:10.1.0.2",
        "::ffff:127.0.0.1",
    ];
    prop_oneof![
        4 => proptest::sample::select(known.to_vec()).prop_map(|ip| ip.parse().unwrap()),
        1 => any::<[u8; 4]>().prop_map(IpAddr::from),
        1 => any::<[u8; 16]>().prop_map(IpAddr::from),
    ]
}

fn port() -> impl Strategy<Value = u16> {
    prop_oneof![3 => 1u16..40, 1 => any::<u16>()]
}

fn pod() -> impl Strategy<Value = Pod> {
    (
        proptest::option::of(Just("10.1.0.2".parse().unwrap())),
        proptest::option::of(Just("fd00::2".parse().unwrap())),
        vec(port(), 0..=MAX_PORTS),
        vec((port(), port()), 0..=MAX_RANGES),
        0u32..16,
        any::<u32>(),
    )
        .prop_map(|(ip4, ip6, ports, skip, flags, turn)| Pod {
            ip4,
            ip6,
            ports,
            skip,
            flags,
            turn,
        })
}

fn announced() -> impl Strategy<Value = Announced> {
    use Announced::{Delivery, ForAnother, Nothing, Plain};
    proptest::sample::select(vec![Nothing, Nothing, Nothing, Delivery, ForAnother, Plain])
}

/// Heartbeats on both sides of every threshold.
fn silence_ns() -> impl Strategy<Value = u64> {
    let second = 1_000_000_000;
    let steps = vec![0, STALE_NS, STALE_NS + 1, GONE_NS, GONE_NS + 1, second];
    prop_oneof![proptest::sample::select(steps), 0..2 * GONE_NS]
}

/// The rules of `connect`, from the documents and the standard library's notion of addresses.
fn connect_model(pod: &Pod, dst: SocketAddr, destination: bool, block: bool, ns: u64) -> Connect {
    let ip = dst.ip().to_canonical();
    let own = if ip.is_ipv4() { pod.ip4 } else { pod.ip6 };
    if ip.is_loopback() || ip.is_unspecified() {
        return Connect::Pass(Counter::ConnectLoopback);
    }
    if Some(ip) == own {
        return if pod.ports.contains(&dst.port()) {
            Connect::Deny(Counter::ConnectOwnListener)
        } else {
            Connect::Pass(Counter::ConnectSelf)
        };
    }
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    if link_local {
        return Connect::Pass(Counter::ConnectLinkLocal);
    }
    if pod.skips(dst.port()) {
        return Connect::Pass(Counter::ConnectSkippedPort);
    }
    if !destination && pod.flags & OUTBOUND_ALL == 0 {
        return Connect::Pass(Counter::ConnectNotMesh);
    }
    if block && pod.flags & HAS_SKIP_CIDRS != 0 {
        return Connect::Pass(Counter::ConnectSkippedCidr);
    }
    if ns > GONE_NS {
        return Connect::Pass(Counter::ConnectDeadMan);
    }
    if ns > STALE_NS && pod.flags & FAIL_OPEN != 0 {
        return Connect::FailOpen;
    }
    match own {
        Some(own) if !pod.ports.is_empty() => {
            let turn = usize::try_from(pod.turn).unwrap() % pod.ports.len();
            Connect::Capture { ip: from_ip(own), port: pod.ports[turn] }
        }
        _ => Connect::Deny(Counter::ConnectNoListener),
    }
}

/// Whether a pod can only have sent it to itself.
fn is_own(local: SocketAddr, remote: SocketAddr) -> bool {
    let [local, remote] = [local, remote].map(|addr| addr.ip().to_canonical());
    local == remote || remote.is_loopback() || local.is_loopback()
}

/// The rules of `sk_lookup`.
fn lookup_model(
    pod: &Pod,
    listeners: u32,
    local: SocketAddr,
    remote: SocketAddr,
    announced: Announced,
    ns: u64,
) -> Lookup {
    if is_own(local, remote) {
        return Lookup::Pass(Counter::LookupSelf);
    }
    match announced {
        Announced::Delivery => return Lookup::Pass(Counter::LookupDelivery),
        Announced::ForAnother => return Lookup::Drop(Counter::LookupAnother),
        _ => {}
    }
    if pod.skips(local.port()) {
        return Lookup::Pass(Counter::LookupSkippedPort);
    }
    if ns > GONE_NS {
        return Lookup::Pass(Counter::LookupDeadMan);
    }
    if pod.ports.contains(&local.port()) {
        return Lookup::Drop(Counter::LookupOwnListener);
    }
    if pod.flags & STRICT != 0 {
        return Lookup::Drop(Counter::LookupStrict);
    }
    if ns > STALE_NS && pod.flags & FAIL_OPEN != 0 {
        return Lookup::Pass(Counter::LookupFailOpen);
    }
    match listeners {
        0 => Lookup::Drop(Counter::LookupListenerGone),
        n => Lookup::Steer { shard: u32::from(remote.port()) % n },
    }
}

#[test]
fn block_is_captured_or_left_alone_and_its_first_use_is_noted() {
    assert_eq!(Block::of(BLOCK_UNREAD), Block::Unread);
    assert_eq!(Block::of(BLOCK_LEFT_ALONE), Block::LeftAlone(Some(BLOCK_USED)));
    assert_eq!(Block::of(BLOCK_USED), Block::LeftAlone(None), "once is enough");
}

#[test]
fn kubelet_is_its_cgroup_in_the_nodes_namespace() {
    let control =
        Control { heartbeat_ns: 1, node_netns: 3, kubelet_cgroup: 77, pending: 0, no_direct: 0 };
    assert!(is_kubelet(&control, 3, || 77));
    assert!(!is_kubelet(&control, 3, || 78), "another process of the node");
    assert!(!is_kubelet(&control, 4, || panic!("not even asked")), "a pod");
    let unknown = Control { kubelet_cgroup: 0, ..control };
    assert!(!is_kubelet(&unknown, 3, || 0), "nobody knows which it is");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn connect_does_what_the_rules_say(
        pod in pod(),
        (ip, port) in (ip(), port()),
        destination: bool,
        block: bool,
        ns in silence_ns(),
    ) {
        let dst = SocketAddr::new(ip, port);
        let verdict = decide_connect(
            &pod.outbound(),
            &dst.into(),
            || destination,
            || block,
            || Agent::at(ALIVE - ns, ALIVE),
        );
        prop_assert_eq!(verdict, connect_model(&pod, dst, destination, block, ns));
    }

    #[test]
    fn lookup_does_what_the_rules_say(
        pod in pod(),
        listeners in 0u32..4,
        local in (ip(), port()),
        remote in (ip(), port()),
        announced in announced(),
        ns in silence_ns(),
    ) {
        let (local, remote) = (SocketAddr::from(local), SocketAddr::from(remote));
        let verdict = decide_lookup(
            &pod.inbound(listeners),
            &local.into(),
            &remote.into(),
            || announced,
            || Agent::at(ALIVE - ns, ALIVE),
        );
        prop_assert_eq!(verdict, lookup_model(&pod, listeners, local, remote, announced, ns));
    }

    #[test]
    fn strict_pod_gets_at_other_addresses_what_it_sends_itself_and_deliveries(
        local in (ip(), port()),
        remote in (ip(), port()),
        delivery: bool,
        ns in silence_ns(),
    ) {
        let (local, remote) = (SocketAddr::from(local), SocketAddr::from(remote));
        let agent = || Agent::at(ALIVE - ns, ALIVE);
        let wanted = if is_own(local, remote) {
            Lookup::Pass(Counter::LookupSelf)
        } else if delivery {
            Lookup::Pass(Counter::LookupDelivery)
        } else if ns > GONE_NS {
            Lookup::Pass(Counter::LookupDeadMan)
        } else {
            Lookup::Drop(Counter::LookupStrictElsewhere)
        };
        let verdict = decide_elsewhere(&local.into(), &remote.into(), || delivery, agent);
        prop_assert_eq!(verdict, wanted);
    }
}

#[test]
fn agent_is_silent_after_five_seconds_and_gone_after_a_day() {
    let at = |age_ns| Agent::at(ALIVE - age_ns, ALIVE);
    assert_eq!(at(STALE_NS), Agent::Alive);
    assert_eq!(at(STALE_NS + 1), Agent::Silent);
    assert_eq!(at(GONE_NS), Agent::Silent);
    assert_eq!(at(GONE_NS + 1), Agent::Gone);
    assert_eq!(Agent::at(0, 1), Agent::Gone, "never heard");
    assert_eq!(Agent::at(ALIVE + 1, ALIVE), Agent::Alive, "heard after the clock was read");
}

/// What becomes of a SYN to a strict pod that fails open, when nothing was announced.
fn to_a_strict_pod(local: &str, remote: &str, agent: Agent) -> Lookup {
    let flags = STRICT | FAIL_OPEN;
    let pod = Pod { ip4: None, ip6: None, ports: vec![], skip: vec![], flags, turn: 0 };
    let [local, remote] =
        [local, remote].map(|addr| WireAddr::from(addr.parse::<SocketAddr>().unwrap()));
    decide_lookup(&pod.inbound(1), &local, &remote, || Announced::Nothing, || agent)
}

#[test]
fn strict_mode_outlives_a_silent_agent_that_fails_open() {
    let verdict = to_a_strict_pod("10.1.0.2:80", "10.1.0.3:4000", Agent::Silent);
    assert_eq!(verdict, Lookup::Drop(Counter::LookupStrict));
}

#[test]
fn strict_pod_reaches_itself_from_loopback_too() {
    let itself = Lookup::Pass(Counter::LookupSelf);
    for (local, remote) in [
        ("10.1.0.2:80", "10.1.0.2:4000"),
        ("10.1.0.2:80", "127.0.0.1:4000"),
        ("[fd00::2]:80", "[::1]:4000"),
        ("127.0.0.1:80", "10.1.0.2:4000"),
        ("[::1]:80", "[fd00::2]:4000"),
    ] {
        assert_eq!(to_a_strict_pod(local, remote, Agent::Alive), itself, "{remote}");
    }
    // Somebody may send from there.
    for (local, remote) in [("10.1.0.2:80", "0.0.0.0:4000"), ("[fd00::2]:80", "[::]:4000")] {
        let refused = Lookup::Drop(Counter::LookupStrict);
        assert_eq!(to_a_strict_pod(local, remote, Agent::Alive), refused, "{remote}");
    }
}
