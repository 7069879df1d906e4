//! What the documents say is what the code has: names that one can copy, and the example that one
//! begins with.

#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that goes wrong")]

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use clap::CommandFactory as _;
use mesh_agent::cli::Cli;
use mesh_agent::discovery::file::{FileSource, Settings};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn document(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap()
}

/// What stands between single backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    let prose = text.split("```").step_by(2);
    prose.flat_map(|prose| prose.split('`').skip(1).step_by(2))
}

/// The parts of `text` that begin with `prefix` and go on with name characters.
fn names<'a>(text: &'a str, prefix: &str) -> BTreeSet<&'a str> {
    let end = |rest: &str| {
        let is_name = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
        rest.find(|c| !is_name(c)).unwrap_or(rest.len())
    };
    text.match_indices(prefix).map(|(at, _)| &text[at..][..end(&text[at..])]).collect()
}

/// Every Rust source of ours.
fn sources() -> Vec<(PathBuf, String)> {
    let mut pending: Vec<_> = ["mesh-agent", "mesh-common", "mesh-ebpf/src", "tests", "xtask"]
        .map(|dir| root().join(dir))
        .into();
    let mut found = Vec::new();
    while let Some(path) = pending.pop() {
        if path.is_dir() && !path.ends_with("target") {
            pending.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            found.push((path, text));
        }
    }
    found
}

#[test]
fn manifest_of_the_readme_is_taken_as_it_stands() {
    let readme = document("README.md");
    let (_, rest) = readme.split_once("```yaml\n").unwrap();
    let (manifest, _) = rest.split_once("```").unwrap();
    let dir = std::env::temp_dir().join(format!("malla-{}-readme", std::process::id()));
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("shop.yaml"), manifest).unwrap();
    let settings = Settings {
        node: "node-a".into(),
        trust_domain: "cluster.local".parse().unwrap(),
        tunnel_port: 15019,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _inside = runtime.enter();
    let (source, snapshots) = FileSource::open(&dir, settings).unwrap();
    fs::remove_dir_all(&dir).unwrap();
    assert_eq!(**source.problems().borrow(), []);

    let snapshot = snapshots.borrow();
    let local: Vec<_> = snapshot.local_enrolled().map(|pod| pod.identity.to_string()).collect();
    assert_eq!(local, ["spiffe://cluster.local/ns/shop/sa/client"]);
    let service = snapshot.service_at("10.96.0.10".parse().unwrap()).unwrap();
    let endpoints: Vec<_> = service.ports.iter().flat_map(|port| port.endpoints.iter()).collect();
    assert_eq!(endpoints.len(), 1);
    assert_eq!(endpoints[0].addr.to_string(), "10.2.0.10:8080");
    assert!(endpoints[0].workload.as_ref().unwrap().is_enrolled());
}

#[test]
fn every_command_and_every_flag_of_run_is_in_the_readme() {
    let readme = document("README.md");
    let cli = Cli::command();
    let commands =
        cli.get_subcommands().map(|command| format!("`mesh-agent {}", command.get_name()));
    let run = cli.find_subcommand("run").unwrap();
    let flags =
        run.get_arguments().filter_map(|arg| arg.get_long()).map(|flag| format!("--{flag}"));
    let absent: Vec<_> = commands
        .chain(flags)
        .filter(|name| name != "`mesh-agent completion" && name != "--help" && name != "--version")
        .filter(|name| !readme.contains(name.as_str()))
        .collect();
    assert_eq!(absent, [""; 0], "not in README.md");
}

