//! Which clusters there are: the directory of each, with a file that says whose it is.
//!
//! A cluster is called after the process that keeps it, as everything that this project makes on a
//! machine: `malla-<pid>-cluster` among the temporary files, namespaces and cgroups `malla-<pid>-…`.
//! All its processes end with that one. A process id is used again some day, so the file also tells
//! when the process started, and nothing is ended that started at another time.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::process::started;
use crate::{clean, privilege, root, this};

const FILE: &str = "state";

/// How long a killed process may take to be gone, with all that die along.
const GONE: Duration = Duration::from_secs(20);

/// A cluster, running or left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cluster {
    /// The process that keeps it.
    pub(crate) pid: u32,
    /// When that started, in clock ticks since boot: proc_pid_stat(5), field 22.
    started: u64,
    /// The checkout that calls it its own.
    checkout: Option<PathBuf>,
    /// Which of the checkout's it is: the one of `cluster up`, and of the first file of tests, has no name, and others
    /// that tests start beside it have one (`MALLA_CLUSTER`).
    which: Option<String>,
    /// How many nodes it has.
    pub(crate) nodes: usize,
    /// Where all its files are.
    pub(crate) dir: PathBuf,
}

impl Cluster {
    /// Makes the directory of a cluster that this process will keep.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be made.
    pub(crate) fn begin(
        nodes: usize,
        checkout: Option<PathBuf>,
        which: Option<String>,
    ) -> Result<Self> {
        let pid = std::process::id();
        let started = started(pid).context("read when this process started")?;
        let dir = std::env::temp_dir().join(format!("malla-{pid}-cluster"));
        let this = Self { pid, started, checkout, which, nodes, dir };
        fs::create_dir(&this.dir).with_context(|| format!("create {}", this.dir.display()))?;
        let mut text = format!("PID={pid}\nSTARTED={started}\nNODES={nodes}\n");
        if let Some(checkout) = &this.checkout {
            text.push_str(&format!("CHECKOUT={}\n", checkout.display()));
        }
        if let Some(which) = &this.which {
            text.push_str(&format!("WHICH={which}\n"));
        }
        fs::write(this.dir.join(FILE), text).context("write the state file")?;
        Ok(this)
    }

    /// The running cluster of this checkout, `which` of several.
    ///
    /// # Errors
    ///
    /// Fails if the directories cannot be read.
    pub(crate) fn of_this_checkout(which: Option<&str>) -> Result<Option<Self>> {
        let root = Some(root()?);
        let is_it = |cluster: &Self| {
            cluster.checkout == root && cluster.which.as_deref() == which && cluster.is_alive()
        };
        Ok(all()?.into_iter().find(is_it))
    }

    /// Those whose keeper is gone, of any checkout.
    ///
    /// # Errors
    ///
    /// Fails if the directories cannot be read.
    pub(crate) fn left() -> Result<Vec<Self>> {
        Ok(all()?.into_iter().filter(|cluster| !cluster.is_alive()).collect())
    }

    /// Whether the process that keeps it is the one that started it.
    pub(crate) fn is_alive(&self) -> bool {
        started(self.pid) == Some(self.started)
    }

    /// The name of something of its: a namespace, a cgroup.
    pub(crate) fn name(&self, what: &str) -> String {
        format!("malla-{}-{what}", self.pid)
    }

    /// The namespace of `what`.
    pub(crate) fn netns(&self, what: &str) -> PathBuf {
        Path::new("/run/netns").join(self.name(what))
    }

    /// What administrators use.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.dir.join("admin.conf")
    }

    /// The socket of a node's containerd.
    pub(crate) fn containerd(&self, node: usize) -> PathBuf {
        self.dir.join(format!("node-{node}/containerd/containerd.sock"))
    }

    /// Ends it, if it still runs, and removes all of it.
    ///
    /// # Errors
    ///
    /// Fails if something is left.
    pub(crate) fn end(&self) -> Result<()> {
        if self.is_alive() {
            let mut kill = privilege::command("kill")?;
            kill.args(["-KILL", &self.pid.to_string()]);
            ensure!(kill.status().context("start kill")?.success(), "kill {}", self.pid);
            let deadline = Instant::now() + GONE;
            while self.is_alive() {
                ensure!(Instant::now() < deadline, "process {} does not end", self.pid);
                thread::sleep(Duration::from_millis(20));
            }
        }
        // As root, which may be another process than this one.
        let mut clean = privilege::command(this()?)?;
        clean.args(["clean", "--pid", &self.pid.to_string()]);
        let output = clean.output().context("start cargo xtask clean")?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "clean up after {}:\n{said}", self.pid);
        ensure!(!self.dir.exists(), "{} is left:\n{said}", self.dir.display());
        Ok(())
    }

    /// Removes everything but this process, which keeps it.
    ///
    /// # Errors
    ///
    /// Fails if something is left.
    pub(crate) fn remove_own(&self) -> Result<()> {
        if self.pid != std::process::id() {
            bail!("process {} keeps this cluster", self.pid);
        }
        clean::own()
    }

    fn read(dir: &Path) -> Option<Self> {
        // Anybody may make files among the temporary ones: only root's say what root should kill.
        let owner = fs::metadata(dir.join(FILE)).ok()?.uid();
        if owner != 0 {
            return None;
        }
        let text = fs::read_to_string(dir.join(FILE)).ok()?;
        let value =
            |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        Some(Self {
            pid: value("PID")?.parse().ok()?,
            started: value("STARTED")?.parse().ok()?,
            nodes: value("NODES")?.parse().ok()?,
            checkout: value("CHECKOUT").map(PathBuf::from),
            which: value("WHICH").map(str::to_owned),
            dir: dir.to_owned(),
        })
    }
}

fn all() -> Result<Vec<Cluster>> {
    let temp = std::env::temp_dir();
    let entries = fs::read_dir(&temp).with_context(|| format!("read {}", temp.display()))?;
    let dirs = entries.flatten().map(|entry| entry.path());
    let named = dirs.filter(|dir| dir.to_string_lossy().ends_with("-cluster"));
    Ok(named.filter_map(|dir| Cluster::read(&dir)).collect())
}

/// The text of a file that only root may read.
///
/// # Errors
///
/// Fails if root cannot either.
pub(crate) fn read_as_root(file: &Path) -> Result<String> {
    if let Ok(text) = fs::read_to_string(file) {
        return Ok(text);
    }
    let mut cat = privilege::command("cat")?;
    let output = cat.arg(file).output().context("start cat")?;
    ensure!(output.status.success(), "read {}", file.display());
    String::from_utf8(output.stdout).with_context(|| format!("read {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_is_the_same_only_while_its_start_is() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let cluster = Cluster {
            pid: child.id(),
            started: started(child.id()).unwrap(),
            checkout: None,
            which: None,
            nodes: 1,
            dir: "/x".into(),
        };
        assert!(cluster.is_alive());
        assert!(!Cluster { started: cluster.started + 1, ..cluster.clone() }.is_alive());
        child.kill().unwrap();
        // Not waited for yet: a zombie keeps nothing.
        let deadline = Instant::now() + GONE;
        while cluster.is_alive() && Instant::now() < deadline {
            thread::yield_now();
        }
        assert!(!cluster.is_alive());
        child.wait().unwrap();
        assert!(!cluster.is_alive());
    }
}
