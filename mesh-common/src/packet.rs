//! A TCP segment in an Ethernet frame, as `mesh_redirect` reads and writes it.
//!
//! Only what a router would forward without a second thought is understood: no IPv4 options, no IPv6
//! extension header, no fragment, no last hop. Everything else is `None`, and left to the node.

use crate::WireAddr;
use crate::addr::{WireIp, v4_mapped};

/// `IPPROTO_TCP`.
const TCP: u8 = 6;

/// [`Tcp::flags`].
const FIN: u8 = 1;
/// [`Tcp::flags`].
const SYN: u8 = 1 << 1;
/// [`Tcp::flags`].
const RST: u8 = 1 << 2;
/// [`Tcp::flags`].
const ACK: u8 = 1 << 4;

/// Bytes of a link-layer address.
pub const MAC_LEN: usize = 6;

// Packed to two bytes: an IP header begins at 14, so that nothing in it lies where its type would have
// it lie.

/// An Ethernet header.
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ethernet {
    /// To whom.
    pub dst: [u8; MAC_LEN],
    /// From whom.
    pub src: [u8; MAC_LEN],
    /// What follows.
    pub kind_be: u16,
}

/// An IPv4 header without options (RFC 791 section 3.1).
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4 {
    version_length: u8,
    service: u8,
    length_be: u16,
    id_be: u16,
    fragment_be: u16,
    ttl: u8,
    protocol: u8,
    checksum_be: u16,
    src: u32,
    dst: u32,
}

/// An IPv6 header (RFC 8200 section 3).
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv6 {
    version_class_label_be: u32,
    length_be: u16,
    next: u8,
    hops: u8,
    src: WireIp,
    dst: WireIp,
}

/// A TCP header up to its flags, and the window that fills it up (RFC 9293 section 3.1).
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tcp {
    src_be: u16,
    dst_be: u16,
    seq_be: u32,
    ack_be: u32,
    offset: u8,
    flags: u8,
    window_be: u16,
}

/// What is read of a frame: `head` is what is written back.
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<Ip> {
    /// What is written back.
    pub head: Head<Ip>,
    /// What is only read.
    pub tcp: Tcp,
}

/// The headers that a hop changes.
#[repr(C, packed(2))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head<Ip> {
    /// Both link-layer addresses.
    pub eth: Ethernet,
    /// The time to live.
    pub ip: Ip,
}

const _: () = assert!(size_of::<Frame<Ipv4>>() == 14 + 20 + 16);
const _: () = assert!(size_of::<Frame<Ipv6>>() == 14 + 40 + 16);

/// What decides over a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Who sends it.
    pub src: WireAddr,
    /// To whom.
    pub dst: WireAddr,
    /// Its first sequence number.
    pub seq: u32,
    /// The next one that its sender expects.
    pub ack: u32,
    flags: u8,
}

/// An IP header that a hop passes on.
pub trait Hop: Copy {
    /// Both addresses, if it is one of TCP that a router would pass on as it is.
    fn ends(&self) -> Option<(WireIp, WireIp)>;
    /// Takes one from its time to live.
    fn pass(&mut self);
}

impl Hop for Ipv4 {
    #[inline(always)]
    fn ends(&self) -> Option<(WireIp, WireIp)> {
        // More fragments, or an offset; "don't fragment" is none of our business.
        let is_fragment = self.fragment_be & 0x3fff_u16.to_be() != 0;
        let is_plain = self.version_length == 0x45 && self.protocol == TCP && !is_fragment;
        // A router answers the last hop with an ICMP error.
        (is_plain && self.ttl > 1).then(|| (v4_mapped(self.src), v4_mapped(self.dst)))
    }

    /// With the checksum, as in RFC 1624: one less in the upper byte of a word is one more in the sum,
    /// and a carry comes round.
    #[inline(always)]
    fn pass(&mut self) {
        self.ttl -= 1;
        let sum = u32::from(u16::from_be(self.checksum_be)) + 0x0100;
        #[expect(clippy::cast_possible_truncation, reason = "the carry is added")]
        let sum = (sum + (sum >= 0xffff) as u32) as u16;
        self.checksum_be = sum.to_be();
    }
}

