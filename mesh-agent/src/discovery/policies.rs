//! What a Service asks about where its connections go: the meaning of `internalTrafficPolicy` and
//! `trafficDistribution`.
//!
//! An API server refuses values that it does not know, so wrong ones come from files: each is reported
//! and counts as not given.

use mesh_core::locality::InternalTraffic;
use mesh_core::snapshot::Distribution;

use super::kube::Service;
use super::{Report, shown};

/// What a Service asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Policies {
    pub(super) traffic: InternalTraffic,
    pub(super) distribution: Option<Distribution>,
}

impl Policies {
    pub(super) fn read(service: &Service, report: &mut Report<'_>) -> Self {
        let Some(spec) = &service.spec else { return Self::default() };
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
        Self { traffic: traffic.unwrap_or_default(), distribution }
    }
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
