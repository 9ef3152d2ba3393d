//! The two halves of a request's stream, over quinn.

use std::{
    future::Future,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode};
use http_body::Frame;

use super::{
    Code, Fault,
    codec::{
        frame,
        head::{self, TooLarge},
        message::{Event, Message},
        varint,
    },
    connection::{Connection, MAX_SECTION_BYTES},
    order::Turn,
};
use crate::{
    BodyError, Head,
    stall::{STALL, Stall},
};

/// Payloads up to this size are copied behind their frame's header: one buffer is cheaper than two.
const COPY_BYTES: usize = 1024;
/// Messages above this size may take more than a round trip to arrive.
const LARGE_BYTES: usize = 16 << 10;
/// Buffers that are handed to QUIC at a time.
const MAX_CHUNKS: usize = 8;
/// What is gathered before it is handed over, in bytes.
const MAX_GATHERED: usize = 32 << 10;

/// Pieces of a body below this size are put together, up to so much.
const LARGE_PIECE_BYTES: usize = 2 << 10;
const GATHER_BYTES: usize = 8 << 10;

/// The sending half: what is queued leaves in as few writes as possible. Reset on drop unless it was finished, so that a part
/// of a message never looks like a whole one.
pub(crate) struct Sender {
    stream: quinn::SendStream,
    connection: Arc<Connection>,
    /// Frames, and the headers of those whose payload is in `chunks`.
    queued: BytesMut,
    chunks: Vec<Bytes>,
    gathered: usize,
    /// Bytes written so far.
    written: usize,
    turn: Turn,
    on_drop: Code,
    /// Somebody waits, or waited, for the peer to stop the stream.
    watched: bool,
    open: bool,
    /// How long the peer may take nothing.
    patience: Duration,
}

impl Sender {
    pub(crate) fn new(stream: quinn::SendStream, connection: Arc<Connection>, on_drop: Code) -> Self {
        Self {
            stream,
            connection,
            queued: BytesMut::new(),
            chunks: Vec::new(),
            gathered: 0,
            written: 0,
            turn: Turn::default(),
            on_drop,
            watched: false,
            open: true,
            patience: STALL,
        }
    }

    /// Queues the head of a request.
    pub(crate) fn request(&mut self, head: &Head<'_>) -> Result<(), TooLarge> {
        self.queued.reserve(512);
        head::encode_request(head, self.connection.peer_max_section_bytes(), &mut self.queued)
    }

    pub(crate) fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    pub(crate) fn stream_id(&self) -> quinn::StreamId {
        self.stream.id()
    }

    /// Has so much patience with a peer that takes nothing.
    pub(crate) fn have_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Queues the head of a response.
    pub(crate) fn response(&mut self, status: StatusCode, fields: &HeaderMap) -> Result<(), TooLarge> {
        self.queued.reserve(512);
        head::encode_response(status, fields, self.connection.peer_max_section_bytes(), &mut self.queued)
    }

    /// Queues an interim head; not one that is larger than the peer takes.
    pub(crate) fn interim(&mut self, status: StatusCode, fields: &HeaderMap) {
        // One that says nothing but to go on always fits: a limit that is below one field is nobody's.
        let limit = if fields.is_empty() { u64::MAX } else { self.connection.peer_max_section_bytes() };
        let _ = head::encode_response(status, fields, limit, &mut self.queued);
    }

    /// Queues trailers.
    pub(crate) fn trailers(&mut self, fields: &HeaderMap) -> Result<(), TooLarge> {
        head::encode_trailers(fields, self.connection.peer_max_section_bytes(), &mut self.queued)
    }

    /// Queues part of the body.
    pub(crate) fn data(&mut self, data: Bytes) {
        if data.is_empty() {
            return;
        }
        varint::encode(frame::DATA, &mut self.queued);
        varint::encode(data.len() as u64, &mut self.queued);
        if data.len() <= COPY_BYTES {
            return self.queued.extend_from_slice(&data);
        }
        self.put_queued();
        self.put(data);
    }

    pub(crate) fn has_queued(&self) -> bool {
        !self.chunks.is_empty() || !self.queued.is_empty()
    }

