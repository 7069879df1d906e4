//! `productpage`: the shop's front, for people (`/productpage`) and scripts (`/api/v1`).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use crate::backend::{Answer, Backend, Limits, until_good};
use crate::call::{Call, Reply, error, html, json, reply};
use crate::headers::{END_USER, form_field, hand_on, session_cookie, session_user};
use crate::page;

/// The one product there is.
const PRODUCT_ID: u64 = 0;

/// The service.
#[derive(Debug)]
pub(crate) struct Productpage {
    details: Backend,
    reviews: Backend,
    ratings: Backend,
    limits: Limits,
    results: Mutex<BTreeMap<(&'static str, u16), u64>>,
}

impl Productpage {
    /// A front for the three services behind it.
    pub(crate) fn new(
        details: Backend,
        reviews: Backend,
        ratings: Backend,
        limits: Limits,
    ) -> Self {
        Self { details, reviews, ratings, limits, results: Mutex::default() }
    }

    /// Answers the pages, the API, `/login` and `/logout`, `/health` and `/metrics`.
    pub(crate) async fn answer(&self, call: &Call) -> Reply {
        match (&call.method, call.segments().as_slice()) {
            (&Method::GET, [] | ["index.html"]) => html(page::index()),
            (&Method::GET, ["health"]) => {
                reply(StatusCode::OK, "text/plain", "Product page is healthy".to_owned())
            }
            (&Method::GET, ["metrics"]) => {
                reply(StatusCode::OK, "text/plain; version=0.0.4", self.metrics())
            }
            (&Method::GET, ["productpage"]) => self.page(call).await,
            (&Method::POST, ["login"]) => {
                let user = form_field(&call.body, "username").filter(|user| !user.is_empty());
                back(call, user.as_deref())
            }
            (&Method::GET, ["logout"]) => back(call, None),
            (&Method::GET, ["api", "v1", "products"]) => json(StatusCode::OK, &products()),
            (&Method::GET, ["api", "v1", "products", id, rest @ ..]) => match id.parse() {
                Ok(id) => self.api(id, rest, &call.headers).await,
                Err(_not_a_number) => {
                    error(StatusCode::BAD_REQUEST, "please provide numeric product id")
                }
            },
            _ => error(StatusCode::NOT_FOUND, "not found"),
        }
    }

    async fn page(&self, call: &Call) -> Reply {
        // One after the other, as the sample does: its page takes the sum of both.
        let details = self.ask_details(PRODUCT_ID, &call.headers).await;
        let reviews = self.ask_reviews(PRODUCT_ID, &call.headers).await;
        let user = session_user(&call.headers);
        html(page::product(user.as_deref(), details.json().as_ref(), reviews.json().as_ref()))
    }

    async fn api(&self, id: u64, rest: &[&str], incoming: &HeaderMap) -> Reply {
        let (answer, what) = match rest {
            [] => (self.ask_details(id, incoming).await, "details"),
            ["reviews"] => (self.ask_reviews(id, incoming).await, "reviews"),
            ["ratings"] => (self.ask_ratings(id, incoming).await, "ratings"),
            _ => return error(StatusCode::NOT_FOUND, "not found"),
        };
        match answer.json() {
            Some(found) => json(StatusCode::OK, &found),
            None => {
                // An answer with status 200 that is not JSON is no good answer either.
                let status = Some(answer.status()).filter(|status| *status != StatusCode::OK);
                error(status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), &page::unavailable(what))
            }
        }
    }

    async fn ask_details(&self, id: u64, incoming: &HeaderMap) -> Answer {
        self.ask(&self.details, id, incoming, self.limits.details).await
    }

    async fn ask_reviews(&self, id: u64, incoming: &HeaderMap) -> Answer {
        let ask = || self.ask(&self.reviews, id, incoming, self.limits.reviews);
        until_good(self.limits.reviews_tries, ask).await
    }

    async fn ask_ratings(&self, id: u64, incoming: &HeaderMap) -> Answer {
        self.ask(&self.ratings, id, incoming, self.limits.product_ratings).await
    }

    async fn ask(
        &self,
        backend: &Backend,
        id: u64,
        incoming: &HeaderMap,
        limit: Duration,
    ) -> Answer {
        let path = format!("/{}/{id}", backend.name);
        let answer = backend.get(&path, outgoing(incoming), limit).await;
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        *results.entry((backend.name, answer.status().as_u16())).or_default() += 1;
        answer
    }

    /// The sample's one counter, in the Prometheus text format.
    fn metrics(&self) -> String {
        let mut text = "# HELP request_result_total Results of requests\n\
                        # TYPE request_result_total counter\n"
            .to_owned();
        let results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        for ((app, code), count) in results.iter() {
            // Writing to a `String` cannot fail.
            let _always_ok = writeln!(
                text,
                "request_result_total{{destination_app=\"{app}\",response_code=\"{code}\"}} {count}"
            );
        }
        text
    }
}

