//! Requests beside what a test does, each by a new connection.

use std::panic::resume_unwind;
use std::thread;

use anyhow::{Context as _, Result};
use harness::Cluster;

use crate::hosts;

/// Connections of one `curl`, which the loop in the pod starts anew until it is told to end, with a pause of
/// 50 ms: what is tested beside it needs the machine too.
const AT_ONCE: usize = 20;
const END: &str = "/tmp/end";

/// Asks `service` over and over from the pod `from` while `work` runs, and returns how often: from inside of the
/// pod, so that there is hardly a moment without. By its addresses in turns: by its name `curl` would go to the one
/// when the other does not answer.
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
    let urls = hosts.iter().cycle().take(AT_ONCE).map(|host| format!("'http://{host}/'"));
    let urls: Vec<_> = urls.collect();
    let ask = format!(
        "curl --silent --show-error --fail --fail-early --max-time 5 --header 'Connection: close' {}",
        urls.join(" ")
    );
    let script = format!(
        "rm -f {END}; n=0
         while [ ! -e {END} ]; do
             {ask} >/dev/null || {{ echo \"after $n connections\" >&2; exit 1; }}
             n=$((n + {AT_ONCE})); sleep 0.05
         done
         echo $n"
    );
    thread::scope(|scope| {
        let asking = scope.spawn(|| cluster.exec(from, &["sh", "-c", &script]));
        let worked = work();
        let ended = cluster.exec(from, &["touch", END]);
        let asked = asking.join().unwrap_or_else(|panic| resume_unwind(panic));
        worked?;
        ended?;
        asked?.trim().parse().context("read how often was asked")
    })
}
