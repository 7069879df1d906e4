//! Outbound: carries a captured connection from the client's pod to an endpoint.
//!
//! ```text
//! stage    accept ──► orig_dst ──► route ──► balance ──► tunnel ──► relay
//! module   serve      capture      core      core        tunnel     relay
//! effect   socket     map read     pure      pure        network    network
//! ```
//!
//! One task per connection walks this line and owns all that it opens: dropping the task releases
//! everything, so there is no clean-up path to forget.
//!
//! # Guarantees
//!
//! - *Never in clear.* A destination in the mesh is tunnelled, handed over on this node, or refused.
//! - *At most once.* Another endpoint is tried only while no payload can have reached an application.
//! - *At once.* What cannot be carried is reset: the application sees an error, not a time-out.
//! - *Half-close survives*, a crash is an error: see [`crate::relay`].
//! - *Bounded.* At most [`Limits::attempts`](crate::node::Limits::attempts) endpoints, each within
//!   its connect timeout; where the last one only seems not to know its pod *yet*, or its agent to be followed
//!   by another one just now, all of that again after each of [`SETTLE`].
//!
//! # Not here
//!
//! Why an endpoint was chosen ([`mesh_core::balance`]), how a tunnel is built ([`crate::tunnel`]),
//! and what the destination's agent allows ([`crate::inbound`]): this module puts them in order.

mod error;
mod picked;
mod targets;

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::addr::{EndpointAddr, OrigDst};
use mesh_core::authorize::Via;
use mesh_core::direct;
use mesh_core::route::{self, Route, RouteRefusal};
use mesh_core::snapshot::{Endpoint, Snapshot, Workload};
use mesh_core::spiffe::SpiffeId;
use mesh_core::stage::Stage;
use mesh_core::wire;
use tokio::net::TcpStream;

pub use self::error::OutboundError;
use self::picked::Picked;
use self::targets::{Picker, Targets};
use crate::capture::Role;
use crate::inbound::{self, Arrival};
use crate::known::{PATIENCE, Says};
use crate::net;
use crate::node::{LocalPod, Wish, Worker};
use crate::relay;
use crate::telemetry::{
    Carrier, ConnectionFacts, Direction, Outcome, Party, SecurityPolicy, Tracked, Way,
};
use crate::tunnel::{self, Flow, Held, Peer};

/// How long to wait before everything is tried again, while a pod that has just been enrolled is not
/// known everywhere: 750 ms in all. Agents learn of a pod within tens of milliseconds of each other, and
/// a certificate is issued in as many; who asks in vain is refused within a second.
const SETTLE: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
];

/// Between looks for the certificate of a pod that is just starting.
const CERTIFICATE_LOOK: Duration = Duration::from_millis(5);

/// A flow to the endpoint that took the connection.
struct Carried {
    flow: Flow,
    /// What the application sent before the flow was accepted.
    held: Held,
    picked: Picked,
    /// The destination's own record, if it is a pod of this node.
    arrival: Option<Tracked>,
}

/// One connection of an enrolled pod, from accept to end. `client` is the socket that called,
/// `listener` the port that it came to.
pub fn carry(
    worker: Arc<Worker>,
    pod: Arc<LocalPod>,
    app: TcpStream,
    client: SocketAddr,
    listener: u16,
) -> impl Future<Output = ()> + Send + use<> {
    let opens = worker.node.opening.begin();
    // Boxed: what reaching needs is given back before the long part begins.
    let reached = Box::pin(async move {
        let reached = reach(&worker, &pod, app, client, listener).await;
        drop(opens);
        reached
    });
    async move {
        let Some((app, carried, mut tracked)) = reached.await else {
            return;
        };
        tracked.established();
        let live = Arc::clone(tracked.live());
        // Apart: whole, it would keep the place of what the relay takes.
        let Carried { flow, held, picked, arrival } = carried;
        let end = relay::relay(app, flow, held, &live).await;
        drop(picked);
        if let Some(arrival) = arrival {
            arrival.finish(Outcome::from(end.mirrored()));
        }
        tracked.finish(Outcome::from(end));
    }
}

