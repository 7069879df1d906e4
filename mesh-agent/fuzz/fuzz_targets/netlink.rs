//! Any bytes as netlink's answer.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| mesh_agent::net::fuzzing::netlink(input));
