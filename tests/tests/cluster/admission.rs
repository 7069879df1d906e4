//! What the agent's account may do to pods: one annotation, on its own node.

use anyhow::{Result, ensure};
use harness::{Cluster, Deployment, User, wait};
use serde_json::{Value, json};

/// Whether the patch is let through; otherwise what it is refused for.
fn patch(user: &User, namespace: &str, pod: &str, patch: &Value) -> Result<(), String> {
    let patch = patch.to_string();
    let args =
        ["patch", "pod", pod, "--namespace", namespace, "--type=strategic", "--patch", &patch];
    user.kubectl(&args).map(drop).map_err(|error| format!("{error:#}"))
}

fn annotated(key: &str, value: &Value) -> Value {
    json!({"metadata": {"annotations": {key: value}}})
}

/// Every right for the agent's account, until dropped.
struct Rights<'a> {
    system: &'a Cluster,
    name: String,
}

impl<'a> Rights<'a> {
    fn give(system: &'a Cluster) -> Result<Self> {
        let name = format!("{}-everything", system.name());
        let account = format!("--serviceaccount={}:malla-agent", system.name());
        let bind = ["create", "clusterrolebinding", &name, "--clusterrole=cluster-admin", &account];
        system.kubectl(&bind)?;
        Ok(Self { system, name })
    }
}

impl Drop for Rights<'_> {
    fn drop(&mut self) {
        self.system.kubectl(&["delete", "clusterrolebinding", &self.name]).ok();
    }
}

#[test]
fn agent_changes_one_annotation_of_pods_of_its_node_and_nothing_else() -> Result<()> {
    require_cluster!();
    let deployment = Deployment::read(Some("malla.dev/admission"))?;
    deployment.apply(&["DaemonSet", "Deployment"])?;
    let (system, shop) = (deployment.system(), Cluster::namespace()?);
    let nodes = shop.two_nodes()?;
    let image = Cluster::load("busybox")?;
    let pod = |account: &str| {
        let container = json!([{"image": image, "command": ["sleep", "3600"]}]);
        json!({"serviceAccountName": account, "containers": container})
    };
    system.start("agent", &nodes[0], pod("malla-agent"))?;
    shop.start("here", &nodes[0], pod("default"))?;
    shop.start("there", &nodes[1], pod("default"))?;
    shop.kubectl(&["annotate", "pod", "here", "theirs=1"])?;
    let agent = system.user("agent", &system.token("malla-agent", Some(("Pod", "agent")))?)?;
    let patched = |pod: &str, change: &Value| patch(&agent, shop.name(), pod, change);
    let ours = "malla.dev/redirection";

    // What cannot be decided is refused: nothing here makes an expression fail.
    let name = format!("{}-malla-agent-pods", system.name());
    let policy = system.get(&["validatingadmissionpolicy", &name])?;
    assert_eq!(policy["spec"]["failurePolicy"], "Fail");

    // A policy is in force some moments after it was made.
    wait::until(wait::SOON, "the policy", || {
        patched("here", &annotated("theirs", &json!("2"))).is_err()
    })?;
    let refusals = [
        ("here", annotated("theirs", &json!("3")), "changes only the annotation"),
        ("here", annotated("theirs", &Value::Null), "changes only the annotation"),
        ("here", annotated("another", &json!("1")), "changes only the annotation"),
        ("here", annotated("malla.dev/mesh", &json!("disabled")), "changes only the annotation"),
        ("here", json!({"metadata": {"labels": {"app": "other"}}}), "only changes an annotation"),
        (
            "here",
            json!({"metadata": {"finalizers": ["a.example/b"]}}),
            "only changes an annotation",
        ),
        (
            "here",
            json!({"metadata": {"ownerReferences": [
            {"apiVersion": "v1", "kind": "Pod", "name": "there", "uid": "1"}]}}),
            "only changes an annotation",
        ),
        (
            "here",
            json!({"spec": {"containers": [{"name": "main", "image": "evil"}]}}),
            "only changes an annotation",
        ),
        ("here", json!({"spec": {"activeDeadlineSeconds": 1}}), "only changes an annotation"),
        ("there", annotated(ours, &json!("enabled")), "changes only pods of its own node"),
    ];
    for (pod, change, why) in refusals {
        let refused = patched(pod, &change).err().unwrap_or_default();
        let told = refused.contains("ValidatingAdmissionPolicy") && refused.contains(why);
        ensure!(told, "{change} of {pod} should be refused, `{why}`: {refused}");
    }
    for value in [json!("enabled"), json!("other"), Value::Null] {
        patched("here", &annotated(ours, &value)).map_err(anyhow::Error::msg)?;
    }

    // Neither a token without a node, nor anything but a patch.
    let loose = system.user("loose", &system.token("malla-agent", None)?)?;
    let refused = patch(&loose, shop.name(), "here", &annotated(ours, &json!("enabled")));
    let refused = refused.err().unwrap_or_default();
    ensure!(refused.contains("changes only pods of its own node"), "{refused}");
    for args in [
        &["delete", "pod", "here", "--namespace", shop.name()][..],
        &["exec", "here", "--namespace", shop.name(), "--", "true"],
        &["get", "secrets", "--namespace", system.name()],
        &["get", "configmaps", "--namespace", system.name()],
    ] {
        let refused = agent.kubectl(args).err().map(|error| format!("{error:#}"));
        ensure!(refused.is_some_and(|why| why.contains("forbidden")), "{args:?}");
    }
    // Nor where somebody has given it every right: the policy is not RBAC.
    let _rights = Rights::give(system)?;
    wait::until(wait::SOON, "the agent's rights", || {
        let can = ["auth", "can-i", "delete", "pods", "--namespace", shop.name()];
        agent.kubectl(&can).is_ok()
    })?;
    for args in [
        &["delete", "pod", "here"][..],
        &["exec", "here", "--", "true"],
        &["attach", "here"],
        &["debug", "here", "--image", &image, "--container", "theirs", "--attach=false"],
        &["run", "theirs", "--image", &image],
        &[
            "patch",
            "pod",
            "here",
            "--subresource=status",
            "--patch",
            r#"{"status":{"reason":"x"}}"#,
        ],
    ] {
        let in_shop = [&["--namespace", shop.name()], args].concat();
        let refused = agent.kubectl(&in_shop).err().map(|error| format!("{error:#}"));
        let refused = refused.unwrap_or_default();
        ensure!(refused.contains("and does nothing else to them"), "{args:?}: {refused}");
    }
    let refused = agent.evict("agent").err().map(|error| format!("{error:#}"));
    let refused = refused.unwrap_or_default();
    ensure!(refused.contains("and does nothing else to them"), "{refused}");
    // A pod in the place of the one that is there is as good as a patch, and as bad.
    let put = |change: &dyn Fn(&mut Value)| {
        let mut pod = shop.get(&["pod", "here"])?;
        // Whatever has become of it meanwhile: other tests' agents write on it too.
        pod["metadata"]["resourceVersion"] = Value::Null;
        change(&mut pod);
        agent.put(&format!("/api/v1/namespaces/{}/pods/here", shop.name()), &pod)
    };
    put(&|pod| pod["metadata"]["annotations"][ours] = json!("put"))?;
    let refused = put(&|pod| pod["metadata"]["labels"]["app"] = json!("put"));
    let refused = refused.err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(refused.contains("only changes an annotation"), "{refused}");
    // Nobody else is hindered.
    shop.kubectl(&["label", "pod", "there", "--overwrite", "app=other"])?;
    Ok(())
}
