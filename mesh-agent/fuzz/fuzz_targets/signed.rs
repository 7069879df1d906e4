//! Any answer of a signer.
#![no_main]

use mesh_agent::identity::kubernetes::fuzzing;

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzzing::signed(input));
