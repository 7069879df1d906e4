//! The lanes' record layer against plain rustls at the other end, and against everything that rustls
//! would refuse.

use std::io::{Read as _, Write as _};
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{AlertDescription, ClientConnection, Connection, Error, ServerConnection};

use super::world::*;
use crate::identity::sni_name;
use crate::tunnel::Buf;
use crate::tunnel::records::{MAX_PLAIN, OVERHEAD, Record, Records, UPDATE_LEN};
use crate::tunnel::session::Session;

const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;

/// One end behind its handshake, and what lies at it.
pub(super) struct Established {
    pub(super) records: Records,
    pub(super) inbox: Buf,
    pub(super) outbox: Buf,
    pub(super) plain: Buf,
}

impl Established {
    pub(super) fn new(records: Records) -> Self {
        let (inbox, outbox, plain) = Default::default();
        Self { records, inbox, outbox, plain }
    }

    pub(super) fn seal(&mut self, plain: &[u8]) {
        self.records.seal(plain, &mut self.outbox).unwrap();
    }

    pub(super) fn open(&mut self) -> Result<Record, Error> {
        self.records.open(&mut self.inbox, &mut self.plain, &mut self.outbox)
    }

    /// Opens what there is, and says what ended it.
    pub(super) fn open_all(&mut self) -> Result<Record, Error> {
        loop {
            match self.open() {
                Ok(Record::Taken) => {}
                end => return end,
            }
        }
    }
}

/// Plain rustls at one end, and us at the other.
struct Pair {
    ours: Established,
    theirs: Connection,
}

impl Pair {
    fn new(we_are_client: bool) -> Self {
        let (client, server) = tls_configs(&Ca::new());
        let (client, server) = (Arc::new(client), Arc::new(server));
        let name = ServerName::try_from(sni_name(&id(SERVICE))).unwrap();
        let (mut session, mut theirs) = if we_are_client {
            let theirs = ServerConnection::new(server).unwrap();
            (Session::client(client, name).unwrap(), Connection::from(theirs))
        } else {
            let theirs = ClientConnection::new(client, name).unwrap();
            (Session::server(server).unwrap(), Connection::from(theirs))
        };
        let (mut inbox, mut outbox) = (Buf::default(), Buf::default());
        while !session.handshake(&mut inbox, &mut outbox).unwrap() || theirs.is_handshaking() {
            give(&mut theirs, &mut outbox).unwrap();
            take(&mut theirs, &mut inbox);
        }
        let mut ours = Established::new(session.into_records().unwrap());
        (ours.inbox, ours.outbox) = (inbox, outbox);
        Self { ours, theirs }
    }

    /// What they read of what we have sealed.
    fn there(&mut self) -> Vec<u8> {
        give(&mut self.theirs, &mut self.ours.outbox).unwrap()
    }

    /// What we open of what they say.
    fn back(&mut self, plain: &[u8]) -> Vec<u8> {
        let mut opened = Vec::new();
        for piece in plain.chunks(MAX_PLAIN) {
            self.theirs.writer().write_all(piece).unwrap();
            take(&mut self.theirs, &mut self.ours.inbox);
            self.ours.open_all().unwrap();
            opened.extend_from_slice(self.ours.plain.bytes());
            self.ours.plain.clear();
        }
        opened
    }
}

/// Returns what they read.
fn give(to: &mut Connection, from: &mut Buf) -> Result<Vec<u8>, Error> {
    let mut plain = Vec::new();
    while !from.is_empty() {
        let len = to.read_tls(&mut from.bytes()).unwrap();
        from.consume(len);
        to.process_new_packets()?;
        // It ends with `WouldBlock`, or with the end.
        to.reader().read_to_end(&mut plain).ok();
    }
    Ok(plain)
}

fn take(from: &mut Connection, to: &mut Buf) {
    let mut bytes = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut bytes).unwrap();
    }
    assert!(to.push(&bytes));
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251).to_le_bytes()[0]).collect()
}

#[test]
fn plain_rustls_and_our_records_understand_each_other() {
    for we_are_client in [true, false] {
        let mut pair = Pair::new(we_are_client);
        for len in [1, 64, MAX_PLAIN - 1, MAX_PLAIN, MAX_PLAIN + 1, 3 * MAX_PLAIN + 7] {
            let payload = bytes(len);
            pair.ours.seal(&payload);
            assert!(pair.there() == payload, "{len} bytes there, client: {we_are_client}");
            assert!(pair.back(&payload) == payload, "{len} bytes back, client: {we_are_client}");
        }
        pair.ours.records.close(&mut pair.ours.outbox);
        give(&mut pair.theirs, &mut pair.ours.outbox).unwrap();
        assert_eq!(pair.theirs.reader().read(&mut [0]).unwrap(), 0, "they see no end");
        pair.theirs.send_close_notify();
        take(&mut pair.theirs, &mut pair.ours.inbox);
        assert_eq!(pair.ours.open_all(), Ok(Record::Closed));
    }
}

