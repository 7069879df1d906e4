//! The handshake on bytes, without sockets: records and messages that come in the smallest pieces.

use std::sync::Arc;

use rustls::pki_types::ServerName;

use super::records::Established;
use super::world::*;
use crate::identity::sni_name;
use crate::tunnel::Buf;
use crate::tunnel::session::Session;

/// One end and what lies at it.
struct End {
    session: Session,
    inbox: Buf,
    outbox: Buf,
}

impl End {
    fn new(session: Session) -> Self {
        let (inbox, outbox) = Default::default();
        Self { session, inbox, outbox }
    }

    fn handshake(&mut self) -> bool {
        self.session.handshake(&mut self.inbox, &mut self.outbox).unwrap()
    }

    fn established(self) -> Established {
        let records = self.session.into_records().unwrap();
        let mut end = Established::new(records);
        (end.inbox, end.outbox) = (self.inbox, self.outbox);
        end
    }
}

/// Both ends, whose records hold no more than `fragment` bytes in the handshake.
fn ends(fragment: usize) -> (End, End) {
    let (mut client, mut server) = tls_configs(&Ca::new());
    client.max_fragment_size = Some(fragment);
    server.max_fragment_size = Some(fragment);
    let name = ServerName::try_from(sni_name(&id(SERVICE))).unwrap();
    let client = Session::client(Arc::new(client), name).unwrap();
    (End::new(client), End::new(Session::server(Arc::new(server)).unwrap()))
}

/// Moves one byte; `false` if there is none.
fn carry(from: &mut Buf, to: &mut Buf) -> bool {
    let Some(byte) = from.bytes().first().copied() else { return false };
    assert!(to.push(&[byte]));
    from.consume(1);
    true
}

#[test]
fn messages_may_span_records_and_records_may_come_byte_by_byte() {
    let (mut client, mut server) = ends(64);
    let (mut client_done, mut server_done) = (client.handshake(), false);
    while !(client_done && server_done) {
        let mut moved = false;
        while carry(&mut client.outbox, &mut server.inbox) {
            moved = true;
            server_done |= server.handshake();
        }
        while !client_done && carry(&mut server.outbox, &mut client.inbox) {
            moved = true;
            client_done |= client.handshake();
        }
        assert!(moved, "the handshake stands still");
    }
    // The session tickets, each over many records, are still on their way when both ends talk: a
    // message of which only a part has come must not disturb what is sent.
    let (mut client, mut server) = (client.established(), server.established());
    assert!(server.outbox.len() > 1000);
    let mut exchanged = 0;
    while carry(&mut server.outbox, &mut client.inbox) {
        client.open_all().unwrap();
        if server.outbox.len() % 50 == 0 {
            client.seal(b"meanwhile");
            while carry(&mut client.outbox, &mut server.inbox) {
                server.open_all().unwrap();
            }
            exchanged += 1;
        }
    }
    assert!(exchanged > 10);
    assert_eq!(server.plain.bytes(), b"meanwhile".repeat(exchanged));
    assert!(client.plain.is_empty());

    server.seal(&[7; 5000]);
    while carry(&mut server.outbox, &mut client.inbox) {
        client.open_all().unwrap();
    }
    assert_eq!(client.plain.bytes(), [7; 5000]);
    assert!(client.inbox.is_empty() && server.inbox.is_empty());
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
