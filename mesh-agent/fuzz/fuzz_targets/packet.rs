#![no_main]

#[path = "../bodies/packet.rs"]
mod packet;

libfuzzer_sys::fuzz_target!(|input: &[u8]| packet::feed(input));
