//! Who takes part, and how.

use super::*;
use crate::discovery::Problem;
use crate::discovery::kube::{Container, PodSpec, PodStatus};

fn meta(annotations: &[(&str, &str)], labels: &[(&str, &str)]) -> ObjectMeta {
    let map = |pairs: &[(&str, &str)]| Some(pairs.iter().copied().collect());
    ObjectMeta { annotations: map(annotations), labels: map(labels), ..Default::default() }
}

fn wishes(meta: &ObjectMeta) -> (Wishes, Vec<Problem>) {
    let mut problems = Problems::default();
    let web = ObjectKey { kind: Kind::Pod, namespace: "default".into(), name: "web".into() };
    let wishes = Wishes::of_pod(meta, &mut Report::of(&web, &mut problems));
    (wishes, problems.told())
}

fn enrolment(pod: &Pod) -> Enrolment {
    let (own, problems) = wishes(&pod.metadata);
    assert_eq!(problems, []);
    own.enrolment(&Wishes::default(), "default", pod)
}

fn enrolled_pod() -> Pod {
    Pod { metadata: meta(&[(MESH, "enabled")], &[]), ..Default::default() }
}

#[test]
fn pod_goes_before_namespace_and_annotation_before_label() {
    let on = wishes(&meta(&[(MESH, "enabled")], &[])).0;
    let off = wishes(&meta(&[(MESH, "disabled")], &[])).0;
    let label = wishes(&meta(&[], &[(MESH, "enabled")])).0;
    let both = wishes(&meta(&[(MESH, "disabled")], &[(MESH, "enabled")])).0;
    let nothing = Wishes::default();
    let pod = Pod::default();
    let left = Enrolment::LeftAlone;
    for (own, namespace, expected) in [
        (&nothing, &nothing, left(left_alone::NOT_ENROLLED)),
        (&nothing, &on, Enrolment::Enrolled),
        (&nothing, &label, Enrolment::Enrolled),
        (&label, &nothing, Enrolment::Enrolled),
        (&off, &on, left(left_alone::DISABLED)),
        (&on, &off, Enrolment::Enrolled),
        (&both, &nothing, left(left_alone::DISABLED)),
    ] {
        assert_eq!(own.enrolment(namespace, "default", &pod), expected);
    }
}

#[test]
fn pod_that_cannot_be_carried_is_left_alone_with_the_reason() {
    assert_eq!(enrolment(&enrolled_pod()), Enrolment::Enrolled);
    let with = |change: &dyn Fn(&mut Pod)| {
        let mut pod = enrolled_pod();
        change(&mut pod);
        enrolment(&pod)
    };
    let annotated = |key: &str, value: &str| {
        with(&|pod| {
            let ours = (MESH, "enabled");
            pod.metadata.annotations = Some([ours, (key, value)].into_iter().collect());
        })
    };
    let container = |name: &str| Container { name: name.into() };
    let host = PodSpec { host_network: Some(true), ..Default::default() };
    let linkerd =
        PodSpec { init_containers: Some(vec![container("linkerd-proxy")]), ..Default::default() };
    let run_by = |class: &str| {
        let runtime_class_name = Some(class.into());
        with(&|pod| {
            pod.spec = Some(PodSpec {
                runtime_class_name: Clone::clone(&runtime_class_name),
                ..Default::default()
            });
        })
    };
    for usual in ["crun", "nvidia", "katana", "youki"] {
        assert_eq!(run_by(usual), Enrolment::Enrolled, "{usual}");
    }
    let phase = |phase: &str| PodStatus { phase: Some(phase.into()), ..Default::default() };
    for (found, reason) in [
        (with(&|pod| pod.spec = Some(host.clone())), left_alone::HOST_NETWORK),
        (with(&|pod| pod.status = Some(phase("Succeeded"))), left_alone::COMPLETED),
        (with(&|pod| pod.status = Some(phase("Failed"))), left_alone::COMPLETED),
        (annotated("sidecar.istio.io/status", "{}"), left_alone::ISTIO_SIDECAR),
        (annotated("ambient.istio.io/redirection", "enabled"), left_alone::ISTIO_AMBIENT),
        (annotated("linkerd.io/proxy-version", "2.20"), left_alone::LINKERD),
        (annotated("kubernetes.io/config.mirror", "1f2e"), left_alone::STATIC),
        (with(&|pod| pod.spec = Some(linkerd.clone())), left_alone::LINKERD),
        (run_by("gvisor"), left_alone::OWN_KERNEL),
        (run_by("kata-qemu"), left_alone::OWN_KERNEL),
        (run_by("my-runsc.v2"), left_alone::OWN_KERNEL),
    ] {
        assert_eq!(found, Enrolment::LeftAlone(reason));
    }
    assert_eq!(with(&|pod| pod.status = Some(phase("Running"))), Enrolment::Enrolled);
    let (own, _) = wishes(&enrolled_pod().metadata);
    for system in ["kube-system", "malla-system"] {
        let found = own.enrolment(&Wishes::default(), system, &enrolled_pod());
        assert_eq!(found, Enrolment::LeftAlone(left_alone::SYSTEM), "{system}");
    }
}

