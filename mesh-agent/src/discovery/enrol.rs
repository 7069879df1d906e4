//! Who takes part in the mesh, and how: the meaning of `malla.dev/…` on a namespace, a pod and a Service.
//!
//! A pod's own word goes before its namespace's. A value that is not understood is reported and never
//! widens anything: it counts as the narrowest one, also where the namespace's is wider. Where none lets
//! through more than another it counts as not given.

pub mod left_alone;

use std::fmt;
use std::str::FromStr;

use mesh_core::addr::Cidr;
use mesh_core::settings::{MAX_SKIP_CIDRS, Mode, Outbound, PortList, Settings, UnknownPods};
use mesh_core::snapshot::Enrolment;

use self::left_alone::unfit;
pub(super) use self::left_alone::{has_completed, shares_the_nodes_network};
use super::kube::{Namespace, ObjectMeta, Pod, Texts};
use super::objects::{Kind, ObjectKey};
use super::problems::Shown;
use super::{Problems, Report, shown};

/// `enabled` or `disabled`; the only key that also counts as a label.
pub const MESH: &str = "malla.dev/mesh";
/// `permissive` or `strict`.
pub const MODE: &str = "malla.dev/mode";
/// `mesh` or `all`.
pub const OUTBOUND: &str = "malla.dev/outbound";
/// Ports, such as `4567,8000-8100`.
pub const SKIP_INBOUND_PORTS: &str = "malla.dev/skip-inbound-ports";
/// Ports.
pub const SKIP_OUTBOUND_PORTS: &str = "malla.dev/skip-outbound-ports";
/// Blocks of addresses, such as `10.0.0.0/8,fd00::/8`.
pub const SKIP_OUTBOUND_CIDRS: &str = "malla.dev/skip-outbound-cidrs";
/// `true` or `false`.
pub const FAIL_OPEN: &str = "malla.dev/fail-open";
/// `true` or `false`.
pub const PRESERVE_CLIENT_ADDRESS: &str = "malla.dev/preserve-client-address";
/// Ports of pods, and on a Service of it: carried, and never parsed as HTTP.
pub const OPAQUE_PORTS: &str = "malla.dev/opaque-ports";
/// `on` or `off`.
pub const DIRECT: &str = "malla.dev/direct";
/// `hold`, `deny` or `allow`; in a cluster.
pub const UNKNOWN_PODS: &str = "malla.dev/unknown-pods";
/// On a pod, standalone: where its network namespace is.
pub const NETNS: &str = "malla.dev/netns";
/// On a node: the port of its agent, if not everybody's.
pub const TUNNEL_PORT: &str = "malla.dev/tunnel-port";

/// On a pod, written by its agent: how taking part went.
pub const REDIRECTION: &str = "malla.dev/redirection";

const PREFIX: &str = "malla.dev/";

/// Istio's label on a pod or a namespace: `ambient` or `none`.
const AMBIENT: &str = "istio.io/dataplane-mode";

/// Istio's label for the proxy that is to see a namespace's requests.
const WAYPOINT: &str = "istio.io/use-waypoint";

const OF_NAMESPACE: &[&str] = &[
    MESH,
    MODE,
    OUTBOUND,
    SKIP_INBOUND_PORTS,
    SKIP_OUTBOUND_PORTS,
    SKIP_OUTBOUND_CIDRS,
    FAIL_OPEN,
    PRESERVE_CLIENT_ADDRESS,
    OPAQUE_PORTS,
    DIRECT,
    UNKNOWN_PODS,
];

const OF_SERVICE: &[&str] = &[OPAQUE_PORTS];

/// Namespaces whose pods the mesh itself may need to start.
const SYSTEM_NAMESPACES: &[&str] = &["kube-system", "malla-system"];

/// Whether no pod of the namespace takes part.
pub(super) fn is_system(namespace: &str) -> bool {
    SYSTEM_NAMESPACES.contains(&namespace)
}

