//! Message bodies, whatever protocol they come from and go to.

use std::{
    any::Any,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use http::HeaderMap;
use http_body::{Body as _, Frame, SizeHint};

use crate::{guard, normal, replay::Replay};

/// Why a body broke off. Whoever forwards it must let the receiver see that it is not complete.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The sender gave up or was lost.
    #[error("the sender broke off: {0}")]
    Broken(String),
    /// The length is not what the head promised.
    #[error("the body has {seen} bytes where the head promised {promised}")]
    Length {
        /// What Content-Length said.
        promised: u64,
        /// What came.
        seen: u64,
    },
}

/// A body, streamed: data, then perhaps trailers. Reads no faster than it is asked.
pub struct Body {
    kind: Kind,
    /// What [`Body::peek`] found.
    peeked: Option<Result<Frame<Bytes>, BodyError>>,
    /// What Content-Length promised and how much of it is still to come.
    length: Option<Length>,
    /// Dropped with the body: counts of calls in flight, connections to give back.
    kept: Vec<Box<dyn Any + Send>>,
}

enum Kind {
    Empty,
    Full(Bytes),
    Hyper(hyper::body::Incoming),
    H3Client(Box<h3::client::RequestStream<guard::Recv, Bytes>>, Phase),
    H3Server(Box<h3::server::RequestStream<guard::Recv, Bytes>>, Phase),
    Replay(Replay),
}

/// How far an h3 body has been read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Data,
    Trailers,
    Done,
}

struct Length {
    promised: u64,
    seen: u64,
}

/// Data until there is none, then trailers. A macro because client and server streams are two types with the same methods.
macro_rules! poll_h3 {
    ($stream:expr, $phase:expr, $cx:expr) => {{
        let broken = |e: h3::error::StreamError| BodyError::Broken(e.to_string());
        if *$phase == Phase::Data {
            match ready!($stream.poll_recv_data($cx)) {
                Ok(Some(mut data)) => {
                    let bytes = data.copy_to_bytes(data.remaining());
                    return Poll::Ready(Some(Ok(Frame::data(bytes))));
                }
                Ok(None) => *$phase = Phase::Trailers,
                Err(e) => {
                    *$phase = Phase::Done;
                    return Poll::Ready(Some(Err(broken(e))));
                }
            }
        }
        if *$phase == Phase::Trailers {
            let trailers = ready!($stream.poll_recv_trailers($cx));
            *$phase = Phase::Done;
            return Poll::Ready(match trailers {
                Ok(trailers) => trailers.map(|t| Ok(Frame::trailers(t))),
                Err(e) => Some(Err(broken(e))),
            });
        }
        Poll::Ready(None)
    }};
}

impl Body {
    /// No body.
    pub fn empty() -> Self {
        Self::from(Kind::Empty)
    }

    /// A body from memory.
    pub fn full(bytes: impl Into<Bytes>) -> Self {
        Self::from(Kind::Full(bytes.into()))
    }

    /// The body of an answer on an h3 stream.
    pub fn h3_client(stream: h3::client::RequestStream<guard::Recv, Bytes>) -> Self {
        Self::from(Kind::H3Client(Box::new(stream), Phase::Data))
    }

    pub(crate) fn h3_server(stream: h3::server::RequestStream<guard::Recv, Bytes>) -> Self {
        Self::from(Kind::H3Server(Box::new(stream), Phase::Data))
    }

    pub(crate) fn replay(replay: Replay) -> Self {
        Self::from(Kind::Replay(replay))
    }

    /// Holds the body to a length: more or fewer bytes become an error (RFC 9110 §8.6).
    pub fn with_length(mut self, promised: Option<u64>) -> Self {
        self.length = promised.map(|promised| Length { promised, seen: 0 });
        self
    }

    /// Keeps `thing` until the body has ended or is dropped.
    pub fn keep(mut self, thing: impl Any + Send) -> Self {
        self.kept.push(Box::new(thing));
        self
    }

