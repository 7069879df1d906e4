//! A client that never stops asking, while a test changes something underneath it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use anyhow::{Result, ensure};

use crate::pod::Pod;
use crate::traffic::exchange;
use crate::wait;

/// How a load went so far.
#[derive(Debug, Default)]
pub struct Load {
    stop: AtomicBool,
    succeeded: AtomicU64,
}

impl Load {
    /// Runs `change` while `pod` makes one connection after the other to `to`, which must echo.
    /// Returns how many there were, and what `change` returned.
    ///
    /// # Errors
    ///
    /// Fails if a single connection does, or `change`, or if none was made at all.
    pub fn during<T>(
        pod: &Pod,
        to: SocketAddr,
        change: impl FnOnce(&Self) -> Result<T>,
    ) -> Result<(u64, T)> {
        let load = Self::default();
        thread::scope(|scope| {
            let asking = scope.spawn(|| load.run(pod, to));
            let changed = load.wait_for(1).and_then(|()| change(&load));
            load.stop.store(true, Ordering::Release);
            asking.join().unwrap_or_else(|panicked| std::panic::resume_unwind(panicked))?;
            let succeeded = load.succeeded();
            ensure!(succeeded > 0, "not one connection was made");
            Ok((succeeded, changed?))
        })
    }

    /// Connections that succeeded so far.
    pub fn succeeded(&self) -> u64 {
        self.succeeded.load(Ordering::Acquire)
    }

    /// Waits for `more` further connections, so that something was asked in the present state.
    ///
    /// # Errors
    ///
    /// Fails if they do not come: the load has failed.
    pub fn wait_for(&self, more: u64) -> Result<()> {
        let goal = self.succeeded() + more;
        wait::until(wait::SOON, "more connections", || self.succeeded() >= goal)
    }

    fn run(&self, pod: &Pod, to: SocketAddr) -> Result<()> {
        while !self.stop.load(Ordering::Acquire) {
            exchange(&mut pod.connect(to)?, b"still there?")?;
            self.succeeded.fetch_add(1, Ordering::AcqRel);
        }
        Ok(())
    }
}
