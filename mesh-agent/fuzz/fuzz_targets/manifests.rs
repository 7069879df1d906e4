//! Any text as manifests, up to the snapshot.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| mesh_agent::discovery::fuzzing::manifests(input));
