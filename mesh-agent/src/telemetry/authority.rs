//! What the cluster's CA tells Prometheus: a process of its own, with these families and no other.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::mesh::Word;

/// How a request for a certificate was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// With a certificate.
    Signed,
    /// With a reason.
    Denied,
    /// Not at all: it is tried again.
    Failed,
}

impl Verdict {
    fn as_str(self) -> &'static str {
        match self {
            Self::Signed => "signed",
            Self::Denied => "denied",
            Self::Failed => "failed",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    verdict: Word,
    reason: Word,
}

/// The families of a CA. Cheap to clone.
#[derive(Clone, Debug)]
pub struct CaTelemetry {
    registry: Arc<Registry>,
    requests: Family<Labels, Counter>,
    leads: Gauge,
    ends: Gauge<f64, AtomicU64>,
}

impl CaTelemetry {
    /// Registers them.
    #[expect(clippy::new_without_default, reason = "it registers families: not a plain value")]
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let (requests, leads) = (Family::default(), Gauge::default());
        let ends = Gauge::<f64, AtomicU64>::default();
        registry.register(
            "mesh_ca_requests",
            "Requests for certificates, by verdict and its reason",
            Family::clone(&requests),
        );
        registry.register(
            "mesh_ca_leads",
            "Whether this one of the signers answers: 1 on exactly one of them",
            Gauge::clone(&leads),
        );
        registry.register(
            "mesh_ca_expiry_seconds",
            "End of the CA certificate that signs, in Unix time; 0 on a signer that does not",
            Gauge::clone(&ends),
        );
        Self { registry: Arc::new(registry), requests, leads, ends }
    }

    /// A request was answered.
    pub fn answered(&self, verdict: Verdict, reason: &'static str) {
        self.requests
            .get_or_create(&Labels { verdict: Word(verdict.as_str()), reason: Word(reason) })
            .inc();
    }

    /// Whether this signer answers.
    pub fn lead(&self, leads: bool) {
        self.leads.set(leads.into());
        if !leads {
            self.ends.set(0.0);
        }
    }

    /// When what signs ends.
    pub fn ends(&self, at: SystemTime) {
        self.ends.set(at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
    }

    /// Everything, in OpenMetrics text.
    pub fn exposition(&self) -> String {
        let mut text = String::new();
        #[expect(clippy::expect_used, reason = "writing to a String does not fail")]
        prometheus_client::encoding::text::encode(&mut text, &self.registry).expect("a String");
        text
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn exposition_is_pinned() {
        let telemetry = CaTelemetry::new();
        telemetry.answered(Verdict::Denied, "no_pod");
        telemetry.lead(true);
        telemetry.ends(UNIX_EPOCH + Duration::from_secs(2_000_000_000));
        let text = telemetry.exposition();
        for line in [
            r#"mesh_ca_requests_total{verdict="denied",reason="no_pod"} 1"#,
            "mesh_ca_leads 1",
            "mesh_ca_expiry_seconds 2000000000.0",
        ] {
            assert!(text.lines().any(|told| told == line), "{line}: {text}");
        }
        telemetry.lead(false);
        assert!(telemetry.exposition().contains("mesh_ca_expiry_seconds 0.0"));
    }
}
