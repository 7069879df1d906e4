//! Who has how much of a table of bounded size, and who gives way when it is full.
//!
//! Guarantees: whoever has less than another always gets an entry; nobody who has the most takes one from
//! those that have less. Looking is cheap: nothing that is kept elsewhere is read.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Whoever has the most gives up the oldest of its own entries for a new one when that is so old: what is
/// used now is worth more than what was used then, and renewing costs little at this pace.
const AGED: Duration = Duration::from_secs(60);

/// The entries of a table, by who has them.
#[derive(Debug)]
pub struct Shares<O, K, V> {
    room: usize,
    taken: usize,
    /// Numbers entries in the order in which they were written.
    next: u64,
    owners: HashMap<O, Share<K, V>>,
}

#[derive(Debug)]
struct Share<K, V> {
    by_key: HashMap<K, Entry<V>>,
    /// The same by number: the first is the oldest.
    by_age: BTreeMap<u64, K>,
}

#[derive(Debug)]
struct Entry<V> {
    number: u64,
    written: Instant,
    value: V,
}

impl<K, V> Default for Share<K, V> {
    fn default() -> Self {
        Self { by_key: HashMap::new(), by_age: BTreeMap::new() }
    }
}

impl<O: Copy + Eq + Hash, K: Copy + Eq + Hash, V> Shares<O, K, V> {
    /// A table that has room for so many entries, and none yet.
    pub fn new(room: usize) -> Self {
        Self { room, taken: 0, next: 0, owners: HashMap::new() }
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.taken
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.taken == 0
    }

    /// Who has to give up which entry before `owner` writes `key` at `now`. `Ok(None)`: there is room, or
    /// the entry is there already.
    ///
    /// # Errors
    ///
    /// Nobody gives way: it stays unwritten.
    pub fn yields(&self, owner: O, key: &K, now: Instant) -> Result<Option<(O, K)>, Full> {
        let own = self.owners.get(&owner);
        if self.taken < self.room || own.is_some_and(|share| share.by_key.contains_key(key)) {
            return Ok(None);
        }
        let own_len = own.map_or(0, |share| share.by_key.len());
        let most = self.owners.iter().max_by_key(|(_, share)| share.by_key.len());
        let (victim, share) = most.ok_or(Full)?;
        // Of two that have as many, neither takes from the other: one of them would have more then.
        if share.by_key.len() > own_len + 1 {
            let oldest = share.by_age.values().next().ok_or(Full)?;
            return Ok(Some((*victim, *oldest)));
        }
        let oldest = own.and_then(|share| share.by_age.values().next()).ok_or(Full)?;
        let written = own.and_then(|share| share.by_key.get(oldest)).map(|entry| entry.written);
        let is_aged = written.is_some_and(|at| now.saturating_duration_since(at) >= AGED);
        if is_aged { Ok(Some((owner, *oldest))) } else { Err(Full) }
    }

    /// `owner` has written `key`.
    pub fn insert(&mut self, owner: O, key: K, value: V, now: Instant) {
        let share = self.owners.entry(owner).or_default();
        let number = self.next;
        self.next += 1;
        match share.by_key.insert(key, Entry { number, written: now, value }) {
            Some(before) => drop(share.by_age.remove(&before.number)),
            None => self.taken += 1,
        }
        share.by_age.insert(number, key);
    }

    /// The entry of `owner` is no more.
    pub fn remove(&mut self, owner: O, key: &K) {
        let Some(share) = self.owners.get_mut(&owner) else { return };
        if let Some(entry) = share.by_key.remove(key) {
            share.by_age.remove(&entry.number);
            self.taken -= 1;
        }
        if share.by_key.is_empty() {
            self.owners.remove(&owner);
        }
    }

    /// Those of which `holds` is not true.
    pub fn dead(&self, holds: impl Fn(&O, &K, &V) -> bool) -> Vec<(O, K)> {
        let all = self.owners.iter().flat_map(|(owner, share)| {
            share.by_key.iter().map(move |(key, entry)| (owner, key, entry))
        });
        let dead = all.filter(|(owner, key, entry)| !holds(owner, key, &entry.value));
        dead.map(|(owner, key, _entry)| (*owner, *key)).collect()
    }
}

