//! Any refusal of the API.
#![no_main]

use mesh_agent::discovery::fuzzing;

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzzing::refusals(input));
