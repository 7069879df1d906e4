//! A lane's TLS handshake, at either end.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use mesh_core::wire::{ALPN, Role};
use rustls::HandshakeKind;
use tokio::net::TcpStream;

use super::{Codec, Lane, SCRAP, flush, linger, receive};
use crate::tunnel::buffers::Buf;
use crate::tunnel::error::DialError;
use crate::tunnel::proof::Proof;
use crate::tunnel::session::Session;
use crate::tunnel::stats::{Gauged, SessionKind, TunnelStats};
use crate::tunnel::tls;

/// A handshake that is under way.
#[derive(Debug)]
pub(in crate::tunnel) struct Handshake {
    tcp: TcpStream,
    session: Session,
    role: Role,
    inbox: Buf,
    outbox: Buf,
}

impl Handshake {
    pub(in crate::tunnel) fn new(tcp: TcpStream, session: Session, role: Role) -> Self {
        Self { tcp, session, role, inbox: Buf::default(), outbox: Buf::default() }
    }

    /// Drives the handshake to its end. What our end thinks of it goes to the peer also when it
    /// fails: then an alert, and a moment for the peer to read it.
    pub(in crate::tunnel) async fn complete(&mut self) -> Result<(), DialError> {
        loop {
            let done = self.session.handshake(&mut self.inbox, &mut self.outbox);
            if let Err(error) = flush(&self.tcp, &mut self.outbox).await {
                // Also the peer's own failure looks like this; its alert says more.
                return Err(match done {
                    Err(error) => tls::cause(error),
                    Ok(_) => self.alert_or(error).await,
                });
            }
            match done {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => return Err(tls::cause(error)),
            }
            if receive(&self.tcp, &mut self.inbox).await.map_err(DialError::Network)? == 0 {
                return Err(DialError::Network(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        if self.session.state().alpn_protocol() != Some(ALPN) {
            return Err(DialError::Tls(rustls::Error::NoApplicationProtocol));
        }
        Ok(())
    }

    /// The alert that came before the connection broke, or how it broke.
    async fn alert_or(&mut self, error: io::Error) -> DialError {
        while let Ok(1..) = receive(&self.tcp, &mut self.inbox).await {
            match self.session.handshake(&mut self.inbox, &mut self.outbox) {
                Err(error @ rustls::Error::AlertReceived(_)) => return tls::cause(error),
                Ok(false) => {}
                _ => break,
            }
        }
        DialError::Network(error)
    }

    pub(in crate::tunnel) fn session(&self) -> &Session {
        &self.session
    }

    /// Whether the session was resumed: then no certificate was verified.
    pub(in crate::tunnel) fn kind(&self) -> SessionKind {
        match self.session().state().handshake_kind() {
            Some(HandshakeKind::Resumed) => SessionKind::Resumed,
            _ => SessionKind::Full,
        }
    }

    /// The lane, once its peer is known.
    pub(in crate::tunnel) fn into_lane(
        self,
        proof: Arc<Proof>,
        expires: Instant,
        stats: &Arc<TunnelStats>,
    ) -> Result<Lane, DialError> {
        let records = self.session.into_records().map_err(DialError::Tls)?;
        Ok(Lane {
            tcp: self.tcp,
            codec: Codec::new(records, self.role, self.inbox),
            proof,
            expires,
            used: false,
            _open: Gauged::new(stats, |stats| &stats.lanes_open),
        })
    }

    /// Gives the peer time to read the alert: closing with unread bytes would send RST, which may
    /// overtake it.
    pub(in crate::tunnel) async fn linger(self) {
        linger(self.tcp, SCRAP).await;
    }
}
