//! Istio's label set for TCP metrics, built from facts, with groups that can be left out.
//!
//! Every value comes from a manifest or from a verified certificate; nothing that a client chooses
//! freely (an address, a name it sends) becomes a label. A value that is not known is the string
//! `unknown`, as in Istio.

use std::fmt::Error;
use std::sync::Arc;

use mesh_core::snapshot::{Service, Workload};
use prometheus_client::encoding::{EncodeLabel as _, EncodeLabelSet, LabelSetEncoder};

use super::connection::{ConnectionFacts, Direction, Party, ResponseFlags, SecurityPolicy};

const UNKNOWN: &str = "unknown";

/// Labels that can be left out where there are too many series.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum LabelGroup {
    /// `source_principal`, `destination_principal`.
    Principal,
    /// `*_workload` (the namespace stays).
    Workload,
    /// `*_app`, `*_version`, `*_canonical_service`, `*_canonical_revision`.
    App,
    /// `destination_service`, `_service_name`, `_service_namespace`.
    Service,
    /// `source_cluster`, `destination_cluster`.
    Cluster,
}

/// What all series of one agent have in common.
#[derive(Clone, Debug)]
pub(super) struct Scheme {
    cluster: Arc<str>,
    dropped: Vec<LabelGroup>,
}

impl Scheme {
    pub(super) fn new(cluster: Arc<str>, dropped: Vec<LabelGroup>) -> Self {
        Self { cluster, dropped }
    }

    fn has(&self, group: LabelGroup) -> bool {
        !self.dropped.contains(&group)
    }

    /// The labels of a pod. Two pods of one Deployment have the same.
    pub(super) fn names(&self, workload: &Workload) -> NameLabels {
        let names = &workload.names;
        let of_app = |value: &Arc<str>| self.has(LabelGroup::App).then(|| Arc::clone(value));
        NameLabels {
            workload: self.has(LabelGroup::Workload).then(|| Arc::clone(&names.workload)),
            namespace: Some(Arc::clone(&workload.namespace)),
            app: of_app(&names.app),
            version: of_app(&names.version),
            canonical_service: of_app(&names.canonical_service),
            canonical_revision: of_app(&names.canonical_revision),
        }
    }

    fn party(&self, party: &Party) -> PartyLabels {
        let names = party.workload.as_deref().map(|workload| self.names(workload));
        let identity = party.identity.as_ref().filter(|_| self.has(LabelGroup::Principal));
        PartyLabels {
            names: names.unwrap_or_default(),
            known: party.workload.is_some(),
            principal: identity.map(|identity| identity.to_string().into()),
        }
    }

    /// The labels of a connection.
    pub(super) fn labels(&self, facts: &ConnectionFacts) -> Labels {
        let service = facts.service.as_deref().filter(|_| self.has(LabelGroup::Service));
        Labels {
            reporter: facts.direction,
            source: self.party(&facts.source),
            destination: self.party(&facts.destination),
            service: service.map(ServiceLabels::of),
            security: facts.security,
        }
    }
}

/// What the manifests call a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct NameLabels {
    workload: Option<Arc<str>>,
    namespace: Option<Arc<str>>,
    app: Option<Arc<str>>,
    version: Option<Arc<str>>,
    canonical_service: Option<Arc<str>>,
    canonical_revision: Option<Arc<str>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct PartyLabels {
    pub(super) names: NameLabels,
    /// Whether `names` are those of a pod: such a series goes when the pod goes.
    pub(super) known: bool,
    principal: Option<Arc<str>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct ServiceLabels {
    host: Arc<str>,
    name: Arc<str>,
    namespace: Arc<str>,
}

impl ServiceLabels {
    pub(super) fn of(service: &Service) -> Self {
        Self {
            host: Arc::clone(&service.host),
            name: Arc::clone(&service.name),
            namespace: Arc::clone(&service.namespace),
        }
    }
}

/// What one series is counted under, but for the response flags.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Labels {
    pub(super) reporter: Direction,
    pub(super) source: PartyLabels,
    pub(super) destination: PartyLabels,
    pub(super) service: Option<ServiceLabels>,
    pub(super) security: SecurityPolicy,
}

