//! Reads pods of other nodes: by name, or by the address that somebody wants to know of.
//!
//! # Guarantees
//!
//! - What is read for one address is bounded, and of it only the pod that has it is kept, however many pods its
//!   service account or its node has.
//! - That an address is nobody's is said only if every pod was looked at that may have it: all by their first
//!   addresses, and where its node is known that node's by all of theirs.

use std::net::IpAddr;
use std::time::Duration;

use kube::Client;
use tokio::time::timeout;

use super::behind::has;
use super::demand::{Found, Wanted};
use super::feed::{Followed as _, Searched, list, read, search};
use crate::discovery::client::escaped;
use crate::discovery::kube::Pod;
use crate::discovery::objects::Object;

/// All that is read for one address: whoever waits for it has given up before, and others want to be read.
const LIMIT: Duration = Duration::from_secs(10);

/// Reads what is wanted.
pub(super) async fn find(client: &Client, wanted: &Wanted) -> Found {
    match wanted {
        Wanted::Pod { namespace, name, uid, at: _ } => {
            let path = format!("/api/v1/namespaces/{}/pods/{}", escaped(namespace), escaped(name));
            match read::<Pod>(client, &path).await {
                Ok(Some(Object::Pod(pod)))
                    if uid.is_some() && pod.metadata.uid.as_ref() != uid.as_ref() =>
                {
                    Found::None
                }
                Ok(Some(pod)) => Found::Pods(vec![pod]),
                Ok(None) => Found::None,
                Err(why) => Found::Failed(why),
            }
        }
        Wanted::Address { ip, account, node } => {
            let found = find_at(client, *ip, account.as_ref(), node.as_deref());
            let late = |_elapsed| Found::Failed(format!("not found within {LIMIT:?}"));
            timeout(LIMIT, found).await.unwrap_or_else(late)
        }
    }
}

async fn find_at(
    client: &Client,
    ip: IpAddr,
    account: Option<&(String, String)>,
    node: Option<&str>,
) -> Found {
    // By that only the first address of a pod is found. The answer is short, and not in pages, for which some
    // servers would leave what they have in memory.
    match list::<Pod>(client, Pod::PATH, &selector("status.podIP", &ip.to_string())).await {
        Ok(pods) => {
            let found: Vec<_> = pods.into_iter().filter(|pod| has(pod, ip)).collect();
            if !found.is_empty() {
                return Found::Pods(found);
            }
        }
        Err(why) => return Found::Failed(why),
    }
    // A node has hundreds of pods at most, an account thousands.
    let mut places = Vec::new();
    if let Some(node) = node {
        places.push((Pod::PATH.to_owned(), selector("spec.nodeName", node)));
    }
    if let Some((namespace, name)) = account {
        let path = format!("/api/v1/namespaces/{}/pods", escaped(namespace));
        places.push((path, selector("spec.serviceAccountName", name)));
    }
    let mut is_certain = true;
    for (path, selector) in places {
        match search::<Pod>(client, &path, &selector, |pod| has(pod, ip)).await {
            Ok(Searched::Found(pods)) => return Found::Pods(pods),
            Ok(Searched::Nothing) => {}
            Ok(Searched::TooMany) => is_certain = false,
            Err(why) => return Found::Failed(why),
        }
    }
    // Where somebody has called from, that nobody was found means no more than not to look again at once.
    if is_certain || account.is_some() {
        Found::None
    } else {
        Found::Failed("too many pods to find the one that has this address".into())
    }
}

fn selector(field: &str, value: &str) -> String {
    format!("fieldSelector={field}%3D{}", escaped(value))
}
