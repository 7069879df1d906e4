//! Malla's programs in the kernel: they send an enrolled pod's connections to the agent of its node.
//!
//! ```text
//! connect4/6      remember the destination on the socket, rewrite it to the agent's listener, or
//!                 to an endpoint on this node that a verdict allows
//! sock_ops        publish {netns, source} -> destination before the SYN leaves; announce deliveries
//!                 and direct connections, and tell what becomes of the latter
//! getpeername4/6  show the application whom it dialled
//! sk_lookup       steer what comes to the pod to the agent, pass deliveries, refuse the rest
//! tcx ingress     hand packets between two pods of the node over, past it (`--redirect-peer on`)
//! ```
//!
//! Guarantees: a socket outside every enrolled pod costs two lookups that miss, and while pods are pending
//! one or two for each level of its cgroup; an exit is counted;
//! what should be captured and cannot be is refused; no loop, no kernel structure and no address
//! that user space did not give.
//!
//! Not here: the decisions ([`mesh_common::verdict`]).
#![no_std]
#![no_main]

mod connect;
mod context;
mod direct;
mod getpeername;
mod log;
mod lookup;
mod maps;
mod redirect;
mod sockops;

/// `bpf_sk_storage_get` and the socket lookup helpers are GPL only.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual BSD/GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses an endless loop: a program that could panic does not load.
    loop {}
}
