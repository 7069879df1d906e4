//! One list of the Kubernetes API, followed: list, then watch, and again from where it ended.
//!
//! The API's own rules ("Efficient detection of changes",
//! <https://kubernetes.io/docs/reference/using-api/api-concepts/>): a list has a version, a watch goes on
//! from one, and a version that is too old is answered with 410, after which everything is listed again.
//!
//! # Guarantees
//!
//! - Whatever the API server does, the last state stays with the reader: a failure is a wait, never an
//!   empty list.
//! - A watch that falls silent for longer than bookmarks take is given up: a connection may be dead
//!   without either end knowing. Where the next one is answered and silent too, everything is listed again: a server
//!   whose state was set back (etcd restored from a backup) tells nothing until it is past the version that it is
//!   asked from, which may take hours (<https://github.com/kubernetes/kubernetes/issues/107457>).
//! - A version that a server refuses [`REFUSED`] times in a row is not asked from again.
//! - Waits double and differ between agents, so that a server that comes back is not hit by all at once. What
//!   ends a watch that has worked for a while is no failure in a row, however often it does.
//! - A server that says when to ask again is not asked before, within [`LONGEST_WAIT`].

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use http::HeaderValue;
use http::header::ACCEPT;
use kube::Client;
use kube::core::{Status, WatchEvent};
use mesh_core::backoff::Backoff;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, warn};

use crate::discovery::client::escaped;
use crate::discovery::kube::{EndpointSlice, Namespace, Node, ObjectMeta, Pod, Service};
use crate::discovery::objects::{Kind, Object, ObjectKey};

/// Objects asked for at once: a list of 100,000 pods is not one answer.
const PAGE: usize = 500;
/// The same where one is searched for: answers of many searches are in memory at once.
const SEARCH_PAGE: usize = 100;
/// Objects that a search looks at. Kubernetes is made for 3,000 pods of a namespace
/// (<https://github.com/kubernetes/community/blob/master/sig-scalability/configs-and-limits/thresholds.md>).
const MOST_SEARCHED: usize = 5000;
/// The server ends a watch after this many seconds, and up to a half more: agents that began together
/// must not ask again together.
const WATCH_S: u64 = 240;
/// Bookmarks come about every minute (apiserver's `bookmarkFrequency`).
const SILENCE: Duration = Duration::from_secs(180);
/// A page that takes longer is not coming.
const LIST_LIMIT: Duration = Duration::from_secs(60);
/// One object that a connection waits for, or a page of a search for it.
const READ_LIMIT: Duration = Duration::from_secs(3);
/// So often in a row may a server refuse, but for being overloaded or broken, to go on from a version.
const REFUSED: u32 = 3;
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// Also of what a server asks for: whatever it says, its return is noticed.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A watch that was open for so long has worked: something that resets idle ones must not make waits grow.
const WORKED: Duration = Duration::from_secs(5);
/// A server that has forgotten versions has forgotten everybody's: lists are spread over so long.
pub(super) const EXPIRED_WAIT: Duration = Duration::from_secs(3);

/// News of one kind.
#[derive(Debug)]
pub(super) struct News {
    /// Of what.
    pub(super) kind: Kind,
    /// What happened.
    pub(super) what: What,
}

/// What happened to the objects of a kind.
#[derive(Debug)]
pub(super) enum What {
    /// These are all of them.
    All(Vec<Object>),
    /// One is new, or another than before.
    Is(Object),
    /// One is gone.
    Gone(ObjectKey),
    /// Nothing else happened until now.
    Current,
    /// The server can be asked again; what happened meanwhile is still to come.
    Answered,
    /// The server cannot be asked, for this reason.
    Failing(String),
}

/// A kind that can be followed.
pub(super) trait Followed: Clone + DeserializeOwned + Send + 'static {
    const KIND: Kind;
    /// Below the server's address.
    const PATH: &'static str;
    fn meta(&mut self) -> &mut ObjectMeta;
    fn into_object(self) -> Object;
}

macro_rules! followed {
    ($($kind:ident $path:literal)*) => {$(
        impl Followed for $kind {
            const KIND: Kind = Kind::$kind;
            const PATH: &'static str = $path;

            fn meta(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }

            fn into_object(self) -> Object {
                Object::$kind(Arc::new(self))
            }
        }
    )*};
}

