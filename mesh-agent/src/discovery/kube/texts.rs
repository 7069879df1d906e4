//! Labels and annotations, of which only those are kept that are read.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer, de};

/// Keys of labels and annotations that are read: without a prefix, and the prefixes of others.
const KEYS: [&str; 3] = ["app", "version", "pod-template-hash"];
const PREFIXES: [&str; 9] = [
    "malla.dev",
    "kubernetes.io",
    "app.kubernetes.io",
    "topology.kubernetes.io",
    "istio.io",
    "sidecar.istio.io",
    "ambient.istio.io",
    "service.istio.io",
    "linkerd.io",
];

/// Texts by key, in the order of the keys. Every Service and slice of a cluster has some: they take no more room
/// than they need, where a map takes half a kilobyte for one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Texts(Box<[(Box<str>, Box<str>)]>);

impl Texts {
    /// What is written there.
    pub fn get(&self, key: &str) -> Option<&str> {
        let at = self.0.binary_search_by(|(other, _)| (**other).cmp(key)).ok()?;
        self.0.get(at).map(|(_, text)| &**text)
    }

    /// Keys and texts.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, text)| (&**key, &**text))
    }
}

/// Of two texts of one key the last one counts.
impl<K: Into<Box<str>>, T: Into<Box<str>>> FromIterator<(K, T)> for Texts {
    fn from_iter<I: IntoIterator<Item = (K, T)>>(texts: I) -> Self {
        let texts = texts.into_iter().map(|(key, text)| (key.into(), text.into()));
        Self(texts.collect::<BTreeMap<_, _>>().into_iter().collect())
    }
}

/// Those that are read. Others may be 256 KiB in every object, such as what `kubectl apply` remembers, and a change
/// of one is no news.
impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Reader)
    }
}

struct Reader;

impl<'de> de::Visitor<'de> for Reader {
    type Value = Texts;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("texts by key")
    }

    fn visit_map<M: de::MapAccess<'de>>(self, mut map: M) -> Result<Texts, M::Error> {
        let mut read = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            let is_read = match key.split_once('/') {
                Some((prefix, _)) => PREFIXES.contains(&prefix),
                None => KEYS.contains(&key.as_str()),
            };
            if is_read {
                read.push((key, map.next_value::<String>()?));
            } else {
                map.next_value::<de::IgnoredAny>()?;
            }
        }
        Ok(read.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_in_order_and_found_by_their_keys() {
        let texts: Texts = [("b", "1"), ("c", "2"), ("a", "3"), ("b", "4")].into_iter().collect();
        assert_eq!(texts.iter().collect::<Vec<_>>(), [("a", "3"), ("b", "4"), ("c", "2")]);
        assert_eq!(["a", "b", "c"].map(|key| texts.get(key)), [Some("3"), Some("4"), Some("2")]);
        assert_eq!(["", "aa", "d"].map(|key| texts.get(key)), [None; 3]);
    }
}
