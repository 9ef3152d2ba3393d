//! HTTP/1.1, as hyper serves it, with our limits around it.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, header, response};
use http_body::{Body as _, Frame, SizeHint};
use hyper::{server::conn::http1::Builder, service::service_fn, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    Limits, MAX_HEAD_BYTES,
    watched::{Busy, Progress, Watched},
};
use crate::{
    Body, BodyError, Drain,
    stall::STALL,
    tunnel::{self, Awaited, End, Protocol, websocket},
};

pub(super) async fn serve<S, H, F, B>(stream: S, limits: &Limits, drain: Drain, handler: H)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Request<Body>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: http_body::Body<Data = Bytes, Error = BodyError> + From<Body> + Unpin + Send + 'static,
{
    let progress = Progress::new();
    let stream = Watched::new(stream, progress.clone(), limits.idle);
    let tunnel: Arc<Mutex<Option<Carrying>>> = Arc::default();
    let (opened, of) = (tunnel.clone(), drain.clone());
    let service = service_fn(move |mut request: Request<hyper::body::Incoming>| {
        let (handler, busy, opened, drain) = (handler.clone(), progress.busy(), opened.clone(), of.clone());
        async move {
            let switch = Switch::asked_for(&mut request);
            let (mut head, body) = request.map(Body::from).into_parts();
            let (body, switch) = match switch {
                Some(switch) => {
                    let (promise, promised) = Awaited::promised();
                    head.method = Method::CONNECT;
                    head.extensions.extend(switch.extensions());
                    (Ok(tunnel::sent(promised.into(), switch.protocol.as_ref(), &drain)), Some((switch, promise)))
                }
                None => (body.settle(&head.method, &head.headers).await, None),
            };
            let body = match body {
                Ok(body) => body,
                Err(problem) => return Ok(problem.into_response("starling", false).map(B::from).map(Answer::done)),
            };
            let method = head.method.clone();
            let response = handler(Request::from_parts(head, body)).await;
            let (head, body) = response.into_parts();
            if let Some((switch, promise)) = switch.filter(|_| tunnel::is_open(&method, &head)) {
                let body = tunnel::answered(body, switch.protocol.as_ref(), &drain);
                let (head, upgrade) = switch.consent(head);
                // It opens when this answer is out.
                let carrying = async move {
                    let _busy = busy;
                    match upgrade.await {
                        Ok(upgraded) => End::of(TokioIo::new(upgraded)).fulfil(promise).carry(body, STALL).await,
                        Err(error) => tracing::debug!(%error, "a tunnel did not open"),
                    }
                };
                *opened.lock().unwrap_or_else(|e| e.into_inner()) = Some(Box::pin(carrying));
                return Ok::<_, Infallible>(Response::from_parts(head, Answer::done(B::from(Body::empty()))));
            }
            // An answer to HEAD has no content, whoever made it (RFC 9110 §9.3.2).
            let body = if method == Method::HEAD && !body.is_end_stream() { B::from(Body::empty()) } else { body };
            Ok(Response::from_parts(head, Answer { body, _busy: Some(busy) }))
        }
    });
    let connection = Builder::new()
        .max_buf_size(MAX_HEAD_BYTES)
        // `normal::MAX_FIELDS` at most, by default; to say so would move its table of them to the heap, for each request.
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = drain.draining() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                served = connection.as_mut() => served,
                () = drain.closing() => return,
            }
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "connection");
    }
    let carrying = tunnel.lock().unwrap_or_else(|e| e.into_inner()).take();
    if let Some(carrying) = carrying {
        tokio::select! {
            () = carrying => {}
            () = drain.closing() => {}
        }
    }
}

/// What goes through a tunnel, to the end.
type Carrying = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A request to leave HTTP on this connection.
struct Switch {
    /// To what; bytes to the authority if `None`.
    protocol: Option<Protocol>,
    /// Of a WebSocket.
    key: Option<HeaderValue>,
    upgrade: OnUpgrade,
}

impl Switch {
    /// Reads what a request asks for. An `Upgrade` may be passed over, and is where the tunnel would begin within the request's body,
    /// or where it asks for another version of HTTP (RFC 9110 §7.8).
    fn asked_for(request: &mut Request<hyper::body::Incoming>) -> Option<Self> {
        if *request.method() == Method::CONNECT {
            return Some(Self { protocol: None, key: None, upgrade: hyper::upgrade::on(request) });
        }
        let fields = request.headers();
        let has_body = !request.body().is_end_stream() || fields.contains_key(header::CONTENT_LENGTH);
        let says = |name: HeaderName, what: &str| {
            let values = fields.get_all(name).iter().filter_map(|value| value.to_str().ok());
            values.flat_map(|value| value.split(',')).any(|option| option.trim().eq_ignore_ascii_case(what))
        };
        let is_upgrade = request.version() == Version::HTTP_11
            && *request.method() == Method::GET
            && !has_body
            && says(header::CONNECTION, "upgrade");
        if !is_upgrade {
            return None;
        }
        let named = if says(header::UPGRADE, Protocol::WEBSOCKET) {
            Protocol::WEBSOCKET
        } else {
            fields.get(header::UPGRADE)?.to_str().ok()?.split(',').next()?.trim()
        };
        let is_http = |name: &str| name == "h2" || name == "h2c" || name.starts_with("http/");
        let protocol = Protocol::read(named).filter(|protocol| !is_http(&protocol.0))?;
        let key = match protocol.is_websocket() {
            // Without it, it is none (RFC 6455 §4.2.1), and the service is the one to say so.
            true => Some(request.headers_mut().remove(header::SEC_WEBSOCKET_KEY)?),
            false => None,
        };
        Some(Self { protocol: Some(protocol), key, upgrade: hyper::upgrade::on(request) })
    }

    fn extensions(&self) -> http::Extensions {
        let mut extensions = http::Extensions::new();
        if let Some(protocol) = &self.protocol {
            extensions.insert(protocol.clone());
        }
        extensions
    }

    /// The answer that makes the switch.
    fn consent(self, mut head: response::Parts) -> (response::Parts, OnUpgrade) {
        head.headers.remove(header::CONTENT_LENGTH);
        if let Some(Protocol(name)) = &self.protocol {
            head.status = StatusCode::SWITCHING_PROTOCOLS;
            head.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            head.headers.insert(header::UPGRADE, HeaderValue::from_str(name).expect("a token"));
        }
        if let Some(key) = &self.key {
            head.headers.insert(header::SEC_WEBSOCKET_ACCEPT, websocket::accept_of(key.as_bytes()));
        }
        (head, self.upgrade)
    }
}

/// The body of an answer; until it is out, the connection waits for no request.
struct Answer<B> {
    body: B,
    _busy: Option<Busy>,
}

impl<B> Answer<B> {
    /// With nothing to wait for.
    fn done(body: B) -> Self {
        Self { body, _busy: None }
    }
}

impl<B: http_body::Body + Unpin> http_body::Body for Answer<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
