//! A network namespace: a node, or a pod.

use std::fs::{self, File};
use std::io::Write as _;
use std::panic;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use anyhow::{Context as _, Result, ensure};

use crate::sys;

/// A named network namespace, removed when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes the namespace `name`, with its loopback up and both families ready at once.
    ///
    /// # Errors
    ///
    /// Fails without the privilege, or if the name is taken.
    pub fn new(name: &str) -> Result<Self> {
        ip(None, &format!("netns add {name}\n"))?;
        let this = Self { name: name.to_owned() };
        this.run(|| {
            // An address that waits a second for duplicates is a test that waits a second.
            sysctl("net/ipv6/conf/all/accept_dad", "0")?;
            sysctl("net/ipv6/conf/default/accept_dad", "0")
        })?;
        this.ip("link set lo up\n")?;
        Ok(this)
    }

    /// Its name, for `ip netns exec`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it can be opened.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Runs `f` on a thread of its own inside the namespace: `setns` moves one thread, and a test
    /// runner's threads are shared. A panic of `f` goes on in the caller.
    ///
    /// # Errors
    ///
    /// Fails if the namespace cannot be entered, or with the error of `f`.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = File::open(self.path()).with_context(|| format!("open netns {}", self.name))?;
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                sys::enter_netns(&file).with_context(|| format!("enter netns {}", self.name))?;
                f()
            });
            inside.join().unwrap_or_else(|panicked| panic::resume_unwind(panicked))
        })
    }

    /// Starts `command` inside the namespace.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be started.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        self.run(|| {
            // A child inherits what this process blocks in order to clean up after Ctrl-C.
            sys::unblock_interrupts(command);
            command.spawn().with_context(|| format!("start {}", command.get_program().display()))
        })
    }

    /// Lets packets pass from one interface to another.
    ///
    /// # Errors
    ///
    /// Fails if the setting cannot be written.
    pub(crate) fn forward(&self) -> Result<()> {
        self.run(|| {
            sysctl("net/ipv4/ip_forward", "1")?;
            sysctl("net/ipv6/conf/all/forwarding", "1")
        })
    }

    /// Runs `ip` commands inside the namespace, one a line.
    ///
    /// # Errors
    ///
    /// Fails with what `ip` says.
    pub fn ip(&self, batch: &str) -> Result<()> {
        ip(Some(&self.name), batch)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // What still lives inside keeps the namespace, nameless, until it ends.
        ip(None, &format!("netns delete {}\n", self.name)).ok();
    }
}

/// Runs `ip` commands, one a line, in `netns` or outside.
pub(crate) fn ip(netns: Option<&str>, batch: &str) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(netns) = netns {
        command.args(["-n", netns]);
    }
    feed(command.args(["-batch", "-"]), batch)
}

/// Runs `command` with `input`, and fails with what it says.
pub(crate) fn feed(command: &mut Command, input: &str) -> Result<()> {
    let name = command.get_program().display().to_string();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {name}"))?;
    let written = child.stdin.take().context("no stdin")?.write_all(input.as_bytes());
    let output = child.wait_with_output().with_context(|| format!("wait for {name}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name}: {}\n{input}", said.trim());
    // Last: a program that fails reads no further, and what it says tells more than a broken pipe.
    written.with_context(|| format!("write to {name}"))
}

/// Writes a setting of the calling thread's network namespace.
pub(crate) fn sysctl(key: &str, value: &str) -> Result<()> {
    fs::write(Path::new("/proc/sys").join(key), value).with_context(|| format!("write {key}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_that_fails_before_it_has_read_all_is_quoted() {
        // More than a pipe holds.
        let input = "x\n".repeat(1 << 20);
        let failed = feed(Command::new("sh").args(["-c", "echo why >&2; exit 1"]), &input);
        assert!(failed.unwrap_err().to_string().starts_with("sh: why\n"));
    }
}
