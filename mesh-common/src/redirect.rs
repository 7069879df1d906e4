//! Which packets between two pods of a node need not go through it.
//!
//! A connection is taken as a whole or not at all, from its first segment on: what the node's
//! netfilter has begun to track or to translate goes on through it, in both directions. An answer that
//! was redirected round the translation of a service's address would come from an address that its
//! client never dialled.

use crate::WireAddr;
use crate::addr::WireIp;
use crate::counter::Counter;
use crate::maps::map_struct;
use crate::packet::{MAC_LEN, Segment};
use crate::verdict::Agent;

map_struct! {
    /// Where a pod is plugged in. Map `PEERS`, by the pod's address.
    pub struct Peer {
        /// The node's end of the pod's cable.
        pub ifindex: u32,
        /// When the pod was plugged in, in 2^10 ns on `CLOCK_BOOTTIME`: connections of before are not
        /// this pod's.
        pub since: u32,
        /// Hash of the pod's UID, two words: whose entry this is after a restart of the agent.
        pub pod: [u32; 2],
        /// The link-layer address of the pod's end.
        pub pod_mac: [u8; MAC_LEN],
        /// That of the node's end.
        pub node_mac: [u8; MAC_LEN],
    }
}

map_struct! {
    /// A connection between two pods, the one plugged in with the lower index first. Map `PEER_FLOWS`.
    pub struct PeerFlowKey {
        /// Its end at the lower index.
        pub low: WireAddr,
        /// Its other end.
        pub high: WireAddr,
    }
}

