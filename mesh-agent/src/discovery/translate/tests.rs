//! Each fact of the translation on manifests as people write them.

use mesh_core::snapshot::{Enrolment, Workload};

use super::*;
use crate::discovery::enrol::left_alone;
use crate::discovery::kube::{ObjectMeta, Service};
use crate::discovery::manifest::{self, Format};
use crate::discovery::problems::{MOST_OF_ONE, MOST_PROBLEMS};
use crate::identity::testing::cluster_local;

/// Two nodes, an enrolled namespace, and in it the pods `one` (here) and `two` (there).
pub(super) const CLUSTER: &str = r#"
apiVersion: v1
kind: Node
metadata: {name: a}
status: {addresses: [{type: Hostname, address: a}, {type: InternalIP, address: 192.0.2.1}]}
---
apiVersion: v1
kind: Node
metadata: {name: b, annotations: {malla.dev/tunnel-port: "16000"}}
status: {addresses: [{type: InternalIP, address: 192.0.2.2}, {type: InternalIP, address: "2001:db8::2"}]}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, annotations: {malla.dev/mesh: enabled, malla.dev/mode: strict}}
---
apiVersion: v1
kind: Pod
metadata:
  {name: one, namespace: shop, uid: u1, annotations: {malla.dev/netns: /run/netns/one}, labels: {app: web, version: v1}}
spec: {nodeName: a, serviceAccountName: web}
status: {phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: two, namespace: shop, uid: u2}
spec: {nodeName: b}
status: {podIPs: [{ip: 10.0.0.2}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.1.0.1
  clusterIPs: [10.1.0.1, "fd01::1"]
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: web}
  - {name: admin, port: 81, targetPort: 9001}
  - {name: dns, port: 53, protocol: UDP}
"#;

pub(super) const SLICE: &str = r#"
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports:
- {name: http, port: 8080}
- {name: admin, port: 9001, protocol: TCP}
- {name: dns, port: 53, protocol: UDP}
endpoints:
- {addresses: [10.0.0.2], targetRef: {kind: Pod, name: two, namespace: shop, uid: u2}}
- {addresses: [10.0.0.1], conditions: {ready: true}, targetRef: {kind: Pod, name: one}}
"#;

pub(super) fn objects(text: &str) -> Vec<Object> {
    let manifest = manifest::parse(text, Format::Yaml).unwrap();
    assert_eq!(manifest.ignored, [""; 0]);
    manifest.objects.into_iter().map(|(_, object)| object).collect()
}

pub(super) fn context() -> Context {
    Context {
        node: "a".into(),
        trust_domain: cluster_local(),
        tunnel_port: 15019,
        netns: NetnsFrom::Annotation,
        pod_cidrs: Vec::new(),
    }
}

pub(super) fn read(text: &str) -> (Snapshot, Vec<Problem>) {
    translate(&objects(text).into_iter().collect(), &context(), 1)
}

/// A snapshot without problems.
pub(super) fn snapshot(text: &str) -> Snapshot {
    let (snapshot, problems) = read(text);
    assert_eq!(problems, []);
    snapshot
}

pub(super) fn with(documents: &[&str]) -> String {
    [&[CLUSTER], documents].concat().join("\n---\n")
}

/// `<object>: <field>` of each problem.
pub(super) fn fields(problems: &[Problem]) -> Vec<String> {
    problems.iter().map(|problem| format!("{}: {}", problem.object, problem.field)).collect()
}

fn workload(snapshot: &Snapshot, ip: &str) -> Arc<Workload> {
    Arc::clone(snapshot.workload_at(ip.parse().unwrap()).unwrap())
}

#[test]
fn pod_is_known_by_each_of_its_addresses_with_its_identity_and_settings() {
    let snapshot = snapshot(CLUSTER);
    let one = workload(&snapshot, "10.0.0.1");
    assert_eq!(one, workload(&snapshot, "fd00::1"));
    assert_eq!(one, workload(&snapshot, "::ffff:10.0.0.1"));
    assert_eq!(one.identity.to_string(), "spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!(one.netns.as_deref(), Some("/run/netns/one"));
    assert_eq!(one.settings.mode, mesh_core::settings::Mode::Strict);
    assert_eq!(one.ips.len(), 2);
    assert!(one.is_enrolled());
    let two = workload(&snapshot, "10.0.0.2");
    assert_eq!(two.identity.service_account(), "default");
    assert!(two.is_enrolled() && two.netns.is_none());
    let local: Vec<_> = snapshot.local_enrolled().map(|w| w.name.to_string()).collect();
    assert_eq!(local, ["one"]);
}

/// What a kubelet writes there is what others dial, one after the other.
#[test]
fn node_is_tried_at_a_few_addresses_and_at_none_that_means_the_one_who_dials() {
    let many: String =
        (0..200).map(|n| format!("{{type: InternalIP, address: 192.0.2.{n}}},")).collect();
    let address = |ip: &str| format!("{{type: InternalIP, address: \"{ip}\"}},");
    let nobodys =
        ["127.0.0.1", "::1", "0.0.0.0", "::", "224.0.0.1", "::ffff:127.0.0.1"].map(address);
    let node = format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: c}}\nstatus: {{addresses: [{}{many}]}}",
        nobodys.concat(),
    );
    let (snapshot, problems) = read(&with(&[&node]));
    let peers = &snapshot.node("c").unwrap().peers;
    let ips: Vec<_> = peers.iter().map(|peer| peer.0.ip().to_string()).collect();
    assert_eq!(ips, ["192.0.2.0", "192.0.2.1", "192.0.2.2", "192.0.2.3"]);
    assert_eq!(fields(&problems), ["Node c: status.addresses"; 6]);
}

