//! Keeps packets between pods of this node off the node, and says of which it is so.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::info;

use super::shortfall::Shortfall;
use crate::node::Node;

/// How often devices are looked at again: nothing tells when somebody attaches a program to one.
const SURVEY: Duration = Duration::from_secs(5);

/// How each enrolled pod of this node fares, by `namespace/name`: [`ON`], or why not.
pub(super) type Redirected = BTreeMap<String, String>;

const ON: &str = "on";

/// Looks at the devices of enrolled pods after every change of pods, and every few seconds; for ever.
pub(super) async fn survey(
    node: Arc<Node>,
    mut pods: watch::Receiver<Shortfall>,
    published: watch::Sender<Redirected>,
) {
    loop {
        let now = look(&node);
        published.send_if_modified(|before| {
            for (pod, how) in now.iter().filter(|(pod, how)| before.get(*pod) != Some(how)) {
                if how == ON {
                    info!(pod, "its packets to other pods of the node skip the node");
                } else {
                    info!(pod, why = how, stage = "capture", "its packets go through the node");
                }
            }
            let changed = *before != now;
            *before = now;
            changed
        });
        tokio::select! {
            changed = pods.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(SURVEY) => {}
        }
    }
}

fn look(node: &Node) -> Redirected {
    let snapshot = node.known.load();
    let shown = |uid: &str| match snapshot.workload(uid) {
        Some(pod) => format!("{}/{}", pod.namespace, pod.name),
        None => uid.to_owned(),
    };
    let how = |done: Result<(), _>| match done {
        Ok(()) => ON.to_owned(),
        Err(why) => crate::telemetry::chain(&why),
    };
    let found = node.capture.redirect();
    found.into_iter().map(|(uid, done)| (shown(&uid), how(done))).collect()
}
