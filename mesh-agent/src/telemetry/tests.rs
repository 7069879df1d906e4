//! What telemetry promises as a whole: the exposition, and that it is complete, current and bounded.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, UNIX_EPOCH};

use mesh_core::stage::Stage;

use super::fixture::{Shop, Written, snapshot, workload};
use super::{
    AccessLogFormat, ConnectionFacts, Direction, Failure, LabelGroup, Options, Outcome, Party,
    ResponseFlags, SnapshotState, Sources, Telemetry, Tracked, TunnelNumbers,
};

fn quiet() -> Options {
    Options { access_log: AccessLogFormat::Off, ..Options::default() }
}

fn telemetry(options: &Options) -> Telemetry {
    Telemetry::with_output(options, std::io::sink()).unwrap()
}

fn carry(tracked: &Tracked, sent: u64, received: u64) {
    tracked.live().sent.fetch_add(sent, Ordering::Relaxed);
    tracked.live().received.fetch_add(received, Ordering::Relaxed);
}

/// The value of the one series of `family` whose labels contain all of `labels`.
fn value(text: &str, family: &str, labels: &[&str]) -> u64 {
    let mut found = text.lines().filter(|line| {
        line.strip_prefix(family).is_some_and(|rest| rest.starts_with(['{', ' ']))
            && labels.iter().all(|label| line.contains(label))
    });
    let line = found.next().unwrap_or_else(|| panic!("no {family} with {labels:?} in\n{text}"));
    assert_eq!(found.next(), None, "more than one {family} with {labels:?}");
    line.rsplit_once(' ').unwrap().1.parse().unwrap()
}

/// Without `process_*` and the version, which differ from run to run.
fn pinned_part(exposition: &str) -> String {
    let of_process = |line: &&str| !line.contains("process_");
    let lines = exposition.lines().filter(of_process).map(|line| format!("{line}\n"));
    lines.collect::<String>().replace(env!("CARGO_PKG_VERSION"), "VERSION")
}

fn refused() -> Outcome {
    Outcome::Failed(Failure::new(Stage::Authorize, "denied", "policy shop/deny-all"))
}

#[test]
fn exposition_is_pinned() {
    let telemetry = telemetry(&quiet());
    telemetry.set_sources(Sources {
        capture: Box::new(|| vec![("captured", 12), ("orig_dst_full", 0)]),
        not_enrolled: Box::new(|| vec![("netns", 1)]),
        tunnels: Box::new(|| TunnelNumbers {
            tunnels: vec![("lane", "idle", 3), ("quic", "busy", 1)],
            handshakes: vec![("client", "full", 4), ("client", "resumed", 9)],
            refusals: vec![("server", "expired", 2)],
            events: vec![("fallback", 1)],
        }),
        certificates: Box::new(|| {
            let web = Shop::new().web;
            vec![(web.identity.clone(), UNIX_EPOCH + Duration::from_secs(1_800_000_000))]
        }),
        snapshot: Box::new(|| SnapshotState {
            age: Duration::from_millis(1500),
            in_manifests: 2,
            problems: 3,
            policies: 4,
        }),
        look_at_direct: Box::new(|| {}),
        direct_events_lost: Box::new(|| 5),
    });
    let shop = Shop::new();
    let mut open = telemetry.open(shop.facts(Direction::Outbound));
    open.established();
    carry(&open, 70, 490);
    let denied = telemetry.open(shop.facts(Direction::Outbound));
    denied.finish(refused());
    telemetry.0.stages.observe(Direction::Outbound, Stage::Tunnel, Duration::from_micros(100));
    telemetry.0.stages.observe(Direction::Outbound, Stage::Tunnel, Duration::from_secs(7));

    assert_eq!(pinned_part(&telemetry.exposition()), include_str!("exposition.txt"));
}

#[test]
fn process_is_told_of() {
    let text = telemetry(&quiet()).exposition();
    for family in [
        "process_open_fds",
        "process_max_fds",
        "process_resident_memory_bytes",
        "process_virtual_memory_bytes",
        "process_threads",
    ] {
        assert!(value(&text, family, &[]) > 0, "{family}");
    }
    assert!(text.contains("# TYPE process_cpu_seconds counter\nprocess_cpu_seconds_total "));
}

