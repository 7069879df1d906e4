//! Looking at, and ending, TCP connections inside the calling thread's namespace: `NETLINK_SOCK_DIAG`.
//!
//! Layouts: `linux/inet_diag.h`, `linux/sock_diag.h`, `linux/tcp.h`, of which libc has nothing. Single
//! sockets are asked for by cookie: a lookup by addresses alone would find a listener where the
//! connection is gone.

use std::io::{self, Read as _};
use std::net::{IpAddr, SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};

use super::links::messages;
use super::netlink::{Family, HEADER_LEN, attribute, errno, message};

const SOCK_DESTROY: u16 = 21;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const REQ_BYTECODE: u16 = 1;
const BC_MARK_COND: u8 = 10;
/// Bytes of `struct inet_diag_sockid`; all zero means any socket.
const SOCKID_LEN: usize = 48;
/// Every state of a connection that still has something to send or to hear. TIME_WAIT (6) only
/// repeats an ACK, CLOSE (7) and LISTEN (10) have no peer.
const CONNECTED: u32 = !(1 << 6 | 1 << 7 | 1 << 10);
/// `1 << (INET_DIAG_INFO - 1)`: with `struct tcp_info`.
const WITH_INFO: u8 = 1 << 1;
const INET_DIAG_INFO: u16 = 2;
/// Bytes of `struct inet_diag_msg`, and where the cookie lies in it.
const ANSWER_LEN: usize = 72;
const COOKIE_AT: usize = 44;
/// Where `tcpi_bytes_acked` lies in `struct tcp_info`; `tcpi_bytes_received` follows.
const BYTES_AT: usize = 120;
/// What the kernel puts into one answer of a list at most.
const LIST_LEN: usize = 32 * 1024;
/// `TCP_LISTEN`.
const LISTEN: u8 = 10;

/// A connection as its own end sees it.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// Here.
    pub local: SocketAddr,
    /// There, of the same family.
    pub remote: SocketAddr,
}

/// What the kernel says of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpInfo {
    /// The socket's cookie.
    pub cookie: u64,
    state: u8,
    acked: u64,
    received: u64,
}

impl TcpInfo {
    /// Payload that was acknowledged, of a connection that was opened here: its SYN counts as a byte, and
    /// its FIN once it is acknowledged.
    pub fn payload_sent(&self) -> u64 {
        // FIN_WAIT2, TIME_WAIT: ours was acknowledged.
        self.acked.saturating_sub(1 + u64::from(matches!(self.state, 5 | 6)))
    }

    /// Payload that was received: the other side's FIN counts as a byte.
    pub fn payload_received(&self) -> u64 {
        // TIME_WAIT, CLOSE_WAIT, LAST_ACK, CLOSING: theirs has come.
        self.received.saturating_sub(u64::from(matches!(self.state, 6 | 8 | 9 | 11)))
    }
}

/// A socket of the calling thread's namespace that answers about others; see [`super::Netns::run`].
#[derive(Debug)]
pub struct SockDiag(Socket);

impl SockDiag {
    /// Opens it in the calling thread's namespace.
    ///
    /// # Errors
    ///
    /// Of `socket()`.
    pub fn open() -> io::Result<Self> {
        let family = Domain::from(libc::AF_NETLINK);
        let protocol = Protocol::from(libc::NETLINK_SOCK_DIAG);
        Socket::new(family, Type::RAW, Some(protocol)).map(Self)
    }

