//! Any text: the parser never panics, and what it takes survives its own text.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_core::spiffe::{MAX_LEN, SpiffeId};

fuzz_target!(|text: &str| {
    if let Ok(id) = SpiffeId::parse(text) {
        assert!(text.len() <= MAX_LEN);
        assert_eq!(id.to_string(), text);
        assert_eq!(SpiffeId::parse(&id.to_string()), Ok(id));
    }
});
