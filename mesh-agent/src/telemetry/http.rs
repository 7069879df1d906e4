//! The small HTTP/1.1 server behind metrics, probes and the admin socket.
//!
//! Whoever can reach the port can send anything, so everything is bounded: connections at once, the
//! size and number of headers, and the time from accept to the end of the answer. A connection
//! serves one request; what asks here does so every few seconds, and gets its answer at once: where all
//! places are taken the oldest that has asked nothing makes room, or the oldest. A probe that waited for those who say
//! nothing would fail, and the kubelet start the container anew.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::{AbortHandle, JoinSet, yield_now};
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

/// Several Prometheus replicas, the kubelet and a person at the same time.
const CONNECTIONS: usize = 32;
const HEADER_BYTES: usize = 16 * 1024;
const HEADERS: usize = 64;
const HEADER_TIME: Duration = Duration::from_secs(5);
/// From accept to the end of the answer. Prometheus itself gives up after 10 s by default.
const ANSWER_TIME: Duration = Duration::from_secs(15);
/// Long enough for a file descriptor to come free.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// OpenMetrics 1.0.0, section "Protocol Negotiation".
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What is asked.
#[derive(Debug)]
pub(crate) struct Question<'a> {
    pub(crate) method: &'a Method,
    pub(crate) path: &'a str,
    pub(crate) query: &'a str,
}

/// What is answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) content_type: &'static str,
    pub(crate) body: Bytes,
}

impl Answer {
    /// Plain text, for people and probes.
    pub(crate) fn text(status: StatusCode, body: impl Into<Bytes>) -> Self {
        Self { status, content_type: "text/plain; charset=utf-8", body: body.into() }
    }
}