followed! {
    Namespace "/api/v1/namespaces"
    Node "/api/v1/nodes"
    Pod "/api/v1/pods"
    Service "/api/v1/services"
    EndpointSlice "/apis/discovery.k8s.io/v1/endpointslices"
}

#[derive(Deserialize)]
#[serde(bound = "T: DeserializeOwned")]
pub(super) struct List<T> {
    #[serde(default)]
    metadata: ListMeta,
    pub(super) items: Vec<T>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMeta {
    resource_version: Option<String>,
    #[serde(rename = "continue")]
    next: Option<String>,
}

/// Why a list or a watch ended.
pub(super) enum Ended {
    /// The version that it went on from is not kept any more.
    Expired,
    /// As the server had said.
    InTime,
    /// Something failed, and is not to be tried again before so long.
    Failed(String, Duration),
    /// Nobody reads any more.
    Unread,
}

impl Ended {
    fn silent(why: &str) -> Self {
        Self::Failed(why.into(), Duration::ZERO)
    }
}

/// Follows all objects of a kind that `selector` (such as `fieldSelector=…`) lets through, for ever.
pub(super) async fn follow<T: Followed>(
    client: Client,
    selector: String,
    news: mpsc::Sender<News>,
) {
    let mut feed =
        Feed { client, selector, news, version: None, watching: None, silences: 0, refusals: 0 };
    let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
    loop {
        let began = Instant::now();
        match feed.go_on::<T>().await {
            Ended::Unread => return,
            Ended::InTime => {}
            Ended::Expired => {
                debug!(kind = ?T::KIND, "the API server has forgotten our version: listing again");
                feed.version = None;
                sleep(EXPIRED_WAIT.mul_f32(fastrand::f32())).await;
            }
            Ended::Failed(why, asked) => {
                let has_worked = feed.watching.is_some_and(|since| since.elapsed() >= WORKED);
                if has_worked || began.elapsed() > LONGEST_WAIT {
                    backoff.succeeded();
                }
                let now = Instant::now().into_std();
                backoff.failed_for_at_least(now, asked, |n| fastrand::u32(0..n));
                if backoff.failures() == 1 {
                    warn!(kind = ?T::KIND, error = why, "the API server cannot be followed; the last state holds");
                }
                if feed.tell::<T>(What::Failing(why)).await.is_err() {
                    return;
                }
                let wait = backoff.wait(Instant::now().into_std());
                sleep(wait.unwrap_or_default()).await;
                continue;
            }
        }
        backoff.succeeded();
        // Whatever a server does, it is not asked in a circle.
        if began.elapsed() < FIRST_WAIT {
            sleep(FIRST_WAIT.mul_f32(0.5 + fastrand::f32() / 2.0)).await;
        }
    }
}

struct Feed {
    client: Client,
    selector: String,
    news: mpsc::Sender<News>,
    /// Where to go on from; `None` to list first.
    version: Option<String>,
    /// When the last watch was answered; `None` if the server was not asked for one, or refused it.
    watching: Option<Instant>,
    /// How many watches in a row were answered, and told nothing until they were given up.
    silences: u32,
    /// How many in a row were refused.
    refusals: u32,
}

impl Feed {
    async fn go_on<T: Followed>(&mut self) -> Ended {
        self.watching = None;
        let version = match self.version.take() {
            Some(version) => version,
            None => match self.list::<T>().await {
                Ok((version, objects)) => {
                    if self.tell::<T>(What::All(objects)).await.is_err() {
                        return Ended::Unread;
                    }
                    (self.silences, self.refusals) = (0, 0);
                    version
                }
                Err(ended) => return ended,
            },
        };
        self.watch::<T>(version).await
    }

    async fn list<T: Followed>(&self) -> Result<(String, Vec<Object>), Ended> {
        let mut objects = Vec::new();
        let take = |page: Vec<T>| objects.extend(page.into_iter().map(|item| taken(item).0));
        let what = (T::PATH, &*self.selector, Form::Whole);
        let version = pages(&self.client, what, take).await.map_err(ended)?;
        Ok((version, objects))
    }

