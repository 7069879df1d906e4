//! `ratings`: how many stars each reviewer gave.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use hyper::{Method, StatusCode};
use serde_json::{Map, Value, json};

use crate::call::{Call, Reply, error, healthy, json};

/// Products whose ratings somebody set, so that a test that posts forever does not grow us.
const LIMIT_PRODUCTS: usize = 1024;

/// The service, with the ratings that were posted to it.
#[derive(Debug, Default)]
pub(crate) struct Ratings {
    posted: Mutex<BTreeMap<u64, Map<String, Value>>>,
}

impl Ratings {
    /// Answers `/health`, `GET /ratings/{id}`, and `POST /ratings/{id}`, which replaces them.
    pub(crate) fn answer(&self, call: &Call) -> Reply {
        match (&call.method, call.segments().as_slice()) {
            (&Method::GET, ["health"]) => healthy("Ratings"),
            (method @ (&Method::GET | &Method::POST), ["ratings", id]) => {
                let Ok(id) = id.parse() else {
                    return error(StatusCode::BAD_REQUEST, "please provide numeric product ID");
                };
                if method == Method::POST { self.post(id, &call.body) } else { self.show(id) }
            }
            _ => error(StatusCode::NOT_FOUND, "not found"),
        }
    }

    fn show(&self, id: u64) -> Reply {
        let posted = self.posted.lock().unwrap_or_else(PoisonError::into_inner);
        let ratings = posted.get(&id).map_or_else(
            || json!({ "Reviewer1": 5, "Reviewer2": 4 }),
            |ratings| Value::Object(ratings.clone()),
        );
        json(StatusCode::OK, &json!({ "id": id, "ratings": ratings }))
    }

    fn post(&self, id: u64, body: &[u8]) -> Reply {
        let Ok(Value::Object(ratings)) = serde_json::from_slice(body) else {
            return error(StatusCode::BAD_REQUEST, "please provide valid ratings JSON");
        };
        let mut posted = self.posted.lock().unwrap_or_else(PoisonError::into_inner);
        if posted.len() >= LIMIT_PRODUCTS && !posted.contains_key(&id) {
            return error(StatusCode::INSUFFICIENT_STORAGE, "too many products");
        }
        posted.insert(id, ratings);
        drop(posted);
        self.show(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::body_of;

    async fn stars(service: &Ratings, path: &str) -> Value {
        let reply = service.answer(&Call::get(path));
        assert_eq!(reply.status(), StatusCode::OK);
        serde_json::from_slice(&body_of(reply).await).unwrap()
    }

    #[tokio::test]
    async fn ratings_are_five_and_four_until_somebody_posts_others() {
        let service = Ratings::default();
        let expected = json!({ "id": 0, "ratings": { "Reviewer1": 5, "Reviewer2": 4 } });
        assert_eq!(stars(&service, "/ratings/0").await, expected);

        let post = Call::get("/ratings/0").post(r#"{"Reviewer1":1,"Reviewer2":2}"#);
        assert_eq!(service.answer(&post).status(), StatusCode::OK);
        assert_eq!(stars(&service, "/ratings/0").await["ratings"]["Reviewer1"], 1);
        assert_eq!(stars(&service, "/ratings/1").await["ratings"]["Reviewer1"], 5);
    }

    #[test]
    fn nonsense_is_refused() {
        let service = Ratings::default();
        let status = |call: Call| service.answer(&call).status();
        assert_eq!(status(Call::get("/ratings/x")), StatusCode::BAD_REQUEST);
        assert_eq!(status(Call::get("/ratings/0").post("[]")), StatusCode::BAD_REQUEST);
        assert_eq!(status(Call::get("/stars")), StatusCode::NOT_FOUND);
    }
}
