//! The service behind the nodes of a run: answers what the load asks, keeps a ledger of what it has done, and misbehaves when
//! told to on its stdin.
//!
//! `GET /call/N` and `POST /call/N` answer `N`; `GET /bytes/N/SIZE` sends SIZE bytes that follow from N; `GET /drip/N/SIZE` the
//! same over some seconds and without saying how much; `POST /bytes/N` answers length and digest of what came; `POST /talk/N` is a
//! gRPC call that says again what it hears; `GET /echo/N` is a WebSocket that does so; `GET /open` lists the calls that are open, each with its age in milliseconds. Every
//! answer names its node.

mod raw;

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fs::File,
    io::Write,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use sha2::{Digest, Sha256};
use tokio::{
    io::AsyncWriteExt,
    net::TcpListener,
    sync::{mpsc, watch},
};

pub(crate) use self::raw::MESSAGE_BYTES;

/// Who answered.
pub(crate) const SERVED_BY: &str = "x-served-by";
/// Content of a gRPC call.
pub(crate) const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
/// How a gRPC call ended; 0 is well.
pub(crate) const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// Why it did not end well.
pub(crate) const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const CHUNK_BYTES: usize = 16 << 10;
/// Pause between the chunks of a drip.
const DRIP_PAUSE: Duration = Duration::from_millis(250);
const SLOW: Duration = Duration::from_millis(200);
/// One in so many calls fails when stumbling.
const STUMBLE_ONE_IN: u64 = 25;

/// What the service does with calls, as it is told by a word a line on stdin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    Good,
    Hang,
    Stumble,
    CloseIdle,
    AnswerEarly,
    Slow,
    Work(Duration),
}

impl Manner {
    fn named(word: &str) -> Option<Self> {
        Some(match word {
            "good" => Self::Good,
            "hang" => Self::Hang,
            "stumble" => Self::Stumble,
            "close-idle" => Self::CloseIdle,
            "answer-early" => Self::AnswerEarly,
            "slow" => Self::Slow,
            _ => Self::Work(Duration::from_millis(word.strip_prefix("work ")?.parse().ok()?)),
        })
    }
}

struct Service {
    name: HeaderValue,
    ledger: Mutex<File>,
    manner: watch::Receiver<Manner>,
    calls: AtomicU64,
    /// Calls that have begun and whose answer has not, by number; one whose client has gone is not among them.
    open: Mutex<BTreeMap<u64, (Instant, String)>>,
}

/// A call that is open.
struct Open(Arc<Service>, u64);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open().remove(&self.1);
    }
}

/// Serves until the process is ended; at `raw` what is no HTTP. Says `ready` on stdout when it listens, and repeats each manner that it takes on.
///
/// # Errors
/// If it cannot listen, or write its ledger.
pub async fn run(listen: SocketAddr, raw: Option<SocketAddr>, name: &str, ledger: &Path) -> Result<()> {
    let file = File::options().create(true).append(true).open(ledger);
    let file = file.with_context(|| format!("cannot write {}", ledger.display()))?;
    let listener = TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen}"))?;
    let (told, manner) = watch::channel(Manner::Good);
    let (name, ledger) = (HeaderValue::from_str(name)?, Mutex::new(file));
    let service = Arc::new(Service { name, ledger, manner, calls: AtomicU64::new(0), open: Mutex::default() });
    if let Some(raw) = raw {
        raw::serve(raw, service.clone()).await?;
    }
    println!("ready");
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if let Some(manner) = Manner::named(&line) {
                told.send_replace(manner);
                println!("{line}");
            }
        }
        // Nobody tells any more; what was told last stays.
        loop {
            std::thread::park();
        }
    });
    loop {
        let (stream, _) = listener.accept().await?;
        let _ = stream.set_nodelay(true);
        let service = service.clone();
        tokio::spawn(async move {
            let answering = service.clone();
            let answer = service_fn(move |request| answer(answering.clone(), request));
            let keep = *service.manner.borrow() != Manner::CloseIdle;
            let mut server = auto::Builder::new(TokioExecutor::new());
            server.http1().timer(TokioTimer::new()).keep_alive(true);
            server.http2().enable_connect_protocol();
            let connection = server.serve_connection_with_upgrades(TokioIo::new(stream), answer);
            if keep {
                let _ = connection.await;
            } else {
                // Without a word: the peer may just be sending the next call.
                let _ = tokio::time::timeout(Duration::from_millis(500), connection).await;
            }
        });
    }
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

