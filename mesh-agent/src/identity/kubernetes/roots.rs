//! The CA's own certificate, and the roots that agents trust: read from the Secret, made if there is
//! none, published in the ConfigMap.
//!
//! ```text
//! Secret replaced ──► both roots published ──► spread ──► the new one signs ──► the old one retires
//!                     the old one still signs   minutes                          a day later
//! ```
//!
//! # Guarantees
//!
//! - Nothing is signed below a root that has not been in the ConfigMap for as long as its readers may
//!   take to read it.
//! - A root stays published for as long as what was signed below it may live, also when the Secret
//!   does not name it any more.
//! - A Secret that cannot be used changes nothing: what could sign before still does.
//! - A ConfigMap that is deleted or emptied is put back as it was. Only who starts without one takes
//!   what the Secret names for all there is.
//!
//! When each root was published is kept beside it, in an annotation: another signer that takes over
//! knows as much.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::ByteString;
use mesh_core::sign::MAX_LIFETIME;
use mesh_core::spiffe::{SpiffeId, TrustDomain};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::pki_types::{CertificateDer, UnixTime};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tracing::info;
use zeroize::{Zeroize as _, Zeroizing};

use super::api::{Api, ConfigMap, Named, Secret};
use super::{CONFIG_MAP, SECRET, pem};
use crate::identity::authority::{Authority, make_root};
use crate::identity::bundle::{Root, TrustBundles, parse_roots};
use crate::identity::ca::CaError;
use crate::identity::verify::{PeerRole, verify_peer};

/// The signing certificate, and what is above it.
const CERT: &str = "tls.crt";
/// Its key.
const KEY: &str = "tls.key";
/// More roots to trust.
const ROOTS: &str = "ca.crt";
/// The file that agents have mounted.
const BUNDLE: &str = "bundle.pem";
/// Where the ConfigMap says since when each root is in it.
const SINCE: &str = "malla.dev/roots";

/// How long a root that is named no more is published: the longest life of a certificate, and an hour
/// for those that were being made.
const RETIREMENT: Duration = MAX_LIFETIME.saturating_add(Duration::from_secs(3600));

/// A published root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Published {
    fingerprint: String,
    /// Unix seconds; `None` if it was there from the beginning, before any agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    since: Option<u64>,
    /// Until when it stays though the Secret does not name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    until: Option<u64>,
}

/// What is to be published when `named` are the roots in use and `before` was published; `None` before
/// the first time.
fn follow(before: Option<&[Published]>, named: &[String], now_s: u64) -> Vec<Published> {
    let known = before.unwrap_or_default();
    let mut roots: Vec<Published> = Vec::new();
    for fingerprint in named {
        let new = Published {
            fingerprint: fingerprint.clone(),
            since: before.map(|_| now_s),
            until: None,
        };
        let found = known.iter().find(|root| root.fingerprint == *fingerprint);
        let root = found.map_or(new, |root| Published { until: None, ..root.clone() });
        if !roots.contains(&root) {
            roots.push(root);
        }
    }
    for root in known.iter().filter(|root| !named.contains(&root.fingerprint)) {
        let until = *root.until.as_ref().unwrap_or(&(now_s + RETIREMENT.as_secs()));
        if now_s < until {
            roots.push(Published { until: Some(until), ..root.clone() });
        }
    }
    roots
}

impl Published {
    /// Whether every reader has it.
    fn is_spread(&self, spread: Duration, now_s: u64) -> bool {
        self.since.is_none_or(|since| since.saturating_add(spread.as_secs()) <= now_s)
    }
}

/// How it stands.
#[derive(Clone, Debug)]
pub(super) struct Standing {
    /// What signs.
    pub(super) authority: Arc<Authority>,
    /// Whether what the Secret holds does not sign yet.
    pub(super) waits: bool,
}

/// Keeps Secret and ConfigMap in step.
#[derive(Debug)]
pub(super) struct Roots {
    pub(super) api: Api,
    pub(super) namespace: String,
    pub(super) trust_domain: TrustDomain,
    /// How long readers of the ConfigMap may take.
    pub(super) spread: Duration,
    /// What has signed last.
    pub(super) current: Option<Arc<Authority>>,
    /// What was published last.
    pub(super) last: Option<(Vec<Published>, Certs)>,
}

