//! The heartbeat: what the programs take the agent for alive by.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use tracing::error;

use crate::capture::Capture;

/// The programs take the agent for gone when its heartbeat is 5 s old.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Tells the programs that this agent lives, until dropped. A thread of its own: the control thread
/// may be busy for seconds with manifests, and that must not open pods that fail open.
pub(super) struct Heart {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Heart {
    pub(super) fn start(capture: Arc<Capture>) -> io::Result<Self> {
        let (stop, stopped) = mpsc::channel::<()>();
        let thread = thread::Builder::new().name("heartbeat".into()).spawn(move || {
            while stopped.recv_timeout(HEARTBEAT) == Err(RecvTimeoutError::Timeout) {
                capture.beat();
            }
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(Err(_panic)) = self.thread.take().map(thread::JoinHandle::join) {
            error!("the heartbeat panicked");
        }
    }
}