impl Hop for Ipv6 {
    #[inline(always)]
    fn ends(&self) -> Option<(WireIp, WireIp)> {
        let is_plain = self.next == TCP && self.hops > 1;
        is_plain.then_some((self.src, self.dst))
    }

    #[inline(always)]
    fn pass(&mut self) {
        self.hops -= 1;
    }
}

impl<Ip: Hop> Frame<Ip> {
    /// The segment in it, unless the node has to look at it.
    #[inline(always)]
    pub fn segment(&self) -> Option<Segment> {
        // Copied out first: fields of a packed struct cannot be borrowed.
        let (head, tcp) = (self.head, self.tcp);
        let ip = head.ip;
        let (src, dst) = ip.ends()?;
        Some(Segment {
            src: WireAddr { ip: src, port_be: tcp.src_be, reserved: 0 },
            dst: WireAddr { ip: dst, port_be: tcp.dst_be, reserved: 0 },
            seq: u32::from_be(tcp.seq_be),
            ack: u32::from_be(tcp.ack_be),
            flags: tcp.flags,
        })
    }

    /// What a router would send on: one hop less to live, and the link-layer addresses of its own device
    /// and of the next one.
    #[inline(always)]
    pub fn forwarded(&self, from: [u8; MAC_LEN], to: [u8; MAC_LEN]) -> Head<Ip> {
        let mut head = self.head;
        let mut ip = head.ip;
        ip.pass();
        head.ip = ip;
        head.eth = Ethernet { dst: to, src: from, kind_be: head.eth.kind_be };
        head
    }
}

impl Segment {
    #[cfg(test)]
    pub(crate) const fn new(src: WireAddr, dst: WireAddr, seq: u32, ack: u32, flags: u8) -> Self {
        Self { src, dst, seq, ack, flags }
    }

