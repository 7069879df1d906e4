//! Manifests as the fuzzer writes them, and refusals of the API.

use std::sync::Arc;

use http::Response;
use http::header::RETRY_AFTER;
use http_body_util::BodyExt as _;
use kube::core::response::Status;
use mesh_core::spiffe::TrustDomain;

use super::client::{boxed, with_retry_after};
use super::manifest::{self, Format};
use super::objects::Objects;
use super::translate::{Context, NetnsFrom, translate};

/// Any text is read or refused as YAML and as JSON, always with the same result, and what is read
/// becomes the same snapshot in whatever order.
pub fn manifests(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    for format in [Format::Yaml, Format::Json] {
        let read = manifest::parse(text, format);
        assert_eq!(read, manifest::parse(text, format), "read twice");
        let Ok(read) = read else { continue };
        let (mut forth, mut back) = (Objects::default(), Objects::default());
        for (_, object) in &read.objects {
            if !forth.contains(&object.key()) {
                forth.insert(object.clone());
            }
        }
        // Of several with one key the first counts, as in a directory.
        read.objects.iter().rev().for_each(|(_, object)| drop(back.insert(object.clone())));
        for netns in [NetnsFrom::Annotation, NetnsFrom::Processes] {
            let Ok(trust_domain) = TrustDomain::new("cluster.local") else { return };
            let (node, pod_cidrs) = (Arc::from("a"), Vec::new());
            let context = Context { node, trust_domain, tunnel_port: 15019, netns, pod_cidrs };
            let (snapshot, problems) = translate(&forth, &context, 1);
            let (other, others) = translate(&back, &context, 1);
            assert!(snapshot.same_state(&other), "the order of objects counts");
            assert_eq!(problems, others, "the order of objects counts");
        }
    }
}

/// Any answer (its status in two bytes, a line that says when to ask again, and its body) stays as it is, or says that
/// in its body where the API's own answers do.
pub fn refusals(input: &[u8]) {
    let Some((&code, rest)) = input.split_first_chunk::<2>() else { return };
    let mut parts = rest.splitn(2, |byte| *byte == b'\n');
    let (wait, body) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let answer = Response::builder().status(u16::from_be_bytes(code)).header(RETRY_AFTER, wait);
    let Ok(answer) = answer.body(boxed(body.to_vec())) else { return };
    let status = answer.status();
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let Ok(runtime) = runtime else { return };
    let said = runtime.block_on(async {
        let answer = with_retry_after(answer).await.ok()?;
        assert_eq!(answer.status(), status, "another answer");
        Some(answer.into_body().collect().await.ok()?.to_bytes())
    });
    assert!(said.is_some(), "an answer that cannot be read any more");
    let said = said.unwrap_or_default();
    let seconds = std::str::from_utf8(wait).ok().and_then(|wait| wait.parse::<u32>().ok());
    let is_refusal = status.is_client_error() || status.is_server_error();
    match seconds.filter(|_| is_refusal) {
        None => assert_eq!(said, body),
        Some(seconds) => {
            let told = serde_json::from_slice::<Status>(&said).ok().and_then(|told| told.details);
            let told = told.map(|details| details.retry_after_seconds);
            assert!(told.is_some_and(|told| told != 0 || seconds == 0), "{told:?} of {seconds}");
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn seeds_of_the_fuzzer_hold() {
        crate::fuzzing::replay("manifests", super::manifests);
        crate::fuzzing::replay("refusals", super::refusals);
    }
}
