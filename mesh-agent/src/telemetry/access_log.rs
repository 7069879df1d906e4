//! The access log: one record per connection, when it has ended.
//!
//! Text and JSON carry the same keys, named and ordered as ztunnel's, with ours behind them. A
//! record that has no value for a key leaves it out.
//!
//! | key | meaning |
//! |---|---|
//! | `src.*`, `dst.*` | address, pod, namespace and *proven* identity of both ends |
//! | `dst.orig_addr` | what the application dialled, if routing changed it |
//! | `direction` | which agent reports: the client's (`outbound`) or the server's (`inbound`) |
//! | `bytes_sent`, `bytes_recv` | by the application on the reporting side, as in ztunnel |
//! | `duration`, `setup` | accept to end; accept to the moment bytes could flow |
//! | `protocol` | what is spoken, as the service declares it; nobody has looked |
//! | `rtt`, `retransmits` | what the kernel measured, of a direct connection |
//! | `carrier`, `way`, `peer.node` | how it went, and to or from which node |
//! | `response_flags`, `stage`, `reason`, `error` | who is to blame, if it failed |
//! | `connection`, `trace.id` | to find it again here, and on the other node |
//!
//! The worker hands the record over and goes on; a thread of its own formats and writes. When that
//! thread cannot keep up, because nobody reads our standard output or its disk is full, records are
//! dropped and counted. A record is written whole or not at all.

use std::fmt::{self, Write as _};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use tracing::{info, warn};

use super::connection::{Outcome, Party};
use super::open::Ended;
use super::whole_lines::{Dropped, WholeLines};

/// Records that may wait: at 50,000 connections a second, a tenth of a second of a stalled reader.
const QUEUE: usize = 8192;
/// Enough records in one `write` that the system call no longer counts.
const BATCH_BYTES: usize = 64 * 1024;
const FLUSH_LIMIT: Duration = Duration::from_secs(1);
/// Between looks whether there is room to ask.
const FLUSH_PAUSE: Duration = Duration::from_millis(2);

const TIME: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z");

/// How connections are logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum AccessLogFormat {
    /// Not at all.
    Off,
    /// One line of `key=value`.
    #[default]
    Text,
    /// One JSON object on a line.
    Json,
}

/// How many records were dropped.
#[derive(Clone, Debug, Default)]
pub(super) struct Lost(Arc<AtomicU64>);

impl Lost {
    pub(super) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }
}

enum Message {
    Record(Ended),
    Flush(SyncSender<()>),
}

/// The end of the queue that connections write to.
#[derive(Debug)]
pub(super) struct AccessLog {
    queue: Option<SyncSender<Message>>,
    lost: Lost,
}

impl AccessLog {
    /// The thread ends when this is dropped. It is not joined: it may hang in a `write` that nobody
    /// reads, and that must not keep the agent from exiting.
    pub(super) fn start(
        format: AccessLogFormat,
        output: impl io::Write + Send + 'static,
    ) -> io::Result<Self> {
        let lost = Lost::default();
        let write: Write = match format {
            AccessLogFormat::Off => return Ok(Self { queue: None, lost }),
            AccessLogFormat::Text => write_text,
            AccessLogFormat::Json => write_json,
        };
        let (queue, records) = sync_channel(QUEUE);
        let lost_by_writer = lost.clone();
        thread::Builder::new()
            .name("access-log".into())
            .spawn(move || run(&records, write, output, &lost_by_writer))?;
        Ok(Self { queue: Some(queue), lost })
    }

    pub(super) fn lost(&self) -> Lost {
        self.lost.clone()
    }

    /// Never waits.
    pub(super) fn write(&self, ended: Ended) {
        let Some(queue) = &self.queue else {
            return;
        };
        match queue.try_send(Message::Record(ended)) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => self.lost.add(1),
        }
    }

    /// Waits until everything handed over so far is written, for [`FLUSH_LIMIT`] at most.
    pub(super) fn flush(&self) {
        let Some(queue) = &self.queue else {
            return;
        };
        let (done, is_done) = sync_channel(1);
        let (began, mut message) = (Instant::now(), Message::Flush(done));
        // A queue that is full is what there is to wait for.
        while let Err(TrySendError::Full(refused)) = queue.try_send(message) {
            if began.elapsed() >= FLUSH_LIMIT {
                return;
            }
            message = refused;
            thread::sleep(FLUSH_PAUSE);
        }
        // Whether it was written in time or not, the caller is about to exit.
        is_done.recv_timeout(FLUSH_LIMIT.saturating_sub(began.elapsed())).ok();
    }
}

type Write = fn(&mut String, &Ended);

