//! One TLS connection without a buffer of its own: rustls on bytes that the lane owns.

use std::io;
use std::sync::Arc;

use rustls::client::{ClientConfig, UnbufferedClientConnection};
use rustls::pki_types::ServerName;
use rustls::server::{ServerConfig, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};
use rustls::{CommonState, Error};

use super::buffers::Buf;

/// RFC 9846 section 5.2: type 1, version 2, length 2.
const RECORD_HEADER: usize = 5;
/// The most plaintext that a record holds.
pub(super) const MAX_RECORD: usize = 16 * 1024;
/// The most that anything called a record has behind its header.
const MAX_RECORD_BODY: usize = MAX_RECORD + 2048;
/// change_cipher_spec, alert, handshake, application_data.
const RECORD_KINDS: std::ops::RangeInclusive<u8> = 20..=23;

/// One end of a TLS connection.
pub(super) struct Session {
    side: Side,
    /// Bytes at the front of the inbox that rustls has looked at and wants to see again: the
    /// beginning of a handshake message that spans records. It counts on finding them there.
    seen: usize,
}

enum Side {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.side {
            Side::Client(_) => "Session::Client",
            Side::Server(_) => "Session::Server",
        })
    }
}

/// What one step of rustls came to.
enum Step {
    /// Look again.
    Again,
    /// A record's plaintext has been handed over.
    Plaintext,
    /// Nothing to do before more arrives, or something is to be sent.
    Quiet,
    /// The peer has sent `close_notify`.
    PeerClosed,
}

/// What a record was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record {
    /// There is no complete record.
    Incomplete,
    /// Decrypted, or of the handshake; look again.
    Taken,
    /// `close_notify`.
    Closed,
}

