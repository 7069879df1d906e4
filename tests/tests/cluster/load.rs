//! Requests beside what a test does, each by a new connection.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result};
use harness::Cluster;

/// Connections of one `curl`: starting it in a pod takes longer than they do.
const AT_ONCE: usize = 50;

/// Asks for `url` over and over from the pod `from` while `work` runs, and returns how often.
///
/// # Errors
///
/// Fails if one of the requests does, or what `work` does.
pub(crate) fn under_load(
    cluster: &Cluster,
    from: &str,
    url: &str,
    work: impl FnOnce() -> Result<()>,
) -> Result<usize> {
    let end = AtomicBool::new(false);
    thread::scope(|scope| {
        let asking = scope.spawn(|| keep_asking(cluster, from, url, &end));
        let worked = work();
        end.store(true, Ordering::Release);
        let asked = asking.join().unwrap_or_else(|panic| resume_unwind(panic));
        worked?;
        asked
    })
}

fn keep_asking(cluster: &Cluster, from: &str, url: &str, end: &AtomicBool) -> Result<usize> {
    let urls = format!("{url}?[1-{AT_ONCE}]");
    let mut asked = 0;
    while !end.load(Ordering::Acquire) {
        let ask = [
            "curl",
            "--silent",
            "--show-error",
            "--fail",
            "--fail-early",
            "--max-time",
            "5",
            "--header",
            "Connection: close",
            &urls,
        ];
        cluster.exec(from, &ask).with_context(|| format!("after {asked} connections"))?;
        asked += AT_ONCE;
    }
    Ok(asked)
}
