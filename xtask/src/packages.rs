//! Debian's and Ubuntu's package manager.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::process::{installed, watch};
use crate::{privilege, say};

/// How long it may take.
const LIMIT: Duration = Duration::from_secs(1800);

/// Installs, without starting services.
const INSTALL: &str = include_str!("install.sh");

/// The line in that file that says whose it is.
const POLICY_MARK: &str = "# made by cargo xtask setup";

/// A machine that was just started updates itself at first, and holds dpkg's lock meanwhile.
const OPTIONS: [&str; 7] =
    ["-q", "-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=600", "-o", "Acquire::Retries=3"];

/// The file by which [`INSTALL`] keeps services from starting, if a killed setup left it.
pub(crate) fn leftover_policy() -> Option<&'static Path> {
    let policy = Path::new("/usr/sbin/policy-rc.d");
    let text = fs::read_to_string(policy).ok()?;
    text.contains(POLICY_MARK).then_some(policy)
}

/// What has been done with the package manager so far.
#[derive(Debug, Default)]
pub(crate) struct Packages {
    updated: bool,
}

impl Packages {
    /// Whether this process can install `names`.
    ///
    /// # Errors
    ///
    /// Says who can, and how.
    pub(crate) fn may_install(names: &[String]) -> Result<()> {
        if !installed("apt-get") {
            bail!("no apt-get here; install what Debian calls {}", names.join(" "));
        }
        if let Err(why) = privilege::command("apt-get") {
            bail!("{why}; as root run: {}", Self::by_hand(names));
        }
        Ok(())
    }

    /// Installs `names`, and starts none of the services that come with them.
    ///
    /// # Errors
    ///
    /// Fails, with the command that root has to run, where this process may not install anything.
    pub(crate) fn install(&mut self, names: &[String]) -> Result<()> {
        Self::may_install(names)?;
        self.update()?;
        say(&format!("setup: {}", Self::by_hand(names)));
        let mut install = privilege::command("sh")?;
        install.args(["-c", INSTALL, "install.sh"]).args(OPTIONS);
        install.args(["install", "--yes", "--no-install-recommends"]).args(names);
        let installed = watch("apt-get install", install, LIMIT)?;
        ensure!(installed.success, "{}\n{}", installed.how, installed.tail());
        Ok(())
    }

    /// Reads what packages there are, unless it has done so.
    ///
    /// # Errors
    ///
    /// Fails if this process may not.
    pub(crate) fn update(&mut self) -> Result<()> {
        if self.updated {
            return Ok(());
        }
        say("setup: apt-get update");
        let mut update = privilege::command("apt-get")?;
        update.args(OPTIONS).arg("update");
        // One source of several that is broken must not keep the packages of the others away.
        let updated = watch("apt-get update", update, LIMIT)?;
        if !updated.success {
            let tail = updated.tail();
            say(&format!("setup: apt-get update failed, going on without it\n{tail}"));
        }
        self.updated = true;
        Ok(())
    }

    fn by_hand(names: &[String]) -> String {
        format!("apt-get install --yes --no-install-recommends {}", names.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn script_marks_its_file_as_clean_looks_for_it() {
        assert!(INSTALL.contains(&format!("mark='{POLICY_MARK}'")));
    }
}
