//! Which connections `sk_lookup` knows by their tuple, and for how long. Times are on `CLOCK_BOOTTIME` in
//! units of 2^20 ns, about 1 ms.
//!
//! A tuple names pods by their addresses, and an address may be another pod's by the time a SYN arrives: one
//! that a full backlog dropped is sent again for two minutes, and one that waits for the first bytes
//! (`TCP_FASTOPEN_CONNECT`) leaves when the application writes. So what is announced of a direct connection
//! names its two pods.

use crate::addr::WireIp;
use crate::maps::{PodInbound, is_within, map_struct, number};

/// [`Announcement::until`]: the SYN is not answered yet.
const UNANSWERED: u32 = 0;

/// How long a tuple is still known after the handshake: an application whose SYN queue is full answers with
/// a SYN cookie, and then the ACK is looked up like a SYN.
const GRACE: u32 = 1024;

/// [`Announcement::kind`]: the agent's, to an application.
pub const DELIVERY: u32 = 0;
/// [`Announcement::kind`]: the same in the name of a client of the mesh.
///
/// A client that leaves the mesh may connect from the same port again, and `sk_lookup` sees no difference
/// between its SYN and the last ACK of the connection before: what is announced for a member ends with
/// the membership.
pub const FOR_MEMBER: u32 = 1;
/// [`Announcement::kind`]: a direct connection.
pub const DIRECT: u32 = 2;
/// [`Announcement::kind`]: a connection that the client's pod keeps out of the mesh. It is decided over like
/// a stranger's, whatever the pod's direct connections may do ([`crate::maps::Admission`]).
pub const PLAIN: u32 = 3;

map_struct! {
    /// What is known of a tuple. The value of `DELIVERIES`.
    pub struct Announcement {
        /// Address of the client pod, if direct: what it has its entry by. The tuple's source may be another one of
        /// its, which a route prefers.
        pub client_ip: WireIp,
        /// Hash of the client pod's UID, if direct.
        pub client: [u32; 2],
        /// Hash of the server pod's UID, if direct.
        pub server: [u32; 2],
        /// [`DELIVERY`], [`FOR_MEMBER`], [`DIRECT`], [`PLAIN`].
        pub kind: u32,
        /// When it ends; 0 while the SYN is not answered.
        pub until: u32,
    }
}

/// What `sk_lookup` knows of a SYN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announced {
    /// Nothing.
    Nothing,
    /// The application is to get it.
    Delivery,
    /// Whoever sent it meant a pod that had this address before.
    ForAnother,
    /// It is no direct connection.
    Plain,
}

impl Announcement {
    /// A tuple of this kind, whose SYN is going to leave.
    #[inline(always)]
    pub const fn of(kind: u32) -> Self {
        Self { client_ip: [0; 4], client: [0; 2], server: [0; 2], kind, until: UNANSWERED }
    }

    /// A direct connection between these two pods, the first of which has this address.
    #[inline(always)]
    pub const fn direct(client: [u32; 2], client_ip: WireIp, server: [u32; 2]) -> Self {
        Self { client_ip, client, server, ..Self::of(DIRECT) }
    }

    /// The same when the SYN has been answered, at `now`.
    #[inline(always)]
    #[must_use]
    pub const fn answered(self, now: u32) -> Self {
        let until = now.wrapping_add(GRACE);
        Self { until: if until == UNANSWERED { 1 } else { until }, ..self }
    }

