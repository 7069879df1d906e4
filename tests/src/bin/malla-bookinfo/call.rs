//! Requests and replies as plain values, so that what a service answers is tested without a socket.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Method, Response, StatusCode};
use serde_json::{Value, json};

/// A request whose body has arrived.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    /// The method.
    pub(crate) method: Method,
    /// The path without the query.
    pub(crate) path: String,
    /// The headers as they came.
    pub(crate) headers: HeaderMap,
    /// The body, bounded by `serve::BODY_LIMIT_BYTES`.
    pub(crate) body: Bytes,
}

impl Call {
    /// The path cut at its slashes: `/reviews/0` is `["reviews", "0"]`.
    pub(crate) fn segments(&self) -> Vec<&str> {
        self.path.split('/').filter(|part| !part.is_empty()).collect()
    }
}

/// What a service answers.
pub(crate) type Reply = Response<Full<Bytes>>;

/// A JSON reply.
pub(crate) fn json(status: StatusCode, value: &Value) -> Reply {
    reply(status, "application/json", value.to_string())
}

/// The answer of a health check, in the form that `service` has in the sample.
pub(crate) fn healthy(service: &str) -> Reply {
    json(StatusCode::OK, &json!({ "status": format!("{service} is healthy") }))
}

/// A reply that names what was wrong.
pub(crate) fn error(status: StatusCode, text: &str) -> Reply {
    json(status, &json!({ "error": text }))
}

/// A page for a browser.
pub(crate) fn html(text: String) -> Reply {
    reply(StatusCode::OK, "text/html; charset=utf-8", text)
}

/// A reply of any kind.
pub(crate) fn reply(status: StatusCode, content_type: &'static str, body: String) -> Reply {
    let mut reply = Response::new(Full::new(Bytes::from(body)));
    *reply.status_mut() = status;
    reply.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    reply
}

#[cfg(test)]
impl Call {
    /// A GET without headers.
    pub(crate) fn get(path: &str) -> Self {
        Self {
            method: Method::GET,
            path: path.to_owned(),
            headers: HeaderMap::new(),
            body: Bytes::new(),
        }
    }

    /// The same call with one more header.
    pub(crate) fn with(mut self, name: &'static str, value: &str) -> Self {
        self.headers.insert(name, value.parse().unwrap());
        self
    }

    /// The same call as a POST of `body`.
    pub(crate) fn post(mut self, body: &str) -> Self {
        self.method = Method::POST;
        self.body = Bytes::copy_from_slice(body.as_bytes());
        self
    }
}

/// The body of `reply`.
#[cfg(test)]
pub(crate) async fn body_of(reply: Reply) -> Bytes {
    use http_body_util::BodyExt as _;
    reply.into_body().collect().await.unwrap().to_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_cut_at_its_slashes() {
        assert_eq!(Call::get("/api/v1/products/0/").segments(), ["api", "v1", "products", "0"]);
        assert!(Call::get("/").segments().is_empty());
    }

    #[tokio::test]
    async fn an_error_is_json_with_its_text() {
        let reply = error(StatusCode::BAD_REQUEST, "why");
        assert_eq!(reply.status(), StatusCode::BAD_REQUEST);
        assert_eq!(reply.headers()[header::CONTENT_TYPE], "application/json");
        assert_eq!(body_of(reply).await, r#"{"error":"why"}"#);
    }
}
