//! Pods that take no part, since they cannot or must not, and say so.

use anyhow::{Context as _, Result, ensure};
use harness::{Agents, Cluster, enabled, service_of_pods, wait};
use serde_json::json;

#[test]
fn pods_that_cannot_take_part_are_left_alone_with_the_reason() -> Result<()> {
    require_cluster!();
    let agents = Agents::deployed()?;
    let cluster = Cluster::namespace()?;
    cluster.annotate(&enabled())?;
    let nodes = cluster.two_nodes()?;
    let image = Cluster::load("busybox")?;
    let sleep = |seconds: &str| json!([{"image": image, "command": ["sleep", seconds]}]);
    let on_host = json!({"hostNetwork": true, "containers": sleep("3600")});
    cluster.start("on-host", &nodes[0], on_host)?;
    let ends = json!({"restartPolicy": "Never", "containers": sleep("0")});
    cluster.start("ends", &nodes[0], ends)?;
    cluster.start("alone", &nodes[0], json!({"containers": sleep("3600")}))?;
    cluster.kubectl(&["annotate", "pod", "alone", "malla.dev/mesh=disabled"])?;
    cluster.start("member", &nodes[0], json!({"containers": sleep("3600")}))?;
    let of_the_system = OfTheSystem::start(&cluster, &nodes[0], &image)?;
    // Of another mesh, by what its injector, its agent or a user writes.
    for (pod, verb, word) in [
        ("istio", "annotate", "sidecar.istio.io/status={}"),
        ("ambient", "annotate", "ambient.istio.io/redirection=enabled"),
        ("to-be-ambient", "label", "istio.io/dataplane-mode=ambient"),
        ("linkerd", "annotate", "linkerd.io/proxy-version=edge"),
        ("labelled", "label", "malla.dev/mesh=disabled"),
    ] {
        cluster.start(pod, &nodes[0], json!({"containers": sleep("3600")}))?;
        cluster.kubectl(&[verb, "pod", pod, word])?;
    }
    for (pod, reason) in [
        ("istio", "has an Istio sidecar"),
        ("ambient", "in Istio's ambient mesh"),
        ("to-be-ambient", "in Istio's ambient mesh"),
        ("linkerd", "has a Linkerd proxy"),
        ("on-host", "shares the node's network"),
        ("ends", "completed"),
        ("alone", "disabled"),
        ("labelled", "disabled"),
        ("member", ""),
    ] {
        let is_so = || {
            let found = agents.workload(&nodes[0], cluster.name(), pod);
            found.is_ok_and(|found| {
                found["reason"].as_str().unwrap_or_default() == reason
                    && found["enrolled"] == reason.is_empty()
            })
        };
        wait::until(wait::SOON, "", is_so).with_context(|| {
            let found = agents.workload(&nodes[0], cluster.name(), pod);
            format!("{pod} is not `{reason}`: {found:?}\n{}", agents.log(&nodes[0]))
        })?;
    }
    of_the_system.is_left_alone(&agents, &nodes[0])?;
    for (pod, says) in [
        ("on-host", "refused: shares the node's network"),
        ("alone", ""),
        ("member", "enabled"),
        ("linkerd", "refused: has a Linkerd proxy"),
    ] {
        let said = || {
            let found = cluster.get(&["pod", pod]).unwrap_or_default();
            let found = &found["metadata"]["annotations"]["malla.dev/redirection"];
            found.as_str().unwrap_or_default() == says
        };
        wait::until(wait::SOON, &format!("{pod} to say `{says}`"), said)?;
    }
    cluster.start("confused", &nodes[1], json!({"containers": sleep("3600")}))?;
    cluster.kubectl(&["annotate", "pod", "confused", "malla.dev/mode=hard"])?;
    wait::until(wait::SOON, "an event on the pod", || {
        let about = "involvedObject.name=confused,reason=NotUnderstood";
        let events = cluster.get(&["events", "--field-selector", about]).unwrap_or_default();
        let message = &events["items"][0]["message"];
        message.as_str().is_some_and(|message| message.contains("`hard` is not understood"))
    })?;
    agents.wait_until_enrolled(&nodes[1], cluster.name(), "confused", true)?;
    let confused = agents.workload(&nodes[1], cluster.name(), "confused")?;
    assert_eq!(confused["mode"], "strict", "the safe one: {confused}");
    let problems = agents.ask_by_exec(&nodes[1], &["status"])?["problems"].to_string();
    ensure!(problems.contains(&format!("{}/confused", cluster.name())), "{problems}");
    mistakes_of_a_namespace_and_a_service_are_told_on_them(&cluster)?;
    if Cluster::is_ours() {
        let counted = || agents.process(&nodes[1])?.metrics();
        wait::until(wait::SOON, "the mistake to be counted", || {
            counted().is_ok_and(|metrics| metrics.sum("mesh_manifest_problems", &[]) > 0.0)
        })?;
    }
    let status = agents.ask_by_exec(&nodes[0], &["status"])?;
    assert_eq!(status["ready"], true, "{status}");
    Ok(())
}

fn mistakes_of_a_namespace_and_a_service_are_told_on_them(cluster: &Cluster) -> Result<()> {
    cluster.annotate(&json!({"malla.dev/mesh": "enabled", "malla.dev/fail-open": "perhaps"}))?;
    let mut service = service_of_pods("confused", 80);
    service["metadata"]["annotations"] = json!({"malla.dev/opaque-ports": "eighty"});
    cluster.apply(&service)?;
    // An object of no namespace has its events in this one.
    for (kind, name, of, word) in [
        ("Namespace", cluster.name(), "default", "perhaps"),
        ("Service", "confused", cluster.name(), "eighty"),
    ] {
        let about = format!("involvedObject.kind={kind},involvedObject.name={name}");
        let get = ["get", "events", "--namespace", of, "--field-selector", &about, "--output=json"];
        let mut said = String::new();
        let is_told = || {
            said = cluster.kubectl(&get).unwrap_or_default();
            said.contains(&format!("`{word}` is not understood"))
        };
        wait::until(wait::SOON, &format!("an event on the {kind}"), is_told)
            .with_context(|| said)?;
    }
    Ok(())
}

