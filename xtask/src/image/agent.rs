//! The agent's image: the program alone, linked statically. Tests have one of the program that they were
//! built with, which is not, together with the libraries that it wants.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::build;
use crate::image::{architecture, oci};
use crate::process::{answer, must};
use crate::{say, setup};

/// Where the program lies in the image. `deploy/Dockerfile` has the same.
const PROGRAM: &str = "/mesh-agent";
const STRIP_LIMIT: Duration = Duration::from_secs(120);

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
    pack(&name, out, |files| {
        let program = files.join(PROGRAM.trim_start_matches('/'));
        fs::copy(&agent, &program).with_context(|| format!("copy {}", agent.display()))?;
        Ok(program)
    })?;
    Ok(name)
}

/// Writes an image of an agent that is built already, and returns its name.
///
/// # Errors
///
/// Fails if a file cannot be written, or it is not to be seen what the program wants.
pub(crate) fn write_of(agent: &Path, out: &Path) -> Result<String> {
    let name = "malla.dev/test/mesh-agent:1";
    pack(name, out, |files| {
        let program = files.join(PROGRAM.trim_start_matches('/'));
        // Most of it is for debuggers, and every node would unpack that.
        let mut strip = Command::new("strip");
        strip.arg("--strip-debug").arg("-o").arg(&program).arg(agent);
        must("stripping the agent", strip, STRIP_LIMIT)?;
        let wanted = answer("ldd", &[&agent.display().to_string()]).context("start ldd")?;
        for library in libraries(&wanted) {
            let place = files.join(library.trim_start_matches('/'));
            let dir = place.parent().context("a library is in a directory")?;
            fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
            fs::copy(library, &place).with_context(|| format!("copy {library}"))?;
        }
        Ok(program)
    })?;
    Ok(name.to_owned())
}

/// The paths in what ldd(1) prints. What the kernel brings along has none.
fn libraries(wanted: &str) -> impl Iterator<Item = &str> {
    wanted.lines().filter_map(|line| {
        let line = line.rsplit_once("=> ").map_or(line, |(_, path)| path);
        line.split_whitespace().next().filter(|path| path.starts_with('/'))
    })
}

/// Writes an image of the files that `fill` puts into a directory; it returns which one is the program.
fn pack(name: &str, out: &Path, fill: impl FnOnce(&Path) -> Result<PathBuf>) -> Result<()> {
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
        user: "0:0",
    };
    let written = fill(&files).and_then(|program| {
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).context("set a mode")?;
        image.write(&files, &work, out)
    });
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

    #[test]
    fn libraries_are_those_with_a_path() {
        let wanted = "\tlinux-vdso.so.1 (0x7f)\n\tlibc.so.6 => /lib/libc.so.6 (0x7f)\n\
                      \tlibx.so => not found\n\t/lib64/ld-linux-x86-64.so.2 (0x7f)\n";
        let found: Vec<_> = libraries(wanted).collect();
        assert_eq!(found, ["/lib/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
        assert_eq!(libraries("\tstatically linked\n").count(), 0);
    }

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
