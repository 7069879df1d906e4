//! What rtnetlink tells of the network devices in the calling thread's namespace.
//!
//! Layouts: `linux/if_link.h`, `linux/if_addr.h`, `linux/rtnetlink.h`,
//! `linux/net_namespace.h`.

use std::io::{self, Read as _};
use std::net::IpAddr;

use super::netlink::{
    HEADER_LEN, NETNSA_FD, NETNSA_NSID, RTGENMSG_LEN, Rtnetlink, attribute, errno, message,
};

// What libc does not have.
/// `IFLA_XDP_ATTACHED`.
const XDP_ATTACHED: u16 = 2;
/// `RTEXT_FILTER_SKIP_STATS`.
const SKIP_STATS: u32 = 1 << 3;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)`, which an `ingress` qdisc takes for its own too.
const CLSACT_INGRESS: u32 = 0xffff_fff2;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_EGRESS)`.
const CLSACT_EGRESS: u32 = 0xffff_fff3;

/// Bytes of `struct ifinfomsg` and of `struct ifaddrmsg`.
const IFINFOMSG_LEN: usize = 16;
const IFADDRMSG_LEN: usize = 8;
/// The kernel fills at most this much at once.
const ANSWER_LEN: usize = 32 << 10;

/// A link-layer address.
pub(super) type Mac = [u8; 6];

/// A device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) index: u32,
    /// `veth`, `bridge`, ...; empty for a physical one.
    pub(super) kind: String,
    /// The device that it is joined to, in the namespace `link_netns`, or else in its own.
    pub(super) link: Option<u32>,
    pub(super) link_netns: Option<u32>,
    /// The bridge, bond or VRF that it belongs to.
    pub(super) master: Option<u32>,
    pub(super) is_up: bool,
    pub(super) mac: Option<Mac>,
    /// How it queues what it sends.
    pub(super) qdisc: String,
    pub(super) has_xdp: bool,
}

impl Rtnetlink {
    /// The index of the device that has an address, by address.
    pub(super) fn addresses(&self) -> io::Result<Vec<(IpAddr, u32)>> {
        let found = self.ask(libc::RTM_GETADDR, libc::NLM_F_DUMP, &[0; IFADDRMSG_LEN])?;
        Ok(found.iter().filter_map(|payload| address(payload)).collect())
    }

    /// The index of the device of this name; `None` if there is none.
    pub(super) fn index_of(&self, name: &str) -> io::Result<Option<u32>> {
        let mut body = vec![0; IFINFOMSG_LEN];
        attribute(&mut body, libc::IFLA_IFNAME, &[name.as_bytes(), &[0]].concat());
        attribute(&mut body, libc::IFLA_EXT_MASK, &SKIP_STATS.to_ne_bytes());
        match self.ask(libc::RTM_GETLINK, 0, &body) {
            Ok(found) => Ok(found.first().and_then(|payload| Some(device(payload)?.index))),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The device with this index; `None` if there is none.
    pub(super) fn device(&self, index: u32) -> io::Result<Option<Device>> {
        // struct ifinfomsg: family, padding, type (16 bits), index, flags, which flags change.
        let mut body = vec![0; IFINFOMSG_LEN];
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        attribute(&mut body, libc::IFLA_EXT_MASK, &SKIP_STATS.to_ne_bytes());
        match self.ask(libc::RTM_GETLINK, 0, &body) {
            Ok(found) => Ok(found.first().and_then(|payload| device(payload))),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether anything filters what comes in from a device, or goes out: tc's `clsact` or `ingress`.
    pub(super) fn has_filters(&self, index: u32) -> io::Result<bool> {
        for parent in [CLSACT_INGRESS, CLSACT_EGRESS] {
            // struct tcmsg: family and padding, index, handle, parent, info.
            let mut body = vec![0; 4];
            body.extend(index.to_ne_bytes());
            body.extend([0; 4]);
            body.extend(parent.to_ne_bytes());
            body.extend([0; 4]);
            if !self.ask(libc::RTM_GETTFILTER, libc::NLM_F_DUMP, &body)?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The number of the namespace behind the descriptor `fd`, if it has one here.
    pub(super) fn namespace_id(&self, fd: u32) -> io::Result<Option<u32>> {
        let mut body = vec![0; RTGENMSG_LEN];
        attribute(&mut body, NETNSA_FD, &fd.to_ne_bytes());
        let found = self.ask(libc::RTM_GETNSID, 0, &body)?;
        let number = found.first().and_then(|payload| {
            let mut attributes = attributes(payload.get(RTGENMSG_LEN..)?);
            let (_, value) = attributes.find(|(kind, _)| *kind == NETNSA_NSID)?;
            Some(i32::from_ne_bytes(value.try_into().ok()?))
        });
        // "None" is -1.
        Ok(number.and_then(|number| u32::try_from(number).ok()))
    }

    /// Sends one question and collects the answers to it, without their headers.
    fn ask(&self, kind: u16, flags: i32, body: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        self.socket().send(&message(kind, flags | libc::NLM_F_REQUEST, body))?;
        let mut found = Vec::new();
        let mut buffer = vec![0; ANSWER_LEN];
        loop {
            let len = self.socket().read(&mut buffer)?;
            for (kind, message) in messages(&buffer[..len]) {
                let payload = message.get(HEADER_LEN..).unwrap_or_default();
                match i32::from(kind) {
                    libc::NLMSG_DONE if payload.starts_with(&[0; 4]) => return Ok(found),
                    // Both carry the errno in the same place.
                    libc::NLMSG_DONE | libc::NLMSG_ERROR => return Err(errno(message)),
                    _ => found.push(payload.to_vec()),
                }
            }
            if flags & libc::NLM_F_DUMP == 0 {
                return Ok(found);
            }
        }
    }
}

/// The messages in one answer, with their types.
pub(super) fn messages(mut answer: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        // struct nlmsghdr: the length with the header, the type.
        let [l0, l1, l2, l3, k0, k1, ..] = *answer else { return None };
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?.max(HEADER_LEN);
        let message = answer.get(..length)?;
        answer = answer.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]), message))
    })
}

