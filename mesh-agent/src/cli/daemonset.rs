//! The name of a DaemonSet, as `NAMESPACE/NAME`.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Names of objects are DNS labels, or subdomains of 253 characters at most (Kubernetes, "Object Names
/// and IDs").
const LONGEST: usize = 253;

/// A DaemonSet and its namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DaemonSetName {
    /// Where it is.
    pub namespace: String,
    /// What it is called there.
    pub name: String,
}

/// It is no such name.
#[derive(Debug, Error)]
#[error("not NAMESPACE/NAME, of lower-case letters, digits, `-` and `.`")]
pub struct NotADaemonSet;

impl FromStr for DaemonSetName {
    type Err = NotADaemonSet;

    fn from_str(text: &str) -> Result<Self, NotADaemonSet> {
        let is_name = |name: &str| {
            let is_allowed = |byte: u8| {
                byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.')
            };
            (1..=LONGEST).contains(&name.len()) && name.bytes().all(is_allowed)
        };
        match text.split_once('/') {
            Some((namespace, name)) if is_name(namespace) && is_name(name) => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err(NotADaemonSet),
        }
    }
}

impl fmt::Display for DaemonSetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_has_a_namespace_and_nothing_that_leads_elsewhere() {
        let name: DaemonSetName = "malla-system/malla-agent".parse().unwrap();
        assert_eq!(name.to_string(), "malla-system/malla-agent");
        for wrong in ["", "malla-agent", "/malla-agent", "malla-system/", "a/b/c", "a/b?c", "A/b"] {
            assert!(wrong.parse::<DaemonSetName>().is_err(), "{wrong}");
        }
    }
}
