//! The cgroup whose processes the agents under test capture.
//!
//! A socket belongs to the cgroup that its process was in when it was made. Tests act as pods from
//! threads of their own process, so the whole process has to be inside. All meshes of a process
//! therefore share one cgroup; pods are told apart by their network namespaces, as always.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::wait;

static SHARED: Mutex<Weak<Cgroup>> = Mutex::new(Weak::new());

/// A cgroup that this process is in while it lives.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// Where the process was before.
    before: PathBuf,
}

impl Cgroup {
    /// Moves this process into a cgroup of its own, unless it is there already.
    ///
    /// # Errors
    ///
    /// Fails without cgroup v2 or the privilege to change it.
    pub fn join() -> Result<Arc<Self>> {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cgroup) = shared.upgrade() {
            return Ok(cgroup);
        }
        let root = root()?;
        let path = root.join(format!("malla-{}-pods", std::process::id()));
        // A previous one of this process may be on its way out in another thread.
        if !path.is_dir() {
            fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        }
        let cgroup = Arc::new(Self { path, before: own(&root)? });
        enter(&cgroup.path)?;
        *shared = Arc::downgrade(&cgroup);
        Ok(cgroup)
    }

    /// What `--cgroup` means.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _still_alone = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        enter(&self.before).ok();
        // Children that were just killed leave a moment later.
        wait::until(Duration::from_secs(5), "the cgroup to be empty", || {
            fs::remove_dir(&self.path).is_ok()
        })
        .ok();
    }
}

/// Where cgroup v2 is mounted: `/sys/fs/cgroup`, or beside version 1 `/sys/fs/cgroup/unified`.
///
/// # Errors
///
/// Fails if it is mounted nowhere.
pub(crate) fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read mountinfo")?;
    // `36 35 98:0 / /mnt rw - type source options`: proc_pid_mountinfo(5).
    let mut cgroup2 = mounts.lines().filter_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        after.starts_with("cgroup2 ").then(|| before.split(' ').nth(4))?
    });
    Ok(cgroup2.next().context("cgroup v2 is not mounted")?.into())
}

fn own(root: &Path) -> Result<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").context("read /proc/self/cgroup")?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/")).context("no cgroup v2")?;
    Ok(root.join(path))
}

fn enter(cgroup: &Path) -> Result<()> {
    let file = cgroup.join("cgroup.procs");
    fs::write(&file, std::process::id().to_string())
        .with_context(|| format!("write {}", file.display()))
}
