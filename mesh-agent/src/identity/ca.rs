//! The directory CA: a root certificate and its key in a directory, and certificates issued from it.
//!
//! ```text
//! root.pem     the root certificate: ECDSA P-256, ten years, URI spiffe://<trust domain>
//! root.key     its key, PKCS#8 PEM, mode 0600
//! bundle.pem   the roots that agents trust, one or more (see `bundle`)
//! ```
//!
//! Root and key are read anew for each certificate. That happens once per identity and half
//! lifetime, costs less than the key generation next to it, keeps the root's key out of memory in
//! between, and makes a replaced root take effect with the next certificate.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_core::spiffe::{SpiffeId, TrustDomain};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::crypto::aws_lc_rs::sign::any_ecdsa_type;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use thiserror::Error;
use zeroize::{Zeroize as _, Zeroizing};

use super::authority::{Authority, Signed, make_root};
use super::bundle::{self, BundleError, Root, TrustBundles, parse_roots};
use super::kubernetes::ApiError;

#[cfg(test)]
mod tests;

/// The root certificate.
pub const ROOT_CERT: &str = "root.pem";
/// The root's key.
pub const ROOT_KEY: &str = "root.key";
/// The trusted roots.
pub const BUNDLE: &str = "bundle.pem";

/// Why a CA did not do as asked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CaError {
    /// `ca init` found something that it would have overwritten.
    #[error(
        "{path} exists already: a new root would cut off every workload that trusts the old one; \
         choose another --dir, or move the directory away"
    )]
    Exists {
        /// What is there.
        path: PathBuf,
    },
    /// A file could not be read.
    #[error("read {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file could not be written.
    #[error("write {path}")]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// `root.pem` is not one usable root certificate.
    #[error(transparent)]
    Root(#[from] BundleError),
    /// `root.pem` does not say which trust domain it is for.
    #[error("{path} has no URI spiffe://<trust domain>: make it with `mesh-agent ca init`")]
    NoTrustDomain {
        /// Which file.
        path: PathBuf,
    },
    /// `root.key` is not the key of `root.pem`.
    #[error("{path} is not the key of {ROOT_CERT}: restore the pair that belongs together")]
    WrongKey {
        /// Which file.
        path: PathBuf,
    },
    /// The root's own validity does not hold now.
    #[error(
        "the root certificate is not valid now: check the clock, or make a new root and trust both"
    )]
    RootNotValid,
    /// Asked for an identity of another trust domain.
    #[error(
        "this CA is for trust domain {ours}, not {asked}: run the agent with --trust-domain {ours}"
    )]
    ForeignTrustDomain {
        /// The root's.
        ours: TrustDomain,
        /// The identity's.
        asked: TrustDomain,
    },
    /// The Kubernetes API did not do as asked.
    #[error("ask the Kubernetes API")]
    Api(#[from] ApiError),
    /// Nothing that is published vouches for what the CA would sign.
    #[error(
        "no root of this trust domain vouches for {place}: put the root that is above it into ca.crt of \
         that Secret, or set --trust-domain"
    )]
    NoRoot {
        /// Which certificate.
        place: String,
    },
    /// The root was published a moment ago.
    #[error("the new root is not everywhere yet: it signs when all agents have it")]
    NotSpread,
    /// What was written beside the published roots.
    #[error(
        "read the annotation malla.dev/roots of ConfigMap malla-trust: remove it, or the ConfigMap"
    )]
    Annotation {
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The signer refused.
    #[error("the signer refused: {why}")]
    Denied {
        /// What it says, shortened.
        why: String,
    },
    /// The signer has not answered.
    #[error(
        "no answer to request {name} from signer {signer}: is it running? (`mesh-agent ca run` is the one of malla.dev/workload)"
    )]
    NotAnswered {
        /// Which request: `kubectl describe csr` tells more.
        name: String,
        /// Which signer.
        signer: String,
    },
    /// The signer's answer is not the certificate that was asked for.
    #[error("the signer's answer {what}")]
    Answer {
        /// What is wrong with it.
        what: &'static str,
    },
    /// The cryptographic library refused.
    #[error("make a certificate")]
    Make(#[from] rcgen::Error),
    /// The key that was just made cannot be used for TLS.
    #[error("use a certificate")]
    Use(#[from] rustls::Error),
    /// The operating system gave no random bytes.
    #[error("no random bytes from the operating system")]
    NoRandomness,
}

impl CaError {
    /// The `reason` label: a closed set.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Exists { .. } => "exists",
            Self::Read { .. } => "read",
            Self::Write { .. } => "write",
            Self::Root(_) | Self::NoTrustDomain { .. } => "root_malformed",
            Self::WrongKey { .. } => "root_key",
            Self::RootNotValid => "root_not_valid",
            Self::ForeignTrustDomain { .. } => "foreign_trust_domain",
            Self::Api(_) => "api",
            Self::NoRoot { .. } => "no_root",
            Self::NotSpread => "not_spread",
            Self::Annotation { .. } => "annotation",
            Self::Denied { .. } => "denied",
            Self::NotAnswered { .. } => "not_answered",
            Self::Answer { .. } => "answer",
            Self::Make(_) | Self::Use(_) | Self::NoRandomness => "crypto",
        }
    }
}

