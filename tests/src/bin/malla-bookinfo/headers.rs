//! What a service takes over from the request that it answers into the ones that it makes: who the
//! user is, and the ids that let a tracer join the calls.

use hyper::HeaderMap;
use hyper::header::{HeaderName, HeaderValue};

/// The header in which the logged-in user's name travels; routes match on it.
pub(crate) const END_USER: HeaderName = HeaderName::from_static("end-user");

/// Handed on unchanged: the user, the caller's credentials, and every tracing convention that the
/// sample knows (W3C Trace Context, B3 in both forms, OpenTracing, Datadog, Google).
const HANDED_ON: [&str; 21] = [
    "end-user",
    "user-agent",
    "authorization",
    "cookie",
    "jwt",
    "x-request-id",
    "traceparent",
    "tracestate",
    "b3",
    "x-b3-traceid",
    "x-b3-spanid",
    "x-b3-parentspanid",
    "x-b3-sampled",
    "x-b3-flags",
    "x-ot-span-context",
    "x-datadog-trace-id",
    "x-datadog-parent-id",
    "x-datadog-sampling-priority",
    "x-cloud-trace-context",
    "grpc-trace-bin",
    "sw8",
];

/// The headers for a call made because of a request with `incoming` headers.
pub(crate) fn hand_on(incoming: &HeaderMap) -> HeaderMap {
    HANDED_ON
        .iter()
        .filter_map(|name| Some((HeaderName::from_static(name), incoming.get(*name)?.clone())))
        .collect()
}

/// The user whom the session cookie names.
///
/// The cookie is the name itself, percent-encoded: it proves nothing, as the sample's login, which
/// takes any password, proves nothing.
pub(crate) fn session_user(incoming: &HeaderMap) -> Option<String> {
    let cookies = incoming.get("cookie")?.to_str().ok()?;
    let session = cookies.split(';').find_map(|pair| pair.trim().strip_prefix("session="))?;
    Some(percent_decode(session)).filter(|user| !user.is_empty())
}

/// The `Set-Cookie` value that starts a session of `user`, or ends it when there is none.
pub(crate) fn session_cookie(user: Option<&str>) -> HeaderValue {
    let text = match user {
        Some(user) => format!("session={}; Path=/; HttpOnly", percent_encode(user)),
        None => "session=; Path=/; HttpOnly; Max-Age=0".to_owned(),
    };
    #[expect(clippy::expect_used, reason = "percent-encoding leaves only visible ASCII")]
    HeaderValue::try_from(text).expect("a header value")
}

/// The value of `field` in a body of type `application/x-www-form-urlencoded`.
pub(crate) fn form_field(body: &[u8], field: &str) -> Option<String> {
    let body = str::from_utf8(body).ok()?;
    body.split('&').find_map(|pair| {
        let (name, value) = pair.split_once('=')?;
        (name == field).then(|| percent_decode(&value.replace('+', " ")))
    })
}

/// RFC 3986 section 2.1, for every byte outside the unreserved set.
fn percent_encode(text: &str) -> String {
    text.bytes().fold(String::new(), |mut encoded, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
        encoded
    })
}

/// The reverse; a broken escape stays as it is.
fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let escaped = bytes
            .get(at + 1..at + 3)
            .filter(|digits| byte == b'%' && digits.iter().all(u8::is_ascii_hexdigit))
            .and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok());
        decoded.push(escaped.unwrap_or(byte));
        at += if escaped.is_some() { 3 } else { 1 };
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Call;

    #[test]
    fn tracing_ids_and_the_user_are_handed_on_and_nothing_else() {
        let call = Call::get("/")
            .with("end-user", "jason")
            .with("x-request-id", "42")
            .with("traceparent", "00-a-b-01")
            .with("tracestate", "k=v")
            .with("b3", "0")
            .with("x-b3-traceid", "t")
            .with("accept", "text/html")
            .with("host", "productpage:9080");
        let handed_on = hand_on(&call.headers);
        let mut names: Vec<_> = handed_on.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(
            names,
            ["b3", "end-user", "traceparent", "tracestate", "x-b3-traceid", "x-request-id"]
        );
        assert_eq!(handed_on["end-user"], "jason");
    }

    #[test]
    fn any_name_survives_the_cookie() {
        for user in ["jason", "Jos\u{e9} 100%; a=b", "a\r\nset-cookie: x"] {
            let cookie = session_cookie(Some(user));
            let pair = cookie.to_str().unwrap().split(';').next().unwrap().to_owned();
            let call = Call::get("/").with("cookie", &format!("other=1; {pair}"));
            assert_eq!(session_user(&call.headers).as_deref(), Some(user));
        }
    }

    #[test]
    fn an_ended_session_names_nobody() {
        let call = Call::get("/").with("cookie", "session=");
        assert_eq!(session_user(&call.headers), None);
        assert!(session_cookie(None).to_str().unwrap().contains("Max-Age=0"));
    }

    #[test]
    fn a_form_field_is_decoded() {
        assert_eq!(form_field(b"username=a+b%21&passwd=x", "username").as_deref(), Some("a b!"));
        assert_eq!(form_field(b"passwd=x", "username"), None);
    }

    #[test]
    fn a_broken_escape_stays_as_it_is() {
        assert_eq!(percent_decode("100%"), "100%");
        assert_eq!(percent_decode("%+1%zz"), "%+1%zz");
    }
}
