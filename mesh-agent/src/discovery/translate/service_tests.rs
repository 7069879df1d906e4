//! Services and their endpoints, from manifests as people write them.

use mesh_core::snapshot::Workload;

use super::tests::{CLUSTER, SLICE, fields, read, snapshot, with};
use super::*;

/// `<address>=<pod>` of each endpoint of a port of the service `web`.
fn endpoints(snapshot: &Snapshot, port: &str) -> Vec<String> {
    let service = snapshot.service("shop", "web").unwrap();
    let port = service.ports.iter().find(|found| &*found.name == port).unwrap();
    let pod = |workload: &Option<Arc<Workload>>| match workload {
        Some(workload) => workload.name.to_string(),
        None => "none".into(),
    };
    port.endpoints.iter().map(|e| format!("{}={}", e.addr, pod(&e.workload))).collect()
}

/// The slice with `one` replaced by what a test needs.
fn slice(endpoints: &str) -> String {
    let (head, _) = SLICE.split_once("endpoints:").unwrap();
    format!("{head}endpoints:\n{endpoints}")
}

#[test]
fn service_has_its_tcp_ports_with_the_slices_port_numbers() {
    let snapshot = snapshot(&with(&[SLICE]));
    let web = Arc::clone(snapshot.service_at("10.1.0.1".parse().unwrap()).unwrap());
    assert_eq!(*snapshot.service_at("fd01::1".parse().unwrap()).unwrap(), web);
    assert_eq!(&*web.host, "web.shop.svc.cluster.local");
    assert!(web.selector);
    let ports: Vec<_> = web.ports.iter().map(|port| (port.port, port.name.to_string())).collect();
    assert_eq!(ports, [(80, "http".into()), (81, "admin".into())]);
    assert_eq!(endpoints(&snapshot, "http"), ["10.0.0.1:8080=one", "10.0.0.2:8080=two"]);
    assert_eq!(endpoints(&snapshot, "admin"), ["10.0.0.1:9001=one", "10.0.0.2:9001=two"]);
}

#[test]
fn slices_of_both_families_come_together() {
    let v6 = SLICE
        .replace("web-1", "web-2")
        .replace("IPv4", "IPv6")
        .replace("10.0.0.1]", "\"fd00::1\"]");
    let v6 = v6.replace(
        "- {addresses: [10.0.0.2], targetRef: {kind: Pod, name: two, namespace: shop, uid: u2}}\n",
        "",
    );
    let snapshot = snapshot(&with(&[SLICE, &v6]));
    let expected = ["10.0.0.1:8080=one", "10.0.0.2:8080=two", "[fd00::1]:8080=one"];
    assert_eq!(endpoints(&snapshot, "http"), expected);
}

#[test]
fn endpoint_in_two_slices_counts_once() {
    let again = SLICE.replace("web-1", "web-2");
    assert_eq!(endpoints(&snapshot(&with(&[SLICE, &again])), "http").len(), 2);
}

#[test]
fn headless_service_has_endpoints_and_no_address() {
    let text = with(&[SLICE]).replace("  clusterIP: 10.1.0.1\n", "  clusterIP: None\n");
    let text = text.replace("clusterIPs: [10.1.0.1, \"fd01::1\"]", "clusterIPs: [None]");
    let snapshot = snapshot(&text);
    assert!(snapshot.service("shop", "web").unwrap().vips.is_empty());
    assert_eq!(endpoints(&snapshot, "http").len(), 2);
}

#[test]
fn external_name_is_no_service_of_ours() {
    let text = CLUSTER
        .replace("  clusterIP: 10.1.0.1\n", "  type: ExternalName\n  externalName: example.com\n");
    assert!(snapshot(&text).service("shop", "web").is_none());
}

#[test]
fn service_without_an_address_is_reported() {
    let text = CLUSTER.replace("  clusterIP: 10.1.0.1\n", "");
    let text = text.replace("  clusterIPs: [10.1.0.1, \"fd01::1\"]\n", "");
    let (snapshot, problems) = read(&text);
    assert_eq!(fields(&problems), ["Service shop/web: spec.clusterIP"]);
    assert!(snapshot.service("shop", "web").is_some());
}

#[test]
fn address_of_two_services_is_one_services_and_reported() {
    let copy = "apiVersion: v1\nkind: Service\nmetadata: {name: zzz, namespace: shop}\n\
                spec: {clusterIPs: [10.1.0.1, 10.1.0.2], ports: [{port: 80}]}\n";
    let (snapshot, problems) = read(&with(&[copy]));
    assert_eq!(fields(&problems), ["Service shop/zzz: spec.clusterIPs"]);
    assert!(problems[0].message.contains("Service shop/web"), "{}", problems[0]);
    let at = |vip: &str| snapshot.service_at(vip.parse().unwrap()).unwrap().name.to_string();
    assert_eq!((at("10.1.0.1"), at("10.1.0.2")), ("web".into(), "zzz".into()));
    let loser = snapshot.service("shop", "zzz").unwrap();
    assert_eq!(loser.vips, ["10.1.0.2".parse::<IpAddr>().unwrap()]);
}

