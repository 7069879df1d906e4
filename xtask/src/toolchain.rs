//! Compilers for the BPF target: which ones could work on this machine, what each of them needs,
//! and whether it really does.
//!
//! A toolchain is a compiler with a `core` for `bpfel-unknown-none` and a `bpf-linker` made for the
//! same LLVM. Nothing is believed from version numbers: [`Toolchain::try_out`] builds a small program.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::process::{answer, must};

/// The last release that can use rustc's own LLVM, so that no LLVM needs to be installed.
const LINKER_FOR_RUSTC_LLVM: &str = "0.10.3";
/// Linked to the distribution's LLVM.
const LINKER_FOR_SYSTEM_LLVM: &str = "0.13.0";
/// Building `bpf-linker` takes two minutes on two idle cores, and ten on busy ones.
const LINKER_LIMIT: Duration = Duration::from_secs(1200);

/// Everything `mesh-agent/build.rs` has to know to build the eBPF programs: the content of
/// `ebpf-toolchain.env`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Toolchain {
    /// For humans: compiler, its version, linker.
    pub(crate) name: String,
    /// The `cargo` to call.
    pub(crate) cargo: String,
    /// The compiler; empty if `cargo` finds the right one itself.
    pub(crate) rustc: String,
    /// Directories before all others in `PATH`, colon-separated.
    pub(crate) path_prepend: String,
    /// `RUSTUP_TOOLCHAIN`; empty where rustup is not involved.
    pub(crate) rustup_toolchain: String,
    /// Whether a stable compiler has to be told to accept unstable flags.
    pub(crate) bootstrap: bool,
    /// Further arguments for `cargo build`.
    pub(crate) build_args: String,
    /// The path of `bpf-linker`.
    pub(crate) linker: String,
    /// Release and LLVM of the compiler when this was chosen: an update may bring an LLVM for which the
    /// linker was not made. Empty in a file written by hand, which is believed.
    pub(crate) version: String,
}

impl Toolchain {
    /// As lines `KEY=VALUE`.
    pub(crate) fn to_env(&self) -> String {
        let bootstrap = if self.bootstrap { "1" } else { "" };
        let pairs = [
            ("NAME", self.name.as_str()),
            ("CARGO", &self.cargo),
            ("RUSTC", &self.rustc),
            ("PATH_PREPEND", &self.path_prepend),
            ("RUSTUP_TOOLCHAIN", &self.rustup_toolchain),
            ("BOOTSTRAP", bootstrap),
            ("BUILD_ARGS", &self.build_args),
            ("LINKER", &self.linker),
            ("VERSION", &self.version),
        ];
        pairs.iter().map(|(key, value)| format!("{key}={value}\n")).collect()
    }

    /// The opposite of [`Toolchain::to_env`].
    pub(crate) fn from_env(text: &str) -> Self {
        let pairs: HashMap<&str, &str> =
            text.lines().filter_map(|line| line.split_once('=')).collect();
        let value = |key| pairs.get(key).copied().unwrap_or_default().to_owned();
        Self {
            name: value("NAME"),
            cargo: value("CARGO"),
            rustc: value("RUSTC"),
            path_prepend: value("PATH_PREPEND"),
            rustup_toolchain: value("RUSTUP_TOOLCHAIN"),
            bootstrap: value("BOOTSTRAP") == "1",
            build_args: value("BUILD_ARGS"),
            linker: value("LINKER"),
            version: value("VERSION"),
        }
    }

    /// Whether everything it names is still there and as it was.
    pub(crate) fn is_complete(&self) -> bool {
        let there = |path: &str| Path::new(path).is_file();
        let is_there = there(&self.cargo)
            && there(&self.linker)
            && (self.rustc.is_empty() || there(&self.rustc));
        let about = || answer(&self.rustc, &["-vV"]);
        is_there
            && (self.version.is_empty()
                || about().and_then(|about| version(&about).ok()).as_ref() == Some(&self.version))
    }