/// A pod of `kube-system` that asks to take part, deleted when dropped.
struct OfTheSystem<'a> {
    admin: &'a Cluster,
    name: String,
}

impl<'a> OfTheSystem<'a> {
    const NAMESPACE: &'static str = "--namespace=kube-system";

    fn start(admin: &'a Cluster, node: &str, image: &str) -> Result<Self> {
        let this = Self { admin, name: format!("{}-asks", admin.name()) };
        // It ends by itself where whoever tests is killed.
        let spec = json!({
            "nodeName": node,
            "terminationGracePeriodSeconds": 1,
            "activeDeadlineSeconds": 300,
        });
        let on = json!({"spec": spec});
        let (image, on) = (format!("--image={image}"), format!("--overrides={on}"));
        let asks = "--annotations=malla.dev/mesh=enabled";
        admin.kubectl(&[
            "run",
            &this.name,
            Self::NAMESPACE,
            asks,
            &image,
            &on,
            "--restart=Never",
            "--",
            "sleep",
            "3600",
        ])?;
        Ok(this)
    }

    fn is_left_alone(&self, agents: &Agents, node: &str) -> Result<()> {
        let found = || agents.workload(node, "kube-system", &self.name);
        let is_so = || {
            found().is_ok_and(|found| {
                found["reason"] == "system namespace" && found["enrolled"] == false
            })
        };
        wait::until(wait::SOON, "", is_so).with_context(|| format!("{:?}", found()))?;
        let path = "jsonpath={.metadata.annotations.malla\\.dev/redirection}";
        let get = ["get", "pod", &self.name, Self::NAMESPACE, "--output", path];
        let mut says = String::new();
        wait::until(wait::SOON, "it to be said on the pod", || {
            says = self.admin.kubectl(&get).unwrap_or_default();
            says == "refused: system namespace"
        })
        .with_context(|| says)
    }
}

impl Drop for OfTheSystem<'_> {
    fn drop(&mut self) {
        let delete = ["delete", "pod", &self.name, Self::NAMESPACE, "--wait=false"];
        self.admin.kubectl(&delete).ok();
    }
}

/// The network namespace that a pod's processes are in has to have the pod's addresses.
#[test]
fn pod_that_does_not_have_its_address_is_not_taken_in_and_says_so_until_it_has() -> Result<()> {
    require_cluster!();
    if !Cluster::is_ours() {
        harness::skip!("changes the addresses of a pod on a node that was made here");
    }
    // What is wrong with one pod is in everybody's `status`.
    let agents = Agents::alone()?;
    let cluster = Cluster::namespace()?;
    let nodes = cluster.two_nodes()?;
    cluster.client("moved", &nodes[0])?;
    let address = cluster.get(&["pod", "moved"])?["status"]["podIP"].clone();
    let address = address.as_str().context("no address")?.to_owned();
    let process = cluster.process("moved", "sleep")?;
    let ip = |words: &str| {
        let words: Vec<_> = ["ip"].into_iter().chain(words.split(' ')).collect();
        let output = process.run_beside(&words)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{words:?}: {said}");
        Ok(String::from_utf8(output.stdout)?)
    };
    let had = ip("-oneline address show dev eth0")?;
    let had = had.split_whitespace().find(|word| word.starts_with(&format!("{address}/")));
    let had = had.with_context(|| format!("{address} is not on eth0"))?.to_owned();
    let routes = ip("-4 route show")?;
    ip(&format!("address del {had} dev eth0"))?;

    cluster.annotate(&enabled())?;
    let says = |expected: &str| {
        let pod = cluster.get(&["pod", "moved"]).unwrap_or_default();
        let found = pod["metadata"]["annotations"]["malla.dev/redirection"].clone();
        let is_so = found.as_str().is_some_and(|found| found.starts_with(expected));
        if is_so { Ok(()) } else { Err(found) }
    };
    let why =
        "find its network namespace: no process of this pod is in a network namespace that has";
    let expected = format!("failed: {why} {address}");
    wait::until(wait::SOON, "the pod to say what is wrong", || says(&expected).is_ok())
        .with_context(|| format!("{:?}, not `{expected}`", says(&expected)))?;
    let status = agents.ask(&nodes[0], &["status"])?;
    ensure!(status["problems"].to_string().contains(&format!("not enrolled: {why}")), "{status}");
    let metrics = agents.process(&nodes[0])?.metrics()?;
    assert_eq!(metrics.sum("mesh_pods_not_enrolled", &[("reason", "no_address")]), 1.0);
    wait::until(wait::SOON, "an event", || {
        let about = "involvedObject.name=moved,type=Warning";
        let events = cluster.get(&["events", "--field-selector", about]).unwrap_or_default();
        events["items"].to_string().contains(why)
    })?;

    ip(&format!("address add {had} dev eth0"))?;
    for route in routes.lines() {
        ip(&format!("route replace {}", route.trim()))?;
    }
    wait::until(wait::SOON, "the pod to be taken in", || says("enabled").is_ok())
        .with_context(|| format!("{:?}", says("enabled")))?;
    agents.wait_until_carried(&nodes[0], cluster.name(), "moved")
}
