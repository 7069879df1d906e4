//! Addresses with a meaning: an address that says what it is for cannot be passed for another.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Where the application meant to connect: what it passed to `connect()`, before any rewriting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OrigDst(pub SocketAddr);

/// Where a workload accepts connections: a pod's own address and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointAddr(pub SocketAddr);

/// Where the agent of a node accepts tunnels: the node's address and tunnel port, UDP and TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerAddr(pub SocketAddr);

impl OrigDst {
    /// The address, with `::ffff:a.b.c.d` (RFC 4291 section 2.5.5.2) turned into `a.b.c.d`.
    pub fn canonical(addr: SocketAddr) -> Self {
        Self(canonical(addr))
    }
}

/// `addr` with a v4-mapped IPv6 address turned into IPv4: both name the same place, and an
/// application that dials through an `AF_INET6` socket must not miss what is known by its IPv4 name.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

macro_rules! shown_as_socket_addr {
    ($($name:ty),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}

shown_as_socket_addr!(OrigDst, EndpointAddr, PeerAddr);

/// A block of addresses, `10.0.0.0/8` or `fd00::/8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cidr {
    ip: IpAddr,
    prefix_len: u8,
}

/// Bits that all v4-mapped addresses share: `::ffff:0:0/96`.
const MAPPED_BITS: u8 = 96;

/// Why a text is not a [`Cidr`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CidrError(String);

impl fmt::Display for CidrError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is not a block of addresses such as 10.0.0.0/8 or fd00::/8", self.0)
    }
}

impl std::error::Error for CidrError {}

impl Cidr {
    /// Every IPv4 address.
    pub const ALL_V4: Self = Self { ip: IpAddr::V4(Ipv4Addr::UNSPECIFIED), prefix_len: 0 };

    /// The block of this many leading bits that `ip` is in; a v4-mapped address is an IPv6 one here. More
    /// bits than there are count as all.
    pub fn new(ip: IpAddr, prefix_len: u8) -> Self {
        match ip {
            IpAddr::V4(v4) => {
                let prefix_len = prefix_len.min(32);
                let mask = u32::MAX.checked_shl(32 - u32::from(prefix_len)).unwrap_or(0);
                Self { ip: IpAddr::V4((u32::from(v4) & mask).into()), prefix_len }
            }
            IpAddr::V6(v6) => {
                let prefix_len = prefix_len.min(128);
                let mask = u128::MAX.checked_shl(128 - u32::from(prefix_len)).unwrap_or(0);
                Self { ip: IpAddr::V6((u128::from(v6) & mask).into()), prefix_len }
            }
        }
    }

    /// The first address of the block.
    pub fn ip(&self) -> IpAddr {
        self.ip
    }

    /// Leading bits that are fixed: 0 to 32 for IPv4, 0 to 128 for IPv6.
    pub fn prefix_len(&self) -> u8 {
        self.prefix_len
    }

    /// Whether `ip` lies in the block. A v4-mapped address counts as IPv4.
    pub fn contains(&self, ip: IpAddr) -> bool {
        match (self.ip, ip.to_canonical()) {
            (IpAddr::V4(net), IpAddr::V4(ip)) => {
                let shift = 32 - u32::from(self.prefix_len);
                u32::from(net).checked_shr(shift) == u32::from(ip).checked_shr(shift)
            }
            (IpAddr::V6(_), IpAddr::V6(ip)) => self.has_v6(ip),
            _ => false,
        }
    }

    /// Whether this is an IPv6 block that has `ip` in it, be that a v4-mapped address: where the two
    /// families are one, as in the kernel's maps.
    pub fn has_v6(&self, ip: Ipv6Addr) -> bool {
        let IpAddr::V6(net) = self.ip else { return false };
        let shift = 128 - u32::from(self.prefix_len);
        u128::from(net).checked_shr(shift) == u128::from(ip).checked_shr(shift)
    }
}

impl std::str::FromStr for Cidr {
    type Err = CidrError;

    /// A bare address is a block of one. Bits behind the prefix are cleared. A block of v4-mapped
    /// addresses is the IPv4 block, as everywhere.
    fn from_str(text: &str) -> Result<Self, CidrError> {
        let wrong = || CidrError(text.chars().take(64).collect());
        let (ip, prefix) = match text.split_once('/') {
            Some((ip, prefix)) => (ip, Some(prefix)),
            None => (text, None),
        };
        let ip: IpAddr = ip.trim().parse().map_err(|_not_ip| wrong())?;
        let bits: u8 = if ip.is_ipv4() { 32 } else { 128 };
        let prefix_len: u8 = match prefix {
            Some(prefix) => prefix.trim().parse().map_err(|_not_number| wrong())?,
            None => bits,
        };
        if prefix_len > bits {
            return Err(wrong());
        }
        let (ip, prefix_len) = match (ip, ip.to_canonical(), prefix_len.checked_sub(MAPPED_BITS)) {
            (IpAddr::V6(_), v4 @ IpAddr::V4(_), Some(prefix_len)) => (v4, prefix_len),
            _ => (ip, prefix_len),
        };
        Ok(Self::new(ip, prefix_len))
    }
}

impl From<IpAddr> for Cidr {
    /// The block of this one address, a v4-mapped one being IPv4.
    fn from(ip: IpAddr) -> Self {
        Self::new(ip.to_canonical(), 128)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix_len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_address_is_the_ipv4_address() {
        let mapped = "[::ffff:10.96.0.10]:80".parse().unwrap();
        assert_eq!(OrigDst::canonical(mapped).to_string(), "10.96.0.10:80");
    }

    #[test]
    fn block_holds_its_first_and_last_address_and_not_the_next() {
        let block: Cidr = "10.1.2.3/23".parse().unwrap();
        assert_eq!(block.to_string(), "10.1.2.0/23");
        for (ip, inside) in [("10.1.2.0", true), ("10.1.3.255", true), ("10.1.4.0", false)] {
            assert_eq!(block.contains(ip.parse().unwrap()), inside, "{ip}");
        }
        assert!(block.contains("::ffff:10.1.3.1".parse().unwrap()));
        assert!(!block.contains("fd00::1".parse().unwrap()));
    }

    #[test]
    fn zero_prefix_holds_its_whole_family() {
        let all: Cidr = "0.0.0.0/0".parse().unwrap();
        assert!(all.contains("203.0.113.7".parse().unwrap()));
        let all: Cidr = "::/0".parse().unwrap();
        assert!(all.contains("2001:db8::1".parse().unwrap()));
    }

    #[test]
    fn mapped_block_is_the_ipv4_block() {
        for (text, block) in [
            ("::ffff:10.1.2.3/104", "10.0.0.0/8"),
            ("::ffff:10.1.2.3", "10.1.2.3/32"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("::ffff:0:0/95", "::fffe:0:0/95"),
        ] {
            assert_eq!(text.parse::<Cidr>().unwrap().to_string(), block, "{text}");
        }
    }

    #[test]
    fn what_is_no_block_is_refused() {
        for text in ["", "10.0.0.0/33", "fd00::/129", "10.0.0/8", "a/8", "10.0.0.0/-1", "1.2.3.4/"]
        {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
    }
}
