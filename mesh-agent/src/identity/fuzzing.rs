//! Bundles, certificate chains and requests for certificates as the fuzzer makes them.

use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use mesh_core::spiffe::TrustDomain;
use rustls::pki_types::{CertificateDer, UnixTime};

use super::bundle::{TrustBundles, parse_roots};
use super::verify::{PeerRole, svid_rules, verify_peer};

/// The root of `cluster.local` that has signed what chains begin with; its key is nowhere.
const ROOT: &[u8] = include_bytes!("../../fuzz/seeds/bundle/root");

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
