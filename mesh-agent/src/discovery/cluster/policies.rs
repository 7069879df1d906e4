//! How many NetworkPolicies a cluster has. Nothing here enforces them: the CNI does, where it can, and
//! `--redirect-peer on` may skip the place where it does.

use std::time::Duration;

use http::header::ACCEPT;
use kube::Client;
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::warn;

use super::feed::{LIST_LIMIT, PAGE, escaped};
use crate::discovery::enrol::is_system;
use crate::telemetry::chain;

const PATH: &str = "/apis/networking.k8s.io/v1/networkpolicies";

/// Names without what is behind them.
const METADATA: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";

/// Not a watch: what comes of it is one line in a log. Up to twice as long, so that agents do not ask
/// together.
const AGAIN: Duration = Duration::from_secs(300);

#[derive(Deserialize)]
struct List {
    #[serde(default)]
    metadata: ListMeta,
    items: Vec<Policy>,
}

#[derive(Default, Deserialize)]
struct ListMeta {
    #[serde(default, rename = "continue")]
    next: String,
}

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
    let mut next = String::new();
    loop {
        let request =
            http::Request::get(format!("{PATH}?limit={PAGE}&continue={}", escaped(&next)))
                .header(ACCEPT, METADATA)
                .body(Vec::new())
                .map_err(kube::Error::HttpError)?;
        let asked = timeout(LIST_LIMIT, client.request::<List>(request)).await;
        let page = asked.unwrap_or_else(|_elapsed| {
            Err(kube::Error::Service(format!("no list within {LIST_LIMIT:?}").into()))
        })?;
        let theirs = page.items.iter().filter(|policy| !is_system(&policy.metadata.namespace));
        count += theirs.count();
        if page.metadata.next.is_empty() {
            return Ok(count);
        }
        next = page.metadata.next;
    }
}

/// Counts them every few minutes, for ever.
pub(super) async fn count(client: Client, counts: watch::Sender<usize>) {
    let mut is_told = false;
    loop {
        match network_policies(&client).await {
            Ok(count) => {
                counts.send_if_modified(|before| std::mem::replace(before, count) != count);
            }
            Err(error) => {
                if !std::mem::replace(&mut is_told, true) {
                    warn!(
                        error = chain(&error),
                        "NetworkPolicies are not counted: nothing warns of those that \
                         --redirect-peer on skips",
                    );
                }
            }
        }
        sleep(AGAIN.mul_f32(1.0 + fastrand::f32())).await;
    }
}
