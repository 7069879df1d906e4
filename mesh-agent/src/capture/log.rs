//! What the programs tell: refusals in the kernel, with the addresses that a counter cannot have.
//!
//! The ring is not pinned. Every start loads programs of its own and moves the links to them, so the
//! ring that they write to is this agent's, and an earlier agent's goes with its programs. What happens
//! while no agent runs is counted, not told.

use std::fmt;
use std::io;

use aya::Ebpf;
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::info;

use super::CaptureError;

/// Lines of the programs, which bound their number: ten a second on a CPU.
pub struct KernelLog(EbpfLogger<Events>);

impl fmt::Debug for KernelLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelLog").finish_non_exhaustive()
    }
}

impl KernelLog {
    /// Takes the reading end out of the loaded object. After its programs were loaded.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, CaptureError> {
        let logger = EbpfLogger::init_with_logger(ebpf, Events)
            .map_err(|error| CaptureError::Load { what: "AYA_LOGS", source: error.into() })?;
        Ok(Self(logger))
    }

    /// Turns lines into events until the future is dropped.
    ///
    /// # Errors
    ///
    /// The ring cannot be waited for.
    pub async fn follow(self) -> io::Result<()> {
        let Self(logger) = self;
        // SAFETY: the logger owns the map's descriptor, and neither closes nor replaces it while it lives.
        let ring = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
        let mut ring = ring?;
        loop {
            let mut ready = ring.readable_mut().await?;
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    }
}

/// Lines as events of this module.
struct Events;

impl Log for Events {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, line: &Record<'_>) {
        info!(stage = "capture", refused = %line.args(), "refused in the kernel");
    }

    fn flush(&self) {}
}