    /// Whether it opens a connection.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == SYN
    }

    /// Whether it answers what opened a connection, with yes or no: a reset of what was never open has
    /// the sequence number zero (RFC 9293 section 3.10.7.1).
    #[inline(always)]
    pub fn answers(&self) -> bool {
        self.flags & (SYN | ACK) == SYN | ACK || (self.flags & RST != 0 && self.seq == 0)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A SYN from 10.0.0.2:43210 to 10.0.0.3:80.
    pub(crate) const SYN4: [u8; 50] = [
        0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2, 0x08, 0x00, // Ethernet
        0x45, 0x00, 0x00, 0x3c, 0x1c, 0x46, 0x40, 0x00, 0x40, 0x06, 0x0a, 0x72, // IPv4
        0x0a, 0, 0, 2, 0x0a, 0, 0, 3, // addresses
        0xa8, 0xca, 0x00, 0x50, 0x11, 0x22, 0x33, 0x44, 0, 0, 0, 0, 0xa0, 0x02, 0xfa,
        0xf0, // TCP
    ];

    fn frame4(bytes: [u8; 50]) -> Frame<Ipv4> {
        let be = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from_ne_bytes(*bytes[at..].first_chunk().unwrap());
        Frame {
            head: Head {
                eth: Ethernet {
                    dst: *bytes.first_chunk().unwrap(),
                    src: *bytes[6..].first_chunk().unwrap(),
                    kind_be: be(12),
                },
                ip: Ipv4 {
                    version_length: bytes[14],
                    service: bytes[15],
                    length_be: be(16),
                    id_be: be(18),
                    fragment_be: be(20),
                    ttl: bytes[22],
                    protocol: bytes[23],
                    checksum_be: be(24),
                    src: word(26),
                    dst: word(30),
                },
            },
            tcp: Tcp {
                src_be: be(34),
                dst_be: be(36),
                seq_be: word(38),
                ack_be: word(42),
                offset: bytes[46],
                flags: bytes[47],
                window_be: be(48),
            },
        }
    }

    fn changed(at: usize, to: u8) -> Frame<Ipv4> {
        let mut bytes = SYN4;
        bytes[at] = to;
        frame4(bytes)
    }

    /// RFC 1071: the sum of all words, the checksum among them, is all ones.
    fn sums_up(ip: Ipv4) -> bool {
        let words = [
            u32::from(ip.version_length) << 8 | u32::from(ip.service),
            u32::from(u16::from_be(ip.length_be)),
            u32::from(u16::from_be(ip.id_be)),
            u32::from(u16::from_be(ip.fragment_be)),
            u32::from(ip.ttl) << 8 | u32::from(ip.protocol),
            u32::from(u16::from_be(ip.checksum_be)),
            u32::from_be(ip.src) >> 16,
            u32::from_be(ip.src) & 0xffff,
            u32::from_be(ip.dst) >> 16,
            u32::from_be(ip.dst) & 0xffff,
        ];
        let sum: u32 = words.iter().sum();
        (sum & 0xffff) + (sum >> 16) == 0xffff
    }

    #[test]
    fn segment_is_what_the_wire_says() {
        let segment = frame4(SYN4).segment().unwrap();
        assert_eq!(
            segment.src,
            WireAddr::from("10.0.0.2:43210".parse::<std::net::SocketAddr>().unwrap())
        );
        assert_eq!(
            segment.dst,
            WireAddr::from("10.0.0.3:80".parse::<std::net::SocketAddr>().unwrap())
        );
        assert_eq!((segment.seq, segment.ack), (0x1122_3344, 0));
        assert!(segment.opens() && !segment.answers());
        let is = |flags| {
            let segment = changed(47, flags).segment().unwrap();
            (segment.opens(), segment.answers())
        };
        assert_eq!(is(SYN | ACK), (false, true));
        assert_eq!(is(ACK), (false, false));
        assert_eq!(is(RST | ACK), (false, false), "a reset with a sequence number");
        assert_eq!(is(FIN | ACK), (false, false));
        assert_eq!(is(SYN | 0xc0), (true, false), "explicit congestion notification");
    }

    #[test]
    fn what_a_router_has_to_look_at_is_no_segment() {
        for (at, to, what) in [
            (14, 0x46, "options"),
            (23, 17, "UDP"),
            (20, 0x20, "more fragments"),
            (21, 0x01, "an offset"),
            (22, 1, "the last hop"),
            (22, 0, "less than the last hop"),
        ] {
            assert_eq!(changed(at, to).segment(), None, "{what}");
        }
        assert!(changed(20, 0).segment().is_some(), "may be fragmented, is not");
        let mut ip = Ipv6 {
            version_class_label_be: 0x6000_0000_u32.to_be(),
            length_be: 0,
            next: TCP,
            hops: 64,
            src: [1, 0, 0, 0],
            dst: [2, 0, 0, 0],
        };
        assert_eq!(ip.ends(), Some(([1, 0, 0, 0], [2, 0, 0, 0])));
        ip.hops = 1;
        assert_eq!(ip.ends(), None, "the last hop");
        (ip.hops, ip.next) = (64, 44);
        assert_eq!(ip.ends(), None, "a fragment");
    }

    #[test]
    fn forwarded_header_has_one_hop_less_and_still_adds_up() {
        let (from, to) = ([2, 0, 0, 0, 0, 7], [2, 0, 0, 0, 0, 8]);
        let mut frame = frame4(SYN4);
        assert!(sums_up(frame.head.ip));
        for left in (1..64).rev() {
            frame.head = frame.forwarded(from, to);
            let head = frame.head;
            assert_eq!(head.ip.ttl, left);
            assert!(sums_up(head.ip), "{left} left");
        }
        let eth = frame.head.eth;
        assert_eq!(eth, Ethernet { dst: to, src: from, kind_be: 0x0800_u16.to_be() });
        // The carry: RFC 1624 section 5 has no zero come of it.
        for checksum in [0xfdff_u16, 0xfeff, 0xfefe, 0xff00, 0xffff, 0] {
            let mut ip = frame4(SYN4).head.ip;
            ip.checksum_be = checksum.to_be();
            let before = sums_up(ip);
            ip.pass();
            assert_eq!(sums_up(ip), before, "{checksum:#x}");
        }
    }
}
