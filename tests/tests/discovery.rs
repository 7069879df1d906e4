//! Route, balance and what they are decided from: manifests that change, are wrong, and heal.

use std::fs;
use std::io::Read as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Family, Mesh, PodSpec, Serve, ServiceSpec, exchange, wait};
use serde_json::Value;

/// What `status` lists, having checked that its exit code says whether it lists anything.
fn problems(mesh: &Mesh) -> Result<Vec<Value>> {
    let cli = mesh.agent("a").cli(&["status", "-o", "json"])?;
    let status = cli.json()?;
    let problems = status["problems"].as_array().context("no list of problems")?.clone();
    ensure!(cli.code == i32::from(!problems.is_empty()), "code {}: {}", cli.code, cli.stdout);
    Ok(problems)
}

fn greeting(mesh: &Mesh, service: &str) -> Result<String> {
    let mut stream = mesh.pod("a1").connect(mesh.service(service).v4(80))?;
    let mut greeting = [0; 2];
    stream.read_exact(&mut greeting)?;
    Ok(String::from_utf8(greeting.into())?)
}

#[test]
fn manifest_that_is_wrong_changes_nothing_and_heals() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let works = || exchange(&mut mesh.pod("a1").connect(mesh.service("b").v4(80))?, b"hello");
    works()?;
    for wrong in [
        "kind: [unfinished\n",
        "apiVersion: v1\nkind: Pod\nmetadata: {name: x, uid: x}\nspec: {nodeName: a}\nstatus: {podIPs: [{ip: not-an-address}]}\n",
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: other\n  annotations: {malla.dev/mode: maybe}\n",
    ] {
        mesh.manifests().write("wrong", wrong)?;
        wait::until(wait::SOON, "the problem to be reported", || {
            problems(&mesh).is_ok_and(|problems| !problems.is_empty())
        })?;
        let reported = problems(&mesh)?;
        let place = reported[0]["place"].as_str().context("no place")?;
        ensure!(place.contains("wrong.yaml"), "{reported:?}");
        for field in ["message", "remedy"] {
            ensure!(
                reported[0][field].as_str().is_some_and(|text| !text.is_empty()),
                "{reported:?}"
            );
        }
        mesh.agent("a").wait_for_metric("mesh_manifest_problems", &[], 1.0)?;
        works()?;

        mesh.manifests()
            .write("wrong", "apiVersion: v1\nkind: Namespace\nmetadata: {name: other}\n")?;
        wait::until(wait::SOON, "the problem to be gone", || {
            problems(&mesh).is_ok_and(|problems| problems.is_empty())
        })?;
    }
    works()
}

#[test]
fn kind_that_is_not_known_is_ignored() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Greet("b1"))?;
    let generation = |mesh: &Mesh| -> Result<u64> {
        mesh.agent("a").ask(&["status"])?["snapshot"]["generation"].as_u64().context("none")
    };
    let before = generation(&mesh)?;
    mesh.manifests().write(
        "other",
        "apiVersion: example.com/v1\nkind: Unheard\nmetadata: {name: x}\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {name: added, namespace: default}\n\
         spec: {clusterIP: 10.250.0.1, ports: [{port: 80}]}\n",
    )?;
    wait::until(wait::SOON, "the rest of the file to count", || {
        generation(&mesh).is_ok_and(|now| now > before)
    })?;
    let services = mesh.agent("a").ask(&["services"])?;
    let services = services.as_array().context("a list")?;
    ensure!(services.iter().any(|one| one["service"] == "added"), "{services:?}");
    assert_eq!(greeting(&mesh, "b")?, "b1");

    // Told once, however often it is read.
    let before = generation(&mesh)?;
    mesh.manifests().write(
        "another",
        "apiVersion: example.com/v1\nkind: Unheard\nmetadata: {name: y}\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {name: more, namespace: default}\n\
         spec: {clusterIP: 10.250.0.2, ports: [{port: 80}]}\n",
    )?;
    wait::until(wait::SOON, "the other file to count", || {
        generation(&mesh).is_ok_and(|now| now > before)
    })?;
    let log = mesh.agent("a").log();
    let told = log.lines().filter(|line| line.contains("example.com/v1 Unheard")).count();
    ensure!(told == 1, "told {told} times");
    Ok(())
}

