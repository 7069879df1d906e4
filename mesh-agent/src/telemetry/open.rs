//! The connections that are open now: the guard of each, and the table of all.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use mesh_core::stage::Stage;

use super::Telemetry;
use super::connection::{ConnectionFacts, Direction, Failure, Live, Outcome, ResponseFlags};
use super::series::Series;

/// Locks of the table: more than there are workers on a usual node, so that two seldom meet.
const SHARDS: usize = 16;

/// One connection, shared by its guard, the table and the access log.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) id: u64,
    pub(super) started: Instant,
    pub(super) counters: Counters,
    facts: Mutex<ConnectionFacts>,
    series: OnceLock<Arc<Series>>,
    /// What its series already holds, as [`Self::carried`] has it.
    folded: Live,
}

/// Whose bytes a relay counts.
#[derive(Debug)]
pub(super) enum Counters {
    /// Those of the application on this side.
    Own(Arc<Live>),
    /// Those of the application on the other side: what that one sent, this one received.
    Mirrored(Arc<Live>),
}

impl Default for Counters {
    fn default() -> Self {
        Self::Own(Arc::default())
    }
}

impl Counters {
    fn live(&self) -> &Arc<Live> {
        match self {
            Self::Own(live) | Self::Mirrored(live) => live,
        }
    }
}

impl Connection {
    pub(super) fn facts(&self) -> MutexGuard<'_, ConnectionFacts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves what was carried since the last call into the series. Safe against itself: of two
    /// that run at once each moves a part.
    pub(super) fn fold(&self) {
        let Some(series) = self.series.get() else {
            return;
        };
        let (sent, received) = self.carried();
        let new_since = |folded: &AtomicU64, now: u64| {
            now.saturating_sub(folded.fetch_max(now, Ordering::Relaxed))
        };
        let sent = new_since(&self.folded.sent, sent);
        let received = new_since(&self.folded.received, received);
        series.carried(sent, received);
    }

    /// Bytes that the application on this side has sent and received.
    pub(super) fn carried(&self) -> (u64, u64) {
        let live = self.counters.live();
        let sent = live.sent.load(Ordering::Relaxed);
        let received = live.received.load(Ordering::Relaxed);
        match self.counters {
            Counters::Own(_) => (sent, received),
            Counters::Mirrored(_) => (received, sent),
        }
    }
}

/// A connection as it was when somebody looked.
#[derive(Clone, Debug)]
pub struct OpenConnection {
    /// Unique in this process.
    pub id: u64,
    /// What is known of it.
    pub facts: ConnectionFacts,
    /// Since the agent accepted it.
    pub age: Duration,
    /// Bytes that the application on this side has sent so far.
    pub sent: u64,
    /// Bytes that it has received so far.
    pub received: u64,
}

/// Every open connection, by id.
#[derive(Debug, Default)]
pub(super) struct OpenTable {
    shards: [Mutex<HashMap<u64, Arc<Connection>>>; SHARDS],
    counts: [AtomicU64; Direction::ALL.len()],
    last_id: AtomicU64,
}

impl OpenTable {
    pub(super) fn open(
        &self,
        facts: ConnectionFacts,
        counters: Counters,
        started: Instant,
    ) -> Arc<Connection> {
        self.counts[facts.direction as usize].fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection {
            id: self.last_id.fetch_add(1, Ordering::Relaxed) + 1,
            started,
            counters,
            facts: Mutex::new(facts),
            series: OnceLock::new(),
            folded: Live::default(),
        });
        self.shard(connection.id).insert(connection.id, Arc::clone(&connection));
        connection
    }

    fn close(&self, connection: &Connection, direction: Direction) {
        if self.shard(connection.id).remove(&connection.id).is_some() {
            self.counts[direction as usize].fetch_sub(1, Ordering::Relaxed);
        }
    }

    pub(super) fn count(&self, direction: Direction) -> u64 {
        self.counts[direction as usize].load(Ordering::Relaxed)
    }

    /// All of them, in no order.
    pub(super) fn all(&self) -> Vec<Arc<Connection>> {
        let mut all = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            all.extend(shard.values().cloned());
        }
        all
    }

    fn shard(&self, id: u64) -> MutexGuard<'_, HashMap<u64, Arc<Connection>>> {
        #[expect(clippy::cast_possible_truncation, reason = "the low bits choose the shard")]
        let shard = &self.shards[id as usize % SHARDS];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection that ended: what the access log writes.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) connection: Arc<Connection>,
    pub(super) outcome: Outcome,
    pub(super) at: SystemTime,
    pub(super) duration: Duration,
    /// From accept to the moment bytes could flow; `None` if they never could.
    pub(super) setup: Option<Duration>,
}

