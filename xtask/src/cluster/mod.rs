//! `cargo xtask cluster`: a real Kubernetes cluster on this machine, every node in namespaces of it.
//!
//! Each node has its own kubelet, containerd, CNI and kube-proxy; nothing is mocked, and no container
//! engine or virtual machine is needed. Everything is called `malla-<pid>-…` after the process that
//! keeps it ([`keep`]), lies in namespaces and cgroups of its own, and is gone with it.

mod certificates;
mod control;
mod forward;
mod keep;
mod net;
mod node;
mod outage;
mod state;
pub(crate) mod tested;
pub(crate) mod tools;

use std::env;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, Subcommand};

use self::state::Cluster;
use crate::process::attached;
use crate::{image, privilege, root, say, this};

/// The environment variable that says which of its clusters a checkout means. Nobody but tests needs it.
pub(crate) const WHICH: &str = "MALLA_CLUSTER";

/// What the keeper says when the cluster can be used.
const READY: &str = "cluster: ready";

/// Nodes, unless something else is asked for.
const NODES: usize = 2;

/// `cargo xtask cluster …`.
#[derive(Debug, Subcommand)]
pub(crate) enum Task {
    /// Start a cluster, after building its programs if they are not in the cache, and print how to
    /// use it. It runs until `down`.
    Up(Up),
    /// End this checkout's cluster and remove all of it, also after a crash.
    Down,
    /// Show this checkout's cluster.
    Status,
    /// Load an image into every node.
    Load(Load),
    /// Take the API server away, or bring it back: what the rest does meanwhile.
    #[command(subcommand)]
    ApiServer(outage::Task),
    #[command(hide = true)]
    Keep(keep::Keep),
    #[command(hide = true)]
    Forward(forward::Forward),
    #[command(hide = true)]
    Ask(forward::Ask),
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    /// How many nodes, 1 to 9.
    #[arg(long, default_value_t = NODES)]
    nodes: usize,
}

#[derive(Debug, Args)]
pub(crate) struct Load {
    /// An OCI archive, or the name of one that the tests use (`cargo xtask image --help`).
    image: PathBuf,
}

impl Task {
    pub(crate) fn run(&self) -> Result<()> {
        match self {
            Self::Up(up) => up.run(),
            Self::Down => down(),
            Self::Status => status(),
            Self::Load(load) => load.run(),
            Self::ApiServer(outage) => outage.run(),
            Self::Keep(keep) => keep.run(),
            Self::Forward(forward) => forward.run(),
            Self::Ask(ask) => ask.run(),
        }
    }
}

impl Up {
    fn run(&self) -> Result<()> {
        if let Some(missing) = tools::missing() {
            return say_skipped(&missing);
        }
        if meant()?.is_some() {
            say("cluster: one runs already; `cargo xtask cluster down` ends it");
        } else {
            start(self.nodes, Life::Detached, which().as_deref())?;
        }
        say(&format!("export KUBECONFIG={}", kubeconfig(which().as_deref())?.display()));
        say(&format!("export PATH={}:$PATH", tools::KUBERNETES.dir()?.display()));
        Ok(())
    }
}

/// A machine without Go cannot have a cluster, and that must not be overlooked.
fn say_skipped(missing: &str) -> Result<()> {
    bail!("SKIPPED: no cluster here: {missing}")
}

/// How long a cluster lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    /// Until `down`.
    Detached,
    /// As long as this process.
    Bound,
}

/// A cluster that ends with this value, or with this process however that ends.
#[derive(Debug)]
pub(crate) struct Bound {
    child: Child,
    which: Option<String>,
}

impl Bound {
    /// Starts one, `which` of this checkout's.
    ///
    /// # Errors
    ///
    /// Fails, with the logs, if it does not become ready.
    pub(crate) fn start(which: Option<&str>) -> Result<Self> {
        let child = start(NODES, Life::Bound, which)?;
        Ok(Self { child, which: which.map(str::to_owned) })
    }

    /// Ends it.
    ///
    /// # Errors
    ///
    /// Fails if something of it could not be removed.
    pub(crate) fn end(mut self) -> Result<()> {
        drop(self.child.stdin.take());
        let status = self.child.wait().context("wait for the cluster's keeper")?;
        ensure!(status.success(), "the cluster's keeper: {status}");
        forget_kubeconfig(self.which.as_deref())
    }
}

/// Whoever calls may have given this process more than its terminal, such as a lock, and a cluster
/// would hold it as long as it runs.
const WITHOUT_INHERITED: &str = r#"exec "$0" "$@" 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-"#;

