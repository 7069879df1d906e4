//! Addresses exactly as they lie in a map.

use core::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::maps::map_struct;

/// An IP address as the kernel's contexts hold it (`bpf_sock_addr.user_ip6`): four words whose bytes
/// lie in network order. IPv4 is v4-mapped, `::ffff:a.b.c.d` (RFC 4291 section 2.5.5.2), so that one map
/// serves both families and no program branches on family to build a key.
///
/// Words and not bytes, because the programs would otherwise take every address apart byte by byte.
pub type WireIp = [u32; 4];

/// Bits of a [`WireIp`] before those of the IPv4 address that it holds.
pub const V4_MAPPED_BITS: u32 = 96;

/// The third word of a v4-mapped address.
const V4_MARK: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

map_struct! {
    /// A TCP endpoint. The kernel compares keys byte by byte, so every byte is a field.
    pub struct WireAddr {
        /// The address.
        pub ip: WireIp,
        /// The port in network order, as `sockaddr_in.sin_port`.
        pub port_be: u16,
        /// Zero.
        pub reserved: u16,
    }
}

const _: () = assert!(size_of::<WireAddr>() == 20 && align_of::<WireAddr>() == 4);

impl WireAddr {
    /// No address.
    pub const NONE: Self = Self::new([0; 4], 0);

    /// An address and a port in host order.
    #[inline(always)]
    pub const fn new(ip: WireIp, port: u16) -> Self {
        Self { ip, port_be: port.to_be(), reserved: 0 }
    }

    /// The port, in host order.
    #[inline(always)]
    pub const fn port(&self) -> u16 {
        u16::from_be(self.port_be)
    }
}

/// A word in network order (`bpf_sock_addr.user_ip4`) as the v4-mapped address.
#[inline(always)]
pub const fn v4_mapped(ip4: u32) -> WireIp {
    [0, 0, V4_MARK, ip4]
}

/// Whether the address is an IPv4 one.
#[inline(always)]
pub const fn is_v4(ip: &WireIp) -> bool {
    ip[0] == 0 && ip[1] == 0 && ip[2] == V4_MARK
}

/// User space's address as the maps spell it.
pub fn from_ip(ip: IpAddr) -> WireIp {
    let v6 = match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(v6.octets().as_chunks().0) {
        *word = u32::from_ne_bytes(*bytes);
    }
    words
}

/// The address as user space spells it: a v4-mapped one is IPv4.
pub fn to_ip(ip: WireIp) -> IpAddr {
    let mut octets = [0; 16];
    for (bytes, word) in octets.as_chunks_mut().0.iter_mut().zip(ip) {
        *bytes = word.to_ne_bytes();
    }
    Ipv6Addr::from(octets).to_canonical()
}

impl From<SocketAddr> for WireAddr {
    fn from(addr: SocketAddr) -> Self {
        Self::new(from_ip(addr.ip()), addr.port())
    }
}

impl From<WireAddr> for SocketAddr {
    fn from(addr: WireAddr) -> Self {
        Self::new(to_ip(addr.ip), addr.port())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_build_the_same_address() {
        let ip4 = u32::from_ne_bytes([10, 96, 0, 10]);
        let words = [0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), ip4];
        let user_space = WireAddr::from(SocketAddr::from(([10, 96, 0, 10], 80)));
        assert_eq!(WireAddr::new(v4_mapped(ip4), 80), user_space);
        assert_eq!(WireAddr::new(words, 80), user_space);
        assert_eq!(user_space.port_be.to_ne_bytes(), [0, 80], "network order");
        let v6: SocketAddr = "[fd00::1]:443".parse().unwrap();
        assert_eq!(WireAddr::from(v6).ip[0].to_ne_bytes(), [0xfd, 0, 0, 0]);
    }

    #[test]
    fn address_survives_the_round_trip() {
        for addr in ["10.96.0.10:80", "[fd00::1]:65535", "[::]:0", "0.0.0.0:1"] {
            let addr: SocketAddr = addr.parse().unwrap();
            assert_eq!(SocketAddr::from(WireAddr::from(addr)), addr);
        }
    }
}
