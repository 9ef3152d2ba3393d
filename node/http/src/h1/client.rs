//! Exchanges with a server: one at a time on a connection, in the task of whoever wants the answer.

use std::{
    any::Any,
    cell::RefCell,
    future::poll_fn,
    io::{self, IoSlice},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use http::{Method, Response, StatusCode, header, response};
use http_body::{Body as _, Frame, SizeHint};
use tokio_util::task::AbortOnDropHandle;

use super::{
    codec::{self, AnswerHead, Decoder, Framing, MAX_HEAD_BYTES, Offence, Step},
    stream::ServerStream,
};
use crate::{
    Body, BodyError, Head, Interim,
    interim::MAX_TAKEN,
    normal::Origin,
    stall::{STALL, Stall},
    tunnel::End,
};

/// Read at a time; with more than this, an answer is taken for a long one.
const READ_BYTES: usize = 16 << 10;
/// Read at a time of a long answer: so much of it waits that nobody takes.
const LONG_READ_BYTES: usize = 32 << 10;
/// So much of a request is put together before it is written.
const GATHER_BYTES: usize = 16 << 10;
/// Pieces of a request up to this size are put together with others; larger ones are written from where they are.
const COPY_BYTES: usize = 4 << 10;

/// Uploads at a time that may go on although their answer is complete; others end with it.
const MAX_LINGERING: usize = 512;

static LINGERING: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Where answers are read first: most are short, and then nothing else has to be kept for them.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(Vec::with_capacity(READ_BYTES));
}

/// A request on its way: what of it is written, and what is still to come.
pub struct Outgoing {
    method: Method,
    /// Written next, from `at` on.
    out: Vec<u8>,
    at: usize,
    /// Written then.
    data: Bytes,
    body: Body,
    is_chunked: bool,
    /// Whether there is a chunk whose end is not written yet.
    in_chunk: bool,
    says_trailers: bool,
    /// There is no more of the body.
    ended: bool,
    is_begun: bool,
    stall: Stall,
}

impl Outgoing {
    /// Prepares a request. A body whose length no field tells is sent in chunks.
    pub fn new(head: &Head<'_>, body: Body) -> Self {
        let ended = body.is_end_stream();
        let is_chunked = !ended && !head.fields.contains_key(header::CONTENT_LENGTH);
        let mut out = Vec::with_capacity(512);
        codec::put_request(&mut out, head, is_chunked);
        Self {
            method: head.method.clone(),
            out,
            at: 0,
            data: Bytes::new(),
            body,
            is_chunked,
            in_chunk: false,
            says_trailers: head.fields.contains_key(header::TRAILER),
            ended,
            is_begun: false,
            stall: Stall::default(),
        }
    }

    /// Writes on; ready when all of it is written, or when the server takes no more.
    fn poll_upload(&mut self, cx: &mut Context<'_>, stream: &ServerStream) -> Poll<Result<(), ExchangeError>> {
        loop {
            if self.at > GATHER_BYTES {
                self.out.drain(..self.at);
                self.at = 0;
            }
            while !self.ended && self.data.is_empty() && self.out.len() - self.at < GATHER_BYTES {
                match std::pin::Pin::new(&mut self.body).poll_frame(cx) {
                    Poll::Ready(frame) => self.put(frame).map_err(ExchangeError::Upload)?,
                    Poll::Pending => break,
                }
            }
            if self.at == self.out.len() && self.data.is_empty() {
                return if self.ended { Poll::Ready(Ok(())) } else { Poll::Pending };
            }
            let bufs = [IoSlice::new(&self.out[self.at..]), IoSlice::new(&self.data)];
            let Poll::Ready(written) = stream.poll_write_some(cx, &bufs) else {
                ready!(self.stall.poll_stalled(cx));
                return Poll::Ready(Err(ExchangeError::Stalled));
            };
            if stream.is_deaf() {
                return Poll::Ready(Ok(()));
            }
            self.wrote(written.unwrap_or_default());
        }
    }

    fn wrote(&mut self, written: usize) {
        self.is_begun |= written > 0;
        self.stall.moved();
        let of_out = written.min(self.out.len() - self.at);
        self.at += of_out;
        self.data.advance(written - of_out);
        if self.at == self.out.len() {
            self.out.clear();
            self.at = 0;
        }
    }

