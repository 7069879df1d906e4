//! Refuses what crosses a layer: Cargo sees the edges between crates, but neither the boundaries
//! between modules nor where `unsafe` is written.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

const AGENT: &str = "agent/";
const CLI: &str = "cli";
const MAIN: &str = "main.rs";
const NODE: &str = "node.rs";
const WORKERS: &str = "workers.rs";

/// A path that source code may name, and the places under `mesh-agent/src` that may name it.
const PLACES: &[(&str, &[&str])] = &[
    ("anyhow", &[MAIN, AGENT]),
    ("aya", &["capture/"]),
    ("aya_log", &["capture/"]),
    // The crate, and the types of the API under the same name.
    ("kube", &["discovery/", "identity/"]),
    ("k8s_openapi", &["discovery/", "identity/"]),
    ("prometheus_client", &["telemetry/"]),
    ("quinn", &["tunnel/"]),
    ("rustls", &["tunnel/", "identity/"]),
    // Only the two ways through the stages know their order, and only what accepts calls them.
    ("crate::outbound", &["outbound/", "serve.rs", AGENT, WORKERS]),
    ("crate::inbound", &["inbound/", "outbound/", "serve.rs", AGENT, WORKERS]),
    ("crate::capture", &["capture/", "outbound/", "inbound/", "serve.rs", NODE, AGENT, CLI, MAIN]),
    ("crate::tunnel", &["tunnel/", "outbound/", "inbound/", "relay/", NODE, AGENT, WORKERS, CLI]),
];

/// Where `unsafe` may be written, by crate: socket options and `setns`, system calls of the
/// capture, `Pod` impls of the map layouts.
const UNSAFE: &[(&str, &[&str])] = &[
    ("mesh-agent/src", &["net.rs", "net/", "capture/"]),
    ("mesh-agent/core/src", &[]),
    ("mesh-common/src", &[""]),
    ("xtask/src", &[]),
    ("tests", &["src/sys.rs"]),
];

/// Crates whose root must forbid `unsafe`, so that the compiler says it too.
const FORBID: &[&str] = &["mesh-agent/core/src/lib.rs", "xtask/src/main.rs"];

/// What a crate may depend on, where that is a promise.
const DEPENDENCIES: &[(&str, &[&str])] =
    &[("mesh-agent/core", &["bytes"]), ("xtask", &["anyhow", "clap", "serde_json"])];

/// Fails with one line per violation.
///
/// # Errors
///
/// Lists what crosses a layer, or says which file cannot be read.
pub(crate) fn check(root: &Path) -> Result<()> {
    let mut found = Vec::new();
    each_source(&root.join("mesh-agent/src"), &mut |path, source| {
        found.extend(misplaced_names(path, source));
    })?;
    for (dir, places) in UNSAFE {
        each_source(&root.join(dir), &mut |path, source| {
            if !places.iter().any(|place| path.starts_with(place)) {
                found.extend(unsafe_code(path, source).map(|line| format!("{dir}/{line}")));
            }
        })?;
    }
    for path in FORBID {
        if !read(&root.join(path))?.contains("#![forbid(unsafe_code)]") {
            found.push(format!("{path}: `#![forbid(unsafe_code)]` is missing"));
        }
    }
    let workspace = read(&root.join("Cargo.toml"))?;
    for member in quoted(&workspace, "members") {
        if !inherits_lints(&read(&root.join(&member).join("Cargo.toml"))?) {
            found.push(format!("{member}/Cargo.toml: `[lints] workspace = true` is missing"));
        }
    }
    for (dir, allowed) in DEPENDENCIES {
        let manifest = read(&root.join(dir).join("Cargo.toml"))?;
        let surplus = dependencies(&manifest).filter(|name| !allowed.contains(name));
        found.extend(surplus.map(|name| {
            format!("{dir}/Cargo.toml: depends on {name}; may on {}", allowed.join(", "))
        }));
    }
    ensure!(found.is_empty(), "layers crossed:\n    {}", found.join("\n    "));
    Ok(())
}

