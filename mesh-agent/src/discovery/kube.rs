//! The parts of Kubernetes objects that are read, under the names that the API gives them.
//!
//! Not the whole API (`k8s-openapi` has it): everything that a pod may say, read from YAML, from JSON
//! and from a list, is twelve megabytes of code, and was most of what an idle agent had in memory.
//! What is not here is skipped unseen, so a mistake in it is not reported either: it changes nothing.
//!
//! As in the API, a field that is missing or `null` is `None`, or empty where it is required there.

mod texts;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer, de};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

pub use self::texts::Texts;

/// `metadata`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ObjectMeta {
    /// Unique among the objects of one kind in a namespace.
    pub name: Option<String>,
    /// Not of Namespaces and Nodes.
    pub namespace: Option<String>,
    /// Unique for ever.
    pub uid: Option<String>,
    /// Of this state of the object; only who follows the API reads it.
    pub resource_version: Option<String>,
    /// What selectors see; those that are read.
    pub labels: Option<Texts>,
    /// What they do not; those that are read.
    pub annotations: Option<Texts>,
    /// What the object belongs to.
    pub owner_references: Option<Vec<OwnerReference>>,
    /// When it was made.
    pub creation_timestamp: Option<Time>,
    /// When it is to be gone.
    pub deletion_timestamp: Option<Time>,
}

/// One of `metadata.ownerReferences`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct OwnerReference {
    /// Such as `ReplicaSet`.
    #[serde(default, deserialize_with = "name_or_default")]
    pub kind: String,
    /// Its name.
    #[serde(default, deserialize_with = "name_or_default")]
    pub name: String,
    /// Whether it manages the object.
    pub controller: Option<bool>,
}

/// A moment, as RFC 3339 writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(pub OffsetDateTime);

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        impl de::Visitor<'_> for Text {
            type Value = Time;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a time such as 2026-01-31T12:00:00Z")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Time, E> {
                let time = OffsetDateTime::parse(text, &Rfc3339);
                time.map(Time)
                    .map_err(|_no_time| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }

        deserializer.deserialize_str(Text)
    }
}

/// `v1` Namespace.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Namespace {
    /// Its annotations hold for its pods.
    #[serde(default, deserialize_with = "or_default")]
    pub metadata: ObjectMeta,
}

/// `v1` ServiceAccount.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct ServiceAccount {
    /// Its name is part of an identity.
    #[serde(default, deserialize_with = "or_default")]
    pub metadata: ObjectMeta,
}

/// `v1` Node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Node {
    /// May say at which port its agent is.
    #[serde(default, deserialize_with = "or_default")]
    pub metadata: ObjectMeta,
    /// What was asked for.
    pub spec: Option<NodeSpec>,
    /// Where it is.
    pub status: Option<NodeStatus>,
}

/// `spec` of a Node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct NodeSpec {
    /// What its pods have their addresses from: one of each family at most.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Option<Vec<String>>,
}

/// `status` of a Node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct NodeStatus {
    /// In the order in which they are to be tried.
    pub addresses: Option<Vec<NodeAddress>>,
}

/// One of `status.addresses`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct NodeAddress {
    /// Such as `InternalIP`.
    #[serde(rename = "type", default, deserialize_with = "or_default")]
    pub type_: String,
    /// An address, or a name for types that say so.
    #[serde(default, deserialize_with = "or_default")]
    pub address: String,
}

/// `v1` Pod.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Pod {
    /// Who it is.
    #[serde(default, deserialize_with = "or_default")]
    pub metadata: ObjectMeta,
    /// What was asked for.
    pub spec: Option<PodSpec>,
    /// What became of it.
    pub status: Option<PodStatus>,
}

/// `spec` of a Pod.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodSpec {
    /// Where it runs.
    pub node_name: Option<String>,
    /// As whom.
    pub service_account_name: Option<String>,
    /// The older name of the same.
    pub service_account: Option<String>,
    /// Whether it has no network namespace of its own.
    pub host_network: Option<bool>,
    /// What runs it, if not the node's usual runtime.
    pub runtime_class_name: Option<Box<str>>,
    /// What runs in it.
    #[serde(default, deserialize_with = "or_default")]
    pub containers: Vec<Container>,
    /// What ran before, or runs beside.
    pub init_containers: Option<Vec<Container>>,
}

/// A container of a Pod.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Container {
    /// Tells another mesh's proxy.
    #[serde(default, deserialize_with = "or_default")]
    pub name: String,
}

/// `status` of a Pod.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    /// Such as `Running`.
    pub phase: Option<String>,
    /// The older form of the following.
    #[serde(rename = "podIP")]
    pub pod_ip: Option<String>,
    /// One of each family at most.
    #[serde(rename = "podIPs")]
    pub pod_ips: Option<Vec<PodIp>>,
}

