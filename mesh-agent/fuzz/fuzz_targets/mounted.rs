//! Any text of proc_pid_mountinfo(5), of two processes.
#![no_main]

use mesh_agent::mounted::fuzzing;

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzzing::mounted(input));
