//! Peers that do not answer, or over one carrier only.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use mesh_core::addr::PeerAddr;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;

use super::pool::{cleanly, exchange, without_spares};
use super::world::*;
use crate::tunnel::*;

/// All who wait for a peer fail with the first, and then at once for a while.
async fn silent_peer_fails_all_together(carrier: CarrierChoice, node: PeerAddr) {
    const LIMIT: Duration = Duration::from_millis(600);
    let (ours, _) = holdings(&Ca::new());
    let config = TunnelConfig {
        connect_timeout: LIMIT,
        backoff_min: Duration::from_secs(60),
        backoff_max: Duration::from_secs(60),
        ..config(carrier)
    };
    let client = Arc::new(Client::new(&ours, config, node));
    let started = Instant::now();
    let mut waiting = Vec::new();
    for _ in 0..6 {
        let client = Arc::clone(&client);
        waiting.push(tokio::spawn(async move {
            let (_user, app) = pair().await;
            let error = client
                .open(&app, "10.0.0.2:80".parse().unwrap(), &mut Held::default())
                .await
                .unwrap_err();
            (error, Instant::now())
        }));
        tokio::time::sleep(LIMIT / 12).await;
    }
    for waiter in waiting {
        let (error, at) = waiter.await.unwrap();
        assert_eq!(error.reason(), "connect_timeout", "{error:?}");
        assert!(error.may_retry());
        let took = at - started;
        assert!(took >= LIMIT - Duration::from_millis(5) && took < LIMIT * 3 / 2, "{took:?}");
    }
    let again = Instant::now();
    let (_user, app) = pair().await;
    let error =
        client.open(&app, "10.0.0.2:80".parse().unwrap(), &mut Held::default()).await.unwrap_err();
    assert!(matches!(error, OpenError::BackingOff(_)), "{error:?}");
    assert_eq!(error.reason(), "connect_timeout");
    assert!(again.elapsed() < LIMIT / 4, "{:?}", again.elapsed());
}

#[tokio::test]
async fn a_silent_peer_fails_all_who_wait_together_on_lanes() {
    // The kernel accepts and nobody answers.
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let node = PeerAddr(silent.local_addr().unwrap());
    silent_peer_fails_all_together(CarrierChoice::Lane, node).await;
}

#[tokio::test]
async fn a_silent_peer_fails_all_who_wait_together_on_quic() {
    let silent = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let node = PeerAddr(silent.local_addr().unwrap());
    silent_peer_fails_all_together(CarrierChoice::Quic, node).await;
}

#[tokio::test]
async fn a_peer_that_comes_back_is_used_after_the_back_off() {
    let ca = Ca::new();
    let (ours, theirs) = holdings(&ca);
    let (gone, _closed) = closed_port();
    let node = PeerAddr(gone);
    let mut client = Client::new(&ours, config(CarrierChoice::Lane), node);
    let (address, _apps) = application().await;
    let (_user, app) = pair().await;
    let error = client.open(&app, address, &mut Held::default()).await.unwrap_err();
    assert_eq!(error.reason(), "connection_refused", "{error:?}");
    // Another peer is not concerned.
    let agent = Agent::start(&theirs, config(CarrierChoice::Lane)).await;
    client.peer.node = agent.node;
    exchange(&client, cleanly).await;
}

/// As while an agent starts again: it is not to be away for as long again as it was.
#[tokio::test]
async fn a_peer_that_refuses_is_asked_again_soon() {
    let (ours, _theirs) = holdings(&Ca::new());
    let (gone, _closed) = closed_port();
    let node = PeerAddr(gone);
    let client = Client::new(&ours, config(CarrierChoice::Lane), node);
    let (address, _apps) = application().await;
    let (_user, app) = pair().await;
    let ten = async {
        while client.stats.dials.load(Relaxed) < 10 {
            let error = client.open(&app, address, &mut Held::default()).await.unwrap_err();
            assert_eq!(error.reason(), "connection_refused", "{error:?}");
            tokio::task::yield_now().await;
        }
    };
    // With a back-off that doubles from 100 ms it is half a minute.
    timeout(Duration::from_secs(5), ten).await.expect("it is left alone");
}

async fn falls_back(serves: Serves, expected: Carrier) {
    let ca = Ca::new();
    let (ours, theirs) = holdings(&ca);
    let config = TunnelConfig { carrier: CarrierChoice::Auto, ..without_spares() };
    let agent = Agent::start_with(&theirs, config.clone(), serves).await;
    let client = Client::new(&ours, config, agent.node);
    exchange(&client, cleanly).await;
    let dials = client.stats.dials.load(Relaxed);
    exchange(&client, cleanly).await;
    assert!(agent.seen().iter().all(|seen| seen.carrier == expected));
    assert_eq!(client.stats.dials.load(Relaxed), dials, "it is remembered");
    assert_eq!(client.tunnels.view()[0].carrier, expected);
}

#[tokio::test]
async fn auto_uses_quic_where_tcp_does_not_pass() {
    falls_back(Serves::OnlyQuic, Carrier::Quic).await;
}

#[tokio::test]
async fn auto_uses_lanes_where_both_pass() {
    falls_back(Serves::Both, Carrier::Lane).await;
}

#[tokio::test]
async fn auto_goes_back_to_lanes_when_quic_does_not_pass_any_more() {
    let ca = Ca::new();
    let (ours, theirs) = holdings(&ca);
    let config = TunnelConfig {
        connect_timeout: Duration::from_secs(1),
        lane_idle: Duration::from_millis(1),
        ..config(CarrierChoice::Auto)
    };
    let mut agent = Agent::start_with(&theirs, config.clone(), Serves::OnlyQuic).await;
    let client = Client::new(&ours, config.clone(), agent.node);
    exchange(&client, cleanly).await;
    assert_eq!(agent.seen()[0].carrier, Carrier::Quic);
    until("the connection is closed", || client.stats.quic_connections.load(Relaxed) == 0).await;
    agent.tasks.shutdown().await;
    // Now TCP passes and UDP does not, and QUIC is still what is remembered.
    let listener = agent.closed.take().unwrap().listen(BACKLOG).unwrap();
    let _silent = UdpSocket::bind(agent.node.0).await;
    let tunnels = Tunnels::new(
        config,
        TicketKeys::new().unwrap(),
        theirs.credentials(),
        Arc::new(TunnelStats::default()),
    )
    .unwrap();
    let (_drain, draining) = tokio::sync::watch::channel(false);
    tokio::spawn(tunnels.serve_lanes(listener, draining, |request| async move {
        let app = TcpStream::connect(request.open.destination.0).await.unwrap();
        let flow = request.accept().await.unwrap();
        crate::relay::relay(app, flow, Held::default(), &crate::telemetry::Live::default()).await;
    }));
    exchange(&client, cleanly).await;
    assert_eq!(client.tunnels.view()[0].carrier, Carrier::Lane);
    assert_eq!(client.stats.fallbacks.load(Relaxed), 2);
}
