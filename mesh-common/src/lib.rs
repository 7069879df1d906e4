//! The contract between the eBPF programs and the agent: what lies in the maps, what is counted, and
//! the decisions, which are pure so that the host can test what the kernel runs.
//!
//! Guarantees: a map value has no padding and no invalid bit pattern (asserted at build time), every
//! address is 16 bytes in network order with IPv4 v4-mapped, and [`abi::HASH`] changes whenever the
//! layout of anything shared changes.
//!
//! Not here: reading a context or a map (`mesh-ebpf`), and what user space knows by other types
//! (`mesh-agent`'s `capture`).
#![cfg_attr(not(test), no_std)]

pub mod abi;
pub mod addr;
pub mod announce;
pub mod counter;
pub mod direct;
pub mod maps;
pub mod packet;
pub mod pending;
pub mod redirect;
pub mod verdict;

pub use addr::WireAddr;
pub use counter::Counter;
