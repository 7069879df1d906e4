//! The direct way: verdicts, what is remembered and told of direct connections, and the decision.
//!
//! A *generation* is a 64-bit hash of all that a decision was made from. It lies beside what it is
//! about: a source pod's in [`PodOutbound`](crate::maps::PodOutbound), a destination's in
//! `DESTINATIONS`, an endpoint's pod's in [`PodInbound`](crate::maps::PodInbound). A verdict holds only
//! while it names the very generations that lie there, so one write there ends every verdict that it
//! touches, wherever those are.

use core::hint::black_box;

use crate::addr::WireAddr;
use crate::counter::Counter;
use crate::maps::map_struct;

/// Endpoints in a verdict. A service with more is carried by the agent.
pub const MAX_ENDPOINTS: usize = 32;

/// [`DirectEvent::kind`]: the connection is established.
pub const OPENED: u32 = 1;
/// [`DirectEvent::kind`]: an established connection has ended.
pub const CLOSED: u32 = 2;
/// [`DirectEvent::kind`]: it was never established.
pub const FAILED: u32 = 3;

/// [`SockMeta::fins`](crate::maps::SockMeta::fins), [`DirectEvent::fins`]: the client ended its direction.
pub const FIN_SENT: u32 = 1;
/// The server ended its direction.
pub const FIN_RECEIVED: u32 = 1 << 1;
/// The client ended in `FIN_WAIT2`: whether the server's FIN came is what the byte counter tells.
pub const FIN_UNKNOWN: u32 = 1 << 2;

map_struct! {
    /// What a verdict is about. Map `VERDICTS`.
    pub struct VerdictKey {
        /// Cookie of the source pod's netns.
        pub netns: u64,
        /// The destination as dialled.
        pub dst: WireAddr,
        /// Zero.
        pub reserved: u32,
    }
}

map_struct! {
    /// One endpoint of a verdict.
    pub struct VerdictEndpoint {
        /// Generation of its pod, or zero: the agent carries what goes to this one.
        pub generation: u64,
        /// Where it accepts connections.
        pub addr: WireAddr,
        /// Its netns, as the source pod's netns numbers it.
        pub nsid: u32,
    }
}

map_struct! {
    /// What was decided for connections of a pod to a destination. Map `VERDICTS`.
    pub struct Verdict {
        /// What it is about, again: the element may be recycled for another under a program that reads.
        pub key: VerdictKey,
        /// Generation of the source pod.
        pub source: u64,
        /// Generation of the destination's address.
        pub destination: u64,
        /// On `CLOCK_BOOTTIME`, when the agent wants to decide again; zero is never.
        pub until_ns: u64,
        /// The endpoints; only the first `len` count.
        pub endpoints: [VerdictEndpoint; MAX_ENDPOINTS],
        /// How many.
        pub len: u32,
        /// Zero.
        pub reserved: u32,
    }
}

map_struct! {
    /// A captured connection as the agent finds it. The value of `FLOWS`.
    pub struct Flow {
        /// Where the application meant to go.
        pub orig: WireAddr,
        /// The endpoint that a verdict chose, or zeros.
        pub endpoint: WireAddr,
    }
}

map_struct! {
    /// An open direct connection. Map `DIRECT_CONNS`, by the client's socket cookie.
    pub struct DirectConn {
        /// Cookie of the client's netns.
        pub netns: u64,
        /// On `CLOCK_BOOTTIME`, when `connect()` was called.
        pub started_ns: u64,
        /// On `CLOCK_BOOTTIME`, when it was established; zero before.
        pub opened_ns: u64,
        /// The client.
        pub src: WireAddr,
        /// Where the application meant to go.
        pub orig: WireAddr,
        /// The endpoint.
        pub endpoint: WireAddr,
        /// Hash of the client pod's UID.
        pub client: [u32; 2],
        /// Hash of the server pod's UID.
        pub server: [u32; 2],
        /// Zero.
        pub reserved: u32,
    }
}

