//! Reading and writing contexts one field at a time.
//!
//! LLVM merges neighbouring accesses and shares the tails of branches, and the verifier then says
//! `invalid bpf_context access off=32 size=8` or `dereference of modified ctx ptr R1 off=28
//! disallowed`. Volatile accesses are neither merged nor moved into a shared tail.

use aya_ebpf::bindings::bpf_sock_addr;
use mesh_common::WireAddr;
use mesh_common::addr::v4_mapped;

/// `SOL_TCP`.
pub(crate) const IPPROTO_TCP: u32 = 6;
pub(crate) const AF_INET: u32 = 2;
pub(crate) const AF_INET6: u32 = 10;

/// One volatile read of a field of a context.
macro_rules! read {
    ($ctx:expr, $($field:tt)+) => {
        // SAFETY: the kernel passes a context that is valid for the whole call, and the verifier
        // checks the offset and size of every access to it.
        unsafe { core::ptr::read_volatile(&raw const (*$ctx).$($field)+) }
    };
}

/// One volatile write of a field of a context.
macro_rules! write {
    ($ctx:expr, $value:expr, $($field:tt)+) => {
        // SAFETY: as for `read!`; nothing else touches the context during the call.
        unsafe { core::ptr::write_volatile(&raw mut (*$ctx).$($field)+, $value) }
    };
}

/// The four words of an IPv6 address in a context.
macro_rules! read_ip6 {
    ($ctx:expr, $field:ident) => {
        [
            $crate::context::read!($ctx, $field[0]),
            $crate::context::read!($ctx, $field[1]),
            $crate::context::read!($ctx, $field[2]),
            $crate::context::read!($ctx, $field[3]),
        ]
    };
}

pub(crate) use {read, read_ip6};

/// The destination in an IPv4 `bpf_sock_addr`.
#[inline(always)]
pub(crate) fn dst4(addr: *const bpf_sock_addr) -> WireAddr {
    let ip = v4_mapped(read!(addr, user_ip4));
    WireAddr { ip, port_be: read!(addr, user_port) as u16, reserved: 0 }
}

/// The destination in an IPv6 `bpf_sock_addr`, which may be v4-mapped.
#[inline(always)]
pub(crate) fn dst6(addr: *const bpf_sock_addr) -> WireAddr {
    let ip = read_ip6!(addr, user_ip6);
    // The port is in network order, zero-extended.
    WireAddr { ip, port_be: read!(addr, user_port) as u16, reserved: 0 }
}

/// Overwrites the address in an IPv4 `bpf_sock_addr`.
#[inline(always)]
pub(crate) fn set4(addr: *mut bpf_sock_addr, to: &WireAddr) {
    write!(addr, to.ip[3], user_ip4);
    write!(addr, u32::from(to.port_be), user_port);
}

/// Overwrites the address in an IPv6 `bpf_sock_addr`.
#[inline(always)]
pub(crate) fn set6(addr: *mut bpf_sock_addr, to: &WireAddr) {
    write!(addr, to.ip[0], user_ip6[0]);
    write!(addr, to.ip[1], user_ip6[1]);
    write!(addr, to.ip[2], user_ip6[2]);
    write!(addr, to.ip[3], user_ip6[3]);
    write!(addr, u32::from(to.port_be), user_port);
}
