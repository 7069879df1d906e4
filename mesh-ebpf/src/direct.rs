//! The direct way at `connect`: a verdict's endpoint instead of the agent's listener.
//!
//! Never the last word on anything: whatever is not exactly as the agent decided it goes to the agent.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{bpf_sock, bpf_sock_tuple};
use aya_ebpf::helpers::{
    bpf_get_prandom_u32, bpf_sk_lookup_tcp, bpf_sk_release, bpf_sk_storage_get,
};
use aya_ebpf::programs::SockAddrContext;
use mesh_common::addr::{WireIp, is_v4};
use mesh_common::direct::{Choice, VerdictEndpoint, VerdictKey, choose};
use mesh_common::maps::{
    DeliveryKey, PodInbound, PodOutbound, ROLE_DIRECT, ROLE_LISTENER, SockMeta, number,
};
use mesh_common::{Counter, WireAddr};

use crate::context::{read, read_ip6};
use crate::maps::{CONTROL, DESTINATIONS, POD_INBOUND, PROBE, SOCK_META, VERDICTS, count, now_ns};

/// `TCP_LISTEN` of `enum` in the kernel's UAPI.
const TCP_LISTEN: u32 = 10;

/// The namespace of the socket that connects: any negative number is (`BPF_F_CURRENT_NETNS`).
const OWN_NETNS: u32 = u32::MAX;

/// Where a captured connection goes.
pub(crate) enum Way {
    /// To the agent, which tries this endpoint first, or chooses by itself if it is none.
    Agent(WireAddr),
    /// To this endpoint, of the pod with this hash.
    Direct(WireAddr, [u32; 2]),
}

/// The pod that connects, as its entry said while that was what it said of nobody else.
#[derive(Clone, Copy)]
pub(crate) struct Client {
    /// Its hash.
    pod: [u32; 2],
    generation: u64,
    /// Its address of the destination's family.
    ip: WireIp,
}

impl Client {
    /// Of whoever the entry is; whether it still is, the caller looks afterwards.
    #[inline(always)]
    pub(crate) fn of(entry: &PodOutbound, is_v4: bool) -> Self {
        // SAFETY: RCU keeps the element mapped. Volatile: the kernel may write it, and what is read is read now,
        // and not when it is used.
        let (pod, generation, ip) = unsafe {
            (
                core::ptr::read_volatile(&raw const entry.pod),
                core::ptr::read_volatile(&raw const entry.generation),
                core::ptr::read_volatile(if is_v4 {
                    &raw const entry.ip4
                } else {
                    &raw const entry.ip6
                }),
            )
        };
        Self { pod, generation: number(generation), ip }
    }
}

/// Looks for a verdict on a connection of `client` to `dst`.
#[inline(always)]
pub(crate) fn way(ctx: &SockAddrContext, netns: u64, client: &Client, dst: &WireAddr) -> Way {
    let key = VerdictKey::new(netns, *dst);
    // SAFETY: RCU keeps the element mapped for this call; `choose` notices if it was recycled.
    let Some(verdict) = (unsafe { VERDICTS.get(key) }) else {
        return Way::Agent(WireAddr::NONE);
    };
    if CONTROL.get(0).is_some_and(|control| control.no_direct != 0) {
        count(Counter::DirectFull);
        return Way::Agent(WireAddr::NONE);
    }
    // SAFETY: eight bytes, read at once; a recycled element holds another destination's generation.
    let destination = unsafe { DESTINATIONS.get(dst.ip) }.copied().unwrap_or(0);
    // SAFETY: the helper has no arguments.
    let draw = unsafe { bpf_get_prandom_u32() };
    match choose(verdict, &key, client.generation, destination, draw, now_ns) {
        Choice::Stale(reason) => {
            count(reason);
            Way::Agent(WireAddr::NONE)
        }
        Choice::Agent(endpoint) => {
            count(Counter::DirectAgent);
            Way::Agent(endpoint.addr)
        }
        Choice::Direct(endpoint) => direct(ctx, client, &endpoint),
    }
}

/// What is remembered on the socket of a connection of `client` that goes straight to `endpoint`, of the pod
/// with the hash `server`.
#[inline(always)]
pub(crate) fn remember(meta: &mut SockMeta, client: &Client, endpoint: WireAddr, server: [u32; 2]) {
    meta.endpoint = endpoint;
    meta.role = ROLE_DIRECT;
    meta.started_ns = now_ns();
    meta.client = client.pod;
    meta.server = server;
}

/// The endpoint, if its pod is the one that was decided about and somebody listens there.
#[inline(always)]
fn direct(ctx: &SockAddrContext, client: &Client, endpoint: &VerdictEndpoint) -> Way {
    // SAFETY: RCU keeps the element mapped for this call; two fields are copied, and a recycled element
    // has another pod's generation.
    let Some(server) = (unsafe { POD_INBOUND.get(endpoint.addr.ip) }) else {
        count(Counter::DirectStale);
        return Way::Agent(WireAddr::NONE);
    };
    let PodInbound { pod: uid, generation, .. } = *server;
    if number(generation) != endpoint.generation {
        count(Counter::DirectStale);
        return Way::Agent(WireAddr::NONE);
    }
    if !leaves_from(ctx, &client.ip) {
        count(Counter::DirectBound);
        return Way::Agent(WireAddr::NONE);
    }
    if !listens(ctx, &client.ip, endpoint) {
        count(Counter::DirectNoListener);
        return Way::Agent(WireAddr::NONE);
    }
    count(Counter::DirectTaken);
    Way::Direct(endpoint.addr, uid)
}