/// Whoever may write slices or Services must not be able to fill every agent of the cluster.
#[test]
fn service_has_so_many_ports_and_endpoints_and_no_more() {
    let slice = |ports: std::ops::Range<u32>, endpoints: u32| {
        let ports: String = ports.map(|n| format!("{{name: p{n}, port: {n}}},")).collect();
        let endpoints: String = (0..endpoints)
            .map(|n| format!("{{addresses: [10.9.{}.{}]}},", n / 256, n % 256))
            .collect();
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: big-1, \
             namespace: shop, labels: {{kubernetes.io/service-name: big}}}}\naddressType: IPv4\n\
             ports: [{ports}]\nendpoints: [{endpoints}]"
        )
    };
    let service = |ports: std::ops::Range<u32>| {
        let ports: String = ports.map(|n| format!("{{name: p{n}, port: {n}}},")).collect();
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: big, namespace: shop}}\n\
             spec: {{clusterIP: 10.96.0.9, ports: [{ports}]}}"
        )
    };
    let big = |snapshot: &Snapshot| {
        let found = snapshot.services().find(|service| &*service.name == "big").unwrap();
        let endpoints = found.ports.iter().map(|port| port.endpoints.len()).sum::<usize>();
        (found.ports.len(), endpoints)
    };
    // Ports that the Service does not have are of no use.
    let (snapshot, problems) = read(&with(&[&service(1..2), &slice(1..20_000, 1000)]));
    assert_eq!((big(&snapshot), fields(&problems)), ((1, 1000), vec![]));
    let (snapshot, problems) = read(&with(&[&service(1..2001), &slice(1..2001, 1000)]));
    assert_eq!(big(&snapshot), (1024, 100_000));
    assert_eq!(fields(&problems), ["Service shop/big: spec.ports"; 2]);
}

#[test]
fn node_is_reached_at_its_internal_addresses_and_tunnel_port() {
    let snapshot = snapshot(CLUSTER);
    let peers = |name: &str| {
        let node = snapshot.node(name).unwrap();
        node.peers.iter().map(PeerAddr::to_string).collect::<Vec<_>>()
    };
    assert_eq!(peers("a"), ["192.0.2.1:15019"]);
    assert_eq!(peers("b"), ["192.0.2.2:16000", "[2001:db8::2]:16000"]);
}

