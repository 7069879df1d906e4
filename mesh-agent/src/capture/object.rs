//! The programs and maps as they were built, and how this kernel is to load them.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use aya::EbpfLoader;
use aya::maps::MapData;
use aya::programs::ProgramType;
use aya::sys::{BpfHelper, is_helper_supported};

use super::CaptureError;
use super::pins::Pins;

/// The programs, built from `mesh-ebpf` by the build script.
pub(super) static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mesh-ebpf.o"));

/// Prepares loading for what this kernel has beyond what is needed.
pub(super) fn loader() -> EbpfLoader<'static> {
    static ON: u8 = 1;
    let mptcp =
        is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_skc_to_mptcp_sock);
    let retval = is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval);
    let mut loader = EbpfLoader::new();
    // Without it what a pod connects too early fails with `EPERM`.
    if retval.unwrap_or(false) {
        loader.override_global("HAS_RETVAL", &ON, true);
    }
    // Without it an application that uses MPTCP sees the listener as its peer.
    if mptcp.unwrap_or(false) && Path::new("/sys/kernel/btf/vmlinux").exists() {
        loader.override_global("HAS_MPTCP", &ON, true);
    }
    loader
}

/// A pinned map, by its name.
pub(super) fn open_map(pins: &Pins, name: &'static str) -> Result<OwnedFd, CaptureError> {
    let refused = |source: Box<dyn std::error::Error + Send + Sync>| CaptureError::Load {
        what: name,
        source,
    };
    let map = MapData::from_pin(pins.map(name)).map_err(|error| refused(error.into()))?;
    map.fd().as_fd().try_clone_to_owned().map_err(|error| refused(error.into()))
}
