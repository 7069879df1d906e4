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
//! - What has a successor signs no more, whichever signer has seen that, unless the Secret holds it again.
//! - A Secret that cannot be used changes nothing: what could sign before still does.
//! - A ConfigMap that is deleted, emptied or changed is put back as it was. Only who starts without one
//!   takes what the Secret names for all there is. What a signer has written itself is no change, though it
//!   may never have heard that it was written.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::ByteString;
use mesh_core::spiffe::{SpiffeId, TrustDomain};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::pki_types::UnixTime;
use serde_json::json;
use tracing::{info, warn};
use zeroize::{Zeroize as _, Zeroizing};

use super::api::{Api, ApiError, ConfigMap, Named, Secret};
use super::published::{
    BUNDLE, Certs, Held, Published, SINCE, follow, has, mark, recount, signs_on,
};
use super::{CONFIG_MAP, SECRET, pem};
use crate::identity::authority::{Authority, make_root};
use crate::identity::bundle::{TrustBundles, parse_roots};
use crate::identity::ca::CaError;
use crate::identity::verify::{PeerRole, verify_peer};

/// The signing certificate, and what is above it.
const CERT: &str = "tls.crt";
/// Its key.
const KEY: &str = "tls.key";
/// More roots to trust.
const ROOTS: &str = "ca.crt";

/// What somebody changes again and again is put back no more often: with a look's interval, within a minute.
const PUT_BACK: Duration = Duration::from_secs(50);

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
    api: Api,
    namespace: String,
    trust_domain: TrustDomain,
    /// How long readers of the ConfigMap may take.
    spread: Duration,
    /// What has signed last.
    current: Option<Arc<Authority>>,
    /// What was published last, and the certificate of each.
    last: Option<(Vec<Published>, Certs)>,
    /// The same of what may have been published: there was no answer. And whether it was to put back a change.
    attempted: Option<(Vec<Published>, Certs, bool)>,
    /// Whether `last` is of this term, so that no other signer has published since.
    is_sure: bool,
    /// When a change was put back last.
    put_back: Option<SystemTime>,
}

impl Roots {
    /// Has seen nothing yet.
    pub(super) fn new(
        api: Api,
        namespace: String,
        trust_domain: TrustDomain,
        spread: Duration,
    ) -> Self {
        Self {
            api,
            namespace,
            trust_domain,
            spread,
            current: None,
            last: None,
            attempted: None,
            is_sure: false,
            put_back: None,
        }
    }

    /// A term begins: another signer may have led since the last one.
    pub(super) fn begin_term(&mut self) {
        self.is_sure = false;
    }

    /// Looks at the Secret, publishes what is to be trusted, and says what signs.
    ///
    /// # Errors
    ///
    /// If the API does not answer, or what the Secret holds cannot be used. What could sign before
    /// may still.
    pub(super) async fn look(&mut self, now: SystemTime) -> Result<Standing, CaError> {
        let now_s = unix_s(now);
        let secret = self.secret(now).await?;
        let (candidate, mut certs) = self.read(&secret)?;
        let candidate = Arc::new(candidate);
        let map = self.map().await?;
        let held = match Held::of(map.as_ref(), &self.namespace) {
            Ok(held) => Some(held),
            // It is put back. Agents go on with what they have read.
            Err(_malformed) if self.is_sure => None,
            Err(error) => return Err(error),
        };
        self.recognise(held.as_ref(), now);
        let is_lost = held.as_ref().is_some_and(|held| held.certs.is_empty());
        // What another signer has published meanwhile is told by the annotation, also beside an empty bundle.
        let is_told = held.as_ref().is_some_and(|held| held.annotated.is_some());
        if is_lost && !is_told && !self.is_sure {
            // With it is lost whether another signer has made something else sign.
            self.current = None;
        }
        let is_unsure = !self.is_sure && (!is_lost || is_told);
        let mut before = match &held {
            Some(held) if self.last.is_none() || is_unsure => held.before(),
            _ => self.last.as_ref().map(|(roots, _)| roots.clone()),
        };
        let is_changed = !is_lost && self.is_changed(held.as_ref(), before.as_deref());
        if is_changed && let (Some(roots), Some(held)) = (&mut before, &held) {
            recount(roots, &held.certs, now_s);
        }
        self.gather(&mut certs, held.as_ref(), before.as_deref().unwrap_or_default());

        let vouching = self.vouching(&candidate, &certs, now)?;
        if vouching.is_empty() {
            return Err(CaError::NoRoot { place: self.place(CERT).display().to_string() });
        }
        // Those that vouch, and those in `ca.crt`: more than one may.
        let named = named(&secret, &self.place(ROOTS))?;
        let unnamed = vouching.iter().filter(|fingerprint| !named.contains(fingerprint));
        let mut in_use: Vec<String> = unnamed.chain(&named).cloned().collect();
        let known = before.as_deref();
        let waits = !follow(known, &in_use, now_s)
            .iter()
            .any(|root| vouching.contains(&root.fingerprint) && root.is_spread(self.spread, now_s));
        let signing = if waits {
            self.signing_on(known.unwrap_or_default(), &certs, now)
        } else {
            Some((candidate, vouching))
        };
        if let Some((_, trusted)) = &signing {
            in_use.extend(trusted.iter().cloned());
        }
        let mut roots = follow(known, &in_use, now_s);
        roots.retain(|root| self.is_at_hand(root, &certs));
        if let Some((_, trusted)) = &signing {
            mark(&mut roots, trusted);
        }
        certs.retain(|(_, cert)| roots.iter().any(|root| root.fingerprint == cert.fingerprint));
        let is_due = is_lost || known != Some(&roots);
        if is_due || (is_changed && !self.was_put_back(now)) {
            if let Err(error) = self.publish(map.as_ref(), &roots, &certs).await {
                if error.may_be_done() {
                    self.attempted = Some((roots, certs, is_changed));
                }
                return Err(error.into());
            }
            if is_changed {
                self.was_changed(now);
            }
        }
        self.attempted = None;
        self.last = Some((roots, certs));
        self.is_sure = true;
        let Some((authority, _)) = signing else { return Err(CaError::NotSpread) };
        self.current = Some(Arc::clone(&authority));
        Ok(Standing { authority, waits })
    }