#[test]
fn pod_that_istio_is_to_capture_is_left_alone_before_it_has() {
    let labelled = |value: &str| wishes(&meta(&[(MESH, "enabled")], &[(AMBIENT, value)])).0;
    let (ambient, none) = (labelled("ambient"), labelled("none"));
    let (nothing, _) = wishes(&meta(&[], &[]));
    let left = Enrolment::LeftAlone(left_alone::ISTIO_AMBIENT);
    for (own, namespace, expected) in [
        (&ambient, &nothing, left.clone()),
        (&nothing, &ambient, left),
        (&none, &ambient, Enrolment::Enrolled),
        (&none, &nothing, Enrolment::Enrolled),
    ] {
        assert_eq!(own.enrolment(namespace, "default", &Pod::default()), expected);
    }
}

#[test]
fn settings_of_the_pod_go_before_those_of_the_namespace() {
    let namespace = meta(
        &[
            (MODE, "strict"),
            (SKIP_OUTBOUND_PORTS, "25"),
            (FAIL_OPEN, "true"),
            (OUTBOUND, "all"),
            (UNKNOWN_PODS, "deny"),
        ],
        &[],
    );
    let pod = meta(&[(MODE, "permissive"), (SKIP_OUTBOUND_CIDRS, "10.0.0.0/8, fd00::/8")], &[]);
    let allowed = wishes(&meta(&[(UNKNOWN_PODS, "allow")], &[])).0;
    let (namespace, none) = wishes(&namespace);
    assert_eq!(none, []);
    let settings = wishes(&pod).0.settings(&namespace);
    assert_eq!(settings.mode, Mode::Permissive);
    assert_eq!(settings.outbound, Outbound::All);
    assert_eq!(settings.unknown_pods, UnknownPods::Deny);
    assert_eq!(allowed.settings(&namespace).unknown_pods, UnknownPods::Allow);
    assert!(settings.fail_open && settings.preserve_client_address);
    assert!(settings.skip_outbound_ports.contains(25));
    assert_eq!(settings.skip_outbound_cidrs.len(), 2);
    assert_eq!(Wishes::default().settings(&Wishes::default()), Settings::default());
}

#[test]
fn waypoint_of_a_namespace_that_takes_part_is_told() {
    let problems = |annotations: &[(&str, &str)], labels: &[(&str, &str)]| {
        let mut problems = Problems::default();
        let key =
            ObjectKey { kind: Kind::Namespace, namespace: String::new(), name: "shop".into() };
        Wishes::of_namespace(&meta(annotations, labels), &mut Report::of(&key, &mut problems));
        problems.told().len()
    };
    let waypoint = [(WAYPOINT, "waypoint")];
    assert_eq!(problems(&[(MESH, "enabled")], &waypoint), 1);
    assert_eq!(problems(&[(MESH, "enabled")], &[(WAYPOINT, "none")]), 0);
    assert_eq!(problems(&[], &waypoint), 0, "Istio's own");
    let ambient = [(AMBIENT, "ambient"), waypoint[0]];
    assert_eq!(problems(&[(MESH, "enabled")], &ambient), 0, "Istio's still");
}

#[test]
fn blocks_that_are_skipped_are_so_many_and_no_more() {
    let blocks = |number: u32| -> String {
        (0..number).map(|n| format!("10.{}.{}.0/24,", n / 256, n % 256)).collect()
    };
    for (text, kept, problems) in [
        (blocks(32), 32, 0),
        (blocks(33), 0, 1),
        // Each counts once, however often it is written.
        ("::/0,".repeat(100_000), 1, 0),
    ] {
        let (wishes, found) = wishes(&meta(&[(SKIP_OUTBOUND_CIDRS, &text)], &[]));
        let settings = wishes.settings(&Wishes::default());
        assert_eq!((settings.skip_outbound_cidrs.len(), found.len()), (kept, problems));
    }
}

/// One wrong value of each setting.
const WRONG: [(&str, &str); 11] = [
    (MESH, "yes"),
    (MODE, "Strict"),
    (OUTBOUND, ""),
    (SKIP_INBOUND_PORTS, "0"),
    (SKIP_OUTBOUND_PORTS, "443,90000"),
    (SKIP_OUTBOUND_CIDRS, "10.0.0.0/8,x"),
    (FAIL_OPEN, "False"),
    (PRESERVE_CLIENT_ADDRESS, "no"),
    (OPAQUE_PORTS, "http"),
    (DIRECT, "no"),
    (UNKNOWN_PODS, "Deny"),
];

