//! Any bytes as a request for a certificate.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| mesh_agent::identity::fuzzing::request(input));
