//! The requests of a signer, followed: listed once, and then watched from where the last watch ended.
//!
//! # Guarantees
//!
//! - Nothing happens between two watches: the next one begins with what came after the last one. Listing
//!   takes long where there are many requests, and whoever asks meanwhile waits.
//! - A request that could not be answered is read again with the next watch. So many of them that not all
//!   are remembered are found by listing.
//! - What is retried leaves room for what is new.
//! - One node leaves room for the others: a node that is taken over may ask as often as it likes.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use kube::core::WatchEvent;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, warn};

use super::{RETRY, Signer};
use crate::discovery::client::escaped;
use crate::identity::kubernetes::api::{ApiError, List, REQUESTS, SigningRequest, refused};
use crate::identity::kubernetes::roots::Standing;
use crate::telemetry;

/// Requests that are answered at the same time: each asks the API server a handful of questions.
const AT_ONCE: usize = 16;
/// So many of them for one node.
const OF_NODE: usize = 8;
/// The server ends a watch after so long, and then what could not be answered is tried again. Before that it
/// sends a bookmark, so that the next watch has a version to begin with that it has not forgotten.
const WATCH_S: u64 = 60;
/// What a watch may be silent for: it is asked to end before.
const SILENCE: Duration = Duration::from_secs(WATCH_S + 30);
/// Everything is listed again after so long, and up to a half more, whatever was missed: nothing should be.
const RELIST: Duration = Duration::from_secs(1800);
/// Requests in one answer. Whoever may make them may make each as large as the API lets an object be, 1.5 MB,
/// and an answer is in memory as text and read, beside those that are being answered.
const PAGE: usize = 8;
/// Names of requests that could not be answered, 253 bytes each at most, and of those whose node has its share already.
const LEFT: usize = 1000;

/// The requests that are being answered, and those that are to be.
pub(super) struct Desk<'a> {
    signer: &'a Arc<Signer>,
    standing: &'a watch::Receiver<Option<Standing>>,
    /// All that are addressed to this signer.
    query: String,
    answering: JoinSet<Answered>,
    /// Of those that are being answered, by their names.
    names: HashMap<String, Begun>,
    /// Names and nodes of those that came while their node had its share.
    waiting: VecDeque<(String, String)>,
    /// Some of those could not be remembered.
    lost: bool,
    /// The same of those that could not be answered.
    left: HashMap<String, String>,
    /// Of these, whose turn has come again.
    due: VecDeque<(String, String)>,
    /// Where to go on from; `None` to list first.
    version: Option<String>,
    list_at: Instant,
}

/// A request that is being answered.
struct Begun {
    node: String,
    /// Not for the first time.
    is_retry: bool,
}

/// What became of a request.
struct Answered {
    name: String,
    /// Whether nobody waits for it any more.
    is_done: bool,
}

impl<'a> Desk<'a> {
    pub(super) fn new(
        signer: &'a Arc<Signer>,
        standing: &'a watch::Receiver<Option<Standing>>,
    ) -> Self {
        let name = escaped(&signer.settings.signer);
        Self {
            signer,
            standing,
            query: format!("{REQUESTS}?fieldSelector=spec.signerName%3D{name}"),
            answering: JoinSet::new(),
            names: HashMap::new(),
            waiting: VecDeque::new(),
            lost: false,
            left: HashMap::new(),
            due: VecDeque::new(),
            version: None,
            list_at: Instant::now(),
        }
    }

    /// Has every request answered, for ever.
    pub(super) async fn follow(mut self) {
        loop {
            let began = Instant::now();
            let followed = self.follow_once().await;
            match &followed {
                Ok(()) => {}
                Err(error) if error.is_expired() => {
                    debug!("the API server has forgotten our version: listing requests again");
                }
                Err(error) => {
                    warn!(error = telemetry::chain(error), "requests are not seen; trying again");
                }
            }
            // Whatever a server does, it is not asked in a circle.
            if followed.is_err() || began.elapsed() < RETRY {
                sleep(RETRY.mul_f32(1.0 + fastrand::f32())).await;
            }
        }
    }

    /// What has come since the last time, and then what comes, until the server ends it. After a failure
    /// everything is listed again.
    async fn follow_once(&mut self) -> Result<(), ApiError> {
        while let Some(answered) = self.answering.try_join_next() {
            self.done(answered);
        }
        let version = self.version.take().filter(|_| Instant::now() < self.list_at);
        let mut version = match version {
            Some(version) => version,
            None => match self.list().await? {
                Some(version) => version,
                None => return Ok(()),
            },
        };
        self.due.extend(self.left.drain());
        let path = format!(
            "{}&watch=1&allowWatchBookmarks=true&resourceVersion={}&timeoutSeconds={WATCH_S}",
            self.query,
            escaped(&version)
        );
        let mut events = std::pin::pin!(self.signer.api.watch::<SigningRequest>(&path).await?);
        loop {
            self.go_on();
            let event = tokio::select! {
                event = timeout(SILENCE, events.next()) => event,
                Some(answered) = self.answering.join_next() => {
                    self.done(answered);
                    continue;
                }
            };
            let event = match event {
                Ok(Some(event)) => event?,
                Ok(None) | Err(_) => break,
            };
            let (seen, request) = match event {
                WatchEvent::Added(request) | WatchEvent::Modified(request) => {
                    (request.metadata.resource_version.clone(), Some(request))
                }
                WatchEvent::Deleted(request) => (request.metadata.resource_version, None),
                WatchEvent::Bookmark(mark) => (Some(mark.metadata.resource_version), None),
                WatchEvent::Error(status) => {
                    return Err(refused("watch", &path, kube::Error::Api(status)));
                }
            };
            version = seen.unwrap_or(version);
            if let Some(request) = request {
                self.take(request).await;
            }
        }
        self.version = Some(version);
        Ok(())
    }

