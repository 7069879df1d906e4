//! A peer's agent that another one follows: killed and started again, seen over QUIC, where nobody says
//! goodbye and no kernel does it in its place; or told to drain.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mesh_core::addr::PeerAddr;
use mesh_core::wire::Reason;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::pool::{cleanly, exchange};
use super::world::*;
use crate::telemetry::Live;
use crate::tunnel::*;

/// Passes datagrams between clients and the agent that is in its place now, so that an agent can vanish
/// without its last words being heard.
struct Wire {
    node: PeerAddr,
    now: Arc<Mutex<SocketAddr>>,
    /// After so many datagrams of the agent the next one is in its place.
    next: Arc<Mutex<Option<(usize, SocketAddr)>>>,
    /// For so long each datagram of the agent occupies it.
    pace: Arc<Mutex<Duration>>,
    _passing: JoinSet<()>,
}

impl Wire {
    async fn to(agent: &Agent) -> Self {
        let near = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
        let far = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
        let node = PeerAddr(near.local_addr().unwrap());
        let now = Arc::new(Mutex::new(agent.node.0));
        let client = Arc::new(Mutex::new(None));
        let mut passing = JoinSet::new();
        let (from, to, caller, agent) =
            (Arc::clone(&near), Arc::clone(&far), Arc::clone(&client), Arc::clone(&now));
        passing.spawn(async move {
            let mut datagram = [0; 65_536];
            while let Ok((len, source)) = from.recv_from(&mut datagram).await {
                *caller.lock().unwrap() = Some(source);
                let agent = *agent.lock().unwrap();
                drop(to.send_to(&datagram[..len], agent).await);
            }
        });
        let agent = Arc::clone(&now);
        let next = Arc::new(Mutex::new(None::<(usize, SocketAddr)>));
        let becomes = Arc::clone(&next);
        let pace = Arc::new(Mutex::new(Duration::ZERO));
        let occupied = Arc::clone(&pace);
        passing.spawn(async move {
            let mut datagram = [0; 65_536];
            while let Ok((len, source)) = far.recv_from(&mut datagram).await {
                let occupied = *occupied.lock().unwrap();
                if !occupied.is_zero() {
                    sleep(occupied).await;
                }
                let caller = *client.lock().unwrap();
                if source == *agent.lock().unwrap()
                    && let Some(caller) = caller
                {
                    drop(near.send_to(&datagram[..len], caller).await);
                    let mut next = becomes.lock().unwrap();
                    if let Some((left, to)) = next.as_mut() {
                        *left -= 1;
                        if *left == 0 {
                            *agent.lock().unwrap() = *to;
                            *next = None;
                        }
                    }
                }
            }
        });
        Self { node, now, next, pace, _passing: passing }
    }

    /// The agent in its place is another one as soon as so many more of its datagrams have passed.
    fn leads_to_after(&self, agent: &Agent, datagrams: usize) {
        *self.next.lock().unwrap() = Some((datagrams, agent.node.0));
    }

    /// The agent in its place is another one from now on.
    fn leads_to(&self, agent: &Agent) {
        *self.now.lock().unwrap() = agent.node.0;
    }
}

/// Nothing but a flow's own packets crosses: no keep-alive finds out what the flow is to find out.
fn silent() -> TunnelConfig {
    TunnelConfig {
        quic_keep_alive: Duration::from_secs(60),
        quic_idle: Duration::from_secs(120),
        answer_timeout: Duration::from_secs(60),
        ..config(CarrierChoice::Quic)
    }
}

async fn echo_once(client: &Client, wait: Duration) {
    let (address, mut apps) = application().await;
    let (mut user, app) = pair().await;
    // There before the flow is opened, so that it is sent with OPEN if anything is.
    user.write_all(b"question").await.unwrap();
    app.readable().await.unwrap();
    let mut held = Held::default();
    let opened = timeout(wait, client.open(&app, address, &mut held)).await.expect("it hangs");
    let flow = opened.unwrap();
    let relaying =
        tokio::spawn(async move { crate::relay::relay(app, flow, held, &Live::default()).await });
    let mut service = apps.recv().await.unwrap();
    let mut question = [0; 8];
    service.read_exact(&mut question).await.unwrap();
    assert_eq!(&question, b"question");
    drop((user, service));
    relaying.await.unwrap();
    assert!(apps.try_recv().is_err(), "delivered twice");
}

