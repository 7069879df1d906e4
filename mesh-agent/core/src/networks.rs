//! Blocks of addresses where pods may be of which nobody has been told.
//!
//! Not every pod is known before somebody needs it, and one that no service names is known by nothing but
//! the block that its address is from. What is in a block is looked up once somebody dials it.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::addr::Cidr;

/// Whether connections to a block's addresses are captured, of which nothing else is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Block {
    /// They are: whoever is there has to be read first.
    Unread,
    /// They are not, although the block may lie in a larger one.
    LeftAlone,
}

/// Blocks inside of each other: of those that an address is in, the smallest decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks {
    blocks: HashMap<Cidr, Block>,
    /// The lengths of prefixes that there are, of IPv4 and of IPv6, the longest first: few, while there
    /// may be a block for each node.
    lengths: [Vec<u8>; 2],
}

impl Networks {
    /// The blocks `unread` without those `left_alone`, which may be a part of one, or one.
    pub fn new(
        unread: impl IntoIterator<Item = Cidr>,
        left_alone: impl IntoIterator<Item = Cidr>,
    ) -> Self {
        let unread = unread.into_iter().map(|block| (block, Block::Unread));
        let left_alone = left_alone.into_iter().map(|block| (block, Block::LeftAlone));
        let blocks: HashMap<_, _> = unread.chain(left_alone).collect();
        let lengths = [true, false].map(|v4| {
            let of_family = blocks.keys().filter(|block| block.ip().is_ipv4() == v4);
            let mut lengths: Vec<u8> = of_family.map(Cidr::prefix_len).collect();
            lengths.sort_unstable_by(|a, b| b.cmp(a));
            lengths.dedup();
            lengths
        });
        Self { blocks, lengths }
    }

    /// Whether somebody may be at this address who has to be read first.
    pub fn has(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        let lengths = &self.lengths[usize::from(ip.is_ipv6())];
        let mut blocks = lengths.iter().map(|length| Cidr::new(ip, *length));
        blocks.find_map(|block| self.blocks.get(&block)) == Some(&Block::Unread)
    }

    /// All of them, in no order.
    pub fn blocks(&self) -> impl Iterator<Item = (Cidr, Block)> {
        self.blocks.iter().map(|(cidr, block)| (*cidr, *block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidrs(texts: &[&str]) -> Vec<Cidr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn smallest_block_decides() {
        let networks = Networks::new(
            cidrs(&["10.0.0.0/8", "10.1.2.0/24", "fd00:1::/64"]),
            cidrs(&["10.1.0.0/16", "fd00:1::/80", "10.9.0.0/16"]),
        );
        for (ip, has) in [
            ("10.2.0.1", true),
            ("10.1.0.1", false),
            ("10.1.2.3", true),
            ("::ffff:10.1.2.3", true),
            ("10.9.0.1", false),
            ("11.0.0.1", false),
            ("fd00:1::1", false),
            ("fd00:1::1:0:0:1", true),
            ("fd00:2::1", false),
        ] {
            assert_eq!(networks.has(ip.parse().unwrap()), has, "{ip}");
        }
    }

    #[test]
    fn block_that_is_to_be_left_alone_is() {
        let own = cidrs(&["10.1.0.0/24"]);
        let networks = Networks::new(own.clone(), own);
        assert!(!networks.has("10.1.0.1".parse().unwrap()));
        assert!(!Networks::default().has("10.1.0.1".parse().unwrap()));
    }
}
