//! Any object that may be a request for a certificate.
#![no_main]

use mesh_agent::identity::kubernetes::fuzzing;

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzzing::signing(input));
