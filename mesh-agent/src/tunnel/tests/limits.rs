//! How much one peer may take, and what others keep.

use std::net::Ipv4Addr;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use mesh_core::addr::PeerAddr;
use mesh_core::wire::Reason;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::time::timeout;

use super::pool::{cleanly, exchange};
use super::world::*;
use crate::tunnel::*;

/// Flows that stay open, and have each carried a byte.
async fn open(client: &Client, number: usize) -> Vec<(TcpStream, TcpStream)> {
    let (address, mut apps) = application().await;
    let mut open = Vec::new();
    for _ in 0..number {
        let (mut user, _relay) = client.connect(address).await;
        user.write_u8(1).await.unwrap();
        let mut app = apps.recv().await.unwrap();
        app.read_u8().await.unwrap();
        open.push((user, app));
    }
    open
}

#[tokio::test]
async fn more_flows_than_a_peer_may_have_are_refused_at_once() {
    for carrier in [CarrierChoice::Lane, CarrierChoice::Quic] {
        let config = TunnelConfig { max_flows_per_peer: 3, ..config(carrier) };
        let (_agent, client) = world_with(&Ca::new(), config).await;
        let flows = open(&client, 3).await;
        let (_user, app) = pair().await;
        let mut held = Held::default();
        let more = client.open(&app, "10.0.0.2:80".parse().unwrap(), &mut held);
        let more = timeout(Duration::from_secs(1), more).await.expect("it has to wait");
        assert_eq!(more.unwrap_err().reason(), "overloaded", "{carrier:?}");
        drop(flows);
        until("they have ended", || client.tunnels.view().iter().all(|peer| peer.busy == 0)).await;
        exchange(&client, cleanly).await;
    }
}

#[tokio::test]
async fn streams_of_a_quic_connection_become_more_as_they_are_used() {
    let config = TunnelConfig {
        quic_first_streams: 4,
        max_flows_per_peer: 64,
        ..config(CarrierChoice::Quic)
    };
    let (_agent, client) = world_with(&Ca::new(), config).await;
    let flows = timeout(Duration::from_secs(10), open(&client, 64)).await;
    assert_eq!(flows.expect("a stream has to wait").len(), 64);
    assert_eq!(client.stats.dials.load(Relaxed), 1);
}

#[tokio::test]
async fn who_does_not_show_its_address_takes_no_handshakes_from_others() {
    let ca = Ca::new();
    // A quarter of one is none: every client has to show its address.
    let config = TunnelConfig { max_handshakes: 1, ..config(CarrierChoice::Quic) };
    let (agent, client) = world_with(&ca, config.clone()).await;
    // A first packet that is sent again and again, from addresses that hear no answer.
    let (ours, _) = holdings(&ca);
    let near = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let liar = Client::new(&ours, config.clone(), PeerAddr(near.local_addr().unwrap()));
    let opening = tokio::spawn(async move {
        let (_user, app) = pair().await;
        liar.open(&app, "10.0.0.2:80".parse().unwrap(), &mut Held::default()).await.map(drop)
    });
    let mut first = [0; 2048];
    let (len, _) = near.recv_from(&mut first).await.unwrap();
    opening.abort();
    for sent in 1..=8 {
        let elsewhere = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        elsewhere.send_to(&first[..len], agent.node.0).await.unwrap();
        until("it is asked for its address", || agent.stats.retries.load(Relaxed) >= sent).await;
    }
    exchange(&client, cleanly).await;
    assert_eq!(agent.seen().len(), 1);
    assert!(agent.stats.retries.load(Relaxed) >= 9);
}

/// A server takes no handshake from whoever is silent for this long, and a client waits half of it.
const SILENCE: Duration = Duration::from_secs(10);

#[tokio::test]
async fn who_connects_and_says_nothing_keeps_nobody_out() {
    let config = TunnelConfig {
        max_handshakes: 4,
        handshake_timeout: SILENCE,
        connect_timeout: SILENCE / 2,
        ..config(CarrierChoice::Lane)
    };
    let (agent, client) = world_with(&Ca::new(), config).await;
    let connect = async |from: [u8; 4]| {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((from, 0).into()).unwrap();
        socket.connect(agent.node.0).await.unwrap()
    };
    let mut flood = Vec::new();
    for _ in 0..3 {
        flood.push(connect([127, 0, 0, 2]).await);
    }
    let slow = connect([127, 0, 0, 3]).await;
    exchange(&client, cleanly).await;
    let ended = timeout(SILENCE / 2, flood[0].read(&mut [0])).await.expect("it is let in still");
    assert_eq!(ended.unwrap(), 0);
    for kept in [&flood[2], &slow] {
        let said = kept.try_read(&mut [0]).unwrap_err();
        assert_eq!(said.kind(), std::io::ErrorKind::WouldBlock, "others have more");
    }
    assert_eq!(agent.stats.refusals_for(Side::Server, "handshake_timeout"), 1);
}