/// All stages up to a flow that an endpoint has accepted, and the connection's record. `None` if that
/// failed, which is already recorded.
async fn reach(
    worker: &Worker,
    pod: &Arc<LocalPod>,
    app: TcpStream,
    client: SocketAddr,
    listener: u16,
) -> Option<(TcpStream, Carried, Tracked)> {
    let node = &worker.node;
    let client = mesh_core::addr::canonical(client);
    let snapshot = node.known.load_full();
    let source = snapshot.workload(&pod.uid).cloned();
    let party = match &source {
        Some(workload) => Party::proven(client, workload),
        None => Party::unproven(client, None),
    };
    let mut tracked = node.telemetry.open(ConnectionFacts::new(Direction::Outbound, party));
    // Whatever goes wrong with `app`, a killed agent included, is a reset and never a clean end: it has
    // that from its listener.
    let connection = Connection { worker, pod, snapshot, app: &app, client, listener };
    match connection.reach(source.as_ref(), &mut tracked).await {
        Ok(carried) => Some((app, carried, tracked)),
        Err(error) => {
            drop(app);
            tracked.finish(Outcome::Failed(error.failure()));
            None
        }
    }
}

/// What stays the same while endpoints are tried.
struct Connection<'a> {
    worker: &'a Worker,
    pod: &'a Arc<LocalPod>,
    snapshot: Arc<Snapshot>,
    app: &'a TcpStream,
    client: SocketAddr,
    listener: u16,
}