map_struct! {
    /// What happened to a direct connection. Ring `EVENTS`.
    pub struct DirectEvent {
        /// The client's socket cookie.
        pub cookie: u64,
        /// On `CLOCK_BOOTTIME`.
        pub at_ns: u64,
        /// `tcpi_bytes_acked` of the client's socket: SYN and FIN count as a byte each.
        pub acked: u64,
        /// `tcpi_bytes_received` of the client's socket: FIN counts as a byte.
        pub received: u64,
        /// `received` when the state became `FIN_WAIT2`.
        pub received_at_fin: u64,
        /// The connection.
        pub conn: DirectConn,
        /// [`OPENED`], [`CLOSED`], [`FAILED`].
        pub kind: u32,
        /// [`FIN_SENT`], [`FIN_RECEIVED`], [`FIN_UNKNOWN`].
        pub fins: u32,
        /// 1 if all that the client sent, its FIN included, was acknowledged.
        pub all_acked: u32,
        /// Smoothed round trip, in eighths of a microsecond.
        pub srtt: u32,
        /// Segments that were sent again.
        pub retransmits: u32,
        /// Zero.
        pub reserved: u32,
    }
}

/// What a verdict makes of a `connect()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The verdict does not hold.
    Stale(Counter),
    /// The agent carries it, to this endpoint if that is still there.
    Agent(VerdictEndpoint),
    /// Straight to this endpoint, if its pod is still of that generation and listens.
    Direct(VerdictEndpoint),
}

/// Applies a verdict: `source` and `destination` are the generations that hold now, `draw` is uniform.
#[inline(always)]
pub fn choose(
    verdict: &Verdict,
    key: &VerdictKey,
    source: u64,
    destination: u64,
    draw: u32,
    now_ns: impl FnOnce() -> u64,
) -> Choice {
    let len = verdict.len;
    if len == 0 || len as usize > MAX_ENDPOINTS {
        return Choice::Stale(Counter::DirectStale);
    }
    let until_ns = verdict.until_ns;
    if until_ns != 0 && now_ns() >= until_ns {
        return Choice::Stale(Counter::DirectStale);
    }
    // The mask is what the verifier understands, and `black_box` what keeps LLVM from leaving it out:
    // "math between map_value pointer and register with unbounded min value is not allowed".
    let index = black_box(draw % len) as usize & (MAX_ENDPOINTS - 1);
    // The comparison comes after the copy, which `black_box` keeps the compiler from changing (LLVM has
    // no fence for BPF): what was read of a recycled element must not pass for this destination's. The
    // kernel fills an element from its front, so whoever sees a new endpoint sees a new key.
    let endpoint = black_box(verdict.endpoints[index]);
    let holds = verdict.key == *key
        && verdict.source == source
        && verdict.destination == destination
        && source != 0
        && destination != 0;
    if !holds {
        Choice::Stale(Counter::DirectStale)
    } else if endpoint.generation == 0 {
        Choice::Agent(endpoint)
    } else {
        Choice::Direct(endpoint)
    }
}

impl VerdictKey {
    /// The key for a destination dialled in a netns.
    #[inline(always)]
    pub const fn new(netns: u64, dst: WireAddr) -> Self {
        Self { netns, dst, reserved: 0 }
    }
}

impl VerdictEndpoint {
    /// No endpoint.
    pub const NONE: Self = Self { generation: 0, addr: WireAddr::NONE, nsid: 0 };
}

impl DirectEvent {
    /// Payload that the client sent and the server's kernel acknowledged.
    pub fn payload_sent(&self) -> u64 {
        let fin = self.fins & FIN_SENT != 0 && self.all_acked != 0;
        self.acked.saturating_sub(1 + u64::from(fin))
    }

    /// Payload that reached the client's kernel.
    pub fn payload_received(&self) -> u64 {
        self.received.saturating_sub(u64::from(self.server_finished()))
    }

