//! `sk_lookup`, linked to every enrolled pod's netns: who gets a new connection.
//!
//! Fails closed: without a listener of the agent a SYN is refused at once. No netns cookie and no mark
//! exist here, so everything goes by the pod's address. What comes to another one of its addresses (a
//! link-local one, one of a second interface) cannot be told from what comes to nobody's, and so there are
//! two programs: one for pods that accept plain text, and one for those that do not.

use aya_ebpf::bindings::{BPF_SK_LOOKUP_F_REPLACE, sk_action};
use aya_ebpf::macros::sk_lookup;
use aya_ebpf::programs::SkLookupContext;
use mesh_common::addr::{WireIp, v4_mapped};
use mesh_common::announce::{Announced, Announcement};
use mesh_common::maps::{AdmissionKey, DeliveryKey, ListenerKey, PodInbound};
use mesh_common::verdict::{Lookup, decide_elsewhere, decide_lookup};
use mesh_common::{Counter, WireAddr};

use crate::context::{AF_INET, AF_INET6, IPPROTO_TCP, read, read_ip6};
use crate::log::tell;
use crate::maps::{
    ADMISSIONS, DELIVERIES, INBOUND, POD_INBOUND, PROBE, agent, count, is_member, now_ms,
};

const PASS: u32 = sk_action::SK_PASS;
/// RST to the client.
const DROP: u32 = sk_action::SK_DROP;

/// What becomes of a SYN to an address that no pod is known by.
#[derive(Clone, Copy)]
enum Elsewhere {
    /// The kernel's own lookup finds the listener.
    LeftAlone,
    /// It is plain text, and refused, unless the agent delivers it.
    Refused,
}

#[sk_lookup]
pub fn mesh_lookup(ctx: SkLookupContext) -> u32 {
    lookup(&ctx, Elsewhere::LeftAlone)
}

/// The same for a pod in strict mode.
#[sk_lookup]
pub fn mesh_strict(ctx: SkLookupContext) -> u32 {
    lookup(&ctx, Elsewhere::Refused)
}

#[inline(always)]
fn lookup(ctx: &SkLookupContext, elsewhere: Elsewhere) -> u32 {
    if read!(ctx.lookup, protocol) != IPPROTO_TCP {
        return PASS;
    }
    match read!(ctx.lookup, family) {
        AF_INET => {
            let local = v4_mapped(read!(ctx.lookup, local_ip4));
            let remote = v4_mapped(read!(ctx.lookup, remote_ip4));
            steer(ctx, local, remote, elsewhere)
        }
        AF_INET6 => {
            let local = read_ip6!(ctx.lookup, local_ip6);
            let remote = read_ip6!(ctx.lookup, remote_ip6);
            steer(ctx, local, remote, elsewhere)
        }
        _ => PASS,
    }
}

#[inline(always)]
fn steer(ctx: &SkLookupContext, local_ip: WireIp, remote_ip: WireIp, elsewhere: Elsewhere) -> u32 {
    // `local_port` is in host order, `remote_port` in network order.
    let local = WireAddr::new(local_ip, read!(ctx.lookup, local_port) as u16);
    let remote = WireAddr::new(remote_ip, u16::from_be(read!(ctx.lookup, remote_port)));
    // Nobody is taken for no pod by one look, and what changed under it is decided anew: see `POD_OUTBOUND`.
    let seen = match look(&local, &remote, false) {
        Seen::Nothing => look(&local, &remote, false),
        Seen::Changed => look(&local, &remote, true),
        seen => seen,
    };
    let verdict = match seen {
        Seen::Probe => {
            count(Counter::LookupProbe);
            return PASS;
        }
        Seen::Decided(verdict, is_admitted) => {
            if is_admitted {
                count(Counter::LookupTranslated);
            }
            verdict
        }
        Seen::Changed => Lookup::Drop(Counter::LookupChanged),
        Seen::Nothing => match elsewhere {
            Elsewhere::LeftAlone => return PASS,
            Elsewhere::Refused => {
                let is_delivery = || is_delivery(&DeliveryKey { src: remote, dst: local });
                decide_elsewhere(&local, &remote, is_delivery, agent)
            }
        },
    };
    answer(ctx, verdict, &local, &remote)
}

/// What a look at a pod's entry came to.
enum Seen {
    /// There is none.
    Nothing,
    /// There is one, and `connect` asks.
    Probe,
    /// It was written or removed meanwhile.
    Changed,
    /// What it says, and whether because of an admission.
    Decided(Lookup, bool),
}

