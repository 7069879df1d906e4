//! What Services ask about where connections go and what they are, as people write it.

use std::time::Duration;

use mesh_core::addr::{EndpointAddr, OrigDst};
use mesh_core::locality::Scope;
use mesh_core::networks::Block;
use mesh_core::protocol::Protocol;
use mesh_core::snapshot::{Enrolment, Service, ServicePort};

use super::tests::{CLUSTER, SLICE, context, fields, objects, read, snapshot, with};
use super::*;
use crate::discovery::enrol::left_alone;

/// The cluster and its slice, with `spec` in the Service's.
fn asking(spec: &str) -> String {
    with(&[SLICE]).replace("  selector: {app: web}\n", &format!("  selector: {{app: web}}\n{spec}"))
}

fn web(snapshot: &Snapshot) -> Arc<Service> {
    Arc::clone(snapshot.service("shop", "web").unwrap())
}

fn in_reach(port: &ServicePort) -> Vec<String> {
    port.in_reach.iter().map(|endpoint| endpoint.addr.to_string()).collect()
}

/// The addresses in reach of the port `http`, and by which rules.
fn reach(text: &str) -> (Vec<String>, Vec<Scope>) {
    let port = web(&snapshot(text)).ports[0].clone();
    (in_reach(&port), port.scopes)
}

const ONE: &str = "10.0.0.1:8080";
const TWO: &str = "10.0.0.2:8080";

#[test]
fn service_that_says_nothing_means_all_and_forgets_its_clients() {
    let text = with(&[SLICE]);
    let service = web(&snapshot(&text));
    assert_eq!(service.affinity, None);
    assert_eq!(reach(&text), (vec![ONE.into(), TWO.into()], vec![Scope::All]));
    assert!(Arc::ptr_eq(&service.ports[0].endpoints, &service.ports[0].in_reach), "one list");
}

#[test]
fn local_traffic_means_pods_of_this_node_also_where_the_slice_does_not_name_it() {
    let text = asking("  internalTrafficPolicy: Local\n");
    assert_eq!(reach(&text), (vec![ONE.into()], vec![Scope::Local]));
    let moved = text.replace("[10.0.0.2], target", "[10.0.0.2], nodeName: a, target");
    assert_eq!(reach(&moved).0, [ONE, TWO], "the slice goes before the pod");
    let all: Vec<_> = web(&snapshot(&text)).ports[0].endpoints.iter().map(|e| e.addr).collect();
    assert_eq!(all.len(), 2, "they are there all the same");
}

#[test]
fn hints_of_the_slice_are_followed_whatever_the_service_says() {
    let hinted = with(&[SLICE])
        .replace(
            "[10.0.0.2], ",
            "[10.0.0.2], hints: {forNodes: [{name: a}], forZones: [{name: z2}]}, ",
        )
        .replace(
            "[10.0.0.1], ",
            "[10.0.0.1], hints: {forNodes: [{name: b}], forZones: [{name: z1}]}, ",
        );
    assert_eq!(reach(&hinted), (vec![TWO.into()], vec![Scope::SameNode]));
    let zones =
        hinted.replace("forNodes: [{name: a}], ", "").replace("forNodes: [{name: b}], ", "");
    assert_eq!(reach(&zones).1, [Scope::All], "this node has no zone");
    let zoned = zones
        .replace("name: a}\nstatus", "name: a, labels: {topology.kubernetes.io/zone: z1}}\nstatus");
    assert_ne!(zoned, zones);
    assert_eq!(reach(&zoned), (vec![ONE.into()], vec![Scope::SameZone]));
}

