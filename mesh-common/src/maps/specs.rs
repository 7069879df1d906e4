//! What the pinned maps are, and the hash of everything in them.

use super::{
    Admission, AdmissionKey, Control, DeliveryKey, FlowKey, ListenerKey, PendingPod, PodInbound,
    PodOutbound, PortRange, PortRanges, Secrets, SkipCidr, SockMeta,
};
use crate::abi::{self, Layout as _};
use crate::addr::{WireAddr, WireIp};
use crate::announce::Announcement;
use crate::counter::Counter;
use crate::direct::{DirectConn, DirectEvent, Flow, Verdict, VerdictEndpoint, VerdictKey};
use crate::redirect::{Peer, PeerFlow, PeerFlowKey};

/// A map that both sides know: what its pin must look like to be reused.
#[derive(Clone, Copy, Debug)]
pub struct MapSpec {
    /// Name in the object, in the kernel and in bpffs.
    pub name: &'static str,
    /// `enum bpf_map_type` of the kernel's UAPI.
    pub kind: u32,
    /// Bytes of a key.
    pub key_size: usize,
    /// Bytes of a value.
    pub value_size: usize,
    /// How many entries it has room for.
    pub size: MapSize,
}

/// Where a map's number of entries comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapSize {
    /// Always this many.
    Fixed(usize),
    /// The pods of a node, times this.
    PerPod(usize),
    /// The destinations of the mesh, or the blocks in which some may be.
    Destinations,
    /// The connections between `connect()` and the agent's `accept()`.
    Flows,
    /// The verdicts of the direct way.
    Verdicts,
    /// The connections between pods of the node that are redirected; one where none are.
    Redirected(usize),
}

const HASH: u32 = 1;
const ARRAY: u32 = 2;
const PERCPU_ARRAY: u32 = 6;
const LRU_HASH: u32 = 9;
const LPM_TRIE: u32 = 11;
const RINGBUF: u32 = 27;
const SOCKHASH: u32 = 18;
const SK_STORAGE: u32 = 24;

/// Inbound listeners per address that fit.
pub const MAX_SHARDS: usize = 16;
/// Entries of each pod's `skip-outbound-cidrs` that fit: 32 blocks, and IPv4 inside of a larger one that is not skipped.
/// The trie takes memory only for those that are there.
pub const SKIP_CIDRS_PER_POD: usize = 33;

/// Bytes of `EVENTS`: some 6,000 records, read ten times a second.
pub const EVENTS_BYTES: usize = 1 << 20;

/// Every pinned map.
pub const SPECS: [MapSpec; 20] = [
    spec("POD_OUTBOUND", HASH, size_of::<u64>(), size_of::<PodOutbound>(), MapSize::PerPod(1)),
    spec("POD_INBOUND", HASH, size_of::<WireIp>(), size_of::<PodInbound>(), MapSize::PerPod(2)),
    spec("DESTINATIONS", HASH, size_of::<WireIp>(), size_of::<u64>(), MapSize::Destinations),
    // The key is a prefix length and an address.
    spec("NETWORKS", LPM_TRIE, 20, size_of::<u32>(), MapSize::Destinations),
    spec("SKIP_CIDRS", LPM_TRIE, 28, size_of::<u32>(), MapSize::PerPod(SKIP_CIDRS_PER_POD)),
    spec("SOCK_META", SK_STORAGE, size_of::<u32>(), size_of::<SockMeta>(), MapSize::Fixed(0)),
    spec("FLOWS", LRU_HASH, size_of::<FlowKey>(), size_of::<Flow>(), MapSize::Flows),
    spec(
        "DELIVERIES",
        LRU_HASH,
        size_of::<DeliveryKey>(),
        size_of::<Announcement>(),
        MapSize::Fixed(65_536),
    ),
    spec(
        "ADMISSIONS",
        LRU_HASH,
        size_of::<AdmissionKey>(),
        size_of::<Admission>(),
        MapSize::Fixed(16_384),
    ),
    spec(
        "INBOUND",
        SOCKHASH,
        size_of::<ListenerKey>(),
        size_of::<u32>(),
        MapSize::PerPod(2 * MAX_SHARDS),
    ),
    spec("VERDICTS", HASH, size_of::<VerdictKey>(), size_of::<Verdict>(), MapSize::Verdicts),
    spec("PROBE", PERCPU_ARRAY, size_of::<u32>(), size_of::<DeliveryKey>(), MapSize::Fixed(1)),
    spec("DIRECT_CONNS", HASH, size_of::<u64>(), size_of::<DirectConn>(), MapSize::Fixed(65_536)),
    spec("EVENTS", RINGBUF, 0, 0, MapSize::Fixed(EVENTS_BYTES)),
    spec("SECRETS", ARRAY, size_of::<u32>(), size_of::<Secrets>(), MapSize::Fixed(1)),
    spec("PEERS", HASH, size_of::<WireIp>(), size_of::<Peer>(), MapSize::PerPod(2)),
    spec(
        "PEER_FLOWS",
        LRU_HASH,
        size_of::<PeerFlowKey>(),
        size_of::<PeerFlow>(),
        MapSize::Redirected(65_536),
    ),
    spec("PENDING", HASH, size_of::<u64>(), size_of::<PendingPod>(), MapSize::PerPod(1)),
    spec("CONTROL", ARRAY, size_of::<u32>(), size_of::<Control>(), MapSize::Fixed(1)),
    spec(
        "COUNTERS",
        PERCPU_ARRAY,
        size_of::<u32>(),
        size_of::<u64>(),
        MapSize::Fixed(Counter::ALL.len()),
    ),
];

const fn spec(
    name: &'static str,
    kind: u32,
    key_size: usize,
    value_size: usize,
    size: MapSize,
) -> MapSpec {
    MapSpec { name, kind, key_size, value_size, size }
}

/// Everything that lies in maps, the maps, and the order of the counters, in one number.
pub(crate) const fn layout_hash(mut hash: u64) -> u64 {
    let structs = [
        WireAddr::HASH,
        PortRange::HASH,
        PortRanges::HASH,
        PodOutbound::HASH,
        PodInbound::HASH,
        FlowKey::HASH,
        DeliveryKey::HASH,
        Announcement::HASH,
        AdmissionKey::HASH,
        Admission::HASH,
        ListenerKey::HASH,
        SkipCidr::HASH,
        SockMeta::HASH,
        PendingPod::HASH,
        Control::HASH,
        Secrets::HASH,
        VerdictKey::HASH,
        VerdictEndpoint::HASH,
        Verdict::HASH,
        Flow::HASH,
        DirectConn::HASH,
        DirectEvent::HASH,
        Peer::HASH,
        PeerFlowKey::HASH,
        PeerFlow::HASH,
    ];
    let mut i = 0;
    while i < structs.len() {
        hash = abi::bytes(hash, &structs[i].to_le_bytes());
        i += 1;
    }
    i = 0;
    while i < SPECS.len() {
        let spec = SPECS[i];
        hash = abi::text(hash, spec.name);
        hash = abi::number(hash, spec.kind as usize);
        hash = abi::number(hash, spec.key_size);
        hash = abi::number(hash, spec.value_size);
        i += 1;
    }
    i = 0;
    while i < Counter::ALL.len() {
        hash = abi::text(hash, Counter::ALL[i].name());
        i += 1;
    }
    hash
}
