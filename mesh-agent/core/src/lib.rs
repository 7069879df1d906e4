//! Malla's decisions.
//!
//! Everything here is a pure function of its arguments: no clock (time is `now: Instant`), no
//! randomness (a `draw` is passed in), no socket, no file, no task. What a peer sends is parsed
//! here and nowhere else, so that a fuzzer reaches every parser.
//!
//! | module | stage |
//! |---|---|
//! | [`route`] | route: which service or workload a destination means |
//! | [`locality`] | route: which endpoints of a service are meant from here |
//! | [`networks`] | route: where somebody may be who has to be read first |
//! | [`protocol`] | route: what is spoken with them, as declared |
//! | [`balance`] | balance: which endpoint takes the connection |
//! | [`affinity`] | balance: which endpoint a client keeps to |
//! | [`direct`], [`generation`] | capture: what the kernel may decide by itself, and until when |
//! | [`places`] | tunnel: whose handshake gives way to others |
//! | [`wire`] | tunnel: what two agents say to each other |
//! | [`authorize`] | authorize: whether the destination's agent delivers |
//! | [`cgroup`] | capture: which pod a process belongs to |
//! | [`pending`] | capture: what becomes of a pod before it is captured |
//! | [`sign`] | no stage: whether the cluster's CA certifies a workload |
//! | [`addr`], [`spiffe`], [`snapshot`], [`settings`], [`stage`] | the vocabulary of all of them |
#![forbid(unsafe_code)]

pub mod addr;
pub mod affinity;
pub mod authorize;
pub mod backoff;
pub mod balance;
pub mod cgroup;
pub mod direct;
#[cfg(test)]
mod fixtures;
pub mod generation;
pub mod locality;
pub mod names;
pub mod networks;
pub mod pending;
pub mod places;
pub mod polling;
pub mod protocol;
pub mod route;
pub mod settings;
pub mod shares;
pub mod sign;
pub mod snapshot;
pub mod spiffe;
pub mod stage;
pub mod wire;
