//! Netlink's answers as the fuzzer makes them up. They come from the kernel, which means no harm; but
//! their shape is the kernel's choice, and their lengths lead through memory.

use super::netlink::errno;
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

#[cfg(test)]
mod tests {
    #[test]
    fn seeds_of_the_fuzzer_hold() {
        crate::fuzzing::replay("netlink", super::netlink);
    }
}
