//! `details`: facts about the one book.

use hyper::{Method, StatusCode};
use serde_json::json;

use crate::call::{Call, Reply, error, healthy, json};

/// Answers `/health` and `/details/{id}`.
pub(crate) fn answer(call: &Call) -> Reply {
    match (&call.method, call.segments().as_slice()) {
        (&Method::GET, ["health"]) => healthy("Details"),
        (&Method::GET, ["details", id]) => match id.parse::<u64>() {
            Ok(id) => json(
                StatusCode::OK,
                &json!({
                    "id": id,
                    "author": "William Shakespeare",
                    "year": 1595,
                    "type": "paperback",
                    "pages": 200,
                    "publisher": "PublisherA",
                    "language": "English",
                    "ISBN-10": "1234567890",
                    "ISBN-13": "123-1234567890",
                }),
            ),
            Err(_not_a_number) => {
                error(StatusCode::BAD_REQUEST, "please provide numeric product id")
            }
        },
        _ => error(StatusCode::NOT_FOUND, "not found"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::call::body_of;

    #[tokio::test]
    async fn a_book_has_its_facts() {
        let reply = answer(&Call::get("/details/0"));
        assert_eq!(reply.status(), StatusCode::OK);
        let book: Value = serde_json::from_slice(&body_of(reply).await).unwrap();
        assert_eq!(book["id"], 0);
        assert_eq!(book["author"], "William Shakespeare");
        for key in ["year", "type", "pages", "publisher", "language", "ISBN-10", "ISBN-13"] {
            assert!(!book[key].is_null(), "{key}");
        }
    }

    #[test]
    fn an_id_that_is_no_number_is_a_bad_request() {
        assert_eq!(answer(&Call::get("/details/x")).status(), StatusCode::BAD_REQUEST);
        assert_eq!(answer(&Call::get("/elsewhere")).status(), StatusCode::NOT_FOUND);
        assert_eq!(answer(&Call::get("/health")).status(), StatusCode::OK);
    }
}
