//! Records of the programs' ring as the fuzzer makes them up: whatever numbers they hold, none
//! overflows. And names of pins, which whoever may write to the bpffs gives.

use super::events::record;
use super::pins::{decoded, encoded};
use super::sys;

/// Any bytes of the size of a record are one, at any time; others are none.
pub fn events(input: &[u8]) {
    let Some((now, bytes)) = input.split_first_chunk::<8>() else { return };
    if let Some(event) = sys::read_event(bytes) {
        _ = record(&event, u64::from_ne_bytes(*now));
    }
}

/// Any text is a UID, and is that again when it is read from the name of its pin; any name is one that a UID has, or
/// stays as it is.
pub fn pins(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let name = encoded(text);
    assert!(name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')));
    assert_eq!(decoded(&name), text, "read back");
    let uid = decoded(text);
    assert!(encoded(&uid) == text || uid == text, "another name than that of {uid:?}");
}

#[cfg(test)]
mod tests {
    use mesh_common::direct::DirectEvent;

    use super::*;

    #[test]
    fn seeds_of_the_fuzzer_hold() {
        crate::fuzzing::replay("events", events);
        crate::fuzzing::replay("pins", pins);
    }

    #[test]
    fn what_the_fuzzer_begins_with_is_a_record() {
        let seed = include_bytes!("../../fuzz/seeds/events/zeros");
        assert_eq!(seed.len(), 8 + size_of::<DirectEvent>());
    }
}
