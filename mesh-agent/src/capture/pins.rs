//! Where links and maps outlive the agent: `<bpffs>/<layout>/{maps,links,routes}`.
//!
//! `<layout>` is a hash of everything that programs and agent must agree on, sizes included, so a
//! directory with our name holds our layout, and one with another name an older agent's. Every pin is
//! still compared with what we would have made before it is used: a name proves nothing.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use aya::maps::{Array, Map, MapData, MapInfo};
use mesh_common::abi;
use mesh_common::maps::{Control, MapSize, MapSpec, SPECS};

use super::sys::{self, AttachType, LinkInfo};
use super::{CaptureConfig, CaptureError};

/// `BPF_FS_MAGIC` and `CGROUP2_SUPER_MAGIC` of `linux/magic.h`.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;

/// All our programs' names begin with this.
const PROGRAM_PREFIX: &str = "mesh_";
/// Files of `links/` that belong to a pod's namespace: this and [`encoded`] the pod's UID.
const LOOKUP_PREFIX: &str = "lookup_";
/// Those that belong to the node's end of a pod's cable.
const REDIRECT_PREFIX: &str = "redirect_";
/// With its prefix a name on a bpffs has at most 255 bytes (`NAME_MAX`).
const MAX_ENCODED: usize = 240;

/// Entries that a map of the given specification has under this configuration.
pub(super) fn entries(spec: &MapSpec, config: &CaptureConfig) -> u32 {
    let fit = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    match spec.size {
        MapSize::Fixed(n) => fit(n),
        MapSize::PerPod(n) => config.max_pods.saturating_mul(fit(n)),
        MapSize::Destinations => config.max_destinations,
        MapSize::Flows => config.max_flows,
        MapSize::Verdicts => config.max_verdicts,
        // An LRU map takes all its memory at once: 7 MiB that only those pay who use it.
        MapSize::Redirected(n) => {
            if config.redirect_peer {
                fit(n)
            } else {
                1
            }
        }
    }
}

/// Our directory, and those of older agents beside it.
#[derive(Debug)]
pub(super) struct Pins {
    dir: PathBuf,
}

impl Pins {
    /// Checks that `config.bpffs` is usable and makes the directory of our layout in it. Also returns
    /// the directories of other layouts.
    pub(super) fn open(config: &CaptureConfig) -> Result<(Self, Vec<PathBuf>), CaptureError> {
        let root = &config.bpffs;
        check_bpffs(root)?;
        let hash = SPECS
            .iter()
            .fold(abi::HASH, |hash, spec| abi::bytes(hash, &entries(spec, config).to_le_bytes()));
        let dir = root.join(format!("{hash:016x}"));
        for dir in ["maps", "links", "routes"].map(|name| dir.join(name)) {
            fs::create_dir_all(&dir).map_err(failed("create", &dir))?;
        }
        let mut older = Vec::new();
        for path in list(root)? {
            if !is_layout(&path) {
                return Err(foreign(&path, "the agent keeps nothing of this name"));
            }
            if path != dir {
                older.push(path);
            }
        }
        let pins = Self { dir };
        pins.check_maps(config)?;
        Ok((pins, older))
    }

    /// Our directory.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the map of this name is pinned.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.dir.join("maps").join(name)
    }

    /// Where the link of this name is pinned.
    pub(super) fn link(&self, name: &str) -> PathBuf {
        self.dir.join("links").join(name)
    }

    /// Where notes of namespaces with routes lie: [`super::routes`].
    pub(super) fn routes(&self) -> PathBuf {
        self.dir.join("routes")
    }

    /// Where the link to a pod's namespace is pinned.
    pub(super) fn lookup(&self, uid: &str) -> PathBuf {
        self.link(&lookup_name(uid))
    }

    /// The UIDs of pods with a link, and where it is pinned.
    pub(super) fn lookups(&self) -> Result<Vec<(String, PathBuf)>, CaptureError> {
        lookups(&self.dir)
    }

    /// Where the link to the node's end of a pod's cable is pinned.
    pub(super) fn redirect(&self, uid: &str) -> PathBuf {
        self.link(&format!("{REDIRECT_PREFIX}{}", encoded(uid)))
    }

    /// The UIDs of pods with such a link, and where it is pinned.
    pub(super) fn redirects(&self) -> Result<Vec<(String, PathBuf)>, CaptureError> {
        links(&self.dir, REDIRECT_PREFIX)
    }

    /// Compares every map that is already there with what we would create.
    fn check_maps(&self, config: &CaptureConfig) -> Result<(), CaptureError> {
        for path in list(&self.dir.join("maps"))? {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let Some(spec) = SPECS.iter().find(|spec| spec.name == name) else {
                return Err(foreign(&path, "the agent has no map of this name"));
            };
            let info = MapInfo::from_pin(&path)
                .map_err(|error| foreign(&path, format!("cannot be opened as a map: {error}")))?;
            let found = (
                info.map_type().map_or(0, |kind| kind as u32),
                info.key_size() as usize,
                info.value_size() as usize,
                info.max_entries(),
            );
            let wanted = (spec.kind, spec.key_size, spec.value_size, entries(spec, config));
            if found != wanted {
                let why = format!(
                    "type, key bytes, value bytes, entries are {found:?} and should be {wanted:?}"
                );
                return Err(foreign(&path, why));
            }
        }
        Ok(())
    }
}

