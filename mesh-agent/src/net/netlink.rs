//! The rtnetlink objects that this agent makes: a policy rule, a local route, a namespace's number.
//!
//! Written out here because it is all that is needed, and less than the adapters around a crate would
//! be. Layouts: `linux/netlink.h`, `linux/rtnetlink.h`, `linux/fib_rules.h`; numbers are in the
//! machine's byte order, attributes are padded to four bytes.

use std::io::{self, Read as _};

use socket2::{Domain, Protocol, Socket, Type};

/// `LOOPBACK_IFINDEX`: the kernel gives `lo` this index in every namespace.
const LO: u32 = 1;
/// Bytes of `struct nlmsghdr`.
pub(super) const HEADER_LEN: usize = 16;

// `linux/fib_rules.h`, which libc does not have.
/// `FR_ACT_TO_TBL`: the rule leads to a table.
const ACT_TO_TABLE: u8 = 1;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FRA_PROTOCOL: u16 = 21;

// `linux/net_namespace.h`, which libc does not have.
pub(super) const NETNSA_NSID: u16 = 1;
pub(super) const NETNSA_FD: u16 = 3;
/// Bytes of `struct rtgenmsg`, padded.
pub(super) const RTGENMSG_LEN: usize = 4;

/// An address family as rtnetlink spells it.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
pub(super) enum Family {
    V4 = 2,
    V6 = 10,
}

/// `ip rule add pref PRIORITY fwmark MARK lookup TABLE protocol PROTOCOL`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    pub(super) family: Family,
    pub(super) priority: u32,
    pub(super) mark: u32,
    pub(super) table: u32,
    pub(super) protocol: u8,
}

/// `ip route add local default dev lo table TABLE proto PROTOCOL`.
#[derive(Clone, Copy, Debug)]
pub(super) struct LocalRoute {
    pub(super) family: Family,
    pub(super) table: u32,
    pub(super) protocol: u8,
}

/// What can be added and deleted.
pub(super) trait Object {
    /// The message types that add and delete it.
    const KINDS: (u16, u16);
    /// Its fixed header and its attributes.
    fn body(&self) -> Vec<u8>;
}

impl Object for Rule {
    const KINDS: (u16, u16) = (libc::RTM_NEWRULE, libc::RTM_DELRULE);

    fn body(&self) -> Vec<u8> {
        // struct fib_rule_hdr: family, dst_len, src_len, tos, table, res1, res2, action, flags.
        let mut body = vec![self.family as u8, 0, 0, 0, 0, 0, 0, ACT_TO_TABLE, 0, 0, 0, 0];
        attribute(&mut body, FRA_PRIORITY, &self.priority.to_ne_bytes());
        attribute(&mut body, FRA_FWMARK, &self.mark.to_ne_bytes());
        attribute(&mut body, FRA_FWMASK, &u32::MAX.to_ne_bytes());
        attribute(&mut body, FRA_TABLE, &self.table.to_ne_bytes());
        attribute(&mut body, FRA_PROTOCOL, &[self.protocol]);
        body
    }
}

impl Object for LocalRoute {
    const KINDS: (u16, u16) = (libc::RTM_NEWROUTE, libc::RTM_DELROUTE);

    fn body(&self) -> Vec<u8> {
        // struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags.
        let (scope, kind) = (libc::RT_SCOPE_HOST, libc::RTN_LOCAL);
        let mut body = vec![self.family as u8, 0, 0, 0, 0, self.protocol, scope, kind, 0, 0, 0, 0];
        attribute(&mut body, libc::RTA_TABLE, &self.table.to_ne_bytes());
        attribute(&mut body, libc::RTA_OIF, &LO.to_ne_bytes());
        body
    }
}

/// An rtnetlink socket of the namespace in which it was opened.
#[derive(Debug)]
pub(super) struct Rtnetlink(Socket);

