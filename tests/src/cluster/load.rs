//! Requests beside what a test does, each by a new connection.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread;

use anyhow::Result;

use super::Cluster;

/// How often is asked, by one `curl`: what is tested beside it needs the machine too, and a program that is started
/// over and over took most of it.
const PER_SECOND: usize = 50;
/// As many as no test takes.
const MOST: usize = 30_000;
const END: &str = "/tmp/end";
/// Where the pod that asks has what was answered so far.
pub const ANSWERS: &str = "/tmp/answers";

impl Cluster {
    /// Asks `service` over and over from the pod `from` while `work` runs, and returns what was answered: from
    /// inside of the pod, so that there is no gap in which something could go wrong unseen. By its addresses in
    /// turns: by its name `curl` would go to the one when the other does not answer.
    ///
    /// # Errors
    ///
    /// Fails if one of the requests does, or what `work` does.
    pub fn under_load(
        &self,
        from: &str,
        service: &str,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<Vec<String>> {
        self.under_load_of(PER_SECOND, from, service, work)
    }

    /// The same with so many requests a second.
    ///
    /// # Errors
    ///
    /// Fails if one of the requests does, or what `work` does.
    pub fn under_load_of(
        &self,
        per_second: usize,
        from: &str,
        service: &str,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<Vec<String>> {
        let hosts = self.hosts(service)?;
        let urls: Vec<_> = hosts.iter().map(|host| format!("url = http://{host}/")).collect();
        let script = format!(
            "cd /tmp; rm -f {END}
             n=0; while [ $n -lt {MOST} ]; do echo '{urls}'; n=$((n + {each})); done >urls
             curl --silent --show-error --no-buffer --fail --fail-early --globoff --max-time 5 --rate {per_second}/s \
                 --header 'Connection: close' --config urls >{ANSWERS} & pid=$!
             while [ ! -e {END} ] && kill -0 $pid 2>/dev/null; do sleep 0.2; done
             kill $pid 2>/dev/null; wait $pid; code=$?
             n=0; while read -r answer; do n=$((n + 1)); echo \"$answer\"; done <{ANSWERS}
             # Ended by us, and not by itself.
             [ $code -eq $((128 + 15)) ] || {{ echo \"code $code after $n answers\" >&2; exit 1; }}",
            urls = urls.join("\n"),
            each = urls.len(),
        );
        thread::scope(|scope| {
            let asking = scope.spawn(|| self.exec(from, &["sh", "-c", &script]));
            // Also if it panics: who asks goes on until it is told.
            let worked = catch_unwind(AssertUnwindSafe(work));
            let ended = self.exec(from, &["touch", END]);
            let asked = asking.join().unwrap_or_else(|panic| resume_unwind(panic));
            worked.unwrap_or_else(|panic| resume_unwind(panic))?;
            ended?;
            Ok(asked?.lines().map(str::to_owned).collect())
        })
    }
}