/// Something that connections come from.
pub(crate) trait Listen: Send + Sync {
    type Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    fn next(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Listen for TcpListener {
    type Stream = TcpStream;

    async fn next(&self) -> io::Result<TcpStream> {
        self.accept().await.map(|(stream, _peer)| stream)
    }
}

impl Listen for UnixListener {
    type Stream = UnixStream;

    async fn next(&self) -> io::Result<UnixStream> {
        self.accept().await.map(|(stream, _peer)| stream)
    }
}

/// A connection, in the order of their coming.
struct Open {
    task: AbortHandle,
    has_asked: Arc<AtomicBool>,
}

/// Answers until dropped. `answer` runs on this thread and must not block.
pub(crate) async fn serve<L, F>(listener: L, answer: F) -> Infallible
where
    L: Listen,
    F: Fn(&Question<'_>) -> Answer + Send + Sync + 'static,
{
    let answer = Arc::new(answer);
    let mut connections = JoinSet::new();
    let mut open: VecDeque<Open> = VecDeque::new();
    loop {
        let stream = match listener.next().await {
            Ok(stream) => stream,
            Err(error) => {
                warn!(%error, "accept failed");
                sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        if open.len() >= CONNECTIONS {
            // Many may have been waiting to be accepted: whoever has asked already is answered first.
            yield_now().await;
        }
        while connections.try_join_next().is_some() {}
        open.retain(|one| !one.task.is_finished());
        if open.len() >= CONNECTIONS {
            let silent = open.iter().position(|one| !one.has_asked.load(Ordering::Relaxed));
            if let Some(one) = open.remove(silent.unwrap_or(0)) {
                one.task.abort();
            }
        }
        let (answer, has_asked) = (Arc::clone(&answer), Arc::new(AtomicBool::new(false)));
        let asked = Arc::clone(&has_asked);
        let answer = move |question: &Question<'_>| {
            asked.store(true, Ordering::Relaxed);
            answer(question)
        };
        let task = connections.spawn(async move { serve_one(stream, &answer).await });
        open.push_back(Open { task, has_asked });
    }
}

pub(crate) async fn serve_one<S>(stream: S, answer: &(impl Fn(&Question<'_>) -> Answer + Sync))
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let service = service_fn(|request: Request<Incoming>| {
        let question = Question {
            method: request.method(),
            path: request.uri().path(),
            query: request.uri().query().unwrap_or_default(),
        };
        let answer = answer(&question);
        let mut response = Response::new(Full::new(answer.body));
        *response.status_mut() = answer.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(answer.content_type));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        async { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_headers(HEADERS)
        .max_buf_size(HEADER_BYTES)
        .keep_alive(false)
        // Who sends FIN right behind the request waits for the answer.
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(ANSWER_TIME, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "http connection ended"),
        Err(_elapsed) => debug!("http connection took too long"),
    }
}

fn not_found() -> Answer {
    Answer::text(StatusCode::NOT_FOUND, "not found\n")
}

/// Whether `question` is a read, and otherwise what to answer.
pub(crate) fn must_be_read(question: &Question<'_>) -> Result<(), Answer> {
    match *question.method {
        Method::GET | Method::HEAD => Ok(()),
        _ => Err(Answer::text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n")),
    }
}

/// Whether the agent is ready, or why not.
pub type Readiness = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// `/metrics` and `/stats/prometheus` (Istio's path), until dropped.
/// `exposition` is asked at each scrape.
pub async fn serve_metrics(
    listener: TcpListener,
    exposition: impl Fn() -> String + Send + Sync + 'static,
) -> Infallible {
    let kept = Kept::default();
    serve(listener, move |question| metrics(question, || kept.or_made_by(&exposition))).await
}

/// The last exposition. Whoever reaches the port may ask as often as they like, on a thread that others need: the
/// more it costs the longer it is answered from, all askers the same copy.
#[derive(Debug, Default)]
struct Kept(Mutex<Option<(Bytes, Instant)>>);

impl Kept {
    /// The kept one while it is new enough: as long as it took to make, up to ten times that (a tenth of the
    /// thread) from 50 ms on.
    fn or_made_by(&self, make: impl Fn() -> String) -> Bytes {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let began = Instant::now();
        if let Some((body, until)) = &*kept
            && began < *until
        {
            return body.clone();
        }
        let body = Bytes::from(make());
        let took = began.elapsed();
        let times = u32::try_from(took.as_millis() / 5).unwrap_or(u32::MAX).clamp(1, 10);
        *kept = Some((body.clone(), began + took * (times + 1)));
        body
    }
}

fn metrics(question: &Question<'_>, exposition: impl Fn() -> Bytes) -> Answer {
    if let Err(refused) = must_be_read(question) {
        return refused;
    }
    match question.path {
        "/metrics" | "/stats/prometheus" => {
            Answer { status: StatusCode::OK, content_type: OPEN_METRICS, body: exposition() }
        }
        _ => not_found(),
    }
}

/// `/healthz/ready` and `/healthz/live`, until dropped. Not ready is 503 with the reason.
pub async fn serve_probes(listener: TcpListener, readiness: Readiness) -> Infallible {
    serve(listener, move |question| probe(question, &readiness)).await
}

fn probe(question: &Question<'_>, readiness: &Readiness) -> Answer {
    if let Err(refused) = must_be_read(question) {
        return refused;
    }
    match question.path {
        "/healthz/live" => Answer::text(StatusCode::OK, "live\n"),
        "/healthz/ready" => match readiness() {
            Ok(()) => Answer::text(StatusCode::OK, "ready\n"),
            Err(reason) => {
                Answer::text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n"))
            }
        },
        _ => not_found(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::super::{AccessLogFormat, Options, Telemetry};
    use super::*;

    async fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let addr = listener.local_addr().unwrap();
        (listener, addr)
    }

    /// The whole answer to `request`, as it comes over the wire.
    async fn exchange(addr: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        // A server that refuses may reset what was not read.
        stream.read_to_string(&mut answer).await.ok();
        answer
    }

    async fn get(addr: SocketAddr, path: &str) -> String {
        exchange(addr, &format!("GET {path} HTTP/1.1\r\nHost: agent\r\n\r\n")).await
    }

    #[tokio::test]
    async fn metrics_are_served_under_both_paths() {
        let options = Options { access_log: AccessLogFormat::Off, ..Options::default() };
        let telemetry = Telemetry::new(&options).unwrap();
        let (listener, addr) = listener().await;
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_metrics(listener, move || telemetry.exposition()));

        for path in ["/metrics", "/stats/prometheus", "/metrics?name=x"] {
            let answer = get(addr, path).await;
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{path}: {answer}");
            assert!(answer.contains(&format!("content-type: {OPEN_METRICS}\r\n")), "{answer}");
            assert!(answer.ends_with("# EOF\n"), "{answer}");
        }
        assert!(get(addr, "/").await.starts_with("HTTP/1.1 404 "));
        let post = "POST /metrics HTTP/1.1\r\nHost: agent\r\nContent-Length: 0\r\n\r\n";
        assert!(exchange(addr, post).await.starts_with("HTTP/1.1 405 "));
    }

    #[tokio::test]
    async fn readiness_is_asked_each_time_and_tells_why_not() {
        let is_ready = Arc::new(AtomicBool::new(false));
        let readiness: Readiness = {
            let is_ready = Arc::clone(&is_ready);
            Arc::new(move || match is_ready.load(Ordering::Relaxed) {
                true => Ok(()),
                false => Err("no snapshot yet".into()),
            })
        };
        let (listener, addr) = listener().await;
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_probes(listener, readiness));

        let answer = get(addr, "/healthz/ready").await;
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        assert!(answer.ends_with("not ready: no snapshot yet\n"), "{answer}");
        assert!(get(addr, "/healthz/live").await.starts_with("HTTP/1.1 200 "));
        is_ready.store(true, Ordering::Relaxed);
        assert!(get(addr, "/healthz/ready").await.starts_with("HTTP/1.1 200 "));
    }

    #[tokio::test]
    async fn who_ends_its_direction_behind_the_request_gets_the_answer() {
        let (mut client, server) = tokio::io::duplex(1 << 16);
        client.write_all(b"GET /healthz/live HTTP/1.0\r\n\r\n").await.unwrap();
        client.shutdown().await.unwrap();
        let readiness: Readiness = Arc::new(|| Ok(()));
        serve_one(server, &|question: &Question<'_>| probe(question, &readiness)).await;
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.0 200 "), "{answer}");
    }

    #[tokio::test]
    async fn too_many_and_too_large_headers_are_refused() {
        let (listener, addr) = listener().await;
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_probes(listener, Arc::new(|| Ok(()))));

        let many = "a: b\r\n".repeat(HEADERS + 1);
        let large = format!("a: {}\r\n", "b".repeat(2 * HEADER_BYTES));
        for headers in [many, large] {
            let request = format!("GET /healthz/live HTTP/1.1\r\n{headers}\r\n");
            let answer = exchange(addr, &request).await;
            assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
        }
        assert!(get(addr, "/healthz/live").await.starts_with("HTTP/1.1 200 "));
    }

    /// Who probes waits for none of them: time is paused, and jumps where everybody waits.
    #[tokio::test(start_paused = true)]
    async fn silent_clients_keep_nobody_from_an_answer() {
        let (listener, addr) = listener().await;
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_probes(listener, Arc::new(|| Ok(()))));
        let began = tokio::time::Instant::now();
        let mut silent = Vec::new();
        for _ in 0..10 * CONNECTIONS {
            silent.push(TcpStream::connect(addr).await.unwrap());
        }
        let answer = get(addr, "/healthz/live").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(began.elapsed() < HEADER_TIME, "it has waited for one of them to be given up");
        // Not more than so many are kept, the newest.
        let mut ended = 0;
        for mut stream in silent {
            let gone = timeout(Duration::from_millis(1), stream.read_u8()).await;
            ended += usize::from(gone.is_ok());
        }
        assert!(ended >= 9 * CONNECTIONS, "{ended}");
    }

    /// This thread was busy, and all of them are accepted at once.
    #[tokio::test]
    async fn probe_before_a_crowd_of_silent_clients_is_answered() {
        use std::io::{Read as _, Write as _};
        let (listener, addr) = listener().await;
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_probes(listener, Arc::new(|| Ok(()))));
        yield_now().await;
        // Without a wait of this thread's, so that the server does not run meanwhile.
        let mut probe = std::net::TcpStream::connect(addr).unwrap();
        probe.write_all(b"GET /healthz/live HTTP/1.1\r\nHost: agent\r\n\r\n").unwrap();
        let connect = |_| std::net::TcpStream::connect(addr).unwrap();
        let _silent: Vec<_> = (0..3 * CONNECTIONS).map(connect).collect();
        let read = move || {
            let mut answer = String::new();
            probe.read_to_string(&mut answer).map(|_| answer)
        };
        let answer = tokio::task::spawn_blocking(read).await.unwrap().unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
}
