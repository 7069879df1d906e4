//! Ctrl-C as something to ask for, so that a program cleans up before it ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result};

use crate::sys;

/// Whether SIGINT or SIGTERM came. A second one ends the process at once.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From now on these signals only set a flag. Call it first in `main`: threads inherit it.
    ///
    /// # Errors
    ///
    /// Fails if the signals cannot be blocked.
    pub fn catch() -> Result<Self> {
        sys::block_interrupts().context("block signals")?;
        let flag = Arc::new(AtomicBool::new(false));
        let set = Arc::clone(&flag);
        thread::Builder::new()
            .name("interrupt".into())
            .spawn(move || {
                sys::wait_for_interrupt();
                set.store(true, Ordering::Release);
                sys::wait_for_interrupt();
                std::process::exit(130);
            })
            .context("start a thread")?;
        Ok(Self(flag))
    }

    /// Whether one came.
    pub fn came(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}
