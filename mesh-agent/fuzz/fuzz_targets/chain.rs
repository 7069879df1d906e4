//! Any certificates as a peer's chain.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| mesh_agent::identity::fuzzing::chain(input));
