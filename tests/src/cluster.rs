//! A real Kubernetes cluster, as `cargo xtask cluster` makes it or as somebody else has it.
//!
//! `cargo xtask test` starts one for the tests that need it and ends it after them; the environment
//! says which one it is. Every test has a namespace of its own, and may run beside others.

mod agents;
mod api;
mod deployment;
mod house;
mod load;
mod process;
mod shop;
mod signer;

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

pub use self::agents::Agents;
pub use self::deployment::{Deployment, User};
pub use self::house::{OwnAgents, SharedAgents};
pub use self::load::ANSWERS;
pub use self::process::{Frozen, Outage, PodProcess, Stopped};
pub use self::shop::{SERVERS, Shop, enabled, host, service_of_pods};
pub use self::signer::SignerProcess;
use crate::guard::Guard;
use crate::wait;

/// Until a pod is ready: its image is unpacked on a node that others use too.
const POD_LIMIT: Duration = Duration::from_secs(60);

/// A namespace in a cluster, removed with all that is in it when dropped.
#[derive(Debug)]
pub struct Cluster {
    kubeconfig: PathBuf,
    namespace: String,
    /// Whether the namespace was made by this value, and goes with it.
    is_ours: bool,
}

impl Cluster {
    /// The exit codes of a `curl` that is refused at once: it cannot connect, or the reset comes when it sends or
    /// receives.
    pub const REFUSED: [i32; 3] = [7, 55, 56];

    /// Why there is no cluster for this test, if that is so.
    pub fn missing() -> Option<String> {
        if let Ok(why) = env::var("MALLA_NO_CLUSTER") {
            return Some(why);
        }
        let none = env::var_os("MALLA_KUBECONFIG").is_none();
        none.then(|| "needs a cluster: cargo xtask e2e --file cluster starts one".to_owned())
    }

    /// Whether it is one that `cargo xtask cluster` made, of which more is known.
    pub fn is_ours() -> bool {
        env::var_os("MALLA_OWN_CLUSTER").is_some()
    }

    /// Makes a namespace in the cluster.
    ///
    /// # Errors
    ///
    /// Fails with what `kubectl` says.
    pub fn namespace() -> Result<Self> {
        static NTH: AtomicUsize = AtomicUsize::new(0);
        // It removes what `kubectl` remembers, and an archive that a killed test was loading.
        Guard::over_this_process()?;
        let nth = NTH.fetch_add(1, Ordering::Relaxed);
        let this = Self {
            kubeconfig: env::var_os("MALLA_KUBECONFIG").context("no cluster")?.into(),
            namespace: format!("malla-test-{}-{nth}", std::process::id()),
            is_ours: true,
        };
        this.kubectl(&["create", "namespace", &this.namespace])?;
        // A pod is refused until its namespace has that.
        wait::until(wait::SOON, "the namespace's service account", || {
            this.kubectl(&["get", "serviceaccount", "default"]).is_ok()
        })?;
        Ok(this)
    }

    /// A namespace that is about to be made, and goes with this value.
    pub(crate) fn named(namespace: &str) -> Result<Self> {
        Guard::over_this_process()?;
        let kubeconfig = env::var_os("MALLA_KUBECONFIG").context("no cluster")?.into();
        Ok(Self { kubeconfig, namespace: namespace.to_owned(), is_ours: true })
    }

    /// The name of the namespace.
    pub fn name(&self) -> &str {
        &self.namespace
    }