    /// Whether the server ended its direction with FIN. Wrong only where a client that has ended its own
    /// direction goes away after exactly one more byte and before the server's end.
    pub fn server_finished(&self) -> bool {
        self.fins & FIN_RECEIVED != 0
            || self.fins & FIN_UNKNOWN != 0 && self.received > self.received_at_fin
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use proptest::prelude::*;

    use super::*;

    fn addr(text: &str) -> WireAddr {
        text.parse::<SocketAddr>().unwrap().into()
    }

    fn verdict(generations: &[u64]) -> (Verdict, VerdictKey) {
        let key = VerdictKey::new(7, addr("10.96.0.1:80"));
        let mut endpoints = [VerdictEndpoint::NONE; MAX_ENDPOINTS];
        for (n, (to, generation)) in endpoints.iter_mut().zip(generations).enumerate() {
            let addr = addr(&format!("10.0.0.{}:8080", n + 1));
            *to = VerdictEndpoint { generation: *generation, addr, nsid: 1 };
        }
        let len = u32::try_from(generations.len()).unwrap();
        let made =
            Verdict { key, source: 1, destination: 2, until_ns: 0, endpoints, len, reserved: 0 };
        (made, key)
    }

    #[test]
    fn verdict_holds_only_for_its_generations_its_key_and_its_time() {
        let (mut made, key) = verdict(&[9]);
        let ask = |made: &Verdict, key: &VerdictKey, source, destination, now| {
            choose(made, key, source, destination, 0, || now)
        };
        let direct = Choice::Direct(made.endpoints[0]);
        let stale = Choice::Stale(Counter::DirectStale);
        assert_eq!(ask(&made, &key, 1, 2, 0), direct);
        assert_eq!(ask(&made, &key, 3, 2, 0), stale, "another source");
        assert_eq!(ask(&made, &key, 1, 3, 0), stale, "another destination");
        let other = VerdictKey::new(8, key.dst);
        assert_eq!(ask(&made, &other, 1, 2, 0), stale, "recycled for another pod");
        let other = VerdictKey::new(7, addr("10.96.0.1:81"));
        assert_eq!(ask(&made, &other, 1, 2, 0), stale, "recycled for another port");
        made.until_ns = 50;
        assert_eq!(ask(&made, &key, 1, 2, 49), direct);
        assert_eq!(ask(&made, &key, 1, 2, 50), stale, "the agent wants to decide again");
        let (mut unset, key) = verdict(&[9]);
        (unset.source, unset.destination) = (0, 0);
        assert_eq!(ask(&unset, &key, 0, 0, 0), stale, "nothing was ever decided");
    }

    proptest! {
        #[test]
        fn whoever_is_drawn_is_one_of_the_endpoints(
            len in 0u32..40,
            draw: u32,
            directs in proptest::collection::vec(any::<bool>(), MAX_ENDPOINTS),
        ) {
            let generations: Vec<u64> = directs.iter().map(|direct| u64::from(*direct)).collect();
            let (mut made, key) = verdict(&generations);
            made.len = len;
            match choose(&made, &key, 1, 2, draw, || 0) {
                Choice::Stale(_) => prop_assert!(len == 0 || len > 32),
                Choice::Agent(one) => prop_assert!(one.generation == 0),
                Choice::Direct(one) => {
                    prop_assert!(made.endpoints[..len as usize].contains(&one));
                    prop_assert!(one.generation != 0);
                }
            }
        }

        #[test]
        fn every_endpoint_is_drawn_as_often(len in 1u32..=32) {
            let (mut made, key) = verdict(&[1; 32]);
            made.len = len;
            let mut seen = [0u32; 32];
            for draw in 0..len * 10 {
                let Choice::Direct(one) = choose(&made, &key, 1, 2, draw, || 0) else {
                    panic!("not direct");
                };
                seen[usize::from(one.addr.ip[3].to_ne_bytes()[3]) - 1] += 1;
            }
            prop_assert!(seen[..len as usize].iter().all(|n| *n == 10));
        }
    }

    #[test]
    fn control_segments_are_no_payload() {
        let conn = DirectConn {
            netns: 0,
            started_ns: 0,
            opened_ns: 0,
            src: WireAddr::NONE,
            orig: WireAddr::NONE,
            endpoint: WireAddr::NONE,
            client: [0; 2],
            server: [0; 2],
            reserved: 0,
        };
        let event = |acked, received, at_fin, fins, all_acked| DirectEvent {
            cookie: 0,
            at_ns: 0,
            acked,
            received,
            received_at_fin: at_fin,
            conn,
            kind: CLOSED,
            fins,
            all_acked,
            srtt: 0,
            retransmits: 0,
            reserved: 0,
        };
        let payload = |e: DirectEvent| (e.payload_sent(), e.payload_received());
        // SYN, 5 bytes, FIN; 7 bytes and FIN back, the server first.
        assert_eq!(payload(event(7, 8, 0, FIN_SENT | FIN_RECEIVED, 1)), (5, 7));
        // The client first: the FIN came after FIN_WAIT2.
        assert_eq!(payload(event(7, 8, 7, FIN_SENT | FIN_UNKNOWN, 1)), (5, 7));
        // The client closed, and the server's FIN never came.
        assert_eq!(payload(event(7, 7, 7, FIN_SENT | FIN_UNKNOWN, 1)), (5, 7));
        // Reset with the last byte and the FIN unacknowledged.
        assert_eq!(payload(event(5, 7, 0, FIN_SENT, 0)), (4, 7));
        assert_eq!(payload(event(0, 0, 0, 0, 0)), (0, 0), "never established");
    }
}
