//! How many NetworkPolicies a cluster has. Nothing here enforces them: the CNI does, where it can, and
//! `--redirect-peer on` may skip the place where it does.

use std::time::Duration;

use kube::Client;
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::warn;

use super::feed::{Form, pages};
use crate::discovery::enrol::is_system;
use crate::telemetry::chain;

const PATH: &str = "/apis/networking.k8s.io/v1/networkpolicies";

/// Not a watch: what comes of it is a number that people look at. Up to twice as long, so that agents do not ask
/// together.
const AGAIN: Duration = Duration::from_secs(300);

#[derive(Deserialize)]
struct Policy {
    metadata: Metadata,
}

#[derive(Deserialize)]
struct Metadata {
    namespace: String,
}

/// How many NetworkPolicies there are where pods may take part: not in system namespaces.
///
/// # Errors
///
/// The server does not answer, or not this client.
pub async fn network_policies(client: &Client) -> Result<usize, kube::Error> {
    let mut count = 0;
    let take = |page: Vec<Policy>| {
        count += page.iter().filter(|policy| !is_system(&policy.metadata.namespace)).count();
    };
    pages(client, (PATH, "", Form::Metadata), take).await?;
    Ok(count)
}

/// Counts them every few minutes, for ever.
pub(super) async fn count(client: Client, counts: watch::Sender<usize>) {
    let mut is_told = false;
    loop {
        match network_policies(&client).await {
            Ok(count) => drop(counts.send_replace(count)),
            Err(error) if !is_told => {
                is_told = true;
                warn!(
                    error = chain(&error),
                    "NetworkPolicies are not counted: nothing says that there are some which do not hold \
                     between pods of the mesh",
                );
            }
            Err(_) => {}
        }
        sleep(AGAIN.mul_f32(1.0 + fastrand::f32())).await;
    }
}