/// Asked for and not possible is not the same as done.
#[test]
fn pod_whose_enrolment_fails_is_shown_as_not_enrolled() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let absent = "/run/netns/malla-there-is-none";
    mesh.manifests().write(
        "homeless",
        &format!(
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: homeless\n  namespace: default\n  \
             annotations: {{malla.dev/netns: {absent}}}\nspec: {{nodeName: a}}\n\
             status: {{podIPs: [{{ip: 10.249.0.1}}]}}\n"
        ),
    )?;
    let shown = || {
        let workloads = mesh.agent("a").ask(&["workloads"]).ok()?;
        let mut workloads = workloads.as_array()?.iter();
        workloads.find(|one| one["pod"] == "homeless" && one["enrolled"] == false).cloned()
    };
    let shown = wait::until_some(wait::SOON, "the pod to be shown as not enrolled", shown)?;
    ensure!(shown["reason"].as_str().is_some_and(|why| why.contains(absent)), "{shown}");
    assert_eq!(mesh.agent("a").is_enrolled(mesh.pod("a1")), Some(true));
    let status = mesh.agent("a").cli(&["status", "-o", "json"])?.json()?;
    assert_eq!(status["snapshot"]["enrolled_here"], 2, "{status}");
    Ok(())
}

/// A manifest that people write has no UID, and its name may have dots.
#[test]
fn pod_without_a_uid_takes_part() -> Result<()> {
    harness::require!();
    let mut mesh = Mesh::two_nodes()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    let to = mesh.pod("b1").v4(8080);
    for pod in ["a1", "b1"] {
        let file = format!("pod-default-{pod}");
        let text = fs::read_to_string(mesh.manifests().dir().join(format!("{file}.yaml")))?;
        let (account, pod_text) = text.split_once("kind: \"Pod\"").context("no pod")?;
        let lines = pod_text.lines().filter(|line| !line.trim_start().starts_with("uid:"));
        let by_hand = lines.collect::<Vec<_>>().join("\n");
        ensure!(by_hand.len() < pod_text.trim_end().len(), "the harness gives one:\n{text}");
        let name = |pod: &str| format!("name: \"{pod}\"");
        let by_hand = by_hand.replacen(&name(pod), &name(&format!("{pod}.by-hand")), 1);
        mesh.manifests().write(&file, &format!("{account}kind: \"Pod\"{by_hand}\n"))?;
    }
    let carried = |mesh: &Mesh| {
        mesh.agent("a").access_log().iter().any(|record| {
            record.has(&[
                ("src.workload", "a1.by-hand"),
                ("dst.workload", "b1.by-hand"),
                ("way", "tunnel"),
                ("response_flags", "-"),
            ])
        })
    };
    wait::until(wait::SOON, "the pods to be in the mesh under their names", || {
        mesh.pod("a1").connect(to).and_then(|mut s| exchange(&mut s, b"by hand")).is_ok()
            && carried(&mesh)
    })?;
    assert_eq!(problems(&mesh)?, [Value::Null; 0]);

    // The next agent knows whose pins it finds, and they go with their pod.
    let lookups = |mesh: &Mesh| -> Result<Vec<String>> {
        let mut names = Vec::new();
        for layout in fs::read_dir(mesh.agent("a").bpffs())? {
            for link in fs::read_dir(layout?.path().join("links"))? {
                names.push(link?.file_name().to_string_lossy().into_owned());
            }
        }
        names.retain(|name| name.starts_with("lookup_"));
        Ok(names)
    };
    assert_eq!(lookups(&mesh)?.len(), 2);
    mesh.agent_mut("a").kill()?;
    mesh.agent_mut("a").restart()?;
    exchange(&mut mesh.pod("a1").connect(to)?, b"again")?;
    assert_eq!(lookups(&mesh)?.len(), 2);
    mesh.delete_pod_manifest("a1")?;
    wait::until(wait::SOON, "its pin to go", || lookups(&mesh).is_ok_and(|found| found.len() == 1))
}

