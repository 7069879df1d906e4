//! Lets the kubelet's probes into enrolled pods.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::capture::Capture;
use crate::net::Netns;
use crate::processes::Kubelet;

/// How soon a kubelet that was restarted is recognised: before its third probe fails.
const LOOK: Duration = Duration::from_secs(2);

/// Tells the programs which cgroup is the kubelet's, for ever, and `is_missing` whether there is none.
pub(super) async fn follow(
    capture: Arc<Capture>,
    cgroup: PathBuf,
    names: Vec<String>,
    is_missing: watch::Sender<bool>,
) {
    let node = match Netns::current() {
        Ok(node) => node,
        Err(error) => {
            return warn!(%error, stage = "capture", "probes are not recognised");
        }
    };
    let mut kubelet = Kubelet::new(&cgroup, &names);
    let mut before: Option<Option<u64>> = None;
    loop {
        let now = kubelet.cgroup();
        if before != Some(now) {
            match now {
                Some(id) => info!(cgroup = id, "probes of the kubelet are recognised"),
                None => warn!(
                    names = names.join(","),
                    stage = "capture",
                    "no such cgroup with a process: probes of the kubelet are plain text of a stranger, \
                     which strict pods refuse; see --kubelet-cgroup"
                ),
            }
            capture.let_kubelet_in(&node, now);
            is_missing.send_replace(now.is_none());
            before = Some(now);
        }
        sleep(LOOK).await;
    }
}
