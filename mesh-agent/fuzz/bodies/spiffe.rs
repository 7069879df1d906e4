//! Any text: the parser never panics, and what it takes survives its own text.

use mesh_core::spiffe::{MAX_LEN, SpiffeId};

pub(crate) fn feed(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(id) = SpiffeId::parse(text) {
        assert!(text.len() <= MAX_LEN);
        assert_eq!(id.to_string(), text);
        assert_eq!(SpiffeId::parse(&id.to_string()), Ok(id));
    }
}
