//! Whether a namespace is prepared to show applications their clients' addresses, and whether a
//! delivery is about to rely on it.
//!
//! Guarantees that nobody begins to rely on routes that are being taken away. Who relies on them
//! already is for the kernel to say ([`super::sock_diag`]): the sockets outlive their deliveries.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Shared by all handles to a namespace that were cloned from one.
#[derive(Clone, Debug, Default)]
pub(super) struct Clients(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    prepared: bool,
    /// Deliveries between their look at `prepared` and the answer to their SYN.
    beginning: usize,
}

/// A delivery that shows its client, until it is connected or has failed.
#[derive(Debug)]
pub(super) struct Beginning(Clients);

impl Clients {
    pub(super) fn set_prepared(&self, prepared: bool) {
        self.lock().prepared = prepared;
    }

    /// `None`: the application cannot be shown its client.
    pub(super) fn begin(&self) -> Option<Beginning> {
        let mut state = self.lock();
        if !state.prepared {
            return None;
        }
        state.beginning += 1;
        Some(Beginning(self.clone()))
    }

    /// Lets nobody begin any more, unless somebody is just about to; says whether it did.
    pub(super) fn close(&self) -> bool {
        let mut state = self.lock();
        if state.beginning > 0 {
            return false;
        }
        state.prepared = false;
        true
    }

    /// A holder that panicked has left two plain values: go on.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Beginning {
    fn drop(&mut self) {
        self.0.lock().beginning -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_are_not_closed_under_a_delivery_that_begins() {
        let clients = Clients::default();
        assert!(clients.begin().is_none(), "not prepared");
        clients.set_prepared(true);
        let (one, two) = (clients.begin().unwrap(), clients.begin().unwrap());
        drop(one);
        assert!(!clients.close());
        drop(two);
        assert!(clients.close());
        assert!(clients.begin().is_none(), "closed");
    }
}
