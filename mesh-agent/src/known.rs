//! Knowing: the snapshot that connections decide from, and the wait for one that says more.
//!
//! # Guarantees
//!
//! - *Nothing is guessed.* What a connection needs to know and nobody has read is read first.
//! - *At once.* It goes on with the first answer after which enough is known, and with what there is where the
//!   rest takes longer than its patience.
//! - *Bounded.* Nobody waits for longer than [`READ_LIMIT`], or asks more than a few times meanwhile.

use std::net::IpAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use mesh_core::snapshot::{Snapshot, WorkloadUid};
use mesh_core::spiffe::SpiffeId;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};

use crate::discovery::Demand;

/// How long a connection waits until somebody has read what it needs to know. An API server that takes
/// longer is down, and what it could not tell is refused.
pub const READ_LIMIT: Duration = Duration::from_secs(3);

/// The same of one that could as well go on with what is known. A read takes milliseconds.
pub const PATIENCE: Duration = Duration::from_millis(250);

/// Who was answered in vain does not ask again before so long after its question, and twice as long each time:
/// of those there may be thousands, and in a large mesh there is another snapshot at any moment.
const AGAIN: Duration = Duration::from_millis(20);

/// How much a snapshot says, to somebody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Says {
    /// Too little to go on.
    TooLittle,
    /// Enough, and more is to be read.
    Enough,
    /// All there is.
    All,
}

/// Pods are not doubted more often than this.
const DOUBT: Duration = Duration::from_millis(50);

/// What is known of the mesh now, and to whom to turn for more.
#[derive(Debug)]
pub struct Known {
    snapshot: ArcSwap<Snapshot>,
    /// Its generation, to wait for.
    generation: watch::Sender<u64>,
    demands: Option<mpsc::Sender<Demand>>,
    /// When a pod was last doubted.
    doubted: Mutex<Option<Instant>>,
}

impl Known {
    /// Begins with `snapshot`. `demands` go to a source that reads pods of other nodes when they are
    /// needed, if it is one that does.
    pub fn new(snapshot: Arc<Snapshot>, demands: Option<mpsc::Sender<Demand>>) -> Self {
        Self {
            generation: watch::Sender::new(snapshot.generation),
            snapshot: ArcSwap::new(snapshot),
            demands,
            doubted: Mutex::default(),
        }
    }

    /// The present snapshot, for a look.
    pub fn load(&self) -> Guard<Arc<Snapshot>> {
        self.snapshot.load()
    }

