//! The images of ordinary programs that tests run in pods, made from the distribution's packages.
//!
//! The packages' scripts do not run, and nothing is installed on this machine: the package manager
//! only says what belongs to a program, and gets it. Kept in the cache.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::cluster::tools;
use crate::image::{architecture, oci};
use crate::packages::Packages;
use crate::process::{answer, cargo, must};
use crate::{root, say, setup};

/// A mirror may be slow.
const LIMIT: Duration = Duration::from_secs(900);

/// Everybody whom one of the programs wants to be.
const USERS: &str = "root:x:0:0::/:/bin/sh\nwww-data:x:33:33::/:/bin/sh\n\
    postgres:x:999:999::/tmp:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n";
const GROUPS: &str = "root:x:0:\nwww-data:x:33:\npostgres:x:999:\nnogroup:x:65534:\n";

/// Big, and needed by nothing that runs: compilers for queries, scripts of packages, documentation.
const LEFT_OUT: &[&str] =
    &["libllvm", "libz3", "perl", "libperl", "locales", "libc-l10n", "usrmerge"];
const NOT_NEEDED: &[&str] =
    &["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info"];

/// Answers with the pod's name, which is what a test wants to know of a server.
const NGINX: &str = r#"user www-data;
error_log stderr;
pid /tmp/nginx.pid;
events {}
http {
    access_log off;
    server {
        listen 80;
        listen [::]:80;
        location / { return 200 "$hostname\n"; }
    }
}
"#;

/// An image for tests.
#[derive(Debug)]
pub(crate) struct Program {
    /// `malla.dev/test/<short>`.
    pub(crate) short: &'static str,
    from: From,
    /// Counted up when anything here changes, since the cache goes by it.
    revision: u32,
    command: &'static [&'static str],
    user: &'static str,
}

#[derive(Debug)]
enum From {
    /// Packages with everything that they depend on, and files of ours.
    Packages(&'static [&'static str], &'static [(&'static str, &'static str)]),
    /// The name server that is built with the cluster.
    CoreDns,
    /// A program of the tests, with the libraries that it finds here. Never kept: it changes.
    Ours(&'static str),
}

/// What holds a pod's namespaces: it ends at once when asked, as nothing else in a pod would.
pub(crate) const PAUSE: Program = Program {
    short: "pause",
    from: From::Packages(&[], &[]),
    revision: 1,
    command: &["/bin/sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait; done"],
    user: "65534:65534",
};

pub(crate) const COREDNS: Program = Program {
    short: "coredns",
    from: From::CoreDns,
    revision: 1,
    command: &["/coredns"],
    user: "0:0",
};

const BUSYBOX: Program = Program {
    short: "busybox",
    from: From::Packages(&[], &[]),
    revision: 1,
    command: &["/bin/sh"],
    user: "0:0",
};

const CURL: Program = Program {
    short: "curl",
    from: From::Packages(&["curl"], &[]),
    revision: 1,
    command: &["/bin/sh"],
    user: "0:0",
};

const NGINX_LIGHT: Program = Program {
    short: "nginx",
    from: From::Packages(&["nginx-light"], &[("etc/nginx/nginx.conf", NGINX)]),
    revision: 1,
    command: &["nginx", "-g", "daemon off;"],
    user: "0:0",
};

const POSTGRES: Program = Program {
    short: "postgres",
    from: From::Packages(&["postgresql"], &[]),
    revision: 1,
    command: &[
        "/bin/sh",
        "-ec",
        "PATH=$(echo /usr/lib/postgresql/*/bin):$PATH; initdb --no-locale -A trust -D /tmp/data; \
         echo 'host all all all trust' >>/tmp/data/pg_hba.conf; \
         exec postgres -D /tmp/data -k /tmp -c 'listen_addresses=*' -c jit=off",
    ],
    user: "999:999",
};

const REDIS: Program = Program {
    short: "redis",
    from: From::Packages(&["redis-server"], &[]),
    revision: 1,
    command: &["redis-server", "--protected-mode", "no", "--save", "", "--bind", "*", "-::*"],
    user: "65534:65534",
};

/// The four services of the demo; which one is the argument.
const BOOKINFO: Program = Program {
    short: "bookinfo",
    from: From::Ours("malla-bookinfo"),
    revision: 1,
    command: &["/malla-bookinfo"],
    user: "65534:65534",
};

pub(crate) const ALL: [&Program; 8] =
    [&PAUSE, &COREDNS, &BUSYBOX, &CURL, &NGINX_LIGHT, &POSTGRES, &REDIS, &BOOKINFO];

/// What a node cannot do without.
pub(crate) const EVERY_NODE: [&Program; 2] = [&PAUSE, &COREDNS];

impl Program {
    /// What it is called in a manifest.
    ///
    /// # Errors
    ///
    /// Fails if the version of the name server cannot be read.
    pub(crate) fn name(&self) -> Result<String> {
        Ok(format!("malla.dev/test/{}:{}", self.short, self.revision))
    }

