//! What the kernel tells of direct connections, in the agent's words.
//!
//! Records wait in a ring that outlives the agent: what ends while none runs is told to the next one, as
//! long as the ring has room. Nobody is woken by them; the reader looks as often as it wants to know.

use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use aya::Ebpf;
use aya::maps::{HashMap, Map, MapData, MapError, RingBuf};
use mesh_common::Counter;
use mesh_common::direct::{CLOSED, DirectConn, DirectEvent, FIN_SENT, OPENED};
use mesh_core::addr::{EndpointAddr, OrigDst};

use super::maps::{Maps, PodTag, absent_is_ok, pairs, typed};
use super::{Capture, CaptureError, lock, sys};

/// A direct connection, as the kernel let it through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectFacts {
    /// Its client's socket cookie: unique since boot.
    pub cookie: u64,
    /// Cookie of the client's netns.
    pub netns: u64,
    /// The client's pod.
    pub client: PodTag,
    /// The server's pod.
    pub server: PodTag,
    /// The client.
    pub src: SocketAddr,
    /// What the application dialled.
    pub orig_dst: OrigDst,
    /// The endpoint.
    pub to: EndpointAddr,
    /// How long ago `connect()` was called.
    pub age: Duration,
}

/// How a direct connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// From `connect()` to the end.
    pub duration: Duration,
    /// Payload from client to server.
    pub sent: u64,
    /// Payload from server to client.
    pub received: u64,
    /// Both directions ended with FIN, or the client's did and it is gone.
    pub clean: bool,
    /// Smoothed round trip, at the end.
    pub rtt: Duration,
    /// Segments that the client sent again.
    pub retransmits: u32,
}

/// What happened to a direct connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectRecord {
    /// It is established; the handshake took this long.
    Opened(DirectFacts, Duration),
    /// It has ended.
    Closed(DirectFacts, Ended),
    /// It was never established.
    Failed(DirectFacts, Ended),
}

/// The reading end of the ring.
pub struct KernelEvents(RingBuf<MapData>);

impl fmt::Debug for KernelEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelEvents").finish_non_exhaustive()
    }
}

impl KernelEvents {
    /// Takes it out of the loaded object.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, CaptureError> {
        Ok(Self(typed(ebpf, "EVENTS")?))
    }
}

impl Iterator for KernelEvents {
    type Item = DirectRecord;

    /// The next record; `None` if there is none now.
    fn next(&mut self) -> Option<DirectRecord> {
        loop {
            let item = self.0.next()?;
            // Another size would be another layout, and that has its own ring.
            let Some(event) = sys::read_event(&item) else { continue };
            return Some(record(&event, sys::boot_ns()));
        }
    }
}

impl Capture {
    /// What the programs tell of direct connections, for one reader: `None` after the first call.
    pub fn take_events(&self) -> Option<KernelEvents> {
        lock(&self.events).take()
    }

    /// How much the ring had no room for, since the maps were made.
    pub fn direct_events_lost(&self) -> u64 {
        lock(&self.pods).maps.counter(Counter::DirectEventLost)
    }

    /// The direct connections that are open now, and how long the handshake of each took.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn direct_connections(&self) -> Result<Vec<(DirectFacts, Duration)>, CaptureError> {
        let pods = lock(&self.pods);
        let failed = pods.maps.failed("DIRECT_CONNS");
        let now_ns = sys::boot_ns();
        let all = pods.maps.direct.iter().map(|found| {
            let (cookie, conn) = found.map_err(&failed)?;
            let setup = Duration::from_nanos(conn.opened_ns.saturating_sub(conn.started_ns));
            Ok((facts(cookie, &conn, now_ns), setup))
        });
        all.collect()
    }

    /// Lets further direct connections begin, or has the agent carry them instead.
    pub fn let_direct_begin(&self, may_begin: bool) {
        let mut told = lock(&self.told);
        told.no_direct = u64::from(!may_begin);
        self.tell(&mut told);
    }

    /// Takes a connection whose end the program has missed off the list of those that are open.
    pub fn forget_direct(&self, cookie: u64) {
        let mut pods = lock(&self.pods);
        if let Err(error) = absent_is_ok(pods.maps.direct.remove(&cookie)) {
            let error = super::maps::io_error(error);
            tracing::debug!(%error, cookie, stage = "telemetry", "a connection stays listed");
        }
    }
}