#[test]
fn value_that_is_not_understood_is_reported() {
    let (_, problems) = wishes(&meta(&WRONG, &[]));
    let mut fields: Vec<_> = problems.iter().map(|problem| problem.field.clone()).collect();
    let mut expected: Vec<_> = WRONG.iter().map(|(key, _)| annotation(key).to_string()).collect();
    fields.sort();
    expected.sort();
    assert_eq!(fields, expected);
    let of = |key: &str| {
        let field = annotation(key).to_string();
        problems.iter().find(|problem| problem.field == field).unwrap()
    };
    for (key, counts_as) in [
        (MODE, "`Strict` is not understood and counts as `strict`"),
        (SKIP_INBOUND_PORTS, "`0` is not understood and counts as an empty list"),
        (PRESERVE_CLIENT_ADDRESS, "`no` is not understood and counts as not given"),
    ] {
        assert_eq!(of(key).message, counts_as);
    }
}

#[test]
fn value_that_is_not_understood_counts_as_the_narrowest_whatever_the_namespace_says() {
    let wide = [
        (MODE, "permissive"),
        (OUTBOUND, "mesh"),
        (SKIP_INBOUND_PORTS, "4567"),
        (SKIP_OUTBOUND_PORTS, "25"),
        (SKIP_OUTBOUND_CIDRS, "192.168.0.0/16"),
        (FAIL_OPEN, "true"),
        (PRESERVE_CLIENT_ADDRESS, "false"),
        (OPAQUE_PORTS, "3306"),
        (DIRECT, "on"),
        (UNKNOWN_PODS, "allow"),
    ];
    let (wide, none) = wishes(&meta(&wide, &[]));
    assert_eq!(none, []);
    let (wrong, _) = wishes(&meta(&WRONG, &[]));
    let nothing = Wishes::default();
    let narrowest = Settings {
        mode: Mode::Strict,
        outbound: Outbound::All,
        direct: false,
        unknown_pods: UnknownPods::Deny,
        ..Settings::default()
    };
    assert_eq!(wrong.settings(&nothing), narrowest);
    assert_eq!(nothing.settings(&wrong), narrowest, "on the namespace");
    assert_ne!(wide.settings(&nothing), Settings::default());
    assert_eq!(nothing.settings(&wide), wide.settings(&nothing), "a pod has its namespace's");
    let inherited = Settings {
        preserve_client_address: false,
        opaque_ports: "3306".parse().unwrap(),
        ..narrowest
    };
    assert_eq!(wrong.settings(&wide), inherited, "but for what lets nothing through");
    assert_eq!(wide.settings(&wrong), wide.settings(&nothing), "the pod's own is understood");
}

/// Whoever writes `false` is not to be enrolled by it, and neither is anybody by `Enabled`.
#[test]
fn word_for_taking_part_that_is_not_understood_counts_as_not_given() {
    let annotated = |word: &str| wishes(&meta(&[(MESH, word)], &[])).0;
    let (wrong, on, nothing) = (annotated("Enabled"), annotated("enabled"), Wishes::default());
    let (label, problems) = wishes(&meta(&[], &[(MESH, "on")]));
    assert_eq!(problems[0].field, "metadata.labels[\"malla.dev/mesh\"]");
    let both = wishes(&meta(&[(MESH, "false")], &[(MESH, "enabled")])).0;
    for (own, namespace, expected) in [
        (&wrong, &nothing, false),
        (&label, &nothing, false),
        (&nothing, &wrong, false),
        (&wrong, &on, true),
        (&label, &on, true),
        (&both, &nothing, true),
    ] {
        let found = own.enrolment(namespace, "default", &Pod::default());
        assert_eq!(found == Enrolment::Enrolled, expected, "{own:?} in {namespace:?}");
    }
}

#[test]
fn setting_that_is_given_as_a_label_is_reported_and_has_no_effect() {
    let labels = [(MESH, "enabled"), (MODE, "strict"), ("malla.dev/mod", "x"), ("app", "web")];
    let (own, problems) = wishes(&meta(&[], &labels));
    assert_eq!(own, wishes(&meta(&[(MESH, "enabled")], &[])).0);
    let [misspelt, mode] = &problems[..] else { panic!("{problems:?}") };
    assert_eq!(misspelt.field, "metadata.labels[\"malla.dev/mod\"]");
    assert!(misspelt.remedy.contains(MODE), "{misspelt}");
    assert_eq!(mode.field, "metadata.labels[\"malla.dev/mode\"]");
    assert!(mode.remedy.contains("annotate with malla.dev/mode=strict"), "{mode}");
}

#[test]
fn misspelt_setting_is_reported() {
    let (_, problems) = wishes(&meta(&[("malla.dev/mod", "strict")], &[]));
    assert_eq!(problems.len(), 1);
    assert!(problems[0].remedy.contains(MODE), "{}", problems[0]);
    let fine = [("malla.dev/redirection", "enabled"), (NETNS, "/run/netns/a"), ("other/key", "x")];
    assert_eq!(wishes(&meta(&fine, &[])).1, []);
}
