//! What becomes of a pod that has a cgroup and is not captured yet.

use crate::settings::{Settings, UnknownPods};

/// How it stands with a pod, as far as the agent knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It takes no part, or may not.
    LeftAlone,
    /// It is to take part like this, and is not captured.
    Waits(Settings),
    /// It is captured by the addresses that were seen in its namespace, which the API has still to
    /// confirm. If it does not, it waits again.
    Provisional(Settings),
    /// It is captured.
    Carried,
}

/// What is done about a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treatment<'a> {
    /// Nothing any more, for as long as its cgroup lives.
    Settled,
    /// What it connects is refused for a bounded time, until more is known of it.
    Unknown,
    /// What it connects is refused until it is captured.
    Refused {
        /// How it is going to take part.
        settings: &'a Settings,
        /// Whether its addresses are looked for in its namespace.
        look: bool,
    },
}

/// Decides over the pod whose cgroup is named after `uid`.
///
/// A static pod's is named after a hash of its manifest, by which the API does not know it (kubelet's
/// `pkg/kubelet/config/common.go`): such a pod is never held back.
pub fn treat<'a>(uid: &str, standing: Option<&'a Standing>) -> Treatment<'a> {
    match standing {
        None if !uid.contains('-') => Treatment::Settled,
        None => Treatment::Unknown,
        Some(Standing::LeftAlone | Standing::Carried) => Treatment::Settled,
        Some(Standing::Waits(settings)) => match settings.unknown_pods {
            UnknownPods::Hold => Treatment::Refused { settings, look: true },
            UnknownPods::Deny => Treatment::Refused { settings, look: false },
            UnknownPods::Allow => Treatment::Settled,
        },
        // Nobody asks the programs while it is captured.
        Some(Standing::Provisional(settings)) => Treatment::Refused { settings, look: true },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "d5a5c9f2-90d5-43b4-b1b4-2a7a0a1b6c11";

    fn settings(unknown_pods: UnknownPods) -> Settings {
        Settings { unknown_pods, ..Settings::default() }
    }

    #[test]
    fn pod_that_waits_is_treated_as_it_says() {
        let treated = |unknown_pods| {
            let standing = Standing::Waits(settings(unknown_pods));
            match treat(UID, Some(&standing)) {
                Treatment::Refused { look, .. } => Some(look),
                Treatment::Settled => None,
                Treatment::Unknown => panic!("it is known"),
            }
        };
        assert_eq!(treated(UnknownPods::default()), Some(true));
        assert_eq!(treated(UnknownPods::Hold), Some(true));
        assert_eq!(treated(UnknownPods::Deny), Some(false));
        assert_eq!(treated(UnknownPods::Allow), None);
    }

    #[test]
    fn pod_is_settled_when_it_is_captured_for_good_or_left_alone() {
        assert_eq!(treat(UID, Some(&Standing::Carried)), Treatment::Settled);
        assert_eq!(treat(UID, Some(&Standing::LeftAlone)), Treatment::Settled);
        let settings = settings(UnknownPods::Hold);
        let provisional = Standing::Provisional(settings.clone());
        let held = Treatment::Refused { settings: &settings, look: true };
        assert_eq!(treat(UID, Some(&provisional)), held, "the API may not agree");
    }

    #[test]
    fn static_pod_is_never_unknown() {
        assert_eq!(treat(UID, None), Treatment::Unknown);
        assert_eq!(treat("0123456789abcdef0123456789abcdef", None), Treatment::Settled);
    }
}
