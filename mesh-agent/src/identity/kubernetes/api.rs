//! The few requests that are made to the API, and the parts of its objects that are read.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use k8s_openapi::ByteString;
use kube::Client;
use kube::core::WatchEvent;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use thiserror::Error;
use tokio::time::timeout;
use zeroize::Zeroize as _;

use crate::discovery::client::escaped;
use crate::discovery::kube::{ObjectMeta, Pod, or_default};

/// An answer that takes longer is not coming.
const LIMIT: Duration = Duration::from_secs(10);

/// Where requests for certificates are.
pub(super) const REQUESTS: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";

/// Why the API did not do as asked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ApiError {
    /// It refused, or could not be reached.
    #[error("{verb} {path}")]
    Refused {
        /// What was to be done.
        verb: &'static str,
        /// To what.
        path: String,
        /// Why not.
        source: Box<kube::Error>,
    },
    /// It did not answer.
    #[error("{verb} {path}: no answer within {LIMIT:?}")]
    Silent {
        /// What was to be done.
        verb: &'static str,
        /// To what.
        path: String,
    },
}

impl ApiError {
    fn code(&self) -> Option<u16> {
        match self {
            Self::Refused { source, .. } => match &**source {
                kube::Error::Api(status) => Some(status.code),
                _ => None,
            },
            Self::Silent { .. } => None,
        }
    }

    /// Somebody else was first.
    pub(super) fn is_conflict(&self) -> bool {
        self.code() == Some(409)
    }

    /// The version that was to be gone on from is not kept any more.
    pub(super) fn is_expired(&self) -> bool {
        self.code() == Some(410)
    }

    /// Nobody has said that it was not done: a server may do what it gives no answer to.
    pub(super) fn may_be_done(&self) -> bool {
        self.code().is_none_or(|code| code >= 500)
    }

    fn is_not_found(&self) -> bool {
        self.code() == Some(404)
    }
}

/// The way to the API.
#[derive(Clone)]
pub(super) struct Api(Client);

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").finish_non_exhaustive()
    }
}

impl Api {
    pub(super) fn new(client: Client) -> Self {
        Self(client)
    }

    /// One object, or a list; `None` if there is none.
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>, ApiError> {
        match self.ask("get", http::Request::get(path), path, None).await {
            Ok(object) => Ok(Some(object)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes an object, below `path`.
    pub(super) async fn create<T: DeserializeOwned>(
        &self,
        path: &str,
        object: &Value,
    ) -> Result<T, ApiError> {
        self.ask("create", http::Request::post(path), path, Some(object)).await
    }

    /// Changes what `patch` names (RFC 7396), and nothing if it names another version than the
    /// present one.
    pub(super) async fn patch<T: DeserializeOwned>(
        &self,
        path: &str,
        patch: &Value,
    ) -> Result<T, ApiError> {
        let request = http::Request::patch(path);
        let request = request.header(http::header::CONTENT_TYPE, "application/merge-patch+json");
        self.ask("patch", request, path, Some(patch)).await
    }

    /// What happens to the objects of `path` after `version`.
    pub(super) async fn watch<T: Clone + DeserializeOwned>(
        &self,
        path: &str,
    ) -> Result<impl Stream<Item = Result<WatchEvent<T>, ApiError>> + use<T>, ApiError> {
        let owned = path.to_owned();
        let refused = move |error| refused("watch", &owned, error);
        let request = http::Request::get(path).body(Vec::new()).map_err(kube::Error::HttpError);
        let request = request.map_err(&refused)?;
        let silent = |_elapsed| ApiError::Silent { verb: "watch", path: path.to_owned() };
        let events = timeout(LIMIT, self.0.request_events::<T>(request)).await.map_err(silent)?;
        Ok(events.map_err(&refused)?.map(move |event| event.map_err(&refused)))
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        verb: &'static str,
        request: http::request::Builder,
        path: &str,
        body: Option<&Value>,
    ) -> Result<T, ApiError> {
        let body = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        let mut request = request.body(body).map_err(kube::Error::HttpError);
        if let Ok(request) = &mut request
            && !request.headers().contains_key(http::header::CONTENT_TYPE)
        {
            let json = http::HeaderValue::from_static("application/json");
            request.headers_mut().insert(http::header::CONTENT_TYPE, json);
        }
        let request = request.map_err(|error| refused(verb, path, error))?;
        match timeout(LIMIT, self.0.request(request)).await {
            Ok(answer) => answer.map_err(|error| refused(verb, path, error)),
            Err(_elapsed) => Err(ApiError::Silent { verb, path: path.to_owned() }),
        }
    }
}

pub(super) fn refused(verb: &'static str, path: &str, error: kube::Error) -> ApiError {
    ApiError::Refused { verb, path: path.to_owned(), source: Box::new(error) }
}

/// A list of objects.
#[derive(Debug, Deserialize)]
#[serde(bound = "T: DeserializeOwned")]
pub(super) struct List<T> {
    pub(super) metadata: ListMeta,
    #[serde(deserialize_with = "or_default")]
    pub(super) items: Vec<T>,
}

/// `metadata` of a list.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ListMeta {
    pub(super) resource_version: String,
    #[serde(rename = "continue", default)]
    pub(super) next: String,
}

/// `v1` Pod, in a list.
pub(super) type Pods = List<Pod>;

/// `certificates.k8s.io/v1` CertificateSigningRequest.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct SigningRequest {
    pub(super) metadata: ObjectMeta,
    pub(super) spec: SigningRequestSpec,
    #[serde(default)]
    pub(super) status: SigningRequestStatus,
}

/// What the API server adds to who authenticates by a token that is bound to a pod: where that runs.
pub(super) const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
/// Bytes of an object's name.
const MAX_NAME: usize = 253;

/// Where the request of that name is, which may be of any characters but `/` and `%`.
pub(super) fn request_path(name: &str) -> String {
    format!("{REQUESTS}/{}", escaped(name))
}

/// `spec` of a request.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SigningRequestSpec {
    pub(super) request: ByteString,
    pub(super) signer_name: String,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) usages: Vec<String>,
    pub(super) expiration_seconds: Option<i64>,
    #[serde(default)]
    pub(super) username: String,
    /// A list may be `null`, which the API makes of an empty one.
    #[serde(default, deserialize_with = "or_default")]
    pub(super) extra: BTreeMap<String, Option<Vec<String>>>,
}