/// Starts a keeper and waits until its cluster is ready.
fn start(nodes: usize, life: Life, which: Option<&str>) -> Result<Child> {
    ensure!((1..=net::MAX_NODES).contains(&nodes), "1 to {} nodes", net::MAX_NODES);
    tools::ready()?;
    clear()?;
    say(&format!("cluster: starting, {nodes} nodes"));
    let started = std::time::Instant::now();
    let mut keep = privilege::command("sh")?;
    keep.args(["-c", WITHOUT_INHERITED]).arg(this()?);
    keep.args(["cluster", "keep", "--nodes", &nodes.to_string(), "--checkout"]).arg(root()?);
    keep.args(which.map(|which| format!("--which={which}")));
    keep.stdout(Stdio::piped()).stderr(Stdio::null()).stdin(Stdio::null());
    if life == Life::Bound {
        keep.arg("--bound").stdin(Stdio::piped()).stderr(Stdio::inherit());
    }
    // Not in the terminal's foreground: Ctrl-C is for whoever waits, and the keeper then cleans up.
    let mut keeper = keep.process_group(0).spawn().context("start the cluster's keeper")?;
    let output = BufReader::new(keeper.stdout.take().context("no output")?);
    for line in output.lines() {
        let line = line.context("read what the keeper says")?;
        if line == READY {
            let cluster = Cluster::of_this_checkout(which)?;
            remember_kubeconfig(&cluster.context("a cluster without a state file")?, which)?;
            say(&format!("{READY} after {:.1} s", started.elapsed().as_secs_f32()));
            return Ok(keeper);
        }
        say(&line);
    }
    bail!("the cluster did not become ready")
}

/// Removes what killed keepers have left. One at a time: clusters may be started side by side.
fn clear() -> Result<()> {
    static CLEARING: Mutex<()> = Mutex::new(());
    let _one = CLEARING.lock().unwrap_or_else(PoisonError::into_inner);
    for left in Cluster::left()? {
        say(&format!("cluster: removing what process {} left", left.pid));
        left.end()?;
    }
    Ok(())
}

fn down() -> Result<()> {
    let running = meant()?;
    let left = Cluster::left()?;
    for cluster in running.iter().chain(&left) {
        cluster.end()?;
        say(&format!("cluster: removed {}", cluster.name("…")));
    }
    if running.is_none() && left.is_empty() {
        say("cluster: none was there");
    }
    forget_kubeconfig(which().as_deref())
}

fn status() -> Result<()> {
    let Some(cluster) = meant()? else {
        say("cluster: this checkout has none");
        return Ok(());
    };
    say(&format!("cluster: kept by process {}, logs in {}", cluster.pid, cluster.dir.display()));
    let kubeconfig = kubeconfig(which().as_deref())?;
    say(&format!("export KUBECONFIG={}", kubeconfig.display()));
    let mut kubectl = std::process::Command::new(tools::KUBERNETES.program("kubectl")?);
    kubectl.arg("--kubeconfig").arg(kubeconfig);
    kubectl.args(["get", "nodes,pods", "--all-namespaces", "--output", "wide"]);
    attached(kubectl)
}

impl Load {
    fn run(&self) -> Result<()> {
        let cluster = meant()?.context("this checkout has no cluster")?;
        let archive = match self.image.to_str().and_then(image::by_name) {
            Some(image) => image.archive()?,
            None => self.image.clone(),
        };
        ensure!(archive.is_file(), "{} is no archive", archive.display());
        let mut imports = Vec::new();
        for node in 1..=cluster.nodes {
            let mut import = privilege::command(tools::CONTAINERD.program("ctr")?)?;
            import.arg("--address").arg(cluster.containerd(node));
            import.args(["--namespace", "k8s.io", "images", "import"]);
            // Or the kubelet does not see it.
            import.args(["--label", "io.cri-containerd.image=managed"]).arg(&archive);
            // It always has something to say, which matters only when it fails.
            import.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
            imports.push((node, import.spawn().context("start ctr")?));
        }
        // Every one is waited for, also when one of them fails.
        let ends = imports.into_iter().map(|(node, import)| (node, import.wait_with_output()));
        for (node, end) in ends.collect::<Vec<_>>() {
            let end = end.context("wait for ctr")?;
            let said = String::from_utf8_lossy(&end.stderr);
            let archive = archive.display();
            ensure!(end.status.success(), "node-{node} does not take {archive}: {}", said.trim());
        }
        Ok(())
    }
}

fn which() -> Option<String> {
    env::var(WHICH).ok().filter(|which| !which.is_empty())
}

/// The running cluster of this checkout that is meant.
fn meant() -> Result<Option<Cluster>> {
    Cluster::of_this_checkout(which().as_deref())
}

/// Where whoever works in this checkout finds the way to its cluster, `which` of several.
pub(crate) fn kubeconfig(which: Option<&str>) -> Result<PathBuf> {
    let name = which.map_or_else(|| "kubeconfig".to_owned(), |which| format!("kubeconfig-{which}"));
    Ok(root()?.join("target/cluster").join(name))
}

fn remember_kubeconfig(cluster: &Cluster, which: Option<&str>) -> Result<()> {
    let file = kubeconfig(which)?;
    let dir = file.parent().context("the file is in a directory")?;
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    certificates::private(&file, &state::read_as_root(&cluster.kubeconfig())?)
}

fn forget_kubeconfig(which: Option<&str>) -> Result<()> {
    let file = kubeconfig(which)?;
    if file.exists() {
        fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))?;
    }
    Ok(())
}
