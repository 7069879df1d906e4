//! TLS 1.3 records once the handshake is over: sealed and opened from one buffer straight into
//! another.
//!
//! rustls makes the connection, derives every key and reads session tickets; it hands out the traffic
//! secrets as it does for kernel TLS ([`rustls::kernel`]). What is left of TLS for this module is the
//! record layer (RFC 9846 section 5), key updates (section 4.7.3) and alerts (section 6). rustls' own
//! record layer allocates and copies once for each record that it seals, which costs a lane more than
//! its encryption does.
//!
//! # Guarantees
//!
//! - *Nothing unauthenticated gets out*: only what the AEAD has accepted is added to `plain`.
//! - *No nonce twice*: a sequence number is used for one record and then counted; long before it or
//!   the cipher's limit is used up the key is replaced ([`REFRESH_AFTER`]).
//! - *What rustls refuses is refused*, with the same alert: a wrong tag or content type, an oversize
//!   record, a handshake message that is interleaved or leads across a change of keys, too many empty
//!   records, key updates or warnings.
//! - *Nothing after the end*: behind `close_notify` or an alert of ours nothing is sealed any more.

use std::{fmt, mem};

use aws_lc_rs::aead::{self, Aad, Nonce};
use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{
    AlertDescription, ConnectionTrafficSecrets, ContentType, Error, ExtractedSecrets,
    HandshakeType, InvalidMessage, PeerMisbehaved,
};
use zeroize::Zeroizing;

use super::buffers::Buf;
use super::keys::AeadKey;

/// Type 1, version 2, length 2: RFC 9846 section 5.2.
pub(super) const HEADER: usize = 5;
/// The most plaintext that a record holds.
pub(super) const MAX_PLAIN: usize = 16 * 1024;
/// The length of the tag of every AEAD of TLS 1.3.
const TAG: usize = 16;
/// What a record takes beside its plaintext: the header, the inner content type and the tag.
pub(super) const OVERHEAD: usize = HEADER + 1 + TAG;
/// The most behind a header: 256 bytes are for content type, padding and tag.
const MAX_BODY: usize = MAX_PLAIN + 256;
/// The most that opening one record writes before its padding is known.
pub(super) const MAX_OPENED: usize = MAX_BODY - TAG;

/// Records under one key. 2^24 full records of AES-GCM keep an attacker's advantage at 2^-60
/// (draft-irtf-cfrg-aead-limits-08 section 5.1.1, and rustls' own limit); ChaCha20-Poly1305 would not
/// need one.
const REFRESH_AFTER: u64 = 1 << 24;

/// What a peer may repeat between two records of payload; rustls' and BoringSSL's numbers.
const MAX_EMPTY: u8 = 10;
const MAX_KEY_UPDATES: u8 = 32;
const MAX_WARNINGS: u8 = 4;
/// A session ticket is at most 64 KiB, and nothing else comes that is longer.
const MAX_HANDSHAKE: usize = 4 + 0xffff;

/// Kinds of records and messages, as they are on the wire.
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// What a record was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record {
    /// There is no complete record.
    Incomplete,
    /// Opened, and its payload added, if it held any.
    Taken,
    /// `close_notify`.
    Closed,
}

/// What rustls keeps of a connection: the secrets from which keys are derived, and what a ticket is
/// stored with.
pub(super) enum Secrets {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

/// Both directions of an established TLS connection.
pub(super) struct Records {
    sealing: Key,
    opening: Key,
    secrets: Box<Secrets>,
    /// The beginning of a handshake message that goes on in the next record.
    message: Vec<u8>,
    /// The peer wants our next payload under a new key.
    update_owed: bool,
    /// `close_notify` or an alert has been sealed.
    ended: bool,
    refresh_after: u64,
    empty: u8,
    key_updates: u8,
    warnings: u8,
}

impl fmt::Debug for Records {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Records").finish_non_exhaustive()
    }
}

impl Records {
    pub(super) fn new(secrets: Secrets, keys: ExtractedSecrets) -> Result<Self, Error> {
        Ok(Self {
            sealing: Key::new(keys.tx)?,
            opening: Key::new(keys.rx)?,
            secrets: Box::new(secrets),
            message: Vec::new(),
            update_owed: false,
            ended: false,
            refresh_after: REFRESH_AFTER,
            empty: 0,
            key_updates: 0,
            warnings: 0,
        })
    }

