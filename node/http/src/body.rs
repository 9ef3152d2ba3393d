//! Message bodies, whatever protocol they come from and go to.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use http_body::{Body as _, Frame, SizeHint};

use crate::{
    Problem, ProxyError, Source, h1,
    h3::{Receiver, UploadBody},
    normal,
    replay::Replay,
    shelf::{Shelf, Standing, Wanted},
    stall::STALL,
    tcp::Http2Body,
    tunnel::{Awaited, CapsuleBody, Leaving, Reading},
};

/// How long a request that should have no body may take to end.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a body broke off. Whoever forwards it must let the receiver see that it is not complete.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The sender gave up or was lost.
    #[error("the sender broke off: {0}")]
    Broken(String),
    /// It took longer than it may.
    #[error("it took too long")]
    Late,
    /// The length is not what the head promised.
    #[error("the body has {seen} bytes where the head promised {promised}")]
    Length {
        /// What Content-Length said.
        promised: u64,
        /// What came.
        seen: u64,
    },
}

/// A body that is made of another on its way, as one that is coded anew.
pub trait Recoded: http_body::Body<Data = Bytes, Error = BodyError> + Send {
    /// What it is made of.
    fn source(&self) -> &Body;
}

/// A body, streamed: data, then perhaps trailers. Reads no faster than it is asked.
pub struct Body {
    kind: Kind,
    /// What [`Body::settle`] found.
    peeked: Option<Box<Result<Frame<Bytes>, BodyError>>>,
    /// What Content-Length promised and how much of it is still to come.
    length: Option<Length>,
    pace: Option<Box<Pace>>,
    /// It is told in trailers that it broke off.
    grpc: bool,
    /// It was.
    broke_off: bool,
    /// Where its bytes are counted.
    count: Option<Arc<AtomicU64>>,
}

/// How long a body may be silent, and how long it may take.
struct Pace {
    idle: Option<Duration>,
    until: Option<Instant>,
    /// What the other direction does is no silence either.
    upload: Option<Source>,
    /// Since when nothing came.
    since: Instant,
    timer: Option<Pin<Box<tokio::time::Sleep>>>,
}

pub(crate) enum Kind {
    Empty,
    Full(Bytes),
    Hyper(hyper::body::Incoming),
    /// The answer of a server over HTTP/2.
    HyperHttp2(hyper::body::Incoming),
    Http1(Box<h1::Receiver>),
    Http2(Box<Http2Body>),
    Http3(Box<Receiver>),
    Upload(UploadBody),
    Tunnel(Box<Reading>),
    Awaited(Awaited),
    Capsules(CapsuleBody),
    Leaving(Box<Leaving<Body>>),
    Replay(Replay),
    Shelved(Arc<Standing>),
    Recoded(Pin<Box<dyn Recoded>>),
    /// It was ended before it was read.
    Ended(&'static str),
}

impl Kind {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self {
            Self::Empty => Poll::Ready(None),
            Self::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                *self = Self::Empty;
                Poll::Ready((!bytes.is_empty()).then_some(Ok(Frame::data(bytes))))
            }
            Self::Hyper(incoming) => Pin::new(incoming).poll_frame(cx).map_err(|e| BodyError::Broken(reason(&e))),
            // To hyper a stream that was reset without an error has ended; that it has said its last word is another thing.
            Self::HyperHttp2(incoming) => match ready!(Pin::new(&mut *incoming).poll_frame(cx)) {
                None if !incoming.is_end_stream() => {
                    Poll::Ready(Some(Err(BodyError::Broken("the stream was reset".into()))))
                }
                frame => Poll::Ready(frame.map(|frame| frame.map_err(|e| BodyError::Broken(reason(&e))))),
            },
            Self::Http1(receiver) => receiver.poll_frame(cx),
            Self::Http2(body) => body.poll_frame(cx),
            Self::Http3(receiver) => receiver.poll_frame(cx).map_err(BodyError::from),
            Self::Upload(upload) => upload.poll_frame(cx),
            Self::Tunnel(reading) => reading.poll_frame(cx),
            Self::Awaited(awaited) => awaited.poll_frame(cx),
            Self::Capsules(CapsuleBody(waiting)) => {
                waiting.poll_recv(cx).map(|next| next.map(|next| Ok(Frame::data(next))))
            }
            Self::Leaving(leaving) => Pin::new(leaving).poll_frame(cx),
            Self::Replay(replay) => replay.poll_frame(cx),
            Self::Shelved(standing) => standing.with(|kind| kind.poll_frame(cx), Poll::is_pending),
            Self::Recoded(body) => body.as_mut().poll_frame(cx),
            Self::Ended(why) => Poll::Ready(Some(Err(BodyError::Broken((*why).into())))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(bytes) => bytes.is_empty(),
            Self::Hyper(incoming) | Self::HyperHttp2(incoming) => incoming.is_end_stream(),
            Self::Http1(receiver) => receiver.is_end_stream(),
            Self::Http2(body) => body.is_end_stream(),
            Self::Http3(receiver) => receiver.has_ended(),
            Self::Upload(upload) => upload.is_end_stream(),
            Self::Replay(replay) => replay.is_end_stream(),
            Self::Shelved(standing) => standing.peek(Self::is_end_stream),
            Self::Recoded(body) => body.is_end_stream(),
            Self::Tunnel(_) | Self::Awaited(_) | Self::Capsules(_) | Self::Leaving(_) | Self::Ended(_) => false,
        }
    }