    /// Whether enough is queued to be written.
    pub(crate) fn is_full(&self) -> bool {
        // A payload takes two places, and what is queued behind it one.
        self.chunks.len() + 3 > MAX_CHUNKS || self.gathered + self.queued.len() >= MAX_GATHERED
    }

    /// Writes what is queued, as far as the peer lets; gives up when it takes nothing for too long. If dropped half way, only
    /// a reset makes sense, which the drop of the sender does.
    pub(crate) async fn flush(&mut self) -> Result<(), Unsent> {
        let length = self.gathered + self.queued.len();
        self.written += length;
        if let Some(priority) = self.connection.line().and_then(|line| self.turn.say(length, line)) {
            let _ = self.stream.set_priority(priority);
        }
        self.put_queued();
        self.gathered = 0;
        let mut stall = Stall::of(self.patience);
        let mut rest = &mut self.chunks[..];
        while !rest.is_empty() {
            let written = {
                let mut writing = pin!(self.stream.write_chunks(&mut *rest));
                std::future::poll_fn(|cx| match writing.as_mut().poll(cx) {
                    Poll::Ready(written) => Poll::Ready(written.map_err(Unsent::Failed)),
                    Poll::Pending => stall.poll_stalled(cx).map(|()| Err(Unsent::Stalled)),
                })
                .await?
            };
            stall.moved();
            rest = &mut rest[written.chunks..];
        }
        self.chunks.clear();
        Ok(())
    }

    /// Ends the stream: everything that was to be sent has been written.
    pub(crate) fn finish(&mut self) {
        self.open = false;
        let _ = self.stream.finish();
    }

    /// Breaks the stream off.
    pub(crate) fn reset(&mut self, code: Code) {
        self.open = false;
        if self.watched && !self.is_stopped() {
            self.connection.count_remembered();
        }
        let _ = self.stream.reset(code.var_int());
    }

    /// Waits until the peer has all of a large message that was finished, so that the connection is not closed over it. A small
    /// one is on its way.
    pub(crate) async fn delivered(&self) {
        if self.written > LARGE_BYTES {
            let _ = self.stream.stopped().await;
        }
    }

    /// Whether the peer has stopped the stream.
    fn is_stopped(&self) -> bool {
        let stopped = pin!(self.stream.stopped()).poll(&mut Context::from_waker(Waker::noop()));
        matches!(stopped, Poll::Ready(Ok(Some(_))))
    }

    /// Resolves when the peer wants no more of this stream, with its code, or when the connection is gone.
    pub(crate) fn stopped(&mut self) -> impl Future<Output = Option<Code>> + Send + use<> {
        self.watched = true;
        let stopped = self.stream.stopped();
        async move { stopped.await.ok().flatten().map(Code::from) }
    }

    fn put_queued(&mut self) {
        if !self.queued.is_empty() {
            let queued = self.queued.split().freeze();
            self.put(queued);
        }
    }

    fn put(&mut self, bytes: Bytes) {
        self.gathered += bytes.len();
        self.chunks.push(bytes);
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        if self.open {
            self.reset(self.on_drop);
        }
    }
}

/// Why something was not sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unsent {
    /// The peer takes nothing.
    #[error("the peer takes nothing")]
    Stalled,
    #[error(transparent)]
    Failed(quinn::WriteError),
}

/// Why no more comes.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Broken {
    /// The peer did not keep to the protocol.
    #[error("{0}")]
    Fault(Fault),
    /// The peer gave the stream up.
    #[error("the stream was reset ({0})")]
    Reset(Code),
    /// The connection is gone.
    #[error("{0}")]
    Lost(String),
}

impl Broken {
    /// What the other half of the stream is to be reset with.
    pub(crate) fn reset_code(&self) -> Code {
        match self {
            Self::Fault(fault) => fault.code(),
            Self::Reset(_) | Self::Lost(_) => Code::H3_REQUEST_CANCELLED,
        }
    }
}

impl From<Broken> for BodyError {
    fn from(broken: Broken) -> Self {
        Self::Broken(broken.to_string())
    }
}

/// What a look at a stream finds.
pub(crate) enum Sight {
    /// Nothing new; the task that looked is woken when there is.
    Nothing,
    /// Data that nobody has read. It hides whatever comes behind it, and nobody is woken.
    Data,
    /// It is over, well.
    Over,
    /// It broke off.
    Broken(Broken),
}