    /// Looks, without waiting, whether the body has ended already: an h3 request shows only by its end that it has no body,
    /// and that end mostly comes along with the head.
    pub(crate) async fn peek(mut self) -> Self {
        let found = std::future::poll_fn(|cx| Poll::Ready(self.poll_kind(cx))).await;
        match found {
            Poll::Ready(None) => self.kind = Kind::Empty,
            Poll::Ready(Some(frame)) => self.peeked = Some(frame),
            Poll::Pending => {}
        }
        self
    }

    fn poll_kind(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.kind {
            Kind::Empty => Poll::Ready(None),
            Kind::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                self.kind = Kind::Empty;
                Poll::Ready((!bytes.is_empty()).then_some(Ok(Frame::data(bytes))))
            }
            Kind::Hyper(incoming) => Pin::new(incoming).poll_frame(cx).map_err(|e| BodyError::Broken(reason(&e))),
            Kind::H3Client(stream, phase) => poll_h3!(stream, phase, cx),
            Kind::H3Server(stream, phase) => poll_h3!(stream, phase, cx),
            Kind::Replay(replay) => replay.poll_frame(cx),
        }
    }

    fn ended(&mut self) -> Option<Result<Frame<Bytes>, BodyError>> {
        self.kept.clear();
        let length = self.length.take()?;
        (length.seen != length.promised)
            .then(|| Err(BodyError::Length { promised: length.promised, seen: length.seen }))
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = match self.peeked.take() {
            Some(frame) => Some(frame),
            None => ready!(self.poll_kind(cx)),
        };
        Poll::Ready(match frame {
            Some(Ok(frame)) => Some(match frame.into_data() {
                Ok(data) => {
                    if let Some(length) = &mut self.length {
                        length.seen += data.len() as u64;
                        if length.seen > length.promised {
                            let error = BodyError::Length { promised: length.promised, seen: length.seen };
                            self.length = None;
                            self.kept.clear();
                            return Poll::Ready(Some(Err(error)));
                        }
                    }
                    Ok(Frame::data(data))
                }
                Err(frame) => match frame.into_trailers() {
                    Ok(trailers) => Ok(Frame::trailers(clean(trailers))),
                    Err(frame) => Ok(frame),
                },
            }),
            Some(Err(error)) => {
                self.length = None;
                self.kept.clear();
                Some(Err(error))
            }
            None => self.ended(),
        })
    }

    fn is_end_stream(&self) -> bool {
        if self.peeked.is_some() {
            return false;
        }
        match &self.kind {
            Kind::Empty => self.length.as_ref().is_none_or(|l| l.seen == l.promised),
            Kind::Full(bytes) => bytes.is_empty(),
            Kind::Hyper(incoming) => incoming.is_end_stream(),
            Kind::H3Client(_, phase) | Kind::H3Server(_, phase) => *phase == Phase::Done,
            Kind::Replay(replay) => replay.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match (&self.kind, &self.length) {
            (_, Some(length)) => SizeHint::with_exact(length.promised.saturating_sub(length.seen)),
            (Kind::Empty, None) => SizeHint::with_exact(0),
            (Kind::Full(bytes), None) => SizeHint::with_exact(bytes.len() as u64),
            (Kind::Hyper(incoming), None) => incoming.size_hint(),
            (Kind::Replay(replay), None) => replay.size_hint(),
            _ => SizeHint::default(),
        }
    }
}

fn clean(mut trailers: HeaderMap) -> HeaderMap {
    normal::clean_trailers(&mut trailers);
    trailers
}

/// hyper's errors say what happened only in their sources.
fn reason(error: &hyper::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(e) = source {
        text.push_str(": ");
        text.push_str(&e.to_string());
        source = e.source();
    }
    text
}

impl From<Kind> for Body {
    fn from(kind: Kind) -> Self {
        Self { kind, peeked: None, length: None, kept: Vec::new() }
    }
}

impl From<hyper::body::Incoming> for Body {
    fn from(incoming: hyper::body::Incoming) -> Self {
        if incoming.is_end_stream() { Self::empty() } else { Self::from(Kind::Hyper(incoming)) }
    }
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Body").finish_non_exhaustive()
    }
}
