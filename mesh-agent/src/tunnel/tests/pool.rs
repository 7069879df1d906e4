//! How carriers are made, shared, given back and given up.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use mesh_core::addr::PeerAddr;
use mesh_core::stage::Stage;
use mesh_core::wire::{OPEN_LEN, Reason, ResetReason, Role, encode_answer};
use rustls::pki_types::ServerName;
use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::world::*;
use crate::identity::sni_name;
use crate::relay::Outcome;
use crate::tunnel::lane::Handshake;
use crate::tunnel::session::Session;
use crate::tunnel::tls::Refusals;
use crate::tunnel::*;

/// Opens a flow, sees one byte through, and ends it as told.
pub(super) async fn exchange(client: &Client, end: fn(TcpStream, TcpStream)) -> Outcome {
    let (address, mut apps) = application().await;
    let seen_through = async {
        let (mut user, connection) = client.connect(address).await;
        user.write_u8(1).await.unwrap();
        let mut app = apps.recv().await.unwrap();
        app.read_u8().await.unwrap();
        end(user, app);
        connection.await.unwrap().unwrap().outcome
    };
    timeout(Duration::from_secs(30), seen_through).await.expect("it hangs")
}

pub(super) fn cleanly(user: TcpStream, app: TcpStream) {
    drop((user, app));
}

/// The caller keeps the other end until the reset has been seen.
fn by_reset(user: TcpStream, app: TcpStream) {
    SockRef::from(&user).set_linger(Some(Duration::ZERO)).unwrap();
    drop(user);
    tokio::spawn(async move {
        let mut app = app;
        let mut rest = Vec::new();
        app.read_to_end(&mut rest).await.unwrap_err();
    });
}

pub(super) fn without_spares() -> TunnelConfig {
    TunnelConfig { spare_lanes: 0, ..config(CarrierChoice::Lane) }
}

#[tokio::test]
async fn a_lane_is_used_again_after_a_clean_end_and_not_after_a_reset() {
    let (agent, client) = world_with(&Ca::new(), without_spares()).await;
    assert_eq!(exchange(&client, cleanly).await, Outcome::Clean);
    assert_eq!(exchange(&client, by_reset).await.reason(), "application_reset");
    assert_eq!(exchange(&client, cleanly).await, Outcome::Clean);
    let peers: Vec<_> = agent.seen().into_iter().map(|seen| seen.peer).collect();
    assert_eq!(peers[0], peers[1]);
    assert_ne!(peers[1], peers[2]);
    assert_eq!(client.stats.dials.load(Relaxed), 2);
}

#[tokio::test]
async fn a_stream_per_flow_shares_one_connection() {
    let (agent, client) = world(CarrierChoice::Quic).await;
    for end in [cleanly, by_reset, cleanly] {
        exchange(&client, end).await;
    }
    let seen = agent.seen();
    assert_eq!(seen.len(), 3);
    assert!(seen.iter().all(|s| s.peer == seen[0].peer && s.carrier == Carrier::Quic));
    assert_eq!(client.stats.dials.load(Relaxed), 1);
}

/// The next lane that a client dials, behind its handshake.
async fn accepted_lane(ca: &Ca, listener: &TcpListener) -> Lane {
    let (_, server) = tls_configs(ca);
    let (tcp, _) = listener.accept().await.unwrap();
    let session = Session::server(Arc::new(server)).unwrap();
    let mut handshake = Handshake::new(tcp, session, Role::Server);
    handshake.complete().await.unwrap();
    let stats = Arc::new(TunnelStats::default());
    let proof = nobody(&holdings(ca).1, &stats);
    handshake.into_lane(proof, Instant::now() + Duration::from_secs(60), &stats).unwrap()
}

