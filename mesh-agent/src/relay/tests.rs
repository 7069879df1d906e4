//! Two applications on one node: socket to socket. The carriers are tested with the tunnel.

use std::net::Ipv4Addr;
use std::sync::Arc;

use futures_util::FutureExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::turn::BUDGET_ALONE;
use super::*;

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (ours, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    (ours.unwrap(), accepted.unwrap().0)
}

/// Both applications, and the relay between them.
async fn relayed() -> (TcpStream, TcpStream, JoinHandle<RelayEnd>, Arc<Live>) {
    let (client, app) = pair().await;
    let (server, far) = pair().await;
    let live = Arc::new(Live::default());
    let seen = Arc::clone(&live);
    let relaying =
        tokio::spawn(async move { relay(app, Flow::Local(far), Held::default(), &live).await });
    (client, server, relaying, seen)
}

async fn read_all(socket: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    socket.read_to_end(&mut all).await.map(|_len| all)
}

#[tokio::test]
async fn each_direction_ends_by_itself() {
    let (mut client, mut server, relaying, live) = relayed().await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut server).await.unwrap(), b"question");
    server.write_all(b"answer!").await.unwrap();
    drop(server);
    assert_eq!(read_all(&mut client).await.unwrap(), b"answer!");
    let end = relaying.await.unwrap();
    assert_eq!(end, RelayEnd { sent: 8, received: 7, outcome: Outcome::Clean });
    assert_eq!((live.sent.load(Relaxed), live.received.load(Relaxed)), (8, 7));
}

#[tokio::test]
async fn a_reset_crosses_in_either_direction_and_state() {
    for from_client in [true, false] {
        for half_closed in [true, false] {
            let (client, server, relaying, _live) = relayed().await;
            let (mut from, mut to) = if from_client { (client, server) } else { (server, client) };
            from.write_all(b"x").await.unwrap();
            assert_eq!(to.read_u8().await.unwrap(), b'x');
            if half_closed {
                from.shutdown().await.unwrap();
                assert_eq!(read_all(&mut to).await.unwrap(), b"");
            }
            SockRef::from(&from).set_linger(Some(Duration::ZERO)).unwrap();
            drop(from);
            let outcome = relaying.await.unwrap().outcome;
            let expected = if from_client { "application_reset" } else { "peer_reset" };
            assert_eq!(outcome.reason(), expected, "half closed: {half_closed}");
            // The end that was read already hides the error from a read; the socket has it.
            let error = to.take_error().unwrap().map(|error| error.kind());
            let broken = [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe];
            assert!(error.is_some_and(|kind| broken.contains(&kind)), "{error:?}");
        }
    }
}

/// Whoever resets has answered before, while the other end still writes.
#[tokio::test]
async fn last_words_in_front_of_a_reset_cross() {
    for from_client in [true, false] {
        let (client, server, relaying, _live) = relayed().await;
        let (from, mut to) = if from_client { (client, server) } else { (server, client) };
        let chunk = vec![7; 1 << 20];
        while timeout(Duration::from_millis(500), to.write(&chunk)).await.is_ok() {}
        from.writable().await.unwrap();
        assert_eq!(from.try_write(b"answer").unwrap(), 6);
        SockRef::from(&from).set_linger(Some(Duration::ZERO)).unwrap();
        drop(from);
        let mut said = Vec::new();
        let end = to.read_to_end(&mut said).await;
        assert_eq!(String::from_utf8_lossy(&said), "answer", "from the client: {from_client}");
        assert_eq!(end.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        let expected = if from_client { "application_reset" } else { "peer_reset" };
        assert_eq!(relaying.await.unwrap().outcome.reason(), expected);
    }
}

/// The answer and the reset come between the runtime's looks: it knows of the upload, and of nothing else.
#[tokio::test]
async fn last_words_that_the_runtime_has_not_heard_of_cross() {
    let ((mut client, app), (server, far)) = (pair().await, pair().await);
    let live = Live::default();
    let mut relaying = relay(app, Flow::Local(far), Held::default(), &live);
    assert!((&mut relaying).now_or_never().is_none());
    client.write_all(b"upload").await.unwrap();
    server.writable().await.unwrap();
    // So that the runtime asks the kernel of all of them.
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(server.try_write(b"answer").unwrap(), 6);
    SockRef::from(&server).set_linger(Some(Duration::ZERO)).unwrap();
    drop(server);
    let end = relaying.await;
    assert_eq!(end.outcome.reason(), "peer_reset");
    let mut said = Vec::new();
    let read = client.read_to_end(&mut said).await;
    assert_eq!(String::from_utf8_lossy(&said), "answer");
    assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_relay_that_is_dropped_resets_both() {
    let (mut client, mut server, relaying, _live) = relayed().await;
    client.write_all(b"x").await.unwrap();
    assert_eq!(server.read_u8().await.unwrap(), b'x');
    relaying.abort();
    for socket in [&mut client, &mut server] {
        let error = read_all(socket).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn much_crosses_unchanged_past_a_slow_reader() {
    const LEN: usize = 16 << 20;
    let (mut client, mut server, relaying, _live) = relayed().await;
    let sent: Vec<u8> = (0..LEN).map(|at| (at % 251).to_le_bytes()[0]).collect();
    let expected = sent.clone();
    tokio::spawn(async move {
        client.write_all(&sent).await.unwrap();
    });
    let mut received = Vec::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        tokio::task::yield_now().await;
        match server.read(&mut piece).await.unwrap() {
            0 => break,
            len => received.extend_from_slice(&piece[..len]),
        }
    }
    assert!(received == expected, "{} bytes", received.len());
    drop(server);
    assert_eq!(relaying.await.unwrap().outcome, Outcome::Clean);
}

#[tokio::test]
async fn a_relay_is_a_small_task() {
    let ((_client, app), (_server, far)) = (pair().await, pair().await);
    let live = Live::default();
    let future = relay(app, Flow::Local(far), Held::default(), &live);
    let size = size_of_val(&future);
    assert!(size <= 2048, "{size} bytes for every connection");
}

#[test]
fn the_only_flow_in_bulk_has_the_long_turn() {
    let (mut one, mut other, mut small) = (Turn::default(), Turn::default(), Turn::default());
    let look = |turn: &mut Turn, len: usize| {
        turn.begin();
        let budget = turn.left();
        turn.copied(len);
        turn.end();
        budget
    };
    assert_eq!(look(&mut one, BUDGET_ALONE), BUDGET_ALONE);
    assert_eq!(look(&mut one, BUDGET_ALONE), BUDGET_ALONE, "it does not count itself");
    assert_eq!(look(&mut small, 64), BUDGET);
    assert_eq!(look(&mut other, BUDGET), BUDGET);
    assert_eq!(look(&mut one, BUDGET), BUDGET);
    // Small exchanges are no bulk, and neither is who has ended.
    assert_eq!(look(&mut one, 64), BUDGET);
    drop(other);
    assert_eq!(look(&mut one, 64), BUDGET_ALONE);
    assert_eq!(look(&mut small, 64), BUDGET_ALONE);
}
