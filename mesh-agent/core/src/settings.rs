//! What a namespace or a pod asks of the mesh: the meaning of its `malla.dev/…` annotations.

use std::fmt;
use std::ops::RangeInclusive;

use crate::addr::Cidr;

/// At most this many ranges in one port list: the kernel keeps them in a fixed array.
pub const MAX_PORT_RANGES: usize = 16;

/// Blocks that a pod can leave out of the mesh.
pub const MAX_SKIP_CIDRS: usize = 32;

/// What happens to a connection that comes to an enrolled pod in plain text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Accepted, without a caller identity. The default: enrolling must not break who is not in yet.
    #[default]
    Permissive,
    /// Refused with RST.
    Strict,
}

/// Which destinations of an enrolled pod are captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Outbound {
    /// Services and pods of the mesh; anything else never leaves the kernel's own path. Default.
    #[default]
    Mesh,
    /// Everything but the pod itself; what is not in the mesh is passed through and reported.
    All,
}

/// What becomes of a connection that a pod opens before it is captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum UnknownPods {
    /// The pod is captured as soon as it has a namespace with an address, before the API tells its
    /// address, and its connections wait for what is missing; in the moment before they are refused.
    /// Default.
    #[default]
    Hold,
    /// Refused until the pod is captured as the API tells.
    Deny,
    /// Passes, in plain text.
    Allow,
}

/// Ports and ranges of ports, as in `4567,8000-8100`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct PortList(Vec<RangeInclusive<u16>>);

/// How a pod takes part, after its own annotations and its namespace's have been merged.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Settings {
    /// `malla.dev/mode`.
    pub mode: Mode,
    /// `malla.dev/outbound`.
    pub outbound: Outbound,
    /// `malla.dev/skip-inbound-ports`: reach the application without the agent, in any mode.
    pub skip_inbound_ports: PortList,
    /// `malla.dev/skip-outbound-ports`: destination ports that are never captured.
    pub skip_outbound_ports: PortList,
    /// `malla.dev/skip-outbound-cidrs`: destination addresses that are never captured.
    pub skip_outbound_cidrs: Vec<Cidr>,
    /// `malla.dev/fail-open`: without a live agent, connections bypass the mesh instead of failing.
    pub fail_open: bool,
    /// `malla.dev/preserve-client-address` (default true): the application sees the client's
    /// address; otherwise its own pod's.
    pub preserve_client_address: bool,
    /// `malla.dev/opaque-ports`: what is spoken there is carried and never parsed.
    pub opaque_ports: PortList,
    /// `malla.dev/direct` (default on): between pods of one node, connections may leave the agent out.
    pub direct: bool,
    /// `malla.dev/unknown-pods`, in a cluster.
    pub unknown_pods: UnknownPods,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            outbound: Outbound::default(),
            skip_inbound_ports: PortList::default(),
            skip_outbound_ports: PortList::default(),
            skip_outbound_cidrs: Vec::new(),
            fail_open: false,
            preserve_client_address: true,
            opaque_ports: PortList::default(),
            direct: true,
            unknown_pods: UnknownPods::default(),
        }
    }
}

/// Why a text is not a list of ports.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PortListError {
    /// An item is neither a port (1 to 65535) nor a range of ports.
    Item(String),
    /// A range ends before it begins.
    Backwards(String),
    /// More than [`MAX_PORT_RANGES`] items.
    TooMany(usize),
}

impl fmt::Display for PortListError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Item(item) => write!(f, "`{item}` is neither a port nor a range like 8000-8100"),
            Self::Backwards(item) => write!(f, "the range `{item}` ends before it begins"),
            Self::TooMany(n) => write!(f, "{n} items, {MAX_PORT_RANGES} at most: merge ranges"),
        }
    }
}

impl std::error::Error for PortListError {}

impl PortList {
    /// Whether `port` is in the list.
    pub fn contains(&self, port: u16) -> bool {
        self.0.iter().any(|range| range.contains(&port))
    }

    /// The ranges, at most [`MAX_PORT_RANGES`].
    pub fn ranges(&self) -> &[RangeInclusive<u16>] {
        &self.0
    }
}

impl std::str::FromStr for PortList {
    type Err = PortListError;

    fn from_str(text: &str) -> Result<Self, PortListError> {
        let mut ranges = Vec::new();
        for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let wrong = || PortListError::Item(item.chars().take(32).collect());
            let port = |text: &str| match text.trim().parse::<u16>() {
                Ok(0) | Err(_) => Err(wrong()),
                Ok(port) => Ok(port),
            };
            let (first, last) = match item.split_once('-') {
                Some((first, last)) => (port(first)?, port(last)?),
                None => (port(item)?, port(item)?),
            };
            if last < first {
                return Err(PortListError::Backwards(item.chars().take(32).collect()));
            }
            ranges.push(first..=last);
        }
        if ranges.len() > MAX_PORT_RANGES {
            return Err(PortListError::TooMany(ranges.len()));
        }
        Ok(Self(ranges))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_holds_its_ports_and_ranges() {
        let list: PortList = "4567, 8000-8100,".parse().unwrap();
        for (port, inside) in
            [(4567, true), (4568, false), (8000, true), (8100, true), (8101, false)]
        {
            assert_eq!(list.contains(port), inside, "{port}");
        }
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for text in ["0", "65536", "x", "8100-8000", "1-2-3", "-5", "80;81"] {
            assert!(text.parse::<PortList>().is_err(), "{text}");
        }
        let many: Vec<_> = (1..=17).map(|port| port.to_string()).collect();
        assert_eq!(many.join(",").parse::<PortList>(), Err(PortListError::TooMany(17)));
    }
}
