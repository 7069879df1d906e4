//! Refuses a dependency whose licence is not on the list in `deny.toml`, or that does not come from
//! a registry.
//!
//! `cargo deny check` reads the same file and does more (advisories); this does the part that must
//! never be skipped, without a tool that takes longer to build than Malla. Looked at is what is shipped: the
//! workspace, for each of its targets, and the eBPF programs in it.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::layers::quoted;
use crate::process::{cargo, must};

/// For what is to be downloaded.
const LIMIT: Duration = Duration::from_secs(600);

/// Fails with one line per violation.
///
/// # Errors
///
/// Lists what `deny.toml` does not allow, or says why the dependencies cannot be read.
pub(crate) fn check(root: &Path) -> Result<()> {
    let deny = std::fs::read_to_string(root.join("deny.toml")).context("read deny.toml")?;
    let allowed = quoted(&deny, "allow");
    ensure!(!allowed.is_empty(), "deny.toml allows no licence");

    let targets = quoted(&deny, "targets");
    ensure!(!targets.is_empty(), "deny.toml names no target");
    let mut found = BTreeSet::new();
    for manifest in ["Cargo.toml", "mesh-ebpf/Cargo.toml"] {
        for target in &targets {
            found.extend(violations(manifest, target, &allowed)?);
        }
    }
    let found: Vec<String> = found.into_iter().collect();
    ensure!(found.is_empty(), "not allowed by deny.toml:\n    {}", found.join("\n    "));
    Ok(())
}

/// Those of what `manifest` depends on for `target`.
fn violations(manifest: &str, target: &str, allowed: &[String]) -> Result<Vec<String>> {
    // `metadata` says nothing while it gets what is not there yet.
    let options = format!("--locked --manifest-path {manifest}");
    must("getting dependencies", cargo(&format!("fetch {options} --target {target}"))?, LIMIT)?;
    let options = format!("{options} --filter-platform {target}");
    let mut metadata = cargo(&format!("metadata --format-version 1 {options}"))?;
    let output = metadata.output().context("cargo metadata")?;
    ensure!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).context("read cargo metadata")?;
    let packages = metadata["packages"].as_array().context("no packages")?;
    Ok(packages.iter().filter_map(|package| violation(package, allowed)).collect())
}

fn violation(package: &Value, allowed: &[String]) -> Option<String> {
    let name = package["name"].as_str().unwrap_or("?");
    let version = package["version"].as_str().unwrap_or("?");
    let what = format!("{name} {version}");
    if package["source"].as_str().is_some_and(|source| source.starts_with("git+")) {
        return Some(format!("{what}: comes from git"));
    }
    match package["license"].as_str() {
        None => Some(format!("{what}: names no licence")),
        Some(licence) if satisfied(licence, allowed) => None,
        Some(licence) => Some(format!("{what}: {licence}")),
    }
}

/// Whether the SPDX expression `licence` can be met with licences of `allowed`. `OR` is a choice,
/// `AND` is not; the old `MIT/Apache-2.0` means `OR`.
fn satisfied(licence: &str, allowed: &[String]) -> bool {
    let spaced = licence.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    any_of(&words, &mut at, allowed) && at == words.len()
}

fn any_of(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let mut met = all_of(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        met |= all_of(words, at, allowed);
    }
    met
}

fn all_of(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let mut met = one(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        met &= one(words, at, allowed);
    }
    met
}

fn one(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let Some(word) = words.get(*at) else {
        return false;
    };
    *at += 1;
    if *word == "(" {
        let met = any_of(words, at, allowed);
        *at += 1; // The closing bracket.
        return met;
    }
    let mut licence = (*word).to_owned();
    if words.get(*at) == Some(&"WITH") {
        licence = format!("{licence} WITH {}", words.get(*at + 1).unwrap_or(&""));
        *at += 2;
    }
    allowed.contains(&licence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expression_is_met_as_spdx_means_it() {
        let allowed = ["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned);
        for (licence, met) in [
            ("MIT", true),
            ("GPL-3.0", false),
            ("GPL-3.0 OR MIT", true),
            ("GPL-3.0 AND MIT", false),
            ("MIT/Apache-2.0", true),
            ("(MIT OR GPL-2.0) AND Apache-2.0", true),
            ("(MIT OR GPL-2.0) AND ISC", false),
            ("Apache-2.0 WITH LLVM-exception", true),
            ("MIT WITH LLVM-exception", false),
            ("MIT OR", true),
            ("MIT MIT", false),
            ("", false),
        ] {
            assert_eq!(satisfied(licence, &allowed), met, "{licence}");
        }
    }
}