impl Connection<'_> {
    /// All stages up to a flow that an endpoint has accepted.
    async fn reach(
        mut self,
        source: Option<&Arc<Workload>>,
        tracked: &mut Tracked,
    ) -> Result<Carried, OutboundError> {
        let (dst, chosen) = self.orig_dst()?;
        tracked.update(|facts| facts.orig_dst = Some(dst));
        tracked.lap(Stage::OrigDst);

        let source = source.ok_or(OutboundError::UnknownSource)?;
        let ip = dst.0.ip();
        if self.snapshot.is_unread(ip) {
            let says = |snapshot: &Snapshot| match route::route(snapshot, dst) {
                _ if !snapshot.is_unread(ip) => Says::All,
                // A service of which some endpoints are known: better one of these than none. Not so where the
                // client may keep to one of the others.
                Route::Service { service, .. } if service.affinity.is_none() => Says::Enough,
                _ => Says::TooLittle,
            };
            let known = &self.worker.node.known;
            self.snapshot = known.knowing(ip, None, PATIENCE, says).await;
        }
        let targets = self.route(dst, tracked)?;
        tracked.lap(Stage::Route);

        let carried = self.settle(source, dst, &targets, chosen, tracked).await?;
        self.wish(source, dst, &targets, chosen, &carried);
        Ok(carried)
    }

    /// Tries endpoints, and again while the mesh does not know them everywhere yet.
    async fn settle(
        &self,
        source: &Arc<Workload>,
        dst: OrigDst,
        targets: &Targets,
        chosen: Option<EndpointAddr>,
        tracked: &mut Tracked,
    ) -> Result<Carried, OutboundError> {
        let mut held = Held::default();
        for wait in SETTLE {
            match self.try_endpoints(source, dst, targets, chosen, &mut held, tracked).await {
                Err(error) if error.may_settle() => {
                    tracing::debug!(
                        error = %crate::telemetry::chain(&error),
                        stage = error.stage().as_str(),
                        "not known everywhere yet: trying again"
                    );
                    tokio::time::sleep(wait).await;
                }
                Ok((flow, picked, arrival)) => return Ok(Carried { flow, held, picked, arrival }),
                Err(error) => return Err(error),
            }
        }
        let (flow, picked, arrival) =
            self.try_endpoints(source, dst, targets, chosen, &mut held, tracked).await?;
        Ok(Carried { flow, held, picked, arrival })
    }

    /// Tells that the kernel had no verdict on this connection, or one that leads astray, and could have
    /// one that spares us the next.
    fn wish(
        &self,
        source: &Arc<Workload>,
        dst: OrigDst,
        targets: &Targets,
        chosen: Option<EndpointAddr>,
        carried: &Carried,
    ) {
        let (mut endpoints, here) = (targets.as_slice(), &self.snapshot.node);
        if targets.sticky(source, dst).is_some() {
            // The kernel would be told of the one that the client keeps to, and of no other.
            let kept = endpoints.iter().find(|one| one.addr == carried.picked.endpoint);
            endpoints = kept.map_or(&[], std::slice::from_ref);
        }
        let is_here =
            |endpoint: &Endpoint| endpoint.workload.as_ref().is_some_and(|w| w.node == *here);
        let is_new = chosen.is_none_or(|chosen| chosen != carried.picked.endpoint);
        let could = source.settings.direct && endpoints.len() <= direct::MAX_ENDPOINTS;
        if is_new && could && endpoints.iter().any(is_here) {
            let wish = Wish { source: Arc::clone(&source.uid), dst, without: None };
            // Full, or nobody listens any more: the next connection will wish again.
            drop(self.worker.node.wishes.try_send(wish));
        }
    }

    /// One endpoint after the other, while nothing can have been delivered.
    async fn try_endpoints(
        &self,
        source: &Arc<Workload>,
        dst: OrigDst,
        targets: &Targets,
        chosen: Option<EndpointAddr>,
        held: &mut Held,
        tracked: &mut Tracked,
    ) -> Result<(Flow, Picked, Option<Tracked>), OutboundError> {
        let node = &self.worker.node;
        let mut tried = Vec::new();
        let picker = Picker {
            node,
            snapshot: &self.snapshot,
            netns: self.pod.netns.cookie(),
            endpoints: targets.as_slice(),
            drawn: chosen,
            sticky: targets.sticky(source, dst),
        };
        loop {
            let asked = Instant::now();
            let index = picker.next(&tried, asked);
            // The first pick always finds one: a route has at least one endpoint.
            let Some(index) = index else {
                let refusal = RouteRefusal::NoEndpoints;
                return Err(OutboundError::Route { dst, refusal });
            };
            let endpoint = &targets.as_slice()[index];
            tracked.update(|facts| facts.protocol = targets.protocol(dst, endpoint));
            tracked.lap(Stage::Balance);

            let mut picked = Picked::new(node, endpoint.addr, asked);
            match self.attempt(source, endpoint, held, tracked, &mut picked).await {
                Ok((flow, arrival)) => {
                    picked.accepted(targets.as_slice());
                    return Ok((flow, picked, arrival));
                }
                Err(error) => {
                    if error.blames_endpoint() {
                        picked.failed();
                    }
                    if error.doubts_endpoint()
                        && let Some(workload) = &endpoint.workload
                    {
                        node.known.doubt(&workload.uid);
                    }
                    tried.push(endpoint.addr);
                    let is_last = tried.len() >= node.limits.attempts.min(targets.as_slice().len());
                    if is_last || !error.may_retry() {
                        return Err(error);
                    }
                    tracing::debug!(
                        error = %crate::telemetry::chain(&error),
                        endpoint = %endpoint.addr,
                        stage = error.stage().as_str(),
                        "trying another endpoint"
                    );
                }
            }
        }
    }

    /// Where the application meant to go, as the kernel noted it before the SYN left, and to which
    /// endpoint, if a verdict says.
    fn orig_dst(&self) -> Result<(OrigDst, Option<EndpointAddr>), OutboundError> {
        let cookie = self.pod.netns.cookie();
        let gone = OutboundError::ClientGone { client: self.client };
        // As long as this connection lives nobody else has its port, and the entry is its own. One that
        // was reset while it waited for us may find that of its port's next user: to be left alone, and
        // if that came between the two looks, in no case to be followed with what this one had sent.
        if !net::is_connected(self.app) {
            return Err(gone);
        }
        let found = self.worker.orig_dst().take(cookie, self.client, self.listener);
        if !net::is_connected(self.app) {
            return Err(gone);
        }
        found.ok_or(OutboundError::NotCaptured { peer: self.client })
    }

    fn route(&self, dst: OrigDst, tracked: &Tracked) -> Result<Targets, OutboundError> {
        match route::route(&self.snapshot, dst) {
            Route::Service { service, candidates } => {
                tracked.update(|facts| facts.service = Some(Arc::clone(&service)));
                Ok(Targets::Service(service, candidates))
            }
            Route::Workload { workload, addr } => {
                Ok(Targets::One(Endpoint { addr, workload: Some(workload) }))
            }
            Route::Passthrough => {
                let addr = EndpointAddr(mesh_core::addr::canonical(dst.0));
                Ok(Targets::One(Endpoint { addr, workload: None }))
            }
            Route::Refuse(refusal) => Err(OutboundError::Route { dst, refusal }),
        }
    }

    /// One endpoint, by the way that leads there.
    async fn attempt(
        &self,
        source: &Arc<Workload>,
        endpoint: &Endpoint,
        held: &mut Held,
        tracked: &mut Tracked,
        picked: &mut Picked,
    ) -> Result<(Flow, Option<Tracked>), OutboundError> {
        let to = endpoint.addr;
        tracked.update(ConnectionFacts::begin_attempt);
        match route::way(&self.snapshot, endpoint.workload.as_ref()) {
            route::Way::Tunnel { workload, peers } => {
                self.worker.uses(&workload);
                let trace = fastrand::u128(..);
                tracked.update(|facts| {
                    facts.way = Some(Way::Tunnel);
                    facts.destination = Party::unproven(to.0, Some(&workload));
                    facts.peer_node = Some(Arc::clone(&workload.node));
                    facts.trace_id = trace;
                });
                self.certificate(&source.identity).await;
                // What this pod itself waits for is none of the endpoint's doing.
                picked.asked = Instant::now();
                let flow = self.tunnel(source, &workload, &peers, to, trace, held, tracked).await?;
                let carrier = carrier_of(&flow);
                tracked.update(|facts| {
                    facts.carrier = Some(carrier);
                    facts.destination = Party::proven(to.0, &workload);
                    facts.security = SecurityPolicy::MutualTls;
                });
                Ok((flow, None))
            }
            route::Way::Local { workload } => {
                tracked.update(|facts| {
                    facts.way = Some(Way::Local);
                    facts.carrier = Some(Carrier::Local);
                    facts.destination = Party::proven(to.0, &workload);
                    facts.peer_node = Some(Arc::clone(&workload.node));
                    // Both identities are this agent's own issuing, and nothing leaves the machine.
                    facts.security = SecurityPolicy::MutualTls;
                });
                let arrival = Arrival {
                    to,
                    client: self.client,
                    via: Via::Local { caller: &source.identity },
                    source: Party::proven(self.client, source),
                    carrier: Carrier::Local,
                    trace_id: 0,
                };
                let admitted =
                    inbound::admit_local(self.worker, &self.snapshot, arrival, tracked.live())
                        .await;
                let (stream, arrival) = admitted.map_err(OutboundError::Local)?;
                tracked.lap(Stage::Deliver);
                Ok((Flow::Local(stream), Some(arrival)))
            }
            route::Way::Plain => {
                tracked.update(|facts| {
                    facts.way = Some(Way::Passthrough);
                    facts.carrier = Some(Carrier::Passthrough);
                    facts.destination = Party::unproven(to.0, endpoint.workload.as_ref());
                });
                let stream = self.plain(to).await;
                let stream =
                    stream.map_err(|source| OutboundError::Passthrough { endpoint: to, source })?;
                tracked.lap(Stage::Deliver);
                Ok((Flow::Local(stream), None))
            }
            route::Way::NoNode => {
                tracked.update(|facts| {
                    facts.destination = Party::unproven(to.0, endpoint.workload.as_ref());
                });
                let node = endpoint.workload.as_ref().map(|w| w.node.to_string());
                Err(OutboundError::UnknownNode { endpoint: to, node: node.unwrap_or_default() })
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the facts of one flow, used once")]
    async fn tunnel(
        &self,
        source: &Arc<Workload>,
        workload: &Arc<Workload>,
        peers: &[mesh_core::addr::PeerAddr],
        to: EndpointAddr,
        trace: u128,
        held: &mut Held,
        tracked: &mut Tracked,
    ) -> Result<Flow, OutboundError> {
        let open = wire::Open {
            flow: tracked.id(),
            trace: trace.to_be_bytes(),
            destination: to,
            source: self.client,
        };
        let mut last = None;
        // A node with an address of each family is tried at the second if the first is unreachable.
        for peer in peers {
            let peer =
                Peer { from: source.identity.clone(), to: workload.identity.clone(), node: *peer };
            match self.worker.tunnels.open(&peer, &open, self.app, held).await {
                Ok(flow) => {
                    tracked.lap(Stage::Tunnel);
                    return Ok(flow);
                }
                Err(error) => {
                    let try_next = error.is_unreachable();
                    last = Some(error);
                    if !try_next {
                        break;
                    }
                }
            }
        }
        let source = last.unwrap_or(tunnel::OpenError::NoCertificate);
        Err(OutboundError::Tunnel { endpoint: to, source })
    }

    /// Waits for the certificate of a pod that is just starting.
    async fn certificate(&self, identity: &SpiffeId) {
        // The time first: nearly all pods have started long ago, and need not look.
        let is_starting = || Instant::now() < self.pod.certificate_by;
        while is_starting() && !self.worker.tunnels.has_certificate(identity) {
            tokio::time::sleep(CERTIFICATE_LOOK).await;
        }
    }

    /// A plain connection from inside the client's pod, as if the mesh were not there.
    async fn plain(&self, to: EndpointAddr) -> std::io::Result<TcpStream> {
        let node = &self.worker.node;
        let exempt = |socket: BorrowedFd<'_>| node.capture.exempt(socket, Role::Agent);
        let connecting = net::pass_through(&self.pod.netns, to.0, exempt);
        net::within(node.limits.connect_timeout, connecting).await
    }
}

fn carrier_of(flow: &Flow) -> Carrier {
    match flow.carrier() {
        tunnel::Carrier::Lane => Carrier::Lane,
        tunnel::Carrier::Quic => Carrier::Quic,
        tunnel::Carrier::Local => Carrier::Local,
    }
}