    /// Takes all requests, and returns their version; `None` if the server knows of none.
    async fn list(&mut self) -> Result<Option<String>, ApiError> {
        // They come again.
        self.left.clear();
        self.due.clear();
        self.waiting.clear();
        self.lost = false;
        // Before the first page: what is lost track of meanwhile brings it forward.
        self.list_at = Instant::now() + RELIST.mul_f32(1.0 + fastrand::f32() / 2.0);
        let mut next = String::new();
        loop {
            let path = format!("{}&limit={PAGE}&continue={}", self.query, escaped(&next));
            let list = self.signer.api.get::<List<SigningRequest>>(&path).await?;
            let Some(list) = list else { return Ok(None) };
            for request in list.items {
                self.take(request).await;
            }
            next = list.metadata.next;
            if next.is_empty() {
                return Ok(Some(list.metadata.resource_version));
            }
        }
    }

    async fn take(&mut self, request: SigningRequest) {
        // Whose it is the field selector has said already, if the server honours it.
        let name = request.name();
        let is_known =
            self.names.contains_key(name) || self.waiting.iter().any(|(waits, _)| waits == name);
        if !self.signer.is_to_answer(&request) || is_known {
            return;
        }
        while let Some(answered) = self.answering.try_join_next() {
            self.done(answered);
        }
        let node = request.node().to_owned();
        if !self.has_place(&node) {
            return self.keep_waiting(name.to_owned(), node);
        }
        while self.answering.len() >= AT_ONCE {
            if let Some(answered) = self.answering.join_next().await {
                self.done(answered);
            }
        }
        let begun = Begun { node, is_retry: false };
        self.begin(request.name().to_owned(), begun, Some(request));
    }

    /// Whether this node may have another one answered.
    fn has_place(&self, node: &str) -> bool {
        self.names.values().filter(|begun| begun.node == node).count() < OF_NODE
    }

    /// Remembers a request whose node has its share. Past what can be remembered the node that has most of them loses its
    /// last one, which is found by listing when the others are begun.
    fn keep_waiting(&mut self, name: String, node: String) {
        self.waiting.push_back((name, node));
        if self.waiting.len() <= LEFT {
            return;
        }
        self.lost = true;
        let mut of_nodes: HashMap<&str, usize> = HashMap::new();
        for (_, node) in &self.waiting {
            *of_nodes.entry(node).or_default() += 1;
        }
        let most = of_nodes.into_iter().max_by_key(|(_, number)| *number).map(|(node, _)| node);
        let at = self.waiting.iter().rposition(|(_, node)| Some(&**node) == most);
        at.and_then(|at| self.waiting.remove(at));
    }

    /// Begins with what is due again, and with what has waited for its node's turn.
    fn go_on(&mut self) {
        let retries = |desk: &Self| desk.names.values().filter(|begun| begun.is_retry).count();
        while self.answering.len() < AT_ONCE
            && retries(self) < AT_ONCE / 2
            && let Some(at) = self.due.iter().position(|(_, node)| self.has_place(node))
            && let Some((name, node)) = self.due.remove(at)
        {
            self.begin(name, Begun { node, is_retry: true }, None);
        }
        while self.answering.len() < AT_ONCE
            && let Some(at) = self.waiting.iter().position(|(_, node)| self.has_place(node))
            && let Some((name, node)) = self.waiting.remove(at)
        {
            self.begin(name, Begun { node, is_retry: false }, None);
        }
        if self.lost && self.waiting.is_empty() {
            self.lost = false;
            self.list_at = Instant::now();
        }
    }

    /// Has a request answered, which is read first if it is only known by name.
    fn begin(&mut self, name: String, begun: Begun, request: Option<SigningRequest>) {
        let Some(Standing { authority, .. }) = self.standing.borrow().clone() else { return };
        if self.names.contains_key(&name) {
            return;
        }
        self.names.insert(name.clone(), begun);
        let signer = Arc::clone(self.signer);
        self.answering.spawn(async move {
            let is_done = match request {
                Some(request) => signer.answer_one(request, &authority).await,
                None => signer.answer_again(&name, &authority).await,
            };
            Answered { name, is_done }
        });
    }

    fn done(&mut self, answered: Result<Answered, JoinError>) {
        match answered {
            Ok(Answered { name, is_done }) => {
                let node = self.names.remove(&name).map(|begun| begun.node).unwrap_or_default();
                if is_done {
                    return;
                }
                if self.left.len() + self.due.len() < LEFT {
                    self.left.insert(name, node);
                } else {
                    self.list_at = Instant::now();
                }
            }
            Err(error) => {
                warn!(%error, "an answer panicked");
                // Whose it was is not told. Of two that answer the same request one does.
                self.names.clear();
                self.list_at = Instant::now();
            }
        }
    }
}
