//! What this kernel and this machine offer, feature by feature, for `mesh-agent check`.
//!
//! Each answer comes from trying: maps are created, our own programs are loaded, a link is made and moved
//! in a namespace that exists for that only. Versions are quoted, never asked. Nothing stays.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::thread;

use aya::Ebpf;
use aya::maps::{HashMap, IterableMap as _, MapData, MapType};
use aya::programs::{Program, ProgramError};
use aya::sys::is_map_supported;

use super::sys::{self, AttachType};
use super::{OBJECT, attach, loader, pins};
use crate::net::{Ends, Netns, SockDiag, add_client_address_routes, raise_loopback};

/// How a feature fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FeatureState {
    /// It works.
    Ok,
    /// The mesh works without it, less well.
    Warning,
    /// The mesh needs it.
    Missing,
}

impl FeatureState {
    /// The word for people and for `-o json`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Missing => "missing",
        }
    }
}

/// One thing that capture needs or likes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// What it is.
    pub name: &'static str,
    /// The Linux release that brought it.
    pub since: &'static str,
    /// How it fares.
    pub state: FeatureState,
    /// What was found, or what the kernel said.
    pub detail: String,
    /// What to do when it is not [`FeatureState::Ok`].
    pub remedy: &'static str,
}

/// `LOOPBACK_IFINDEX`: the index of `lo` in every namespace.
const LOOPBACK: u32 = 1;

const NEWER_KERNEL: &str =
    "a kernel of 5.15 or newer with CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF";

/// Tries everything that capture with these directories would use.
pub fn run(cgroup: &Path, bpffs: &Path) -> Vec<Feature> {
    let mut features = Vec::from(capabilities(effective_capabilities()));
    features.extend([cgroup_tree(cgroup), own_cgroup(cgroup), bpf_file_system(bpffs)]);
    features.extend(MAPS.iter().map(|(name, since, kind)| map(name, since, *kind)));
    features.push(lookup_and_delete());
    let (lookup, redirect) = programs(&mut features);
    features.extend(in_scratch_namespace(lookup, redirect));
    features.push(btf());
    features
}

/// The kernel's IDs of the link pinned at `path` and of its program.
///
/// # Errors
///
/// Nothing is pinned there, or something else than a link.
pub fn link(path: &Path) -> io::Result<(u32, u32)> {
    let link = sys::open_pin(path)?;
    let info = sys::link_info(link.as_fd())?;
    Ok((info.id, info.program))
}

/// A feature that the mesh cannot do without.
fn needed(
    name: &'static str,
    since: &'static str,
    remedy: &'static str,
    found: Result<String, String>,
) -> Feature {
    let (state, detail) = match found {
        Ok(detail) => (FeatureState::Ok, detail),
        Err(detail) => (FeatureState::Missing, detail),
    };
    Feature { name, since, state, detail, remedy }
}

/// How a feature fares that the mesh works without, and what was found.
fn liked(found: Result<String, String>) -> (FeatureState, String) {
    match found {
        Ok(detail) => (FeatureState::Ok, detail),
        Err(detail) => (FeatureState::Warning, detail),
    }
}

/// Those of this process, by their numbers (capabilities(7)).
fn effective_capabilities() -> Result<u64, String> {
    let status = fs::read_to_string("/proc/self/status").map_err(|error| error.to_string())?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    bits.ok_or_else(|| "/proc/self/status has no CapEff".to_owned())
}

