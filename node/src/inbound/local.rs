//! The service behind this node: connections to it over HTTP/1.1 or HTTP/2 with prior knowledge.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use http::{Request, Response, StatusCode, Version};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use starling_http::{Body, Guard, Guarded, Problem, ProxyError, normal};
use starling_protocol::Protocol;
use tokio::net::TcpStream;

use crate::Sent;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Connections kept for the next request.
const MAX_IDLE: usize = 256;
/// Longest head of a response, in bytes.
const MAX_HEAD_BYTES: usize = 64 << 10;
const STREAM_WINDOW_BYTES: u32 = 1 << 20;

/// A failed request to the local service, and whether the service may have acted on it.
pub(crate) struct LocalError {
    pub(crate) sent: Sent,
    pub(crate) problem: Problem,
}

/// Client of one local service. Cheap to clone.
#[derive(Clone)]
pub(crate) struct LocalService {
    addr: SocketAddr,
    connections: Connections,
}

#[derive(Clone)]
enum Connections {
    Http1(Arc<Mutex<Vec<http1::SendRequest<Body>>>>),
    Http2(Arc<tokio::sync::Mutex<Option<http2::SendRequest<Body>>>>),
}

impl LocalService {
    pub(crate) fn new(addr: SocketAddr, protocol: Protocol) -> Self {
        let connections = match protocol {
            Protocol::Http1 => Connections::Http1(Arc::default()),
            Protocol::H2c => Connections::Http2(Arc::default()),
            // Cannot be configured.
            Protocol::Unknown(_) => Connections::Http1(Arc::default()),
        };
        Self { addr, connections }
    }

    /// Sends a request whose target is `http://authority/path`.
    pub(crate) async fn send(&self, request: Request<Body>) -> Result<Response<Guarded<Place>>, LocalError> {
        match &self.connections {
            Connections::Http1(idle) => self.send_http1(idle, request).await,
            Connections::Http2(shared) => self.send_http2(shared, request).await,
        }
    }

    async fn send_http1(
        &self,
        idle: &Arc<Mutex<Vec<http1::SendRequest<Body>>>>,
        request: Request<Body>,
    ) -> Result<Response<Guarded<Place>>, LocalError> {
        let mut request = origin_form(request);
        // A kept connection may be closed by the service at the very moment it is used. Then the request comes back
        // unsent, or is sent again if that is harmless: without a body, and idempotent.
        let repeatable = http_body::Body::is_end_stream(request.body()) && request.method().is_idempotent();
        loop {
            let kept = take_ready(idle);
            let is_fresh = kept.is_none();
            let mut connection = match kept {
                Some(kept) => kept,
                None => self.connect_http1().await?,
            };
            if connection.ready().await.is_err() {
                if is_fresh {
                    return Err(self.terminated("closed the connection at once", Sent::No));
                }
                continue;
            }
            let copy = (repeatable && !is_fresh).then(|| copy_bodiless(&request));
            match connection.try_send_request(request).await {
                Ok(response) => {
                    let place = Place { connection: Some(connection), idle: idle.clone() };
                    return Ok(response.map(|body| Guarded::new(Body::from(body), place)));
                }
                Err(mut failed) => match (failed.take_message(), copy) {
                    (Some(unsent), _) if !is_fresh => request = unsent,
                    (_, Some(copy)) if !failed.error().is_parse() => request = copy,
                    (unsent, _) => return Err(self.failed(failed.error(), unsent.is_some())),
                },
            }
        }
    }

    async fn send_http2(
        &self,
        shared: &tokio::sync::Mutex<Option<http2::SendRequest<Body>>>,
        mut request: Request<Body>,
    ) -> Result<Response<Guarded<Place>>, LocalError> {
        *request.version_mut() = Version::HTTP_2;
        let mut connection = {
            // Held across the dial on purpose: whoever comes meanwhile wants this very connection.
            let mut shared = shared.lock().await;
            match &*shared {
                Some(live) if !live.is_closed() => live.clone(),
                _ => shared.insert(self.connect_http2().await?).clone(),
            }
        };
        let sent = async {
            connection.ready().await.map_err(|e| self.failed(&e, true))?;
            connection.try_send_request(request).await.map_err(|mut failed| {
                let unsent = failed.take_message().is_some();
                self.failed(failed.error(), unsent)
            })
        };
        Ok(sent.await?.map(|body| Guarded::from(Body::from(body))))
    }

