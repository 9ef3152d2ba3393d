//! A TCP connection to a client: it ends when the client takes nothing for too long, and it ends gently.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use socket2::TcpKeepalive;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
};

use crate::stall::{Stall, TUNNEL_STALL};

/// Bytes that wait in the kernel and are not sent yet, at most: what is there cannot be given back.
const NOT_SENT_BYTES: u32 = 64 << 10;
/// How long a peer that says nothing is left alone, how often it is asked then, and how often in vain.
const QUIET: Duration = Duration::from_secs(30);
const ASKED_EVERY: Duration = Duration::from_secs(10);
const ASKED: u32 = 3;
/// How long a client may acknowledge nothing of what was sent, or have no room for it.
const UNHEARD: Duration = Duration::from_secs(60);
/// How long a client is listened to that has its answer and still sends.
const LINGER: Duration = Duration::from_secs(5);
/// Connections that are listened to so at a time; others are closed at once.
const MAX_LINGERING: usize = 512;

static LINGERING: AtomicUsize = AtomicUsize::new(0);

/// Tells a connection, from above whatever is on it, how it is to be treated. Cheap to clone; every clone means the same one.
#[derive(Debug, Clone, Default)]
pub struct Control(Arc<Treatment>);

#[derive(Debug, Default)]
struct Treatment {
    severed: AtomicBool,
    patient: AtomicBool,
}

impl Control {
    /// What was written is not all: dropped, the connection is reset, and not ended.
    pub(crate) fn sever(&self) {
        self.0.severed.store(true, Relaxed);
    }

    /// What is on it is no HTTP: its client may pause as long as it may be silent.
    pub(crate) fn be_patient(&self) {
        self.0.patient.store(true, Relaxed);
    }
}

/// A client's connection.
#[derive(Debug)]
pub struct Socket {
    stream: Option<TcpStream>,
    control: Control,
    stall: Stall,
    is_patient: bool,
    /// The client sends no more.
    read_all: bool,
    /// There may be something on its way to the client.
    wrote: bool,
}

impl Socket {
    /// Takes a connection that was accepted.
    pub fn new(stream: TcpStream) -> Self {
        let _ = stream.set_nodelay(true);
        let socket = socket2::SockRef::from(&stream);
        let _ = socket.set_tcp_notsent_lowat(NOT_SENT_BYTES);
        let _ = socket.set_tcp_user_timeout(Some(UNHEARD));
        notice_when_gone(&stream);
        let (stall, control) = (Stall::default(), Control::default());
        Self { stream: Some(stream), control, stall, is_patient: false, read_all: false, wrote: false }
    }

    /// The handle by which it is told how to end.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// The connection by itself, without the care of [`Socket`] for how it ends, and for how long its client takes nothing.
    pub fn into_tcp(mut self) -> Option<TcpStream> {
        let stream = self.stream.take()?;
        let _ = socket2::SockRef::from(&stream).set_tcp_user_timeout(None);
        Some(stream)
    }

    /// Does as it was told, if it was told so since.
    fn heed(&mut self) {
        if self.control.0.patient.load(Relaxed) && !std::mem::replace(&mut self.is_patient, true) {
            self.stall = Stall::of(TUNNEL_STALL);
            if let Some(stream) = &self.stream {
                let _ = socket2::SockRef::from(stream).set_tcp_user_timeout(None);
            }
        }
    }

    fn stream(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        self.stream.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn written(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.heed();
        match written {
            Poll::Ready(written) => {
                self.stall.moved();
                self.wrote |= written.is_ok();
                Poll::Ready(written)
            }
            Poll::Pending => self.stall.poll_stalled(cx).map(|()| {
                // Nothing of what waits there will arrive, and what did is not all.
                self.read_all = true;
                self.control.sever();
                Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing"))
            }),
        }
    }
}

/// Has the kernel end a connection within about a minute whose peer has vanished without a word while nothing is to be sent: a
/// call that waits would keep its place for as long as it may be silent.
pub fn notice_when_gone(stream: &TcpStream) {
    let asking = TcpKeepalive::new().with_time(QUIET).with_interval(ASKED_EVERY).with_retries(ASKED);
    let _ = socket2::SockRef::from(stream).set_tcp_keepalive(&asking);
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let room = buf.remaining();
        let read = self.stream()?.poll_read(cx, buf);
        if let Poll::Ready(read) = &read {
            self.read_all |= read.is_err() || room > 0 && buf.filled().len() == before;
        }
        read
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = self.stream()?.poll_write(cx, buf);
        self.written(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = self.stream()?.poll_write_vectored(cx, bufs);
        self.written(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_shutdown(cx)
    }
}

/// Closed with bytes that were not read, a connection is reset, and the answer is lost that the client has not read yet. So
/// it is listened to for a while (RFC 9112 §9.6).
impl Drop for Socket {
    fn drop(&mut self) {
        if self.control.0.severed.load(Relaxed) {
            // Reset, then, and not ended.
            if let Some(stream) = &self.stream {
                let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
            }
            return;
        }
        let Some(mut stream) = self.stream.take().filter(|_| self.wrote && !self.read_all) else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if LINGERING.fetch_add(1, Relaxed) >= MAX_LINGERING {
            LINGERING.fetch_sub(1, Relaxed);
            return;
        }
        runtime.spawn(async move {
            let listening = async {
                let _ = stream.shutdown().await;
                let mut unwanted = vec![0; 16 << 10];
                while matches!(stream.read(&mut unwanted).await, Ok(read) if read > 0) {}
            };
            let _ = tokio::time::timeout(LINGER, listening).await;
            LINGERING.fetch_sub(1, Relaxed);
        });
    }
}