    /// Takes what the ConfigMap holds for published if it is what this one has tried to publish.
    fn recognise(&mut self, held: Option<&Held>, now: SystemTime) {
        let Some((roots, ..)) = &self.attempted else { return };
        if !held.is_some_and(|held| held.says(roots)) {
            return;
        }
        if let Some((roots, certs, is_put_back)) = self.attempted.take() {
            self.last = Some((roots, certs));
            if is_put_back {
                self.was_changed(now);
            }
        }
    }

    /// Tells that a change was put back.
    fn was_changed(&mut self, now: SystemTime) {
        self.put_back = Some(now);
        warn!(
            config_map = format!("{}/{CONFIG_MAP}", self.namespace),
            key = BUNDLE,
            annotation = SINCE,
            "somebody had changed which roots are trusted, and it was put back: list further ones in \
             ca.crt of Secret malla-ca; to distrust one, end all signers, delete that Secret and the \
             ConfigMap, and start them again"
        );
    }

    /// Whether what the ConfigMap holds, `None` if that cannot be read, is not what a signer has
    /// published: `before`.
    fn is_changed(&self, held: Option<&Held>, before: Option<&[Published]>) -> bool {
        let Some(before) = before else { return false };
        // Without an annotation it is of somebody who was there before any signer.
        let is_of_signer = |held: &Held| self.is_sure || held.annotated.is_some();
        held.is_none_or(|held| is_of_signer(held) && !held.says(before))
    }

    /// Adds to `certs` those that were published: of what is in the ConfigMap, and of what this one has
    /// put there, only what a signer has written beside it.
    fn gather(&self, certs: &mut Certs, held: Option<&Held>, before: &[Published]) {
        let found = held.iter().flat_map(|held| &held.certs);
        for (der, root) in found.chain(self.last.iter().flat_map(|(_, certs)| certs)) {
            if before.iter().any(|known| known.fingerprint == root.fingerprint)
                && !has(certs, &root.fingerprint)
            {
                certs.push((der.clone(), root.clone()));
            }
        }
    }

    /// What has signed before and signs on while what the Secret holds has to wait, and the roots that
    /// vouch for it.
    fn signing_on(
        &self,
        before: &[Published],
        certs: &Certs,
        now: SystemTime,
    ) -> Option<(Arc<Authority>, Vec<String>)> {
        let current = self.current.as_ref()?;
        // One that has expired signs nothing any more.
        let trusted = self.vouching(current, certs, now).ok()?;
        signs_on(before, &trusted, self.spread, unix_s(now)).then(|| (Arc::clone(current), trusted))
    }

    /// Whether its certificate is known, without which it cannot be published.
    fn is_at_hand(&self, root: &Published, certs: &Certs) -> bool {
        let is_at_hand = has(certs, &root.fingerprint);
        if !is_at_hand {
            warn!(
                config_map = format!("{}/{CONFIG_MAP}", self.namespace),
                key = BUNDLE,
                fingerprint = root.fingerprint,
                "a root was taken out and cannot be put back: what it has signed is not trusted, \
                 unless it is listed in ca.crt of Secret malla-ca"
            );
        }
        is_at_hand
    }

    /// Whether that was a moment ago.
    fn was_put_back(&self, now: SystemTime) -> bool {
        self.put_back.is_some_and(|at| now.duration_since(at).is_ok_and(|ago| ago < PUT_BACK))
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

    async fn map(&self) -> Result<Option<ConfigMap>, CaError> {
        let path = format!("/api/v1/namespaces/{}/configmaps/{CONFIG_MAP}", self.namespace);
        Ok(self.api.get::<ConfigMap>(&path).await?)
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
    ) -> Result<(), ApiError> {
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

fn unix_s(at: SystemTime) -> u64 {
    at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests;
