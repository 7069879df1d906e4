//! What the tests stand on: a CA, two agents, and applications.

use std::collections::HashMap;
use std::future::pending;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mesh_core::addr::{EndpointAddr, PeerAddr};
use mesh_core::spiffe::SpiffeId;
use mesh_core::stage::Stage;
use mesh_core::wire::{Open, Reason, Refusal};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType,
};
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::sign::CertifiedKey;
use socket2::SockRef;
use time::OffsetDateTime;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use crate::identity::sni_name;
use crate::identity::verify::{PeerRefused, PeerRole};
use crate::relay::{RelayEnd, relay};
use crate::telemetry::Live;
use crate::tunnel::tls::{Refusals, ServedBySni};
use crate::tunnel::*;

pub(super) const CALLER: &str = "spiffe://cluster.local/ns/a/sa/caller";
pub(super) const SERVICE: &str = "spiffe://cluster.local/ns/b/sa/service";

pub(super) fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).unwrap()
}

/// A CA of one trust domain.
pub(super) struct Ca {
    pub(super) root: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

/// Connections that a listener keeps until they are accepted, as tokio has it.
pub(super) const BACKLOG: u32 = 1024;

/// Validity in seconds from now.
pub(super) type Span = (i64, i64);
pub(super) const VALID: Span = (-60, 3600);

impl Ca {
    pub(super) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        // Distinct, so that a root is found by its name and not refused by its signature.
        params.distinguished_name.push(DnType::CommonName, key.public_key_pem());
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().der().clone();
        Self { root, issuer: Issuer::new(params, key) }
    }

    pub(super) fn issue(&self, id: &str, span: Span) -> Arc<CertifiedKey> {
        let key = KeyPair::generate().unwrap();
        let leaf = leaf(id, span).signed_by(&key, &self.issuer).unwrap();
        certified(leaf.der().clone(), &key)
    }
}

fn leaf(id: &str, (from, to): Span) -> CertificateParams {
    let now = OffsetDateTime::now_utc();
    let mut params = CertificateParams::default();
    params.not_before = now + time::Duration::seconds(from);
    params.not_after = now + time::Duration::seconds(to);
    params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    params
}

pub(super) fn self_signed(id: &str) -> Arc<CertifiedKey> {
    let key = KeyPair::generate().unwrap();
    let leaf = leaf(id, VALID).self_signed(&key).unwrap();
    certified(leaf.der().clone(), &key)
}

fn certified(leaf: CertificateDer<'static>, key: &KeyPair) -> Arc<CertifiedKey> {
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    Arc::new(CertifiedKey::new(vec![leaf], any_supported_type(&key).unwrap()))
}

/// What an agent holds and trusts; changes take effect at once.
#[derive(Clone, Default)]
pub(super) struct Holdings(Arc<Mutex<Holding>>);

#[derive(Default)]
struct Holding {
    /// How far this agent's clock, for certificates, is ahead.
    ahead: Duration,
    keys: HashMap<SpiffeId, Arc<CertifiedKey>>,
    roots: HashMap<String, Vec<CertificateDer<'static>>>,
    /// Counts the roots.
    trusted: watch::Sender<u64>,
}

impl Holdings {
    pub(super) fn new(trust_domain: &str, ca: &Ca) -> Self {
        let this = Self::default();
        this.trust(trust_domain, &[&ca.root]);
        this
    }

