//! Writes an image as an OCI archive: a tar of an image layout with one layer, as
//! <https://github.com/opencontainers/image-spec/blob/v1.1.1/image-layout.md> has it. No daemon is
//! needed, and the same files give the same bytes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

/// What an image says of itself.
#[derive(Debug)]
pub(crate) struct Image<'a> {
    /// With its host: without one, containerd takes it for one of a registry's.
    pub(crate) name: &'a str,
    /// `amd64`, `arm64`.
    pub(crate) architecture: &'a str,
    pub(crate) entrypoint: &'a [&'a str],
    /// What runs if nothing else is asked for.
    pub(crate) command: &'a [&'a str],
    /// `uid:gid`.
    pub(crate) user: &'a str,
}

/// Options that keep names, times, owners and the order of a directory out of an archive.
const REPRODUCIBLE: [&str; 6] =
    ["--format=gnu", "--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"];

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

impl Image<'_> {
    /// Writes the files below `files` as an image to `out`; `work` is an empty directory.
    ///
    /// # Errors
    ///
    /// Fails if a file cannot be read or written.
    pub(crate) fn write(&self, files: &Path, work: &Path, out: &Path) -> Result<()> {
        let blobs = work.join("blobs/sha256");
        fs::create_dir_all(&blobs).with_context(|| format!("create {}", blobs.display()))?;
        let layer = work.join("layer");
        pack(files, &layer, &[])?;
        let layer = Blob::take(&blobs, &layer)?;
        let config = json!({
            "architecture": self.architecture,
            "os": "linux",
            "config": {
                "Entrypoint": self.entrypoint,
                "Cmd": self.command,
                "Env": [PATH],
                "User": self.user,
            },
            "rootfs": {"type": "layers", "diff_ids": [layer.digest()]},
        });
        let config = Blob::of(&blobs, &config)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config.describe("application/vnd.oci.image.config.v1+json"),
            // Not compressed: it is unpacked on the machine that packs it.
            "layers": [layer.describe("application/vnd.oci.image.layer.v1.tar")],
        });
        let manifest = Blob::of(&blobs, &manifest)?;
        let mut described = manifest.describe("application/vnd.oci.image.manifest.v1+json");
        let tag = self.name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        described["annotations"] = json!({
            // What containerd reads, and what the specification has.
            "io.containerd.image.name": self.name,
            "org.opencontainers.image.ref.name": tag,
        });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [described],
        });
        write(&work.join("index.json"), &index.to_string())?;
        write(&work.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        // Another process may make the same one at the same time.
        let partial = out.with_file_name(format!("malla-{}-image.partial", std::process::id()));
        // What the layout's own files may do depends on who makes them, and says nothing.
        pack(work, &partial, &["--mode=a+rX,u+w,go-w"])?;
        fs::rename(&partial, out).with_context(|| format!("write {}", out.display()))
    }
}

/// The SHA-256 of some files, one after the other, in hexadecimal.
///
/// # Errors
///
/// Fails if one cannot be read.
pub(crate) fn digest_of(files: &[&Path]) -> Result<String> {
    use std::io::Write as _;

    let mut sum = Command::new("sha256sum");
    let mut sum = sum.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("sha256sum")?;
    let mut input = sum.stdin.take().context("no stdin")?;
    for file in files {
        let bytes = fs::read(file).with_context(|| format!("read {}", file.display()))?;
        input.write_all(&bytes).context("write to sha256sum")?;
    }
    drop(input);
    let output = sum.wait_with_output().context("wait for sha256sum")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let digest = text.split(' ').next().unwrap_or_default();
    ensure!(output.status.success() && digest.len() == 64, "sha256sum: {text}");
    Ok(digest.to_owned())
}

/// A file that is called after its content.
struct Blob {
    hex: String,
    size: u64,
}

impl Blob {
    /// Moves `file` to the others.
    fn take(blobs: &Path, file: &Path) -> Result<Self> {
        let hex = digest_of(&[file])?;
        let size = fs::metadata(file).context("read a layer's size")?.len();
        fs::rename(file, blobs.join(&hex)).context("move a layer")?;
        Ok(Self { hex, size })
    }

    fn of(blobs: &Path, value: &Value) -> Result<Self> {
        let file = blobs.join("new");
        write(&file, &value.to_string())?;
        Self::take(blobs, &file)
    }

    fn digest(&self) -> String {
        format!("sha256:{}", self.hex)
    }

    fn describe(&self, media_type: &str) -> Value {
        json!({"mediaType": media_type, "digest": self.digest(), "size": self.size})
    }
}

/// Makes a tar of what is below `dir`.
fn pack(dir: &Path, out: &Path, options: &[&str]) -> Result<()> {
    // Named one by one: with `.` the archive would say what the directory itself may do.
    let entries = fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))?;
    let mut names: Vec<PathBuf> = Vec::new();
    for entry in entries {
        names.push(entry.context("read a directory")?.file_name().into());
    }
    names.sort();
    let mut tar = Command::new("tar");
    tar.args(REPRODUCIBLE).args(options).arg("--create").arg("--file").arg(out);
    tar.arg("--directory").arg(dir).arg("--").args(names);
    let output = tar.output().context("start tar")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "tar: {}", said.trim());
    Ok(())
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn same_files_are_the_same_image_whenever_they_were_written() {
        let temp = std::env::temp_dir().join(format!("malla-{}-oci", std::process::id()));
        let image = Image {
            name: "malla.dev/test/x:1",
            architecture: "amd64",
            entrypoint: &["/x"],
            command: &[],
            user: "0:0",
        };
        let make = |nth: &str, order: [&str; 2], content: &str| {
            let dir = temp.join(nth);
            let files = dir.join("files");
            fs::create_dir_all(files.join("d")).unwrap();
            for name in order {
                let file = files.join("d").join(name);
                fs::write(&file, content).unwrap();
                fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
                let time = fs::FileTimes::new().set_modified(std::time::SystemTime::now());
                fs::File::open(&file).unwrap().set_times(time).unwrap();
            }
            fs::create_dir(dir.join("work")).unwrap();
            image.write(&files, &dir.join("work"), &dir.join("image.tar")).unwrap();
            fs::read(dir.join("image.tar")).unwrap()
        };
        let one = make("1", ["a", "b"], "x");
        let two = make("2", ["b", "a"], "x");
        let other = make("3", ["a", "b"], "y");
        fs::remove_dir_all(&temp).unwrap();
        assert!(one == two);
        assert!(one != other);
    }

    #[test]
    fn digest_is_the_one_of_the_standard() {
        // FIPS 180-2, appendix B.1.
        let file = std::env::temp_dir().join(format!("malla-{}-abc", std::process::id()));
        fs::write(&file, "abc").unwrap();
        let digest = digest_of(&[&file]).unwrap();
        fs::remove_file(&file).unwrap();
        assert_eq!(digest, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
