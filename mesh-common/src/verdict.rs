//! The decisions of the programs, without a kernel: the same code runs there and in the tests below.
//!
//! What needs a map lookup is passed as a closure and asked only when it matters.

use crate::addr::{WireAddr, WireIp, is_v4};
use crate::announce::Announced;
use crate::counter::Counter;
use crate::maps::{
    BLOCK_LEFT_ALONE, BLOCK_UNREAD, BLOCK_USED, Control, FAIL_OPEN, HAS_SKIP_CIDRS, MAX_PORTS,
    OUTBOUND_ALL, PodInbound, PodOutbound, STRICT, has_port,
};

/// A silent agent is bypassed by pods that fail open after this long: five missed heartbeats.
pub const STALE_NS: u64 = 5_000_000_000;

/// An agent silent for a day was uninstalled without `detach`: the programs switch themselves off.
pub const GONE_NS: u64 = 24 * 3_600 * 1_000_000_000;

/// What the heartbeat says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agent {
    /// It lives.
    Alive,
    /// Silent for more than [`STALE_NS`].
    Silent,
    /// Silent for more than [`GONE_NS`], or never heard.
    Gone,
}

impl Agent {
    /// Both on `CLOCK_BOOTTIME`, so that a suspended machine's agent does not look alive.
    #[inline(always)]
    pub fn at(heartbeat_ns: u64, now_ns: u64) -> Self {
        // A heartbeat written on another CPU after `now_ns` was read is younger than zero: alive.
        let age_ns = now_ns.saturating_sub(heartbeat_ns);
        if heartbeat_ns == 0 || age_ns > GONE_NS {
            Self::Gone
        } else if age_ns > STALE_NS {
            Self::Silent
        } else {
            Self::Alive
        }
    }
}

/// Whether it is the node's kubelet that connects. By its cgroup, which no other process is in: its
/// address is also that of every process that shares the node's network, and of what the node
/// masquerades.
#[inline(always)]
pub fn is_kubelet(control: &Control, netns: u64, cgroup: impl FnOnce() -> u64) -> bool {
    control.kubelet_cgroup != 0 && control.node_netns == netns && cgroup() == control.kubelet_cgroup
}

/// What becomes of a `connect()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connect {
    /// Goes where the application said.
    Pass(Counter),
    /// `EPERM`.
    Deny(Counter),
    /// Bypasses a silent agent: straight to an endpoint that a verdict names, since what was allowed
    /// before needs no agent, or else where the application said.
    FailOpen,
    /// Goes to the agent's listener on the pod's own address.
    Capture {
        /// The pod's address of the destination's family.
        ip: WireIp,
        /// The listener's port.
        port: u16,
    },
}

/// Decides over an application's TCP `connect()` to `dst` in the pod.
///
/// Fails closed: what would be captured but has nowhere to go is denied.
#[inline(always)]
pub fn decide_connect(
    pod: &PodOutbound,
    dst: &WireAddr,
    is_destination: impl FnOnce() -> bool,
    is_skipped: impl FnOnce() -> bool,
    agent: impl FnOnce() -> Agent,
) -> Connect {
    let v4 = is_v4(&dst.ip);
    let (own_ip, ports) = if v4 { (&pod.ip4, &pod.ports4) } else { (&pod.ip6, &pod.ports6) };
    let port = dst.port();
    if is_local(&dst.ip) {
        return Connect::Pass(Counter::ConnectLoopback);
    }
    if dst.ip == *own_ip {
        // Nothing else can listen there, and an entry in `FLOWS` that an earlier connection from the
        // same source port left behind must not be taken for this one.
        if has_port(ports, pod.ports_len, port) {
            return Connect::Deny(Counter::ConnectOwnListener);
        }
        return Connect::Pass(Counter::ConnectSelf);
    }
    if is_link_local(&dst.ip) {
        return Connect::Pass(Counter::ConnectLinkLocal);
    }
    if pod.skip.contains(port) {
        return Connect::Pass(Counter::ConnectSkippedPort);
    }
    if pod.flags & OUTBOUND_ALL == 0 && !is_destination() {
        return Connect::Pass(Counter::ConnectNotMesh);
    }
    if pod.flags & HAS_SKIP_CIDRS != 0 && is_skipped() {
        return Connect::Pass(Counter::ConnectSkippedCidr);
    }
    match agent() {
        Agent::Gone => return Connect::Pass(Counter::ConnectDeadMan),
        Agent::Silent if pod.flags & FAIL_OPEN != 0 => {
            return Connect::FailOpen;
        }
        Agent::Silent | Agent::Alive => {}
    }
    if pod.ports_len == 0 || *own_ip == [0; 4] {
        return Connect::Deny(Counter::ConnectNoListener);
    }
    // The mask is what the verifier understands; `ports_len` never exceeds it.
    let index = (pod.turn % pod.ports_len) as usize & (MAX_PORTS - 1);
    Connect::Capture { ip: *own_ip, port: ports[index] }
}

/// What a value of `NETWORKS` says of an address that is no destination of the mesh by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// Somebody of the mesh may be there: captured as a destination is.
    Unread,
    /// Not captured. Written back, if there is something to write.
    LeftAlone(Option<u32>),
}

