//! A valid member gone bad: it has the key and the certificate of a real node, and speaks gossip by hand.

use std::{net::SocketAddr, path::Path};

use anyhow::{Context, Result};
use bytes::Bytes;
use rcgen::{KeyPair, SigningKey as _};
use rustls::{
    DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime, pem::PemObject},
};
use starling_protocol::{
    Delta, FrameHeader, Framed, Inspect, Items, Life, MAX_FRAME_HEADER_BYTES, MAX_GOSSIP_FRAME_BYTES, MemberState,
    News, NodeId, NodeRecord, Packet, Ping, Pong, Purpose, SignedRecord, Summary, Word, alpn, decode, frame,
    frame_header,
};

use crate::raw_h3::{self, RawClient};

/// What the identity of one node can say. Tells the truth unless it is made to lie.
pub struct Rogue {
    key: KeyPair,
    chain: Vec<CertificateDer<'static>>,
    endpoint: quinn::Endpoint,
    calls: quinn::Endpoint,
}

impl Rogue {
    /// Takes the identity out of a node's state directory; that node must not run.
    pub fn of(state: &Path) -> Result<Self> {
        let read = |name: &str| std::fs::read_to_string(state.join("identity").join(name)).context(name.to_string());
        let key = KeyPair::from_pem(&read("key.pem")?)?;
        let chain: Vec<_> = CertificateDer::pem_slice_iter(read("chain.pem")?.as_bytes()).collect::<Result<_, _>>()?;
        let identity = || (chain.clone(), PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())));
        let endpoint = raw_h3::endpoint(Some(identity()), alpn::GOSSIP)?;
        let calls = raw_h3::endpoint(Some(identity()), alpn::CALLS)?;
        Ok(Self { key, chain, endpoint, calls })
    }

    /// A new connection. A node closes those of members that it gives up, so take one for each thing to say.
    pub async fn dial(&self, to: SocketAddr) -> Result<Line> {
        Ok(Line(self.endpoint.connect(to, "mesh.internal")?.await?))
    }

    /// The same, to call services by hand.
    pub async fn dial_calls(&self, to: SocketAddr) -> Result<RawClient> {
        RawClient::dial(&self.calls, to, "mesh.internal").await
    }

    /// The endpoint that calls are dialled from.
    pub fn calls(&self) -> &quinn::Endpoint {
        &self.calls
    }

    /// How it dials for calls.
    pub fn calls_config(&self) -> quinn::ClientConfig {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        raw_h3::client_config(Some((self.chain.clone(), key)), alpn::CALLS).expect("it was good once")
    }

    /// An endpoint that takes the node's calls in its name, on a port of the system's choice; its connection ids say that they
    /// are calls'.
    pub fn answering(&self) -> Result<quinn::Endpoint> {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(self.chain.clone(), key)?;
        tls.alpn_protocols = vec![alpn::CALLS.to_vec()];
        let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(tls)?;
        let mut config = quinn::EndpointConfig::default();
        config.cid_generator(|| Box::new(raw_h3::ForCalls));
        let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
        let server = quinn::ServerConfig::with_crypto(std::sync::Arc::new(crypto));
        let runtime = std::sync::Arc::new(quinn::TokioRuntime);
        Ok(quinn::Endpoint::new(config, Some(server), socket, runtime)?)
    }

    /// Signs a record, whatever it says.
    pub fn sign(&self, record: &NodeRecord) -> SignedRecord {
        let body = SignedRecord::encode_body(record);
        let signature = self.sign_bytes(&SignedRecord::signed_bytes(&body)).into();
        SignedRecord { body, signature, chain: self.chain.iter().map(|der| Bytes::copy_from_slice(der)).collect() }
    }

    /// ECDSA P-256 with SHA-256, ASN.1, over any bytes.
    pub fn sign_bytes(&self, bytes: &[u8]) -> Vec<u8> {
        self.key.sign(bytes).expect("a P-256 key can sign")
    }

    /// DER of the node's own certificate.
    pub fn certificate(&self) -> Bytes {
        Bytes::copy_from_slice(&self.chain[0])
    }

    /// DER of the certificate of whoever issued it.
    pub fn issuer_certificate(&self) -> Bytes {
        Bytes::copy_from_slice(&self.chain[1])
    }

    /// A word in this node's name or, if it lies, in another's: signed by this node's key.
    pub fn word(&self, kind: u8, by: NodeId, subject: Life, incarnation: u16) -> Word {
        let Life { id, generation } = subject;
        let mut word = Word { kind, subject: id, generation, incarnation, by, raised: true, signature: Vec::new() };
        word.signature = self.sign_bytes(&word.signed_bytes());
        word
    }

    /// How it dials for a protocol, with its certificate.
    pub fn client_config(&self, protocol: &[u8]) -> quinn::ClientConfig {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        raw_h3::client_config(Some((self.chain.clone(), key)), protocol).expect("it was good once")
    }
}

