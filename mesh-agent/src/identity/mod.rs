//! Identity: who a workload is, and how it proves it.
//!
//! Every identity is an X.509-SVID: a certificate with one URI, `spiffe://<trust domain>/ns/<ns>/sa/<sa>`,
//! signed by a root of that trust domain and valid for a day. [`store::Identities`] holds those of
//! this node's own pods, and no others: a node that is taken over gives away its own workloads only.
//!
//! | file | what it does |
//! |---|---|
//! | `authority` | signs, with a CA's certificate and key |
//! | [`ca`] | makes a root in a directory, and issues from it |
//! | [`verify`] | decides whether a peer's chain proves an identity |
//! | [`bundle`] | reads the trusted roots, and follows their file |
//! | [`request`] | reads and makes requests for certificates |
//! | [`kubernetes`] | asks for certificates over the Kubernetes API, and answers there |
//! | [`store`] | holds, renews and looks up this node's certificates |
//!
//! # Guarantees
//!
//! - A workload's private key is made here, lives in memory and is never written anywhere.
//! - A chain counts only under the roots *of its own trust domain*.
//! - A wrong bundle file changes nothing: the last good roots stay in force until it heals.
//!
//! # Not here
//!
//! Which identities a node needs (discovery says), the handshake (`tunnel`), and what an identity
//! may do (`mesh_core::authorize`).

mod authority;
pub mod bundle;
pub mod ca;
#[cfg(any(fuzzing, test))]
pub mod fuzzing;
pub mod kubernetes;
pub mod request;
pub mod store;
pub mod verify;

use std::fmt::Write as _;

use aws_lc_rs::digest::{SHA256, digest};
use mesh_core::spiffe::SpiffeId;
use mesh_core::wire;

/// The server name that asks a peer's agent for this workload:
/// `<first 16 bytes of SHA-256 of the SPIFFE ID, in hex>.malla`.
///
/// A server name crosses the wire in clear, so it must not tell who is meant. 128 bits are not
/// secret and need not be: the certificate proves the identity, the name only picks it.
pub fn sni_name(id: &SpiffeId) -> String {
    let hash = digest(&SHA256, id.to_string().as_bytes());
    wire::server_name(&hex(hash.as_ref().get(..16).unwrap_or_default()))
}

/// Lower-case hex.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a `String` cannot fail.
        _ = write!(text, "{byte:02x}");
        text
    })
}

/// Names that the tests of this module share.
#[cfg(test)]
pub(crate) mod testing {
    use mesh_core::spiffe::{SpiffeId, TrustDomain};

    pub(crate) fn cluster_local() -> TrustDomain {
        TrustDomain::new("cluster.local").unwrap()
    }

    pub(crate) fn id(service_account: &str) -> SpiffeId {
        SpiffeId::new(cluster_local(), "default", service_account).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pinned against `printf %s spiffe://... | sha256sum | cut -c1-32`.
    #[test]
    fn server_name_is_the_hash_of_the_identity_and_says_nothing() {
        let id = SpiffeId::parse("spiffe://cluster.local/ns/default/sa/web").unwrap();
        assert_eq!(sni_name(&id), "b86ac57d10c3ca9f23e51830b3707811.malla");
    }
}
