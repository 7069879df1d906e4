//! Requests beside what a test does, each by a new connection.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result};
use harness::Cluster;

use crate::hosts;

/// Connections of one `curl`: starting it in a pod takes longer than they do.
const AT_ONCE: usize = 50;

/// Asks `service` over and over from the pod `from` while `work` runs, and returns how often. By its addresses
/// in turns: by its name `curl` would go to the one when the other does not answer.
///
/// # Errors
///
/// Fails if one of the requests does, or what `work` does.
pub(crate) fn under_load(
    cluster: &Cluster,
    from: &str,
    service: &str,
    work: impl FnOnce() -> Result<()>,
) -> Result<usize> {
    let hosts = hosts(cluster, service)?;
    let end = AtomicBool::new(false);
    thread::scope(|scope| {
        let asking = scope.spawn(|| keep_asking(cluster, from, &hosts, &end));
        let worked = work();
        end.store(true, Ordering::Release);
        let asked = asking.join().unwrap_or_else(|panic| resume_unwind(panic));
        worked?;
        asked
    })
}

fn keep_asking(cluster: &Cluster, from: &str, hosts: &[String], end: &AtomicBool) -> Result<usize> {
    let urls: Vec<_> =
        hosts.iter().cycle().take(AT_ONCE).map(|host| format!("http://{host}/")).collect();
    let mut ask = vec![
        "curl",
        "--silent",
        "--show-error",
        "--fail",
        "--fail-early",
        "--max-time",
        "5",
        "--header",
        "Connection: close",
    ];
    ask.extend(urls.iter().map(String::as_str));
    let mut asked = 0;
    while !end.load(Ordering::Acquire) {
        cluster.exec(from, &ask).with_context(|| format!("after {asked} connections"))?;
        asked += AT_ONCE;
    }
    Ok(asked)
}
