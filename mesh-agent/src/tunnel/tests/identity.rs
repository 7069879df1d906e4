//! Who is let in, who is not, and what both ends say about it.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use mesh_core::stage::Stage;
use mesh_core::wire::{Reason, Refusal, ResetReason, Role};
use rustls::NamedGroup;
use rustls::pki_types::ServerName;
use rustls::sign::CertifiedKey;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::world::*;
use crate::identity::sni_name;
use crate::identity::verify::PeerRefused;
use crate::relay::{Outcome, RelayEnd};
use crate::tunnel::lane::Handshake;
use crate::tunnel::session::Session;
use crate::tunnel::tls::Refusals;
use crate::tunnel::*;

const CARRIERS: [CarrierChoice; 2] = [CarrierChoice::Lane, CarrierChoice::Quic];
const ELSEWHERE: &str = "spiffe://elsewhere.example/ns/a/sa/caller";
const OTHER: &str = "spiffe://cluster.local/ns/b/sa/other";
const OVER: Span = (-7200, -3600);
const TO_COME: Span = (3600, 7200);

/// Opens a flow that must fail, with payload ready to be sent; the server's application must see
/// nothing of it.
async fn refused(client: &Client) -> OpenError {
    let (address, mut apps) = application().await;
    let (mut user, app) = pair().await;
    user.write_all(b"secret").await.unwrap();
    app.readable().await.unwrap();
    let error = client.open(&app, address, &mut Held::default()).await.expect_err("was opened");
    assert!(apps.try_recv().is_err(), "payload was delivered");
    error
}

/// A caller with this certificate is refused: what the server says, and what the client learns.
async fn caller_is_refused(certified: Arc<CertifiedKey>, from: &str, ca: &Ca, reason: &str) {
    for carrier in CARRIERS {
        let (ours, theirs) = holdings(ca);
        ours.hold(from, Arc::clone(&certified));
        let agent = Agent::start(&theirs, config(carrier)).await;
        let mut client = Client::new(&ours, config(carrier), agent.node);
        client.peer.from = id(from);
        let error = refused(&client).await;
        assert_eq!(error.reason(), "peer_refused_certificate", "{carrier:?}: {error:?}");
        assert_eq!(error.stage(), Stage::Tunnel);
        assert!(error.may_retry(), "nothing was delivered");
        until("the server counted it", || agent.stats.refusals_for(Side::Server, reason) == 1)
            .await;
        assert_eq!(client.stats.refusals_for(Side::Client, "peer_refused_certificate"), 1);
        assert!(agent.seen().is_empty());
    }
}

/// A server with this certificate is refused: what the client says, and what the server learns.
async fn server_is_refused(certified: Arc<CertifiedKey>, ca: &Ca, reason: &str) {
    for carrier in CARRIERS {
        let (ours, theirs) = holdings(ca);
        theirs.hold(SERVICE, Arc::clone(&certified));
        let agent = Agent::start(&theirs, config(carrier)).await;
        let client = Client::new(&ours, config(carrier), agent.node);
        let error = refused(&client).await;
        assert_eq!(error.reason(), reason, "{carrier:?}: {error:?}");
        assert!(error.may_retry(), "nothing was sent");
        assert_eq!(client.stats.refusals_for(Side::Client, reason), 1);
        until("the server learned it", || {
            agent.stats.refusals_for(Side::Server, "peer_refused_certificate") == 1
        })
        .await;
    }
}

#[tokio::test]
async fn expired_certificates_are_refused() {
    let ca = Ca::new();
    caller_is_refused(ca.issue(CALLER, OVER), CALLER, &ca, "certificate_expired").await;
    server_is_refused(ca.issue(SERVICE, OVER), &ca, "certificate_expired").await;
}

#[tokio::test]
async fn certificates_that_are_not_yet_valid_are_refused() {
    let ca = Ca::new();
    caller_is_refused(ca.issue(CALLER, TO_COME), CALLER, &ca, "certificate_not_yet_valid").await;
    server_is_refused(ca.issue(SERVICE, TO_COME), &ca, "certificate_not_yet_valid").await;
}

#[tokio::test]
async fn self_signed_certificates_are_refused() {
    let ca = Ca::new();
    caller_is_refused(self_signed(CALLER), CALLER, &ca, "unknown_issuer").await;
    server_is_refused(self_signed(SERVICE), &ca, "unknown_issuer").await;
}

