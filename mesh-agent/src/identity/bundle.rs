//! Trust bundles: the roots under which peers' certificates count, by trust domain.
//!
//! The file is PEM, one or more root certificates; a root says its trust domain by a URI
//! `spiffe://<trust domain>`, and one without belongs to the agent's own. While two roots of a trust
//! domain are listed, certificates of both count: that is how a root is replaced without an
//! interruption (list both, replace the signing root, and drop the old one when its last
//! certificate has expired).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use std::{fs, io};

use aws_lc_rs::digest::{SHA256, digest};
use mesh_core::spiffe::TrustDomain;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, TrustAnchor};
use thiserror::Error;
use tracing::{info, warn};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::store::Identities;
use crate::dirwatch::DirWatch;
use crate::telemetry;

/// A bundle is read into memory: no certificate store of the world is this large.
const MAX_BUNDLE_BYTES: u64 = 1 << 20;

/// Why a file is not a trust bundle. Says file, place and remedy.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BundleError {
    /// The file could not be read.
    #[error("read {path}, which `mesh-agent ca init` makes, and `ca run` in a cluster")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is larger than any bundle.
    #[error("{path} is larger than {MAX_BUNDLE_BYTES} bytes: is it a bundle?")]
    TooLarge {
        /// Which file.
        path: PathBuf,
    },
    /// The file is not PEM.
    #[error(
        "{path}, certificate {index}: not PEM; copy it whole, from -----BEGIN CERTIFICATE-----"
    )]
    NotPem {
        /// Which file.
        path: PathBuf,
        /// Counted from 1.
        index: usize,
    },
    /// No certificate in the file. Trusting nobody is never what was meant.
    #[error("{path} holds no certificate: put the root certificates there, in PEM")]
    Empty {
        /// Which file.
        path: PathBuf,
    },
    /// Not a certificate, or not one that can be a root.
    #[error("{path}, certificate {index}: {what}")]
    NotARoot {
        /// Which file.
        path: PathBuf,
        /// Counted from 1.
        index: usize,
        /// What is wrong and what to do.
        what: &'static str,
    },
}

impl BundleError {
    /// The `reason` label: a closed set.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Read { .. } => "read",
            Self::TooLarge { .. } => "too_large",
            Self::NotPem { .. } => "not_pem",
            Self::Empty { .. } => "empty",
            Self::NotARoot { .. } => "not_a_root",
        }
    }
}

/// A root certificate, as people see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// The trust domain that it names; `None` if it names none.
    pub trust_domain: Option<TrustDomain>,
    /// The subject, in the form `O=..., CN=...`.
    pub subject: String,
    /// In hex.
    pub serial: String,
    /// SHA-256 of the DER, in hex.
    pub fingerprint: String,
    /// Valid from.
    pub not_before: SystemTime,
    /// Valid until, exclusive.
    pub not_after: SystemTime,
    /// Whether nothing is above it.
    pub(super) is_self_signed: bool,
    /// The subject's public key, bare.
    pub(super) public_key: Vec<u8>,
}

/// The trusted roots by trust domain.
#[derive(Clone, Debug, Default)]
pub struct TrustBundles {
    bundles: BTreeMap<TrustDomain, Bundle>,
}

/// The trusted roots of one trust domain.
#[derive(Clone, Debug, Default)]
struct Bundle {
    anchors: Vec<TrustAnchor<'static>>,
    roots: Vec<Root>,
}

impl TrustBundles {
    /// Reads `path`. Roots that name no trust domain count for `own`.
    ///
    /// # Errors
    ///
    /// If any part is wrong: half a bundle would cut off some peers and not others.
    pub fn load(path: &Path, own: &TrustDomain) -> Result<Self, BundleError> {
        Self::parse(path, &read(path)?, own)
    }

    /// Reads `pem`, which `path` holds.
    pub(super) fn parse(path: &Path, pem: &[u8], own: &TrustDomain) -> Result<Self, BundleError> {
        let mut this = Self::default();
        for (index, (der, root)) in parse_roots(path, pem)?.into_iter().enumerate() {
            let anchor = webpki::anchor_from_trusted_cert(&der).map_err(|_malformed| {
                BundleError::NotARoot {
                    path: path.into(),
                    index: index + 1,
                    what: "cannot serve as a trust anchor; make it with `mesh-agent ca init`",
                }
            })?;
            let domain = root.trust_domain.clone().unwrap_or_else(|| own.clone());
            let bundle = this.bundles.entry(domain).or_default();
            if !bundle.roots.contains(&root) {
                bundle.anchors.push(anchor.to_owned());
                bundle.roots.push(root);
            }
        }
        Ok(this)
    }

    /// One root, which is right.
    pub(super) fn of(der: &CertificateDer<'_>, root: Root, own: &TrustDomain) -> Self {
        let domain = root.trust_domain.clone().unwrap_or_else(|| own.clone());
        // What is no anchor vouches for nobody.
        let anchors = webpki::anchor_from_trusted_cert(der).map(|anchor| anchor.to_owned());
        let bundle = Bundle { anchors: anchors.into_iter().collect(), roots: vec![root] };
        Self { bundles: BTreeMap::from([(domain, bundle)]) }
    }

