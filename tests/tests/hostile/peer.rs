//! A peer that is not an agent: it shows the certificate that it is given, believes any, and says
//! the bytes that it is told. Written after `ARCHITECTURE.md` section 6, without the agent's code:
//! what the two disagree about shows.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use harness::{Carrier, Node, wait};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Endpoint, EndpointConfig, TokioRuntime};
use rcgen::{
    CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{
    ClientSessionMemoryCache, ClientSessionStore, ResolvesClientCert, Resumption,
    Tls12ClientSessionValue, Tls13ClientSessionValue,
};
use rustls::crypto::aws_lc_rs::{default_provider, sign::any_supported_type};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, HandshakeKind, NamedGroup, ServerConfig,
    SignatureScheme, StreamOwned,
};
use socket2::SockRef;
use time::OffsetDateTime;
use tokio::runtime::Runtime;
use tokio::time::timeout;

/// TCP and UDP, of every agent.
const TUNNEL_PORT: u16 = 15019;
/// No answer takes longer.
const LIMIT: Duration = Duration::from_secs(10);
/// Verdict, stage, reason and version behind a header.
const ANSWER_BYTES: usize = 8;

/// What is shown to the other side, or nothing.
pub(crate) type Shown = Option<Arc<CertifiedKey>>;

/// Hours from now between which a certificate is valid.
pub(crate) const VALID: (i64, i64) = (-1, 1);

/// A certificate authority whose key lies in a directory.
pub(crate) struct Authority(Issuer<'static, KeyPair>);

impl Authority {
    pub(crate) fn of(dir: &Path) -> Result<Self> {
        let key = KeyPair::from_pem(&fs::read_to_string(dir.join("root.key"))?)?;
        Ok(Self(Issuer::from_ca_cert_pem(&fs::read_to_string(dir.join("root.pem"))?, key)?))
    }

    pub(crate) fn issue(&self, identity: &str, hours: (i64, i64)) -> Result<Shown> {
        let key = KeyPair::generate()?;
        certified(leaf(identity, hours)?.signed_by(&key, &self.0)?.der(), &key)
    }
}

pub(crate) fn self_signed(identity: &str) -> Result<Shown> {
    let key = KeyPair::generate()?;
    certified(leaf(identity, VALID)?.self_signed(&key)?.der(), &key)
}

fn leaf(identity: &str, (from, to): (i64, i64)) -> Result<CertificateParams> {
    let now = OffsetDateTime::now_utc();
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.not_before = now + time::Duration::hours(from);
    params.not_after = now + time::Duration::hours(to);
    params.subject_alt_names = vec![SanType::URI(identity.try_into()?)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    Ok(params)
}

fn certified(leaf: &CertificateDer<'static>, key: &KeyPair) -> Result<Shown> {
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
    Ok(Some(Arc::new(CertifiedKey::new(vec![leaf.clone()], any_supported_type(&key)?))))
}

/// The server name that means the workload `identity`.
pub(crate) fn server_name(identity: &str) -> String {
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, identity.as_bytes());
    let hex: String = hash.as_ref()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{hex}.malla")
}

/// An OPEN frame.
pub(crate) fn open(destination: SocketAddr, source: SocketAddr) -> Vec<u8> {
    let mut frame = vec![1, 0, 0, 62, 1, 0];
    frame.extend([7; 8]);
    frame.extend([0; 16]);
    for addr in [destination, source] {
        let ip = match addr.ip() {
            std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            std::net::IpAddr::V6(v6) => v6,
        };
        frame.extend(ip.octets());
        frame.extend(addr.port().to_be_bytes());
    }
    frame
}

/// Calls the agent of `to` from inside `from`, asks for the workload that `name` stands for, says
/// `said`, and returns the answer.
///
/// # Errors
///
/// If the carrier does not come about, or ends without an answer.
pub(crate) fn call(
    carrier: Carrier,
    from: &Node,
    to: &Node,
    name: &str,
    shown: &Shown,
    said: &[u8],
) -> Result<[u8; ANSWER_BYTES]> {
    let to = SocketAddr::from((to.v4(), TUNNEL_PORT));
    let config = client_config(shown)?;
    if carrier == Carrier::Quic {
        quic(from, to, name, config, said)
    } else {
        lane(from, to, name, config, said)
    }
}

/// Sends bytes that are no TLS, and waits for the agent to end the connection.
pub(crate) fn garble(from: &Node, to: &Node, said: &[u8]) -> Result<()> {
    let to = SocketAddr::from((to.v4(), TUNNEL_PORT));
    let mut tcp = dial(from, to)?;
    tcp.write_all(said)?;
    // A reset is an end as good as any.
    tcp.read_to_end(&mut Vec::new()).ok();
    let udp = from.netns().run(|| Ok(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?))?;
    udp.send_to(said, to)?;
    Ok(())
}

fn dial(from: &Node, to: SocketAddr) -> Result<TcpStream> {
    let tcp = from.netns().run(|| Ok(TcpStream::connect_timeout(&to, LIMIT)?))?;
    tcp.set_read_timeout(Some(LIMIT))?;
    Ok(tcp)
}

fn lane(
    from: &Node,
    to: SocketAddr,
    name: &str,
    config: ClientConfig,
    said: &[u8],
) -> Result<[u8; ANSWER_BYTES]> {
    let name = ServerName::try_from(name.to_owned())?;
    let session = rustls::ClientConnection::new(Arc::new(config), name)?;
    let mut stream = StreamOwned::new(session, dial(from, to)?);
    stream.write_all(said).context("send")?;
    let mut answer = [0; ANSWER_BYTES];
    stream.read_exact(&mut answer).context("receive")?;
    Ok(answer)
}

fn quic(
    from: &Node,
    to: SocketAddr,
    name: &str,
    config: ClientConfig,
    said: &[u8],
) -> Result<[u8; ANSWER_BYTES]> {
    let socket = from.netns().run(|| Ok(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?))?;
    let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(config)?));
    let talk = async {
        let endpoint =
            Endpoint::new(EndpointConfig::default(), None, socket, Arc::new(TokioRuntime))?;
        let connection = endpoint.connect_with(config, to, name)?.await?;
        let (mut send, mut receive) = connection.open_bi().await?;
        send.write_all(said).await?;
        let mut answer = [0; ANSWER_BYTES];
        receive.read_exact(&mut answer).await?;
        connection.close(0_u32.into(), b"");
        endpoint.wait_idle().await;
        Ok(answer)
    };
    runtime()?.block_on(async { timeout(LIMIT, talk).await? })
}