    /// `cargo <subcommand>` with this compiler, free of what `cargo xtask` itself was called with.
    pub(crate) fn cargo(&self, subcommand: &str) -> Command {
        let mut command = Command::new(&self.cargo);
        command.arg(subcommand).env_remove("RUSTUP_TOOLCHAIN").env_remove("RUSTC");
        for inherited in ["CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET", "CARGO_TARGET_DIR"] {
            command.env_remove(inherited);
        }
        for (key, value) in [("RUSTC", &self.rustc), ("RUSTUP_TOOLCHAIN", &self.rustup_toolchain)] {
            if !value.is_empty() {
                command.env(key, value);
            }
        }
        if self.bootstrap {
            command.env("RUSTC_BOOTSTRAP", "1");
        }
        let path = std::env::var("PATH").unwrap_or_default();
        if !self.path_prepend.is_empty() {
            command.env("PATH", format!("{}:{path}", self.path_prepend));
        }
        command.env(
            "RUSTFLAGS",
            format!("-C linker={} -C debuginfo=2 -C link-arg=--btf", self.linker),
        );
        command
    }

    /// Builds a small eBPF program under `dir` and looks whether the object is one.
    ///
    /// # Errors
    ///
    /// Says what the compiler said, or what the object lacks.
    pub(crate) fn try_out(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir.join("src")).context("create the trial crate")?;
        let manifest = "[package]\nname = \"trial\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n\
                        [[bin]]\nname = \"trial\"\npath = \"src/main.rs\"\n\n\
                        [profile.release]\npanic = \"abort\"\ndebug = 2\n\n[workspace]\n";
        fs::write(dir.join("Cargo.toml"), manifest).context("write the trial crate")?;
        fs::write(dir.join("src/main.rs"), include_str!("../trial/lib.rs"))
            .context("write the trial crate")?;

        let mut build = self.cargo("build");
        build.args(["--release", "--target", "bpfel-unknown-none"]);
        build.args(self.build_args.split_whitespace()).current_dir(dir);
        must("trial build for BPF", build, LINKER_LIMIT)?;

        let object = fs::read(dir.join("target/bpfel-unknown-none/release/trial"))
            .context("read the trial object")?;
        for section in ["cgroup/connect4", ".BTF"] {
            // As the end of a string: the section table shares `.BTF` with `.rel.BTF`.
            let name = format!("{section}\0");
            let found = object.windows(name.len()).any(|bytes| bytes == name.as_bytes());
            ensure!(found, "the trial object has no section {section}");
        }
        Ok(())
    }
}

/// A way to come by a toolchain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Candidate {
    /// The compiler that builds the agent, which rustup manages: `core` is built from its sources,
    /// `bpf-linker` uses its LLVM. Needs no root and no distribution.
    Rustup,
    /// rustup's nightly in the same way, where the pinned compiler will not do.
    RustupNightly,
    /// Debian's compiler (`rustc-web`), its prebuilt `core` for BPF and its LLVM.
    Debian,
}

/// What is missing before a candidate can be tried.
#[derive(Debug, Default)]
pub(crate) struct Needs {
    /// Distribution packages.
    pub(crate) packages: Vec<String>,
    /// A rustup toolchain whose `rust-src` has to be added.
    pub(crate) rust_src: Option<String>,
    /// The linker to build: version, feature, the environment that points to LLVM.
    pub(crate) linker: Option<Linker>,
}

/// A `bpf-linker` in the cache.
#[derive(Clone, Debug)]
pub(crate) struct Linker {
    version: &'static str,
    feature: String,
    llvm_prefix: Option<(String, String)>,
    root: PathBuf,
}

impl Candidate {
    /// In the order of preference: what needs no root, downloads least and brings lints comes first.
    pub(crate) const ALL: [Self; 3] = [Self::Rustup, Self::RustupNightly, Self::Debian];

    /// For humans.
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Rustup => "rustup's pinned compiler with rust-src",
            Self::RustupNightly => "rustup's nightly with rust-src",
            Self::Debian => "Debian's rustc-web with its core for BPF",
        }
    }

    /// What this candidate would be on this machine, and what it still needs.
    ///
    /// # Errors
    ///
    /// Says why the candidate cannot work here.
    pub(crate) fn look(self, cache: &Path) -> Result<(Toolchain, Needs)> {
        match self {
            Self::Rustup => {
                let pinned = answer("rustc", &["--version"]);
                let pinned = pinned.as_deref().and_then(|text| text.split(' ').nth(1));
                rustup(pinned.context("no rustc")?, true, cache)
            }
            Self::RustupNightly => rustup("nightly", false, cache),
            Self::Debian => debian(cache),
        }
    }
}

