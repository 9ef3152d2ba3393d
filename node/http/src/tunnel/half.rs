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

use crate::{Body, BodyError, h1::ServerStream, stall::Stall, tcp::Control};

/// Read at a time.
const READ_BYTES: usize = 32 << 10;
/// Put together before it is written: pieces of a body are as small as packets.
const GATHER_BYTES: usize = 64 << 10;
/// So much is gathered before others get their turn: often enough for a sender to hear of new room in a window several times as
/// large while it still has some.
const YIELD_BYTES: usize = 32 << 10;
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
    /// Told when this half has ended; dropped without a word if it is given up before.
    over: Option<oneshot::Sender<()>>,
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
        (Self { from, ahead, ended: false, over: Some(over) }, told)
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
                if let Some(over) = self.over.take() {
                    let _ = over.send(());
                }
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
    /// When the other half is over: with an error if it was given up.
    other: oneshot::Receiver<()>,
}

enum Sink {
    Tcp(ServerStream),
    Io(Box<dyn AsyncWrite + Send + Unpin>, Control),
}

impl Writing {
    pub(super) fn tcp(stream: ServerStream, other: oneshot::Receiver<()>) -> Self {
        Self { into: Sink::Tcp(stream), ended: false, other }
    }

    pub(super) fn io(
        stream: Box<dyn AsyncWrite + Send + Unpin>,
        control: Control,
        other: oneshot::Receiver<()>,
    ) -> Self {
        Self { into: Sink::Io(stream, control), ended: false, other }
    }

    /// Writes a body until it ends, or until its receiver takes no more, or nothing for so long. Then waits for the end of the other
    /// half: who hears no more may still speak. If the body breaks off, so does the connection.
    ///
    /// For a client's end, whose other half the server may give up while it still answers.
    pub async fn carry<B>(mut self, body: B, patience: Duration)
    where
        B: http_body::Body<Data = Bytes, Error = BodyError> + Unpin,
    {
        let broken = self.into.broken();
        let mut transfer = Transfer::new(body, patience);
        let written = tokio::select! {
            biased;
            written = poll_fn(|cx| transfer.poll(&mut self.into, cx)) => written,
            // Nothing may come that could be written to it, and nothing go that could be read from it.
            () = broken => Err(Unwritten::Taker(io::ErrorKind::ConnectionReset.into())),
        };
        // What the body keeps is not needed any more.
        drop(transfer);
        if self.has_written(written) {
            let _ = (&mut self.other).await;
        }
    }

    /// The same for a server's end: if the other half is given up, nobody is there any more, and the connection breaks off, whether
    /// or not the server takes what is there for it. Once the other half has ended, this one may be silent for so long, too.
    pub async fn carry_to_server(mut self, body: Body, patience: Duration) {
        let mut transfer = Transfer::new(body, patience);
        let written = tokio::select! {
            biased;
            written = poll_fn(|cx| transfer.poll(&mut self.into, cx)) => Some(written),
            over = &mut self.other => match over {
                Ok(()) => None,
                Err(_) => return tracing::debug!("a tunnel was given up"),
            },
        };
        match written {
            Some(written) => {
                if self.has_written(written) {
                    let _ = (&mut self.other).await;
                }
            }
            None => {
                // The limit of time for silence went with the other half.
                let body = std::mem::replace(&mut transfer.body, Body::empty());
                transfer.body = body.with_pace(Some(patience), None, None);
                let written = poll_fn(|cx| transfer.poll(&mut self.into, cx)).await;
                self.has_written(written);
            }
        }
    }

    /// Whether all was written.
    fn has_written(&mut self, written: Result<(), Unwritten>) -> bool {
        match written {
            Ok(()) => self.ended = true,
            Err(Unwritten::Body(error)) => tracing::debug!(%error, "a tunnel broke off"),
            Err(Unwritten::Taker(error)) => tracing::debug!(%error, "an end of a tunnel takes no more"),
        }
        self.ended
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

/// A body on its way to a connection.
struct Transfer<B> {
    body: B,
    /// Read, and not written yet.
    pieces: VecDeque<Bytes>,
    gathered: usize,
    ended: bool,
    /// Others have had their turn since so much was gathered.
    has_yielded: bool,
    stall: Stall,
}

impl<B> Transfer<B>
where
    B: http_body::Body<Data = Bytes, Error = BodyError> + Unpin,
{
    fn new(body: B, patience: Duration) -> Self {
        Self {
            body,
            pieces: VecDeque::new(),
            gathered: 0,
            ended: false,
            has_yielded: false,
            stall: Stall::of(patience),
        }
    }

    /// Writes all of it, and then that there is no more.
    fn poll(&mut self, into: &mut Sink, cx: &mut Context<'_>) -> Poll<Result<(), Unwritten>> {
        loop {
            while !self.ended && self.gathered < GATHER_BYTES && self.pieces.len() < GATHER_PIECES {
                match Pin::new(&mut self.body).poll_frame(cx) {
                    Poll::Ready(Some(Ok(frame))) => {
                        if let Some(data) = frame.into_data().ok().filter(|data| !data.is_empty()) {
                            self.gathered += data.len();
                            self.pieces.push_back(data);
                        }
                    }
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(Unwritten::Body(error))),
                    Poll::Ready(None) => self.ended = true,
                    Poll::Pending => break,
                }
            }
            // What was read makes room at its sender, who is to be told before this task writes, and not after it.
            if self.gathered >= YIELD_BYTES && !std::mem::replace(&mut self.has_yielded, true) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let is_out = self.pieces.is_empty();
            let written = match (is_out, self.ended) {
                (true, true) => into.poll_end(cx).map_ok(|()| 0),
                (true, false) => into.poll_flush(cx).map_ok(|()| 0),
                (false, _) => into.poll_write(cx, &self.pieces),
            };
            let Poll::Ready(written) = written else {
                ready!(self.stall.poll_stalled(cx));
                return Poll::Ready(Err(Unwritten::Taker(io::ErrorKind::TimedOut.into())));
            };
            self.stall.moved();
            let written = written.map_err(Unwritten::Taker)?;
            if is_out {
                // More comes with the body, which has been asked for it.
                return if self.ended { Poll::Ready(Ok(())) } else { Poll::Pending };
            }
            self.has_yielded = false;
            self.gathered -= written;
            consume(&mut self.pieces, written);
        }
    }
}

impl Sink {
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
            Self::Io(stream, _) => ready!(Pin::new(stream).poll_write_vectored(cx, bufs)),
        };
        Poll::Ready(match written {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            written => written,
        })
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(_) => Poll::Ready(Ok(())),
            Self::Io(stream, _) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Io(stream, _) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    /// Resolves when the connection is broken, as far as that can be seen without using it.
    fn broken(&self) -> impl Future<Output = ()> + use<> {
        let stream = match self {
            Self::Tcp(stream) => Some(stream.clone()),
            Self::Io(..) => None,
        };
        async move {
            match stream {
                Some(stream) => stream.broken().await,
                None => std::future::pending().await,
            }
        }
    }

    /// Breaks off: with a reset, where there is a connection of its own that can be reset.
    fn abort(&self) {
        match self {
            Self::Tcp(stream) => stream.abort(),
            Self::Io(_, control) => control.sever(),
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
