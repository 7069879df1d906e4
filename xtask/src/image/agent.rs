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

/// Builds the agent, writes its image to `out` and returns its name.
///
/// # Errors
///
/// Fails with what the compiler said, or if a file cannot be written.
pub(crate) fn write(out: &Path, debug: bool) -> Result<String> {
    setup::toolchain()?;
    // With a target named, cargo keeps flags from what it builds for itself, such as the build script;
    // that cannot be linked like this.
    let target = match std::env::consts::ARCH {
        "x86_64" => "x86_64-unknown-linux-gnu",
        "aarch64" => "aarch64-unknown-linux-gnu",
        other => bail!("no images for {other}"),
    };
    say("image: building the agent");
    let profile = if debug { "dev" } else { "release" };
    let args = format!("build --package mesh-agent --bins --profile {profile} --target {target}");
    let built = build::static_executables("building the agent", &args)?;
    let agent = built.into_iter().find(|built| built.name == "mesh-agent");
    let agent = agent.context("cargo built no mesh-agent")?.path;

    let name = name();
    let temp = std::env::temp_dir().join(format!("malla-{}-image", std::process::id()));
    let (files, work) = (temp.join("files"), temp.join("work"));
    for dir in [&files, &work] {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    let program = files.join(PROGRAM.trim_start_matches('/'));
    fs::copy(&agent, &program).with_context(|| format!("copy {}", agent.display()))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).context("set a mode")?;
    let image = oci::Image {
        name: &name,
        architecture: architecture()?,
        entrypoint: &[PROGRAM],
        command: &[],
        user: "0:0",
    };
    let written = image.write(&files, &work, out);
    fs::remove_dir_all(&temp).with_context(|| format!("remove {}", temp.display()))?;
    written.map(|()| name)
}

/// What it is called, with a host that no registry has.
fn name() -> String {
    format!("malla.dev/mesh-agent:{}", env!("CARGO_PKG_VERSION"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_that_docker_makes_is_the_same() {
        let file = crate::root().unwrap().join("deploy/Dockerfile");
        let text = fs::read_to_string(file).unwrap();
        let (_, last) = text.rsplit_once("\nFROM ").unwrap();
        assert!(last.starts_with("scratch\n"));
        assert!(last.contains(&format!("COPY --from=build /mesh-agent {PROGRAM}\n")));
        assert!(last.ends_with(&format!("ENTRYPOINT [\"{PROGRAM}\"]\n")));
        assert!(text.contains(&format!("RUSTFLAGS=\"{}\"", build::STATIC)));
    }
}
