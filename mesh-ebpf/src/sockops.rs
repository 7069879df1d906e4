//! `sock_ops`: publishes a captured connection's origin, announces deliveries and direct connections to
//! `sk_lookup`, and tells what becomes of direct ones.
//!
//! The first two at `TCP_CONNECT_CB`: the kernel has chosen the source address and port, and no SYN has
//! left. Telling fails open: a connection is never refused because it cannot be told of.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_RB_NO_WAKEUP, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RTO_CB,
    BPF_SOCK_OPS_RTO_CB_FLAG, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
    BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock_ops,
};
use aya_ebpf::helpers::{
    bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_setsockopt, bpf_sk_storage_get,
    bpf_sock_ops_cb_flags_set,
};
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use mesh_common::addr::{WireIp, is_v4, v4_mapped};
use mesh_common::announce::{Announcement, DELIVERY, FOR_MEMBER, PLAIN};
use mesh_common::direct::{
    CLOSED, DirectConn, DirectEvent, FAILED, FIN_RECEIVED, FIN_SENT, FIN_UNKNOWN, Flow, OPENED,
};
use mesh_common::maps::{
    Admission, AdmissionKey, DeliveryKey, FlowKey, ROLE_DELIVER, ROLE_DIRECT, ROLE_PLAIN, SockMeta,
};
use mesh_common::{Counter, WireAddr};

use crate::context::{AF_INET6, read, read_ip6};
use crate::log::tell;
use crate::maps::{
    ADMISSIONS, DELIVERIES, DIRECT_CONNS, EVENTS, FLOWS, POD_INBOUND, POD_OUTBOUND, SOCK_META,
    count, is_member, now_ms, now_ns,
};

const OK: u32 = 1;

/// How old an admission is, in units of 2^20 ns, when the next connection writes it again.
const RENEWED: u32 = Admission::LASTS / 2;

// States of `enum` in the kernel's UAPI.
const TCP_ESTABLISHED: u32 = 1;
const TCP_SYN_SENT: u32 = 2;
const TCP_FIN_WAIT1: u32 = 4;
const TCP_FIN_WAIT2: u32 = 5;
const TCP_CLOSE: u32 = 7;
const TCP_CLOSE_WAIT: u32 = 8;
const TCP_LAST_ACK: u32 = 9;
const TCP_CLOSING: u32 = 11;

