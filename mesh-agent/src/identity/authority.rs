//! What signs: a CA's certificate with its key, wherever they are kept, and what it makes of a key and
//! an identity.
//!
//! Nothing of what is certified is taken from a request but the key: the rest is the same for every
//! workload.

use std::path::Path;
use std::time::{Duration, SystemTime};

use aws_lc_rs::rand;
use mesh_core::spiffe::{SpiffeId, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use zeroize::Zeroize as _;

use super::bundle::{Root, parse_roots};
use super::ca::CaError;

/// Certificates begin this much before they are issued: a peer whose clock is behind must not
/// refuse a fresh one. Two minutes is what hosts without working NTP drift in weeks.
const BACKDATE: Duration = Duration::from_secs(120);

const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);

/// A CA that can sign.
pub(super) struct Authority {
    root: Root,
    issuer: rcgen::Issuer<'static, WipedKey>,
    /// What is sent behind a leaf: the certificates between it and its root.
    above: Vec<CertificateDer<'static>>,
}

// By hand: the key must not reach a log.
impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("root", &self.root).finish_non_exhaustive()
    }
}

/// A certificate, as signed.
#[derive(Clone, Debug)]
pub(super) struct Signed {
    /// The leaf first, without the root.
    pub(super) chain: Vec<CertificateDer<'static>>,
    /// In hex.
    pub(super) serial: String,
    /// Valid from.
    pub(super) not_before: SystemTime,
    /// Valid until, exclusive.
    pub(super) not_after: SystemTime,
}

impl Authority {
    /// Of the first certificate in `pem` and its key. What follows are the certificates above it; of
    /// these a root is left out, since peers have it.
    ///
    /// # Errors
    ///
    /// If a certificate is not a CA's, or the key is not the first one's. `cert_place` and
    /// `key_place` are named then.
    pub(super) fn new(
        cert_place: &Path,
        pem: &[u8],
        key_place: &Path,
        key: &str,
    ) -> Result<Self, CaError> {
        let certs = parse_roots(cert_place, pem)?;
        let wrong_key = || CaError::WrongKey { path: key_place.into() };
        let key = WipedKey(KeyPair::from_pem(key).map_err(|_not_a_key| wrong_key())?);
        let above = certs.iter().filter(|(_, root)| !root.is_self_signed);
        let above = above.map(|(der, _)| der.clone()).collect();
        let Some((der, root)) = certs.into_iter().next() else { return Err(wrong_key()) };
        if key.der_bytes() != root.public_key {
            return Err(wrong_key());
        }
        Ok(Self { issuer: rcgen::Issuer::from_ca_cert_der(&der, key)?, root, above })
    }

    /// The certificate that signs.
    pub(super) fn root(&self) -> &Root {
        &self.root
    }

    /// Certifies `public_key` as `id`, from a little before `now` for `lifetime`, but not beyond the
    /// CA's own end.
    ///
    /// # Errors
    ///
    /// If the CA's certificate is not valid now.
    pub(super) fn sign(
        &self,
        id: &SpiffeId,
        public_key: &impl PublicKeyData,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Signed, CaError> {
        if now < self.root.not_before || self.root.not_after <= now {
            return Err(CaError::RootNotValid);
        }
        let not_before = whole_seconds(now - BACKDATE).max(self.root.not_before);
        let not_after = whole_seconds(now + lifetime).min(self.root.not_after);
        let serial = random_serial()?;
        let mut leaf = CertificateParams::default();
        // X509-SVID section 2 and RFC 5280 section 4.2.1.6: without a subject, the name is the URI
        // alone and is critical.
        leaf.distinguished_name = DistinguishedName::new();
        leaf.subject_alt_names = vec![SanType::URI(id.to_string().as_str().try_into()?)];
        leaf.serial_number = Some(SerialNumber::from_slice(&serial));
        leaf.not_before = not_before.into();
        leaf.not_after = not_after.into();
        leaf.is_ca = IsCa::ExplicitNoCa;
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        leaf.use_authority_key_identifier_extension = true;
        let cert = leaf.signed_by(public_key, &self.issuer)?;
        let chain = std::iter::once(cert.der()).chain(&self.above).cloned().collect();
        Ok(Signed { chain, serial: super::hex(&serial), not_before, not_after })
    }
}

/// A CA's key that is wiped when dropped.
struct WipedKey(KeyPair);

impl Drop for WipedKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl PublicKeyData for WipedKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        PublicKeyData::algorithm(&self.0)
    }
}

impl rcgen::SigningKey for WipedKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.0.sign(message)
    }
}