impl Service {
    fn open(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, (Instant, String)>> {
        self.open.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Writes down that a call is done, and takes its time before it is answered: who hangs up meanwhile has it done.
    async fn done(&self, nonce: u64, manner: Manner) {
        self.write_down(nonce);
        match manner {
            Manner::Slow => tokio::time::sleep(SLOW).await,
            Manner::Work(long) => tokio::time::sleep(long).await,
            _ => {}
        }
    }

    fn write_down(&self, nonce: u64) {
        let line = format!("{nonce}\n");
        let mut ledger = self.ledger.lock().unwrap_or_else(|e| e.into_inner());
        if let Err(error) = ledger.write_all(line.as_bytes()) {
            // A ledger with holes proves nothing.
            eprintln!("cannot write the ledger: {error}");
            std::process::abort();
        }
    }

    fn answer(&self, status: StatusCode, body: Body) -> Response<Body> {
        let mut response = Response::new(body);
        *response.status_mut() = status;
        response.headers_mut().insert(SERVED_BY, self.name.clone());
        response
    }

    /// Consents to a WebSocket, over HTTP/1.1 or 2, and says again what comes, as it comes.
    fn switch(&self, mut request: Request<Incoming>, open: Open) -> Response<Body> {
        let status = match request.extensions().get::<hyper::ext::Protocol>() {
            Some(_) => StatusCode::OK,
            None => StatusCode::SWITCHING_PROTOCOLS,
        };
        let mut response = self.answer(status, Full::default().boxed_unsync());
        if let Some(key) = request.headers().get(header::SEC_WEBSOCKET_KEY) {
            let headers = response.headers_mut();
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
            headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept_of(key));
        }
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let _open = open;
            let Ok(stream) = upgrade.await else { return };
            let (mut read, mut write) = tokio::io::split(TokioIo::new(stream));
            if tokio::io::copy(&mut read, &mut write).await.is_ok() {
                let _ = write.shutdown().await;
            }
        });
        response
    }

    fn text(&self, status: StatusCode, text: String) -> Response<Body> {
        self.answer(status, Full::new(Bytes::from(text)).boxed_unsync())
    }
}

async fn answer(service: Arc<Service>, request: Request<Incoming>) -> Result<Response<Body>, hyper::Error> {
    if request.uri().path() == "/open" {
        let line = |(since, what): &(Instant, String)| format!("{} {what}", since.elapsed().as_millis());
        let open: Vec<String> = service.open().values().map(line).collect();
        return Ok(service.text(StatusCode::OK, open.join("\n")));
    }
    let count = service.calls.fetch_add(1, Relaxed);
    let what = format!("{} {}", request.method(), request.uri().path());
    service.open().insert(count, (Instant::now(), what));
    let open = Open(service.clone(), count);
    let manner = *service.manner.borrow();
    let path = request.uri().path().trim_matches('/').to_string();
    let parts: Vec<&str> = path.split('/').collect();
    let number = |at: usize| parts.get(at).and_then(|part| part.parse::<u64>().ok());
    match manner {
        Manner::Hang => {
            // What came is read: who does not read does not see that his caller hangs up.
            if request.into_body().collect().await.is_err() {
                // Over HTTP/1.1 nothing else says that he has: nobody waits any more.
                return Ok(service.text(StatusCode::BAD_REQUEST, "the caller has gone".into()));
            }
            std::future::pending::<()>().await;
            unreachable!("nothing comes after for ever");
        }
        Manner::Stumble if count % STUMBLE_ONE_IN == 7 => {
            return Ok(service.text(StatusCode::INTERNAL_SERVER_ERROR, "stumbled".into()));
        }
        _ => {}
    }
    let Some(nonce) = number(1) else {
        return Ok(service.text(StatusCode::NOT_FOUND, "no number".into()));
    };
    let early = manner == Manner::AnswerEarly;
    if parts[0] == "echo" {
        service.done(nonce, manner).await;
        return Ok(service.switch(request, open));
    }
    match (request.method().clone(), parts[0]) {
        (Method::GET, "call") => {
            service.done(nonce, manner).await;
            Ok(service.text(StatusCode::OK, nonce.to_string()))
        }
        (Method::POST, "call") if early => {
            service.done(nonce, manner).await;
            Ok(service.text(StatusCode::OK, nonce.to_string()))
        }
        (Method::POST, "call") => {
            request.into_body().collect().await?;
            service.done(nonce, manner).await;
            Ok(service.text(StatusCode::OK, nonce.to_string()))
        }
        (Method::POST, "bytes") if early => Ok(service.text(StatusCode::PAYLOAD_TOO_LARGE, "too much".into())),
        (Method::POST, "bytes") => {
            let mut digest = Sha256::new();
            let mut length = 0;
            let mut body = request.into_body();
            while let Some(frame) = body.frame().await {
                if let Ok(data) = frame?.into_data() {
                    length += data.len();
                    digest.update(&data);
                }
            }
            service.done(nonce, manner).await;
            Ok(service.text(StatusCode::OK, format!("{length} {}", hex(&digest.finalize()))))
        }
        (Method::POST, "talk") => {
            service.done(nonce, manner).await;
            let mut response = service.answer(StatusCode::OK, echo(request.into_body()));
            response.headers_mut().insert(header::CONTENT_TYPE, GRPC);
            // HTTP/1.1 wants to know beforehand.
            response.headers_mut().insert(header::TRAILER, HeaderValue::from_static("grpc-status"));
            Ok(response)
        }
        (Method::GET, kind @ ("bytes" | "drip")) => {
            let size = number(2).unwrap_or(0) as usize;
            service.done(nonce, manner).await;
            let pause = if kind == "drip" { DRIP_PAUSE } else { Duration::ZERO };
            let mut response = service.answer(StatusCode::OK, content(nonce, size, pause));
            // One that tells its length shows by itself when it is cut short; of the others only the content can tell.
            if kind == "bytes" {
                response.headers_mut().insert(header::CONTENT_LENGTH, size.into());
            }
            Ok(response)
        }
        _ => Ok(service.text(StatusCode::NOT_FOUND, "nothing here".into())),
    }
}

