//! Inbound: lets a connection into a pod of this node, or refuses it.
//!
//! ```text
//! from      tunnel request  ┐
//!           local hand-over ├─► authorize ──► deliver ──► relay
//!           plain text      ┘
//! module    tunnel, serve       core          net         relay
//! effect    network             pure          socket      network
//! ```
//!
//! # Guarantees
//!
//! - *The caller is its certificate.* The address in a request decides nothing
//!   ([`mesh_core::authorize`]).
//! - *Nothing delivered before it is allowed.* The application's socket is opened after the verdict.
//! - *Refused at once and with a reason*: the caller's agent gets it in its answer, a plain client
//!   gets RST.
//!
//! # Not here
//!
//! What arrives in plain text for a pod in strict mode: the kernel refuses that before this agent
//! sees it. The check here is for the moment between a change of mode and the kernel's knowing it.

mod error;

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use mesh_core::addr::{EndpointAddr, canonical};
use mesh_core::authorize::{self, Request, Verdict, Via};
use mesh_core::snapshot::Snapshot;
use mesh_core::stage::Stage;
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;

pub use self::error::{InboundError, connect_reason};
use crate::capture::Role;
use crate::known::{READ_LIMIT, Says};
use crate::net;
use crate::node::{LocalPod, Worker};
use crate::opening::Opens;
use crate::relay;
use crate::telemetry::{
    Carrier, ConnectionFacts, Direction, Failure, Live, Outcome, Party, SecurityPolicy, Tracked,
    Way,
};
use crate::tunnel::{self, Flow, Held};

/// A connection that wants in.
#[derive(Debug)]
pub struct Arrival<'a> {
    /// Where to.
    pub to: EndpointAddr,
    /// The client's address, as reported.
    pub client: SocketAddr,
    /// How it came, and with it who calls.
    pub via: Via<'a>,
    /// The caller, for telemetry.
    pub source: Party,
    /// What carried it.
    pub carrier: Carrier,
    /// From the caller's agent; 0 if there is none.
    pub trace_id: u128,
}

/// A request that came through the tunnel, from OPEN to end.
///
/// It counts as one of the connections that this agent may hold. Where there is no place left it is
/// refused, and does not wait as one on a pod's listener does: its caller may try another endpoint.
pub fn serve_request(
    worker: Arc<Worker>,
    request: tunnel::Request,
) -> impl Future<Output = ()> + Send + use<> {
    let place = Arc::clone(&worker.node.connections).try_acquire_owned().ok();
    // Boxed: what admitting needs, the request with it, is given back before the long part begins.
    let admitted = Box::pin(async move { admit_request(&worker, request, place).await });
    async move {
        if let Some((app, flow, tracked, place)) = admitted.await {
            carry(app, flow, tracked).await;
            drop(place);
        }
    }
}

/// Answers a request. `None` if it was refused, or its carrier broke; that is already recorded.
async fn admit_request(
    worker: &Worker,
    request: tunnel::Request,
    place: Option<OwnedSemaphorePermit>,
) -> Option<(TcpStream, Flow, Tracked, Option<OwnedSemaphorePermit>)> {
    let has_place = place.is_some();
    let client = canonical(request.open.source);
    let caller = request.caller.clone();
    // Who is not found is let in by its certificate: its address is not shown then, and that is all. Whoever is known to
    // have had it may be gone, since of other nodes' pods nobody tells that.
    let says = |snapshot: &Snapshot| match snapshot.workload_at(client.ip()) {
        Some(known) if known.identity == caller => Says::All,
        _ => Says::Enough,
    };
    // Nothing is asked for one that is refused anyway.
    let snapshot = if has_place {
        worker.node.known.knowing(client.ip(), Some(&caller), READ_LIMIT, says).await
    } else {
        worker.node.known.load_full()
    };
    let served_as = request.served_as.clone();
    // The workload is shown beside the caller only where the certificate agrees with the address.
    let known = snapshot.workload_at(client.ip()).filter(|known| known.identity == caller);
    if let Some(known) = known {
        worker.uses(known);
    }
    let arrival = Arrival {
        to: request.open.destination,
        client,
        via: Via::Tunnel { caller: &caller, served_as: &served_as },
        source: Party {
            addr: Some(client),
            workload: known.cloned(),
            identity: Some(caller.clone()),
        },
        carrier: match request.carrier() {
            tunnel::Carrier::Quic => Carrier::Quic,
            _ => Carrier::Lane,
        },
        trace_id: u128::from_be_bytes(request.open.trace),
    };
    let mut tracked = open(worker, &snapshot, &arrival, None);
    let admitted = if has_place {
        admit(worker, &snapshot, &arrival, &mut tracked).await
    } else {
        Err(InboundError::Overloaded)
    };
    match admitted {
        Ok(app) => {
            if let Some(flow) = request.accept().await {
                return Some((app, flow, tracked, place));
            }
            let detail = "the tunnel broke before the flow was accepted";
            let failure = Failure::new(Stage::Tunnel, "tunnel_lost", detail);
            tracked.finish(Outcome::Failed(failure));
        }
        Err(error) => {
            tracked.finish(Outcome::Failed(error.failure()));
            // However long it takes to say so.
            drop(place);
            request.refuse(error.refusal()).await;
        }
    }
    None
}