    /// Opens the first record of `inbox` to the end of `plain`, which has room for [`MAX_OPENED`].
    /// After an error the alert that belongs to it is in `outbox`.
    pub(super) fn open(
        &mut self,
        inbox: &mut Buf,
        plain: &mut Buf,
        outbox: &mut Buf,
    ) -> Result<Record, Error> {
        let opened = self.open_first(inbox, plain);
        plain.release();
        if let Err(error) = &opened {
            // What came behind it must not be looked at.
            inbox.clear();
            if let Some(alert) = alert_for(error) {
                self.end(FATAL, alert, outbox);
            }
            self.ended = true;
        }
        opened
    }

    fn open_first(&mut self, inbox: &mut Buf, plain: &mut Buf) -> Result<Record, Error> {
        let Some((&header, rest)) = inbox.bytes().split_first_chunk::<HEADER>() else {
            return Ok(Record::Incomplete);
        };
        let [kind, major, _, high, low] = header;
        if kind != APPLICATION_DATA {
            return Err(unexpected(kind));
        }
        if major != 3 {
            return Err(InvalidMessage::UnknownProtocolVersion.into());
        }
        let len = usize::from(u16::from_be_bytes([high, low]));
        if len > MAX_BODY {
            return Err(Error::PeerSentOversizedRecord);
        }
        let sealed = len.checked_sub(TAG).ok_or(Error::DecryptError)?;
        let Some((body, tag)) = rest.get(..len).map(|body| body.split_at(sealed)) else {
            return Ok(Record::Incomplete);
        };
        let Some(opened) = plain.room().get_mut(..sealed) else {
            return Err(Error::General("no room for a record".into()));
        };
        self.opening.open(header, body, tag, opened)?;
        // The content type is the last byte that is not padding (RFC 9846 section 5.4).
        let Some(len) = opened.iter().rposition(|byte| *byte != 0) else {
            return Err(PeerMisbehaved::IllegalTlsInnerPlaintext.into());
        };
        if len > MAX_PLAIN {
            return Err(Error::PeerSentOversizedRecord);
        }
        inbox.consume(HEADER + sealed + TAG);
        let (content, kind) = (&opened[..len], opened[len]);
        if kind != HANDSHAKE && !self.message.is_empty() {
            return Err(PeerMisbehaved::MessageInterleavedWithHandshakeMessage.into());
        }
        if content.is_empty() {
            self.empty = bounded(self.empty, MAX_EMPTY, PeerMisbehaved::TooManyEmptyFragments)?;
        } else {
            self.empty = 0;
        }
        match kind {
            APPLICATION_DATA => {
                self.key_updates = 0;
                plain.fill(len);
            }
            HANDSHAKE => {
                if self.message.len() + len > MAX_HANDSHAKE {
                    return Err(InvalidMessage::HandshakePayloadTooLarge.into());
                }
                self.message.extend_from_slice(content);
                self.messages()?;
            }
            ALERT => return self.alert(content),
            kind => return Err(unexpected(kind)),
        }
        Ok(Record::Taken)
    }

    /// Handles the handshake messages that are complete.
    fn messages(&mut self) -> Result<(), Error> {
        let mut message = mem::take(&mut self.message);
        let mut rest = message.as_slice();
        while let Some((&[kind, len @ ..], body)) = rest.split_first_chunk::<4>() {
            let [high, middle, low] = len;
            let len = usize::try_from(u32::from_be_bytes([0, high, middle, low]));
            let Some((body, behind)) = len.ok().and_then(|len| body.split_at_checked(len)) else {
                break;
            };
            match (kind, &mut *self.secrets) {
                (NEW_SESSION_TICKET, Secrets::Client(client)) => {
                    client.handle_new_session_ticket(body)?;
                }
                // What follows is under another key: it cannot be in this record.
                (KEY_UPDATE, _) if !behind.is_empty() => {
                    return Err(PeerMisbehaved::KeyEpochWithPendingFragment.into());
                }
                (KEY_UPDATE, _) => self.update_opening(body)?,
                (kind, _) => {
                    return Err(Error::InappropriateHandshakeMessage {
                        expect_types: vec![
                            HandshakeType::NewSessionTicket,
                            HandshakeType::KeyUpdate,
                        ],
                        got_type: HandshakeType::from(kind),
                    });
                }
            }
            rest = behind;
        }
        if !rest.is_empty() {
            let done = message.len() - rest.len();
            message.drain(..done);
            self.message = message;
        }
        Ok(())
    }

