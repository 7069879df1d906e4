//! What a peer sends before and behind the handshake, as the fuzzer makes it up.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use mesh_core::wire::{HEADER_LEN, MAX_CONTROL};
use rustls::Error;

use super::buffers::Buf;
use super::ends::{End, FLIGHTS, connected, sessions};
use super::records::Record;
use super::stream;

/// The types of records' contents that TLS 1.3 knows.
const KINDS: [u8; 3] = [23, 22, 21];

/// Records of any kind and in any order from a peer that has the keys, and any bytes from whoever sits
/// between: what is opened is what the peer has sealed, in its order and from its beginning.
///
/// The first byte says which side we are. Then each step is a byte and a length, and so many bytes.
pub fn records(input: &[u8]) {
    let Some((&side, mut input)) = input.split_first() else { return };
    let Some((mut ours, mut peer)) = connected(side & 1 == 0) else { return };
    let (mut sent, mut opened) = (Vec::new(), Vec::new());
    while let Some((&[step, len], rest)) = input.split_first_chunk::<2>() {
        let (content, behind) = rest.split_at(usize::from(len).min(rest.len()));
        input = behind;
        let mut wire = Vec::new();
        match step & 7 {
            // Whatever it likes, under its key.
            kind @ 0..=3 => {
                let (kind, content) = match (KINDS.get(usize::from(kind)), content) {
                    (Some(kind), content) => (*kind, content),
                    (None, [kind, content @ ..]) => (*kind, content),
                    (None, []) => continue,
                };
                // Up to more than a record may hold.
                let content = content.repeat(if step & 0x80 == 0 { 1 } else { 65 });
                sent.extend_from_slice(payload(kind, &content));
                if peer.records.seal_as(kind, &content, &mut peer.outbox).is_err() {
                    return;
                }
            }
            4 => {
                if peer.records.ask_for_update(&mut peer.outbox).is_err() {
                    return;
                }
            }
            5 => wire.extend_from_slice(content),
            6 => {
                if peer.records.seal_as(KINDS[0], content, &mut peer.outbox).is_err() {
                    return;
                }
                sent.extend_from_slice(content);
                wire.extend_from_slice(peer.outbox.bytes());
                peer.outbox.clear();
                if let Some(byte) = wire.get_mut(usize::from(step >> 3)) {
                    *byte ^= 1 << (len & 7);
                }
            }
            _ => {
                if ours.records.seal(content, &mut ours.outbox).is_err() {
                    return;
                }
            }
        }
        wire.extend_from_slice(peer.outbox.bytes());
        peer.outbox.clear();
        if !ours.inbox.push(&wire) {
            return;
        }
        let ended = ours.open_all(&mut opened);
        assert!(sent.starts_with(&opened), "what nobody has sealed was opened");
        // A peer that keeps the rules understands whatever we answer.
        assert!(peer.inbox.push(ours.outbox.bytes()));
        ours.outbox.clear();
        let heard = peer.open_all(&mut Vec::new());
        match (&ended, heard) {
            (Ok(_), heard) => assert!(matches!(heard, Ok(Record::Incomplete)), "{heard:?}"),
            (Err(_), Ok(_)) => {}
            (Err(_), Err(heard)) => assert!(matches!(heard, Error::AlertReceived(_)), "{heard:?}"),
        }
        match ended {
            Ok(Record::Incomplete) => {}
            Ok(_) => return,
            Err(_) => {
                assert!(ours.inbox.is_empty(), "what came behind an error is kept");
                assert!(ours.records.seal(b"x", &mut ours.outbox).is_err(), "sealed after the end");
                return;
            }
        }
    }
}

/// What of a record of `kind` is payload. A type of 0 is padding, and what is in front of it the type
/// (RFC 9846 section 5.4).
fn payload(kind: u8, content: &[u8]) -> &[u8] {
    match (kind, content.iter().rposition(|byte| *byte != 0)) {
        (0, Some(last)) if content[last] == KINDS[0] => &content[..last],
        (kind, _) if kind == KINDS[0] => content,
        _ => &[],
    }
}