    /// Whether all its data was read from the stream, so that it holds nothing there: most small ones are so from the start.
    fn is_all_here(&self) -> bool {
        match self {
            Self::Empty | Self::Full(_) => true,
            Self::Http3(receiver) => receiver.is_all_here(),
            Self::Upload(upload) => upload.is_all_here(),
            _ => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Hyper(incoming) | Self::HyperHttp2(incoming) => incoming.size_hint(),
            Self::Http1(receiver) => receiver.size_hint(),
            Self::Replay(replay) => replay.size_hint(),
            Self::Shelved(standing) => standing.peek(Self::size_hint),
            Self::Recoded(body) => body.size_hint(),
            _ => SizeHint::default(),
        }
    }

    fn pause(&self) {
        match self {
            Self::Upload(upload) => upload.pause(),
            Self::Shelved(standing) => standing.peek(Self::pause),
            _ => {}
        }
    }

    /// Gives back what the body holds; whether there was anything.
    pub(crate) fn end(&mut self, why: &'static str) -> bool {
        if self.is_end_stream() {
            return false;
        }
        if let Self::Upload(upload) = self {
            upload.give_up();
        }
        *self = Self::Ended(why);
        true
    }
}

struct Length {
    promised: u64,
    seen: u64,
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

    /// A body made of another.
    pub fn recoded(body: impl Recoded + 'static) -> Self {
        Self::from(Kind::Recoded(Box::pin(body)))
    }

    /// The body of an answer that a server gives over HTTP/2.
    pub fn of_http2_server(incoming: hyper::body::Incoming) -> Self {
        if incoming.is_end_stream() { Self::empty() } else { Self::from(Kind::HyperHttp2(incoming)) }
    }

    pub(crate) fn replay(replay: Replay) -> Self {
        Self::from(Kind::Replay(replay))
    }

    /// Holds the body to a length: more or fewer bytes become an error (RFC 9110 §8.6).
    pub fn with_length(mut self, promised: Option<u64>) -> Self {
        self.length = promised.map(|promised| Length { promised, seen: 0 });
        self
    }

    /// If the body breaks off, it ends with the status that gRPC has for that (14, UNAVAILABLE), which its clients take for a
    /// reason to try again, or for the end of its time (4, DEADLINE_EXCEEDED). A reset they take for a fault of the service (13,
    /// INTERNAL).
    pub fn ending_as_grpc(mut self) -> Self {
        self.grpc = true;
        self
    }

    /// Whether its trailers say that it broke off, or those of the one of which it is made.
    pub(crate) fn broke_off(&self) -> bool {
        match &self.kind {
            Kind::Recoded(body) => body.source().broke_off(),
            _ => self.broke_off,
        }
    }

    /// Counts its bytes as they are read.
    pub fn counted(mut self, bytes: Arc<AtomicU64>) -> Self {
        self.count = Some(bytes);
        self
    }