    /// Runs `kubectl` in the namespace, and returns what it prints.
    ///
    /// # Errors
    ///
    /// Fails with what it says.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        let mut command = self.command();
        read(command.args(args).stdin(Stdio::null()))
    }

    /// Makes or changes objects.
    ///
    /// # Errors
    ///
    /// Fails with what `kubectl` says.
    pub fn apply(&self, object: &Value) -> Result<()> {
        let mut command = self.command();
        fed(command.args(["apply", "--filename", "-"]), &object.to_string()).map(drop)
    }

    /// Makes many objects, which must be new: in half the requests.
    ///
    /// # Errors
    ///
    /// Fails with what `kubectl` says.
    pub fn create_all(&self, objects: &[Value]) -> Result<()> {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        let mut command = self.command();
        fed(command.args(["create", "--filename", "-"]), &list.to_string()).map(drop)
    }

    /// Asks for a pod to be evicted, as `kubectl drain` does.
    ///
    /// # Errors
    ///
    /// Fails with what the API server says, such as that a PodDisruptionBudget does not allow it.
    pub fn evict(&self, pod: &str) -> Result<()> {
        let eviction = json!({
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod, "namespace": self.namespace},
        });
        let path = format!("/api/v1/namespaces/{}/pods/{pod}/eviction", self.namespace);
        let mut command = self.command();
        command.args(["create", "--raw", &path, "--filename", "-"]);
        fed(&mut command, &eviction.to_string()).map(drop)
    }

    /// Annotates the namespace.
    ///
    /// # Errors
    ///
    /// Fails with what `kubectl` says.
    pub fn annotate(&self, annotations: &Value) -> Result<()> {
        self.apply(&json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": self.namespace, "annotations": annotations},
        }))
    }

    /// The names of the nodes that take pods.
    ///
    /// # Errors
    ///
    /// Fails with what `kubectl` says.
    pub fn nodes(&self) -> Result<Vec<String>> {
        let nodes = self.get(&["nodes"])?;
        let nodes = nodes["items"].as_array().context("no nodes")?.iter();
        let free = nodes.filter(|node| node["spec"]["taints"].is_null());
        Ok(free.filter_map(|node| Some(node["metadata"]["name"].as_str()?.to_owned())).collect())
    }

    /// Two nodes that take pods.
    ///
    /// # Errors
    ///
    /// Fails if there are less.
    pub fn two_nodes(&self) -> Result<[String; 2]> {
        let mut nodes = self.nodes()?.into_iter();
        Ok([nodes.next().context("no node")?, nodes.next().context("only one node")?])
    }

    /// Starts a pod of `spec`, with the label `app: <name>`, on `node`. The spec may leave the
    /// name of its only container out.
    ///
    /// # Errors
    ///
    /// Fails with what `kubectl` says.
    pub fn start(&self, name: &str, node: &str, spec: Value) -> Result<()> {
        self.start_as(name, name, node, spec)
    }

    /// The same with the label `app: <app>`.
    ///
    /// # Errors
    ///
    /// Fails with what `kubectl` says.
    pub fn start_as(&self, name: &str, app: &str, node: &str, mut spec: Value) -> Result<()> {
        spec["nodeName"] = json!(node);
        // Nothing that a test runs needs to be asked twice to end.
        spec["terminationGracePeriodSeconds"] = json!(1);
        for container in spec["containers"].as_array_mut().into_iter().flatten() {
            if container["name"].is_null() {
                container["name"] = json!("main");
            }
            container["imagePullPolicy"] = json!("IfNotPresent");
        }
        self.apply(&json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"app": app}},
            "spec": spec,
        }))
    }

    /// Waits until a pod is ready.
    ///
    /// # Errors
    ///
    /// Fails, with what happened to it, if it does not become so.
    pub fn ready(&self, pod: &str) -> Result<()> {
        self.ready_within(POD_LIMIT, pod)
    }

    /// The same where something is known to keep a pod from it.
    ///
    /// # Errors
    ///
    /// Fails, with what happened to it, if it does not become so.
    pub fn ready_within(&self, limit: Duration, pod: &str) -> Result<()> {
        let limit = format!("--timeout={}s", limit.as_secs());
        let waited = self.kubectl(&["wait", "--for=condition=Ready", &limit, "pod", pod]);
        if let Err(error) = waited {
            let told = self.kubectl(&["describe", "pod", pod]).unwrap_or_default();
            bail!("{error:#}\n{told}");
        }
        Ok(())
    }

    /// Starts a pod with `curl` that waits to be told what to do by [`Cluster::exec`], and waits until
    /// it is ready. (The `wget` of a static busybox crashes when it looks for the C library's modules.)
    ///
    /// # Errors
    ///
    /// Fails if the image cannot be loaded, or the pod does not become ready.
    pub fn client(&self, name: &str, node: &str) -> Result<()> {
        let image = Self::load("curl")?;
        let command = ["sleep", "3600"];
        self.start(name, node, json!({"containers": [{"image": image, "command": command}]}))?;
        self.ready(name)
    }

    /// Runs a command in a pod, and returns what it prints.
    ///
    /// # Errors
    ///
    /// Fails with what it says.
    pub fn exec(&self, pod: &str, command: &[&str]) -> Result<String> {
        self.kubectl(&[&["exec", pod, "--"], command].concat())
    }

    /// The same, whatever the command's exit code.
    ///
    /// # Errors
    ///
    /// Fails if `kubectl` cannot be started.
    pub fn exec_output(&self, pod: &str, command: &[&str]) -> Result<Output> {
        let mut kubectl = self.command();
        kubectl.args(["exec", pod, "--"]).args(command).stdin(Stdio::null());
        kubectl.output().context("start kubectl")
    }

    /// Loads one of the images of `cargo xtask image --program` into every node, once, and returns the
    /// name that pods use.
    ///
    /// # Errors
    ///
    /// Fails with what the program that loads it says.
    pub fn load(program: &str) -> Result<String> {
        static LOADED: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());
        let mut loaded = LOADED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((_, image)) = loaded.iter().find(|(known, _)| known == program) {
            return Ok(image.clone());
        }
        let archive = env::temp_dir().join(format!("malla-{}-{program}.tar", std::process::id()));
        let mut make = xtask()?;
        make.args(["image", "--program", program, "--out"]).arg(&archive);
        let said = read(&mut make)?;
        let name = image_name(&said, &archive)?;
        let put = load_archive(archive.as_os_str());
        fs::remove_file(&archive).context("remove the archive")?;
        put?;
        loaded.push((program.to_owned(), name.clone()));
        Ok(name)
    }

    fn command(&self) -> Command {
        let program = env::var_os("MALLA_KUBECTL").unwrap_or_else(|| "kubectl".into());
        let mut command = Command::new(program);
        command.arg("--kubeconfig").arg(&self.kubeconfig);
        // What it remembers of the API is shared by all tests, and in nobody's home.
        let cache = env::temp_dir().join(format!("malla-{}-kubectl", std::process::id()));
        command.arg("--cache-dir").arg(cache);
        command.args(["--namespace", &self.namespace]);
        // It lives for a tenth of a second, a third of which it would spend on collecting garbage.
        command.env("GOGC", "off");
        command
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.is_ours {
            self.kubectl(&["delete", "namespace", &self.namespace, "--wait=false"]).ok();
        }
    }
}

