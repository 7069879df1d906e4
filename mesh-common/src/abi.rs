//! One number for everything that programs and agent must agree on: pins live in a directory named
//! after it, so that a new agent never reads an old agent's bytes as something else.

use crate::maps;

/// Raise when a field's *meaning* changes while its layout does not.
pub const VERSION: usize = 1;

/// Names, types, offsets and sizes of all that is shared, and what its numbers mean, hashed.
pub const HASH: u64 = meanings(maps::layout_hash(number(SEED, VERSION)), &maps::MEANINGS);

/// A struct whose layout is part of [`HASH`].
pub trait Layout {
    /// Its name, fields, offsets and sizes, hashed.
    const HASH: u64;
}

/// Offset basis of 64-bit FNV-1a. Collisions would need two of our own layouts to meet by chance:
/// one in 2^64, and a pin is compared with [`maps::SPECS`] all the same.
pub const SEED: u64 = 0xcbf2_9ce4_8422_2325;

/// Adds `bytes` to a hash (FNV-1a, <http://www.isthe.com/chongo/tech/comp/fnv/>).
pub const fn bytes(mut hash: u64, bytes: &[u8]) -> u64 {
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0100_0000_01b3);
        i += 1;
    }
    hash
}

/// Adds a text and its length, so that `ab`, `c` is not `a`, `bc`.
pub const fn text(hash: u64, text: &str) -> u64 {
    bytes(number(hash, text.len()), text.as_bytes())
}

/// Adds a number.
pub const fn number(hash: u64, number: usize) -> u64 {
    bytes(hash, &(number as u64).to_le_bytes())
}

/// Adds numbers and what they are called.
pub const fn meanings(mut hash: u64, meanings: &[(&str, u32)]) -> u64 {
    let mut i = 0;
    while i < meanings.len() {
        hash = number(text(hash, meanings[i].0), meanings[i].1 as usize);
        i += 1;
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::maps::map_struct;

    /// Vectors of the reference implementation (`test_fnv.c`).
    #[test]
    fn hash_is_fnv_1a() {
        assert_eq!(bytes(SEED, b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(bytes(SEED, b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(bytes(SEED, b"foobar"), 0x8594_4171_f739_67e8);
    }

    mod before {
        use super::*;
        map_struct! {
            /// As it was.
            pub(super) struct Entry {
                /// A.
                a: u32,
                /// B.
                b: u32,
            }
        }
    }

    mod swapped {
        use super::*;
        map_struct! {
            /// Same size, other order.
            pub(super) struct Entry {
                /// B.
                b: u32,
                /// A.
                a: u32,
            }
        }
    }

    mod retyped {
        use super::*;
        map_struct! {
            /// Same offsets, other type.
            pub(super) struct Entry {
                /// A.
                a: u32,
                /// B.
                b: [u8; 4],
            }
        }
    }

    /// An agent of another version that stands by takes programs over whose numbers it would misread.
    #[test]
    fn any_number_with_a_meaning_is_part_of_the_hash() {
        let (source, names) = (include_str!("maps.rs"), maps::MEANINGS.map(|(name, _)| name));
        let constants = source.lines().filter_map(|line| line.strip_prefix("pub const "));
        let names_of = |kind: &'static str| {
            constants.clone().filter_map(move |rest| rest.split_once(kind).map(|(name, _)| name))
        };
        let numbers: Vec<_> = names_of(": u8 = ").chain(names_of(": u32 = ")).collect();
        assert!(numbers.len() > 10, "{numbers:?}");
        for name in numbers {
            assert!(names.contains(&name), "{name} is missing in MEANINGS");
        }
        assert_ne!(meanings(SEED, &[("ROLE", 1)]), meanings(SEED, &[("ROLE", 2)]));
        assert_ne!(meanings(SEED, &[("ROLE", 1)]), meanings(SEED, &[("ROLE", 1), ("FLAG", 1)]));
    }

    #[test]
    fn any_change_of_layout_changes_the_hash() {
        assert_ne!(before::Entry::HASH, swapped::Entry::HASH);
        assert_ne!(before::Entry::HASH, retyped::Entry::HASH);
    }
}