    /// What the kernel says of the connection with these ends; `None` if there is none, or one with
    /// another cookie.
    ///
    /// # Errors
    ///
    /// The kernel refuses to tell.
    pub fn look(&self, ends: Ends, cookie: Option<u64>) -> io::Result<Option<TcpInfo>> {
        let request = request(ends, cookie, WITH_INFO);
        self.0.send(&message(SOCK_DIAG_BY_FAMILY, libc::NLM_F_REQUEST, &request))?;
        let mut answer = [0; 2048];
        let len = (&self.0).read(&mut answer)?;
        if answer[4..6] != SOCK_DIAG_BY_FAMILY.to_ne_bytes() {
            let error = errno(&answer[..len]);
            let is_gone = matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE));
            return if is_gone { Ok(None) } else { Err(error) };
        }
        let body = answer[..len].get(HEADER_LEN..).unwrap_or_default();
        Ok(info(body).filter(|found| found.state != LISTEN))
    }

    /// What the kernel says of every connection of the calling thread's namespace. Of a list that changes
    /// while it is read some may be missing.
    ///
    /// # Errors
    ///
    /// The kernel refuses to tell.
    pub fn all(mut each: impl FnMut(TcpInfo)) -> io::Result<()> {
        let mut buffer = vec![0; LIST_LEN];
        for family in [Family::V4, Family::V6] {
            // One socket for each, as in `any_marked`.
            let diag = Self::open()?;
            let request = list_request(family, WITH_INFO);
            let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
            diag.0.send(&message(SOCK_DIAG_BY_FAMILY, flags, &request))?;
            'list: loop {
                let len = (&diag.0).read(&mut buffer)?;
                for (kind, message) in messages(&buffer[..len]) {
                    match kind {
                        SOCK_DIAG_BY_FAMILY => {
                            info(message.get(HEADER_LEN..).unwrap_or_default()).map(&mut each);
                        }
                        DONE => break 'list,
                        // A kernel without IPv6 has no socket of it.
                        _ if matches!(family, Family::V6) => break 'list,
                        _ => return Err(errno(message)),
                    }
                }
            }
        }
        Ok(())
    }

    /// Ends the connection with these ends and this cookie: both sides get a reset. `false` if it is
    /// gone already.
    ///
    /// # Errors
    ///
    /// The kernel cannot (`CONFIG_INET_DIAG_DESTROY`) or refuses (`CAP_NET_ADMIN`).
    pub fn destroy(&self, ends: Ends, cookie: u64) -> io::Result<bool> {
        let request = request(ends, Some(cookie), 0);
        let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
        self.0.send(&message(SOCK_DESTROY, flags, &request))?;
        let mut answer = [0; 1024];
        let len = (&self.0).read(&mut answer)?;
        let error = errno(&answer[..len]);
        match error.raw_os_error() {
            Some(0) => Ok(true),
            Some(libc::ENOENT | libc::ESTALE) => Ok(false),
            _ => Err(error),
        }
    }
}

/// `struct inet_diag_req_v2`.
fn request(Ends { local, remote }: Ends, cookie: Option<u64>, ext: u8) -> Vec<u8> {
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    #[expect(clippy::cast_possible_truncation, reason = "2, 6 and 10")]
    #[expect(clippy::cast_sign_loss, reason = "libc's constants are signed")]
    let mut request = vec![family as u8, libc::IPPROTO_TCP as u8, ext, 0];
    request.extend(u32::MAX.to_ne_bytes());
    request.extend(local.port().to_be_bytes());
    request.extend(remote.port().to_be_bytes());
    for end in [local, remote] {
        let mut ip = [0; 16];
        match end.ip() {
            IpAddr::V4(v4) => ip[..4].copy_from_slice(&v4.octets()),
            IpAddr::V6(v6) => ip = v6.octets(),
        }
        request.extend(ip);
    }
    request.extend(0u32.to_ne_bytes());
    // Two words, the low one first; all ones is "any".
    let cookie = cookie.unwrap_or(u64::MAX);
    #[expect(clippy::cast_possible_truncation, reason = "the low word")]
    request.extend((cookie as u32).to_ne_bytes());
    request.extend(((cookie >> 32) as u32).to_ne_bytes());
    request
}

pub(super) fn info(body: &[u8]) -> Option<TcpInfo> {
    let state = *body.get(1)?;
    let word = |at: usize| Some(u64::from(u32::from_ne_bytes(*body.get(at..)?.first_chunk()?)));
    let cookie = word(COOKIE_AT)? | word(COOKIE_AT + 4)? << 32;
    let mut attributes = body.get(ANSWER_LEN..)?;
    while let [l0, l1, k0, k1, rest @ ..] = attributes {
        let (length, kind) = (u16::from_ne_bytes([*l0, *l1]), u16::from_ne_bytes([*k0, *k1]));
        if kind == INET_DIAG_INFO {
            let number = |at: usize| Some(u64::from_ne_bytes(*rest.get(at..)?.first_chunk()?));
            let (acked, received) = (number(BYTES_AT)?, number(BYTES_AT + 8)?);
            return Some(TcpInfo { cookie, state, acked, received });
        }
        let next = usize::from(length).max(4).next_multiple_of(4) - 4;
        attributes = rest.get(next..).unwrap_or_default();
    }
    None
}

