//! Calls to the other services: where they are, how long they may take, how often to try.

use std::{io, time::Duration};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper::{HeaderMap, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{net::TcpStream, time::timeout};

/// The sample's port, of all four services.
const DEFAULT_PORT: u16 = 9080;
/// No answer of these services comes near it.
const ANSWER_LIMIT_BYTES: usize = 1 << 20;

/// How long a call may take from connecting to the last byte of its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// productpage asking details.
    pub(crate) details: Duration,
    /// productpage asking reviews, each of `reviews_tries`.
    pub(crate) reviews: Duration,
    /// How often productpage asks reviews before it gives up.
    pub(crate) reviews_tries: usize,
    /// productpage asking ratings, which only its API does.
    pub(crate) product_ratings: Duration,
    /// reviews asking ratings for black stars (v2).
    pub(crate) black_stars: Duration,
    /// reviews asking ratings for stars of another colour (v3).
    pub(crate) other_stars: Duration,
}

impl Default for Limits {
    /// The sample's. That 10 s of v2 outlast the two times 3 s of the page is its planted bug, which
    /// its fault-injection task is there to find.
    fn default() -> Self {
        Self {
            details: Duration::from_secs(3),
            reviews: Duration::from_secs(3),
            reviews_tries: 2,
            product_ratings: Duration::from_secs(3),
            black_stars: Duration::from_secs(10),
            other_stars: Duration::from_millis(2500),
        }
    }
}

/// Where one service is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Backend {
    /// Its name, for `/metrics`.
    pub(crate) name: &'static str,
    host: String,
    port: u16,
}

impl Backend {
    /// Reads `<NAME>_HOSTNAME`, `<NAME>_SERVICE_PORT` and `SERVICES_DOMAIN` through `variable`.
    ///
    /// # Errors
    ///
    /// Fails when the port is not one.
    pub(crate) fn from_env(
        name: &'static str,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self> {
        let upper = name.to_uppercase();
        let host = variable(&format!("{upper}_HOSTNAME")).unwrap_or_else(|| name.to_owned());
        let host = match variable("SERVICES_DOMAIN") {
            Some(domain) if !domain.is_empty() => format!("{host}.{domain}"),
            _ => host,
        };
        let key = format!("{upper}_SERVICE_PORT");
        let port = match variable(&key) {
            Some(text) => text.parse().with_context(|| format!("{key}={text}"))?,
            None => DEFAULT_PORT,
        };
        Ok(Self { name, host, port })
    }

    /// The `Host` header of a request to it.
    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// GETs `path` on a connection of its own and reads the answer whole.
    ///
    /// Whatever goes wrong short of an answer (refused, reset, too late, not HTTP) is one case for
    /// the caller, as it is for the sample's services.
    pub(crate) async fn get(&self, path: &str, headers: HeaderMap, limit: Duration) -> Answer {
        match timeout(limit, self.exchange(path, headers)).await {
            Ok(Ok((status, body))) => Answer { status: Some(status), body },
            Ok(Err(_)) | Err(_) => Answer { status: None, body: Bytes::new() },
        }
    }

    async fn exchange(&self, path: &str, headers: HeaderMap) -> Result<(StatusCode, Bytes)> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let mut request = Request::get(path).body(Empty::<Bytes>::new())?;
        *request.headers_mut() = headers;
        request.headers_mut().insert(header::HOST, self.authority().parse()?);

        let answer = async {
            let answer = sender.send_request(request).await?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER_LIMIT_BYTES).collect().await;
            Ok((status, body.map_err(io::Error::other)?.to_bytes()))
        };
        // One future drives both, so that nothing outlives the call: its end closes the connection.
        tokio::pin!(connection);
        tokio::select! {
            biased; // A whole answer counts even when the peer has closed behind it.
            answer = answer => answer,
            ended = async { (&mut connection).await } => {
                ended?;
                anyhow::bail!("closed before the answer")
            }
        }
    }
}

/// What came of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    status: Option<StatusCode>,
    body: Bytes,
}

