//! Mutual TLS on the mesh port. The only module that makes a [`Peer`].

use std::{sync::Arc, time::Duration};

use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use rustls::{
    CertificateError as TlsCertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme,
    client::{
        ResolvesClientCert, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ClientHello, NoServerSessionStorage, ResolvesServerCert,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};
use starling_gossip::Snapshot;
use starling_protocol::{Name, NodeId, alpn};
use tokio::sync::watch;

use crate::identity::{CertificateError, Identity, sha256, unix_now, verify_chain};

/// How long a certificate that has ended may still ask for the next one, and do nothing else: a host that slept over a
/// weekend must not need a person.
pub(crate) const EXPIRED_GRACE: Duration = Duration::from_secs(7 * 86400);

/// Name that is sent as SNI. Nodes are told apart by their certificates' SPIFFE ids, not by host names.
pub(crate) const SERVER_NAME: &str = "mesh.internal";

/// The authenticated other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Peer {
    /// Who.
    pub id: NodeId,
    /// Its name.
    pub name: Name,
    /// Services that its certificate grants.
    pub services: Vec<Name>,
    /// Whether it may be an edge.
    pub edge: bool,
    /// End of its certificate, unix seconds. Nothing new begins on the connection then.
    pub expires: u64,
}

impl Peer {
    /// The authenticated peer of a connection whose handshake is complete. The certificate is judged again, at this
    /// moment, because the handshake also lets in those that may only renew.
    pub(crate) fn of(connection: &quinn::Connection, identity: &Identity) -> Result<Self, CertificateError> {
        let chain = connection
            .peer_identity()
            .and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok())
            .ok_or_else(|| CertificateError::Chain("the peer showed no certificate".into()))?;
        let leaf = identity.check_chain(&chain, Duration::ZERO)?;
        Ok(Self {
            id: leaf.id,
            name: leaf.name.clone(),
            services: leaf.services.clone(),
            edge: leaf.edge,
            expires: leaf.not_after,
        })
    }
}

/// When a connection that was just dialled is given up, unix seconds: some time before the first of the two certificates ends
/// that made it, so that what is under way can finish. The peer hangs up at the end itself.
pub(crate) fn useful_until(peer: &Peer, identity: &Identity) -> u64 {
    const MARGIN_S: u64 = 60;
    let ends = peer.expires.min(identity.validity().1);
    ends - MARGIN_S.min(ends.saturating_sub(unix_now()) / 10)
}

/// Resolves when nothing vouches for a peer any more: its certificate has ended, and those that came after it, by its record, which
/// the same key has signed; or the mesh knows it no more. What has begun by a former certificate goes on as long as that. Cancel
/// safe.
pub(crate) async fn vouched_for(id: NodeId, expires: u64, mesh: watch::Receiver<Arc<Snapshot>>) {
    /// How often it is looked whether it is a member.
    const LOOK_S: u64 = 30;
    until(expires).await;
    loop {
        let renewed = mesh.borrow().member(&id).and_then(|member| member.record.as_ref()).map(|r| r.cert_expires);
        match renewed.filter(|ends| *ends > unix_now()) {
            Some(ends) => until(ends.min(unix_now() + LOOK_S)).await,
            None => return,
        }
    }
}

/// Resolves at that time by the wall clock, which goes on while the machine sleeps. Cancel safe.
pub(crate) async fn until(unix: u64) {
    const LOOK: Duration = Duration::from_secs(30);
    while let left @ 1.. = unix.saturating_sub(unix_now()) {
        tokio::time::sleep(Duration::from_secs(left).min(LOOK)).await;
    }
}

/// The protocol that a connection speaks.
pub(crate) fn protocol_of(connection: &quinn::Connection) -> Option<Vec<u8>> {
    connection.handshake_data()?.downcast::<HandshakeData>().ok()?.protocol
}