/// What one object says. `None`: nothing, or nothing that counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    mesh: Option<bool>,
    mode: Option<Mode>,
    outbound: Option<Outbound>,
    skip_inbound_ports: Option<PortList>,
    skip_outbound_ports: Option<PortList>,
    skip_outbound_cidrs: Option<Vec<Cidr>>,
    fail_open: Option<bool>,
    preserve_client_address: Option<bool>,
    opaque_ports: Option<PortList>,
    direct: Option<bool>,
    unknown_pods: Option<UnknownPods>,
    /// Whether Istio's ambient mode is asked for.
    ambient: Option<bool>,
}

/// What a Service says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ServiceWishes {
    opaque_ports: Option<PortList>,
}

impl ServiceWishes {
    /// Those of its ports that are opaque, in a namespace with these wishes.
    pub(super) fn settings_of(&self, namespace: Option<&Wishes>) -> PortList {
        let inherited = namespace.and_then(|namespace| namespace.opaque_ports.clone());
        first(&self.opaque_ports, &inherited)
    }
}

impl Wishes {
    pub(super) fn of_namespace(meta: &ObjectMeta, report: &mut Report<'_>) -> Self {
        foreign(meta, OF_NAMESPACE, &[], report);
        let wishes = Self::read(meta, report);
        // Whoever has moved an ambient namespace here must not believe that what its waypoint enforced still holds.
        let waypoint = meta.labels.as_ref().and_then(|labels| labels.get(WAYPOINT));
        let is_ours = wishes.mesh == Some(true) && wishes.ambient != Some(true);
        if is_ours && waypoint.is_some_and(|name| name != "none") {
            report.say(
                label(WAYPOINT),
                "has no effect in this mesh: nothing goes through a waypoint of Istio, and no policy that needs one holds",
                "remove the label",
            );
        }
        wishes
    }

    pub(super) fn of_pod(meta: &ObjectMeta, report: &mut Report<'_>) -> Self {
        foreign(meta, OF_NAMESPACE, &[NETNS], report);
        Self::read(meta, report)
    }

    pub(super) fn of_service(meta: &ObjectMeta, report: &mut Report<'_>) -> ServiceWishes {
        foreign(meta, OF_SERVICE, &[], report);
        ServiceWishes { opaque_ports: value(meta, OPAQUE_PORTS, PORTS.0, report, parsed) }
    }

    fn read(meta: &ObjectMeta, report: &mut Report<'_>) -> Self {
        Self {
            mesh: mesh(meta, report),
            mode: narrowed(
                meta,
                MODE,
                ("permissive or strict", "strict"),
                report,
                |text| match text {
                    "permissive" => Some(Mode::Permissive),
                    "strict" => Some(Mode::Strict),
                    _ => None,
                },
            ),
            // What is captured is seen, and refused while there is no agent.
            outbound: narrowed(meta, OUTBOUND, ("mesh or all", "all"), report, |text| match text {
                "mesh" => Some(Outbound::Mesh),
                "all" => Some(Outbound::All),
                _ => None,
            }),
            skip_inbound_ports: narrowed(meta, SKIP_INBOUND_PORTS, PORTS, report, parsed),
            skip_outbound_ports: narrowed(meta, SKIP_OUTBOUND_PORTS, PORTS, report, parsed),
            skip_outbound_cidrs: narrowed(meta, SKIP_OUTBOUND_CIDRS, CIDRS, report, cidrs),
            fail_open: narrowed(meta, FAIL_OPEN, ("true or false", "false"), report, parsed),
            preserve_client_address: value(
                meta,
                PRESERVE_CLIENT_ADDRESS,
                "true or false",
                report,
                parsed,
            ),
            opaque_ports: value(meta, OPAQUE_PORTS, PORTS.0, report, parsed),
            direct: narrowed(meta, DIRECT, ("on or off", "off"), report, |text| match text {
                "on" => Some(true),
                "off" => Some(false),
                _ => None,
            }),
            unknown_pods: narrowed(
                meta,
                UNKNOWN_PODS,
                ("hold, deny or allow", "deny"),
                report,
                |text| match text {
                    "hold" => Some(UnknownPods::Hold),
                    "deny" => Some(UnknownPods::Deny),
                    "allow" => Some(UnknownPods::Allow),
                    _ => None,
                },
            ),
            ambient: meta.labels.as_ref().and_then(|labels| match labels.get(AMBIENT)? {
                "ambient" => Some(true),
                "none" => Some(false),
                _ => None,
            }),
        }
    }