/// Lists the direct connections here that the programs of an older layout had let through: their sockets
/// tell the new ones nothing, and so they are followed by what the kernel says of sockets.
///
/// Only where the list has the form of ours. Whatever else it may mean then, nothing is ended but a socket
/// with that very cookie and those very ends.
pub(super) fn inherit(maps: &mut Maps, layout: &Path) {
    let path = layout.join("maps").join("DIRECT_CONNS");
    let listed = open_list(&path).and_then(|list| match list {
        Some(list) => pairs(&list),
        None => Ok(Vec::new()),
    });
    let added = listed.and_then(|listed| {
        listed.into_iter().try_for_each(|(cookie, conn)| maps.direct.insert(cookie, conn, 0))
    });
    if let Err(error) = added {
        let error = super::maps::io_error(error);
        tracing::warn!(%error, stage = "telemetry", "direct connections of an older agent are not followed");
    }
}

/// The list at `path`, if there is one that has the form of ours.
fn open_list(path: &Path) -> Result<Option<HashMap<MapData, u64, DirectConn>>, MapError> {
    if !path.exists() {
        return Ok(None);
    }
    let list = MapData::from_pin(path)?;
    let info = list.info()?;
    let form = (info.key_size() as usize, info.value_size() as usize);
    if form != (size_of::<u64>(), size_of::<DirectConn>()) {
        return Ok(None);
    }
    HashMap::try_from(Map::HashMap(list)).map(Some)
}

pub(super) fn record(event: &DirectEvent, now_ns: u64) -> DirectRecord {
    let facts = facts(event.cookie, &event.conn, now_ns);
    let since_start = Duration::from_nanos(event.at_ns.saturating_sub(event.conn.started_ns));
    if event.kind == OPENED {
        return DirectRecord::Opened(facts, since_start);
    }
    let ended = Ended {
        duration: since_start,
        sent: event.payload_sent(),
        received: event.payload_received(),
        clean: event.fins & FIN_SENT != 0 && (event.server_finished() || event.all_acked != 0),
        rtt: Duration::from_micros(u64::from(event.srtt >> 3)),
        retransmits: event.retransmits,
    };
    if event.kind == CLOSED {
        DirectRecord::Closed(facts, ended)
    } else {
        DirectRecord::Failed(facts, ended)
    }
}

fn facts(cookie: u64, conn: &DirectConn, now_ns: u64) -> DirectFacts {
    DirectFacts {
        cookie,
        netns: conn.netns,
        client: PodTag(conn.client),
        server: PodTag(conn.server),
        src: conn.src.into(),
        orig_dst: OrigDst(conn.orig.into()),
        to: EndpointAddr(conn.endpoint.into()),
        age: Duration::from_nanos(now_ns.saturating_sub(conn.started_ns)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_of_a_connection_is_told_in_units_of_time() {
        let bytes = [0; size_of::<DirectEvent>()];
        let mut event = sys::read_event(&bytes).unwrap();
        event.kind = CLOSED;
        event.conn.started_ns = 5_000_000_000;
        event.at_ns = 5_300_000_000;
        // Eighths of a microsecond (struct tcp_sock, srtt_us).
        event.srtt = 8 * 250 + 7;
        event.retransmits = 3;
        let DirectRecord::Closed(_, ended) = record(&event, event.at_ns) else {
            panic!("not closed")
        };
        assert_eq!(ended.duration, Duration::from_millis(300));
        assert_eq!(ended.rtt, Duration::from_micros(250));
        assert_eq!(ended.retransmits, 3);
        event.kind = OPENED;
        let DirectRecord::Opened(_, ago) = record(&event, event.at_ns) else {
            panic!("not opened")
        };
        assert_eq!(ago, Duration::from_millis(300));
    }
}
