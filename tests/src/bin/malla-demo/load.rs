//! The load: people who open the shop's page, again and again, each on a connection of its own.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// People at once.
pub(crate) const CLIENTS: usize = 4;
/// Between two pages of one person: the machine must not be saturated, or the percentiles would
/// tell how long its queue is.
const PAUSE: Duration = Duration::from_millis(15);
/// The page gives up on its slowest service after 6 s.
const PATIENCE: Duration = Duration::from_secs(8);

/// What the people saw.
#[derive(Debug, Default)]
pub(crate) struct Load {
    /// Pages that came whole.
    pub(crate) pages: usize,
    /// Pages that did not, or said that a part is missing; with the first reason.
    pub(crate) failed: usize,
    /// Why the first one failed.
    pub(crate) reason: Option<String>,
    /// Pages by the version of `reviews` that they show.
    pub(crate) versions: BTreeMap<&'static str, usize>,
    latencies: Vec<Duration>,
}

impl Load {
    /// The `percent`th percentile of the pages' time in milliseconds, by nearest rank.
    pub(crate) fn percentile_ms(&self, percent: usize) -> f64 {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * percent).div_ceil(100).max(1) - 1;
        sorted.get(rank).map_or(0.0, |took| took.as_secs_f64() * 1e3)
    }

    fn add(&mut self, took: Duration, outcome: Result<&'static str>) {
        match outcome {
            Ok(version) => {
                self.pages += 1;
                self.latencies.push(took);
                *self.versions.entry(version).or_default() += 1;
            }
            Err(error) => {
                self.failed += 1;
                self.reason.get_or_insert_with(|| format!("{error:#}"));
            }
        }
    }

    fn merge(&mut self, other: Self) {
        self.pages += other.pages;
        self.failed += other.failed;
        self.reason = self.reason.take().or(other.reason);
        self.latencies.extend(other.latencies);
        for (version, count) in other.versions {
            *self.versions.entry(version).or_default() += count;
        }
    }
}

/// Opens the page at `shop` for `time`, from the calling thread's network namespace, with `marker`
/// in the URL and in the request id, which the services hand on to each other.
///
/// # Errors
///
/// Fails when threads cannot be started; pages that fail are counted.
pub(crate) fn run(
    shop: SocketAddr,
    marker: &str,
    time: Duration,
    stop: impl Fn() -> bool + Sync,
) -> Result<Load> {
    let start = Instant::now();
    let one = || {
        let mut load = Load::default();
        while start.elapsed() < time && !stop() {
            let before = Instant::now();
            let outcome = page(shop, marker).and_then(|text| version(&text));
            load.add(before.elapsed(), outcome);
            thread::sleep(PAUSE);
        }
        load
    };
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| thread::Builder::new().spawn_scoped(scope, one))
            .collect::<io::Result<_>>()
            .context("start the load")?;
        let mut all = Load::default();
        for client in clients {
            all.merge(client.join().map_err(|_panic| anyhow::anyhow!("a client panicked"))?);
        }
        Ok(all)
    })
}

/// The answer to one request, whole. The client closes first, as browsers and curl do.
pub(crate) fn page(shop: SocketAddr, marker: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&shop, PATIENCE).context("connect")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let request = format!(
        "GET /productpage?marker={marker} HTTP/1.1\r\nHost: productpage:9080\r\n\
         X-Request-Id: {marker}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).context("send")?;
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    while !is_whole(&answer) {
        match stream.read(&mut chunk).context("read")? {
            0 => break,
            length => answer.extend_from_slice(&chunk[..length]),
        }
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Whether an answer has as many bytes as its head announces.
fn is_whole(answer: &[u8]) -> bool {
    const END: &[u8] = b"\r\n\r\n";
    let Some(end) = answer.windows(END.len()).position(|window| window == END) else {
        return false;
    };
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    let length: Option<usize> = length.and_then(|text| text.trim().parse().ok());
    length.is_some_and(|length| answer.len() >= end + END.len() + length)
}

/// Which version of `reviews` a whole page shows.
fn version(page: &str) -> Result<&'static str> {
    let status = page.lines().next().unwrap_or_default();
    anyhow::ensure!(status.starts_with("HTTP/1.1 200 "), "the page answered {status:?}");
    anyhow::ensure!(page.trim_end().ends_with("</html>"), "the page was cut");
    for missing in ["Error fetching product", "currently unavailable"] {
        anyhow::ensure!(!page.contains(missing), "the page said {missing:?}");
    }
    Ok(if page.contains("color:red") {
        "v3"
    } else if page.contains("color:black") {
        "v2"
    } else {
        "v1"
    })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const PAGE: &str = "HTTP/1.1 200 OK\r\n\r\n<html><p style=\"color:red\">*</p></html>\n";

    #[test]
    fn the_colour_of_the_stars_is_the_version() {
        assert_eq!(version(PAGE).unwrap(), "v3");
        assert_eq!(version(&PAGE.replace("red", "black")).unwrap(), "v2");
        assert_eq!(version(&PAGE.replace("red", "")).unwrap(), "v1");
    }

    #[test]
    fn a_page_with_a_part_missing_is_a_failed_one() {
        let sorry = PAGE.replace("<html>", "<html>Error fetching product details!");
        for bad in [PAGE.replace("200", "503"), sorry, PAGE.replace("</html>", "")] {
            assert!(version(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn pages_are_counted_with_their_time_and_failures_with_their_reason() {
        let mut load = Load::default();
        for ms in 1..=100 {
            load.add(Duration::from_millis(ms), Ok("v1"));
        }
        load.add(Duration::from_secs(9), Err(anyhow::anyhow!("why")));
        load.add(Duration::from_secs(9), Err(anyhow::anyhow!("again")));
        assert_eq!((load.pages, load.failed), (100, 2));
        assert_eq!(load.reason.as_deref(), Some("why"));
        assert_eq!(load.percentile_ms(50), 50.0);
        assert_eq!(load.percentile_ms(99), 99.0);
        assert_eq!(Load::default().percentile_ms(50), 0.0);
    }

    #[test]
    fn an_answer_is_whole_when_the_announced_bytes_are_there() {
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc";
        assert!(is_whole(answer));
        assert!((0..answer.len()).all(|end| !is_whole(&answer[..end])));
        assert!(!is_whole(PAGE.as_bytes()), "announces nothing: ends with the connection");
    }

    #[test]
    fn a_page_is_asked_for_with_the_marker_in_url_and_request_id() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let shop = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let length = stream.read(&mut request).unwrap();
            stream.write_all(PAGE.as_bytes()).unwrap();
            String::from_utf8(request[..length].to_vec()).unwrap()
        });
        assert_eq!(page(shop, "m4rk").unwrap(), PAGE);
        let request = server.join().unwrap();
        assert!(request.starts_with("GET /productpage?marker=m4rk HTTP/1.1\r\n"), "{request}");
        assert!(request.contains("X-Request-Id: m4rk\r\n"), "{request}");
    }
}