impl Labels {
    /// Where everything is counted that does not fit below the limit.
    pub(super) fn collapsed(reporter: Direction, security: SecurityPolicy) -> Self {
        Self {
            reporter,
            source: PartyLabels::default(),
            destination: PartyLabels::default(),
            service: None,
            security,
        }
    }
}

/// A series' labels as Prometheus sees them.
#[derive(Debug)]
pub(super) struct Encoded<'a> {
    pub(super) scheme: &'a Scheme,
    pub(super) labels: &'a Labels,
    pub(super) flags: ResponseFlags,
}

impl EncodeLabelSet for Encoded<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), Error> {
        let Self { scheme, labels, flags } = self;
        let mut out = Out { encoder, scheme };
        out.put("reporter", labels.reporter.reporter())?;
        out.party(&SOURCE, &labels.source)?;
        if scheme.has(LabelGroup::Service) {
            let service = labels.service.as_ref();
            out.put("destination_service", service.map_or(UNKNOWN, |s| &s.host))?;
            out.put("destination_service_name", service.map_or(UNKNOWN, |s| &s.name))?;
            out.put("destination_service_namespace", service.map_or(UNKNOWN, |s| &s.namespace))?;
        }
        out.party(&DESTINATION, &labels.destination)?;
        out.put("request_protocol", "tcp")?;
        out.put("response_flags", flags.as_str())?;
        out.put("connection_security_policy", labels.security.as_str())
    }
}

/// The label names of one party.
struct PartyKeys {
    workload: &'static str,
    namespace: &'static str,
    principal: &'static str,
    app: &'static str,
    version: &'static str,
    cluster: &'static str,
    canonical_service: &'static str,
    canonical_revision: &'static str,
}

const SOURCE: PartyKeys = PartyKeys {
    workload: "source_workload",
    namespace: "source_workload_namespace",
    principal: "source_principal",
    app: "source_app",
    version: "source_version",
    cluster: "source_cluster",
    canonical_service: "source_canonical_service",
    canonical_revision: "source_canonical_revision",
};

const DESTINATION: PartyKeys = PartyKeys {
    workload: "destination_workload",
    namespace: "destination_workload_namespace",
    principal: "destination_principal",
    app: "destination_app",
    version: "destination_version",
    cluster: "destination_cluster",
    canonical_service: "destination_canonical_service",
    canonical_revision: "destination_canonical_revision",
};

struct Out<'a, 'b> {
    encoder: &'a mut LabelSetEncoder<'b>,
    scheme: &'a Scheme,
}

impl Out<'_, '_> {
    fn put(&mut self, key: &'static str, value: &str) -> Result<(), Error> {
        (key, value).encode(self.encoder.encode_label())
    }

    fn party(&mut self, keys: &PartyKeys, party: &PartyLabels) -> Result<(), Error> {
        let names = &party.names;
        if self.scheme.has(LabelGroup::Workload) {
            self.put(keys.workload, names.workload.as_deref().unwrap_or(UNKNOWN))?;
        }
        self.put(keys.namespace, names.namespace.as_deref().unwrap_or(UNKNOWN))?;
        if self.scheme.has(LabelGroup::Principal) {
            self.put(keys.principal, party.principal.as_deref().unwrap_or(UNKNOWN))?;
        }
        if self.scheme.has(LabelGroup::App) {
            self.put(keys.app, names.app.as_deref().unwrap_or(UNKNOWN))?;
            self.put(keys.version, names.version.as_deref().unwrap_or(UNKNOWN))?;
            self.put(
                keys.canonical_service,
                names.canonical_service.as_deref().unwrap_or(UNKNOWN),
            )?;
            self.put(
                keys.canonical_revision,
                names.canonical_revision.as_deref().unwrap_or(UNKNOWN),
            )?;
        }
        if self.scheme.has(LabelGroup::Cluster) {
            let scheme = self.scheme;
            self.put(keys.cluster, if party.known { &scheme.cluster } else { UNKNOWN })?;
        }
        Ok(())
    }
}
