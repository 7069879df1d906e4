//! Finds the network namespace of a pod by looking at this node's processes: no container runtime has
//! an API that all of them share, and every one of them puts a pod's processes into the cgroup that the
//! kubelet made for it.
//!
//! # Guarantees
//!
//! - The namespace is that of a process which was in the pod's cgroup *after* the namespace was opened:
//!   a process ID that is used again in between leads nowhere.
//! - It is not the node's own, and the pod's addresses are inside it.
//! - What cannot be told is refused with a reason, never guessed.
//!
//! # Not here
//!
//! Which pods there are, and whether they are to be enrolled.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use mesh_core::cgroup::{pod_of_name, pod_of_process};
use thiserror::Error;

use crate::net::{self, Netns};

/// How deep pods' cgroups may lie: `kubelet.slice/kubelet-kubepods.slice/….slice/….slice` of a node that
/// is itself a container, and some to spare.
pub(crate) const DEEPEST: usize = 10;
/// Processes of one pod that are looked at, those of its containers before what it has in cgroups below.
const MOST_PROCESSES: usize = 4096;
/// Namespaces of one pod that are entered: it has one, and those of containers that it runs itself.
const MOST_NAMESPACES: usize = 64;

/// Why a pod's namespace is not known.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NotFound {
    /// The kubelet has not made it yet, or the agent does not see the node's cgroups.
    #[error("no cgroup of this pod below {cgroup}")]
    NoCgroup {
        /// Where was looked.
        cgroup: PathBuf,
    },
    /// It is being started, or has ended; or the agent does not see the node's processes.
    #[error("no process of this pod in {cgroup}")]
    NoProcess {
        /// The pod's cgroup.
        cgroup: PathBuf,
    },
    /// Its processes are in the node's namespace, though its manifest does not say so.
    #[error("its processes are in the node's network namespace")]
    HostNetwork,
    /// A process of it is in some other namespace, and none is where the pod's addresses are.
    #[error("no process of this pod is in a network namespace that has {ip}")]
    NoAddress {
        /// The address that is missing.
        ip: IpAddr,
    },
    /// `/proc` or the cgroups cannot be read.
    #[error("read {path}")]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl NotFound {
    /// The label: a closed set.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoCgroup { .. } => "no_cgroup",
            Self::NoProcess { .. } => "no_process",
            Self::HostNetwork => "host_network",
            Self::NoAddress { .. } => "no_address",
            Self::Read { .. } => "read",
        }
    }
}

/// Looks for namespaces, and remembers where pods' cgroups lie.
#[derive(Debug)]
pub struct Processes {
    cgroup: PathBuf,
    proc: PathBuf,
    /// The node's own namespace.
    own: u64,
    known: HashMap<String, PathBuf>,
}

impl Processes {
    /// `cgroup` is the root of the node's cgroup2 tree, `proc` where its processes are seen.
    ///
    /// # Errors
    ///
    /// If the node's own namespace is not to be seen.
    pub fn new(cgroup: &Path, proc: &Path) -> Result<Self, NotFound> {
        let path = proc.join("1/ns/net");
        let own = Netns::open(&path).map_err(|source| NotFound::Read { path, source })?.inode();
        Ok(Self { cgroup: cgroup.into(), proc: proc.into(), own, known: HashMap::new() })
    }

    /// The namespace of the pod with this UID, which has these addresses.
    ///
    /// # Errors
    ///
    /// See [`NotFound`].
    pub fn netns(&mut self, uid: &str, ips: &[IpAddr]) -> Result<Netns, NotFound> {
        let cgroup = self.cgroup_of(uid)?;
        let mut seen = HashSet::new();
        let mut why = NotFound::NoProcess { cgroup: cgroup.clone() };
        for process in processes(&cgroup).take(MOST_PROCESSES) {
            // Nearly all of them share one.
            if self.inode_of(process).is_some_and(|inode| seen.contains(&inode)) {
                continue;
            }
            let Some(netns) = self.netns_of(process, uid) else { continue };
            if !seen.insert(netns.inode()) {
                continue;
            }
            if seen.len() > MOST_NAMESPACES {
                break;
            }
            if netns.inode() == self.own {
                why = NotFound::HostNetwork;
                continue;
            }
            match ips.iter().find(|ip| !net::has_address(&netns, **ip)) {
                None => return Ok(netns),
                Some(ip) => why = NotFound::NoAddress { ip: *ip },
            }
        }
        Err(why)
    }

    /// The addresses of the pod with this UID, whose cgroup this is: those of the namespace of its first
    /// process that is in another one than the node's. `None` while it has none, or they are not clear, or
    /// when it is more than a sandbox: an application may change the addresses of its namespace.
    pub fn addresses(&self, uid: &str, cgroup: &Path) -> Option<Vec<IpAddr>> {
        // CRI-O keeps what watches over a container beside it.
        let is_container = |(name, _): &(String, PathBuf)| !name.contains("conmon");
        let is_sandbox = || directories(cgroup).filter(is_container).count() == 1;
        if !is_sandbox() {
            return None;
        }
        let processes = processes(cgroup).take(MOST_PROCESSES);
        let mut namespaces = processes.filter_map(|process| self.netns_of(process, uid));
        let netns = namespaces.find(|netns| netns.inode() != self.own)?;
        let ips = net::pod_addresses(&netns)?;
        // No process is there before its cgroup.
        is_sandbox().then_some(ips)
    }