/// Opens the link pinned at `path` if there is one, and checks that it is one of ours.
pub(super) fn open_link(
    path: &Path,
    attach_type: AttachType,
) -> Result<Option<(OwnedFd, LinkInfo)>, CaptureError> {
    let link = match sys::open_pin(path) {
        Ok(link) => link,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(foreign(path, format!("cannot be opened: {error}"))),
    };
    let info = sys::link_info(link.as_fd()).map_err(|error| foreign(path, error.to_string()))?;
    if info.attach_type != attach_type as u32 {
        let why = format!("attached as {}, not as {attach_type:?}", info.attach_type);
        return Err(foreign(path, why));
    }
    let name = sys::program_name(info.program).map_err(failed("look into", path))?;
    if !name.starts_with(PROGRAM_PREFIX) {
        return Err(foreign(path, format!("runs the program `{name}`")));
    }
    Ok(Some((link, info)))
}

/// The UIDs of pods with a link in a layout's directory, and where it is pinned.
pub(super) fn lookups(layout: &Path) -> Result<Vec<(String, PathBuf)>, CaptureError> {
    links(layout, LOOKUP_PREFIX)
}

fn links(layout: &Path, prefix: &str) -> Result<Vec<(String, PathBuf)>, CaptureError> {
    let mut found = Vec::new();
    for path in list(&layout.join("links"))? {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if let Some(encoded) = name.strip_prefix(prefix) {
            found.push((decoded(encoded), path));
        }
    }
    Ok(found)
}

/// The pin of a pod's link, in any layout.
pub(super) fn lookup_name(uid: &str) -> String {
    format!("{LOOKUP_PREFIX}{}", encoded(uid))
}

/// Whether a pod's link can be pinned under its UID.
pub(super) fn fits(uid: &str) -> bool {
    !uid.is_empty() && encoded(uid).len() <= MAX_ENCODED
}

/// `uid` as a bpffs takes it: that one refuses dots (`bpf_lookup()` in kernel/bpf/inode.c), and a pod
/// without a UID of its own has a slash in its stead. The UUIDs that Kubernetes gives stay as they are.
pub(super) fn encoded(uid: &str) -> String {
    let mut name = String::new();
    for byte in uid.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' {
            name.push(char::from(byte));
        } else {
            name.push_str(&format!("_{byte:02x}"));
        }
    }
    name
}

/// What [`encoded`] made of a UID; a name that it cannot have made stays itself, and is no pod's.
pub(super) fn decoded(name: &str) -> String {
    let mut parts = name.split('_');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let code = part.get(..2).and_then(|code| u8::from_str_radix(code, 16).ok());
        let Some(byte) = code else { return name.to_owned() };
        bytes.push(byte);
        bytes.extend_from_slice(&part.as_bytes()[2..]);
    }
    let uid = String::from_utf8(bytes).ok().filter(|uid| encoded(uid) == name);
    uid.unwrap_or_else(|| name.to_owned())
}