/// A connection from a pod of this node: its record, and the socket to the application. The byte
/// counters are those of the caller's record, since one relay serves both.
///
/// # Errors
///
/// It was refused, or the application was not reached; that is already recorded.
pub async fn admit_local(
    worker: &Worker,
    snapshot: &Snapshot,
    arrival: Arrival<'_>,
    live: &Arc<Live>,
) -> Result<(TcpStream, Tracked), InboundError> {
    let mut tracked = open(worker, snapshot, &arrival, Some(live));
    match admit(worker, snapshot, &arrival, &mut tracked).await {
        Ok(app) => {
            tracked.established();
            Ok((app, tracked))
        }
        Err(error) => {
            tracked.finish(Outcome::Failed(error.failure()));
            Err(error)
        }
    }
}

/// A connection that came to an enrolled pod in plain text, from accept to end. It `opens` until the application
/// has it.
pub async fn serve_plain(
    worker: &Worker,
    pod: &Arc<LocalPod>,
    peer: TcpStream,
    from: SocketAddr,
    opens: Opens,
) {
    let snapshot = worker.node.known.load_full();
    let client = canonical(from);
    let Ok(to) = peer.local_addr().map(canonical) else {
        return; // Reset before it was accepted: there is nobody left to tell.
    };
    let own = snapshot.workload(&pod.uid).is_some_and(|own| own.ips.contains(&to.ip()));
    if !own {
        // Somebody in the pod dialled the listener itself instead of being led to it.
        tracing::debug!(%from, %to, stage = "capture", "refused: the agent's own listener was dialled");
        return;
    }
    let arrival = Arrival {
        to: EndpointAddr(to),
        client,
        via: Via::Plain,
        source: Party::unproven(client, snapshot.workload_at(client.ip())),
        carrier: Carrier::Plaintext,
        trace_id: 0,
    };
    let mut tracked = open(worker, &snapshot, &arrival, None);
    let admitted = Box::pin(admit(worker, &snapshot, &arrival, &mut tracked)).await;
    drop(opens);
    match admitted {
        Ok(app) => carry(app, Flow::Local(peer), tracked).await,
        Err(error) => tracked.finish(Outcome::Failed(error.failure())),
    }
}

/// Begins the record of an arrival.
fn open(
    worker: &Worker,
    snapshot: &Snapshot,
    arrival: &Arrival<'_>,
    live: Option<&Arc<Live>>,
) -> Tracked {
    let mut facts = ConnectionFacts::new(Direction::Inbound, arrival.source.clone());
    let to = canonical(arrival.to.0);
    let proven = !matches!(arrival.via, Via::Plain);
    facts.destination = match (snapshot.workload_at(to.ip()), arrival.via) {
        (Some(workload), Via::Local { .. }) => Party::proven(to, workload),
        // A caller may ask for another pod than the one whose certificate it was shown.
        (Some(workload), Via::Tunnel { served_as, .. }) if workload.identity == *served_as => {
            Party::proven(to, workload)
        }
        (workload, _) => Party::unproven(to, workload),
    };
    facts.peer_node = arrival.source.workload.as_ref().map(|workload| Arc::clone(&workload.node));
    facts.carrier = Some(arrival.carrier);
    facts.way = Some(match arrival.via {
        Via::Tunnel { .. } => Way::Tunnel,
        Via::Local { .. } => Way::Local,
        Via::Plain => Way::Passthrough,
    });
    if proven {
        facts.security = SecurityPolicy::MutualTls;
    }
    facts.trace_id = arrival.trace_id;
    match live {
        Some(live) => worker.node.telemetry.open_sharing(facts, Arc::clone(live)),
        None => worker.node.telemetry.open(facts),
    }
}

/// Authorizes an arrival and connects to the application.
async fn admit(
    worker: &Worker,
    snapshot: &Snapshot,
    arrival: &Arrival<'_>,
    tracked: &mut Tracked,
) -> Result<TcpStream, InboundError> {
    if worker.node.is_draining() {
        return Err(InboundError::Draining);
    }
    let request = Request { to: arrival.to, client: arrival.client, via: arrival.via };
    let (workload, client) = match authorize::authorize(snapshot, &request) {
        Verdict::Deliver { workload, client } => (workload, client),
        Verdict::Refuse(refusal) => return Err(InboundError::Refused(refusal)),
    };
    tracked.lap(Stage::Authorize);

    let to = EndpointAddr(canonical(arrival.to.0));
    let pod = worker.node.pod(&workload.uid).ok_or(InboundError::NoNamespace { to })?;
    let node = &worker.node;
    let exempt = |socket: BorrowedFd<'_>| node.capture.exempt(socket, Role::Deliver);
    let connecting = net::deliver(&pod.netns, to.0, client, exempt);
    let app = net::within(node.limits.connect_timeout, connecting).await;
    let app = app.map_err(|source| InboundError::Deliver { to, source })?;
    tracked.lap(Stage::Deliver);
    Ok(app)
}

/// Relays until both sides have ended.
async fn carry(app: TcpStream, flow: Flow, mut tracked: Tracked) {
    tracked.established();
    let live = Arc::clone(tracked.live());
    let end = relay::relay(app, flow, Held::default(), &live).await;
    tracked.finish(Outcome::from(end));
}
