//! Any bytes at the beginning of a QUIC stream.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| mesh_agent::tunnel::fuzzing::streams(input));