    fn put(&mut self, frame: Option<Result<Frame<Bytes>, BodyError>>) -> Result<(), BodyError> {
        match frame.transpose()?.map(Frame::into_data) {
            Some(Ok(data)) if data.is_empty() => {}
            Some(Ok(data)) => {
                if self.is_chunked {
                    self.end_chunk();
                    codec::put_chunk_head(&mut self.out, data.len());
                    self.in_chunk = true;
                }
                if data.len() <= COPY_BYTES {
                    self.out.extend_from_slice(&data);
                } else {
                    self.data = data;
                }
            }
            end => {
                // Servers may not know what to do with trailers that nobody promised (RFC 9110 §6.5.1).
                let trailers = end.and_then(|frame| frame.err()?.into_trailers().ok()).filter(|_| self.says_trailers);
                if self.is_chunked {
                    self.end_chunk();
                    codec::put_last_chunk(&mut self.out, trailers.as_ref());
                }
                self.ended = true;
            }
        }
        Ok(())
    }

    fn end_chunk(&mut self) {
        if std::mem::take(&mut self.in_chunk) {
            self.out.extend_from_slice(b"\r\n");
        }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The server took nothing of the request, which is as it was.
    #[error("closed the connection before it took anything")]
    Unsent(Box<Outgoing>),
    /// The connection ended, or broke, before the head of an answer was there.
    #[error("closed the connection without an answer")]
    Closed(#[source] Option<io::Error>),
    /// The answer is none.
    #[error(transparent)]
    Offence(#[from] Offence),
    /// The request's own body broke off.
    #[error(transparent)]
    Upload(BodyError),
    /// The server takes nothing of the request for too long.
    #[error("does not take the request")]
    Stalled,
}

impl std::fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outgoing").field("method", &self.method).finish_non_exhaustive()
    }
}

/// A connection to a server. Dropped, it closes, and so ends what is under way on it.
#[derive(Debug)]
pub struct Connection {
    shared: Arc<Shared>,
    /// The rest of an upload, while the answer is read.
    upload: Mutex<Option<AbortOnDropHandle<()>>>,
    /// An upload goes on that ends by itself.
    lingers: bool,
    /// It belongs to a tunnel now.
    is_tunnel: bool,
}

/// What became of a request to switch to another protocol.
#[derive(Debug)]
pub enum Switched {
    /// The head of the answer; the connection, which begins behind it; and what it takes the place of.
    To(response::Parts, End, Arc<dyn Any + Send + Sync>),
    /// An answer like any other, and the connection.
    Not(Response<Body>, Connection),
}

#[derive(Debug)]
struct Shared {
    stream: ServerStream,
    /// The server keeps the connection for another exchange.
    keeps: AtomicBool,
    /// The last answer was read to its end.
    answered: AtomicBool,
    /// Some of the last request is not written.
    uploading: AtomicBool,
    /// What the connection takes the place of, as long as it is there.
    _place: Arc<dyn Any + Send + Sync>,
}

impl Connection {
    /// Takes a new connection, and what it takes the place of: dropped when the connection is closed, also by an upload that
    /// comes to its end after the answer.
    pub fn new(stream: ServerStream, place: Arc<dyn Any + Send + Sync>) -> Self {
        let (keeps, answered, uploading) = (true.into(), true.into(), false.into());
        let shared = Arc::new(Shared { stream, keeps, answered, uploading, _place: place });
        Self { shared, upload: Mutex::default(), lingers: false, is_tunnel: false }
    }

    /// Whether the server has neither closed the connection nor said anything unasked: a look into the kernel.
    pub fn is_quiet(&self) -> bool {
        self.shared.stream.is_quiet()
    }

    /// Sends a request and waits for the head of its answer, and hands interim answers on. Not cancel safe: it leaves the
    /// connection in the middle of an exchange, which has to be dropped then.
    pub async fn exchange(
        &self,
        mut request: Outgoing,
        interim: Option<&Interim>,
    ) -> Result<Response<Body>, ExchangeError> {
        let (head, rest, uploading) = match self.answer(&mut request, interim, false).await {
            Err(ExchangeError::Closed(_)) if !request.is_begun => {
                return Err(ExchangeError::Unsent(Box::new(request)));
            }
            answered => answered?,
        };
        if uploading {
            self.upload_on(request);
        }
        Ok(Response::from_parts(head.parts, self.shared.body(head.framing, rest)))
    }