#[test]
fn families_are_apart_as_kube_proxys_are() {
    let v6 = SLICE.replace("web-1", "web-2").replace("IPv4", "IPv6").replace(
        "[10.0.0.1], conditions: {ready: true}, ",
        "[\"fd00::1\"], hints: {forNodes: [{name: b}]}, ",
    );
    let v6 = v6.replace(
        "[10.0.0.2], targetRef: {kind: Pod, name: two, namespace: shop, uid: u2}",
        "[\"fd00::2\"], hints: {forNodes: [{name: a}]}",
    );
    let (found, scopes) = reach(&with(&[SLICE, &v6]));
    assert_eq!(found, [ONE, TWO, "[fd00::2]:8080"]);
    assert_eq!(scopes, [Scope::All, Scope::SameNode]);
}

/// Node `a` in `west`, node `b` in `east`.
fn in_zones(text: &str) -> String {
    let zone = |name: &str| format!("labels: {{topology.kubernetes.io/zone: {name}}}");
    text.replace("{name: a}\nstatus", &format!("{{name: a, {}}}\nstatus", zone("west")))
        .replace("{name: b, annotations", &format!("{{name: b, {}, annotations", zone("east")))
}

#[test]
fn where_nobody_else_writes_hints_they_follow_from_the_service() {
    for (word, scope) in [
        ("PreferSameZone", Scope::SameZone),
        ("PreferClose", Scope::SameZone),
        ("PreferSameNode", Scope::SameNode),
    ] {
        let text = in_zones(&asking(&format!("  trafficDistribution: {word}\n")));
        assert_eq!(reach(&text), (vec![ONE.into()], vec![scope]), "{word}");
        let all = objects(&text).into_iter().collect();
        let cluster = Context { netns: NetnsFrom::Processes, ..context() };
        let (snapshot, _) = translate(&all, &cluster, 1);
        assert_eq!(web(&snapshot).ports[0].scopes, [Scope::All], "{word}: a cluster's write them");
    }
    let text = asking("  trafficDistribution: PreferSameZone\n");
    assert_eq!(reach(&text).1, [Scope::All], "no node has a zone");
    let of_slice = text.replace("[10.0.0.2], ", "[10.0.0.2], zone: east, ");
    assert_eq!(reach(&of_slice).1, [Scope::All], "one endpoint has none");
}

#[test]
fn service_remembers_its_clients_for_as_long_as_it_says() {
    let affinity = |spec: &str| web(&snapshot(&asking(spec))).affinity;
    assert_eq!(affinity("  sessionAffinity: None\n"), None);
    let config = |seconds: &str| {
        format!("  sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {seconds}}}}}\n")
    };
    assert_eq!(affinity(&config("60")), None, "nobody asked");
    let asked = "  sessionAffinity: ClientIP\n";
    assert_eq!(affinity(asked), Some(Duration::from_secs(10_800)));
    for (seconds, expected) in [("1", 1), ("60", 60), ("86400", 86_400)] {
        let spec = format!("{asked}{}", config(seconds));
        assert_eq!(affinity(&spec), Some(Duration::from_secs(expected)));
    }
    for wrong in ["0", "-1", "86401"] {
        let (snapshot, problems) = read(&asking(&format!("{asked}{}", config(wrong))));
        let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
        assert_eq!(fields(&problems), [format!("Service shop/web: {field}")], "{wrong}");
        assert_eq!(web(&snapshot).affinity, Some(Duration::from_secs(10_800)), "{wrong}");
    }
}

#[test]
fn word_that_is_not_understood_is_reported_and_counts_as_not_given() {
    for field in ["internalTrafficPolicy", "trafficDistribution", "sessionAffinity"] {
        let (snapshot, problems) = read(&asking(&format!("  {field}: local\n")));
        assert_eq!(fields(&problems), [format!("Service shop/web: spec.{field}")]);
        assert!(problems[0].message.contains("`local`"), "{}", problems[0]);
        let service = web(&snapshot);
        assert_eq!((service.affinity, service.distribution), (None, None));
        assert_eq!(service.ports[0].scopes, [Scope::All]);
    }
}

/// What is spoken at the ports `http` and `admin`.
fn spoken(text: &str) -> [Protocol; 2] {
    let service = web(&snapshot(text));
    [service.ports[0].protocol, service.ports[1].protocol]
}