#[test]
fn service_without_endpoints_is_refused_at_once() -> Result<()> {
    harness::require!();
    let mesh =
        Mesh::two_nodes_builder().service(ServiceSpec::new("empty").port(80, 8080)).start()?;
    for family in Family::BOTH {
        let took = mesh.pod("a1").refused(mesh.service("empty").addr(family, 80))?;
        ensure!(took < Duration::from_secs(1), "refused after {took:?}");
    }
    mesh.agent("a").wait_for_record(&[("reason", "no_endpoints")])?;
    mesh.agent("a").wait_for_metric("mesh_refusals_total", &[("reason", "no_endpoints")], 2.0)?;
    // A port that the service does not have is another reason.
    mesh.pod("a1").refused(mesh.service("empty").v4(81))?;
    mesh.agent("a").wait_for_record(&[("reason", "no_such_port")])?;
    Ok(())
}

#[test]
fn endpoints_are_followed() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let _b1 = mesh.pod("b1").serve(8080, Serve::Greet("b1"))?;
    let _b2 = mesh.pod("b2").serve(8080, Serve::Greet("b2"))?;
    let _a2 = mesh.pod("a2").serve(8080, Serve::Greet("a2"))?;
    assert_eq!(greeting(&mesh, "b")?, "b1");
    for name in ["b2", "a2", "b1"] {
        mesh.endpoints("b", &[name])?;
        wait::until(wait::SOON, "the new endpoint", || {
            greeting(&mesh, "b").is_ok_and(|who| who == name)
        })?;
    }
    mesh.endpoints("b", &[])?;
    wait::until(wait::SOON, "no endpoint", || {
        mesh.pod("a1").refused(mesh.service("b").v4(80)).is_ok()
    })
}

#[test]
fn several_ports_lead_to_their_own_targets() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .service(ServiceSpec::new("many").port(80, 8080).port(443, 8443).pods(&["b1"]))
        .start()?;
    let _http = mesh.pod("b1").serve(8080, Serve::Greet("80"))?;
    let _https = mesh.pod("b1").serve(8443, Serve::Greet("443"))?;
    for (port, expected) in [(80, "80"), (443, "443")] {
        for family in Family::BOTH {
            let to = mesh.service("many").addr(family, port);
            let mut stream = mesh.pod("a1").connect(to)?;
            let mut greeting = vec![0; expected.len()];
            stream.read_exact(&mut greeting)?;
            assert_eq!(greeting, expected.as_bytes());
        }
    }
    Ok(())
}

#[test]
fn pod_that_appears_later_is_in_the_mesh() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes()?;
    let _server = mesh.pod("b1").serve(8080, Serve::Echo)?;
    mesh.delete_pod_manifest("a1")?;
    wait::until(wait::SOON, "the pod to be forgotten", || {
        mesh.agent("a").is_enrolled(mesh.pod("a1")).is_none()
    })?;
    // Nothing of the mesh is left in the pod: it connects as ever, and is a stranger.
    let mut stream = mesh.pod("a1").connect(mesh.pod("b1").v4(8080))?;
    exchange(&mut stream, b"plain")?;
    drop(stream);
    mesh.agent("b").wait_for_record(&[("direction", "inbound"), ("carrier", "plaintext")])?;

    mesh.enrol("a1", true)?;
    exchange(&mut mesh.pod("a1").connect(mesh.service("b").v4(80))?, b"in the mesh")?;
    mesh.agent("a").wait_for_record(&[("src.workload", "a1"), ("way", "tunnel")])?;
    Ok(())
}

#[test]
fn pod_beats_its_namespace() -> Result<()> {
    harness::require!();
    let mesh = Mesh::two_nodes_builder()
        .namespace("default", &[("malla.dev/mesh", "disabled")])
        .pod(PodSpec::new("a1", "a").annotation("malla.dev/mesh", "enabled"))
        .pod(PodSpec::new("a2", "a").label("malla.dev/mesh", "enabled"))
        .start()?;
    for (pod, enrolled) in [("a1", true), ("a2", true), ("b1", false)] {
        assert_eq!(mesh.agent("a").is_enrolled(mesh.pod(pod)), Some(enrolled), "{pod}");
    }
    Ok(())
}
