//! What is kept of each thing that is wanted.

use std::collections::BTreeMap;

use super::Wanted;

/// Knows how many of them are addresses that callers say they have: that is asked with every demand, and there
/// may be thousands.
#[derive(Debug)]
pub(super) struct Counted<T> {
    all: BTreeMap<Wanted, T>,
    callers: usize,
}

impl<T> Default for Counted<T> {
    fn default() -> Self {
        Self { all: BTreeMap::new(), callers: 0 }
    }
}

impl<T> Counted<T> {
    pub(super) fn get(&self, wanted: &Wanted) -> Option<&T> {
        self.all.get(wanted)
    }

    pub(super) fn get_mut(&mut self, wanted: &Wanted) -> Option<&mut T> {
        self.all.get_mut(wanted)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &Wanted> {
        self.all.keys()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&Wanted, &T)> {
        self.all.iter()
    }

    pub(super) fn insert(&mut self, wanted: Wanted, value: T) {
        let is_callers = wanted.is_callers();
        if self.all.insert(wanted, value).is_none() {
            self.callers += usize::from(is_callers);
        }
    }

    pub(super) fn remove(&mut self, wanted: &Wanted) -> Option<T> {
        let value = self.all.remove(wanted)?;
        self.callers -= usize::from(wanted.is_callers());
        Some(value)
    }

    /// Says whether any was not kept.
    pub(super) fn retain(&mut self, mut is_kept: impl FnMut(&Wanted, &T) -> bool) -> bool {
        let before = self.all.len();
        self.all.retain(|wanted, value| is_kept(wanted, value));
        self.callers = self.all.keys().filter(|wanted| wanted.is_callers()).count();
        self.all.len() != before
    }

    /// How many are addresses that callers say they have,
    pub(super) fn callers(&self) -> usize {
        self.callers
    }

    /// and how many are not.
    pub(super) fn others(&self) -> usize {
        self.all.len() - self.callers
    }
}
