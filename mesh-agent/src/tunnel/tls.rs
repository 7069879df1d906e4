//! TLS as the tunnel uses it: 1.3 only, both ends certified, sessions resumed, nothing sent early.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use mesh_core::spiffe::SpiffeId;
use mesh_core::wire::ALPN;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName,
    Error, OtherError, ServerConfig, SignatureScheme,
};

use super::credentials::Credentials;
use super::error::DialError;
use super::tunnels::TicketKeys;
use crate::identity::sni_name;
use crate::identity::verify::{PeerRefused, PeerRole};

/// Sessions that a client remembers per identity of its own: one per peer is used, the rest is for
/// a node that comes back.
const REMEMBERED_SESSIONS: usize = 1024;

/// Tickets for each handshake. A client uses each once, and dials lanes in small groups.
const TICKETS: usize = 2;

/// The configuration of our end as a server; `resolver` says which workloads it serves.
pub(super) fn server_config(
    credentials: &Arc<Credentials>,
    tickets: &TicketKeys,
    resolver: Arc<dyn ResolvesServerCert>,
    refusals: &Refusals,
) -> Result<ServerConfig, Error> {
    let provider = Arc::new(provider());
    let verifier = Arc::new(Verifier::new(credentials, &provider, refusals));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(resolver);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.ticketer = tickets.ticketer();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = TICKETS;
    config.max_early_data_size = 0;
    config.enable_secret_extraction = true; // For the lanes' own record layer.
    Ok(config)
}

/// The configuration under which one workload calls, for as long as it has this certificate. Its
/// sessions die with it: a session proves the certificate under which it began.
pub(super) fn client_config(
    credentials: &Arc<Credentials>,
    certified: &Arc<CertifiedKey>,
    refusals: &Refusals,
) -> Result<ClientConfig, Error> {
    let provider = Arc::new(provider());
    let verifier = Arc::new(Verifier::new(credentials, &provider, refusals));
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(OneKey(Arc::clone(certified))));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::in_memory_sessions(REMEMBERED_SESSIONS);
    config.enable_early_data = false;
    config.enable_secret_extraction = true; // For the lanes' own record layer.
    Ok(config)
}

/// rustls' algorithms, with AES-128-GCM before AES-256-GCM, which is a seventh slower with full
/// records: who could try 2^128 keys would rather attack the certificates. The client's order counts.
fn provider() -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    let first = aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != first.suite());
    provider
}

