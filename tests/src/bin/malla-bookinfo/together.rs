//! The four services together, on ports of the loopback.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hyper::HeaderMap;
use serde_json::Value;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::backend::{Answer, Backend, Limits};
use crate::productpage::Productpage;
use crate::ratings::Ratings;
use crate::reviews::{Reviews, Version};
use crate::serve::{App, listen, serve};

/// Long enough for any answer over the loopback of a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// Running services; they end with the shop.
#[derive(Default)]
struct Shop {
    services: JoinSet<()>,
    stops: Vec<oneshot::Sender<()>>,
}

impl Shop {
    /// Starts `app` and says where it is.
    fn start(&mut self, name: &'static str, app: App) -> Backend {
        let listener = listen(0).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (stop, stopped) = oneshot::channel();
        self.stops.push(stop);
        self.services.spawn(serve(listener, app, async {
            stopped.await.unwrap();
        }));
        at(name, port)
    }

    /// Tells all services to stop and waits until they have.
    async fn stop(mut self) {
        for stop in self.stops {
            stop.send(()).unwrap();
        }
        while let Some(ended) = self.services.join_next().await {
            ended.unwrap();
        }
    }
}

fn at(name: &'static str, port: u16) -> Backend {
    let set = |key: &str| match key {
        "SERVICES_DOMAIN" => None,
        key if key.ends_with("_HOSTNAME") => Some("127.0.0.1".to_owned()),
        _ => Some(port.to_string()),
    };
    Backend::from_env(name, set).unwrap()
}

fn reviews(version: Version, ratings: Backend) -> App {
    let limits = Limits::default();
    App::Reviews(Reviews { version, pod: "reviews-0".to_owned(), cluster: None, ratings, limits })
}

async fn get(backend: &Backend, path: &str) -> Answer {
    backend.get(path, HeaderMap::new(), PATIENCE).await
}

/// A shop whose reviews are of `version`, and the place of its page.
fn shop(version: Version, limits: Limits) -> (Shop, Backend) {
    let mut shop = Shop::default();
    let ratings = shop.start("ratings", App::Ratings(Ratings::default()));
    let details = shop.start("details", App::Details);
    let reviews = shop.start("reviews", reviews(version, ratings.clone()));
    let front = Productpage::new(details, reviews, ratings, limits);
    let page = shop.start("productpage", App::Productpage(front));
    (shop, page)
}

#[tokio::test]
async fn a_page_has_details_and_reviews_with_red_stars() {
    let (shop, page) = shop(Version::V3, Limits::default());

    let answer = get(&page, "/productpage?u=normal").await;
    let text = answer.text();
    assert_eq!(answer.status(), 200, "{text}");
    assert!(text.contains("William Shakespeare"), "{text}");
    assert!(text.contains("color:red"), "{text}");
    assert_eq!(text.matches("glyphicon-star\"").count(), 9, "{text}");

    let reviews = get(&page, "/api/v1/products/0/reviews").await.json().unwrap();
    assert_eq!(reviews["id"], "0");
    assert_eq!(reviews["podname"], "reviews-0");
    assert_eq!(reviews["clustername"], "null");
    assert_eq!(reviews["reviews"][0]["rating"]["stars"], 5);
    let ratings = get(&page, "/api/v1/products/0/ratings").await.json().unwrap();
    assert_eq!(ratings["ratings"]["Reviewer2"], 4);
    assert_eq!(get(&page, "/api/v1/products/0").await.json().unwrap()["year"], 1595);

    shop.stop().await;
    assert!(get(&page, "/health").await.json().is_none(), "still answers after its stop");
}

#[tokio::test]
async fn v1_has_no_stars() {
    let (shop, page) = shop(Version::V1, Limits::default());
    let reviews = get(&page, "/api/v1/products/0/reviews").await.json().unwrap();
    assert_eq!(reviews["reviews"].as_array().unwrap().len(), 2);
    assert_eq!(reviews["reviews"][0].get("rating"), None);
    shop.stop().await;
}

#[tokio::test]
async fn reviews_without_ratings_say_so_and_stand() {
    let mut shop = Shop::default();
    // Bound and closed again: nobody listens there.
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let reviews = shop.start("reviews", reviews(Version::V2, at("ratings", closed)));

    let found = get(&reviews, "/reviews/0").await.json().unwrap();
    let why = "Ratings service is currently unavailable";
    assert_eq!(found["reviews"][0]["rating"]["error"], Value::from(why));
    assert_eq!(found["reviews"][1]["rating"]["error"], Value::from(why));
    shop.stop().await;
}

#[tokio::test]
async fn reviews_that_never_answer_are_tried_twice_and_the_page_stands() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let tries = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&tries);
    let mut shop = Shop::default();
    shop.services.spawn(async move {
        for _ in 0..2 {
            let (mut stream, _) = silent.accept().await.unwrap();
            seen.fetch_add(1, Ordering::Relaxed);
            // Until the client gives up: its request is all that ever comes.
            stream.read_to_end(&mut Vec::new()).await.unwrap();
        }
    });
    let details = shop.start("details", App::Details);
    let limits = Limits { reviews: Duration::from_millis(100), ..Limits::default() };
    let front = Productpage::new(details, at("reviews", port), at("ratings", port), limits);
    let page = shop.start("productpage", App::Productpage(front));

    let text = get(&page, "/productpage").await.text();
    assert!(text.contains("William Shakespeare"), "{text}");
    assert!(text.contains("Sorry, product reviews are currently unavailable for this book."));
    assert_eq!(tries.load(Ordering::Relaxed), 2);
    shop.stop().await;
}

#[tokio::test]
async fn who_is_logged_in_and_what_is_traced_reaches_the_ratings() {
    let ratings = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = ratings.local_addr().unwrap().port();
    let mut shop = Shop::default();
    let details = shop.start("details", App::Details);
    let reviews = shop.start("reviews", reviews(Version::V3, at("ratings", port)));
    let front = Productpage::new(details, reviews, at("ratings", port), Limits::default());
    let page = shop.start("productpage", App::Productpage(front));

    let asked = tokio::spawn(async move {
        let (mut stream, _) = ratings.accept().await.unwrap();
        let mut request = vec![0; 4096];
        let length = stream.read(&mut request).await.unwrap();
        String::from_utf8(request[..length].to_vec()).unwrap().to_lowercase()
    });
    let mut headers = HeaderMap::new();
    headers.insert("cookie", "session=jason".parse().unwrap());
    headers.insert("x-request-id", "4711".parse().unwrap());
    headers.insert("traceparent", "00-11-22-01".parse().unwrap());
    page.get("/productpage", headers, PATIENCE).await;

    let request = asked.await.unwrap();
    for line in ["end-user: jason\r\n", "x-request-id: 4711\r\n", "traceparent: 00-11-22-01\r\n"] {
        assert!(request.contains(line), "{request}");
    }
    shop.stop().await;
}