#[sock_ops]
pub fn mesh_sockops(ctx: SockOpsContext) -> u32 {
    // Some nine callbacks run per connection and most are not ours.
    match read!(ctx.ops, op) {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(&ctx),
        BPF_SOCK_OPS_STATE_CB => {
            let old = read!(ctx.ops, __bindgen_anon_1.args[0]);
            let new = read!(ctx.ops, __bindgen_anon_1.args[1]);
            changed(&ctx, old, new);
        }
        BPF_SOCK_OPS_RTO_CB => sending_again(&ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => established(&ctx),
        _ => {}
    }
    OK
}

// Functions of their own, so that neither's stack is the other's too: together they may take 512 bytes.

#[inline(never)]
fn connecting(ctx: &SockOpsContext) {
    let Some(meta) = meta(ctx) else {
        return;
    };
    // SAFETY: the storage lives as long as the socket, and nothing else writes it during this callback.
    let meta = unsafe { *meta };
    if is_announced(meta.role) {
        let ends = ends(ctx.ops);
        let announced = DELIVERIES.insert(ends, announcement(ctx, &meta, &ends), 0).is_ok();
        if meta.role == ROLE_DIRECT {
            admit(ctx, &meta, &ends);
        }
        follow(ctx, meta.role);
        count(if announced { Counter::DeliveryAnnounced } else { Counter::DeliveryLost });
    } else if meta.captured != 0 {
        // SAFETY: the helper only reads the context.
        let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
        let ends = ends(ctx.ops);
        let key = FlowKey { netns, src: ends.src, listener_be: ends.dst.port_be, reserved: 0 };
        let flow = Flow { orig: meta.orig, endpoint: meta.endpoint };
        let published = FLOWS.insert(key, flow, 0).is_ok();
        if published {
            count(Counter::FlowPublished);
        } else {
            count(Counter::FlowLost);
            tell!("original destination not stored: [{:i}]:{} to [{:i}]:{}", ends.src, meta.orig);
        }
        // From a second address of the pod: to `sk_lookup` that looks like a stranger.
        if ends.src.ip != ends.dst.ip {
            let delivery = Announcement::of(DELIVERY).answered(now_ms());
            let _refused_if_lost = DELIVERIES.insert(ends, delivery, 0);
        }
        without_pacing(ctx);
    }
}

/// To the agent it is loopback, where there is no congestion, and pacing (BBR) only costs.
#[inline(always)]
fn without_pacing(ctx: &SockOpsContext) {
    const IPPROTO_TCP: i32 = 6;
    const TCP_CONGESTION: i32 = 13;
    let mut name = *b"reno\0";
    // SAFETY: the context is a full socket's, and the name is read only.
    unsafe {
        bpf_setsockopt(ctx.as_ptr(), IPPROTO_TCP, TCP_CONGESTION, name.as_mut_ptr().cast(), 5)
    };
}

/// Whether sockets of this role are announced to `sk_lookup`.
#[inline(always)]
fn is_announced(role: u8) -> bool {
    role == ROLE_DELIVER || role == ROLE_DIRECT || role == ROLE_PLAIN
}

/// The address by which the client's pod has its entry: the kernel may have chosen another one of its for the
/// source, where a route says so. Not for an address of the mesh: that one's own pod has to vouch for it.
#[inline(always)]
fn own_ip(ctx: &SockOpsContext, ends: &DeliveryKey) -> WireIp {
    if is_member(&ends.src.ip) {
        return ends.src.ip;
    }
    // SAFETY: the helper only reads the context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: RCU keeps the element mapped for this call. One address is read, and if the element is recycled the
    // pod that has it is not the one that is announced.
    match unsafe { POD_OUTBOUND.get(netns) } {
        Some(pod) if is_v4(&ends.dst.ip) => pod.ip4,
        Some(pod) => pod.ip6,
        None => ends.src.ip,
    }
}

/// What is announced of such a socket when its SYN leaves.
#[inline(always)]
fn announcement(ctx: &SockOpsContext, meta: &SockMeta, ends: &DeliveryKey) -> Announcement {
    match meta.role {
        ROLE_DIRECT => Announcement::direct(meta.client, own_ip(ctx, ends), meta.server),
        ROLE_PLAIN => Announcement::of(PLAIN),
        _ => Announcement::of(DELIVERY),
    }
}

/// Asks for the callback that ends the announcement and tells what becomes of a direct connection, and for the one
/// before such a connection's SYN is sent again.
///
/// Other programs may have asked for callbacks too, so theirs stay, and ours is never given back: nobody can
/// know whether they want that one as well.
#[inline(always)]
fn follow(ctx: &SockOpsContext, role: u8) {
    let wanted = match role {
        ROLE_DIRECT => BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG,
        _ => BPF_SOCK_OPS_STATE_CB_FLAG,
    };
    let flags = read!(ctx.ops, bpf_sock_ops_cb_flags) | wanted;
    // SAFETY: the context is a full socket's `bpf_sock_ops`; an error leaves the flags as they were.
    unsafe { bpf_sock_ops_cb_flags_set(ctx.ops, flags as i32) };
}

/// A program that does not leave other programs' callbacks alone may have taken ours away: what it kept from
/// us is made up for, and asked for again.
#[inline(always)]
fn established(ctx: &SockOpsContext) {
    if read!(ctx.ops, bpf_sock_ops_cb_flags) & BPF_SOCK_OPS_STATE_CB_FLAG != 0 {
        return;
    }
    let Some(meta) = meta(ctx) else {
        return;
    };
    // SAFETY: as in `connecting`; the pointer is not kept.
    let role = unsafe { (*meta).role };
    if is_announced(role) {
        follow(ctx, role);
        changed(ctx, TCP_SYN_SENT, TCP_ESTABLISHED);
    }
}

/// A SYN that nobody answered is about to leave again (`tcp_write_timeout()` calls before it retransmits, and once when it
/// gives up), and will arrive from whatever port, too.
#[inline(never)]
fn sending_again(ctx: &SockOpsContext) {
    if read!(ctx.ops, state) != TCP_SYN_SENT {
        return;
    }
    let Some(meta) = meta(ctx) else {
        return;
    };
    // SAFETY: as in `connecting`.
    let meta = unsafe { *meta };
    if meta.role == ROLE_DIRECT {
        admit(ctx, &meta, &ends(ctx.ops));
    }
}

/// Announces a direct connection from whatever port its SYN will arrive.
#[inline(always)]
fn admit(ctx: &SockOpsContext, meta: &SockMeta, ends: &DeliveryKey) {
    // SAFETY: the helper only reads the context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: RCU keeps the elements mapped for this call. One field of each is read, and one that is
    // recycled has another pod's generation, which then has to be that of the pod with this address.
    let pods = unsafe { (POD_OUTBOUND.get(netns), POD_INBOUND.get(ends.dst.ip)) };
    let (Some(client), Some(server)) = pods else {
        return;
    };
    // The SYN of a `connect()` may leave much later: `TCP_FASTOPEN_CONNECT`.
    if client.pod != meta.client || server.pod != meta.server {
        return;
    }
    let (client, server, now) = (client.generation, server.generation, now_ms());
    let key = AdmissionKey { client: ends.src.ip, server: ends.dst };
    // SAFETY: as above.
    if let Some(there) = unsafe { ADMISSIONS.get(key) }
        && there.admits(client, server, now.wrapping_add(Admission::LASTS - RENEWED))
    {
        // Written a moment ago: connections of one pod to one endpoint come in crowds.
        return;
    }
    let admission = Admission { client, server, until: now.wrapping_add(Admission::LASTS) };
    let _refused_if_lost = ADMISSIONS.insert(key, admission, 0);
}

/// A connection that was announced has another state.
#[inline(never)]
fn changed(ctx: &SockOpsContext, old: u32, new: u32) {
    let Some(meta) = meta(ctx) else {
        return;
    };
    // SAFETY: as in `connecting`; the reference is not kept.
    let announced = unsafe { &*meta };
    let role = announced.role;
    if old == TCP_SYN_SENT && is_announced(role) {
        answered(ctx, announced, new);
    }
    if role == ROLE_DIRECT {
        tell_of(ctx, meta, old, new);
    }
}

/// The connection has left `SYN_SENT`: its tuple must not let anybody else past the agent.
#[inline(always)]
fn answered(ctx: &SockOpsContext, meta: &SockMeta, new: u32) {
    let key = ends(ctx.ops);
    if new == TCP_ESTABLISHED {
        let is_members = meta.role == ROLE_DELIVER && is_member(&key.src.ip);
        let what =
            if is_members { Announcement::of(FOR_MEMBER) } else { announcement(ctx, meta, &key) };
        // A tuple that cannot be updated stays open until it is pushed out: worth no reset.
        let _unbounded = DELIVERIES.insert(key, what.answered(now_ms()), 0);
    } else {
        let _already_gone = DELIVERIES.remove(key);
    }
}

/// Follows a direct connection's states, and tells of its begin and its end.
#[inline(always)]
fn tell_of(ctx: &SockOpsContext, meta: *mut SockMeta, old: u32, new: u32) {
    // SAFETY: as in `connecting`.
    let meta = unsafe { &mut *meta };
    meta.fins |= match (old, new) {
        (_, TCP_FIN_WAIT1 | TCP_LAST_ACK) => FIN_SENT,
        (_, TCP_CLOSE_WAIT | TCP_CLOSING) => FIN_RECEIVED,
        (TCP_FIN_WAIT2, TCP_CLOSE) => FIN_UNKNOWN,
        _ => 0,
    } as u8;
    match new {
        TCP_FIN_WAIT2 => meta.received_at_fin = read!(ctx.ops, bytes_received),
        TCP_ESTABLISHED => event(ctx, meta, OPENED),
        TCP_CLOSE => event(ctx, meta, if old == TCP_SYN_SENT { FAILED } else { CLOSED }),
        _ => {}
    }
}

#[inline(never)]
fn event(ctx: &SockOpsContext, meta: &SockMeta, kind: u32) {
    let at_ns = now_ns();
    // SAFETY: the helper only reads the context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let conn = DirectConn {
        // SAFETY: the helper only reads the context.
        netns: unsafe { bpf_get_netns_cookie(ctx.as_ptr()) },
        started_ns: meta.started_ns,
        opened_ns: if kind == OPENED { at_ns } else { 0 },
        src: ends(ctx.ops).src,
        orig: meta.orig,
        endpoint: meta.endpoint,
        client: meta.client,
        server: meta.server,
        reserved: 0,
    };
    if kind == OPENED {
        if DIRECT_CONNS.insert(cookie, conn, 0).is_err() {
            count(Counter::DirectUnlisted);
        }
    } else if kind == CLOSED {
        let _never_listed = DIRECT_CONNS.remove(cookie);
    }
    let Some(mut entry) = EVENTS.reserve::<DirectEvent>(0) else {
        return count(Counter::DirectEventLost);
    };
    entry.write(DirectEvent {
        cookie,
        at_ns,
        acked: read!(ctx.ops, bytes_acked),
        received: read!(ctx.ops, bytes_received),
        received_at_fin: meta.received_at_fin,
        conn,
        kind,
        fins: u32::from(meta.fins),
        all_acked: u32::from(read!(ctx.ops, snd_una) == read!(ctx.ops, snd_nxt)),
        srtt: read!(ctx.ops, srtt_us),
        retransmits: read!(ctx.ops, total_retrans),
        reserved: 0,
    });
    // Nobody is woken: the agent looks ten times a second, and a wake-up costs more than the connection.
    entry.submit(BPF_RB_NO_WAKEUP.into());
}

