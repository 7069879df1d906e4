//! How much a direction may copy at one look.

use std::cell::Cell;

use mesh_core::wire::HEADER_LEN;

/// How much one direction copies before the task gives way to the others of its worker, where
/// several of them copy in bulk: 64 KiB, less a frame's header, so that frame and payload fill their
/// TLS records to the last byte.
pub const BUDGET: usize = 64 * 1024 - HEADER_LEN;

/// The same where this is the only one: as much as a large buffer holds and one system call moves.
pub(super) const BUDGET_ALONE: usize = 256 * 1024 - HEADER_LEN;

thread_local! {
    /// Directions on this worker that used up [`BUDGET`] when they were looked at last.
    static IN_BULK: Cell<usize> = const { Cell::new(0) };
}

/// What one direction may copy at one look, and whether it is one of those [`IN_BULK`].
#[derive(Debug, Default)]
pub(super) struct Turn {
    budget: usize,
    pub(super) copied: usize,
    in_bulk: bool,
}

impl Turn {
    pub(super) fn begin(&mut self) {
        let others = IN_BULK.get().saturating_sub(self.in_bulk.into());
        self.budget = if others == 0 { BUDGET_ALONE } else { BUDGET };
        self.copied = 0;
    }

    pub(super) fn copied(&mut self, len: usize) {
        self.copied += len;
    }

    pub(super) fn left(&self) -> usize {
        self.budget.saturating_sub(self.copied)
    }

    pub(super) fn end(&mut self) {
        self.count_as(self.copied >= BUDGET);
    }

    fn count_as(&mut self, in_bulk: bool) {
        if in_bulk != self.in_bulk {
            let now = IN_BULK.get();
            IN_BULK.set(if in_bulk { now + 1 } else { now.saturating_sub(1) });
            self.in_bulk = in_bulk;
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.count_as(false);
    }
}
