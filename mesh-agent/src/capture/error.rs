//! What can go wrong between the agent and the kernel.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

/// Why capture could not be set up or changed.
///
/// Every one is the node's or the operator's affair: nothing here depends on what a peer sends.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// Pins need a bpffs, and this directory is not on one.
    #[error("{} is not on a bpffs: run `mount -t bpf bpf {}`, in a container on the node itself", dir.display(), mount.display())]
    NoBpffs {
        /// The configured directory.
        dir: PathBuf,
        /// Where to mount one.
        mount: PathBuf,
    },
    /// Programs attach to a cgroup v2 only.
    #[error("{} is not in a cgroup v2 hierarchy: --cgroup names the mount, on some systems /sys/fs/cgroup/unified", dir.display())]
    NotCgroup2 {
        /// The configured directory.
        dir: PathBuf,
    },
    /// What the agent delivers is not seen where it attaches, and would be captured again.
    #[error("this agent is in no cgroup below {}: --cgroup must be above its own cgroup, too", cgroup.display())]
    Outside {
        /// The configured directory.
        cgroup: PathBuf,
    },
    /// Something that is not ours, or not as we would have made it, lies where our pins go.
    #[error("{} is not ours: {why}; remove it, or give the agent another --bpffs", path.display())]
    Foreign {
        /// The pin or directory.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A file operation in bpffs failed.
    #[error("cannot {what} {}", path.display())]
    Pin {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kernel refused the programs or the maps: `mesh-agent check` says what is missing.
    #[error("the kernel refuses {what}: `mesh-agent check` says what it lacks")]
    Load {
        /// Which program or map.
        what: &'static str,
        /// The verifier's or the kernel's words.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A link could not be made or moved to a new program.
    #[error("cannot attach {what}: `mesh-agent check` says what the kernel lacks")]
    Attach {
        /// Which program.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A map has no room left.
    #[error("map {map} is full at {limit} entries: {remedy}")]
    Full {
        /// Which map.
        map: &'static str,
        /// How many entries it has.
        limit: u32,
        /// Which setting raises it.
        remedy: &'static str,
    },
    /// A map could not be read or written.
    #[error("cannot use map {map}")]
    Map {
        /// Which map.
        map: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A pod has at most one address of each family, and at least one.
    #[error(
        "pod {uid} has no usable address, or two of one family: leave one of each in status.podIPs"
    )]
    Addresses {
        /// The pod.
        uid: String,
    },
    /// Another enrolled pod has this address or namespace.
    #[error("pod {uid} shares its address or network namespace with enrolled pod {other}")]
    Shared {
        /// The pod.
        uid: String,
        /// Who was there first.
        other: String,
    },
    /// The UID is too long for a file name. A pod without one has its namespace and name in its stead.
    #[error("{uid:?} is too long for a UID: give the pod a shorter metadata.uid")]
    Uid {
        /// What was given.
        uid: String,
    },
    /// The pod is not enrolled.
    #[error("pod {uid} is not enrolled")]
    NotEnrolled {
        /// The pod.
        uid: String,
    },
    /// The pod's namespace could not be entered.
    #[error("cannot enter the network namespace of pod {uid}")]
    Netns {
        /// The pod.
        uid: String,
        /// Why not.
        source: io::Error,
    },
    /// Replies to a client's address would leave the pod instead of coming back to the agent.
    #[error(
        "cannot route replies to client addresses in pod {uid}: `mesh-agent check` tells why, \
         `malla.dev/preserve-client-address: false` does without"
    )]
    Routes {
        /// The pod.
        uid: String,
        /// Why not.
        source: io::Error,
    },
    /// A listener could not be opened in the pod.
    #[error("cannot listen on {ip} in pod {uid}")]
    Listen {
        /// The pod.
        uid: String,
        /// Its address.
        ip: IpAddr,
        /// Why not.
        source: io::Error,
    },
}

impl CaptureError {
    /// The `reason` label: a closed set, stable across releases.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoBpffs { .. } => "no_bpffs",
            Self::NotCgroup2 { .. } => "not_cgroup2",
            Self::Outside { .. } => "outside_cgroup",
            Self::Foreign { .. } => "foreign_pin",
            Self::Pin { .. } => "pin",
            Self::Load { .. } => "load",
            Self::Attach { .. } => "attach",
            Self::Full { .. } => "map_full",
            Self::Map { .. } => "map",
            Self::Addresses { .. } => "addresses",
            Self::Shared { .. } => "shared_address",
            Self::Uid { .. } => "uid",
            Self::NotEnrolled { .. } => "not_enrolled",
            Self::Netns { .. } => "netns",
            Self::Routes { .. } => "routes",
            Self::Listen { .. } => "listen",
        }
    }
}
