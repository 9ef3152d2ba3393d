//! The two halves of a connection that is one end of a tunnel.

use std::{
    cell::RefCell,
    collections::VecDeque,
    fmt,
    future::{Future, poll_fn},
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use http_body::Frame;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::oneshot,
};

use crate::{BodyError, h1::ServerStream, stall::Stall};

/// Read at a time.
const READ_BYTES: usize = 32 << 10;
/// Put together before it is written: pieces of a body are as small as packets.
const GATHER_BYTES: usize = 64 << 10;
/// The same, in pieces.
const GATHER_PIECES: usize = 32;

thread_local! {
    /// Where is read what may be nothing: a tunnel that is silent holds no buffer.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into());
}

/// The half that is read.
pub(crate) struct Reading {
    from: Source,
    /// Read before it was a tunnel.
    ahead: Bytes,
    ended: bool,
    /// Dropped with this half.
    _over: oneshot::Sender<()>,
}

enum Source {
    Tcp(ServerStream),
    Io(Box<dyn AsyncRead + Send + Unpin>),
}

impl Reading {
    pub(super) fn tcp(stream: ServerStream, ahead: Bytes) -> (Self, oneshot::Receiver<()>) {
        Self::of(Source::Tcp(stream), ahead)
    }

    pub(super) fn io(stream: Box<dyn AsyncRead + Send + Unpin>) -> (Self, oneshot::Receiver<()>) {
        Self::of(Source::Io(stream), Bytes::new())
    }

    fn of(from: Source, ahead: Bytes) -> (Self, oneshot::Receiver<()>) {
        let (over, told) = oneshot::channel();
        (Self { from, ahead, ended: false, _over: over }, told)
    }

    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if !self.ahead.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.ahead)))));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        let read = match &mut self.from {
            Source::Tcp(stream) => {
                let mut piece = Vec::new();
                stream.poll_read_into_new(cx, &mut piece, READ_BYTES).map_ok(|_| shrunk(piece))
            }
            Source::Io(stream) => SCRATCH.with_borrow_mut(|scratch| {
                let mut buf = ReadBuf::new(scratch);
                let read = ready!(Pin::new(stream).poll_read(cx, &mut buf));
                Poll::Ready(read.map(|()| Bytes::copy_from_slice(buf.filled())))
            }),
        };
        Poll::Ready(match ready!(read) {
            Ok(piece) if piece.is_empty() => {
                self.ended = true;
                None
            }
            Ok(piece) => Some(Ok(Frame::data(piece))),
            Err(error) => {
                self.ended = true;
                Some(Err(BodyError::Broken(error.to_string())))
            }
        })
    }
}

/// A short piece must not hold as much as a long one.
fn shrunk(piece: Vec<u8>) -> Bytes {
    if piece.len() < piece.capacity() / 2 { Bytes::copy_from_slice(&piece) } else { piece.into() }
}

impl fmt::Debug for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reading").finish_non_exhaustive()
    }
}

/// The reading half of a tunnel that is not open yet: nothing comes before it is, and nothing at all if it never is.
#[derive(Debug)]
pub(crate) enum Awaited {
    Promised(oneshot::Receiver<Reading>),
    Open(Box<Reading>),
    Never,
}

impl Awaited {
    /// For a tunnel that is asked for; to be fulfilled when it opens.
    pub(crate) fn promised() -> (oneshot::Sender<Reading>, Self) {
        let (promise, promised) = oneshot::channel();
        (promise, Self::Promised(promised))
    }

    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Self::Promised(promised) = self {
            *self = match ready!(Pin::new(promised).poll(cx)) {
                Ok(reading) => Self::Open(Box::new(reading)),
                Err(_) => Self::Never,
            };
        }
        match self {
            Self::Open(reading) => reading.poll_frame(cx),
            _ => Poll::Ready(None),
        }
    }
}

/// The half that is written. Dropped before its end, it breaks the connection off: what was written must not look like all.
#[derive(Debug)]
pub struct Writing {
    into: Sink,
    ended: bool,
    over: oneshot::Receiver<()>,
}

enum Sink {
    Tcp(ServerStream),
    Io(Box<dyn AsyncWrite + Send + Unpin>),
}

