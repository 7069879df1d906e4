//! Which roots are published, since when and until when, and what follows from it. No IO.
//!
//! It is written beside the roots, in an annotation of the ConfigMap: another signer that takes over
//! knows as much.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use mesh_core::sign::MAX_LIFETIME;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::CONFIG_MAP;
use super::api::ConfigMap;
use crate::identity::bundle::{Root, parse_roots};
use crate::identity::ca::CaError;

/// The file that agents have mounted.
pub(super) const BUNDLE: &str = "bundle.pem";
/// Where the ConfigMap says since when each root is in it.
pub(super) const SINCE: &str = "malla.dev/roots";

/// How long a root that is named no more is published: the longest life of a certificate, and an hour
/// for those that were being made.
pub(super) const RETIREMENT: Duration = MAX_LIFETIME.saturating_add(Duration::from_secs(3600));

/// Certificates, and what they say.
pub(super) type Certs = Vec<(CertificateDer<'static>, Root)>;

/// Whether that certificate is among `certs`.
pub(super) fn has(certs: &Certs, fingerprint: &str) -> bool {
    certs.iter().any(|(_, root)| root.fingerprint == fingerprint)
}

/// A published root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Published {
    pub(super) fingerprint: String,
    /// Unix seconds; `None` if it was there from the beginning, before any agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) since: Option<u64>,
    /// Until when it stays though the Secret does not name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) until: Option<u64>,
    /// Whether it vouches for what has signed last, of all signers.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) signs: bool,
}

impl Published {
    /// Whether every reader has it.
    pub(super) fn is_spread(&self, spread: Duration, now_s: u64) -> bool {
        self.since.is_none_or(|since| since.saturating_add(spread.as_secs()) <= now_s)
    }
}

