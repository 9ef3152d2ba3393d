//! HTTP/1.1, as hyper serves it, with our limits around it.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body::{Frame, SizeHint};
use hyper::{server::conn::http1::Builder, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    Limits, MAX_HEAD_BYTES,
    watched::{Busy, Progress, Watched},
};
use crate::{Body, BodyError, Drain};

pub(super) async fn serve<S, H, F, B>(stream: S, limits: &Limits, drain: Drain, handler: H)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Request<Body>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: http_body::Body<Data = Bytes, Error = BodyError> + From<Body> + Unpin + Send + 'static,
{
    let progress = Progress::new();
    let stream = Watched::new(stream, progress.clone(), limits.idle);
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let (handler, busy) = (handler.clone(), progress.busy());
        async move {
            let (head, body) = request.map(Body::from).into_parts();
            let response = match body.settle(&head.method, &head.headers).await {
                Ok(body) => {
                    let is_head = head.method == Method::HEAD;
                    let response = handler(Request::from_parts(head, body)).await;
                    // An answer to HEAD has no content, whoever made it (RFC 9110 §9.3.2).
                    if is_head && !response.body().is_end_stream() {
                        response.map(|_| B::from(Body::empty()))
                    } else {
                        response
                    }
                }
                Err(problem) => problem.into_response("starling", false).map(B::from),
            };
            Ok::<_, Infallible>(response.map(|body| Answer { body, _busy: busy }))
        }
    });
    let connection = Builder::new()
        .max_buf_size(MAX_HEAD_BYTES)
        // `normal::MAX_FIELDS` at most, by default; to say so would move its table of them to the heap, for each request.
        .serve_connection(TokioIo::new(stream), service);
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
}

/// The body of an answer; until it is out, the connection waits for no request.
struct Answer<B> {
    body: B,
    _busy: Busy,
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