/// The attributes in `bytes`, with their types; the upper bits of a type are flags.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        // struct rtattr: the length with this header, the type.
        let [l0, l1, k0, k1, ..] = *bytes else { return None };
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & 0x3fff, value))
    })
}

/// `struct ifaddrmsg`: family, prefix, flags, scope, the device's index.
pub(super) fn address(payload: &[u8]) -> Option<(IpAddr, u32)> {
    let index = u32::from_ne_bytes(payload.get(4..8)?.try_into().ok()?);
    let (mut local, mut other) = (None, None);
    for (kind, value) in attributes(payload.get(IFADDRMSG_LEN..)?) {
        match kind {
            libc::IFA_LOCAL => local = ip(value),
            libc::IFA_ADDRESS => other = ip(value),
            _ => {}
        }
    }
    // IPv6 addresses have the second only; of a point-to-point one it is the other side's.
    Some((local.or(other)?, index))
}

fn ip(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => Some(<[u8; 4]>::try_from(value).ok()?.into()),
        16 => Some(<[u8; 16]>::try_from(value).ok()?.into()),
        _ => None,
    }
}

pub(super) fn device(payload: &[u8]) -> Option<Device> {
    const UP: u32 = libc::IFF_UP.cast_unsigned();
    let word = |at: usize| Some(u32::from_ne_bytes(payload.get(at..at + 4)?.try_into().ok()?));
    let mut device = Device { index: word(4)?, is_up: word(8)? & UP != 0, ..Device::default() };
    for (kind, value) in attributes(payload.get(IFINFOMSG_LEN..)?) {
        let number = || Some(u32::from_ne_bytes(value.try_into().ok()?));
        match kind {
            libc::IFLA_ADDRESS => device.mac = value.try_into().ok(),
            libc::IFLA_LINK => device.link = number(),
            libc::IFLA_LINK_NETNSID => device.link_netns = number(),
            libc::IFLA_MASTER => device.master = number(),
            libc::IFLA_QDISC => device.qdisc = text(value),
            libc::IFLA_LINKINFO => {
                let kind = attributes(value).find(|(kind, _)| *kind == libc::IFLA_INFO_KIND);
                device.kind = kind.map(|(_, value)| text(value)).unwrap_or_default();
            }
            libc::IFLA_XDP => {
                let how = attributes(value).find(|(kind, _)| *kind == XDP_ATTACHED);
                device.has_xdp = how.is_some_and(|(_, value)| value != [0]);
            }
            _ => {}
        }
    }
    Some(device)
}

/// A text that ends in NUL.
fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_are_cut_off_or_made_up_are_read_without_a_panic() {
        let mut link = vec![0; IFINFOMSG_LEN];
        link[4] = 7;
        link[8] = 1;
        attribute(&mut link, libc::IFLA_ADDRESS, &[2, 0, 0, 0, 0, 1]);
        attribute(&mut link, libc::IFLA_LINK, &5_u32.to_ne_bytes());
        attribute(&mut link, libc::IFLA_LINK_NETNSID, &3_u32.to_ne_bytes());
        attribute(&mut link, libc::IFLA_QDISC, b"noqueue\0");
        let whole = device(&link).unwrap();
        let expected = Device {
            index: 7,
            link: Some(5),
            link_netns: Some(3),
            is_up: true,
            mac: Some([2, 0, 0, 0, 0, 1]),
            qdisc: "noqueue".into(),
            ..Device::default()
        };
        assert_eq!(whole, expected);
        for end in 0..link.len() {
            let _some_of_it = device(&link[..end]);
            let _none = address(&link[..end]);
            assert!(messages(&link[..end]).count() < 8);
        }
        // A length that leads nowhere ends it.
        assert_eq!(attributes(&[0, 0, 1, 0, 9, 9]).count(), 0);
        assert_eq!(attributes(&[255, 255, 1, 0, 9, 9]).count(), 0);
        assert_eq!(messages(&[3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).count(), 1);
    }
}
