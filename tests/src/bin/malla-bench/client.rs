//! The clients, each a process of its own in the client's pod: does one kind of work for a while
//! and writes what came of it, as JSON, on its standard output.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::process;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, Builder, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::task::JoinSet;

use crate::server::{ECHO_MANY, ECHO_ONE, NEW, SINK};
use crate::stats::Latencies;
use crate::usage::process_cpu_s;

/// The small exchange: as much there and back.
const SMALL_BYTES: usize = 64;
/// One write of a bulk flow.
const BULK_WRITE_BYTES: usize = 128 * 1024;
/// Exchanges before the first that counts: lets handshakes, caches and windows settle.
const WARM_UP: usize = 200;
/// How long bulk flows run before the small exchange beside them counts.
const BULK_LEAD: Duration = Duration::from_millis(300);
/// A new connection that takes longer counts as failed.
const PATIENCE: Duration = Duration::from_secs(10);
/// After a failed connection: a client that spins on a refusal would measure refusals.
const PAUSE: Duration = Duration::from_millis(1);

/// What a client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Work {
    /// Sends as much as it can over each connection.
    Bulk,
    /// Exchanges 64 B over each connection, one at a time.
    Exchange,
    /// Exchanges 64 B over one connection beside bulk flows over the others.
    Beside,
    /// Each client opens, exchanges 64 B, closes, and again.
    Connect,
    /// Opens the connections, exchanges 64 B once, holds them until standard input ends.
    Hold,
}

/// How a client is told what to do.
#[derive(Debug, Clone, Args)]
pub(crate) struct Order {
    /// What to do.
    pub(crate) work: Work,
    /// The server's pod.
    #[arg(long)]
    pub(crate) server: IpAddr,
    /// Connections, or clients that make them.
    #[arg(long)]
    pub(crate) connections: usize,
    /// For how long.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) seconds: f64,
}

/// What came of it; a measure that does not apply is 0.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Outcome {
    /// Bytes that arrived, by the server's count.
    pub(crate) bytes: u64,
    /// From the first byte to the last.
    pub(crate) bulk_s: f64,
    /// Exchanges, or connections.
    pub(crate) count: u64,
    /// Exchanges, or connections, per second.
    pub(crate) rate: f64,
    /// Median round trip.
    pub(crate) p50_us: f64,
    /// 99th percentile of the round trips.
    pub(crate) p99_us: f64,
    /// Rate of the last quarter of the time by the rate of the first: 1 is no decay.
    pub(crate) decay: f64,
    /// Connections that failed.
    pub(crate) errors: u64,
    /// CPU seconds of the client itself, since it was started.
    pub(crate) cpu_s: f64,
}

impl Outcome {
    /// Throughput of the bulk flows.
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53 bytes")]
    pub(crate) fn gbit_per_s(&self) -> f64 {
        if self.bulk_s > 0.0 { self.bytes as f64 * 8.0 / 1e9 / self.bulk_s } else { 0.0 }
    }

    /// Bytes in GB.
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53 bytes")]
    pub(crate) fn gigabytes(&self) -> f64 {
        self.bytes as f64 / 1e9
    }
}

/// Does the work and writes the [`Outcome`].
///
/// # Errors
///
/// Fails when a connection fails that should not, or when bytes are missing.
pub(crate) fn run(order: &Order) -> Result<()> {
    let time = Duration::from_secs_f64(order.seconds);
    let at = |port| SocketAddr::new(order.server, port);
    match order.work {
        Work::Bulk => tell(bulk(at(SINK), order.connections, time)?),
        Work::Exchange if order.connections == 1 => tell(exchange_one(at(ECHO_ONE), time)?),
        Work::Exchange => tell(exchange_many(at(ECHO_MANY), order.connections, time)?),
        Work::Beside => tell(beside(at(SINK), at(ECHO_ONE), order.connections, time)?),
        Work::Connect => tell(connect(&NEW.map(at), order.connections, time)?),
        Work::Hold => hold(&NEW.map(at), order.connections),
    }
}