    /// Leaves in `version` where to go on.
    async fn watch<T: Followed>(&mut self, version: String) -> Ended {
        let seconds = WATCH_S + fastrand::u64(0..WATCH_S / 2);
        let query = format!(
            "watch=1&allowWatchBookmarks=true&timeoutSeconds={seconds}&resourceVersion={}",
            escaped(&version)
        );
        self.version = Some(version);
        let request = match get(T::PATH, &query, &self.selector) {
            Ok(request) => request,
            Err(error) => return ended(error),
        };
        let asked = timeout(SILENCE, self.client.request_events::<T>(request)).await;
        let events = match asked {
            Err(_elapsed) => return Ended::silent("the watch was not answered"),
            Ok(Err(error)) => {
                self.refusals += u32::from(is_refusal(&error));
                if self.refusals >= REFUSED {
                    self.version = None;
                }
                return ended(error);
            }
            Ok(Ok(events)) => events,
        };
        self.refusals = 0;
        self.watching = Some(Instant::now());
        if self.tell::<T>(What::Answered).await.is_err() {
            return Ended::Unread;
        }
        let mut events = std::pin::pin!(events);
        loop {
            let event = match timeout(SILENCE, events.next()).await {
                Err(_elapsed) => {
                    self.silences += 1;
                    return match self.silences {
                        1 => Ended::silent("the watch has fallen silent"),
                        _ => Ended::Expired,
                    };
                }
                Ok(None) => return Ended::InTime,
                Ok(Some(Err(error))) => return ended(error),
                Ok(Some(Ok(event))) => event,
            };
            self.silences = 0;
            let (version, what) = match happened(event) {
                Ok(happened) => happened,
                Err(ended) => return ended,
            };
            if version.is_some() {
                self.version = version;
            }
            if self.tell::<T>(what).await.is_err() {
                return Ended::Unread;
            }
        }
    }

    async fn tell<T: Followed>(&self, what: What) -> Result<(), mpsc::error::SendError<News>> {
        self.news.send(News { kind: T::KIND, what }).await
    }
}

/// What an event of a watch tells, and the version from which to go on.
pub(super) fn happened<T: Followed>(event: WatchEvent<T>) -> Result<(Option<String>, What), Ended> {
    Ok(match event {
        WatchEvent::Added(item) | WatchEvent::Modified(item) => {
            let (object, version) = taken(item);
            (version, What::Is(object))
        }
        WatchEvent::Deleted(item) => {
            let (object, version) = taken(item);
            (version, What::Gone(object.key()))
        }
        WatchEvent::Bookmark(mark) => (Some(mark.metadata.resource_version), What::Current),
        WatchEvent::Error(status) if status.code == 410 => return Err(Ended::Expired),
        WatchEvent::Error(status) => {
            return Err(Ended::Failed(status.message.clone(), not_before(&status)));
        }
    })
}

/// What of an object is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Form {
    Whole,
    /// Where that is all that is read.
    Metadata,
}

const METADATA: HeaderValue =
    HeaderValue::from_static("application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1");

/// Gives `take` all that is at `path` and that `selector` lets through, page by page, and returns its version.
pub(super) async fn pages<T: DeserializeOwned>(
    client: &Client,
    (path, selector, form): (&str, &str, Form),
    mut take: impl FnMut(Vec<T>),
) -> Result<String, kube::Error> {
    let mut from: Option<String> = None;
    loop {
        let what = (path, selector, form);
        let list = page::<T>(client, what, from.as_deref(), PAGE, LIST_LIMIT).await?;
        take(list.items);
        from = list.metadata.next;
        if from.is_none() {
            return Ok(list.metadata.resource_version.unwrap_or_default());
        }
    }
}

/// What came of a search.
#[derive(Debug)]
pub(super) enum Searched {
    /// These, of one page.
    Found(Vec<Object>),
    /// There is none.
    Nothing,
    /// There are more than are looked at, and it is none of the first.
    TooMany,
}