/// An application that closes and then gets bytes resets, when its client may be done with both directions: what
/// comes too late for that flow is not the next one's.
#[tokio::test]
async fn a_reset_of_the_flow_before_costs_the_next_one_nothing() {
    let (ca, address) = (Ca::new(), "10.0.0.2:80".parse().unwrap());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let node = PeerAddr(listener.local_addr().unwrap());
    let client = Client::new(&holdings(&ca).0, without_spares(), node);

    let (mut user, connection) = client.connect(address).await;
    let mut lane = accepted_lane(&ca, &listener).await;
    assert!(matches!(lane.next_event().await, Ok(LaneEvent::Open(_))));
    lane.codec.queue(&encode_answer(Ok(()))).unwrap();
    lane.codec.queue_fin().unwrap();
    lane.flush().await.unwrap();
    user.shutdown().await.unwrap();
    assert_eq!(lane.next_event().await.unwrap(), LaneEvent::Fin);
    assert_eq!(connection.await.unwrap().unwrap().outcome, Outcome::Clean);
    assert_eq!(client.stats.lanes_idle.load(Relaxed), 1);

    let (mut user, app) = pair().await;
    user.write_all(b"hello").await.unwrap();
    app.readable().await.unwrap();
    let mut held = Held::default();
    let opening = client.open(&app, address, &mut held);
    let serving = async {
        assert!(matches!(lane.next_event().await, Ok(LaneEvent::Open(_))));
        lane.codec.queue_reset(ResetReason::Application).unwrap();
        lane.flush().await.unwrap();
        drop(lane);
        let mut lane = accepted_lane(&ca, &listener).await;
        assert!(matches!(lane.next_event().await, Ok(LaneEvent::Open(_))));
        assert_eq!(lane.next_event().await.unwrap(), LaneEvent::Data);
        assert_eq!(lane.codec.payload(), b"hello");
        // On a lane that has carried nothing else it is of this one, which was not answered.
        lane.codec.queue_reset(ResetReason::Application).unwrap();
        lane.flush().await.unwrap();
        lane
    };
    let (opened, _lane) =
        timeout(Duration::from_secs(30), async { tokio::join!(opening, serving) })
            .await
            .expect("it hangs");
    assert!(matches!(opened, Err(OpenError::Protocol(_))), "{opened:?}");
}

#[tokio::test]
async fn a_spare_lane_is_dialled_ahead() {
    let (_agent, client) = world(CarrierChoice::Lane).await;
    exchange(&client, cleanly).await;
    // From here on the one lane is in use.
    let (address, mut apps) = application().await;
    let (_user, _connection) = client.connect(address).await;
    apps.recv().await.unwrap();
    until("there is another one", || client.stats.lanes_idle.load(Relaxed) == 1).await;
    assert_eq!(client.stats.lanes_open.load(Relaxed), 2);
}

#[tokio::test]
async fn a_peer_that_does_not_answer_is_asked_on_no_other_idle_lane() {
    let config =
        TunnelConfig { answer_timeout: Duration::from_secs(1), ..config(CarrierChoice::Lane) };
    let (agent, client) = world_with(&Ca::new(), config).await;
    exchange(&client, cleanly).await;
    let (address, mut apps) = application().await;
    let (user, connection) = client.connect(address).await;
    let app = apps.recv().await.unwrap();
    until("there is a spare one", || client.stats.lanes_idle.load(Relaxed) == 1).await;
    drop((user, app));
    connection.await.unwrap().unwrap();
    until("both are idle", || client.stats.lanes_idle.load(Relaxed) == 2).await;

    agent.behave(Behaviour::Hang);
    let (_user, app) = pair().await;
    let opened = client.open(&app, address, &mut Held::default()).await;
    assert!(matches!(opened, Err(OpenError::TimedOut { .. })), "{opened:?}");
    assert_eq!(client.stats.lanes_idle.load(Relaxed), 0);
}

#[tokio::test]
async fn idle_lanes_are_closed_after_a_while() {
    let config = TunnelConfig { lane_idle: Duration::from_millis(100), ..without_spares() };
    let (agent, client) = world_with(&Ca::new(), config).await;
    exchange(&client, cleanly).await;
    until("the client closed it", || client.stats.lanes_open.load(Relaxed) == 0).await;
    until("the server closed it", || agent.stats.lanes_open.load(Relaxed) == 0).await;
    until("the peer is forgotten", || client.tunnels.view().is_empty()).await;
}

#[tokio::test]
async fn an_idle_flow_holds_no_buffer() {
    let (_agent, client) = world(CarrierChoice::Lane).await;
    let (address, _apps) = application().await;
    let (_user, app) = pair().await;
    let flow = client.open(&app, address, &mut Held::default()).await.unwrap();
    let Flow::Lane(flow) = flow else { panic!("{flow:?}") };
    assert!(!flow.lane.codec.holds_memory());
}

