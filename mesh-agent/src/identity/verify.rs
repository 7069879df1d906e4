//! Whether a peer's certificate chain proves an identity: the X509-SVID document, section 5.
//!
//! The claimed identity is read first, because it says *which* roots may vouch for it; nothing else
//! of the chain is believed before a path to one of those roots is verified. What the handshake
//! itself proves (that the peer holds the key) is rustls's part.

use std::fmt;

use mesh_core::spiffe::SpiffeId;
use rustls::pki_types::{CertificateDer, UnixTime};
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert, KeyUsage};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::bundle::TrustBundles;

/// What the peer was in the handshake: which extended key usage its certificate must allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PeerRole {
    /// It connected.
    Client,
    /// It accepted.
    Server,
}

/// Why a chain proves nothing. Carries none of what the peer sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PeerRefused {
    /// It sent no certificate.
    Missing,
    /// A certificate, or a part of it, is not what RFC 5280 says.
    Malformed,
    /// No URI in it, or one that is no workload's SPIFFE ID.
    NoSpiffeId,
    /// More than one URI: X509-SVID section 2 wants exactly one.
    ManySans,
    /// No root is trusted to vouch for the trust domain that it claims.
    UntrustedDomain,
    /// No path to a trusted root of the claimed trust domain: self-signed, another CA's, or an
    /// intermediate is missing.
    UnknownIssuer,
    /// It, or a certificate above it, is past its end.
    Expired,
    /// It, or a certificate above it, has not begun.
    NotYetValid,
    /// A signature does not verify, or is of a kind that is not accepted.
    BadSignature,
    /// It is a CA's, or not for signing, or not for this side of a handshake.
    WrongUsage,
    /// A path constraint of a CA is broken, or the chain is longer than is looked at.
    BadPath,
    /// It proves another workload than the one meant. Never [`verify_peer`]'s: who asks for a
    /// workload compares.
    WrongWorkload,
}

/// Certificates of a chain, and bytes of them all: a leaf and more CAs above it than anybody has.
const MAX_CHAIN: (usize, usize) = (8, 16 << 10);

impl PeerRefused {
    /// The `reason` label and the log field: a closed set.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Missing => "certificate_missing",
            Self::Malformed => "certificate_malformed",
            Self::NoSpiffeId => "no_spiffe_id",
            Self::ManySans => "many_sans",
            Self::UntrustedDomain => "untrusted_domain",
            Self::UnknownIssuer => "unknown_issuer",
            Self::Expired => "certificate_expired",
            Self::NotYetValid => "certificate_not_yet_valid",
            Self::BadSignature => "bad_signature",
            Self::WrongUsage => "wrong_usage",
            Self::BadPath => "bad_path",
            Self::WrongWorkload => "wrong_workload",
        }
    }
}

impl fmt::Display for PeerRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "the peer sent no certificate",
            Self::Malformed => "the peer's certificate is malformed",
            Self::NoSpiffeId => "the peer's certificate names no workload",
            Self::ManySans => "the peer's certificate has more than one URI",
            Self::UntrustedDomain => "no root is trusted for the peer's trust domain",
            Self::UnknownIssuer => "the peer's certificate is from an issuer that is not trusted",
            Self::Expired => "the peer's certificate has expired",
            Self::NotYetValid => "the peer's certificate is not valid yet",
            Self::BadSignature => "a signature in the peer's certificate chain does not verify",
            Self::WrongUsage => "the peer's certificate is not for this use",
            Self::BadPath => "the peer's certificate chain breaks a constraint",
            Self::WrongWorkload => "the peer is not the workload that was meant",
        })
    }
}

impl std::error::Error for PeerRefused {}

