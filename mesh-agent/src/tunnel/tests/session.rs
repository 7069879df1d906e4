//! TLS on bytes, without sockets: records and messages that come in the smallest pieces.

use std::sync::Arc;

use rustls::pki_types::ServerName;

use super::world::*;
use crate::identity::sni_name;
use crate::tunnel::session::{Record, Session};
use crate::tunnel::tls::{Refusals, ServedBySni};
use crate::tunnel::*;

/// One end and what lies at it.
struct End {
    session: Session,
    inbox: Buf,
    outbox: Buf,
    plain: Buf,
}

impl End {
    fn new(session: Session) -> Self {
        let (inbox, outbox, plain) = Default::default();
        Self { session, inbox, outbox, plain }
    }

    fn handshake(&mut self) -> bool {
        self.session.handshake(&mut self.inbox, &mut self.outbox).unwrap()
    }

    fn seal(&mut self, plain: &[u8]) {
        self.session.seal(plain, &mut self.inbox, &mut self.outbox).unwrap();
    }

    fn open_all(&mut self) {
        while self.session.open(&mut self.inbox, &mut self.plain, &mut self.outbox).unwrap()
            == Record::Taken
        {}
    }
}

/// Both ends, whose records hold no more than `fragment` bytes.
fn ends(fragment: usize) -> (End, End) {
    let (ours, theirs) = holdings(&Ca::new());
    let (ours, theirs) = (ours.credentials(), theirs.credentials());
    let certified = (ours.certified)(&id(CALLER)).unwrap();
    let mut client = tls::client_config(&ours, &certified, &Refusals::default()).unwrap();
    let resolver = Arc::new(ServedBySni::new(&theirs));
    let tickets = TicketKeys::new().unwrap();
    let mut server = tls::server_config(&theirs, &tickets, resolver, &Refusals::default()).unwrap();
    client.max_fragment_size = Some(fragment);
    server.max_fragment_size = Some(fragment);
    let name = ServerName::try_from(sni_name(&id(SERVICE))).unwrap();
    let client = Session::client(Arc::new(client), name).unwrap();
    (End::new(client), End::new(Session::server(Arc::new(server)).unwrap()))
}

/// Moves one byte; `false` if there is none.
fn carry(from: &mut End, to: &mut End) -> bool {
    let Some(byte) = from.outbox.bytes().first().copied() else { return false };
    assert!(to.inbox.push(&[byte]));
    from.outbox.consume(1);
    true
}

#[test]
fn messages_may_span_records_and_records_may_come_byte_by_byte() {
    let (mut client, mut server) = ends(64);
    let (mut client_done, mut server_done) = (client.handshake(), false);
    while !(client_done && server_done) {
        let mut moved = false;
        while carry(&mut client, &mut server) {
            moved = true;
            server_done |= server.handshake();
        }
        while !client_done && carry(&mut server, &mut client) {
            moved = true;
            client_done |= client.handshake();
        }
        assert!(moved, "the handshake stands still");
    }
    // The session tickets, each over many records, are still on their way when both ends talk: a
    // message of which only a part has come must not disturb what is sent.
    assert!(server.outbox.len() > 1000);
    let mut exchanged = 0;
    while carry(&mut server, &mut client) {
        client.open_all();
        if server.outbox.len() % 50 == 0 {
            client.seal(b"meanwhile");
            while carry(&mut client, &mut server) {
                server.open_all();
            }
            exchanged += 1;
        }
    }
    assert!(exchanged > 10);
    assert_eq!(server.plain.bytes(), b"meanwhile".repeat(exchanged));
    assert!(client.plain.is_empty());

    server.seal(&[7; 5000]);
    while carry(&mut server, &mut client) {
        client.open_all();
    }
    assert_eq!(client.plain.bytes(), [7; 5000]);
    assert!(client.inbox.is_empty() && server.inbox.is_empty());
}

#[test]
fn an_altered_record_is_an_error_with_an_alert() {
    let (mut client, mut server) = ends(16 * 1024);
    while !(client.handshake() & server.handshake()) {
        while carry(&mut client, &mut server) {}
        server.handshake();
        while carry(&mut server, &mut client) {}
    }
    client.outbox.clear();
    client.seal(b"payload");
    let last = client.outbox.len() - 1;
    client.outbox.bytes_mut()[last] ^= 1;
    while carry(&mut client, &mut server) {}
    let sent = server.outbox.len();
    server.session.open(&mut server.inbox, &mut server.plain, &mut server.outbox).unwrap_err();
    assert!(server.plain.is_empty());
    assert!(server.outbox.len() > sent, "no alert");
}

#[test]
fn what_is_no_record_is_refused_by_its_header() {
    // A request of another protocol, an unknown type, another version, and a length too large.
    for header in [*b"GET /", [0; 5], [22, 2, 1, 0, 9], [22, 3, 1, 0xff, 0xff]] {
        let (_, mut server) = ends(16 * 1024);
        assert!(server.inbox.push(&header));
        let result = server.session.handshake(&mut server.inbox, &mut server.outbox);
        assert!(result.is_err(), "{header:?} is waited for");
    }
}
