//! What lies in the maps: `repr(C)`, integers and byte arrays only, every byte a named field.

mod specs;

pub(crate) use specs::layout_hash;
pub use specs::{EVENTS_BYTES, MAX_SHARDS, MapSize, MapSpec, SKIP_CIDRS_PER_POD, SPECS};

use crate::addr::{WireAddr, WireIp};

/// Declares a struct that lies in a map, refuses padding, and derives its layout hash.
macro_rules! map_struct {
    ($(#[$doc:meta])* $vis:vis struct $name:ident {
        $($(#[$field_doc:meta])* $field_vis:vis $field:ident: $type:ty,)*
    }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        $vis struct $name {
            $($(#[$field_doc])* $field_vis $field: $type,)*
        }

        const _: () =
            assert!(size_of::<$name>() == 0 $(+ size_of::<$type>())*, "padding must be a field");

        impl $crate::abi::Layout for $name {
            const HASH: u64 = {
                let hash = $crate::abi::text($crate::abi::SEED, stringify!($name));
                let hash = $crate::abi::number(hash, size_of::<$name>());
                let hash = $crate::abi::number(hash, align_of::<$name>());
                $(
                    let hash = $crate::abi::text(hash, stringify!($field));
                    let hash = $crate::abi::text(hash, stringify!($type));
                    let hash = $crate::abi::number(hash, core::mem::offset_of!($name, $field));
                    let hash = $crate::abi::number(hash, size_of::<$type>());
                )*
                hash
            };
        }

        // SAFETY: `repr(C)`, `Copy`, no padding (asserted above), and every bit pattern is valid.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $name {}
    };
}
pub(crate) use map_struct;

/// Port ranges in a list of a pod; `mesh_core::settings` refuses more.
pub const MAX_RANGES: usize = 16;

/// Outbound listeners of a pod per family. More than twice the workers that anybody runs, and each
/// gives the pod another 28,000 connections, since all of them have one destination address.
pub const MAX_PORTS: usize = 16;

/// [`PodOutbound::flags`]: capture every destination, not only those of the mesh.
pub const OUTBOUND_ALL: u32 = 1;
/// [`PodOutbound::flags`], [`PodInbound::flags`]: bypass a silent agent instead of failing.
pub const FAIL_OPEN: u32 = 1 << 1;
/// [`PodOutbound::flags`]: the pod has entries in `SKIP_CIDRS`.
pub const HAS_SKIP_CIDRS: u32 = 1 << 2;
/// [`PodInbound::flags`]: refuse plain text.
pub const STRICT: u32 = 1 << 3;
/// [`PendingPod::flags`]: the agent does not know this pod.
pub const UNKNOWN: u32 = 1 << 4;

/// Value of `NETWORKS`: whoever is in this block has to be read first, so connections are captured.
pub const BLOCK_UNREAD: u32 = 1;
/// Value of `NETWORKS`: left alone, although it may lie in a larger block that is captured.
pub const BLOCK_LEFT_ALONE: u32 = 2;
/// Value of `NETWORKS`: as [`BLOCK_LEFT_ALONE`], and somebody has connected there since the agent looked.
pub const BLOCK_USED: u32 = 3;

/// [`SockMeta::role`]: an application's socket.
pub const ROLE_APP: u8 = 0;
/// [`SockMeta::role`]: a socket of the agent that must leave as it is.
pub const ROLE_AGENT: u8 = 1;
/// [`SockMeta::role`]: a socket of the agent that delivers to an application in its pod.
pub const ROLE_DELIVER: u8 = 2;
/// [`SockMeta::role`]: an application's socket that goes straight to an endpoint on this node.
pub const ROLE_DIRECT: u8 = 3;
/// [`SockMeta::role`]: an application's socket that its pod keeps out of the mesh, to a pod of this node.
pub const ROLE_PLAIN: u8 = 4;
/// [`SockMeta::role`]: a listener of the agent for what is captured. No program can give that to its own.
pub const ROLE_LISTENER: u8 = 5;

/// All of these: part of [`crate::abi::HASH`].
pub const MEANINGS: [(&str, u32); 14] = [
    ("OUTBOUND_ALL", OUTBOUND_ALL),
    ("FAIL_OPEN", FAIL_OPEN),
    ("HAS_SKIP_CIDRS", HAS_SKIP_CIDRS),
    ("STRICT", STRICT),
    ("UNKNOWN", UNKNOWN),
    ("BLOCK_UNREAD", BLOCK_UNREAD),
    ("BLOCK_LEFT_ALONE", BLOCK_LEFT_ALONE),
    ("BLOCK_USED", BLOCK_USED),
    ("ROLE_APP", ROLE_APP as u32),
    ("ROLE_AGENT", ROLE_AGENT as u32),
    ("ROLE_DELIVER", ROLE_DELIVER as u32),
    ("ROLE_DIRECT", ROLE_DIRECT as u32),
    ("ROLE_PLAIN", ROLE_PLAIN as u32),
    ("ROLE_LISTENER", ROLE_LISTENER as u32),
];

map_struct! {
    /// Ports from `first` to `last`, both included, in host order.
    pub struct PortRange {
        /// Lowest port.
        pub first: u16,
        /// Highest port.
        pub last: u16,
    }
}

map_struct! {
    /// A list of port ranges.
    pub struct PortRanges {
        /// The ranges; only the first `len` count.
        pub ranges: [PortRange; MAX_RANGES],
        /// How many.
        pub len: u32,
    }
}

map_struct! {
    /// How an enrolled pod's outgoing connections are treated. Map `POD_OUTBOUND`, by netns cookie.
    pub struct PodOutbound {
        /// The pod's IPv4 address (v4-mapped), or zero.
        pub ip4: WireIp,
        /// The pod's IPv6 address, or zero.
        pub ip6: WireIp,
        /// Ports of the agent's listeners on `ip4`, in host order; only the first `ports_len` count.
        pub ports4: [u16; MAX_PORTS],
        /// The same on `ip6`.
        pub ports6: [u16; MAX_PORTS],
        /// Destination ports that are never captured.
        pub skip: PortRanges,
        /// Listeners per family.
        pub ports_len: u32,
        /// [`OUTBOUND_ALL`], [`FAIL_OPEN`], [`HAS_SKIP_CIDRS`].
        pub flags: u32,
        /// Which listener is next. Advanced by the program without an atomic: two connections at
        /// once may take the same one, which is all that can go wrong.
        pub turn: u32,
        /// Hash of the pod's UID, two words: whose entry this is after a restart of the agent. Zero: of a pod
        /// that an agent of another layout had captured, which one nobody knows.
        pub pod: [u32; 2],
        /// Generation, two words: verdicts about other generations do not hold. Zero: none does.
        pub generation: [u32; 2],
        /// The number of the write that this is of: no other write of any pod's entry has it while somebody reads
        /// this one. The kernel may give the element to another pod meanwhile, and to this one again.
        pub written: u32,
    }
}

map_struct! {
    /// How connections to an enrolled pod are treated. Map `POD_INBOUND`, by the pod's address.
    pub struct PodInbound {
        /// Ports that reach the application without the agent.
        pub skip: PortRanges,
        /// The agent's outbound listeners on this address: never a destination from outside.
        pub own_ports: [u16; MAX_PORTS],
        /// How many of them.
        pub own_ports_len: u32,
        /// Inbound listeners in `INBOUND`, shards 0 to this.
        pub listeners: u32,
        /// [`STRICT`], [`FAIL_OPEN`].
        pub flags: u32,
        /// Hash of the pod's UID, as in [`PodOutbound`].
        pub pod: [u32; 2],
        /// Generation, as in [`PodOutbound`].
        pub generation: [u32; 2],
        /// Number of the write, as in [`PodOutbound`].
        pub written: u32,
    }
}

map_struct! {
    /// A captured connection as the agent sees it. Map `FLOWS`; the value is a
    /// [`Flow`](crate::direct::Flow).
    pub struct FlowKey {
        /// Cookie of the pod's netns: two pods may use one address and port (loopback).
        pub netns: u64,
        /// The application's address and port: the accepted socket's peer.
        pub src: WireAddr,
        /// The port of the listener that was dialled instead, in network order. Without it two
        /// connections from one source port, which the kernel allows to different listeners, would
        /// share a key, and one would be carried to the other's destination.
        pub listener_be: u16,
        /// Zero.
        pub reserved: u16,
    }
}

map_struct! {
    /// A connection that `sk_lookup` is to know: a delivery under way, a direct connection, a captured one
    /// from a second address of its pod, or one that is none of these. Map `DELIVERIES`; the value is an
    /// [`Announcement`](crate::announce::Announcement). The tuple names pods by their addresses, which are
    /// unique on a node.
    pub struct DeliveryKey {
        /// What the application will see as its client.
        pub src: WireAddr,
        /// The application.
        pub dst: WireAddr,
    }
}

map_struct! {
    /// Direct connections of a pod to an endpoint, whatever their source port. Map `ADMISSIONS`.
    pub struct AdmissionKey {
        /// The client's address.
        pub client: WireIp,
        /// The endpoint.
        pub server: WireAddr,
    }
}

map_struct! {
    /// Until when such connections are let in, and of which two pods. The value of `ADMISSIONS`.
    pub struct Admission {
        /// Generation of the client's pod.
        pub client: [u32; 2],
        /// Generation of the endpoint's pod.
        pub server: [u32; 2],
        /// On `CLOCK_BOOTTIME`, in units of 2^20 ns, about 1 ms; wraps after 52 days.
        pub until: u32,
    }
}

map_struct! {
    /// An inbound listener. Map `INBOUND`.
    pub struct ListenerKey {
        /// The pod's address.
        pub ip: WireIp,
        /// Which of the pod's listeners: there is one per worker.
        pub shard: u32,
    }
}

map_struct! {
    /// What follows the prefix length in a key of `SKIP_CIDRS`.
    pub struct SkipCidr {
        /// Netns cookie, as two words in the machine's order: always matched in full.
        pub netns: [u32; 2],
        /// The network.
        pub ip: WireIp,
    }
}

map_struct! {
    /// What is remembered on a socket. Map `SOCK_META`.
    pub struct SockMeta {
        /// `CLOCK_BOOTTIME` of `connect()`, if direct.
        pub started_ns: u64,
        /// Bytes received when the state became `FIN_WAIT2`, if direct.
        pub received_at_fin: u64,
        /// Where the application meant to go, if `captured`.
        pub orig: WireAddr,
        /// The endpoint that a verdict chose, or zeros.
        pub endpoint: WireAddr,
        /// Hash of the client pod's UID, if direct.
        pub client: [u32; 2],
        /// Hash of the server pod's UID, if direct.
        pub server: [u32; 2],
        /// [`ROLE_APP`], [`ROLE_AGENT`], [`ROLE_DELIVER`], [`ROLE_DIRECT`], [`ROLE_PLAIN`],
        /// [`ROLE_LISTENER`].
        pub role: u8,
        /// 1 while the socket's destination is rewritten.
        pub captured: u8,
        /// Which directions of a direct connection have ended: [`crate::direct::FIN_SENT`] and on.
        pub fins: u8,
        /// Zero.
        pub reserved: [u8; 5],
    }
}

impl SockMeta {
    /// A socket of this role of which nothing else is known.
    pub const fn of(role: u8) -> Self {
        Self {
            started_ns: 0,
            received_at_fin: 0,
            orig: WireAddr::NONE,
            endpoint: WireAddr::NONE,
            client: [0; 2],
            server: [0; 2],
            role,
            captured: 0,
            fins: 0,
            reserved: [0; 5],
        }
    }
}

map_struct! {
    /// A pod that has a cgroup and is not captured yet: how what it connects is treated until then. Map
    /// `PENDING`, by the ID of the cgroup that the kubelet made for the pod.
    pub struct PendingPod {
        /// `CLOCK_BOOTTIME` from which on it is left alone; 0: not before the agent says so.
        pub until_ns: u64,
        /// Destination ports that are never captured.
        pub skip: PortRanges,
        /// [`OUTBOUND_ALL`], [`FAIL_OPEN`], [`UNKNOWN`].
        pub flags: u32,
    }
}

map_struct! {
    /// What the agent tells all programs. Map `CONTROL`, one element.
    pub struct Control {
        /// `CLOCK_BOOTTIME` when the agent last said that it lives.
        pub heartbeat_ns: u64,
        /// Cookie of the node's own namespace.
        pub node_netns: u64,
        /// ID of the cgroup of the node's kubelet; 0 if it is not known.
        pub kubelet_cgroup: u64,
        /// How many entries `PENDING` has: with none, nobody looks there.
        pub pending: u64,
        /// 1 while no further direct connection is to begin: the agent follows as many as it may.
        pub no_direct: u64,
    }
}

map_struct! {
    /// What only agents read, and what outlives them. Map `SECRETS`, one element.
    pub struct Secrets {
        /// Key of the generations' hash, made with the map: who writes manifests cannot aim for a
        /// collision, and the next agent computes the same generations.
        pub generation_key: [u64; 2],
    }
}

/// A 64-bit number as structs carry it whose alignment is four bytes.
#[inline(always)]
pub const fn words(number: u64) -> [u32; 2] {
    // Truncation is the point: the low word, then the high one.
    #[expect(clippy::cast_possible_truncation, reason = "split into two words")]
    let words = [number as u32, (number >> 32) as u32];
    words
}

/// What [`words`] took apart.
#[inline(always)]
pub const fn number(words: [u32; 2]) -> u64 {
    words[0] as u64 | (words[1] as u64) << 32
}

/// Whether `until` is still to come, of something that lasts for `most` from its beginning. All are on
/// `CLOCK_BOOTTIME` in units of 2^20 ns.
#[inline(always)]
pub const fn is_within(now: u32, until: u32, most: u32) -> bool {
    // Of two processors that write and read at the same moment, the one may be ahead.
    const SLACK: u32 = 1024;
    // The clock wraps after 52 days, and what nobody has removed must not come back to life after half of that:
    // what is further off than it can be is long over.
    let left = until.wrapping_sub(now);
    left != 0 && left <= most + SLACK
}

impl Admission {
    /// How long connections are let in after a SYN has left; of those that follow soon half of it is certain. Within a
    /// node a SYN arrives at once; the rest is for a busy one. Each that is sent again, which is a second later at the
    /// earliest (`TCP_TIMEOUT_INIT`), is admitted anew.
    pub const LASTS: u32 = 1024;

    /// Whether it is for pods of these generations at this time. A pod without a generation is being
    /// changed, or leaves.
    #[inline(always)]
    pub fn admits(&self, client: [u32; 2], server: [u32; 2], now: u32) -> bool {
        number(client) != 0
            && number(server) != 0
            && self.client == client
            && self.server == server
            && is_within(now, self.until, Self::LASTS)
    }
}

impl SkipCidr {
    /// Bits before those of the address.
    pub const NETNS_BITS: u32 = 64;

    /// The key for an address seen from a netns.
    #[inline(always)]
    pub const fn new(netns: u64, ip: WireIp) -> Self {
        Self { netns: words(netns), ip }
    }
}

impl PortRanges {
    /// No ports.
    pub const NONE: Self = Self { ranges: [PortRange { first: 0, last: 0 }; MAX_RANGES], len: 0 };

    /// Whether `port` is in one of the ranges.
    #[inline(always)]
    pub fn contains(&self, port: u16) -> bool {
        for (range, index) in self.ranges.iter().zip(0u32..) {
            if index >= self.len {
                return false;
            }
            if range.first <= port && port <= range.last {
                return true;
            }
        }
        false
    }
}

/// Whether `port` is among the first `len` of `ports`.
#[inline(always)]
pub(crate) fn has_port(ports: &[u16; MAX_PORTS], len: u32, port: u16) -> bool {
    for (own, index) in ports.iter().zip(0u32..) {
        if index >= len {
            return false;
        }
        if *own == port {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn admission_is_of_two_pods_as_they_were_and_of_a_time() {
        let (client, server, other) = (words(7), words(1 << 40), words(8));
        let admission = Admission { client, server, until: 1000 };
        assert!(admission.admits(client, server, 999));
        assert!(!admission.admits(client, server, 1000));
        assert!(!admission.admits(other, server, 999));
        assert!(!admission.admits(client, other, 999));
        let changing = Admission { client: words(0), ..admission };
        assert!(!changing.admits(words(0), server, 999), "one that has no generation is nobody");
        let changing = Admission { server: words(0), ..admission };
        assert!(!changing.admits(client, words(0), 999));
    }

    #[test]
    fn time_goes_on_where_its_number_begins_again() {
        assert!(is_within(u32::MAX - 1, 3, 5));
        assert!(!is_within(3, u32::MAX - 1, 5));
        assert!(!is_within(5, 5, 5));
        assert!(!is_within(5, 5 + (1 << 31), 8192), "of 26 days ago");
    }
}
