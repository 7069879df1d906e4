//! The agent's own sockets and limits, in its own namespace.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};

use super::{BACKLOG, check, domain, stream_socket};

/// What to bind to in order to be reached over every family that this machine has.
pub fn any_address() -> IpAddr {
    // A kernel without IPv6 refuses the family itself.
    match Socket::new(Domain::IPV6, Type::DGRAM.cloexec(), None) {
        Ok(_has_ipv6) => Ipv6Addr::UNSPECIFIED.into(),
        Err(_) => Ipv4Addr::UNSPECIFIED.into(),
    }
}

/// A listener that shares its port with those of the other workers, and with a successor of this
/// process: the kernel spreads connections over all of them.
///
/// # Errors
///
/// Of `socket()`, `bind()` and `listen()`.
pub fn listen_shared(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = stream_socket(domain(addr.ip()))?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A non-blocking UDP socket for both families.
///
/// # Errors
///
/// Of `socket()` and `bind()`.
pub fn udp_socket(addr: SocketAddr) -> io::Result<UdpSocket> {
    let kind = Type::DGRAM.nonblocking().cloexec();
    let socket = Socket::new(domain(addr.ip()), kind, Some(Protocol::UDP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_port(true)?;
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// Raises the soft limit of open files to the hard one: every connection takes two, and the soft
/// limit is kept at 1024 only for programs that use `select()` (systemd, `DefaultLimitNOFILE=`).
/// Returns the limit that holds.
///
/// # Errors
///
/// Of `getrlimit()` and `setrlimit()`.
pub fn raise_file_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one `rlimit` to `limit`.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the kernel reads one `rlimit` from `limit`.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })?;
    Ok(limit.rlim_cur)
}