/// What Content-Length promised, and what came.
struct Length {
    promised: u64,
    seen: u64,
}

/// The receiving half. Dropped before the end, it tells the peer that the rest is not wanted.
pub(crate) struct Receiver {
    stream: quinn::RecvStream,
    connection: Arc<Connection>,
    message: Message,
    input: Bytes,
    /// What [`Receiver::look_ahead`] found.
    ahead: Option<Event>,
    /// Trailers whose end has not come.
    trailers: Option<Box<HeaderMap>>,
    length: Option<Length>,
    on_drop: Code,
    end: End,
}

/// How far a receiving half has come.
enum End {
    /// More may come.
    Open,
    /// All of the message is here.
    Whole,
    /// It broke off, and stays so: whoever asks again must not take it for whole.
    Broken(Broken),
}

impl Receiver {
    pub(crate) fn new(stream: quinn::RecvStream, connection: Arc<Connection>, on_drop: Code) -> Self {
        let message = Message::new(connection.role(), MAX_SECTION_BYTES);
        Self {
            stream,
            connection,
            message,
            input: Bytes::new(),
            ahead: None,
            trailers: None,
            length: None,
            on_drop,
            end: End::Open,
        }
    }

    /// Holds the body to a length (RFC 9114 §4.1.2).
    pub(crate) fn promise(&mut self, length: Option<u64>) {
        self.length = length.map(|promised| Length { promised, seen: 0 });
    }