/// Removes a layout's directory with all that it holds, links first. Returns what was removed.
pub(super) fn remove_layout(layout: &Path) -> Result<Vec<PathBuf>, CaptureError> {
    let mut removed = Vec::new();
    // `connect` before the rest: nothing may be captured for which the other programs are gone.
    let mut links = list(&layout.join("links"))?;
    links.sort();
    for path in &links {
        // Whatever is no link of ours, or one whose namespace is gone, has nothing to be ended.
        drop(sys::open_pin(path).and_then(|link| sys::detach_link(link.as_fd())));
    }
    let others = [list(&layout.join("maps"))?, list(&layout.join("routes"))?];
    for path in links.into_iter().chain(others.into_iter().flatten()) {
        fs::remove_file(&path).map_err(failed("remove", &path))?;
        removed.push(path);
    }
    let dirs = ["links", "maps", "routes"].map(|name| layout.join(name));
    for dir in dirs.into_iter().chain([layout.to_owned()]) {
        match fs::remove_dir(&dir) {
            Ok(()) => removed.push(dir),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("remove", &dir)(error)),
        }
    }
    Ok(removed)
}

/// The layouts of any agent under `root`, and what else lies there.
pub(super) fn layouts(root: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>), CaptureError> {
    Ok(list(root)?.into_iter().partition(|path| is_layout(path)))
}

/// The last heartbeats in the layouts under `root`, on [`sys::boot_ns`]'s clock. Of those of other versions only
/// where it lies where ours does.
pub(super) fn heartbeats(root: &Path) -> Result<Vec<u64>, CaptureError> {
    let (layouts, _others) = layouts(root)?;
    let beat = |layout: &PathBuf| {
        let map = MapData::from_pin(layout.join("maps/CONTROL")).ok()?;
        let control = Array::<_, Control>::try_from(Map::Array(map)).ok()?;
        Some(control.get(&0, 0).ok()?.heartbeat_ns)
    };
    Ok(layouts.iter().filter_map(beat).collect())
}

fn is_layout(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.len() == 16 && name.bytes().all(|byte| byte.is_ascii_hexdigit()) && path.is_dir()
}

/// Whether pins can be made at `dir`, or under it once it is created.
pub(super) fn check_bpffs(dir: &Path) -> Result<(), CaptureError> {
    let nearest = dir.ancestors().find(|dir| dir.exists()).unwrap_or_else(|| Path::new("/"));
    match sys::file_system(nearest) {
        Ok(BPF_FS_MAGIC) => Ok(()),
        Ok(_) => {
            // Where systemd and every distribution mount it, or what was asked for instead.
            let usual = Path::new("/sys/fs/bpf");
            let mount = if dir.starts_with(usual) { usual } else { nearest };
            Err(CaptureError::NoBpffs { dir: dir.to_owned(), mount: mount.to_owned() })
        }
        Err(error) => Err(failed("look at", nearest)(error)),
    }
}

/// Whether programs can be attached to `dir`.
pub(super) fn check_cgroup2(dir: &Path) -> Result<(), CaptureError> {
    match sys::file_system(dir) {
        Ok(CGROUP2_SUPER_MAGIC) => Ok(()),
        _ => Err(CaptureError::NotCgroup2 { dir: dir.to_owned() }),
    }
}

/// What lies in a directory; nothing if it does not exist.
pub(super) fn list(dir: &Path) -> Result<Vec<PathBuf>, CaptureError> {
    // One that was removed where it is mounted from can still be opened.
    let read = fs::read_dir(dir)
        .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect());
    match read {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read.map_err(failed("read", dir)),
    }
}

pub(super) fn foreign(path: &Path, why: impl Into<String>) -> CaptureError {
    CaptureError::Foreign { path: path.to_owned(), why: why.into() }
}

pub(super) fn failed(what: &'static str, path: &Path) -> impl Fn(io::Error) -> CaptureError {
    move |source| CaptureError::Pin { what, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_uid_has_a_name_of_its_own_and_is_read_back() {
        let uids = ["0a-1b", "shop/web-0", "shop/web.v1", "a_2fb", "a/b", "_", "ü", "kube.d/x"];
        for uid in uids {
            let name = encoded(uid);
            assert!(!name.contains(['.', '/']), "{name}");
            assert_eq!(decoded(&name), uid);
        }
        assert_eq!(encoded("0a-1b"), "0a-1b");
        assert_eq!(decoded("x_zz"), "x_zz");
        assert!(fits("shop/web") && !fits("") && !fits(&"a".repeat(MAX_ENCODED + 1)));
    }
}