/// There is no room, and nobody gives way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

impl std::fmt::Display for Full {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("there is no room")
    }
}

impl std::error::Error for Full {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[expect(clippy::disallowed_methods, reason = "any start will do; time then moves by hand")]
    fn epoch() -> Instant {
        Instant::now()
    }

    /// Writes `key`, whoever has to give way; says whether it is written.
    fn write(shares: &mut Shares<u8, u16, ()>, owner: u8, key: u16, now: Instant) -> bool {
        match shares.yields(owner, &key, now) {
            Err(Full) => return false,
            Ok(Some((victim, oldest))) => shares.remove(victim, &oldest),
            Ok(None) => {}
        }
        shares.insert(owner, key, (), now);
        true
    }

    fn has(shares: &Shares<u8, u16, ()>, owner: u8) -> usize {
        shares.owners.get(&owner).map_or(0, |share| share.by_key.len())
    }

    #[test]
    fn whoever_has_everything_gives_way_and_takes_nothing_from_others() {
        let (mut shares, now) = (Shares::new(100), epoch());
        assert!((0..100).all(|key| write(&mut shares, 1, key, now)));
        assert!(!write(&mut shares, 1, 100, now), "it has the most itself");
        assert!(write(&mut shares, 1, 7, now), "what it has it may renew");
        assert_eq!((0..200).filter(|key| write(&mut shares, 2, *key, now)).count(), 50);
        assert_eq!((has(&shares, 1), has(&shares, 2)), (50, 50));
        assert!(shares.owners[&1].by_key.contains_key(&7), "the oldest go first");
        assert!(!shares.owners[&1].by_key.contains_key(&0));
        assert!((0..9).all(|key| write(&mut shares, 3, key, now)));
        assert_eq!(has(&shares, 3), 9);
    }

    #[test]
    fn what_is_old_makes_room_for_its_owners_own() {
        let (mut shares, now) = (Shares::new(2), epoch());
        assert!(write(&mut shares, 1, 0, now) && write(&mut shares, 1, 1, now + AGED / 2));
        assert!(!write(&mut shares, 1, 2, now + AGED / 2));
        assert!(write(&mut shares, 1, 2, now + AGED));
        assert!(!write(&mut shares, 1, 3, now + AGED), "one at a time");
        let left: Vec<u16> = shares.owners[&1].by_age.values().copied().collect();
        assert_eq!(left, [1, 2]);
    }

    #[test]
    fn one_entry_of_one_is_not_fought_over() {
        let (mut shares, now) = (Shares::new(1), epoch());
        assert!(write(&mut shares, 1, 0, now));
        assert!(!write(&mut shares, 2, 0, now));
        shares.remove(1, &0);
        assert!(shares.is_empty() && write(&mut shares, 2, 0, now));
    }

    #[test]
    fn dead_ones_are_named() {
        let (mut shares, now) = (Shares::new(10), epoch());
        shares.insert(1u8, 1u16, 5u64, now);
        shares.insert(2, 1, 6, now);
        assert_eq!(shares.dead(|_, _, value| *value == 6), [(1, 1)]);
    }

    proptest! {
        #[test]
        fn there_are_never_more_than_fit_and_the_books_agree(
            steps in proptest::collection::vec((0u8..5, 0u16..40, 0u64..90, any::<bool>()), 1..400),
        ) {
            let (mut shares, mut now) = (Shares::new(20), epoch());
            for (owner, key, seconds, is_removed) in steps {
                now += Duration::from_secs(seconds / 30);
                if is_removed {
                    shares.remove(owner, &key);
                } else {
                    write(&mut shares, owner, key, now);
                }
                let counted: usize = (0..5).map(|owner| has(&shares, owner)).sum();
                prop_assert_eq!(counted, shares.len());
                prop_assert!(shares.len() <= 20);
                for share in shares.owners.values() {
                    prop_assert_eq!(share.by_age.len(), share.by_key.len());
                }
            }
        }
    }
}
