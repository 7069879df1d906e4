//! Any text beside the trusted roots.
#![no_main]

use mesh_agent::identity::kubernetes::fuzzing;

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzzing::published(input));
