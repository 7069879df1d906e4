//! Buffers that a flow borrows while it has bytes in hand, and gives back when it has none.
//!
//! A worker is one thread, so its pool needs no lock: it is the thread's own. An idle flow holds no
//! memory here; the pool's high-water mark is what was needed at once, up to [`MAX_POOLED`].

use std::cell::RefCell;

use super::records::{MAX_PLAIN, OVERHEAD, UPDATE_LEN};

/// Full records that a small buffer holds, and a large one: 64 and 256 KiB of plaintext. Fewer, longer
/// system calls are what a bulk flow gains by a large one.
const SMALL_RECORDS: usize = 4;
const LARGE_RECORDS: usize = 16;

/// Behind the full records: a key update, an alert and a few control frames.
const SLACK: usize = 1024;

const SMALL: usize = size_for(SMALL_RECORDS);
const LARGE: usize = size_for(LARGE_RECORDS);

/// Large buffers that a thread makes: 4 MiB. Flows that stall keep theirs, and who finds none left
/// takes a small one; so this bounds what they can hold beyond that.
const MAX_LARGE: usize = 16;

/// Small buffers that a thread keeps for the next flow: 2 MiB.
const MAX_POOLED: usize = 32;

const fn size_for(records: usize) -> usize {
    records * (MAX_PLAIN + OVERHEAD) + SLACK
}

/// How much plaintext can be sealed into `room` bytes, with a key update in front of it.
pub(super) const fn sealable(room: usize) -> usize {
    let room = room.saturating_sub(UPDATE_LEN);
    let (full, rest) = (room / (MAX_PLAIN + OVERHEAD), room % (MAX_PLAIN + OVERHEAD));
    full * MAX_PLAIN + rest.saturating_sub(OVERHEAD)
}

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool::new()) };
}

/// What a thread has for its flows.
struct Pool {
    large: Vec<Box<[u8]>>,
    small: Vec<Box<[u8]>>,
    /// Large buffers that were made and not freed, here or in use.
    made: usize,
}

impl Pool {
    const fn new() -> Self {
        Self { large: Vec::new(), small: Vec::new(), made: 0 }
    }

    fn take(&mut self) -> Box<[u8]> {
        // Zeroed by the kernel, page by page, when it is first written to: a small exchange touches
        // one page of a large buffer.
        let make = |len: usize| vec![0; len].into_boxed_slice();
        if let Some(memory) = self.large.pop() {
            return memory;
        }
        if self.made < MAX_LARGE {
            self.made += 1;
            return make(LARGE);
        }
        self.small.pop().unwrap_or_else(|| make(SMALL))
    }

    fn give_back(&mut self, memory: Box<[u8]>) {
        if memory.len() == LARGE {
            // One that was made on another thread is only freed.
            if self.large.len() < self.made {
                self.large.push(memory);
            }
        } else if self.small.len() < MAX_POOLED {
            self.small.push(memory);
        }
    }
}

/// A queue of bytes that has memory only while it is not empty.
#[derive(Default)]
pub(crate) struct Buf {
    memory: Option<Box<[u8]>>,
    start: usize,
    end: usize,
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buf").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl Buf {
    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    pub(crate) fn len(&self) -> usize {
        self.end - self.start
    }

    /// How much can still be added, at least.
    pub(crate) fn room_len(&self) -> usize {
        self.memory.as_deref().map_or(SMALL, <[u8]>::len) - self.len()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.memory.as_deref().map_or(&[], |memory| &memory[self.start..self.end])
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        let (start, end) = (self.start, self.end);
        self.memory.as_deref_mut().map_or(&mut [], |memory| &mut memory[start..end])
    }

    /// All free memory, behind what is there. Borrows memory if there is none: [`Buf::release`]
    /// gives it back if nothing came of it.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        let memory = self.memory.get_or_insert_with(|| POOL.with_borrow_mut(Pool::take));
        if self.start > 0 {
            memory.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut memory[self.end..]
    }

    /// Says that the first `len` bytes of [`Buf::room`] have been filled.
    pub(crate) fn fill(&mut self, len: usize) {
        let size = self.memory.as_deref().map_or(0, <[u8]>::len);
        debug_assert!(self.end + len <= size, "filled more than there was room for");
        self.end = (self.end + len).min(size);
    }

    /// Removes `len` bytes from the front.
    pub(crate) fn consume(&mut self, len: usize) {
        self.start = (self.start + len).min(self.end);
        self.release();
    }

    /// Adds `bytes`; `false`, and nothing added, if they do not fit.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> bool {
        if bytes.len() > self.room_len() {
            return false;
        }
        self.room()[..bytes.len()].copy_from_slice(bytes);
        self.fill(bytes.len());
        true
    }

    /// Gives the memory back if there is nothing in it.
    pub(crate) fn release(&mut self) {
        if self.is_empty() {
            self.clear();
        }
    }

    /// Drops what is there and gives the memory back.
    pub(crate) fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
        if let Some(memory) = self.memory.take() {
            POOL.with_borrow_mut(|pool| pool.give_back(memory));
        }
    }

    /// Whether it holds memory now.
    #[cfg(test)]
    pub(crate) fn holds_memory(&self) -> bool {
        self.memory.is_some()
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_queue_holds_no_memory() {
        let mut buf = Buf::default();
        assert!(!buf.holds_memory());
        assert!(buf.push(b"abc"));
        buf.consume(2);
        assert_eq!(buf.bytes(), b"c");
        assert!(buf.holds_memory());
        buf.consume(1);
        assert!(!buf.holds_memory());
        buf.room();
        buf.release();
        assert!(!buf.holds_memory());
    }

    #[test]
    fn what_is_left_moves_to_the_front_to_make_room() {
        let mut buf = Buf::default();
        let len = buf.room().len();
        buf.room().fill(7);
        buf.fill(len);
        assert_eq!(buf.room_len(), 0);
        assert!(!buf.push(b"x"));
        buf.consume(len - 2);
        assert_eq!(buf.room().len(), len - 2);
        assert!(buf.push(b"x"));
        assert_eq!(buf.bytes(), [7, 7, b'x']);
    }

    #[test]
    fn who_finds_no_large_buffer_takes_a_small_one() {
        let mut held: Vec<Buf> = (0..=MAX_LARGE).map(|_| Buf::default()).collect();
        let sizes: Vec<_> = held.iter_mut().map(|buf| buf.room().len()).collect();
        assert_eq!(sizes[..MAX_LARGE], [LARGE; MAX_LARGE]);
        assert_eq!(sizes[MAX_LARGE], SMALL);
        // What one gives back the next one gets.
        held[3].release();
        assert_eq!(Buf::default().room().len(), LARGE);
    }

    #[test]
    fn what_is_sealable_fits_with_a_key_update() {
        for room in [UPDATE_LEN + OVERHEAD + 1, SMALL, LARGE, LARGE - 1, SMALL - SLACK] {
            let plain = sealable(room);
            let records = plain.div_ceil(MAX_PLAIN);
            assert!(UPDATE_LEN + plain + records * OVERHEAD <= room, "{room}");
            assert!(plain > 0, "{room}");
        }
        assert_eq!((sealable(0), sealable(UPDATE_LEN + OVERHEAD)), (0, 0));
        assert!(sealable(SMALL) >= SMALL_RECORDS * MAX_PLAIN);
    }
}
