//! `cgroup/getpeername4` and `getpeername6`: show the application whom it dialled.
//!
//! Asks the socket and not the pod, so that a connection captured before its pod left the mesh keeps
//! its peer. Fails open: at worst the application sees the listener.

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use mesh_common::{Counter, WireAddr};

use crate::context::{set4, set6};
use crate::maps::{SOCK_META, count};

/// The only return value that the kernel takes from these hooks.
const OK: i32 = 1;

#[cgroup_sock_addr(getpeername4)]
pub fn mesh_peername4(ctx: SockAddrContext) -> i32 {
    show(&ctx, set4)
}

#[cgroup_sock_addr(getpeername6)]
pub fn mesh_peername6(ctx: SockAddrContext) -> i32 {
    show(&ctx, set6)
}

#[inline(always)]
fn show(ctx: &SockAddrContext, set: impl FnOnce(*mut bpf_sock_addr, &WireAddr)) -> i32 {
    // SAFETY: the context is a `bpf_sock_addr` with a full socket; without `CREATE` the helper returns
    // this socket's storage, which lives as long as the socket, or null.
    let meta = unsafe { SOCK_META.get_ptr_mut(ctx) };
    if meta.is_null() {
        return OK;
    }
    // SAFETY: not null; see above. Written by `connect` alone, which a caller may race with itself.
    let meta = unsafe { *meta };
    if meta.captured != 0 {
        set(ctx.sock_addr, &meta.orig);
        count(Counter::PeerShown);
    }
    OK
}