/// What a server did with a payload that was sent before the handshake.
#[derive(Debug, PartialEq)]
pub(crate) struct Early {
    /// Whether the session was taken up again: only then could the payload have counted.
    pub(crate) is_resumed: bool,
    pub(crate) is_accepted: bool,
    /// What the same words were answered, said again after the handshake.
    pub(crate) answer: [u8; ANSWER_BYTES],
}

/// As [`call`] on a lane, twice: the second time `said` is sent at once, encrypted under the ticket
/// of the first, as nobody who believes what the ticket says would do. `between` comes after the
/// handshake of the second and before the words are said again.
pub(crate) fn call_early(
    from: &Node,
    to: &Node,
    name: &str,
    shown: &Shown,
    said: &[u8],
    between: impl FnOnce(),
) -> Result<Early> {
    let to = SocketAddr::from((to.v4(), TUNNEL_PORT));
    let mut config = client_config(shown)?;
    config.resumption = Resumption::store(Arc::new(Hasty(ClientSessionMemoryCache::new(8))));
    config.enable_early_data = true;
    lane(from, to, name, config.clone(), said).context("the first time")?;

    let name = ServerName::try_from(name.to_owned())?;
    let mut session = rustls::ClientConnection::new(Arc::new(config), name)?;
    session.early_data().context("there is no ticket")?.write_all(said)?;
    let mut tcp = dial(from, to)?;
    while session.is_handshaking() {
        session.complete_io(&mut tcp).context("shake hands")?;
    }
    between();
    let is_resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
    let is_accepted = session.is_early_data_accepted();
    let mut stream = StreamOwned::new(session, tcp);
    stream.write_all(said).context("send")?;
    let mut answer = [0; ANSWER_BYTES];
    stream.read_exact(&mut answer).context("receive")?;
    Ok(Early { is_resumed, is_accepted, answer })
}

/// Remembers tickets, and takes each for one that allows early data.
#[derive(Debug)]
struct Hasty(ClientSessionMemoryCache);

impl ClientSessionStore for Hasty {
    fn set_kx_hint(&self, name: ServerName<'static>, group: NamedGroup) {
        self.0.set_kx_hint(name, group);
    }

    fn kx_hint(&self, name: &ServerName<'_>) -> Option<NamedGroup> {
        self.0.kx_hint(name)
    }

    fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {}

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {}

    fn insert_tls13_ticket(&self, name: ServerName<'static>, ticket: Tls13ClientSessionValue) {
        self.0.insert_tls13_ticket(name, ticket);
    }

