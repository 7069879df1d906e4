//! The agent's UDP sockets, in its own namespace, and how several share one port.

use std::fs;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd as _, BorrowedFd};

use socket2::{Protocol, Socket, Type};

use super::{check, domain};

/// One instruction of classic BPF.
pub type Instruction = libc::sock_filter;

/// A non-blocking UDP socket for both families, which shares its port with a successor's.
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

/// How many sockets of this namespace are bound to `port` at no address in particular.
///
/// # Errors
///
/// `/proc` is not mounted.
pub fn udp_sockets_at(port: u16) -> io::Result<usize> {
    let mut found = 0;
    for table in ["udp", "udp6"] {
        match fs::read_to_string(format!("/proc/thread-self/net/{table}")) {
            Ok(table) => found += bound_at(&table, port),
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound && table == "udp6" => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// The same, by the text of proc_pid_net(5).
fn bound_at(table: &str, port: u16) -> usize {
    let port = format!("{port:04X}");
    let is_it = |line: &&str| {
        let local = line.split_ascii_whitespace().nth(1).and_then(|local| local.split_once(':'));
        local.is_some_and(|(ip, at)| at == port && ip.bytes().all(|digit| digit == b'0'))
    };
    table.lines().skip(1).filter(is_it).count()
}

/// Has `program` choose among the sockets that share the port of `socket`: it is shown what follows the
/// UDP header, and returns the place of one, in the order in which they were bound. When one is closed,
/// the last one takes its place; a place that does not exist leaves the choice to the kernel.
///
/// # Errors
///
/// The kernel does not take the program, or the socket shares no port.
pub fn choose_socket_by(socket: BorrowedFd<'_>, program: &[Instruction]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    // The kernel copies the program, and only reads it: the pointer is `*mut` for the C type alone.
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_REUSEPORT_CBPF, &program)
}

/// Whether the kernel may join packets of the same addresses before it looks for their socket.
///
/// # Errors
///
/// `socket` is no UDP socket.
pub fn set_udp_gro(socket: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    set(socket, libc::SOL_UDP, libc::UDP_GRO, &libc::c_int::from(on))
}

fn set<T>(socket: BorrowedFd<'_>, level: i32, option: i32, value: &T) -> io::Result<()> {
    let len = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    let value = std::ptr::from_ref(value).cast();
    // SAFETY: the kernel reads `len` bytes at `value`, which are a `T`, and what they point to (a program
    // of that length) lives as long as the caller's borrow of it.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value, len) })
}

#[cfg(test)]
pub(super) mod testing {
    //! What tests look at.

    use super::*;

    /// Whether the kernel may join packets for this socket.
    pub fn udp_gro(socket: BorrowedFd<'_>) -> bool {
        let (mut on, mut len): (libc::c_int, _) = (0, 4);
        let value = (&raw mut on).cast();
        // SAFETY: the kernel writes `len` bytes at most, which are `on`'s.
        let got = unsafe {
            libc::getsockopt(socket.as_raw_fd(), libc::SOL_UDP, libc::UDP_GRO, value, &raw mut len)
        };
        assert_eq!(got, 0, "{}", io::Error::last_os_error());
        on != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sockets_at_that_port_and_no_address_are_counted() {
        let table = "  sl  local_address rem_address   st tx_queue\n\
            1: 00000000:3AAB 00000000:0000 07 00000000:00000000\n\
            2: 0100007F:3AAB 00000000:0000 07 00000000:00000000\n\
            3: 00000000:3AAC 00000000:0000 07 00000000:00000000\n\
            4: 00000000:3AAB 00000000:0000 07 00000000:00000000\n";
        assert_eq!(bound_at(table, 0x3aab), 2);
        assert_eq!(bound_at("", 1), 0);
    }
}