#[test]
fn keys_are_replaced_by_either_end_without_losing_a_byte() {
    for we_are_client in [true, false] {
        let mut pair = Pair::new(we_are_client);
        // After every second record of ours, with none of theirs in between.
        pair.ours.records.refresh_after(2);
        let payload = bytes(3 * MAX_PLAIN + 7);
        pair.ours.seal(&payload);
        assert!(pair.there() == payload);
        for round in 0..3 {
            pair.theirs.refresh_traffic_keys().unwrap();
            assert_eq!(pair.back(b"under their new key"), b"under their new key", "{round}");
            // They asked for a new key of ours as well, which comes in front of our next word.
            assert!(pair.ours.outbox.is_empty(), "{round}");
            pair.ours.seal(b"under our new key");
            assert_eq!(pair.ours.outbox.len(), UPDATE_LEN + OVERHEAD + 17, "{round}");
            assert_eq!(pair.there(), b"under our new key", "{round}");
        }
    }
}

/// Two ends of ours.
fn ends() -> (Established, Established) {
    let (client, server) = tls_configs(&Ca::new());
    let name = ServerName::try_from(sni_name(&id(SERVICE))).unwrap();
    let mut client = Session::client(Arc::new(client), name).unwrap();
    let mut server = Session::server(Arc::new(server)).unwrap();
    let (mut to_client, mut to_server) = (Buf::default(), Buf::default());
    while !client.handshake(&mut to_client, &mut to_server).unwrap()
        | !server.handshake(&mut to_server, &mut to_client).unwrap()
    {}
    let mut client = Established::new(client.into_records().unwrap());
    let mut server = Established::new(server.into_records().unwrap());
    // The tickets.
    client.inbox = to_client;
    assert_eq!(client.open_all(), Ok(Record::Incomplete));
    server.inbox = to_server;
    (client, server)
}

/// What the server says to what the client's records became in `alter`, and its alert as the client
/// reads it.
fn refused(make: impl FnOnce(&mut Established)) -> (Error, Option<AlertDescription>) {
    let (mut client, mut server) = ends();
    make(&mut client);
    assert!(server.inbox.push(client.outbox.bytes()));
    let error = server.open_all().unwrap_err();
    assert!(server.plain.is_empty(), "{error:?}: something got out");
    assert!(server.inbox.is_empty(), "{error:?}: it would be looked at again");
    server.records.seal(b"x", &mut server.outbox).unwrap_err();
    assert!(client.inbox.push(server.outbox.bytes()));
    let alert = match client.open_all() {
        Err(Error::AlertReceived(alert)) => Some(alert),
        Ok(Record::Incomplete) => None,
        other => panic!("{other:?}"),
    };
    (error, alert)
}

#[test]
fn what_breaks_the_record_layer_is_refused_with_its_alert() {
    let as_kind = |kind: u8, content: &'static [u8]| {
        move |end: &mut Established| end.records.seal_as(kind, content, &mut end.outbox).unwrap()
    };
    let flip = |at: usize| {
        move |end: &mut Established| {
            end.seal(b"payload");
            end.outbox.bytes_mut()[at] ^= 1;
        }
    };
    let repeat = |times: usize, kind: u8, content: &'static [u8]| {
        move |end: &mut Established| {
            for _ in 0..times {
                end.records.seal_as(kind, content, &mut end.outbox).unwrap();
            }
        }
    };
    let raw = |record: &'static [u8]| move |end: &mut Established| assert!(end.outbox.push(record));
    type Make = Box<dyn FnOnce(&mut Established)>;
    let cases: Vec<(&str, Make, AlertDescription)> = vec![
        ("payload", Box::new(flip(5)), AlertDescription::BadRecordMac),
        ("tag", Box::new(flip(5 + 7 + 1 + 15)), AlertDescription::BadRecordMac),
        ("version is authenticated", Box::new(flip(2)), AlertDescription::BadRecordMac),
        ("shorter than a tag", Box::new(raw(&[23, 3, 3, 0, 1, 0])), AlertDescription::BadRecordMac),
        (
            "plain alert",
            Box::new(raw(&[21, 3, 3, 0, 2, 2, 0])),
            AlertDescription::UnexpectedMessage,
        ),
        ("plain CCS", Box::new(raw(&[20, 3, 3, 0, 1, 1])), AlertDescription::UnexpectedMessage),
        ("other version", Box::new(raw(&[23, 2, 3, 0, 17])), AlertDescription::DecodeError),
        ("too long", Box::new(raw(&[23, 3, 3, 0x41, 1])), AlertDescription::RecordOverflow),
        (
            "too much inside",
            Box::new(|end: &mut Established| {
                let content = bytes(MAX_PLAIN + 1);
                end.records.seal_as(APPLICATION_DATA, &content, &mut end.outbox).unwrap();
            }),
            AlertDescription::RecordOverflow,
        ),
        ("only padding", Box::new(as_kind(0, &[0; 9])), AlertDescription::UnexpectedMessage),
        ("sealed CCS", Box::new(as_kind(20, &[1])), AlertDescription::UnexpectedMessage),
        ("sealed nonsense", Box::new(as_kind(99, b"x")), AlertDescription::UnexpectedMessage),
        ("half an alert", Box::new(as_kind(ALERT, &[1])), AlertDescription::DecodeError),
        (
            "a ticket for a server",
            Box::new(as_kind(HANDSHAKE, &[4, 0, 0, 0])),
            AlertDescription::UnexpectedMessage,
        ),
        (
            "key update of no kind",
            Box::new(as_kind(HANDSHAKE, &[24, 0, 0, 1, 2])),
            AlertDescription::IllegalParameter,
        ),
        (
            "behind a key update",
            Box::new(as_kind(HANDSHAKE, &[24, 0, 0, 1, 0, 24])),
            AlertDescription::UnexpectedMessage,
        ),
        (
            "payload inside a message",
            Box::new(|end: &mut Established| {
                end.records.seal_as(HANDSHAKE, &[24, 0], &mut end.outbox).unwrap();
                end.seal(b"x");
            }),
            AlertDescription::UnexpectedMessage,
        ),
        (
            "many empty",
            Box::new(repeat(11, APPLICATION_DATA, b"")),
            AlertDescription::UnexpectedMessage,
        ),
        (
            "many warnings",
            Box::new(repeat(5, ALERT, &[1, 90])),
            AlertDescription::UnexpectedMessage,
        ),
    ];
    for (what, make, alert) in cases {
        let (error, told) = refused(make);
        assert_eq!(told, Some(alert), "{what}: {error:?}");
    }
}

