//! The calls of `bpf(2)` that aya 0.14 does not offer: links that are replaced in place, and map
//! operations through a shared reference.
//!
//! Attributes are laid out as in the kernel's `union bpf_attr`; what follows the fields that a command
//! reads may be left out (`bpf_check_uarg_tail_zero`).

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::OnceLock;

use aya::Pod;
use mesh_common::direct::DirectEvent;

const MAP_LOOKUP_ELEM: libc::c_int = 1;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const MAP_GET_NEXT_KEY: libc::c_int = 4;
const OBJ_PIN: libc::c_int = 6;
const OBJ_GET: libc::c_int = 7;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const PROG_QUERY: libc::c_int = 16;
const MAP_LOOKUP_AND_DELETE_ELEM: libc::c_int = 21;
const LINK_CREATE: libc::c_int = 28;
const LINK_UPDATE: libc::c_int = 29;
const LINK_DETACH: libc::c_int = 34;

/// `enum bpf_link_type`.
const LINK_TYPE_CGROUP: u32 = 3;
const LINK_TYPE_NETNS: u32 = 5;
const LINK_TYPE_TCX: u32 = 11;

/// `BPF_MPROG_MAX`: no hook of a device has more programs.
const MPROG_MAX: usize = 64;

/// `enum bpf_attach_type`, those of our programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum AttachType {
    SockOps = 3,
    Connect4 = 10,
    Connect6 = 11,
    Peername4 = 29,
    Peername6 = 30,
    SkLookup = 36,
    TcxIngress = 46,
    TcxEgress = 47,
}

/// What a link is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// A cgroup, by the inode of its directory.
    Cgroup { id: u64 },
    /// A network namespace, by inode; zero when it is gone.
    Netns { inode: u32 },
    /// A network device, by index; zero when it is gone.
    Device { index: u32 },
    /// Something that we never attach to.
    Other,
}

/// What the kernel says about a link.
#[derive(Clone, Copy, Debug)]
pub(super) struct LinkInfo {
    pub(super) id: u32,
    pub(super) program: u32,
    pub(super) target: Target,
    pub(super) attach_type: u32,
}

/// # Safety
///
/// Pointers inside of `attr` must be valid for what `command` reads and writes through them.
unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads, and for some commands writes, `size_of::<T>()` bytes at `attr`; the
    // rest is the caller's promise.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// As [`bpf`], for commands that return a descriptor.
///
/// # Safety
///
/// As for [`bpf`].
unsafe fn bpf_fd<T>(command: libc::c_int, attr: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let fd = unsafe { bpf(command, attr) }?;
    let fd = libc::c_int::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the command returns a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn address<T>(value: *const T) -> u64 {
    value.addr() as u64
}

#[repr(C)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Opens what is pinned at `path`: a map, a program or a link.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = ObjectAttr { path: address(path.as_ptr()), fd: 0, flags: 0 };
    // SAFETY: `path` ends in NUL and lives until the call returns.
    unsafe { bpf_fd(OBJ_GET, &mut attr) }
}

/// Pins `object` at `path`, which must not exist.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = ObjectAttr { path: address(path.as_ptr()), fd: raw(object), flags: 0 };
    // SAFETY: `path` ends in NUL and lives until the call returns.
    unsafe { bpf(OBJ_PIN, &mut attr) }?;
    Ok(())
}

/// Attaches `program` to a cgroup or a network namespace. The link ends with its last descriptor or pin.
pub(super) fn create_link(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: AttachType,
) -> io::Result<OwnedFd> {
    // struct { prog_fd, target_fd, attach_type, flags }: flags must be 0, links are always "multi".
    let mut attr = [raw(program), raw(target), attach_type as u32, 0];
    // SAFETY: no pointers.
    unsafe { bpf_fd(LINK_CREATE, &mut attr) }
}

/// Attaches `program` to a device of the calling thread's network namespace, behind those that are there.
pub(super) fn create_device_link(
    program: BorrowedFd<'_>,
    index: u32,
    attach_type: AttachType,
) -> io::Result<OwnedFd> {
    // As above, with the index in place of a descriptor; what is left out means "last".
    let mut attr = [raw(program), index, attach_type as u32, 0];
    // SAFETY: no pointers.
    unsafe { bpf_fd(LINK_CREATE, &mut attr) }
}

#[repr(C)]
struct QueryAttr {
    index: u32,
    attach_type: u32,
    flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    reserved: u32,
    program_flags: u64,
    links: u64,
    link_flags: u64,
    revision: u64,
}

