//! When a server that refuses is asked again.

use tokio::time::Instant;

use super::*;
use crate::discovery::cluster::feed::follow;
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
