//! What is written beside the trusted roots, as the fuzzer writes it. Signers of all versions do, and whoever
//! may change the ConfigMap.

use std::time::Duration;

use super::api::ConfigMap;
use super::published::{Held, Published, SINCE, follow, mark, signs_on};
use crate::discovery::kube::ObjectMeta;

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
