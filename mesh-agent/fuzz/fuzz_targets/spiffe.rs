#![no_main]

#[path = "../bodies/spiffe.rs"]
mod spiffe;

libfuzzer_sys::fuzz_target!(|input: &[u8]| spiffe::feed(input));
