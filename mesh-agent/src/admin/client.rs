//! Asks the admin socket of a running agent.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// A dump of 10,000 workloads has about 5 MB.
const ANSWER_BYTES: usize = 256 * 1024 * 1024;
/// An agent that is alive answers in milliseconds.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// Why the agent did not answer as asked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody answers at the socket.
    #[error("no agent answers at {path}: is it running, and are you allowed to open the socket?")]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection broke, or the answer is not one of ours.
    #[error("the agent's answer could not be read")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The agent refused.
    #[error("the agent refused: {message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// In the agent's words.
        message: String,
    },
    /// It did not answer in time.
    #[error("the agent did not answer within {} s", ANSWER_TIME.as_secs())]
    TimedOut,
}

impl ClientError {
    /// Whether there was no agent to ask: exit code 3.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::TimedOut)
    }

    /// Whether nobody listens: there is no socket, or whoever made it has ended. All else, as that it may
    /// not be opened, proves nothing.
    pub fn is_nobody(&self) -> bool {
        use io::ErrorKind::{ConnectionRefused, NotFound};
        let Self::Unreachable { source, .. } = self else { return false };
        matches!(source.kind(), NotFound | ConnectionRefused)
    }
}

/// Reads `path_and_query`, such as `/workloads`.
///
/// # Errors
///
/// If nobody answers, or the answer is an error.
pub async fn ask(socket: &Path, path_and_query: &str) -> Result<Value, ClientError> {
    timeout(ANSWER_TIME, exchange(socket, Method::GET, path_and_query))
        .await
        .unwrap_or(Err(ClientError::TimedOut))
}

/// Changes something by `path_and_query`, such as `/log?level=debug`.
///
/// # Errors
///
/// If nobody answers, or the agent refuses.
pub async fn ask_to_change(socket: &Path, path_and_query: &str) -> Result<Value, ClientError> {
    timeout(ANSWER_TIME, exchange(socket, Method::POST, path_and_query))
        .await
        .unwrap_or(Err(ClientError::TimedOut))
}

async fn exchange(socket: &Path, method: Method, path: &str) -> Result<Value, ClientError> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|source| ClientError::Unreachable { path: socket.into(), source })?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, "localhost")
        .body(Empty::<Bytes>::new())
        .map_err(broken)?;
    let answered = async {
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES);
        let body = body.collect().await.map_err(ClientError::Broken)?.to_bytes();
        Ok((status, body))
    };
    tokio::pin!(connection);
    tokio::pin!(answered);
    let mut is_open = true;
    let (status, body) = loop {
        tokio::select! {
            biased; // The answer counts, also when the connection ends at the same time.
            answer = &mut answered => break answer?,
            _ended = &mut connection, if is_open => is_open = false,
        }
    };
    parse(status, &body)
}

pub(super) fn parse(status: StatusCode, body: &[u8]) -> Result<Value, ClientError> {
    if status.is_success() {
        return serde_json::from_slice(body).map_err(broken);
    }
    let told = serde_json::from_slice::<Value>(body).ok();
    let told = told.as_ref().and_then(|value| value.get("error")?.as_str());
    let message = told.map_or_else(|| String::from_utf8_lossy(body).trim().into(), str::to_owned);
    Err(ClientError::Refused { status: status.as_u16(), message })
}

fn broken(error: impl std::error::Error + Send + Sync + 'static) -> ClientError {
    ClientError::Broken(Box::new(error))
}