    /// Where its archive is; made now if it is not in the cache yet.
    ///
    /// # Errors
    ///
    /// Fails if a package cannot be had.
    pub(crate) fn archive(&self) -> Result<PathBuf> {
        let cache = setup::cache()?;
        let file = match self.key()? {
            Some(key) => cache.join(format!("image-{}-{key}.tar", self.short)),
            None => root()?.join(format!("target/image-{}.tar", self.short)),
        };
        if file.is_file() && !matches!(self.from, From::Ours(_)) {
            return Ok(file);
        }
        say(&format!("image: making {}", self.name()?));
        // Named so that `cargo xtask clean` finds it after a kill.
        let temp = cache.join(format!("malla-{}-image", std::process::id()));
        let [files, work, packages] = ["files", "work", "packages"].map(|dir| temp.join(dir));
        for dir in [&files, &work, &packages] {
            fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        }
        let image = oci::Image {
            name: &self.name()?,
            architecture: architecture()?,
            entrypoint: &[],
            command: self.command,
            user: self.user,
        };
        let made = self.fill(&files, &packages).and_then(|()| image.write(&files, &work, &file));
        fs::remove_dir_all(&temp).with_context(|| format!("remove {}", temp.display()))?;
        made.map(|()| file)
    }

    /// What the archive is kept under, if it is.
    fn key(&self) -> Result<Option<String>> {
        Ok(Some(match self.from {
            From::Ours(_) => return Ok(None),
            From::CoreDns => {
                let dir = tools::COREDNS.dir()?;
                let name = dir.file_name().context("a directory has a name")?;
                name.to_string_lossy().into_owned()
            }
            From::Packages(..) => {
                let release = fs::read_to_string("/etc/os-release").context("read os-release")?;
                let codename = release.lines().find_map(|l| l.strip_prefix("VERSION_CODENAME="));
                format!("{}-{}", codename.unwrap_or("unknown"), self.revision)
            }
        }))
    }

