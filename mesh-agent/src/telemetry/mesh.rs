//! The `mesh_*` families: refusals, tunnels, certificates, snapshot, kernel counters.
//!
//! Failed connections are counted here. What others own (how many tunnels there are,
//! when a certificate expires, what the kernel counted) is asked for at each scrape through
//! [`Sources`], so there is no second copy that could be stale.

use std::fmt;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mesh_core::spiffe::SpiffeId;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, LabelValueEncoder, NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::connection::{Direction, Failure};

/// What the tunnels are and have done, in words of closed sets.
#[derive(Clone, Debug, Default)]
pub struct TunnelNumbers {
    /// `(carrier, state, count)`: `mesh_tunnels`, tunnels that there are now.
    pub tunnels: Vec<(&'static str, &'static str, u64)>,
    /// `(role, kind, count)`: `mesh_tunnel_handshakes_total`; role is `client` or `server`, kind is
    /// `full` or `resumed`.
    pub handshakes: Vec<(&'static str, &'static str, u64)>,
    /// `(side, reason, count)`: `mesh_tunnel_refusals_total`.
    pub refusals: Vec<(&'static str, &'static str, u64)>,
    /// `(event, count)`: `mesh_tunnel_events_total`, such as `dial`, `flow`, `fallback`.
    pub events: Vec<(&'static str, u64)>,
}

/// How current the agent's knowledge is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SnapshotState {
    /// Since the snapshot in use was made.
    pub age: Duration,
    /// Problems in the manifests now.
    pub in_manifests: u64,
    /// Those, and all others that `status` tells.
    pub problems: u64,
    /// NetworkPolicies: `mesh_policies_not_enforced{kind}`.
    pub policies: u64,
}

/// Where state is asked for at each scrape. The closures run on the thread that answers the scrape
/// and must not block.
pub struct Sources {
    /// Kernel counters by name: `mesh_capture_total{event}`.
    pub capture: Box<dyn Fn() -> Vec<(&'static str, u64)> + Send + Sync>,
    /// Pods that should be enrolled and are not, by reason: `mesh_pods_not_enrolled{reason}`.
    pub not_enrolled: Box<dyn Fn() -> Vec<(&'static str, u64)> + Send + Sync>,
    /// The `mesh_tunnel*` families.
    pub tunnels: Box<dyn Fn() -> TunnelNumbers + Send + Sync>,
    /// When each certificate held ends: `mesh_certificate_expiry_seconds{identity}`.
    pub certificates: Box<dyn Fn() -> Vec<(SpiffeId, SystemTime)> + Send + Sync>,
    /// `mesh_snapshot_age_seconds`, `mesh_manifest_problems`, `mesh_problems`.
    pub snapshot: Box<dyn Fn() -> SnapshotState + Send + Sync>,
    /// Brings the byte counters of open direct connections up to date.
    pub look_at_direct: Box<dyn Fn() + Send + Sync>,
    /// `mesh_direct_events_lost_total`: what the kernel could not tell of direct connections.
    pub direct_events_lost: Box<dyn Fn() -> u64 + Send + Sync>,
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources").finish_non_exhaustive()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusalLabels {
    stage: Word,
    reason: Word,
    direction: Word,
}

/// A label value from the program text: no peer can add one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Word(pub(super) &'static str);

impl EncodeLabelValue for Word {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        EncodeLabelValue::encode(&self.0, encoder)
    }
}

/// `mesh_refusals_total`: who is to blame for connections that failed.
#[derive(Clone, Debug, Default)]
pub(super) struct Refusals(Family<RefusalLabels, Counter>);

impl Refusals {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let this = Self::default();
        registry.register(
            "mesh_refusals",
            "Connections that failed, by the stage to blame and its reason",
            this.0.clone(),
        );
        this
    }

    pub(super) fn count(&self, direction: Direction, failure: &Failure) {
        let labels = RefusalLabels {
            stage: Word(failure.stage.as_str()),
            reason: Word(failure.reason),
            direction: Word(direction.as_str()),
        };
        self.0.get_or_create(&labels).inc();
    }
}

/// Asks [`Sources`] at each scrape; shows nothing before they are known.
#[derive(Debug, Default)]
pub(super) struct MeshState {
    pub(super) sources: OnceLock<Sources>,
}

