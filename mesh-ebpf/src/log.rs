//! Refusals told to the agent's log, with the addresses that a counter cannot have.
//!
//! Whoever sends SYNs decides how often one happens: every CPU tells ten a second, and counts all.

use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use mesh_common::addr::WireIp;

use crate::maps::now_ns;

/// Between two lines of one CPU.
const PAUSE_NS: u64 = 100_000_000;

/// When this CPU may tell again, on `CLOCK_BOOTTIME`. Not pinned, as the ring that lines go to: both
/// belong to one loading of the programs, and the next agent brings its own.
#[map]
static LOG_PAUSE: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// Tells the agent that a connection was refused: why, with four gaps for its two ends.
///
/// A line for which the ring has no room is lost: nobody waits here.
macro_rules! tell {
    ($why:literal, $src:expr, $dst:expr) => {
        if $crate::log::may_tell() {
            let (src, dst) = ($src, $dst);
            let (src_ip, dst_ip) = ($crate::log::octets(src.ip), $crate::log::octets(dst.ip));
            aya_log_ebpf::info!((), $why, src_ip, src.port(), dst_ip, dst.port());
        }
    };
}

pub(crate) use tell;

/// Whether this CPU has been silent for long enough, and if so begins the next pause.
#[inline(always)]
pub(crate) fn may_tell() -> bool {
    let now_ns = now_ns();
    let Some(until_ns) = LOG_PAUSE.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: the slot is this CPU's. A program that preempts us here can tell one line more.
    unsafe {
        if now_ns < *until_ns {
            return false;
        }
        *until_ns = now_ns + PAUSE_NS;
    }
    true
}

/// The address as a line carries it.
#[inline(always)]
pub(crate) fn octets(ip: WireIp) -> [u8; 16] {
    let mut octets = [0; 16];
    for (bytes, word) in octets.as_chunks_mut().0.iter_mut().zip(ip) {
        *bytes = word.to_ne_bytes();
    }
    octets
}