    /// Sends a request to switch to another protocol. If the server does, the connection is one end of a tunnel; what it took the
    /// place of is kept by what is returned with it. Not cancel safe, as an exchange is not.
    pub async fn switch(mut self, mut request: Outgoing, interim: Option<&Interim>) -> Result<Switched, ExchangeError> {
        let (head, rest, _) = self.answer(&mut request, interim, true).await?;
        if head.parts.status != StatusCode::SWITCHING_PROTOCOLS {
            let body = self.shared.body(head.framing, rest);
            return Ok(Switched::Not(Response::from_parts(head.parts, body), self));
        }
        self.is_tunnel = true;
        let shared = self.shared.clone();
        Ok(Switched::To(head.parts, End::server(shared.stream.clone(), rest), shared))
    }

    /// The head of an answer, what was read behind it, and whether there is more of the request to write.
    async fn answer(
        &self,
        request: &mut Outgoing,
        interim: Option<&Interim>,
        may_switch: bool,
    ) -> Result<(AnswerHead, Bytes, bool), ExchangeError> {
        let shared = &self.shared;
        shared.answered.store(false, Relaxed);
        let mut uploading = true;
        let mut incoming = Incoming { method: request.method.clone(), partial: Vec::new(), taken: 0, may_switch };
        let (head, rest) = poll_fn(|cx| {
            if uploading && let Poll::Ready(done) = request.poll_upload(cx, &shared.stream) {
                uploading = false;
                done?;
            }
            incoming.poll_head(cx, &shared.stream, interim)
        })
        .await?;
        shared.keeps.store(head.keeps, Relaxed);
        Ok((head, rest, uploading))
    }

    /// Writes the rest of a request while its answer is read.
    fn upload_on(&self, mut request: Outgoing) {
        self.shared.uploading.store(true, Relaxed);
        let shared = self.shared.clone();
        let task = tokio::spawn(async move {
            match poll_fn(|cx| request.poll_upload(cx, &shared.stream)).await {
                Ok(()) => shared.uploading.store(false, Relaxed),
                // Half a request must not look like a whole one.
                Err(_) => shared.stream.close(),
            }
        });
        *self.upload() = Some(AbortOnDropHandle::new(task));
    }

    /// The connection for another exchange, if it can carry one. If not, it closes; but an upload that goes on although its
    /// answer is complete may come to its end first, if it does so soon.
    pub fn again(mut self) -> Option<Self> {
        let Shared { stream, keeps, answered, uploading, .. } = &*self.shared;
        if !answered.load(Relaxed) || stream.is_deaf() {
            return None;
        }
        if uploading.load(Relaxed) {
            let upload = self.upload().take();
            if let Some(upload) = upload
                && let Some(place) = Lingering::enter()
            {
                self.lingers = true;
                tokio::spawn(async move {
                    let _place = place;
                    drop(tokio::time::timeout(STALL, upload).await);
                });
            }
            return None;
        }
        keeps.load(Relaxed).then_some(self)
    }

    fn upload(&self) -> MutexGuard<'_, Option<AbortOnDropHandle<()>>> {
        self.upload.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// An upload that goes on although its call is over, and so counts for nobody.
struct Lingering;

impl Lingering {
    fn enter() -> Option<Self> {
        let entered = LINGERING.fetch_update(Relaxed, Relaxed, |n| (n < MAX_LINGERING).then_some(n + 1));
        entered.is_ok().then_some(Self)
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        LINGERING.fetch_sub(1, Relaxed);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.lingers && !self.is_tunnel {
            self.shared.stream.close();
        }
    }
}

impl Shared {
    /// The body behind a head, of which the beginning may be there.
    fn body(self: &Arc<Self>, framing: Option<Framing>, mut rest: Bytes) -> Body {
        let body = match framing {
            None => Body::empty(),
            Some(Framing::Length(length)) if rest.len() as u64 >= length => {
                Body::full(rest.split_to(usize::try_from(length).unwrap_or(usize::MAX)))
            }
            Some(framing) => {
                let decoder = Decoder::new(framing);
                let shared = self.clone();
                return Receiver { shared, decoder, input: rest, is_long: false }.into();
            }
        };
        self.ended(&rest);
        body
    }

