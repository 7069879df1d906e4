//! The agent's own sockets, limits and memory, in its own namespace.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use socket2::{Domain, Socket, Type};

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
    listen_on(&bind_shared(addr)?)
}

/// Listens on what [`bind_shared`] has bound.
///
/// # Errors
///
/// Of `listen()`.
pub fn listen_on(socket: &Socket) -> io::Result<TcpListener> {
    socket.listen(BACKLOG)?;
    Ok(socket.try_clone()?.into())
}

/// What [`listen_shared`] would listen on. Nothing arrives at a socket that does not listen: those that do go on as
/// before.
///
/// # Errors
///
/// Of `socket()` and `bind()`: `EADDRINUSE` where a program listens that shares it with nobody, or is another user's.
pub fn bind_shared(addr: SocketAddr) -> io::Result<Socket> {
    let socket = stream_socket(domain(addr.ip()))?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.bind(&addr.into())?;
    Ok(socket)
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

/// Gives back to the system what only starting needed: the freed parts of the heap (manifests, the
/// programs' object file, BTF), and the pages of the executable that were read on the way. What of these
/// is used again comes back from the page cache at the first touch. Returns how many bytes of
/// executable that were.
///
/// # Errors
///
/// Of reading `/proc/self/maps`, and of `madvise()`.
pub fn give_back_memory() -> io::Result<usize> {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes the heap's own locks, and touches no memory that is in use.
    unsafe {
        libc::malloc_trim(0)
    };
    let executable = std::env::current_exe()?;
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let mut given = 0;
    for (start, len) in read_only(&maps, &executable.to_string_lossy()) {
        let at = std::ptr::without_provenance_mut(start);
        // SAFETY: the kernel says that these pages map a file and cannot be written to, so nothing in
        // them is lost (but a debugger's breakpoints): they are read from the file again.
        check(unsafe { libc::madvise(at, len, libc::MADV_DONTNEED) })?;
        given += len;
    }
    Ok(given)
}

/// Start and length of the executable mappings of `file` in the text of proc_pid_maps(5). Only these:
/// what is read-only and not executable may have been relocated, and holds what is not in the file.
pub(super) fn read_only<'a>(
    maps: &'a str,
    file: &'a str,
) -> impl Iterator<Item = (usize, usize)> + 'a {
    maps.lines().filter_map(move |line| {
        let mut fields = line.split_ascii_whitespace();
        let (range, rights) = (fields.next()?, fields.next()?);
        if rights != "r-xp" || line.split_once('/')?.1 != file.strip_prefix('/')? {
            return None;
        }
        let (start, end) = range.split_once('-')?;
        let address = |text| usize::from_str_radix(text, 16).ok();
        let (start, end) = (address(start)?, address(end)?);
        Some((start, end.checked_sub(start)?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_the_executable_is_given_back() {
        let maps = "\
            1000-3000 r--p 00000000 fe:00 7   /x/mesh agent\n\
            3000-a000 r-xp 00002000 fe:00 7   /x/mesh agent\n\
            a000-b000 r--p 00009000 fe:00 7   /x/mesh agent\n\
            b000-c000 rw-p 0000a000 fe:00 7   /x/mesh agent\n\
            d000-e000 r-xp 00000000 fe:00 8   /lib/libc.so.6\n\
            e000-f000 r-xp 00000000 00:00 0   [vdso]\n\
            f000-ff00 rw-p 00000000 00:00 0\n";
        let found: Vec<_> = read_only(maps, "/x/mesh agent").collect();
        assert_eq!(found, [(0x3000, 0x7000)]);
    }

    #[test]
    fn code_goes_on_after_it_was_given_back() {
        let given = give_back_memory().unwrap();
        assert!(given > 100_000, "{given} bytes");
        assert_eq!(format!("{:.3}", 2f64.sqrt()), "1.414");
    }
}
