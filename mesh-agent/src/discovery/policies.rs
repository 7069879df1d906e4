//! What a Service asks about where its connections go and what they are: the meaning of
//! `internalTrafficPolicy`, `trafficDistribution`, `sessionAffinity` and its annotation.
//!
//! An API server refuses values that it does not know, so wrong ones come from files: each is reported
//! and counts as not given.

use std::time::Duration;

use mesh_core::affinity::{DEFAULT_TIMEOUT, MAX_TIMEOUT};
use mesh_core::locality::InternalTraffic;
use mesh_core::settings::PortList;
use mesh_core::snapshot::Distribution;

use super::enrol::Wishes;
use super::kube::{Service, ServiceSpec};
use super::{Report, shown};

/// What a Service asks for, and its namespace for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Policies {
    pub(super) traffic: InternalTraffic,
    pub(super) distribution: Option<Distribution>,
    pub(super) affinity: Option<Duration>,
    /// Of its own ports, those that are never parsed.
    pub(super) opaque: PortList,
}

impl Policies {
    pub(super) fn read(
        service: &Service,
        namespace: Option<&Wishes>,
        report: &mut Report<'_>,
    ) -> Self {
        let opaque = Wishes::of_service(&service.metadata, report).settings_of(namespace);
        let Some(spec) = &service.spec else { return Self { opaque, ..Self::default() } };
        let traffic = word(
            "spec.internalTrafficPolicy",
            spec.internal_traffic_policy.as_deref(),
            &[("Cluster", InternalTraffic::Cluster), ("Local", InternalTraffic::Local)],
            report,
        );
        let distribution = word(
            "spec.trafficDistribution",
            spec.traffic_distribution.as_deref(),
            &[
                ("PreferSameZone", Distribution::SameZone),
                ("PreferSameNode", Distribution::SameNode),
                ("PreferClose", Distribution::SameZone),
            ],
            report,
        );
        Self {
            traffic: traffic.unwrap_or_default(),
            distribution,
            affinity: affinity(spec, report),
            opaque,
        }
    }
}

fn affinity(spec: &ServiceSpec, report: &mut Report<'_>) -> Option<Duration> {
    let asked = word(
        "spec.sessionAffinity",
        spec.session_affinity.as_deref(),
        &[("None", false), ("ClientIP", true)],
        report,
    );
    if asked != Some(true) {
        return None;
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let Some(seconds) = config.and_then(|config| config.timeout_seconds) else {
        return Some(DEFAULT_TIMEOUT);
    };
    let wanted = u64::try_from(seconds).map(Duration::from_secs).unwrap_or_default();
    if wanted.is_zero() || wanted > MAX_TIMEOUT {
        let most = MAX_TIMEOUT.as_secs();
        report.say(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            format!("{seconds} is not possible; {} holds instead", DEFAULT_TIMEOUT.as_secs()),
            format!("write a number from 1 to {most}"),
        );
        return Some(DEFAULT_TIMEOUT);
    }
    Some(wanted)
}

/// What one of a few words means, if it is given and one of them.
fn word<T: Copy>(
    field: &str,
    text: Option<&str>,
    words: &[(&str, T)],
    report: &mut Report<'_>,
) -> Option<T> {
    let text = text.filter(|text| !text.is_empty())?;
    let found = words.iter().find(|(word, _)| *word == text);
    if found.is_none() {
        let all: Vec<_> = words.iter().map(|(word, _)| *word).collect();
        report.say(
            field,
            format!("`{}` is not understood and counts as not given", shown(text)),
            format!("write one of {}", all.join(", ")),
        );
    }
    found.map(|(_, meaning)| *meaning)
}
