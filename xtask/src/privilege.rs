//! Root: whether this process has it, or can have it through `sudo`.
//!
//! Asks for a password at most once, and only on a terminal, so that a run without one never waits.

use std::collections::BTreeSet;
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
            command.arg(format!("--preserve-env={}", preserved())).arg("--").arg(program);
            Ok(command)
        }
        Way::None(why) => bail!("{why}"),
    }
}

/// What tasks give to programs that they run as root.
const GIVEN: &[&str] = &[
    "CARGO_MANIFEST_DIR",
    "DEBIAN_FRONTEND",
    "MALLA_AGENT",
    "MALLA_CLUSTER",
    "MALLA_IMAGE",
    "MALLA_IMAGE_NAME",
    "MALLA_KUBECONFIG",
    "MALLA_KUBECTL",
    "MALLA_LOAD_IMAGE",
    "MALLA_LOGS",
    "MALLA_LONG",
    "MALLA_NO_CLUSTER",
    "MALLA_OWN_CLUSTER",
    "MALLA_SKIPPED",
    "MALLA_XTASK",
    "RUST_LIB_BACKTRACE",
];

/// The names of all that may be in the environment, separated by commas: those that are there, and those that are
/// given to a program beside. `sudo-rs` knows no way to ask for all.
fn preserved() -> String {
    let is_name = |name: &String| {
        name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
            && !name.starts_with(|c: char| c.is_ascii_digit())
    };
    let inherited = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    let given = GIVEN.iter().map(|name| (*name).to_owned());
    let all: BTreeSet<String> = inherited.filter(is_name).chain(given).collect();
    all.into_iter().collect::<Vec<_>>().join(",")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_tests_are_given_passes_sudo() {
        let preserved = preserved();
        let preserved: Vec<&str> = preserved.split(',').collect();
        let sources = [include_str!("test.rs"), include_str!("cluster/tested.rs")].concat();
        let is_name = |word: &&str| word.chars().all(|c| c.is_ascii_uppercase() || c == '_');
        let words = sources.split('"').filter(|word| word.starts_with("MALLA_"));
        let names = words.filter(is_name);
        let names: Vec<&str> = names.chain([crate::cluster::WHICH, "PATH"]).collect();
        assert!(names.len() > 10, "{names:?}");
        for name in names {
            assert!(preserved.contains(&name), "{name} is not in {preserved:?}");
        }
    }
}