    /// The present snapshot, to keep.
    pub fn load_full(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// From now on this is known.
    pub fn store(&self, snapshot: Arc<Snapshot>) {
        let generation = snapshot.generation;
        self.snapshot.store(snapshot);
        self.generation.send_replace(generation);
    }

    /// Whether pods of other nodes are read only when somebody needs them.
    pub fn reads_on_demand(&self) -> bool {
        self.demands.is_some()
    }

    /// A peer says that this pod is not there: it is read again. Not waited for: where much is asked already, it is
    /// read when its time has come.
    pub fn doubt(&self, pod: &WorkloadUid) {
        let Some(demands) = &self.demands else { return };
        let now = Instant::now();
        let mut doubted = self.doubted.lock().unwrap_or_else(PoisonError::into_inner);
        // Where much fails, one of a few is enough, and those who wait to know more come first.
        if doubted.is_none_or(|last| now.saturating_duration_since(last) >= DOUBT) {
            *doubted = Some(now);
            demands.try_send(Demand::Doubt { pod: Arc::clone(pod) }).ok();
        }
    }

    /// A snapshot that says all there is of `ip`, from where `caller` has called; if that cannot be had in
    /// time, the present one. Where it says enough it is waited for an answer for `patience` at most, and for
    /// nothing after that.
    ///
    /// Cancel-safe.
    pub async fn knowing(
        &self,
        ip: IpAddr,
        caller: Option<&SpiffeId>,
        patience: Duration,
        says: impl Fn(&Snapshot) -> Says,
    ) -> Arc<Snapshot> {
        let snapshot = self.snapshot.load_full();
        let Some(demands) = self.demands.as_ref().filter(|_| says(&snapshot) != Says::All) else {
            return snapshot;
        };
        let asked = async {
            let mut generation = self.generation.subscribe();
            let mut pause = AGAIN;
            loop {
                let next = Instant::now() + pause;
                pause *= 2;
                let (done, answer) = oneshot::channel();
                demands.send(Demand::Know { ip, caller: caller.cloned(), done }).await.ok()?;
                let answered = answer.await.ok()?;
                let now = *generation.wait_for(|now| *now >= answered).await.ok()?;
                if says(&self.snapshot.load()) > Says::TooLittle {
                    return Some(());
                }
                // It could not be read, or a service has another new endpoint by now: the next state tells, or makes
                // the question a new one.
                let enough = generation.wait_for(|_| says(&self.snapshot.load()) > Says::TooLittle);
                if timeout_at(next, enough).await.is_ok() {
                    return Some(());
                }
                generation.wait_for(|later| *later > now).await.ok()?;
            }
        };
        let mut asked = pin!(asked);
        let patience = patience.min(READ_LIMIT);
        let is_late = timeout(patience, &mut asked).await.is_err();
        if is_late {
            let mut generation = self.generation.subscribe();
            let enough = generation.wait_for(|_| says(&self.snapshot.load()) > Says::TooLittle);
            let either = async {
                tokio::select! {
                    _ = asked => {}
                    _ = enough => {}
                }
            };
            // In vain or not: what is known by then decides.
            timeout(READ_LIMIT - patience, either).await.ok();
        }
        self.snapshot.load_full()
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::snapshot::Parts;

    use super::*;

    const IP: &str = "10.96.0.10";

    /// A snapshot of this generation.
    fn snapshot(generation: u64) -> Arc<Snapshot> {
        let domain = "cluster.local".parse().unwrap();
        Arc::new(Snapshot::new(generation, "a".into(), domain, Parts::default()))
    }

    /// How much is said from each of these generations on.
    fn from(enough: u64, all: u64) -> impl Fn(&Snapshot) -> Says {
        move |snapshot| match snapshot.generation {
            generation if generation >= all => Says::All,
            generation if generation >= enough => Says::Enough,
            _ => Says::TooLittle,
        }
    }

    const NEVER: u64 = u64::MAX;

    struct World {
        known: Known,
        asked: mpsc::Receiver<Demand>,
    }

    fn world() -> World {
        let (demands, asked) = mpsc::channel(8);
        World { known: Known::new(snapshot(1), Some(demands)), asked }
    }

    /// Runs `source` beside the wait, and says what it came to, and after how long.
    async fn wait(
        known: &Known,
        says: impl Fn(&Snapshot) -> Says,
        source: impl Future<Output = ()>,
    ) -> (u64, Duration) {
        let began = Instant::now();
        let waiting = known.knowing(IP.parse().unwrap(), None, PATIENCE, says);
        let both = async {
            source.await;
            std::future::pending::<()>().await;
        };
        tokio::select! {
            found = waiting => (found.generation, began.elapsed()),
            () = both => unreachable!("it is pending"),
        }
    }

    async fn question(asked: &mut mpsc::Receiver<Demand>) -> oneshot::Sender<u64> {
        match asked.recv().await {
            Some(Demand::Know { ip, done, .. }) if ip.to_string() == IP => done,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_knows_asks_nobody_and_waits_for_nothing() {
        let mut world = world();
        let found = wait(&world.known, from(1, 1), async {}).await;
        assert_eq!(found, (1, Duration::ZERO));
        assert!(world.asked.try_recv().is_err());
        let alone = Known::new(snapshot(1), None);
        assert_eq!(wait(&alone, from(NEVER, NEVER), async {}).await, (1, Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn question_is_asked_again_where_the_answer_has_raised_another() {
        let mut world = world();
        let (known, asked) = (&world.known, &mut world.asked);
        let source = async {
            question(asked).await.send(2).unwrap();
            known.store(snapshot(2));
            tokio::time::sleep(PATIENCE / 2).await;
            // The service has another new endpoint.
            known.store(snapshot(3));
            question(asked).await.send(4).unwrap();
            known.store(snapshot(4));
        };
        assert_eq!(wait(known, from(NEVER, 4), source).await, (4, PATIENCE / 2));
    }

    #[tokio::test(start_paused = true)]
    async fn answer_that_comes_before_its_snapshot_waits_for_it() {
        let mut world = world();
        let (known, asked) = (&world.known, &mut world.asked);
        let source = async {
            question(asked).await.send(7).unwrap();
            tokio::time::sleep(PATIENCE / 2).await;
            known.store(snapshot(7));
        };
        assert_eq!(wait(known, from(NEVER, 7), source).await, (7, PATIENCE / 2));
    }

    #[tokio::test(start_paused = true)]
    async fn who_can_go_on_waits_neither_for_what_cannot_be_read_nor_for_long() {
        let mut world = world();
        let (known, asked) = (&world.known, &mut world.asked);
        let refused = async { question(asked).await.send(1).unwrap() };
        assert_eq!(wait(known, from(1, NEVER), refused).await, (1, Duration::ZERO));
        let silent = async { std::mem::forget(question(asked).await) };
        assert_eq!(wait(known, from(1, NEVER), silent).await, (1, PATIENCE));
    }

    #[tokio::test(start_paused = true)]
    async fn who_cannot_go_on_waits_until_it_can_or_its_time_is_over() {
        let mut world = world();
        let (known, asked) = (&world.known, &mut world.asked);
        let other_way = async {
            let _unanswered = question(asked).await;
            tokio::time::sleep(2 * PATIENCE).await;
            known.store(snapshot(2));
            std::future::pending::<()>().await;
        };
        assert_eq!(wait(known, from(2, NEVER), other_way).await, (2, 2 * PATIENCE));
        let silent = async { std::mem::forget(question(asked).await) };
        assert_eq!(wait(known, from(NEVER, NEVER), silent).await, (2, READ_LIMIT));
    }

    /// As while somebody scans addresses: there is news at any moment, and none for this one.
    #[tokio::test(start_paused = true)]
    async fn who_is_answered_in_vain_does_not_ask_with_every_generation() {
        let mut world = world();
        let (known, asked) = (&world.known, &mut world.asked);
        let mut questions = 0;
        let source = async {
            for generation in 2.. {
                known.store(snapshot(generation));
                while let Ok(Demand::Know { done, .. }) = asked.try_recv() {
                    done.send(generation).ok();
                    questions += 1;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let (_generation, waited) = wait(known, from(NEVER, NEVER), source).await;
        assert!(waited >= READ_LIMIT, "{waited:?}");
        assert!((4..10).contains(&questions), "{questions}");
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_answered_in_vain_goes_on_as_soon_as_enough_is_known() {
        let mut world = world();
        let (known, asked) = (&world.known, &mut world.asked);
        let source = async {
            question(asked).await.send(1).unwrap();
            tokio::time::sleep(AGAIN / 2).await;
            known.store(snapshot(2));
        };
        assert_eq!(wait(known, from(2, NEVER), source).await, (2, AGAIN / 2));
    }

    #[tokio::test(start_paused = true)]
    async fn source_that_is_gone_keeps_nobody() {
        let world = world();
        drop(world.asked);
        let found = wait(&world.known, from(NEVER, NEVER), async {}).await;
        assert_eq!(found, (1, Duration::ZERO));
    }
}
