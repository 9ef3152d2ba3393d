//! HTTP/3 by hand, over quinn: for what no decent client would send. Knows just enough QPACK to be understood.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use quinn::{ConnectionId, ConnectionIdGenerator, ReadError, VarInt, WriteError, crypto::rustls::QuicClientConfig};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::rogue::AnyServer;

/// How long an answer, or an error, may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Frame types.
pub const DATA: u64 = 0x00;
/// A field section.
pub const HEADERS: u64 = 0x01;
/// Settings.
pub const SETTINGS: u64 = 0x04;

/// The head of a GET that any server of ours answers.
pub const GET: [(&str, &str); 4] = [(":method", "GET"), (":scheme", "https"), (":authority", "x"), (":path", "/")];

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// An answer with that status, and how long its body was.
    Answer(u16, usize),
    /// The stream was reset with that code.
    Reset(u64),
    /// The connection was closed with that code.
    Closed(u64),
}

/// A variable-length integer (RFC 9000 §16), as short as it can be.
pub fn varint(value: u64) -> Vec<u8> {
    match value {
        0..=0x3f => vec![value as u8],
        0x40..=0x3fff => (value as u16 | 0x4000).to_be_bytes().into(),
        0x4000..=0x3fff_ffff => (value as u32 | 0x8000_0000).to_be_bytes().into(),
        _ => (value | 0xc000_0000_0000_0000).to_be_bytes().into(),
    }
}

/// A frame.
pub fn frame(kind: u64, payload: impl AsRef<[u8]>) -> Vec<u8> {
    let payload = payload.as_ref();
    [varint(kind), varint(payload.len() as u64), payload.to_vec()].concat()
}

/// A field section, every name and value spelt out.
pub fn section(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut out = vec![0, 0];
    let mut text = |prefix: u8, flags: u8, text: &str| {
        let mask = (1usize << prefix) - 1;
        if text.len() < mask {
            out.push(flags | text.len() as u8);
        } else {
            out.push(flags | mask as u8);
            let mut rest = text.len() - mask;
            while rest >= 0x80 {
                out.push(rest as u8 | 0x80);
                rest >>= 7;
            }
            out.push(rest as u8);
        }
        out.extend_from_slice(text.as_bytes());
    };
    for (name, value) in fields {
        text(3, 0x20, name);
        text(7, 0, value);
    }
    out
}

/// A HEADERS frame.
pub fn head(fields: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, section(fields))
}

/// A certificate's chain and its key.
pub type Shown = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// A client endpoint that believes every server, and shows a certificate if it has one.
pub fn endpoint(identity: Option<Shown>, protocol: &[u8]) -> Result<quinn::Endpoint> {
    let mut endpoint = quinn::Endpoint::client(([127, 0, 0, 1], 0).into())?;
    endpoint.set_default_client_config(client_config(identity, protocol)?);
    Ok(endpoint)
}

/// How such an endpoint dials.
pub fn client_config(identity: Option<Shown>, protocol: &[u8]) -> Result<quinn::ClientConfig> {
    let tls = tls_config(identity, protocol)?;
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    // On a mesh port, the first byte aims a connection at the thread that takes calls.
    config.initial_dst_cid_provider(Arc::new(|| ForCalls.generate_cid()));
    Ok(config)
}

/// TLS that believes every server, and shows a certificate if it has one.
pub fn tls_config(identity: Option<Shown>, protocol: &[u8]) -> Result<rustls::ClientConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer::default()));
    let mut tls = match identity {
        Some((chain, key)) => tls.with_client_auth_cert(chain, key)?,
        None => tls.with_no_client_auth(),
    };
    tls.alpn_protocols = vec![protocol.to_vec()];
    Ok(tls)
}

/// Connection ids of the thread that takes calls.
#[derive(Debug)]
pub struct ForCalls;

impl ConnectionIdGenerator for ForCalls {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id: [u8; 8] = rand::random();
        id[0] = 1;
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        8
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// A connection to a server, on which nothing of HTTP/3 has been said.
pub struct RawClient {
    connection: quinn::Connection,
    control: Option<quinn::SendStream>,
}

impl RawClient {
    /// Dials; says nothing.
    pub async fn silent(endpoint: &quinn::Endpoint, to: SocketAddr, name: &str) -> Result<Self> {
        Ok(Self { connection: endpoint.connect(to, name)?.await?, control: None })
    }

    /// Dials and opens a control stream with empty SETTINGS.
    pub async fn dial(endpoint: &quinn::Endpoint, to: SocketAddr, name: &str) -> Result<Self> {
        Self::silent(endpoint, to, name).await?.introduced().await
    }

    /// The same, not as the endpoint is used to.
    pub async fn dial_with(
        endpoint: &quinn::Endpoint,
        config: quinn::ClientConfig,
        to: SocketAddr,
        name: &str,
    ) -> Result<Self> {
        let connection = endpoint.connect_with(config, to, name)?.await?;
        Self { connection, control: None }.introduced().await
    }

    async fn introduced(mut self) -> Result<Self> {
        let client = &mut self;
        client.control = Some(client.one_way(&[varint(0), frame(SETTINGS, [])].concat()).await?);
        Ok(self)
    }

    /// The connection.
    pub fn connection(&self) -> &quinn::Connection {
        &self.connection
    }

