//! Any bytes in the handshake of a lane.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| mesh_agent::tunnel::fuzzing::session(input));
