//! The agent's image: the program alone, linked statically.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::build;
use crate::image::{architecture, oci};
use crate::{say, setup};

/// Where the program lies in the image. `deploy/Dockerfile` has the same.
const PROGRAM: &str = "/mesh-agent";
/// As whom it runs where the manifest does not say. `deploy/Dockerfile` has the same.
const USER: &str = "0:0";
/// What users install.
pub(crate) const RELEASE: &str = "release";
/// What the cluster tests run: the workspace's manifest says in what it differs.
pub(crate) const TESTED: &str = "tested";

/// Builds the agent in one of cargo's profiles, writes its image to `out` and returns its name.
///
/// # Errors
///
/// Fails with what the compiler said, or if a file cannot be written.
pub(crate) fn write(out: &Path, profile: &str) -> Result<String> {
    setup::toolchain()?;
    // With a target named, cargo keeps flags from what it builds for itself, such as the build script;
    // that cannot be linked like this.
    let target = match std::env::consts::ARCH {
        "x86_64" => "x86_64-unknown-linux-gnu",
        "aarch64" => "aarch64-unknown-linux-gnu",
        other => bail!("no images for {other}"),
    };
    say(&format!("image: building the agent ({profile})"));
    let args = format!("build --package mesh-agent --bins --profile {profile} --target {target}");
    let built = build::static_executables("building the agent", &args)?;
    let agent = built.into_iter().find(|built| built.name == "mesh-agent");
    let agent = agent.context("cargo built no mesh-agent")?.path;

    let name = name();
    pack(&name, &agent, out)?;
    Ok(name)
}

/// Writes an image of the program alone.
fn pack(name: &str, agent: &Path, out: &Path) -> Result<()> {
    let temp = std::env::temp_dir().join(format!("malla-{}-image", std::process::id()));
    let (files, work) = (temp.join("files"), temp.join("work"));
    for dir in [&files, &work] {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    let image = oci::Image {
        name,
        architecture: architecture()?,
        entrypoint: &[PROGRAM],
        command: &[],
        user: USER,
    };
    let program = files.join(PROGRAM.trim_start_matches('/'));
    let written = fs::copy(agent, &program)
        .with_context(|| format!("copy {}", agent.display()))
        .and_then(|_bytes| {
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).context("set a mode")
        })
        .and_then(|()| image.write(&files, &work, out));
    fs::remove_dir_all(&temp).with_context(|| format!("remove {}", temp.display()))?;
    written
}

/// What it is called, with a host that no registry has.
fn name() -> String {
    format!("malla.dev/mesh-agent:{}", env!("CARGO_PKG_VERSION"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str) -> String {
        fs::read_to_string(crate::root().unwrap().join(name)).unwrap()
    }

    #[test]
    fn image_that_docker_makes_is_the_same() {
        let text = read("deploy/Dockerfile");
        let (_, last) = text.rsplit_once("\nFROM ").unwrap();
        assert!(last.starts_with("scratch\n"));
        assert!(last.contains(&format!("COPY --from=build /mesh-agent {PROGRAM}\n")));
        assert!(last.contains(&format!("USER {USER}\n")));
        assert!(last.ends_with(&format!("ENTRYPOINT [\"{PROGRAM}\"]\n")));
        assert!(text.contains(&format!("RUSTFLAGS=\"{}\"", build::STATIC)));
    }

    #[test]
    fn image_that_the_manifest_names_is_the_one_that_is_made() {
        let manifest = read("deploy/daemonset.yaml");
        let lines = manifest.lines().map(|line| line.trim_start().trim_start_matches("- "));
        let named: Vec<_> = lines.filter_map(|line| line.strip_prefix("image: ")).collect();
        // The agent's and the CA's: mesh-agent/tests/manifest.rs sees that there are no others.
        assert_eq!(named, [name(), name()]);
    }

    #[test]
    fn image_is_built_with_the_pinned_compiler() {
        let pin = read("rust-toolchain.toml");
        let pin = pin.lines().find_map(|line| line.strip_prefix("channel = ")).unwrap();
        let pin = pin.trim_matches('"');
        let from = format!("FROM --platform=$BUILDPLATFORM rust:{pin}-bookworm AS build\n");
        assert!(read("deploy/Dockerfile").contains(&from));
    }

    #[test]
    fn members_of_the_workspace_are_one_line_as_the_dockerfile_takes_them() {
        let file = read("deploy/Dockerfile");
        assert!(file.contains("sed -i 's/^members = .*/members = [\"xtask\"]/' Cargo.toml"));
        let manifest = read("Cargo.toml");
        let members: Vec<_> = manifest.lines().filter(|line| line.starts_with("members")).collect();
        assert!(
            matches!(members[..], [line] if line.starts_with("members = [") && line.ends_with(']'))
        );
    }
}
