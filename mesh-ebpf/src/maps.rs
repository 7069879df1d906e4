//! The maps. Sizes are defaults: the loader sets them, and [`mesh_common::maps::SPECS`] is what it
//! checks them against.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::bpf_ktime_get_boot_ns;
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SockHash};
use mesh_common::Counter;
use mesh_common::addr::WireIp;
use mesh_common::announce::Announcement;
use mesh_common::direct::{DirectConn, Flow, Verdict, VerdictKey};
use mesh_common::maps::{
    Admission, AdmissionKey, Control, DeliveryKey, EVENTS_BYTES, FlowKey, ListenerKey, PendingPod,
    PodInbound, PodOutbound, Secrets, SkipCidr, SockMeta,
};
use mesh_common::redirect::{Peer, PeerFlow, PeerFlowKey};
use mesh_common::verdict::Agent;

/// Read in place: a copy of its 196 bytes is a call and a loop. The kernel replaces an element that the agent
/// writes, and gives the old one to the next key that is written on that CPU, without waiting for who reads
/// it; since Linux 6.1 that is so with `BPF_F_NO_PREALLOC` too (`alloc_htab_elem()`, `bpf_mem_cache_free()`).
/// So what was decided from an element holds only if the key still leads to the same write afterwards: an
/// element is taken out before anybody else's settings are written into it, and what lies in it when it is
/// found is whole. (That it leads to the same element is not enough: the element may have been another's in
/// between. A number at either end of the value would not be either: which end is written first depends on the
/// processor's `memcpy()`.) On processors that reorder loads this makes a mix unlikely, and not impossible.
/// What else is read of it compares hashes or generations, of which two pods have no equal ones.
///
/// A lookup finds nothing, though there is an entry, if that is replaced by a newer one at the head of its bucket
/// after the lookup has passed there, or if the element it has come to is given to another key at that moment: so nobody is taken for no pod, and no address for one outside of the mesh,
/// by one lookup alone.
#[map]
pub(crate) static POD_OUTBOUND: HashMap<u64, PodOutbound> = HashMap::with_max_entries(1024, 0);

/// As `POD_OUTBOUND`.
#[map]
pub(crate) static POD_INBOUND: HashMap<WireIp, PodInbound> = HashMap::with_max_entries(2048, 0);

/// Every address that belongs to the mesh, and its generation.
#[map]
pub(crate) static DESTINATIONS: HashMap<WireIp, u64> =
    HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

/// Where somebody of the mesh may be, and what in it is left alone: asked of what is in no other map.
#[map]
pub(crate) static NETWORKS: LpmTrie<WireIp, u32> = LpmTrie::with_max_entries(65_536, 0);

#[map]
pub(crate) static SKIP_CIDRS: LpmTrie<SkipCidr, u32> = LpmTrie::with_max_entries(8192, 0);

#[btf_map]
pub(crate) static SOCK_META: SkStorage<SockMeta> = SkStorage::new();

/// Least recently used first out: a connect flood cannot fill it, and a flow that it pushes out is
/// reset by the agent.
#[map]
pub(crate) static FLOWS: LruHashMap<FlowKey, Flow> = LruHashMap::with_max_entries(131_072, 0);

/// What the agent has decided for the direct way.
#[map]
pub(crate) static VERDICTS: HashMap<VerdictKey, Verdict> =
    HashMap::with_max_entries(16_384, BPF_F_NO_PREALLOC);

/// Which tuple `connect` asks about on this CPU, so that `sk_lookup` tells the question from a SYN.
#[map]
pub(crate) static PROBE: PerCpuArray<DeliveryKey> = PerCpuArray::with_max_entries(1, 0);

/// Open direct connections, for an agent that starts while they are.
#[map]
pub(crate) static DIRECT_CONNS: HashMap<u64, DirectConn> =
    HashMap::with_max_entries(65_536, BPF_F_NO_PREALLOC);

#[map]
pub(crate) static EVENTS: RingBuf = RingBuf::with_byte_size(EVENTS_BYTES as u32, 0);

/// No program reads it: it lies here to be pinned with the others.
#[map]
static SECRETS: Array<Secrets> = Array::with_max_entries(1, 0);

/// Who announces a tuple says what it is, and of whom: [`mesh_common::announce`].
#[map]
pub(crate) static DELIVERIES: LruHashMap<DeliveryKey, Announcement> =
    LruHashMap::with_max_entries(131_072, 0);

/// Least recently used first out: what is pushed out costs a connection only where the node has changed
/// its source port.
#[map]
pub(crate) static ADMISSIONS: LruHashMap<AdmissionKey, Admission> =
    LruHashMap::with_max_entries(16_384, 0);

#[map]
pub(crate) static INBOUND: SockHash<ListenerKey> = SockHash::with_max_entries(32_768, 0);

/// Where the pods of this node are plugged in, of those that are redirected.
#[map]
pub(crate) static PEERS: HashMap<WireIp, Peer> = HashMap::with_max_entries(2048, 0);

/// Least recently used first out: what is pushed out, the node routes.
#[map]
pub(crate) static PEER_FLOWS: LruHashMap<PeerFlowKey, PeerFlow> =
    LruHashMap::with_max_entries(65_536, 0);

/// Pods that have a cgroup and are not captured yet.
#[map]
pub(crate) static PENDING: HashMap<u64, PendingPod> = HashMap::with_max_entries(1024, 0);

#[map]
pub(crate) static CONTROL: Array<Control> = Array::with_max_entries(1, 0);

#[map]
pub(crate) static COUNTERS: PerCpuArray<u64> =
    PerCpuArray::with_max_entries(Counter::ALL.len() as u32, 0);

/// Adds one to `counter`.
#[inline(always)]
pub(crate) fn count(counter: Counter) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the slot is this CPU's. A program that preempts us here can lose one of the two
        // increments: statistics may, a quota may not (the BPF target has no `fetch_add`).
        unsafe { *slot += 1 };
    }
}

/// Nanoseconds on `CLOCK_BOOTTIME`.
#[inline(always)]
pub(crate) fn now_ns() -> u64 {
    // SAFETY: the helper has no arguments and only reads a clock.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// `CLOCK_BOOTTIME` in units of 2^20 ns.
#[inline(always)]
pub(crate) fn now_ms() -> u32 {
    (now_ns() >> 20) as u32
}

/// Whether this address is a destination of the mesh. Looked up twice: see [`POD_OUTBOUND`].
#[inline(always)]
pub(crate) fn is_destination(ip: &WireIp) -> bool {
    DESTINATIONS.get_ptr(ip).or_else(|| DESTINATIONS.get_ptr(ip)).is_some()
}

/// Whether an enrolled pod of this node has this address. Looked up twice, too.
#[inline(always)]
pub(crate) fn is_pod(ip: &WireIp) -> bool {
    POD_INBOUND.get_ptr(ip).or_else(|| POD_INBOUND.get_ptr(ip)).is_some()
}

/// Whether a pod of the mesh has this address, on this node or another one.
#[inline(always)]
pub(crate) fn is_member(ip: &WireIp) -> bool {
    // Of this node's also where there was no room for all destinations.
    is_destination(ip) || is_pod(ip)
}

/// What the heartbeat says now.
#[inline(always)]
pub(crate) fn agent() -> Agent {
    let now_ns = now_ns();
    // An array of one element has its element: `None` is for the verifier.
    let heartbeat_ns = CONTROL.get(0).map_or(0, |control| control.heartbeat_ns);
    Agent::at(heartbeat_ns, now_ns)
}
