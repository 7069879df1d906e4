//! What comes from the API that has to do with certificates, as the fuzzer writes it: what is written beside the
//! trusted roots, by signers of all versions and whoever may change the ConfigMap; requests, by whoever may make
//! them; and somebody else's signer's answers.

use std::sync::OnceLock;
use std::time::Duration;

use mesh_core::sign::{Facts, Rules};
use mesh_core::spiffe::{SpiffeId, TrustDomain};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::api::{ConfigMap, REQUESTS, SigningRequest};
use super::published::{Held, Published, SINCE, follow, mark, signs_on};
use super::requests::answer;
use super::signer::claim;
use crate::discovery::client::escaped;
use crate::discovery::kube::ObjectMeta;
use crate::identity::request;

/// A leaf of `web` in `default`, whose key is nowhere.
const LEAF: &[u8] = include_bytes!("../../../fuzz/seeds/chain/good");

const NOW_S: u64 = 1_800_000_000;
const SPREAD: Duration = Duration::from_secs(180);

/// Any text is refused, or is the same when it is written again; and what follows from it names every root
/// in use, forgets none before its time, invents none, and is the same a second time.
pub fn published(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let Some(before) = read(text) else { return };
    let again = serde_json::to_string(&before).ok().and_then(|text| read(&text));
    assert_eq!(again.as_ref(), Some(&before), "written again");

    let first = before.first().map(|root| root.fingerprint.clone());
    let named: Vec<String> = ["new".to_owned()].into_iter().chain(first).collect();
    let mut roots = follow(Some(&before), &named, NOW_S);
    let is_in = |roots: &[Published], name: &str| roots.iter().any(|root| root.fingerprint == name);
    for root in &roots {
        let is_named = named.contains(&root.fingerprint);
        assert!(is_named || is_in(&before, &root.fingerprint), "invented");
        assert_eq!(is_named, root.until.is_none(), "what is in use has no end, and all else has");
        assert!(root.until.is_none_or(|until| NOW_S < until), "its time is over");
    }
    assert!(named.iter().all(|name| is_in(&roots, name)), "a root in use is missing");
    for root in &before {
        let is_over = root.until.is_some_and(|until| until <= NOW_S);
        assert!(is_over || is_in(&roots, &root.fingerprint), "forgotten before its time");
    }
    assert_eq!(follow(Some(&roots), &named, NOW_S), roots, "followed again");

    // Nothing signs on that no published root vouches for, nor what its readers do not have yet.
    assert!(!signs_on(&before, &[], SPREAD, NOW_S));
    let (new, is_known) = (&named[..1], is_in(&before, "new"));
    assert!(is_known || !signs_on(&before, new, SPREAD, NOW_S));
    mark(&mut roots, new);
    assert_eq!(roots.iter().filter(|root| root.signs).count(), 1);
    assert!(is_known || !signs_on(&roots, new, SPREAD, NOW_S));
}

/// Any object that is a request is denied, or claims an identity of the trust domain on one node, by the agent; and
/// that is granted by nobody but the cluster. No name leads to another place of the API.
pub fn signing(input: &[u8]) {
    let Ok(asked) = serde_json::from_slice::<SigningRequest>(input) else { return };
    let path = asked.path();
    let name = path.strip_prefix(REQUESTS).and_then(|name| name.strip_prefix('/'));
    let is_one_part = |name: &str| {
        name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.~%".contains(&byte))
    };
    assert!(name.is_some_and(is_one_part), "{path}");
    let Ok(trust_domain) = TrustDomain::new("cluster.local") else { return };
    let agent = "system:serviceaccount:malla-system:malla-agent".to_owned();
    let rules = Rules { trust_domain, agent };
    let read = request::read(&asked.spec.request.0);
    let Ok(claim) = claim(&asked, read.as_ref(), &rules) else { return };
    assert_eq!(asked.spec.username, rules.agent);
    let (id, node) = (claim.identity(), claim.node());
    assert_eq!(id.trust_domain(), &rules.trust_domain);
    for part in [id.namespace(), id.service_account(), node] {
        assert!(!part.is_empty() && escaped(part) == part, "{part:?} in a path");
    }
    assert!(claim.confirm(&Facts { node_uid: None, pods: &[] }).is_err(), "of no node");
}

/// Any text is refused, or certifies the key and the identity that were asked for.
pub fn signed(input: &[u8]) {
    let Some((id, key)) = asked_for() else { return };
    let Ok(signed) = answer(input, id, key) else { return };
    let leaf = X509Certificate::from_der(&signed.chain[0]);
    assert!(leaf.is_ok_and(|(_, leaf)| *leaf.public_key().subject_public_key.data == *key));
}

/// The identity and the key of [`LEAF`].
fn asked_for() -> Option<&'static (SpiffeId, Vec<u8>)> {
    static ASKED: OnceLock<Option<(SpiffeId, Vec<u8>)>> = OnceLock::new();
    let make = || {
        let (_, leaf) = X509Certificate::from_der(LEAF.get(2..)?).ok()?;
        let id = SpiffeId::new(TrustDomain::new("cluster.local").ok()?, "default", "web").ok()?;
        Some((id, leaf.public_key().subject_public_key.data.to_vec()))
    };
    ASKED.get_or_init(make).as_ref()
}

/// What is written in the annotation, if it is well-formed.
fn read(text: &str) -> Option<Vec<Published>> {
    let annotations = Some([(SINCE, text)].into_iter().collect());
    let metadata = ObjectMeta { annotations, ..ObjectMeta::default() };
    let map = ConfigMap { metadata, ..ConfigMap::default() };
    Held::of(Some(&map), "malla-system").ok()?.before()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_of_the_fuzzer_hold() {
        crate::fuzzing::replay("published", published);
        crate::fuzzing::replay("signing", signing);
        crate::fuzzing::replay("signed", signed);
    }

    #[test]
    fn answer_that_the_fuzzer_begins_with_is_a_good_one() {
        let (id, key) = asked_for().unwrap();
        let seed = include_bytes!("../../../fuzz/seeds/signed/good");
        assert_eq!(*answer(seed, id, key).unwrap().chain[0], LEAF[2..]);
    }

    #[test]
    fn request_that_the_fuzzer_begins_with_claims_an_identity() {
        let seed = include_bytes!("../../../fuzz/seeds/signing/good");
        let asked: SigningRequest = serde_json::from_slice(seed).unwrap();
        let agent = "system:serviceaccount:malla-system:malla-agent".to_owned();
        let rules = Rules { trust_domain: TrustDomain::new("cluster.local").unwrap(), agent };
        let read = request::read(&asked.spec.request.0);
        let claim = claim(&asked, read.as_ref(), &rules).unwrap();
        assert_eq!(claim.identity().to_string(), "spiffe://cluster.local/ns/default/sa/web");
    }

    #[test]
    fn what_the_fuzzer_begins_with_is_read() {
        for seed in [
            include_str!("../../../fuzz/seeds/published/two"),
            include_str!("../../../fuzz/seeds/published/signs"),
            include_str!("../../../fuzz/seeds/published/over"),
            include_str!("../../../fuzz/seeds/published/twice"),
        ] {
            assert!(!read(seed).unwrap().is_empty(), "{seed}");
        }
        assert_eq!(read(include_str!("../../../fuzz/seeds/published/wrong")), None);
    }
}