/// What a server answers to a WebSocket's key (RFC 6455 §4.2.2).
fn accept_of(key: &HeaderValue) -> HeaderValue {
    let proof = [key.as_bytes(), b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"].concat();
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY, &proof);
    HeaderValue::from_str(&STANDARD.encode(digest)).expect("base64 is ASCII")
}

/// The content of a download: each chunk begins with what it is and where, so that none can be missing or elsewhere.
fn content(nonce: u64, size: usize, pause: Duration) -> Body {
    let (send, receive) = mpsc::channel(2);
    tokio::spawn(async move {
        for chunk in chunks(nonce, size) {
            if send.send(Frame::data(chunk)).await.is_err() {
                return;
            }
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
        }
    });
    Frames(receive).boxed_unsync()
}

/// What comes, as it comes; then trailers that say that all is well, if the request came to its end.
fn echo(mut body: Incoming) -> Body {
    let (send, receive) = mpsc::channel(2);
    tokio::spawn(async move {
        while let Some(frame) = body.frame().await {
            let Ok(frame) = frame else { return };
            // Empty is what the end of the request may be; said again it would be noise (CVE-2019-9518).
            let Some(data) = frame.into_data().ok().filter(|data| !data.is_empty()) else { continue };
            if send.send(Frame::data(data)).await.is_err() {
                return;
            }
        }
        let trailers = HeaderMap::from_iter([(GRPC_STATUS, HeaderValue::from_static("0"))]);
        let _ = send.send(Frame::trailers(trailers)).await;
    });
    Frames(receive).boxed_unsync()
}

/// The bytes that follow from a nonce, chunk by chunk.
pub(crate) fn chunks(nonce: u64, size: usize) -> impl Iterator<Item = Bytes> {
    (0..size).step_by(CHUNK_BYTES).map(move |at| {
        let mut chunk = BytesMut::zeroed(CHUNK_BYTES.min(size - at));
        let seed = nonce.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ at as u64;
        for (word, place) in chunk.chunks_mut(8).enumerate() {
            let bytes = (seed.wrapping_add(word as u64)).rotate_left(21).to_le_bytes();
            place.copy_from_slice(&bytes[..place.len()]);
        }
        chunk.freeze()
    })
}

/// SHA-256 of those bytes, hex.
pub(crate) fn digest(nonce: u64, size: usize) -> String {
    let mut digest = Sha256::new();
    chunks(nonce, size).for_each(|chunk| digest.update(&chunk));
    hex(&digest.finalize())
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A body that somebody else writes.
pub(crate) struct Frames(pub(crate) mpsc::Receiver<Frame<Bytes>>);

impl http_body::Body for Frames {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(context).map(|frame| frame.map(Ok))
    }
}
