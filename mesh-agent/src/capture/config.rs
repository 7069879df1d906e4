//! What capture is told at its start.

use std::path::PathBuf;

/// Where capture attaches, where it pins, and how much it has room for.
///
/// A change of a size is a change of layout: the next start moves everything to new maps.
#[derive(Clone, Debug)]
pub struct CaptureConfig {
    /// Directory of the cgroup v2 hierarchy whose processes are captured. Must be above every pod.
    pub cgroup: PathBuf,
    /// Directory of pins, on a bpffs. Must be the same for every start, and no other agent's.
    pub bpffs: PathBuf,
    /// Enrolled pods. Default 1024; the kubelet's is 110 per node.
    pub max_pods: u32,
    /// Addresses of services and pods in the mesh, and as many blocks of addresses that are unread, with
    /// their exceptions. Default 65536; one takes about 100 bytes, when used.
    pub max_destinations: u32,
    /// Connections between `connect()` and the agent's `accept()`. Default 65536, 7 MiB of the kernel's
    /// memory. Too small and a flood of connections pushes out, and so resets, others.
    pub max_flows: u32,
    /// Verdicts of the direct way: one for each pod and destination that it talks to. Default 16384; one
    /// takes about 1,100 bytes, when used. Too small and the agent carries the rest.
    pub max_verdicts: u32,
    /// Whether packets between two pods of the node are handed over past it. Default false: they then
    /// skip its netfilter too, and with it what is enforced there.
    pub redirect_peer: bool,
}

impl Default for CaptureConfig {
    fn default() -> Self {
        Self {
            cgroup: "/sys/fs/cgroup".into(),
            bpffs: "/sys/fs/bpf/malla".into(),
            max_pods: 1024,
            max_destinations: 65_536,
            max_flows: 65_536,
            max_verdicts: 16_384,
            redirect_peer: false,
        }
    }
}
