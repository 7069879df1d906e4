//! What holds of the translation whatever the objects are.

use std::collections::HashSet;

use proptest::prelude::*;

use super::tests::{CLUSTER, context, objects};
use super::*;
use crate::discovery::manifest::{self, Format};

/// Pods, services and slices that collide in names, UIDs and addresses as often as they can.
fn arbitrary_object() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec!["p", "q", "r"]);
    let namespace = prop::sample::select(vec!["shop", "default"]);
    let ip = (1u8..5).prop_map(|last| format!("10.0.0.{last}"));
    let pod = (name.clone(), namespace.clone(), ip.clone(), ip.clone(), 0u8..4, any::<bool>(), any::<bool>())
        .prop_map(|(name, namespace, ip, second, uid, leaving, host)| {
            let leaving = if leaving { ", deletionTimestamp: \"2026-01-01T00:00:00Z\"" } else { "" };
            format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, uid: u{uid}{leaving}, \
                 annotations: {{malla.dev/mesh: enabled}}}}\n\
                 spec: {{nodeName: b, hostNetwork: {host}}}\nstatus: {{podIPs: [{{ip: {ip}}}, {{ip: {second}}}]}}\n"
            )
        });
    let service = (name.clone(), namespace.clone(), ip.clone()).prop_map(|(name, namespace, ip)| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
             spec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n"
        )
    });
    let slice = (name.clone(), name, namespace, ip, any::<bool>(), any::<bool>()).prop_map(
        |(name, of, namespace, ip, ready, named)| {
            let target = if named { format!(", targetRef: {{kind: Pod, name: {of}}}") } else { String::new() };
            format!(
                "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}, namespace: {namespace}, \
                 labels: {{kubernetes.io/service-name: {of}}}}}\naddressType: IPv4\nports: [{{port: 80}}]\n\
                 endpoints: [{{addresses: [{ip}], conditions: {{ready: {ready}}}{target}}}]\n"
            )
        },
    );
    prop_oneof![pod, service, slice]
}

/// Objects of distinct keys, twice: as they came, and shuffled.
fn arbitrary_sets() -> impl Strategy<Value = (Vec<Object>, Vec<Object>)> {
    prop::collection::vec(arbitrary_object(), 0..24)
        .prop_map(|texts| {
            let mut seen = HashSet::new();
            let all = texts.iter().flat_map(|text| objects(text));
            all.filter(|object| seen.insert(object.key())).collect::<Vec<_>>()
        })
        .prop_flat_map(|all| (Just(all.clone()), Just(all).prop_shuffle()))
}

proptest! {
    #[test]
    fn order_of_objects_does_not_matter((one, other) in arbitrary_sets()) {
        let one = translate(&one.into_iter().collect(), &context(), 1);
        let other = translate(&other.into_iter().collect(), &context(), 1);
        prop_assert!(one.0.same_state(&other.0));
        prop_assert_eq!(one.1, other.1);
    }

    #[test]
    fn arriving_one_by_one_and_replacing_ends_in_the_same_state((one, other) in arbitrary_sets()) {
        let mut objects: Objects = other.iter().rev().cloned().collect();
        for object in &other {
            objects.remove(&object.key());
            objects.insert(object.clone());
        }
        let incremental = translate(&objects, &context(), 1);
        let at_once = translate(&one.into_iter().collect(), &context(), 1);
        prop_assert!(incremental.0.same_state(&at_once.0));
    }

    #[test]
    fn an_address_is_one_pods_and_endpoints_agree_with_it((all, _) in arbitrary_sets()) {
        let (snapshot, _) = translate(&all.into_iter().collect(), &context(), 1);
        let mut owners = HashSet::new();
        for workload in snapshot.workloads() {
            for ip in &workload.ips {
                prop_assert!(owners.insert(*ip), "{} twice", ip);
                prop_assert_eq!(snapshot.workload_at(*ip), Some(workload));
            }
            prop_assert!(!workload.is_enrolled() || !workload.ips.is_empty());
        }
        let endpoints = snapshot.services().flat_map(|s| &s.ports).flat_map(|p| p.endpoints.iter());
        for endpoint in endpoints {
            if let Some(workload) = endpoint.workload.as_ref().filter(|w| w.is_enrolled()) {
                prop_assert!(workload.ips.contains(&endpoint.addr.0.ip()));
            }
        }
    }

    /// What a slip of the hand makes of a manifest is read, or refused with its place.
    #[test]
    fn any_text_is_read_or_refused_with_its_place(
        cut in 0..CLUSTER.len(),
        typed in "(?s).{0,3}",
        skipped in 0usize..3,
    ) {
        let text: String =
            CLUSTER.chars().take(cut).chain(typed.chars()).chain(CLUSTER.chars().skip(cut + skipped)).collect();
        match manifest::parse(&text, Format::Yaml) {
            Ok(manifest) => {
                let objects = manifest.objects.into_iter().map(|(_, object)| object).collect();
                let (snapshot, problems) = translate(&objects, &context(), 7);
                prop_assert_eq!(snapshot.generation, 7);
                prop_assert!(problems.iter().all(|p| !p.object.is_empty() && !p.remedy.is_empty()));
            }
            Err(problem) => {
                prop_assert!(problem.at.starts_with("document "), "{}", problem);
                prop_assert!(!problem.message.is_empty() && !problem.remedy.is_empty());
            }
        }
    }
}