/// What is remembered on the socket, without creating it.
#[inline(always)]
fn meta(ctx: &SockOpsContext) -> Option<*mut SockMeta> {
    let sk = read!(ctx.ops, __bindgen_anon_2.sk);
    if sk.is_null() {
        return None;
    }
    // aya's `SkStorage` takes a `bpf_sock_addr` only. The static's address is what the loader replaces
    // with the map.
    let map = (&raw const SOCK_META).cast_mut();
    // SAFETY: `sk` is this callback's socket, and without `CREATE` no initial value is read.
    let meta = unsafe { bpf_sk_storage_get(map.cast(), sk.cast(), core::ptr::null_mut(), 0) };
    if meta.is_null() { None } else { Some(meta.cast()) }
}

/// The connection's two ends.
#[inline(always)]
fn ends(ops: *const bpf_sock_ops) -> DeliveryKey {
    let nowhere = WireAddr::new([0; 4], 0);
    let mut ends = DeliveryKey { src: nowhere, dst: nowhere };
    if read!(ops, family) == AF_INET6 {
        ends6(ops, &mut ends);
    } else {
        ends4(ops, &mut ends);
    }
    ends
}

// Functions of their own, or LLVM reads both families through one computed pointer:
// `dereference of modified ctx ptr R7 off=60 disallowed`.

#[inline(never)]
fn ends4(ops: *const bpf_sock_ops, ends: &mut DeliveryKey) {
    ends.src = WireAddr::new(v4_mapped(read!(ops, local_ip4)), local_port(ops));
    ends.dst = WireAddr::new(v4_mapped(read!(ops, remote_ip4)), remote_port(ops));
}

/// An `AF_INET6` socket that dialled a v4-mapped address has v4-mapped ends here.
#[inline(never)]
fn ends6(ops: *const bpf_sock_ops, ends: &mut DeliveryKey) {
    ends.src = WireAddr::new(read_ip6!(ops, local_ip6), local_port(ops));
    ends.dst = WireAddr::new(read_ip6!(ops, remote_ip6), remote_port(ops));
}

/// `local_port` is in host order.
#[inline(always)]
fn local_port(ops: *const bpf_sock_ops) -> u16 {
    read!(ops, local_port) as u16
}

/// `remote_port` is in network order, as the two bytes that are first on the wire: on a little-endian
/// machine the kernel shifts them into the upper half.
#[inline(always)]
fn remote_port(ops: *const bpf_sock_ops) -> u16 {
    u32::from_be(read!(ops, remote_port)) as u16
}
