//! A TCP connection to a server.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

use bytes::BufMut;
use rustix::net::{RecvFlags, Shutdown};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
};

use crate::tcp::notice_when_gone;

/// A connection on which an answer is read although writing has failed. Clones are the same connection, for one that reads and
/// one that writes; it closes with the last of them, or when it is told to.
#[derive(Debug, Clone)]
pub struct ServerStream(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    stream: TcpStream,
    /// The server takes no more of the request. It may have answered before it stopped reading, and that answer counts
    /// (RFC 9112 §9.5): what is still written goes nowhere, and what is read tells how it ended.
    deaf: AtomicBool,
    /// We have closed it.
    closed: AtomicBool,
}

impl ServerStream {
    /// Takes a connection that was made.
    pub fn new(stream: TcpStream) -> Self {
        let _ = stream.set_nodelay(true);
        notice_when_gone(&stream);
        Self(Arc::new(Inner { stream, deaf: AtomicBool::new(false), closed: AtomicBool::new(false) }))
    }

    /// Whether the server has neither closed the connection nor said anything unasked.
    pub(super) fn is_quiet(&self) -> bool {
        let mut byte = [0u8];
        let found = rustix::net::recv(&self.0.stream, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT);
        matches!(found, Err(rustix::io::Errno::WOULDBLOCK))
    }

    pub(crate) fn is_deaf(&self) -> bool {
        self.0.deaf.load(Relaxed)
    }

    /// Closes it for everybody.
    pub(super) fn close(&self) {
        self.0.closed.store(true, Relaxed);
        let _ = rustix::net::shutdown(&self.0.stream, Shutdown::Both);
    }

    /// Resolves when the connection is broken, whether or not anybody reads or writes. Cancel safe.
    pub(crate) async fn broken(&self) {
        loop {
            match self.0.stream.ready(Interest::ERROR).await {
                Ok(ready) if !ready.is_error() => {}
                _ => return,
            }
        }
    }

    /// Breaks it off for everybody: the server sees a reset, and no end that could be taken for one.
    pub(crate) fn abort(&self) {
        self.0.closed.store(true, Relaxed);
        // On Linux, a connection that is dissolved is reset.
        if rustix::net::connect_unspec(&self.0.stream).is_err() {
            let _ = rustix::net::shutdown(&self.0.stream, Shutdown::Both);
        }
    }

    /// The same as [`Self::poll_read_into`], into a piece of memory that is reserved when there is something to be read.
    pub(crate) fn poll_read_into_new(
        &self,
        cx: &mut Context<'_>,
        into: &mut Vec<u8>,
        room: usize,
    ) -> Poll<io::Result<usize>> {
        ready!(self.0.stream.poll_read_ready(cx))?;
        into.reserve_exact(room);
        self.poll_read_into(cx, into)
    }

    /// Reads what is there, at most as much as there is room for in what `into` has reserved; nothing at the end.
    pub(super) fn poll_read_into(&self, cx: &mut Context<'_>, into: &mut Vec<u8>) -> Poll<io::Result<usize>> {
        let stream = &self.0.stream;
        let room = into.capacity() - into.len();
        loop {
            ready!(stream.poll_read_ready(cx))?;
            let mut read = 0;
            // When it was less than there is room for, there is no more, and who reads on need not ask the kernel to learn
            // that. Told in one go with the read, so that what comes after it is not missed.
            let tried = stream.try_io(Interest::READABLE, || {
                read = rustix::io::read(stream, rustix::buffer::spare_capacity(into))?;
                if 0 < read && read < room { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
            });
            match tried {
                Err(error) if read == 0 && error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if read == 0 => return Poll::Ready(Err(error)),
                // Closed by ourselves, it must not look as if the server had ended well.
                _ if read == 0 && self.0.closed.load(Relaxed) => {
                    return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
                }
                _ => return Poll::Ready(Ok(read)),
            }
        }
    }

    /// Writes some; all of it goes nowhere once the server is deaf.
    pub(crate) fn poll_write_some(&self, cx: &mut Context<'_>, bufs: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let length = bufs.iter().map(|buf| buf.len()).sum();
        while !self.is_deaf() {
            let stream = &self.0.stream;
            let written = match ready!(stream.poll_write_ready(cx)) {
                Ok(()) => stream.try_write_vectored(bufs),
                Err(error) => Err(error),
            };
            match written {
                Ok(written) => return Poll::Ready(Ok(written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.0.deaf.store(true, Relaxed),
            }
        }
        Poll::Ready(Ok(length))
    }
}

/// Read at a time for a protocol that has its own buffers: so much of an answer waits that nobody takes, in each of a few
/// places.
const MAX_READ_BYTES: usize = 16 << 10;

impl AsyncRead for ServerStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let room = buf.remaining().min(MAX_READ_BYTES);
        loop {
            ready!(self.0.stream.poll_read_ready(cx))?;
            match self.0.stream.try_read_buf(&mut buf.limit(room)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map(drop)),
            }
        }
    }
}

impl AsyncWrite for ServerStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_some(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_some(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let _ = rustix::net::shutdown(&self.0.stream, Shutdown::Write);
        Poll::Ready(Ok(()))
    }
}