    /// The control stream.
    pub fn control(&mut self) -> &mut quinn::SendStream {
        self.control.as_mut().expect("dialled, not silent")
    }

    /// Opens a stream one way and writes to it.
    pub async fn one_way(&self, bytes: &[u8]) -> Result<quinn::SendStream> {
        let mut stream = self.connection.open_uni().await?;
        stream.write_all(bytes).await?;
        Ok(stream)
    }

    /// Opens a request's stream, writes to it and leaves it open.
    pub async fn open(&self, bytes: &[u8]) -> Result<(quinn::SendStream, quinn::RecvStream)> {
        let (mut send, receive) = self.connection.open_bi().await?;
        write(&mut send, bytes).await?;
        Ok((send, receive))
    }

    /// Sends all that on a request's stream, ends it, and waits for what becomes of it.
    pub async fn request(&self, bytes: &[u8]) -> Result<Outcome> {
        let Ok((mut send, receive)) = self.open(bytes).await else { return self.closed().await };
        let _ = send.finish();
        self.outcome(receive).await
    }

    /// The same, a byte at a time.
    pub async fn request_in_drops(&self, bytes: &[u8]) -> Result<Outcome> {
        let (mut send, receive) = self.open(&[]).await?;
        for byte in bytes {
            if write(&mut send, &[*byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let _ = send.finish();
        self.outcome(receive).await
    }

    /// Waits for what becomes of a request.
    pub async fn outcome(&self, receive: quinn::RecvStream) -> Result<Outcome> {
        tokio::time::timeout(PATIENCE, self.read(receive)).await.context("no answer and no error")?
    }

    async fn read(&self, mut receive: quinn::RecvStream) -> Result<Outcome> {
        let mut bytes = Vec::new();
        loop {
            match receive.read_chunk(usize::MAX, true).await {
                Ok(Some(chunk)) => bytes.extend_from_slice(&chunk.bytes),
                Ok(None) => break,
                Err(ReadError::Reset(code)) => return Ok(Outcome::Reset(code.into_inner())),
                Err(_) => return self.closed().await,
            }
        }
        let (mut status, mut body, mut rest) = (None, 0, &bytes[..]);
        while !rest.is_empty() {
            let (kind, length, payload) = parse_frame(rest).context("an answer of whole frames")?;
            match kind {
                HEADERS if status.is_none() => status = Some(parse_status(&payload[..length])?),
                DATA => body += length,
                _ => {}
            }
            rest = &payload[length..];
        }
        Ok(Outcome::Answer(status.context("an answer with a head")?, body))
    }

    /// Waits for the connection's end.
    pub async fn closed(&self) -> Result<Outcome> {
        match tokio::time::timeout(PATIENCE, self.connection.closed()).await.context("the connection stays open")? {
            quinn::ConnectionError::ApplicationClosed(close) => Ok(Outcome::Closed(close.error_code.into_inner())),
            other => bail!("the connection ended by itself: {other}"),
        }
    }
}

/// Writes; a stream that the server has stopped is the server's affair.
async fn write(send: &mut quinn::SendStream, bytes: &[u8]) -> Result<()> {
    match send.write_all(bytes).await {
        Ok(()) | Err(WriteError::Stopped(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn parse_frame(bytes: &[u8]) -> Option<(u64, usize, &[u8])> {
    let (kind, rest) = parse_varint(bytes)?;
    let (length, payload) = parse_varint(rest)?;
    let length = usize::try_from(length).ok().filter(|length| *length <= payload.len())?;
    Some((kind, length, payload))
}

fn parse_varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let first = *bytes.first()?;
    let (own, rest) = bytes.split_at_checked(1 << (first >> 6))?;
    Some((own[1..].iter().fold(u64::from(first & 0x3f), |value, byte| value << 8 | u64::from(*byte)), rest))
}

/// The heads of an answer, of which the interim ones come first: status and encoded fields of each.
pub fn heads(mut answer: &[u8]) -> Result<Vec<(u16, Vec<u8>)>> {
    let mut heads = Vec::new();
    while !answer.is_empty() {
        let (kind, length, payload) = parse_frame(answer).context("an answer of whole frames")?;
        if kind == HEADERS {
            heads.push((parse_status(&payload[..length])?, payload[..length].to_vec()));
        }
        answer = &payload[length..];
    }
    Ok(heads)
}

/// `:status` comes first: from the static table (RFC 9204 Appendix A), or by its name there and three digits.
fn parse_status(section: &[u8]) -> Result<u16> {
    Ok(match section {
        [0, 0, 0xd8, ..] => 103,
        [0, 0, 0xd9, ..] => 200,
        [0, 0, 0xda, ..] => 304,
        [0, 0, 0xdb, ..] => 404,
        [0, 0, 0xdc, ..] => 503,
        [0, 0, 0xff, n @ 0..=8, ..] => [100, 204, 206, 302, 400, 403, 421, 425, 500][*n as usize],
        [0, 0, 0x5f, 0x09, 3, a, b, c, ..] => std::str::from_utf8(&[*a, *b, *c])?.parse()?,
        other => bail!("an answer starts with {:x?}", &other[..other.len().min(8)]),
    })
}

/// A code for [`quinn::SendStream::reset`].
pub fn code(code: u32) -> VarInt {
    VarInt::from_u32(code)
}
