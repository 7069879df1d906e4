//! Records of the programs' ring as the fuzzer makes them up: whatever numbers they hold, none
//! overflows.

use super::events::record;
use super::sys;

/// Any bytes of the size of a record are one, at any time; others are none.
pub fn events(input: &[u8]) {
    let Some((now, bytes)) = input.split_first_chunk::<8>() else { return };
    if let Some(event) = sys::read_event(bytes) {
        _ = record(&event, u64::from_ne_bytes(*now));
    }
}

#[cfg(test)]
mod tests {
    use mesh_common::direct::DirectEvent;

    use super::*;

    #[test]
    fn seeds_of_the_fuzzer_hold() {
        crate::fuzzing::replay("events", events);
    }

    #[test]
    fn what_the_fuzzer_begins_with_is_a_record() {
        let seed = include_bytes!("../../fuzz/seeds/events/zeros");
        assert_eq!(seed.len(), 8 + size_of::<DirectEvent>());
    }
}
