//! How many pods of other nodes are read at once, by who asks for them.
//!
//! # Guarantees
//!
//! - Whoever asks for many addresses that nothing names, a pod of this node or a caller through the tunnel, keeps
//!   nobody waiting for what a Service names: a read of a free address may take seconds.
//! - What is read again is not given up, however much else is asked for: it may be another pod's address by now.
//! - Who waits for a read is answered, also if it does not get its turn.

use std::time::Duration;

use kube::Client;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::demand::{Found, Wanted};
use super::find::find;

/// Reads at once of what slices name: a first connection to a large service must not take the API server for
/// itself.
const NAMED: usize = 16;
/// The same of addresses that this node's pods dial and nothing names.
const DIALLED: usize = 12;
/// The same of addresses from which somebody says to have called. Nobody is refused for the want of these: a
/// connection goes on after [`READ_LIMIT`](crate::known::READ_LIMIT), and its client is not shown.
const CALLED: usize = 8;
/// The same of what is read again.
const AGAIN: usize = 4;
/// Until a read is given up that has not got its turn. No connection waits for so long
/// ([`READ_LIMIT`](crate::known::READ_LIMIT)), and what is waited for in vain must not keep those that come after
/// it.
const LIMIT: Duration = Duration::from_secs(5);

/// Why something is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// Something that is followed names it.
    Named,
    /// A pod of this node dials it.
    Dialled,
    /// Somebody says to have called from there.
    Called,
    /// It is used, and was read long ago. Nobody waits.
    Again,
}

/// Where what is wanted is read.
#[derive(Debug)]
pub(super) struct Places {
    named: Semaphore,
    dialled: Semaphore,
    called: Semaphore,
    again: Semaphore,
}

impl Default for Places {
    fn default() -> Self {
        let [named, dialled, called, again] = [NAMED, DIALLED, CALLED, AGAIN].map(Semaphore::new);
        Self { named, dialled, called, again }
    }
}

impl Places {
    /// Reads what is wanted when there is a place for it.
    pub(super) async fn read(&self, client: &Client, wanted: &Wanted, reason: Reason) -> Found {
        let places = match reason {
            Reason::Named => &self.named,
            Reason::Dialled => &self.dialled,
            Reason::Called => &self.called,
            Reason::Again => {
                let _place = self.again.acquire().await;
                return find(client, wanted).await;
            }
        };
        match timeout(LIMIT, places.acquire()).await {
            Ok(_place) => find(client, wanted).await,
            Err(_elapsed) => Found::GivenUp,
        }
    }
}