#[test]
fn node_without_an_address_or_with_a_wrong_port_is_reported() {
    let wrong = r#"
apiVersion: v1
kind: Node
metadata: {name: c, annotations: {malla.dev/tunnel-port: "0"}}
status: {addresses: [{type: ExternalIP, address: 198.51.100.1}]}
"#;
    let (_, problems) = read(&with(&[wrong]));
    let expected =
        ["Node c: metadata.annotations[\"malla.dev/tunnel-port\"]", "Node c: status.addresses"];
    assert_eq!(fields(&problems), expected);
}

#[test]
fn setting_that_is_given_as_a_label_is_reported_wherever_it_is_read_as_an_annotation() {
    let mut text = CLUSTER.to_owned();
    for (object, labels) in [
        ("{name: a", "malla.dev/tunnel-port: \"16000\", malla.dev/pool: meshed"),
        ("{name: shop", "malla.dev/fail-open: \"true\""),
        ("{name: two", "malla.dev/mode: permissive"),
        ("{name: web", "malla.dev/mesh: enabled, malla.dev/opaque-ports: \"80\""),
    ] {
        text = text.replacen(object, &format!("{object}, labels: {{{labels}}}"), 1);
    }
    let (found, problems) = read(&text);
    let told = [
        ("Namespace shop", "fail-open"),
        ("Node a", "tunnel-port"),
        ("Pod shop/two", "mode"),
        ("Service shop/web", "opaque-ports"),
    ];
    let told = told.map(|(of, key)| format!("{of}: metadata.labels[\"malla.dev/{key}\"]"));
    assert_eq!(fields(&problems), told);
    assert!(found.same_state(&snapshot(CLUSTER)), "they have no effect");
}

/// Whoever may edit one Service could otherwise fill the memory of every agent.
#[test]
fn object_with_thousands_of_mistakes_has_a_few_told_and_the_others_counted() {
    let labels = (0..30_000).map(|n| (format!("malla.dev/a{n:05}"), "x")).collect();
    let metadata =
        ObjectMeta { name: Some("web".into()), labels: Some(labels), ..Default::default() };
    let service = Service { metadata, ..Default::default() };
    let objects = [Object::Service(Arc::new(service))].into_iter().collect();
    let (_, problems) = translate(&objects, &context(), 1);
    assert_eq!(problems.len(), MOST_OF_ONE + 1);
    assert_eq!(problems[0].field, "metadata.labels[\"malla.dev/a00000\"]");
    let last = &problems[MOST_OF_ONE];
    assert_eq!((&*last.object, &*last.message), ("Service default/web", "and 29984 more"));
}

#[test]
fn thousands_of_objects_with_a_mistake_have_some_told_and_the_others_counted() {
    let node = |n: usize| {
        let metadata = ObjectMeta { name: Some(format!("n{n:05}")), ..Default::default() };
        Object::Node(Arc::new(KubeNode { metadata, ..Default::default() }))
    };
    let objects = (0..3 * MOST_PROBLEMS).map(node).collect();
    let (_, problems) = translate(&objects, &context(), 1);
    assert_eq!(problems.len(), MOST_PROBLEMS + 1);
    assert_eq!(problems[MOST_PROBLEMS - 1].object, "Node n00999");
    assert_eq!(problems[MOST_PROBLEMS].message, "and 2000 more, of any objects");
}

#[test]
fn address_of_two_pods_is_one_pods_and_reported() {
    let copy = "apiVersion: v1\nkind: Pod\nmetadata: {name: aaa, namespace: shop, \
                deletionTimestamp: \"2026-01-01T00:00:00Z\"}\n\
                spec: {nodeName: b}\nstatus: {podIPs: [{ip: 10.0.0.2}]}\n";
    let (snapshot, problems) = read(&with(&[copy]));
    assert_eq!(fields(&problems), ["Pod shop/aaa: status.podIPs"]);
    assert_eq!(&*workload(&snapshot, "10.0.0.2").name, "two");
    let loser = snapshot.workload("shop/aaa").unwrap();
    assert_eq!(loser.enrolment, Enrolment::LeftAlone(left_alone::ADDRESS_TAKEN));
    assert!(loser.ips.is_empty());
}