/// The guard of an open connection. Its owner tells what happens; dropping it without
/// [`Self::finish`] records an aborted connection, so none is ever missing from the log.
#[derive(Debug)]
#[must_use = "dropping it records the connection as aborted"]
pub struct Tracked {
    telemetry: Telemetry,
    connection: Arc<Connection>,
    direction: Direction,
    lap: Instant,
    setup: Option<Duration>,
    is_finished: bool,
}

impl Tracked {
    pub(super) fn new(
        telemetry: Telemetry,
        facts: ConnectionFacts,
        counters: Counters,
        started: Instant,
    ) -> Self {
        let direction = facts.direction;
        let connection = telemetry.table().open(facts, counters, started);
        let lap = connection.started;
        Self { telemetry, connection, direction, lap, setup: None, is_finished: false }
    }

    /// The connection's number, unique in this process.
    pub fn id(&self) -> u64 {
        self.connection.id
    }

    /// The byte counters for the relay.
    pub fn live(&self) -> &Arc<Live> {
        self.connection.counters.live()
    }

    /// Adds what has become known.
    pub fn update(&self, change: impl FnOnce(&mut ConnectionFacts)) {
        change(&mut self.connection.facts());
    }

    /// `stage` has ended, and took the time since the previous lap or the accept.
    pub fn lap(&mut self, stage: Stage) {
        let now = Instant::now();
        let took = now.saturating_duration_since(self.lap);
        self.lap = now;
        self.telemetry.stages().observe(self.direction, stage, took);
    }

    /// Bytes can flow. Counts the connection as opened, under what is known of it now; what
    /// becomes known later no longer changes its labels.
    pub fn established(&mut self) {
        self.setup.get_or_insert_with(|| self.connection.started.elapsed());
        self.count_opened();
    }

    /// As [`Self::established`], which took `setup`.
    pub(super) fn established_after(&mut self, setup: Duration) {
        self.setup.get_or_insert(setup);
        self.count_opened();
    }

    /// What it has carried so far was counted by somebody else.
    pub(super) fn skip_carried(&self) {
        let (sent, received) = self.connection.carried();
        self.connection.folded.sent.store(sent, Ordering::Relaxed);
        self.connection.folded.received.store(received, Ordering::Relaxed);
    }

    /// It goes on without this agent, and the next one records it.
    pub(super) fn let_go(mut self) {
        self.is_finished = true;
    }

    /// The connection has ended.
    pub fn finish(mut self, outcome: Outcome) {
        let duration = self.connection.started.elapsed();
        self.end(outcome, duration);
    }

    /// As [`Self::finish`], after `duration`.
    pub(super) fn finish_after(mut self, outcome: Outcome, duration: Duration) {
        self.end(outcome, duration);
    }

    fn count_opened(&self) -> &Arc<Series> {
        self.connection
            .series
            .get_or_init(|| self.telemetry.series().open(&self.connection.facts()))
    }

    fn end(&mut self, outcome: Outcome, duration: Duration) {
        self.is_finished = true;
        // One that failed before it was established counts as opened too: what is opened is
        // closed, and the difference of the two families is what is open.
        let series = self.count_opened();
        self.connection.fold();
        match &outcome {
            Outcome::Failed(failure) if outcome.is_failure() => {
                series.closed(failure.flags, self.setup.is_none());
                self.telemetry.refusals().count(self.direction, failure);
            }
            _ => series.closed(ResponseFlags::None, false),
        }
        self.telemetry.table().close(&self.connection, self.direction);
        self.telemetry.log(Ended {
            connection: Arc::clone(&self.connection),
            outcome,
            at: SystemTime::now(),
            duration,
            setup: self.setup,
        });
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        if !self.is_finished {
            let detail = "the agent gave the connection up";
            let duration = self.connection.started.elapsed();
            self.end(Outcome::Failed(Failure::new(Stage::Telemetry, "aborted", detail)), duration);
        }
    }
}