/// When the first certificate of `chain` ends, in seconds since 1970. A leaf that cannot be read has
/// not been verified either, and ends at once.
pub(super) fn not_after(chain: &[CertificateDer<'_>]) -> u64 {
    let end = chain.first().and_then(|leaf| {
        let (_, leaf) = x509_parser::parse_x509_certificate(leaf).ok()?;
        u64::try_from(leaf.validity().not_after.timestamp()).ok()
    });
    end.unwrap_or(0)
}

/// The last certificates that were not accepted, by the server name of the handshake (empty at the
/// server's end): QUIC reports a failed handshake as an alert, which says less.
#[derive(Clone, Debug, Default)]
pub(super) struct Refusals(Arc<Mutex<VecDeque<(String, PeerRefused)>>>);

impl Refusals {
    /// Kept at once: more than handshakes end between two looks.
    const MOST: usize = 64;

    fn put(&self, name: &str, refused: PeerRefused) {
        let mut refusals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        refusals.truncate(Self::MOST - 1);
        refusals.push_front((name.to_owned(), refused));
    }

    /// Removes and returns the latest one of this server name.
    pub(super) fn take(&self, name: &str) -> Option<PeerRefused> {
        let mut refusals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = refusals.iter().find(|(of, _)| of == name)?.1;
        refusals.retain(|(of, _)| of != name);
        Some(found)
    }
}

/// Both verifiers of rustls, in front of the one function of [`Credentials`].
struct Verifier {
    credentials: Arc<Credentials>,
    algorithms: WebPkiSupportedAlgorithms,
    refusals: Refusals,
}

impl Verifier {
    fn new(credentials: &Arc<Credentials>, provider: &CryptoProvider, refusals: &Refusals) -> Self {
        Self {
            credentials: Arc::clone(credentials),
            algorithms: provider.signature_verification_algorithms,
            refusals: refusals.clone(),
        }
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: PeerRole,
        now: UnixTime,
    ) -> Result<SpiffeId, PeerRefused> {
        let mut chain = Vec::with_capacity(1 + intermediates.len());
        chain.push(leaf.clone());
        chain.extend_from_slice(intermediates);
        (self.credentials.verify)(&chain, role, now)
    }

    fn refuse(&self, name: &str, why: PeerRefused) -> Error {
        self.refusals.put(name, why);
        refused(why)
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").finish_non_exhaustive()
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let name = server_name.to_str();
        let found = self
            .verify(end_entity, intermediates, PeerRole::Server, now)
            .map_err(|why| self.refuse(&name, why))?;
        // The name is made of the identity that is meant. Refused here, the server learns it too;
        // the dialler compares the identities themselves.
        if name != sni_name(&found) {
            return Err(self.refuse(&name, PeerRefused::WrongWorkload));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    /// None: they would tell an eavesdropper's probe which roots we trust.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity, intermediates, PeerRole::Client, now)
            .map_err(|why| self.refuse("", why))?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Shows one certificate, whatever roots the server names.
#[derive(Debug)]
struct OneKey(Arc<CertifiedKey>);

impl ResolvesClientCert for OneKey {
    fn resolve(
        &self,
        _root_hint_subjects: &[&[u8]],
        _sigschemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Picks the certificate of the workload that the client's server name means, and remembers which.
pub(super) struct ServedBySni {
    credentials: Arc<Credentials>,
    found: OnceLock<(SpiffeId, Arc<CertifiedKey>)>,
}

impl ServedBySni {
    pub(super) fn new(credentials: &Arc<Credentials>) -> Self {
        Self { credentials: Arc::clone(credentials), found: OnceLock::new() }
    }

    /// What was found for the first handshake; only of use for a resolver of a single connection.
    pub(super) fn found(&self) -> Option<&(SpiffeId, Arc<CertifiedKey>)> {
        self.found.get()
    }
}

impl fmt::Debug for ServedBySni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServedBySni").finish_non_exhaustive()
    }
}

impl ResolvesServerCert for ServedBySni {
    fn resolve(&self, client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let (id, certified) = (self.credentials.served)(client_hello.server_name()?)?;
        self.found.get_or_init(|| (id, Arc::clone(&certified)));
        Some(certified)
    }
}

/// The error that makes rustls send the alert nearest to the reason, and that [`cause`] can read.
fn refused(refused: PeerRefused) -> Error {
    Error::InvalidCertificate(match refused {
        PeerRefused::Missing => return Error::NoCertificatesPresented,
        PeerRefused::Malformed => CertificateError::BadEncoding,
        PeerRefused::Expired => CertificateError::Expired,
        PeerRefused::NotYetValid => CertificateError::NotValidYet,
        PeerRefused::UnknownIssuer => CertificateError::UnknownIssuer,
        PeerRefused::BadSignature => CertificateError::BadSignature,
        PeerRefused::WrongUsage => CertificateError::InvalidPurpose,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    })
}

/// Why a handshake failed, in the tunnel's own words.
pub(super) fn cause(error: Error) -> DialError {
    match error {
        Error::NoCertificatesPresented => DialError::Certificate(PeerRefused::Missing),
        Error::AlertReceived(alert) => DialError::PeerRefused { alert: alert_name(alert) },
        Error::InvalidCertificate(why) => match certificate_cause(&why) {
            Some(refused) => DialError::Certificate(refused),
            None => DialError::Tls(Error::InvalidCertificate(why)),
        },
        other => DialError::Tls(other),
    }
}

fn certificate_cause(error: &CertificateError) -> Option<PeerRefused> {
    Some(match error {
        CertificateError::BadEncoding => PeerRefused::Malformed,
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => PeerRefused::Expired,
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            PeerRefused::NotYetValid
        }
        CertificateError::UnknownIssuer => PeerRefused::UnknownIssuer,
        CertificateError::BadSignature => PeerRefused::BadSignature,
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            PeerRefused::WrongUsage
        }
        CertificateError::Other(OtherError(other)) => *other.downcast_ref::<PeerRefused>()?,
        _ => return None,
    })
}

/// The alert's name as RFC 9846 section 6 writes it: a closed set, safe for logs and metrics.
pub(super) fn alert_name(alert: AlertDescription) -> &'static str {
    match alert {
        AlertDescription::CloseNotify => "close_notify",
        AlertDescription::UnexpectedMessage => "unexpected_message",
        AlertDescription::BadRecordMac => "bad_record_mac",
        AlertDescription::HandshakeFailure => "handshake_failure",
        AlertDescription::BadCertificate => "bad_certificate",
        AlertDescription::UnsupportedCertificate => "unsupported_certificate",
        AlertDescription::CertificateExpired => "certificate_expired",
        AlertDescription::CertificateUnknown => "certificate_unknown",
        AlertDescription::UnknownCA => "unknown_ca",
        AlertDescription::AccessDenied => "access_denied",
        AlertDescription::DecodeError => "decode_error",
        AlertDescription::DecryptError => "decrypt_error",
        AlertDescription::ProtocolVersion => "protocol_version",
        AlertDescription::InternalError => "internal_error",
        AlertDescription::UnrecognisedName => "unrecognized_name",
        AlertDescription::CertificateRequired => "certificate_required",
        AlertDescription::NoApplicationProtocol => "no_application_protocol",
        _ => "other",
    }
}