#[tokio::test]
async fn certificates_of_another_ca_are_refused() {
    let (ca, other) = (Ca::new(), Ca::new());
    caller_is_refused(other.issue(CALLER, VALID), CALLER, &ca, "unknown_issuer").await;
    server_is_refused(other.issue(SERVICE, VALID), &ca, "unknown_issuer").await;
}

#[tokio::test]
async fn a_trust_domain_that_is_not_trusted_is_refused() {
    let ca = Ca::new();
    caller_is_refused(ca.issue(ELSEWHERE, VALID), ELSEWHERE, &ca, "untrusted_domain").await;
    server_is_refused(ca.issue(ELSEWHERE, VALID), &ca, "untrusted_domain").await;
}

#[tokio::test]
async fn another_workload_than_the_one_meant_is_refused() {
    let ca = Ca::new();
    server_is_refused(ca.issue(OTHER, VALID), &ca, "wrong_workload").await;
}

#[tokio::test]
async fn a_workload_that_is_not_there_is_refused() {
    for carrier in CARRIERS {
        let (agent, mut client) = world(carrier).await;
        client.peer.to = id(OTHER);
        let error = refused(&client).await;
        assert_eq!(error.reason(), "peer_serves_no_such_workload", "{carrier:?}: {error:?}");
        let OpenError::Dial(why) = &error else { panic!("{error:?}") };
        assert!(why.to_string().contains("trust domain"), "{why}: nobody knows what to compare");
        until("the server counted it", || {
            agent.stats.refusals_for(Side::Server, "unknown_workload") == 1
        })
        .await;
    }
}

#[tokio::test]
async fn a_workload_without_certificate_opens_nothing() {
    let (_agent, mut client) = world(CarrierChoice::Auto).await;
    client.peer.from = id(OTHER);
    let error = refused(&client).await;
    assert_eq!(error.reason(), "no_certificate");
    assert!(!error.may_retry(), "no endpoint would answer differently");
}

/// A client that trusts anything and shows nothing.
fn anonymous(ca: &Ca) -> rustls::ClientConfig {
    let (ours, _) = holdings(ca);
    let credentials = ours.credentials();
    let certified = (credentials.certified)(&id(CALLER)).unwrap();
    let mut config = tls::client_config(&credentials, &certified, &Refusals::default()).unwrap();
    config.client_auth_cert_resolver = Arc::new(Nothing);
    config
}

#[derive(Debug)]
struct Nothing;

