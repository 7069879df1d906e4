//! What a pod may connect to before it is captured: pure, as [`crate::verdict`].
//!
//! Such a pod is known by its cgroup alone, so what goes by its namespace or its addresses
//! (`skip-outbound-cidrs`, the pod itself) is not asked: for a moment too much is refused, never too
//! little.

use crate::addr::WireAddr;
use crate::counter::Counter;
use crate::maps::{FAIL_OPEN, OUTBOUND_ALL, PendingPod, UNKNOWN};
use crate::verdict::{Agent, Connect, is_link_local, is_local};

/// How deep below the root the cgroup of a pod may lie: that of a kubelet which is itself in a container
/// lies six deep, and each level costs a lookup, while there is a pending pod.
pub const DEEPEST: i32 = 12;

/// Decides over a TCP `connect()` to `dst` of a process in the cgroup of `pod`.
///
/// Fails closed: what would be captured a moment later is denied.
#[inline(always)]
pub fn decide_pending(
    pod: &PendingPod,
    dst: &WireAddr,
    now_ns: u64,
    is_destination: impl FnOnce() -> bool,
    agent: impl FnOnce() -> Agent,
) -> Connect {
    if is_local(&dst.ip) {
        return Connect::Pass(Counter::ConnectLoopback);
    }
    if is_link_local(&dst.ip) {
        return Connect::Pass(Counter::ConnectLinkLocal);
    }
    if pod.skip.contains(dst.port()) {
        return Connect::Pass(Counter::ConnectSkippedPort);
    }
    if pod.flags & OUTBOUND_ALL == 0 && !is_destination() {
        return Connect::Pass(Counter::ConnectNotMesh);
    }
    // Whatever became of the agent, a pod that it does not know is free after a while.
    if pod.until_ns != 0 && now_ns >= pod.until_ns {
        return Connect::Pass(Counter::ConnectStillUnknown);
    }
    match agent() {
        Agent::Gone => Connect::Pass(Counter::ConnectDeadMan),
        Agent::Silent if pod.flags & FAIL_OPEN != 0 => Connect::Pass(Counter::ConnectFailOpen),
        Agent::Silent | Agent::Alive if pod.flags & UNKNOWN != 0 => {
            Connect::Deny(Counter::ConnectUnknown)
        }
        Agent::Silent | Agent::Alive => Connect::Deny(Counter::ConnectPending),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::maps::{MAX_RANGES, PortRange, PortRanges};

    const POD: PendingPod = PendingPod { until_ns: 0, skip: PortRanges::NONE, flags: 0 };

    fn decide(pod: &PendingPod, dst: &str, now_ns: u64, mesh: bool, agent: Agent) -> Connect {
        let dst = dst.parse::<SocketAddr>().unwrap();
        decide_pending(pod, &WireAddr::from(dst), now_ns, || mesh, || agent)
    }

    #[test]
    fn what_would_be_captured_is_refused_and_nothing_else() {
        let decide = |pod: &PendingPod, dst, mesh| decide(pod, dst, 1, mesh, Agent::Alive);
        let refused = Connect::Deny(Counter::ConnectPending);
        for dst in ["10.96.0.10:80", "[fd96::10]:80"] {
            assert_eq!(decide(&POD, dst, true), refused);
            assert_eq!(decide(&POD, dst, false), Connect::Pass(Counter::ConnectNotMesh));
            let all = PendingPod { flags: OUTBOUND_ALL, ..POD };
            assert_eq!(decide(&all, dst, false), refused);
        }
        for (dst, reason) in [
            ("127.0.0.1:80", Counter::ConnectLoopback),
            ("[::1]:80", Counter::ConnectLoopback),
            ("169.254.169.254:80", Counter::ConnectLinkLocal),
        ] {
            assert_eq!(decide(&POD, dst, true), Connect::Pass(reason), "{dst}");
        }
        let mut skip = PortRanges { ranges: [PortRange { first: 0, last: 0 }; MAX_RANGES], len: 1 };
        skip.ranges[0] = PortRange { first: 80, last: 80 };
        let skips = PendingPod { skip, ..POD };
        let skipped = Connect::Pass(Counter::ConnectSkippedPort);
        assert_eq!(decide(&skips, "10.96.0.10:80", true), skipped);
        assert_eq!(decide(&skips, "10.96.0.10:81", true), refused);
    }

    #[test]
    fn pod_that_stays_unknown_is_free_in_time_also_without_an_agent() {
        let pod = PendingPod { until_ns: 10, flags: UNKNOWN, ..POD };
        for agent in [Agent::Alive, Agent::Silent] {
            let decide = |now_ns| decide(&pod, "10.96.0.10:80", now_ns, true, agent);
            assert_eq!(decide(9), Connect::Deny(Counter::ConnectUnknown));
            assert_eq!(decide(10), Connect::Pass(Counter::ConnectStillUnknown));
        }
    }

    #[test]
    fn silent_agent_is_treated_as_by_pods_that_are_captured() {
        let decide =
            |flags, agent| decide(&PendingPod { flags, ..POD }, "10.96.0.10:80", 1, true, agent);
        let refused = Connect::Deny(Counter::ConnectPending);
        assert_eq!(decide(0, Agent::Silent), refused);
        assert_eq!(decide(FAIL_OPEN, Agent::Alive), refused);
        assert_eq!(decide(FAIL_OPEN, Agent::Silent), Connect::Pass(Counter::ConnectFailOpen));
        assert_eq!(decide(0, Agent::Gone), Connect::Pass(Counter::ConnectDeadMan));
    }
}