/// What `ca show` shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaView {
    /// The trust domain that this CA issues for.
    pub trust_domain: TrustDomain,
    /// The root that signs.
    pub root: Root,
    /// Every trusted root, of any trust domain.
    pub bundle: Vec<Root>,
}

/// Makes a root for `trust_domain` in `dir`, which is created if absent.
///
/// # Errors
///
/// Refuses to overwrite anything; otherwise the file that could not be written.
pub fn init(dir: &Path, trust_domain: &TrustDomain, now: SystemTime) -> Result<CaView, CaError> {
    fs::create_dir_all(dir).map_err(|source| CaError::Write { path: dir.into(), source })?;
    for name in [ROOT_CERT, ROOT_KEY, BUNDLE] {
        let path = dir.join(name);
        if fs::symlink_metadata(&path).is_ok() {
            return Err(CaError::Exists { path });
        }
    }
    let (cert, mut key) = make_root(trust_domain, now)?;
    let pem = Zeroizing::new(key.serialize_pem());
    key.zeroize();
    // The key first: a directory with a certificate and no key looks complete to `show`.
    let root = cert.pem();
    let files: [(_, _, &str); 3] =
        [(ROOT_KEY, 0o600, &pem), (ROOT_CERT, 0o644, &root), (BUNDLE, 0o644, &root)];
    for (nth, (name, mode, text)) in files.into_iter().enumerate() {
        if let Err(error) = write_new(&dir.join(name), mode, text) {
            // Half a root would only be in the way of the next attempt.
            files[..nth].iter().for_each(|(name, ..)| drop(fs::remove_file(dir.join(name))));
            return Err(error);
        }
    }
    show(dir)
}

/// Reads what is in `dir`. Needs no key.
///
/// # Errors
///
/// The file that is missing or wrong.
pub fn show(dir: &Path) -> Result<CaView, CaError> {
    let (pem, trust_domain) = read_root(dir)?;
    let (_, root) = parse_roots(&dir.join(ROOT_CERT), &pem)?.swap_remove(0);
    let bundle = TrustBundles::load(&dir.join(BUNDLE), &trust_domain)?;
    Ok(CaView { trust_domain, root, bundle: bundle.roots().cloned().collect() })
}

/// A root in a directory, ready to issue.
#[derive(Clone, Debug)]
pub struct DirectoryCa {
    dir: PathBuf,
    trust_domain: TrustDomain,
}