#[test]
fn app_protocol_is_the_services_or_else_the_slices_and_goes_before_the_name() {
    use Protocol::{H2c, Http, Opaque};
    assert_eq!(spoken(CLUSTER), [Http, Opaque], "by name");
    let of_slice = with(&[SLICE])
        .replace("name: http, port: 8080}", "name: http, port: 8080, appProtocol: tcp}")
        .replace("name: admin, port: 9001,", "name: admin, port: 9001, appProtocol: http,");
    assert_eq!(spoken(&of_slice), [Opaque, Http]);
    let of_service = of_slice.replace("port: 80, ", "port: 80, appProtocol: kubernetes.io/h2c, ");
    assert_eq!(spoken(&of_service), [H2c, Http]);
}

#[test]
fn opaque_ports_are_the_services_or_else_the_namespaces() {
    use Protocol::{Http, Opaque};
    let on_service = |list: &str| {
        let meta = format!(
            "{{name: web, namespace: shop, annotations: {{malla.dev/opaque-ports: \"{list}\"}}}}\nspec"
        );
        with(&[SLICE]).replace("{name: web, namespace: shop}\nspec", &meta)
    };
    assert_eq!(spoken(&on_service("80")), [Opaque, Opaque]);
    assert_eq!(spoken(&on_service("70-90, 8443")), [Opaque, Opaque]);
    assert_eq!(spoken(&on_service("8080")), [Http, Opaque], "its own ports, not its pods'");
    let on_namespace = |text: &str, list: &str| {
        let more = format!("malla.dev/mode: strict, malla.dev/opaque-ports: \"{list}\"");
        text.replace("malla.dev/mode: strict", &more)
    };
    assert_eq!(spoken(&on_namespace(CLUSTER, "80")), [Opaque, Opaque]);
    assert_eq!(spoken(&on_namespace(&on_service("1"), "80")), [Http, Opaque], "its own word");

    let (found, problems) = read(&on_service("http"));
    let field = "metadata.annotations[\"malla.dev/opaque-ports\"]";
    assert_eq!(fields(&problems), [format!("Service shop/web: {field}")]);
    assert_eq!(web(&found).ports[0].protocol, Http);
    let (found, problems) = read(&on_namespace(&on_service("http"), "80"));
    assert_eq!(problems.len(), 1);
    assert_eq!(web(&found).ports[0].protocol, Opaque, "the namespace's holds");
}

#[test]
fn pods_own_list_is_in_its_settings() {
    let annotated =
        CLUSTER.replace("uid: u2}", "uid: u2, annotations: {malla.dev/opaque-ports: \"8080\"}}");
    let snapshot = snapshot(&annotated);
    let opaque = |ip: &str| {
        let pod = snapshot.workload_at(ip.parse().unwrap()).unwrap();
        pod.settings.opaque_ports.contains(8080)
    };
    assert_eq!([opaque("10.0.0.1"), opaque("10.0.0.2")], [false, true]);
}

#[test]
fn other_annotations_of_ours_mean_nothing_on_a_service() {
    let text = CLUSTER.replace(
        "{name: web, namespace: shop}\nspec",
        "{name: web, namespace: shop, annotations: {malla.dev/mode: strict}}\nspec",
    );
    let (_, problems) = read(&text);
    assert_eq!(fields(&problems), ["Service shop/web: metadata.annotations[\"malla.dev/mode\"]"]);
    assert!(problems[0].remedy.contains("malla.dev/opaque-ports"), "{}", problems[0]);
}