    /// The head that came was an interim one.
    pub(crate) fn expect_another_head(&mut self) {
        self.message.expect_another_head();
    }

    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.end, End::Whole) && self.ahead.is_none() && self.trailers.is_none()
    }

    /// Whether all the data that was promised has been taken from the stream: nothing but its end is still there.
    pub(crate) fn is_all_here(&self) -> bool {
        self.length.as_ref().is_some_and(|length| length.seen == length.promised)
    }

    /// Looks, without waiting, what comes next: an end that is there already shows in [`Receiver::has_ended`].
    pub(crate) async fn look_ahead(&mut self) -> Result<(), Broken> {
        let found = std::future::poll_fn(|cx| Poll::Ready(self.poll_event(cx))).await;
        if let Poll::Ready(event) = found {
            self.ahead = event?;
        }
        Ok(())
    }

    /// The next part of the message; `None` at its end. Cancel safe.
    pub(crate) async fn event(&mut self) -> Result<Option<Event>, Broken> {
        std::future::poll_fn(|cx| self.poll_event(cx)).await
    }

    /// The same, to be polled.
    pub(crate) fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Event>, Broken>> {
        if let Some(event) = self.ahead.take() {
            return Poll::Ready(Ok(Some(event)));
        }
        match &self.end {
            End::Open => {}
            End::Whole => return Poll::Ready(Ok(None)),
            End::Broken(broken) => return Poll::Ready(Err(broken.clone())),
        }
        loop {
            match self.message.next(&mut self.input) {
                Ok(Some(event)) => {
                    return Poll::Ready(match (&event, &mut self.length) {
                        (Event::Data(data), Some(length)) => {
                            length.seen += data.len() as u64;
                            if length.seen > length.promised {
                                Err(self.break_off(Fault::malformed("more data than Content-Length says")))
                            } else {
                                Ok(Some(event))
                            }
                        }
                        _ => Ok(Some(event)),
                    });
                }
                Ok(None) => {}
                Err(fault) => return Poll::Ready(Err(self.break_off(fault))),
            }
            match ready!(self.poll_chunk(usize::MAX, cx)) {
                Ok(Some(bytes)) => self.input = bytes,
                Ok(None) => {
                    let short = self.length.as_ref().is_some_and(|length| length.seen != length.promised);
                    let end = match self.message.end() {
                        Ok(()) if short => Err(Fault::malformed("less data than Content-Length says")),
                        end => end,
                    };
                    return Poll::Ready(match end {
                        Ok(()) => {
                            self.end = End::Whole;
                            Ok(None)
                        }
                        Err(fault) => Err(self.break_off(fault)),
                    });
                }
                Err(error) => return Poll::Ready(Err(self.lose(error))),
            }
        }
    }

    /// The body as `http_body` has it: data, then trailers. These come with the end, because whoever reads them reads no
    /// further, and what is wrong behind them would pass.
    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        loop {
            match ready!(self.poll_event(cx)) {
                Ok(Some(Event::Data(data))) => return Poll::Ready(Some(Ok(Frame::data(self.gather(data, cx))))),
                Ok(Some(Event::Head(section) | Event::Trailers(section))) => {
                    match head::decode_trailers(&section, MAX_SECTION_BYTES) {
                        Ok(trailers) => self.trailers = Some(Box::new(trailers)),
                        Err(fault) => return Poll::Ready(Some(Err(self.break_off(fault)))),
                    }
                }
                Ok(None) => return Poll::Ready(self.trailers.take().map(|trailers| Ok(Frame::trailers(*trailers)))),
                Err(broken) => return Poll::Ready(Some(Err(broken))),
            }
        }
    }

    /// Puts small pieces together, as far as they are there. Each is a part of the packets that came with it, and would keep
    /// all of them for as long as somebody holds it; and a few large pieces are less work than many small ones.
    fn gather(&mut self, first: Bytes, cx: &mut Context<'_>) -> Bytes {
        if first.len() >= LARGE_PIECE_BYTES {
            return first;
        }
        let (mut length, mut more) = (first.len(), Vec::new());
        while length + LARGE_PIECE_BYTES <= GATHER_BYTES {
            match self.poll_event(cx) {
                Poll::Ready(Ok(Some(Event::Data(data)))) if data.len() < LARGE_PIECE_BYTES => {
                    length += data.len();
                    more.push(data);
                }
                Poll::Ready(Ok(Some(other))) => {
                    self.ahead = Some(other);
                    break;
                }
                // An end that is there is found again.
                Poll::Ready(Ok(None) | Err(_)) | Poll::Pending => break,
            }
        }
        let mut gathered = BytesMut::with_capacity(length);
        gathered.extend_from_slice(&first);
        more.iter().for_each(|data| gathered.extend_from_slice(data));
        gathered.freeze()
    }

    /// What can be found out without reading on, for when nobody wants more data at the moment.
    pub(crate) fn look(&mut self, cx: &mut Context<'_>) -> Sight {
        match &self.end {
            End::Open => {}
            End::Whole => return Sight::Over,
            End::Broken(broken) => return Sight::Broken(broken.clone()),
        }
        // A read of no bytes finds a reset, which makes quinn forget the data, and leaves data where it is.
        match self.poll_chunk(0, cx) {
            Poll::Ready(Err(error)) => Sight::Broken(self.lose(error)),
            Poll::Ready(Ok(Some(_))) => Sight::Data,
            // The end is there, and will be found by whoever reads.
            Poll::Ready(Ok(None)) => Sight::Over,
            Poll::Pending => Sight::Nothing,
        }
    }

    /// Ends the stream, or the connection, as the fault asks for.
    pub(crate) fn break_off(&mut self, fault: Fault) -> Broken {
        match fault {
            Fault::Connection(code, reason) => self.connection.fail(code, reason),
            Fault::Stream(code, _) => drop(self.stream.stop(code.var_int())),
            // There is an answer to it, and nothing else is wrong.
            Fault::TooLarge => drop(self.stream.stop(self.on_drop.var_int())),
        }
        self.end = End::Broken(Broken::Fault(fault));
        Broken::Fault(fault)
    }

    /// Tells the peer that the rest is not wanted, and why.
    pub(crate) fn stop(mut self, code: Code) {
        self.on_drop = code;
    }

    fn poll_chunk(&mut self, max: usize, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, quinn::ReadError>> {
        // The future holds nothing between polls, so that a new one each time is as good as one that is kept.
        pin!(self.stream.read_chunk(max, true)).poll(cx).map_ok(|chunk| chunk.map(|chunk| chunk.bytes))
    }

    fn lose(&mut self, error: quinn::ReadError) -> Broken {
        let broken = match error {
            quinn::ReadError::Reset(code) => Broken::Reset(code.into()),
            other => Broken::Lost(other.to_string()),
        };
        self.end = End::Broken(broken.clone());
        broken
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if matches!(self.end, End::Open) {
            let _ = self.stream.stop(self.on_drop.var_int());
        }
    }
}