/// One of `status.podIPs`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct PodIp {
    /// Without prefix length.
    #[serde(default, deserialize_with = "or_default")]
    pub ip: String,
}

/// `v1` Service.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Service {
    /// Its name and namespace are its name in DNS.
    #[serde(default, deserialize_with = "or_default")]
    pub metadata: ObjectMeta,
    /// What was asked for.
    pub spec: Option<ServiceSpec>,
}

/// `spec` of a Service.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSpec {
    /// Such as `ExternalName`.
    #[serde(rename = "type")]
    pub type_: Option<String>,
    /// The first of the following, or `None` for a headless one.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    /// One of each family at most.
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Option<Box<[String]>>,
    /// What it is reached at.
    pub ports: Option<Box<[ServicePort]>>,
    /// Whether it says whose pods are behind it.
    #[serde(rename = "selector", default, deserialize_with = "is_any")]
    pub selects: bool,
    /// Whether pods that are not ready count too.
    pub publish_not_ready_addresses: Option<bool>,
    /// `Cluster` or `Local`.
    pub internal_traffic_policy: Option<String>,
    /// Such as `PreferSameZone`.
    pub traffic_distribution: Option<String>,
    /// `None` or `ClientIP`.
    pub session_affinity: Option<String>,
    /// For how long.
    pub session_affinity_config: Option<SessionAffinityConfig>,
}

/// `sessionAffinityConfig` of a Service.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct SessionAffinityConfig {
    /// Of the only kind that there is.
    #[serde(rename = "clientIP")]
    pub client_ip: Option<ClientIpConfig>,
}

/// `clientIP` of such a one.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClientIpConfig {
    /// From one connection to the next.
    pub timeout_seconds: Option<i32>,
}

/// One of `spec.ports` of a Service.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    /// Joins it with the port of the same name of a slice.
    pub name: Option<String>,
    /// The number that clients dial.
    #[serde(default, deserialize_with = "or_default")]
    pub port: i32,
    /// TCP if nothing is said.
    pub protocol: Option<String>,
    /// What is spoken, such as `http` or `kubernetes.io/h2c`.
    pub app_protocol: Option<String>,
}

/// `discovery.k8s.io/v1` EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointSlice {
    /// A label says which Service it is of.
    #[serde(default, deserialize_with = "or_default")]
    pub metadata: ObjectMeta,
    /// `IPv4`, `IPv6` or `FQDN`.
    #[serde(default, deserialize_with = "or_default")]
    pub address_type: String,
    /// Behind the Service.
    pub endpoints: Option<Box<[Endpoint]>>,
    /// Of all of them.
    pub ports: Option<Box<[EndpointPort]>>,
}

/// One of `endpoints`. A cluster may have 100,000: what most of them do not have takes one word.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// The first of its `addresses`; of more the API says that "consumers should only use the first".
    #[serde(rename = "addresses", default, deserialize_with = "first")]
    pub address: Option<Box<str>>,
    /// Whether it may be used.
    pub conditions: Option<EndpointConditions>,
    /// Where it is.
    pub node_name: Option<Box<str>>,
    /// The zone of that node.
    pub zone: Option<Box<str>>,
    /// Whom it is meant for.
    pub hints: Option<Box<EndpointHints>>,
    /// The pod that it is.
    pub target_ref: Option<Box<ObjectReference>>,
}

/// `hints` of an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointHints {
    /// Clients of these nodes.
    #[serde(default, deserialize_with = "or_default")]
    pub for_nodes: Vec<Hint>,
    /// Clients of these zones.
    #[serde(default, deserialize_with = "or_default")]
    pub for_zones: Vec<Hint>,
}

/// One node or zone.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Hint {
    /// Its name.
    #[serde(default, deserialize_with = "or_default")]
    pub name: String,
}

/// `conditions` of an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct EndpointConditions {
    /// Takes connections.
    pub ready: Option<bool>,
    /// Still serves, whether it is going or not.
    pub serving: Option<bool>,
    /// Is going.
    pub terminating: Option<bool>,
}

/// One of `ports` of a slice.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointPort {
    /// Joins it with the port of the same name of the Service.
    pub name: Option<String>,
    /// The pod's.
    pub port: Option<i32>,
    /// TCP if nothing is said.
    pub protocol: Option<String>,
    /// What is spoken, such as `http` or `kubernetes.io/h2c`.
    pub app_protocol: Option<String>,
}

/// Names another object.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct ObjectReference {
    /// Such as `Pod`.
    pub kind: Option<Box<str>>,
    /// The slice's own if nothing is said.
    pub namespace: Option<Box<str>>,
    /// Its name.
    pub name: Option<Box<str>>,
    /// Which one of that name.
    pub uid: Option<Box<str>>,
}