    /// The answer was read to its end, and this is behind it.
    fn ended(&self, behind: &[u8]) {
        if !behind.is_empty() {
            // Whatever it is, nobody asked for it.
            self.keeps.store(false, Relaxed);
        }
        self.answered.store(true, Relaxed);
    }
}

/// The head of an answer, as far as it has come.
struct Incoming {
    /// The request's.
    method: Method,
    partial: Vec<u8>,
    /// Interim answers so far.
    taken: usize,
    /// 101 is an answer to the request.
    may_switch: bool,
}

impl Incoming {
    /// Reads the head of the answer proper, and perhaps some of what is behind it.
    fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        stream: &ServerStream,
        interim: Option<&Interim>,
    ) -> Poll<Result<(AnswerHead, Bytes), ExchangeError>> {
        SCRATCH.with_borrow_mut(|scratch| {
            loop {
                scratch.clear();
                match ready!(stream.poll_read_into(cx, scratch)) {
                    Ok(0) => return Poll::Ready(Err(ExchangeError::Closed(None))),
                    Ok(_) => {}
                    Err(error) => return Poll::Ready(Err(ExchangeError::Closed(Some(error)))),
                }
                let mut bytes = &scratch[..];
                if !self.partial.is_empty() {
                    let from = self.partial.len().saturating_sub(3);
                    self.partial.extend_from_slice(bytes);
                    // Not to be read from its start again with each byte that comes.
                    if self.partial.len() < MAX_HEAD_BYTES && !codec::may_end_head(&self.partial[from..]) {
                        continue;
                    }
                    bytes = &self.partial;
                }
                let before = bytes.len();
                while let Some((head, length)) = codec::read_head(bytes, &self.method)? {
                    bytes = &bytes[length..];
                    let switches = head.parts.status == StatusCode::SWITCHING_PROTOCOLS;
                    if !head.parts.status.is_informational() || switches && self.may_switch {
                        return Poll::Ready(Ok((head, Bytes::copy_from_slice(bytes))));
                    }
                    self.taken += 1;
                    if switches {
                        return Poll::Ready(Err(Offence("it switches protocols, which nobody asked for").into()));
                    }
                    if self.taken > MAX_TAKEN {
                        return Poll::Ready(Err(Offence("it has too many interim answers").into()));
                    }
                    if let Some(interim) = interim {
                        interim.pass_on(head.parts.status, head.parts.headers, Origin::Outside);
                    }
                }
                let read = before - bytes.len();
                match self.partial.is_empty() {
                    true => self.partial.extend_from_slice(&scratch[read..]),
                    false => drop(self.partial.drain(..read)),
                }
            }
        })
    }
}

/// The body of an answer, read as it is asked for.
#[derive(Debug)]
pub(crate) struct Receiver {
    shared: Arc<Shared>,
    decoder: Decoder,
    /// Read, and not taken yet.
    input: Bytes,
    is_long: bool,
}

impl Receiver {
    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        loop {
            let frame = match self.decoder.step(&mut self.input) {
                Ok(Step::Data(data)) => Some(Frame::data(data)),
                Ok(Step::Trailers(trailers)) => Some(Frame::trailers(trailers)),
                Ok(Step::Done) => None,
                Ok(Step::Starved) => {
                    if let Err(why) = ready!(self.poll_read(cx)) {
                        return Poll::Ready(Some(Err(BodyError::Broken(why))));
                    }
                    continue;
                }
                Err(offence) => return Poll::Ready(Some(Err(BodyError::Broken(offence.to_string())))),
            };
            if self.decoder.is_done() {
                self.shared.ended(&self.input);
            }
            return Poll::Ready(frame.map(Ok));
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), String>> {
        let stream = &self.shared.stream;
        let read = if self.is_long {
            // Reserved only once there is something to be read.
            let mut piece = Vec::new();
            let read = ready!(stream.poll_read_into_new(cx, &mut piece, LONG_READ_BYTES));
            // One that has become slow must not hold so much for so little.
            self.is_long = piece.len() >= READ_BYTES;
            self.input = piece.into();
            read
        } else {
            ready!(SCRATCH.with_borrow_mut(|scratch| {
                scratch.clear();
                let read = stream.poll_read_into(cx, scratch);
                self.input = Bytes::copy_from_slice(scratch);
                self.is_long = scratch.len() == READ_BYTES;
                read
            }))
        };
        match read {
            Ok(0) => self.decoder.end().map_err(|offence| offence.to_string())?,
            Ok(_) => {}
            Err(error) => return Poll::Ready(Err(error.to_string())),
        }
        Poll::Ready(Ok(()))
    }

    pub(crate) fn is_end_stream(&self) -> bool {
        self.decoder.is_done()
    }

    pub(crate) fn size_hint(&self) -> SizeHint {
        self.decoder.whole_left().map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
