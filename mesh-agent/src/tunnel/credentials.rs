//! What the tunnel needs to know about certificates, as plain functions: where they come from is
//! the business of the identity stage.

use std::fmt;
use std::sync::Arc;

use mesh_core::spiffe::SpiffeId;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::sign::CertifiedKey;
use tokio::sync::watch;

use crate::identity::verify::{PeerRefused, PeerRole};

/// Finds the certificate of a workload of this node.
pub type Certified = Box<dyn Fn(&SpiffeId) -> Option<Arc<CertifiedKey>> + Send + Sync>;
/// Finds the workload of this node that a server name stands for (`identity::sni_name`).
pub type Served = Box<dyn Fn(&str) -> Option<(SpiffeId, Arc<CertifiedKey>)> + Send + Sync>;
/// Verifies a peer's chain, leaf first, and says who it is.
pub type Verify = Box<
    dyn Fn(&[CertificateDer<'_>], PeerRole, UnixTime) -> Result<SpiffeId, PeerRefused>
        + Send
        + Sync,
>;

/// Certificates of this node's workloads, and what peers are trusted.
///
/// Every function is called at each handshake and answers from the present state, so that a renewed
/// certificate or a replaced root needs nothing here but `trusted`, for the carriers that are open. An unchanged certificate must be the same
/// `Arc`: TLS sessions are resumed only under it.
pub struct Credentials {
    /// The certificate under which a workload of this node calls.
    pub certified: Certified,
    /// The workload and certificate that answer to a server name.
    pub served: Served,
    /// Who a peer is.
    pub verify: Verify,
    /// Which roots `verify` goes by: another number after every change of them.
    pub trusted: watch::Receiver<u64>,
}

impl Credentials {
    /// The number of the roots in force.
    pub(super) fn generation(&self) -> u64 {
        *self.trusted.borrow()
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}