    fn fill(&self, files: &Path, packages: &Path) -> Result<()> {
        match self.from {
            From::CoreDns => {
                let program = tools::COREDNS.program("coredns")?;
                fs::copy(program, files.join("coredns")).context("copy the name server")?;
            }
            From::Ours(name) => {
                let mut build = cargo("build --workspace --bin")?;
                build.arg(name);
                must("building a program of the tests", build, LIMIT)?;
                let program = root()?.join("target/debug").join(name);
                fs::copy(&program, files.join(name)).context("copy a program of the tests")?;
                libraries(&program, files)?;
            }
            From::Packages(names, ours) => {
                // A shell, for whatever image: tests want to look around in pods.
                download(&[&["busybox-static"], names].concat(), packages)?;
                unpack(packages, files)?;
                shell(files)?;
                for (file, text) in ours {
                    put(&files.join(file), text)?;
                }
                put(&files.join("etc/passwd"), USERS)?;
                put(&files.join("etc/group"), GROUPS)?;
                for dir in NOT_NEEDED {
                    let dir = files.join(dir);
                    if dir.is_dir() {
                        fs::remove_dir_all(&dir).context("remove what is not needed")?;
                    }
                }
            }
        }
        let temp = files.join("tmp");
        fs::create_dir_all(&temp).context("create /tmp of an image")?;
        fs::set_permissions(&temp, fs::Permissions::from_mode(0o1777)).context("set a mode")
    }
}

/// Gets the packages `names` with what they depend on.
fn download(names: &[&str], dir: &Path) -> Result<()> {
    // As if nothing were installed yet: then everything that they need is named.
    let nothing = dir.join("status");
    fs::write(&nothing, "").context("write an empty list of packages")?;
    fs::create_dir_all(dir.join("partial")).context("create a directory for packages")?;
    let get = || {
        let mut get = Command::new("apt-get");
        get.args(["install", "--download-only", "--yes", "--no-install-recommends"]);
        get.arg("-o").arg(format!("Dir::State::status={}", nothing.display()));
        get.arg("-o").arg(format!("Dir::Cache::archives={}", dir.display()));
        // Not as a user of apt's, who may not write there.
        get.args(["-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User=root"]);
        get.args(names);
        must("getting packages", get, LIMIT)
    };
    if get().is_ok() {
        return Ok(());
    }
    // Nothing had to be installed here, so nobody has read the lists yet, or they are those of packages that have
    // been replaced since.
    Packages::default().update()?;
    get().map(drop)
}

fn unpack(packages: &Path, files: &Path) -> Result<()> {
    let entries = fs::read_dir(packages).context("read the directory of packages")?;
    for entry in entries {
        let path = entry.context("read the directory of packages")?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let is_left_out = LEFT_OUT.iter().any(|prefix| name.starts_with(prefix));
        if !name.ends_with(".deb") || is_left_out {
            continue;
        }
        let mut extract = Command::new("dpkg-deb");
        extract.arg("--extract").arg(&path).arg(files);
        must("unpacking a package", extract, LIMIT)?;
    }
    Ok(())
}

/// Gives every program of busybox its name, unless the image has a real one.
fn shell(files: &Path) -> Result<()> {
    let busybox = files.join("bin/busybox");
    let list = answer(&busybox.display().to_string(), &["--list"]).context("busybox --list")?;
    ensure!(list.lines().any(|name| name == "sh"), "a busybox without a shell");
    for name in list.lines() {
        let real = ["bin", "sbin", "usr/bin", "usr/sbin"].map(|dir| files.join(dir).join(name));
        if real.iter().all(|place| place.symlink_metadata().is_err()) {
            symlink("busybox", &real[0]).with_context(|| format!("create {name}"))?;
        }
    }
    Ok(())
}

/// Puts what `program` is linked with here to where it looks for it.
fn libraries(program: &Path, files: &Path) -> Result<()> {
    let list = answer("ldd", &[&program.display().to_string()]).context("ldd")?;
    // `libc.so.6 => /lib/…/libc.so.6 (0x…)`, and the loader by its path alone.
    let paths = list.split_whitespace().filter(|word| word.starts_with('/'));
    for path in paths {
        let to = files.join(path.trim_start_matches('/'));
        let dir = to.parent().context("a file is in a directory")?;
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        fs::copy(path, &to).with_context(|| format!("copy {path}"))?;
    }
    Ok(())
}

fn put(file: &Path, text: &str) -> Result<()> {
    let dir = file.parent().context("a file is in a directory")?;
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    fs::write(file, text).with_context(|| format!("write {}", file.display()))?;
    fs::set_permissions(file, fs::Permissions::from_mode(0o644)).context("set a mode")
}
