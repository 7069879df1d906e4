//! Sockets that are made in another network namespace, and what they need to behave there.
//!
//! A socket belongs for ever to the namespace of the thread that created it, so a thread enters a
//! pod's namespace, calls `socket()`, `bind()` and `connect()`, and comes back; from then on any
//! thread may use the descriptor.
//!
//! Guarantees: no thread ever stays in a foreign namespace (the process aborts rather than go on
//! there), nothing here blocks while inside, and no future of this module holds a namespace across an
//! `.await`.
//!
//! Not here: who may connect where, and the programs that would capture these sockets (`exempt`).

mod cable;
mod clients;
mod deliver;
#[cfg(any(fuzzing, test))]
pub mod fuzzing;
mod links;
mod netlink;
mod nsid;
mod own;
mod routes;
mod sock_diag;
mod source_port;
mod sysctl;
mod udp;

use std::cell::OnceCell;
use std::fs::File;
use std::io;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tokio::net::TcpStream;

pub use cable::{Cable, NoCable, cable};
use clients::Clients;
pub use deliver::deliver;
pub use nsid::namespace_id;
pub use own::{
    any_address, bind_shared, give_back_memory, listen_on, listen_shared, raise_file_limit,
};
pub use routes::{
    add_client_address_routes, raise_loopback, remove_client_address_routes,
    retire_client_address_routes,
};
pub use sock_diag::{Ends, SockDiag, TcpInfo};
#[cfg(test)]
pub use udp::testing::udp_gro;
pub use udp::{Instruction, choose_socket_by, set_udp_gro, udp_socket, udp_sockets_at};

/// The mark of deliveries that keep the client's address. `routes` sends marked replies back over
/// loopback. The value is only ever seen inside a pod's namespace, by that namespace's rules.
pub const DELIVERY_MARK: u32 = 0x6d61_6c6c;

/// Connections that may wait for `accept()`: a worker that is busy for 50 ms must not refuse anybody
/// at 80,000 connections per second. The kernel lowers it to `net.core.somaxconn` (4096 since 5.4).
pub const BACKLOG: i32 = 4096;

/// A relayed connection that is silent for this long is asked whether its peer still exists: less
/// than the idle limits of usual load balancers and NATs (350 s and more).
const KEEPALIVE: Duration = Duration::from_secs(180);
/// `SO_NETNS_COOKIE` of `asm-generic/socket.h`, since Linux 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;
/// `NS_GET_NSTYPE` of `linux/nsfs.h`, since Linux 4.11.
const NS_GET_NSTYPE: libc::c_ulong = 0xb703;

/// A network namespace that is held open: it, its cookie and its inode live as long as this value.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
    inode: u64,
    cookie: u64,
    /// Whether [`add_client_address_routes`] has prepared it, through whichever handle.
    clients: Clients,
}

thread_local! {
    /// The namespace that this thread returns to. A thread keeps the namespace of the one that
    /// started it, so this is the agent's, and costs one look into `/proc` per thread.
    static HOME: OnceCell<File> = const { OnceCell::new() };
}

impl Netns {
    /// Opens `/run/netns/NAME` or `/proc/PID/ns/net`.
    ///
    /// # Errors
    ///
    /// The path cannot be opened, is not a network namespace, or may not be entered.
    pub fn open(path: &Path) -> io::Result<Self> {
        // Whatever the path leads to: opening a FIFO would wait for its other end.
        Self::new(File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?)
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// `/proc` is not mounted.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    fn new(file: File) -> io::Result<Self> {
        // SAFETY: `NS_GET_NSTYPE` takes no argument; on anything but a namespace it fails with ENOTTY.
        let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
        if kind != libc::CLONE_NEWNET {
            let error = "not a network namespace (is it mounted? see `ip netns`)";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
        }
        let inode = file.metadata()?.ino();
        let mut netns = Self { fd: file.into(), inode, cookie: 0, clients: Clients::default() };
        netns.cookie = netns.run(|| cookie(&stream_socket(Domain::IPV4)?))??;
        Ok(netns)
    }

    /// Another handle to the same namespace.
    ///
    /// # Errors
    ///
    /// No file descriptor is left.
    pub fn try_clone(&self) -> io::Result<Self> {
        let fd = self.fd.try_clone()?;
        Ok(Self { fd, inode: self.inode, cookie: self.cookie, clients: self.clients.clone() })
    }

    /// The kernel's number for this namespace: unique since boot, never used again, and not to be
    /// forged from inside.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// The inode, as `readlink /proc/PID/ns/net` shows it.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Runs `inside` on this thread in the namespace, and comes back, also from a panic.
    ///
    /// Not to be nested: the inner call would leave the outer closure at home. `inside` must not
    /// block: a worker's other connections wait. Aborts the process if the thread cannot come back,
    /// since whatever ran next would speak for the pod.
    ///
    /// # Errors
    ///
    /// The namespace cannot be entered (`CAP_SYS_ADMIN`); `inside` has not run then.
    pub fn run<T>(&self, inside: impl FnOnce() -> T) -> io::Result<T> {
        HOME.with(|home| {
            let home = match home.get() {
                Some(home) => home,
                None => {
                    let opened = File::open("/proc/thread-self/ns/net")?;
                    home.get_or_init(|| opened)
                }
            };
            enter(self.fd.as_fd())?;
            let _on_the_way_out = Return(home);
            Ok(inside())
        })
    }
}

