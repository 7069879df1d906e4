//! How the Kubernetes API is reached: from inside a pod, or by a kubeconfig.
//!
//! # Guarantees
//!
//! - A request is made once. Whoever asks knows whether and when to ask again.
//! - A service account's token is read again before it expires, and the cluster's CA when it changes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use thiserror::Error;

/// An API server that cannot be reached for so long is down: there may be another behind the address.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Why there is no way to the API.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The process runs in no pod, or in one that has no service account's token.
    #[error("find the Kubernetes API from inside a pod: outside of one, set --kubeconfig")]
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
    Client::try_from(config).map_err(ClientError::Unusable)
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
