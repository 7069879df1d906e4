//! What tests send, and how they tell whether all of it came.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::panic;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use socket2::{SockRef, Socket};

use crate::sys;

/// The length of a pattern before it repeats: a prime, so that a block that is lost, doubled or
/// swapped cannot look right at any power of two.
const PERIOD: usize = 1_048_573;

/// A stream of bytes in which every place is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern(u64);

impl Pattern {
    /// What clients send.
    pub const CLIENT: Self = Self(0x9e37_79b9_7f4a_7c15);
    /// What servers send.
    pub const SERVER: Self = Self(0xd1b5_4a32_d192_ed03);

    /// One period of it. Made once: whoever exchanges all the time would do little else.
    fn block(self) -> &'static [u8] {
        static CLIENT: OnceLock<Vec<u8>> = OnceLock::new();
        static SERVER: OnceLock<Vec<u8>> = OnceLock::new();
        let made = if self == Self::CLIENT { &CLIENT } else { &SERVER };
        made.get_or_init(|| self.make())
    }

    fn make(self) -> Vec<u8> {
        // xorshift64: any generator without a short cycle would do.
        let mut state = self.0;
        let words = (0..PERIOD.div_ceil(8)).flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        });
        words.take(PERIOD).collect()
    }
}

/// Sends `bytes` bytes of `pattern`, in writes of changing size.
///
/// # Errors
///
/// Fails if a write does.
pub fn send_pattern(stream: &mut impl Write, bytes: u64, pattern: Pattern) -> Result<()> {
    let block = pattern.block();
    let sizes = [1, 1500, 65_536, 16_384, 7, 262_144];
    let mut sent = 0;
    for size in sizes.iter().cycle() {
        let at = place(sent);
        let left = usize::try_from(bytes - sent).unwrap_or(usize::MAX);
        let length = (*size).min(PERIOD - at).min(left);
        if length == 0 {
            break;
        }
        stream
            .write_all(&block[at..at + length])
            .with_context(|| format!("write after {sent} of {bytes} bytes"))?;
        sent += length as u64;
    }
    Ok(())
}

/// Reads to the end and compares every byte.
///
/// # Errors
///
/// Fails at the first byte that differs, and unless exactly `bytes` bytes come.
pub fn receive_pattern(stream: &mut impl Read, bytes: u64, pattern: Pattern) -> Result<()> {
    let block = pattern.block();
    let mut buffer = vec![0; 256 * 1024];
    let mut received: u64 = 0;
    loop {
        let at = place(received);
        let length = buffer.len().min(PERIOD - at);
        let n = stream
            .read(&mut buffer[..length])
            .with_context(|| format!("read after {received} of {bytes} bytes"))?;
        if n == 0 {
            ensure!(received == bytes, "the end came after {received} of {bytes} bytes");
            return Ok(());
        }
        ensure!(
            buffer[..n] == block[at..at + n],
            "wrong bytes between {received} and {}",
            received + n as u64
        );
        received += n as u64;
        ensure!(received <= bytes, "more than {bytes} bytes came");
    }
}

/// Sends `bytes` bytes of `out` and expects as many of `back`, both at once, to the end of both.
///
/// # Errors
///
/// Fails if either direction does.
pub fn exchange_patterns(
    stream: &TcpStream,
    bytes: u64,
    out: Pattern,
    back: Pattern,
) -> Result<()> {
    let mut sending = stream.try_clone().context("clone a stream")?;
    let sender = thread::spawn(move || {
        send_pattern(&mut sending, bytes, out)?;
        sending.shutdown(Shutdown::Write).context("end sending")
    });
    let received = receive_pattern(&mut &*stream, bytes, back);
    let sent = sender.join().unwrap_or_else(|panicked| panic::resume_unwind(panicked));
    // What ends one direction ends the other as well, and what was received tells more.
    received?;
    sent
}

fn place(offset: u64) -> usize {
    usize::try_from(offset % PERIOD as u64).unwrap_or_default()
}

/// Sends `message` and expects it back.
///
/// # Errors
///
/// Fails if something else comes, or nothing.
pub fn exchange(stream: &mut TcpStream, message: &[u8]) -> Result<()> {
    stream.write_all(message).context("send")?;
    let mut answer = vec![0; message.len()];
    stream.read_exact(&mut answer).context("receive")?;
    ensure!(answer == message, "another answer: {:?}", String::from_utf8_lossy(&answer));
    Ok(())
}

/// Writes until the other side takes no more for a second, or `limit` bytes are gone. Returns how many
/// are.
///
/// # Errors
///
/// Fails if a write does.
pub fn fill(stream: &mut TcpStream, limit: usize) -> Result<usize> {
    stream.set_write_timeout(Some(Duration::from_secs(1)))?;
    let block = vec![0; 256 * 1024];
    let mut sent = 0;
    while sent < limit {
        match stream.write(&block) {
            Ok(n) => sent += n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error).context("write to a reader that stalls"),
        }
    }
    Ok(sent)
}

/// Makes the coming `close()` a reset.
///
/// # Errors
///
/// Fails if the option cannot be set.
pub fn linger_zero(stream: &TcpStream) -> Result<()> {
    SockRef::from(stream).set_linger(Some(Duration::ZERO)).context("set SO_LINGER")
}

/// Has the SYN of the coming `connect()` wait for the first bytes (`TCP_FASTOPEN_CONNECT`).
///
/// # Errors
///
/// Fails if the option cannot be set.
pub fn defer_connect(socket: &Socket) -> Result<()> {
    sys::defer_connect(socket).context("set TCP_FASTOPEN_CONNECT")
}

/// Whether the connection was reset, as far as its kernel has heard; whoever writes next is told all the same.
///
/// # Errors
///
/// Fails if the socket cannot be asked.
pub fn has_failed(stream: &TcpStream) -> Result<bool> {
    sys::has_failed(stream).context("poll")
}

/// Whether the connection ends with a reset rather than an end: what a program sees of a crash.
pub fn is_reset(stream: &mut TcpStream) -> bool {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pattern_that_was_sent_is_recognised() {
        let mut wire = Vec::new();
        send_pattern(&mut wire, 3_000_001, Pattern::CLIENT).unwrap();
        receive_pattern(&mut wire.as_slice(), 3_000_001, Pattern::CLIENT).unwrap();
        assert!(receive_pattern(&mut wire.as_slice(), 3_000_001, Pattern::SERVER).is_err());
        assert!(receive_pattern(&mut wire.as_slice(), 3_000_000, Pattern::CLIENT).is_err());
    }

    #[test]
    fn stream_that_is_damaged_is_recognised() {
        let mut wire = Vec::new();
        send_pattern(&mut wire, 300_000, Pattern::CLIENT).unwrap();
        let damaged: [fn(&mut Vec<u8>); 4] = [
            |wire| wire[150_000] ^= 1,
            |wire| drop(wire.drain(65_536..131_072)),
            |wire| wire[..131_072].rotate_left(65_536),
            |wire| wire.truncate(299_999),
        ];
        for damage in damaged {
            let mut wire = wire.clone();
            damage(&mut wire);
            assert!(receive_pattern(&mut wire.as_slice(), 300_000, Pattern::CLIENT).is_err());
        }
    }
}
