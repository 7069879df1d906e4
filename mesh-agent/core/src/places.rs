//! Who is heard when more want to be heard than there are places for.
//!
//! Guarantees: a place that is free is had at once. When none is, whoever has the most of them loses the one that
//! lasts the longest, if it has lasted for [`PATIENCE`], or for [`LENIENCE`] if that one has less than a quarter of
//! all: what is honest is over long before, and silence keeps nobody else out.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::time::{Duration, Instant};

/// For so long nobody loses a place. A TLS handshake takes two round trips and some milliseconds of a CPU.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// For so long nobody does who has few: with many callers at once on a CPU that is short, what is about to be done
/// is not to be begun again. As long as a client waits by default.
pub const LENIENCE: Duration = Duration::from_secs(5);

/// The places, by who has them.
#[derive(Debug)]
pub struct Places<O> {
    room: usize,
    taken: usize,
    /// Numbers places in the order in which they were taken.
    next: u64,
    /// Never an empty one: the first of each lasts the longest.
    by_owner: HashMap<O, BTreeMap<u64, Instant>>,
}

/// A place that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number, which no other one ever has.
    pub number: u64,
    /// The number of the one that was lost for it.
    pub instead_of: Option<u64>,
}

impl<O: Copy + Eq + Hash> Places<O> {
    /// So many, all of them free.
    pub fn new(room: usize) -> Self {
        Self { room, taken: 0, next: 0, by_owner: HashMap::new() }
    }

    /// How many are taken.
    pub fn taken(&self) -> usize {
        self.taken
    }

    /// Takes one at `now`.
    ///
    /// # Errors
    ///
    /// All are taken and nobody loses one yet: how long it is until somebody does, if none becomes free before.
    pub fn take(&mut self, owner: O, now: Instant) -> Result<Place, Duration> {
        let instead_of = if self.taken < self.room { None } else { Some(self.lose(now)?) };
        let number = self.next;
        self.next += 1;
        self.taken += 1;
        self.by_owner.entry(owner).or_default().insert(number, now);
        Ok(Place { number, instead_of })
    }

    /// The place is free again; one that was lost is so already.
    pub fn leave(&mut self, owner: O, number: u64) {
        let Some(places) = self.by_owner.get_mut(&owner) else { return };
        if places.remove(&number).is_some() {
            self.taken -= 1;
        }
        if places.is_empty() {
            self.by_owner.remove(&owner);
        }
    }

    fn lose(&mut self, now: Instant) -> Result<u64, Duration> {
        let longest = |places: &BTreeMap<u64, Instant>| {
            places.first_key_value().map(|(number, since)| (*number, *since))
        };
        // Of two that have as many, the one whose first came first.
        let most = self.by_owner.iter().max_by_key(|(_, places)| {
            (places.len(), std::cmp::Reverse(longest(places).map(|(number, _)| number)))
        });
        let Some((owner, many, (number, since))) =
            most.and_then(|(owner, places)| Some((*owner, places.len(), longest(places)?)))
        else {
            // There is no place at all.
            return Err(PATIENCE);
        };
        let patience = if many >= self.room.div_ceil(4) { PATIENCE } else { LENIENCE };
        let lasted = now.saturating_duration_since(since);
        if lasted < patience {
            return Err(patience - lasted);
        }
        self.leave(owner, number);
        Ok(number)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[expect(clippy::disallowed_methods, reason = "any start will do; time then moves by hand")]
    fn epoch() -> Instant {
        Instant::now()
    }

    fn has(places: &Places<u8>, owner: u8) -> usize {
        places.by_owner.get(&owner).map_or(0, BTreeMap::len)
    }

    #[test]
    fn whoever_has_the_most_loses_what_lasts_the_longest_and_nobody_else_does() {
        let (mut places, now) = (Places::new(4), epoch());
        let quiet = places.take(2, now).unwrap();
        let first = places.take(1, now).unwrap();
        for _ in 0..2 {
            assert_eq!(places.take(1, now).unwrap().instead_of, None);
        }
        let late = now + PATIENCE;
        assert_eq!(places.take(3, late).unwrap().instead_of, Some(first.number));
        // The flood goes on, at its own cost.
        assert_eq!(places.take(1, late).unwrap().instead_of, Some(first.number + 1));
        assert_eq!((has(&places, 1), has(&places, 2), has(&places, 3)), (2, 1, 1));
        assert!(places.by_owner[&2].contains_key(&quiet.number));
    }

    #[test]
    fn what_has_just_begun_is_lost_to_nobody() {
        let (mut places, now) = (Places::new(2), epoch());
        places.take(1, now).unwrap();
        let second = places.take(1, now + PATIENCE / 4).unwrap();
        let middle = now + PATIENCE / 2;
        assert_eq!(places.take(2, middle), Err(PATIENCE / 2));
        places.leave(1, second.number);
        assert_eq!(places.take(2, middle).unwrap().instead_of, None);
    }

    #[test]
    fn of_many_that_have_one_each_the_first_one_is_lost_later() {
        let (mut places, now) = (Places::new(5), epoch());
        let first = places.take(1, now).unwrap();
        for owner in 2..=5 {
            places.take(owner, now).unwrap();
        }
        assert_eq!(places.take(6, now + PATIENCE), Err(LENIENCE - PATIENCE));
        assert_eq!(places.take(6, now + LENIENCE).unwrap().instead_of, Some(first.number));
        // Who lost it does not free another's.
        places.leave(1, first.number);
        assert_eq!(places.taken(), 5);
    }

    proptest! {
        #[test]
        fn the_books_agree(
            steps in proptest::collection::vec((0u8..5, 0u64..30, 0u64..900, any::<bool>()), 1..400),
        ) {
            let (mut places, mut now) = (Places::new(8), epoch());
            for (owner, number, millis, leaves) in steps {
                now += Duration::from_millis(millis);
                if leaves {
                    places.leave(owner, number);
                } else if let Err(wait) = places.take(owner, now) {
                    prop_assert!(places.take(owner, now + wait).is_ok());
                }
                let counted: usize = (0..5).map(|owner| has(&places, owner)).sum();
                prop_assert_eq!(counted, places.taken());
                prop_assert!(places.taken() <= 8);
                prop_assert!(places.by_owner.values().all(|places| !places.is_empty()));
            }
        }
    }
}
