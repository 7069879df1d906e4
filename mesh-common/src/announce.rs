//! How long a tuple in `DELIVERIES` passes, and whose it has to be. Times are on `CLOCK_BOOTTIME` in units
//! of 2^20 ns, about 1 ms.

use crate::maps::is_before;

/// The SYN is not answered yet: it passes.
pub const UNANSWERED: u32 = 0;

/// How long a tuple still passes after the handshake: an application whose SYN queue is full answers with
/// a SYN cookie, and then the ACK is looked up like a SYN.
const GRACE: u32 = 1024;

/// Bit of a value: passes only while its client is in the mesh. Takes one unit of the time at most.
const MEMBERS: u32 = 1;

/// The value from `now` on, when the SYN is answered.
///
/// A client that leaves the mesh may connect from the same port again, and `sk_lookup` sees no difference
/// between its SYN and the last ACK of the connection before: what is announced for a member ends with
/// the membership.
#[inline(always)]
pub const fn answered(now: u32, is_member: bool) -> u32 {
    let until = now.wrapping_add(GRACE) & !MEMBERS;
    let until = if until == UNANSWERED { 2 } else { until };
    if is_member { until | MEMBERS } else { until }
}

/// Whether a tuple with this value passes at `now`.
#[inline(always)]
pub fn passes(value: u32, now: u32, is_member: impl FnOnce() -> bool) -> bool {
    value == UNANSWERED || is_before(now, value) && (value & MEMBERS == 0 || is_member())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn tuple_passes_for_about_a_second_after_the_answer(now: u32, later in 0..GRACE * 3) {
            let value = answered(now, false);
            prop_assert_ne!(value, UNANSWERED);
            let passes = passes(value, now.wrapping_add(later), || false);
            // A unit less for the bit, one or two more where zero means something else.
            prop_assert!(passes || later >= GRACE - 1);
            prop_assert!(!passes || later < GRACE + 2);
        }

        #[test]
        fn members_tuple_ends_with_the_membership(now: u32, later in 0..GRACE - 1) {
            let value = answered(now, true);
            prop_assert!(passes(value, now.wrapping_add(later), || true));
            prop_assert!(!passes(value, now.wrapping_add(later), || false));
            prop_assert!(!passes(value, now.wrapping_add(GRACE + 3), || true));
        }
    }

    #[test]
    fn syn_without_an_answer_passes_whoever_it_is_from() {
        assert!(passes(UNANSWERED, 7, || false));
    }
}