/// Any bytes, or a handshake of which some are changed on the way, end in a connection, in an error, or
/// in waiting for more.
///
/// The first byte says which side we are, and whether bytes are ours to invent or to change; then come
/// the bytes, or three for each change: where, and what is flipped there.
pub fn session(input: &[u8]) {
    let Some((&[mode, cut], bytes)) = input.split_first_chunk::<2>() else { return };
    let Some((client, server)) = sessions() else { return };
    if mode & 2 == 0 {
        let mut session = if mode & 1 == 0 { server } else { client };
        let (mut inbox, mut outbox) = (Buf::default(), Buf::default());
        for piece in bytes.chunks(usize::from(cut).max(1)) {
            if !inbox.push(piece) {
                return;
            }
            match session.handshake(&mut inbox, &mut outbox) {
                Ok(complete) => assert!(!complete, "nobody proved anything"),
                Err(_) => return assert!(inbox.is_empty(), "what came behind an error is kept"),
            }
            outbox.clear();
        }
        return;
    }
    let changes = bytes
        .chunks_exact(3)
        .map(|change| (usize::from(u16::from_be_bytes([change[0], change[1]])), change[2]));
    let changes: Vec<_> = changes.take(8).collect();
    let (mut ends, mut passed) = ([client, server], 0);
    let (mut outboxes, mut inboxes) = <([Buf; 2], [Buf; 2])>::default();
    for flight in 0..FLIGHTS {
        let (from, to) = (flight % 2, 1 - flight % 2);
        let ended = ends[from].handshake(&mut inboxes[from], &mut outboxes[from]).is_err();
        let mut wire = outboxes[from].bytes().to_vec();
        outboxes[from].clear();
        for (at, flip) in &changes {
            if let Some(byte) = at.checked_sub(passed).and_then(|at| wire.get_mut(at)) {
                *byte ^= flip;
            }
        }
        passed += wire.len();
        if ended || !inboxes[to].push(&wire) {
            return;
        }
    }
}

/// Any bytes at the beginning of a QUIC stream are one frame, or none; what follows the frame is left.
pub fn streams(input: &[u8]) {
    let mut rest = input;
    let read = at_once(stream::read_open(&mut rest));
    left_over(input, rest, read.is_ok());
    let mut rest = input;
    let read = at_once(stream::read_answer(&mut rest));
    left_over(input, rest, read.is_ok());
}

fn left_over(input: &[u8], rest: &[u8], is_frame: bool) {
    let read = input.len() - rest.len();
    assert!(read <= HEADER_LEN + MAX_CONTROL, "{read} bytes were read");
    if is_frame {
        let &[_, high, middle, low] = input.first_chunk().unwrap_or(&[0; HEADER_LEN]);
        let len = u32::from_be_bytes([0, high, middle, low]);
        assert_eq!(
            usize::try_from(len),
            Ok(read - HEADER_LEN),
            "a frame is read whole, and no more"
        );
    }
}

/// The result of a future that never waits.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(done) => done,
        Poll::Pending => unreachable!("a slice is always ready"),
    }
}

impl End {
    /// Opens what there is to the end of `opened`, and says what ended it.
    fn open_all(&mut self, opened: &mut Vec<u8>) -> Result<Record, Error> {
        loop {
            let end = self.records.open(&mut self.inbox, &mut self.plain, &mut self.outbox);
            opened.extend_from_slice(self.plain.bytes());
            self.plain.clear();
            match end {
                Ok(Record::Taken) => {}
                end => return end,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_of_the_fuzzer_hold() {
        crate::fuzzing::replay("records", records);
        crate::fuzzing::replay("session", session);
        crate::fuzzing::replay("streams", streams);
    }
}
