//! Worker threads: each a single-threaded runtime that owns its connections from accept to end.
//!
//! Waking another core costs more than anything else a mesh does to a small exchange, so whatever
//! follows from one event happens on the thread that saw it: a connection's sockets, its tunnel and
//! its relay live on one worker. Load spreads because the kernel spreads connections over listeners,
//! and each listener belongs to one worker.

use std::io;
use std::thread;
use std::time::Duration;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::error;

use crate::polling;

/// How long a worker's tasks may take to be dropped when the process ends.
const SHUTDOWN: Duration = Duration::from_secs(1);

/// Tasks that run before sockets are asked again, 61 by default: bulk flows that give way every
/// 64 KiB would keep a small exchange waiting for tens of turns.
const EVENT_INTERVAL: u32 = 16;

/// The worker threads of this process. Dropping them ends every connection.
#[derive(Debug)]
pub struct Workers {
    workers: Vec<Worker>,
}

#[derive(Debug)]
struct Worker {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Workers {
    /// Starts `count` threads named `worker-0` and on.
    ///
    /// # Errors
    ///
    /// The system refused a thread or a runtime.
    pub fn start(count: usize, poll: Duration) -> io::Result<Self> {
        let workers =
            (0..count).map(|index| Worker::start(index, poll)).collect::<io::Result<Vec<_>>>()?;
        Ok(Self { workers })
    }

    /// How many there are; at least one.
    pub fn len(&self) -> usize {
        self.workers.len()
    }

    /// Whether there are none, which [`Workers::start`] with a positive count never makes.
    pub fn is_empty(&self) -> bool {
        self.workers.is_empty()
    }

    /// Runs `future` on worker `index` until it ends or the worker stops.
    pub fn spawn<F>(&self, index: usize, future: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        self.workers[index].handle.spawn(future)
    }
}

impl Worker {
    fn start(index: usize, poll: Duration) -> io::Result<Self> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .event_interval(EVENT_INTERVAL)
            .on_thread_park(polling::ran_out)
            .build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let thread = thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
            if !poll.is_zero() {
                runtime.spawn(polling::look_for_work(poll));
            }
            // Both a message and a dropped sender mean the end.
            let _ended = runtime.block_on(stopped);
            runtime.shutdown_timeout(SHUTDOWN);
        })?;
        Ok(Self { handle, stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(Err(_panic)) = self.thread.take().map(thread::JoinHandle::join) {
            error!("a worker thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_of_one_worker_share_its_thread() {
        let workers = Workers::start(2, Duration::ZERO).unwrap();
        let runtime = Builder::new_current_thread().build().unwrap();
        let name_on = |index| {
            let task = workers.spawn(index, async { thread::current().name().map(str::to_owned) });
            runtime.block_on(task).unwrap().unwrap()
        };
        assert_eq!([name_on(0), name_on(1), name_on(0)], ["worker-0", "worker-1", "worker-0"]);
    }

    #[test]
    fn dropping_workers_drops_their_tasks() {
        let workers = Workers::start(1, Duration::ZERO).unwrap();
        let (alive, mut gone) = oneshot::channel::<()>();
        workers.spawn(0, async move {
            let _alive = alive;
            std::future::pending::<()>().await;
        });
        drop(workers);
        assert!(matches!(gone.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
    }
}
