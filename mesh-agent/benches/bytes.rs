//! What a byte costs on its way through an agent: sealed, opened, and copied by a relay.
#![expect(clippy::expect_used, reason = "a benchmark that cannot be set up has nothing to tell")]

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use mesh_agent::relay::relay;
use mesh_agent::telemetry::Live;
use mesh_agent::tunnel::ends::{End, connected};
use mesh_agent::tunnel::{Flow, Held};

/// A small exchange, one full record, and what a relay moves in bulk by one system call.
const SIZES: [usize; 3] = [64, 16 * 1024, 256 * 1024];

fn main() {
    divan::main();
}

/// Both ends of a lane behind the handshake.
fn lane() -> (End, End) {
    connected(true).expect("a handshake")
}

/// Sealed at one end of a lane, and put in front of the other.
#[divan::bench(args = SIZES)]
fn seal(bencher: Bencher<'_, '_>, len: usize) {
    let ((mut client, mut server), plain) = (lane(), vec![7; len]);
    bencher.counter(BytesCount::new(len)).bench_local(|| {
        // In pieces, as the relay does: what a buffer holds.
        for piece in plain.chunks(64 * 1024 - 4) {
            assert!(client.send(black_box(piece), &mut server));
            server.discard();
        }
    });
}

/// The same, and opened at the other end.
#[divan::bench(args = SIZES)]
fn seal_and_open(bencher: Bencher<'_, '_>, len: usize) {
    let ((mut client, mut server), plain) = (lane(), vec![7; len]);
    bencher.counter(BytesCount::new(len)).bench_local(|| {
        for piece in plain.chunks(64 * 1024 - 4) {
            assert!(client.send(black_box(piece), &mut server));
            assert_eq!(server.receive(), piece.len());
        }
    });
}

/// Two applications with a relay on a thread of its own between them.
struct Relayed {
    near: TcpStream,
    far: TcpStream,
    relay: Option<JoinHandle<()>>,
}

impl Relayed {
    fn new() -> Self {
        let (near, app) = pair();
        let (far, other) = pair();
        let relay = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let [app, other] = [app, other].map(|socket| {
                    socket.set_nonblocking(true).expect("not to block");
                    tokio::net::TcpStream::from_std(socket).expect("a socket")
                });
                let live = Live::default();
                relay(app, Flow::Local(other), Held::default(), &live).await;
            });
        });
        Self { near, far, relay: Some(relay) }
    }
}

impl Drop for Relayed {
    fn drop(&mut self) {
        for end in [&self.near, &self.far] {
            end.shutdown(Shutdown::Write).ok();
        }
        if let Some(relay) = self.relay.take() {
            relay.join().ok();
        }
    }
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
    let addr = listener.local_addr().expect("its address");
    let dialled = TcpStream::connect(addr).expect("to connect");
    let (accepted, _) = listener.accept().expect("to accept");
    for socket in [&dialled, &accepted] {
        socket.set_nodelay(true).expect("no delay");
    }
    (dialled, accepted)
}

/// There and back through a relay, between two sockets of this thread.
#[divan::bench(args = SIZES)]
fn relay_loop(bencher: Bencher<'_, '_>, len: usize) {
    let mut relayed = Relayed::new();
    // No more than what the sockets hold: writer and reader are one thread.
    let (sent, mut received) = (vec![7; len], vec![0; len]);
    bencher.counter(BytesCount::new(2 * len)).bench_local(|| {
        relayed.near.write_all(&sent).expect("to send");
        relayed.far.read_exact(&mut received).expect("to receive");
        relayed.far.write_all(&received).expect("to answer");
        relayed.near.read_exact(&mut received).expect("the answer");
    });
}

/// The same without a relay, to compare with.
#[divan::bench(args = SIZES)]
fn without_relay(bencher: Bencher<'_, '_>, len: usize) {
    let (mut near, mut far) = pair();
    let (sent, mut received) = (vec![7; len], vec![0; len]);
    bencher.counter(BytesCount::new(2 * len)).bench_local(|| {
        near.write_all(&sent).expect("to send");
        far.read_exact(&mut received).expect("to receive");
        far.write_all(&received).expect("to answer");
        near.read_exact(&mut received).expect("the answer");
    });
}
