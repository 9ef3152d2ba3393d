//! Serves HTTP/1.1 and 2 on a byte stream: the application's doors and the edge's public port alike.

use std::{convert::Infallible, future::Future, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response};
use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::{Body, BodyError, Drain, normal};

/// How long a request's head may take to arrive.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest head, in bytes.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// How often a quiet HTTP/2 connection is asked whether it is still there, and how long it may take to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// What a connection speaks. Only a trusted client may leave it open: finding out waits for its first bytes without limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaks {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
    /// Whichever its first bytes show.
    Either,
}

/// Bounds of a connection that depend on who is at its other end.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Streams at once on an HTTP/2 connection.
    pub max_streams: u32,
    /// Flow-control window of an HTTP/2 stream, in bytes; the connection has eight times as much.
    pub stream_window_bytes: u32,
}

/// Serves one connection until it ends; a drain lets requests under way finish. Errors of the connection are the other
/// end's affair and only logged.
pub async fn serve<S, H, F, B>(stream: S, speaks: Speaks, limits: Limits, drain: Drain, handler: H)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Request<Body>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: http_body::Body<Data = Bytes, Error = BodyError> + From<Body> + Send + 'static,
{
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let handler = handler.clone();
        async move {
            let (head, body) = request.map(Body::from).into_parts();
            Ok::<_, Infallible>(match body.settle(&head.method, &head.headers).await {
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
            })
        }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(normal::MAX_FIELDS);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .max_concurrent_streams(limits.max_streams)
        .initial_stream_window_size(limits.stream_window_bytes)
        .initial_connection_window_size(limits.stream_window_bytes.saturating_mul(8))
        .max_header_list_size(MAX_HEAD_BYTES as u32);
    let builder = match speaks {
        Speaks::Http1 => builder.http1_only(),
        Speaks::Http2 => builder.http2_only(),
        Speaks::Either => builder,
    };
    let connection = builder.serve_connection(TokioIo::new(stream), service);
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

/// Whether an HTTP/2 server says of a request that it did nothing about it (RFC 9113 §8.7).
pub fn was_refused(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(h2) = error.downcast_ref::<h2::Error>() {
            return h2.reason() == Some(h2::Reason::REFUSED_STREAM) && h2.is_reset();
        }
        source = error.source();
    }
    false
}
