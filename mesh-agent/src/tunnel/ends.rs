//! Two ends of a TLS connection without a network between them: what the fuzzer and the benchmarks of
//! single stages stand on.

use std::sync::{Arc, OnceLock};

use rcgen::KeyPair;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::buffers::Buf;
use super::records::{Record, Records};
use super::session::Session;

/// The name under which both ends know the server.
const NAME: &str = "ends.malla";
/// More flights than any handshake has.
pub(super) const FLIGHTS: usize = 16;

/// One end behind its handshake, and what lies at it.
#[derive(Debug)]
pub struct End {
    pub(super) records: Records,
    pub(super) inbox: Buf,
    pub(super) outbox: Buf,
    pub(super) plain: Buf,
}

impl End {
    /// Seals `plain` and puts it in front of `peer`. `false` if it does not fit, or the end has come.
    pub fn send(&mut self, plain: &[u8], peer: &mut Self) -> bool {
        let sent = self.records.seal(plain, &mut self.outbox).is_ok()
            && peer.inbox.push(self.outbox.bytes());
        self.outbox.clear();
        sent
    }

    /// Opens what lies in front of this end and forgets it: how many bytes of payload it was.
    pub fn receive(&mut self) -> usize {
        let mut received = 0;
        while let Ok(Record::Taken) =
            self.records.open(&mut self.inbox, &mut self.plain, &mut self.outbox)
        {
            received += self.plain.len();
            self.plain.clear();
        }
        received
    }

    /// Forgets what lies in front of this end.
    pub fn discard(&mut self) {
        self.inbox.clear();
    }
}

/// Both ends of a connection, ours first. `None` never happens but for a defect of the handshake.
pub fn connected(we_are_client: bool) -> Option<(End, End)> {
    let (client, server) = sessions()?;
    let mut ends = [client, server].map(|session| (session, Buf::default(), Buf::default()));
    for _ in 0..FLIGHTS / 2 {
        let [(client, to_client, from_client), (server, to_server, from_server)] = &mut ends;
        client.handshake(to_client, from_client).ok()?;
        to_server.push(from_client.bytes());
        from_client.clear();
        server.handshake(to_server, from_server).ok()?;
        to_client.push(from_server.bytes());
        from_server.clear();
    }
    let ends = ends.map(|(session, inbox, outbox)| {
        let records = session.into_records().ok()?;
        Some(End { records, inbox, outbox, plain: Buf::default() })
    });
    let [Some(client), Some(server)] = ends else { return None };
    Some(if we_are_client { (client, server) } else { (server, client) })
}

pub(super) fn sessions() -> Option<(Session, Session)> {
    static CONFIGS: OnceLock<Option<(Arc<ClientConfig>, Arc<ServerConfig>)>> = OnceLock::new();
    let (client, server) = CONFIGS.get_or_init(configs).as_ref()?;
    let name = ServerName::try_from(NAME).ok()?;
    Some((
        Session::client(Arc::clone(client), name).ok()?,
        Session::server(Arc::clone(server)).ok()?,
    ))
}

/// As lanes have them, but with the quickest key exchange and without names of workloads.
fn configs() -> Option<(Arc<ClientConfig>, Arc<ServerConfig>)> {
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![aws_lc_rs::kx_group::X25519];
    let provider = Arc::new(provider);
    let key = KeyPair::generate().ok()?;
    let cert = rcgen::CertificateParams::new([NAME.to_owned()]).ok()?.self_signed(&key).ok()?;
    let cert = CertificateDer::clone(cert.der());
    let mut roots = RootCertStore::empty();
    roots.add(cert.clone()).ok()?;
    let key = PrivateKeyDer::try_from(key.serialize_der()).ok()?;
    let versions = &[&rustls::version::TLS13];
    let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(versions)
        .ok()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.enable_secret_extraction = true;
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .ok()?
        .with_no_client_auth()
        .with_single_cert(vec![cert], key)
        .ok()?;
    server.enable_secret_extraction = true;
    Some((Arc::new(client), Arc::new(server)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fuzzer_and_benchmarks_stand_on_is_a_connection() {
        for we_are_client in [true, false] {
            let (mut ours, mut peer) = connected(we_are_client).unwrap();
            peer.records.seal(b"hello", &mut peer.outbox).unwrap();
            assert!(ours.inbox.push(peer.outbox.bytes()));
            peer.outbox.clear();
            assert_eq!(ours.receive(), 5);
            assert!(ours.send(&[7; 20_000], &mut peer));
            assert_eq!(peer.receive(), 20_000);
        }
    }
}