/// What is needed everywhere, and what only an agent needs that finds pods' namespaces by their processes.
fn capabilities(effective: Result<u64, String>) -> [Feature; 2] {
    const EVERYWHERE: [(&str, u32); 4] =
        [("NET_ADMIN", 12), ("SYS_ADMIN", 21), ("PERFMON", 38), ("BPF", 39)];
    const IN_A_CLUSTER: [(&str, u32); 1] = [("SYS_PTRACE", 19)];
    let everywhere = effective.clone().and_then(|bits| all_of(&EVERYWHERE, bits));
    let remedy = "run as root, or add the capabilities to the container";
    let everywhere = needed("capabilities", "5.8", remedy, everywhere);
    let (state, detail) = liked(effective.and_then(|bits| all_of(&IN_A_CLUSTER, bits)));
    let in_a_cluster = Feature {
        name: "capability: SYS_PTRACE, in a cluster",
        since: "2.2",
        state,
        detail,
        remedy: "add SYS_PTRACE to the container: in a cluster pods' network namespaces are entered by \
                 /proc/PID/ns of their processes; with --manifests nothing needs it",
    };
    [everywhere, in_a_cluster]
}

/// The names of `wanted`, or of those that are not among `bits`.
fn all_of(wanted: &[(&str, u32)], bits: u64) -> Result<String, String> {
    let absent = wanted.iter().filter(|(_, bit)| bits >> bit & 1 == 0);
    let absent: Vec<_> = absent.map(|(name, _)| *name).collect();
    if absent.is_empty() {
        let names: Vec<_> = wanted.iter().map(|(name, _)| *name).collect();
        Ok(names.join(", "))
    } else {
        Err(format!("without {}", absent.join(", ")))
    }
}

fn cgroup_tree(cgroup: &Path) -> Feature {
    let found = pins::check_cgroup2(cgroup)
        .map(|()| cgroup.display().to_string())
        .map_err(|error| error.to_string());
    let remedy = "mount cgroup2 and name it with --cgroup";
    needed("cgroup v2", "4.5", remedy, found)
}

/// A `--cgroup` that does not even hold this process is often a container's own view, under which no
/// pod lies.
fn own_cgroup(cgroup: &Path) -> Feature {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default().to_owned();
    let below = cgroup.canonicalize().is_ok_and(|cgroup| {
        let mount = cgroup
            .ancestors()
            .take_while(|dir| pins::check_cgroup2(dir).is_ok())
            .last()
            .map(Path::to_owned);
        mount.is_some_and(|mount| mount.join(own.trim_start_matches('/')).starts_with(&cgroup))
    });
    Feature {
        name: "own cgroup below --cgroup",
        since: "4.5",
        state: if below { FeatureState::Ok } else { FeatureState::Warning },
        detail: own,
        remedy: "mount the host's cgroup tree, not the container's view of it",
    }
}

fn bpf_file_system(bpffs: &Path) -> Feature {
    let found = pins::check_bpffs(bpffs)
        .map(|()| bpffs.display().to_string())
        .map_err(|error| error.to_string());
    needed("bpffs", "4.4", "mount -t bpf bpf /sys/fs/bpf, on the host", found)
}

const MAPS: [(&str, &str, MapType); 8] = [
    ("map: hash", "3.19", MapType::Hash),
    ("map: array", "3.19", MapType::Array),
    ("map: per-CPU array", "4.6", MapType::PerCpuArray),
    ("map: LRU hash", "4.10", MapType::LruHash),
    ("map: LPM trie", "4.11", MapType::LpmTrie),
    ("map: sockhash", "4.18", MapType::SockHash),
    ("map: socket storage", "5.2", MapType::SkStorage),
    ("map: ring buffer", "5.8", MapType::RingBuf),
];

fn map(name: &'static str, since: &'static str, kind: MapType) -> Feature {
    let found = match is_map_supported(kind) {
        Ok(true) => Ok("created".to_owned()),
        Ok(false) => Err("the kernel does not know it".to_owned()),
        Err(error) => Err(with_causes(&error)),
    };
    needed(name, since, NEWER_KERNEL, found)
}

fn lookup_and_delete() -> Feature {
    let found = || {
        let mut map = HashMap::<MapData, u32, u32>::create(1, 0).map_err(|e| with_causes(&e))?;
        map.insert(7, 9, 0).map_err(|error| with_causes(&error))?;
        let taken =
            sys::take(map.map().fd().as_fd(), &7u32, 0u32).map_err(|error| error.to_string())?;
        if taken == Some(9) { Ok("read and removed".to_owned()) } else { Err(format!("{taken:?}")) }
    };
    needed("lookup and delete in a hash", "5.14", NEWER_KERNEL, found())
}