fn rustup(channel: &str, bootstrap: bool, cache: &Path) -> Result<(Toolchain, Needs)> {
    let which = |program| answer("rustup", &["which", "--toolchain", channel, program]);
    let cargo = which("cargo")
        .with_context(|| format!("no rustup here, or it has no toolchain {channel}"))?;
    let rustc = which("rustc").context("a toolchain without rustc")?;
    let about = answer(&rustc, &["-vV"]).context("rustc does not say its version")?;
    let (release, llvm) = (field(&about, "release: ")?, llvm_major(&about)?);
    ensure!((20..=22).contains(&llvm), "no bpf-linker for the LLVM {llvm} of rustc {release}");

    let sysroot = Path::new(&rustc).ancestors().nth(2).context("rustc outside a toolchain")?;
    let has_src = sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").is_file();
    let linker = Linker {
        version: LINKER_FOR_RUSTC_LLVM,
        feature: format!("rust-llvm-{llvm}"),
        llvm_prefix: None,
        root: cache.join(format!("bpf-linker-{LINKER_FOR_RUSTC_LLVM}-rust-llvm-{llvm}")),
    };
    let toolchain = Toolchain {
        name: format!(
            "rustc {release} of rustup, bpf-linker {} with rustc's LLVM {llvm}",
            linker.version
        ),
        cargo,
        rustc: rustc.clone(),
        // bpf-linker looks for libLLVM in the `lib` beside each directory of the PATH.
        path_prepend: sysroot.join("bin").display().to_string(),
        rustup_toolchain: channel.to_owned(),
        bootstrap,
        build_args: "-Zbuild-std=core".to_owned(),
        linker: linker.path().display().to_string(),
        version: version(&about)?,
    };
    let needs = Needs {
        packages: Vec::new(),
        rust_src: (!has_src).then(|| channel.to_owned()),
        linker: (!linker.path().is_file()).then_some(linker),
    };
    Ok((toolchain, needs))
}

fn debian(cache: &Path) -> Result<(Toolchain, Needs)> {
    let available = |package: &str| {
        answer("apt-cache", &["policy", package])
            .is_some_and(|text| text.contains("Candidate: ") && !text.contains("Candidate: (none)"))
    };
    let compiler = Path::new("/usr/bin/rustc");
    let installed = answer("dpkg-query", &["-W", "-f", "${Status}", "libstd-rust-web-dev-bpf"])
        .is_some_and(|status| status.ends_with(" installed"));
    ensure!(installed || available("libstd-rust-web-dev-bpf"), "no such packages here");

    let about = answer("/usr/bin/rustc", &["-vV"]).filter(|_| compiler.is_file() && installed);
    // What is not installed yet is Debian's newest, which goes with LLVM 22.
    let (release, llvm) = match &about {
        Some(about) => (field(about, "release: ")?.to_owned(), llvm_major(about)?),
        None => ("web".to_owned(), 22),
    };
    ensure!((21..=22).contains(&llvm), "no bpf-linker for the LLVM {llvm} of rustc {release}");

    let prefix = format!("/usr/lib/llvm-{llvm}");
    let linker = Linker {
        version: LINKER_FOR_SYSTEM_LLVM,
        feature: format!("llvm-{llvm}"),
        llvm_prefix: Some((format!("LLVM_SYS_{llvm}1_PREFIX"), prefix.clone())),
        root: cache.join(format!("bpf-linker-{LINKER_FOR_SYSTEM_LLVM}-llvm-{llvm}")),
    };
    let mut packages = Vec::new();
    if about.is_none() {
        packages.extend(["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"].map(str::to_owned));
    }
    let linker_is_there = linker.path().is_file();
    if !linker_is_there && !Path::new(&prefix).join("include").is_dir() {
        packages.extend([format!("llvm-{llvm}-dev"), "libz3-dev".into(), "libzstd-dev".into()]);
    }
    let toolchain = Toolchain {
        name: format!(
            "rustc {release} of Debian, bpf-linker {} with Debian's LLVM {llvm}",
            linker.version
        ),
        cargo: "/usr/bin/cargo".to_owned(),
        rustc: "/usr/bin/rustc".to_owned(),
        path_prepend: format!("{prefix}/bin"),
        rustup_toolchain: String::new(),
        bootstrap: true,
        build_args: String::new(),
        linker: linker.path().display().to_string(),
        version: about.as_deref().map(version).transpose()?.unwrap_or_default(),
    };
    let needs = Needs { packages, rust_src: None, linker: (!linker_is_there).then_some(linker) };
    Ok((toolchain, needs))
}

