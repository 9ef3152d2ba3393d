//! A byte stream that requests come on: it ends when none comes, or when one comes too slowly.

use std::{
    future::Future,
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep},
};

use super::HEAD_TIMEOUT;

/// What an HTTP/1.1 connection is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Waiting for a request, since then.
    Idle(Instant),
    /// A request's head is coming, since then.
    Head(Instant),
    /// A request is answered.
    Busy,
}

/// Tells the stream what the requests on it are about. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Progress(Arc<Mutex<Phase>>);

impl Progress {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Phase::Idle(Instant::now()))))
    }

    /// A request is here, and busy until what is returned is dropped.
    pub(super) fn busy(&self) -> Busy {
        *self.lock() = Phase::Busy;
        Busy(self.clone())
    }

    /// Whether a request is answered.
    pub(super) fn is_busy(&self) -> bool {
        *self.lock() == Phase::Busy
    }

    fn lock(&self) -> MutexGuard<'_, Phase> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A request that is answered.
#[derive(Debug)]
pub(super) struct Busy(Progress);

impl Drop for Busy {
    fn drop(&mut self) {
        *self.0.lock() = Phase::Idle(Instant::now());
    }
}

/// A stream with its limits of time for what comes in.
pub(super) struct Watched<S> {
    stream: S,
    progress: Progress,
    idle: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    lines: Lines,
}

/// The lines of a request's head, as they come. They end with CRLF: who ends one at LF alone sees other fields than who does not, such
/// as a proxy in front (RFC 9112 §2.2, §11.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lines {
    /// Nothing but empty lines so far.
    Before,
    /// In a head, behind that byte, and so many CRLF in a row.
    In { last: u8, empty: u8 },
    /// Behind it: what comes is a body, or the next head.
    Behind,
}

impl Lines {
    /// Makes an LF that ends no line what no head may have, so that its reader refuses it.
    fn mark(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            *self = match *self {
                Self::Behind => return,
                Self::Before if matches!(byte, b'\r' | b'\n') => Self::Before,
                Self::In { last: b'\r', empty } if *byte == b'\n' => match empty {
                    0 => Self::In { last: b'\n', empty: 1 },
                    _ => Self::Behind,
                },
                Self::In { empty, .. } if *byte == b'\r' => Self::In { last: b'\r', empty },
                Self::Before | Self::In { .. } => {
                    if *byte == b'\n' {
                        *byte = 0;
                    }
                    Self::In { last: *byte, empty: 0 }
                }
            };
        }
    }
}

impl<S> Watched<S> {
    pub(super) fn new(stream: S, progress: Progress, idle: Duration) -> Self {
        Self { stream, progress, idle, timer: None, lines: Lines::Before }
    }

    /// Ready when what is waited for should have come.
    fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let phase = *self.progress.lock();
        let due = match phase {
            Phase::Idle(since) => since + self.idle,
            Phase::Head(since) => since + HEAD_TIMEOUT,
            Phase::Busy => return Poll::Pending,
        };
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
        if timer.deadline() != due {
            timer.as_mut().reset(due);
        }
        timer.as_mut().poll(cx)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        match Pin::new(&mut self.stream).poll_read(cx, buf) {
            Poll::Ready(read) => {
                let Self { progress, lines, .. } = &mut *self;
                let mut phase = progress.lock();
                if matches!(*phase, Phase::Idle(_)) && *lines == Lines::Behind {
                    *lines = Lines::Before;
                }
                if *phase != Phase::Busy {
                    lines.mark(&mut buf.filled_mut()[before..]);
                }
                if let Phase::Idle(_) = *phase
                    // Empty lines before a request are none.
                    && buf.filled()[before..].iter().any(|byte| !matches!(byte, b'\r' | b'\n'))
                {
                    *phase = Phase::Head(Instant::now());
                }
                drop(phase);
                // A head of a byte a second is never waited for, because there is always something to read.
                match self.poll_late(cx) {
                    Poll::Ready(()) if matches!(*self.progress.lock(), Phase::Head(_)) => too_late(),
                    _ => Poll::Ready(read),
                }
            }
            Poll::Pending => match self.poll_late(cx) {
                Poll::Ready(()) => too_late(),
                Poll::Pending => Poll::Pending,
            },
        }
    }
}

fn too_late() -> Poll<io::Result<()>> {
    Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "no request in time")))
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is left of a head, however it is cut.
    fn marked(text: &str) -> String {
        let mut whole = text.as_bytes().to_vec();
        let mut lines = Lines::Before;
        lines.mark(&mut whole);
        let mut pieces = text.as_bytes().to_vec();
        let mut lines = Lines::Before;
        for piece in pieces.chunks_mut(1) {
            lines.mark(piece);
        }
        assert_eq!(whole, pieces);
        String::from_utf8(whole).unwrap()
    }

    #[test]
    fn a_line_ends_with_both_or_is_refused() {
        for good in [
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "\r\n\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\n\r\nbody\nwith\nlines",
        ] {
            assert_eq!(marked(good), good);
        }
        for (bad, left) in [
            ("GET / HTTP/1.1\nHost: a\n\n", "GET / HTTP/1.1\0Host: a\0\0"),
            ("GET / HTTP/1.1\r\nA: b\nHost: a\r\n\r\nx\n", "GET / HTTP/1.1\r\nA: b\0Host: a\r\n\r\nx\n"),
            ("GET / HTTP/1.1\r\nHost: a\r\n\n", "GET / HTTP/1.1\r\nHost: a\r\n\0"),
        ] {
            assert_eq!(marked(bad), left);
        }
    }
}
