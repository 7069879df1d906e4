//! The cgroup whose processes the agents under test capture.
//!
//! A socket belongs to the cgroup that its process was in when it was made. Tests act as pods from
//! threads of their own process, so the whole process has to be inside. All meshes of a process
//! therefore share one cgroup; pods are told apart by their network namespaces, as always.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::wait;

/// Entered and left under this lock: who comes while the last one leaves waits until it is gone.
static SHARED: Mutex<Option<Shared>> = Mutex::new(None);

#[derive(Debug)]
struct Shared {
    /// How many [`Cgroup`]s there are, at least one.
    users: usize,
    path: PathBuf,
    /// Where the process was before.
    before: PathBuf,
}

/// A cgroup that this process is in while it lives.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Moves this process into a cgroup of its own, unless it is there already.
    ///
    /// # Errors
    ///
    /// Fails without cgroup v2 or the privilege to change it.
    pub fn join() -> Result<Self> {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = &mut *shared {
            shared.users += 1;
            return Ok(Self { path: shared.path.clone() });
        }
        let root = root()?;
        let path = root.join(format!("malla-{}-pods", std::process::id()));
        // A previous one of this process may still be there: what was killed in it had yet to end.
        if !path.is_dir() {
            fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        }
        let before = own(&root)?;
        enter(&path)?;
        *shared = Some(Shared { users: 1, path: path.clone(), before });
        Ok(Self { path })
    }

    /// What `--cgroup` means.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mut left) = shared.take() else { return };
        left.users -= 1;
        if left.users > 0 {
            *shared = Some(left);
            return;
        }
        enter(&left.before).ok();
        // Children that were just killed leave a moment later.
        wait::until(Duration::from_secs(5), "the cgroup to be empty", || {
            fs::remove_dir(&left.path).is_ok()
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

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn who_enters_while_another_one_leaves_is_inside() -> Result<()> {
        crate::require!();
        let root = root()?;
        let before = own(&root)?;
        thread::scope(|scope| {
            let one = || -> Result<()> {
                for _ in 0..200 {
                    let cgroup = Cgroup::join()?;
                    assert_eq!(own(&root)?, cgroup.path());
                }
                Ok(())
            };
            let all = [(); 4].map(|()| scope.spawn(one));
            all.into_iter().try_for_each(|one| one.join().unwrap())
        })?;
        assert_eq!(own(&root)?, before, "all have left");
        Ok(())
    }
}
