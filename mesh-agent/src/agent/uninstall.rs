//! What an agent does differently when it ends for good: the DaemonSet that it belongs to is gone.
//!
//! An agent that ends leaves its programs in the kernel, so that pods are refused until the next one is
//! there, and never talk in plain text meanwhile. After an uninstallation there is no next one. That is
//! seen at the DaemonSet: it is deleted before its pods are told to end. A watch hears of it even if
//! the agent's rights are deleted in the same moment, as `kubectl delete --filename` does.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{fmt, fs, io};

use anyhow::{Context as _, Result};
use futures_util::StreamExt as _;
use kube::Client;
use kube::core::WatchEvent;
use serde::Deserialize;
use tokio::time::{sleep, timeout};
use tracing::{error, info, warn};

use super::turn::lock_path;
use crate::admin::{AdminError, AdminSocket};
use crate::capture::Capture;
use crate::cli::DaemonSetName;
use crate::telemetry::chain;
use crate::tunnel::ResetKey;

/// After which the server ends a watch, in seconds.
const WATCH_S: u64 = 300;
/// A server that says nothing for longer than that is gone.
const SILENCE: Duration = Duration::from_secs(WATCH_S + 30);
/// Between two watches, and up to twice as long.
const PAUSE: Duration = Duration::from_secs(5);
/// An agent that ends does not wait longer to hear whether it does so for good.
const ASK_LIMIT: Duration = Duration::from_secs(2);

/// `apps/v1` DaemonSet, as far as it is looked at.
#[derive(Clone, Debug, Default, Deserialize)]
struct DaemonSet {
    #[serde(default)]
    metadata: Metadata,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    deletion_timestamp: Option<String>,
}

impl DaemonSet {
    /// Deleted, and still there: perhaps until its pods are gone.
    fn is_going(&self) -> bool {
        self.metadata.deletion_timestamp.is_some()
    }
}

/// The DaemonSet that this agent belongs to.
pub(super) struct Owner {
    client: Client,
    name: DaemonSetName,
    /// As the last event said.
    is_gone: AtomicBool,
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Owner").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Owner {
    pub(super) fn new(client: Client, name: DaemonSetName) -> Self {
        Self { client, name, is_gone: AtomicBool::new(false) }
    }

    /// Follows it, for ever.
    pub(super) async fn follow(self: Arc<Self>) {
        let mut is_told = false;
        loop {
            if let Err(error) = self.watch().await
                && !is_told
            {
                warn!(
                    daemonset = %self.name, error = chain(&error),
                    "not followed: whether this agent ends for good is asked when it ends",
                );
                is_told = true;
            }
            sleep(PAUSE.mul_f32(1.0 + fastrand::f32())).await;
        }
    }

    /// One watch. Without a version to go on from it begins with what is there.
    async fn watch(&self) -> Result<(), kube::Error> {
        let DaemonSetName { namespace, name } = &self.name;
        let uri = format!(
            "/apis/apps/v1/namespaces/{namespace}/daemonsets?watch=1&timeoutSeconds={WATCH_S}\
             &fieldSelector=metadata.name%3D{name}",
        );
        let request = http::Request::get(uri).body(Vec::new()).map_err(kube::Error::HttpError)?;
        let events = self.client.request_events::<DaemonSet>(request).await?;
        let mut events = pin!(events);
        while let Ok(Some(event)) = timeout(SILENCE, events.next()).await {
            match event? {
                WatchEvent::Added(set) | WatchEvent::Modified(set) => {
                    self.is_gone.store(set.is_going(), Ordering::Relaxed);
                }
                WatchEvent::Deleted(_) => self.is_gone.store(true, Ordering::Relaxed),
                WatchEvent::Bookmark(_) => {}
                WatchEvent::Error(_expired) => break,
            }
        }
        Ok(())
    }

    /// Whether it is deleted, and this agent has no successor. What cannot be told is no.
    pub(super) async fn is_gone(&self) -> bool {
        if self.is_gone.load(Ordering::Relaxed) {
            return true;
        }
        let DaemonSetName { namespace, name } = &self.name;
        let uri = format!("/apis/apps/v1/namespaces/{namespace}/daemonsets/{name}");
        let Ok(request) = http::Request::get(uri).body(Vec::new()) else { return false };
        match timeout(ASK_LIMIT, self.client.request::<DaemonSet>(request)).await {
            Ok(Ok(set)) => set.is_going(),
            Ok(Err(kube::Error::Api(status))) => status.code == 404,
            Ok(Err(_)) | Err(_) => false,
        }
    }
}

/// Removes everything that an agent leaves for the next one.
pub(super) fn remove(bpffs: &Path, admin_socket: &Path) {
    let removed = Capture::detach(bpffs).map_err(anyhow::Error::from).and_then(|detached| {
        remove_files(admin_socket)?;
        Ok(detached)
    });
    match removed {
        Ok(detached) => {
            info!(removed = detached.removed.len(), "uninstalled: nothing is left in the kernel");
        }
        Err(error) => {
            error!(
                error = format!("{error:#}"),
                "not all is removed: `mesh-agent detach` tries again"
            );
        }
    }
}

/// Removes what an agent keeps outside the kernel, unless one is running, and returns what that was.
///
/// # Errors
///
/// If something of it cannot be removed, or is something else.
pub fn remove_files(admin_socket: &Path) -> Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    match AdminSocket::remove_leftover(admin_socket) {
        Ok(true) => removed.push(admin_socket.to_owned()),
        Ok(false) => {}
        Err(AdminError::InUse { .. }) => return Ok(removed),
        Err(error) => return Err(error.into()),
    }
    for file in [ResetKey::path(admin_socket), lock_path(admin_socket)] {
        match fs::remove_file(&file) {
            Ok(()) => removed.push(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("remove {}", file.display()));
            }
        }
    }
    Ok(removed)
}
