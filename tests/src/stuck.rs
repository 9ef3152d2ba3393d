//! Clients that ask for more than they read.

use std::net::SocketAddr;

use anyhow::Result;
use bytes::Bytes;
use http::Request;
use hyper_util::rt::{TokioExecutor, TokioIo};
use starling_chaos::{Client, Door};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};

use crate::raw_h3;

/// Requests of one connection whose answers nobody reads. Everything closes when it is dropped.
pub struct Stuck {
    _kept: Kept,
}

/// Connections and streams: whatever must not be dropped.
type Kept = Box<dyn Send>;

/// Asks for `path` so often over one connection, and reads no answer. Over HTTP/1.1 there is one request a connection.
pub async fn readers(
    client: &Client,
    door: Door,
    addr: SocketAddr,
    host: &str,
    path: &str,
    requests: usize,
) -> Result<Stuck> {
    let kept = match door {
        Door::PlainHttp1 => asleep(small(addr).await?, host, path).await?,
        Door::PlainHttp2 => unread_http2(TcpStream::connect(addr).await?, "http", host, path, requests).await?,
        Door::Http1 => asleep(client.connect_tls(addr, host, b"http/1.1").await?, host, path).await?,
        Door::Http2 => {
            unread_http2(client.connect_tls(addr, host, b"h2").await?, "https", host, path, requests).await?
        }
        Door::Http3 => {
            let (connection, endpoint) = client.connect_quic(addr, host).await?;
            let head = raw_h3::head(&[(":method", "GET"), (":scheme", "https"), (":authority", host), (":path", path)]);
            let mut streams = Vec::new();
            for _ in 0..requests {
                let (mut send, receive) = connection.open_bi().await?;
                send.write_all(&head).await?;
                send.finish()?;
                streams.push((send, receive));
            }
            Box::new((streams, connection, endpoint))
        }
    };
    Ok(Stuck { _kept: kept })
}

/// A connection with little room for what is not read.
async fn small(addr: SocketAddr) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(4096)?;
    Ok(socket.connect(addr).await?)
}

async fn asleep(mut stream: impl AsyncWrite + Unpin + Send + 'static, host: &str, path: &str) -> Result<Kept> {
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes()).await?;
    stream.flush().await?;
    Ok(Box::new(stream))
}

async fn unread_http2(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    scheme: &str,
    host: &str,
    path: &str,
    requests: usize,
) -> Result<Kept> {
    let (mut sender, connection) =
        h2::client::Builder::new().initial_window_size(0).handshake::<_, Bytes>(stream).await?;
    let mut driving = tokio::task::JoinSet::new();
    driving.spawn(async move { drop(connection.await) });
    let mut answers = Vec::new();
    for _ in 0..requests {
        sender = sender.ready().await?;
        let request = Request::builder().uri(format!("{scheme}://{host}{path}")).body(())?;
        answers.push(sender.send_request(request, true)?.0);
    }
    Ok(Box::new((answers, driving)))
}

/// Sends a request whose body comes as slowly as `body` gives it: the status of the answer.
pub async fn trickle(
    client: &Client,
    door: Door,
    addr: SocketAddr,
    request: Request<tokio::sync::mpsc::Receiver<Bytes>>,
) -> Result<u16> {
    let host = request.uri().host().unwrap_or_default().to_string();
    let request = request.map(Trickle);
    let answer = match door {
        Door::PlainHttp1 => {
            let stream = TokioIo::new(TcpStream::connect(addr).await?);
            let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await?;
            tokio::spawn(connection);
            let mut request = request;
            request.headers_mut().insert(http::header::HOST, host.parse()?);
            sender.send_request(request).await?
        }
        _ => {
            let stream: Box<dyn Stream> = match door {
                Door::PlainHttp2 => Box::new(TcpStream::connect(addr).await?),
                _ => Box::new(client.connect_tls(addr, &host, b"h2").await?),
            };
            let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
            let (mut sender, connection) = handshake.await?;
            tokio::spawn(connection);
            sender.send_request(request).await?
        }
    };
    Ok(answer.status().as_u16())
}

struct Trickle(tokio::sync::mpsc::Receiver<Bytes>);

impl http_body::Body for Trickle {
    type Data = Bytes;
    type Error = std::convert::Infallible;
    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, Self::Error>>> {
        self.0.poll_recv(cx).map(|bytes| bytes.map(|bytes| Ok(http_body::Frame::data(bytes))))
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}
