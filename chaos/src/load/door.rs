//! A door of the mesh, and the connections that a client keeps to it.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use anyhow::{Context, Result, anyhow, bail};
use bytes::{Buf, Bytes};
use http::{HeaderMap, Request, Response, StatusCode, Uri, header, request::Parts, response};
use http_body_util::{BodyExt, Empty, Full, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::{plan::DoorKind, stage::Place};

type H3Sender = h3::client::SendRequest<h3_quinn::OpenStreams, Bytes>;

/// What a client sends, all at once or bit by bit.
pub(crate) type Sent = UnsyncBoxBody<Bytes, Infallible>;

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

/// Connections that can carry the next call.
#[derive(Default)]
pub(crate) struct Kept {
    http1: Mutex<Vec<http1::SendRequest<Sent>>>,
    http2: tokio::sync::Mutex<Option<http2::SendRequest<Sent>>>,
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

/// What bytes go over.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// An answer's body as it comes. Dropped before its end, it says so to the other side.
pub(crate) enum Coming {
    Http1 {
        body: Incoming,
        sender: Option<http1::SendRequest<Sent>>,
        kept: Arc<Kept>,
    },
    Http2(Incoming),
    /// With a sender: the connection is closed when nobody has one any more, whatever is still on it.
    Http3 {
        receive: Box<H3Stream>,
        body_is_over: bool,
        _upload: Aborting,
        _sender: H3Sender,
    },
}

type H3Stream = h3::client::RequestStream<h3_quinn::RecvStream, Bytes>;

impl Coming {
    /// What comes next, data or trailers; `None` after the end.
    pub(crate) async fn next(&mut self) -> Option<Result<Frame<Bytes>>> {
        match self {
            Self::Http1 { body, sender, kept } => match body.frame().await {
                Some(frame) => Some(frame.map_err(Into::into)),
                None => {
                    let mut sender = sender.take()?;
                    if sender.ready().await.is_ok() {
                        let mut idle = kept.http1.lock().unwrap_or_else(|e| e.into_inner());
                        if idle.len() < MOST_IDLE {
                            idle.push(sender);
                        }
                    }
                    None
                }
            },
            Self::Http2(body) => Some(body.frame().await?.map_err(Into::into)),
            Self::Http3 { receive, body_is_over, .. } => {
                if !*body_is_over {
                    match receive.recv_data().await {
                        Ok(Some(mut data)) => return Some(Ok(Frame::data(data.copy_to_bytes(data.remaining())))),
                        Ok(None) => *body_is_over = true,
                        Err(error) => return Some(Err(error.into())),
                    }
                    return Some(receive.recv_trailers().await.transpose()?.map(Frame::trailers).map_err(Into::into));
                }
                None
            }
        }
    }
}

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
        let (head, body) = request.into_parts();
        let mut whole = || Full::new(body.clone()).boxed_unsync();
        let (head, mut coming) = self.open(service, head, &mut whole).await?.into_parts();
        let mut answer = Answer { status: head.status.as_u16(), headers: head.headers, bytes: 0, text: String::new() };
        while let Some(frame) = coming.next().await {
            if let Ok(data) = frame?.into_data() {
                answer.take(&data, read);
            }
        }
        answer.is_whole()?;
        Ok(answer)
    }

    /// Sends a call; its answer is to be read. `body` gives what is sent: again, when a connection that was kept turns out
    /// to be closed.
    pub(crate) async fn open(
        &self,
        service: &str,
        mut head: Parts,
        body: &mut (dyn FnMut() -> Sent + Send),
    ) -> Result<Response<Coming>> {
        let path = head.uri.path().to_string();
        let (host, path) = match &self.host {
            // An edge takes the service from the path.
            Some(host) => (host.clone(), format!("/{service}{path}")),
            None => (format!("{service}.mesh.internal"), path),
        };
        head.uri = format!("{}://{host}{path}", if self.tls.is_some() { "https" } else { "http" }).parse()?;
        head.headers.extend(self.headers.clone());
        match self.kind {
            DoorKind::OutboundHttp1 | DoorKind::Upstream | DoorKind::EdgeHttp1 => self.http1(head, body).await,
            DoorKind::OutboundHttp2 | DoorKind::EdgeHttp2 => self.http2(&head, body).await,
            DoorKind::EdgeHttp3 => self.http3(&head, body).await,
            DoorKind::UpstreamTcp | DoorKind::UpstreamUdp => bail!("that door is for what is no HTTP"),
        }
    }

    /// Asks for a WebSocket, on a connection of its own: the head of the answer, and what there is then, if it was consent.
    pub(crate) async fn switch(&self, service: &str, path: &str) -> Result<(response::Parts, Option<Box<dyn Stream>>)> {
        let (host, path) = match &self.host {
            Some(host) => (host.clone(), format!("/{service}{path}")),
            None => (format!("{service}.mesh.internal"), path.to_string()),
        };
        let stream = TokioIo::new(self.connect(&host, b"http/1.1").await?);
        let (mut sender, connection) = http1::handshake(stream).await?;
        tokio::spawn(async move { drop(connection.with_upgrades().await) });
        let mut request = Request::get(path)
            .header(header::HOST, &host)
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, "websocket")
            .header(header::SEC_WEBSOCKET_VERSION, "13")
            .header(header::SEC_WEBSOCKET_KEY, "c3RhcmxpbmctY2hhb3MtMQ==")
            .body(Empty::<Bytes>::new().boxed_unsync())?;
        request.headers_mut().extend(self.headers.clone());
        let mut response = sender.send_request(request).await?;
        let stream: Option<Box<dyn Stream>> = match response.status() {
            StatusCode::SWITCHING_PROTOCOLS => Some(Box::new(TokioIo::new(hyper::upgrade::on(&mut response).await?))),
            _ => None,
        };
        Ok((response.into_parts().0, stream))
    }

    async fn http1(&self, mut head: Parts, body: &mut (dyn FnMut() -> Sent + Send)) -> Result<Response<Coming>> {
        let host = head.uri.authority().context("no authority")?.to_string();
        head.headers.insert(header::HOST, host.parse()?);
        head.uri = head.uri.path().parse::<Uri>()?;
        loop {
            let kept = self.kept.http1.lock().unwrap_or_else(|e| e.into_inner()).pop();
            let is_kept = kept.is_some();
            let mut sender = match kept {
                Some(sender) if sender.is_closed() => continue,
                Some(sender) => sender,
                None => self.connect_http1(&host).await?,
            };
            let response = match sender.send_request(Request::from_parts(head.clone(), body())).await {
                Ok(response) => response,
                // It was closed before anything was sent.
                Err(error) if is_kept && error.is_canceled() => continue,
                Err(error) => return Err(error.into()),
            };
            let kept = self.kept.clone();
            return Ok(response.map(|body| Coming::Http1 { body, sender: Some(sender), kept }));
        }
    }

    async fn connect_http1(&self, host: &str) -> Result<http1::SendRequest<Sent>> {
        let (sender, connection) = http1::handshake(TokioIo::new(self.connect(host, b"http/1.1").await?)).await?;
        tokio::spawn(async move { drop(connection.await) });
        Ok(sender)
    }

    async fn http2(&self, head: &Parts, body: &mut (dyn FnMut() -> Sent + Send)) -> Result<Response<Coming>> {
        loop {
            let (mut sender, is_kept) = {
                let mut kept = self.kept.http2.lock().await;
                match &*kept {
                    Some(sender) if !sender.is_closed() => (sender.clone(), true),
                    _ => {
                        let host = head.uri.host().unwrap_or_default().to_string();
                        (kept.insert(self.connect_http2(&host).await?).clone(), false)
                    }
                }
            };
            match sender.send_request(Request::from_parts(head.clone(), body())).await {
                Ok(response) => return Ok(response.map(Coming::Http2)),
                // The other end had said that it takes no more on this connection: nothing was sent.
                Err(error) if is_kept && error.is_canceled() => *self.kept.http2.lock().await = None,
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn connect_http2(&self, host: &str) -> Result<http2::SendRequest<Sent>> {
        let stream = TokioIo::new(self.connect(host, b"h2").await?);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), stream).await?;
        tokio::spawn(async move { drop(connection.await) });
        Ok(sender)
    }

    /// A connection on which nobody has written yet, over TLS where the door has it.
    pub(crate) async fn connect(&self, host: &str, protocol: &[u8]) -> Result<Box<dyn Stream>> {
        let stream = self.from.connect(self.addr).await.context("connect")?;
        let Some(tls) = &self.tls else { return Ok(Box::new(stream)) };
        let mut tls = rustls::ClientConfig::clone(tls);
        tls.alpn_protocols = vec![protocol.to_vec()];
        let name = ServerName::try_from(host.split(':').next().unwrap_or_default().to_string())?;
        let stream = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(name, stream).await.context("TLS")?;
        Ok(Box::new(stream))
    }

    async fn http3(&self, head: &Parts, body: &mut (dyn FnMut() -> Sent + Send)) -> Result<Response<Coming>> {
        let (mut send, mut receive, sender) = loop {
            let (mut sender, is_kept) = {
                let mut kept = self.kept.http3.lock().await;
                match &*kept {
                    Some((sender, connection)) if connection.close_reason().is_none() => (sender.clone(), true),
                    _ => {
                        let host = head.uri.host().unwrap_or_default().to_string();
                        (kept.insert(self.connect_http3(&host).await?).0.clone(), false)
                    }
                }
            };
            match sender.send_request(Request::from_parts(head.clone(), ())).await {
                Ok(stream) => {
                    let (send, receive) = stream.split();
                    break (send, receive, sender);
                }
                Err(error) => {
                    *self.kept.http3.lock().await = None;
                    // The other end had said that it takes no more on this connection: nothing was sent.
                    if !(is_kept && matches!(error, h3::error::StreamError::RemoteClosing { .. })) {
                        return Err(error.into());
                    }
                }
            }
        };
        let mut body = body();
        let upload = tokio::spawn(async move {
            while let Some(Ok(frame)) = body.frame().await {
                let Ok(chunk) = frame.into_data() else { continue };
                // An early answer may stop the upload; the answer itself tells.
                if send.send_data(chunk).await.is_err() {
                    return;
                }
            }
            let _ = send.finish().await;
        });
        let upload = Aborting(upload);
        let (head, ()) = receive.recv_response().await?.into_parts();
        let coming =
            Coming::Http3 { receive: Box::new(receive), body_is_over: false, _upload: upload, _sender: sender };
        Ok(Response::from_parts(head, coming))
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
pub(crate) struct Aborting(tokio::task::JoinHandle<()>);

impl Drop for Aborting {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Answer {
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