    /// Puts the body on a shelf: it may be ended when nobody reads it.
    pub fn shelved(self, shelf: &Shelf) -> Self {
        self.shelved_for(shelf, STALL, Wanted::Now)
    }

    /// The same, where its reader may stand still for so long, if there is room.
    pub(crate) fn shelved_for(mut self, shelf: &Shelf, patience: Duration, wanted: Wanted) -> Self {
        if !self.is_end_stream() && !self.kind.is_all_here() {
            self.kind = Kind::Shelved(shelf.put(std::mem::replace(&mut self.kind, Kind::Empty), patience, wanted));
        }
        self
    }

    /// Lets the body break off when nothing has moved for `idle`, neither of it nor of the `upload` that it answers, and when
    /// it has not ended by `until`.
    pub fn with_pace(mut self, idle: Option<Duration>, until: Option<Instant>, upload: Option<&Source>) -> Self {
        if (idle.is_some() || until.is_some()) && !self.is_end_stream() {
            self.pace =
                Some(Box::new(Pace { idle, until, upload: upload.cloned(), since: Instant::now(), timer: None }));
        }
        self
    }

    /// Finds out whether a request has a body where that would have no meaning: the end of a GET may come in a packet of its
    /// own, and a body that was invented meanwhile would confuse the service (RFC 9110 §9.3.1). So with these methods, and
    /// without a length, the first event is awaited: data, trailers or the end. Not cancel safe: what it read is lost.
    pub async fn settle(mut self, method: &Method, fields: &HeaderMap) -> Result<Self, Problem> {
        let has_length = fields.get(header::CONTENT_LENGTH).is_some_and(|length| length != "0");
        if has_length || self.is_end_stream() || !is_meaningless_on(method) {
            return Ok(self);
        }
        let first = async {
            loop {
                match std::future::poll_fn(|cx| self.kind.poll_frame(cx)).await {
                    Some(Ok(frame)) if frame.data_ref().is_some_and(Bytes::is_empty) => {}
                    first => return first,
                }
            }
        };
        match tokio::time::timeout(SETTLE_TIMEOUT, first).await {
            Ok(None) => self.kind = Kind::Empty,
            Ok(Some(frame)) => self.peeked = Some(Box::new(frame)),
            Err(_) => {
                let detail = format!("a {method} request did not end");
                return Err(Problem::proxy(StatusCode::REQUEST_TIMEOUT, ProxyError::HttpRequestError, detail));
            }
        }
        Ok(self)
    }

    /// Whoever read it does not, for now: somebody else has to notice if its sender gives up.
    pub(crate) fn pause(&self) {
        self.kind.pause();
    }

    fn ended(&mut self) -> Option<Result<Frame<Bytes>, BodyError>> {
        let length = self.length.take()?;
        (length.seen != length.promised)
            .then(|| Err(BodyError::Length { promised: length.promised, seen: length.seen }))
    }
}

