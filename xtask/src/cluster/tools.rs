//! The programs of a cluster: which modules they come from, and their builds in the cache.
//!
//! The modules in `tests/cluster` pin everything with `go.mod` and `go.sum`. A build is kept under the
//! module's version and a digest of both files, outside the checkout, so that a fresh one finds it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::packages::Packages;
use crate::process::{answer, installed, must};
use crate::{image, privilege, root, say, setup};

/// The oldest release of Go that the modules accept.
const GO: (u32, u32) = (1, 26);

/// The API server alone takes 165 s on two idle cores.
const BUILD_LIMIT: Duration = Duration::from_secs(3600);

/// Programs that a cluster needs of the distribution, and their packages.
const PROGRAMS: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("openssl", "openssl"),
    ("nsenter", "util-linux"),
    ("pkg-config", "pkg-config"),
    ("cc", "gcc"),
];

/// runc is linked to it: without it every pod fails with "seccomp not supported".
const SECCOMP: (&str, &str) = ("libseccomp", "libseccomp-dev");

/// One of the modules below `tests/cluster`.
#[derive(Debug)]
pub(crate) struct Module {
    /// Its directory there.
    name: &'static str,
    /// The module whose version it pins.
    pins: &'static str,
    /// Packages to build, with the programs' names.
    programs: &'static [(&'static str, &'static str)],
    /// Whether it is linked to a C library.
    cgo: bool,
}