pub(super) type Certs = Vec<(CertificateDer<'static>, Root)>;

impl Roots {
    /// Looks at the Secret, publishes what is to be trusted, and says what signs.
    ///
    /// # Errors
    ///
    /// If the API does not answer, or what the Secret holds cannot be used. What could sign before
    /// may still.
    pub(super) async fn look(&mut self, now: SystemTime) -> Result<Standing, CaError> {
        let secret = self.secret(now).await?;
        let (candidate, mut certs) = self.read(&secret)?;
        let candidate = Arc::new(candidate);
        let (map, old) = self.published().await?;
        let is_lost = old.is_empty();
        let (before, old) = match &self.last {
            Some((roots, certs)) if is_lost => (Some(roots.clone()), certs.clone()),
            _ => (before(map.as_ref(), &old)?, old),
        };
        certs.extend(old);

        let mut vouching = self.vouching(&candidate, &certs, now)?;
        if vouching.is_empty() {
            return Err(CaError::NoRoot { place: self.place(CERT).display().to_string() });
        }
        let now_s = unix_s(now);
        let is_spread = |root: &Published| {
            vouching.contains(&root.fingerprint) && root.is_spread(self.spread, now_s)
        };
        let may_sign = before.as_deref().is_none_or(|roots| roots.iter().any(is_spread));
        // Those in `ca.crt` and those that vouch: more than one may.
        let named: Vec<_> = named(&secret, &self.place(ROOTS))?;
        vouching.retain(|fingerprint| !named.contains(fingerprint));
        let mut in_use = [vouching, named].concat();
        // Not once the Secret's may sign: another signer may have let the old one retire meanwhile.
        if let Some(current) = self.current.as_ref().filter(|_| !may_sign) {
            // One that has expired needs nobody any more.
            in_use.extend(self.vouching(current, &certs, now).unwrap_or_default());
        }
        let roots = follow(before.as_deref(), &in_use, now_s);
        if is_lost || before.as_deref() != Some(&roots) {
            self.publish(map.as_ref(), &roots, &certs).await?;
        }
        self.last = Some((roots.clone(), certs.clone()));
        let spread = roots.iter().filter(|root| root.is_spread(self.spread, now_s));
        let spread: Vec<_> = spread.map(|root| root.fingerprint.as_str()).collect();
        certs.retain(|(_, root)| spread.contains(&root.fingerprint.as_str()));
        let waits = self.vouching(&candidate, &certs, now)?.is_empty();
        // What has signed in an earlier term may be trusted by nobody any more.
        let current = self.current.as_ref().filter(|current| {
            let trusted = self.vouching(current, &certs, now).unwrap_or_default();
            waits && !trusted.is_empty()
        });
        let authority = match current {
            Some(current) => Arc::clone(current),
            None if waits => return Err(CaError::NotSpread),
            None => candidate,
        };
        self.current = Some(Arc::clone(&authority));
        Ok(Standing { authority, waits })
    }

    /// The Secret, which is made if there is none.
    async fn secret(&self, now: SystemTime) -> Result<Secret, CaError> {
        let dir = format!("/api/v1/namespaces/{}/secrets", self.namespace);
        let path = format!("{dir}/{SECRET}");
        if let Some(secret) = self.api.get::<Secret>(&path).await? {
            return Ok(secret);
        }
        let (cert, mut key) = make_root(&self.trust_domain, now)?;
        let pem = Zeroizing::new(key.serialize_pem());
        key.zeroize();
        let cert = cert.pem();
        let secret = json!({
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "kubernetes.io/tls",
            "metadata": {"name": SECRET, "namespace": self.namespace},
            "stringData": {CERT: cert, KEY: *pem, ROOTS: cert},
        });
        match self.api.create::<Named>(&dir, &secret).await {
            Ok(_) => info!(secret = SECRET, "made a new root"),
            Err(error) if error.is_conflict() => {}
            Err(error) => return Err(error.into()),
        }
        let gone = || CaError::NoRoot { place: self.place(CERT).display().to_string() };
        self.api.get::<Secret>(&path).await?.ok_or_else(gone)
    }

    /// What the Secret holds: the authority, and every certificate in it.
    fn read(&self, secret: &Secret) -> Result<(Authority, Certs), CaError> {
        let (cert, key) = (self.place(CERT), self.place(KEY));
        let pem = bytes(secret, CERT);
        let text = std::str::from_utf8(bytes(secret, KEY)).unwrap_or_default();
        let authority = Authority::new(&cert, pem, &key, text)?;
        let mut certs = parse_roots(&cert, pem)?;
        certs.retain(|(_, root)| root.is_self_signed);
        if !bytes(secret, ROOTS).is_empty() {
            certs.extend(parse_roots(&self.place(ROOTS), bytes(secret, ROOTS))?);
        }
        Ok((authority, certs))
    }

    async fn published(&self) -> Result<(Option<ConfigMap>, Certs), CaError> {
        let path = format!("/api/v1/namespaces/{}/configmaps/{CONFIG_MAP}", self.namespace);
        let map = self.api.get::<ConfigMap>(&path).await?;
        let pem = map.as_ref().and_then(|map| map.data.get(BUNDLE));
        let place = format!("ConfigMap {}/{CONFIG_MAP}", self.namespace);
        let certs = match pem.filter(|pem| !pem.is_empty()) {
            Some(pem) => parse_roots(Path::new(&place), pem.as_bytes())?,
            None => Vec::new(),
        };
        // Somebody may have made it without anything in it.
        Ok((map, certs))
    }

    /// The fingerprints of those among `certs` that vouch for what `authority` signs: asked of the
    /// verifier that peers ask.
    fn vouching(
        &self,
        authority: &Authority,
        certs: &Certs,
        now: SystemTime,
    ) -> Result<Vec<String>, CaError> {
        let probe = SpiffeId::new(self.trust_domain.clone(), "malla", "probe")
            .map_err(|_impossible| CaError::NoRandomness)?;
        let mut key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let signed = authority.sign(&probe, &key, Duration::from_secs(60), now);
        key.zeroize();
        let chain = signed?.chain;
        let at = UnixTime::since_unix_epoch(Duration::from_secs(unix_s(now)));
        let mut found = Vec::new();
        for (der, root) in certs {
            let trust = TrustBundles::of(der, root.clone(), &self.trust_domain);
            if verify_peer(&trust, &chain, PeerRole::Server, at).is_ok()
                && !found.contains(&root.fingerprint)
            {
                found.push(root.fingerprint.clone());
            }
        }
        Ok(found)
    }

    async fn publish(
        &self,
        map: Option<&ConfigMap>,
        roots: &[Published],
        certs: &Certs,
    ) -> Result<(), CaError> {
        let mut text = String::new();
        for root in roots {
            let cert = certs.iter().find(|(_, cert)| cert.fingerprint == root.fingerprint);
            if let Some((der, cert)) = cert {
                text.push_str(&format!("# {}\n{}", cert.subject, pem(der)));
            }
        }
        let since = serde_json::to_string(roots).unwrap_or_default();
        let mut object = json!({
            "metadata": {"annotations": {SINCE: since}},
            "data": {BUNDLE: text},
        });
        let dir = format!("/api/v1/namespaces/{}/configmaps", self.namespace);
        match map {
            Some(map) => {
                object["metadata"]["resourceVersion"] = json!(map.metadata.resource_version);
                self.api.patch::<Named>(&format!("{dir}/{CONFIG_MAP}"), &object).await?
            }
            None => {
                object["apiVersion"] = json!("v1");
                object["kind"] = json!("ConfigMap");
                object["metadata"]["name"] = json!(CONFIG_MAP);
                object["metadata"]["namespace"] = json!(self.namespace);
                self.api.create::<Named>(&dir, &object).await?
            }
        };
        info!(roots = roots.len(), config_map = CONFIG_MAP, "trusted roots published");
        Ok(())
    }

    /// For error texts.
    fn place(&self, key: &str) -> std::path::PathBuf {
        format!("Secret {}/{SECRET}, {key}", self.namespace).into()
    }
}

fn bytes<'a>(secret: &'a Secret, key: &str) -> &'a [u8] {
    secret.data.get(key).map(|ByteString(bytes)| bytes.as_slice()).unwrap_or_default()
}

