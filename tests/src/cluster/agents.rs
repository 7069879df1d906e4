//! The real agent on every node of a cluster, in pods of a DaemonSet with no more privileges than it
//! needs. All tests share one: a node has room for one agent.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::{Cluster, load_archive, read, xtask};
use crate::access_log::Record;
use crate::agent::binary;
use crate::mesh::init_ca;
use crate::wait;

/// Its image is unpacked, the programs are loaded, and the API is listed.
const READY: Duration = Duration::from_secs(60);

/// Agents on all nodes, removed with what they have attached when the last test drops them.
#[derive(Debug)]
pub struct Agents {
    system: Cluster,
    image: String,
    /// The agent's pod, by node.
    pods: BTreeMap<String, String>,
}

impl Agents {
    /// Those that another test has deployed, or new ones, all of them ready.
    ///
    /// # Errors
    ///
    /// Fails, with their logs, if they do not become ready.
    pub fn deployed() -> Result<Arc<Self>> {
        static SHARED: Mutex<Weak<Agents>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(agents) = shared.upgrade() {
            return Ok(agents);
        }
        let agents = Arc::new(Self::deploy()?);
        *shared = Arc::downgrade(&agents);
        Ok(agents)
    }

    fn deploy() -> Result<Self> {
        let image = load()?;
        let mut this = Self { system: Cluster::namespace()?, image, pods: BTreeMap::new() };
        let name = this.system.name().to_owned();
        this.give_ca()?;
        for object in access(&name) {
            this.system.apply(&object)?;
        }
        this.system.apply(&json!({
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": {"name": "agent"},
            "spec": {
                "selector": {"matchLabels": {"app": "agent"}},
                "template": {
                    "metadata": {"labels": {"app": "agent"}},
                    "spec": this.spec(&["run", "--ca-dir=/ca", "--access-log=json", "--drain-s=2",
                        "--log=info,mesh_agent=debug"]),
                },
            },
        }))?;
        let limit = format!("--timeout={}s", READY.as_secs());
        let rollout = ["rollout", "status", "daemonset/agent", &limit];
        if let Err(error) = this.system.kubectl(&rollout) {
            let told = this.system.kubectl(&["describe", "pods"]).unwrap_or_default();
            let logs = ["logs", "--selector", "app=agent", "--prefix", "--tail", "50"];
            let logs = this.system.kubectl(&logs).unwrap_or_default();
            bail!("{error:#}\n{told}\n{logs}");
        }
        let pods = this.system.get(&["pods", "--selector", "app=agent"])?;
        for pod in pods["items"].as_array().context("no pods")? {
            let text = |value: &Value| value.as_str().map(str::to_owned).context("no name");
            this.pods.insert(text(&pod["spec"]["nodeName"])?, text(&pod["metadata"]["name"])?);
        }
        ensure!(this.pods.len() == this.system.nodes()?.len(), "an agent on every node: {this:?}");
        Ok(this)
    }

    /// A certificate authority that all share.
    fn give_ca(&self) -> Result<()> {
        let dir = env::temp_dir().join(format!("malla-{}-ca", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let from = format!("--from-file={}", dir.display());
        let made = init_ca(&dir, "cluster.local")
            .and_then(|()| self.system.kubectl(&["create", "secret", "generic", "ca", &from]));
        fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))?;
        made.map(drop)
    }

    fn spec(&self, args: &[&str]) -> Value {
        let cgroup = format!("--cgroup={}", cgroup());
        let args: Vec<_> = args.iter().copied().chain([&*cgroup]).collect();
        json!({
            "serviceAccountName": "agent",
            "hostNetwork": true,
            "hostPID": true,
            "terminationGracePeriodSeconds": 10,
            "tolerations": [{"operator": "Exists"}],
            "containers": [{
                "name": "agent",
                "image": self.image,
                "imagePullPolicy": "IfNotPresent",
                "args": args,
                "env": [{
                    "name": "MESH_NODE",
                    "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}},
                }],
                "readinessProbe": {
                    "httpGet": {"host": "127.0.0.1", "port": 15021, "path": "/healthz/ready"},
                    "periodSeconds": 1,
                },
                "securityContext": {
                    "allowPrivilegeEscalation": false,
                    "readOnlyRootFilesystem": true,
                    "seccompProfile": {"type": "RuntimeDefault"},
                    "capabilities": {
                        "drop": ["ALL"],
                        "add": ["BPF", "NET_ADMIN", "PERFMON", "SYS_ADMIN", "SYS_PTRACE"],
                    },
                },
                "volumeMounts": [
                    {"name": "cgroup", "mountPath": "/host/cgroup", "readOnly": true},
                    {"name": "bpf", "mountPath": "/sys/fs/bpf"},
                    {"name": "run", "mountPath": "/run/malla"},
                    {"name": "ca", "mountPath": "/ca", "readOnly": true},
                ],
            }],
            "volumes": [
                {"name": "cgroup", "hostPath": {"path": "/sys/fs/cgroup"}},
                {"name": "bpf", "hostPath": {"path": "/sys/fs/bpf"}},
                {"name": "run", "hostPath": {"path": "/run/malla", "type": "DirectoryOrCreate"}},
                {"name": "ca", "secret": {"secretName": "ca", "defaultMode": 0o400}},
            ],
        })
    }