impl Writing {
    pub(super) fn tcp(stream: ServerStream, over: oneshot::Receiver<()>) -> Self {
        Self { into: Sink::Tcp(stream), ended: false, over }
    }

    pub(super) fn io(stream: Box<dyn AsyncWrite + Send + Unpin>, over: oneshot::Receiver<()>) -> Self {
        Self { into: Sink::Io(stream), ended: false, over }
    }

    /// Writes a body until it ends, or until its receiver takes no more, or nothing for so long. Then waits for the end of the other
    /// half: who hears no more may still speak. If the body breaks off, so does the connection.
    pub async fn carry<B>(mut self, mut body: B, patience: Duration)
    where
        B: http_body::Body<Data = Bytes, Error = BodyError> + Unpin,
    {
        match self.into.write(&mut body, Stall::of(patience)).await {
            Ok(()) => self.ended = true,
            Err(Unwritten::Body(error)) => return tracing::debug!(%error, "a tunnel broke off"),
            Err(Unwritten::Taker(error)) => {
                return tracing::debug!(%error, "an end of a tunnel takes no more");
            }
        }
        // What the body keeps is not needed any more.
        drop(body);
        let _ = (&mut self.over).await;
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if !self.ended {
            self.into.abort();
        }
    }
}

/// Why not all was written.
enum Unwritten {
    Body(BodyError),
    Taker(io::Error),
}

impl Sink {
    /// Writes all of a body, and then that there is no more.
    async fn write<B>(&mut self, body: &mut B, mut stall: Stall) -> Result<(), Unwritten>
    where
        B: http_body::Body<Data = Bytes, Error = BodyError> + Unpin,
    {
        let mut pieces = VecDeque::new();
        let (mut gathered, mut ended) = (0, false);
        poll_fn(|cx| {
            loop {
                while !ended && gathered < GATHER_BYTES && pieces.len() < GATHER_PIECES {
                    match Pin::new(&mut *body).poll_frame(cx) {
                        Poll::Ready(Some(Ok(frame))) => {
                            if let Some(data) = frame.into_data().ok().filter(|data| !data.is_empty()) {
                                gathered += data.len();
                                pieces.push_back(data);
                            }
                        }
                        Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(Unwritten::Body(error))),
                        Poll::Ready(None) => ended = true,
                        Poll::Pending => break,
                    }
                }
                if pieces.is_empty() {
                    if ended {
                        return self.poll_end(cx).map_err(Unwritten::Taker);
                    }
                    ready!(self.poll_flush(cx)).map_err(Unwritten::Taker)?;
                    return Poll::Pending;
                }
                let Poll::Ready(written) = self.poll_write(cx, &pieces) else {
                    ready!(stall.poll_stalled(cx));
                    return Poll::Ready(Err(Unwritten::Taker(io::ErrorKind::TimedOut.into())));
                };
                stall.moved();
                let written = written.map_err(Unwritten::Taker)?;
                gathered -= written;
                consume(&mut pieces, written);
            }
        })
        .await
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, pieces: &VecDeque<Bytes>) -> Poll<io::Result<usize>> {
        let mut bufs = [IoSlice::new(&[]); GATHER_PIECES];
        for (buf, piece) in bufs.iter_mut().zip(pieces) {
            *buf = IoSlice::new(piece);
        }
        let bufs = &bufs[..pieces.len().min(GATHER_PIECES)];
        let written = match self {
            Self::Tcp(stream) => {
                let written = ready!(stream.poll_write_some(cx, bufs));
                if stream.is_deaf() { Err(io::ErrorKind::BrokenPipe.into()) } else { written }
            }
            Self::Io(stream) => ready!(Pin::new(stream).poll_write_vectored(cx, bufs)),
        };
        Poll::Ready(match written {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            written => written,
        })
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(_) => Poll::Ready(Ok(())),
            Self::Io(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Io(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    /// Breaks off. A stream that is no connection by itself is dropped without its end, which says the same.
    fn abort(&self) {
        if let Self::Tcp(stream) = self {
            stream.abort();
        }
    }
}

fn consume(pieces: &mut VecDeque<Bytes>, mut written: usize) {
    while let Some(first) = pieces.front_mut() {
        if written < first.len() {
            return first.advance(written);
        }
        written -= first.len();
        pieces.pop_front();
    }
}

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sink")
    }
}
