//! The maps as the agent holds them, and the translation of a pod's settings into their values.

use std::borrow::Borrow;
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::os::fd::AsRawFd as _;

use aya::Ebpf;
use aya::maps::lpm_trie::Key;
use aya::maps::{HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, SkStorage, SockHash};
use mesh_common::addr::{V4_MAPPED_BITS, WireIp, from_ip};
use mesh_common::direct::{DirectConn, Verdict, VerdictKey};
use mesh_common::maps::{
    FAIL_OPEN, HAS_SKIP_CIDRS, ListenerKey, MAX_PORTS, OUTBOUND_ALL, PendingPod, PodInbound,
    PodOutbound, PortRange, PortRanges, ROLE_LISTENER, SKIP_CIDRS_PER_POD, SPECS, STRICT, SkipCidr,
    SockMeta, words,
};
use mesh_common::redirect::Peer;
use mesh_common::{Counter, abi};
use mesh_core::addr::Cidr;
use mesh_core::generation::Generation;
use mesh_core::settings::{MAX_SKIP_CIDRS, Mode, Outbound, PortList, Settings};

use super::{CaptureConfig, CaptureError, pins};

/// Writable from one place at a time: [`super::Capture`] keeps it behind a lock.
pub(super) struct Maps {
    pub(super) outbound: HashMap<MapData, u64, PodOutbound>,
    pub(super) inbound: HashMap<MapData, WireIp, PodInbound>,
    pub(super) skip: LpmTrie<MapData, SkipCidr, u32>,
    pub(super) listeners: SockHash<MapData, ListenerKey>,
    pub(super) destinations: HashMap<MapData, WireIp, Generation>,
    pub(super) verdicts: HashMap<MapData, VerdictKey, Verdict>,
    pub(super) direct: HashMap<MapData, u64, DirectConn>,
    pub(super) counters: PerCpuArray<MapData, u64>,
    sockets: SkStorage<MapData, SockMeta>,
    peers: HashMap<MapData, WireIp, Peer>,
    /// The number of the last write of a pod's entry.
    written: u32,
    config: CaptureConfig,
}

