//! What crosses, and how it ends: the same facts for both carriers.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_core::wire::ResetReason;
use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::world::*;
use crate::relay::{Outcome, RelayEnd};
use crate::tunnel::*;

type Connection = JoinHandle<Result<RelayEnd, OpenError>>;

/// Declares each fact once and tests it on both carriers.
macro_rules! on_both_carriers {
    ($($name:ident),* $(,)?) => {
        mod lane {
            $(#[tokio::test] async fn $name() { super::$name(super::CarrierChoice::Lane).await; })*
        }
        mod quic {
            $(#[tokio::test] async fn $name() { super::$name(super::CarrierChoice::Quic).await; })*
        }
    };
}

on_both_carriers!(
    bytes_cross_unchanged_both_ways_at_once,
    single_bytes_cross,
    a_server_may_speak_first,
    the_client_ends_first,
    the_server_ends_first,
    a_reset_of_the_client_crosses,
    a_reset_of_the_server_crosses,
    a_reset_crosses_after_the_end_of_the_other_direction,
    last_words_in_front_of_a_reset_cross,
    a_crashed_peer_is_an_error_and_not_an_end,
    a_slow_reader_stops_the_writer,
    the_server_knows_the_caller_and_the_destination,
    closing_with_data_in_flight_loses_nothing,
    a_small_flow_is_served_beside_bulk,
);

async fn connected(carrier: CarrierChoice) -> (Agent, Client, TcpStream, TcpStream, Connection) {
    let (agent, client) = world(carrier).await;
    let (address, mut apps) = application().await;
    let (user, app, connection) = through(&client, address, &mut apps).await;
    (agent, client, user, app, connection)
}

async fn through(
    client: &Client,
    address: SocketAddr,
    apps: &mut UnboundedReceiver<TcpStream>,
) -> (TcpStream, TcpStream, Connection) {
    let (user, connection) = client.connect(address).await;
    let app = apps.recv().await.unwrap();
    (user, app, connection)
}

/// A fixed generator (Knuth's MMIX constants).
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        bytes.extend_from_slice(&state.to_be_bytes());
    }
    bytes.truncate(len);
    bytes
}

async fn ended(connection: Connection) -> RelayEnd {
    timeout(Duration::from_secs(20), connection).await.unwrap().unwrap().unwrap()
}

fn reset(socket: TcpStream) {
    SockRef::from(&socket).set_linger(Some(Duration::ZERO)).unwrap();
}

async fn read_error(socket: &mut TcpStream) -> io::ErrorKind {
    let mut rest = Vec::new();
    let read = timeout(Duration::from_secs(30), socket.read_to_end(&mut rest)).await.unwrap();
    read.expect_err("a clean end").kind()
}

async fn bytes_cross_unchanged_both_ways_at_once(carrier: CarrierChoice) {
    const LEN: usize = 50 << 20;
    let (_agent, _client, user, app, connection) = connected(carrier).await;
    let there = noise(1, LEN);
    let back = noise(2, LEN);
    let exchange = |socket: TcpStream, send: Vec<u8>| async move {
        let (mut read, mut write) = socket.into_split();
        let sending = tokio::spawn(async move {
            write.write_all(&send).await.unwrap();
            write.shutdown().await.unwrap();
        });
        let mut received = Vec::with_capacity(LEN);
        read.read_to_end(&mut received).await.unwrap();
        sending.await.unwrap();
        received
    };
    let (at_user, at_app) =
        tokio::join!(exchange(user, there.clone()), exchange(app, back.clone()));
    assert!(at_app == there, "client to server");
    assert!(at_user == back, "server to client");
    let len = LEN as u64;
    let end = ended(connection).await;
    assert_eq!(end, RelayEnd { sent: len, received: len, outcome: Outcome::Clean });
}

async fn single_bytes_cross(carrier: CarrierChoice) {
    let (_agent, _client, mut user, mut app, _connection) = connected(carrier).await;
    user.set_nodelay(true).unwrap();
    app.set_nodelay(true).unwrap();
    for byte in 0..=255u8 {
        user.write_u8(byte).await.unwrap();
        assert_eq!(app.read_u8().await.unwrap(), byte);
        app.write_u8(!byte).await.unwrap();
        assert_eq!(user.read_u8().await.unwrap(), !byte);
    }
}

