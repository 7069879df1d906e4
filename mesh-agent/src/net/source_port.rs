//! Which source port a connection to the application takes.
//!
//! Left to the kernel, it would come from the range out of which the application's own connections
//! and the clients get theirs, and that hurts three times:
//!
//! - With a client's address shown to the application, the pod then holds two kinds of sockets for
//!   one client: those that it opened itself, `(pod:80, client:p)`, and those that this agent opens
//!   in its name, `(client:p, pod:80)`. The kernel does not see that the second is the mirror image
//!   of the first. With the same `p`, the SYN of one arrives at the other's socket, and neither
//!   connection works. So the ports must differ: exactly from the client that is being served, and by
//!   range from whatever else it has open or will open.
//! - A socket that connects closes first when its client did, and stays in TIME_WAIT for a minute.
//!   The kernel's own search steps over such ports one by one and finds none after 28,000; a port
//!   that was chosen by `bind()` replaces its TIME_WAIT at once, if both sides use timestamps
//!   (`tcp_twsk_unique()`, the case without `twp`).
//! - `connect()` of the application does not use a port that anybody has bound to. Ports outside its
//!   range cost it nothing.

use std::iter;
use std::net::SocketAddr;
use std::ops::RangeInclusive;

/// Where to look, and how often to try there, in this order.
///
/// 16384 to 32767: in no system's default range for outgoing connections (Linux 32768 to 60999,
/// others 49152 and up), and few listen there. 61000 to 65535: above Linux's. Eight tries fail
/// together once in 65,000 times when a quarter of the first range is taken *for this client and this
/// destination*. The rest is for 20,000 and more of these: the last row finds one of the remaining
/// ports practically always until nine in ten are taken.
const SEARCH: [(RangeInclusive<u16>, usize); 3] =
    [(16384..=32767, 8), (61000..=65535, 4), (1024..=65535, 48)];

/// What a connection to `to` must not come from: the client's own port; and where it comes from the address
/// that it goes to, as without a client, the port there. A socket that connects to itself is connected: a
/// port that nobody listens at would answer, with what it is sent.
pub(super) fn avoided(client: Option<SocketAddr>, to: SocketAddr) -> [Option<u16>; 2] {
    let from = client.unwrap_or(to);
    [client.map(|client| client.port()), (from.ip() == to.ip()).then_some(to.port())]
}

/// The ports to try for one connection, without these.
pub(super) fn candidates(
    avoid: [Option<u16>; 2],
    draw: impl FnMut(RangeInclusive<u16>) -> u16,
) -> impl Iterator<Item = u16> {
    let tries = SEARCH.into_iter().flat_map(|(range, tries)| iter::repeat_n(range, tries));
    tries.map(draw).filter(move |port| !avoid.contains(&Some(*port)))
}

/// Above what Linux takes for outgoing connections, and above the last port there that servers are known by
/// (61613 to 61616, ActiveMQ).
const UNWANTED: RangeInclusive<u16> = 61_617..=65_535;

/// The ports to try for a listener in a pod: 0 is the kernel's choice.
pub(super) fn for_listeners(
    mut draw: impl FnMut(RangeInclusive<u16>) -> u16,
) -> impl Iterator<Item = u16> {
    let unwanted: [u16; 16] = std::array::from_fn(|_| draw(UNWANTED));
    unwanted.into_iter().chain([0]).chain(candidates([None; 2], draw))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_own_port_is_never_tried() {
        let mut step = 0_u16;
        let ports = candidates([Some(16385), None], |range| {
            step += 1;
            range.start() + step % 2
        });
        let ports: Vec<_> = ports.collect();
        assert_eq!(ports.len(), 60 - 4, "every second of the first eight is 16385: {ports:?}");
        assert!(!ports.contains(&16385));
    }

    #[test]
    fn no_connection_comes_from_where_it_goes() {
        let to: SocketAddr = "10.1.0.2:16385".parse().unwrap();
        let is_tried = |client: Option<&str>| {
            let client = client.map(|client| client.parse().unwrap());
            candidates(avoided(client, to), |range| range.start() + 1).any(|port| port == to.port())
        };
        assert!(!is_tried(None), "from the pod's own address");
        assert!(!is_tried(Some("10.1.0.2:40000")), "the pod is its own client");
        assert!(is_tried(Some("10.1.0.3:40000")), "another pod may come from there");
        assert!(!is_tried(Some("10.1.0.3:16385")), "its own port");
    }

    #[test]
    fn listeners_take_what_no_server_wants_and_then_what_there_is() {
        let ports: Vec<_> = for_listeners(|range| *range.start()).collect();
        assert!(ports[..16].iter().all(|port| *port == 61_617), "{ports:?}");
        assert_eq!(ports[16], 0);
        assert_eq!(ports.len(), 16 + 1 + 60);
    }

    #[test]
    fn ranges_of_outgoing_connections_come_last() {
        for edge in [RangeInclusive::start, RangeInclusive::end] {
            let ports: Vec<_> = candidates([None; 2], |range| *edge(&range)).collect();
            assert!(ports[..12].iter().all(|port| !(32768..=60999).contains(port)), "{ports:?}");
        }
    }
}
