//! Telemetry: what happened to each connection, for people and for Prometheus.
//!
//! ```text
//! accept ─► open(facts) ─► lap(stage)… ─► established() ─► relay adds to Live ─► finish(outcome)
//!                                              │                                   │
//!                                         opened_total              closed_total, access log
//! ```
//!
//! # Guarantees
//!
//! - *Complete.* Every connection that was opened here is closed here once, also when its task is
//!   dropped: one record in the access log, one count in `istio_tcp_connections_closed_total`.
//! - *Current.* Byte counters move while a connection is open, not only at its end.
//! - *Bounded.* Series are limited in number and leave with their workload; the access log drops
//!   and counts rather than wait for a slow reader.
//! - *Cheap.* A connection formats no text on the worker's thread once its series exists, and every
//!   lock is held for one look-up.
//!
//! # Not here
//!
//! What a failure means (the stage's own error) and where bytes are counted (`relay`).

mod access_log;
mod authority;
mod connection;
mod direct;
#[cfg(test)]
pub(crate) mod fixture;
pub(crate) mod http;
mod labels;
mod logging;
mod mesh;
mod open;
mod process;
mod series;
mod stages;
#[cfg(test)]
mod tests;
mod whole_lines;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::snapshot::Snapshot;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

pub use self::access_log::AccessLogFormat;
use self::access_log::{AccessLog, Lost};
pub use self::authority::{CaTelemetry, Verdict};
pub use self::connection::{
    Carrier, ConnectionFacts, Direction, Failure, Live, Outcome, Party, Path, ResponseFlags,
    SecurityPolicy, Way,
};
pub use self::direct::{DirectTracked, Neighbours};
pub use self::http::{Readiness, serve_metrics, serve_probes};
pub use self::labels::LabelGroup;
use self::labels::Scheme;
pub use self::logging::{LogFormat, LogLevel, LogLevelError, init_logging, parse_level};
use self::mesh::{MeshState, Refusals};
pub use self::mesh::{SnapshotState, Sources, TunnelNumbers};
use self::open::{Counters, Ended, OpenTable};
pub use self::open::{OpenConnection, Tracked};
use self::process::Process;
use self::series::SeriesTable;
use self::stages::StageDurations;

/// Enough for a node with 100 workloads that each talk to 50 others, reported from both sides.
pub const DEFAULT_SERIES_LIMIT: usize = 10_000;

/// What telemetry is made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// How connections are logged to standard output.
    pub access_log: AccessLogFormat,
    /// The `*_cluster` labels: Istio's name for a single cluster is `Kubernetes`.
    pub cluster: Arc<str>,
    /// Most label sets of the `istio_tcp_*` families; what exceeds them counts as `unknown`.
    pub series_limit: usize,
    /// How long the series of a deleted workload are shown to whoever scrapes.
    pub series_linger: Duration,
    /// Labels to leave out.
    pub drop_labels: Vec<LabelGroup>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            access_log: AccessLogFormat::Text,
            cluster: "Kubernetes".into(),
            series_limit: DEFAULT_SERIES_LIMIT,
            series_linger: Duration::ZERO,
            drop_labels: Vec::new(),
        }
    }
}

/// An error with its causes, `no flow to 10.0.0.1:80: no tunnel to the peer: timed out`.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// The handle that everyone shares; cloning it is one count.
#[derive(Clone)]
pub struct Telemetry(Arc<Inner>);

struct Inner {
    registry: Registry,
    series: Arc<SeriesTable>,
    stages: Arc<StageDurations>,
    table: Arc<OpenTable>,
    refusals: Refusals,
    state: Arc<MeshState>,
    access_log: AccessLog,
}

impl Telemetry {
    /// Registers every family and starts the thread that writes the access log.
    ///
    /// # Errors
    ///
    /// If the thread cannot be started.
    pub fn new(options: &Options) -> io::Result<Self> {
        // Not through the standard library's buffer, which keeps what could not be written.
        let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        Self::with_output(options, output)
    }

    /// As [`Self::new`], with the access log written to `output`.
    ///
    /// # Errors
    ///
    /// If the thread cannot be started.
    pub fn with_output(
        options: &Options,
        output: impl io::Write + Send + 'static,
    ) -> io::Result<Self> {
        let access_log = AccessLog::start(options.access_log, output)?;
        let scheme = Scheme::new(Arc::clone(&options.cluster), options.drop_labels.clone());
        let series =
            Arc::new(SeriesTable::new(scheme, options.series_limit, options.series_linger));
        let stages = Arc::<StageDurations>::default();
        let table = Arc::<OpenTable>::default();
        let state = Arc::<MeshState>::default();

        let mut registry = Registry::default();
        registry.register_collector(Box::new(Arc::clone(&series)));
        registry.register_collector(Box::new(Build));
        registry.register_collector(Box::new(Arc::clone(&stages)));
        let refusals = Refusals::register(&mut registry);
        registry.register_collector(Box::new(Arc::clone(&state)));
        registry.register_collector(Box::new(Own {
            table: Arc::clone(&table),
            lost: access_log.lost(),
        }));
        registry.register_collector(Box::new(Process));
        Ok(Self(Arc::new(Inner { registry, series, stages, table, refusals, state, access_log })))
    }

