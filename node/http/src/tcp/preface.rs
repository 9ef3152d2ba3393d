//! Which protocol a client without TLS speaks: HTTP/2 begins with words that no other request can (RFC 9113 §3.4).

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A stream of which the beginning was read already, and comes again.
pub(super) struct Rewound<S> {
    read: Bytes,
    stream: S,
}

/// Reads as much as shows the protocol: the stream, and whether it is HTTP/2. `None` if nothing comes: no first byte for
/// `idle`, or no more for `timeout` after it.
pub(super) async fn look<S: AsyncRead + Unpin>(
    mut stream: S,
    idle: Duration,
    timeout: Duration,
) -> Option<(Rewound<S>, bool)> {
    let mut bytes = [0; PREFACE.len()];
    let mut read = 0;
    let mut until = tokio::time::Instant::now() + idle;
    while read < PREFACE.len() && bytes[..read] == PREFACE[..read] {
        let more = tokio::time::timeout_at(until, stream.read(&mut bytes[read..])).await.ok()?.ok()?;
        if more == 0 {
            return None;
        }
        if read == 0 {
            until = tokio::time::Instant::now() + timeout;
        }
        read += more;
    }
    let is_http2 = bytes == *PREFACE;
    Some((Rewound { read: Bytes::copy_from_slice(&bytes[..read]), stream }, is_http2))
}

impl<S: AsyncRead + Unpin> AsyncRead for Rewound<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.read.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let length = self.read.len().min(buf.remaining());
        buf.put_slice(&self.read[..length]);
        self.read.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rewound<S> {
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
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn the_first_bytes_tell_and_come_again() {
        for (sent, is_http2) in [
            (&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nrest"[..], true),
            (b"PRI * HTTP/1.1\r\nHost: a\r\n\r\n", false),
            (b"PUT / HTTP/1.1\r\n\r\n", false),
            (b"G", false),
        ] {
            let (mut client, server) = tokio::io::duplex(8);
            let writing = tokio::spawn(async move {
                client.write_all(sent).await.unwrap();
                client.shutdown().await.unwrap();
            });
            let limit = Duration::from_secs(5);
            let (mut stream, found) = look(server, limit, limit).await.expect("something came");
            assert_eq!(found, is_http2, "{}", String::from_utf8_lossy(sent));
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await.unwrap();
            writing.await.unwrap();
            assert_eq!(all, sent);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends() {
        let (mut client, server) = tokio::io::duplex(8);
        let (idle, timeout) = (Duration::from_secs(60), Duration::from_secs(10));
        let (_silent, other) = tokio::io::duplex(8);
        assert!(look(other, idle, timeout).await.is_none());
        client.write_all(b"PRI").await.unwrap();
        let begun = tokio::time::Instant::now();
        assert!(look(server, idle, timeout).await.is_none());
        assert!(begun.elapsed() < timeout * 2);
    }
}
