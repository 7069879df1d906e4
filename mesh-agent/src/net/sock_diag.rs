//! Asks the kernel for the TCP sockets of the namespace in which the calling thread is
//! (`linux/sock_diag.h`, `linux/inet_diag.h`).

use std::io::{self, Read as _};

use socket2::{Domain, Protocol, Socket, Type};

use super::netlink::{Family, HEADER_LEN, attribute, errno, message};

// `linux/sock_diag.h` and `linux/inet_diag.h`, of which libc has nothing.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const REQ_BYTECODE: u16 = 1;
const BC_MARK_COND: u8 = 10;
/// Bytes of `struct inet_diag_sockid`; all zero means any socket.
const SOCKID_LEN: usize = 48;
/// Every state of a connection that still has something to send or to hear. TIME_WAIT (6) only
/// repeats an ACK, CLOSE (7) and LISTEN (10) have no peer.
const CONNECTED: u32 = !(1 << 6 | 1 << 7 | 1 << 10);

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
        socket.send(&request(family, mark))?;
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

fn kind(answer: &[u8]) -> Option<u16> {
    // struct nlmsghdr: length (4 bytes), type.
    Some(u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?))
}

fn request(family: Family, mark: u32) -> Vec<u8> {
    // struct inet_diag_req_v2: family, protocol, extensions, padding, states, socket.
    #[expect(clippy::cast_possible_truncation, reason = "six")]
    let mut body = vec![family as u8, libc::IPPROTO_TCP as u8, 0, 0];
    body.extend(CONNECTED.to_ne_bytes());
    body.extend([0; SOCKID_LEN]);
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