    /// Where state is asked for at each scrape. Only the first call has an effect.
    pub fn set_sources(&self, sources: Sources) {
        let is_first = self.0.state.sources.set(sources).is_ok();
        debug_assert!(is_first, "sources are set once");
    }

    /// A connection was accepted.
    pub fn open(&self, facts: ConnectionFacts) -> Tracked {
        Tracked::new(self.clone(), facts, Counters::default(), Instant::now())
    }

    /// As [`Self::open`], for the second record of a connection between two pods of this node: one
    /// relay counts for both, and `live` is seen from the application on the *other* side.
    pub fn open_sharing(&self, facts: ConnectionFacts, live: Arc<Live>) -> Tracked {
        Tracked::new(self.clone(), facts, Counters::Mirrored(live), Instant::now())
    }

    /// A new snapshot is in use: series of what it no longer has are shown for a while and then go. `on_demand` if it has
    /// pods of other nodes only for as long as somebody talks to them.
    pub fn retain(&self, snapshot: &Snapshot, on_demand: bool) {
        self.0.series.retain(snapshot, on_demand, Instant::now());
    }

    /// The connections that are open now, oldest first.
    pub fn connections(&self) -> Vec<OpenConnection> {
        self.0.state.look_at_direct();
        let mut open = self.0.table.all();
        open.sort_unstable_by_key(|connection| connection.id);
        let look = |connection: &Arc<open::Connection>| {
            let (sent, received) = connection.carried();
            let facts = connection.facts().clone();
            OpenConnection {
                id: connection.id,
                facts,
                age: connection.started.elapsed(),
                sent,
                received,
            }
        };
        open.iter().map(look).collect()
    }

    /// How many connections are open now.
    pub fn open_count(&self, direction: Direction) -> u64 {
        self.0.table.count(direction)
    }

    /// Everything, in OpenMetrics text: one scrape.
    pub fn exposition(&self) -> String {
        let scraped = Instant::now();
        self.0.state.look_at_direct();
        for connection in self.0.table.all() {
            connection.fold();
        }
        let mut text = String::new();
        #[expect(clippy::expect_used, reason = "writing to a String does not fail")]
        prometheus_client::encoding::text::encode(&mut text, &self.0.registry).expect("a String");
        self.0.series.sweep(scraped);
        text
    }

    /// Waits until the access log has written what was handed to it, a second at most.
    pub fn flush(&self) {
        self.0.access_log.flush();
    }

    fn series(&self) -> &SeriesTable {
        &self.0.series
    }

    fn stages(&self) -> &StageDurations {
        &self.0.stages
    }

    fn refusals(&self) -> &Refusals {
        &self.0.refusals
    }

    fn table(&self) -> &OpenTable {
        &self.0.table
    }

    fn log(&self, ended: Ended) {
        self.0.access_log.write(ended);
    }
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Telemetry").field("series", &self.0.series).finish_non_exhaustive()
    }
}

/// `istio_build`: by which Istio's dashboards know what runs.
#[derive(Debug)]
struct Build;

impl Collector for Build {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        encoder
            .encode_descriptor("istio_build", "Component and version", None, MetricType::Gauge)?
            .encode_family(&[("component", "malla"), ("tag", env!("CARGO_PKG_VERSION"))])?
            .encode_gauge(&1i64)
    }
}

/// What telemetry says about itself.
#[derive(Debug)]
struct Own {
    table: Arc<OpenTable>,
    lost: Lost,
}

impl Collector for Own {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut open = encoder.encode_descriptor(
            "mesh_connections_open",
            "Connections that are open now",
            None,
            MetricType::Gauge,
        )?;
        for direction in Direction::ALL {
            let count = i64::try_from(self.table.count(direction)).unwrap_or(i64::MAX);
            open.encode_family(&[("direction", direction.as_str())])?.encode_gauge(&count)?;
        }
        encoder
            .encode_descriptor(
                "mesh_access_log_lost",
                "Access-log records dropped because the reader was too slow",
                None,
                MetricType::Counter,
            )?
            .encode_counter::<NoLabelSet, _, u64>(&self.lost.count(), None)
    }
}
