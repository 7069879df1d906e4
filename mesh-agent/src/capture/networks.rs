//! The map of blocks in which somebody of the mesh may be, and of what in them is left alone.

use std::collections::HashMap;
use std::net::IpAddr;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{MapData, MapError};
use mesh_common::addr::{V4_MAPPED_BITS, WireIp, from_ip, to_ip};
use mesh_common::maps::{BLOCK_LEFT_ALONE, BLOCK_UNREAD, BLOCK_USED};
use mesh_core::addr::Cidr;
use mesh_core::networks::Block;

use super::CaptureError;
use super::maps::absent_is_ok;

/// Blocks as [`super::Capture::set_destinations`] takes them.
pub(super) type Blocks = HashMap<Cidr, Block>;

/// The map, and what lies in it.
pub(super) struct Networks {
    map: LpmTrie<MapData, WireIp, u32>,
    written: Blocks,
}

impl std::fmt::Debug for Networks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Networks").field("written", &self.written).finish_non_exhaustive()
    }
}

impl Networks {
    /// Begins with what an earlier agent left in the map.
    pub(super) fn new(map: LpmTrie<MapData, WireIp, u32>) -> Result<Self, MapError> {
        let block = |(key, value): (Key<WireIp>, u32)| {
            let kind = if value == BLOCK_UNREAD { Block::Unread } else { Block::LeftAlone };
            (cidr(&key), kind)
        };
        let written = map.iter().map(|entry| entry.map(block)).collect::<Result<_, _>>()?;
        Ok(Self { map, written })
    }

    /// Captures what was left alone and is not to be any more. Before anything else: the rest can wait.
    pub(super) fn end_exceptions(
        &mut self,
        wanted: &Blocks,
        failed: &impl Fn(MapError) -> CaptureError,
    ) -> Result<(), CaptureError> {
        let is_over = |(cidr, block): &(&Cidr, &Block)| {
            **block == Block::LeftAlone && wanted.get(*cidr) != Some(&Block::LeftAlone)
        };
        let over: Vec<Cidr> = self.written.iter().filter(is_over).map(|(cidr, _)| *cidr).collect();
        for cidr in over {
            if wanted.contains_key(&cidr) {
                self.write(cidr, Block::Unread).map_err(failed)?;
            } else {
                self.remove(cidr).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Adds what is wanted and not there. What is captured comes first: for an exception without a place
    /// too much is captured, which the agent passes on.
    pub(super) fn add(
        &mut self,
        wanted: &Blocks,
        failed: &impl Fn(MapError) -> CaptureError,
    ) -> Result<(), CaptureError> {
        for kind in [Block::Unread, Block::LeftAlone] {
            for (cidr, block) in wanted.iter().filter(|(_, block)| **block == kind) {
                if self.written.get(cidr) != Some(block) {
                    self.write(*cidr, *block).map_err(failed)?;
                }
            }
        }
        Ok(())
    }

    /// Removes what is not wanted.
    pub(super) fn retain(
        &mut self,
        wanted: &Blocks,
        failed: &impl Fn(MapError) -> CaptureError,
    ) -> Result<(), CaptureError> {
        let gone = self.written.keys().filter(|cidr| !wanted.contains_key(*cidr));
        for cidr in gone.copied().collect::<Vec<_>>() {
            self.remove(cidr).map_err(failed)?;
        }
        Ok(())
    }

    /// The addresses that are left alone and to which somebody has connected since this was last asked.
    pub(super) fn take_used(&mut self) -> Vec<IpAddr> {
        let is_used = |cidr: &Cidr| {
            let value = self.map.get(&key(*cidr), 0);
            value.is_ok_and(|value| value == BLOCK_USED)
        };
        let left_alone = self.written.iter().filter(|(_, block)| **block == Block::LeftAlone);
        let addresses = left_alone.map(|(cidr, _)| *cidr).filter(|cidr| *cidr == cidr.ip().into());
        let used: Vec<Cidr> = addresses.filter(is_used).collect();
        for cidr in &used {
            // What cannot be written is used once more.
            self.write(*cidr, Block::LeftAlone).ok();
        }
        used.iter().map(Cidr::ip).collect()
    }

    fn write(&mut self, cidr: Cidr, block: Block) -> Result<(), MapError> {
        let value = match block {
            Block::Unread => BLOCK_UNREAD,
            Block::LeftAlone => BLOCK_LEFT_ALONE,
        };
        self.map.insert(&key(cidr), value, 0)?;
        self.written.insert(cidr, block);
        Ok(())
    }

    fn remove(&mut self, cidr: Cidr) -> Result<(), MapError> {
        absent_is_ok(self.map.remove(&key(cidr)))?;
        self.written.remove(&cidr);
        Ok(())
    }
}

/// In the kernel IPv4 is a part of IPv6: `Snapshot::captured_blocks` says what that must not mean.
fn key(cidr: Cidr) -> Key<WireIp> {
    let before = if cidr.ip().is_ipv4() { V4_MAPPED_BITS } else { 0 };
    Key::new(before + u32::from(cidr.prefix_len()), from_ip(cidr.ip()))
}

/// What [`key`] made a key of.
fn cidr(key: &Key<WireIp>) -> Cidr {
    let ip = to_ip(key.data());
    let before = if ip.is_ipv4() { V4_MAPPED_BITS } else { 0 };
    let bits = key.prefix_len().saturating_sub(before);
    Cidr::new(ip, u8::try_from(bits).unwrap_or(u8::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_of_either_family_survives_the_round_trip() {
        for text in ["10.244.1.0/24", "10.244.1.7/32", "0.0.0.0/0", "fd00:1::/64", "fd00:1::7/128"]
        {
            let block: Cidr = text.parse().unwrap();
            assert_eq!(cidr(&key(block)), block);
        }
    }
}