    /// How a pod with these wishes, in a namespace with those, takes part.
    pub(super) fn settings(&self, namespace: &Self) -> Settings {
        let default = Settings::default();
        Settings {
            mode: self.mode.or(namespace.mode).unwrap_or(default.mode),
            outbound: self.outbound.or(namespace.outbound).unwrap_or(default.outbound),
            skip_inbound_ports: first(&self.skip_inbound_ports, &namespace.skip_inbound_ports),
            skip_outbound_ports: first(&self.skip_outbound_ports, &namespace.skip_outbound_ports),
            skip_outbound_cidrs: first(&self.skip_outbound_cidrs, &namespace.skip_outbound_cidrs),
            fail_open: self.fail_open.or(namespace.fail_open).unwrap_or(default.fail_open),
            preserve_client_address: self
                .preserve_client_address
                .or(namespace.preserve_client_address)
                .unwrap_or(default.preserve_client_address),
            opaque_ports: first(&self.opaque_ports, &namespace.opaque_ports),
            direct: self.direct.or(namespace.direct).unwrap_or(default.direct),
            unknown_pods: self
                .unknown_pods
                .or(namespace.unknown_pods)
                .unwrap_or(default.unknown_pods),
        }
    }

    /// Whether `pod`, in a namespace with the wishes `namespace`, is to be carried. Its addresses
    /// are looked at by the caller.
    pub(super) fn enrolment(&self, namespace: &Self, name: &str, pod: &Pod) -> Enrolment {
        let asked = match self.mesh.or(namespace.mesh) {
            None => Err(left_alone::NOT_ENROLLED),
            Some(false) => Err(left_alone::DISABLED),
            Some(true) => Ok(()),
        };
        // Before Istio has captured it, only this says that it will.
        let is_ambient = self.ambient.or(namespace.ambient) == Some(true);
        let unfit = || unfit(name, pod).or_else(|| is_ambient.then_some(left_alone::ISTIO_AMBIENT));
        match asked.and_then(|()| unfit().map_or(Ok(()), Err)) {
            Ok(()) => Enrolment::Enrolled,
            Err(reason) => Enrolment::LeftAlone(reason),
        }
    }
}

/// Reports what is ours and is neither one of the `settings` of such an object nor `also` there, and what
/// is one but stands among the labels.
fn foreign(meta: &ObjectMeta, settings: &[&str], also: &[&str], report: &mut Report<'_>) {
    let is_setting = |key: &str| settings.contains(&key) || also.contains(&key);
    for (key, _) in ours(meta.annotations.as_ref()) {
        // What the agent itself writes to say how enrolling went is no wish.
        if key != REDIRECTION && !is_setting(key) {
            no_setting(annotation(key), settings, report);
        }
    }
    for (key, text) in ours(meta.labels.as_ref()) {
        // On a Service it means nothing, and may be there because a chart gives it to all its objects.
        if key == MESH {
            continue;
        }
        if is_setting(key) {
            no_label(key, text, report);
        } else {
            no_setting(label(key), settings, report);
        }
    }
}

/// Those of the labels or annotations that are ours.
fn ours(texts: Option<&Texts>) -> impl Iterator<Item = (&str, &str)> {
    let all = texts.into_iter().flat_map(Texts::iter);
    all.filter(|(key, _)| key.starts_with(PREFIX))
}

fn no_setting(field: Place<'_>, settings: &[&str], report: &mut Report<'_>) {
    report.say(
        field,
        "is no setting of this version here, and has no effect",
        format_args!("the settings are {}", Listed(settings)),
    );
}

/// Reports the setting `key` where it is a label: since `malla.dev/mesh` may be one, people write others so
/// too.
pub(super) fn no_label(key: &str, text: &str, report: &mut Report<'_>) {
    report.say(
        label(key),
        "counts only as an annotation; as a label it has no effect",
        format_args!("annotate with {key}={} instead, and remove the label", shown(text)),
    );
}

