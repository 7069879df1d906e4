//! Peers that have a certificate, and mean no good.

use std::net::Ipv4Addr;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use mesh_core::wire::Reason;
use socket2::SockRef;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpSocket;
use tokio::runtime::Builder;
use tokio::time::timeout;

use super::pool::raw_lane;
use super::world::*;
use crate::tunnel::*;

const SOON: Duration = Duration::from_secs(10);

/// A DATA frame (`mesh_core::wire`).
fn data(len: u32) -> Vec<u8> {
    let [_, high, middle, low] = len.to_be_bytes();
    let mut frame = vec![3, high, middle, low];
    frame.resize(frame.len() + usize::try_from(len).unwrap(), 7);
    frame
}

/// What the peer says last is that the lane ends, behind bytes that the application does not take; then it
/// resets. A relay that went on asking would keep its worker for ever.
#[test]
fn lane_that_is_closed_and_reset_behind_bytes_that_nobody_takes_ends_its_flow() {
    let (done, ended) = mpsc::channel();
    // Not in the test's own thread: a worker that spins cannot even be dropped.
    thread::spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(close_behind_bytes_that_nobody_takes());
        done.send(())
    });
    ended.recv_timeout(6 * SOON).expect("the flow goes on for ever");
}

async fn close_behind_bytes_that_nobody_takes() {
    let ca = Ca::new();
    let (agent, _client) = world_with(&ca, config(CarrierChoice::Lane)).await;
    // So that little is enough.
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let listener = socket.listen(BACKLOG).unwrap();
    let mut lane = raw_lane(&ca, &agent).await;
    lane.codec.queue(&open_to(listener.local_addr().unwrap()).encode()).unwrap();
    lane.flush().await.unwrap();
    let (app, _) = listener.accept().await.unwrap();
    // The agent always has something to send to the peer, which does not read.
    let (_app_reads, mut app_writes) = app.into_split();
    let writing =
        tokio::spawn(async move { while app_writes.write_all(&[7; 1 << 16]).await.is_ok() {} });
    let ours = lane.tcp.local_addr().unwrap().port();
    let theirs = lane.tcp.peer_addr().unwrap().port();
    // Until some of it stays with the agent unread.
    let frame = data(1 << 16);
    let left = loop {
        lane.codec.queue(&frame).unwrap();
        timeout(SOON, lane.flush()).await.expect("there is room").unwrap();
        tokio::time::sleep(SOON / 200).await;
        let (_, left) = queues(theirs, ours);
        tokio::time::sleep(SOON / 200).await;
        if left > 0 && queues(theirs, ours).1 == left {
            break left;
        }
    };
    lane.codec.queue_close();
    lane.flush().await.unwrap();
    while queues(ours, theirs).0 > 0 {
        tokio::task::yield_now().await;
    }
    assert!(queues(theirs, ours).1 > left, "the end lies behind it");
    SockRef::from(&lane.tcp).set_linger(Some(Duration::ZERO)).unwrap();
    drop(lane);
    timeout(SOON, writing).await.expect("the application hears nothing").unwrap();
}

/// Bytes of the socket with these ports that the other end has not acknowledged, and that were not read
/// (proc(5)).
fn queues(local: u16, remote: u16) -> (u64, u64) {
    let sockets = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let mut found = sockets.lines().skip(1).filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let is_it = fields[1].ends_with(&format!(":{local:04X}"))
            && fields[2].ends_with(&format!(":{remote:04X}"));
        let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
        is_it.then(|| (number(&fields[4][..8]), number(&fields[4][9..])))
    });
    found.next().unwrap()
}

#[tokio::test]
async fn client_to_which_nothing_may_be_said_is_not_waited_for() {
    let ca = Ca::new();
    let (ours, theirs) = holdings(&ca);
    let agent = Agent::start(&theirs, config(CarrierChoice::Quic)).await;
    agent.behave(Behaviour::Refuse(Reason::ConnectionRefused));
    // A peer that gives no room on any stream, and takes its time.
    let silent = TunnelConfig { quic_stream_window: 0, ..config(CarrierChoice::Quic) };
    let client = Client::new(&ours, silent, agent.node);
    let ready = client.tunnels.acquire(&client.tunnels.pool(&client.peer), false).await.unwrap();
    let pool::Ready::Quic(link) = ready else { panic!("{ready:?}") };
    for behaviour in [Behaviour::Refuse(Reason::ConnectionRefused), Behaviour::Vanish] {
        agent.behave(behaviour);
        let (mut send, mut recv) = link.connection().open_bi().await.unwrap();
        send.write_all(&open_to("127.0.0.1:1".parse().unwrap()).encode()).await.unwrap();
        let ended = timeout(Duration::from_secs(8), recv.read(&mut [0; 1])).await;
        ended.expect("it is waited for").expect_err("it was answered");
    }
}