/// Until the connection to the peer has been silent for so long that a flow asks first.
async fn silence(client: &Client) {
    let pool = client.tunnels.pool(&client.peer);
    until("the connection is quiet", || {
        let now = std::time::Instant::now();
        match pool.acquire(now, false, &mut Vec::new()) {
            Ok(pool::Acquired::Now(pool::Ready::Quic(link))) => link.is_quiet(now),
            _ => panic!("no connection"),
        }
    })
    .await;
}

#[tokio::test]
async fn the_next_flow_reaches_an_agent_that_was_started_again() {
    let (ours, theirs) = holdings(&Ca::new());
    let key = ResetKey::random().unwrap();
    let start = || Agent::start_after(&theirs, silent(), Serves::OnlyQuic, key.clone());
    let before = start().await;
    let wire = Wire::to(&before).await;
    let client = Client::new(&ours, silent(), wire.node);
    echo_once(&client, Duration::from_secs(10)).await;
    let after = start().await;
    silence(&client).await;
    wire.leads_to(&after);
    echo_once(&client, Duration::from_secs(2)).await;
    assert_eq!((before.seen().len(), after.seen().len()), (1, 1));
}

#[tokio::test]
async fn a_flow_that_runs_is_reset_by_the_agent_that_was_started_again() {
    let (ours, theirs) = holdings(&Ca::new());
    let key = ResetKey::random().unwrap();
    let start = || Agent::start_after(&theirs, silent(), Serves::OnlyQuic, key.clone());
    let before = start().await;
    let wire = Wire::to(&before).await;
    let client = Client::new(&ours, silent(), wire.node);
    let (address, mut apps) = application().await;
    let (mut user, relaying) = client.connect(address).await;
    user.write_u8(1).await.unwrap();
    let mut service = apps.recv().await.unwrap();
    assert_eq!(service.read_u8().await.unwrap(), 1);
    service.write_u8(1).await.unwrap();
    assert_eq!(user.read_u8().await.unwrap(), 1);
    let after = start().await;
    wire.leads_to(&after);
    user.write_u8(2).await.unwrap();
    let read = timeout(Duration::from_secs(2), user.read_u8()).await.expect("it hangs");
    assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(relaying.await.unwrap().unwrap().outcome.reason(), "tunnel_lost");
}

#[tokio::test]
async fn payload_that_may_have_arrived_is_not_sent_again() {
    let (ours, theirs) = holdings(&Ca::new());
    let key = ResetKey::random().unwrap();
    let start = || Agent::start_after(&theirs, silent(), Serves::OnlyQuic, key.clone());
    let before = start().await;
    let wire = Wire::to(&before).await;
    let client = Client::new(&ours, silent(), wire.node);
    let after = start().await;
    echo_once(&client, Duration::from_secs(10)).await;
    let (address, mut apps) = application().await;
    let (mut user, app) = pair().await;
    user.write_all(b"question").await.unwrap();
    app.readable().await.unwrap();
    // The peer was heard a moment ago: the payload goes along.
    wire.leads_to(&after);
    let error = client.open(&app, address, &mut Held::default()).await.unwrap_err();
    assert_eq!(error.reason(), "tunnel_lost", "{error:?}");
    assert!(!error.may_retry());
    assert!(apps.try_recv().is_err());
}

/// The successor listens already, and the agent that drains has yet to close its listeners: the kernel
/// chooses between them.
#[tokio::test]
async fn fresh_carriers_to_an_agent_that_drains_are_followed_by_others_until_one_is_taken() {
    for carrier in [CarrierChoice::Lane, CarrierChoice::Quic] {
        let (agent, client) = world(carrier).await;
        agent.behave(Behaviour::RefuseFirst(9, Reason::Draining));
        exchange(&client, cleanly).await;
        assert_eq!(agent.seen().len(), 10, "{carrier:?}");
    }
}

