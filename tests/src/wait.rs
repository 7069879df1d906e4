//! Waiting for something to become true, instead of sleeping for long enough.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How long anything that a test waits for may take, on a machine that is busy with other tests.
pub const SOON: Duration = Duration::from_secs(30);

/// Often enough not to show in a test's duration, seldom enough not to steal the core. After a look that
/// takes longer, such as one that starts a program, as long as that.
const PAUSE: Duration = Duration::from_millis(10);

/// Asks until `holds` says yes.
///
/// # Errors
///
/// Fails if that does not happen within `limit`.
pub fn until(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    until_some(limit, what, || holds().then_some(()))
}

/// Asks until `look` finds something.
///
/// # Errors
///
/// Fails if that does not happen within `limit`.
pub fn until_some<T>(
    limit: Duration,
    what: &str,
    mut look: impl FnMut() -> Option<T>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        let began = Instant::now();
        if let Some(found) = look() {
            return Ok(found);
        }
        let took = began.elapsed();
        if Instant::now() > deadline {
            bail!("waited {} s for {what}", limit.as_secs_f32());
        }
        thread::sleep(PAUSE.max(took));
    }
}
