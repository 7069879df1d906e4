//! Whether an agent that ends does so for good: the DaemonSet that it belongs to is gone.
//!
//! An agent that ends leaves its programs in the kernel, so that pods are refused until the next one is
//! there, and never talk in plain text meanwhile. After an uninstallation there is no next one. That is
//! seen at the DaemonSet: it is deleted before its pods are told to end. A watch hears of it even if
//! the agent's rights are deleted in the same moment, as `kubectl delete --filename` does.

use std::fmt;
use std::future::pending;
use std::pin::pin;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use kube::Client;
use kube::core::WatchEvent;
use mesh_core::names::is_subdomain;
use serde::Deserialize;
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::warn;

use crate::telemetry::chain;

/// After which the server ends a watch, in seconds.
const WATCH_S: u64 = 300;
/// A server that says nothing for longer than that is gone.
const SILENCE: Duration = Duration::from_secs(WATCH_S + 30);
/// After a watch that failed or was short, and up to twice as long.
const PAUSE: Duration = Duration::from_secs(5);
/// An agent that ends does not wait longer to hear whether it does so for good.
const ASK_LIMIT: Duration = Duration::from_secs(2);

/// A DaemonSet and its namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DaemonSetName {
    /// Where it is.
    pub namespace: String,
    /// What it is called there.
    pub name: String,
}

/// It is no such name.
#[derive(Debug, Error)]
#[error("not NAMESPACE/NAME, of lower-case letters, digits, `-` and `.`")]
pub struct NotADaemonSet;

impl FromStr for DaemonSetName {
    type Err = NotADaemonSet;

    fn from_str(text: &str) -> Result<Self, NotADaemonSet> {
        match text.split_once('/') {
            Some((namespace, name)) if is_subdomain(namespace) && is_subdomain(name) => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err(NotADaemonSet),
        }
    }
}

impl fmt::Display for DaemonSetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// `apps/v1` DaemonSet, as far as it is looked at.
#[derive(Clone, Debug, Default, Deserialize)]
struct DaemonSet {
    #[serde(default)]
    metadata: Metadata,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    deletion_timestamp: Option<String>,
}

impl DaemonSet {
    /// Deleted, and still there: perhaps until its pods are gone.
    fn is_going(&self) -> bool {
        self.metadata.deletion_timestamp.is_some()
    }
}

/// The DaemonSet that this agent belongs to, followed.
pub struct Owner {
    client: Client,
    name: DaemonSetName,
    /// As was last heard.
    is_gone: watch::Sender<bool>,
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Owner").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Owner {
    /// Asks nothing yet.
    pub fn new(client: Client, name: DaemonSetName) -> Self {
        Self { client, name, is_gone: watch::Sender::new(false) }
    }

    /// Follows it, for ever.
    pub async fn follow(self: Arc<Self>) {
        let (mut is_told, mut was_there) = (false, false);
        loop {
            let began = Instant::now();
            let watched = self.watch(&mut was_there).await;
            if let Err(error) = &watched
                && !is_told
            {
                warn!(
                    daemonset = %self.name, error = chain(error),
                    "not followed: whether this agent ends for good is asked when it ends",
                );
                is_told = true;
            }
            // The next one at once where the server has ended one in time: nothing is heard in between.
            if watched.is_err() || began.elapsed() < PAUSE {
                sleep(PAUSE.mul_f32(1.0 + fastrand::f32())).await;
            }
        }
    }

    /// One watch. Without a version to go on from it begins with what is there, and of what `was_there` and has gone
    /// since the one before it says nothing: that is asked.
    async fn watch(&self, was_there: &mut bool) -> Result<(), kube::Error> {
        let DaemonSetName { namespace, name } = &self.name;
        let uri = format!(
            "/apis/apps/v1/namespaces/{namespace}/daemonsets?watch=1&timeoutSeconds={WATCH_S}\
             &fieldSelector=metadata.name%3D{name}",
        );
        let request = http::Request::get(uri).body(Vec::new()).map_err(kube::Error::HttpError)?;
        let events = self.client.request_events::<DaemonSet>(request).await?;
        let mut events = pin!(events);
        let mut asked = pin!(self.read());
        let mut is_asked = *was_there;
        loop {
            let event = tokio::select! {
                is_going = &mut asked, if is_asked => {
                    is_asked = false;
                    if is_going.is_ok_and(|is_going| is_going) {
                        self.is_gone.send_replace(true);
                    }
                    continue;
                }
                event = timeout(SILENCE, events.next()) => event,
            };
            let Ok(Some(event)) = event else { break };
            match event? {
                WatchEvent::Added(set) | WatchEvent::Modified(set) => {
                    (*was_there, is_asked) = (true, false);
                    self.is_gone.send_replace(set.is_going());
                }
                WatchEvent::Deleted(_) => {
                    is_asked = false;
                    self.is_gone.send_replace(true);
                }
                WatchEvent::Bookmark(_) => {}
                WatchEvent::Error(_expired) => break,
            }
        }
        Ok(())
    }

    /// Where it is.
    pub fn namespace(&self) -> &str {
        &self.name.namespace
    }

    /// Whether it is deleted, as far as it was heard.
    pub fn heard(&self) -> watch::Receiver<bool> {
        self.is_gone.subscribe()
    }

