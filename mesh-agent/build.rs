//! Builds the eBPF object from source, so that the agent and its programs can never disagree, and
//! leaves it in `OUT_DIR` for `capture` to embed.
//!
//! The eBPF target needs another compiler than the agent. Which one, `cargo xtask setup` finds out and
//! writes down; see `toolchain_file` for where.

use std::collections::HashMap;
use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "bpfel-unknown-none";
const OBJECT: &str = "mesh-ebpf";

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let root = root.parent().ok_or("the agent's crate has no parent directory")?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for source in [
        "mesh-ebpf/src",
        "mesh-ebpf/Cargo.toml",
        "mesh-ebpf/Cargo.lock",
        "mesh-common/src",
        "mesh-common/Cargo.toml",
    ] {
        // Relative to this crate: in another checkout to which `target` was copied, that one's sources
        // count, and not those of the first.
        println!("cargo::rerun-if-changed=../{source}");
    }
    for variable in ["MALLA_CACHE", "XDG_CACHE_HOME", "HOME"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }

    let file = toolchain_file()?;
    println!("cargo::rerun-if-changed={}", file.display());
    let toolchain = Toolchain::read(&file)?;
    let object = toolchain.build(&root.join("mesh-ebpf"), &out.join("ebpf-target"))?;
    fs::copy(object, out.join("mesh-ebpf.o"))?;
    Ok(())
}

/// `${MALLA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/malla}/ebpf-toolchain.env`
fn toolchain_file() -> Result<PathBuf, Box<dyn Error>> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
    let cache = match (set("MALLA_CACHE"), set("XDG_CACHE_HOME"), set("HOME")) {
        (Some(cache), _, _) => PathBuf::from(cache),
        (None, Some(cache), _) => PathBuf::from(cache).join("malla"),
        (None, None, Some(home)) => PathBuf::from(home).join(".cache/malla"),
        (None, None, None) => return Err("none of MALLA_CACHE, XDG_CACHE_HOME, HOME is set".into()),
    };
    Ok(cache.join("ebpf-toolchain.env"))
}

/// The lines `KEY=VALUE` of the toolchain file. A key that is empty or absent means "do not set".
struct Toolchain {
    file: PathBuf,
    values: HashMap<String, String>,
}

impl Toolchain {
    fn read(file: &Path) -> Result<Self, Box<dyn Error>> {
        let text = fs::read_to_string(file).map_err(|error| {
            format!(
                "no eBPF toolchain is known: {}: {error}\nrun: cargo xtask setup",
                file.display()
            )
        })?;
        let values = text
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()))
            .collect();
        Ok(Self { file: file.to_owned(), values })
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn need(&self, key: &str) -> Result<&str, String> {
        self.get(key)
            .ok_or_else(|| format!("{}: no {key}\nrun: cargo xtask setup", self.file.display()))
    }

    /// Runs cargo and returns the object's path.
    fn build(&self, package: &Path, target_dir: &Path) -> Result<PathBuf, Box<dyn Error>> {
        let cargo = self.need("CARGO")?;
        let linker = self.need("LINKER")?;
        let mut command = Command::new(cargo);
        command
            .current_dir(package)
            .args(["build", "--release", "--locked", "--target", TARGET, "--target-dir"])
            .arg(target_dir)
            .args(self.get("BUILD_ARGS").unwrap_or_default().split_whitespace());
        // What the outer cargo says to its compiler, about its target, is not for this one.
        const OUTER: [&str; 8] = [
            "CARGO_BUILD_",
            "CARGO_CFG_",
            "CARGO_ENCODED_",
            "CARGO_PROFILE_",
            "CARGO_TARGET",
            "RUSTC",
            "RUSTFLAGS",
            "RUSTUP_TOOLCHAIN",
        ];
        for (name, _value) in env::vars_os() {
            if OUTER.iter().any(|outer| name.to_string_lossy().starts_with(outer)) {
                command.env_remove(&name);
            }
        }
        let flags = [&format!("linker={linker}"), "debuginfo=2", "link-arg=--btf"];
        let flags = flags.map(|flag| format!("-C\x1f{flag}")).join("\x1f");
        command.env("CARGO_ENCODED_RUSTFLAGS", flags);
        for (key, variable) in [
            ("RUSTC", "RUSTC"),
            ("RUSTUP_TOOLCHAIN", "RUSTUP_TOOLCHAIN"),
            ("BOOTSTRAP", "RUSTC_BOOTSTRAP"),
        ] {
            if let Some(value) = self.get(key) {
                command.env(variable, value);
            }
        }
        if let Some(prepend) = self.get("PATH_PREPEND") {
            let mut path = OsString::from(prepend);
            path.push(":");
            path.push(env::var_os("PATH").unwrap_or_default());
            command.env("PATH", path);
        }

        let name = self.get("NAME").unwrap_or(cargo);
        let output = command.output().map_err(|error| {
            format!("cannot run {cargo} ({name}): {error}\nrun: cargo xtask setup")
        })?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("the eBPF programs do not build with {name}:\n{said}").into());
        }
        Ok(target_dir.join(TARGET).join("release").join(OBJECT))
    }
}