/// Whether any connection has the mark `mark`, whoever owns it, or nobody any more: a socket that was
/// closed with bytes unsent lives on without a process.
///
/// # Errors
///
/// Of netlink: `tcp_diag` is neither built in nor to be loaded (`NotFound`), or `CAP_NET_ADMIN` is
/// missing.
pub(super) fn any_marked(mark: u32) -> io::Result<bool> {
    let domain = Domain::from(libc::AF_NETLINK);
    for family in [Family::V4, Family::V6] {
        // One socket for each: the rest of an answer that is not read must not meet the next request.
        let protocol = Protocol::from(libc::NETLINK_SOCK_DIAG);
        let socket = Socket::new(domain, Type::RAW.cloexec(), Some(protocol))?;
        socket.send(&marked_request(family, mark))?;
        // The first message tells, and it is shorter than this.
        let mut answer = [0; 1024];
        let len = (&socket).read(&mut answer)?;
        match kind(&answer[..len]) {
            Some(SOCK_DIAG_BY_FAMILY) => return Ok(true),
            Some(DONE) => {}
            _ => {
                let error = errno(&answer[..len]);
                // A kernel without IPv6 has no socket of it.
                if !(matches!(family, Family::V6) && error.kind() == io::ErrorKind::NotFound) {
                    return Err(error);
                }
            }
        }
    }
    Ok(false)
}

/// `NLMSG_DONE`: the list is at its end.
#[expect(clippy::cast_possible_truncation, reason = "three")]
const DONE: u16 = libc::NLMSG_DONE as u16;

pub(super) fn kind(answer: &[u8]) -> Option<u16> {
    // struct nlmsghdr: length (4 bytes), type.
    Some(u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?))
}

/// `struct inet_diag_req_v2` for all connections of a family.
fn list_request(family: Family, ext: u8) -> Vec<u8> {
    // Family, protocol, extensions, padding, states, socket.
    #[expect(clippy::cast_possible_truncation, reason = "six")]
    let mut body = vec![family as u8, libc::IPPROTO_TCP as u8, ext, 0];
    body.extend(CONNECTED.to_ne_bytes());
    body.extend([0; SOCKID_LEN]);
    body
}

fn marked_request(family: Family, mark: u32) -> Vec<u8> {
    let mut body = list_request(family, 0);
    // struct inet_diag_bc_op: code, offset if yes, offset if no; then struct inet_diag_markcond. The
    // end of the program, at 12, accepts; four bytes behind it, rejects.
    let mut program = vec![BC_MARK_COND, 12];
    program.extend(16_u16.to_ne_bytes());
    program.extend(mark.to_ne_bytes());
    program.extend(u32::MAX.to_ne_bytes());
    attribute(&mut body, REQ_BYTECODE, &program);
    debug_assert_eq!(body.len() + HEADER_LEN, 88);
    message(SOCK_DIAG_BY_FAMILY, libc::NLM_F_REQUEST | libc::NLM_F_DUMP, &body)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn list_has_every_connection_with_what_it_has_carried() {
        let mut held = Vec::new();
        for (n, at) in (0..100).zip(["127.0.0.1:0", "[::1]:0"].iter().cycle()) {
            let listener = TcpListener::bind(at).unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            client.write_all(&vec![0; n]).unwrap();
            server.read_exact(&mut vec![0; n]).unwrap();
            let ends =
                Ends { local: client.local_addr().unwrap(), remote: client.peer_addr().unwrap() };
            let found = SockDiag::open().unwrap().look(ends, None).unwrap().unwrap();
            held.push((client, server, found));
        }
        let mut listed = Vec::new();
        SockDiag::all(|info| listed.push(info)).unwrap();
        for (n, (_client, _server, found)) in held.iter().enumerate() {
            let info = listed.iter().find(|info| info.cookie == found.cookie).unwrap();
            assert_eq!(info.payload_sent(), n as u64);
        }
    }

    #[test]
    fn kernel_tells_what_a_connection_has_carried() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let ends =
            Ends { local: client.local_addr().unwrap(), remote: client.peer_addr().unwrap() };
        client.write_all(b"hello").unwrap();
        server.read_exact(&mut [0; 5]).unwrap();
        server.write_all(b"hi").unwrap();
        client.read_exact(&mut [0; 2]).unwrap();

        let diag = SockDiag::open().unwrap();
        let found = diag.look(ends, None).unwrap().unwrap();
        assert_eq!((found.payload_sent(), found.payload_received()), (5, 2));
        assert_eq!(diag.look(ends, Some(found.cookie)).unwrap(), Some(found));
        assert_eq!(diag.look(ends, Some(found.cookie + 1)).unwrap(), None, "another cookie");
        let listening = Ends { remote: "127.0.0.1:9".parse().unwrap(), local: ends.remote };
        assert_eq!(diag.look(listening, None).unwrap(), None, "a listener is no connection");
    }
}
