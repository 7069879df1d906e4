//! Keys of record layers, expanded only while they are used.
//!
//! What an AEAD derives from a key is twenty times as large as the key, and can be derived again. A
//! worker keeps it for the keys that it used last, up to [`MOST`]: an idle lane costs its key and no
//! more.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use aws_lc_rs::aead::{Algorithm, LessSafeKey, UnboundKey};
use aws_lc_rs::error::Unspecified;
use zeroize::Zeroizing;

/// Expanded keys that a thread has: two for each of 128 lanes that are busy at once, 150 KB.
const MOST: usize = 256;
/// AES-256 and ChaCha20 have the longest keys.
const MAX_LEN: usize = 32;

thread_local! {
    static EXPANDED: RefCell<Expanded> = const { RefCell::new(Expanded::new()) };
}

/// Numbers expansions. Of the process and not of a thread: a key that is used on another thread must
/// never find a stranger's expansion under its own number.
static NUMBERS: AtomicU64 = AtomicU64::new(1);

/// What a thread has expanded. The oldest gives way.
struct Expanded {
    places: Vec<Option<(u64, LessSafeKey)>>,
    next: usize,
}

/// The key of an AEAD.
pub(super) struct AeadKey {
    algorithm: &'static Algorithm,
    /// Of which the algorithm takes as many bytes as its keys have.
    bytes: Zeroizing<[u8; MAX_LEN]>,
    /// Where its expansion was made last, and under which number; 0 before the first one.
    place: usize,
    number: u64,
}

impl AeadKey {
    /// `None` if `bytes` is not as long as the algorithm's keys are.
    pub(super) fn new(algorithm: &'static Algorithm, bytes: &[u8]) -> Option<Self> {
        let mut kept = Zeroizing::new([0; MAX_LEN]);
        kept.get_mut(..bytes.len())?.copy_from_slice(bytes);
        (bytes.len() == algorithm.key_len()).then_some(Self {
            algorithm,
            bytes: kept,
            place: 0,
            number: 0,
        })
    }

    /// Does something with the expanded key.
    pub(super) fn expanded<T>(
        &mut self,
        seal_or_open: impl FnOnce(&LessSafeKey) -> Result<T, Unspecified>,
    ) -> Result<T, Unspecified> {
        EXPANDED.with_borrow_mut(|expanded| {
            if expanded.get(self).is_none() {
                let bytes = &self.bytes[..self.algorithm.key_len()];
                let key = LessSafeKey::new(UnboundKey::new(self.algorithm, bytes)?);
                self.number = NUMBERS.fetch_add(1, Relaxed);
                self.place = expanded.add(self.number, key);
            }
            seal_or_open(expanded.get(self).ok_or(Unspecified)?)
        })
    }
}

/// Nothing of a connection's keys outlives it.
impl Drop for AeadKey {
    fn drop(&mut self) {
        // At the end of a thread all of them are gone already.
        let forgotten = EXPANDED.try_with(|expanded| {
            if let Ok(mut expanded) = expanded.try_borrow_mut() {
                expanded.forget(self);
            }
        });
        forgotten.unwrap_or_default();
    }
}

impl Expanded {
    const fn new() -> Self {
        Self { places: Vec::new(), next: 0 }
    }

    fn get(&self, key: &AeadKey) -> Option<&LessSafeKey> {
        let (number, expanded) = self.places.get(key.place)?.as_ref()?;
        (*number == key.number).then_some(expanded)
    }

    fn add(&mut self, number: u64, key: LessSafeKey) -> usize {
        let place = self.next;
        self.next = (self.next + 1) % MOST;
        match self.places.get_mut(place) {
            Some(taken) => *taken = Some((number, key)),
            None => self.places.push(Some((number, key))),
        }
        place
    }

    fn forget(&mut self, key: &AeadKey) {
        if self.get(key).is_some() {
            self.places[key.place] = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, NONCE_LEN, Nonce};

    use super::*;

    fn key(of: u8) -> AeadKey {
        AeadKey::new(&AES_128_GCM, &[of; 16]).unwrap()
    }

    /// The tag that `key` puts on nothing.
    fn tag(key: &mut AeadKey) -> Vec<u8> {
        key.expanded(|key| {
            let nonce = Nonce::assume_unique_for_key([0; NONCE_LEN]);
            let mut sealed = Vec::new();
            key.seal_in_place_append_tag(nonce, Aad::empty(), &mut sealed).map(|()| sealed)
        })
        .unwrap()
    }

    fn held() -> usize {
        EXPANDED.with_borrow(|expanded| expanded.places.iter().flatten().count())
    }

    #[test]
    fn keys_that_gave_way_are_expanded_again_and_none_is_taken_for_another() {
        let mut keys: Vec<_> = (0..=u8::MAX).map(key).collect();
        keys.extend((0..=u8::MAX).map(key));
        let tags: Vec<_> = keys.iter_mut().map(tag).collect();
        assert_eq!(held(), MOST, "of {} keys", keys.len());
        // First those that gave way, in an order that lets others give way.
        for (at, key) in keys.iter_mut().enumerate() {
            assert_eq!(tag(key), tags[at], "{at}");
        }
        assert!(tags[..MOST] == tags[MOST..], "equal keys are equal");
        assert!(tags[..MOST].iter().enumerate().all(|(at, tag)| !tags[..at].contains(tag)));
        drop(keys);
        assert_eq!(held(), 0, "keys outlive their connections");
    }

    #[test]
    fn a_key_on_another_thread_does_not_find_a_strangers() {
        let (mut one, mut other) = (key(1), key(2));
        let (first, second) = (tag(&mut one), tag(&mut other));
        std::thread::spawn(move || {
            // The same places as on the first thread, the other way round.
            assert_eq!(tag(&mut other), second);
            assert_eq!(tag(&mut one), first);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_key_of_another_length_is_none() {
        for len in [0, 15, 17, 32, 33] {
            assert!(AeadKey::new(&AES_128_GCM, &vec![0; len]).is_none(), "{len}");
        }
        assert!(AeadKey::new(&AES_256_GCM, &[0; 32]).is_some());
    }
}
