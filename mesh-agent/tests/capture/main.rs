//! Capture against the real kernel: a pod is a network namespace, the programs hang on a cgroup of this
//! process. Needs root; skipped without.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "clippy takes only the test functions themselves for tests, not their helpers"
)]

mod elements;
mod enrol;
mod generations;
mod inbound;
mod networks;
mod outbound;
mod pending;
mod pins;
mod routes;
#[path = "../skip/mod.rs"]
mod skip;
mod world;
