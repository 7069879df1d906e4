//! Whose turn it is: of two agents of a node, one attaches and serves.
//!
//! A DaemonSet that surges starts the new agent beside the old one, and ends the old one when the new
//! one is ready. So the new one is: it has read its flags, has tried to load its programs and to have its
//! ports, and waits for the old one to be told to end.
//! From then on the old one touches neither the programs nor their maps. It goes on accepting what they
//! still send to it until the new one carries, so that nothing is refused in between; then it drains.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use crate::cli::Run;
use crate::{admin, capture, net, telemetry};

/// Between looks at the lock: after an agent that dies, what is captured meanwhile is refused, so this is
/// short.
const LOOK: Duration = Duration::from_millis(20);
/// Whoever waits has looked after that long, also on a busy machine.
const LOOKED: Duration = LOOK.saturating_mul(10);
/// A new agent loads the programs, lists the API and gets its certificates. One that takes longer has a
/// problem, and the old one is to end.
const TAKEOVER: Duration = Duration::from_secs(10);

/// So much of that is left for what follows certificates.
const MARGIN: Duration = Duration::from_secs(2);

/// Held by the agent whose turn it is; the kernel takes it from one that dies (flock(2)).
#[derive(Debug)]
pub(super) struct Turn {
    lock: File,
    /// Since when, if there was somebody before who was told to end.
    since: Option<Instant>,
}

impl Turn {
    /// Waits for it, and meanwhile tells whoever probes that this agent is ready for it.
    pub(super) async fn wait(options: &Run) -> Result<Self> {
        let path = lock_path(&options.admin.socket);
        if let Some(lock) = take(&path)? {
            return Ok(Self { lock, since: None });
        }
        // The old one ends when this one is ready, so what would fail then fails now.
        let rehearsed = capture::rehearse(options.redirect_peer.is_on());
        rehearsed.context("this agent cannot replace the one that runs here")?;
        super::listeners::rehearse(options)?;
        info!(lock = %path.display(), "another agent runs here: waiting for it to drain");
        let probes = net::listen_shared(super::listeners::usable(options.ready_addr));
        let probes = TcpListener::from_std(probes.context("--ready-addr")?)?;
        let waiting = async {
            loop {
                if let Some(lock) = take(&path)? {
                    return anyhow::Ok(lock);
                }
                sleep(LOOK).await;
            }
        };
        let lock = tokio::select! {
            lock = waiting => lock?,
            never = telemetry::serve_probes(probes, Arc::new(|| Ok(()))) => match never {},
        };
        info!("it is this agent's turn");
        Ok(Self { lock, since: Some(Instant::now()) })
    }

    /// Until when the agent before this one goes on carrying, unless this one does. Nothing if there was none. An
    /// agent that has died cannot be told from one that ends, and is soon over, too.
    pub(super) fn covered(&self) -> Option<Instant> {
        self.since.map(|since| since + TAKEOVER - MARGIN)
    }

    /// Lets whoever waits take over, and returns when that one carries; soon, if nobody waits. By now
    /// this agent answers at no port and socket that the two share.
    pub(super) async fn hand_over(self, admin_socket: &Path) {
        drop(self.lock);
        sleep(LOOKED).await;
        let is_free = || {
            let lock = File::options().write(true).open(lock_path(admin_socket))?;
            try_lock(&lock)
        };
        if is_free().unwrap_or(true) {
            return;
        }
        let carries = async {
            loop {
                let status = admin::ask(admin_socket, "/status").await;
                if status.is_ok_and(|status| status["ready"] == true) {
                    return;
                }
                sleep(LOOK).await;
            }
        };
        match timeout(TAKEOVER, carries).await {
            Ok(()) => info!("another agent carries"),
            Err(_elapsed) => warn!(
                within_s = TAKEOVER.as_secs(),
                "the agent whose turn it is does not carry yet: new connections are refused until it does",
            ),
        }
    }
}

/// Beside the admin socket, which two agents of a node share.
pub(super) fn lock_path(admin_socket: &Path) -> PathBuf {
    admin_socket.with_extension("lock")
}

/// The lock, if nobody has it.
fn take(path: &Path) -> Result<Option<File>> {
    // Whoever leaves nothing behind removes it, too.
    if let Some(dir) = path.parent().filter(|dir| !dir.exists()) {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.with_context(|| format!("create {}", dir.display()))?;
    }
    let lock = File::create(path).map_err(|error| {
        let is_gone = error.kind() == io::ErrorKind::NotFound;
        let remedy = if is_gone {
            ": what is mounted there was removed; start this container anew"
        } else {
            ""
        };
        anyhow::Error::from(error).context(format!("create {}{remedy}", path.display()))
    })?;
    if !try_lock(&lock)? {
        return Ok(None);
    }
    // An agent that leaves nothing behind, or `detach`, removes the file: a lock on one that is not there any
    // more keeps nobody out.
    let inode = |found: io::Result<fs::Metadata>| found.ok().map(|found| found.ino());
    let is_there = inode(fs::metadata(path)) == inode(lock.metadata());
    Ok(is_there.then_some(lock))
}

fn try_lock(lock: &File) -> Result<bool> {
    match lock.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error).context("lock"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dirwatch::testing::TempDir;

    #[test]
    fn lock_is_one_agents_also_when_its_file_was_removed() {
        let dir = TempDir::new();
        let path = dir.path().join("admin.lock");
        let old = take(&path).unwrap().unwrap();
        assert!(take(&path).unwrap().is_none());
        // Of somebody who waits since before the file was removed.
        let stale = File::create(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let new = take(&path).unwrap().unwrap();
        drop(old);
        assert!(try_lock(&stale).unwrap(), "the lock of a file that is gone");
        assert!(take(&path).unwrap().is_none(), "the file's is another one's");
        drop(new);
        fs::remove_file(&path).unwrap();
        fs::remove_dir(dir.path()).unwrap();
        assert!(take(&path).unwrap().is_some(), "the directory was removed, too");
    }
}