/// Istio: `sent` is what the server answered, `received` is what the client sent (istio#32399).
#[test]
fn both_reporters_agree_on_sent_and_received() {
    for (direction, reporter) in
        [(Direction::Outbound, "source"), (Direction::Inbound, "destination")]
    {
        let telemetry = telemetry(&quiet());
        let mut tracked = telemetry.open(Shop::new().facts(direction));
        tracked.established();
        // A request of 67 bytes and an answer of 490, as the application of this side sees them.
        match direction {
            Direction::Outbound => carry(&tracked, 67, 490),
            Direction::Inbound => carry(&tracked, 490, 67),
        }
        tracked.finish(Outcome::Complete);

        let text = telemetry.exposition();
        let labels = [&*format!(r#"reporter="{reporter}""#)];
        assert_eq!(value(&text, "istio_tcp_received_bytes_total", &labels), 67);
        assert_eq!(value(&text, "istio_tcp_sent_bytes_total", &labels), 490);
    }
}

/// Between two pods of one node there is one relay, on the client's side, and there are two records.
#[test]
fn both_records_of_a_local_connection_agree() {
    let telemetry = telemetry(&quiet());
    let shop = Shop::new();
    let mut outbound = telemetry.open(shop.facts(Direction::Outbound));
    let live = Arc::clone(outbound.live());
    let mut inbound = telemetry.open_sharing(shop.facts(Direction::Inbound), live);
    outbound.established();
    inbound.established();
    carry(&outbound, 67, 490);

    let seen: Vec<_> =
        telemetry.connections().iter().map(|open| (open.sent, open.received)).collect();
    assert_eq!(seen, [(67, 490), (490, 67)], "each as its own pod sees it");
    inbound.finish(Outcome::Complete);
    outbound.finish(Outcome::Complete);
    let text = telemetry.exposition();
    for reporter in [r#"reporter="source""#, r#"reporter="destination""#] {
        assert_eq!(value(&text, "istio_tcp_received_bytes_total", &[reporter]), 67);
        assert_eq!(value(&text, "istio_tcp_sent_bytes_total", &[reporter]), 490);
    }
}

#[test]
fn bytes_are_counted_while_a_connection_is_open_and_once() {
    let telemetry = telemetry(&quiet());
    let mut tracked = telemetry.open(Shop::new().facts(Direction::Outbound));
    tracked.established();
    let sent = || value(&telemetry.exposition(), "istio_tcp_received_bytes_total", &[]);

    carry(&tracked, 100, 0);
    assert_eq!(sent(), 100);
    assert_eq!(sent(), 100);
    carry(&tracked, 50, 0);
    assert_eq!(sent(), 150);
    carry(&tracked, 7, 0);
    tracked.finish(Outcome::Complete);
    assert_eq!(sent(), 157);
}

#[test]
fn connection_is_opened_once_and_closed_once_however_it_ends() {
    let telemetry = telemetry(&quiet());
    let shop = Shop::new();
    let open = || telemetry.open(shop.facts(Direction::Outbound));
    let mut complete = open();
    complete.established();
    complete.established();
    complete.finish(Outcome::Complete);
    let mut broken = open();
    broken.established();
    let failure = Failure::new(Stage::Tunnel, "expired", "").with_flags(ResponseFlags::TlsFailure);
    broken.finish(Outcome::Failed(failure));
    let mut reset = open();
    reset.established();
    let failure = Failure::new(Stage::Telemetry, "application_reset", "");
    reset.finish(Outcome::Failed(failure.with_flags(ResponseFlags::None)));
    open().finish(refused());
    drop(open());

    let text = telemetry.exposition();
    assert_eq!(value(&text, "istio_tcp_connections_opened_total", &[]), 5);
    let closed = |flags: &str| {
        value(&text, "istio_tcp_connections_closed_total", &[&format!(r#"flags="{flags}""#)])
    };
    assert_eq!(
        (closed("-"), closed("TLS_FAILURE"), closed("DENY"), closed("CONNECT")),
        (2, 1, 1, 1)
    );
    let failed = |flags: &str| {
        value(&text, "istio_tcp_connections_failed_total", &[&format!(r#"flags="{flags}""#)])
    };
    assert_eq!((failed("DENY"), failed("CONNECT")), (1, 1));
    let of_failed = |line: &&str| line.starts_with("istio_tcp_connections_failed_total{");
    assert_eq!(text.lines().filter(of_failed).count(), 2, "those that were established count not");
    assert!(!text.contains(r#"reason="application_reset""#), "an application refuses nobody");
    let refusals = |stage: &str, reason: &str| {
        let labels = [&*format!(r#"stage="{stage}""#), &*format!(r#"reason="{reason}""#)];
        value(&text, "mesh_refusals_total", &labels)
    };
    assert_eq!(refusals("tunnel", "expired"), 1);
    assert_eq!(refusals("authorize", "denied"), 1);
    assert_eq!(refusals("telemetry", "aborted"), 1);
    assert_eq!(telemetry.open_count(Direction::Outbound), 0);
    assert!(telemetry.connections().is_empty());
}

#[test]
fn unproven_client_has_no_principal() {
    let telemetry = telemetry(&quiet());
    let shop = Shop::new();
    let source = Party::unproven("10.0.1.5:40000".parse().unwrap(), Some(&shop.web));
    telemetry.open(ConnectionFacts::new(Direction::Inbound, source)).finish(Outcome::Complete);
    let expected = [
        r#"source_workload="web""#,
        r#"source_principal="unknown""#,
        r#"destination_workload="unknown""#,
        r#"connection_security_policy="unknown""#,
    ];
    assert_eq!(value(&telemetry.exposition(), "istio_tcp_connections_opened_total", &expected), 1);
}

#[test]
fn only_what_policy_refused_is_a_denial() {
    for (stage, reason, flags) in [
        (Stage::Authorize, "denied", ResponseFlags::Deny),
        (Stage::Authorize, "plaintext_in_strict", ResponseFlags::Deny),
        (Stage::Authorize, "draining", ResponseFlags::Connect),
        (Stage::Authorize, "overloaded", ResponseFlags::Connect),
        (Stage::Authorize, "unknown_workload", ResponseFlags::Connect),
        (Stage::Deliver, "connection_refused", ResponseFlags::Connect),
    ] {
        assert_eq!(Failure::new(stage, reason, "").flags, flags, "{reason}");
    }
}

#[test]
fn series_of_a_deleted_workload_are_shown_once_more_and_go() {
    let telemetry = telemetry(&quiet());
    let shop = Shop::new();
    telemetry.retain(&shop.snapshot(), false);
    telemetry.open(shop.facts(Direction::Outbound)).finish(Outcome::Complete);

    telemetry.retain(&shop.snapshot(), false);
    telemetry.exposition();
    assert!(telemetry.exposition().contains(r#"destination_workload="api""#));

    telemetry.retain(&snapshot(vec![Arc::clone(&shop.web)], Vec::new()), false);
    assert!(telemetry.exposition().contains(r#"destination_workload="api""#), "last value");
    assert!(!telemetry.exposition().contains(r#"destination_workload="api""#), "gone");
}

#[test]
fn series_of_a_deleted_workload_stays_while_a_connection_is_open() {
    let telemetry = telemetry(&quiet());
    let shop = Shop::new();
    let mut tracked = telemetry.open(shop.facts(Direction::Outbound));
    tracked.established();
    telemetry.retain(&snapshot(Vec::new(), Vec::new()), false);
    telemetry.exposition();
    carry(&tracked, 5, 0);
    assert_eq!(value(&telemetry.exposition(), "istio_tcp_received_bytes_total", &[]), 5);

    tracked.finish(Outcome::Complete);
    telemetry.exposition();
    assert!(!telemetry.exposition().contains(r#"source_workload="web""#));
}

#[test]
fn series_of_a_workload_that_comes_back_stays() {
    let telemetry = telemetry(&quiet());
    let shop = Shop::new();
    telemetry.open(shop.facts(Direction::Outbound)).finish(Outcome::Complete);
    telemetry.retain(&snapshot(Vec::new(), Vec::new()), false);
    telemetry.retain(&Shop::new().snapshot(), false);
    telemetry.exposition();
    assert_eq!(value(&telemetry.exposition(), "istio_tcp_connections_opened_total", &[]), 1);
}

#[test]
fn past_the_limit_connections_count_as_unknown() {
    let telemetry = telemetry(&Options { series_limit: 2, ..quiet() });
    let shop = Shop::new();
    for name in ["a", "b", "c", "d", "a"] {
        let client = workload(name, "node-1", "10.0.1.9");
        let source = Party::proven("10.0.1.9:40000".parse().unwrap(), &client);
        let facts = ConnectionFacts { source, ..shop.facts(Direction::Outbound) };
        telemetry.open(facts).finish(Outcome::Complete);
    }
    let text = telemetry.exposition();
    let opened = |name: &str| {
        let label = format!(r#"source_workload="{name}""#);
        value(&text, "istio_tcp_connections_opened_total", &[&label])
    };
    assert_eq!((opened("a"), opened("b"), opened("unknown")), (2, 1, 2));
    assert!(!text.contains(r#"source_workload="c""#));
    assert_eq!(value(&text, "mesh_metrics_series_collapsed_total", &[]), 2);
}

#[test]
fn dropped_labels_are_absent_and_their_series_merge() {
    let all = [
        LabelGroup::Principal,
        LabelGroup::Workload,
        LabelGroup::App,
        LabelGroup::Service,
        LabelGroup::Cluster,
    ];
    let telemetry = telemetry(&Options { drop_labels: all.into(), ..quiet() });
    let shop = Shop::new();
    let other = workload("other", "node-1", "10.0.1.9");
    for client in [&shop.web, &other] {
        let source = Party::proven("10.0.1.9:40000".parse().unwrap(), client);
        let facts = ConnectionFacts { source, ..shop.facts(Direction::Outbound) };
        telemetry.open(facts).finish(Outcome::Complete);
    }
    let expected = concat!(
        "istio_tcp_connections_opened_total{",
        r#"reporter="source",source_workload_namespace="shop","#,
        r#"destination_workload_namespace="shop",request_protocol="tcp","#,
        r#"response_flags="-",connection_security_policy="mutual_tls"} 2"#,
    );
    assert!(telemetry.exposition().contains(expected), "{}", telemetry.exposition());
    // The series still belongs to its workloads.
    telemetry.retain(&snapshot(vec![other], vec![Arc::clone(&shop.service)]), false);
    telemetry.exposition();
    assert!(telemetry.exposition().contains(expected), "a pod of the namespace is left");
}

#[test]
fn open_connections_are_listed_oldest_first() {
    let telemetry = telemetry(&quiet());
    let shop = Shop::new();
    let first = telemetry.open(shop.facts(Direction::Outbound));
    let second = telemetry.open(shop.facts(Direction::Inbound));
    second.update(|facts| facts.peer_node = Some("node-9".into()));
    carry(&first, 3, 4);

    let open = telemetry.connections();
    assert_eq!(open.iter().map(|open| open.id).collect::<Vec<_>>(), [first.id(), second.id()]);
    assert_eq!((open[0].sent, open[0].received), (3, 4));
    assert_eq!(open[1].facts.peer_node.as_deref(), Some("node-9"));
    first.finish(Outcome::Complete);
    assert_eq!(telemetry.connections().len(), 1);
    second.finish(Outcome::Complete);
}

#[test]
fn record_is_written_for_a_connection_that_was_dropped() {
    let written = Written::default();
    let telemetry = Telemetry::with_output(&Options::default(), written.clone()).unwrap();
    drop(telemetry.open(Shop::new().facts(Direction::Inbound)));
    telemetry.flush();
    let text = written.text();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains(r#" stage="telemetry" reason="aborted" "#), "{text}");
}

#[test]
fn guard_may_be_held_across_a_wait() {
    fn is_send<T: Send>(_: &T) {}
    let telemetry = telemetry(&quiet());
    is_send(&telemetry);
    is_send(&telemetry.open(Shop::new().facts(Direction::Outbound)));
}

#[test]
fn lap_is_the_time_since_the_one_before() {
    let telemetry = telemetry(&quiet());
    let mut tracked = telemetry.open(Shop::new().facts(Direction::Inbound));
    tracked.lap(Stage::Authorize);
    // Not a wait for something: the time that passes is what is measured.
    std::thread::sleep(Duration::from_millis(3));
    tracked.lap(Stage::Deliver);

    let text = telemetry.exposition();
    let fast = |stage: &str, le: &str| {
        let labels =
            [&*format!(r#"stage="{stage}",direction="inbound""#), &*format!(r#"le="{le}""#)];
        value(&text, "mesh_stage_duration_seconds_bucket", &labels)
    };
    assert_eq!(fast("deliver", "0.00128"), 0, "waited for 3 ms");
    assert_eq!(fast("deliver", "+Inf"), 1);
    assert_eq!(fast("authorize", "+Inf"), 1);
    tracked.finish(Outcome::Complete);
}