fn tell(outcome: Outcome) -> Result<()> {
    // By itself: nobody can look at a process that has ended.
    let outcome = Outcome { cpu_s: process_cpu_s(process::id())?, ..outcome };
    let mut out = io::stdout();
    writeln!(out, "{}", serde_json::to_string(&outcome)?)?;
    out.flush().context("write the outcome")
}

fn open(server: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&server, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn exchange(stream: &mut TcpStream) -> io::Result<()> {
    let mut buffer = [7; SMALL_BYTES];
    stream.write_all(&buffer)?;
    stream.read_exact(&mut buffer)
}

fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>> {
    Builder::new().spawn_scoped(scope, work).context("start a thread")
}

fn join<T>(thread: ScopedJoinHandle<'_, T>) -> Result<T> {
    thread.join().map_err(|_panic| anyhow::anyhow!("a client thread panicked"))
}

/// One bulk flow until `end`: bytes, and when the server had them all.
fn bulk_flow(server: SocketAddr, end: Instant) -> Result<(u64, Instant)> {
    let mut stream = open(server).context("open a bulk flow")?;
    let chunk = vec![7; BULK_WRITE_BYTES];
    let mut sent = 0_u64;
    // At least once, also if it took all the time to open: nothing by nothing is no figure.
    loop {
        stream.write_all(&chunk).context("send in bulk")?;
        sent += chunk.len() as u64;
        if Instant::now() >= end {
            break;
        }
    }
    stream.shutdown(Shutdown::Write)?;
    let mut arrived = [0; 8];
    stream.read_exact(&mut arrived).context("read the server's count")?;
    let arrived = u64::from_be_bytes(arrived);
    ensure!(arrived == sent, "{sent} bytes were sent and {arrived} arrived");
    Ok((sent, Instant::now()))
}

fn bulk(server: SocketAddr, flows: usize, time: Duration) -> Result<Outcome> {
    let start = Instant::now();
    let ended = thread::scope(|scope| {
        let flows: Vec<_> = (0..flows)
            .map(|_| spawn(scope, || bulk_flow(server, start + time)))
            .collect::<Result<_>>()?;
        flows.into_iter().map(|flow| join(flow)?).collect::<Result<Vec<_>>>()
    })?;
    let bytes = ended.iter().map(|(bytes, _)| bytes).sum();
    let last = ended.iter().map(|(_, at)| *at).max().unwrap_or(start);
    Ok(Outcome { bytes, bulk_s: (last - start).as_secs_f64(), ..Outcome::default() })
}

fn exchange_one(server: SocketAddr, time: Duration) -> Result<Outcome> {
    let mut stream = open(server).context("open the connection")?;
    for _ in 0..WARM_UP {
        exchange(&mut stream)?;
    }
    let mut latencies = Latencies::default();
    let start = Instant::now();
    let mut before = start;
    while before - start < time {
        exchange(&mut stream)?;
        let after = Instant::now();
        latencies.add(after - before);
        before = after;
    }
    Ok(exchanged(latencies, before - start))
}

fn exchange_many(server: SocketAddr, connections: usize, time: Duration) -> Result<Outcome> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut open = Vec::with_capacity(connections);
        for _ in 0..connections {
            let mut stream = tokio::net::TcpStream::connect(server).await.context("connect")?;
            stream.set_nodelay(true)?;
            for _ in 0..WARM_UP / connections + 1 {
                exchange_async(&mut stream).await?;
            }
            open.push(stream);
        }
        let start = Instant::now();
        let mut tasks = JoinSet::new();
        for mut stream in open {
            tasks.spawn(async move {
                let mut latencies = Latencies::default();
                let mut before = Instant::now();
                while before - start < time {
                    exchange_async(&mut stream).await?;
                    let after = Instant::now();
                    latencies.add(after - before);
                    before = after;
                }
                Ok::<_, io::Error>(latencies)
            });
        }
        let mut all = Latencies::default();
        while let Some(ended) = tasks.join_next().await {
            all.merge(ended??);
        }
        Ok(exchanged(all, start.elapsed()))
    })
}