/// Looks for what `is_it` is true of among what is at `path` and `selector` lets through: page by page, no
/// further than to the page that has it, and keeps nothing else.
pub(super) async fn search<T: Followed>(
    client: &Client,
    path: &str,
    selector: &str,
    is_it: impl Fn(&Object) -> bool,
) -> Result<Searched, String> {
    let mut from: Option<String> = None;
    for _ in 0..MOST_SEARCHED / SEARCH_PAGE {
        let from_here = from.as_deref();
        let what = (path, selector, Form::Whole);
        let list = page::<T>(client, what, from_here, SEARCH_PAGE, READ_LIMIT).await;
        let list = list.map_err(|error| crate::telemetry::chain(&error))?;
        let objects = list.items.into_iter().map(|item| taken(item).0);
        let found: Vec<Object> = objects.filter(&is_it).collect();
        if !found.is_empty() {
            return Ok(Searched::Found(found));
        }
        from = list.metadata.next;
        if from.is_none() {
            return Ok(Searched::Nothing);
        }
    }
    Ok(Searched::TooMany)
}

/// So `many` objects, `from` where the page before has ended.
async fn page<T: DeserializeOwned>(
    client: &Client,
    (path, selector, form): (&str, &str, Form),
    from: Option<&str>,
    many: usize,
    limit: Duration,
) -> Result<List<T>, kube::Error> {
    let mut query = format!("limit={many}");
    if let Some(from) = from {
        query.push_str("&continue=");
        query.push_str(&escaped(from));
    }
    let mut request = get(path, &query, selector)?;
    if let Form::Metadata = form {
        request.headers_mut().insert(ACCEPT, METADATA);
    }
    let asked = timeout(limit, client.request::<List<T>>(request)).await;
    let mut list = asked.unwrap_or_else(|_elapsed| {
        Err(kube::Error::Service(format!("no list within {limit:?}").into()))
    })?;
    list.metadata.next = list.metadata.next.filter(|next| !next.is_empty());
    Ok(list)
}

fn get(path: &str, query: &str, selector: &str) -> Result<http::Request<Vec<u8>>, kube::Error> {
    let and = if selector.is_empty() { "" } else { "&" };
    let uri = format!("{path}?{query}{and}{selector}");
    http::Request::get(uri).body(Vec::new()).map_err(kube::Error::HttpError)
}

/// The object at `path`, if there is one.
pub(super) async fn read<T: Followed>(
    client: &Client,
    path: &str,
) -> Result<Option<Object>, String> {
    match request::<T>(client, path.to_owned()).await {
        Ok(item) => Ok(Some(taken(item).0)),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        Err(error) => Err(crate::telemetry::chain(&error)),
    }
}

/// The few objects at `path` that `selector` lets through.
pub(super) async fn list<T: Followed>(
    client: &Client,
    path: &str,
    selector: &str,
) -> Result<Vec<Object>, String> {
    let list = request::<List<T>>(client, format!("{path}?{selector}")).await;
    let list = list.map_err(|error| crate::telemetry::chain(&error))?;
    Ok(list.items.into_iter().map(|item| taken(item).0).collect())
}

async fn request<T: DeserializeOwned>(client: &Client, uri: String) -> Result<T, kube::Error> {
    let request = http::Request::get(uri).body(Vec::new()).map_err(kube::Error::HttpError)?;
    let asked = timeout(READ_LIMIT, client.request::<T>(request)).await;
    asked.unwrap_or_else(|_elapsed| Err(kube::Error::Service("no answer in time".into())))
}

/// The object, and its version: which does not stay with it, or every heartbeat were a change.
pub(super) fn taken<T: Followed>(mut item: T) -> (Object, Option<String>) {
    let version = item.meta().resource_version.take();
    (item.into_object(), version)
}

fn ended(error: kube::Error) -> Ended {
    match error {
        kube::Error::Api(status) if status.code == 410 => Ended::Expired,
        error => {
            let asked = match &error {
                kube::Error::Api(status) => not_before(status),
                _ => Duration::ZERO,
            };
            Ended::Failed(crate::telemetry::chain(&error), asked)
        }
    }
}

/// Whether the server says that it will not, and not that it cannot now or that nobody may: a list would be refused
/// as well then.
fn is_refusal(error: &kube::Error) -> bool {
    let kube::Error::Api(status) = error else { return false };
    (400..500).contains(&status.code) && ![401, 403, 408, 429].contains(&status.code)
}

/// How long the server asks not to be asked again. `discovery::client` has put its header there too.
fn not_before(status: &Status) -> Duration {
    let seconds = status.details.as_ref().map_or(0, |details| details.retry_after_seconds);
    Duration::from_secs(seconds.into())
}
