//! TLS of the public port: over TCP and for QUIC, with the same certificates, and the same question for those of clients.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use quinn::crypto::rustls::QuicServerConfig;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme,
    SupportedProtocolVersion,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    server::danger::{ClientCertVerified, ClientCertVerifier},
    version::{TLS12, TLS13},
};
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio_rustls::TlsAcceptor;

use crate::{acme, certificates::Certificates};

/// What a client may show, in bytes: it is kept as long as the connection.
const MAX_CHAIN_BYTES: usize = 16 << 10;

/// Certificates behind a client's own. The ways to put them together are more with each of them, and all may have to be tried.
const MAX_INTERMEDIATES: usize = 4;

/// How the public port makes handshakes. A change is for new connections only.
pub(crate) struct Tls {
    provider: Arc<CryptoProvider>,
    certificates: Arc<Certificates>,
    tcp: ArcSwap<ServerConfig>,
    quic: Mutex<Quic>,
}

struct Quic {
    config: Arc<QuicServerConfig>,
    transport: Arc<quinn::TransportConfig>,
    endpoints: Vec<quinn::Endpoint>,
    /// Of which authorities' certificates clients are asked for.
    asked: Vec<DistinguishedName>,
}

impl Quic {
    fn server(&self) -> quinn::ServerConfig {
        let mut server = quinn::ServerConfig::with_crypto(self.config.clone());
        server.transport_config(self.transport.clone());
        server
    }
}

impl Tls {
    /// Asks clients for certificates of these authorities; for none, if there are none.
    pub(crate) fn new(
        provider: Arc<CryptoProvider>,
        certificates: Arc<Certificates>,
        transport: Arc<quinn::TransportConfig>,
        subjects: &[DistinguishedName],
    ) -> Result<Self, String> {
        let (tcp, config) = configs(&provider, &certificates, subjects)?;
        let quic = Quic { config, transport, endpoints: Vec::new(), asked: subjects.to_vec() };
        Ok(Self { provider, certificates, tcp: ArcSwap::new(tcp), quic: Mutex::new(quic) })
    }

    /// The same with other authorities. An error is for the log: everything stays as it was.
    pub(crate) fn ask_for(&self, subjects: &[DistinguishedName]) -> Result<(), String> {
        let mut quic = self.quic();
        if !quic.asked.iter().map(AsRef::<[u8]>::as_ref).eq(subjects.iter().map(AsRef::as_ref)) {
            let (tcp, config) = configs(&self.provider, &self.certificates, subjects)?;
            (quic.config, quic.asked) = (config, subjects.to_vec());
            for endpoint in &quic.endpoints {
                endpoint.set_server_config(Some(quic.server()));
            }
            self.tcp.store(tcp);
        }
        Ok(())
    }

    /// For the next connection over TCP.
    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        self.tcp.load_full().into()
    }

    /// Connections of this endpoint are ours from now on.
    pub(crate) fn serve_at(&self, endpoint: &quinn::Endpoint) {
        let mut quic = self.quic();
        endpoint.set_server_config(Some(quic.server()));
        quic.endpoints.push(endpoint.clone());
    }

    fn quic(&self) -> MutexGuard<'_, Quic> {
        self.quic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn configs(
    provider: &Arc<CryptoProvider>,
    certificates: &Arc<Certificates>,
    subjects: &[DistinguishedName],
) -> Result<(Arc<ServerConfig>, Arc<QuicServerConfig>), String> {
    let asks = Arc::new(Asks { provider: provider.clone(), subjects: subjects.to_vec() });
    let config = |versions: &[&'static SupportedProtocolVersion], protocols: &[&[u8]]| {
        let mut config = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .map_err(|e| e.to_string())?
            .with_client_cert_verifier(asks.clone())
            .with_cert_resolver(certificates.clone());
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok::<_, String>(config)
    };
    let tcp = config(&[&TLS13, &TLS12], &[b"h2", b"http/1.1", acme::ALPN])?;
    let quic = QuicServerConfig::try_from(config(&[&TLS13], &[b"h3"])?).map_err(|e| e.to_string())?;
    Ok((Arc::new(tcp), Arc::new(quic)))
}

/// Asks for a certificate, and takes any whose key the client holds, or none: whether it is good is seen when a route asks.
#[derive(Debug)]
struct Asks {
    provider: Arc<CryptoProvider>,
    subjects: Vec<DistinguishedName>,
}

impl ClientCertVerifier for Asks {
    fn offer_client_auth(&self) -> bool {
        !self.subjects.is_empty()
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.subjects
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let bytes = rest.iter().map(|certificate| certificate.len()).sum::<usize>() + leaf.len();
        match bytes <= MAX_CHAIN_BYTES && rest.len() <= MAX_INTERMEDIATES {
            true => Ok(ClientCertVerified::assertion()),
            false => Err(CertificateError::BadEncoding.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, leaf, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, leaf, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
