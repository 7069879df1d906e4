//! Numbers by which one network namespace knows another.
//!
//! The kernel's socket lookup takes such a number. It goes with the namespace that it names, and the
//! agent makes it of that namespace's cookie, so that it never comes to mean another one.

use std::io;
use std::os::fd::AsRawFd as _;

use super::Netns;
use super::netlink::Rtnetlink;

/// Where our numbers begin. The kernel gives out the lowest free ones, from zero.
const FIRST: u32 = 1 << 30;

/// The number of `of` in `seen_from`; given now, if there is none yet.
///
/// The kernel cannot take it back before one of the two namespaces ends.
///
/// # Errors
///
/// A namespace cannot be entered, or the number is another namespace's.
pub fn namespace_id(seen_from: &Netns, of: &Netns) -> io::Result<u32> {
    #[expect(clippy::cast_possible_truncation, reason = "the low bits, of a number that counts up")]
    let wanted = FIRST + (of.cookie() as u32 & (FIRST - 1));
    let fd = of.fd.as_raw_fd().cast_unsigned();
    seen_from.run(|| {
        let netlink = Rtnetlink::open()?;
        match netlink.add_namespace_id(fd, wanted) {
            Ok(()) => Ok(wanted),
            // It has one already, ours or somebody else's; both are as good.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                netlink.namespace_id(fd)?.ok_or(error)
            }
            Err(error) => Err(error),
        }
    })?
}