async fn a_server_may_speak_first(carrier: CarrierChoice) {
    let (_agent, _client, mut user, mut app, _connection) = connected(carrier).await;
    app.write_all(b"220 ready").await.unwrap();
    let mut greeting = [0; 9];
    user.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"220 ready");
}

async fn the_client_ends_first(carrier: CarrierChoice) {
    let (_agent, _client, mut user, mut app, connection) = connected(carrier).await;
    user.write_all(b"question").await.unwrap();
    user.shutdown().await.unwrap();
    let mut question = String::new();
    app.read_to_string(&mut question).await.unwrap();
    assert_eq!(question, "question");
    app.write_all(b"answer").await.unwrap();
    drop(app);
    let mut answer = String::new();
    user.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "answer");
    assert_eq!(ended(connection).await.outcome, Outcome::Clean);
}

async fn the_server_ends_first(carrier: CarrierChoice) {
    let (_agent, _client, mut user, mut app, connection) = connected(carrier).await;
    app.write_all(b"news").await.unwrap();
    app.shutdown().await.unwrap();
    let mut news = String::new();
    user.read_to_string(&mut news).await.unwrap();
    assert_eq!(news, "news");
    user.write_all(b"thanks").await.unwrap();
    user.shutdown().await.unwrap();
    let mut thanks = String::new();
    app.read_to_string(&mut thanks).await.unwrap();
    assert_eq!(thanks, "thanks");
    assert_eq!(ended(connection).await.outcome, Outcome::Clean);
}

async fn a_reset_of_the_client_crosses(carrier: CarrierChoice) {
    let (_agent, _client, mut user, mut app, connection) = connected(carrier).await;
    user.write_all(b"x").await.unwrap();
    assert_eq!(app.read_u8().await.unwrap(), b'x');
    reset(user);
    assert_eq!(read_error(&mut app).await, io::ErrorKind::ConnectionReset);
    let outcome = ended(connection).await.outcome;
    assert_eq!(outcome, Outcome::ApplicationReset(ResetReason::Application));
}

async fn a_reset_of_the_server_crosses(carrier: CarrierChoice) {
    let (_agent, _client, mut user, mut app, connection) = connected(carrier).await;
    user.write_all(b"x").await.unwrap();
    assert_eq!(app.read_u8().await.unwrap(), b'x');
    reset(app);
    assert_eq!(read_error(&mut user).await, io::ErrorKind::ConnectionReset);
    let outcome = ended(connection).await.outcome;
    assert_eq!(outcome, Outcome::PeerReset(ResetReason::Application));
}

async fn a_reset_crosses_after_the_end_of_the_other_direction(carrier: CarrierChoice) {
    let (_agent, _client, mut user, mut app, connection) = connected(carrier).await;
    user.write_all(b"x").await.unwrap();
    user.shutdown().await.unwrap();
    let mut all = Vec::new();
    app.read_to_end(&mut all).await.unwrap();
    // The client's direction has ended, and nothing flows.
    reset(user);
    until("the server's application sees it", || app.take_error().unwrap().is_some()).await;
    let outcome = ended(connection).await.outcome;
    assert_eq!(outcome, Outcome::ApplicationReset(ResetReason::Application));
}

/// A server that does not read a request to its end has answered it all the same, and so may a client.
async fn last_words_in_front_of_a_reset_cross(carrier: CarrierChoice) {
    for (of_server, uploads) in [(true, false), (true, true), (false, false), (false, true)] {
        let (_agent, _client, mut user, mut app, connection) = connected(carrier).await;
        user.write_all(b"x").await.unwrap();
        assert_eq!(app.read_u8().await.unwrap(), b'x');
        let (from, mut to) = if of_server { (app, user) } else { (user, app) };
        if uploads {
            fill(&mut to).await;
        }
        from.writable().await.unwrap();
        // Nothing else happens in between, so that agents find both at once.
        assert_eq!(from.try_write(b"answer").unwrap(), 6);
        reset(from);
        let mut said = Vec::new();
        let end = timeout(Duration::from_secs(30), to.read_to_end(&mut said)).await.unwrap();
        let told = format!("of the server: {of_server}, in an upload: {uploads}");
        assert_eq!(String::from_utf8_lossy(&said), "answer", "{told}");
        assert_eq!(end.unwrap_err().kind(), io::ErrorKind::ConnectionReset, "{told}");
        let outcome = ended(connection).await.outcome;
        let expected = match of_server {
            true => Outcome::PeerReset(ResetReason::Application),
            false => Outcome::ApplicationReset(ResetReason::Application),
        };
        assert_eq!(outcome, expected, "{told}");
    }
}