    /// The peer's next record is under its next key.
    fn update_opening(&mut self, body: &[u8]) -> Result<(), Error> {
        let wants_ours = match body {
            [0] => false,
            [1] => true,
            _ => return Err(InvalidMessage::InvalidKeyUpdate.into()),
        };
        let too_many = PeerMisbehaved::TooManyKeyUpdateRequests;
        self.key_updates = bounded(self.key_updates, MAX_KEY_UPDATES, too_many)?;
        self.opening = Key::new(match &mut *self.secrets {
            Secrets::Client(client) => client.update_rx_secret()?,
            Secrets::Server(server) => server.update_rx_secret()?,
        })?;
        self.update_owed |= wants_ours;
        Ok(())
    }

    fn alert(&mut self, content: &[u8]) -> Result<Record, Error> {
        let &[_level, description] = content else {
            return Err(InvalidMessage::MessageTooShort.into());
        };
        // The level means nothing in TLS 1.3, and everything but these two is fatal (section 6).
        match AlertDescription::from(description) {
            AlertDescription::CloseNotify => Ok(Record::Closed),
            AlertDescription::UserCanceled => {
                let too_many = PeerMisbehaved::TooManyWarningAlertsReceived;
                self.warnings = bounded(self.warnings, MAX_WARNINGS, too_many)?;
                Ok(Record::Taken)
            }
            fatal => Err(Error::AlertReceived(fatal)),
        }
    }

    /// Seals `plain` to the end of `outbox`, as many records as it takes.
    pub(super) fn seal(&mut self, plain: &[u8], outbox: &mut Buf) -> Result<(), Error> {
        if self.ended {
            return Err(Error::General("sealed after the end".into()));
        }
        for content in plain.chunks(MAX_PLAIN) {
            // A peer that wants another key gets it in front of the next payload, however often it has asked
            // (RFC 9846 section 4.7.3): one that asks often and is sent nothing would count an answer to
            // each as too many.
            if mem::take(&mut self.update_owed) || self.sealing.seq >= self.refresh_after {
                self.update_sealing(outbox)?;
            }
            self.sealing.seal(APPLICATION_DATA, content, outbox)?;
        }
        Ok(())
    }

    /// Seals `close_notify`.
    pub(super) fn close(&mut self, outbox: &mut Buf) {
        self.end(WARNING, AlertDescription::CloseNotify, outbox);
    }

    fn end(&mut self, level: u8, alert: AlertDescription, outbox: &mut Buf) {
        if !self.ended {
            self.ended = true;
            // Without room for it the peer learns from TCP that it is over.
            drop(self.sealing.seal(ALERT, &[level, alert.into()], outbox));
        }
    }

    /// Our next record is under our next key.
    fn update_sealing(&mut self, outbox: &mut Buf) -> Result<(), Error> {
        const UPDATE_NOT_REQUESTED: u8 = 0;

        self.sealing.seal(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, UPDATE_NOT_REQUESTED], outbox)?;
        self.next_sealing()
    }

    fn next_sealing(&mut self) -> Result<(), Error> {
        self.sealing = Key::new(match &mut *self.secrets {
            Secrets::Client(client) => client.update_tx_secret()?,
            Secrets::Server(server) => server.update_tx_secret()?,
        })?;
        Ok(())
    }

    /// Replaces our key after so many records.
    #[cfg(test)]
    pub(super) fn refresh_after(&mut self, records: u64) {
        self.refresh_after = records;
    }

    /// Replaces our key and asks the peer to replace its own.
    #[cfg(any(fuzzing, test))]
    pub(super) fn ask_for_update(&mut self, outbox: &mut Buf) -> Result<(), Error> {
        self.seal_as(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, 1], outbox)?;
        self.next_sealing()
    }

    /// A record of any kind, right or wrong.
    #[cfg(any(fuzzing, test))]
    pub(super) fn seal_as(
        &mut self,
        kind: u8,
        content: &[u8],
        outbox: &mut Buf,
    ) -> Result<(), Error> {
        self.sealing.seal(kind, content, outbox)
    }
}