#[tokio::test]
async fn agent_that_goes_on_draining_is_given_up() {
    for carrier in [CarrierChoice::Lane, CarrierChoice::Quic] {
        let (agent, client) = world(carrier).await;
        agent.behave(Behaviour::Refuse(Reason::Draining));
        let (_user, app) = pair().await;
        let to = "10.0.0.2:80".parse().unwrap();
        let error = client.open(&app, to, &mut Held::default()).await.unwrap_err();
        assert_eq!(error.reason(), "draining", "{carrier:?}");
        let asked = agent.seen().len();
        assert!((5..40).contains(&asked), "{carrier:?}: {asked} times");
    }
}

/// The client may have any part of the agent's first flight.
#[tokio::test]
async fn agent_that_dies_in_a_handshake_is_followed_by_the_next_one_soon() {
    let (ours, theirs) = holdings(&Ca::new());
    let key = ResetKey::random().unwrap();
    let usual = || config(CarrierChoice::Quic);
    let start = || Agent::start_after(&theirs, usual(), Serves::OnlyQuic, key.clone());
    for datagrams in 1..4 {
        let (before, after) = (start().await, start().await);
        let wire = Wire::to(&before).await;
        wire.leads_to_after(&after, datagrams);
        let client = Client::new(&ours, usual(), wire.node);
        let served = async {
            let (address, _apps) = application().await;
            let (mut user, app) = pair().await;
            user.write_all(b"question").await.unwrap();
            app.readable().await.unwrap();
            // Lost with the agent, if it went so far; the next one is not.
            while after.seen().is_empty() {
                drop(client.open(&app, address, &mut Held::default()).await);
                // An attempt while the peer is avoided has nothing to wait for.
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(4), served).await.expect("it hangs");
        assert!(datagrams > 1 || before.seen().is_empty(), "the handshake was over");
    }
}

/// It has seen its connection succeed: an alert or an end tells it to go elsewhere, a reset tells it nothing.
#[tokio::test]
async fn who_waits_to_be_accepted_when_the_drain_begins_is_not_reset() {
    let (_, theirs) = holdings(&Ca::new());
    let (address, lanes) = closed_port();
    let listener = lanes.listen(BACKLOG).unwrap();
    let mut early = TcpStream::connect(address).await.unwrap();
    let (stats, tickets) = (Arc::default(), TicketKeys::new().unwrap());
    let config = config(CarrierChoice::Lane);
    let tunnels = Tunnels::new(config, tickets, theirs.credentials(), stats).unwrap();
    let (_drain, draining) = watch::channel(true);
    let serving = tokio::spawn(tunnels.serve_lanes(listener, draining, |_request| async {}));
    early.write_all(b"not a handshake").await.unwrap();
    let mut said = Vec::new();
    early.read_to_end(&mut said).await.unwrap();
    assert!(!said.is_empty(), "an alert");
    serving.await.unwrap().unwrap();
}

/// Both applications have ended, and the wire is slower than they were.
#[tokio::test]
async fn what_a_flow_has_still_to_deliver_when_it_has_ended_survives_the_drain() {
    const ALL: usize = 512 * 1024;
    let (ours, theirs) = holdings(&Ca::new());
    let agent = Agent::start_with(&theirs, silent(), Serves::OnlyQuic).await;
    let wire = Wire::to(&agent).await;
    let client = Client::new(&ours, silent(), wire.node);
    let (address, mut apps) = application().await;
    let (mut user, _relaying) = client.connect(address).await;
    user.write_u8(1).await.unwrap();
    user.shutdown().await.unwrap();
    let mut service = apps.recv().await.unwrap();
    let mut asked = Vec::new();
    service.read_to_end(&mut asked).await.unwrap();
    *wire.pace.lock().unwrap() = Duration::from_millis(10);
    service.write_all(&vec![7; ALL]).await.unwrap();
    drop(service);
    agent.drain.send_replace(true);
    let mut answer = Vec::new();
    let read = timeout(Duration::from_secs(60), user.read_to_end(&mut answer));
    read.await.expect("it hangs").unwrap();
    assert_eq!((asked.len(), answer.len()), (1, ALL));
}