/// Writes until nothing on the way takes any more.
async fn fill(socket: &mut TcpStream) {
    let chunk = vec![7; 1 << 20];
    while timeout(Duration::from_millis(500), socket.write(&chunk)).await.is_ok() {}
}

async fn a_crashed_peer_is_an_error_and_not_an_end(carrier: CarrierChoice) {
    let (mut agent, _client, mut user, mut app, connection) = connected(carrier).await;
    user.write_all(b"x").await.unwrap();
    assert_eq!(app.read_u8().await.unwrap(), b'x');
    // Every task of the agent is dropped where it stands.
    agent.tasks.shutdown().await;
    assert_eq!(read_error(&mut user).await, io::ErrorKind::ConnectionReset);
    assert_eq!(read_error(&mut app).await, io::ErrorKind::ConnectionReset);
    assert_ne!(ended(connection).await.outcome, Outcome::Clean);
}

async fn a_slow_reader_stops_the_writer(carrier: CarrierChoice) {
    let (_agent, _client, mut user, app, _connection) = connected(carrier).await;
    let chunk = vec![0; 1 << 20];
    let mut written: u64 = 0;
    // The kernel's buffers of three sockets and QUIC's window; 256 MiB would mean no limit at all.
    while let Ok(len) = timeout(Duration::from_secs(1), user.write(&chunk)).await {
        written += len.unwrap() as u64;
        assert!(written < 256 << 20, "nobody reads, and {written} bytes were taken");
    }
    drop(app);
}

async fn the_server_knows_the_caller_and_the_destination(carrier: CarrierChoice) {
    let (agent, _client, _user, app, _connection) = connected(carrier).await;
    let seen = agent.seen();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].caller, id(CALLER));
    assert_eq!(seen[0].served_as, id(SERVICE));
    assert_eq!(seen[0].open, open_to(app.local_addr().unwrap()));
}

async fn closing_with_data_in_flight_loses_nothing(carrier: CarrierChoice) {
    const LEN: usize = 8 << 20;
    let (_agent, _client, mut user, mut app, connection) = connected(carrier).await;
    let sent = noise(3, LEN);
    let expected = sent.clone();
    let writer = tokio::spawn(async move {
        user.write_all(&sent).await.unwrap();
        // Closed with most of it on its way still.
        drop(user);
    });
    let mut received = Vec::new();
    app.read_to_end(&mut received).await.unwrap();
    assert!(received == expected, "{} of {LEN} bytes", received.len());
    writer.await.unwrap();
    drop(app);
    assert_eq!(ended(connection).await.outcome, Outcome::Clean);
}

async fn a_small_flow_is_served_beside_bulk(carrier: CarrierChoice) {
    let (_agent, client) = world(carrier).await;
    let (address, mut apps) = application().await;
    for _ in 0..2 {
        let (mut user, mut app, _connection) = through(&client, address, &mut apps).await;
        tokio::spawn(async move {
            let chunk = vec![0; 1 << 20];
            while user.write_all(&chunk).await.is_ok() {}
        });
        tokio::spawn(async move {
            let mut chunk = vec![0; 1 << 20];
            while matches!(app.read(&mut chunk).await, Ok(1..)) {}
        });
    }
    let (mut user, mut app, _connection) = through(&client, address, &mut apps).await;
    let echo = async {
        for _ in 0..100 {
            user.write_u8(1).await.unwrap();
            app.read_u8().await.unwrap();
        }
    };
    // Starved it would never come back; with a fair share each takes milliseconds at most, here where
    // applications and both agents are one thread.
    timeout(Duration::from_secs(10), echo).await.expect("starved");
}
