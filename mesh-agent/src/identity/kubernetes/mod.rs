//! Certificates through the Kubernetes API: `certificates.k8s.io/v1`.
//!
//! ```text
//! agent                          API server                     mesh-agent ca run
//! requests ── create ──► CertificateSigningRequest ──► signer ── mesh_core::sign
//!          ◄─ status.certificate ────────────────────────┘
//! bundle file ◄── kubelet ◄── ConfigMap malla-trust ◄── roots ◄── Secret malla-ca
//! ```
//!
//! # Guarantees
//!
//! - The agent's key never leaves its memory, the CA's is in one Secret.
//! - A signer signs nothing that the agents may not trust yet, and a root stays trusted for as long
//!   as what it has signed may live ([`roots`]): replacing the Secret replaces the root, and no
//!   connection fails of it.
//! - Of several signers one works ([`election`]); should two do so for a moment, the API lets one
//!   answer stand.
//! - An API server or a signer that is away delays new certificates, and nothing else.

mod api;
pub mod election;
#[cfg(any(fuzzing, test))]
pub mod fuzzing;
mod published;
pub mod requests;
mod roots;
pub mod signer;
#[cfg(test)]
mod testing;

pub use api::ApiError;

/// The signer that answers, unless another one is asked for.
pub const SIGNER: &str = "malla.dev/workload";
/// The Secret with the CA's certificate and key: `tls.crt`, `tls.key`, and in `ca.crt` the root if
/// `tls.crt` is an intermediate. The form is that of cert-manager.
pub const SECRET: &str = "malla-ca";
/// The ConfigMap with the trusted roots.
pub const CONFIG_MAP: &str = "malla-trust";
/// The Lease that says which signer works.
pub const LEASE: &str = "malla-ca";

/// A certificate in PEM.
fn pem(der: &[u8]) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new("CERTIFICATE", der), config)
}