    /// What the agent of `node` answers to a command of its command line.
    ///
    /// # Errors
    ///
    /// Fails with what it says.
    pub fn ask(&self, node: &str, command: &[&str]) -> Result<Value> {
        let words = [&["/mesh-agent"], command, &["-o", "json"]].concat();
        let text = self.system.exec(self.pod(node)?, &words)?;
        serde_json::from_str(&text).with_context(|| format!("read the answer to {command:?}"))
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

    /// What the agent of `node` has written.
    pub fn log(&self, node: &str) -> String {
        let pod = self.pod(node).unwrap_or_default();
        self.system.kubectl(&["logs", pod]).unwrap_or_default()
    }

    fn pod(&self, node: &str) -> Result<&str> {
        self.pods.get(node).map(String::as_str).with_context(|| format!("no agent on {node}"))
    }

    /// Removes what the agents have left in the kernel, as whoever uninstalls them would.
    fn detach(&self) -> Result<()> {
        let limit = format!("--timeout={}s", READY.as_secs());
        for node in self.pods.keys() {
            let mut spec = self.spec(&["detach"]);
            spec["nodeName"] = json!(node);
            spec["restartPolicy"] = json!("Never");
            // It has no such flag, and nothing to be ready for.
            let container = &mut spec["containers"][0];
            container["args"] = json!(["detach"]);
            container["readinessProbe"] = Value::Null;
            let name = format!("detach-{node}");
            let metadata = json!({"name": name});
            let pod =
                json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec});
            self.system.apply(&pod)?;
            let phase = "--for=jsonpath={.status.phase}=Succeeded";
            self.system.kubectl(&["wait", phase, &limit, "pod", &name])?;
        }
        Ok(())
    }
}

impl Drop for Agents {
    fn drop(&mut self) {
        // Waited for: the next agent of a node wants the same ports.
        let delete = ["delete", "daemonset", "agent", "--cascade=foreground", "--timeout=30s"];
        self.system.kubectl(&delete).ok();
        // What stays in spite of that goes with the node.
        self.detach().ok();
        for object in access(self.system.name()) {
            let kind = object["kind"].as_str().unwrap_or_default();
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            self.system.kubectl(&["delete", kind, name]).ok();
        }
    }
}

/// What an agent may ask of the API.
fn access(namespace: &str) -> [Value; 3] {
    let role = "rbac.authorization.k8s.io";
    [
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "agent"}}),
        json!({
            "apiVersion": format!("{role}/v1"),
            "kind": "ClusterRole",
            "metadata": {"name": namespace},
            "rules": [
                {
                    "apiGroups": [""],
                    "resources": ["namespaces", "nodes", "pods", "services"],
                    "verbs": ["get", "list", "watch"],
                },
                {"apiGroups": [""], "resources": ["pods"], "verbs": ["patch"]},
                {"apiGroups": [""], "resources": ["events"], "verbs": ["create"]},
                {
                    "apiGroups": ["discovery.k8s.io"],
                    "resources": ["endpointslices"],
                    "verbs": ["get", "list", "watch"],
                },
            ],
        }),
        json!({
            "apiVersion": format!("{role}/v1"),
            "kind": "ClusterRoleBinding",
            "metadata": {"name": namespace},
            "roleRef": {"apiGroup": role, "kind": "ClusterRole", "name": namespace},
            "subjects": [{"kind": "ServiceAccount", "name": "agent", "namespace": namespace}],
        }),
    ]
}

/// The nodes' cgroup2 as the agent's pod sees it: nodes that are made here have this machine's, which
/// may be beside version 1.
fn cgroup() -> &'static str {
    let is_hybrid = Path::new("/sys/fs/cgroup/unified/cgroup.controllers").exists();
    if Cluster::is_ours() && is_hybrid { "/host/cgroup/unified" } else { "/host/cgroup" }
}

/// Loads an image of the agent that the tests were built with into every node, and returns its name.
fn load() -> Result<String> {
    let archive = env::temp_dir().join(format!("malla-{}-agent.tar", std::process::id()));
    let mut make = xtask()?;
    make.args(["image", "--of"]).arg(binary()?).arg("--out").arg(&archive);
    let said = read(&mut make)?;
    let put = load_archive(archive.as_os_str());
    fs::remove_file(&archive).context("remove the archive")?;
    put?;
    super::image_name(&said, &archive)
}
