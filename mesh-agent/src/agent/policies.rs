//! Says of policies that this agent does not enforce that it does not.

use tokio::sync::watch;
use tracing::warn;

/// Says, whenever there begin to be NetworkPolicies, what they do not hold for: also between pods of this node if their
/// packets skip it.
pub(super) async fn warn_of(mut policies: watch::Receiver<usize>, skips_the_node: bool) {
    let why = if skips_the_node {
        "--redirect-peer on skips the node's netfilter: NetworkPolicies that are enforced there do not hold \
         between pods of this node, nor between pods of the mesh on two nodes"
    } else {
        "NetworkPolicies are not enforced on TCP between pods of the mesh: what agents carry does not pass where the \
         CNI enforces them"
    };
    let mut before = 0;
    loop {
        let now = *policies.borrow_and_update();
        if before == 0 && now > 0 {
            warn!(policies = now, stage = "authorize", "{why}");
        }
        before = now;
        if policies.changed().await.is_err() {
            return;
        }
    }
}
