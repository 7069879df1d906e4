//! Every way for a program to end, met by every other.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use harness::{Carrier, Family, Mesh, Serve, has_failed, linger_zero, wait};

use crate::{carriers, joined, mesh, wait_until_idle};

/// How a program that has sent and received something goes on.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Manner {
    /// Closes, having read everything.
    Close,
    /// Closes without having read: the kernel makes that a reset.
    CloseUnread,
    /// Resets.
    Reset,
    /// Ends sending, and reads on.
    HalfThenRead,
    /// Ends sending, and resets later.
    HalfThenReset,
    /// Reads to the end, and writes then.
    Wait,
}

impl Manner {
    const ALL: [Self; 6] = [
        Self::Close,
        Self::CloseUnread,
        Self::Reset,
        Self::HalfThenRead,
        Self::HalfThenReset,
        Self::Wait,
    ];

    /// Long enough for anything to arrive, so that what is seen does not depend on who is faster.
    const SETTLE: Duration = Duration::from_millis(600);

    /// Does it, and tells what could be seen.
    fn behave(self, mut stream: TcpStream) -> Result<String> {
        stream.set_read_timeout(Some(Self::SETTLE * 8))?;
        stream.write_all(&[1; 1000])?;
        // What the other one has sent is there, and read or not.
        wait::until(wait::SOON, "what the other one has sent", || {
            stream.peek(&mut [0; 1000]).is_ok_and(|there| there == 1000)
        })?;
        thread::sleep(Self::SETTLE);
        let mut seen = String::new();
        match self {
            Self::Close | Self::Reset => {
                stream.read_exact(&mut [0; 1000])?;
                thread::sleep(Self::SETTLE);
            }
            Self::CloseUnread => thread::sleep(Self::SETTLE),
            Self::HalfThenRead => {
                stream.shutdown(Shutdown::Write)?;
                seen = read_all(&mut stream);
            }
            Self::HalfThenReset => {
                stream.shutdown(Shutdown::Write)?;
                thread::sleep(Self::SETTLE * 2);
            }
            Self::Wait => {
                seen = read_all(&mut stream);
                thread::sleep(Self::SETTLE * 4);
                for _ in 0..2 {
                    let written = stream.write(&[1]).map_err(|error| error.kind());
                    seen = format!("{seen}, {written:?}");
                    wait_for_error(&stream, Self::SETTLE * 4)?;
                }
            }
        }
        if matches!(self, Self::Reset | Self::HalfThenReset) {
            linger_zero(&stream)?;
        }
        Ok(seen)
    }
}

/// Waits until the kernel has an error for who writes, or as long as one may take to come.
fn wait_for_error(stream: &TcpStream, limit: Duration) -> Result<()> {
    let until = Instant::now() + limit;
    while !has_failed(stream)? && Instant::now() < until {
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// How much comes, and how it ends.
fn read_all(stream: &mut TcpStream) -> String {
    let mut bytes = 0;
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return format!("{bytes} bytes and the end"),
            Ok(n) => bytes += n,
            Err(error) => return format!("{bytes} bytes and {:?}", error.kind()),
        }
    }
}

/// Where two programs meet: from whom, to whom, and by which family.
#[derive(Clone, Copy)]
struct Place<'a> {
    mesh: &'a Mesh,
    from: &'a str,
    to: &'a str,
    family: Family,
    /// Whether the kernel connects them.
    is_direct: bool,
}

impl Place<'_> {
    /// Both ends of a connection.
    fn open(&self, listener: &TcpListener, port: u16) -> Result<[TcpStream; 2]> {
        let to = self.mesh.pod(self.to).addr(self.family, port);
        listener.set_nonblocking(true)?;
        let once = || -> Result<[TcpStream; 2]> {
            let dialled = self.mesh.pod(self.from).connect(to)?;
            let accept = || listener.accept().ok();
            let (accepted, _) = wait::until_some(wait::SOON, "the other end", accept)?;
            accepted.set_nonblocking(false)?;
            Ok([dialled, accepted])
        };
        if !self.is_direct {
            return once();
        }
        wait::until_some(wait::SOON, "a direct connection", || {
            let [dialled, accepted] = once().ok()?;
            let [from, seen] = [dialled.local_addr().ok()?, accepted.peer_addr().ok()?];
            let is_direct =
                from.port() == seen.port() && from.ip().to_canonical() == seen.ip().to_canonical();
            is_direct.then_some([dialled, accepted])
        })
    }
}

