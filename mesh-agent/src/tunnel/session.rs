//! The handshake of one TLS connection without a buffer of its own: rustls on bytes that the lane
//! owns. What follows it is for [`super::records`].

use std::sync::Arc;

use rustls::client::{ClientConfig, UnbufferedClientConnection};
use rustls::pki_types::ServerName;
use rustls::server::{ServerConfig, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{CommonState, Error};

use super::buffers::Buf;
use super::records::{HEADER as RECORD_HEADER, MAX_PLAIN, Records, Secrets};

/// The most that anything called a record has behind its header.
const MAX_RECORD_BODY: usize = MAX_PLAIN + 2048;
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
    /// Nothing to do before more arrives, or something is to be sent.
    Quiet,
    /// The peer has sent `close_notify`.
    PeerClosed,
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
            match self.step(inbox, outbox)? {
                Step::Again => {}
                Step::PeerClosed => return Err(Error::General("closed in the handshake".into())),
                Step::Quiet if !self.state().is_handshaking() => return Ok(true),
                Step::Quiet if self.show_record(inbox) => {}
                Step::Quiet => return Ok(false),
            }
        }
    }

    /// The connection after its handshake. Nothing that was received behind the handshake has been
    /// looked at.
    pub(super) fn into_records(self) -> Result<Records, Error> {
        if self.seen > 0 {
            return Err(Error::General("a handshake message is not complete".into()));
        }
        match self.side {
            Side::Client(client) => {
                let (keys, secrets) = client.dangerous_into_kernel_connection()?;
                Records::new(Secrets::Client(secrets), keys)
            }
            Side::Server(server) => {
                let (keys, secrets) = server.dangerous_into_kernel_connection()?;
                Records::new(Secrets::Server(secrets), keys)
            }
        }
    }

    /// Lets rustls see one record more; `false` if there is none.
    fn show_record(&mut self, inbox: &Buf) -> bool {
        let len = record_len(&inbox.bytes()[self.seen..]);
        self.seen += len.unwrap_or(0);
        len.is_some()
    }

    /// One step, and after an error the steps that bring out its alert.
    fn step(&mut self, inbox: &mut Buf, outbox: &mut Buf) -> Result<Step, Error> {
        let result = self.step_once(inbox, outbox);
        if result.is_err() {
            // What was received must not be looked at again; rustls gives out what it has to say
            // before it looks.
            self.seen = 0;
            inbox.clear();
            while self.state().wants_write() && self.step_once(inbox, outbox).is_ok() {}
        }
        result
    }

    fn step_once(&mut self, inbox: &mut Buf, outbox: &mut Buf) -> Result<Step, Error> {
        let seen = &mut inbox.bytes_mut()[..self.seen];
        let (discard, result) = match &mut self.side {
            Side::Client(client) => step(client.process_tls_records(seen), outbox),
            Side::Server(server) => step(server.process_tls_records(seen), outbox),
        };
        self.seen -= discard;
        inbox.consume(discard);
        result
    }
}

fn step<D>(status: UnbufferedStatus<'_, '_, D>, outbox: &mut Buf) -> (usize, Result<Step, Error>) {
    let UnbufferedStatus { discard, state } = status;
    let step = match state {
        Err(error) => Err(error),
        // Both ends show records one by one, and none behind the handshake.
        Ok(ConnectionState::ReadTraffic(_)) => {
            Err(Error::General("payload in the handshake".into()))
        }
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

/// The length of the first record in `bytes`, header included, if all of it is there. What cannot be
/// a record is taken for its header alone: by that rustls refuses it, and nobody waits for the rest.
fn record_len(bytes: &[u8]) -> Option<usize> {
    let &[kind, major, _, high, low] = bytes.first_chunk::<RECORD_HEADER>()?;
    let body = usize::from(u16::from_be_bytes([high, low]));
    let is_record = RECORD_KINDS.contains(&kind) && major == 3 && body <= MAX_RECORD_BODY;
    let len = RECORD_HEADER + if is_record { body } else { 0 };
    (bytes.len() >= len).then_some(len)
}
