//! What xtask does inside a cluster's namespaces: it carries the API server's port out of them, and
//! asks the name server.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;

/// Between two questions.
const PATIENCE: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub(crate) struct Forward {
    /// Where to connect, in the namespace that this process is in.
    to: SocketAddr,
}

impl Forward {
    /// Carries every connection that comes to the listener on standard input. A socket stays in the
    /// namespace where it was made: that one listens outside, and this process connects inside.
    ///
    /// # Errors
    ///
    /// Fails if standard input is no listener; otherwise it does not return.
    pub(crate) fn run(&self) -> Result<()> {
        let given = io::stdin().as_fd().try_clone_to_owned().context("no standard input")?;
        let listener = TcpListener::from(given);
        loop {
            // A connection that ended before it was accepted is no reason to end the others.
            let Ok((outside, _)) = listener.accept() else {
                thread::sleep(PATIENCE);
                continue;
            };
            let to = self.to;
            thread::spawn(move || carry(&outside, to));
        }
    }
}

fn carry(outside: &TcpStream, to: SocketAddr) {
    // Nobody listens yet: the other side sees a closed connection, and tries again.
    let Ok(inside) = TcpStream::connect(to) else {
        return;
    };
    thread::scope(|scope| {
        scope.spawn(|| copy(&inside, outside));
        copy(outside, &inside);
    });
}

fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    // An error ends the direction, as the end of the stream does.
    drop(io::copy(&mut from, &mut to));
    drop(to.shutdown(Shutdown::Write));
}

#[derive(Debug, Args)]
pub(crate) struct Ask {
    /// The name server.
    server: SocketAddr,

    /// The name whose address is asked for.
    name: String,

    /// How many seconds to go on asking.
    limit_s: u64,
}

impl Ask {
    /// Asks until there is an answer with an address in it.
    ///
    /// # Errors
    ///
    /// Fails if there is none in time.
    pub(crate) fn run(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(self.limit_s);
        let question = question(&self.name);
        while Instant::now() < deadline {
            // A new socket each time: the way to a service is chosen with the first packet of a flow,
            // and where there was none it is remembered that there is none.
            let asked = Instant::now();
            let socket = UdpSocket::bind("0.0.0.0:0").context("make a socket")?;
            socket.set_read_timeout(Some(PATIENCE)).context("set a time limit")?;
            let mut answer = [0; 512];
            if socket.send_to(&question, self.server).is_ok()
                && let Ok(length) = socket.recv(&mut answer)
                && has_answer(&answer[..length])
            {
                return Ok(());
            }
            thread::sleep(PATIENCE.saturating_sub(asked.elapsed()));
        }
        bail!("{} does not know {}", self.server, self.name)
    }
}

/// RFC 1035 section 4: a header that asks for recursion, and one question of type A.
fn question(name: &str) -> Vec<u8> {
    let mut bytes = vec![0x4d, 0x61, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len()).unwrap_or(63));
        bytes.extend(label.bytes().take(63));
    }
    bytes.extend([0, 0, 1, 0, 1]);
    bytes
}

/// Whether it answers [`question`], without error, and with something.
fn has_answer(bytes: &[u8]) -> bool {
    let [0x4d, 0x61, flags, code, _, _, high, low, ..] = *bytes else {
        return false;
    };
    flags & 0x80 != 0 && code & 15 == 0 && u16::from_be_bytes([high, low]) > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_with_an_address_is_one() {
        let question = question("a.bc");
        assert_eq!(question[12..], *b"\x01a\x02bc\x00\x00\x01\x00\x01");
        assert!(!has_answer(&question));
        let answer = |flags, code, count| {
            let mut bytes = question.clone();
            (bytes[2], bytes[3], bytes[7]) = (flags, code, count);
            bytes
        };
        assert!(has_answer(&answer(0x84, 0, 1)));
        assert!(!has_answer(&answer(0x84, 0, 0)), "nothing");
        assert!(!has_answer(&answer(0x84, 3, 1)), "no such name");
        assert!(!has_answer(&answer(0x84, 0, 1)[..6]), "cut off");
    }
}
