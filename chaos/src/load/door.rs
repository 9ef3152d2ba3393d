//! A door of the mesh, and the connections that a client keeps to it.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use anyhow::{Context, Result, anyhow, bail};
use bytes::{Buf, Bytes};
use http::{HeaderMap, Request, Response, Uri, header};
use http_body::Body as _;
use http_body_util::{BodyExt, Full};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;

use crate::{plan::DoorKind, stage::Place};

type H3Sender = h3::client::SendRequest<h3_quinn::OpenStreams, Bytes>;

/// Connections that are kept while nobody uses them.
const MOST_IDLE: usize = 256;

/// How to get at a door.
#[derive(Clone)]
pub(crate) struct Door {
    pub(crate) kind: DoorKind,
    /// Node or edge.
    pub(crate) node: String,
    pub(crate) addr: SocketAddr,
    /// Where the client is.
    pub(crate) from: Place,
    /// Host, or server name, of a call; `None`: by the service's name.
    pub(crate) host: Option<String>,
    /// Sent along with every call.
    pub(crate) headers: HeaderMap,
    /// For TLS.
    pub(crate) tls: Option<Arc<rustls::ClientConfig>>,
    /// The one service behind it; `None`: all.
    pub(crate) only: Option<String>,
    kept: Arc<Kept>,
}

#[derive(Default)]
struct Kept {
    http1: Mutex<Vec<http1::SendRequest<Full<Bytes>>>>,
    http2: tokio::sync::Mutex<Option<http2::SendRequest<Full<Bytes>>>>,
    http3: tokio::sync::Mutex<Option<(H3Sender, quinn::Connection)>>,
}

/// What a call's answer came to.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) bytes: usize,
    /// The body of a short answer.
    pub(crate) text: String,
}

/// Longer answers are not kept.
const SHORT_BYTES: usize = 4096;

impl Door {
    pub(crate) fn new(kind: DoorKind, node: &str, addr: SocketAddr, from: Place) -> Self {
        let (host, headers, tls, only, kept) = Default::default();
        Self { kind, node: node.into(), addr, from, host, headers, tls, only, kept }
    }

    /// Sends a call, and reads its whole answer through `read`.
    pub(crate) async fn call(
        &self,
        service: &str,
        request: Request<Bytes>,
        read: &mut (dyn FnMut(&[u8]) + Send),
    ) -> Result<Answer> {
        let (mut parts, body) = request.into_parts();
        let path = parts.uri.path().to_string();
        let (host, path) = match &self.host {
            // An edge takes the service from the path.
            Some(host) => (host.clone(), format!("/{service}{path}")),
            None => (format!("{service}.mesh.internal"), path),
        };
        parts.uri = format!("{}://{host}{path}", if self.tls.is_some() { "https" } else { "http" }).parse()?;
        parts.headers.extend(self.headers.clone());
        let request = Request::from_parts(parts, body);
        match self.kind {
            DoorKind::OutboundHttp1 | DoorKind::Upstream | DoorKind::EdgeHttp1 => self.http1(request, read).await,
            DoorKind::OutboundHttp2 | DoorKind::EdgeHttp2 => self.http2(request, read).await,
            DoorKind::EdgeHttp3 => self.http3(request, read).await,
        }
    }

    async fn http1(&self, mut request: Request<Bytes>, read: &mut (dyn FnMut(&[u8]) + Send)) -> Result<Answer> {
        let host = request.uri().authority().context("no authority")?.to_string();
        request.headers_mut().insert(header::HOST, host.parse()?);
        *request.uri_mut() = request.uri().path().parse::<Uri>()?;
        let request = request.map(Full::new);
        loop {
            let kept = self.kept.http1.lock().unwrap_or_else(|e| e.into_inner()).pop();
            let is_kept = kept.is_some();
            let mut sender = match kept {
                Some(sender) if sender.is_closed() => continue,
                Some(sender) => sender,
                None => self.connect_http1(&host).await?,
            };
            let response = match sender.send_request(request.clone()).await {
                Ok(response) => response,
                // It was closed before anything was sent.
                Err(error) if is_kept && error.is_canceled() => continue,
                Err(error) => return Err(error.into()),
            };
            let answer = collect(response, read).await?;
            if sender.ready().await.is_ok() {
                let mut idle = self.kept.http1.lock().unwrap_or_else(|e| e.into_inner());
                if idle.len() < MOST_IDLE {
                    idle.push(sender);
                }
            }
            return Ok(answer);
        }
    }

    async fn connect_http1(&self, host: &str) -> Result<http1::SendRequest<Full<Bytes>>> {
        let stream = self.from.connect(self.addr).await.context("connect")?;
        let (sender, connection) = match &self.tls {
            None => {
                let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
                (sender, tokio::spawn(async move { drop(connection.await) }))
            }
            Some(tls) => {
                let stream = self.connect_tls(tls, host, b"http/1.1", stream).await?;
                let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
                (sender, tokio::spawn(async move { drop(connection.await) }))
            }
        };
        drop(connection);
        Ok(sender)
    }

    async fn http2(&self, request: Request<Bytes>, read: &mut (dyn FnMut(&[u8]) + Send)) -> Result<Answer> {
        let mut sender = {
            let mut kept = self.kept.http2.lock().await;
            match &*kept {
                Some(sender) if !sender.is_closed() => sender.clone(),
                _ => {
                    let host = request.uri().host().unwrap_or_default().to_string();
                    kept.insert(self.connect_http2(&host).await?).clone()
                }
            }
        };
        let response = sender.send_request(request.map(Full::new)).await?;
        collect(response, read).await
    }