/// A sealed key update.
pub(super) const UPDATE_LEN: usize = 5 + OVERHEAD;

const WARNING: u8 = 1;
const FATAL: u8 = 2;

/// The key of one direction, and the number of the record that comes next.
struct Key {
    key: AeadKey,
    iv: Zeroizing<[u8; aead::NONCE_LEN]>,
    seq: u64,
}

impl Key {
    fn new((seq, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        let unknown = || Error::General("a cipher suite that lanes do not know".into());
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&aead::AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&aead::AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
                (&aead::CHACHA20_POLY1305, key, iv)
            }
            _ => return Err(unknown()),
        };
        let key = AeadKey::new(algorithm, key.as_ref()).ok_or_else(unknown)?;
        let iv = Zeroizing::new(*iv.as_ref().first_chunk().ok_or_else(unknown)?);
        Ok(Self { key, iv, seq })
    }

    /// The nonce of the next record (RFC 9846 section 5.3), which is counted with it.
    fn nonce(&mut self) -> Result<Nonce, Error> {
        let mut nonce = *self.iv;
        let seq = self.seq.to_be_bytes();
        let place = nonce.len() - seq.len();
        for (byte, seq) in nonce[place..].iter_mut().zip(seq) {
            *byte ^= seq;
        }
        self.seq = self.seq.checked_add(1).ok_or(Error::EncryptError)?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }

    /// Opens `body` into `opened`, which is as long.
    fn open(
        &mut self,
        header: [u8; HEADER],
        body: &[u8],
        tag: &[u8],
        opened: &mut [u8],
    ) -> Result<(), Error> {
        let nonce = self.nonce()?;
        self.key
            .expanded(|key| key.open_separate_gather(nonce, Aad::from(header), body, tag, opened))
            .map_err(|_unspecified| Error::DecryptError)
    }

    /// Adds one record.
    fn seal(&mut self, kind: u8, content: &[u8], outbox: &mut Buf) -> Result<(), Error> {
        let len = content.len() + 1 + TAG;
        let [high, low] = u16::try_from(len).map_err(|_long| Error::EncryptError)?.to_be_bytes();
        let header = [APPLICATION_DATA, 3, 3, high, low];
        let Some(record) = outbox.room().get_mut(..HEADER + len) else {
            outbox.release();
            return Err(Error::General("no room to seal".into()));
        };
        let (head, sealed) = record.split_at_mut(HEADER);
        head.copy_from_slice(&header);
        let (body, end) = sealed.split_at_mut(content.len());
        let nonce = self.nonce()?;
        let (aad, kind) = (Aad::from(header), [kind]);
        self.key
            .expanded(|key| key.seal_out_of_place_scatter(nonce, aad, content, body, &kind, end))
            .map_err(|_unspecified| Error::EncryptError)?;
        outbox.fill(HEADER + len);
        Ok(())
    }
}

/// One more of what may not come more than `most` times in a row.
fn bounded(count: u8, most: u8, too_many: PeerMisbehaved) -> Result<u8, Error> {
    if count == most { Err(too_many.into()) } else { Ok(count + 1) }
}

fn unexpected(kind: u8) -> Error {
    Error::InappropriateMessage {
        expect_types: vec![ContentType::ApplicationData],
        got_type: ContentType::from(kind),
    }
}

/// What the peer is told (RFC 9846 section 6.2); nothing in answer to its own alert.
fn alert_for(error: &Error) -> Option<AlertDescription> {
    Some(match error {
        Error::AlertReceived(_) => return None,
        Error::DecryptError => AlertDescription::BadRecordMac,
        Error::PeerSentOversizedRecord => AlertDescription::RecordOverflow,
        Error::InvalidMessage(InvalidMessage::InvalidKeyUpdate) => {
            AlertDescription::IllegalParameter
        }
        Error::InvalidMessage(_) => AlertDescription::DecodeError,
        Error::PeerMisbehaved(_)
        | Error::InappropriateMessage { .. }
        | Error::InappropriateHandshakeMessage { .. } => AlertDescription::UnexpectedMessage,
        _ => AlertDescription::InternalError,
    })
}