/// `cargo xtask`, as it was built with the tests.
///
/// # Errors
///
/// Fails if it cannot be found.
pub fn xtask() -> Result<Command> {
    if let Some(xtask) = env::var_os("MALLA_XTASK") {
        return Ok(Command::new(xtask));
    }
    let this = env::current_exe().context("find this program")?;
    let target = this.ancestors().nth(2).context("no target directory")?;
    Ok(Command::new(target.join("xtask")))
}

/// What xtask says that the image in `archive` is called.
fn image_name(said: &str, archive: &Path) -> Result<String> {
    let name = said.lines().find_map(|line| {
        line.strip_prefix("image: ")?.strip_suffix(&format!(" in {}", archive.display()))
    });
    Ok(name.context("xtask does not say what the image is called")?.to_owned())
}

fn load_archive(archive: &OsStr) -> Result<()> {
    let load = env::var("MALLA_LOAD_IMAGE").context("no --load-image for this cluster")?;
    let mut words = load.split_whitespace();
    let mut command = Command::new(words.next().context("an empty --load-image")?);
    read(command.args(words).arg(archive)).map(drop)
}

fn read(command: &mut Command) -> Result<String> {
    let name = command.get_program().display().to_string();
    let output = command.output().with_context(|| format!("start {name}"))?;
    succeeded(&format!("{command:?}"), &output)?;
    String::from_utf8(output.stdout).with_context(|| format!("read what {name} printed"))
}

/// What a command prints that reads `input`.
fn fed(command: &mut Command, input: &str) -> Result<Vec<u8>> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("start {command:?}"))?;
    let written = child.stdin.take().context("no stdin")?.write_all(input.as_bytes());
    let output = child.wait_with_output().with_context(|| format!("wait for {command:?}"))?;
    succeeded(&format!("{command:?}"), &output)?;
    written.with_context(|| format!("write to {command:?}"))?;
    Ok(output.stdout)
}

fn succeeded(what: &str, output: &Output) -> Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    let printed = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{what}: {}: {}{}", output.status, printed, said.trim());
    Ok(())
}