/// The identity that `chain` (the leaf first) proves at `now`.
///
/// # Errors
///
/// The first rule that is broken. When no path can be built for several reasons, the one that came
/// nearest to a valid path.
pub fn verify_peer(
    bundles: &TrustBundles,
    chain: &[CertificateDer<'_>],
    role: PeerRole,
    now: UnixTime,
) -> Result<SpiffeId, PeerRefused> {
    let (leaf, intermediates) = chain.split_first().ok_or(PeerRefused::Missing)?;
    // Before anything is parsed: it is kept for as long as the peer is connected, junk behind the leaf with it.
    if chain.len() > MAX_CHAIN.0 || chain.iter().map(|one| one.len()).sum::<usize>() > MAX_CHAIN.1 {
        return Err(PeerRefused::BadPath);
    }
    let cert = EndEntityCert::try_from(leaf).map_err(|error| refused(&error))?;
    let claimed = claimed(&cert)?;
    let anchors = bundles.anchors(claimed.trust_domain()).ok_or(PeerRefused::UntrustedDomain)?;
    let usage = match role {
        PeerRole::Client => KeyUsage::client_auth(),
        PeerRole::Server => KeyUsage::server_auth(),
    };
    cert.verify_for_usage(ALL_VERIFICATION_ALGS, anchors, intermediates, now, usage, None, None)
        .map_err(|error| refused(&error))?;
    svid_rules(leaf)?;
    Ok(claimed)
}

/// What the certificate says it is, not yet believed.
fn claimed(cert: &EndEntityCert<'_>) -> Result<SpiffeId, PeerRefused> {
    let mut uris = cert.valid_uri_names();
    let uri = uris.next().ok_or(PeerRefused::NoSpiffeId)?;
    if uris.next().is_some() {
        return Err(PeerRefused::ManySans);
    }
    SpiffeId::parse(uri).map_err(|_not_a_workload| PeerRefused::NoSpiffeId)
}

/// X509-SVID sections 4.1 and 4.3, which webpki does not look at. Runs after the path is verified,
/// so that only a trusted CA's bytes get here.
pub(super) fn svid_rules(leaf: &CertificateDer<'_>) -> Result<(), PeerRefused> {
    let (_, cert) =
        X509Certificate::from_der(leaf).map_err(|_unreadable| PeerRefused::Malformed)?;
    // webpki skips names that it cannot read; here each one counts.
    let names = cert.subject_alternative_name().map_err(|_unreadable| PeerRefused::Malformed)?;
    let names = names.ok_or(PeerRefused::NoSpiffeId)?;
    let uri = |name: &&GeneralName<'_>| matches!(name, GeneralName::URI(_));
    if names.value.general_names.iter().filter(uri).count() != 1 {
        return Err(PeerRefused::ManySans);
    }
    let usage = cert.key_usage().map_err(|_unreadable| PeerRefused::Malformed)?;
    let usage = usage.ok_or(PeerRefused::WrongUsage)?.value;
    if !usage.digital_signature() || usage.key_cert_sign() || usage.crl_sign() {
        return Err(PeerRefused::WrongUsage);
    }
    Ok(())
}

fn refused(error: &webpki::Error) -> PeerRefused {
    use webpki::Error as E;
    match error {
        E::CertExpired { .. } => PeerRefused::Expired,
        E::CertNotValidYet { .. } => PeerRefused::NotYetValid,
        E::UnknownIssuer | E::CertDistrusted => PeerRefused::UnknownIssuer,
        E::InvalidSignatureForPublicKey
        | E::SignatureAlgorithmMismatch
        | E::UnsupportedSignatureAlgorithmContext(_)
        | E::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => PeerRefused::BadSignature,
        E::CaUsedAsEndEntity | E::RequiredEkuNotFoundContext(_) | E::EmptyEkuExtension => {
            PeerRefused::WrongUsage
        }
        E::EndEntityUsedAsCa
        | E::PathLenConstraintViolated
        | E::NameConstraintViolation
        | E::MaximumPathBuildCallsExceeded
        | E::MaximumPathDepthExceeded
        | E::MaximumSignatureChecksExceeded
        | E::MaximumNameConstraintComparisonsExceeded => PeerRefused::BadPath,
        _ => PeerRefused::Malformed,
    }
}

#[cfg(test)]
mod tests {
    use std::iter;
    use std::time::{Duration, SystemTime};

    use rcgen::{
        BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa,
        Issuer, KeyPair, KeyUsagePurpose, SanType,
    };
    use time::OffsetDateTime;

    use super::*;
    use crate::dirwatch::testing::TempDir;
    use crate::identity::testing::{cluster_local, id};

    struct Ca {
        params: CertificateParams,
        key: KeyPair,
        cert: Certificate,
    }

    impl Ca {
        fn params(name: &str, path_len: u8) -> CertificateParams {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_len));
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            params
        }

        fn root(name: &str, trust_domain: &str) -> Self {
            let mut params = Self::params(name, 1);
            params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))];
            let key = KeyPair::generate().unwrap();
            let cert = params.self_signed(&key).unwrap();
            Self { params, key, cert }
        }

        fn intermediate(&self, params: CertificateParams) -> Self {
            let key = KeyPair::generate().unwrap();
            let cert = params.signed_by(&key, &self.issuer()).unwrap();
            Self { params, key, cert }
        }

        fn issuer(&self) -> Issuer<'_, &KeyPair> {
            Issuer::from_params(&self.params, &self.key)
        }

        fn leaf(&self, change: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
            let mut params = leaf();
            change(&mut params);
            let key = KeyPair::generate().unwrap();
            params.signed_by(&key, &self.issuer()).unwrap().der().clone()
        }
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    fn leaf() -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.subject_alt_names = vec![uri(&id("web").to_string())];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params
    }

    fn trusting(roots: &[&Ca]) -> TrustBundles {
        let dir = TempDir::new();
        let path = dir.path().join("bundle.pem");
        let pem: String = roots.iter().map(|ca| ca.cert.pem()).collect();
        std::fs::write(&path, pem).unwrap();
        TrustBundles::load(&path, &cluster_local()).unwrap()
    }

    fn verify(roots: &[&Ca], chain: &[CertificateDer<'_>]) -> Result<SpiffeId, PeerRefused> {
        let server = verify_peer(&trusting(roots), chain, PeerRole::Server, UnixTime::now());
        let client = verify_peer(&trusting(roots), chain, PeerRole::Client, UnixTime::now());
        assert_eq!(server, client);
        server
    }

    fn changed(change: impl FnOnce(&mut CertificateParams)) -> Result<SpiffeId, PeerRefused> {
        let root = Ca::root("root", "cluster.local");
        let leaf = root.leaf(change);
        verify(&[&root], &[leaf])
    }

    #[test]
    fn certificate_of_a_trusted_root_proves_its_identity() {
        assert_eq!(changed(|_| {}), Ok(id("web")));
    }

    #[test]
    fn chain_with_an_intermediate_counts_and_without_it_does_not() {
        let root = Ca::root("root", "cluster.local");
        let middle = root.intermediate(Ca::params("middle", 0));
        let leaf = middle.leaf(|_| {});
        let whole = [leaf.clone(), middle.cert.der().clone()];
        assert_eq!(verify(&[&root], &whole), Ok(id("web")));
        assert_eq!(verify(&[&root], &[leaf]), Err(PeerRefused::UnknownIssuer));
    }

    #[test]
    fn chain_that_is_too_long_is_refused_whatever_is_in_it() {
        let root = Ca::root("root", "cluster.local");
        let leaf = root.leaf(|_| {});
        let behind = |number: usize, len: usize| -> Vec<CertificateDer<'static>> {
            let junk = iter::repeat_n(CertificateDer::from(vec![7; len]), number);
            iter::once(leaf.clone()).chain(junk).collect()
        };
        assert_eq!(verify(&[&root], &behind(7, 100)), Ok(id("web")), "nobody needs them");
        assert_eq!(verify(&[&root], &behind(8, 1)), Err(PeerRefused::BadPath));
        assert_eq!(verify(&[&root], &behind(1, 16 << 10)), Err(PeerRefused::BadPath));
    }

    #[test]
    fn chain_below_a_leaf_is_refused() {
        let root = Ca::root("root", "cluster.local");
        let mut not_a_ca = leaf();
        not_a_ca.distinguished_name.push(DnType::CommonName, "not a ca");
        let not_a_ca = root.intermediate(not_a_ca);
        let chain = [not_a_ca.leaf(|_| {}), not_a_ca.cert.der().clone()];
        assert_eq!(verify(&[&root], &chain), Err(PeerRefused::BadPath));
    }

    #[test]
    fn intermediate_deeper_than_allowed_is_refused() {
        let root = Ca::root("root", "cluster.local");
        let middle = root.intermediate(Ca::params("middle", 0));
        let lower = middle.intermediate(Ca::params("lower", 0));
        let chain = [lower.leaf(|_| {}), lower.cert.der().clone(), middle.cert.der().clone()];
        assert_eq!(verify(&[&root], &chain), Err(PeerRefused::BadPath));
    }

    #[test]
    fn no_certificate_is_refused() {
        let root = Ca::root("root", "cluster.local");
        assert_eq!(verify(&[&root], &[]), Err(PeerRefused::Missing));
    }

    #[test]
    fn what_is_no_certificate_is_refused() {
        let root = Ca::root("root", "cluster.local");
        for bytes in [&b""[..], b"0", &[0x30, 0x82, 0xff, 0xff]] {
            let chain = [CertificateDer::from(bytes)];
            assert_eq!(verify(&[&root], &chain), Err(PeerRefused::Malformed), "{bytes:?}");
        }
    }

    #[test]
    fn certificate_without_a_workloads_uri_is_refused() {
        for sans in [
            vec![],
            vec![SanType::DnsName("web.default".try_into().unwrap())],
            vec![uri("https://cluster.local/ns/default/sa/web")],
            vec![uri("spiffe://cluster.local")],
        ] {
            let result = changed(|leaf| leaf.subject_alt_names = sans);
            assert_eq!(result, Err(PeerRefused::NoSpiffeId));
        }
    }

    #[test]
    fn dns_name_beside_the_uri_is_allowed() {
        let dns = SanType::DnsName("web.default".try_into().unwrap());
        assert_eq!(changed(|leaf| leaf.subject_alt_names.push(dns)), Ok(id("web")));
    }

    #[test]
    fn two_identities_in_one_certificate_are_refused() {
        let second = uri(&id("other").to_string());
        let result = changed(|leaf| leaf.subject_alt_names.push(second));
        assert_eq!(result, Err(PeerRefused::ManySans));
    }

    #[test]
    fn trust_domain_without_a_root_is_refused() {
        let foreign = vec![uri("spiffe://elsewhere/ns/default/sa/web")];
        let result = changed(|leaf| leaf.subject_alt_names = foreign);
        assert_eq!(result, Err(PeerRefused::UntrustedDomain));
    }

    #[test]
    fn root_vouches_for_its_own_trust_domain_only() {
        let ours = Ca::root("ours", "cluster.local");
        let theirs = Ca::root("theirs", "elsewhere");
        let forged = theirs.leaf(|_| {});
        assert_eq!(verify(&[&ours, &theirs], &[forged]), Err(PeerRefused::UnknownIssuer));
        let honest = theirs.leaf(|leaf| {
            leaf.subject_alt_names = vec![uri("spiffe://elsewhere/ns/default/sa/web")];
        });
        let id = verify(&[&ours, &theirs], &[honest]).unwrap();
        assert_eq!(id.trust_domain().as_str(), "elsewhere");
    }

    #[test]
    fn self_signed_certificate_is_refused() {
        let root = Ca::root("root", "cluster.local");
        let alone = leaf().self_signed(&KeyPair::generate().unwrap()).unwrap();
        let result = verify(&[&root], &[alone.der().clone()]);
        assert_eq!(result, Err(PeerRefused::UnknownIssuer));
    }

    #[test]
    fn root_of_the_same_name_with_another_key_is_refused() {
        let root = Ca::root("root", "cluster.local");
        let impostor = Ca::root("root", "cluster.local");
        let result = verify(&[&root], &[impostor.leaf(|_| {})]);
        assert_eq!(result, Err(PeerRefused::BadSignature));
    }

    #[test]
    fn changed_byte_is_refused() {
        let root = Ca::root("root", "cluster.local");
        let mut der = root.leaf(|_| {}).to_vec();
        let last = der.len() - 1;
        der[last] ^= 1;
        assert_eq!(verify(&[&root], &[der.into()]), Err(PeerRefused::BadSignature));
    }

    #[test]
    fn validity_is_judged_at_the_given_time() {
        let root = Ca::root("root", "cluster.local");
        let now = SystemTime::now();
        let leaf = root.leaf(|leaf| {
            leaf.not_before = OffsetDateTime::from(now - Duration::from_secs(60));
            leaf.not_after = OffsetDateTime::from(now + Duration::from_secs(60));
        });
        let at = |at: SystemTime| {
            let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap();
            let at = UnixTime::since_unix_epoch(since);
            verify_peer(&trusting(&[&root]), std::slice::from_ref(&leaf), PeerRole::Client, at)
        };
        assert_eq!(at(now), Ok(id("web")));
        assert_eq!(at(now + Duration::from_secs(62)), Err(PeerRefused::Expired));
        assert_eq!(at(now - Duration::from_secs(62)), Err(PeerRefused::NotYetValid));
    }

    #[test]
    fn ca_certificate_is_no_workloads() {
        let result = changed(|leaf| {
            leaf.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            leaf.key_usages.push(KeyUsagePurpose::KeyCertSign);
        });
        assert_eq!(result, Err(PeerRefused::WrongUsage));
    }

    #[test]
    fn key_that_may_not_sign_a_handshake_is_refused() {
        for usages in [
            vec![],
            vec![KeyUsagePurpose::KeyEncipherment],
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign],
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::CrlSign],
        ] {
            let result = changed(|leaf| leaf.key_usages = usages.clone());
            assert_eq!(result, Err(PeerRefused::WrongUsage), "{usages:?}");
        }
    }

    #[test]
    fn certificate_for_one_side_only_serves_that_side() {
        let root = Ca::root("root", "cluster.local");
        let server = root.leaf(|leaf| {
            leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        });
        let chain = [server];
        let as_role = |role| verify_peer(&trusting(&[&root]), &chain, role, UnixTime::now());
        assert_eq!(as_role(PeerRole::Server), Ok(id("web")));
        assert_eq!(as_role(PeerRole::Client), Err(PeerRefused::WrongUsage));
    }

    #[test]
    fn old_and_new_root_both_count_while_both_are_listed() {
        let old = Ca::root("root", "cluster.local");
        let new = Ca::root("root", "cluster.local");
        let (by_old, by_new) = ([old.leaf(|_| {})], [new.leaf(|_| {})]);
        for chain in [&by_old, &by_new] {
            assert_eq!(verify(&[&old, &new], chain), Ok(id("web")));
        }
        assert_eq!(verify(&[&new], &by_old), Err(PeerRefused::BadSignature));
        assert_eq!(verify(&[&new], &by_new), Ok(id("web")));
    }

    #[test]
    fn every_reason_is_its_own() {
        use PeerRefused as R;
        let all = [
            R::Missing,
            R::Malformed,
            R::NoSpiffeId,
            R::ManySans,
            R::UntrustedDomain,
            R::UnknownIssuer,
            R::Expired,
            R::NotYetValid,
            R::BadSignature,
            R::WrongUsage,
            R::BadPath,
        ];
        let reasons: std::collections::HashSet<_> = all.iter().map(|r| r.reason()).collect();
        assert_eq!(reasons.len(), all.len());
    }
}
