//! The deployment, whole: the agent on every node of a cluster, and the CA.

use std::collections::BTreeMap;
use std::env;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::{Cluster, Deployment, load_archive};
use crate::access_log::Record;
use crate::wait;

/// Its image is unpacked, the programs are loaded, and the API is listed.
const READY: Duration = Duration::from_secs(60);
/// The agents of all nodes, one after the other, each beside one that drains.
const REPLACED: Duration = Duration::from_secs(180);

/// Agents on all nodes, removed with what they have attached when dropped.
#[derive(Debug)]
pub struct Agents {
    deployment: Deployment,
    /// Of an agent's pod, as deployed.
    spec: Value,
    /// The agent's pod, by node.
    pods: BTreeMap<String, String>,
}

impl Agents {
    /// What users apply, as they do.
    pub(super) fn ship() -> Result<Self> {
        let mut deployment = Deployment::shipped()?;
        let spec = deployment.object("DaemonSet")["spec"]["template"]["spec"].clone();
        let (image, named) = (load()?, &spec["containers"][0]["image"]);
        ensure!(*named == image, "the image is {image}, and deploy/ names {named}");
        deployment.apply_directory()?;
        let mut this = Self { deployment, spec, pods: BTreeMap::new() };
        this.find()?;
        this.find_authority()?;
        Ok(this)
    }