impl DirectoryCa {
    /// Checks that certificate and key are there and belong together.
    ///
    /// # Errors
    ///
    /// The file that is missing or wrong.
    pub fn open(dir: &Path) -> Result<Self, CaError> {
        let (_, trust_domain) = read_root(dir)?;
        let ca = Self { dir: dir.into(), trust_domain };
        ca.signer()?;
        Ok(ca)
    }

    /// The trust domain of the root.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The directory: where the bundle is followed.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes a key and a certificate for `id`, valid from a little before `now` for `lifetime`, but
    /// not beyond the root.
    ///
    /// # Errors
    ///
    /// If the root is unreadable, expired or of another trust domain.
    pub fn issue(
        &self,
        id: &SpiffeId,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Issued, CaError> {
        let authority = self.signer()?;
        if *id.trust_domain() != self.trust_domain {
            return Err(CaError::ForeignTrustDomain {
                ours: self.trust_domain.clone(),
                asked: id.trust_domain().clone(),
            });
        }
        let mut key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let signed = authority.sign(id, &key, lifetime, now);
        let pkcs8 = Zeroizing::new(key.serialize_der());
        key.zeroize();
        Ok(Issued::new(signed?, pkcs8))
    }

    /// The root, read anew, with its key.
    fn signer(&self) -> Result<Authority, CaError> {
        let (cert_path, key_path) = (self.dir.join(ROOT_CERT), self.dir.join(ROOT_KEY));
        let (pem, trust_domain) = read_root(&self.dir)?;
        if trust_domain != self.trust_domain {
            return Err(CaError::ForeignTrustDomain {
                ours: trust_domain,
                asked: self.trust_domain.clone(),
            });
        }
        let key = match fs::read_to_string(&key_path) {
            Ok(key) => Zeroizing::new(key),
            Err(source) => return Err(CaError::Read { path: key_path, source }),
        };
        Authority::new(&cert_path, &pem, &key_path, &key)
    }
}

/// A certificate with its key.
pub struct Issued {
    /// DER, the leaf first, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// PKCS#8 DER, wiped when dropped.
    pub key: Zeroizing<Vec<u8>>,
    /// In hex.
    pub serial: String,
    /// Valid from.
    pub not_before: SystemTime,
    /// Valid until, exclusive.
    pub not_after: SystemTime,
}

// By hand: the key must not reach a log.
impl std::fmt::Debug for Issued {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issued")
            .field("serial", &self.serial)
            .field("not_before", &self.not_before)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl Issued {
    pub(super) fn new(signed: Signed, key: Zeroizing<Vec<u8>>) -> Self {
        let Signed { chain, serial, not_before, not_after } = signed;
        Self { chain, key, serial, not_before, not_after }
    }

    /// In the form that rustls signs with.
    ///
    /// # Errors
    ///
    /// If the key is not one that TLS can use.
    pub fn certified(&self) -> Result<Arc<CertifiedKey>, CaError> {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.as_slice()));
        Ok(Arc::new(CertifiedKey::new(self.chain.clone(), any_ecdsa_type(&key)?)))
    }
}

/// The text of the root certificate, which is right, and the trust domain that it names.
fn read_root(dir: &Path) -> Result<(Vec<u8>, TrustDomain), CaError> {
    let path = dir.join(ROOT_CERT);
    let pem = bundle::read(&path)?;
    let (_, root) = parse_roots(&path, &pem)?.swap_remove(0);
    match root.trust_domain {
        Some(trust_domain) => Ok((pem, trust_domain)),
        None => Err(CaError::NoTrustDomain { path }),
    }
}

/// `CREATE_NEW` as well as the check before: two `ca init` at once must not both succeed.
fn write_new(path: &Path, mode: u32, text: &str) -> Result<(), CaError> {
    let wrong = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => CaError::Exists { path: path.into() },
        _ => CaError::Write { path: path.into(), source },
    };
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(wrong)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(|source| {
        drop(fs::remove_file(path));
        wrong(source)
    })
}