pub(crate) const KUBERNETES: Module = Module {
    name: "kubernetes",
    pins: "k8s.io/kubernetes",
    programs: &[
        ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
        ("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
        ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
        ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
        ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
        ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
        ("etcd", "go.etcd.io/etcd/server/v3"),
    ],
    cgo: false,
};

pub(crate) const CONTAINERD: Module = Module {
    name: "containerd",
    pins: "github.com/containerd/containerd/v2",
    programs: &[
        ("containerd", "github.com/containerd/containerd/v2/cmd/containerd"),
        (
            "containerd-shim-runc-v2",
            "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
        ),
        ("ctr", "github.com/containerd/containerd/v2/cmd/ctr"),
    ],
    cgo: false,
};

pub(crate) const RUNC: Module = Module {
    name: "runc",
    pins: "github.com/opencontainers/runc",
    programs: &[("runc", "github.com/opencontainers/runc")],
    cgo: true,
};

pub(crate) const CNI: Module = Module {
    name: "cni",
    pins: "github.com/containernetworking/plugins",
    programs: &[
        ("ptp", "github.com/containernetworking/plugins/plugins/main/ptp"),
        ("loopback", "github.com/containernetworking/plugins/plugins/main/loopback"),
        ("host-local", "github.com/containernetworking/plugins/plugins/ipam/host-local"),
        ("portmap", "github.com/containernetworking/plugins/plugins/meta/portmap"),
    ],
    cgo: false,
};

pub(crate) const COREDNS: Module = Module {
    name: "coredns",
    pins: "github.com/coredns/coredns",
    programs: &[("coredns", "github.com/coredns/coredns")],
    cgo: false,
};

const MODULES: [&Module; 5] = [&KUBERNETES, &CONTAINERD, &RUNC, &CNI, &COREDNS];

/// Why no cluster can be made here, if that is so: asked before anything is built for one.
pub(crate) fn missing() -> Option<String> {
    let said = answer("go", &["version"]);
    match said.as_deref().map(release) {
        None => {
            Some(format!("needs Go {}.{} or later to build Kubernetes: no go here", GO.0, GO.1))
        }
        Some(Some(release)) if release >= GO => besides_go(),
        Some(_) => Some(format!(
            "needs Go {}.{} or later to build Kubernetes: here is {}",
            GO.0,
            GO.1,
            said.unwrap_or_default()
        )),
    }
}

/// What is missing besides.
fn besides_go() -> Option<String> {
    if !privilege::available() {
        return Some("needs root: the cluster's nodes are namespaces and cgroups".into());
    }
    if let Some(absent) = ["apt-get", "dpkg-deb"].iter().find(|program| !installed(program)) {
        return Some(format!("needs {absent}: what the pods run comes from Debian's packages"));
    }
    None
}

/// The release in `go version go1.26.8 linux/amd64`.
fn release(said: &str) -> Option<(u32, u32)> {
    let version = said.split(' ').nth(2)?.strip_prefix("go")?;
    let mut numbers = version.split(['.', 'r', 'b', '-']).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Builds what is not in the cache yet, and the images that every node starts with.
///
/// # Errors
///
/// Says what is missing, or fails with what the compiler said.
pub(crate) fn ready() -> Result<()> {
    if let Some(missing) = missing() {
        bail!("{missing}");
    }
    let mut packages: Vec<String> = Vec::new();
    for (program, package) in PROGRAMS {
        if !installed(program) {
            packages.push((*package).to_owned());
        }
    }
    let absent = MODULES.iter().filter(|module| !module.dir().is_ok_and(|dir| dir.is_dir()));
    let absent: Vec<_> = absent.collect();
    if absent.iter().any(|module| module.cgo)
        && answer("pkg-config", &["--exists", SECCOMP.0]).is_none()
    {
        packages.push(SECCOMP.1.to_owned());
    }
    if !packages.is_empty() {
        Packages::default().install(&packages)?;
    }
    if !absent.is_empty() {
        say("cluster: building Kubernetes and what it runs on: some ten minutes, once");
    }
    for module in absent {
        module.build()?;
    }
    for image in image::EVERY_NODE {
        image.archive()?;
    }
    Ok(())
}

impl Module {
    /// Where its programs lie, or will.
    ///
    /// # Errors
    ///
    /// Fails if its files cannot be read.
    pub(crate) fn dir(&self) -> Result<PathBuf> {
        let source = self.source()?;
        let digest = image::oci::digest_of(&[&source.join("go.mod"), &source.join("go.sum")])?;
        let version = self.version()?;
        Ok(setup::cache()?.join(format!("{}-{version}-{}", self.name, &digest[..8])))
    }

    /// Where one of its programs lies.
    ///
    /// # Errors
    ///
    /// As [`Module::dir`].
    pub(crate) fn program(&self, name: &str) -> Result<PathBuf> {
        Ok(self.dir()?.join(name))
    }

    /// The version that `go.mod` pins, without the `v`.
    ///
    /// # Errors
    ///
    /// Fails if it names none.
    pub(crate) fn version(&self) -> Result<String> {
        let file = self.source()?.join("go.mod");
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        pinned(&text, self.pins).with_context(|| format!("{} in {}", self.pins, file.display()))
    }

    fn source(&self) -> Result<PathBuf> {
        Ok(root()?.join("tests/cluster").join(self.name))
    }

    fn build(&self) -> Result<()> {
        let dir = self.dir()?;
        let version = self.version()?;
        // Named so that `cargo xtask clean` finds it after a kill.
        let partial = setup::cache()?.join(format!("malla-{}-{}", std::process::id(), self.name));
        fs::create_dir_all(&partial).with_context(|| format!("create {}", partial.display()))?;
        for (program, package) in self.programs {
            say(&format!("cluster: building {program} ({} {version})", self.name));
            let mut build = Command::new("go");
            build.current_dir(self.source()?).args(["build", "-trimpath", "-buildvcs=false"]);
            // Or the API server calls itself 0.0.0, and nothing that looks at its version likes that.
            let (major, rest) = version.split_once('.').context("a version has a dot")?;
            let minor = rest.split('.').next().unwrap_or_default();
            let stamp = "-X k8s.io/component-base/version.git";
            build.arg(format!(
                "-ldflags=-s -w {stamp}Version=v{version} {stamp}Major={major} {stamp}Minor={minor}"
            ));
            if self.cgo {
                build.args(["-tags", "seccomp"]);
            }
            build.env("CGO_ENABLED", if self.cgo { "1" } else { "0" });
            build.env("GOWORK", "off").env_remove("GOFLAGS");
            build.arg("-v").arg("-o").arg(partial.join(program)).arg(package);
            must(&format!("building {program}"), build, BUILD_LIMIT)?;
        }
        place(&partial, &dir)
    }
}

/// Gives what was built its name, unless somebody else was faster.
fn place(partial: &Path, dir: &Path) -> Result<()> {
    let Err(error) = fs::rename(partial, dir) else {
        return Ok(());
    };
    ensure!(dir.is_dir(), "rename {} to {}: {error}", partial.display(), dir.display());
    fs::remove_dir_all(partial).with_context(|| format!("remove {}", partial.display()))
}

/// The version of `module` in a `go.mod`, without the `v`.
fn pinned(text: &str, module: &str) -> Option<String> {
    let mut lines = text.lines().map(|line| line.trim().trim_start_matches("require "));
    let version = lines.find_map(|line| line.strip_prefix(module)?.strip_prefix(" v"))?;
    Some(version.split(' ').next()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_of_go_is_read_from_what_it_says() {
        assert_eq!(release("go version go1.26.8 linux/amd64"), Some((1, 26)));
        assert_eq!(release("go version go1.27rc1 linux/amd64"), Some((1, 27)));
        assert!(release("go version go1.9.7 linux/amd64") < Some(GO));
        assert_eq!(release("go version devel"), None);
    }

    #[test]
    fn every_module_pins_what_it_is_called_after() {
        for module in MODULES {
            let version = module.version().unwrap();
            assert!(version.split('.').count() == 3, "{}: {version}", module.name);
        }
    }

    #[test]
    fn version_is_read_from_both_forms_of_a_requirement() {
        assert_eq!(pinned("require a.b/c v1.2.3\n", "a.b/c").as_deref(), Some("1.2.3"));
        let block = "require (\n\ta.b/c/d v9.9.9\n\ta.b/c v1.2.3 // indirect\n)\n";
        assert_eq!(pinned(block, "a.b/c").as_deref(), Some("1.2.3"));
        assert_eq!(pinned(block, "a.b"), None);
    }
}