/// Whether the socket is not bound to another address than the pod's own. From another, loopback for one,
/// the endpoint may not be reachable, or its answer not come back; through the agent both work.
#[inline(always)]
fn leaves_from(ctx: &SockAddrContext, own_ip: &WireIp) -> bool {
    let socket = read!(ctx.sock_addr, __bindgen_anon_1.sk);
    if socket.is_null() {
        return false;
    }
    if is_v4(own_ip) {
        let bound = read!(socket, src_ip4);
        return bound == 0 || bound == own_ip[3];
    }
    let bound = read_ip6!(socket, src_ip6);
    bound == [0; 4] || bound == *own_ip
}

/// Whether a SYN from `from` would find a listener of the application. Also proves that the namespace
/// still exists to which the agent gave this number: it is made of the namespace's cookie.
#[inline(always)]
fn listens(ctx: &SockAddrContext, from: &WireIp, endpoint: &VerdictEndpoint) -> bool {
    let Some(asked) = PROBE.get_ptr_mut(0) else {
        return false;
    };
    let src = WireAddr::new(*from, 0);
    // SAFETY: the slot is this CPU's. Another task's `connect` that preempts this one leaves another
    // tuple there, and then this question is answered like a SYN: refused, or by the agent's listener,
    // which is not the application's and told apart below.
    unsafe { *asked = DeliveryKey { src, dst: endpoint.addr } };
    let to = &endpoint.addr;
    let found = if is_v4(&to.ip) {
        let mut tuple = Tuple4 { saddr: from[3], daddr: to.ip[3], sport: 0, dport: to.port_be };
        lookup(ctx, &mut tuple, endpoint.nsid, listening)
    } else {
        let mut tuple = Tuple6 { saddr: *from, daddr: to.ip, sport: 0, dport: to.port_be };
        lookup(ctx, &mut tuple, endpoint.nsid, listening)
    };
    // SAFETY: as above.
    let undisturbed = unsafe { (*asked).src == src && (*asked).dst == endpoint.addr };
    // SAFETY: as above. No question has a destination port of zero.
    unsafe { (*asked).dst.port_be = 0 };
    found && undisturbed
}

/// Whether the agent listens at this port of the pod's own address, as it does while it lives, and nobody in its
/// stead.
#[inline(always)]
pub(crate) fn is_there(ctx: &SockAddrContext, listener: &WireAddr) -> bool {
    let (ip, dport) = (listener.ip, listener.port_be);
    if is_v4(&ip) {
        let mut tuple = Tuple4 { saddr: ip[3], daddr: ip[3], sport: 0, dport };
        lookup(ctx, &mut tuple, OWN_NETNS, is_agents)
    } else {
        let mut tuple = Tuple6 { saddr: ip, daddr: ip, sport: 0, dport };
        lookup(ctx, &mut tuple, OWN_NETNS, is_agents)
    }
}

/// Whether a socket that a lookup found listens.
#[inline(always)]
fn listening(socket: *mut bpf_sock) -> bool {
    // SAFETY: not null, and referenced by the lookup.
    let state = unsafe { core::ptr::read_volatile(&raw const (*socket).state) };
    state == TCP_LISTEN
}

/// Whether a socket that a lookup found is a listener of the agent: only it can write the map that says so.
#[inline(always)]
fn is_agents(socket: *mut bpf_sock) -> bool {
    // The static's address is what the loader replaces with the map.
    let map = (&raw const SOCK_META).cast_mut();
    // SAFETY: the socket is not null, and referenced by the lookup; without `CREATE` the helper returns its
    // storage or null.
    let meta = unsafe { bpf_sk_storage_get(map.cast(), socket.cast(), core::ptr::null_mut(), 0) };
    let meta = meta.cast::<SockMeta>();
    // SAFETY: not null; the map's values are `SockMeta`, and this one lives as long as the socket. A byte is read
    // whole whoever writes.
    !meta.is_null() && unsafe { core::ptr::read_volatile(&raw const (*meta).role) } == ROLE_LISTENER
}

/// `bpf_sock_tuple.ipv4`.
#[repr(C)]
struct Tuple4 {
    saddr: u32,
    daddr: u32,
    sport: u16,
    dport: u16,
}

/// `bpf_sock_tuple.ipv6`.
#[repr(C)]
struct Tuple6 {
    saddr: WireIp,
    daddr: WireIp,
    sport: u16,
    dport: u16,
}

/// Whether there is a socket for this tuple, and `is_wanted` says so of it.
#[inline(always)]
fn lookup<T>(
    ctx: &SockAddrContext,
    tuple: &mut T,
    nsid: u32,
    is_wanted: impl FnOnce(*mut bpf_sock) -> bool,
) -> bool {
    let tuple: *mut bpf_sock_tuple = core::ptr::from_mut(tuple).cast();
    // SAFETY: the size says which of the two families the tuple is of; the helper only reads it.
    let socket = unsafe {
        bpf_sk_lookup_tcp(ctx.as_ptr(), tuple, size_of::<T>() as u32, u64::from(nsid), 0)
    };
    if socket.is_null() {
        return false;
    }
    let is_it = is_wanted(socket);
    // SAFETY: the reference that the lookup took, given back once.
    unsafe { bpf_sk_release(socket.cast()) };
    is_it
}