/// The headers of a call to a backend: the session's user overrides the one that the request
/// names.
fn outgoing(incoming: &HeaderMap) -> HeaderMap {
    let mut headers = hand_on(incoming);
    if let Some(user) = session_user(incoming).and_then(|user| HeaderValue::try_from(user).ok()) {
        headers.insert(END_USER, user);
    }
    headers
}

/// Starts or ends the session and sends the browser back to where it was.
fn back(call: &Call, user: Option<&str>) -> Reply {
    let mut reply = reply(StatusCode::FOUND, "text/html; charset=utf-8", String::new());
    let to = call.headers.get(header::REFERER).cloned();
    let to = to.unwrap_or_else(|| HeaderValue::from_static("/productpage"));
    reply.headers_mut().insert(header::LOCATION, to);
    reply.headers_mut().insert(header::SET_COOKIE, session_cookie(user));
    reply
}

fn products() -> Value {
    json!([{
        "id": PRODUCT_ID,
        "title": page::TITLE,
        "descriptionHtml": page::DESCRIPTION,
    }])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::body_of;

    /// Nothing listens on port 1 of the loopback.
    fn alone() -> Productpage {
        let nowhere = |name: &str| match name {
            "DETAILS_HOSTNAME" | "REVIEWS_HOSTNAME" | "RATINGS_HOSTNAME" => {
                Some("127.0.0.1".to_owned())
            }
            _ => Some("1".to_owned()).filter(|_| name.ends_with("_PORT")),
        };
        let backend = |name| Backend::from_env(name, nowhere).unwrap();
        let backends = (backend("details"), backend("reviews"), backend("ratings"));
        Productpage::new(backends.0, backends.1, backends.2, Limits::default())
    }

    #[tokio::test]
    async fn login_sets_the_session_and_goes_back() {
        let login = Call::get("/login").post("username=jason&passwd=x");
        let reply = alone().answer(&login.with("referer", "/productpage?u=test")).await;
        assert_eq!(reply.status(), StatusCode::FOUND);
        assert_eq!(reply.headers()[header::LOCATION], "/productpage?u=test");
        assert_eq!(reply.headers()[header::SET_COOKIE], "session=jason; Path=/; HttpOnly");

        let reply = alone().answer(&Call::get("/logout")).await;
        assert_eq!(reply.headers()[header::LOCATION], "/productpage");
        assert!(reply.headers()[header::SET_COOKIE].to_str().unwrap().starts_with("session=;"));
    }

    #[test]
    fn the_session_is_the_end_user() {
        let call = Call::get("/").with("cookie", "session=jason").with("end-user", "mallory");
        assert_eq!(outgoing(&call.headers)[END_USER], "jason");
        let call = Call::get("/").with("end-user", "tester");
        assert_eq!(outgoing(&call.headers)[END_USER], "tester");
        assert!(outgoing(&Call::get("/").headers).is_empty());
    }

    #[tokio::test]
    async fn the_product_list_has_the_one_book() {
        let reply = alone().answer(&Call::get("/api/v1/products")).await;
        let list: Value = serde_json::from_slice(&body_of(reply).await).unwrap();
        assert_eq!(list[0]["id"], 0);
        assert_eq!(list[0]["title"], "The Comedy of Errors");
        assert!(list[0]["descriptionHtml"].is_string());
    }

    #[tokio::test]
    async fn without_backends_the_page_stands_and_the_api_says_what_is_missing() {
        let shop = alone();
        let reply = shop.answer(&Call::get("/productpage")).await;
        assert_eq!(reply.status(), StatusCode::OK);
        let text = String::from_utf8(body_of(reply).await.to_vec()).unwrap();
        assert!(text.contains("Error fetching product details!"));
        assert!(text.contains("Sorry, product reviews are currently unavailable for this book."));

        for (path, what) in [("", "details"), ("/reviews", "reviews"), ("/ratings", "ratings")] {
            let reply = shop.answer(&Call::get(&format!("/api/v1/products/0{path}"))).await;
            assert_eq!(reply.status(), StatusCode::INTERNAL_SERVER_ERROR);
            let expected =
                format!("Sorry, product {what} are currently unavailable for this book.");
            let body: Value = serde_json::from_slice(&body_of(reply).await).unwrap();
            assert_eq!(body["error"], expected);
        }

        // The page and the API asked once each; reviews are tried twice.
        let metrics = shop.metrics();
        for line in [
            "request_result_total{destination_app=\"details\",response_code=\"500\"} 2\n",
            "request_result_total{destination_app=\"reviews\",response_code=\"500\"} 4\n",
            "request_result_total{destination_app=\"ratings\",response_code=\"500\"} 1\n",
        ] {
            assert!(metrics.contains(line), "{metrics}");
        }
    }
}