/// The programs on a hook of a device of the calling thread's network namespace. `InvalidInput` is what
/// a kernel without TCX says.
pub(super) fn device_programs(index: u32, attach_type: AttachType) -> io::Result<Vec<u32>> {
    let mut programs = vec![0u32; MPROG_MAX];
    let mut attr = QueryAttr {
        index,
        attach_type: attach_type as u32,
        flags: 0,
        attach_flags: 0,
        programs: programs.as_mut_ptr().expose_provenance() as u64,
        #[expect(clippy::cast_possible_truncation, reason = "64")]
        count: MPROG_MAX as u32,
        reserved: 0,
        program_flags: 0,
        links: 0,
        link_flags: 0,
        revision: 0,
    };
    // SAFETY: the kernel writes at most `count` words to `programs`, and to fields of `attr`.
    match unsafe { bpf(PROG_QUERY, &mut attr) } {
        Ok(_) => {}
        // No program was ever attached there.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    }
    programs.truncate(usize::try_from(attr.count).unwrap_or(MPROG_MAX));
    Ok(programs)
}

/// Replaces a link's program. Every packet and call sees the old one or the new one.
pub(super) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    // struct { link_fd, new_prog_fd, flags, old_prog_fd }
    let mut attr = [raw(link), raw(program), 0, 0];
    // SAFETY: no pointers.
    unsafe { bpf(LINK_UPDATE, &mut attr) }?;
    Ok(())
}

/// Ends what a link does, at once. Without this it goes on after its last pin is gone, until the kernel
/// gets round to freeing it: after an RCU grace period, on a work queue.
pub(super) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    // struct { link_fd }
    let mut attr = [raw(link)];
    // SAFETY: no pointers.
    unsafe { bpf(LINK_DETACH, &mut attr) }?;
    Ok(())
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}

/// Reads at most `N` words of what the kernel says about an object.
fn info<const N: usize>(object: BorrowedFd<'_>) -> io::Result<[u32; N]> {
    let mut words = [0u32; N];
    #[expect(clippy::cast_possible_truncation, reason = "under a hundred bytes")]
    let len = size_of_val(&words) as u32;
    let mut attr = InfoAttr { fd: raw(object), len, info: words.as_mut_ptr().addr() as u64 };
    words.as_mut_ptr().expose_provenance();
    // SAFETY: the kernel writes at most `len` bytes to `words`.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(words)
}

/// Describes a link; an error if `object` is not one.
pub(super) fn link_info(object: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    // A map or a program would answer too, in its own layout.
    let kind = fs::read_link(format!("/proc/self/fd/{}", object.as_raw_fd()))?;
    if kind.as_os_str() != "anon_inode:bpf_link" && kind.as_os_str() != "anon_inode:bpf-link" {
        return Err(io::Error::other(format!("is no link but {}", kind.display())));
    }
    // struct bpf_link_info: type, id, prog_id, padding, then
    // cgroup { cgroup_id: u64, attach_type }, netns { netns_ino, attach_type }, tcx { ifindex, attach_type }
    let [kind, id, program, _, a, b, c, _] = info::<8>(object)?;
    let (target, attach_type) = match kind {
        LINK_TYPE_CGROUP => (Target::Cgroup { id: u64::from(a) | u64::from(b) << 32 }, c),
        LINK_TYPE_NETNS => (Target::Netns { inode: a }, b),
        LINK_TYPE_TCX => (Target::Device { index: a }, b),
        _ => (Target::Other, 0),
    };
    Ok(LinkInfo { id, program, target, attach_type })
}

/// The kernel's ID of a loaded program.
pub(super) fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    // struct bpf_prog_info: type, id.
    info::<2>(program).map(|[_kind, id]| id)
}

/// The name of a loaded program, at most 15 bytes.
pub(super) fn program_name(id: u32) -> io::Result<String> {
    let mut attr = [id, 0, 0];
    // SAFETY: no pointers.
    let program = unsafe { bpf_fd(PROG_GET_FD_BY_ID, &mut attr) }?;
    let words = info::<20>(std::os::fd::AsFd::as_fd(&program))?;
    // struct bpf_prog_info: the name is 16 bytes at 64.
    let bytes: Vec<u8> = words[16..20].iter().flat_map(|word| word.to_ne_bytes()).collect();
    Ok(bytes.iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte)).collect())
}

#[repr(C)]
struct ElementAttr {
    map: u32,
    reserved: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Writes an element through a shared reference: aya's maps want an exclusive one, and a lock on the
/// path of every connection.
///
/// `K` and `V` must be the map's: the caller checked its sizes when it opened the pin.
pub(super) fn update<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    let mut attr = ElementAttr {
        map: raw(map),
        reserved: 0,
        key: address(key),
        value: address(value),
        flags: 0,
    };
    // SAFETY: the kernel reads the map's key size and value size, which are those of `K` and `V`.
    unsafe { bpf(MAP_UPDATE_ELEM, &mut attr) }?;
    Ok(())
}

/// Reads an element and removes it, in one call.
///
/// `K` and `V` must be the map's: the caller checked its sizes when it opened the pin.
pub(super) fn take<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    key: &K,
    value: V,
) -> io::Result<Option<V>> {
    read(MAP_LOOKUP_AND_DELETE_ELEM, map, key, value)
}

/// Reads an element.
///
/// `K` and `V` must be the map's, as for [`take`].
pub(super) fn lookup<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    key: &K,
    value: V,
) -> io::Result<Option<V>> {
    read(MAP_LOOKUP_ELEM, map, key, value)
}

