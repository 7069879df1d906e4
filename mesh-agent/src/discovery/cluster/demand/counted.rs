//! What is kept of each thing that is wanted.

use std::collections::BTreeMap;

use super::Wanted;

/// Knows how many of them are addresses, those that callers say they have and those that pods dial: that is asked with
/// every demand, and there may be thousands.
#[derive(Debug)]
pub(super) struct Counted<T> {
    all: BTreeMap<Wanted, T>,
    callers: usize,
    dialled: usize,
}

impl<T> Default for Counted<T> {
    fn default() -> Self {
        Self { all: BTreeMap::new(), callers: 0, dialled: 0 }
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
        let (callers, dialled) = kinds(&wanted);
        if self.all.insert(wanted, value).is_none() {
            self.callers += callers;
            self.dialled += dialled;
        }
    }

    pub(super) fn remove(&mut self, wanted: &Wanted) -> Option<T> {
        let value = self.all.remove(wanted)?;
        let (callers, dialled) = kinds(wanted);
        self.callers -= callers;
        self.dialled -= dialled;
        Some(value)
    }

    /// Says whether any was not kept.
    pub(super) fn retain(&mut self, mut is_kept: impl FnMut(&Wanted, &T) -> bool) -> bool {
        let before = self.all.len();
        self.all.retain(|wanted, value| is_kept(wanted, value));
        let all = self.all.keys().map(kinds);
        (self.callers, self.dialled) = all.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        self.all.len() != before
    }

    /// How many there are,
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// how many are addresses that callers say they have,
    pub(super) fn callers(&self) -> usize {
        self.callers
    }

    /// and how many that pods of this node dial: of what no slice names by a pod.
    pub(super) fn dialled(&self) -> usize {
        self.dialled
    }
}

/// As which of the two it counts.
fn kinds(wanted: &Wanted) -> (usize, usize) {
    match wanted {
        Wanted::Address { account: Some(_), .. } => (1, 0),
        Wanted::Address { account: None, .. } => (0, 1),
        Wanted::Pod { .. } => (0, 0),
    }
}
