//! A valid member gone bad: it has the key and the certificate of a real node, and speaks gossip by hand.

use std::{net::SocketAddr, path::Path};

use anyhow::{Context, Result};
use bytes::{BufMut, Bytes};
use foca::{Codec, Header, Member, Message, PostcardCodec};
use rcgen::{KeyPair, SigningKey as _};
use rustls::{
    DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime, pem::PemObject},
};
use starling_gossip::Ident;
use starling_protocol::{
    Delta, FRAME_HEADER_BYTES, GossipRequest, Items, MAX_GOSSIP_FRAME_BYTES, NodeRecord, Pong, SignedRecord, Summary,
    alpn, decode, frame, frame_length,
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
        let signature = self.sign_bytes(&SignedRecord::signed_bytes(&body));
        SignedRecord { body, signature, chain: self.chain.iter().map(|der| der.to_vec()).collect() }
    }

    /// ECDSA P-256 with SHA-256, ASN.1, over any bytes.
    pub fn sign_bytes(&self, bytes: &[u8]) -> Vec<u8> {
        self.key.sign(bytes).expect("a P-256 key can sign")
    }

    /// DER of the node's own certificate.
    pub fn certificate(&self) -> Vec<u8> {
        self.chain[0].to_vec()
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
        self.stream(&frame(&GossipRequest::Push(items))).await
    }

    /// Everything that the node knows: the answer to one that knows nothing. `last` ends the exchange.
    pub async fn exchange(&self, last: &[u8]) -> Result<Delta> {
        let (mut send, mut receive) = self.0.open_bi().await?;
        send.write_all(&frame(&GossipRequest::Sync(Summary::default()))).await?;
        let delta = read(&mut receive).await?;
        send.write_all(last).await?;
        send.finish()?;
        Ok(delta)
    }

    /// A ping over a stream, and its answer.
    pub async fn ping(&self) -> Result<Pong> {
        let (mut send, mut receive) = self.0.open_bi().await?;
        send.write_all(&frame(&GossipRequest::Ping { suspected: None })).await?;
        send.finish()?;
        read(&mut receive).await
    }

    /// Opens a stream and asks for a view of the mesh; does not wait for it. Whether the stream could be opened.
    pub async fn pester(&self) -> bool {
        let Ok((mut send, _)) = self.0.open_bi().await else { return false };
        // A stream that is refused is stopped, perhaps before everything is written.
        let _ = send.write_all(&frame(&GossipRequest::Inspect)).await;
        let _ = send.finish();
        true
    }
}

async fn read<T: serde::de::DeserializeOwned>(receive: &mut quinn::RecvStream) -> Result<T> {
    let mut header = [0; FRAME_HEADER_BYTES];
    receive.read_exact(&mut header).await?;
    let mut body = vec![0; frame_length(header, MAX_GOSSIP_FRAME_BYTES)?];
    receive.read_exact(&mut body).await?;
    Ok(decode(&body)?)
}

/// A gossip datagram: no root hash that anybody has, the header, and news of members.
pub fn packet(src: Ident, dst: Ident, message: Message<Ident>, news: &[Member<Ident>]) -> Vec<u8> {
    let mut bytes = vec![7; starling_protocol::ROOT_HASH_BYTES];
    let header = Header { src, src_incarnation: 0, dst, message };
    PostcardCodec.encode_header(&header, &mut bytes).expect("a vector grows");
    bytes.put_u16(news.len() as u16);
    for member in news {
        PostcardCodec.encode_member(member, &mut bytes).expect("a vector grows");
    }
    bytes
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
