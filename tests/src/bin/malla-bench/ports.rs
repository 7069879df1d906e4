//! Enough ports: what is measured is how fast connections come about, and not how soon the kernel lets go of the
//! ports of those that have ended.
//!
//! Whoever closes first, here the client, keeps a connection's ends in TIME_WAIT for a minute. With
//! `tcp_tw_reuse` a new connection to the same address and port may have its port after a second
//! (`tcp_twsk_unique()`). `connect()` looks at all even ports of the range, one after the other, before it looks
//! at an odd one (`__inet_hash_connect()`). So to one port of the server half of the client's can be had in each
//! second, and whoever connects faster looks through thousands in vain, every time. On one node, where a side
//! has 18,432 ports, that is 9,216 a second: 9,550 were measured on all sides alike, and in the last quarter of
//! the time 0.58 of what it was in the first. Across nodes it is 27,648, where plain TCP came to 15,000 with
//! one client and to 20,000 with 16.
//!
//! For another port of the server all ports of the client are there once more. So new connections go to 6 of
//! them in turns ([`crate::server::NEW`]): to 55,296 a second on one node and to 165,888 across there is a port
//! at once, and the server, which accepts on one thread, is far from that. What is in the mesh across nodes ends
//! at the agent's listener in the client's pod whatever it dials: there it stays at 27,648, five times of what
//! comes.

use anyhow::Result;

use crate::results::Side;

/// What is set in both pods, for readers of the table.
pub(crate) const SETTINGS: &str = "In both pods net.ipv4.tcp_tw_reuse=1, \
     net.ipv4.tcp_max_tw_buckets=1048576 and net.ipv4.ip_local_port_range=10240 65535, and new \
     connections go to 6 ports of the server in turns, so that a client's own TIME_WAIT ports are not \
     what is measured";

/// The range, in which no port of the server's lies.
const RANGE: (&str, &str) = ("net/ipv4/ip_local_port_range", "10240 65535");

/// The same as files, with room for all that may wait: for each port that clients dial as many as the client has.
/// What finds no room (131,072 by default on a machine with 24 GB) does not wait, and answers the server's end
/// with a reset.
const SYSCTLS: [(&str, &str); 3] =
    [("net/ipv4/tcp_tw_reuse", "1"), ("net/ipv4/tcp_max_tw_buckets", "1048576"), RANGE];

/// For how many seconds the node knows a connection that has ended. With the 120 of the default it would come to
/// 331,776 of them, 110,592 of each side, and past `nf_conntrack_max` (262,144 here) it drops packets. So it is
/// those of one second, some 20,000, and some ten thousands more that are past it and that no look-up has come
/// by yet, which clears what it finds.
const TRACKED: (&str, &str) = ("net/netfilter/nf_conntrack_tcp_timeout_time_wait", "1");

/// Sets up where connections begin: a pod, or a node with a hop on it.
///
/// # Errors
///
/// Fails when `sysctl`, which is given a name and a value, does.
pub(crate) fn provide(sysctl: impl Fn(&str, &str) -> Result<()>) -> Result<()> {
    SYSCTLS.iter().try_for_each(|(key, value)| sysctl(key, value))
}

/// Sets up a node that tracks connections.
///
/// # Errors
///
/// As [`provide`].
pub(crate) fn forget_soon(sysctl: impl Fn(&str, &str) -> Result<()>) -> Result<()> {
    sysctl(TRACKED.0, TRACKED.1)
}

/// Takes the client to the ports of `side`, if it has some of its own.
///
/// # Errors
///
/// As [`provide`].
pub(crate) fn turn_to(side: Side, sysctl: impl Fn(&str, &str) -> Result<()>) -> Result<()> {
    own(side).map_or(Ok(()), |range| sysctl(RANGE.0, range))
}

/// The client's ports on the same node, as many for each side. All sides' connections end at the
/// server's pod, and the node still tracks those of the second before: where the other side had
/// just used a port, a new connection had to be given another one, at 8 times the CPU.
fn own(side: Side) -> Option<&'static str> {
    match side {
        Side::Plain | Side::Hops | Side::Lane | Side::Quic => None,
        Side::Near => Some("10240 28671"),
        Side::Direct => Some("28672 47103"),
        Side::Redirect => Some("47104 65535"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::{NEW, ports};

    /// The first and the last of a range.
    fn ends(range: &str) -> [usize; 2] {
        let (first, last) = range.split_once(' ').unwrap();
        [first, last].map(|port| port.parse().unwrap())
    }

    fn count(range: &str) -> usize {
        let [first, last] = ends(range);
        last - first + 1
    }

    #[test]
    fn every_side_finds_ports_for_50_000_connections_a_second() {
        for side in [Side::Plain, Side::Near, Side::Direct, Side::Redirect] {
            let range = own(side).unwrap_or(RANGE.1);
            assert!(count(range) / 2 * NEW.len() > 50_000, "{side:?}");
            assert!(ends(range)[0].is_multiple_of(2), "as many even ones as odd ones: {side:?}");
        }
    }

    #[test]
    fn sides_of_the_same_node_share_the_range_and_no_port() {
        let ranges =
            [Side::Near, Side::Direct, Side::Redirect].map(|side| ends(own(side).unwrap()));
        let [first, last] = ends(RANGE.1);
        assert_eq!((ranges[0][0], ranges[2][1]), (first, last));
        assert!(ranges.windows(2).all(|two| two[0][1] + 1 == two[1][0]), "{ranges:?}");
        let [a, b, c] = ranges.map(|[first, last]| last - first);
        assert!(a == b && b == c, "{ranges:?}");
    }

    #[test]
    fn the_server_dials_from_no_port_that_it_listens_at() {
        let [first, _] = ends(RANGE.1);
        assert!(ports().into_iter().all(|port| usize::from(port) < first));
    }

    #[test]
    fn all_that_may_wait_has_room() {
        let room: usize = SYSCTLS[1].1.parse().unwrap();
        // Plain and before two hops to each port of the server, both carriers to the agent's.
        let across = count(RANGE.1) * (2 * NEW.len() + 2);
        assert!(across < room, "{across}");
        assert!(count(RANGE.1) * NEW.len() < room, "the same node");
    }
}
