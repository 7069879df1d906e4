//! Any answer to the CLI.
#![no_main]

use mesh_agent::admin::fuzzing;

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzzing::answers(input));