impl Session {
    pub(super) fn client(
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> Result<Self, Error> {
        let client = UnbufferedClientConnection::new(config, name)?;
        Ok(Self { side: Side::Client(Box::new(client)), seen: 0 })
    }

    pub(super) fn server(config: Arc<ServerConfig>) -> Result<Self, Error> {
        let server = UnbufferedServerConnection::new(config)?;
        Ok(Self { side: Side::Server(Box::new(server)), seen: 0 })
    }

    /// What was agreed on.
    pub(super) fn state(&self) -> &CommonState {
        match &self.side {
            Side::Client(client) => client,
            Side::Server(server) => server,
        }
    }

    /// Takes the handshake as far as `inbox` allows and leaves in `outbox` what is to be sent, also
    /// when it fails: then that is the alert. Returns whether the handshake is complete.
    pub(super) fn handshake(&mut self, inbox: &mut Buf, outbox: &mut Buf) -> Result<bool, Error> {
        // Record by record, so that payload behind the handshake is left for `open`.
        loop {
            match self.step(inbox, outbox, &mut |_| ())? {
                Step::Again => {}
                Step::Plaintext => return Err(Error::General("payload in the handshake".into())),
                Step::PeerClosed => return Err(Error::General("closed in the handshake".into())),
                Step::Quiet if !self.state().is_handshaking() => return Ok(true),
                Step::Quiet if self.show_record(inbox) => {}
                Step::Quiet => return Ok(false),
            }
        }
    }

    /// Decrypts the first record of `inbox` to the end of `plain`, which has room for one.
    pub(super) fn open(
        &mut self,
        inbox: &mut Buf,
        plain: &mut Buf,
        outbox: &mut Buf,
    ) -> Result<Record, Error> {
        if !self.show_record(inbox) {
            return Ok(Record::Incomplete);
        }
        loop {
            let mut fits = true;
            let step = self.step(inbox, outbox, &mut |payload| fits &= plain.push(payload))?;
            if !fits {
                return Err(Error::General("no room for a record".into()));
            }
            match step {
                Step::Again => {}
                Step::Plaintext | Step::Quiet => return Ok(Record::Taken),
                Step::PeerClosed => return Ok(Record::Closed),
            }
        }
    }

    /// Encrypts `plain` to the end of `outbox`. `inbox` stays as it is.
    pub(super) fn seal(
        &mut self,
        plain: &[u8],
        inbox: &mut Buf,
        outbox: &mut Buf,
    ) -> io::Result<()> {
        let seen = &mut inbox.bytes_mut()[..self.seen];
        loop {
            let sealed = match &mut self.side {
                Side::Client(client) => seal(client.process_tls_records(seen), plain, outbox)?,
                Side::Server(server) => seal(server.process_tls_records(seen), plain, outbox)?,
            };
            if sealed {
                return Ok(());
            }
        }
    }

    /// Writes `close_notify` to the end of `outbox`.
    pub(super) fn close(&mut self, inbox: &mut Buf, outbox: &mut Buf) {
        let seen = &mut inbox.bytes_mut()[..self.seen];
        match &mut self.side {
            Side::Client(client) => close(client.process_tls_records(seen), outbox),
            Side::Server(server) => close(server.process_tls_records(seen), outbox),
        }
    }

    /// Lets rustls see one record more; `false` if there is none.
    fn show_record(&mut self, inbox: &Buf) -> bool {
        let len = record_len(&inbox.bytes()[self.seen..]);
        self.seen += len.unwrap_or(0);
        len.is_some()
    }

    /// One step, and after an error the steps that bring out its alert.
    fn step(
        &mut self,
        inbox: &mut Buf,
        outbox: &mut Buf,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<Step, Error> {
        let result = self.step_once(inbox, outbox, take);
        if result.is_err() {
            // What was received must not be looked at again; rustls gives out what it has to say
            // before it looks.
            self.seen = 0;
            inbox.clear();
            while self.state().wants_write() && self.step_once(inbox, outbox, take).is_ok() {}
        }
        result
    }

    fn step_once(
        &mut self,
        inbox: &mut Buf,
        outbox: &mut Buf,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<Step, Error> {
        let seen = &mut inbox.bytes_mut()[..self.seen];
        let (discard, result) = match &mut self.side {
            Side::Client(client) => step(client.process_tls_records(seen), outbox, take),
            Side::Server(server) => step(server.process_tls_records(seen), outbox, take),
        };
        self.seen -= discard;
        inbox.consume(discard);
        result
    }
}

fn step<D>(
    status: UnbufferedStatus<'_, '_, D>,
    outbox: &mut Buf,
    take: &mut dyn FnMut(&[u8]),
) -> (usize, Result<Step, Error>) {
    let UnbufferedStatus { mut discard, state } = status;
    let step = match state {
        Err(error) => Err(error),
        Ok(ConnectionState::ReadTraffic(mut read)) => loop {
            match read.next_record() {
                None => break Ok(Step::Plaintext),
                Some(Err(error)) => break Err(error),
                Some(Ok(record)) => {
                    discard += record.discard;
                    take(record.payload);
                }
            }
        },
        Ok(ConnectionState::EncodeTlsData(mut encode)) => match encode.encode(outbox.room()) {
            Ok(len) => {
                outbox.fill(len);
                Ok(Step::Again)
            }
            Err(EncodeError::InsufficientSize(_) | EncodeError::AlreadyEncoded) => {
                Err(Error::General("no room for a handshake message".into()))
            }
        },
        // What was encoded waits in `outbox`, in order with all that follows.
        Ok(ConnectionState::TransmitTlsData(transmit)) => {
            transmit.done();
            Ok(Step::Again)
        }
        Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Ok(Step::PeerClosed),
        Ok(ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_)) => Ok(Step::Quiet),
        // Early data is never offered nor accepted; the enum is open for later versions.
        Ok(_) => Err(Error::General("unexpected state".into())),
    };
    outbox.release();
    (discard, step)
}

/// Encrypts if the connection is ready to; `false` if it had something else to send first.
fn seal<D>(
    status: UnbufferedStatus<'_, '_, D>,
    plain: &[u8],
    outbox: &mut Buf,
) -> io::Result<bool> {
    match status.state.map_err(io::Error::other)? {
        ConnectionState::WriteTraffic(mut write) => match write.encrypt(plain, outbox.room()) {
            Ok(len) => {
                outbox.fill(len);
                Ok(true)
            }
            Err(EncryptError::InsufficientSize(_)) => Err(io::Error::other("no room to encrypt")),
            Err(EncryptError::EncryptExhausted) => Err(io::Error::other("the key is used up")),
        },
        ConnectionState::EncodeTlsData(mut encode) => {
            let len = encode.encode(outbox.room()).map_err(io::Error::other)?;
            outbox.fill(len);
            Ok(false)
        }
        ConnectionState::TransmitTlsData(transmit) => {
            transmit.done();
            Ok(false)
        }
        _ => Err(io::ErrorKind::NotConnected.into()),
    }
}

fn close<D>(status: UnbufferedStatus<'_, '_, D>, outbox: &mut Buf) {
    if let Ok(ConnectionState::WriteTraffic(mut write)) = status.state
        && let Ok(len) = write.queue_close_notify(outbox.room())
    {
        outbox.fill(len);
    }
    outbox.release();
}

/// The length of the first record in `bytes`, header included, if all of it is there. What cannot be
/// a record is taken for its header alone: by that rustls refuses it, and nobody waits for the rest.
fn record_len(bytes: &[u8]) -> Option<usize> {
    let &[kind, major, _, high, low] = bytes.first_chunk::<RECORD_HEADER>()?;
    let body = usize::from(u16::from_be_bytes([high, low]));
    let is_record = RECORD_KINDS.contains(&kind) && major == 3 && body <= MAX_RECORD_BODY;
    let len = RECORD_HEADER + if is_record { body } else { 0 };
    (bytes.len() >= len).then_some(len)
}