/// A pod of another node that nobody needs to read: only those of this node are meant.
#[test]
fn what_is_out_of_reach_need_not_be_read() {
    let two = "apiVersion: v1\nkind: Pod\nmetadata: {name: two, namespace: shop, uid: u2}\n\
               spec: {nodeName: b}\nstatus: {podIPs: [{ip: 10.0.0.2}]}\n---\n";
    let unread = |text: &str| {
        let text = text.replace(two, "");
        let mut all = Objects::on_demand();
        for object in objects(&text) {
            all.insert(object);
        }
        let (snapshot, _) = translate(&all, &context(), 1);
        snapshot.is_unread("10.1.0.1".parse().unwrap())
    };
    assert!(unread(&asking("")));
    assert!(!unread(&asking("  internalTrafficPolicy: Local\n")));
}

/// Its address may be another pod's before the slice says so.
#[test]
fn endpoint_of_a_pod_that_has_completed_is_left_out() {
    for phase in ["Running", "Succeeded", "Failed"] {
        let known = objects(&with(&[SLICE])).into_iter().map(|object| match object {
            Object::Pod(mut pod) if pod.metadata.name.as_deref() == Some("two") => {
                let status = Arc::make_mut(&mut pod).status.get_or_insert_default();
                status.phase = Some(phase.into());
                Object::Pod(pod)
            }
            other => other,
        });
        let known: Vec<_> = known.collect();
        let mut in_cluster = Objects::on_demand();
        known.iter().cloned().for_each(|object| _ = in_cluster.insert(object));
        let standalone: Objects = known.into_iter().collect();
        let expected = if phase == "Running" { vec![ONE, TWO] } else { vec![ONE] };
        for known in [in_cluster, standalone] {
            let found = self::in_cluster(&known, Vec::new());
            assert_eq!(in_reach(&web(&found).ports[0]), expected, "{phase}");
            assert!(!found.is_unread("10.1.0.1".parse().unwrap()), "{phase}");
        }
    }
}

/// Whether a client that keeps to it may wait for it.
#[test]
fn endpoint_whose_pod_has_to_be_read_is_told_from_one_whose_pod_is_gone() {
    let is_two = |object: &Object| match object {
        Object::Pod(pod) => pod.metadata.name.as_deref() == Some("two"),
        _ => false,
    };
    let mut known = Objects::on_demand();
    for object in objects(&with(&[SLICE])) {
        if !is_two(&object) {
            known.insert(object);
        }
    }
    let is_unread = |known: &Objects, to: &str| {
        let (found, _) = translate(known, &context(), 1);
        let to = EndpointAddr(to.parse().unwrap());
        found.has_unread_endpoint(OrigDst("10.1.0.1:80".parse().unwrap()), to)
    };
    assert!(is_unread(&known, TWO) && !is_unread(&known, ONE));
    known.absent_mut().unwrap().insert("u2".into());
    assert!(!is_unread(&known, TWO));
}

/// The objects of `text`, where pods of other nodes are read when somebody needs them.
fn on_demand(text: &str) -> Objects {
    let mut all = Objects::on_demand();
    for object in objects(text) {
        all.insert(object);
    }
    all
}

/// What is known in a cluster whose pods are in `pod_cidrs`.
fn in_cluster(known: &Objects, pod_cidrs: Vec<Cidr>) -> Snapshot {
    let context = Context { netns: NetnsFrom::Processes, pod_cidrs, ..context() };
    translate(known, &context, 1).0
}