    /// Whether the pod still has a process in the namespace with this inode; `None` if it has none at
    /// all, or too many to look at, which proves nothing.
    pub fn is_in(&mut self, uid: &str, inode: u64) -> Option<bool> {
        let cgroup = self.cgroup_of(uid).ok()?;
        let mut found = None;
        for (number, process) in processes(&cgroup).enumerate() {
            if number == MOST_PROCESSES {
                return None;
            }
            // Asked where it decides: a pod may have thousands.
            let is_its = || is_of(&self.proc.join(process.to_string()), uid);
            match self.inode_of(process) {
                Some(other) if other == inode && inode != self.own && is_its() => {
                    return Some(true);
                }
                Some(other) if other != self.own && found.is_none() && is_its() => {
                    found = Some(false);
                }
                _ => {}
            }
        }
        found
    }

    /// The inode of a process' namespace, whoever's process that is.
    fn inode_of(&self, process: u32) -> Option<u64> {
        net::inode(&self.proc.join(process.to_string()).join("ns/net"))
    }

    fn cgroup_of(&mut self, uid: &str) -> Result<PathBuf, NotFound> {
        if self.known.get(uid).is_none_or(|path| !path.is_dir()) {
            self.look();
        }
        let found = self.known.get(uid).cloned();
        found.ok_or_else(|| NotFound::NoCgroup { cgroup: self.cgroup.clone() })
    }

    /// Finds every pod's cgroup. What is below one is the pod's own business.
    fn look(&mut self) {
        self.known.clear();
        let mut places = vec![(self.cgroup.clone(), 0)];
        while let Some((place, depth)) = places.pop() {
            for (name, path) in directories(&place) {
                if let Some(uid) = pod_of_name(&name) {
                    self.known.insert(uid, path);
                } else if depth < DEEPEST {
                    places.push((path, depth + 1));
                }
            }
        }
    }

    /// The namespace of a process, if that is still one of the pod's when it has been opened.
    fn netns_of(&self, process: u32, uid: &str) -> Option<Netns> {
        let place = self.proc.join(process.to_string());
        let netns = Netns::open(&place.join("ns/net")).ok()?;
        is_of(&place, uid).then_some(netns)
    }
}

/// Whether the process with this folder is one of the pod's, now.
fn is_of(place: &Path, uid: &str) -> bool {
    let cgroup = fs::read_to_string(place.join("cgroup"));
    cgroup.is_ok_and(|cgroup| pod_of_process(&cgroup).as_deref() == Some(uid))
}

/// Finds the kubelet by the names that its cgroup may have, and remembers where that was.
#[derive(Debug)]
pub struct Kubelet {
    root: PathBuf,
    names: Vec<String>,
    found: Option<PathBuf>,
}

impl Kubelet {
    /// `root` is the root of the node's cgroup2 tree, `names` what the kubelet's cgroup may be called. Of several
    /// that are there it is the one that is named first.
    pub fn new(root: &Path, names: &[String]) -> Self {
        Self { root: root.into(), names: names.to_vec(), found: None }
    }

    /// The ID of the cgroup of this node's kubelet, if it runs. A service that is restarted gets another.
    pub fn cgroup(&mut self) -> Option<u64> {
        // The kernel's ID of a cgroup is its inode.
        self.place().and_then(net::inode)
    }

    /// Where that cgroup is.
    pub fn place(&mut self) -> Option<&Path> {
        if self.found.as_ref().is_none_or(|found| !is_inhabited(found)) {
            self.found = self.look();
        }
        self.found.as_deref()
    }

    /// Not in pods, nor in what belongs to a user: those name their cgroups as they like.
    fn look(&self) -> Option<PathBuf> {
        let owner = |path: &Path| fs::metadata(path).ok().map(|found| found.uid());
        let root = owner(&self.root)?;
        let mut best: Option<(usize, PathBuf)> = None;
        let mut places = vec![(self.root.clone(), 0)];
        while let Some((place, depth)) = places.pop() {
            for (name, path) in directories(&place).filter(|(name, _)| pod_of_name(name).is_none())
            {
                if owner(&path) != Some(root) {
                    continue;
                }
                let rank = self.names.iter().position(|one| *one == name);
                if let Some(rank) = rank
                    && best.as_ref().is_none_or(|(before, _)| rank < *before)
                    && is_inhabited(&path)
                {
                    best = Some((rank, path.clone()));
                }
                if depth < DEEPEST {
                    places.push((path, depth + 1));
                }
            }
        }
        best.map(|(_, path)| path)
    }
}