/// Whether `pod`, in `namespace`, takes part in the mesh: what its agent goes by, for who decides
/// whether that agent may act for it.
pub fn takes_part(namespace: &Namespace, pod: &Pod) -> bool {
    let mut unread = Problems::default();
    let nobody = ObjectKey { kind: Kind::Pod, namespace: String::new(), name: String::new() };
    let mut report = Report::of(&nobody, &mut unread);
    let wishes = Wishes::of_namespace(&namespace.metadata, &mut report);
    let name = namespace.metadata.name.as_deref().unwrap_or_default();
    let enrolment = Wishes::of_pod(&pod.metadata, &mut report).enrolment(&wishes, name, pod);
    enrolment == Enrolment::Enrolled
}

/// The annotation goes before the label of the same key, which selectors need. A word that is not understood counts
/// as not given: whoever writes `false` is not to be enrolled by it.
fn mesh(meta: &ObjectMeta, report: &mut Report<'_>) -> Option<bool> {
    const WORDS: &str = "enabled or disabled";
    let meaning = |text: &str| match text {
        "enabled" => Some(true),
        "disabled" => Some(false),
        _ => None,
    };
    let annotated = value(meta, MESH, WORDS, report, meaning);
    if annotated.is_some() {
        return annotated;
    }
    let text = meta.labels.as_ref()?.get(MESH)?;
    let labelled = meaning(text);
    if labelled.is_none() {
        not_understood(label(MESH), text, "not given", WORDS, report);
    }
    labelled
}

/// What is expected of a list, and the narrowest one: with one item that is not understood, nothing is
/// skipped.
const PORTS: (&str, &str) = ("ports and ranges such as 4567,8000-8100, at most 16", "");
const CIDRS: (&str, &str) = ("blocks of addresses such as 10.0.0.0/8,fd00::/8, at most 32", "");

/// Blocks, each once. `None` if one is none, or if there are too many.
fn cidrs(text: &str) -> Option<Vec<Cidr>> {
    let mut blocks = Vec::new();
    for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
        let block = parsed(item)?;
        if !blocks.contains(&block) {
            blocks.push(block);
        }
        if blocks.len() > MAX_SKIP_CIDRS {
            return None;
        }
    }
    Some(blocks)
}

/// The annotation `key`, if it is there: what is not understood counts as the narrowest value, and not as
/// not given. Who has written it over `strict` has not asked for less.
fn narrowed<T>(
    meta: &ObjectMeta,
    key: &str,
    (expected, narrowest): (&str, &str),
    report: &mut Report<'_>,
    meaning: impl Fn(&str) -> Option<T>,
) -> Option<T> {
    let text = meta.annotations.as_ref()?.get(key)?;
    let value = meaning(text.trim());
    if value.is_some() {
        return value;
    }
    let instead = match narrowest {
        "" => "an empty list".to_owned(),
        word => format!("`{word}`"),
    };
    not_understood(annotation(key), text, &instead, expected, report);
    meaning(narrowest)
}

/// The annotation `key`, if it is there and understood.
pub(super) fn value<T>(
    meta: &ObjectMeta,
    key: &str,
    expected: &str,
    report: &mut Report<'_>,
    meaning: impl FnOnce(&str) -> Option<T>,
) -> Option<T> {
    let text = meta.annotations.as_ref()?.get(key)?;
    let value = meaning(text.trim());
    if value.is_none() {
        not_understood(annotation(key), text, "not given", expected, report);
    }
    value
}

fn not_understood(
    field: Place<'_>,
    text: &str,
    instead: &str,
    expected: &str,
    report: &mut Report<'_>,
) {
    report.say(
        field,
        format_args!("`{}` is not understood and counts as {instead}", shown(text)),
        format_args!("write {expected}"),
    );
}

/// Where among the metadata a key stands. Written out where it is told: an object can have thousands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    map: &'static str,
    key: Shown<'a>,
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "metadata.{}[\"{}\"]", self.map, self.key)
    }
}

pub(super) fn annotation(key: &str) -> Place<'_> {
    Place { map: "annotations", key: shown(key) }
}

fn label(key: &str) -> Place<'_> {
    Place { map: "labels", key: shown(key) }
}

/// With commas between.
struct Listed<'a>(&'a [&'a str]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, one) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{one}")?;
        }
        Ok(())
    }
}

pub(super) fn parsed<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok()
}

fn first<T: Clone + Default>(own: &Option<T>, inherited: &Option<T>) -> T {
    own.as_ref().or(inherited.as_ref()).cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests;