    /// What it says at `now` of a SYN to `server`, the pod that has the address. `pod_at` knows the pods of this
    /// node by their addresses; `is_member` whether any pod of the mesh has the tuple's source.
    #[inline(always)]
    pub fn says<'a>(
        &self,
        now: u32,
        server: &PodInbound,
        pod_at: impl FnOnce(&WireIp) -> Option<&'a PodInbound>,
        is_member: impl FnOnce() -> bool,
    ) -> Announced {
        if self.is_over(now) {
            return Announced::Nothing;
        }
        match self.kind {
            DELIVERY => Announced::Delivery,
            FOR_MEMBER if is_member() => Announced::Delivery,
            PLAIN => Announced::Plain,
            DIRECT => match pod_at(&self.client_ip) {
                // Without a generation it is about to leave.
                Some(pod) if pod.pod == self.client && number(pod.generation) != 0 => {
                    if server.pod == self.server {
                        Announced::Delivery
                    } else {
                        Announced::ForAnother
                    }
                }
                _ => Announced::Nothing,
            },
            _ => Announced::Nothing,
        }
    }

    /// Whether it says at `now` that the agent delivers, to whatever pod has the address: all that can be told
    /// where nobody knows which one that is.
    #[inline(always)]
    pub fn delivers(&self, now: u32, is_member: impl FnOnce() -> bool) -> bool {
        let is_delivery = match self.kind {
            DELIVERY => true,
            FOR_MEMBER => is_member(),
            _ => false,
        };
        is_delivery && !self.is_over(now)
    }

    #[inline(always)]
    const fn is_over(&self, now: u32) -> bool {
        self.until != UNANSWERED && !is_within(now, self.until, GRACE)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::maps::{MAX_PORTS, PortRanges};

    const AT: WireIp = crate::addr::v4_mapped(u32::from_ne_bytes([10, 0, 0, 7]));

    fn pod(uid: u32, generation: u32) -> PodInbound {
        PodInbound {
            skip: PortRanges::NONE,
            own_ports: [0; MAX_PORTS],
            own_ports_len: 0,
            listeners: 1,
            flags: 0,
            pod: [uid, 0],
            generation: [0, generation],
            written: 0,
        }
    }

    proptest! {
        #[test]
        fn tuple_is_known_for_about_a_second_after_the_answer(now: u32, later in 0..GRACE * 3) {
            let made = Announcement::of(DELIVERY).answered(now);
            prop_assert_ne!(made.until, UNANSWERED);
            let said = made.says(now.wrapping_add(later), &pod(1, 1), |_| None, || false);
            // One unit more where zero means something else.
            prop_assert!(said == Announced::Delivery || later >= GRACE);
            prop_assert!(said == Announced::Nothing || later < GRACE + 1);
        }

        #[test]
        fn members_tuple_ends_with_the_membership(now: u32, later in 0..GRACE) {
            let made = Announcement::of(FOR_MEMBER).answered(now);
            let say = |later, member| {
                made.says(now.wrapping_add(later), &pod(1, 1), |_| None, || member)
            };
            prop_assert_eq!(say(later, true), Announced::Delivery);
            prop_assert_eq!(say(later, false), Announced::Nothing);
            prop_assert_eq!(say(GRACE + 1, true), Announced::Nothing);
        }

        #[test]
        fn agents_delivery_is_known_without_its_pod_and_nothing_else_is(
            kind in 0u32..6,
            now: u32,
            later in 0..GRACE * 3,
            member: bool,
        ) {
            let made = Announcement { client: [1, 0], server: [1, 0], ..Announcement::of(kind) };
            let later = now.wrapping_add(later);
            for made in [made, made.answered(now)] {
                let delivers = made.delivers(later, || member);
                let to_a_pod = made.says(later, &pod(1, 1), |_| None, || member);
                prop_assert_eq!(delivers, to_a_pod == Announced::Delivery);
                prop_assert!(!delivers || kind == DELIVERY || (kind == FOR_MEMBER && member));
            }
            let direct = Announcement::direct([7, 0], AT, [1, 0]);
            prop_assert!(!direct.delivers(later, || true));
        }
    }

    #[test]
    fn direct_tuple_is_of_its_two_pods() {
        let made = Announcement::direct([7, 0], AT, [8, 0]);
        let (client, server) = (pod(7, 1), pod(8, 1));
        for made in [made, made.answered(50)] {
            let say = |client: Option<PodInbound>, server: PodInbound| {
                let pod_at = |ip: &WireIp| client.as_ref().filter(|_| *ip == AT);
                made.says(60, &server, pod_at, || true)
            };
            assert_eq!(say(Some(client), server), Announced::Delivery);
            assert_eq!(say(Some(pod(7, 2)), pod(8, 2)), Announced::Delivery, "as they are now");
            assert_eq!(say(Some(client), pod(9, 1)), Announced::ForAnother);
            assert_eq!(say(Some(pod(9, 1)), server), Announced::Nothing, "another client");
            assert_eq!(say(None, server), Announced::Nothing, "the client has left the mesh");
            assert_eq!(say(Some(pod(7, 0)), server), Announced::Nothing, "or is leaving");
        }
        let later = made.answered(50).says(50 + GRACE, &pod(9, 1), |_| Some(&client), || true);
        assert_eq!(later, Announced::Nothing);
    }

    #[test]
    fn plain_tuple_is_that_until_it_ends() {
        let made = Announcement::of(PLAIN);
        let say = |made: Announcement| made.says(60, &pod(1, 1), |_| None, || true);
        assert_eq!(say(made), Announced::Plain);
        assert_eq!(say(made.answered(59)), Announced::Plain);
        assert_eq!(say(made.answered(60u32.wrapping_sub(GRACE))), Announced::Nothing);
    }

    #[test]
    fn syn_without_an_answer_passes_for_as_long_as_it_takes() {
        let made = Announcement::of(DELIVERY);
        assert_eq!(made.says(u32::MAX, &pod(1, 1), |_| None, || false), Announced::Delivery);
    }
}