/// A new root for `trust_domain`, good for ten years, and its key.
pub(super) fn make_root(
    trust_domain: &TrustDomain,
    now: SystemTime,
) -> Result<(rcgen::Certificate, KeyPair), CaError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let serial = random_serial()?;
    let mut root = CertificateParams::default();
    root.distinguished_name = DistinguishedName::new();
    root.distinguished_name.push(DnType::OrganizationName, "Malla");
    // Told apart in a bundle that holds an old and a new one.
    let name = format!("{trust_domain} root {}", super::hex(serial.get(..4).unwrap_or_default()));
    root.distinguished_name.push(DnType::CommonName, name);
    let uri = format!("spiffe://{trust_domain}");
    root.subject_alt_names = vec![SanType::URI(uri.as_str().try_into()?)];
    root.serial_number = Some(SerialNumber::from_slice(&serial));
    root.not_before = OffsetDateTime::from(whole_seconds(now - BACKDATE));
    root.not_after = OffsetDateTime::from(whole_seconds(now + ROOT_LIFETIME));
    // No intermediates below: the key signs leaves.
    root.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    root.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok((root.self_signed(&key)?, key))
}

/// 127 random bits: RFC 5280 section 4.1.2.2 wants a positive number of at most 20 bytes.
fn random_serial() -> Result<[u8; 16], CaError> {
    let mut serial = [0; 16];
    rand::fill(&mut serial).map_err(|_unspecified| CaError::NoRandomness)?;
    serial[0] = serial[0] & 0x7f | 0x40; // Positive, and never shortened by leading zeros.
    Ok(serial)
}

/// Certificates know seconds; rounding down keeps what we report equal to what they say.
fn whole_seconds(at: SystemTime) -> SystemTime {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::testing::id;

    /// Of `openssl ecparam` and `openssl req -x509`: a key in the form of SEC 1, as cert-manager writes
    /// it, too.
    const KEY: &str = "\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIAykNGImXzxOoQIYNdTqbhVhY0uD6eQARQyYEx9gXYu1oAoGCCqGSM49
AwEHoUQDQgAEU/cC8EVYOcgFJBtfikJMKD2qc4OHTtbYx9AGSJ5rkMLxmzDT6J7J
z+Yj+NXCh/aJoG72M9pgGowljdFQ0NNxCA==
-----END EC PRIVATE KEY-----
";
    const CERT: &str = "\
-----BEGIN CERTIFICATE-----
MIIBrTCCAVSgAwIBAgIUWptaG+1PbkDzsjbxkrcbG11jtbYwCgYIKoZIzj0EAwIw
ETEPMA0GA1UECgwGdGhlaXJzMCAXDTI2MTEyNjIwMjU0MFoYDzIxMjYxMTAyMjAy
NTQwWjARMQ8wDQYDVQQKDAZ0aGVpcnMwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AART9wLwRVg5yAUkG1+KQkwoPapzg4dO1tjH0AZInmuQwvGbMNPonsnP5iP41cKH
9omgbvYz2mAajCWN0VDQ03EIo4GHMIGEMB0GA1UdDgQWBBRhwBXA9NiKElOU+8LA
9I/0UrZtBTAfBgNVHSMEGDAWgBRhwBXA9NiKElOU+8LA9I/0UrZtBTAPBgNVHRMB
Af8EBTADAQH/MA4GA1UdDwEB/wQEAwICBDAhBgNVHREEGjAYhhZzcGlmZmU6Ly9j
bHVzdGVyLmxvY2FsMAoGCCqGSM49BAMCA0cAMEQCIHZgRGpxbjJvBF7bN2AtuMOz
pcImQfP/7fEIbdZV+V7VAiAKosZEZXC10VXehG+0+DO5hJDg9sN11wSpBoUFeZGw
pg==
-----END CERTIFICATE-----
";

    fn authority(pem: &str, key: &str) -> Result<Authority, CaError> {
        Authority::new(Path::new("tls.crt"), pem.as_bytes(), Path::new("tls.key"), key)
    }

    #[test]
    fn key_of_openssl_signs_and_another_key_does_not() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let leaf = KeyPair::generate().unwrap();
        let hour = Duration::from_secs(3600);
        let signed = authority(CERT, KEY).unwrap().sign(&id("web"), &leaf, hour, now).unwrap();
        assert_eq!(signed.chain.len(), 1, "peers have the root");
        assert_eq!(signed.not_after, now + hour);
        for wrong in [KeyPair::generate().unwrap().serialize_pem(), "hello".to_owned()] {
            let error = authority(CERT, &wrong).unwrap_err();
            assert_eq!(error.reason(), "root_key", "{error}");
            assert!(error.to_string().contains("tls.key"), "{error}");
        }
        assert_eq!(authority("", KEY).unwrap_err().reason(), "root_malformed");
    }

    #[test]
    fn nothing_outlives_what_signed_it() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let leaf = KeyPair::generate().unwrap();
        let authority = authority(CERT, KEY).unwrap();
        let end = authority.root().not_after;
        let almost = end - Duration::from_secs(60);
        let hour = Duration::from_secs(3600);
        assert_eq!(authority.sign(&id("web"), &leaf, hour, almost).unwrap().not_after, end);
        for outside in [end, authority.root().not_before - Duration::from_secs(1)] {
            let error = authority.sign(&id("web"), &leaf, hour, outside).unwrap_err();
            assert_eq!(error.reason(), "root_not_valid");
        }
        assert!(authority.sign(&id("web"), &leaf, hour, now).is_ok());
    }
}