map_struct! {
    /// How such a connection began.
    pub struct PeerFlow {
        /// The sequence number that an answer to its SYN acknowledges.
        pub answer: u32,
        /// [`Peer::since`] of the pod at the lower index.
        pub low_since: u32,
        /// Of the other one.
        pub high_since: u32,
    }
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redirect {
    /// The node has it, and whoever else looks at packets there.
    Leave(Option<Counter>),
    /// The node has it, and what was known of this connection was of another one.
    Forget(PeerFlowKey),
    /// It opens a connection, to be remembered before it is handed over.
    Open(PeerFlowKey, PeerFlow, Peer),
    /// Into the pod.
    To(Peer),
}

/// Decides over a segment that came from the pod plugged in at `ifindex`, and is addressed to the node.
#[inline(always)]
pub fn decide_redirect(
    segment: &Segment,
    ifindex: u32,
    peer: impl Fn(&WireIp) -> Option<Peer>,
    flow: impl FnOnce(&PeerFlowKey) -> Option<PeerFlow>,
    agent: impl FnOnce() -> Agent,
) -> Redirect {
    let Some(to) = peer(&segment.dst.ip) else {
        return Redirect::Leave(None);
    };
    let Some(from) = peer(&segment.src.ip) else {
        return Redirect::Leave(None);
    };
    // Not its own address: the node may want to drop that (`rp_filter`). Or to itself, which the node
    // may want to send back.
    if from.ifindex != ifindex || to.ifindex == ifindex {
        return Redirect::Leave(Some(Counter::RedirectForeign));
    }
    let (key, low_since, high_since) = if from.ifindex < to.ifindex {
        (PeerFlowKey { low: segment.src, high: segment.dst }, from.since, to.since)
    } else {
        (PeerFlowKey { low: segment.dst, high: segment.src }, to.since, from.since)
    };
    if segment.opens() {
        // Only here: reading the clock for every packet costs more than the rest of this, and what is
        // open stays on the way that it took.
        if agent() == Agent::Gone {
            return Redirect::Leave(Some(Counter::RedirectDeadMan));
        }
        let answer = segment.seq.wrapping_add(1);
        return Redirect::Open(key, PeerFlow { answer, low_since, high_since }, to);
    }
    match flow(&key) {
        Some(flow) if flow.low_since == low_since && flow.high_since == high_since => {
            // The same ends as a connection of before, and not its SYN: that one went another way, by a
            // service's address.
            if segment.answers() && segment.ack != flow.answer {
                return Redirect::Forget(key);
            }
            Redirect::To(to)
        }
        _ => Redirect::Leave(Some(Counter::RedirectUnknown)),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::HashMap;
    use std::net::{IpAddr, SocketAddr};

    use super::*;
    use crate::addr::from_ip;

    const CLIENT: &str = "10.0.0.2:43210";
    const SERVER: &str = "10.0.0.3:80";
    const SYN: u8 = 2;
    const RST: u8 = 4;
    const ACK: u8 = 16;

    /// A node with its two maps.
    struct Node {
        peers: HashMap<WireIp, Peer>,
        flows: RefCell<HashMap<PeerFlowKey, PeerFlow>>,
        agent: Agent,
    }

    fn addr(text: &str) -> WireAddr {
        text.parse::<SocketAddr>().unwrap().into()
    }

    fn peer(ifindex: u32, since: u32) -> Peer {
        Peer { ifindex, since, pod: [0; 2], pod_mac: [0; 6], node_mac: [0; 6] }
    }

    impl Node {
        /// The client at 7, the server at 5.
        fn new() -> Self {
            let ip = |text: &str| from_ip(text.parse::<IpAddr>().unwrap());
            let peers = [(ip("10.0.0.2"), peer(7, 1)), (ip("10.0.0.3"), peer(5, 2))];
            Self { peers: peers.into(), flows: RefCell::default(), agent: Agent::Alive }
        }

        fn plug(&mut self, ip: &str, peer: Peer) {
            self.peers.insert(from_ip(ip.parse::<IpAddr>().unwrap()), peer);
        }

        /// Does what the program does; says whether the packet was redirected.
        fn sends(&self, ifindex: u32, from: &str, to: &str, flags: u8, seq: u32, ack: u32) -> bool {
            let segment = Segment::new(addr(from), addr(to), seq, ack, flags);
            let decided = decide_redirect(
                &segment,
                ifindex,
                |ip| self.peers.get(ip).copied(),
                |key| self.flows.borrow().get(key).copied(),
                || self.agent,
            );
            match decided {
                Redirect::Leave(_) => false,
                Redirect::Forget(key) => {
                    self.flows.borrow_mut().remove(&key);
                    false
                }
                Redirect::Open(key, flow, to) => {
                    self.flows.borrow_mut().insert(key, flow);
                    to.ifindex != ifindex
                }
                Redirect::To(to) => to.ifindex != ifindex,
            }
        }

        fn client(&self, flags: u8, seq: u32, ack: u32) -> bool {
            self.sends(7, CLIENT, SERVER, flags, seq, ack)
        }

        fn server(&self, flags: u8, seq: u32, ack: u32) -> bool {
            self.sends(5, SERVER, CLIENT, flags, seq, ack)
        }
    }

    #[test]
    fn connection_is_taken_from_its_first_segment_on() {
        let node = Node::new();
        assert!(node.client(SYN, 100, 0));
        assert!(node.server(SYN | ACK, 900, 101));
        assert!(node.client(ACK, 101, 901) && node.server(ACK, 901, 101));
        assert!(node.server(RST | ACK, 901, 101), "a reset is part of it");
    }

    #[test]
    fn connection_that_is_older_stays_with_the_node() {
        let node = Node::new();
        assert!(!node.client(ACK, 101, 901) && !node.server(ACK, 901, 101));
        assert!(!node.server(SYN | ACK, 900, 101), "nor is it begun by its answer");
    }

    #[test]
    fn answer_to_a_translated_address_goes_back_through_the_translation() {
        let node = Node::new();
        assert!(node.client(SYN, 100, 0) && node.server(SYN | ACK, 900, 101));
        // The same ports again, now by the service's address, which is nobody's here.
        assert!(!node.sends(7, CLIENT, "10.96.0.10:80", SYN, 500, 0));
        assert!(!node.server(SYN | ACK, 900, 501));
        assert!(!node.server(ACK, 901, 501), "and so does all that follows");
        assert!(node.client(SYN, 100, 0));
        assert!(!node.server(RST | ACK, 0, 501), "a refusal as well");
        assert!(node.client(SYN, 700, 0) && node.server(RST | ACK, 0, 701));
    }

    #[test]
    fn address_that_is_not_the_senders_own_is_left_to_the_node() {
        let mut node = Node::new();
        node.plug("10.0.0.4", peer(9, 3));
        assert!(node.client(SYN, 100, 0));
        assert!(!node.sends(9, CLIENT, SERVER, ACK, 101, 901), "an open connection of another pod");
        assert!(!node.sends(9, CLIENT, SERVER, SYN, 100, 0));
        assert!(!node.sends(7, "10.9.9.9:1", SERVER, SYN, 100, 0), "an address of nobody");
        assert!(!node.sends(7, CLIENT, "10.0.0.2:80", SYN, 100, 0), "to itself");
        assert!(!node.sends(7, CLIENT, "10.9.9.9:80", SYN, 100, 0), "to a stranger");
    }

    #[test]
    fn pod_that_was_plugged_in_anew_does_not_inherit_connections() {
        for ip in ["10.0.0.2", "10.0.0.3"] {
            let mut node = Node::new();
            assert!(node.client(SYN, 100, 0));
            let same = node.peers[&from_ip(ip.parse().unwrap())];
            node.plug(ip, Peer { since: 9, ..same });
            assert!(!node.client(ACK, 101, 901) && !node.server(ACK, 901, 101), "{ip}");
            assert!(node.client(SYN, 200, 0) && node.server(SYN | ACK, 1, 201));
        }
    }

    #[test]
    fn agent_that_is_gone_begins_nothing() {
        let mut node = Node::new();
        for (agent, redirected) in
            [(Agent::Silent, true), (Agent::Gone, false), (Agent::Alive, true)]
        {
            node.agent = agent;
            assert_eq!(node.client(SYN, 100, 0), redirected, "{agent:?}");
            assert!(node.client(ACK, 101, 901), "what is open goes on");
        }
    }
}
