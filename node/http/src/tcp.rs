//! Serves HTTP/1.1 and 2 on byte streams: the application's doors and the edge's public port alike.

mod http1;
mod http2;
mod preface;
mod socket;
mod switch;
mod watched;

use std::{future::Future, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use tokio::io::{AsyncRead, AsyncWrite};

pub(crate) use self::http2::Http2Body;
pub use self::socket::{Control, Socket, notice_when_gone};
use crate::{Body, BodyError, Drain, Shelf};

/// How long a request's head may take to arrive.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest head, in bytes.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// What a connection speaks.
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
#[derive(Debug, Clone)]
pub struct Limits {
    /// Streams at once on an HTTP/2 connection.
    pub max_streams: u32,
    /// Flow-control window of an HTTP/2 stream, in bytes; the connection has as much as all its streams, so that none can
    /// stall another.
    pub stream_window_bytes: u32,
    /// How long a connection may have no request.
    pub idle: Duration,
    /// Where uploads over HTTP/2 stand that nobody reads.
    pub shelf: Shelf,
    /// Of the TCP connection below, if there is one.
    pub control: Control,
}

/// Serves one connection until it ends; a drain lets requests under way finish. Errors of the connection are the other
/// end's affair and only logged.
pub async fn serve<S, H, F, B>(stream: S, speaks: Speaks, limits: Limits, drain: Drain, handler: H)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Request<Body>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: http_body::Body<Data = Bytes, Error = BodyError> + From<Body> + Unpin + Send + 'static,
{
    match speaks {
        Speaks::Http1 => http1::serve(stream, &limits, drain, handler).await,
        Speaks::Http2 => http2::serve(stream, &limits, drain, handler).await,
        Speaks::Either => {
            let seen = tokio::select! {
                seen = preface::look(stream, limits.idle, HEAD_TIMEOUT) => seen,
                () = drain.no_more_requests() => return,
                () = drain.closing() => return,
            };
            match seen {
                Some((stream, true)) => http2::serve(stream, &limits, drain, handler).await,
                Some((stream, false)) => http1::serve(stream, &limits, drain, handler).await,
                None => {}
            }
        }
    }
}

/// Whether an HTTP/2 server says of a request that it did nothing about it (RFC 9113 §8.7).
pub fn was_refused(error: &hyper::Error) -> bool {
    of_http2(error).is_some_and(|h2| h2.reason() == Some(h2::Reason::REFUSED_STREAM) && h2.is_reset())
}

/// What the other end of an HTTP/2 connection did that made this one end it, such as too many empty frames.
pub fn offence(error: &hyper::Error) -> Option<String> {
    of_http2(error).filter(|h2| h2.is_library() && h2.is_go_away()).map(ToString::to_string)
}

fn of_http2(error: &hyper::Error) -> Option<&h2::Error> {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(h2) = error.downcast_ref() {
            return Some(h2);
        }
        source = error.source();
    }
    None
}
