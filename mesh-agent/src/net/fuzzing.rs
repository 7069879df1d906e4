//! Netlink's answers as the fuzzer makes them up. They come from the kernel, which means no harm; but
//! their shape is the kernel's choice, and their lengths lead through memory. So do the addresses in
//! proc_pid_maps(5).

use super::netlink::errno;
use super::own::read_only;
use super::{links, sock_diag};

/// Any bytes are read, as far as they make sense.
pub fn netlink(input: &[u8]) {
    _ = (errno(input), sock_diag::kind(input), sock_diag::info(input));
    for bytes in [input].into_iter().chain(links::messages(input).map(|(_, message)| message)) {
        _ = (links::address(bytes), links::device(bytes));
        if let Some(info) = sock_diag::info(bytes) {
            _ = (info.payload_sent(), info.payload_received());
        }
    }
}

/// Of any text only ranges of addresses are taken, of lines that name the file and cannot be written to.
pub fn maps(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let found: Vec<_> = read_only(text, "/x/mesh agent").collect();
    let is_code = |line: &&str| line.contains("r-xp") && line.ends_with("/x/mesh agent");
    assert!(found.len() <= text.lines().filter(is_code).count(), "of another line");
    assert!(found.iter().all(|(start, len)| start.checked_add(*len).is_some()), "past the end");
}

#[cfg(test)]
mod tests {
    #[test]
    fn seeds_of_the_fuzzer_hold() {
        crate::fuzzing::replay("netlink", super::netlink);
        crate::fuzzing::replay("maps", super::maps);
    }
}