/// Whether a process of this node is in it: 0 is one of another (cgroups(7)).
fn is_inhabited(cgroup: &Path) -> bool {
    let processes = fs::read_to_string(cgroup.join("cgroup.procs"));
    processes.is_ok_and(|list| list.lines().any(|process| process != "0"))
}

/// The processes in a cgroup and below it, those furthest up first.
pub(crate) fn processes(cgroup: &Path) -> impl Iterator<Item = u32> {
    let mut places = VecDeque::from([cgroup.to_owned()]);
    let lists = std::iter::from_fn(move || {
        let place = places.pop_front()?;
        places.extend(directories(&place).map(|(_name, path)| path));
        Some(fs::read_to_string(place.join("cgroup.procs")).unwrap_or_default())
    });
    lists.flat_map(|list| {
        // 0 is a process that this PID namespace does not see (cgroups(7)).
        let numbers = list.lines().filter_map(|line| line.parse().ok()).filter(|n| *n != 0);
        numbers.collect::<Vec<u32>>()
    })
}

pub(crate) fn directories(path: &Path) -> impl Iterator<Item = (String, PathBuf)> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    directories.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::chown;

    use super::*;
    use crate::dirwatch::testing::TempDir;

    /// A pod that runs containers itself, with namespaces of their own, in cgroups below its own.
    #[test]
    fn pod_with_many_processes_elsewhere_is_still_where_it_is() {
        const UID: &str = "d5a5c9f2-90d5-43b4-b1b4-2a7a0a1b6c11";
        let dir = TempDir::new();
        let (cgroup, proc) = (dir.path().join("cgroup"), dir.path().join("proc"));
        let write = |path: PathBuf, text: &str| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            path
        };
        let [node, pods, nested] =
            ["node", "pods", "nested"].map(|name| write(dir.path().join(name), ""));
        let process = |number: usize, namespace: &Path| {
            let place = proc.join(number.to_string());
            write(place.join("cgroup"), &format!("0::/kubepods/pod{UID}/container\n"));
            fs::create_dir_all(place.join("ns")).unwrap();
            fs::hard_link(namespace, place.join("ns/net")).unwrap();
            format!("{number}\n")
        };
        let container = cgroup.join(format!("kubepods/pod{UID}/container"));
        let crowd =
            |count: usize| (1000..1000 + count).map(|n| process(n, &nested)).collect::<String>();
        let mut processes = Processes {
            cgroup: cgroup.clone(),
            proc: proc.clone(),
            own: net::inode(&node).unwrap(),
            known: HashMap::new(),
        };
        let mut is_in = |namespace: &Path| processes.is_in(UID, net::inode(namespace).unwrap());
        write(container.join("nested/cgroup.procs"), &crowd(MOST_PROCESSES - 1));
        write(container.join("cgroup.procs"), "");
        assert_eq!(is_in(&pods), Some(false));
        // Wherever it is among them.
        write(container.join("nested/zz/cgroup.procs"), &process(7, &pods));
        assert_eq!((is_in(&pods), is_in(&node)), (Some(true), Some(false)));
        write(container.join("zz/cgroup.procs"), &process(8, &node));
        assert_eq!(is_in(&pods), None, "there are more than are looked at");
        write(container.join("cgroup.procs"), "7\n");
        assert_eq!(is_in(&pods), Some(true), "before what is below");
    }

    #[test]
    fn kubelet_is_the_service_of_this_node_and_no_pods() {
        let dir = TempDir::new();
        let place = |path: &str, processes: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("cgroup.procs"), processes).unwrap();
            path
        };
        let names = ["kubelet.service", "k3s.service"].map(str::to_owned);
        let mut kubelet = Kubelet::new(dir.path(), &names);
        assert_eq!(kubelet.cgroup(), None);
        place("kubepods/podd5a5c9f2-90d5-43b4-b1b4-2a7a0a1b6c11/kubelet.service", "5\n");
        place("another-node/kubelet.slice/kubelet.service", "0\n");
        assert_eq!(kubelet.cgroup(), None);
        let own = place("node/kubelet.slice/kubelet.service", "7\n");
        assert_eq!(kubelet.cgroup(), net::inode(&own));
        // A restart: systemd removes the cgroup and makes it again, perhaps elsewhere.
        fs::remove_dir_all(&own).unwrap();
        assert_eq!(kubelet.cgroup(), None);
        let next = place("system.slice/kubelet.service", "9\n");
        assert_eq!(kubelet.cgroup(), net::inode(&next));
        // A tree that systemd has left to a user.
        if chown(&next, Some(65_534), None).is_ok() {
            assert_eq!(Kubelet::new(dir.path(), &names).cgroup(), None);
        }
        let k3s = place("system.slice/k3s.service", "11\n");
        assert_eq!(Kubelet::new(dir.path(), &names).cgroup(), net::inode(&k3s));
        let own = place("a.slice/kubelet.service", "12\n");
        assert_eq!(Kubelet::new(dir.path(), &names).cgroup(), net::inode(&own), "named first");
    }
}
