//! Places for handshakes that are under way. Whoever reaches the port may begin one, so that who is silent must
//! not keep others out.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mesh_core::places::Places;
use tokio::sync::{Notify, oneshot};
use tokio::time::timeout;

use crate::tunnel::error::DialError;
use crate::tunnel::tunnels::lock;

/// The places of one server.
#[derive(Debug)]
pub(super) struct Handshakes {
    books: Mutex<Books>,
    /// One has become free.
    freed: Notify,
}

#[derive(Debug)]
struct Books {
    places: Places<IpAddr>,
    /// By the place's number: dropped when it is lost.
    holders: HashMap<u64, oneshot::Sender<Infallible>>,
}

impl Handshakes {
    pub(super) fn new(room: usize) -> Arc<Self> {
        let books = Books { places: Places::new(room), holders: HashMap::new() };
        Arc::new(Self { books: Mutex::new(books), freed: Notify::new() })
    }

    /// How many are under way.
    pub(super) fn under_way(&self) -> usize {
        lock(&self.books).places.taken()
    }

    /// A place for somebody at this address.
    ///
    /// # Errors
    ///
    /// There is none: how long it is until there will be.
    pub(super) fn take(self: &Arc<Self>, address: IpAddr) -> Result<Handshaking, Duration> {
        // One node may come from both a v4 address and its mapped form.
        let address = address.to_canonical();
        let mut books = lock(&self.books);
        let taken = books.places.take(address, Instant::now())?;
        if let Some(lost) = taken.instead_of {
            books.holders.remove(&lost);
        }
        let (holder, lost) = oneshot::channel();
        books.holders.insert(taken.number, holder);
        drop(books);
        Ok(Handshaking { all: Arc::clone(self), address, number: taken.number, lost })
    }

    /// Waits until one is free, or `most`. Cancel-safe.
    pub(super) async fn wait(&self, most: Duration) {
        drop(timeout(most, self.freed.notified()).await);
    }
}

/// A place, free again when dropped.
#[derive(Debug)]
pub(super) struct Handshaking {
    all: Arc<Handshakes>,
    address: IpAddr,
    number: u64,
    lost: oneshot::Receiver<Infallible>,
}

impl Handshaking {
    /// What the handshake comes to within `limit`, and before its place is lost.
    pub(super) async fn within<T>(
        &mut self,
        limit: Duration,
        handshake: impl Future<Output = T>,
    ) -> Result<T, DialError> {
        tokio::select! {
            biased; // Who has got through has done so, lost place or not.
            done = timeout(limit, handshake) => done.map_err(|_elapsed| DialError::TimedOut),
            _ = &mut self.lost => Err(DialError::TimedOut),
        }
    }
}

impl Drop for Handshaking {
    fn drop(&mut self) {
        let mut books = lock(&self.all.books);
        books.holders.remove(&self.number);
        books.places.leave(self.address, self.number);
        drop(books);
        self.all.freed.notify_one();
    }
}
