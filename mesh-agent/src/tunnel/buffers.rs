//! Buffers that a flow borrows while it has bytes in hand, and gives back when it has none.
//!
//! A worker is one thread, so its pool needs no lock: it is the thread's own. An idle flow holds no
//! memory here; the pool's high-water mark is what was needed at once, up to [`MAX_POOLED`].

use std::cell::RefCell;

/// What one read takes, and what one DATA frame and the TLS records around it fit into: 64 KiB, and
/// 22 bytes for each of the records that it needs, with room for a few control frames.
const SIZE: usize = 65 * 1024;

/// Buffers that a thread keeps for the next flow: 4 MiB.
const MAX_POOLED: usize = 64;

thread_local! {
    static POOL: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
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

    /// How much can still be added.
    pub(crate) fn room_len(&self) -> usize {
        SIZE - self.len()
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
        let memory = self.memory.get_or_insert_with(|| {
            POOL.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; SIZE].into_boxed_slice())
        });
        if self.start > 0 {
            memory.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut memory[self.end..]
    }

    /// Says that the first `len` bytes of [`Buf::room`] have been filled.
    pub(crate) fn fill(&mut self, len: usize) {
        debug_assert!(self.end + len <= SIZE, "filled more than there was room for");
        self.end = (self.end + len).min(SIZE);
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
            POOL.with_borrow_mut(|pool| {
                if pool.len() < MAX_POOLED {
                    pool.push(memory);
                }
            });
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
}
