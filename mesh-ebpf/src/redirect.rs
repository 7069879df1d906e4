//! TCX ingress of the node's end of pods' cables: hand what one pod sends another straight over.
//!
//! Fails open, to the node: whatever is not certainly a segment of a connection that began here is left
//! to routing, and to every other program of the device.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::{bpf_redirect_peer, bpf_skb_load_bytes, bpf_skb_store_bytes};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use core::mem::MaybeUninit;
use mesh_common::Counter;
use mesh_common::packet::{Frame, Hop, Ipv4, Ipv6};
use mesh_common::redirect::{Peer, Redirect, decide_redirect};

use crate::context::read;
use crate::maps::{PEER_FLOWS, PEERS, agent, count};

/// `TCX_NEXT`: the device's next program, and in the end the node.
const NEXT: i32 = -1;
/// `PACKET_HOST` of `linux/if_packet.h`: addressed to the node, which would route it.
const PACKET_HOST: u32 = 0;
/// `ETH_P_IP` and `ETH_P_IPV6`, as `__sk_buff.protocol` holds them: in network order.
const ETH_P_IP: u32 = 0x0800_u16.to_be() as u32;
const ETH_P_IPV6: u32 = 0x86dd_u16.to_be() as u32;

#[classifier]
pub fn mesh_redirect(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    if read!(skb, pkt_type) != PACKET_HOST || read!(skb, vlan_present) != 0 {
        return NEXT;
    }
    match read!(skb, protocol) {
        ETH_P_IP => redirect::<Ipv4>(skb),
        ETH_P_IPV6 => redirect::<Ipv6>(skb),
        _ => NEXT,
    }
}

#[inline(always)]
fn redirect<Ip: Hop>(skb: *mut __sk_buff) -> i32 {
    let mut frame = MaybeUninit::<Frame<Ip>>::uninit();
    // SAFETY: the helper writes as many bytes as the frame has, or fails: the packet is shorter.
    let read = unsafe {
        bpf_skb_load_bytes(skb.cast(), 0, frame.as_mut_ptr().cast(), size_of::<Frame<Ip>>() as u32)
    };
    if read != 0 {
        return NEXT;
    }
    // SAFETY: all of it was written, and every bit pattern is a frame.
    let frame = unsafe { frame.assume_init() };
    let Some(segment) = frame.segment() else {
        return NEXT;
    };
    let decided = decide_redirect(
        &segment,
        read!(skb, ifindex),
        // SAFETY: copied out at once; a recycled element is another pod's, whose address then is not this.
        |ip| unsafe { PEERS.get(ip) }.copied(),
        // SAFETY: as above; another connection's numbers, at worst, leave this one to the node.
        |key| unsafe { PEER_FLOWS.get(key) }.copied(),
        agent,
    );
    let to = match decided {
        Redirect::Leave(None) => return NEXT,
        Redirect::Leave(Some(reason)) => return leave(reason),
        Redirect::Forget(key) => {
            let _already_gone = PEER_FLOWS.remove(key);
            return leave(Counter::RedirectUnknown);
        }
        Redirect::Open(key, flow, to) => {
            if PEER_FLOWS.insert(key, flow, 0).is_err() {
                return leave(Counter::RedirectLost);
            }
            to
        }
        Redirect::To(to) => to,
    };
    hand_over(skb, &frame, &to)
}

/// What arrives is what routing would have delivered: a hop less to live, and the link-layer addresses of
/// the pod's own cable. Programs that look at either see no difference.
#[inline(always)]
fn hand_over<Ip: Hop>(skb: *mut __sk_buff, frame: &Frame<Ip>, to: &Peer) -> i32 {
    let head = frame.forwarded(to.node_mac, to.pod_mac);
    // No flags: a checksum of the whole packet is something that devices make, and this comes from none.
    // SAFETY: the helper copies as many bytes as the head has.
    let written = unsafe {
        bpf_skb_store_bytes(skb.cast(), 0, (&raw const head).cast(), size_of_val(&head) as u32, 0)
    };
    if written != 0 {
        return leave(Counter::RedirectLost);
    }
    count(Counter::Redirected);
    // SAFETY: the helper only notes where to; the packet is moved when the program has returned.
    unsafe { bpf_redirect_peer(to.ifindex, 0) as i32 }
}

#[inline(always)]
fn leave(reason: Counter) -> i32 {
    count(reason);
    NEXT
}