// Some of aya's maps have no `Debug`.
impl fmt::Debug for Maps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Maps").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Maps {
    pub(super) fn take(ebpf: &mut Ebpf, config: &CaptureConfig) -> Result<Self, CaptureError> {
        Ok(Self {
            outbound: typed(ebpf, "POD_OUTBOUND")?,
            inbound: typed(ebpf, "POD_INBOUND")?,
            skip: typed(ebpf, "SKIP_CIDRS")?,
            listeners: typed(ebpf, "INBOUND")?,
            destinations: typed(ebpf, "DESTINATIONS")?,
            verdicts: typed(ebpf, "VERDICTS")?,
            direct: typed(ebpf, "DIRECT_CONNS")?,
            counters: typed(ebpf, "COUNTERS")?,
            sockets: typed(ebpf, "SOCK_META")?,
            peers: typed(ebpf, "PEERS")?,
            // Unlike those of the agent before, whose last one may still be read.
            written: fastrand::u32(..),
            config: config.clone(),
        })
    }

    /// Says that a map is full in words that help, and leaves other errors as they are.
    pub(super) fn failed(&self, map: &'static str) -> impl Fn(MapError) -> CaptureError + use<> {
        let (limit, remedy) = self.room(map);
        move |error| {
            let source = io_error(error);
            match source.raw_os_error() {
                Some(libc::E2BIG | libc::ENOSPC) => CaptureError::Full { map, limit, remedy },
                _ => CaptureError::Map { map, source },
            }
        }
    }

    /// That a map is full, in the same words.
    pub(super) fn full(&self, map: &'static str) -> CaptureError {
        let (limit, remedy) = self.room(map);
        CaptureError::Full { map, limit, remedy }
    }

    /// How many entries a map has room for, and what gives it more.
    fn room(&self, map: &'static str) -> (u32, &'static str) {
        let spec = SPECS.iter().find(|spec| spec.name == map);
        let limit = spec.map_or(0, |spec| pins::entries(spec, &self.config));
        let remedy = if matches!(map, "DESTINATIONS" | "NETWORKS") {
            "raise --max-destinations"
        } else if map == "VERDICTS" {
            "raise --max-verdicts"
        } else if map == "SKIP_CIDRS" {
            "raise --max-pods, or name fewer blocks in skip-outbound-cidrs"
        } else {
            "raise --max-pods"
        };
        (limit, remedy)
    }

    /// How many verdicts there is room for.
    pub(super) fn verdicts_room(&self) -> usize {
        usize::try_from(self.config.max_verdicts).unwrap_or(usize::MAX)
    }

    pub(super) fn set_outbound(
        &mut self,
        netns: u64,
        pod: &PodOutbound,
    ) -> Result<(), CaptureError> {
        let failed = self.failed("POD_OUTBOUND");
        self.written = self.written.wrapping_add(1);
        let pod = PodOutbound { written: self.written, ..*pod };
        self.outbound.insert(netns, pod, 0).map_err(failed)
    }

    /// How the pod in this namespace is captured, by whichever agent.
    pub(super) fn outbound_of(&self, netns: u64) -> Option<PodOutbound> {
        self.outbound.get(&netns, 0).ok()
    }

    /// Whose entries `POD_OUTBOUND` has, by namespace: hashes of UIDs.
    pub(super) fn owners(&self) -> Result<Vec<(u64, [u32; 2])>, CaptureError> {
        let entries = pairs(&self.outbound).map_err(self.failed("POD_OUTBOUND"))?;
        Ok(entries.into_iter().map(|(netns, pod)| (netns, pod.pod)).collect())
    }

    pub(super) fn remove_outbound(&mut self, netns: u64) -> Result<(), CaptureError> {
        let failed = self.failed("POD_OUTBOUND");
        absent_is_ok(self.outbound.remove(&netns)).map_err(failed)
    }

    /// Whether a pod with this address is captured, by whichever agent.
    pub(super) fn has_inbound(&self, ip: WireIp) -> bool {
        self.inbound.get(&ip, 0).is_ok()
    }

    pub(super) fn set_inbound(&mut self, ip: IpAddr, pod: &PodInbound) -> Result<(), CaptureError> {
        let failed = self.failed("POD_INBOUND");
        self.written = self.written.wrapping_add(1);
        let pod = PodInbound { written: self.written, ..*pod };
        self.inbound.insert(from_ip(ip), pod, 0).map_err(failed)
    }

    pub(super) fn remove_inbound(&mut self, ip: WireIp) -> Result<(), CaptureError> {
        let failed = self.failed("POD_INBOUND");
        absent_is_ok(self.inbound.remove(&ip)).map_err(failed)
    }

    /// Has `connect` know an outbound listener from whoever may have its port after the agent.
    pub(super) fn mark_listener(&mut self, listener: &TcpListener) -> Result<(), CaptureError> {
        let failed = self.failed("SOCK_META");
        self.sockets.insert(listener, SockMeta::of(ROLE_LISTENER), 0).map_err(failed)
    }

    pub(super) fn set_listener(
        &mut self,
        ip: IpAddr,
        shard: u32,
        listener: &TcpListener,
    ) -> Result<(), CaptureError> {
        let failed = self.failed("INBOUND");
        let key = ListenerKey { ip: from_ip(ip), shard };
        self.listeners.insert(key, listener.as_raw_fd(), 0).map_err(failed)
    }

    pub(super) fn remove_listener(&mut self, ip: IpAddr, shard: u32) -> Result<(), CaptureError> {
        let failed = self.failed("INBOUND");
        let key = ListenerKey { ip: from_ip(ip), shard };
        absent_is_ok(self.listeners.remove(&key)).map_err(failed)
    }

    pub(super) fn add_skip(
        &mut self,
        netns: u64,
        block: &Cidr,
        skipped: u32,
    ) -> Result<(), CaptureError> {
        let failed = self.failed("SKIP_CIDRS");
        self.skip.insert(&skip_key(netns, block), skipped, 0).map_err(failed)
    }

    pub(super) fn remove_skip(&mut self, netns: u64, block: &Cidr) -> Result<(), CaptureError> {
        let failed = self.failed("SKIP_CIDRS");
        absent_is_ok(self.skip.remove(&skip_key(netns, block))).map_err(failed)
    }

    /// Removes all blocks of namespaces other than `netns`, and of these all but `known`, where that is
    /// known.
    pub(super) fn keep_skips(
        &mut self,
        netns: &HashSet<u64>,
        known: &std::collections::HashMap<u64, BTreeMap<Cidr, u32>>,
    ) -> Result<(), CaptureError> {
        let failed = self.failed("SKIP_CIDRS");
        let all: Vec<_> = self.skip.iter().collect::<Result<_, _>>().map_err(&failed)?;
        for key in in_order_of_removal(all) {
            let [low, high] = key.data().netns;
            let of = u64::from(low) | u64::from(high) << 32;
            let same = |block: &Cidr| {
                let wanted = skip_key(of, block);
                (wanted.prefix_len(), wanted.data()) == (key.prefix_len(), key.data())
            };
            // A few: `MAX_SKIP_CIDRS`.
            let wanted = known.get(&of).is_none_or(|skips| skips.keys().any(same));
            if !netns.contains(&of) || !wanted {
                absent_is_ok(self.skip.remove(&key)).map_err(&failed)?;
            }
        }
        Ok(())
    }

    pub(super) fn set_destination(
        &mut self,
        ip: WireIp,
        generation: Generation,
    ) -> Result<(), CaptureError> {
        let failed = self.failed("DESTINATIONS");
        self.destinations.insert(ip, generation, 0).map_err(failed)
    }

    pub(super) fn remove_destination(&mut self, ip: WireIp) -> Result<(), CaptureError> {
        let failed = self.failed("DESTINATIONS");
        absent_is_ok(self.destinations.remove(&ip)).map_err(failed)
    }

    /// Where the pod with this address is plugged in, if it is redirected.
    pub(super) fn peer(&self, ip: WireIp) -> Option<Peer> {
        self.peers.get(&ip, 0).ok()
    }

    pub(super) fn set_peer(&mut self, ip: WireIp, peer: &Peer) -> Result<(), CaptureError> {
        let failed = self.failed("PEERS");
        self.peers.insert(ip, peer, 0).map_err(failed)
    }

    /// Removes all but those of which `keep` is true.
    pub(super) fn keep_peers(
        &mut self,
        keep: impl Fn(&WireIp, &Peer) -> bool,
    ) -> Result<(), CaptureError> {
        let failed = self.failed("PEERS");
        for (ip, peer) in pairs(&self.peers).map_err(&failed)? {
            if !keep(&ip, &peer) {
                absent_is_ok(self.peers.remove(&ip)).map_err(&failed)?;
            }
        }
        Ok(())
    }

    /// Each counter's sum over all CPUs; one that cannot be read is left out.
    pub(super) fn counters(&self) -> Vec<(&'static str, u64)> {
        let each = Counter::ALL.iter();
        each.filter_map(|counter| Some((counter.name(), self.sum(*counter)?))).collect()
    }

    /// One counter's sum; 0 if it cannot be read.
    pub(super) fn counter(&self, counter: Counter) -> u64 {
        self.sum(counter).unwrap_or(0)
    }

    fn sum(&self, counter: Counter) -> Option<u64> {
        let per_cpu = self.counters.get(&(counter as u32), 0).ok()?;
        Some(per_cpu.iter().sum())
    }
}