    /// Not quite what users apply, but in a namespace of its own and under other names
    /// ([`Deployment::read`]), with the image's name, logs that tests read (the access log too, as JSON), and a
    /// drain of 2 s; and with the settings `changed`. With `roots` those are what the agents trust, and there is
    /// no CA.
    pub(super) fn deploy(changed: &[(&str, &str)], roots: Option<&str>) -> Result<Self> {
        let mut deployment = Deployment::read(None)?;
        name_image(&mut deployment)?;
        let settings = &mut deployment.object("ConfigMap")["data"];
        settings["MESH_ACCESS_LOG"] = json!("json");
        settings["MESH_DRAIN_S"] = json!("2");
        settings["MESH_LOG"] = json!("info,mesh_agent=debug");
        for (name, value) in changed {
            settings[*name] = json!(value);
        }
        let spec = deployment.object("DaemonSet")["spec"]["template"]["spec"].clone();
        if let Some(roots) = roots {
            deployment.system().apply(&json!({
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "malla-trust"},
                "data": {"bundle.pem": roots},
            }))?;
        }
        let without: &[&str] = if roots.is_some() { &["Deployment"] } else { &[] };
        deployment.apply(without)?;
        let mut this = Self { deployment, spec, pods: BTreeMap::new() };
        this.find()?;
        if roots.is_none() {
            this.find_authority()?;
        }
        Ok(this)
    }

    /// Waits until both replicas of the CA are ready: one leads, the other one would.
    fn find_authority(&self) -> Result<()> {
        let limit = format!("--timeout={}s", READY.as_secs());
        self.system().kubectl(&["rollout", "status", "deployment/malla-ca", &limit])?;
        let status = self.system().get(&["deployment", "malla-ca"])?["status"].clone();
        ensure!(status["readyReplicas"] == 2, "two replicas: {status}");
        Ok(())
    }

    /// The namespace of agents and CA.
    pub fn system(&self) -> &Cluster {
        self.deployment.system()
    }

    /// Waits until all are ready, and finds their pods.
    pub(super) fn find(&mut self) -> Result<()> {
        let limit = format!("--timeout={}s", REPLACED.as_secs());
        let rollout = ["rollout", "status", "daemonset/malla-agent", &limit];
        let system = self.deployment.system();
        if let Err(error) = system.kubectl(&rollout) {
            let told = system.kubectl(&["describe", "pods"]).unwrap_or_default();
            let logs =
                ["logs", "--selector=app in (malla-agent,malla-ca)", "--prefix", "--tail=50"];
            let logs = system.kubectl(&logs).unwrap_or_default();
            bail!("{error:#}\n{told}\n{logs}");
        }
        let pods = system.get(&["pods", "--selector=app=malla-agent"])?;
        let pods = pods["items"].as_array().context("no pods")?.iter();
        let stays = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null();
        let mut found = BTreeMap::new();
        for pod in pods.filter(stays) {
            let text = |value: &Value| value.as_str().map(str::to_owned).context("no name");
            found.insert(text(&pod["spec"]["nodeName"])?, text(&pod["metadata"]["name"])?);
        }
        // Also on those that take no other pods.
        let nodes = system.get(&["nodes"])?;
        let nodes = nodes["items"].as_array().map_or(0, Vec::len);
        ensure!(found.len() == nodes, "an agent on every node, of {nodes}: {found:?}");
        self.pods = found;
        Ok(())
    }

    /// What the agent of `node` answers to a command of its command line.
    ///
    /// # Errors
    ///
    /// Fails with what it says.
    pub fn ask(&self, node: &str, command: &[&str]) -> Result<Value> {
        // The same program on the same files and network, a tenth of the work.
        if Cluster::is_ours() {
            return self.process(node)?.ask(command);
        }
        self.ask_by_exec(node, command)
    }

    /// The same as whoever runs a cluster asks.
    ///
    /// # Errors
    ///
    /// Fails with what it says.
    pub fn ask_by_exec(&self, node: &str, command: &[&str]) -> Result<Value> {
        let words = [&["/mesh-agent"], command, &["-o", "json"]].concat();
        let output = self.deployment.system().exec_output(self.pod(node)?, &words)?;
        // Code 1 is an answer: there is a problem, perhaps with a pod of another test.
        serde_json::from_slice(&output.stdout).with_context(|| {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            format!("read the answer to {command:?}: {said}")
        })
    }

    /// What the agent of `node` says of a pod; `null` if it does not know it.
    ///
    /// # Errors
    ///
    /// Fails with what it says.
    pub fn workload(&self, node: &str, namespace: &str, pod: &str) -> Result<Value> {
        let all = self.ask(node, &["workloads", "-n", namespace])?;
        let found = all.as_array().into_iter().flatten().find(|workload| workload["pod"] == pod);
        Ok(found.cloned().unwrap_or_default())
    }

    /// Waits until the agent of `node` says that a pod is enrolled, or that it is not.
    ///
    /// # Errors
    ///
    /// Fails, with what it says, if that does not come true.
    pub fn wait_until_enrolled(
        &self,
        node: &str,
        namespace: &str,
        pod: &str,
        is_so: bool,
    ) -> Result<()> {
        let holds =
            || self.workload(node, namespace, pod).is_ok_and(|found| found["enrolled"] == is_so);
        wait::until(wait::SOON, "", holds).with_context(|| {
            let found = self.workload(node, namespace, pod);
            format!("{pod} is not enrolled ({is_so}) on {node}: {found:?}\n{}", self.log(node))
        })
    }

    /// Waits until the agent of `node` has taken a pod in: `enrolled` alone is what was asked for.
    ///
    /// # Errors
    ///
    /// Fails, with the agent's log, if it does not.
    pub fn wait_until_carried(&self, node: &str, namespace: &str, pod: &str) -> Result<()> {
        let line = format!("namespace={namespace} name={pod} netns=");
        wait::until(wait::SOON, "", || self.log(node).contains(&line))
            .with_context(|| format!("{pod} is not enrolled\n{}", self.log(node)))
    }

    /// Waits until a pod is ready, and the agent of `node` carries what it connects and gets.
    ///
    /// # Errors
    ///
    /// Fails, with what they say, if that does not come true.
    pub fn wait_until_in(&self, node: &str, cluster: &Cluster, pod: &str) -> Result<()> {
        cluster.ready(pod)?;
        self.wait_until_enrolled(node, cluster.name(), pod, true)?;
        self.wait_until_carried(node, cluster.name(), pod)
    }

    /// The access log of `node`'s agent.
    pub fn records(&self, node: &str) -> Vec<Record> {
        self.log(node).lines().filter_map(Record::parse).collect()
    }

    /// Waits for a record with these texts.
    ///
    /// # Errors
    ///
    /// Fails if there is none.
    pub fn wait_for_record(&self, node: &str, texts: &[(&str, &str)]) -> Result<Record> {
        let found = || self.records(node).into_iter().find(|record| record.has(texts));
        wait::until_some(wait::SOON, "", found).with_context(|| {
            let records = self.records(node);
            let last: Vec<_> = records.iter().rev().take(3).collect();
            format!("no access-log record {texts:?} on {node}; the last: {last:#?}")
        })
    }

    /// What the agents say of connections of this namespace that failed, for who wants to know why.
    pub fn failures(&self, namespace: &str) -> String {
        let mut told = String::new();
        for node in self.pods.keys() {
            let records = self.records(node).into_iter();
            let failed = records.filter(|record| {
                let ends = [record.text("src.namespace"), record.text("dst.namespace")];
                ends.contains(&namespace) && record.text("response_flags") != "-"
            });
            failed.for_each(|record| told.push_str(&format!("{node}: {record:?}\n")));
        }
        told
    }

    /// What the agent of `node` has written.
    pub fn log(&self, node: &str) -> String {
        let pod = self.pod(node).unwrap_or_default();
        self.deployment.system().log(pod).unwrap_or_default()
    }

    pub(super) fn pod(&self, node: &str) -> Result<&str> {
        self.pods.get(node).map(String::as_str).with_context(|| format!("no agent on {node}"))
    }

    /// Replaces them all, one after the other, as a new version does.
    ///
    /// # Errors
    ///
    /// Fails, with their logs, if the new ones do not become ready.
    pub fn replace(&mut self) -> Result<()> {
        self.system().kubectl(&["rollout", "restart", "daemonset/malla-agent"])?;
        let before = std::mem::take(&mut self.pods);
        self.find()?;
        let stays = |(node, pod): (&String, &String)| self.pods.get(node) == Some(pod);
        ensure!(!before.iter().any(stays), "not replaced: {before:?}");
        Ok(())
    }

    /// Deletes what was shipped, as users do, and waits until the agents have ended.
    ///
    /// # Errors
    ///
    /// Fails if they do not.
    pub fn delete(&self) -> Result<()> {
        self.deployment.delete_directory()
    }

    /// What `mesh-agent detach` finds to remove on each node, run in `place`.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be run there.
    pub fn traces(&self, place: &Cluster) -> Result<BTreeMap<String, Value>> {
        let limit = format!("--timeout={}s", READY.as_secs());
        let mut found = BTreeMap::new();
        for node in self.pods.keys() {
            let mut spec = self.spec.clone();
            // What else an agent needs is gone.
            for key in ["serviceAccountName", "priorityClassName"] {
                spec[key] = Value::Null;
            }
            let volumes = spec["volumes"].as_array_mut().context("no volumes")?;
            volumes.retain(|volume| volume["name"] != "trust");
            spec["nodeName"] = json!(node);
            spec["restartPolicy"] = json!("Never");
            let container = &mut spec["containers"][0];
            container["args"] = json!(["detach", "-o", "json"]);
            for key in ["startupProbe", "livenessProbe", "readinessProbe", "envFrom"] {
                container[key] = Value::Null;
            }
            let mounts = container["volumeMounts"].as_array_mut().context("no mounts")?;
            mounts.retain(|mount| mount["name"] != "trust");
            let name = format!("detach-{node}");
            let metadata = json!({"name": name});
            let pod =
                json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec});
            place.apply(&pod)?;
            let phase = "--for=jsonpath={.status.phase}=Succeeded";
            place.kubectl(&["wait", phase, &limit, "pod", &name])?;
            let said = place.kubectl(&["logs", &name])?;
            found.insert(node.clone(), serde_json::from_str(&said).context("read its report")?);
        }
        Ok(found)
    }
}

impl Drop for Agents {
    fn drop(&mut self) {
        // Waited for: the next agent of a node wants the same ports. They take what they have attached
        // with them.
        let delete = ["delete", "daemonset/malla-agent", "--cascade=foreground", "--timeout=30s"];
        self.system().kubectl(&delete).ok();
    }
}

/// Loads the image that is to be tested, and has it run.
fn name_image(deployment: &mut Deployment) -> Result<()> {
    let image = load()?;
    for kind in ["DaemonSet", "Deployment"] {
        let containers = &mut deployment.object(kind)["spec"]["template"]["spec"]["containers"];
        containers[0]["image"] = json!(image);
    }
    Ok(())
}

/// Loads the agent's image, as `cargo xtask image` makes it, into every node, once, and returns its name.
fn load() -> Result<String> {
    static IS_LOADED: Mutex<bool> = Mutex::new(false);
    let mut is_loaded = IS_LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if !*is_loaded {
        let archive =
            env::var_os("MALLA_IMAGE").context("cargo xtask e2e makes the agent's image")?;
        load_archive(&archive)?;
        *is_loaded = true;
    }
    env::var("MALLA_IMAGE_NAME").context("an image without a name")
}