impl rustls::client::ResolvesClientCert for Nothing {
    fn resolve(
        &self,
        _root_hint_subjects: &[&[u8]],
        _sigschemes: &[rustls::SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn a_caller_without_certificate_is_refused_on_a_lane() {
    let ca = Ca::new();
    let (agent, _client) = world_with(&ca, config(CarrierChoice::Lane)).await;
    let name = ServerName::try_from(sni_name(&id(SERVICE))).unwrap();
    let session = Session::client(Arc::new(anonymous(&ca)), name).unwrap();
    let tcp = TcpStream::connect(agent.node.0).await.unwrap();
    let mut handshake = Handshake::new(tcp, session, Role::Client);
    // In TLS 1.3 the client's part is over before the server has judged it.
    handshake.complete().await.unwrap();
    let stats = Arc::new(TunnelStats::default());
    let expires = std::time::Instant::now() + Duration::from_secs(60);
    let proof = nobody(&holdings(&ca).0, &stats);
    let mut lane = handshake.into_lane(proof, expires, &stats).unwrap();
    match lane.next_event().await {
        Err(LaneError::Tls(DialError::PeerRefused { alert })) => {
            assert_eq!(alert, "certificate_required");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(agent.stats.refusals_for(Side::Server, "certificate_missing"), 1);
}

#[tokio::test]
async fn a_caller_without_certificate_is_refused_on_quic() {
    let ca = Ca::new();
    let (agent, _client) = world_with(&ca, config(CarrierChoice::Quic)).await;
    let transport = quic::transport(&TunnelConfig::default());
    let config = quic::client_config(anonymous(&ca), &transport).unwrap();
    let endpoint = quic::client_endpoint(agent.node.0).unwrap();
    let name = sni_name(&id(SERVICE));
    let connection = endpoint.connect_with(config, agent.node.0, &name).unwrap().await.unwrap();
    let error = quic::cause(&connection.closed().await, None);
    assert_eq!(error.reason(), "peer_refused_certificate", "{error:?}");
    until("the server counted it", || {
        agent.stats.refusals_for(Side::Server, "certificate_missing") == 1
    })
    .await;
}

/// Opens a flow, sees one byte through, and ends it.
async fn exchange(client: &Client) {
    let (address, mut apps) = application().await;
    let (mut user, connection) = client.connect(address).await;
    user.write_u8(1).await.unwrap();
    let mut app = apps.recv().await.unwrap();
    app.read_u8().await.unwrap();
    drop((user, app));
    connection.await.unwrap().unwrap();
}

/// No lane is used twice, so that every flow needs a handshake.
fn always_dialling() -> TunnelConfig {
    TunnelConfig { max_idle_lanes: 0, ..config(CarrierChoice::Lane) }
}

#[tokio::test]
async fn sessions_are_resumed() {
    let (agent, client) = world_with(&Ca::new(), always_dialling()).await;
    exchange(&client).await;
    exchange(&client).await;
    for (stats, side) in [(&client.stats, Side::Client), (&agent.stats, Side::Server)] {
        assert_eq!(stats.handshakes(side, SessionKind::Full), 1);
        assert_eq!(stats.handshakes(side, SessionKind::Resumed), 1);
    }
}

#[tokio::test]
async fn a_renewed_certificate_starts_a_new_session() {
    let ca = Ca::new();
    let (ours, theirs) = holdings(&ca);
    let agent = Agent::start(&theirs, always_dialling()).await;
    let client = Client::new(&ours, always_dialling(), agent.node);
    exchange(&client).await;
    ours.hold(CALLER, ca.issue(CALLER, VALID));
    exchange(&client).await;
    assert_eq!(agent.stats.handshakes(Side::Server, SessionKind::Full), 2);
    assert_eq!(agent.stats.handshakes(Side::Server, SessionKind::Resumed), 0);
}

#[tokio::test]
async fn a_caller_that_expired_does_not_come_back_by_its_session() {
    let ca = Ca::new();
    let (ours, theirs) = holdings(&ca);
    let agent = Agent::start(&theirs, always_dialling()).await;
    let client = Client::new(&ours, always_dialling(), agent.node);
    exchange(&client).await;
    theirs.wait(Duration::from_secs(7200));
    match refused(&client).await {
        OpenError::Refused(refusal) => {
            assert_eq!(refusal, Refusal::new(Stage::Tunnel, Reason::CallerCertificate));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(
        agent.stats.handshakes(Side::Server, SessionKind::Resumed),
        1,
        "it was no resumed session"
    );
    assert_eq!(agent.stats.refusals_for(Side::Server, "certificate_expired"), 1);
    assert_eq!(agent.seen().len(), 1);
}

#[tokio::test]
async fn a_caller_whose_root_was_removed_does_not_come_back_by_its_session() {
    let (ca, other) = (Ca::new(), Ca::new());
    let (ours, theirs) = holdings(&ca);
    let agent = Agent::start(&theirs, always_dialling()).await;
    let client = Client::new(&ours, always_dialling(), agent.node);
    exchange(&client).await;
    theirs.trust("cluster.local", &[&other.root]);
    let error = refused(&client).await;
    assert_eq!(error.reason(), "caller_certificate", "{error:?}");
    assert_eq!(agent.stats.refusals_for(Side::Server, "unknown_issuer"), 1);
}

#[tokio::test]
async fn a_caller_does_not_come_back_by_its_quic_session_either() {
    let ca = Ca::new();
    let (ours, theirs) = holdings(&ca);
    let config = TunnelConfig {
        // The connection is closed when it has been idle for this long.
        lane_idle: Duration::from_millis(1),
        ..config(CarrierChoice::Quic)
    };
    let agent = Agent::start(&theirs, config.clone()).await;
    let client = Client::new(&ours, config, agent.node);
    exchange(&client).await;
    until("the connection is closed", || client.stats.quic_connections.load(Relaxed) == 0).await;
    theirs.wait(Duration::from_secs(7200));
    let error = refused(&client).await;
    assert_eq!(error.reason(), "peer_refused_certificate", "{error:?}");
    assert_eq!(agent.stats.refusals_for(Side::Server, "certificate_expired"), 1);
    assert_eq!(agent.seen().len(), 1);
}

#[tokio::test]
async fn a_server_that_renewed_while_away_is_met_with_a_full_handshake() {
    for carrier in [CarrierChoice::Lane, CarrierChoice::Quic] {
        let lane_idle = Duration::from_millis(1);
        let config = TunnelConfig { carrier, lane_idle, ..always_dialling() };
        let ca = Ca::new();
        let (ours, theirs) = holdings(&ca);
        let agent = Agent::start(&theirs, config.clone()).await;
        let client = Client::new(&ours, config, agent.node);
        exchange(&client).await;
        let is_gone = || client.stats.quic_connections.load(Relaxed) == 0;
        until("the connection is closed", is_gone).await;
        // What the session remembers of the server has expired; the server's present certificate has not.
        let later = (-60, 14400);
        theirs.hold(SERVICE, ca.issue(SERVICE, later));
        ours.wait(Duration::from_secs(7200));
        let again = tokio::time::timeout(Duration::from_secs(10), exchange(&client));
        again.await.expect("it is refused");
        assert_eq!(client.stats.handshakes(Side::Client, SessionKind::Full), 2, "{carrier:?}");
    }
}

#[tokio::test]
async fn the_key_exchange_is_post_quantum() {
    let ca = Ca::new();
    let (agent, _client) = world_with(&ca, config(CarrierChoice::Lane)).await;
    let name = ServerName::try_from(sni_name(&id(SERVICE))).unwrap();
    let session = Session::client(Arc::new(tls_configs(&ca).0), name).unwrap();
    let tcp = TcpStream::connect(agent.node.0).await.unwrap();
    let mut handshake = Handshake::new(tcp, session, Role::Client);
    handshake.complete().await.unwrap();
    let group = handshake.session().state().negotiated_key_exchange_group().unwrap();
    assert_eq!(group.name(), NamedGroup::X25519MLKEM768);
}

#[tokio::test]
async fn a_lane_does_not_outlive_a_certificate() {
    let ca = Ca::new();
    let (ours, theirs) = holdings(&ca);
    // Long enough for one flow, and over before the second.
    ours.hold(CALLER, ca.issue(CALLER, (-60, 2)));
    let agent = Agent::start(&theirs, config(CarrierChoice::Lane)).await;
    let client = Client::new(&ours, config(CarrierChoice::Lane), agent.node);
    exchange(&client).await;
    until("the lane is idle", || client.stats.lanes_idle.load(Relaxed) == 1).await;
    until("it is closed", || client.stats.lanes_open.load(Relaxed) == 0).await;
    ours.hold(CALLER, ca.issue(CALLER, VALID));
    exchange(&client).await;
    assert_ne!(agent.seen()[0].peer, agent.seen()[1].peer);
}

/// A flow through which one byte has gone.
async fn running(client: &Client) -> (TcpStream, TcpStream, Relaying) {
    let (address, mut apps) = application().await;
    let (mut user, connection) = client.connect(address).await;
    user.write_u8(1).await.unwrap();
    let mut app = apps.recv().await.unwrap();
    app.read_u8().await.unwrap();
    (user, app, connection)
}

type Relaying = tokio::task::JoinHandle<Result<RelayEnd, OpenError>>;

async fn is_reset(socket: &mut TcpStream) {
    let read = tokio::time::timeout(Duration::from_secs(1), socket.read_u8());
    let error = read.await.expect("it goes on").expect_err("a byte came");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// One of the two ends stops trusting the other's root, while two flows run and an end of a third one
/// is idle: the flows are reset, and no further one begins.
async fn root_is_removed(carrier: CarrierChoice, at: Side) {
    // Each end has a root of its own, so that one can go.
    let (client_ca, server_ca, other) = (Ca::new(), Ca::new(), Ca::new());
    let (ours, theirs) = (Holdings::default(), Holdings::default());
    for holdings in [&ours, &theirs] {
        holdings.trust("cluster.local", &[&client_ca.root, &server_ca.root]);
    }
    ours.hold(CALLER, client_ca.issue(CALLER, VALID));
    theirs.hold(SERVICE, server_ca.issue(SERVICE, VALID));
    let agent = Agent::start(&theirs, config(carrier)).await;
    let client = Client::new(&ours, config(carrier), agent.node);
    let (mut user, mut app, relaying) = running(&client).await;
    let (mut half_closed, mut its_app, its_relaying) = running(&client).await;
    half_closed.shutdown().await.unwrap();
    assert_eq!(its_app.read(&mut [0; 1]).await.unwrap(), 0);
    exchange(&client).await;
    assert_eq!(agent.seen().len(), 3);

    // Another root is added: nobody is concerned.
    ours.trust("cluster.local", &[&client_ca.root, &server_ca.root, &other.root]);
    theirs.trust("cluster.local", &[&client_ca.root, &server_ca.root, &other.root]);
    exchange(&client).await;
    user.write_u8(2).await.unwrap();
    assert_eq!(app.read_u8().await.unwrap(), 2);

    let (stats, far) = match at {
        Side::Client => (&client.stats, &agent.stats),
        Side::Server => (&agent.stats, &client.stats),
    };
    match at {
        Side::Client => ours.trust("cluster.local", &[&client_ca.root]),
        Side::Server => theirs.trust("cluster.local", &[&server_ca.root]),
    }
    for socket in [&mut user, &mut app, &mut half_closed] {
        is_reset(socket).await;
    }
    until("its end is reset too", || its_app.take_error().unwrap().is_some()).await;
    for relaying in [relaying, its_relaying] {
        let outcome = relaying.await.unwrap().unwrap().outcome;
        let expected = match at {
            Side::Client => Outcome::Distrusted(PeerRefused::UnknownIssuer),
            Side::Server => Outcome::PeerReset(ResetReason::Denied),
        };
        assert_eq!(outcome, expected, "{carrier:?}, {at:?}");
    }
    assert_eq!(stats.refusals_for(at, "unknown_issuer"), 1, "{carrier:?}, {at:?}");
    until("no carrier is left", || {
        [stats, far].iter().all(|stats| {
            stats.lanes_open.load(Relaxed) == 0 && stats.quic_connections.load(Relaxed) == 0
        })
    })
    .await;
    let seen = agent.seen().len();
    let error = refused(&client).await;
    let reason = match (at, carrier) {
        (Side::Client, _) => "unknown_issuer",
        // The session is resumed, and the caller told why it helps nothing.
        (Side::Server, CarrierChoice::Lane) => "caller_certificate",
        (Side::Server, _) => "peer_refused_certificate",
    };
    assert_eq!(error.reason(), reason, "{carrier:?}, {at:?}: {error:?}");
    assert_eq!(agent.seen().len(), seen);
}

#[tokio::test]
async fn flows_of_a_caller_whose_root_was_removed_are_reset_on_lanes() {
    root_is_removed(CarrierChoice::Lane, Side::Server).await;
}

#[tokio::test]
async fn flows_of_a_caller_whose_root_was_removed_are_reset_on_quic() {
    root_is_removed(CarrierChoice::Quic, Side::Server).await;
}

#[tokio::test]
async fn flows_to_a_server_whose_root_was_removed_are_reset_on_lanes() {
    root_is_removed(CarrierChoice::Lane, Side::Client).await;
}

#[tokio::test]
async fn flows_to_a_server_whose_root_was_removed_are_reset_on_quic() {
    root_is_removed(CarrierChoice::Quic, Side::Client).await;
}

#[tokio::test]
async fn a_flow_that_begins_is_judged_before_anyone_was_told_of_the_change() {
    for carrier in CARRIERS {
        let (ca, other) = (Ca::new(), Ca::new());
        let (ours, theirs) = holdings(&ca);
        let agent = Agent::start(&theirs, config(carrier)).await;
        let client = Client::new(&ours, config(carrier), agent.node);
        exchange(&client).await;
        let acquired = client.tunnels.pool(&client.peer);
        // No task has run between the change and the question.
        ours.trust("cluster.local", &[&other.root]);
        let mut orders = Vec::new();
        let ready = acquired.acquire(std::time::Instant::now(), false, &mut orders);
        assert!(matches!(ready, Ok(pool::Acquired::Later(_))), "{carrier:?}: was taken");
        assert_eq!(orders.len(), 1);
    }
}

#[tokio::test]
async fn a_flow_outlives_the_certificates_that_it_began_under() {
    for carrier in CARRIERS {
        const LIFE: Duration = Duration::from_secs(2);
        let (ca, other) = (Ca::new(), Ca::new());
        let (ours, theirs) = holdings(&ca);
        ours.hold(CALLER, ca.issue(CALLER, (-60, 2)));
        theirs.hold(SERVICE, ca.issue(SERVICE, (-60, 2)));
        let issued = std::time::Instant::now();
        let agent = Agent::start(&theirs, config(carrier)).await;
        let client = Client::new(&ours, config(carrier), agent.node);
        let (mut user, mut app, _relaying) = running(&client).await;
        until("both have ended", || issued.elapsed() > LIFE).await;
        for holdings in [&ours, &theirs] {
            // Judged again, by roots that vouch for it still.
            holdings.trust("cluster.local", &[&ca.root, &other.root]);
        }
        client.tunnels.proofs.judge_all().await;
        user.write_u8(2).await.unwrap();
        assert_eq!(app.read_u8().await.unwrap(), 2);
        assert_eq!(agent.stats.refusals().map(|(_, _, count)| count).sum::<u64>(), 0);
    }
}