/// `null` is as good as nothing, as in the API.
///
/// # Errors
///
/// What it is otherwise is not to be read.
pub fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// The longest name of an object, in bytes
/// (<https://kubernetes.io/docs/concepts/overview/working-with-objects/names/>).
const LONGEST_NAME: usize = 253;

/// What may be a name, and nothing else: the API does not look at how long those are that an object gives to its owners.
fn name_or_default<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let name: String = or_default(deserializer)?;
    Ok(if name.len() <= LONGEST_NAME { name } else { String::new() })
}

/// The first of a list.
fn first<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    let all = Option::<Vec<T>>::deserialize(deserializer)?;
    Ok(all.and_then(|all| all.into_iter().next()))
}

/// Whether there is anything in a map of texts.
fn is_any<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    let texts = Option::<BTreeMap<String, String>>::deserialize(deserializer)?;
    Ok(texts.is_some_and(|texts| !texts.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<T: de::DeserializeOwned>(json: &str) -> Result<T, serde_json::Error> {
        serde_json::from_str(json)
    }

    #[test]
    fn null_and_nothing_mean_the_same() {
        let null = r#"{"metadata": null, "spec": {"containers": null, "hostNetwork": null}, "status": null}"#;
        let nothing = Pod { spec: Some(PodSpec::default()), ..Pod::default() };
        assert_eq!(read::<Pod>(null).unwrap(), nothing);
        assert_eq!(read::<Pod>(r#"{"spec": {}}"#).unwrap(), nothing);
        let slice = r#"{"metadata": {"labels": null}, "addressType": null, "endpoints": [{"addresses": null}], "ports": null}"#;
        let endpoints = Some([Endpoint::default()].into());
        assert_eq!(
            read::<EndpointSlice>(slice).unwrap(),
            EndpointSlice { endpoints, ..EndpointSlice::default() }
        );
    }

    #[test]
    fn what_is_not_read_may_be_anything() {
        let pod = r#"{"metadata": {"name": "web", "managedFields": [{"time": 3}]},
            "spec": {"volumes": "none", "containers": [{"name": "c", "ports": [{"containerPort": "x"}]}]}}"#;
        let pod: Pod = read(pod).unwrap();
        assert_eq!(pod.metadata.name.as_deref(), Some("web"));
        assert_eq!(pod.spec.unwrap().containers, [Container { name: "c".into() }]);
        assert!(read::<Pod>(r#"{"spec": {"containers": {"name": "c"}}}"#).is_err());
    }

    #[test]
    fn of_labels_and_annotations_only_those_that_are_read_are_kept() {
        let large = "x".repeat(200 * 1024);
        let meta = format!(
            r#"{{"annotations": {{"kubectl.kubernetes.io/last-applied-configuration": "{large}",
                "malla.dev/mesh": "enabled", "note": 3}}, "labels": {{"app": "web", "team": "shop"}}}}"#
        );
        let meta: ObjectMeta = read(&meta).unwrap();
        let map = |key: &str, value: &str| Some([(key, value)].into_iter().collect());
        assert_eq!(meta.annotations, map("malla.dev/mesh", "enabled"));
        assert_eq!(meta.labels, map("app", "web"));
    }

    #[test]
    fn first_address_counts_and_a_selector_by_whether_there_is_one() {
        let endpoint = read::<Endpoint>(r#"{"addresses": ["10.0.0.1", "10.0.0.2"]}"#).unwrap();
        assert_eq!(endpoint.address.as_deref(), Some("10.0.0.1"));
        assert_eq!(read::<Endpoint>(r#"{"addresses": []}"#).unwrap(), Endpoint::default());
        let selects = |json: &str| read::<ServiceSpec>(json).unwrap().selects;
        assert!(selects(r#"{"selector": {"app": "web"}}"#));
        for none in ["{}", r#"{"selector": null}"#, r#"{"selector": {}}"#] {
            assert!(!selects(none), "{none}");
        }
        assert!(read::<ServiceSpec>(r#"{"selector": "app"}"#).is_err());
    }

    #[test]
    fn times_are_ordered_and_wrong_ones_are_refused() {
        let time = |text: &str| read::<Time>(&format!("\"{text}\""));
        let (zulu, later) = (time("2026-01-31T12:00:00Z"), time("2026-01-31T11:30:00.5-01:00"));
        assert!(zulu.unwrap() < later.unwrap());
        for wrong in ["", "yesterday", "2026-01-31", "2026-02-30T12:00:00Z"] {
            let error = time(wrong).unwrap_err().to_string();
            assert!(error.contains("2026-01-31T12:00:00Z"), "{error}");
        }
    }
}
