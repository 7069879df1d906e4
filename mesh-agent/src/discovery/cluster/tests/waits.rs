//! When a server that refuses is asked again.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper::{Request, Response};
use kube::Client;
use tokio::time::{Instant, sleep};

use super::api::{page, refuse};
use super::*;
use crate::discovery::cluster::feed::{What, follow};
use crate::discovery::kube::Node;

/// By its header, as an API server that is overloaded or shuts down does.
#[tokio::test]
async fn server_that_asks_to_be_left_alone_is_not_asked_before() {
    let api = Api::start().await;
    api.has(PODS, vec![pod("one", "10.0.0.1")]);
    {
        let mut held = api.held.lock().unwrap();
        held.down = Some(StatusCode::TOO_MANY_REQUESTS);
        held.retry_after = Some("1");
    }
    let mut followed = api.follow();
    until("pods to be asked for again", || api.asked("list pods") >= 2).await;
    let asked = api.asked_at("list pods");
    // After the first failure it would have been half a second at most.
    let wait = asked[1] - asked[0];
    assert!(wait >= Duration::from_secs(1), "{wait:?}");
    api.set_down(None);
    followed.until_pods(&["one"]).await;
}

/// How long an agent waits after each of its failures, if this is its randomness.
async fn waits(seed: u64) -> Vec<Duration> {
    fastrand::seed(seed);
    let asked: Arc<Mutex<Vec<Instant>>> = Arc::default();
    let asking = Arc::clone(&asked);
    let refusing = tower::service_fn(move |_request: Request<kube::client::Body>| {
        asking.lock().unwrap().push(Instant::now());
        std::future::ready(Ok::<_, Infallible>(refuse(StatusCode::TOO_MANY_REQUESTS)))
    });
    let (news, mut told) = mpsc::channel(1);
    let following = follow::<Node>(Client::new(refusing, "default"), String::new(), news);
    let task = tokio::spawn(following);
    for _failure in 0..6 {
        told.recv().await.unwrap();
    }
    task.abort();
    let asked = asked.lock().unwrap();
    asked.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

#[tokio::test(start_paused = true)]
async fn waits_double_and_differ_between_agents() {
    let (one, other) = (waits(1).await, waits(2).await);
    assert_ne!(one, other);
    for all in [one, other] {
        let mut most = Duration::from_millis(500);
        for wait in all {
            // A timer is late by up to a millisecond.
            let latest = most + Duration::from_millis(2);
            assert!(wait >= most / 2 && wait <= latest, "{wait:?} of {most:?}");
            most *= 2;
        }
    }
}

/// A watch that fails when it has lasted for so long.
fn resetting(lasting: Duration) -> Response<BoxBody<Bytes, Infallible>> {
    let reset = async move {
        sleep(lasting).await;
        let status = json!({
            "kind": "Status", "metadata": {}, "code": 500, "message": "reset", "reason": "Test",
            "status": "Failure",
        });
        let line = json!({"type": "ERROR", "object": status}).to_string() + "\n";
        Ok::<_, Infallible>(Frame::data(Bytes::from(line)))
    };
    Response::new(BodyExt::boxed(StreamBody::new(stream::once(reset))))
}

/// How long an agent waits after each of its watches, if they last for so long and then fail.
async fn waits_after_watches(lasting: Duration) -> Vec<Duration> {
    let asked: Arc<Mutex<Vec<Instant>>> = Arc::default();
    let asking = Arc::clone(&asked);
    let serving = tower::service_fn(move |request: Request<kube::client::Body>| {
        let is_watch = request.uri().query().unwrap_or_default().contains("watch=1");
        let answer = if is_watch {
            asking.lock().unwrap().push(Instant::now());
            resetting(lasting)
        } else {
            page(&[], &HashMap::new(), 1)
        };
        std::future::ready(Ok::<_, Infallible>(answer))
    });
    let (news, mut told) = mpsc::channel(1);
    let following = follow::<Node>(Client::new(serving, "default"), String::new(), news);
    let task = tokio::spawn(following);
    let mut failures = 0;
    while failures < 7 {
        failures += usize::from(matches!(told.recv().await.unwrap().what, What::Failing(_)));
    }
    task.abort();
    let asked = asked.lock().unwrap();
    asked.windows(2).map(|pair| pair[1] - pair[0] - lasting).collect()
}

/// As by a proxy that resets what is idle.
#[tokio::test(start_paused = true)]
async fn watch_that_has_worked_for_a_while_is_asked_for_again_soon_however_often_it_fails() {
    for wait in waits_after_watches(Duration::from_secs(20)).await {
        // Two timers are late by up to a millisecond each.
        assert!(wait <= Duration::from_millis(505), "{wait:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn waits_grow_for_watches_that_fail_at_once() {
    let waits = waits_after_watches(Duration::from_secs(1)).await;
    assert!(waits[5] >= Duration::from_secs(8), "{waits:?}");
}

/// How often an agent lists within so long, where each of its watches is answered like this.
async fn lists_within(
    time: Duration,
    watch: impl Fn() -> Response<BoxBody<Bytes, Infallible>> + Clone + Send + 'static,
) -> usize {
    let lists = Arc::new(AtomicUsize::new(0));
    let listing = Arc::clone(&lists);
    let serving = tower::service_fn(move |request: Request<kube::client::Body>| {
        let is_watch = request.uri().query().unwrap_or_default().contains("watch=1");
        let answer = if is_watch {
            watch()
        } else {
            listing.fetch_add(1, Ordering::Relaxed);
            page(&[], &HashMap::new(), 1)
        };
        std::future::ready(Ok::<_, Infallible>(answer))
    });
    let (news, mut told) = mpsc::channel(1);
    let following = follow::<Node>(Client::new(serving, "default"), String::new(), news);
    let reading = async { while told.recv().await.is_some() {} };
    tokio::select! {
        () = following => {}
        () = reading => {}
        () = sleep(time) => {}
    }
    lists.load(Ordering::Relaxed)
}

/// What a watch tells, at these times, and goes on.
fn telling(at: &'static [u64]) -> Response<BoxBody<Bytes, Infallible>> {
    let bookmark = json!({
        "type": "BOOKMARK",
        "object": {"kind": "Node", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}},
    });
    let line = Bytes::from(bookmark.to_string() + "\n");
    let told = stream::iter(at).then(move |at| {
        let line = line.clone();
        async move {
            sleep(Duration::from_secs(*at)).await;
            Ok::<_, Infallible>(Frame::data(line))
        }
    });
    Response::new(BodyExt::boxed(StreamBody::new(told.chain(stream::pending()))))
}

/// As by a server whose state was set back: of what is older than the version it tells nothing.
#[tokio::test(start_paused = true)]
async fn version_of_which_nothing_is_told_is_given_up() {
    let lists = lists_within(Duration::from_secs(400), || telling(&[])).await;
    assert_eq!(lists, 2, "after the second silence, of three minutes each");
    let lists = lists_within(Duration::from_secs(1000), || telling(&[60, 60])).await;
    assert_eq!(lists, 1, "connections that die and worked before");
}

#[tokio::test(start_paused = true)]
async fn version_that_is_refused_again_and_again_is_given_up() {
    for (status, gives_up) in [
        (StatusCode::BAD_REQUEST, true),
        (StatusCode::TOO_MANY_REQUESTS, false),
        (StatusCode::FORBIDDEN, false),
        (StatusCode::SERVICE_UNAVAILABLE, false),
    ] {
        let lists = lists_within(Duration::from_secs(120), move || refuse(status)).await;
        assert_eq!(lists > 1, gives_up, "{status}");
        assert!(lists < 20, "{status}: {lists}");
    }
}