    async fn connect(&self) -> Result<TokioIo<TcpStream>, LocalError> {
        let refused = |why: String| LocalError {
            sent: Sent::No,
            problem: Problem::proxy(
                StatusCode::BAD_GATEWAY,
                ProxyError::ConnectionRefused,
                format!("the service does not accept connections: {why}"),
            ),
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(self.addr)).await {
            Ok(Ok(stream)) => {
                let _ = stream.set_nodelay(true);
                Ok(TokioIo::new(stream))
            }
            Ok(Err(error)) => Err(refused(error.to_string())),
            Err(_) => Err(refused("no answer".into())),
        }
    }

    async fn connect_http1(&self) -> Result<http1::SendRequest<Body>, LocalError> {
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(MAX_HEAD_BYTES)
            .handshake(self.connect().await?)
            .await
            .map_err(|e| self.failed(&e, true))?;
        tokio::spawn(connection);
        Ok(sender)
    }

    async fn connect_http2(&self) -> Result<http2::SendRequest<Body>, LocalError> {
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(STREAM_WINDOW_BYTES * 8)
            .max_header_list_size(MAX_HEAD_BYTES as u32)
            .handshake(self.connect().await?)
            .await
            .map_err(|e| self.failed(&e, true))?;
        tokio::spawn(connection);
        Ok(sender)
    }

    fn failed(&self, error: &hyper::Error, unsent: bool) -> LocalError {
        if error.is_parse() || error.is_parse_too_large() {
            let status = StatusCode::BAD_GATEWAY;
            let detail = format!("the service's answer is not valid HTTP: {error}");
            return LocalError {
                sent: Sent::Maybe,
                problem: Problem::proxy(status, ProxyError::HttpProtocolError, detail),
            };
        }
        self.terminated(&error.to_string(), if unsent { Sent::No } else { Sent::Maybe })
    }

    fn terminated(&self, why: &str, sent: Sent) -> LocalError {
        let detail = format!("the service broke the connection: {why}");
        let problem = Problem::proxy(StatusCode::BAD_GATEWAY, ProxyError::ConnectionTerminated, detail);
        LocalError { sent, problem }
    }
}

/// The newest of the kept connections that can be used. One whose request is still being written, though its answer has ended,
/// cannot: whoever took it would wait for somebody else's upload.
fn take_ready(idle: &Mutex<Vec<http1::SendRequest<Body>>>) -> Option<http1::SendRequest<Body>> {
    let mut idle = idle.lock().unwrap_or_else(|e| e.into_inner());
    idle.retain(|kept| !kept.is_closed());
    let newest = idle.iter().rposition(http1::SendRequest::is_ready)?;
    Some(idle.remove(newest))
}

/// A connection that carries an answer. Kept for the next request if the answer ends whole; else it closes, which is how
/// HTTP/1.1 tells the service that nobody wants the rest.
pub(crate) struct Place {
    connection: Option<http1::SendRequest<Body>>,
    idle: Arc<Mutex<Vec<http1::SendRequest<Body>>>>,
}

impl Guard for Place {
    fn ended(&mut self) {
        let Some(connection) = self.connection.take().filter(|c| !c.is_closed()) else { return };
        let mut idle = self.idle.lock().unwrap_or_else(|e| e.into_inner());
        if idle.len() >= MAX_IDLE {
            // One that somebody's upload holds is no use to anybody.
            idle.retain(http1::SendRequest::is_ready);
        }
        if idle.len() < MAX_IDLE {
            idle.push(connection);
        }
    }
}

/// HTTP/1.1 wants the path as the target and the authority in Host.
fn origin_form(mut request: Request<Body>) -> Request<Body> {
    normal::join_cookies(request.headers_mut());
    let host = request.uri().authority().and_then(|a| http::HeaderValue::from_str(a.as_str()).ok());
    if let Some(host) = host {
        request.headers_mut().insert(http::header::HOST, host);
    }
    if let Some(target) = request.uri().path_and_query().cloned() {
        *request.uri_mut() = http::Uri::from(target);
    }
    // hyper takes a GET without a length for one without a body.
    if !http_body::Body::is_end_stream(request.body()) && !request.headers().contains_key(http::header::CONTENT_LENGTH)
    {
        let chunked = http::HeaderValue::from_static("chunked");
        request.headers_mut().insert(http::header::TRANSFER_ENCODING, chunked);
    }
    *request.version_mut() = Version::HTTP_11;
    request
}

fn copy_bodiless(request: &Request<Body>) -> Request<Body> {
    let mut copy = Request::new(Body::empty());
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    copy.headers_mut().clone_from(request.headers());
    copy
}