    pub(super) fn trust(&self, trust_domain: &str, roots: &[&CertificateDer<'static>]) {
        let roots = roots.iter().map(|root| (*root).clone()).collect();
        let mut holding = self.0.lock().unwrap();
        holding.roots.insert(trust_domain.into(), roots);
        holding.trusted.send_modify(|number| *number += 1);
    }

    /// Moves this agent's clock forward.
    pub(super) fn wait(&self, time: Duration) {
        self.0.lock().unwrap().ahead = time;
    }

    pub(super) fn hold(&self, name: &str, key: Arc<CertifiedKey>) {
        self.0.lock().unwrap().keys.insert(id(name), key);
    }

    pub(super) fn credentials(&self) -> Arc<Credentials> {
        let (keys, served, trusted) = (self.clone(), self.clone(), self.clone());
        Arc::new(Credentials {
            certified: Box::new(move |id| keys.0.lock().unwrap().keys.get(id).cloned()),
            served: Box::new(move |wanted| {
                let held = served.0.lock().unwrap();
                let found = held.keys.iter().find(|(id, _)| sni_name(id) == wanted)?;
                Some((found.0.clone(), Arc::clone(found.1)))
            }),
            verify: Box::new(move |chain, role, now| {
                let holding = trusted.0.lock().unwrap();
                let now = Duration::from_secs(now.as_secs()) + holding.ahead;
                verify(&holding.roots, chain, role, UnixTime::since_unix_epoch(now))
            }),
            trusted: self.0.lock().unwrap().trusted.subscribe(),
        })
    }
}

/// The shortest honest verifier: the real one belongs to the identity stage.
fn verify(
    roots: &HashMap<String, Vec<CertificateDer<'static>>>,
    chain: &[CertificateDer<'_>],
    role: PeerRole,
    now: UnixTime,
) -> Result<SpiffeId, PeerRefused> {
    let (_, parsed) = x509_parser::parse_x509_certificate(&chain[0]).unwrap();
    let sans = parsed.subject_alternative_name().unwrap().ok_or(PeerRefused::NoSpiffeId)?;
    let uri = sans.value.general_names.iter().find_map(|name| match name {
        x509_parser::extensions::GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let id = SpiffeId::parse(uri.ok_or(PeerRefused::NoSpiffeId)?)
        .map_err(|_other| PeerRefused::NoSpiffeId)?;
    let roots = roots.get(id.trust_domain().as_str()).ok_or(PeerRefused::UntrustedDomain)?;
    let anchors: Vec<_> = roots.iter().map(|r| anchor_from_trusted_cert(r).unwrap()).collect();
    let usage = match role {
        PeerRole::Client => KeyUsage::client_auth(),
        PeerRole::Server => KeyUsage::server_auth(),
    };
    let leaf = EndEntityCert::try_from(&chain[0]).map_err(|_broken| PeerRefused::Malformed)?;
    let algorithms = webpki::ALL_VERIFICATION_ALGS;
    let path = leaf.verify_for_usage(algorithms, &anchors, &[], now, usage, None, None);
    path.map(|_| id).map_err(|error| match error {
        webpki::Error::CertExpired { .. } => PeerRefused::Expired,
        webpki::Error::CertNotValidYet { .. } => PeerRefused::NotYetValid,
        webpki::Error::InvalidSignatureForPublicKey => PeerRefused::BadSignature,
        _ => PeerRefused::UnknownIssuer,
    })
}

/// What the server's agent does with a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Behaviour {
    Deliver,
    Refuse(Reason),
    /// Refuses so many requests, and delivers the others.
    RefuseFirst(usize, Reason),
    /// Accepts, then vanishes without a word.
    Vanish,
    /// Takes requests and never answers.
    Hang,
}

/// An agent that serves both carriers on one port.
pub(super) struct Agent {
    pub(super) node: PeerAddr,
    pub(super) stats: Arc<TunnelStats>,
    pub(super) drain: watch::Sender<bool>,
    pub(super) behaviour: Arc<Mutex<Behaviour>>,
    pub(super) requests: Arc<Mutex<Vec<Seen>>>,
    /// The port for lanes, if it serves none.
    pub(super) closed: Option<TcpSocket>,
    pub(super) tasks: JoinSet<()>,
}

/// A request that the server's agent has seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) caller: SpiffeId,
    pub(super) served_as: SpiffeId,
    pub(super) peer: SocketAddr,
    pub(super) carrier: Carrier,
    pub(super) open: Open,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Serves {
    Both,
    OnlyQuic,
}

impl Agent {
    pub(super) async fn start(holdings: &Holdings, config: TunnelConfig) -> Self {
        Self::start_with(holdings, config, Serves::Both).await
    }

    pub(super) async fn start_with(
        holdings: &Holdings,
        config: TunnelConfig,
        serves: Serves,
    ) -> Self {
        Self::start_after(holdings, config, serves, ResetKey::random().unwrap()).await
    }

    /// With the reset key of an agent before this one.
    pub(super) async fn start_after(
        holdings: &Holdings,
        config: TunnelConfig,
        serves: Serves,
        key: ResetKey,
    ) -> Self {
        let (address, lanes, socket) = loop {
            let (address, lanes) = closed_port();
            if let Ok(socket) = UdpSocket::bind(address).await {
                break (address, lanes, socket.into_std().unwrap());
            }
        };
        let node = PeerAddr(address);
        let stats = Arc::new(TunnelStats::default());
        let tickets = TicketKeys::new().unwrap();
        let tunnels =
            Tunnels::new(config, tickets, holdings.credentials(), Arc::clone(&stats)).unwrap();
        let (drain, draining) = watch::channel(false);
        let behaviour = Arc::new(Mutex::new(Behaviour::Deliver));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let handler = {
            let (behaviour, requests) = (Arc::clone(&behaviour), Arc::clone(&requests));
            move |request| handle(request, *behaviour.lock().unwrap(), Arc::clone(&requests))
        };
        let mut tasks = JoinSet::new();
        let closed = if serves == Serves::OnlyQuic {
            Some(lanes)
        } else {
            let listener = lanes.listen(BACKLOG).unwrap();
            let serve =
                Arc::clone(&tunnels).serve_lanes(listener, draining.clone(), handler.clone());
            tasks.spawn(async move { serve.await.unwrap() });
            None
        };
        tasks.spawn(async move {
            let serve = tunnels.serve_quic(socket, &key, Tag([7; 2]), draining, handler);
            serve.await.unwrap();
        });
        Self { node, stats, drain, behaviour, requests, closed, tasks }
    }

    pub(super) fn behave(&self, behaviour: Behaviour) {
        *self.behaviour.lock().unwrap() = behaviour;
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.requests.lock().unwrap().clone()
    }
}

async fn handle(request: Request, behaviour: Behaviour, requests: Arc<Mutex<Vec<Seen>>>) {
    let now = Seen {
        caller: request.caller.clone(),
        served_as: request.served_as.clone(),
        peer: request.peer,
        carrier: request.carrier(),
        open: request.open,
    };
    let before = {
        let mut seen = requests.lock().unwrap();
        seen.push(now);
        seen.len() - 1
    };
    match behaviour {
        Behaviour::RefuseFirst(count, reason) if before < count => {
            request.refuse(Refusal::new(Stage::Authorize, reason)).await;
        }
        Behaviour::Refuse(reason) => {
            request.refuse(Refusal::new(Stage::Authorize, reason)).await;
        }
        Behaviour::Vanish => drop(request.accept().await),
        Behaviour::Hang => pending().await,
        Behaviour::Deliver | Behaviour::RefuseFirst(..) => {
            match TcpStream::connect(request.open.destination.0).await {
                Ok(app) => {
                    if let Some(flow) = request.accept().await {
                        relay(app, flow, Held::default(), &Live::default()).await;
                    }
                }
                Err(_) => {
                    request.refuse(Refusal::new(Stage::Deliver, Reason::ConnectionRefused)).await;
                }
            }
        }
    }
}

/// The client's agent, and an application beside it.
pub(super) struct Client {
    pub(super) tunnels: Arc<Tunnels>,
    pub(super) stats: Arc<TunnelStats>,
    pub(super) peer: Peer,
}

impl Client {
    pub(super) fn new(holdings: &Holdings, config: TunnelConfig, node: PeerAddr) -> Self {
        let stats = Arc::new(TunnelStats::default());
        let tickets = TicketKeys::new().unwrap();
        let tunnels =
            Tunnels::new(config, tickets, holdings.credentials(), Arc::clone(&stats)).unwrap();
        Self { tunnels, stats, peer: Peer { from: id(CALLER), to: id(SERVICE), node } }
    }

    /// Opens a flow for an application's connection without relaying.
    pub(super) async fn open(
        &self,
        app: &TcpStream,
        destination: SocketAddr,
        held: &mut Held,
    ) -> Result<Flow, OpenError> {
        self.tunnels.open(&self.peer, &open_to(destination), app, held).await
    }

    /// An application's connection through the tunnel, and how it ends.
    pub(super) async fn connect(
        &self,
        destination: SocketAddr,
    ) -> (TcpStream, JoinHandle<Result<RelayEnd, OpenError>>) {
        let (user, app) = pair().await;
        let (tunnels, peer) = (Arc::clone(&self.tunnels), self.peer.clone());
        let connection = tokio::spawn(async move {
            let mut held = Held::default();
            let flow = tunnels.open(&peer, &open_to(destination), &app, &mut held).await?;
            Ok(relay(app, flow, held, &Live::default()).await)
        });
        (user, connection)
    }
}

/// What stands for a peer that a test has not judged.
pub(super) fn nobody(holdings: &Holdings, stats: &Arc<TunnelStats>) -> Arc<proof::Proof> {
    let proofs = proof::Proofs::new(&holdings.credentials(), stats);
    proofs.none(id(SERVICE), PeerRefused::Missing)
}

pub(super) fn open_to(destination: SocketAddr) -> Open {
    Open {
        flow: 7,
        trace: [9; 16],
        destination: EndpointAddr(destination),
        source: "10.0.0.1:4711".parse().unwrap(),
    }
}

/// Both ends of an application's connection to its agent, the agent's second.
pub(super) async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (user, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    let (app, _) = accepted.unwrap();
    // As the agent's listeners have it: what is dropped is reset.
    SockRef::from(&app).set_linger(Some(Duration::ZERO)).unwrap();
    (user.unwrap(), app)
}

/// An address that refuses connections for as long as its socket is kept. The port of a listener that is gone
/// may be another test's the next moment, which would take what was to be refused for its own.
pub(super) fn closed_port() -> (SocketAddr, TcpSocket) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    (socket.local_addr().unwrap(), socket)
}

/// An application that accepts one connection after the other; each comes through the channel.
pub(super) async fn application() -> (SocketAddr, tokio::sync::mpsc::UnboundedReceiver<TcpStream>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if sender.send(stream).is_err() {
                return;
            }
        }
    });
    (address, receiver)
}