#[tokio::test]
async fn what_one_endpoint_refused_is_sent_to_another() {
    for carrier in [CarrierChoice::Lane, CarrierChoice::Quic] {
        let ca = Ca::new();
        let (ours, theirs) = holdings(&ca);
        let (first, second) = (
            Agent::start(&theirs, config(carrier)).await,
            Agent::start(&theirs, config(carrier)).await,
        );
        first.behave(Behaviour::Refuse(Reason::Overloaded));
        let mut client = Client::new(&ours, config(carrier), first.node);
        let (address, mut apps) = application().await;
        let (mut user, app) = pair().await;
        user.write_all(b"once, and only once").await.unwrap();
        app.readable().await.unwrap();

        let mut held = Held::default();
        let error = client.open(&app, address, &mut held).await.unwrap_err();
        assert_eq!((error.stage(), error.reason()), (Stage::Authorize, "overloaded"), "{error:?}");
        assert!(error.may_retry());
        assert_eq!(held.bytes(), b"once, and only once");

        client.peer.node = second.node;
        let flow = client.open(&app, address, &mut held).await.unwrap();
        tokio::spawn(async move {
            crate::relay::relay(app, flow, held, &crate::telemetry::Live::default()).await
        });
        user.shutdown().await.unwrap();
        let mut received = String::new();
        apps.recv().await.unwrap().read_to_string(&mut received).await.unwrap();
        assert_eq!(received, "once, and only once");
        assert!(apps.try_recv().is_err(), "delivered twice");
    }
}

#[tokio::test]
async fn a_lane_survives_refusals() {
    let (agent, client) = world_with(&Ca::new(), without_spares()).await;
    agent.behave(Behaviour::Refuse(Reason::Denied));
    let (address, _apps) = application().await;
    for _ in 0..3 {
        let (mut user, app) = pair().await;
        user.write_all(&[1; 40_000]).await.unwrap();
        app.readable().await.unwrap();
        let error = client.open(&app, address, &mut Held::default()).await.unwrap_err();
        assert_eq!(error.reason(), "denied", "{error:?}");
        assert!(!error.may_retry(), "a policy is about the service");
    }
    agent.behave(Behaviour::Deliver);
    exchange(&client, cleanly).await;
    assert_eq!(client.stats.dials.load(Relaxed), 1);
    assert_eq!(client.stats.flows_refused.load(Relaxed), 3);
}

#[tokio::test]
async fn an_application_that_does_not_listen_is_a_refusal_at_delivery() {
    for carrier in [CarrierChoice::Lane, CarrierChoice::Quic] {
        let (_agent, client) = world(carrier).await;
        let (address, _closed) = closed_port();
        let (_user, app) = pair().await;
        let error = client.open(&app, address, &mut Held::default()).await.unwrap_err();
        assert_eq!((error.stage(), error.reason()), (Stage::Deliver, "connection_refused"));
    }
}

#[tokio::test]
async fn a_peer_that_vanishes_after_accepting_is_an_error() {
    for carrier in [CarrierChoice::Lane, CarrierChoice::Quic] {
        let (agent, client) = world(carrier).await;
        agent.behave(Behaviour::Vanish);
        let (address, _apps) = application().await;
        let (mut user, connection) = client.connect(address).await;
        let mut rest = Vec::new();
        user.read_to_end(&mut rest).await.expect_err("a clean end");
        // On QUIC the reset may overtake the answer.
        if let Ok(end) = connection.await.unwrap() {
            assert_ne!(end.outcome, Outcome::Clean);
        }
    }
}

/// A lane to the agent that says what a test wants it to.
pub(super) async fn raw_lane(ca: &Ca, agent: &Agent) -> Lane {
    let (ours, _) = holdings(ca);
    let credentials = ours.credentials();
    let certified = (credentials.certified)(&id(CALLER)).unwrap();
    let tls = tls::client_config(&credentials, &certified, &Refusals::default()).unwrap();
    let name = ServerName::try_from(sni_name(&id(SERVICE))).unwrap();
    let tcp = TcpStream::connect(agent.node.0).await.unwrap();
    let session = Session::client(Arc::new(tls), name).unwrap();
    let mut handshake = Handshake::new(tcp, session, Role::Client);
    handshake.complete().await.unwrap();
    let stats = Arc::new(TunnelStats::default());
    let proof = nobody(&ours, &stats);
    handshake.into_lane(proof, Instant::now() + Duration::from_secs(60), &stats).unwrap()
}