/// Programs, the kernel release that brought their hook and all helpers that they call there.
const PROGRAMS: [(&str, &str, &str); 7] = [
    ("mesh_connect4", "program: connect4", "5.8"),
    ("mesh_connect6", "program: connect6", "5.8"),
    ("mesh_peername4", "program: getpeername4", "5.8"),
    ("mesh_peername6", "program: getpeername6", "5.8"),
    ("mesh_sockops", "program: sock_ops with netns cookie", "5.15"),
    ("mesh_lookup", "program: sk_lookup", "5.9"),
    ("mesh_strict", "program: sk_lookup of strict pods", "5.9"),
];

/// Loads every program with maps of its own. Returns the lookup program, and the one that redirects.
fn programs(features: &mut Vec<Feature>) -> (Option<OwnedFd>, Result<OwnedFd, String>) {
    let mut loaded = loader().load(OBJECT).map_err(|error| with_causes(&error));
    let mut lookup = None;
    for (program, name, since) in PROGRAMS {
        let found = match &mut loaded {
            Ok(ebpf) => load(ebpf, program),
            Err(error) => Err(error.clone()),
        };
        let found = found.map(|fd| {
            if program == "mesh_lookup" {
                lookup = Some(fd);
            }
            "the verifier accepts it".to_owned()
        });
        features.push(needed(name, since, NEWER_KERNEL, found));
    }
    let redirect = loaded.and_then(|mut ebpf| load(&mut ebpf, "mesh_redirect"));
    (lookup, redirect)
}

fn load(ebpf: &mut Ebpf, name: &str) -> Result<OwnedFd, String> {
    let program = ebpf.program_mut(name).ok_or("not in the object")?;
    let loaded = attach::verified(|| match &mut *program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    });
    loaded.map_err(|error| with_causes(&error))?;
    let fd = program.fd().map_err(|error| with_causes(&error))?;
    fd.as_fd().try_clone_to_owned().map_err(|error| error.to_string())
}

/// What can only be tried in a network namespace that is nobody's.
fn in_scratch_namespace(
    lookup: Option<OwnedFd>,
    redirect: Result<OwnedFd, String>,
) -> Vec<Feature> {
    // The namespace ends with its thread and the descriptors that the closure drops.
    let probed = thread::spawn(move || {
        let own = own_namespace();
        let netns = own.as_ref().map_err(ToString::to_string);
        let cookie = netns.clone().and_then(|netns| match netns.cookie() {
            0 => Err("the cookie is zero".to_owned()),
            cookie => Ok(format!("{cookie}")),
        });
        let moved = netns.clone().and_then(|netns| {
            let lookup = lookup.as_ref().ok_or("there is no program to attach")?;
            sys::create_link(lookup.as_fd(), netns.as_fd(), AttachType::SkLookup)
                .and_then(|link| sys::update_link(link.as_fd(), lookup.as_fd()))
                .map(|()| "a link was made and moved".to_owned())
                .map_err(|error| error.to_string())
        });
        let redirected = netns.clone().and(redirect).and_then(|program| {
            sys::create_device_link(program.as_fd(), LOOPBACK, AttachType::TcxIngress)
                .map(|_link| "the program was attached to a device".to_owned())
                .map_err(|error| error.to_string())
        });
        let routes = netns.clone().and_then(|netns| {
            let both: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
            raise_loopback(netns)
                .and_then(|()| add_client_address_routes(netns, &both))
                .map(|()| "rule, route and tcp_fwmark_accept".to_owned())
                .map_err(|error| error.to_string())
        });
        let ended = netns.and_then(|_inside| {
            end_a_connection()
                .map(|()| "a connection was ended".to_owned())
                .map_err(|error| error.to_string())
        });
        let kernel = "a kernel with CONFIG_NET_NS, and CAP_SYS_ADMIN";
        let (state, detail) = liked(routes);
        let (end_state, end_detail) = liked(ended);
        let (redirect_state, redirect_detail) = liked(redirected);
        vec![
            needed("network namespace and its cookie", "5.14", kernel, cookie),
            needed("link update", "5.9", NEWER_KERNEL, moved),
            Feature {
                name: "client address towards the application",
                since: "4.0",
                state,
                detail,
                remedy: "malla.dev/preserve-client-address: false, or a kernel with IPv6 and \
                         CONFIG_IP_MULTIPLE_TABLES",
            },
            Feature {
                name: "ending a direct connection",
                since: "4.9",
                state: end_state,
                detail: end_detail,
                remedy: "malla.dev/direct: off, or a kernel with CONFIG_INET_DIAG_DESTROY",
            },
            Feature {
                name: "program: TCX, for --redirect-peer",
                since: "6.6",
                state: redirect_state,
                detail: redirect_detail,
                remedy: "--redirect-peer off, the default, or a kernel of 6.6 or newer",
            },
        ]
    });
    probed.join().unwrap_or_default()
}

