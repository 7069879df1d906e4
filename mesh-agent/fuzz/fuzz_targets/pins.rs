//! Any name of a pin.
#![no_main]

use mesh_agent::capture::fuzzing;

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzzing::pins(input));
