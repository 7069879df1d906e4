//! Root: whether this process has it, or can have it through `sudo`.
//!
//! Asks for a password at most once, and only on a terminal, so that a run without one never waits.

use std::ffi::OsStr;
use std::io::{IsTerminal as _, stdin};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Result, bail};

use crate::process::{answer, installed};
use crate::say;

/// How a program is run as root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// This process has it.
    Own,
    /// `sudo` gives it.
    Sudo,
    /// Neither, and why.
    None(&'static str),
}

/// Whether [`command`] would succeed.
pub(crate) fn available() -> bool {
    !matches!(way(), Way::None(_))
}

/// `program` as root, with `sudo` in front of it if that is needed.
///
/// # Errors
///
/// Says why root cannot be had.
pub(crate) fn command(program: impl AsRef<OsStr>) -> Result<Command> {
    match way() {
        Way::Own => Ok(Command::new(program)),
        Way::Sudo => {
            let mut command = Command::new("sudo");
            command.args(["--preserve-env", "--"]).arg(program);
            Ok(command)
        }
        Way::None(why) => bail!("{why}"),
    }
}

fn way() -> Way {
    // Once: who has said no to `sudo` should not be asked again by every program.
    static WAY: OnceLock<Way> = OnceLock::new();
    *WAY.get_or_init(|| {
        if answer("id", &["-u"]).as_deref() == Some("0") {
            return Way::Own;
        }
        if !installed("sudo") {
            return Way::None("this is not root, and there is no sudo");
        }
        if answer("sudo", &["--non-interactive", "true"]).is_some() {
            return Way::Sudo;
        }
        if !stdin().is_terminal() {
            return Way::None("this is not root, and sudo wants a password but has no terminal");
        }
        say("sudo: for packages, network namespaces and eBPF");
        match Command::new("sudo").arg("--validate").stdout(Stdio::null()).status() {
            Ok(status) if status.success() => Way::Sudo,
            _ => Way::None("this is not root, and sudo refused"),
        }
    })
}