/// `status` of a request.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct SigningRequestStatus {
    /// As they are: who adds one must leave the others untouched.
    #[serde(default, deserialize_with = "or_default")]
    pub(super) conditions: Vec<Value>,
    #[serde(default)]
    pub(super) certificate: ByteString,
}

impl SigningRequest {
    pub(super) fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    /// Whose agent asks, as the API server says; empty where that is no node's name.
    pub(super) fn node(&self) -> &str {
        match self.spec.extra.get(NODE_NAME).and_then(Option::as_deref) {
            Some([node]) if node.len() <= MAX_NAME => node,
            _ => "",
        }
    }

    /// Where it is.
    pub(super) fn path(&self) -> String {
        request_path(self.name())
    }

    /// The condition of a kind: `Approved`, `Denied` or `Failed`.
    pub(super) fn condition(&self, kind: &str) -> Option<&Value> {
        self.status.conditions.iter().find(|condition| condition["type"] == kind)
    }

    /// Whether it needs no answer any more.
    pub(super) fn is_answered(&self) -> bool {
        !self.status.certificate.0.is_empty()
            || self.condition("Denied").is_some()
            || self.condition("Failed").is_some()
    }
}

/// `coordination.k8s.io/v1` Lease.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Lease {
    #[serde(default)]
    pub(super) metadata: ObjectMeta,
    #[serde(default)]
    pub(super) spec: LeaseSpec,
}

/// `spec` of a Lease.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct LeaseSpec {
    pub(super) holder_identity: Option<String>,
    pub(super) lease_transitions: Option<u32>,
}

/// `v1` Secret.
#[derive(Deserialize)]
pub(super) struct Secret {
    #[serde(default)]
    pub(super) data: BTreeMap<String, ByteString>,
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.data.values_mut().for_each(|ByteString(bytes)| bytes.zeroize());
    }
}

// By hand: what is in it must not reach a log.
impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.data.keys()).finish()
    }
}

/// `v1` ConfigMap.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct ConfigMap {
    #[serde(default)]
    pub(super) metadata: ObjectMeta,
    #[serde(default)]
    pub(super) data: BTreeMap<String, String>,
}

/// Any object of which nothing but its being there is of interest.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Named {
    pub(super) metadata: ObjectMeta,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Who may make requests names them, and must not choose what is asked of the server.
    #[test]
    fn name_of_a_request_is_one_part_of_its_path() {
        let spec = json!({"request": "", "signerName": "a.example/b"});
        let request = json!({"metadata": {"name": "a?b=1#c d..é"}, "spec": spec});
        let request: SigningRequest = serde_json::from_value(request).unwrap();
        assert_eq!(request.path(), format!("{REQUESTS}/a%3Fb%3D1%23c%20d..%C3%A9"));
    }
}