/// What two programs see of each other, for each pair of manners of which one is watched.
fn manners(place: Place<'_>) -> Result<Vec<String>> {
    let watches = |manner| matches!(manner, Manner::HalfThenRead | Manner::Wait);
    let all = Manner::ALL.into_iter().flat_map(|client| Manner::ALL.map(|server| (client, server)));
    // Two that wait see only who loses patience first.
    let pairs = all.filter(|&(client, server)| {
        (watches(client) || watches(server)) && (client, server) != (Manner::Wait, Manner::Wait)
    });
    let meet = |port: u16, client: Manner, server: Manner| -> Result<String> {
        let listener = place.mesh.pod(place.to).listen(port)?;
        let [dialled, accepted] = place.open(&listener, port)?;
        let (seen, other) = thread::scope(|scope| {
            let dialling = scope.spawn(|| client.behave(dialled));
            let accepting = server.behave(accepted);
            (joined(dialling), accepting)
        });
        Ok(format!("{client:?} meets {server:?}: {:?} and {:?}", seen?, other?))
    };
    let meet = &meet;
    thread::scope(|scope| {
        let ports = 9000..;
        let running: Vec<_> = ports
            .zip(pairs)
            .map(|(port, (client, server))| scope.spawn(move || meet(port, client, server)))
            .collect();
        running.into_iter().map(joined).collect()
    })
}

#[test]
fn manners_are_seen_as_over_plain_tcp() -> Result<()> {
    harness::require!();
    let plain = Mesh::two_nodes_builder().plain().start()?;
    let (lane, quic) = (mesh(Carrier::Lane)?, mesh(Carrier::Quic)?);
    let [v4, v6] = Family::BOTH;
    let place = |mesh, from, to, family, is_direct| Place { mesh, from, to, family, is_direct };
    // Across the nodes by each carrier, and within one by its agent and without.
    let places = [
        place(&plain, "a1", "b1", v4, false),
        place(&lane, "a1", "b1", v4, false),
        place(&quic, "a1", "b1", v4, false),
        place(&lane, "a1", "a2", v4, false),
        place(&lane, "b1", "b2", v6, true),
    ];
    let [plain, meshed @ ..] = thread::scope(|scope| {
        let meeting = places.map(|place| scope.spawn(move || manners(place)));
        meeting.map(|one| one.join().unwrap())
    });
    let plain = plain?;
    for (seen, name) in meshed.into_iter().zip(["lane", "quic", "local", "direct"]) {
        assert_eq!(plain, seen?, "{name}");
    }
    Ok(())
}

#[test]
fn close_right_after_connect_and_single_bytes_are_harmless() -> Result<()> {
    harness::require!();
    for (carrier, family) in carriers() {
        let mesh = mesh(carrier)?;
        let _server = mesh.pod("b1").serve(8080, Serve::Greet("hi"))?;
        let to = mesh.pod("b1").addr(family, 8080);
        // Says nothing all the while, and is not forgotten.
        let mut silent = mesh.pod("a1").connect(to)?;
        let mut bytewise = mesh.pod("a1").connect(to)?;
        bytewise.read_exact(&mut [0; 2])?;
        for round in 0..200 {
            let stream = mesh.pod("a1").connect(to)?;
            if round % 2 == 0 {
                linger_zero(&stream)?;
            }
        }
        let mut writing = bytewise.try_clone()?;
        let bytes: Vec<u8> = (0..=250).cycle().take(3000).collect();
        let mut back = vec![0; bytes.len()];
        thread::scope(|scope| {
            let written =
                scope.spawn(|| bytes.iter().try_for_each(|byte| writing.write_all(&[*byte])));
            bytewise.read_exact(&mut back)?;
            written.join().unwrap()
        })?;
        ensure!(back == bytes, "{carrier:?}: wrong bytes");
        silent.read_exact(&mut [0; 2])?;
        drop((silent, bytewise, writing));
        wait_until_idle(&mesh)?;
    }
    Ok(())
}