const OLD: &str = "creationTimestamp: \"2026-01-01T00:00:00Z\"";
const YOUNG: &str = "creationTimestamp: \"2026-01-02T00:00:00Z\"";
const LEAVING: &str =
    "creationTimestamp: \"2026-01-03T00:00:00Z\", deletionTimestamp: \"2026-01-04T00:00:00Z\"";

/// Which of the pods `x` and `y`, each on that node and with that metadata, keeps the address of both.
fn keeper(x: (&str, &str), y: (&str, &str)) -> String {
    let pod = |name: &str, (node, meta): (&str, &str)| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, {meta}}}\n\
             spec: {{nodeName: {node}}}\nstatus: {{podIPs: [{{ip: 10.0.0.9}}]}}\n"
        )
    };
    let (snapshot, _problems) = read(&with(&[&pod("x", x), &pod("y", y)]));
    workload(&snapshot, "10.0.0.9").name.to_string()
}

/// The kubelet of another node could otherwise take any pod of this one out of the mesh.
#[test]
fn address_of_a_pod_of_this_node_stays_its_own_whatever_another_node_says() {
    assert_eq!(keeper(("a", OLD), ("b", YOUNG)), "x");
    assert_eq!(keeper(("b", YOUNG), ("a", OLD)), "y");
    assert_eq!(keeper(("a", LEAVING), ("b", YOUNG)), "x");
}

#[test]
fn address_of_two_pods_of_other_nodes_goes_to_one_that_stays_and_then_to_the_younger() {
    assert_eq!(keeper(("b", OLD), ("b", YOUNG)), "y");
    assert_eq!(keeper(("b", YOUNG), ("c", OLD)), "x");
    assert_eq!(keeper(("c", LEAVING), ("b", OLD)), "y");
}

#[test]
fn address_of_two_pods_of_this_node_goes_to_one_that_stays_and_then_to_the_younger() {
    assert_eq!(keeper(("a", LEAVING), ("a", OLD)), "y");
    assert_eq!(keeper(("a", OLD), ("a", YOUNG)), "y");
}

#[test]
fn completed_and_host_network_pods_own_no_address() {
    let completed = "apiVersion: v1\nkind: Pod\nmetadata: {name: job, namespace: shop}\n\
                     spec: {nodeName: b}\nstatus: {phase: Succeeded, podIPs: [{ip: 10.0.0.2}]}\n";
    let host = "apiVersion: v1\nkind: Pod\nmetadata: {name: host, namespace: shop}\n\
                spec: {nodeName: b, hostNetwork: true}\nstatus: {podIPs: [{ip: 192.0.2.2}]}\n";
    let snapshot = snapshot(&with(&[completed, host]));
    assert_eq!(&*workload(&snapshot, "10.0.0.2").name, "two");
    assert!(snapshot.workload_at("192.0.2.2".parse().unwrap()).is_none());
    let reason = |uid: &str| snapshot.workload(uid).unwrap().enrolment.clone();
    assert_eq!(reason("shop/job"), Enrolment::LeftAlone(left_alone::COMPLETED));
    assert_eq!(reason("shop/host"), Enrolment::LeftAlone(left_alone::HOST_NETWORK));
}

#[test]
fn pod_without_an_address_is_left_alone_for_now() {
    let pending =
        "apiVersion: v1\nkind: Pod\nmetadata: {name: new, namespace: shop}\nspec: {nodeName: b}\n";
    let snapshot = snapshot(&with(&[pending]));
    let new = snapshot.workload("shop/new").unwrap();
    assert_eq!(new.enrolment, Enrolment::LeftAlone(left_alone::NO_ADDRESS));
}