/// What is to be published when `named` are the roots in use and `before` was published; `None` before
/// the first time.
pub(super) fn follow(before: Option<&[Published]>, named: &[String], now_s: u64) -> Vec<Published> {
    let known = before.unwrap_or_default();
    let mut roots: Vec<Published> = Vec::new();
    for fingerprint in named {
        let new = Published {
            fingerprint: fingerprint.clone(),
            since: before.map(|_| now_s),
            until: None,
            signs: false,
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

/// Says of `roots` that `signing` vouch for what signs.
pub(super) fn mark(roots: &mut [Published], signing: &[String]) {
    for root in roots {
        root.signs = signing.contains(&root.fingerprint);
    }
}

/// Whether what `trusted` vouch for may sign on: nothing else has signed since, with whichever signer.
/// A root that has a successor is trusted for what it has signed, and also if it is listed without an
/// end it signs nothing more.
pub(super) fn signs_on(
    before: &[Published],
    trusted: &[String],
    spread: Duration,
    now_s: u64,
) -> bool {
    // A signer that does not know of `signs` lets the roots of what signs no more retire, unless they are
    // listed in `ca.crt`.
    let is_told = before.iter().any(|root| root.signs);
    before.iter().any(|root| {
        let is_last = if is_told { root.signs } else { root.until.is_none() };
        is_last && trusted.contains(&root.fingerprint) && root.is_spread(spread, now_s)
    })
}

/// Begins to count anew for those of `roots` that `held` lacks: whoever has read the bundle meanwhile
/// does not have them. What signs goes on, since nothing else could.
pub(super) fn recount(roots: &mut [Published], held: &Certs, now_s: u64) {
    for root in roots.iter_mut().filter(|root| !root.signs && !has(held, &root.fingerprint)) {
        root.since = Some(now_s);
    }
}

/// What the ConfigMap holds.
#[derive(Debug)]
pub(super) struct Held {
    /// What agents trust.
    pub(super) certs: Certs,
    /// What is written beside them; `None` if nothing is.
    pub(super) annotated: Option<Vec<Published>>,
}

impl Held {
    /// Of a ConfigMap in `namespace`. Somebody may have made it without anything in it.
    ///
    /// # Errors
    ///
    /// If either part is malformed.
    pub(super) fn of(map: Option<&ConfigMap>, namespace: &str) -> Result<Self, CaError> {
        let pem = map.and_then(|map| map.data.get(BUNDLE));
        let place = format!("ConfigMap {namespace}/{CONFIG_MAP}, {BUNDLE}");
        let certs = match pem.filter(|pem| !pem.is_empty()) {
            Some(pem) => parse_roots(Path::new(&place), pem.as_bytes())?,
            None => Vec::new(),
        };
        let annotations = map.and_then(|map| map.metadata.annotations.as_ref());
        let text = annotations.and_then(|annotations| annotations.get(SINCE));
        let annotated = text.map(serde_json::from_str).transpose();
        let annotated = annotated.map_err(|source| CaError::Annotation { source })?;
        Ok(Self { certs, annotated })
    }

    /// What was published before; `None` before the first time.
    pub(super) fn before(&self) -> Option<Vec<Published>> {
        // Without an annotation somebody else has put them there.
        let published = |(_, root): &(_, Root)| Published {
            fingerprint: root.fingerprint.clone(),
            since: None,
            until: None,
            signs: false,
        };
        let found = || (!self.certs.is_empty()).then(|| self.certs.iter().map(published).collect());
        self.annotated.clone().or_else(found)
    }

    /// Whether it is what `roots` come to: the same are trusted, and the same is written beside them.
    pub(super) fn says(&self, roots: &[Published]) -> bool {
        let trusted: BTreeSet<_> = self.certs.iter().map(|(_, root)| &root.fingerprint).collect();
        let wanted: BTreeSet<_> = roots.iter().map(|root| &root.fingerprint).collect();
        self.annotated.as_deref() == Some(roots) && trusted == wanted
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SPREAD: Duration = Duration::from_secs(180);

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn root(name: &str, since: Option<u64>, until: Option<u64>) -> Published {
        Published { fingerprint: name.to_owned(), since, until, signs: false }
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

    #[test]
    fn only_what_has_signed_last_signs_on() {
        let signs_on = |roots: &[Published], name| signs_on(roots, &names(&[name]), SPREAD, 2000);
        // Both are listed without an end, as in `ca.crt`.
        let mut roots = [root("b", Some(1000), None), root("a", None, None)];
        mark(&mut roots, &names(&["b"]));
        assert!(signs_on(&roots, "b") && !signs_on(&roots, "a"));
        // A signer that leads in between and does not have its key lets it retire, and has none follow.
        let roots = follow(Some(&roots), &names(&["c", "a"]), 2000);
        assert!(signs_on(&roots, "b") && !signs_on(&roots, "a") && !signs_on(&roots, "c"));
        // As an older signer wrote it.
        let roots = [root("b", Some(1000), None), root("a", None, Some(9000))];
        assert!(signs_on(&roots, "b") && !signs_on(&roots, "a"));
        assert!(!signs_on(&[root("b", Some(1900), None)], "b"), "not everywhere");
    }

    #[test]
    fn what_is_published_is_read_again_as_it_was() {
        let mut roots = [root("b", Some(1000), Some(2000)), root("a", None, None)];
        mark(&mut roots, &names(&["a"]));
        let text = serde_json::to_string(&roots).unwrap();
        let of = |map: Option<&ConfigMap>| Held::of(map, "malla-system");
        let map = json!({"metadata": {"annotations": {SINCE: text}}});
        let map: ConfigMap = serde_json::from_value(map).unwrap();
        assert_eq!(of(Some(&map)).unwrap().before().unwrap(), roots);
        assert_eq!(of(None).unwrap().before(), None);
        assert_eq!(of(Some(&ConfigMap::default())).unwrap().before(), None);
        let wrong = json!({"metadata": {"annotations": {SINCE: "yesterday"}}});
        let wrong: ConfigMap = serde_json::from_value(wrong).unwrap();
        assert_eq!(of(Some(&wrong)).unwrap_err().reason(), "annotation");
    }

    /// Signers of other versions read it too.
    #[test]
    fn annotation_has_the_form_that_it_had() {
        let mut roots = [root("b", Some(1000), Some(2000)), root("a", None, None)];
        let old = r#"[{"fingerprint":"b","since":1000,"until":2000},{"fingerprint":"a"}]"#;
        assert_eq!(serde_json::to_string(&roots).unwrap(), old);
        assert_eq!(serde_json::from_str::<Vec<Published>>(old).unwrap(), roots);
        mark(&mut roots, &names(&["a"]));
        assert!(serde_json::to_string(&roots[1]).unwrap().contains(r#""signs":true"#));
    }
}