#[test]
fn address_of_a_service_that_is_a_pods_is_reported() {
    let text = "apiVersion: v1\nkind: Service\nmetadata: {name: zzz, namespace: shop}\n\
                spec: {clusterIP: 10.0.0.2, ports: [{port: 80}]}\n";
    let (snapshot, problems) = read(&with(&[text]));
    assert_eq!(fields(&problems), ["Service shop/zzz: spec.clusterIPs"]);
    assert!(problems[0].message.contains("Pod shop/two"), "{}", problems[0]);
    assert!(snapshot.service_at("10.0.0.2".parse().unwrap()).is_some());
}

#[test]
fn endpoint_that_is_not_ready_is_left_out() {
    let text = slice(
        "- {addresses: [10.0.0.1], conditions: {ready: true}}\n\
         - {addresses: [10.0.0.2], conditions: {ready: false}}\n",
    );
    assert_eq!(endpoints(&snapshot(&with(&[&text])), "http"), ["10.0.0.1:8080=one"]);
}

#[test]
fn endpoints_that_still_serve_while_terminating_stand_in_for_ready_ones() {
    let leaving = "{ready: false, serving: true, terminating: true}";
    let gone = "{ready: false, serving: false, terminating: true}";
    let text = slice(&format!(
        "- {{addresses: [10.0.0.1], conditions: {leaving}}}\n\
         - {{addresses: [10.0.0.2], conditions: {gone}}}\n"
    ));
    assert_eq!(endpoints(&snapshot(&with(&[&text])), "http"), ["10.0.0.1:8080=one"]);
    let text = slice(&format!(
        "- {{addresses: [10.0.0.1], conditions: {leaving}}}\n- {{addresses: [10.0.0.2]}}\n"
    ));
    assert_eq!(endpoints(&snapshot(&with(&[&text])), "http"), ["10.0.0.2:8080=two"]);
}

#[test]
fn not_ready_endpoints_count_where_the_service_publishes_them() {
    let text = with(&[&slice("- {addresses: [10.0.0.1], conditions: {ready: false}}\n")]);
    let text = text.replace("  selector: {app: web}\n", "  publishNotReadyAddresses: true\n");
    let snapshot = snapshot(&text);
    assert_eq!(endpoints(&snapshot, "http"), ["10.0.0.1:8080=one"]);
    assert!(!snapshot.service("shop", "web").unwrap().selector);
}

#[test]
fn endpoint_is_joined_by_name_and_address_together() {
    let of = |target: &str| {
        let text = slice(&format!("- {{addresses: [10.0.0.1]{target}}}\n"));
        let (snapshot, problems) = read(&with(&[&text]));
        (endpoints(&snapshot, "http").remove(0), fields(&problems))
    };
    let one = "10.0.0.1:8080=one".to_owned();
    let none = "10.0.0.1:8080=none".to_owned();
    assert_eq!(of(""), (one.clone(), vec![]));
    assert_eq!(of(", targetRef: {kind: Pod, name: one}"), (one.clone(), vec![]));
    assert_eq!(of(", targetRef: {kind: Pod, name: one, uid: u1}"), (one, vec![]));
    // Another pod's name or an older pod's UID: whose certificate to ask for is not certain.
    let reported = |field: &str| vec![format!("EndpointSlice shop/web-1: endpoints[0].{field}")];
    let other = of(", targetRef: {kind: Pod, name: two}");
    assert_eq!(other, (none.clone(), reported("targetRef")));
    let older = of(", targetRef: {kind: Pod, name: one, uid: u0}");
    assert_eq!(older, (none.clone(), reported("targetRef.uid")));
    // A pod that is not described may come yet.
    assert_eq!(of(", targetRef: {kind: Pod, name: later}"), (none, vec![]));
}

#[test]
fn slice_of_no_service_is_reported() {
    let text = SLICE.replace("service-name: web", "service-name: wbe");
    let (snapshot, problems) = read(&with(&[&text]));
    let label = "metadata.labels[\"kubernetes.io/service-name\"]";
    assert_eq!(fields(&problems), [format!("EndpointSlice shop/web-1: {label}")]);
    assert!(endpoints(&snapshot, "http").is_empty());
}

#[test]
fn wrong_endpoint_address_is_reported_and_touches_no_other() {
    let text = slice("- {addresses: [10.0.0.1]}\n- {addresses: [web.example]}\n");
    let (snapshot, problems) = read(&with(&[&text]));
    assert_eq!(fields(&problems), ["EndpointSlice shop/web-1: endpoints[1].addresses[0]"]);
    assert_eq!(endpoints(&snapshot, "http").len(), 1);
}
