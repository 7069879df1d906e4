//! Any bytes as a trust bundle.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| mesh_agent::identity::fuzzing::bundle(input));