#[tokio::test]
async fn an_unknown_version_is_answered_and_ends_the_lane() {
    let ca = Ca::new();
    let (agent, _client) = world_with(&ca, config(CarrierChoice::Lane)).await;
    let mut lane = raw_lane(&ca, &agent).await;

    // A longer OPEN, as a later version may have.
    let mut open = [0; OPEN_LEN + 30];
    open[..OPEN_LEN].copy_from_slice(&open_to("10.0.0.2:80".parse().unwrap()).encode());
    open[3] += 30;
    open[4] = 2;
    lane.codec.queue(&open).unwrap();
    lane.flush().await.unwrap();
    match lane.next_event().await.unwrap() {
        LaneEvent::Answer(answer) => {
            assert_eq!(answer.verdict.unwrap_err().reason, Reason::Version);
            assert_eq!(answer.version, mesh_core::wire::VERSION);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(lane.next_event().await.unwrap(), LaneEvent::Closed);
    assert!(agent.seen().is_empty());
}

#[tokio::test]
async fn a_request_that_does_not_go_on_ends_the_lane_and_an_idle_one_stays() {
    const LIMIT: Duration = Duration::from_millis(200);
    let ca = Ca::new();
    let config = TunnelConfig { open_timeout: LIMIT, ..without_spares() };
    let (agent, _client) = world_with(&ca, config).await;
    let mut idle = raw_lane(&ca, &agent).await;
    let mut slow = raw_lane(&ca, &agent).await;
    let open = open_to("127.0.0.1:1".parse().unwrap()).encode();
    slow.codec.queue(&open[..20]).unwrap();
    slow.flush().await.unwrap();
    let ended = timeout(Duration::from_secs(5), slow.next_event()).await;
    ended.expect("it is waited for").expect_err("it was answered");
    assert_eq!(agent.stats.refusals_for(Side::Server, "open_timeout"), 1);

    // As old as the other one, and it has not begun.
    idle.codec.queue(&open).unwrap();
    idle.flush().await.unwrap();
    assert!(matches!(idle.next_event().await, Ok(LaneEvent::Answer(_))));
}

#[tokio::test]
async fn a_request_that_does_not_go_on_is_given_up_on_quic() {
    let ca = Ca::new();
    let config =
        TunnelConfig { open_timeout: Duration::from_millis(200), ..config(CarrierChoice::Quic) };
    let (agent, client) = world_with(&ca, config).await;
    exchange(&client, cleanly).await;
    let ready = client.tunnels.acquire(&client.tunnels.pool(&client.peer), false).await.unwrap();
    let pool::Ready::Quic(link) = ready else { panic!("{ready:?}") };
    let (mut send, mut recv) = link.connection().open_bi().await.unwrap();
    send.write_all(&open_to("127.0.0.1:1".parse().unwrap()).encode()[..20]).await.unwrap();
    let ended = timeout(Duration::from_secs(5), recv.read(&mut [0; 1])).await;
    ended.expect("it is waited for").expect_err("it was answered");
    assert_eq!(agent.stats.refusals_for(Side::Server, "open_timeout"), 1);
    // The other flows of the connection are not concerned.
    exchange(&client, cleanly).await;
    assert_eq!(client.stats.dials.load(Relaxed), 1);
}

#[tokio::test]
async fn an_application_that_gives_up_while_it_waits_is_not_waited_for() {
    for carrier in [CarrierChoice::Lane, CarrierChoice::Quic] {
        let (_agent, client) = world(carrier).await;
        // Nobody accepts beyond the backlog: the server's agent waits for its connection.
        let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let node = PeerAddr(silent.local_addr().unwrap());
        let (user, app) = pair().await;
        SockRef::from(&user).set_linger(Some(Duration::ZERO)).unwrap();
        let client = Client { peer: Peer { node, ..client.peer.clone() }, ..client };
        let mut held = Held::default();
        let opening = client.open(&app, "10.0.0.2:80".parse().unwrap(), &mut held);
        let (opened, ()) = tokio::join!(opening, async {
            tokio::task::yield_now().await;
            drop(user);
        });
        assert_eq!(opened.unwrap_err().reason(), "application_reset");
    }
}

/// An application that has answered early and reads no further: what it was sent lies in between when the client has
/// ended, and nobody else's flow may come behind it.
#[tokio::test]
async fn a_lane_on_which_something_lies_unread_keeps_no_other_flow() {
    /// More than there is room for at the application's socket, and less than there is altogether.
    const MANY: usize = 5 << 20;
    let config = TunnelConfig { answer_timeout: Duration::from_secs(5), ..without_spares() };
    let (agent, client) = world_with(&Ca::new(), config).await;
    let (address, mut apps) = application().await;
    let (mut user, connection) = client.connect(address).await;
    user.write_u8(1).await.unwrap();
    let mut stalled = apps.recv().await.unwrap();
    SockRef::from(&stalled).set_recv_buffer_size(4096).unwrap();
    stalled.shutdown().await.unwrap();
    assert_eq!(user.read(&mut [0]).await.unwrap(), 0, "it has ended its direction");
    user.write_all(&vec![2; MANY]).await.unwrap();
    drop(user);
    let end = timeout(Duration::from_secs(30), connection).await.unwrap().unwrap().unwrap();
    assert_eq!(end.outcome, Outcome::Clean);

    let other = async {
        let (mut user, _connection) = client.connect(address).await;
        user.write_u8(3).await.unwrap();
        apps.recv().await.unwrap().read_u8().await.unwrap()
    };
    let byte = timeout(Duration::from_secs(2), other).await.expect("behind the first flow's bytes");
    assert_eq!(byte, 3);
    assert_eq!(client.stats.handshakes(Side::Client, SessionKind::Full), 1);
    assert_ne!(agent.seen()[0].peer, agent.seen()[1].peer, "another lane");
    drop(stalled);
}

#[test]
fn a_lane_is_used_again_if_nothing_can_lie_on_it() {
    const MIB: u64 = 1 << 20;
    for (sent, late, acknowledged, reuse) in [
        (0, true, false, Reuse::Next),
        (64 << 10, true, false, Reuse::Next),
        (MIB / 2, false, true, Reuse::Last),
        (MIB / 2, true, true, Reuse::Never),
        (MIB / 2, false, false, Reuse::Never),
        (MIB + 1, false, true, Reuse::Never),
    ] {
        assert_eq!(
            Reuse::after(sent, late, || acknowledged),
            reuse,
            "{sent} {late} {acknowledged}"
        );
    }
}

/// Its end of the handshake is done before the peer has judged, each time.
#[tokio::test]
async fn who_refuses_our_certificate_is_asked_less_and_less() {
    for carrier in [CarrierChoice::Lane, CarrierChoice::Quic] {
        let (ca, other) = (Ca::new(), Ca::new());
        let (ours, theirs) = holdings(&ca);
        theirs.trust("cluster.local", &[&other.root]);
        let agent = Agent::start(&theirs, config(carrier)).await;
        let client = Client::new(&ours, config(carrier), agent.node);
        let (_user, app) = pair().await;
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(2) {
            let mut held = Held::default();
            client.open(&app, "10.0.0.2:80".parse().unwrap(), &mut held).await.unwrap_err();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let handshakes = client.stats.handshakes(Side::Client, SessionKind::Full);
        assert!((2..20).contains(&handshakes), "{carrier:?}: {handshakes} in two seconds");
    }
}

#[tokio::test]
async fn a_drained_server_finishes_what_runs_and_closes_the_rest() {
    for carrier in [CarrierChoice::Lane, CarrierChoice::Quic] {
        let (mut agent, client) = world(carrier).await;
        exchange(&client, cleanly).await;
        let (address, mut apps) = application().await;
        let (mut user, connection) = client.connect(address).await;
        let mut app = apps.recv().await.unwrap();
        agent.drain.send_replace(true);
        // What runs goes on.
        user.write_all(b"still here").await.unwrap();
        user.shutdown().await.unwrap();
        let mut received = String::new();
        app.read_to_string(&mut received).await.unwrap();
        assert_eq!(received, "still here");
        app.write_all(b"bye").await.unwrap();
        drop(app);
        let mut answer = String::new();
        user.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "bye");
        assert_eq!(connection.await.unwrap().unwrap().outcome, Outcome::Clean);
        // Both servers return by themselves.
        let all = async { while agent.tasks.join_next().await.is_some() {} };
        timeout(Duration::from_secs(10), all).await.expect("it never ended");
    }
}

/// As when an agent follows another one: the carrier came just before the old one began to drain.
#[tokio::test]
async fn a_drained_client_opens_nothing_more() {
    let (_agent, client) = world(CarrierChoice::Lane).await;
    exchange(&client, cleanly).await;
    client.tunnels.drain().await;
    assert_eq!(client.stats.lanes_idle.load(Relaxed), 0);
    let (_user, app) = pair().await;
    let error =
        client.open(&app, "10.0.0.2:80".parse().unwrap(), &mut Held::default()).await.unwrap_err();
    assert_eq!(error.reason(), "draining");
}

#[tokio::test]
async fn opening_a_flow_is_a_small_future() {
    let (_agent, client) = world(CarrierChoice::Lane).await;
    let (_user, app) = pair().await;
    let mut held = Held::default();
    let size = size_of_val(&client.open(&app, "10.0.0.2:80".parse().unwrap(), &mut held));
    assert!(size <= 4096, "{size} bytes for every connection");
}
