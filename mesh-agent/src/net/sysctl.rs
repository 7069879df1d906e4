//! Settings under `/proc/sys/net` of the namespace in which the calling thread is.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

/// The value of `net.NAME`, `None` if this kernel has no such setting. `name` is spelled as a path.
pub(super) fn read(name: &str) -> io::Result<Option<String>> {
    match fs::read_to_string(format!("/proc/sys/net/{name}")) {
        Ok(value) => Ok(Some(value.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Sets `net.NAME`.
///
/// In a container that is not privileged `/proc/sys` is mounted read-only. That is a flag of the
/// mount, not of the setting: a `proc` of our own, mounted nowhere, has none.
pub(super) fn write(name: &str, value: &str) -> io::Result<()> {
    let mut file = match File::options().write(true).open(format!("/proc/sys/net/{name}")) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            let proc = detached_proc()?;
            // Through its descriptor, since the mount has no path.
            let path = format!("/proc/self/fd/{}/sys/net/{name}", proc.as_raw_fd());
            File::options().write(true).open(path)?
        }
        opened => opened?,
    };
    file.write_all(value.as_bytes())
}

/// A fresh `proc` that is attached to no mount tree and vanishes with its descriptor
/// (`CAP_SYS_ADMIN`, 5.2).
fn detached_proc() -> io::Result<OwnedFd> {
    const PROC: &CStr = c"proc";
    // SAFETY: fsopen(name, flags) reads a C string that is 'static, and returns a new descriptor.
    let context = unsafe { libc::syscall(libc::SYS_fsopen, PROC.as_ptr(), libc::FSOPEN_CLOEXEC) };
    let context = owned(context)?;
    let none = std::ptr::null::<u8>();
    // SAFETY: with FSCONFIG_CMD_CREATE the kernel wants key and value null and the last argument 0,
    // and touches no memory of ours.
    let created = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            libc::FSCONFIG_CMD_CREATE,
            none,
            none,
            0,
        )
    };
    if created != 0 {
        return Err(io::Error::last_os_error());
    }
    let flags = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    // SAFETY: fsmount(fd, flags, attributes) takes integers and returns a new descriptor.
    let mount = unsafe {
        libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), libc::FSMOUNT_CLOEXEC, flags)
    };
    owned(mount)
}

/// The descriptor that a system call returned, or its error.
fn owned(answer: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(answer) {
        // SAFETY: called only with the answer of a system call that makes a descriptor, at once: it
        // is open, and nobody else knows it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