impl Answer {
    /// The status, 500 when there was no answer at all.
    pub(crate) fn status(&self) -> StatusCode {
        self.status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// The JSON of a good answer.
    pub(crate) fn json(&self) -> Option<Value> {
        self.status
            .filter(|status| *status == StatusCode::OK)
            .and_then(|_| serde_json::from_slice(&self.body).ok())
    }
}

#[cfg(test)]
impl Answer {
    /// The body as text, whatever the status.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Asks up to `tries` times, at least once, until an answer is good; else the last one.
pub(crate) async fn until_good<F>(tries: usize, mut ask: impl FnMut() -> F) -> Answer
where
    F: Future<Output = Answer>,
{
    let mut answer = ask().await;
    for _ in 1..tries {
        if answer.json().is_some() {
            break;
        }
        answer = ask().await;
    }
    answer
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, future::pending};

    use tokio::time::Instant;

    use super::*;

    fn answer(status: u16, body: &'static str) -> Answer {
        Answer {
            status: StatusCode::from_u16(status).ok(),
            body: Bytes::from_static(body.as_bytes()),
        }
    }

    #[test]
    fn the_environment_says_where_a_service_is() {
        let set = |name: &str| match name {
            "RATINGS_HOSTNAME" => Some("10.96.0.4".to_owned()),
            "RATINGS_SERVICE_PORT" => Some("9081".to_owned()),
            _ => None,
        };
        assert_eq!(Backend::from_env("ratings", set).unwrap().authority(), "10.96.0.4:9081");
        assert_eq!(Backend::from_env("details", set).unwrap().authority(), "details:9080");
        let domain = |name: &str| (name == "SERVICES_DOMAIN").then(|| "shop.svc".to_owned());
        let reviews = Backend::from_env("reviews", domain).unwrap();
        assert_eq!(reviews.authority(), "reviews.shop.svc:9080");
    }

    #[test]
    fn an_ipv6_address_is_bracketed_in_the_host_header() {
        let set = |name: &str| (name == "DETAILS_HOSTNAME").then(|| "fd00::1".to_owned());
        assert_eq!(Backend::from_env("details", set).unwrap().authority(), "[fd00::1]:9080");
    }

    #[test]
    fn a_port_that_is_none_is_named() {
        let set = |name: &str| (name == "DETAILS_SERVICE_PORT").then(|| "http".to_owned());
        let error = Backend::from_env("details", set).unwrap_err();
        assert!(error.to_string().contains("DETAILS_SERVICE_PORT=http"), "{error}");
    }

    #[test]
    fn only_ok_with_json_is_good() {
        assert!(answer(200, "{}").json().is_some());
        assert!(answer(200, "<html>").json().is_none());
        assert!(answer(503, "{}").json().is_none());
        assert_eq!(answer(503, "").status(), StatusCode::SERVICE_UNAVAILABLE);
        let none = Answer { status: None, body: Bytes::new() };
        assert_eq!(none.status(), StatusCode::INTERNAL_SERVER_ERROR);
    }

    #[tokio::test]
    async fn a_bad_answer_is_asked_for_again_and_a_good_one_is_not() {
        let asked = Cell::new(0);
        let outcome = until_good(2, || {
            asked.set(asked.get() + 1);
            let now = if asked.get() == 1 { answer(503, "") } else { answer(200, "{}") };
            async { now }
        });
        assert!(outcome.await.json().is_some());
        assert_eq!(asked.get(), 2);

        asked.set(0);
        let outcome = until_good(2, || {
            asked.set(asked.get() + 1);
            async { answer(200, "{}") }
        });
        assert!(outcome.await.json().is_some());
        assert_eq!(asked.get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn reviews_that_hang_cost_the_page_six_seconds() {
        let limits = Limits::default();
        let started = Instant::now();
        let outcome = until_good(limits.reviews_tries, || async {
            timeout(limits.reviews, pending::<()>()).await.unwrap_err();
            Answer { status: None, body: Bytes::new() }
        });
        assert!(outcome.await.json().is_none());
        assert_eq!(started.elapsed().as_secs(), 6);
        assert!(limits.black_stars > started.elapsed());
        assert!(limits.other_stars < limits.reviews);
    }
}
