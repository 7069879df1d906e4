//! Any text of proc_pid_maps(5).
#![no_main]

use mesh_agent::net::fuzzing;

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzzing::maps(input));
