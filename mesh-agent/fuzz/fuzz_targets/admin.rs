//! Any bytes at the admin socket.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| mesh_agent::admin::fuzzing::admin(input));