/// The API may tell of a pod before it tells of its namespace.
#[test]
fn pod_of_another_node_is_unread_until_its_namespace_is_known() {
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    let [vip, one, two] = ["10.1.0.1", "10.0.0.1", "10.0.0.2"].map(ip);
    let found = |known: &Objects| in_cluster(known, vec!["10.0.0.0/24".parse().unwrap()]);
    let is_unread = |found: &Snapshot| [vip, one, two].map(|ip| found.is_unread(ip));
    let namespace = |annotations: &str| {
        let meta = format!("{{name: shop, annotations: {annotations}}}");
        objects(&format!("apiVersion: v1\nkind: Namespace\nmetadata: {meta}\n")).remove(0)
    };
    let mut known = on_demand(&with(&[SLICE]));
    known.remove(&namespace("{}").key()).unwrap();
    let is_kept_back = |known: &Objects| {
        let found = found(known);
        let captured = found.captured_destinations();
        assert_eq!(is_unread(&found), [true, false, true]);
        assert!(captured.contains(&vip) && captured.contains(&two));
        assert_eq!(in_reach(&web(&found).ports[0]), [ONE]);
    };
    is_kept_back(&known);
    // Both were looked for before it came.
    known.absent_mut().unwrap().extend(["u2", "10.0.0.2"].map(str::to_owned));
    is_kept_back(&known);

    known.insert(namespace("{malla.dev/mesh: enabled}"));
    let enrolled = found(&known);
    assert_eq!(is_unread(&enrolled), [false; 3]);
    assert!(enrolled.workload_at(two).unwrap().is_enrolled());
    assert_eq!(in_reach(&web(&enrolled).ports[0]), [ONE, TWO]);

    known.insert(namespace("{}"));
    let outside = found(&known);
    let reason = Enrolment::LeftAlone(left_alone::NOT_ENROLLED);
    assert_eq!(is_unread(&outside), [false; 3]);
    assert_eq!(outside.workload_at(two).unwrap().enrolment, reason);
    assert!(!outside.captured_destinations().contains(&two));
    assert_eq!(outside.captured_blocks().get(&Cidr::from(two)), Some(&Block::LeftAlone));

    // Where every pod is known, so is every namespace that there is.
    known.remove(&namespace("{}").key()).unwrap();
    let files: Objects = known.iter().map(|(_, object)| object.clone()).collect();
    for netns in [NetnsFrom::Annotation, NetnsFrom::Processes] {
        let (alone, _) = translate(&files, &Context { netns, ..context() }, 1);
        assert_eq!(is_unread(&alone), [false; 3], "{netns:?}");
    }
}

/// A pod of the node `b` that has `10.0.0.9`.
fn elsewhere(meta: &str, spec: &str, phase: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{{meta}}}\nspec: {{{spec}nodeName: b}}\n\
         status: {{phase: {phase}, podIPs: [{{ip: 10.0.0.9}}]}}\n"
    )
}

/// Whether it has still to be read if what has `10.0.0.9` is in the mesh.
fn is_nine_unread(pods: &[&str]) -> bool {
    in_cluster(&on_demand(&with(pods)), Vec::new()).is_unread("10.0.0.9".parse().unwrap())
}

#[test]
fn pod_waits_for_its_namespace_only_where_that_could_bring_it_into_the_mesh() {
    for (annotations, spec, phase, waits) in [
        ("", "", "Running", true),
        ("malla.dev/mesh: perhaps", "", "Running", true),
        ("malla.dev/mesh: enabled", "", "Running", false),
        ("malla.dev/mesh: disabled", "", "Running", false),
        ("sidecar.istio.io/status: injected", "", "Running", false),
        ("", "hostNetwork: true, ", "Running", false),
        ("", "", "Succeeded", false),
    ] {
        let meta = format!("name: new, namespace: later, annotations: {{{annotations}}}");
        let pod = elsewhere(&meta, spec, phase);
        assert_eq!(is_nine_unread(&[&pod]), waits, "{pod}");
    }
}

/// What was read of another pod is kept for minutes.
#[test]
fn address_is_unread_where_its_newer_pod_is_of_a_namespace_that_is_not_known() {
    let known = |day: u8| {
        let meta = format!("creationTimestamp: \"2026-01-0{day}T00:00:00Z\"");
        let disabled = "annotations: {malla.dev/mesh: disabled}";
        elsewhere(&format!("name: x, namespace: shop, {disabled}, {meta}"), "", "Running")
    };
    let meta = "name: y, namespace: later, creationTimestamp: \"2026-01-02T00:00:00Z\"";
    let new = elsewhere(meta, "", "Running");
    assert!(is_nine_unread(&[&known(1), &new]));
    assert!(!is_nine_unread(&[&known(3), &new]));
}
