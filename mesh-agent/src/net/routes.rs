//! What a pod's network namespace needs so that an application can be shown its clients' addresses.
//!
//! A delivery then comes from an address that is not the pod's, and the application's replies must
//! come back to this agent instead of leaving by `eth0`, while everything else that goes to the very
//! same client must go on leaving by `eth0`. The mark tells them apart:
//!
//! | Setting | Without it |
//! |---|---|
//! | `ip rule fwmark DELIVERY_MARK lookup TABLE`, `ip route local default dev lo table TABLE`, both families | marked packets leave by `eth0` |
//! | `net.ipv4.tcp_fwmark_accept=1`: an accepted socket takes the mark of its SYN | the SYN-ACK is not marked: deliveries time out |
//! | `net.ipv4.fwmark_reflect=1`, `net.ipv6.fwmark_reflect=1`: as do answers without a socket | the RST of a closed port is not marked: instead of being refused, deliveries time out |
//!
//! # What the application can notice
//!
//! - `getsockopt(SO_MARK)` of a connection that this agent delivered is [`DELIVERY_MARK`]. Of all others it is
//!   what it was: marks do not cross from one namespace to another.
//! - Where somebody marks *incoming* packets inside the pod (nftables, tc), the two kinds of settings
//!   pass that mark on to accepted sockets and to answers, and that person's own rules then see it.
//! - A listener that has set `SO_MARK` itself keeps its own mark: it cannot be shown clients, and
//!   connections to it time out. Such a pod needs `malla.dev/preserve-client-address: false`.
//! - A client whose own source port happens to be one that this agent uses in its name for the same
//!   destination at that moment must retransmit its SYN until the other connection has ended. Ports
//!   are chosen where clients do not choose theirs ([`super::source_port`]).

use std::io;
use std::net::IpAddr;

use super::netlink::{Family, LocalRoute, Rtnetlink, Rule};
use super::{DELIVERY_MARK, Netns, sock_diag, sysctl};

/// The routing table that leads marked packets to `lo`: `la`. Free to choose, but the same for every
/// version of the agent.
const TABLE: u32 = 0x6c61;
/// Right behind the kernel's own rule for local addresses, before any that the pod may have, such as
/// a VPN's "all that is not marked by me".
const PRIORITY: u32 = 1;
/// The `protocol` of rules and routes says who made them. No routing daemon uses 0xd8 and the seven
/// behind it (`/etc/iproute2/rt_protos`). The low bits of the IPv4 route's tell which of [`SYSCTLS`]
/// were off before: a note that survives this process and goes when the route goes.
const PROTOCOL: u8 = 0xd8;
const SYSCTLS: [(u8, &str); 3] =
    [(1, "ipv4/tcp_fwmark_accept"), (2, "ipv4/fwmark_reflect"), (4, "ipv6/fwmark_reflect")];

/// Prepares a namespace for [`super::deliver`] with a client's address, for the families of `pod_ips`.
/// May be repeated, also by another process.
///
/// # Errors
///
/// The kernel refused a rule, a route or a setting; what was added is taken away again.
pub fn add_client_address_routes(netns: &Netns, pod_ips: &[IpAddr]) -> io::Result<()> {
    let has_v6 = pod_ips.iter().any(IpAddr::is_ipv6);
    let added = netns.run(|| {
        add(has_v6).inspect_err(|_error| {
            if let Err(error) = remove() {
                tracing::warn!(%error, stage = "deliver", "a namespace is left half prepared");
            }
        })
    })?;
    netns.clients.set_prepared(added.is_ok());
    added
}

/// Takes away what [`add_client_address_routes`] added, and nothing else. Deliveries in a client's
/// name that are still open stall: [`retire_client_address_routes`] waits for them.
///
/// # Errors
///
/// The kernel refused. Nothing to remove is no error.
pub fn remove_client_address_routes(netns: &Netns) -> io::Result<()> {
    netns.clients.set_prepared(false);
    netns.run(remove)?
}

/// As [`remove_client_address_routes`], unless a connection lives by them: a delivery in a client's
/// name, also one whose last bytes the application has not taken yet. Says whether they are gone; ask
/// again if not.
///
/// # Errors
///
/// The kernel does not tell which connections there are, or refused. Everything is as it was then.
pub fn retire_client_address_routes(netns: &Netns) -> io::Result<bool> {
    if !netns.clients.close() {
        return Ok(false);
    }
    let in_use = netns.run(|| sock_diag::any_marked(DELIVERY_MARK)).flatten();
    if matches!(in_use, Ok(false)) {
        return netns.run(remove).flatten().map(|()| true);
    }
    netns.clients.set_prepared(true);
    in_use.map(|_in_use| false)
}

/// `ip link set lo up`: a new namespace's loopback interface is down.
///
/// # Errors
///
/// Netlink's.
pub fn raise_loopback(netns: &Netns) -> io::Result<()> {
    netns.run(|| Rtnetlink::open()?.raise_loopback())?
}

fn add(has_v6: bool) -> io::Result<()> {
    let rtnetlink = Rtnetlink::open()?;
    let mut off = 0;
    for (bit, name) in SYSCTLS {
        if sysctl::read(name)?.as_deref() == Some("0") {
            off |= bit;
        }
    }
    // The note first, also in a pod that has only IPv6: from here on a crash leaves nothing that
    // `remove` would not find.
    rtnetlink.add(&route(Family::V4, off))?;
    rtnetlink.add(&rule(Family::V4))?;
    if has_v6 {
        match rtnetlink.add(&route(Family::V6, 0)) {
            Ok(()) => rtnetlink.add(&rule(Family::V6))?,
            // IPv6 is switched off, on `lo` or altogether: nothing will come from there.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EACCES | libc::EAFNOSUPPORT)) => {}
            Err(error) => return Err(error),
        }
    }
    for (bit, name) in SYSCTLS {
        if off & bit != 0 {
            sysctl::write(name, "1")?;
        }
    }
    Ok(())
}

fn remove() -> io::Result<()> {
    let rtnetlink = Rtnetlink::open()?;
    for family in [Family::V4, Family::V6] {
        rtnetlink.delete(&rule(family))?;
    }
    rtnetlink.delete(&route(Family::V6, 0))?;
    let all = SYSCTLS.iter().fold(0, |all, (bit, _name)| all | bit);
    for off in 0..=all {
        if !rtnetlink.delete(&route(Family::V4, off))? {
            continue;
        }
        for (bit, name) in SYSCTLS {
            // Only what is still as `add` left it.
            if off & bit != 0 && sysctl::read(name)?.as_deref() == Some("1") {
                sysctl::write(name, "0")?;
            }
        }
    }
    Ok(())
}

fn rule(family: Family) -> Rule {
    Rule { family, priority: PRIORITY, mark: DELIVERY_MARK, table: TABLE, protocol: PROTOCOL }
}

fn route(family: Family, off: u8) -> LocalRoute {
    LocalRoute { family, table: TABLE, protocol: PROTOCOL | off }
}