fn read<K: Pod, V: Pod>(
    command: libc::c_int,
    map: BorrowedFd<'_>,
    key: &K,
    mut value: V,
) -> io::Result<Option<V>> {
    let pointer = &raw mut value;
    let mut attr = ElementAttr {
        map: raw(map),
        reserved: 0,
        key: address(key),
        value: pointer.expose_provenance() as u64,
        flags: 0,
    };
    // SAFETY: the kernel reads the map's key size and writes its value size, those of `K` and `V`.
    match unsafe { bpf(command, &mut attr) } {
        Ok(_) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The keys of a hash map with room for `limit`, whatever its values are.
///
/// `K` must be the map's: the caller compared the size of its keys.
pub(super) fn keys<K: Pod + Default>(map: BorrowedFd<'_>, limit: u32) -> io::Result<Vec<K>> {
    let mut keys: Vec<K> = Vec::new();
    // Bounded: when the last key is removed meanwhile, the kernel begins with the first one again.
    for _ in 0..limit {
        let mut next = K::default();
        let pointer = &raw mut next;
        let mut attr = ElementAttr {
            map: raw(map),
            reserved: 0,
            // None: the first one is asked for.
            key: keys.last().map_or(0, |last| address(std::ptr::from_ref(last))),
            // `next_key` is where other commands have the value.
            value: pointer.expose_provenance() as u64,
            flags: 0,
        };
        // SAFETY: the kernel reads the map's key size at `key`, if that is not null, and writes as much to
        // `next`; the size is that of `K`, of which every bit pattern is valid.
        match unsafe { bpf(MAP_GET_NEXT_KEY, &mut attr) } {
            Ok(_) => keys.push(next),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(keys)
}

/// A record of the ring; `None` if it has another size.
pub(super) fn read_event(bytes: &[u8]) -> Option<DirectEvent> {
    // SAFETY: as many bytes as the struct has, of which every pattern is valid (`Pod`), copied because
    // the ring's alignment is its own.
    (bytes.len() == size_of::<DirectEvent>())
        .then(|| unsafe { bytes.as_ptr().cast::<DirectEvent>().read_unaligned() })
}

/// Two words from the kernel's generator.
pub(super) fn random_words() -> io::Result<[u64; 2]> {
    let mut words = [0u64; 2];
    // SAFETY: the kernel writes at most the size of `words`.
    let got = unsafe { libc::getrandom(words.as_mut_ptr().cast(), size_of_val(&words), 0) };
    if usize::try_from(got) == Ok(size_of_val(&words)) {
        Ok(words)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Nanoseconds on `CLOCK_BOOTTIME`, the programs' clock: in a time namespace (time_namespaces(7)) ours is
/// ahead of it or behind, and a heartbeat by it would tell that the agent is gone, or will never be.
pub(super) fn boot_ns() -> u64 {
    static AHEAD_NS: OnceLock<i64> = OnceLock::new();
    let ahead_ns = AHEAD_NS.get_or_init(|| {
        boot_ahead_ns(&fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default())
    });

    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one `timespec`; this clock exists since Linux 2.6.39.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    let now_ns = now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned();
    now_ns.saturating_add_signed(ahead_ns.saturating_neg())
}

/// How far this process's `CLOCK_BOOTTIME` is ahead: of its lines `clock seconds nanoseconds`, the
/// latter never negative. A kernel without time namespaces has no such file.
fn boot_ahead_ns(offsets: &str) -> i64 {
    let ahead = offsets.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        // Some kernels write the clock's number.
        words.next().filter(|clock| matches!(*clock, "boottime" | "7"))?;
        let (s, ns) = (words.next()?.parse::<i64>().ok()?, words.next()?.parse::<i64>().ok()?);
        Some(s.saturating_mul(1_000_000_000).saturating_add(ns))
    });
    ahead.unwrap_or(0)
}

/// Moves the calling thread into a new network namespace, for good.
pub(super) fn unshare_netns() -> io::Result<()> {
    // SAFETY: affects the calling thread only.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The magic number of the file system that `path` is on.
pub(super) fn file_system(path: &Path) -> io::Result<i64> {
    let path = c_path(path)?;
    // SAFETY: an all-zero `statfs` is valid.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `path` ends in NUL, and the kernel writes one `statfs`.
    if unsafe { libc::statfs(path.as_ptr(), &raw mut stat) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat.f_type)
}

#[cfg(test)]
mod tests {
    use super::boot_ahead_ns;

    #[test]
    fn offset_of_a_time_namespace_is_read() {
        let file = "monotonic         -60         0\nboottime          -60  500000000\n";
        assert_eq!(boot_ahead_ns(file), -59_500_000_000);
        assert_eq!(boot_ahead_ns("1 0 0\n7 86400 1\n"), 86_400_000_000_001);
        assert_eq!(boot_ahead_ns("monotonic 5 0\n"), 0);
        assert_eq!(boot_ahead_ns(""), 0);
    }
}
