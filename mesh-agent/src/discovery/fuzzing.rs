//! Manifests as the fuzzer writes them.

use std::sync::Arc;

use mesh_core::spiffe::TrustDomain;

use super::manifest::{self, Format};
use super::objects::Objects;
use super::translate::{Context, NetnsFrom, translate};

/// Any text is read or refused as YAML and as JSON, always with the same result, and what is read
/// becomes the same snapshot in whatever order.
pub fn manifests(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    for format in [Format::Yaml, Format::Json] {
        let read = manifest::parse(text, format);
        assert_eq!(read, manifest::parse(text, format), "read twice");
        let Ok(read) = read else { continue };
        let (mut forth, mut back) = (Objects::default(), Objects::default());
        for (_, object) in &read.objects {
            if !forth.contains(&object.key()) {
                forth.insert(object.clone());
            }
        }
        // Of several with one key the first counts, as in a directory.
        read.objects.iter().rev().for_each(|(_, object)| drop(back.insert(object.clone())));
        for netns in [NetnsFrom::Annotation, NetnsFrom::Processes] {
            let Ok(trust_domain) = TrustDomain::new("cluster.local") else { return };
            let (node, pod_cidrs) = (Arc::from("a"), Vec::new());
            let context = Context { node, trust_domain, tunnel_port: 15019, netns, pod_cidrs };
            let (snapshot, problems) = translate(&forth, &context, 1);
            let (other, others) = translate(&back, &context, 1);
            assert!(snapshot.same_state(&other), "the order of objects counts");
            assert_eq!(problems, others, "the order of objects counts");
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn seeds_of_the_fuzzer_hold() {
        crate::fuzzing::replay("manifests", super::manifests);
    }
}
