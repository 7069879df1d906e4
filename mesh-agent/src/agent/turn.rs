//! Whose turn it is: of two agents of a node, one attaches and serves.
//!
//! A DaemonSet that surges starts the new agent beside the old one, and ends the old one when the new
//! one is ready. So the new one is: it has read its flags, and waits for the old one to begin to drain.
//! From then on the old one only carries what it has accepted, and touches neither the programs nor
//! their maps.

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::net::TcpListener;
use tokio::time::sleep;
use tracing::info;

use crate::cli::Run;
use crate::{net, telemetry};

/// Between looks at the lock: what is captured meanwhile is refused, so this is short.
const LOOK: Duration = Duration::from_millis(20);

/// Held by the agent whose turn it is; the kernel takes it from one that dies (flock(2)).
#[derive(Debug)]
pub(super) struct Turn {
    _lock: File,
}

impl Turn {
    /// Waits for it, and meanwhile tells whoever probes that this agent is ready for it.
    pub(super) async fn wait(options: &Run) -> Result<Self> {
        let path = lock_path(&options.admin.socket);
        if let Some(dir) = path.parent().filter(|dir| !dir.exists()) {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.with_context(|| format!("create {}", dir.display()))?;
        }
        let lock = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        if try_lock(&lock)? {
            return Ok(Self { _lock: lock });
        }
        info!(lock = %path.display(), "another agent runs here: waiting for it to drain");
        let probes = net::listen_shared(super::usable(options.ready_addr));
        let probes = TcpListener::from_std(probes.context("--ready-addr")?)?;
        let waiting = async {
            while !try_lock(&lock)? {
                sleep(LOOK).await;
            }
            anyhow::Ok(())
        };
        tokio::select! {
            locked = waiting => locked?,
            never = telemetry::serve_probes(probes, Arc::new(|| Ok(()))) => match never {},
        }
        info!("it is this agent's turn");
        Ok(Self { _lock: lock })
    }
}

/// Beside the admin socket, which two agents of a node share.
pub(super) fn lock_path(admin_socket: &Path) -> PathBuf {
    admin_socket.with_extension("lock")
}

fn try_lock(lock: &File) -> Result<bool> {
    match lock.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error).context("lock"),
    }
}
