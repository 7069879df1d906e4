//! How much peers may send on QUIC connections before anybody reads it.
//!
//! Each stream may have a window of its own unread. Were that the only limit, a peer could have as much
//! unread as it opens streams; with a fixed limit for all streams of a connection, applications that do
//! not read would use it up, and the others would not get another byte. So the limit of a connection
//! grows: by what readers that stall hold, and while the peer says that it would send more.
//!
//! # Guarantees
//!
//! - *Bounded.* The limits of all connections of this agent together never exceed the [`Credit`], and
//!   those of one never half of it. A limit does not shrink: what was promised can be sent. It is given
//!   back with the connection.
//! - *Readers go on.* Whatever stalls, the connection has room for those that read; where there is no
//!   credit left for that, the readers that have stalled the longest are reset.
//!
//! # Not here
//!
//! Limits of lanes: their unread bytes lie in the kernel, which has its own (`net.ipv4.tcp_mem`).

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::tunnels::lock;

/// How often connections are looked at.
pub(super) const LOOK: Duration = Duration::from_millis(200);

/// A reader is reset only after it has not read for so many looks: one second, in which a program that
/// is merely slow reads something.
const PATIENCE: u32 = 5;

/// The part of a connection's limit that is kept for streams that are read.
const ROOM: u64 = 4;

/// What a connection may grow to for streams that are read, at the peer's wish: as much as a peer of ours
/// has unacknowledged at most.
const BUSY: u64 = 8 << 20;

/// Bytes that may be promised to peers, shared by whoever has a clone of it.
#[derive(Clone, Debug)]
pub struct Credit(Arc<Pot>);

#[derive(Debug)]
struct Pot {
    all: u64,
    left: AtomicU64,
}

impl Credit {
    /// So many bytes.
    pub fn new(bytes: u64) -> Self {
        Self(Arc::new(Pot { all: bytes, left: AtomicU64::new(bytes) }))
    }

    /// All of it, lent or not.
    pub fn bytes(&self) -> u64 {
        self.0.all
    }

    /// What is lent now.
    pub fn lent(&self) -> u64 {
        self.0.all - self.0.left.load(Relaxed)
    }

    /// So many bytes, until the loan is dropped. `None` if so many are not left.
    pub(super) fn lend(&self, bytes: u64) -> Option<Loan> {
        let lend = |left: u64| left.checked_sub(bytes);
        self.0.left.fetch_update(Relaxed, Relaxed, lend).ok()?;
        Some(Loan { credit: self.clone(), bytes })
    }
}

/// Bytes that one connection has promised.
#[derive(Debug)]
pub(super) struct Loan {
    credit: Credit,
    bytes: u64,
}

impl Loan {
    /// Adds to it what `bytes` have over it, or as much of that as is left and one connection may have.
    fn grow_to(&mut self, bytes: u64) {
        let more = bytes.min(self.credit.bytes() / 2).saturating_sub(self.bytes);
        let mut got = 0;
        let lend = |left: u64| {
            got = more.min(left);
            Some(left - got)
        };
        if self.credit.0.left.fetch_update(Relaxed, Relaxed, lend).is_ok() {
            self.bytes += got;
        }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.credit.0.left.fetch_add(self.bytes, Relaxed);
    }
}

/// What one flow does with what arrives for it.
#[derive(Debug, Default)]
pub(super) struct Reader {
    reads: AtomicU64,
    /// The last read found nothing.
    starved: AtomicBool,
    /// Reads at the last look.
    seen: AtomicU64,
    /// Looks since it read last, with bytes waiting.
    stalled: AtomicU32,
    is_given_up: AtomicBool,
    /// Who relays it. Not a `Notify`, whose waiters are ten times as large, for every connection.
    relay: Mutex<Option<Waker>>,
}

impl Reader {
    /// It has read, and whether there was anything.
    pub(super) fn read(&self, starved: bool) {
        self.starved.store(starved, Relaxed);
        self.reads.fetch_add(1, Relaxed);
    }

    /// For how many looks it has left lying what arrived.
    fn look(&self) -> u32 {
        let reads = self.reads.load(Relaxed);
        if self.seen.swap(reads, Relaxed) != reads || self.starved.load(Relaxed) {
            self.stalled.store(0, Relaxed);
            return 0;
        }
        self.stalled.fetch_add(1, Relaxed) + 1
    }

