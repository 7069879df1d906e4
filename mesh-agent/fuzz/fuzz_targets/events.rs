//! Any bytes as a record of the programs' ring.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| mesh_agent::capture::fuzzing::events(input));