/// Decides over a SYN from `remote` to the pod at `local`, which has an entry for sure if it `has_one`, or has just
/// left.
#[inline(always)]
fn look(local: &WireAddr, remote: &WireAddr, has_one: bool) -> Seen {
    let again = || if has_one { POD_INBOUND.get_ptr(local.ip) } else { None };
    let Some(slot) = POD_INBOUND.get_ptr(local.ip).or_else(again) else {
        return Seen::Nothing;
    };
    if is_probe(remote, local) {
        return Seen::Probe;
    }
    // SAFETY: RCU keeps the element mapped for this call; see `POD_OUTBOUND` for why it is not copied.
    let pod = unsafe { &*slot };
    // SAFETY: as above. Volatile: read now, whatever is read of it later.
    let written = unsafe { core::ptr::read_volatile(&raw const (*slot).written) };
    let mut by_admission = false;
    let announced = || match announced(pod, &DeliveryKey { src: *remote, dst: *local }) {
        Announced::Nothing if is_admitted(pod, remote, local) => {
            by_admission = true;
            Announced::Delivery
        }
        announced => announced,
    };
    let verdict = decide_lookup(pod, local, remote, announced, agent);
    let is_still = POD_INBOUND.get_ptr(local.ip).is_some_and(|now| {
        // SAFETY: as above.
        let now = unsafe { core::ptr::read_volatile(&raw const (*now).written) };
        now == written
    });
    if is_still { Seen::Decided(verdict, by_admission) } else { Seen::Changed }
}

/// Does what was decided.
#[inline(always)]
fn answer(ctx: &SkLookupContext, verdict: Lookup, local: &WireAddr, remote: &WireAddr) -> u32 {
    match verdict {
        Lookup::Pass(reason) => {
            count(reason);
            PASS
        }
        Lookup::Drop(reason) => refuse(reason, remote, local),
        Lookup::Steer { shard } => {
            let listener = ListenerKey { ip: local.ip, shard };
            match INBOUND.redirect_sk_lookup(ctx, listener, BPF_SK_LOOKUP_F_REPLACE.into()) {
                Ok(()) => {
                    count(Counter::LookupSteered);
                    PASS
                }
                Err(_errno) => refuse(Counter::LookupListenerGone, remote, local),
            }
        }
    }
}

/// One function for all refusals: it is mostly the lines of the log.
#[inline(never)]
fn refuse(reason: Counter, remote: &WireAddr, local: &WireAddr) -> u32 {
    count(reason);
    match reason {
        Counter::LookupStrict | Counter::LookupStrictElsewhere => {
            tell!("plain text to a strict pod: [{:i}]:{} to [{:i}]:{}", remote, local)
        }
        Counter::LookupAnother => {
            tell!(
                "meant for a pod that had the address before: [{:i}]:{} to [{:i}]:{}",
                remote,
                local
            )
        }
        Counter::LookupListenerGone => {
            tell!("no listener of the agent: [{:i}]:{} to [{:i}]:{}", remote, local)
        }
        _ => {}
    }
    DROP
}

/// Whether this is `connect` asking from this CPU whether the application listens, and no SYN.
///
/// It asks with source port 0, which no connection has. A SYN that somebody forges from that port would
/// also have to be of this very tuple and interrupt this very CPU while it asks.
#[inline(always)]
fn is_probe(remote: &WireAddr, local: &WireAddr) -> bool {
    if remote.port_be != 0 {
        return false;
    }
    // The slot is this CPU's: programs do not migrate.
    PROBE.get(0).is_some_and(|asked| asked.src == *remote && asked.dst == *local)
}

#[inline(always)]
fn announcement(tuple: &DeliveryKey) -> Option<Announcement> {
    // SAFETY: RCU keeps the element mapped for this call, and it is copied at once; a recycled one holds
    // what another tuple was announced as.
    unsafe { DELIVERIES.get(tuple) }.copied()
}

/// Whether the agent announced this as a delivery of its own. Which pod it meant cannot be told: the address
/// is in no entry.
#[inline(always)]
fn is_delivery(tuple: &DeliveryKey) -> bool {
    announcement(tuple).is_some_and(|there| there.delivers(now_ms(), || is_member(&tuple.src.ip)))
}

#[inline(always)]
fn announced(server: &PodInbound, tuple: &DeliveryKey) -> Announced {
    let Some(there) = announcement(tuple) else {
        return Announced::Nothing;
    };
    // SAFETY: as for the server's; two fields are read.
    let pod_at = |ip: &WireIp| unsafe { POD_INBOUND.get(ip) };
    there.says(now_ms(), server, pod_at, || is_member(&tuple.src.ip))
}

/// Whether this is a direct connection that comes from another source port than it left from.
///
/// A node that translates service addresses may still track an earlier connection from that port, which
/// came to this endpoint by its service; answers would be mistaken for that one's, so netfilter changes
/// the port. Address and port say nothing of who it is, then: the client's pod must be the very one that
/// the verdict was about.
#[inline(always)]
fn is_admitted(server: &PodInbound, remote: &WireAddr, local: &WireAddr) -> bool {
    let key = AdmissionKey { client: remote.ip, server: *local };
    // SAFETY: RCU keeps the element mapped for this call; a recycled one has other pods' generations.
    let Some(admission) = (unsafe { ADMISSIONS.get(key) }) else {
        return false;
    };
    // SAFETY: as above; one field is read.
    let Some(client) = (unsafe { POD_INBOUND.get(remote.ip) }) else {
        return false;
    };
    admission.admits(client.generation, server.generation, now_ms())
}