impl Needs {
    /// Whether the candidate could be tried without installing anything.
    pub(crate) fn nothing(&self) -> bool {
        self.packages.is_empty() && self.rust_src.is_none() && self.linker.is_none()
    }
}

impl Linker {
    fn path(&self) -> PathBuf {
        self.root.join("bin/bpf-linker")
    }

    /// Builds it into the cache.
    ///
    /// # Errors
    ///
    /// Fails if `cargo install` does.
    pub(crate) fn install(&self) -> Result<()> {
        let mut command = crate::process::cargo("install bpf-linker --locked")?;
        command.args(["--version", self.version, "--no-default-features"]);
        command.args(["--features", &self.feature]);
        command.arg("--root").arg(&self.root);
        // Outside the workspace: neither its lock file nor its target directory is concerned.
        command.current_dir("/").env_remove("RUSTFLAGS").env_remove("CARGO_TARGET_DIR");
        if let Some((key, prefix)) = &self.llvm_prefix {
            let path = std::env::var("PATH").unwrap_or_default();
            command.env(key, prefix).env("PATH", format!("{prefix}/bin:{path}"));
        }
        must(&format!("building bpf-linker {}", self.version), command, LINKER_LIMIT)?;
        Ok(())
    }

    /// For humans.
    pub(crate) fn describe(&self) -> String {
        format!("bpf-linker {} ({})", self.version, self.feature)
    }
}

fn field<'a>(about: &'a str, key: &str) -> Result<&'a str> {
    about.lines().find_map(|line| line.strip_prefix(key)).with_context(|| format!("no `{key}`"))
}

/// What must not change under a linker, from a compiler's `rustc -vV`.
fn version(about: &str) -> Result<String> {
    Ok(format!("{} with LLVM {}", field(about, "release: ")?, field(about, "LLVM version: ")?))
}

/// The LLVM of a compiler, from its `rustc -vV`.
fn llvm_major(about: &str) -> Result<u32> {
    let version = field(about, "LLVM version: ")?;
    let major = version.split('.').next().unwrap_or_default();
    major.parse().with_context(|| format!("read the LLVM version {version}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn toolchain_survives_being_written_and_read() {
        let toolchain = Toolchain {
            name: "rustc 1.96.0 of Debian, bpf-linker 0.13.0".into(),
            cargo: "/usr/bin/cargo".into(),
            rustc: "/usr/bin/rustc".into(),
            path_prepend: "/usr/lib/llvm-22/bin".into(),
            rustup_toolchain: String::new(),
            bootstrap: true,
            build_args: "-Zbuild-std=core --offline".into(),
            linker: "/cache/bin/bpf-linker".into(),
            version: "1.96.0 with LLVM 22.1.2".into(),
        };
        assert_eq!(Toolchain::from_env(&toolchain.to_env()), toolchain);
    }

    #[test]
    fn compiler_that_was_updated_is_not_the_one_that_was_chosen() {
        let rustc = std::env::var("RUSTC").unwrap_or_else(|_unset| "rustc".into());
        let sysroot = answer(&rustc, &["--print", "sysroot"]).unwrap();
        let rustc = format!("{sysroot}/bin/rustc");
        let chosen = Toolchain {
            cargo: rustc.clone(),
            linker: rustc.clone(),
            version: version(&answer(&rustc, &["-vV"]).unwrap()).unwrap(),
            rustc,
            ..Toolchain::default()
        };
        assert!(chosen.is_complete());
        assert!(Toolchain { version: String::new(), ..chosen.clone() }.is_complete());
        assert!(!Toolchain { version: "1.0.0 with LLVM 3".into(), ..chosen.clone() }.is_complete());
        assert!(!Toolchain { linker: "/nowhere".into(), ..chosen }.is_complete());
    }

    #[test]
    fn llvm_version_is_read_from_what_rustc_says() {
        let about = "rustc 1.95.0\nrelease: 1.95.0\nLLVM version: 22.1.2\n";
        assert_eq!(llvm_major(about).unwrap(), 22);
        assert_eq!(version(about).unwrap(), "1.95.0 with LLVM 22.1.2");
        assert!(llvm_major("rustc 1.95.0").is_err());
    }
}