/// Goes home when dropped.
struct Return<'a>(&'a File);

impl Drop for Return<'_> {
    fn drop(&mut self) {
        if let Err(error) = enter(self.0.as_fd()) {
            tracing::error!(%error, "cannot leave a pod's network namespace: aborting");
            std::process::abort();
        }
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn enter(netns: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: changes only the calling thread's network namespace; the descriptor is open.
    check(unsafe { libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) })
}

fn cookie(socket: &Socket) -> io::Result<u64> {
    let mut cookie = 0u64;
    #[expect(clippy::cast_possible_truncation, reason = "eight")]
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, the size of `cookie`, and the new length to `len`.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    })?;
    Ok(cookie)
}

/// Where a listening socket is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bind {
    /// To this address, at any port that is free, for connections from the same namespace.
    To(IpAddr),
    /// To an address of this one's family that nobody can dial: the socket is reached only because a
    /// program steers connections to it. 192.0.2.1 (RFC 5737) or 100::1 (RFC 6666).
    Unreachable(IpAddr),
}

/// Opens a non-blocking listener in the calling thread's namespace; see [`Netns::run`].
///
/// # Errors
///
/// Of `socket()`, `bind()` and `listen()`; no port is left.
pub fn listen(bind: Bind) -> io::Result<TcpListener> {
    let ip = match bind {
        Bind::To(ip) => ip,
        Bind::Unreachable(IpAddr::V4(_)) => Ipv4Addr::new(192, 0, 2, 1).into(),
        Bind::Unreachable(IpAddr::V6(_)) => Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 1).into(),
    };
    let socket = relayed_socket(domain(ip))?;
    probe(&socket)?;
    if let Bind::To(_) = bind {
        do_not_pace(&socket)?;
    }
    // Also for a pod's own IPv6 address, which cannot be bound while it is tentative.
    match ip {
        IpAddr::V4(_) => socket.set_freebind_v4(true)?,
        IpAddr::V6(_) => {
            socket.set_only_v6(true)?;
            socket.set_freebind_v6(true)?;
        }
    }
    bind_to_any_port(&socket, ip)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Binds to a port that the application is not about to want: it listens before the application does, which would
/// find its port taken, also at a wildcard address. So where nobody listens on purpose, and the kernel takes none
/// for connections; else where the kernel takes them, whose range may be used up by the pod's own, also by those in
/// TIME_WAIT; else anywhere.
fn bind_to_any_port(socket: &Socket, ip: IpAddr) -> io::Result<()> {
    let mut bound = Err(io::ErrorKind::AddrInUse.into());
    for port in source_port::for_listeners(fastrand::u16) {
        bound = socket.bind(&SocketAddr::new(ip, port).into());
        if !bound.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse) {
            break;
        }
    }
    bound
}

/// The inode of the namespace at `path`; `None` if nothing is there, or it is not to be seen.
pub fn inode(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().map(|found| found.ino())
}

/// Whether `ip` is an address of the namespace; not while it is tentative (RFC 4862 section 5.4).
pub fn has_address(netns: &Netns, ip: IpAddr) -> bool {
    // UDP: no port of it is ever in TIME_WAIT.
    let bound = || {
        let socket = Socket::new(domain(ip), Type::DGRAM, Some(Protocol::UDP))?;
        socket.bind(&SocketAddr::new(ip, 0).into())
    };
    netns.run(bound).is_ok_and(|bound| bound.is_ok())
}

/// The addresses of the device `eth0` in `netns`, which is what every container runtime calls a pod's
/// own: one, or one of each family, IPv4 first. `None` while there are none, one cannot be used yet
/// (duplicate address detection), or a family has several, of which only the runtime knows the pod's.
pub fn pod_addresses(netns: &Netns) -> Option<Vec<IpAddr>> {
    let found = || -> io::Result<Vec<IpAddr>> {
        let netlink = netlink::Rtnetlink::open()?;
        let Some(link) = netlink.index_of("eth0")? else { return Ok(Vec::new()) };
        let all = netlink.addresses()?;
        Ok(all.into_iter().filter(|(_ip, index)| *index == link).map(|(ip, _)| ip).collect())
    };
    let mut ips = netns.run(found).ok()?.ok()?;
    ips.retain(|ip| match ip {
        IpAddr::V4(ip) => !ip.is_link_local() && !ip.is_loopback(),
        IpAddr::V6(ip) => !ip.is_unicast_link_local() && !ip.is_loopback(),
    });
    ips.sort_unstable();
    let v4 = ips.iter().filter(|ip| ip.is_ipv4()).count();
    let is_clear = !ips.is_empty() && v4 <= 1 && ips.len() - v4 <= 1;
    (is_clear && ips.iter().all(|ip| has_address(netns, *ip))).then_some(ips)
}

