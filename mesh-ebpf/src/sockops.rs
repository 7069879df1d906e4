//! `sock_ops`: publishes a captured connection's origin, and announces deliveries to `sk_lookup`.
//!
//! Both at `TCP_CONNECT_CB`: the kernel has chosen the source address and port, and no SYN has left.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock_ops,
};
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_sk_storage_get, bpf_sock_ops_cb_flags_set};
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use mesh_common::addr::v4_mapped;
use mesh_common::maps::{DeliveryKey, FlowKey, ROLE_DELIVER, SockMeta};
use mesh_common::{Counter, WireAddr};

use crate::context::{AF_INET6, read, read_ip6};
use crate::log::tell;
use crate::maps::{DELIVERIES, FLOWS, SOCK_META, count, now_ns};

const OK: u32 = 1;

/// `TCP_ESTABLISHED` of `enum` in the kernel's UAPI.
const TCP_ESTABLISHED: u32 = 1;

/// How long a tuple still passes after the handshake, in units of 2^20 ns: an application whose SYN
/// queue is full answers with a SYN cookie, and then the ACK is looked up like a SYN.
const GRACE: u32 = 1024;

#[sock_ops]
pub fn mesh_sockops(ctx: SockOpsContext) -> u32 {
    // Some nine callbacks run per connection and most are not ours.
    match read!(ctx.ops, op) {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(&ctx),
        BPF_SOCK_OPS_STATE_CB => answered(&ctx),
        _ => {}
    }
    OK
}

#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    let Some(meta) = meta(ctx) else {
        return;
    };
    if meta.role == ROLE_DELIVER {
        let announced = DELIVERIES.insert(ends(ctx.ops), 0, 0).is_ok();
        // Asks for the callback that ends the announcement.
        // SAFETY: the context is a full socket's `bpf_sock_ops`; an error leaves the flags as they were.
        unsafe { bpf_sock_ops_cb_flags_set(ctx.ops, BPF_SOCK_OPS_STATE_CB_FLAG as i32) };
        count(if announced { Counter::DeliveryAnnounced } else { Counter::DeliveryLost });
    } else if meta.captured != 0 {
        // SAFETY: the helper only reads the context.
        let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
        let ends = ends(ctx.ops);
        let key = FlowKey { netns, src: ends.src, listener_be: ends.dst.port_be, reserved: 0 };
        let published = FLOWS.insert(key, meta.orig, 0).is_ok();
        if published {
            count(Counter::FlowPublished);
        } else {
            count(Counter::FlowLost);
            tell!("original destination not stored: [{:i}]:{} to [{:i}]:{}", ends.src, meta.orig);
        }
        // From a second address of the pod: to `sk_lookup` that looks like a stranger.
        if ends.src.ip != ends.dst.ip {
            let _refused_if_lost = DELIVERIES.insert(ends, grace(), 0);
        }
    }
}

/// When a tuple that is announced now stops to pass.
#[inline(always)]
fn grace() -> u32 {
    // Zero means something else.
    ((now_ns() >> 20) as u32).wrapping_add(GRACE).max(1)
}

/// A delivery has left `SYN_SENT`: its tuple must not let anybody else past the agent.
#[inline(always)]
fn answered(ctx: &SockOpsContext) {
    let Some(meta) = meta(ctx) else {
        return;
    };
    if meta.role != ROLE_DELIVER {
        return;
    }
    // SAFETY: as in `connecting`.
    unsafe { bpf_sock_ops_cb_flags_set(ctx.ops, 0) };
    let key = ends(ctx.ops);
    if read!(ctx.ops, __bindgen_anon_1.args[1]) == TCP_ESTABLISHED {
        // A tuple that cannot be updated stays open until it is pushed out: worth no reset.
        let _unbounded = DELIVERIES.insert(key, grace(), 0);
    } else {
        let _already_gone = DELIVERIES.remove(key);
    }
}

/// What is remembered on the socket, without creating it.
#[inline(always)]
fn meta(ctx: &SockOpsContext) -> Option<SockMeta> {
    let sk = read!(ctx.ops, __bindgen_anon_2.sk);
    if sk.is_null() {
        return None;
    }
    // aya's `SkStorage` takes a `bpf_sock_addr` only. The static's address is what the loader replaces
    // with the map.
    let map = (&raw const SOCK_META).cast_mut();
    // SAFETY: `sk` is this callback's socket, and without `CREATE` no initial value is read.
    let meta = unsafe { bpf_sk_storage_get(map.cast(), sk.cast(), core::ptr::null_mut(), 0) };
    if meta.is_null() {
        return None;
    }
    // SAFETY: not null; the map's values are `SockMeta` and live as long as the socket.
    Some(unsafe { *meta.cast::<SockMeta>() })
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
