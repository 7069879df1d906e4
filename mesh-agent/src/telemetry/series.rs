//! The `istio_tcp_*` families: one series for each pair of workloads that talk.
//!
//! The table is looked into once per connection; after that a connection holds its [`Series`] and
//! only adds to atomics. Its size is bounded, and the series of a deleted workload or service leave
//! it a while later, after a scrape that showed their last value.
//!
//! # The meaning of sent and received
//!
//! Istio documents `istio_tcp_sent_bytes_total` as the bytes sent *during response* and
//! `istio_tcp_received_bytes_total` as the bytes received *during request* (istio/istio#32399).
//! Both are therefore seen from the server, whichever side reports: `received` is what the client
//! sent, `sent` is what the server answered, and the two reporters of one connection agree.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_core::snapshot::{Service, Snapshot, Workload};
use mesh_core::spiffe::SpiffeId;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use super::connection::{ConnectionFacts, Direction, ResponseFlags, SecurityPolicy};
use super::labels::{Encoded, Labels, PartyLabels, Scheme, ServiceLabels};

/// How much longer than a scrape may still come for it the series of a deleted workload wait for one to show their last
/// value. Several times the usual scrape interval of 15 s to 60 s.
const GRACE: Duration = Duration::from_secs(300);

/// After how long without a connection the series of a caller or server that no snapshot knows is as good as gone:
/// nobody tells when it is, and what comes and goes would fill the table in the end.
const FORGOTTEN: Duration = Duration::from_secs(3600);

const FLAGS: usize = ResponseFlags::ALL.len();

/// The counters of one label set.
#[derive(Debug)]
pub(super) struct Series {
    labels: Labels,
    opened: AtomicU64,
    /// By response flags.
    closed: [AtomicU64; FLAGS],
    failed: [AtomicU64; FLAGS],
    /// Client to server.
    request_bytes: AtomicU64,
    /// Server to client.
    response_bytes: AtomicU64,
}

impl Series {
    fn new(labels: Labels) -> Self {
        Self {
            labels,
            opened: AtomicU64::new(0),
            closed: Default::default(),
            failed: Default::default(),
            request_bytes: AtomicU64::new(0),
            response_bytes: AtomicU64::new(0),
        }
    }