#[test]
fn an_alert_of_the_peer_is_its_reason_and_is_not_answered() {
    // Whatever level it claims.
    for level in [1, 2, 7] {
        let (error, told) = refused(|end| {
            end.records.seal_as(ALERT, &[level, 48], &mut end.outbox).unwrap();
        });
        assert_eq!(error, Error::AlertReceived(AlertDescription::UnknownCA));
        assert_eq!(told, None);
    }
}

#[test]
fn records_replayed_left_out_or_exchanged_are_refused() {
    for order in [[0, 0], [1, 1], [1, 0]] {
        let (error, _) = refused(|end| {
            let mut sealed = [Vec::new(), Vec::new()];
            for (record, payload) in sealed.iter_mut().zip(["one", "two"]) {
                end.seal(payload.as_bytes());
                record.extend_from_slice(end.outbox.bytes());
                end.outbox.clear();
            }
            // What comes first may be right, and is not looked for here.
            if order[0] == 0 {
                sealed[0][5] ^= 1;
            }
            for at in order {
                assert!(end.outbox.push(&sealed[at]));
            }
        });
        assert_eq!(error, Error::DecryptError, "{order:?}");
    }
    let (mut client, mut server) = ends();
    client.seal(b"once");
    for expected in [Ok(Record::Incomplete), Err(Error::DecryptError)] {
        assert!(server.inbox.push(client.outbox.bytes()));
        assert_eq!(server.open_all(), expected);
    }
    assert_eq!(server.plain.bytes(), b"once");
}

#[test]
fn a_key_update_is_answered_with_the_next_payload_however_often_it_is_asked_for() {
    let (mut client, mut server) = ends();
    // More often than a peer takes updates without payload.
    for _ in 0..100 {
        client.records.ask_for_update(&mut client.outbox).unwrap();
        client.seal(b"more");
        assert!(server.inbox.push(client.outbox.bytes()));
        client.outbox.clear();
        assert_eq!(server.open_all(), Ok(Record::Incomplete));
        assert!(server.outbox.is_empty(), "answered with nothing behind it");
    }
    server.seal(b"");
    assert!(server.outbox.is_empty(), "answered with nothing behind it");
    server.seal(b"answered");
    assert!(client.inbox.push(server.outbox.bytes()));
    assert_eq!(client.open(), Ok(Record::Taken));
    assert!(client.plain.is_empty(), "no key update came first");
    assert_eq!(client.open(), Ok(Record::Taken));
    assert_eq!(client.plain.bytes(), b"answered");
}

#[test]
fn padding_is_taken_off() {
    let (mut client, mut server) = ends();
    client.records.seal_as(0, b"hidden\x17\0\0\0", &mut client.outbox).unwrap();
    assert!(server.inbox.push(client.outbox.bytes()));
    assert_eq!(server.open_all(), Ok(Record::Incomplete));
    assert_eq!(server.plain.bytes(), b"hidden");
}

#[test]
fn a_truncated_record_is_waited_for_and_gives_nothing_out() {
    let (mut client, mut server) = ends();
    client.seal(&bytes(100));
    let sealed = client.outbox.bytes().to_vec();
    for at in 0..sealed.len() - 1 {
        assert!(server.inbox.push(&sealed[at..=at]));
        assert_eq!(server.open(), Ok(Record::Incomplete), "{at}");
        assert!(server.plain.is_empty());
    }
    assert!(server.inbox.push(&sealed[sealed.len() - 1..]));
    assert_eq!(server.open(), Ok(Record::Taken));
    assert!(server.plain.bytes() == bytes(100));
}
