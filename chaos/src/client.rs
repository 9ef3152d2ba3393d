use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow};
use bytes::{Buf, Bytes};
use http::{HeaderMap, Request, Uri, header};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use tokio::net::TcpStream;

const TIMEOUT: Duration = Duration::from_secs(60);
const CHUNK_BYTES: usize = 64 << 10;

/// How to reach a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// HTTP/1.1 without TLS.
    PlainHttp1,
    /// HTTP/2 without TLS, prior knowledge.
    PlainHttp2,
    /// HTTP/1.1 over TLS.
    Http1,
    /// HTTP/2 over TLS.
    Http2,
    /// HTTP/3.
    Http3,
}

impl Door {
    /// The three public protocols.
    pub const PUBLIC: [Self; 3] = [Self::Http1, Self::Http2, Self::Http3];
}

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status.
    pub status: u16,
    /// Fields.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
}

impl Answer {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// A field as text, empty if it is not there.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
    }
}

/// One request a connection, over any of the doors.
#[derive(Debug, Clone)]
pub struct Client {
    roots: RootCertStore,
    /// What it shows of itself, in PEM: a chain and its key.
    shown: Option<(String, String)>,
}

impl Client {
    /// For doors without TLS.
    pub fn plain() -> Self {
        Self { roots: RootCertStore::empty(), shown: None }
    }

    /// Trusts the certificates of a PEM file, and no others.
    pub fn trusting(pem: &Path) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(pem)? {
            roots.add(certificate?)?;
        }
        Ok(Self { roots, shown: None })
    }

    /// Shows a certificate to servers that ask for one: a chain and its key, in PEM.
    pub fn showing(self, chain: &str, key: &str) -> Self {
        Self { shown: Some((chain.to_owned(), key.to_owned())), ..self }
    }

    /// GET over plain HTTP/1.1.
    pub async fn get(&self, addr: SocketAddr, host: &str, path: &str) -> Result<Answer> {
        let request = Request::builder().uri(format!("http://{host}{path}")).body(Bytes::new())?;
        self.send(Door::PlainHttp1, addr, request).await
    }

    /// Sends a request whose target is absolute; its authority becomes Host and server name.
    pub async fn send(&self, door: Door, addr: SocketAddr, request: Request<Bytes>) -> Result<Answer> {
        let host = request.uri().host().unwrap_or_default().to_string();
        let sent = async {
            match door {
                Door::PlainHttp1 => send_http1(TcpStream::connect(addr).await?, request).await,
                Door::PlainHttp2 => send_http2(TcpStream::connect(addr).await?, request).await,
                Door::Http1 => send_http1(self.connect_tls(addr, &host, b"http/1.1").await?, request).await,
                Door::Http2 => send_http2(self.connect_tls(addr, &host, b"h2").await?, request).await,
                Door::Http3 => self.send_http3(addr, request).await,
            }
        };
        tokio::time::timeout(TIMEOUT, sent).await.context("no answer in time")?
    }

    /// For connections of that protocol.
    pub(crate) fn tls(&self, protocol: &[u8]) -> Result<rustls::ClientConfig> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(self.roots.clone());
        let mut config = match &self.shown {
            Some((chain, key)) => {
                let chain = CertificateDer::pem_slice_iter(chain.as_bytes()).collect::<Result<_, _>>()?;
                config.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key.as_bytes())?)?
            }
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![protocol.to_vec()];
        Ok(config)
    }

    /// A TLS connection to a server of that name, for one protocol.
    pub async fn connect_tls(
        &self,
        addr: SocketAddr,
        host: &str,
        protocol: &[u8],
    ) -> Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let name = ServerName::try_from(host.to_string())?;
        let connector = tokio_rustls::TlsConnector::from(Arc::new(self.tls(protocol)?));
        Ok(connector.connect(name, TcpStream::connect(addr).await?).await?)
    }

    /// A QUIC connection to a server of that name, for HTTP/3, and the endpoint that it lives on.
    pub async fn connect_quic(&self, addr: SocketAddr, host: &str) -> Result<(quinn::Connection, quinn::Endpoint)> {
        let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(self.tls(b"h3")?)?;
        let mut endpoint = quinn::Endpoint::client(([127, 0, 0, 1], 0).into())?;
        endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
        Ok((endpoint.connect(addr, host)?.await?, endpoint))
    }

    async fn send_http3(&self, addr: SocketAddr, request: Request<Bytes>) -> Result<Answer> {
        let name = request.uri().host().unwrap_or_default().to_string();
        let (connection, _endpoint) = self.connect_quic(addr, &name).await?;
        let (mut driver, mut sender) = h3::client::new(h3_quinn::Connection::new(connection)).await?;
        let driving = tokio::spawn(async move { std::future::poll_fn(|cx| driver.poll_close(cx)).await });

        let (parts, mut body) = request.into_parts();
        let (mut send, mut receive) = sender.send_request(Request::from_parts(parts, ())).await?.split();
        let upload = tokio::spawn(async move {
            while body.has_remaining() {
                let chunk = body.split_to(CHUNK_BYTES.min(body.len()));
                // An early answer may stop the upload; the answer itself tells.
                if send.send_data(chunk).await.is_err() {
                    return;
                }
            }
            let _ = send.finish().await;
        });
        let (head, ()) = receive.recv_response().await?.into_parts();
        let mut body = Vec::new();
        while let Some(mut data) = receive.recv_data().await? {
            while data.has_remaining() {
                let chunk = data.chunk().len();
                body.extend_from_slice(data.chunk());
                data.advance(chunk);
            }
        }
        upload.abort();
        driving.abort();
        Ok(Answer { status: head.status.as_u16(), headers: head.headers, body: body.into() })
    }
}

async fn send_http1(
    stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    mut request: Request<Bytes>,
) -> Result<Answer> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let driving = tokio::spawn(connection);
    let host = request.uri().authority().ok_or_else(|| anyhow!("no authority"))?.to_string();
    request.headers_mut().insert(header::HOST, host.parse()?);
    let path = request.uri().path_and_query().map_or("/".into(), ToString::to_string);
    *request.uri_mut() = path.parse::<Uri>()?;
    let answer = collect(sender.send_request(request.map(Full::new)).await?).await;
    driving.abort();
    answer
}

async fn send_http2(
    stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    request: Request<Bytes>,
) -> Result<Answer> {
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    let driving = tokio::spawn(connection);
    let answer = collect(sender.send_request(request.map(Full::new)).await?).await;
    driving.abort();
    answer
}

async fn collect(response: http::Response<hyper::body::Incoming>) -> Result<Answer> {
    let (head, body) = response.into_parts();
    let body = body.collect().await?.to_bytes();
    Ok(Answer { status: head.status.as_u16(), headers: head.headers, body })
}

/// Writes a self-signed certificate and its key, PEM, for these host names.
pub fn self_signed(hosts: &[&str], cert: &Path, key: &Path) -> Result<()> {
    let hosts: Vec<String> = hosts.iter().map(ToString::to_string).collect();
    let made = rcgen::generate_simple_self_signed(hosts)?;
    std::fs::write(cert, made.cert.pem())?;
    std::fs::write(key, made.signing_key.serialize_pem())?;
    Ok(())
}
