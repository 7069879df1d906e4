//! SPIFFE identities of workloads: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
//!
//! The form is the one that Istio and Linkerd users know; the rules for trust domain and path are
//! those of the SPIFFE-ID document, sections 2.1 and 2.2. An identity comes from a certificate that
//! was verified, or from a manifest; nothing else makes one.

use std::fmt;
use std::sync::Arc;

/// SPIFFE-ID section 2.3: a SPIFFE ID is at most 2048 bytes.
pub const MAX_LEN: usize = 2048;
/// SPIFFE-ID section 2.1: a trust domain is at most 255 bytes.
pub const MAX_TRUST_DOMAIN_LEN: usize = 255;

/// A name under which certificates are issued: lower case letters, digits, `.`, `-`, `_`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

/// Who a workload is: its trust domain, namespace and service account.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    namespace: Arc<str>,
    service_account: Arc<str>,
}

/// Why a text is not the SPIFFE ID of a workload. Carries none of the text: a peer chose it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SpiffeError {
    /// Longer than [`MAX_LEN`].
    TooLong,
    /// Does not begin with `spiffe://`.
    Scheme,
    /// The trust domain is empty, too long, or has a character outside `a-z0-9.-_`.
    TrustDomain,
    /// The path is not `/ns/<namespace>/sa/<service account>`.
    Path,
}

impl fmt::Display for SpiffeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => "longer than 2048 bytes",
            Self::Scheme => "does not begin with spiffe://",
            Self::TrustDomain => {
                "its trust domain is empty, over 255 bytes, or not of a-z 0-9 . - _"
            }
            Self::Path => "its path is not /ns/<namespace>/sa/<service account>",
        })
    }
}

impl std::error::Error for SpiffeError {}

impl TrustDomain {
    /// Checks and takes a trust domain such as `cluster.local`.
    ///
    /// # Errors
    ///
    /// [`SpiffeError::TrustDomain`] if it is empty, too long or has a forbidden character.
    pub fn new(name: &str) -> Result<Self, SpiffeError> {
        let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
        if name.is_empty() || name.len() > MAX_TRUST_DOMAIN_LEN || !name.bytes().all(allowed) {
            return Err(SpiffeError::TrustDomain);
        }
        Ok(Self(name.into()))
    }

    /// The bare name, without scheme.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::str::FromStr for TrustDomain {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        Self::new(text)
    }
}

impl SpiffeId {
    /// The identity of a service account.
    ///
    /// # Errors
    ///
    /// [`SpiffeError::Path`] if a name is empty or not of the characters a SPIFFE path may have.
    pub fn new(
        trust_domain: TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, SpiffeError> {
        if !is_segment(namespace) || !is_segment(service_account) {
            return Err(SpiffeError::Path);
        }
        let id = Self {
            trust_domain,
            namespace: namespace.into(),
            service_account: service_account.into(),
        };
        if id.to_string().len() > MAX_LEN {
            return Err(SpiffeError::TooLong);
        }
        Ok(id)
    }

    /// Parses the URI of a certificate.
    ///
    /// # Errors
    ///
    /// Says which rule of the SPIFFE-ID document, or of the `/ns/…/sa/…` form, is broken.
    pub fn parse(uri: &str) -> Result<Self, SpiffeError> {
        if uri.len() > MAX_LEN {
            return Err(SpiffeError::TooLong);
        }
        let rest = uri.strip_prefix("spiffe://").ok_or(SpiffeError::Scheme)?;
        let (trust_domain, path) = rest.split_once('/').ok_or(SpiffeError::Path)?;
        let trust_domain = TrustDomain::new(trust_domain)?;
        let mut segments = path.split('/');
        let parts = [segments.next(), segments.next(), segments.next(), segments.next()];
        match (parts, segments.next()) {
            ([Some("ns"), Some(namespace), Some("sa"), Some(service_account)], None) => {
                Self::new(trust_domain, namespace, service_account)
            }
            _ => Err(SpiffeError::Path),
        }
    }

    /// The trust domain whose bundle must have signed this identity's certificate.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The Kubernetes service account.
    pub fn service_account(&self) -> &str {
        &self.service_account
    }

    /// The identity without scheme, `cluster.local/ns/a/sa/b`: how Istio's policies and metrics
    /// write a principal.
    pub fn principal(&self) -> String {
        format!("{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "spiffe://{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

impl std::str::FromStr for SpiffeId {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        Self::parse(text)
    }
}

/// SPIFFE-ID section 2.2: a segment is of letters, digits, `.`, `-`, `_`, and is not `.` or `..`.
fn is_segment(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    !matches!(text, "" | "." | "..") && text.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_survives_its_own_text() {
        let text = "spiffe://cluster.local/ns/default/sa/bookinfo-ratings";
        let id = SpiffeId::parse(text).unwrap();
        assert_eq!(id.namespace(), "default");
        assert_eq!(id.service_account(), "bookinfo-ratings");
        assert_eq!(id.to_string(), text);
        assert_eq!(id.principal(), "cluster.local/ns/default/sa/bookinfo-ratings");
    }

    #[test]
    fn what_breaks_a_rule_is_refused_by_that_rule() {
        let cases = [
            ("https://cluster.local/ns/a/sa/b", SpiffeError::Scheme),
            ("SPIFFE://cluster.local/ns/a/sa/b", SpiffeError::Scheme),
            ("spiffe:///ns/a/sa/b", SpiffeError::TrustDomain),
            ("spiffe://Cluster.local/ns/a/sa/b", SpiffeError::TrustDomain),
            ("spiffe://cluster.local:1/ns/a/sa/b", SpiffeError::TrustDomain),
            ("spiffe://u@cluster.local/ns/a/sa/b", SpiffeError::TrustDomain),
            ("spiffe://cluster.local", SpiffeError::Path),
            ("spiffe://cluster.local/ns/a/sa", SpiffeError::Path),
            ("spiffe://cluster.local/ns/a/sa/", SpiffeError::Path),
            ("spiffe://cluster.local/ns/a/sa/b/", SpiffeError::Path),
            ("spiffe://cluster.local/ns/../sa/b", SpiffeError::Path),
            ("spiffe://cluster.local/ns/a/sa/b?c", SpiffeError::Path),
            ("spiffe://cluster.local/ns/a/sa/%62", SpiffeError::Path),
        ];
        for (text, error) in cases {
            assert_eq!(SpiffeId::parse(text), Err(error), "{text}");
        }
        let long = format!("spiffe://cluster.local/ns/{}/sa/b", "a".repeat(MAX_LEN));
        assert_eq!(SpiffeId::parse(&long), Err(SpiffeError::TooLong));
    }
}
