//! Cleaning up after a program that could not do so itself: killed, ended by Ctrl-C (as Rust's test
//! runner is), or aborted by a panic (the release profile does not unwind).

use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result};

use crate::cgroup;

/// Waits for the end of its input, which is that of the program however it comes, and removes what
/// is left of what the program made: processes first, for they hold the rest.
const SCRIPT: &str = r#"
cat >/dev/null
for cgroup in "$2"/malla-"$1"-*; do
    [ -d "$cgroup" ] || continue
    echo 1 >"$cgroup/cgroup.kill"
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        rmdir "$cgroup" && break
        sleep 0.1
    done
done
for netns in /run/netns/malla-"$1"-*; do
    [ -e "$netns" ] && ip netns delete "${netns##*/}"
done
for dir in "$3"/malla-"$1"-*; do
    [ -e "$dir" ] || continue
    while read -r _ at _; do
        case "$at" in "$dir"/*) umount --lazy "$at" ;; esac
    done </proc/self/mounts
    rm -rf --one-file-system "$dir"
done
"#;

/// A small process that watches over another one.
#[derive(Debug)]
pub(crate) struct Guard(Child);

impl Guard {
    /// Starts the watch over this process, unless there is one already. To be called before anything is
    /// made.
    ///
    /// # Errors
    ///
    /// Fails if the process cannot be started.
    pub(crate) fn over_this_process() -> Result<()> {
        // Kept until the process is gone, since it is the process that is watched: its input ends then.
        static GUARD: Mutex<Option<Guard>> = Mutex::new(None);
        let mut guard = GUARD.lock().unwrap_or_else(PoisonError::into_inner);
        if guard.is_none() {
            *guard = Some(Self::watch(std::process::id())?);
        }
        Ok(())
    }

    fn watch(pid: u32) -> Result<Self> {
        let mut command = Command::new("sh");
        command.args(["-c", SCRIPT, "malla-guard", &pid.to_string()]);
        command.arg(cgroup::root()?).arg(std::env::temp_dir());
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        // Ctrl-C on the terminal must not end the guard before the one it guards.
        command.process_group(0);
        Ok(Self(command.spawn().context("start the guard")?))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The end of its input; what was made is gone by now, so it ends at once.
        drop(self.0.stdin.take());
        self.0.wait().ok();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_a_dead_program_left_is_removed_and_what_others_have_is_not() -> Result<()> {
        // No process has these ids: they are beyond the kernel's largest (2^22).
        let [dead, other] = [1, 2].map(|nth| 4_194_304 + std::process::id() * 2 + nth);
        let dir = |pid| std::env::temp_dir().join(format!("malla-{pid}-0"));
        for pid in [dead, other] {
            fs::create_dir_all(dir(pid).join("node-a"))?;
        }

        drop(Guard::watch(dead)?);

        assert!(!dir(dead).exists());
        assert!(dir(other).exists());
        fs::remove_dir_all(dir(other)).context("remove what the test made")
    }
}