/// Server side: the three protocols of the mesh port.
pub(crate) fn server_crypto(identity: &Arc<Identity>) -> Arc<QuicServerConfig> {
    let mut config = rustls::ServerConfig::builder_with_provider(identity.provider().clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3")
        .with_client_cert_verifier(Arc::new(MeshVerifier(identity.clone())))
        .with_cert_resolver(Arc::new(OwnCertificate(identity.clone())));
    config.alpn_protocols = vec![alpn::CALLS.to_vec(), alpn::GOSSIP.to_vec(), alpn::JOIN.to_vec()];
    // Each connection proves itself anew: a resumed session would carry a certificate past its end or its revocation.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Arc::new(QuicServerConfig::try_from(config).expect("the provider has AES-128-GCM"))
}

/// Client side, as a member, for one protocol.
pub(crate) fn client_crypto(identity: &Arc<Identity>, protocol: &[u8]) -> Arc<QuicClientConfig> {
    let config = rustls::ClientConfig::builder_with_provider(identity.provider().clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(MeshVerifier(identity.clone())))
        .with_client_cert_resolver(Arc::new(OwnCertificate(identity.clone())));
    quic_client(config, protocol)
}

/// Client side of a node that has only a token: it trusts the root with that SHA-256 fingerprint, and shows nothing.
pub(crate) fn joining_crypto(provider: Arc<CryptoProvider>, root: [u8; 32]) -> Arc<QuicClientConfig> {
    let verifier = PinnedRoot { root, provider: provider.clone() };
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    quic_client(config, alpn::JOIN)
}

fn quic_client(mut config: rustls::ClientConfig, protocol: &[u8]) -> Arc<QuicClientConfig> {
    config.alpn_protocols = vec![protocol.to_vec()];
    config.resumption = Resumption::disabled();
    Arc::new(QuicClientConfig::try_from(config).expect("the provider has AES-128-GCM"))
}

/// Shows this node's certificate, always the newest.
struct OwnCertificate(Arc<Identity>);

impl std::fmt::Debug for OwnCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OwnCertificate({})", self.0.name())
    }
}

impl ResolvesServerCert for OwnCertificate {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let joining = hello.alpn().is_some_and(|mut protocols| protocols.any(|p| p == alpn::JOIN));
        let current = self.0.current();
        Some(if joining { current.certified_with_root.clone() } else { current.certified.clone() })
    }
}

impl ResolvesClientCert for OwnCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.current().certified.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Checks the other end's chain, in both directions. Client certificates are optional *in the handshake* because the
/// handshake is over before it is known which protocol the client meant; [`Peer::of`] is what makes them mandatory.
struct MeshVerifier(Arc<Identity>);

impl std::fmt::Debug for MeshVerifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MeshVerifier({})", self.0.mesh())
    }
}

impl MeshVerifier {
    fn provider(&self) -> &CryptoProvider {
        self.0.provider()
    }

    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        issuers: &[CertificateDer<'_>],
        grace: Duration,
    ) -> Result<(), rustls::Error> {
        let chain: Vec<CertificateDer<'_>> = std::iter::once(leaf).chain(issuers).cloned().collect();
        self.0.check_chain(&chain, grace).map(|_| ()).map_err(|e| {
            tracing::debug!(error = %e, "refused a peer's certificate");
            rustls::Error::InvalidCertificate(match e {
                CertificateError::Expired => TlsCertificateError::Expired,
                CertificateError::Chain(_) | CertificateError::OtherMesh(_) => TlsCertificateError::UnknownIssuer,
                CertificateError::Names(_) => TlsCertificateError::BadEncoding,
            })
        })
    }
}

/// The handshake signature checks that any verifier needs; TLS 1.2 is never offered.
macro_rules! tls13_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            let algorithms = &self.provider().signature_verification_algorithms;
            rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.provider().signature_verification_algorithms.supported_schemes()
        }
    };
}

impl ClientCertVerifier for MeshVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        issuers: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(leaf, issuers, EXPIRED_GRACE)?;
        Ok(ClientCertVerified::assertion())
    }

    tls13_signatures!();
}

impl ServerCertVerifier for MeshVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        issuers: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(leaf, issuers, Duration::ZERO)?;
        Ok(ServerCertVerified::assertion())
    }

    tls13_signatures!();
}

/// Trusts the chain that ends in one known root, which the server sends along.
#[derive(Debug)]
struct PinnedRoot {
    root: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl PinnedRoot {
    fn provider(&self) -> &CryptoProvider {
        &self.provider
    }
}

impl ServerCertVerifier for PinnedRoot {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        issuers: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let unknown = || rustls::Error::InvalidCertificate(TlsCertificateError::UnknownIssuer);
        let [issuer, root] = issuers else { return Err(unknown()) };
        if sha256(root) != self.root {
            return Err(unknown());
        }
        let mut roots = RootCertStore::empty();
        roots.add(root.clone().into_owned())?;
        verify_chain(leaf, std::slice::from_ref(issuer), &roots, unix_now(), &self.provider)?;
        Ok(ServerCertVerified::assertion())
    }

    tls13_signatures!();
}
