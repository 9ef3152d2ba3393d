//! HTTP/1.1, as hyper serves it, with our limits around it.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, header};
use http_body::{Frame, SizeHint};
use hyper::{server::conn::http1::Builder, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    Limits, MAX_HEAD_BYTES,
    switch::Switch,
    watched::{Busy, Progress, Watched},
};
use crate::{
    Body, BodyError, Drain,
    stall::STALL,
    tunnel::{self, Awaited, End},
};

pub(super) async fn serve<S, H, F, B>(stream: S, limits: &Limits, drain: Drain, handler: H)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Request<Body>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: http_body::Body<Data = Bytes, Error = BodyError> + From<Body> + Unpin + Send + 'static,
{
    let (control, progress) = (limits.control.clone(), Progress::new());
    let (socket, answering) = (control.clone(), progress.clone());
    let stream = Watched::new(stream, progress.clone(), limits.idle);
    let tunnel: Arc<Mutex<Option<Carrying>>> = Arc::default();
    let (opened, of) = (tunnel.clone(), drain.clone());
    let service = service_fn(move |mut request: Request<hyper::body::Incoming>| {
        let (handler, busy, opened, drain) = (handler.clone(), progress.busy(), opened.clone(), of.clone());
        let control = control.clone();
        async move {
            let switch = Switch::asked_for(&mut request);
            let (mut head, body) = request.map(Body::from).into_parts();
            let (body, switch) = match switch {
                Some(switch) => {
                    let (promise, promised) = Awaited::promised();
                    head.method = Method::CONNECT;
                    if let Some(protocol) = &switch.protocol {
                        head.extensions.insert(protocol.clone());
                    }
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
            let (mut head, body) = response.into_parts();
            if let Some((switch, promise)) = switch {
                if tunnel::is_open(&method, &head) {
                    let body = tunnel::received(body, switch.protocol.as_ref(), &drain);
                    let (head, upgrade, patience) = switch.consent(head);
                    if patience > STALL {
                        control.be_patient();
                    }
                    // It opens when this answer is out.
                    let carrying = async move {
                        let _busy = busy;
                        match upgrade.await {
                            Ok(stream) => {
                                let end = End::controlled(TokioIo::new(stream), control);
                                end.fulfil(promise).carry(body, patience).await;
                            }
                            Err(error) => tracing::debug!(%error, "a tunnel did not open"),
                        }
                    };
                    *opened.lock().unwrap_or_else(|e| e.into_inner()) = Some(Box::pin(carrying));
                    return Ok::<_, Infallible>(Response::from_parts(head, Answer::done(B::from(Body::empty()))));
                }
                switch.refuse(&mut head);
            }
            if drain.has_begun() {
                head.headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
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
    // Dropped before what comes after it: a connection that broke while it said that the tunnel is open keeps the promise of it,
    // and nobody else would ever learn that it comes to nothing.
    let is_cut = {
        tokio::pin!(connection);
        let served = tokio::select! {
            served = connection.as_mut() => Some(served),
            () = drain.no_more_requests() => {
                connection.as_mut().graceful_shutdown();
                tokio::select! {
                    served = connection.as_mut() => Some(served),
                    () = drain.closing() => None,
                }
            }
            () = drain.closing() => None,
        };
        let breaks_off = match &served {
            Some(Ok(())) => false,
            Some(Err(error)) => {
                tracing::debug!(%error, "connection");
                error.is_user()
            }
            None => answering.is_busy(),
        };
        if breaks_off {
            // Where the end of an answer is that of the connection, half of it must not look whole (RFC 9112 §8).
            socket.sever();
        }
        served.is_none()
    };
    let carrying = tunnel.lock().unwrap_or_else(|e| e.into_inner()).take();
    if let Some(carrying) = carrying.filter(|_| !is_cut) {
        tokio::select! {
            () = carrying => {}
            () = drain.closing() => {}
        }
    }
}

/// What goes through a tunnel, to the end.
type Carrying = Pin<Box<dyn Future<Output = ()> + Send>>;

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