/// Ends a connection as one is ended that is no longer allowed. Loopback is up already.
fn end_a_connection() -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let ends = Ends { local: client.local_addr()?, remote: client.peer_addr()? };
    let diag = SockDiag::open()?;
    let found = diag.look(ends, None)?.ok_or(io::ErrorKind::NotFound)?;
    if diag.destroy(ends, found.cookie)? { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
}

/// Moves this thread into a new network namespace.
fn own_namespace() -> io::Result<Netns> {
    sys::unshare_netns()?;
    Netns::current()
}

fn btf() -> Feature {
    let path = "/sys/kernel/btf/vmlinux";
    let found = fs::metadata(path).is_ok();
    Feature {
        name: "kernel BTF",
        since: "5.4",
        state: if found { FeatureState::Ok } else { FeatureState::Warning },
        detail: if found { path.to_owned() } else { format!("no {path}") },
        remedy: "nothing, or a kernel with CONFIG_DEBUG_INFO_BTF: without it getpeername() of MPTCP sockets shows the agent's listener",
    }
}

/// An error with what caused it, in one line: a verifier's log is hundreds.
fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let words = error.to_string();
        let line = words.lines().next().unwrap_or_default();
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(line);
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probe_says_what_is_wrong_and_what_to_do() {
        let features = run(Path::new("/proc"), Path::new("/proc/nowhere"));
        for name in ["cgroup v2", "bpffs"] {
            let feature = features.iter().find(|feature| feature.name == name).unwrap();
            assert_eq!(feature.state, FeatureState::Missing, "{feature:?}");
            assert!(feature.detail.contains("/proc"), "{feature:?}");
        }
        assert!(features.iter().all(|feature| !feature.remedy.is_empty()));
    }

    #[test]
    fn capability_that_only_clusters_need_is_a_warning() {
        fn told(effective: Result<&[u32], &str>) -> [String; 2] {
            let bits =
                |held: &[u32]| held.iter().fold(0u64, |bits, number| bits | (1u64 << number));
            let features = capabilities(effective.map(bits).map_err(str::to_owned));
            features.map(|feature| format!("{}: {}", feature.state.as_str(), feature.detail))
        }
        // NET_ADMIN, SYS_PTRACE, SYS_ADMIN, PERFMON and BPF in linux/capability.h.
        let all = "ok: NET_ADMIN, SYS_ADMIN, PERFMON, BPF";
        assert_eq!(told(Ok(&[12, 19, 21, 38, 39])), [all, "ok: SYS_PTRACE"]);
        assert_eq!(told(Ok(&[12, 21, 38, 39])), [all, "warning: without SYS_PTRACE"]);
        assert_eq!(told(Ok(&[12, 19, 38])), ["missing: without SYS_ADMIN, BPF", "ok: SYS_PTRACE"]);
        assert_eq!(told(Err("unread")), ["missing: unread", "warning: unread"]);
    }
}