/// Connects from inside `netns` to a destination outside of the mesh, as the application would have.
///
/// Cancel-safe: dropping the future closes the socket.
///
/// # Errors
///
/// Of the socket calls and of `connect()`. No time limit here.
pub async fn pass_through(
    netns: &Netns,
    to: SocketAddr,
    exempt: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
) -> io::Result<TcpStream> {
    let socket = netns.run(|| relayed_socket(domain(to.ip())))??;
    probe(&socket)?;
    exempt(socket.as_fd())?;
    start_connect(&socket, to)?;
    connected(socket).await
}

fn start_connect(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(()),
        other => other,
    }
}

async fn connected(socket: Socket) -> io::Result<TcpStream> {
    let stream = TcpStream::from_std(socket.into())?;
    // Within one namespace the answer has come before connect(2) returns.
    if is_connected(&stream) {
        return Ok(stream);
    }
    stream.writable().await?;
    match stream.take_error()? {
        Some(error) => Err(error),
        None => Ok(stream),
    }
}

/// How long the other side of a TCP socket has owed an answer to bytes that were sent again, or to probes
/// of a window that it has closed; `None` if it owes none.
///
/// # Errors
///
/// `fd` is no TCP socket.
pub fn silence(fd: RawFd) -> io::Result<Option<Duration>> {
    // SAFETY: plain numbers, of which zeros are valid.
    let mut info: libc::tcp_info = unsafe { mem::zeroed() };
    let mut len = libc::socklen_t::try_from(size_of_val(&info)).unwrap_or(0);
    let (level, option) = (libc::IPPROTO_TCP, libc::TCP_INFO);
    // SAFETY: the kernel writes `len` bytes at most, which are `info`'s.
    let got = unsafe { libc::getsockopt(fd, level, option, (&raw mut info).cast(), &raw mut len) };
    if got == -1 {
        return Err(io::Error::last_os_error());
    }
    // One probe may be on its way; of two the first has not been answered.
    let owes = (info.tcpi_unacked > 0 && info.tcpi_retransmits > 0) || info.tcpi_probes > 1;
    Ok(owes.then(|| Duration::from_millis(info.tcpi_last_ack_recv.into())))
}

/// Bytes that a TCP socket has taken and the other side has not acknowledged (`SIOCOUTQ`, tcp(7)).
///
/// # Errors
///
/// `fd` is no TCP socket.
pub fn unacknowledged(fd: RawFd) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the kernel writes one `int`, which outlives the call.
    let got = unsafe { libc::ioctl(fd, libc::TIOCOUTQ, &raw mut bytes) };
    if got == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(bytes).unwrap_or_default())
}

/// Whether the connection was made, and has not been reset: it may have ended in either direction, or both.
pub fn is_connected(stream: &TcpStream) -> bool {
    // In TCP_CLOSE and TCP_SYN_SENT, and only there, getpeername(2) says ENOTCONN (`inet_getname`).
    stream.peer_addr().is_ok()
}

/// `connecting`, or [`io::ErrorKind::TimedOut`] after `limit`.
///
/// # Errors
///
/// As `connecting`.
pub async fn within<T>(
    limit: Duration,
    connecting: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    match tokio::time::timeout(limit, connecting).await {
        Ok(connected) => connected,
        Err(_elapsed) => Err(io::ErrorKind::TimedOut.into()),
    }
}

fn domain(ip: IpAddr) -> Domain {
    if ip.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 }
}

fn stream_socket(domain: Domain) -> io::Result<Socket> {
    Socket::new(domain, Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))
}

/// A socket that is going to be relayed, or whose accepted ones are: they inherit all of it, and it
/// costs them no system call. Small writes go at once: the application has decided when to write.
/// Closing it is RST from its first moment on, also when this process is killed, so that a crash never
/// looks like a clean end; the relay turns that off when both directions have ended. Urgent data stays where it
/// is in the stream (RFC 6093, section 4): taken out of it, it would be lost.
fn relayed_socket(domain: Domain) -> io::Result<Socket> {
    let socket = stream_socket(domain)?;
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_tcp_nodelay(true)?;
    socket.set_out_of_band_inline(true)?;
    Ok(socket)
}

/// Notices a peer whose machine is gone.
fn probe(socket: &Socket) -> io::Result<()> {
    let every = KEEPALIVE / 3;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(every).with_retries(3);
    socket.set_tcp_keepalive(&keepalive)
}

/// For a socket whose other end is in the same namespace: loopback has no congestion, and what the
/// machine has chosen for its network costs there (BBR paces by a timer). Every kernel has this one.
fn do_not_pace(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_congestion(b"reno")
}

/// `-1` means that `errno` says why.
fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