    /// Counts the end, and whether there never was a connection.
    pub(super) fn closed(&self, flags: ResponseFlags, has_failed: bool) {
        self.closed[flags as usize].fetch_add(1, Ordering::Relaxed);
        if has_failed {
            self.failed[flags as usize].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Adds what the application on this side sent and received since this was last called.
    pub(super) fn carried(&self, sent: u64, received: u64) {
        let (request, response) = match self.labels.reporter {
            Direction::Outbound => (sent, received),
            Direction::Inbound => (received, sent),
        };
        self.request_bytes.fetch_add(request, Ordering::Relaxed);
        self.response_bytes.fetch_add(response, Ordering::Relaxed);
    }

    fn is_idle(&self) -> bool {
        let closed: u64 = self.closed.iter().map(|count| count.load(Ordering::Relaxed)).sum();
        self.opened.load(Ordering::Relaxed) == closed
    }
}

/// Every series, and the short way to each.
pub(super) struct SeriesTable {
    scheme: Scheme,
    limit: usize,
    /// How long what is gone is shown for certain.
    linger: Duration,
    collapsed: AtomicU64,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    series: HashMap<Labels, Entry>,
    /// From what a connection has at hand to its series, without formatting a label. Emptied with
    /// each snapshot, since the pointers in its keys belong to one.
    routes: HashMap<Route, Arc<Series>>,
}

struct Entry {
    series: Arc<Series>,
    /// Since when its workload or service is no longer in the snapshot.
    gone: Option<Instant>,
    /// Connections that had been opened when this was last looked at, and since when there was none.
    quiet: (u64, Option<Instant>),
}

impl Entry {
    /// Whether there has been no connection for so long that nobody can be expected to come back.
    fn is_forgotten(&mut self, now: Instant) -> bool {
        let opened = self.series.opened.load(Ordering::Relaxed);
        if opened != self.quiet.0 || !self.series.is_idle() {
            self.quiet = (opened, None);
            return false;
        }
        let since = *self.quiet.1.get_or_insert(now);
        now.saturating_duration_since(since) >= FORGOTTEN
    }
}

impl SeriesTable {
    pub(super) fn new(scheme: Scheme, limit: usize, linger: Duration) -> Self {
        Self { scheme, limit, linger, collapsed: AtomicU64::new(0), inner: Mutex::default() }
    }

    /// Counts a connection as opened and returns its series. Past the limit a new label set is
    /// counted as `unknown`.
    pub(super) fn open(&self, facts: &ConnectionFacts) -> Arc<Series> {
        let route = Route::of(facts);
        let mut inner = self.lock();
        let series = match inner.routes.get(&route) {
            Some(series) => Arc::clone(series),
            None => self.resolve(&mut inner, route, facts),
        };
        // Counted under the lock: a series with an open connection is never swept.
        series.opened.fetch_add(1, Ordering::Relaxed);
        series
    }

    fn resolve(&self, inner: &mut Inner, route: Route, facts: &ConnectionFacts) -> Arc<Series> {
        let labels = self.scheme.labels(facts);
        let fits = inner.series.len() < self.limit || inner.series.contains_key(&labels);
        let labels = if fits {
            labels
        } else {
            self.collapsed.fetch_add(1, Ordering::Relaxed);
            Labels::collapsed(facts.direction, facts.security)
        };
        let entry = inner.series.entry(labels).or_insert_with_key(|labels| Entry {
            series: Arc::new(Series::new(labels.clone())),
            gone: None,
            quiet: (0, None),
        });
        let series = Arc::clone(&entry.series);
        // A collapsed route is not kept: a series may come free, and keeping it would let the
        // short way grow past the limit that it is to serve.
        if fits {
            if inner.routes.len() >= self.limit.saturating_mul(4) {
                inner.routes.clear();
            }
            inner.routes.insert(route, Arc::clone(&series));
        }
        series
    }

    /// Marks the series of workloads and services that `snapshot` does not have; and those with somebody unknown that
    /// have not been used for an hour. Where pods of other nodes are read `on_demand`, who is at the other end and not
    /// there counts as unknown. What is marked is shown for a while, and removed by [`Self::sweep`].
    pub(super) fn retain(&self, snapshot: &Snapshot, on_demand: bool, now: Instant) {
        let names: HashSet<_> =
            snapshot.workloads().map(|workload| self.scheme.names(workload)).collect();
        let services: HashSet<_> =
            snapshot.services().map(|service| ServiceLabels::of(service)).collect();
        let mut inner = self.lock();
        inner.routes.clear();
        for (labels, entry) in &mut inner.series {
            let (own, other) = match labels.reporter {
                Direction::Outbound => (&labels.source, &labels.destination),
                Direction::Inbound => (&labels.destination, &labels.source),
            };
            let is_missing = |party: &PartyLabels| !party.known || !names.contains(&party.names);
            let is_forgotten = (is_missing(own) || is_missing(other)) && entry.is_forgotten(now);
            let is_gone = |party: &PartyLabels| party.known && is_missing(party);
            let is_there = !is_forgotten
                && !is_gone(own)
                && (on_demand || !is_gone(other))
                && labels.service.as_ref().is_none_or(|service| services.contains(service));
            entry.gone = match (is_there, entry.series.is_idle()) {
                (true, _) => None,
                (false, true) => entry.gone.or(Some(now)),
                // Its last value is still to come.
                (false, false) => Some(now),
            };
        }
        inner.series.retain(|_, entry| {
            let waited = entry.gone.map(|gone| now.saturating_duration_since(gone));
            waited.is_none_or(|waited| waited < self.linger + GRACE) || !entry.series.is_idle()
        });
    }

    /// Removes what is no longer used and was gone for long enough before the scrape that has just been answered: nobody
    /// knows how many scrape, so one has not shown it to all.
    pub(super) fn sweep(&self, scraped: Instant) {
        let mut inner = self.lock();
        let before = inner.series.len();
        inner.series.retain(|_, entry| {
            let is_idle = entry.series.is_idle();
            if entry.gone.is_some() && !is_idle {
                // Its last value is still to come.
                entry.gone = Some(scraped);
            }
            !is_idle || entry.gone.is_none_or(|gone| gone + self.linger > scraped)
        });
        if inner.series.len() < before {
            inner.routes.clear();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for SeriesTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SeriesTable").field("series", &self.lock().series.len()).finish()
    }
}

impl Collector for SeriesTable {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        // Encoding thousands of series takes milliseconds, and every new connection needs the lock.
        let series: Vec<_> =
            self.lock().series.values().map(|entry| Arc::clone(&entry.series)).collect();

        let mut family = |name, help, read: fn(&Series, ResponseFlags) -> Option<u64>| {
            let mut encoder = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for series in &series {
                for flags in ResponseFlags::ALL {
                    let Some(count) = read(series, flags) else {
                        continue;
                    };
                    let labels = Encoded { scheme: &self.scheme, labels: &series.labels, flags };
                    encoder
                        .encode_family(&labels)?
                        .encode_counter::<NoLabelSet, _, u64>(&count, None)?;
                }
            }
            Ok::<_, fmt::Error>(())
        };
        family(
            "istio_tcp_connections_opened",
            "TCP connections that were opened",
            |series, flags| unflagged(&series.opened, flags),
        )?;
        family(
            "istio_tcp_connections_closed",
            "TCP connections that were closed",
            |series, flags| {
                let closed = &series.closed[flags as usize];
                unflagged(closed, flags).or_else(|| if_any(closed))
            },
        )?;
        family(
            "istio_tcp_connections_failed",
            "TCP connections that could not be established",
            |series, flags| if_any(&series.failed[flags as usize]),
        )?;
        family(
            "istio_tcp_sent_bytes",
            "Bytes sent during response: from server to client, whoever reports",
            |series, flags| unflagged(&series.response_bytes, flags),
        )?;
        family(
            "istio_tcp_received_bytes",
            "Bytes received during request: from client to server, whoever reports",
            |series, flags| unflagged(&series.request_bytes, flags),
        )?;

        encoder
            .encode_descriptor(
                "mesh_metrics_series_collapsed",
                "Connections counted as unknown because the limit of series was reached",
                None,
                MetricType::Counter,
            )?
            .encode_counter::<NoLabelSet, _, u64>(&self.collapsed.load(Ordering::Relaxed), None)
    }
}

/// A counter shown once, under no flag: from the start, so that its first increase is seen.
fn unflagged(counter: &AtomicU64, flags: ResponseFlags) -> Option<u64> {
    (flags == ResponseFlags::None).then(|| counter.load(Ordering::Relaxed))
}

/// A counter shown once it counts: most flags are never seen.
fn if_any(counter: &AtomicU64) -> Option<u64> {
    let count = counter.load(Ordering::Relaxed);
    (count > 0).then_some(count)
}

/// What a connection has at hand that decides its labels.
#[derive(PartialEq, Eq, Hash)]
struct Route {
    direction: Direction,
    security: SecurityPolicy,
    source: Option<ByAddress<Workload>>,
    destination: Option<ByAddress<Workload>>,
    service: Option<ByAddress<Service>>,
    identities: [Option<SpiffeId>; 2],
}

impl Route {
    fn of(facts: &ConnectionFacts) -> Self {
        Self {
            direction: facts.direction,
            security: facts.security,
            source: facts.source.workload.clone().map(ByAddress),
            destination: facts.destination.workload.clone().map(ByAddress),
            service: facts.service.clone().map(ByAddress),
            identities: [facts.source.identity.clone(), facts.destination.identity.clone()],
        }
    }
}

/// Equal if it is the same allocation. Holding the `Arc` keeps the address from being used again.
struct ByAddress<T>(Arc<T>);

impl<T> PartialEq for ByAddress<T> {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl<T> Eq for ByAddress<T> {}

impl<T> Hash for ByAddress<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.0).hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{Shop, snapshot};
    use super::*;

    fn table(limit: usize) -> SeriesTable {
        lingering(limit, Duration::ZERO)
    }

    fn lingering(limit: usize, linger: Duration) -> SeriesTable {
        SeriesTable::new(Scheme::new("Kubernetes".into(), Vec::new()), limit, linger)
    }

    fn count(table: &SeriesTable) -> usize {
        table.lock().series.len()
    }

    #[test]
    fn series_of_a_deleted_workload_go_also_if_nobody_scrapes() {
        let table = table(10);
        let series = table.open(&Shop::new().facts(Direction::Outbound));
        series.closed(ResponseFlags::None, false);
        let nothing = snapshot(Vec::new(), Vec::new());
        let deleted = Instant::now();

        table.retain(&nothing, true, deleted);
        table.retain(&nothing, true, deleted + GRACE / 2);
        assert_eq!(count(&table), 1);
        table.retain(&nothing, true, deleted + GRACE);
        assert_eq!(count(&table), 0);
    }

    #[test]
    fn series_deleted_during_a_scrape_waits_for_the_next() {
        let table = table(10);
        table.open(&Shop::new().facts(Direction::Outbound)).closed(ResponseFlags::None, false);
        let scraped = Instant::now();
        let deleted = scraped + Duration::from_millis(1);

        table.retain(&snapshot(Vec::new(), Vec::new()), true, deleted);
        table.sweep(scraped);
        assert_eq!(count(&table), 1);
        table.sweep(deleted);
        assert_eq!(count(&table), 0);
    }

    #[test]
    fn one_scrape_takes_the_last_value_from_no_other() {
        let linger = Duration::from_secs(120);
        let table = lingering(10, linger);
        table.open(&Shop::new().facts(Direction::Outbound)).closed(ResponseFlags::None, false);
        let deleted = Instant::now();
        let nothing = snapshot(Vec::new(), Vec::new());
        table.retain(&nothing, true, deleted);
        for seconds in [0, 1, 60, 119] {
            table.sweep(deleted + Duration::from_secs(seconds));
            table.retain(&nothing, true, deleted + Duration::from_secs(seconds));
            assert_eq!(count(&table), 1, "after {seconds} s");
        }
        table.retain(&nothing, true, deleted + linger + GRACE / 2);
        assert_eq!(count(&table), 1, "nobody has scraped since");
        table.sweep(deleted + linger);
        assert_eq!(count(&table), 0);
    }

    #[test]
    fn series_of_an_unknown_caller_go_when_it_has_not_come_for_an_hour() {
        let table = table(10);
        let mut facts = Shop::new().facts(Direction::Inbound);
        facts.source.workload = None;
        let (there, began) = (Shop::new().snapshot(), Instant::now());
        let series = table.open(&facts);
        table.retain(&there, true, began + FORGOTTEN * 2);
        series.closed(ResponseFlags::None, false);
        table.retain(&there, true, began + FORGOTTEN * 2);
        table.retain(&there, true, began + FORGOTTEN * 5 / 2);
        // It comes back in time.
        table.open(&facts).closed(ResponseFlags::None, false);
        for (hours, left) in [(3, 1), (4, 1), (5, 0)] {
            table.retain(&there, true, began + FORGOTTEN * hours);
            table.retain(&there, true, began + FORGOTTEN * hours + GRACE);
            assert_eq!(count(&table), left, "after {hours} h");
        }
    }

    #[test]
    fn series_of_a_workload_that_was_not_read_lately_goes_on_counting() {
        let table = table(10);
        let facts = Shop::new().facts(Direction::Outbound);
        let began = Instant::now();
        table.open(&facts).closed(ResponseFlags::None, false);
        // Of the two only this node's own is there: of the other one nobody has had a connection for a while.
        let shop = Shop::new();
        let alone = snapshot(vec![Arc::clone(&shop.web)], vec![Arc::clone(&shop.service)]);
        for minutes in [0, 11, 22] {
            let now = began + Duration::from_secs(minutes * 60);
            table.retain(&alone, true, now);
            table.sweep(now);
            assert_eq!(count(&table), 1, "after {minutes} min");
        }
        let series = table.open(&facts);
        assert_eq!(series.opened.load(Ordering::Relaxed), 2);
        series.closed(ResponseFlags::None, false);
        for (hours, left) in [(1, 1), (2, 1), (3, 0)] {
            let now = began + FORGOTTEN * hours;
            table.retain(&alone, true, now);
            table.sweep(now);
            assert_eq!(count(&table), left, "after {hours} h");
        }
    }

    #[test]
    fn last_value_of_what_ends_after_its_workload_is_shown() {
        let table = table(10);
        let series = table.open(&Shop::new().facts(Direction::Outbound));
        let (nothing, deleted) = (snapshot(Vec::new(), Vec::new()), Instant::now());
        table.retain(&nothing, true, deleted);
        table.retain(&nothing, true, deleted + GRACE * 2);
        series.closed(ResponseFlags::None, false);
        let closed = deleted + GRACE * 2 + GRACE / 2;
        table.retain(&nothing, true, closed);
        assert_eq!(count(&table), 1, "before a scrape");
        table.sweep(closed);
        assert_eq!(count(&table), 0);
    }

    #[test]
    fn short_way_is_bounded_and_forgotten_with_each_snapshot() {
        let table = table(3);
        // The same pods under new pointers, as a new snapshot has them: one series, many keys.
        for _ in 0..100 {
            table.open(&Shop::new().facts(Direction::Outbound));
        }
        assert_eq!(count(&table), 1);
        assert!(table.lock().routes.len() <= 12);
        table.retain(&Shop::new().snapshot(), true, Instant::now());
        assert_eq!(table.lock().routes.len(), 0);
    }
}