impl Rtnetlink {
    pub(super) fn open() -> io::Result<Self> {
        let family = Domain::from(libc::AF_NETLINK);
        let protocol = Protocol::from(libc::NETLINK_ROUTE);
        Socket::new(family, Type::RAW, Some(protocol)).map(Self)
    }

    /// Adds an object, unless it is there already.
    pub(super) fn add<O: Object>(&self, object: &O) -> io::Result<()> {
        let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        match self.request(O::KINDS.0, flags, &object.body()) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            added => added,
        }
    }

    /// Deletes an object that agrees with `object` in everything; says whether there was one.
    pub(super) fn delete<O: Object>(&self, object: &O) -> io::Result<bool> {
        match self.request(O::KINDS.1, 0, &object.body()) {
            Ok(()) => Ok(true),
            Err(error) => match error.raw_os_error() {
                // A rule, a route, and anything of a family that is switched off.
                Some(libc::ENOENT | libc::ESRCH | libc::EAFNOSUPPORT | libc::EOPNOTSUPP) => {
                    Ok(false)
                }
                _ => Err(error),
            },
        }
    }

    /// `ip link set lo up`.
    pub(super) fn raise_loopback(&self) -> io::Result<()> {
        const UP: u32 = libc::IFF_UP.cast_unsigned();
        // struct ifinfomsg: family, padding, type (16 bits), index, flags, which flags change.
        let mut body = vec![0; 4];
        body.extend(LO.to_ne_bytes());
        body.extend(UP.to_ne_bytes());
        body.extend(UP.to_ne_bytes());
        self.request(libc::RTM_NEWLINK, 0, &body)
    }

    /// Gives the namespace behind the descriptor `fd` the number `id` here, or fails with
    /// `AlreadyExists` if it has one.
    pub(super) fn add_namespace_id(&self, fd: u32, id: u32) -> io::Result<()> {
        let mut body = vec![0; RTGENMSG_LEN];
        attribute(&mut body, NETNSA_FD, &fd.to_ne_bytes());
        attribute(&mut body, NETNSA_NSID, &id.to_ne_bytes());
        self.request(libc::RTM_NEWNSID, 0, &body)
    }

    /// Sends one message and reads the kernel's answer to it.
    fn request(&self, kind: u16, flags: i32, body: &[u8]) -> io::Result<()> {
        self.0.send(&message(kind, flags | libc::NLM_F_REQUEST | libc::NLM_F_ACK, body))?;
        // An answer repeats the request: nothing here is longer than a few dozen bytes.
        let mut answer = [0; 1024];
        let len = (&self.0).read(&mut answer)?;
        match errno(&answer[..len]) {
            error if error.raw_os_error() == Some(0) => Ok(()),
            error => Err(error),
        }
    }

    pub(super) fn socket(&self) -> &Socket {
        &self.0
    }
}

/// The error that an answer carries; number 0 if all is well.
pub(super) fn errno(answer: &[u8]) -> io::Error {
    // struct nlmsgerr behind the header: the errno, negative.
    let errno = answer.get(HEADER_LEN..HEADER_LEN + 4).and_then(|errno| errno.try_into().ok());
    match errno.map(i32::from_ne_bytes) {
        Some(errno) => io::Error::from_raw_os_error(errno.saturating_neg()),
        None => io::Error::from(io::ErrorKind::UnexpectedEof),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a message is a few dozen bytes")]
#[expect(clippy::cast_sign_loss, reason = "flags are 16 bits, libc's constants signed")]
pub(super) fn message(kind: u16, flags: i32, body: &[u8]) -> Vec<u8> {
    // struct nlmsghdr: length, type, flags, sequence number, port (the kernel fills it in).
    let mut message = Vec::with_capacity(HEADER_LEN + body.len());
    message.extend(((HEADER_LEN + body.len()) as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((flags as u16).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    message
}

#[expect(clippy::cast_possible_truncation, reason = "an attribute is at most a dozen bytes")]
pub(super) fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    // struct rtattr: length without padding, type.
    body.extend((4 + value.len() as u16).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}