/// One CA, both agents, `carrier` forced.
pub(super) async fn world(carrier: CarrierChoice) -> (Agent, Client) {
    let ca = Ca::new();
    world_with(&ca, config(carrier)).await
}

pub(super) async fn world_with(ca: &Ca, config: TunnelConfig) -> (Agent, Client) {
    let (ours, theirs) = holdings(ca);
    let agent = Agent::start(&theirs, config.clone()).await;
    let client = Client::new(&ours, config, agent.node);
    (agent, client)
}

/// What the client's and the server's agent hold when all is well.
pub(super) fn holdings(ca: &Ca) -> (Holdings, Holdings) {
    let (ours, theirs) = (Holdings::new("cluster.local", ca), Holdings::new("cluster.local", ca));
    ours.hold(CALLER, ca.issue(CALLER, VALID));
    theirs.hold(SERVICE, ca.issue(SERVICE, VALID));
    (ours, theirs)
}

/// The TLS configurations of both ends, without sockets.
pub(super) fn tls_configs(ca: &Ca) -> (rustls::ClientConfig, rustls::ServerConfig) {
    let (ours, theirs) = holdings(ca);
    let (ours, theirs) = (ours.credentials(), theirs.credentials());
    let certified = (ours.certified)(&id(CALLER)).unwrap();
    let client = tls::client_config(&ours, &certified, &Refusals::default()).unwrap();
    let resolver = Arc::new(ServedBySni::new(&theirs));
    let tickets = TicketKeys::new().unwrap();
    let server = tls::server_config(&theirs, &tickets, resolver, &Refusals::default()).unwrap();
    (client, server)
}

pub(super) fn config(carrier: CarrierChoice) -> TunnelConfig {
    TunnelConfig { carrier, ..TunnelConfig::default() }
}

/// Looks every few milliseconds until `done`, for at most ten seconds.
pub(super) async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let (sender, mut receiver) = oneshot::channel::<()>();
    let _keep = sender;
    for _ in 0..2000 {
        if done() {
            return;
        }
        // Never completes: a pause that needs no wall-clock sleep of its own.
        drop(tokio::time::timeout(Duration::from_millis(5), &mut receiver).await);
    }
    panic!("never happened: {what}");
}