    /// What signs for `trust_domain`; `None` if nothing is trusted to.
    pub(super) fn anchors(&self, trust_domain: &TrustDomain) -> Option<&[TrustAnchor<'static>]> {
        self.bundles.get(trust_domain).map(|bundle| bundle.anchors.as_slice())
    }

    /// Every root, by trust domain and then in the order of the file.
    pub fn roots(&self) -> impl Iterator<Item = &Root> {
        self.bundles.values().flat_map(|bundle| &bundle.roots)
    }

    /// Whether `other` trusts the same roots, so that nothing need change.
    fn same_roots(&self, other: &Self) -> bool {
        self.roots().eq(other.roots())
    }
}

/// The bytes of a file that is no larger than a bundle.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, BundleError> {
    let failed = |source| BundleError::Read { path: path.into(), source };
    if fs::metadata(path).map_err(failed)?.len() > MAX_BUNDLE_BYTES {
        return Err(BundleError::TooLarge { path: path.into() });
    }
    fs::read(path).map_err(failed)
}

/// The certificates in `pem`, which `path` holds.
pub(super) fn parse_roots(
    path: &Path,
    pem: &[u8],
) -> Result<Vec<(CertificateDer<'static>, Root)>, BundleError> {
    let mut roots = Vec::new();
    for der in CertificateDer::pem_slice_iter(pem) {
        let index = roots.len() + 1;
        let der = der.map_err(|_not_pem| BundleError::NotPem { path: path.into(), index })?;
        let root = Root::parse(&der).map_err(|what| BundleError::NotARoot {
            path: path.into(),
            index,
            what,
        })?;
        roots.push((der, root));
    }
    if roots.is_empty() {
        return Err(BundleError::Empty { path: path.into() });
    }
    Ok(roots)
}

impl Root {
    fn parse(der: &CertificateDer<'_>) -> Result<Self, &'static str> {
        let Ok((rest, cert)) = X509Certificate::from_der(der) else {
            return Err("not an X.509 certificate; copy it whole");
        };
        if !rest.is_empty() {
            return Err("followed by bytes that belong to no certificate; copy it again");
        }
        if !cert.is_ca() {
            return Err("not a CA certificate; list the root that signs, not a workload's");
        }
        let trust_domain = trust_domain_of(&cert)?;
        Ok(Self {
            trust_domain,
            subject: cert.subject().to_string(),
            is_self_signed: cert.subject().as_raw() == cert.issuer().as_raw(),
            serial: super::hex(cert.raw_serial()),
            fingerprint: super::hex(digest(&SHA256, der).as_ref()),
            not_before: system_time(cert.validity().not_before.timestamp()),
            not_after: system_time(cert.validity().not_after.timestamp()),
            public_key: cert.public_key().subject_public_key.data.to_vec(),
        })
    }
}

fn trust_domain_of(cert: &X509Certificate<'_>) -> Result<Option<TrustDomain>, &'static str> {
    let Ok(names) = cert.subject_alternative_name() else {
        return Err("its subject alternative names cannot be read");
    };
    let uris = names.into_iter().flat_map(|names| &names.value.general_names).filter_map(|name| {
        if let GeneralName::URI(uri) = name { uri.strip_prefix("spiffe://") } else { None }
    });
    let mut found = None;
    for name in uris {
        let Ok(domain) = TrustDomain::new(name.trim_end_matches('/')) else {
            return Err("its URI is not spiffe://<trust domain>; a root has no path");
        };
        if found.replace(domain).is_some() {
            return Err("names two trust domains; a root is for one");
        }
    }
    Ok(found)
}

pub(super) fn system_time(unix_s: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(unix_s).unwrap_or(0))
}

/// Keeps the bundle of `identities` what the file says, for ever. Handshakes take the new
/// roots from that moment on, and whoever holds open tunnels learns of it ([`Identities::trusted`]).
///
/// A file that is wrong is reported once per change, and the last good roots stay in force.
///
/// # Errors
///
/// Only if the directory cannot be watched at all, at the start.
pub async fn follow(
    identities: Arc<Identities>,
    path: PathBuf,
    own: TrustDomain,
) -> Result<(), io::Error> {
    let dir = path.parent().unwrap_or_else(|| Path::new(".")).to_owned();
    let mut watch = DirWatch::open(&dir)?;
    let mut reported = String::new();
    loop {
        match TrustBundles::load(&path, &own) {
            Ok(bundles) => {
                if !reported.is_empty() {
                    info!(path = %path.display(), "trust bundle is valid again");
                    reported.clear();
                }
                if !bundles.same_roots(&identities.trust()) {
                    let roots = bundles.roots().count();
                    info!(path = %path.display(), roots, "trust bundle replaced");
                    identities.set_trust(bundles);
                }
                identities.set_trust_problem(None);
            }
            Err(error) => {
                let text = telemetry::chain(&error);
                if reported != text {
                    warn!(error = text, "trust bundle is wrong, the last good one stays in force");
                    reported = text;
                }
                identities.set_trust_problem(Some(error));
            }
        }
        watch.changed().await;
    }
}
