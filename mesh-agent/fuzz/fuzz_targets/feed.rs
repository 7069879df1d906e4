//! Any news of the cluster.
#![no_main]

use mesh_agent::discovery::cluster::fuzzing;

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzzing::feed(input));