/// The fingerprints of the roots that the Secret's owner lists.
fn named(secret: &Secret, place: &Path) -> Result<Vec<String>, CaError> {
    let pem = bytes(secret, ROOTS);
    if pem.is_empty() {
        return Ok(Vec::new());
    }
    Ok(parse_roots(place, pem)?.into_iter().map(|(_, root)| root.fingerprint).collect())
}

/// What the ConfigMap, with the roots `certs` in it, says of them; `None` before the first time.
fn before(map: Option<&ConfigMap>, certs: &Certs) -> Result<Option<Vec<Published>>, CaError> {
    let annotations = map.and_then(|map| map.metadata.annotations.as_ref());
    if let Some(text) = annotations.and_then(|map| map.get(SINCE)) {
        let roots = serde_json::from_str(text);
        return roots.map(Some).map_err(|source| CaError::Annotation { source });
    }
    // Somebody else has put them there.
    let published = |(_, root): &(_, Root)| Published {
        fingerprint: root.fingerprint.clone(),
        since: None,
        until: None,
    };
    Ok((!certs.is_empty()).then(|| certs.iter().map(published).collect()))
}

fn unix_s(at: SystemTime) -> u64 {
    at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use kube::Client;

    use super::*;
    use crate::identity::kubernetes::testing::{SECRET as AT, Server, new_root};
    use crate::identity::testing::cluster_local;

    const SPREAD: Duration = Duration::from_secs(180);
    const MAP: &str = "/api/v1/namespaces/malla-system/configmaps/malla-trust";

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn root(name: &str, since: Option<u64>, until: Option<u64>) -> Published {
        Published { fingerprint: name.to_owned(), since, until }
    }

    #[test]
    fn first_root_signs_at_once() {
        let roots = follow(None, &names(&["a", "a"]), 1000);
        assert_eq!(roots, [root("a", None, None)]);
        assert!(roots[0].is_spread(SPREAD, 1000));
    }

    #[test]
    fn new_root_signs_when_its_readers_have_it() {
        let roots = follow(Some(&[root("a", None, None)]), &names(&["b", "a"]), 1000);
        assert_eq!(roots, [root("b", Some(1000), None), root("a", None, None)]);
        assert!(!roots[0].is_spread(SPREAD, 1179));
        assert!(roots[0].is_spread(SPREAD, 1180));
        // And nothing is counted anew by looking again, also not by another signer.
        assert_eq!(follow(Some(&roots), &names(&["b", "a"]), 1100), roots);
    }

    #[test]
    fn root_that_is_named_no_more_stays_for_what_it_has_signed() {
        let day = MAX_LIFETIME.as_secs();
        let both = [root("b", Some(1000), None), root("a", None, None)];
        let roots = follow(Some(&both), &names(&["b"]), 2000);
        let until = roots[1].until.unwrap();
        assert_eq!(roots, [both[0].clone(), root("a", None, Some(until))]);
        assert!(until > 2000 + day, "what was signed a moment ago lives for a day");
        assert_eq!(follow(Some(&roots), &names(&["b"]), until - 1), roots);
        assert_eq!(follow(Some(&roots), &names(&["b"]), until), both[..1]);
        // Named again, it stays, and is as old as it was.
        assert_eq!(follow(Some(&roots), &names(&["b", "a"]), until - 1), both);
    }

    /// Those of a signer.
    fn roots_of(client: &Client) -> Roots {
        Roots {
            api: Api::new(client.clone()),
            namespace: "malla-system".into(),
            trust_domain: cluster_local(),
            spread: SPREAD,
            current: None,
            last: None,
        }
    }

    /// Two signers: the first one has seen the first root, and the second one has replaced it by another.
    /// Also returns when that is done, and the fingerprint of the root that signs then.
    async fn replaced() -> (Server, Roots, Roots, SystemTime, String) {
        let (server, client) = Server::start().await;
        let (mut one, mut other) = (roots_of(&client), roots_of(&client));
        let begin = SystemTime::now();
        server.put(AT, new_root().1);
        let first = one.look(begin).await.unwrap().authority.root().fingerprint.clone();
        server.put(AT, new_root().1);
        assert_eq!(other.look(begin).await.unwrap_err().reason(), "not_spread");
        let now = begin + SPREAD;
        let second = other.look(now).await.unwrap();
        let signs = second.authority.root().fingerprint.clone();
        assert!(!second.waits && signs != first);
        (server, one, other, now, signs)
    }

    #[tokio::test]
    async fn signer_that_leads_again_lets_a_root_retire_that_another_one_has_replaced() {
        let (server, mut one, _, now, second) = replaced().await;
        let published = server.get(MAP);
        let again = one.look(now + Duration::from_secs(60)).await.unwrap();
        assert_eq!(again.authority.root().fingerprint, second);
        assert_eq!(server.get(MAP), published, "for no longer than before");
    }

    #[tokio::test]
    async fn root_that_nobody_trusts_any_more_signs_for_no_signer_that_leads_again() {
        let (server, mut one, mut other, now, second) = replaced().await;
        let later = now + RETIREMENT + Duration::from_secs(1);
        other.look(later).await.unwrap();
        server.put(AT, new_root().1);
        assert_eq!(one.look(later).await.unwrap_err().reason(), "not_spread");
        let standing = other.look(later).await.unwrap();
        assert!(standing.waits && standing.authority.root().fingerprint == second);
    }

    #[test]
    fn what_is_published_is_read_again_as_it_was() {
        let roots = [root("b", Some(1000), Some(2000)), root("a", None, None)];
        let map =
            json!({"metadata": {"annotations": {SINCE: serde_json::to_string(&roots).unwrap()}}});
        let map = serde_json::from_value(map).unwrap();
        assert_eq!(before(Some(&map), &Vec::new()).unwrap().unwrap(), roots);
        assert_eq!(before(None, &Vec::new()).unwrap(), None);
        assert_eq!(before(Some(&ConfigMap::default()), &Vec::new()).unwrap(), None);
        let wrong = json!({"metadata": {"annotations": {SINCE: "yesterday"}}});
        let wrong = serde_json::from_value(wrong).unwrap();
        assert_eq!(before(Some(&wrong), &Vec::new()).unwrap_err().reason(), "annotation");
    }
}