impl MeshState {
    /// See [`Sources::look_at_direct`].
    pub(super) fn look_at_direct(&self) {
        if let Some(sources) = self.sources.get() {
            (sources.look_at_direct)();
        }
    }
}

impl Collector for MeshState {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(sources) = self.sources.get() else {
            return Ok(());
        };
        counters(
            &mut encoder,
            ("mesh_capture", "What the kernel programs did, by event"),
            (sources.capture)().into_iter().map(|(event, count)| ([("event", event)], count)),
        )?;
        let mut pods = encoder.encode_descriptor(
            "mesh_pods_not_enrolled",
            "Pods of this node that should be in the mesh and are not",
            None,
            MetricType::Gauge,
        )?;
        for (reason, count) in (sources.not_enrolled)() {
            pods.encode_family(&[("reason", reason)])?.encode_gauge(&as_gauge(count))?;
        }
        encoder
            .encode_descriptor(
                "mesh_direct_events_lost",
                "Begins and ends of direct connections that the kernel could not tell",
                None,
                MetricType::Counter,
            )?
            .encode_counter::<NoLabelSet, _, u64>(&(sources.direct_events_lost)(), None)?;
        let TunnelNumbers { tunnels, handshakes, refusals, events } = (sources.tunnels)();
        let mut now =
            encoder.encode_descriptor("mesh_tunnels", "Tunnels now", None, MetricType::Gauge)?;
        for (carrier, state, count) in tunnels {
            now.encode_family(&[("carrier", carrier), ("state", state)])?
                .encode_gauge(&as_gauge(count))?;
        }
        counters(
            &mut encoder,
            ("mesh_tunnel_handshakes", "Complete TLS handshakes of tunnels"),
            handshakes.into_iter().map(|(role, kind, n)| ([("role", role), ("kind", kind)], n)),
        )?;
        counters(
            &mut encoder,
            ("mesh_tunnel_refusals", "Tunnels that were refused, by the side that counts"),
            refusals.into_iter().map(|(side, why, n)| ([("side", side), ("reason", why)], n)),
        )?;
        counters(
            &mut encoder,
            ("mesh_tunnel_events", "What tunnels did, by event"),
            events.into_iter().map(|(event, count)| ([("event", event)], count)),
        )?;
        let mut certificates = encoder.encode_descriptor(
            "mesh_certificate_expiry_seconds",
            "When the certificate of an identity expires, in seconds since 1970",
            None,
            MetricType::Gauge,
        )?;
        for (identity, not_after) in (sources.certificates)() {
            let since_epoch = not_after.duration_since(UNIX_EPOCH).unwrap_or_default();
            certificates
                .encode_family(&[("identity", identity.to_string())])?
                .encode_gauge(&as_gauge(since_epoch.as_secs()))?;
        }
        let snapshot = (sources.snapshot)();
        encoder
            .encode_descriptor(
                "mesh_snapshot_age_seconds",
                "Age of the state that decisions are made from",
                None,
                MetricType::Gauge,
            )?
            .encode_gauge(&snapshot.age.as_secs_f64())?;
        encoder
            .encode_descriptor(
                "mesh_manifest_problems",
                "Problems in the manifests that are reported now",
                None,
                MetricType::Gauge,
            )?
            .encode_gauge(&as_gauge(snapshot.in_manifests))?;
        encoder
            .encode_descriptor(
                "mesh_problems",
                "Problems that `status` tells now, of the manifests and all others",
                None,
                MetricType::Gauge,
            )?
            .encode_gauge(&as_gauge(snapshot.problems))?;
        encoder
            .encode_descriptor(
                "mesh_policies_not_enforced",
                "Policies that are not enforced on TCP between pods of the mesh, by kind",
                None,
                MetricType::Gauge,
            )?
            .encode_family(&[("kind", "NetworkPolicy")])?
            .encode_gauge(&as_gauge(snapshot.policies))
    }
}

/// A family of counters that somebody else keeps.
fn counters<const N: usize>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help): (&str, &str),
    series: impl Iterator<Item = ([(&'static str, &'static str); N], u64)>,
) -> Result<(), fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (labels, count) in series {
        family.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&count, None)?;
    }
    Ok(())
}

fn as_gauge(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
