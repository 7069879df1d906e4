//! Bundles, certificate chains, requests for certificates and CAs as the fuzzer makes them.

use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use mesh_core::spiffe::{SpiffeId, TrustDomain};
use rcgen::SubjectPublicKeyInfo;
use rustls::pki_types::{CertificateDer, UnixTime};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::authority::Authority;
use super::bundle::{TrustBundles, parse_roots};
use super::verify::{PeerRole, svid_rules, verify_peer};

/// The root of `cluster.local` that has signed what chains begin with; its key is nowhere.
const ROOT: &[u8] = include_bytes!("../../fuzz/seeds/bundle/root");

/// A chain of one, which that has signed.
const GOOD: &[u8] = include_bytes!("../../fuzz/seeds/chain/good");

/// In the life of everything that [`ROOT`] has signed.
const NOW: UnixTime = UnixTime::since_unix_epoch(Duration::from_secs(1_800_000_000));

/// Any bytes are a bundle, whole, or refused.
pub fn bundle(input: &[u8]) {
    if let Ok(roots) = parse_roots(Path::new("bundle.pem"), input) {
        assert!(!roots.is_empty());
    }
    let Some(own) = own() else { return };
    drop(TrustBundles::parse(Path::new("bundle.pem"), input, &own));
}

/// Any certificates, each behind its length in two bytes, prove an identity of the trust domain whose
/// root is trusted, or none.
pub fn chain(mut input: &[u8]) {
    let mut chain = Vec::new();
    while let Some((&len, rest)) = input.split_first_chunk::<2>() {
        let (der, behind) = rest.split_at(usize::from(u16::from_be_bytes(len)).min(rest.len()));
        chain.push(CertificateDer::from_slice(der));
        input = behind;
    }
    // Only what a trusted CA has signed gets here otherwise, which no fuzzer can.
    if let Some(leaf) = chain.first() {
        _ = svid_rules(leaf);
    }
    let Some(bundles) = trusted() else { return };
    for role in [PeerRole::Client, PeerRole::Server] {
        if let Ok(id) = verify_peer(bundles, &chain, role, NOW) {
            assert_eq!(Some(id.trust_domain()), own().as_ref());
        }
    }
}

/// Any bytes are a request for a certificate, or none.
pub fn request(input: &[u8]) {
    drop(super::request::read(input));
}

/// Any text with a key behind it, between them a byte that is in no text, is a CA that signs what it was asked, or is
/// refused.
pub fn authority(input: &[u8]) {
    let mut parts = input.splitn(2, |byte| *byte == 0);
    let (cert, key) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let Ok(key) = std::str::from_utf8(key) else { return };
    let (place, key_place) = (Path::new("ca.pem"), Path::new("ca-key.pem"));
    let Ok(ca) = Authority::new(place, cert, key_place, key) else { return };
    assert!(!format!("{ca:?}").contains("PRIVATE"), "a key in a log");
    let root = ca.root();
    let (Some((id, key)), from) = (leaf(), root.not_before) else { return };
    let Ok(signed) = ca.sign(id, key, Duration::from_secs(3600), from) else { return };
    assert!(signed.not_before >= from && signed.not_after <= root.not_after, "outside of its life");
    let cert = signed.chain.first().and_then(|der| X509Certificate::from_der(der).ok());
    assert!(cert.is_some_and(|(_, cert)| !cert.is_ca()), "signed a CA, or nothing");
}

/// What is asked of a CA: an identity, and a key.
fn leaf() -> Option<&'static (SpiffeId, SubjectPublicKeyInfo)> {
    static LEAF: OnceLock<Option<(SpiffeId, SubjectPublicKeyInfo)>> = OnceLock::new();
    let make = || {
        let (_, cert) = X509Certificate::from_der(GOOD.get(2..)?).ok()?;
        let key = SubjectPublicKeyInfo::from_der(cert.public_key().raw).ok()?;
        Some((SpiffeId::new(own()?, "default", "web").ok()?, key))
    };
    LEAF.get_or_init(make).as_ref()
}

fn own() -> Option<TrustDomain> {
    TrustDomain::new("cluster.local").ok()
}

fn trusted() -> Option<&'static TrustBundles> {
    static TRUSTED: OnceLock<Option<TrustBundles>> = OnceLock::new();
    let read = || TrustBundles::parse(Path::new("root.pem"), ROOT, &own()?).ok();
    TRUSTED.get_or_init(read).as_ref()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_of_the_fuzzer_hold() {
        crate::fuzzing::replay("bundle", bundle);
        crate::fuzzing::replay("chain", chain);
        crate::fuzzing::replay("request", request);
        crate::fuzzing::replay("authority", authority);
    }

    #[test]
    fn ca_that_the_fuzzer_begins_with_signs() {
        let seed = include_bytes!("../../fuzz/seeds/authority/good");
        let (cert, key) = std::str::from_utf8(seed).unwrap().split_once('\0').unwrap();
        let place = Path::new("ca.pem");
        let ca = Authority::new(place, cert.as_bytes(), place, key).unwrap();
        let (id, key) = leaf().unwrap();
        let from = ca.root().not_before;
        assert_eq!(ca.sign(id, key, Duration::from_secs(60), from).unwrap().chain.len(), 1);
    }

    #[test]
    fn chain_that_the_fuzzer_begins_with_is_a_good_one() {
        let seed = include_bytes!("../../fuzz/seeds/chain/good");
        let chain = [CertificateDer::from_slice(&seed[2..])];
        for role in [PeerRole::Client, PeerRole::Server] {
            let id = verify_peer(trusted().unwrap(), &chain, role, NOW).unwrap();
            assert_eq!(id.to_string(), "spiffe://cluster.local/ns/default/sa/web");
        }
    }
}