/// Calls `each` with every Rust file under `root`: its path below `root`, and its text.
fn each_source(root: &Path, each: &mut dyn FnMut(&str, &str)) -> Result<()> {
    let mut pending = vec![PathBuf::from(root)];
    while let Some(path) = pending.pop() {
        if path.is_dir() {
            let entries =
                fs::read_dir(&path).with_context(|| format!("read {}", path.display()))?;
            for entry in entries {
                pending.push(entry.context("read a directory")?.path());
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let below = path.strip_prefix(root).unwrap_or(&path).display().to_string();
            each(&below, &read(&path)?);
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

/// Numbered lines of `source` without its comments.
fn code(source: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = source.lines().enumerate();
    lines.map(|(index, line)| (index + 1, line.split("//").next().unwrap_or_default()))
}

fn misplaced_names(path: &str, source: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (number, line) in code(source) {
        for (name, places) in PLACES {
            if names(line, name) && !places.iter().any(|place| path.starts_with(place)) {
                found.push(format!(
                    "mesh-agent/src/{path}:{number}: `{name}` belongs in {}",
                    places.join(", ")
                ));
            }
        }
    }
    found
}

fn unsafe_code<'a>(path: &'a str, source: &'a str) -> impl Iterator<Item = String> + 'a {
    code(source)
        .filter(|(_, line)| has_word(&without_strings(line), "unsafe"))
        .map(move |(number, _)| format!("{path}:{number}: `unsafe` does not belong here"))
}

/// Whether `line` holds the path `name::…`, and not merely the tail of another identifier.
fn names(line: &str, name: &str) -> bool {
    line.match_indices(&format!("{name}::")).any(|(at, _)| !continues_a_name(&line[..at]))
}

/// `line` without its string literals; as it is where one goes on over its end.
fn without_strings(line: &str) -> String {
    let parts: Vec<&str> = line.split('"').collect();
    if parts.len().is_multiple_of(2) {
        line.to_owned()
    } else {
        parts.into_iter().step_by(2).collect()
    }
}

fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let after = line[at + word.len()..].chars().next();
        !continues_a_name(&line[..at])
            && !after.is_some_and(|after| after.is_alphanumeric() || after == '_')
    })
}

fn continues_a_name(before: &str) -> bool {
    // Behind a backtick it is prose.
    before.ends_with(|last: char| last.is_alphanumeric() || ['_', ':', '`'].contains(&last))
}

fn inherits_lints(manifest: &str) -> bool {
    section(manifest, "[lints]").any(|line| line.replace(' ', "") == "workspace=true")
}

/// The names under `[dependencies]`.
fn dependencies(manifest: &str) -> impl Iterator<Item = &str> {
    section(manifest, "[dependencies]")
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split(['=', '.']).next())
        .map(str::trim)
        .filter(|name| !name.is_empty())
}

/// The lines of one table of a manifest.
fn section<'a>(manifest: &'a str, header: &'a str) -> impl Iterator<Item = &'a str> {
    manifest
        .lines()
        .map(str::trim)
        .skip_while(move |line| *line != header)
        .skip(1)
        .take_while(|line| !line.starts_with('['))
}

/// The strings of the array `key = ["…", …]` of a TOML file, over one line or several.
pub(crate) fn quoted(toml: &str, key: &str) -> Vec<String> {
    let start = toml.lines().scan(0, |at, line| {
        let here = *at;
        *at += line.len() + 1;
        Some((here, line))
    });
    let mut array = start.filter(|(_, line)| {
        line.trim_start().strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with('='))
    });
    let Some((at, _)) = array.next() else {
        return Vec::new();
    };
    let text: String = toml[at..]
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default())
        .collect::<Vec<_>>()
        .join("\n");
    let inside = text.split_once('[').map_or("", |(_, rest)| rest);
    let inside = inside.split(']').next().unwrap_or_default();
    inside.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_outside_its_place_is_found() {
        let found = misplaced_names("relay/mod.rs", "use std::io;\nuse quinn::Connection;\n");
        assert_eq!(found, ["mesh-agent/src/relay/mod.rs:2: `quinn` belongs in tunnel/"]);
        assert!(misplaced_names("tunnel/quic.rs", "use quinn::Connection;").is_empty());
    }

    #[test]
    fn comment_and_other_name_are_no_violation() {
        for line in ["// quinn::Endpoint", "use my_quinn::X;", "use tokio_rustls::X;"] {
            assert!(misplaced_names("relay/mod.rs", line).is_empty(), "{line}");
        }
    }

    #[test]
    fn stage_that_calls_another_is_found() {
        assert!(!misplaced_names("tunnel/lane.rs", "use crate::capture::Flow;").is_empty());
        assert!(misplaced_names("outbound/mod.rs", "use crate::tunnel::Tunnels;").is_empty());
    }

    #[test]
    fn unsafe_is_a_word() {
        assert_eq!(unsafe_code("a.rs", "let x = unsafe { f() };").count(), 1);
        assert_eq!(unsafe_code("a.rs", "f(unsafe { g(\"x\") })").count(), 1);
        for harmless in ["#![forbid(unsafe_code)] // unsafe", "f(\"unsafe\")", "is `unsafe`, so\""]
        {
            assert_eq!(unsafe_code("a.rs", harmless).count(), 0, "{harmless}");
        }
    }

    #[test]
    fn manifest_tables_are_read() {
        let manifest =
            "[dependencies]\nbytes = { workspace = true }\n# x = 1\n\n[lints]\nworkspace = true\n";
        assert_eq!(dependencies(manifest).collect::<Vec<_>>(), ["bytes"]);
        assert!(inherits_lints(manifest));
        assert!(!inherits_lints("[lints.rust]\nmissing_docs = \"warn\"\n"));
    }

    #[test]
    fn array_of_strings_is_read_over_lines() {
        let toml = "x = 1\nallow = [\n  \"MIT\", # why\n  \"ISC\",\n]\n[bans]\nother = [\"no\"]\n";
        assert_eq!(quoted(toml, "allow"), ["MIT", "ISC"]);
        assert_eq!(quoted(toml, "missing"), Vec::<String>::new());
    }
}