    fn take_tls13_ticket(&self, name: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        let mut ticket = self.0.take_tls13_ticket(name)?;
        ticket._private_set_max_early_data_size(16 * 1024);
        Some(ticket)
    }
}

fn runtime() -> Result<Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?)
}

/// Takes the place of a node's agent, which must not run, until it is dropped.
pub(crate) struct Impostor {
    heard: Arc<Mutex<Vec<u8>>>,
    lanes: Arc<TcpListener>,
    accepting: Option<JoinHandle<()>>,
    // Its end ends the QUIC server.
    _quic: Runtime,
}

impl Impostor {
    pub(crate) fn new(node: &Node, shown: &Shown) -> Result<Self> {
        let addr = SocketAddr::from((node.v4(), TUNNEL_PORT));
        // A predecessor's sockets live on for a moment in a program that another test is just starting:
        // it has them all between fork and exec.
        let bind = || Ok((TcpListener::bind(addr)?, UdpSocket::bind(addr)?));
        let (tcp, udp) =
            wait::until_some(wait::SOON, "the tunnel port", || node.netns().run(bind).ok())?;
        let config = Arc::new(server_config(shown)?);

        let heard = Arc::<Mutex<Vec<u8>>>::default();
        let quic = runtime()?;
        let of_quic = QuicServerConfig::try_from(Arc::clone(&config))?;
        let of_quic = quinn::ServerConfig::with_crypto(Arc::new(of_quic));
        let listening = Arc::clone(&heard);
        quic.spawn(async move {
            let runtime = Arc::new(TokioRuntime);
            let endpoint = Endpoint::new(EndpointConfig::default(), Some(of_quic), udp, runtime)?;
            while let Some(incoming) = endpoint.accept().await {
                // Whether the agent takes it is what the test asks the agent.
                let Ok(connection) = incoming.await else { continue };
                let Ok((_answer, mut said)) = connection.accept_bi().await else { continue };
                let mut piece = [0; 4096];
                while let Ok(Some(len)) = said.read(&mut piece).await {
                    hear(&listening, &piece[..len]);
                }
            }
            anyhow::Ok(())
        });

        let lanes = Arc::new(tcp);
        let (listener, listening) = (Arc::clone(&lanes), Arc::clone(&heard));
        let accepting = thread::spawn(move || {
            while let Ok((mut tcp, _)) = listener.accept() {
                let Ok(mut session) = rustls::ServerConnection::new(Arc::clone(&config)) else {
                    return;
                };
                let listening = Arc::clone(&listening);
                // Several at once: an agent keeps spare ones. Ends with its connection, or LIMIT.
                thread::spawn(move || {
                    // As above.
                    tcp.set_read_timeout(Some(LIMIT)).ok();
                    session.complete_io(&mut tcp).ok();
                    let mut said = StreamOwned::new(session, tcp);
                    let mut piece = [0; 4096];
                    while let Ok(len @ 1..) = said.read(&mut piece) {
                        hear(&listening, &piece[..len]);
                    }
                });
            }
        });
        Ok(Self { heard, lanes, accepting: Some(accepting), _quic: quic })
    }

    /// What has been said to it, which it never answers.
    pub(crate) fn heard(&self) -> Vec<u8> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn hear(heard: &Mutex<Vec<u8>>, said: &[u8]) {
    heard.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(said);
}

impl Drop for Impostor {
    fn drop(&mut self) {
        SockRef::from(&*self.lanes).shutdown(std::net::Shutdown::Both).ok();
        if let Some(accepting) = self.accepting.take() {
            accepting.join().ok();
        }
    }
}

fn client_config(shown: &Shown) -> Result<ClientConfig> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Credulous))
        .with_client_cert_resolver(Arc::new(Shows(shown.clone())));
    config.alpn_protocols = vec![b"malla/1".to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

fn server_config(shown: &Shown) -> Result<ServerConfig> {
    if shown.is_none() {
        bail!("a server of TLS 1.3 has a certificate");
    }
    let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Shows(shown.clone())));
    config.alpn_protocols = vec![b"malla/1".to_vec()];
    Ok(config)
}

/// Shows one certificate, or none.
#[derive(Debug)]
struct Shows(Shown);

impl ResolvesClientCert for Shows {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Shown {
        self.0.clone()
    }

    fn has_certs(&self) -> bool {
        self.0.is_some()
    }
}

impl ResolvesServerCert for Shows {
    fn resolve(&self, _: ClientHello<'_>) -> Shown {
        self.0.clone()
    }
}

/// Believes anybody.
#[derive(Debug)]
struct Credulous;

impl ServerCertVerifier for Credulous {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        default_provider().signature_verification_algorithms.supported_schemes()
    }
}