/// A gossip connection of a [`Rogue`].
pub struct Line(quinn::Connection);

impl Line {
    /// Sends a datagram, as it is. Waits while the connection's buffer is full.
    pub async fn datagram(&self, bytes: impl Into<Bytes>) -> Result<()> {
        Ok(self.0.send_datagram_wait(bytes.into()).await?)
    }

    /// The next datagram that the node sends.
    pub async fn heard(&self) -> Result<Bytes> {
        Ok(self.0.read_datagram().await?)
    }

    /// Sends bytes over a stream of their own, as they are, and ends it.
    pub async fn stream(&self, bytes: &[u8]) -> Result<()> {
        let (mut send, _) = self.0.open_bi().await?;
        send.write_all(bytes).await?;
        Ok(send.finish()?)
    }

    /// Pushes items.
    pub async fn push(&self, items: Items) -> Result<()> {
        self.stream(&frame(&items)).await
    }

    /// Everything that the node knows: the answer to one that knows nothing. `last` ends the exchange.
    pub async fn exchange(&self, last: &[u8]) -> Result<Delta> {
        self.exchange_with(Summary::default(), last).await
    }

    /// The answer to one that says so.
    pub async fn exchange_with(&self, summary: Summary, last: &[u8]) -> Result<Delta> {
        let (mut send, mut receive) = self.0.open_bi().await?;
        send.write_all(&frame(&summary)).await?;
        let delta = read(&mut receive).await?;
        send.write_all(last).await?;
        send.finish()?;
        Ok(delta)
    }

    /// A ping over a stream, and its answer.
    pub async fn ping(&self) -> Result<Pong> {
        self.ping_suspecting(None).await
    }

    /// The same, saying that the node is suspected at that incarnation.
    pub async fn ping_suspecting(&self, suspected: Option<u16>) -> Result<Pong> {
        let (mut send, mut receive) = self.0.open_bi().await?;
        send.write_all(&frame(&Ping { suspected })).await?;
        send.finish()?;
        read(&mut receive).await
    }

    /// Opens a stream and asks for a view of the mesh; does not wait for it. Whether the stream could be opened.
    pub async fn pester(&self) -> bool {
        let Ok((mut send, _)) = self.0.open_bi().await else { return false };
        // A stream that is refused is stopped, perhaps before everything is written.
        let _ = send.write_all(&frame(&Inspect {})).await;
        let _ = send.finish();
        true
    }
}

/// Reads a frame: its kind, and its body.
pub async fn read_frame(receive: &mut quinn::RecvStream) -> Result<(u64, Bytes)> {
    let mut header = [0; MAX_FRAME_HEADER_BYTES];
    for length in 1..=header.len() {
        receive.read_exact(&mut header[length - 1..length]).await?;
        if let Some(FrameHeader { kind, length, .. }) = frame_header(&header[..length], MAX_GOSSIP_FRAME_BYTES)? {
            let mut body = vec![0; length];
            receive.read_exact(&mut body).await?;
            return Ok((kind, body.into()));
        }
    }
    anyhow::bail!("no frame")
}

async fn read<T: Framed>(receive: &mut quinn::RecvStream) -> Result<T> {
    let (kind, body) = read_frame(receive).await?;
    anyhow::ensure!(kind == T::KIND, "an answer of kind {kind}");
    Ok(decode(&body)?)
}

/// A gossip packet with a root hash that nobody has.
pub fn packet(source: Life, receiver: Life, purpose: Purpose, news: &[News]) -> Packet {
    let (news, words) = (news.to_vec(), Vec::new());
    Packet { root: 0x0707_0707, source, incarnation: 0, receiver, purpose, probe: 1, news, words }
}

/// How a liar says that a member is.
pub fn claim(life: Life, incarnation: u16, health: starling_protocol::MemberHealth) -> MemberState {
    let Life { id, generation } = life;
    MemberState { id, generation, seq: 1, incarnation, health, down_s: 1 }
}

/// Believes every server: an attacker does not care whom it talks to.
#[derive(Debug)]
pub struct AnyServer(CryptoProvider);

impl Default for AnyServer {
    fn default() -> Self {
        Self(rustls::crypto::aws_lc_rs::default_provider())
    }
}

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

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
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
