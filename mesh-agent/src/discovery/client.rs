//! How the Kubernetes API is reached: from inside a pod, or by a kubeconfig.
//!
//! # Guarantees
//!
//! - A request is made once. Whoever asks knows whether and when to ask again.
//! - A service account's token is read again before it expires, and the cluster's CA when it changes.
//! - When to ask again, if a server that refuses says it, is in the status of the error.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use http::header::{CONTENT_LENGTH, RETRY_AFTER};
use http_body_util::{BodyExt as _, Full};
use kube::client::{ClientBuilder, DynBody};
use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::core::response::{Status, StatusDetails};
use kube::{Client, Config};
use thiserror::Error;
use tower::BoxError;
use tower::util::AndThenLayer;

/// An API server that cannot be reached for so long is down: there may be another behind the address.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Why there is no way to the API.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The process runs in no pod, or in one that has no service account's token.
    #[error(
        "find the Kubernetes API from inside a pod: outside of one, set --kubeconfig, or --manifests to run without a cluster"
    )]
    NotInPod(#[source] InClusterError),
    /// The file is absent, or does not say how to reach a cluster.
    #[error("read {path}: check --kubeconfig")]
    Kubeconfig {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: KubeconfigError,
    },
    /// Certificates or credentials cannot be used.
    #[error("prepare to reach the Kubernetes API")]
    Unusable(#[source] kube::Error),
}

/// The way to the API that `kubeconfig` tells of, or that this pod has. Asks nothing yet.
///
/// # Errors
///
/// See [`ClientError`].
pub async fn client(kubeconfig: Option<&Path>) -> Result<Client, ClientError> {
    let config = match kubeconfig {
        None => Config::incluster().map_err(ClientError::NotInPod)?,
        Some(path) => by_file(path)
            .await
            .map_err(|source| ClientError::Kubeconfig { path: path.into(), source })?,
    };
    by_config(config)
}

pub(super) fn by_config(mut config: Config) -> Result<Client, ClientError> {
    config.connect_timeout = Some(CONNECT_LIMIT);
    config.default_retry = false;
    let builder = ClientBuilder::try_from(config).map_err(ClientError::Unusable)?;
    Ok(builder.with_layer(&AndThenLayer::new(with_retry_after)).build())
}

pub(super) type Answer = Response<Box<DynBody>>;

/// Puts `Retry-After` (RFC 9110 section 10.2.3) where the API has a field for it: of an answer that it
/// reads itself, `kube` shows the body alone, and a server that is overloaded, or shuts down, says it in
/// the header alone, beside a line of plain text.
pub(super) async fn with_retry_after(answer: Answer) -> Result<Answer, BoxError> {
    let Some(seconds) = retry_after(&answer) else { return Ok(answer) };
    let (mut parts, body) = answer.into_parts();
    let text = body.collect().await?.to_bytes();
    let mut status: Status = serde_json::from_slice(&text).unwrap_or_else(|_no_status| {
        let (text, code) = (String::from_utf8_lossy(&text), parts.status);
        let reason = code.canonical_reason().unwrap_or_default();
        Status::failure(text.trim(), reason).with_code(code.as_u16())
    });
    let details = status.details.get_or_insert_with(|| StatusDetails {
        name: String::new(),
        group: String::new(),
        kind: String::new(),
        uid: String::new(),
        causes: Vec::new(),
        retry_after_seconds: 0,
    });
    if details.retry_after_seconds == 0 {
        details.retry_after_seconds = seconds;
    }
    let body = serde_json::to_vec(&status)?;
    parts.headers.remove(CONTENT_LENGTH);
    Ok(Response::from_parts(parts, boxed(body)))
}

/// Of a refusal that says it in seconds: a date is as good as nothing, since clocks differ.
fn retry_after(answer: &Answer) -> Option<u32> {
    let status = answer.status();
    if !status.is_client_error() && !status.is_server_error() {
        return None;
    }
    answer.headers().get(RETRY_AFTER)?.to_str().ok()?.parse().ok()
}

pub(super) fn boxed(body: Vec<u8>) -> Box<DynBody> {
    let never = |never: Infallible| -> BoxError { match never {} };
    Box::new(Full::new(Bytes::from(body)).map_err(never))
}

async fn by_file(path: &Path) -> Result<Config, KubeconfigError> {
    let kubeconfig = Kubeconfig::read_from(path)?;
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await
}

/// A part of a path, or a value of a query (RFC 3986 section 2.1).
pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                escaped.push(char::from(byte));
            }
            byte => {
                escaped.push_str(&format!("%{byte:02X}"));
            }
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::dirwatch::testing::TempDir;

    /// What is read of an answer.
    async fn read(code: u16, retry_after: &str, text: &str) -> (Answer, Vec<u8>) {
        let answer = Response::builder().status(code).header(RETRY_AFTER, retry_after);
        let answer = answer.header(CONTENT_LENGTH, text.len()).body(boxed(text.into())).unwrap();
        let (parts, body) = with_retry_after(answer).await.unwrap().into_parts();
        let text = body.collect().await.unwrap().to_bytes().to_vec();
        (Response::from_parts(parts, boxed(Vec::new())), text)
    }

    #[tokio::test]
    async fn when_to_ask_again_is_in_the_status_wherever_it_was_said() {
        let plain = "Too many requests, please try again later.\n";
        let status = r#"{"kind":"Status","code":429,"message":"storage is (re)initializing"}"#;
        let told = r#"{"kind":"Status","code":500,"details":{"name":"a","retryAfterSeconds":7}}"#;
        for (code, retry_after, text, expected) in [
            (429, "5", plain, (429, "Too many requests, please try again later.", 5)),
            (503, "1", "", (503, "", 1)),
            (429, "1", status, (429, "storage is (re)initializing", 1)),
            (500, "1", told, (500, "", 7)),
        ] {
            let (answer, text) = read(code, retry_after, text).await;
            assert_eq!(answer.status(), code);
            assert_eq!(answer.headers().get(CONTENT_LENGTH), None, "it is another body");
            let said: Status = serde_json::from_slice(&text).unwrap();
            let seconds = said.details.unwrap().retry_after_seconds;
            assert_eq!((said.code, &*said.message, seconds), expected);
        }
    }

    #[tokio::test]
    async fn answer_that_does_not_say_when_to_ask_again_stays_as_it_is() {
        let date = "Fri, 31 Dec 1999 23:59:59 GMT";
        for (code, retry_after) in [(429, date), (429, ""), (429, "-1"), (200, "5"), (301, "5")] {
            let (answer, text) = read(code, retry_after, "as it is").await;
            assert_eq!((answer.status().as_u16(), &*text), (code, &b"as it is"[..]));
            assert!(answer.headers().contains_key(CONTENT_LENGTH));
        }
    }

    #[tokio::test]
    async fn kubeconfig_that_cannot_be_used_is_named() {
        let dir = TempDir::new();
        let path = dir.path().join("config");
        let error = client(Some(&path)).await.err().unwrap();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        fs::write(&path, "apiVersion: v1\nkind: Config\ncurrent-context: nowhere\n").unwrap();
        let error = client(Some(&path)).await.err().unwrap();
        assert!(matches!(error, ClientError::Kubeconfig { .. }), "{error}");
    }

    #[tokio::test]
    async fn kubeconfig_leads_to_its_server() {
        let dir = TempDir::new();
        let path = dir.path().join("config");
        let text = "apiVersion: v1\nkind: Config\ncurrent-context: here\n\
                    clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}]\n\
                    users: [{name: u, user: {}}]\n\
                    contexts: [{name: here, context: {cluster: c, user: u}}]\n";
        fs::write(&path, text).unwrap();
        let client = client(Some(&path)).await.unwrap();
        let error = client.apiserver_version().await.unwrap_err();
        assert!(matches!(error, kube::Error::Service(_)), "{error:?}");
    }
}