async fn exchange_async(stream: &mut tokio::net::TcpStream) -> io::Result<()> {
    let mut buffer = [7; SMALL_BYTES];
    stream.write_all(&buffer).await?;
    stream.read_exact(&mut buffer).await.map(drop)
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53 exchanges")]
fn exchanged(mut latencies: Latencies, took: Duration) -> Outcome {
    let count = latencies.count();
    Outcome {
        count: count as u64,
        rate: count as f64 / took.as_secs_f64(),
        p50_us: latencies.percentile_us(50),
        p99_us: latencies.percentile_us(99),
        ..Outcome::default()
    }
}

fn beside(sink: SocketAddr, echo: SocketAddr, flows: usize, time: Duration) -> Result<Outcome> {
    thread::scope(|scope| {
        let loud = spawn(scope, || bulk(sink, flows, BULK_LEAD + time))?;
        thread::sleep(BULK_LEAD);
        let small = beside_one(echo, time)?;
        let loud = join(loud)??;
        Ok(Outcome { bytes: loud.bytes, bulk_s: loud.bulk_s, ..small })
    })
}

/// Without the warm-up of the others, which would outlast the bulk flows where they are unfair.
fn beside_one(server: SocketAddr, time: Duration) -> Result<Outcome> {
    let start = Instant::now();
    let mut stream = open(server).context("open beside bulk flows")?;
    exchange(&mut stream)?;
    let mut latencies = Latencies::default();
    let mut before = Instant::now();
    // One at least: where that takes all of the time, the median of none would be 0, the best there is.
    loop {
        exchange(&mut stream)?;
        let after = Instant::now();
        latencies.add(after - before);
        before = after;
        if before - start >= time {
            return Ok(exchanged(latencies, before - start));
        }
    }
}

/// New connections to `servers` in turns; quarters of the time are counted apart to see whether the rate
/// decays.
fn connect(servers: &[SocketAddr], clients: usize, time: Duration) -> Result<Outcome> {
    let quarters = [const { AtomicU64::new(0) }; 4];
    let errors = AtomicU64::new(0);
    let next = AtomicUsize::new(0);
    let start = Instant::now();
    let client = || {
        let mut latencies = Latencies::default();
        loop {
            let before = Instant::now();
            let Some(quarter) = quarter_of(before - start, time) else {
                return latencies;
            };
            let server = servers[next.fetch_add(1, Ordering::Relaxed) % servers.len()];
            match open(server).and_then(|mut stream| exchange(&mut stream)) {
                Ok(()) => {
                    latencies.add(before.elapsed());
                    quarters[quarter].fetch_add(1, Ordering::Relaxed);
                }
                Err(_) => {
                    errors.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(PAUSE);
                }
            }
        }
    };
    let all = thread::scope(|scope| {
        let clients: Vec<_> = (0..clients).map(|_| spawn(scope, client)).collect::<Result<_>>()?;
        clients.into_iter().try_fold(Latencies::default(), |mut all, client| {
            all.merge(join(client)?);
            anyhow::Ok(all)
        })
    })?;
    let [first, .., last] = quarters.map(AtomicU64::into_inner);
    Ok(Outcome {
        decay: ratio(last, first),
        errors: errors.into_inner(),
        ..exchanged(all, start.elapsed())
    })
}

/// Which quarter of `time` has come, `None` after it.
fn quarter_of(elapsed: Duration, time: Duration) -> Option<usize> {
    (1..=4).position(|quarter| elapsed < time * quarter / 4)
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53 connections")]
fn ratio(last: u64, first: u64) -> f64 {
    if first == 0 { 0.0 } else { last as f64 / first as f64 }
}

fn hold(servers: &[SocketAddr], connections: usize) -> Result<()> {
    let held = (0..connections)
        .map(|at| {
            let server = servers[at % servers.len()];
            let mut stream = open(server).with_context(|| format!("open connection {at}"))?;
            exchange(&mut stream).with_context(|| format!("use connection {at}"))?;
            Ok(stream)
        })
        .collect::<Result<Vec<_>>>()?;
    tell(Outcome { count: held.len() as u64, ..Outcome::default() })?;
    io::copy(&mut io::stdin(), &mut io::sink()).context("read standard input")?;
    drop(held);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// A server that echoes every connection, `wrong` bytes off.
    fn echo(wrong: bool) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                thread::spawn(move || {
                    let mut buffer = [0; SMALL_BYTES];
                    while stream.read_exact(&mut buffer).is_ok() && !wrong {
                        stream.write_all(&buffer).unwrap();
                    }
                });
            }
        });
        address
    }

    /// A sink that answers with the count of bytes plus `more`.
    fn sink(more: u64) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                thread::spawn(move || {
                    let total = io::copy(&mut stream, &mut io::sink()).unwrap();
                    stream.write_all(&(total + more).to_be_bytes()).unwrap();
                });
            }
        });
        address
    }

    const SHORT: Duration = Duration::from_millis(60);

    #[test]
    fn bulk_counts_what_arrived_over_all_flows() {
        let outcome = bulk(sink(0), 2, SHORT).unwrap();
        assert!(outcome.bytes >= 2 * BULK_WRITE_BYTES as u64, "{outcome:?}");
        assert!(outcome.bulk_s >= SHORT.as_secs_f64(), "{outcome:?}");
        assert!(outcome.gbit_per_s() > 0.0);
    }

    #[test]
    fn bulk_whose_bytes_do_not_all_arrive_is_an_error() {
        let error = bulk(sink(1), 1, SHORT).unwrap_err();
        assert!(error.to_string().contains("arrived"), "{error}");
    }

    #[test]
    fn exchanges_have_percentiles_and_a_rate() {
        for outcome in [
            exchange_one(echo(false), SHORT).unwrap(),
            exchange_many(echo(false), 4, SHORT).unwrap(),
        ] {
            assert!(outcome.count > 0 && outcome.rate > 0.0, "{outcome:?}");
            assert!(0.0 < outcome.p50_us && outcome.p50_us <= outcome.p99_us, "{outcome:?}");
        }
    }

    #[test]
    fn a_small_exchange_is_measured_beside_bulk() {
        let outcome = beside(sink(0), echo(false), 2, SHORT).unwrap();
        assert!(outcome.p50_us > 0.0 && outcome.bytes > 0, "{outcome:?}");
    }

    #[test]
    fn a_small_exchange_that_takes_all_of_the_time_is_measured_too() {
        let outcome = beside_one(echo(false), Duration::ZERO).unwrap();
        assert!(outcome.count == 1 && outcome.p50_us > 0.0, "{outcome:?}");
    }

    #[test]
    fn new_connections_that_fail_are_counted_apart() {
        let outcome = connect(&[echo(false)], 2, SHORT).unwrap();
        assert!(outcome.count > 0 && outcome.errors == 0, "{outcome:?}");
        let outcome = connect(&[echo(true)], 2, SHORT).unwrap();
        assert!(outcome.count == 0 && outcome.errors > 0, "{outcome:?}");
    }

    #[test]
    fn new_connections_go_to_all_ports_in_turns() {
        let outcome = connect(&[echo(false), echo(true)], 1, SHORT).unwrap();
        assert!(outcome.count > 0 && outcome.errors > 0, "{outcome:?}");
        assert!(outcome.count.abs_diff(outcome.errors) <= 1, "{outcome:?}");
    }

    #[test]
    fn time_has_four_quarters() {
        let at = |ms| quarter_of(Duration::from_millis(ms), Duration::from_secs(1));
        assert_eq!(
            [at(0), at(249), at(250), at(999), at(1000)],
            [Some(0), Some(0), Some(1), Some(3), None]
        );
        assert_eq!(ratio(5, 10), 0.5);
        assert_eq!(ratio(5, 0), 0.0);
    }
}