/// Takes a map out of the loaded object.
pub(super) fn map(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, CaptureError> {
    ebpf.take_map(name).ok_or_else(|| CaptureError::Load {
        what: name,
        source: "the object has no map of this name".into(),
    })
}

pub(super) fn typed<T>(ebpf: &mut Ebpf, name: &'static str) -> Result<T, CaptureError>
where
    T: TryFrom<Map, Error = MapError>,
{
    T::try_from(map(ebpf, name)?)
        .map_err(|error| CaptureError::Load { what: name, source: error.into() })
}

/// The error of the system call, which is what an operator can look up.
pub(super) fn io_error(error: MapError) -> io::Error {
    match error {
        MapError::SyscallError(error) => error.io_error,
        MapError::KeyNotFound | MapError::ElementNotFound => {
            io::Error::from_raw_os_error(libc::ENOENT)
        }
        other => io::Error::other(other),
    }
}

pub(super) fn absent_is_ok(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if matches!(error.io_error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) =>
        {
            // A sockhash answers EINVAL for a socket that closed meanwhile.
            Ok(())
        }
        other => other,
    }
}

fn skip_key(netns: u64, block: &Cidr) -> Key<SkipCidr> {
    let before = SkipCidr::NETNS_BITS + if block.ip().is_ipv4() { V4_MAPPED_BITS } else { 0 };
    let prefix_len = before + u32::from(block.prefix_len());
    Key::new(prefix_len, SkipCidr::new(netns, from_ip(block.ip())))
}

const _: () =
    assert!(MAX_SKIP_CIDRS < SKIP_CIDRS_PER_POD, "one pod must not take another's entries");

/// What `SKIP_CIDRS` holds for a pod with these blocks: 1 for a block that is skipped, 0 for one that is
/// not, although it lies in a larger one that is.
///
/// In the kernel IPv4 is a part of IPv6. `::/0` means IPv6 to whoever writes it, and must not let IPv4
/// leave in plain text.
pub(super) fn skips(blocks: &[Cidr]) -> BTreeMap<Cidr, u32> {
    let mut skips = BTreeMap::new();
    let mapped = Ipv4Addr::UNSPECIFIED.to_ipv6_mapped();
    if blocks.iter().any(|block| block.has_v6(mapped)) {
        skips.insert(Cidr::ALL_V4, 0);
    }
    skips.extend(blocks.iter().map(|block| (*block, 1)));
    skips
}

/// Blocks in the order in which they may be removed one by one: what is not skipped inside of a larger one goes after
/// that one. On its own it changes nothing; the larger one on its own lets it out.
pub(super) fn in_order_of_removal<B>(blocks: impl IntoIterator<Item = (B, u32)>) -> Vec<B> {
    let mut blocks: Vec<_> = blocks.into_iter().collect();
    blocks.sort_by_key(|(_, skipped)| *skipped == 0);
    blocks.into_iter().map(|(block, _)| block).collect()
}

/// A pod's UID as programs know and tell it: its hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PodTag(pub(super) [u32; 2]);

impl PodTag {
    /// Of the pod with this UID.
    pub fn of(uid: &str) -> Self {
        Self(pod_hash(uid))
    }
}

/// A pod's UID as its entries carry it.
pub(super) fn pod_hash(uid: &str) -> [u32; 2] {
    let hash = abi::text(abi::SEED, uid);
    words(hash)
}

/// The value of `POD_OUTBOUND` for a pod: `outbound` is what it captures, whatever its settings say,
/// and `ports` are those of its outbound listeners.
pub(super) fn outbound(
    uid: &str,
    settings: &Settings,
    outbound: Outbound,
    ports: &[(IpAddr, Vec<u16>)],
    generation: Generation,
) -> PodOutbound {
    let mut pod = PodOutbound {
        ip4: [0; 4],
        ip6: [0; 4],
        ports4: [0; MAX_PORTS],
        ports6: [0; MAX_PORTS],
        skip: ranges(&settings.skip_outbound_ports),
        ports_len: 0,
        flags: outbound_flags(settings, outbound)
            | flag(!settings.skip_outbound_cidrs.is_empty(), HAS_SKIP_CIDRS),
        turn: 0,
        pod: pod_hash(uid),
        generation: words(generation),
        written: 0,
    };
    for (ip, ports) in ports {
        let (own_ip, own_ports) = match ip {
            IpAddr::V4(_) => (&mut pod.ip4, &mut pod.ports4),
            IpAddr::V6(_) => (&mut pod.ip6, &mut pod.ports6),
        };
        *own_ip = from_ip(*ip);
        pod.ports_len = copy_ports(own_ports, ports);
    }
    pod
}

/// The value of `POD_INBOUND` for one of a pod's addresses.
pub(super) fn inbound(
    uid: &str,
    settings: &Settings,
    ports: &[u16],
    listeners: u32,
    generation: Generation,
) -> PodInbound {
    let mut own_ports = [0; MAX_PORTS];
    PodInbound {
        skip: ranges(&settings.skip_inbound_ports),
        own_ports_len: copy_ports(&mut own_ports, ports),
        own_ports,
        listeners,
        flags: flag(settings.mode == Mode::Strict, STRICT) | flag(settings.fail_open, FAIL_OPEN),
        pod: pod_hash(uid),
        generation: words(generation),
        written: 0,
    }
}

/// In place of a UID's hash: nobody knows whose entry it is ([`super::inherit`]).
pub(super) const NAMELESS: [u32; 2] = [0; 2];

/// The value of `POD_OUTBOUND` for a pod of which nobody knows more than its namespace: nothing leaves it
/// for the mesh.
pub(super) fn nameless_outbound(outbound: Outbound) -> PodOutbound {
    PodOutbound {
        ip4: [0; 4],
        ip6: [0; 4],
        ports4: [0; MAX_PORTS],
        ports6: [0; MAX_PORTS],
        skip: PortRanges::NONE,
        ports_len: 0,
        flags: flag(outbound == Outbound::All, OUTBOUND_ALL),
        turn: 0,
        pod: NAMELESS,
        generation: [0; 2],
        written: 0,
    }
}

/// The value of `POD_INBOUND` for a pod of which nobody knows more than an address: nothing comes in but
/// what was announced.
pub(super) fn nameless_inbound() -> PodInbound {
    PodInbound {
        skip: PortRanges::NONE,
        own_ports: [0; MAX_PORTS],
        own_ports_len: 0,
        listeners: 0,
        flags: STRICT,
        pod: NAMELESS,
        generation: [0; 2],
        written: 0,
    }
}

/// The value of `PENDING` for a pod that takes part like this, until it is captured.
pub(super) fn pending(settings: &Settings) -> PendingPod {
    let flags = outbound_flags(settings, settings.outbound);
    PendingPod { until_ns: 0, skip: ranges(&settings.skip_outbound_ports), flags }
}

fn outbound_flags(settings: &Settings, outbound: Outbound) -> u32 {
    flag(outbound == Outbound::All, OUTBOUND_ALL) | flag(settings.fail_open, FAIL_OPEN)
}

fn flag(on: bool, flag: u32) -> u32 {
    if on { flag } else { 0 }
}

/// Copies as many as fit; the caller opened no more.
fn copy_ports(to: &mut [u16; MAX_PORTS], from: &[u16]) -> u32 {
    let mut len = 0;
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from;
        len += 1;
    }
    len
}

fn ranges(list: &PortList) -> PortRanges {
    let mut ranges = PortRanges::NONE;
    for (to, from) in ranges.ranges.iter_mut().zip(list.ranges()) {
        *to = PortRange { first: *from.start(), last: *from.end() };
        ranges.len += 1;
    }
    ranges
}

/// All of a hash map.
pub(super) fn pairs<K: aya::Pod, V: aya::Pod, T: Borrow<MapData>>(
    map: &HashMap<T, K, V>,
) -> Result<Vec<(K, V)>, MapError> {
    map.iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exception_goes_after_the_block_that_it_is_in() {
        let blocks = ["::/0", "10.1.0.0/16"].map(|text| text.parse().unwrap());
        let order = in_order_of_removal(skips(&blocks));
        assert_eq!(order.len(), 3);
        assert_eq!(order.last(), Some(&Cidr::ALL_V4));
    }
}