fn run(records: &Receiver<Message>, write: Write, output: impl io::Write, lost: &Lost) {
    let mut batch = String::new();
    let mut output = WholeLines::new(output);
    let mut is_failing = false;
    while let Ok(first) = records.recv() {
        let mut waiting = Vec::new();
        let mut next = Some(first);
        while let Some(message) = next {
            match message {
                Message::Record(ended) => write(&mut batch, &ended),
                Message::Flush(done) => waiting.push(done),
            }
            next = if batch.len() < BATCH_BYTES { records.try_recv().ok() } else { None };
        }
        match output.write(batch.as_bytes()) {
            Ok(()) if is_failing => {
                is_failing = false;
                info!(lost = lost.count(), "access log is written again");
            }
            Ok(()) => {}
            Err(Dropped { lines, error }) => {
                lost.add(lines);
                // Once: a disk that is full stays so for a while.
                if !is_failing {
                    warn!(%error, "access log cannot be written: records are lost, and counted");
                }
                is_failing = true;
            }
        }
        batch.clear();
        for done in waiting {
            // The one who asked may have given up.
            done.send(()).ok();
        }
    }
}

/// A value, and how it is quoted.
enum Value<'a> {
    /// Quoted in both forms.
    Text(&'a str),
    /// Bare in text, a string in JSON: it holds nothing that needs quoting.
    Plain(&'a dyn fmt::Display),
    Number(u64),
}

type Put<'a> = &'a mut dyn FnMut(&'static str, Value<'_>);

/// Calls `put` with each key and value that the record has, in order.
fn fields(ended: &Ended, put: Put<'_>) {
    let connection = &ended.connection;
    let facts = connection.facts();
    if let Some(addr) = &facts.source.addr {
        put("src.addr", Value::Plain(addr));
    }
    names(&facts.source, ["src.workload", "src.namespace", "src.identity"], put);
    if let Some(addr) = &facts.destination.addr {
        put("dst.addr", Value::Plain(addr));
    }
    if let Some(orig_dst) = &facts.orig_dst
        && Some(orig_dst.0) != facts.destination.addr
    {
        put("dst.orig_addr", Value::Plain(orig_dst));
    }
    if let Some(service) = &facts.service {
        put("dst.service", Value::Text(&service.host));
    }
    names(&facts.destination, ["dst.workload", "dst.namespace", "dst.identity"], put);
    put("direction", Value::Text(facts.direction.as_str()));

    let (sent, received) = connection.carried();
    put("bytes_sent", Value::Number(sent));
    put("bytes_recv", Value::Number(received));
    put("duration", Value::Text(&format!("{}ms", ended.duration.as_millis())));
    if let Some(setup) = ended.setup {
        put("setup", Value::Text(&format!("{}us", setup.as_micros())));
    }

    if let Some(protocol) = facts.protocol {
        put("protocol", Value::Text(protocol.as_str()));
    }
    if let Some(carrier) = facts.carrier {
        put("carrier", Value::Text(carrier.as_str()));
    }
    if let Some(way) = facts.way {
        put("way", Value::Text(way.as_str()));
    }
    if let Some(node) = &facts.peer_node {
        put("peer.node", Value::Text(node));
    }
    if let Some(path) = facts.path {
        put("rtt", Value::Text(&format!("{}us", path.rtt.as_micros())));
        put("retransmits", Value::Number(path.retransmits.into()));
    }
    match &ended.outcome {
        Outcome::Complete => put("response_flags", Value::Text("-")),
        Outcome::Failed(failure) => {
            put("response_flags", Value::Text(failure.flags.as_str()));
            // An application's reset is nobody's fault.
            if ended.outcome.is_failure() {
                put("stage", Value::Text(failure.stage.as_str()));
            }
            put("reason", Value::Text(failure.reason));
            put("error", Value::Text(&failure.detail));
        }
    }
    put("connection", Value::Number(connection.id));
    if facts.trace_id != 0 {
        put("trace.id", Value::Text(&format!("{:032x}", facts.trace_id)));
    }
}

fn names(party: &Party, [workload, namespace, identity]: [&'static str; 3], put: Put<'_>) {
    if let Some(value) = &party.workload {
        put(workload, Value::Text(&value.name));
        put(namespace, Value::Text(&value.namespace));
    }
    if let Some(value) = &party.identity {
        put(identity, Value::Text(&value.to_string()));
    }
}

fn time_of(at: SystemTime) -> String {
    OffsetDateTime::from(at).format(TIME).unwrap_or_default()
}

/// `(level, message)`.
fn headline(outcome: &Outcome) -> (&'static str, &'static str) {
    match outcome.is_failure() {
        false => ("info", "connection complete"),
        true => ("error", "connection failed"),
    }
}

fn write_text(out: &mut String, ended: &Ended) {
    let (level, message) = headline(&ended.outcome);
    let time = time_of(ended.at);
    push(out, format_args!("{time} {} access: {message}", level.to_uppercase()));
    fields(ended, &mut |key, value| match value {
        // `Debug` escapes quotes and line ends: an error text cannot forge a record.
        Value::Text(text) => push(out, format_args!(" {key}={text:?}")),
        Value::Plain(value) => push(out, format_args!(" {key}={value}")),
        Value::Number(number) => push(out, format_args!(" {key}={number}")),
    });
    out.push('\n');
}

fn write_json(out: &mut String, ended: &Ended) {
    let (level, message) = headline(&ended.outcome);
    let time = time_of(ended.at);
    push(
        out,
        format_args!(
            r#"{{"level":"{level}","time":"{time}","scope":"access","message":"{message}""#
        ),
    );
    fields(ended, &mut |key, value| match value {
        Value::Text(text) => {
            push(out, format_args!(r#","{key}":{}"#, serde_json::Value::from(text)));
        }
        Value::Plain(value) => push(out, format_args!(r#","{key}":"{value}""#)),
        Value::Number(number) => push(out, format_args!(r#","{key}":{number}"#)),
    });
    out.push_str("}\n");
}

#[expect(clippy::expect_used, reason = "writing to a String does not fail")]
fn push(out: &mut String, text: fmt::Arguments<'_>) {
    out.write_fmt(text).expect("a String");
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use mesh_core::stage::Stage;

    use super::super::connection::{ConnectionFacts, Direction, Failure, Live, ResponseFlags};
    use super::super::fixture::Shop;
    use super::super::open::{Counters, OpenTable};
    use super::*;

    /// 2026-01-02T03:04:05.678901Z.
    const AT: Duration = Duration::from_micros(1_767_323_045_678_901);

    fn ended(facts: ConnectionFacts, outcome: Outcome) -> Ended {
        let live = Arc::new(Live { sent: 67.into(), received: 490.into() });
        let connection = OpenTable::default().open(facts, Counters::Own(live), Instant::now());
        Ended {
            connection,
            outcome,
            at: UNIX_EPOCH + AT,
            duration: Duration::from_micros(13_700),
            setup: Some(Duration::from_micros(412)),
        }
    }

    fn rendered(write: Write, ended: &Ended) -> String {
        let mut out = String::new();
        write(&mut out, ended);
        out
    }

    #[test]
    fn text_has_the_keys_of_ztunnel_in_its_order() {
        let ended = ended(Shop::new().facts(Direction::Outbound), Outcome::Complete);
        let expected = concat!(
            "2026-01-02T03:04:05.678901Z INFO access: connection complete ",
            r#"src.addr=10.0.1.5:40000 src.workload="web-0" src.namespace="shop" "#,
            r#"src.identity="spiffe://cluster.local/ns/shop/sa/web" "#,
            r#"dst.addr=10.0.2.7:8080 dst.orig_addr=10.96.0.7:80 "#,
            r#"dst.service="api.shop.svc.cluster.local" "#,
            r#"dst.workload="api-0" dst.namespace="shop" "#,
            r#"dst.identity="spiffe://cluster.local/ns/shop/sa/api" "#,
            r#"direction="outbound" bytes_sent=67 bytes_recv=490 duration="13ms" setup="412us" "#,
            r#"carrier="lane" way="tunnel" peer.node="node-2" response_flags="-" "#,
            r#"connection=1 trace.id="0000000000000000000000000000feed""#,
            "\n"
        );
        assert_eq!(rendered(write_text, &ended), expected);
    }

    #[test]
    fn json_has_the_same_keys() {
        let ended = ended(Shop::new().facts(Direction::Inbound), Outcome::Complete);
        let expected = concat!(
            r#"{"level":"info","time":"2026-01-02T03:04:05.678901Z","scope":"access","#,
            r#""message":"connection complete","#,
            r#""src.addr":"10.0.1.5:40000","src.workload":"web-0","src.namespace":"shop","#,
            r#""src.identity":"spiffe://cluster.local/ns/shop/sa/web","#,
            r#""dst.addr":"10.0.2.7:8080","dst.orig_addr":"10.96.0.7:80","#,
            r#""dst.service":"api.shop.svc.cluster.local","#,
            r#""dst.workload":"api-0","dst.namespace":"shop","#,
            r#""dst.identity":"spiffe://cluster.local/ns/shop/sa/api","#,
            r#""direction":"inbound","bytes_sent":67,"bytes_recv":490,"#,
            r#""duration":"13ms","setup":"412us","carrier":"lane","way":"tunnel","#,
            r#""peer.node":"node-1","response_flags":"-","connection":1,"#,
            r#""trace.id":"0000000000000000000000000000feed"}"#,
            "\n"
        );
        assert_eq!(rendered(write_json, &ended), expected);
    }

    #[test]
    fn error_text_cannot_forge_a_record() {
        let source = Party::unproven("10.0.1.5:40000".parse().unwrap(), None);
        let detail = "no \"route\"\n2026-01-02T00:00:00Z INFO access: connection complete";
        let failure = Failure::new(Stage::Route, "unknown_destination", detail);
        let facts = ConnectionFacts::new(Direction::Outbound, source);
        let ended = Ended { setup: None, ..ended(facts, Outcome::Failed(failure)) };

        let text = concat!(
            "2026-01-02T03:04:05.678901Z ERROR access: connection failed ",
            r#"src.addr=10.0.1.5:40000 direction="outbound" "#,
            r#"bytes_sent=67 bytes_recv=490 duration="13ms" response_flags="CONNECT" "#,
            r#"stage="route" reason="unknown_destination" error="no \"route\"\n"#,
            r#"2026-01-02T00:00:00Z INFO access: connection complete" connection=1"#,
            "\n"
        );
        assert_eq!(rendered(write_text, &ended), text);
        let json = rendered(write_json, &ended);
        assert_eq!(json.lines().count(), 1);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["error"], detail);
        assert_eq!(json["level"], "error");
    }

    #[test]
    fn reset_of_an_application_is_told_and_is_no_error() {
        let failure = Failure::new(Stage::Telemetry, "application_reset", "reset by the client")
            .with_flags(ResponseFlags::None);
        let ended = ended(Shop::new().facts(Direction::Outbound), Outcome::Failed(failure));
        let text = rendered(write_text, &ended);
        assert!(text.contains(" INFO access: connection complete "), "{text}");
        let told = r#" response_flags="-" reason="application_reset" error="reset by the client" "#;
        assert!(text.contains(told), "{text}");
        let json: serde_json::Value = serde_json::from_str(&rendered(write_json, &ended)).unwrap();
        assert_eq!((&json["level"], &json["stage"]), (&"info".into(), &serde_json::Value::Null));
    }

    /// A reader that never reads: `write` waits for ever.
    struct Stalled(Receiver<()>);

    impl io::Write for Stalled {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.recv().ok();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Takes nothing until it is let.
    struct Held(Receiver<()>, Arc<std::sync::Mutex<usize>>);

    impl io::Write for Held {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.recv().ok();
            *self.1.lock().unwrap() += bytes.iter().filter(|byte| **byte == b'\n').count();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// An agent that ends cuts what is open, and each of these is a record at that moment.
    #[test]
    fn what_was_handed_over_is_written_also_where_the_queue_is_full() {
        let (release, held) = std::sync::mpsc::channel();
        let written = Arc::new(std::sync::Mutex::new(0));
        let log =
            AccessLog::start(AccessLogFormat::Text, Held(held, Arc::clone(&written))).unwrap();
        let shop = Shop::new();
        let all = QUEUE + 2000;
        for _ in 0..all {
            log.write(ended(shop.facts(Direction::Outbound), Outcome::Complete));
        }
        assert!(log.lost().count() > 0, "it is full");
        let lets = thread::spawn(move || {
            thread::sleep(10 * FLUSH_PAUSE);
            drop(release);
        });
        log.flush();
        assert!(*written.lock().unwrap() > 0, "it has not waited");
        lets.join().unwrap();
        let lost = usize::try_from(log.lost().count()).unwrap();
        let began = Instant::now();
        while *written.lock().unwrap() + lost != all {
            assert!(began.elapsed() < Duration::from_secs(20), "not all are written");
            thread::sleep(FLUSH_PAUSE);
        }
    }

    #[test]
    fn stalled_reader_costs_records_and_no_time() {
        let (release, stalled) = std::sync::mpsc::channel();
        let log = AccessLog::start(AccessLogFormat::Text, Stalled(stalled)).unwrap();
        let shop = Shop::new();
        // The writer holds what it has taken out of the queue, at most a batch of records.
        let (queued, held) = (QUEUE as u64, 1000);
        for _ in 0..queued + held + 5 {
            log.write(ended(shop.facts(Direction::Outbound), Outcome::Complete));
        }
        let lost = log.lost().count();
        assert!((5..=held + 5).contains(&lost), "{lost}");
        drop(release);
    }
}