/// Brings a client to where the server knows its address and waits for the rest of its handshake, which
/// does not come. Returns what has to be kept for that.
async fn half_open(ours: &Holdings, config: &TunnelConfig, node: PeerAddr) -> impl Sized + use<> {
    let near = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let far = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    far.connect(node.0).await.unwrap();
    let client = Client::new(ours, config.clone(), PeerAddr(near.local_addr().unwrap()));
    let opening = tokio::spawn(async move {
        let (_user, app) = pair().await;
        client.open(&app, "10.0.0.2:80".parse().unwrap(), &mut Held::default()).await.map(drop)
    });
    let (mut asked, mut answer) = ([0; 2048], [0; 2048]);
    let mut from = None;
    loop {
        tokio::select! {
            received = near.recv_from(&mut asked) => {
                let (len, client) = received.unwrap();
                from = Some(client);
                far.send(&asked[..len]).await.unwrap();
            }
            received = far.recv(&mut answer) => {
                let len = received.unwrap();
                // Anything but Retry (RFC 9000 section 17.2.5) is what only the client could answer.
                if answer[0] & 0xb0 != 0xb0 {
                    break;
                }
                near.send_to(&answer[..len], from.unwrap()).await.unwrap();
            }
        }
    }
    opening.abort();
    (near, far)
}

#[tokio::test]
async fn who_shows_its_address_and_says_nothing_more_keeps_nobody_out() {
    let ca = Ca::new();
    let config = TunnelConfig {
        max_handshakes: 2,
        handshake_timeout: SILENCE,
        connect_timeout: SILENCE / 2,
        quic_idle: SILENCE,
        ..config(CarrierChoice::Quic)
    };
    let (agent, client) = world_with(&ca, config.clone()).await;
    let (ours, _) = holdings(&ca);
    let _silent =
        [half_open(&ours, &config, agent.node).await, half_open(&ours, &config, agent.node).await];
    exchange(&client, cleanly).await;
    assert_eq!(agent.seen().len(), 1);
    // One or both: after a second without an answer a client begins another one.
    assert!(agent.stats.refusals_for(Side::Server, "handshake_timeout") >= 1);
}

/// A client's connection to the agent, without a flow.
async fn link(client: &Client) -> Result<quic::QuicLink, OpenError> {
    match client.tunnels.acquire(&client.tunnels.pool(&client.peer), false).await? {
        pool::Ready::Quic(link) => Ok(link),
        ready => panic!("{ready:?}"),
    }
}

/// Streams cost a peer nothing: one frame opens all that are allowed.
#[tokio::test]
async fn streams_that_do_not_say_what_they_want_become_no_more() {
    const LATE: Duration = Duration::from_millis(200);
    let config =
        TunnelConfig { quic_first_streams: 128, open_timeout: LATE, ..config(CarrierChoice::Quic) };
    let (agent, client) = world_with(&Ca::new(), config).await;
    let link = link(&client).await.unwrap();
    let began = Instant::now();
    let mut streams = Vec::new();
    for _ in 0..128 {
        let (mut send, recv) = link.connection().open_bi().await.unwrap();
        send.write_all(&[0]).await.unwrap();
        streams.push((send, recv));
    }
    for (_send, recv) in &mut streams {
        let ended = timeout(Duration::from_secs(10), recv.read(&mut [0])).await;
        ended.expect("it is waited for").expect_err("it was answered");
    }
    assert!(began.elapsed() >= 2 * LATE, "64 at once");
    assert_eq!(agent.stats.refusals_for(Side::Server, "open_timeout"), 128);
    let more = timeout(Duration::from_millis(200), link.connection().open_bi()).await;
    assert!(more.is_err(), "there may be more than at first, though nobody has used one");
}

#[tokio::test]
async fn one_address_has_half_of_the_connections_at_most() {
    let ca = Ca::new();
    let (ours, theirs) = holdings(&ca);
    let window = 1 << 20;
    let credit = Credit::new(8 * u64::from(window));
    let theirs_config = TunnelConfig {
        quic_stream_window: window,
        quic_credit: credit.clone(),
        ..config(CarrierChoice::Quic)
    };
    let agent = Agent::start(&theirs, theirs_config).await;
    let mut links = Vec::new();
    for _ in 0..4 {
        let client = Client::new(&ours, config(CarrierChoice::Quic), agent.node);
        links.push((link(&client).await.unwrap(), client));
        let taken = || credit.lent() == u64::from(window) * links.len() as u64;
        until("it is taken", taken).await;
    }
    let one_more = Client::new(&ours, config(CarrierChoice::Quic), agent.node);
    let refused = link(&one_more).await.unwrap();
    until("it is told to go", || refused.connection().close_reason().is_some()).await;
    assert_eq!(agent.stats.refusals_for(Side::Server, "overloaded"), 1);
    until("others keep the rest", || credit.lent() == credit.bytes() / 2).await;
    assert!(links.iter().all(|(link, _)| link.connection().close_reason().is_none()));
    // What was one of them's is free again.
    let (ended, _client) = links.pop().unwrap();
    ended.close(Reason::Draining);
    until("its credit is back", || credit.lent() < credit.bytes() / 2).await;
    let client = Client::new(&ours, config(CarrierChoice::Quic), agent.node);
    exchange(&client, cleanly).await;
}

#[tokio::test]
async fn connection_that_nobody_uses_is_closed_though_its_client_keeps_it() {
    let ca = Ca::new();
    let (ours, theirs) = holdings(&ca);
    let short =
        TunnelConfig { lane_idle: Duration::from_millis(100), ..config(CarrierChoice::Quic) };
    let agent = Agent::start(&theirs, short).await;
    let client = Client::new(&ours, config(CarrierChoice::Quic), agent.node);
    let link = link(&client).await.unwrap();
    until("it is closed", || link.connection().close_reason().is_some()).await;
}