    /// Says whether it was not given up before.
    fn give_up(&self) -> bool {
        let mut relay = lock(&self.relay);
        let was_given_up = self.is_given_up.swap(true, Relaxed);
        if let Some(relay) = relay.take() {
            relay.wake();
        }
        !was_given_up
    }

    /// Ready when what it leaves lying cannot be kept any longer.
    pub(super) fn poll_given_up(&self, cx: &Context<'_>) -> Poll<()> {
        let mut relay = lock(&self.relay);
        // Under the lock, as who gives up sets it: the waker is there, or the mark is seen.
        if self.is_given_up.load(Relaxed) {
            return Poll::Ready(());
        }
        match &mut *relay {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}

/// The limit of one connection.
#[derive(Debug)]
pub(super) struct Window {
    loan: Loan,
    /// Of one stream.
    stream: u64,
    /// For streams that are read.
    busy: u64,
    /// How often the peer has said that it would send more, at the last look.
    asked: u64,
    /// How often it had been told of a limit by then.
    told: u64,
    /// It has said so, and was told of no other limit since.
    is_wanted: bool,
    readers: Vec<Weak<Reader>>,
}

impl Window {
    /// With the limit that the connection begins with: a stream's.
    pub(super) fn new(loan: Loan) -> Self {
        let stream = loan.bytes;
        Self {
            loan,
            stream,
            busy: stream,
            asked: 0,
            told: 0,
            is_wanted: false,
            readers: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, reader: &Arc<Reader>) {
        self.readers.push(Arc::downgrade(reader));
    }

    /// Looks after the readers. `asked` is how often the peer has said that it would send more, `told` how often it
    /// was told of a limit. Returns the limit if it has changed, and how many readers were given up.
    pub(super) fn look(&mut self, asked: u64, told: u64) -> (Option<u64>, usize) {
        let mut stalled = Vec::new();
        self.readers.retain(|reader| {
            let Some(reader) = reader.upgrade() else { return false };
            let looks = reader.look();
            // Once is nothing: it may have begun a moment ago.
            if looks > 1 {
                stalled.push((looks, reader));
            }
            true
        });
        let before = self.loan.bytes;
        let is_told = std::mem::replace(&mut self.told, told) != told;
        if std::mem::replace(&mut self.asked, asked) != asked {
            self.is_wanted = true;
            self.busy = (2 * self.busy).clamp(self.stream, BUSY.max(self.stream));
        } else if is_told {
            // At that limit it says it again.
            self.is_wanted = false;
        }
        let mut held = self.stream * u64::try_from(stalled.len()).unwrap_or(u64::MAX);
        // With so many that the room for others is a fixed part of all, that part has to be there too.
        let with_room = if self.is_wanted { (held * ROOM).div_ceil(ROOM - 1) } else { 0 };
        self.loan.grow_to(with_room.max(self.busy + held));
        let has_grown = self.loan.bytes != before;
        let room = self.stream.max(self.loan.bytes / ROOM);
        let has_room = |held: u64| held + room <= self.loan.bytes;
        let mut given_up = 0;
        if self.is_wanted && !has_grown {
            stalled.sort_unstable_by_key(|(looks, _)| std::cmp::Reverse(*looks));
            for (looks, reader) in stalled {
                if has_room(held) || looks < PATIENCE {
                    break;
                }
                given_up += usize::from(reader.give_up());
                held -= self.stream;
            }
        }
        // With another limit the peer says it again. Without one it does not: it is remembered until it is told of
        // one. That those who were given up have made room is not enough: of less than an eighth of the limit quinn
        // tells nobody (`add_read_credits()` of quinn-proto), and the peer would wait for ever.
        if has_grown {
            self.is_wanted = false;
        }
        (has_grown.then_some(self.loan.bytes), given_up)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: u64 = 1 << 20;

    fn window(credit: &Credit) -> Window {
        Window::new(credit.lend(STREAM).unwrap())
    }

    fn readers(window: &mut Window, number: usize) -> Vec<Arc<Reader>> {
        let readers: Vec<_> = (0..number).map(|_| Arc::new(Reader::default())).collect();
        readers.iter().for_each(|reader| window.add(reader));
        readers
    }

    fn given_up(readers: &[Arc<Reader>]) -> usize {
        readers.iter().filter(|reader| reader.is_given_up.load(Relaxed)).count()
    }

    #[test]
    fn limit_grows_by_what_stalled_readers_hold_and_not_by_what_others_do() {
        let credit = Credit::new(1 << 30);
        let mut window = window(&credit);
        let readers = readers(&mut window, 10);
        readers[..4].iter().for_each(|reader| reader.read(true));
        window.look(0, 0);
        for _ in 0..3 {
            // Four wait for the peer, three read, three do nothing.
            readers[4..7].iter().for_each(|reader| reader.read(false));
            window.look(0, 0);
        }
        assert_eq!(window.loan.bytes, STREAM + 3 * STREAM);
        assert_eq!(credit.lent(), 4 * STREAM);
        drop(window);
        assert_eq!(credit.lent(), 0);
        assert_eq!(given_up(&readers), 0);
    }

    #[test]
    fn limit_grows_while_the_peer_would_send_more_and_no_further_than_it_can() {
        let credit = Credit::new(1 << 30);
        let mut window = window(&credit);
        for asked in 1..10 {
            window.look(asked, 0);
        }
        assert_eq!(window.loan.bytes, BUSY);
    }

    #[test]
    fn readers_that_stalled_longest_are_given_up_when_the_others_have_no_room() {
        let credit = Credit::new(16 * STREAM);
        let mut window = window(&credit);
        let first = readers(&mut window, 5);
        for _ in 0..2 {
            window.look(0, 0);
        }
        let second = readers(&mut window, 10);
        for _ in 0..PATIENCE {
            window.look(0, 0);
        }
        // Half of the credit is one connection's: eight are held, and more would be if anybody sent.
        assert_eq!(window.loan.bytes, 8 * STREAM);
        assert_eq!((given_up(&first), given_up(&second)), (0, 0), "nobody needs the room");
        let (_, given) = window.look(1, 0);
        assert_eq!(given, 9, "room for two streams that are read");
        assert_eq!((given_up(&first), given_up(&second)), (5, 4));
    }

    /// What one or two of them free is not told to the peer.
    #[test]
    fn peer_that_waits_is_remembered_until_it_is_told_of_room() {
        let credit = Credit::new(32 * STREAM);
        let mut window = window(&credit);
        let mut first = readers(&mut window, 12);
        window.look(1, 0);
        for _ in 0..4 {
            window.look(2, 0);
        }
        assert_eq!(window.loan.bytes, 16 * STREAM);
        let _second = readers(&mut window, 1);
        assert_eq!(window.look(3, 0), (None, 0), "there is room beside twelve");
        let _third = readers(&mut window, 4);
        assert_eq!(window.look(3, 0), (None, 1));
        first.retain(|reader| !reader.is_given_up.load(Relaxed));
        assert_eq!(window.look(3, 0), (None, 4), "sixteen hold what there is, and the peer waits");
        first.retain(|reader| !reader.is_given_up.load(Relaxed));
        assert_eq!(window.look(3, 1), (None, 0), "it knows");
    }

    #[test]
    fn nobody_is_given_up_while_there_is_credit_however_many_stall() {
        let credit = Credit::new(1 << 30);
        let mut window = window(&credit);
        let readers = readers(&mut window, 60);
        for asked in 0..20 {
            window.look(asked, asked);
        }
        assert_eq!(given_up(&readers), 0);
        assert_eq!(window.loan.bytes, 80 * STREAM);
    }

    #[test]
    fn all_connections_together_never_promise_more_than_there_is() {
        let credit = Credit::new(10 * STREAM);
        let mut windows: Vec<_> = (0..6).map(|_| window(&credit)).collect();
        for asked in 1..10 {
            for window in &mut windows {
                window.look(asked, 0);
            }
        }
        assert_eq!(credit.lent(), 10 * STREAM);
        assert!(credit.lend(1).is_none());
        windows.clear();
        assert_eq!(credit.lent(), 0);
    }
}