impl Block {
    /// What `value` means. The agent keeps what is used, so the first use is written down.
    #[inline(always)]
    pub const fn of(value: u32) -> Self {
        match value {
            BLOCK_UNREAD => Self::Unread,
            BLOCK_LEFT_ALONE => Self::LeftAlone(Some(BLOCK_USED)),
            _ => Self::LeftAlone(None),
        }
    }
}

/// What becomes of a SYN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// The kernel's own lookup finds the listener.
    Pass(Counter),
    /// RST.
    Drop(Counter),
    /// Goes to this one of the agent's inbound listeners.
    Steer {
        /// Which.
        shard: u32,
    },
}

/// Decides over a SYN from `remote` to `local`, an address of an enrolled pod.
#[inline(always)]
pub fn decide_lookup(
    pod: &PodInbound,
    local: &WireAddr,
    remote: &WireAddr,
    announced: impl FnOnce() -> Announced,
    agent: impl FnOnce() -> Agent,
) -> Lookup {
    let port = local.port();
    // This is also how captured connections reach the outbound listeners.
    if is_itself(local, remote) {
        return Lookup::Pass(Counter::LookupSelf);
    }
    match announced() {
        Announced::Delivery => return Lookup::Pass(Counter::LookupDelivery),
        // It must not get what was meant for its predecessor, not even through its agent.
        Announced::ForAnother => return Lookup::Drop(Counter::LookupAnother),
        Announced::Plain | Announced::Nothing => {}
    }
    if pod.skip.contains(port) {
        return Lookup::Pass(Counter::LookupSkippedPort);
    }
    let agent = agent();
    if agent == Agent::Gone {
        return Lookup::Pass(Counter::LookupDeadMan);
    }
    if has_port(&pod.own_ports, pod.own_ports_len, port) {
        return Lookup::Drop(Counter::LookupOwnListener);
    }
    // Before fail-open: who asked for "never in plain text" must not get it by crashing the agent.
    if pod.flags & STRICT != 0 {
        return Lookup::Drop(Counter::LookupStrict);
    }
    if agent == Agent::Silent && pod.flags & FAIL_OPEN != 0 {
        return Lookup::Pass(Counter::LookupFailOpen);
    }
    if pod.listeners == 0 {
        return Lookup::Drop(Counter::LookupListenerGone);
    }
    Lookup::Steer { shard: u32::from(remote.port()) % pod.listeners }
}

/// Decides over a SYN from `remote` to `local`, an address of a strict pod that the agent does not know as
/// its: a link-local one, one of a second interface, one that the API does not tell, or told a moment ago.
///
/// Nothing says there what may pass, `skip-inbound-ports` neither. What the agent itself delivers may: it
/// knows of an address before the pod is enrolled with it. So may the pod itself, from that address or from
/// loopback. From another of its addresses it is a stranger: nobody here knows whose that is, and the
/// kernel picks another one where two IPv4 addresses are of one network (`ip route get`, `src`).
#[inline(always)]
pub fn decide_elsewhere(
    local: &WireAddr,
    remote: &WireAddr,
    is_delivery: impl FnOnce() -> bool,
    agent: impl FnOnce() -> Agent,
) -> Lookup {
    if is_itself(local, remote) {
        return Lookup::Pass(Counter::LookupSelf);
    }
    if is_delivery() {
        return Lookup::Pass(Counter::LookupDelivery);
    }
    if agent() == Agent::Gone {
        return Lookup::Pass(Counter::LookupDeadMan);
    }
    Lookup::Drop(Counter::LookupStrictElsewhere)
}

/// Whether a pod connects to itself.
///
/// The interface cannot tell: for a pod that dials its own address the kernel reports `eth0` (Linux 6.18).
/// A socket may be bound to loopback, or come there from the pod's address (so does what its own rules send
/// there): nothing of that is not the pod's, since on any other interface such an address is a martian
/// (`ip_route_input_slow()`, `ip6_rcv_core()`).
#[inline(always)]
fn is_itself(local: &WireAddr, remote: &WireAddr) -> bool {
    remote.ip == local.ip || is_loopback(&remote.ip) || is_loopback(&local.ip)
}

/// 127.0.0.0/8 and `::1`.
#[inline(always)]
fn is_loopback(ip: &WireIp) -> bool {
    let last = u32::from_be(ip[3]);
    if is_v4(ip) {
        return last >> 24 == 127;
    }
    ip[0] == 0 && ip[1] == 0 && ip[2] == 0 && last == 1
}

/// 127.0.0.0/8, 0.0.0.0, `::1`, `::`: never leaves the pod. Linux connects "unspecified" to loopback.
#[inline(always)]
pub(crate) fn is_local(ip: &WireIp) -> bool {
    let last = u32::from_be(ip[3]);
    if is_v4(ip) {
        return last >> 24 == 127 || last == 0;
    }
    ip[0] == 0 && ip[1] == 0 && ip[2] == 0 && last <= 1
}

/// 169.254.0.0/16 and fe80::/10.
#[inline(always)]
pub(crate) fn is_link_local(ip: &WireIp) -> bool {
    if is_v4(ip) {
        return u32::from_be(ip[3]) >> 16 == 0xa9fe;
    }
    u32::from_be(ip[0]) >> 22 == 0xfe80 >> 6
}

#[cfg(test)]
mod tests;