    /// Whether it is deleted, and this agent has no successor. What cannot be told is no.
    pub async fn is_gone(&self) -> bool {
        let mut told = self.is_gone.subscribe();
        let known = async {
            tokio::select! {
                biased;
                heard = told.wait_for(|is_gone| *is_gone) => heard.is_ok(),
                asked = self.ask() => asked,
            }
        };
        let is_gone = timeout(ASK_LIMIT, known).await.unwrap_or(false);
        if is_gone {
            self.is_gone.send_replace(true);
        }
        is_gone
    }

    async fn ask(&self) -> bool {
        match self.read().await {
            Ok(is_going) => is_going,
            // The right to ask has gone before: then the watch hears of it, if somebody deletes all.
            Err(kube::Error::Api(status)) if matches!(status.code, 401 | 403) => pending().await,
            Err(_) => false,
        }
    }

    /// Reads it, and says whether it is gone or going.
    async fn read(&self) -> Result<bool, kube::Error> {
        let DaemonSetName { namespace, name } = &self.name;
        let uri = format!("/apis/apps/v1/namespaces/{namespace}/daemonsets/{name}");
        let request = http::Request::get(uri).body(Vec::new()).map_err(kube::Error::HttpError)?;
        match self.client.request::<DaemonSet>(request).await {
            Ok(set) => Ok(set.is_going()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(true),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::discovery::client::by_config;

    #[test]
    fn name_has_a_namespace_and_nothing_that_leads_elsewhere() {
        let name: DaemonSetName = "malla-system/malla-agent".parse().unwrap();
        assert_eq!(name.to_string(), "malla-system/malla-agent");
        for wrong in ["", "malla-agent", "/malla-agent", "malla-system/", "a/b/c", "a/b?c", "A/b"] {
            assert!(wrong.parse::<DaemonSetName>().is_err(), "{wrong}");
        }
    }

    /// An API that has told a watch that the DaemonSet is there, and lets nobody ask for it any more. What
    /// it tells next comes when this agent asks.
    async fn api(listener: TcpListener, next: &str) {
        let event =
            |kind: &str| format!("{{\"type\":\"{kind}\",\"object\":{{\"metadata\":{{}}}}}}\n");
        let (mut watch, _) = listener.accept().await.unwrap();
        let head = read_head(&mut watch).await;
        assert!(head.contains("watch=1"), "{head}");
        let ok = format!("HTTP/1.1 200 OK\r\n\r\n{}", event("ADDED"));
        watch.write_all(ok.as_bytes()).await.unwrap();

        let (mut asked, _) = listener.accept().await.unwrap();
        let head = read_head(&mut asked).await;
        assert!(head.starts_with("GET /apis/apps/v1/namespaces/a/daemonsets/b "), "{head}");
        let status = r#"{"kind":"Status","status":"Failure","reason":"Forbidden","code":403}"#;
        let no =
            format!("HTTP/1.1 403 Forbidden\r\nContent-Length: {}\r\n\r\n{status}", status.len(),);
        asked.write_all(no.as_bytes()).await.unwrap();
        // It has been read before the watch says more.
        asked.shutdown().await.unwrap();
        assert_eq!(asked.read(&mut [0; 1]).await.unwrap(), 0);
        watch.write_all(event(next).as_bytes()).await.unwrap();
        pending().await
    }

    /// An API that ends its first watch, behind which the DaemonSet goes; nobody may ask any more when it `forbids` that.
    async fn forgetful_api(listener: TcpListener, forbids: Arc<AtomicBool>) {
        let ok = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
        let added = "{\"type\":\"ADDED\",\"object\":{\"metadata\":{}}}\n";
        let mut watches = Vec::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            if read_head(&mut stream).await.contains("watch=1") {
                let is_first = watches.is_empty();
                let said = if is_first { added } else { "" };
                stream.write_all(format!("{ok}{said}").as_bytes()).await.unwrap();
                watches.push((!is_first).then_some(stream));
                continue;
            }
            let code = if forbids.load(Ordering::Relaxed) { 403 } else { 404 };
            let status = format!(r#"{{"kind":"Status","status":"Failure","code":{code}}}"#);
            let head = format!("HTTP/1.1 {code} No\r\nContent-Length: {}\r\n\r\n", status.len());
            stream.write_all((head + &status).as_bytes()).await.unwrap();
            stream.shutdown().await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn deletion_between_two_watches_is_asked_for() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let uri = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
        let forbids = Arc::<AtomicBool>::default();
        let api = tokio::spawn(forgetful_api(listener, Arc::clone(&forbids)));
        let client = by_config(kube::Config::new(uri)).unwrap();
        let owner = Arc::new(Owner::new(client, "a/b".parse().unwrap()));
        let follow = tokio::spawn(Arc::clone(&owner).follow());
        owner.heard().wait_for(|is_gone| *is_gone).await.unwrap();
        forbids.store(true, Ordering::Relaxed);
        assert!(owner.is_gone().await, "it was heard");
        follow.abort();
        api.abort();
    }

    async fn read_head(stream: &mut TcpStream) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        String::from_utf8(head).unwrap()
    }

    #[tokio::test]
    async fn deletion_is_heard_of_that_came_with_the_right_to_ask() {
        for (next, is_gone) in [("DELETED", true), ("MODIFIED", false)] {
            let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
            let uri = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
            let api = tokio::spawn(api(listener, next));
            let client = by_config(kube::Config::new(uri)).unwrap();
            let owner = Arc::new(Owner::new(client, "a/b".parse().unwrap()));
            let follow = tokio::spawn(Arc::clone(&owner).follow());
            owner.is_gone.subscribe().changed().await.unwrap();
            assert_eq!(owner.is_gone().await, is_gone, "{next}");
            follow.abort();
            api.abort();
        }
    }
}
