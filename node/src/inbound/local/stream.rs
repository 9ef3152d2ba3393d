//! A TCP connection to the service.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::BufMut;
use rustix::net::RecvFlags;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
};

/// Read at a time: so much of an answer waits that nobody takes, in each of a few places.
const MAX_READ_BYTES: usize = 16 << 10;

/// A connection that can be looked at from outside, and on which an answer is read although writing has failed.
pub(super) struct ServiceStream {
    stream: Arc<TcpStream>,
    /// The service takes no more of the request. It may have answered before it stopped reading, and that answer counts
    /// (RFC 9112 §9.5): what is still written goes nowhere, and what is read tells how it ended.
    deaf: bool,
}

/// A look at a connection that somebody else reads and writes.
#[derive(Clone)]
pub(super) struct Glance(Arc<TcpStream>);

impl Glance {
    /// Whether the service has neither closed the connection nor said anything unasked.
    pub(super) fn is_quiet(&self) -> bool {
        let mut byte = [0u8];
        let found = rustix::net::recv(&*self.0, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT);
        matches!(found, Err(rustix::io::Errno::WOULDBLOCK))
    }
}

impl ServiceStream {
    pub(super) fn new(stream: TcpStream) -> Self {
        starling_http::tcp::notice_when_gone(&stream);
        Self { stream: Arc::new(stream), deaf: false }
    }

    pub(super) fn glance(&self) -> Glance {
        Glance(self.stream.clone())
    }

    fn poll_try_write(
        &mut self,
        cx: &mut Context<'_>,
        length: usize,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        while !self.deaf {
            let written = match ready!(self.stream.poll_write_ready(cx)) {
                Ok(()) => write(&self.stream),
                Err(error) => Err(error),
            };
            match written {
                Ok(written) => return Poll::Ready(Ok(written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.deaf = true,
            }
        }
        Poll::Ready(Ok(length))
    }
}

impl AsyncRead for ServiceStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            let room = buf.remaining().min(MAX_READ_BYTES);
            match self.stream.try_read_buf(&mut buf.limit(room)) {
                Ok(read) => {
                    if 0 < read && read < room {
                        // There is no more, and who reads on need not ask the kernel to learn that. What comes just now is
                        // not missed, because this thread is the one that looks for it.
                        let _ =
                            self.stream.try_io(Interest::READABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for ServiceStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_try_write(cx, buf.len(), |stream| stream.try_write(buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length = bufs.iter().map(|buf| buf.len()).sum();
        self.poll_try_write(cx, length, |stream| stream.try_write_vectored(bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let _ = rustix::net::shutdown(&*self.stream, rustix::net::Shutdown::Write);
        Poll::Ready(Ok(()))
    }
}

impl Drop for ServiceStream {
    fn drop(&mut self) {
        // Whoever still holds a glance must not keep the connection open.
        let _ = rustix::net::shutdown(&*self.stream, rustix::net::Shutdown::Both);
    }
}