#[test]
fn every_flag_that_the_documents_name_exists() {
    let mut known = HashSet::from(["release", "workspace", "help"].map(str::to_owned));
    let mut pending = vec![Cli::command()];
    while let Some(command) = pending.pop() {
        known.extend(command.get_arguments().filter_map(|arg| arg.get_long()).map(str::to_owned));
        pending.extend(command.get_subcommands().cloned());
    }
    let is_of_another = |flag: &str| {
        let demo = ["--keep", "--carrier", "--duration"];
        let bench = [
            "--rounds",
            "--seconds",
            "--connect-seconds",
            "--idle",
            "--pause-seconds",
            "--quick",
            "--pin",
            "--json",
            "--only",
            "--sides",
            "--dial",
        ];
        let others = [
            "--file",
            "--kubeconfig",
            "--load-image",
            "--long",
            "--nodes",
            "--out",
            "--profile",
            "--program",
        ];
        let docker = ["--build-arg", "--platform", "--push", "--tag"];
        let kubectl = ["--replicas", "--all", "--all-namespaces"];
        [&demo[..], &bench, &others, &docker, &kubectl].iter().any(|flags| flags.contains(&flag))
    };
    for name in ["README.md", "ARCHITECTURE.md", "SECURITY.md"] {
        let text = document(name);
        let flags = quoted(&text).flat_map(|code| names(code, "--"));
        let unknown: BTreeSet<_> =
            flags.filter(|flag| !is_of_another(flag) && !known.contains(&flag[2..])).collect();
        assert!(unknown.is_empty(), "{name}: {unknown:?}");
    }
}

#[test]
fn every_metric_and_annotation_that_the_readme_names_exists() {
    let readme = document("README.md");
    // That of the CA is pinned by a test there.
    let exposition = document("mesh-agent/src/telemetry/exposition.txt")
        + &document("mesh-agent/src/telemetry/authority.rs");
    let agent: String = sources()
        .into_iter()
        .filter(|(path, _)| path.starts_with(root().join("mesh-agent/src")))
        .map(|(_, text)| text)
        .collect();
    let metrics = quoted(&readme).flat_map(|code| {
        let families = names(code, "istio_tcp_").into_iter().chain(names(code, "mesh_"));
        families.filter(|name| *name != "mesh_agent" && !name.ends_with('_'))
    });
    let absent: BTreeSet<_> = metrics.filter(|name| !exposition.contains(name)).collect();
    assert!(absent.is_empty(), "no such metric: {absent:?}");
    let absent: BTreeSet<_> = names(&readme, "malla.dev/")
        .into_iter()
        // A full stop, or the hyphen by which `kubectl annotate` removes one.
        .map(|name| name.trim_end_matches(['.', '-']))
        .filter(|name| !agent.contains(&format!("{name}\"")))
        .collect();
    assert!(absent.is_empty(), "no such annotation: {absent:?}");
}

#[test]
fn every_test_that_guards_an_invariant_exists() {
    let architecture = document("ARCHITECTURE.md");
    let (_, rest) = architecture.split_once("\n## 12. Invariants\n").unwrap();
    let (invariants, _) = rest.split_once("\n## ").unwrap();
    let sources = sources();
    let exists = |name: &str| {
        let function = format!("fn {name}(");
        sources
            .iter()
            .any(|(path, text)| path.ends_with(format!("{name}.rs")) || text.contains(&function))
    };
    let rows = invariants.lines().filter(|line| line.starts_with("| ") && line.contains('`'));
    let guards: Vec<_> = rows
        .filter_map(|row| row.rsplit('|').nth(1))
        .flat_map(quoted)
        .filter(|name| {
            name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_:".contains(c))
        })
        .filter_map(|path| path.rsplit("::").next())
        .collect();
    assert!(guards.len() > 50, "the table is read: {}", guards.len());
    let absent: Vec<_> = guards.into_iter().filter(|name| !exists(name)).collect();
    assert_eq!(absent, [""; 0], "no such test");
}

/// What the fuzzer begins with and what is kept of its runs is fed to every target by a test too.
#[test]
fn every_fuzz_target_is_repeated_by_a_test() {
    let targets = fs::read_dir(root().join("mesh-agent/fuzz/fuzz_targets")).unwrap();
    let targets: BTreeSet<_> = targets
        .map(|target| target.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    assert!(targets.len() > 10, "{targets:?}");
    let sources = sources();
    let is_repeated = |target: &&String| {
        let call = format!("replay(\"{target}\"");
        sources.iter().any(|(_, text)| text.contains(&call))
    };
    let missing: Vec<_> = targets.iter().filter(|target| !is_repeated(target)).collect();
    assert!(missing.is_empty(), "nothing repeats {missing:?}: see mesh-agent/src/fuzzing.rs");
}
