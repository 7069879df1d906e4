//! The system calls that the standard library does not offer.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::ptr;

/// Moves the calling thread into the network namespace that `file` is open on.
pub(crate) fn enter_netns(file: &File) -> io::Result<()> {
    // SAFETY: setns(2) takes two integers; `file` is open for the duration of the call.
    check(unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) })
}

/// Mounts a new bpf file system on the directory `target`.
pub(crate) fn mount_bpffs(target: &Path) -> io::Result<()> {
    let target = path(target)?;
    // SAFETY: the strings are NUL-terminated and outlive the call; bpffs takes no data.
    check(unsafe {
        libc::mount(c"bpffs".as_ptr(), target.as_ptr(), c"bpf".as_ptr(), 0, ptr::null())
    })
}

/// Unmounts `target` at once, also while something in it is open.
pub(crate) fn unmount(target: &Path) -> io::Result<()> {
    let target = path(target)?;
    // SAFETY: the string is NUL-terminated and outlives the call.
    check(unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) })
}

/// Sends `signal` to the process `pid`, which must be a child that was not waited for: only then
/// does its id still mean it.
pub(crate) fn kill(pid: u32, signal: i32) -> io::Result<()> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: kill(2) takes two integers.
    check(unsafe { libc::kill(pid, signal) })
}

/// Keeps SIGINT and SIGTERM from ending the calling thread, and every thread that it starts later.
pub(crate) fn block_interrupts() -> io::Result<()> {
    let set = interrupts();
    // SAFETY: `set` is an initialised signal set; the old one is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Undoes [`block_interrupts`] for a child to be, which would inherit what is blocked. Not for the
/// thread that starts it: a signal that comes meanwhile would be delivered there, and end everything.
pub(crate) fn unblock_interrupts(command: &mut Command) {
    let set = interrupts();
    let unblock = move || {
        // SAFETY: as above.
        match unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut()) } {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    };
    // SAFETY: between fork and exec only a system call is made, which allocates and locks nothing.
    unsafe { command.pre_exec(unblock) };
}

/// Waits for SIGINT or SIGTERM, which must be blocked.
pub(crate) fn wait_for_interrupt() {
    let set = interrupts();
    let mut signal = 0;
    // SAFETY: both arguments are valid for the duration of the call.
    unsafe { libc::sigwait(&raw const set, &raw mut signal) };
}

fn interrupts() -> libc::sigset_t {
    // SAFETY: a signal set is plain memory, and sigemptyset initialises it before it is used.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        set
    }
}

/// Whether a socket is closed both ways or has an error for who uses it next, which keeps it.
pub(crate) fn has_failed(socket: &impl AsRawFd) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one structure, which outlives the call.
    check(unsafe { libc::poll(&raw mut poll, 1, 0) }.min(0))?;
    Ok(poll.revents & (libc::POLLERR | libc::POLLHUP) != 0)
}

/// Has the SYN of the coming `connect()` wait for the first bytes.
pub(crate) fn defer_connect(socket: &impl AsRawFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the kernel reads one `int`, which outlives the call.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_FASTOPEN_CONNECT,
            (&raw const on).cast(),
            4,
        )
    })
}

/// A new TUN device of this name in the calling thread's network namespace: packets that are routed
/// there are read, what is written comes in from there. It goes with the file, which does not block.
pub(crate) fn tun(name: &str) -> io::Result<File> {
    /// `struct ifreq`, as `TUNSETIFF` reads it.
    #[repr(C)]
    struct Request {
        name: [u8; libc::IFNAMSIZ],
        flags: libc::c_short,
        rest: [u8; 22],
    }
    const _: () = assert!(size_of::<Request>() == size_of::<libc::ifreq>());

    let mut request = Request { name: [0; libc::IFNAMSIZ], flags: 0, rest: [0; 22] };
    // The last byte stays NUL.
    request.name.iter_mut().rev().skip(1).rev().zip(name.bytes()).for_each(|(to, of)| *to = of);
    request.flags = libc::c_short::try_from(libc::IFF_TUN | libc::IFF_NO_PI).unwrap_or_default();
    let mut options = File::options();
    let options = options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open("/dev/net/tun")?;
    // SAFETY: the descriptor is open, and the kernel reads and writes one `ifreq`.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    Ok(file)
}

/// Attaches a `sock_ops` program of these instructions behind those that are on `cgroup`, until the link is
/// closed.
pub(crate) fn attach_sock_ops(cgroup: &File, program: &[u64]) -> io::Result<OwnedFd> {
    // Of `enum bpf_cmd`, `bpf_prog_type` and `bpf_attach_type` in the kernel's UAPI.
    const PROG_LOAD: libc::c_long = 5;
    const LINK_CREATE: libc::c_long = 28;
    const TYPE_SOCK_OPS: u32 = 13;
    const CGROUP_SOCK_OPS: i32 = 3;

    /// `union bpf_attr` as `BPF_PROG_LOAD` reads it.
    #[repr(C)]
    struct Load {
        kind: u32,
        len: u32,
        program: *const u64,
        licence: *const libc::c_char,
    }

    let len = u32::try_from(program.len()).map_err(io::Error::other)?;
    let licence = c"GPL".as_ptr();
    let mut load = Load { kind: TYPE_SOCK_OPS, len, program: program.as_ptr(), licence };
    // SAFETY: the instructions and the licence outlive the call, which reads them and `load`.
    let loaded =
        unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw mut load, size_of::<Load>()) };
    let loaded = owned(loaded)?;
    let mut link = [loaded.as_raw_fd(), cgroup.as_raw_fd(), CGROUP_SOCK_OPS, 0];
    // SAFETY: the call reads `link`, and both descriptors are open.
    owned(unsafe { libc::syscall(libc::SYS_bpf, LINK_CREATE, &raw mut link, size_of_val(&link)) })
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(result).map_err(io::Error::other)?;
    check(fd.min(0))?;
    // SAFETY: the kernel has just made this descriptor, for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Has `f` called when this program ends by itself, as Rust's test runner does.
pub(crate) fn at_exit(f: extern "C" fn()) {
    // SAFETY: atexit(3) keeps a pointer to a function, which is there until the end. That it has no room
    // for one more only means that nothing is called.
    unsafe { libc::atexit(f) };
}

fn path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