impl Pace {
    /// Resolves when the body has taken too long.
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<BodyError> {
        loop {
            let moved = self.upload.as_ref().map_or(self.since, |upload| self.since.max(upload.moved()));
            let silent = self.idle.map(|idle| moved + idle);
            let Some(due) = [silent, self.until].into_iter().flatten().min() else { return Poll::Pending };
            let now = Instant::now();
            if due <= now {
                return Poll::Ready(match self.until.is_some_and(|until| until <= now) {
                    true => BodyError::Late,
                    false => BodyError::Broken("it fell silent".into()),
                });
            }
            let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due.into())));
            if timer.deadline() != due.into() {
                timer.as_mut().reset(due.into());
            }
            ready!(timer.as_mut().poll(cx));
        }
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let is_over = |pace: &Pace| pace.until.is_some_and(|until| until <= Instant::now());
        let frame = match self.peeked.take() {
            Some(frame) => Some(*frame),
            // Also where there is always something, because it is read slowly.
            None if self.pace.as_deref().is_some_and(is_over) => Some(Err(BodyError::Late)),
            None => match (self.kind.poll_frame(cx), &mut self.pace) {
                (Poll::Ready(frame), pace) => {
                    if let Some(pace) = pace {
                        pace.since = Instant::now();
                    }
                    frame
                }
                (Poll::Pending, None) => return Poll::Pending,
                (Poll::Pending, Some(pace)) => Some(Err(ready!(pace.poll_over(cx)))),
            },
        };
        Poll::Ready(match frame {
            Some(Ok(frame)) => Some(match frame.into_data() {
                Ok(data) => {
                    if let Some(count) = &self.count {
                        count.fetch_add(data.len() as u64, Relaxed);
                    }
                    if let Some(length) = &mut self.length {
                        length.seen += data.len() as u64;
                        if length.seen > length.promised {
                            let error = BodyError::Length { promised: length.promised, seen: length.seen };
                            self.length = None;
                            return Poll::Ready(Some(Err(error)));
                        }
                    }
                    Ok(Frame::data(data))
                }
                Err(frame) => match frame.into_trailers() {
                    Ok(trailers) => {
                        // Nothing comes behind them, also not that it is late.
                        self.pace = None;
                        Ok(Frame::trailers(clean(trailers)))
                    }
                    Err(frame) => Ok(frame),
                },
            }),
            Some(Err(error)) => {
                (self.length, self.pace) = (None, None);
                if self.grpc {
                    (self.kind, self.broke_off) = (Kind::Empty, true);
                    return Poll::Ready(Some(Ok(Frame::trailers(unavailable(&error)))));
                }
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
            kind => kind.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.length {
            Some(length) => SizeHint::with_exact(length.promised.saturating_sub(length.seen)),
            None => self.kind.size_hint(),
        }
    }
}

/// GET, HEAD, DELETE, OPTIONS and TRACE: their body has no generally defined meaning (RFC 9110 §9.3).
fn is_meaningless_on(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::DELETE | Method::OPTIONS | Method::TRACE)
}

fn unavailable(error: &BodyError) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    let status = if matches!(error, BodyError::Late) { "4" } else { "14" };
    trailers.insert("grpc-status", HeaderValue::from_static(status));
    let text: String = error.to_string().chars().filter(|c| matches!(c, ' '..='~') && *c != '%').collect();
    if let Ok(message) = HeaderValue::from_str(&text) {
        trailers.insert("grpc-message", message);
    }
    trailers
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
        Self { kind, peeked: None, length: None, pace: None, grpc: false, broke_off: false, count: None }
    }
}

impl From<Receiver> for Body {
    fn from(receiver: Receiver) -> Self {
        if receiver.has_ended() { Self::empty() } else { Self::from(Kind::Http3(Box::new(receiver))) }
    }
}

impl From<h1::Receiver> for Body {
    fn from(receiver: h1::Receiver) -> Self {
        Self::from(Kind::Http1(Box::new(receiver)))
    }
}

impl From<Http2Body> for Body {
    fn from(body: Http2Body) -> Self {
        if body.is_end_stream() { Self::empty() } else { Self::from(Kind::Http2(Box::new(body))) }
    }
}

impl From<UploadBody> for Body {
    fn from(upload: UploadBody) -> Self {
        Self::from(Kind::Upload(upload))
    }
}

impl From<Reading> for Body {
    fn from(reading: Reading) -> Self {
        Self::from(Kind::Tunnel(Box::new(reading)))
    }
}

impl From<CapsuleBody> for Body {
    fn from(capsules: CapsuleBody) -> Self {
        Self::from(Kind::Capsules(capsules))
    }
}

impl From<Leaving<Self>> for Body {
    fn from(leaving: Leaving<Self>) -> Self {
        Self::from(Kind::Leaving(Box::new(leaving)))
    }
}

impl From<Awaited> for Body {
    fn from(awaited: Awaited) -> Self {
        Self::from(Kind::Awaited(awaited))
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

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    async fn next(body: &mut Body) -> Option<Result<Frame<Bytes>, BodyError>> {
        poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await
    }

    #[tokio::test]
    async fn what_is_late_is_told_once_though_there_is_more() {
        let late = || Body::full("more").with_pace(None, Some(Instant::now()), None);
        let mut body = late();
        assert!(matches!(next(&mut body).await, Some(Err(BodyError::Late))));
        let mut body = late().ending_as_grpc();
        let trailers = next(&mut body).await.unwrap().unwrap().into_trailers().unwrap();
        assert_eq!(trailers["grpc-status"], "4");
        assert!(body.broke_off() && next(&mut body).await.is_none());
    }
}