    /// A TLS connection for HTTP/1.1 that nobody has written on, and the public host's name.
    pub(crate) async fn connect_raw(&self) -> Result<(tokio_rustls::client::TlsStream<tokio::net::TcpStream>, String)> {
        let (tls, host) = (self.tls.as_ref().context("no TLS here")?, self.host.clone().unwrap_or_default());
        let stream = self.from.connect(self.addr).await?;
        Ok((self.connect_tls(tls, &host, b"http/1.1", stream).await?, host))
    }

    async fn connect_http2(&self, host: &str) -> Result<http2::SendRequest<Full<Bytes>>> {
        let stream = self.from.connect(self.addr).await.context("connect")?;
        match &self.tls {
            None => {
                let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
                tokio::spawn(async move { drop(connection.await) });
                Ok(sender)
            }
            Some(tls) => {
                let stream = self.connect_tls(tls, host, b"h2", stream).await?;
                let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
                tokio::spawn(async move { drop(connection.await) });
                Ok(sender)
            }
        }
    }

    async fn connect_tls(
        &self,
        tls: &rustls::ClientConfig,
        host: &str,
        protocol: &[u8],
        stream: tokio::net::TcpStream,
    ) -> Result<tokio_rustls::client::TlsStream<tokio::net::TcpStream>> {
        let mut tls = tls.clone();
        tls.alpn_protocols = vec![protocol.to_vec()];
        let name = ServerName::try_from(host.split(':').next().unwrap_or_default().to_string())?;
        tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, stream).await.context("TLS")
    }

    async fn http3(&self, request: Request<Bytes>, read: &mut (dyn FnMut(&[u8]) + Send)) -> Result<Answer> {
        let mut sender = {
            let mut kept = self.kept.http3.lock().await;
            match &*kept {
                Some((sender, connection)) if connection.close_reason().is_none() => sender.clone(),
                _ => {
                    let host = request.uri().host().unwrap_or_default().to_string();
                    kept.insert(self.connect_http3(&host).await?).0.clone()
                }
            }
        };
        let (parts, mut body) = request.into_parts();
        let sent = sender.send_request(Request::from_parts(parts, ())).await;
        let (mut send, mut receive) = match sent {
            Ok(stream) => stream.split(),
            Err(error) => {
                // Such as after a GOAWAY: the next call opens another connection.
                *self.kept.http3.lock().await = None;
                return Err(error.into());
            }
        };
        let upload = tokio::spawn(async move {
            while body.has_remaining() {
                let chunk = body.split_to(body.len().min(64 << 10));
                // An early answer may stop the upload; the answer itself tells.
                if send.send_data(chunk).await.is_err() {
                    return;
                }
            }
            let _ = send.finish().await;
        });
        let upload = Aborting(upload);
        let (head, ()) = receive.recv_response().await?.into_parts();
        let mut answer = Answer::of(head.status.as_u16(), head.headers);
        while let Some(mut data) = receive.recv_data().await? {
            while data.has_remaining() {
                let chunk = data.chunk().len();
                answer.take(data.chunk(), read);
                data.advance(chunk);
            }
        }
        drop(upload);
        answer.is_whole()?;
        Ok(answer)
    }

    async fn connect_http3(&self, host: &str) -> Result<(H3Sender, quinn::Connection)> {
        let tls = self.tls.as_ref().context("HTTP/3 is over TLS")?;
        let mut tls = rustls::ClientConfig::clone(tls);
        tls.alpn_protocols = vec![b"h3".to_vec()];
        let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls)?;
        let runtime = quinn::default_runtime().ok_or_else(|| anyhow!("no runtime"))?;
        let mut endpoint = quinn::Endpoint::new(Default::default(), None, self.from.udp()?, runtime)?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        let mut transport = quinn::TransportConfig::default();
        // A client that waits for ever would not notice that an edge has died.
        transport.max_idle_timeout(Some(quinn::VarInt::from_u32(5_000).into()));
        transport.keep_alive_interval(Some(std::time::Duration::from_secs(1)));
        config.transport_config(Arc::new(transport));
        endpoint.set_default_client_config(config);
        let connection = endpoint.connect(self.addr, host)?.await?;
        let (mut driver, sender) = h3::client::new(h3_quinn::Connection::new(connection.clone())).await?;
        tokio::spawn(async move {
            let _endpoint = endpoint;
            std::future::poll_fn(|cx| driver.poll_close(cx)).await
        });
        Ok((sender, connection))
    }
}

/// A task that ends with its owner.
struct Aborting(tokio::task::JoinHandle<()>);

impl Drop for Aborting {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Answer {
    fn of(status: u16, headers: HeaderMap) -> Self {
        Self { status, headers, bytes: 0, text: String::new() }
    }

    fn take(&mut self, chunk: &[u8], read: &mut (dyn FnMut(&[u8]) + Send)) {
        self.bytes += chunk.len();
        if self.bytes <= SHORT_BYTES {
            self.text.push_str(&String::from_utf8_lossy(chunk));
        }
        read(chunk);
    }

    /// A length that was announced must have come (RFC 9110 §8.6).
    fn is_whole(&self) -> Result<()> {
        let announced = self.headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
        match announced {
            Some(length) if length != self.bytes => bail!("{} of {length} bytes came", self.bytes),
            _ => Ok(()),
        }
    }
}

async fn collect(response: Response<Incoming>, read: &mut (dyn FnMut(&[u8]) + Send)) -> Result<Answer> {
    let (head, mut body) = response.into_parts();
    let mut answer = Answer::of(head.status.as_u16(), head.headers);
    while !body.is_end_stream() {
        match body.frame().await {
            Some(frame) => {
                if let Ok(data) = frame?.into_data() {
                    answer.take(&data, read);
                }
            }
            None => break,
        }
    }
    Ok(answer)
}
