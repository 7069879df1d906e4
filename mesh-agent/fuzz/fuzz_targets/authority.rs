//! Any CA's certificate and key.
#![no_main]

use mesh_agent::identity::fuzzing;

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzzing::authority(input));