#[test]
fn pod_here_without_a_network_namespace_is_left_alone_and_reported() {
    let text = CLUSTER.replace("malla.dev/netns: /run/netns/one", "");
    let (snapshot, problems) = read(&text);
    assert_eq!(fields(&problems), ["Pod shop/one: metadata.annotations[\"malla.dev/netns\"]"]);
    let one = workload(&snapshot, "10.0.0.1");
    assert_eq!(one.enrolment, Enrolment::LeftAlone(left_alone::NO_NETNS));

    let context = Context { netns: NetnsFrom::Processes, ..context() };
    let (snapshot, problems) = translate(&objects(CLUSTER).into_iter().collect(), &context, 1);
    assert_eq!(problems, []);
    let one = workload(&snapshot, "10.0.0.1");
    assert!(one.is_enrolled() && one.netns.is_none(), "the annotation means nothing in a cluster");
}

#[test]
fn pod_on_a_node_that_is_not_described_is_reported() {
    let text = CLUSTER.replace("nodeName: b", "nodeName: c");
    assert_eq!(fields(&read(&text).1), ["Pod shop/two: spec.nodeName"]);
}

#[test]
fn service_account_is_checked_where_any_is_declared() {
    let account = |name: &str| {
        format!(
            "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, namespace: shop}}\n"
        )
    };
    assert_eq!(read(&with(&[&account("web")])).1, []);
    let (snapshot, problems) = read(&with(&[&account("wbe")]));
    assert_eq!(fields(&problems), ["Pod shop/one: spec.serviceAccountName"]);
    assert!(workload(&snapshot, "10.0.0.1").is_enrolled());
}

#[test]
fn same_uid_twice_leaves_the_second_pod_out() {
    let copy = "apiVersion: v1\nkind: Pod\nmetadata: {name: copy, namespace: shop, uid: u2}\n\
                spec: {nodeName: b}\nstatus: {podIPs: [{ip: 10.0.0.3}]}\n";
    let (snapshot, problems) = read(&with(&[copy]));
    assert_eq!(fields(&problems).len(), 1);
    assert!(problems[0].field == "metadata.uid", "{problems:?}");
    assert_eq!(snapshot.workloads().count(), 2);
}

#[test]
fn workload_is_named_after_what_people_deploy() {
    let owned = |kind: &str, owner: &str, labels: &str| {
        let pod = format!(
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n  labels: {{{labels}}}\n  ownerReferences:\n\
             \x20 - {{apiVersion: v1, kind: Helper, name: no, uid: h}}\n\
             \x20 - {{apiVersion: v1, kind: {kind}, name: {owner}, uid: o, controller: true}}\n"
        );
        snapshot(&pod).workload("default/p").unwrap().names.clone()
    };
    let name = |kind, owner, labels| owned(kind, owner, labels).workload.to_string();
    assert_eq!(name("ReplicaSet", "web-5d4f", "pod-template-hash: 5d4f"), "web");
    assert_eq!(name("ReplicaSet", "web-5d4f", ""), "web-5d4f");
    assert_eq!(name("StatefulSet", "db-0", ""), "db-0");
    assert_eq!(name("Job", "nightly-29301234", ""), "nightly");
    assert_eq!(name("Job", "import-1", ""), "import-1");
    // The API takes owners' names of a megabyte, and each would be in every line of its metrics.
    let long = "n".repeat(253);
    assert_eq!(name("StatefulSet", &long, ""), long);
    assert_eq!(name("StatefulSet", &format!("{long}n"), ""), "p");

    let bare = owned("StatefulSet", "db", "");
    assert_eq!((&*bare.app, &*bare.version), ("unknown", "unknown"));
    assert_eq!((&*bare.canonical_service, &*bare.canonical_revision), ("db", "latest"));
    let labels = "app.kubernetes.io/name: shop, app.kubernetes.io/version: \"2\"";
    let labelled = owned("StatefulSet", "db", labels);
    assert_eq!((&*labelled.app, &*labelled.canonical_revision), ("shop", "2"));
    let labels =
        "app: a, service.istio.io/canonical-name: c, service.istio.io/canonical-revision: r";
    let canonical = owned("StatefulSet", "db", labels);
    assert_eq!((&*canonical.canonical_service, &*canonical.canonical_revision), ("c", "r"));
}
