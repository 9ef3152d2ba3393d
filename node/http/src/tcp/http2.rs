//! HTTP/2, on the crate `h2`: a task for each request, as over HTTP/3, so that one that stands still is ended by itself.

use std::{
    future::{Future, pending, poll_fn},
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, server::SendResponse};
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body::Frame;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Notify,
    time::Instant,
};

use super::{HEAD_TIMEOUT, Limits, MAX_HEAD_BYTES};
use crate::{
    Body, BodyError, Drain, Interim,
    patience::{HOLD, Patience},
    shelf::Wanted,
    stall::{STALL, Stall},
    tunnel::{self, Protocol},
};

/// How often a client is asked whether it is still there, and how long it may take to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// The same while something is under way: the question, or its answer, may be behind what a slow line has to carry.
const KEEP_ALIVE_BUSY: Duration = Duration::from_secs(120);
/// How often a connection is looked at, and every how many times its client is asked.
const BEAT: Duration = Duration::from_secs(5);
const BEATS: u32 = 6;
/// What may wait of an answer, in bytes, beside what the client's window takes.
const MAX_SEND_BUFFER: usize = 16 << 10;
/// How long a client that has its answer may go on sending its request, before it is told to stop. Whoever is told together
/// with the end of the answer may lose the answer over it.
const LINGER: Duration = Duration::from_secs(1);

pub(super) async fn serve<S, H, F, B>(stream: S, limits: &Limits, drain: Drain, handler: H)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Request<Body>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: http_body::Body<Data = Bytes, Error = BodyError> + Unpin + Send + 'static,
{
    let mut builder = h2::server::Builder::new();
    builder
        .max_concurrent_streams(limits.max_streams)
        .initial_window_size(limits.stream_window_bytes)
        .initial_connection_window_size(limits.stream_window_bytes.saturating_mul(limits.max_streams).min(1 << 30))
        // A network that was away brings requests and their ends together: as many as the client may have under way are no attack.
        .max_pending_accept_reset_streams(limits.max_streams as usize)
        .max_header_list_size(MAX_HEAD_BYTES as u32)
        .max_send_buffer_size(MAX_SEND_BUFFER)
        .enable_connect_protocol();
    let mut connection = match tokio::time::timeout(HEAD_TIMEOUT, builder.handshake(stream)).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return tracing::debug!(%error, "connection"),
        Err(_) => return tracing::debug!("an HTTP/2 client said nothing"),
    };
    let mut pulse = Pulse::new(connection.ping_pong());
    let open = Arc::new(AtomicUsize::new(0));
    let patience = Arc::new(Patience::default());
    let mut idle_since = Instant::now();
    let mut draining = false;
    // A connection on which nothing was asked yet is there for its first request.
    let mut is_new = true;
    let first_is_late = drain.no_more_requests();
    tokio::pin!(first_is_late);
    loop {
        // What is answered may still be on its way, in the library's buffers.
        let is_idle = open.load(Relaxed) == 0 && !connection.has_streams();
        tokio::select! {
            accepted = connection.accept() => match accepted {
                Some(Ok((request, mut respond))) => {
                    is_new = false;
                    let (handler, shelf, place) = (handler.clone(), limits.shelf.clone(), Place::new(&open));
                    let drain = drain.clone();
                    let patience = patience.clone();
                    tokio::spawn(async move {
                        let (mut head, body) = request.into_parts();
                        if let Some(asked) = head.extensions.remove::<h2::ext::Protocol>() {
                            match Protocol::read(asked.as_str()) {
                                Some(protocol) => drop(head.extensions.insert(protocol)),
                                None => return respond.send_reset(Reason::PROTOCOL_ERROR),
                            }
                        }
                        let body = Http2Body::new(body);
                        let upload = body.upload.clone();
                        let protocol = head.extensions.get::<Protocol>();
                        let stall = tunnel::patience_with(&head.method, protocol);
                        let wanted = Wanted::with(&head.method);
                        let request = Request::from_parts(head, Body::from(body).shelved_for(&shelf, stall, wanted));
                        answer(request, &upload, respond, &patience, &drain, handler).await;
                        drop(place);
                    });
                }
                Some(Err(error)) => return tracing::debug!(%error, "connection"),
                None => return,
            },
            () = drain.draining(), if !draining && !is_new => {
                draining = true;
                connection.graceful_shutdown();
            }
            () = &mut first_is_late, if !draining && is_new => {
                draining = true;
                connection.graceful_shutdown();
            }
            () = drain.closing() => return,
            alive = pulse.beat(if is_idle { KEEP_ALIVE } else { KEEP_ALIVE_BUSY }) => {
                if !alive {
                    return tracing::debug!("an HTTP/2 client is gone");
                }
                if !is_idle {
                    idle_since = Instant::now();
                } else if idle_since.elapsed() >= limits.idle && !draining {
                    // Not `draining` by itself: a client that does not close is gone with the next beat that finds it idle.
                    connection.graceful_shutdown();
                    draining = true;
                } else if idle_since.elapsed() >= limits.idle + KEEP_ALIVE {
                    return connection.abrupt_shutdown(Reason::NO_ERROR);
                }
            }
        }
    }
}

/// A request that is answered, counted.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn new(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Relaxed);
        Self(open.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Asks a client whether it is still there.
struct Pulse {
    pings: Option<h2::PingPong>,
    /// When it was asked; `None` once it has answered.
    asked: Option<Instant>,
    next: Instant,
    beats: u32,
}

impl Pulse {
    fn new(pings: Option<h2::PingPong>) -> Self {
        Self { pings, asked: None, next: Instant::now() + BEAT, beats: 0 }
    }

    /// Resolves every few seconds: whether the client is there, as far as is known. Cancel safe.
    async fn beat(&mut self, patience: Duration) -> bool {
        let Some(pings) = &mut self.pings else { return pending().await };
        loop {
            tokio::select! {
                answered = poll_fn(|cx| pings.poll_pong(cx)), if self.asked.is_some() => match answered {
                    Ok(_) => self.asked = None,
                    Err(_) => return false,
                },
                () = tokio::time::sleep_until(self.next) => break,
            }
        }
        self.next = Instant::now() + BEAT;
        self.beats += 1;
        match self.asked {
            Some(asked) => asked.elapsed() < patience,
            None => {
                if self.beats.is_multiple_of(BEATS) && pings.send_ping(h2::Ping::opaque()).is_ok() {
                    self.asked = Some(Instant::now());
                }
                true
            }
        }
    }
}

/// Why an answer is not sent whole.
enum Cut {
    /// The client wants no more of it, or is gone.
    Unwanted,
    /// It takes nothing.
    Stalled,
    /// The body broke off.
    Body(BodyError),
}

async fn answer<H, F, B>(
    request: Request<Body>,
    upload: &Upload,
    mut respond: SendResponse<Bytes>,
    patience: &Patience,
    drain: &Drain,
    handler: H,
) where
    H: Fn(Request<Body>) -> F,
    F: Future<Output = Response<B>>,
    B: http_body::Body<Data = Bytes, Error = BodyError> + Unpin,
{
    let begun = std::time::Instant::now();
    let method = request.method().clone();
    let (mut head, body) = request.into_parts();
    let protocol = head.extensions.get::<Protocol>().cloned();
    let body = tunnel::sent(body, protocol.as_ref(), drain);
    let stall = tunnel::patience_with(&method, protocol.as_ref());
    let mut is_open = false;
    let mut expects =
        head.headers.get(header::EXPECT).is_some_and(|e| e.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    let interim = Interim::default();
    head.extensions.insert(interim.clone());
    let response = {
        let mut answered = pin!(async {
            match body.settle(&head.method, &head.headers).await {
                Ok(body) => {
                    if patience.is_worn_out() {
                        tokio::time::sleep(HOLD).await;
                    }
                    Ok(handler(Request::from_parts(head, body)).await)
                }
                Err(problem) => Err(problem),
            }
        });
        loop {
            tokio::select! {
                biased;
                answered = &mut answered => break answered,
                // The client has given up.
                _ = poll_fn(|cx| respond.poll_reset(cx)) => return patience.cancelled(begun),
                early = interim.next() => drop(respond.send_informational(early)),
                // The body is asked for, and the client waits to be (RFC 9110 §10.1.1).
                () = upload.wanted.notified(), if expects => {
                    expects = false;
                    let go_on = Response::builder().status(StatusCode::CONTINUE).body(()).expect("a status will do");
                    let _ = respond.send_informational(go_on);
                }
            }
        }
    };
    while let Some(early) = interim.take() {
        let _ = respond.send_informational(early);
    }
    let answered = response.and_then(|response| tunnel::answered(response, &method, protocol.as_ref(), drain));
    let sent = match answered {
        Ok((response, opened)) => {
            is_open = opened;
            send(&mut respond, &method, response, if is_open { stall } else { STALL }).await
        }
        Err(problem) => send(&mut respond, &method, problem.into_response("starling", false), STALL).await,
    };
    match sent {
        Ok(stream) => {
            if is_open {
                // The other half of a tunnel may be open for long.
                upload.ended.notified().await;
            } else if !upload.over.load(Relaxed) {
                // Dropped together with the stream, the rest of the request is stopped, and the client told so.
                let _ = tokio::time::timeout(LINGER, closed(stream)).await;
            }
        }
        Err((cut, stream)) => {
            if let Cut::Body(error) = &cut {
                tracing::debug!(%error, "an answer broke off");
            }
            if let Some(mut stream) = stream {
                stream.send_reset(match cut {
                    Cut::Body(_) => Reason::INTERNAL_ERROR,
                    Cut::Unwanted | Cut::Stalled => Reason::CANCEL,
                });
            }
        }
    }
}

async fn closed(mut stream: SendStream<Bytes>) {
    let _ = poll_fn(|cx| stream.poll_reset(cx)).await;
}

type Sent = Result<SendStream<Bytes>, (Cut, Option<SendStream<Bytes>>)>;

async fn send<B>(respond: &mut SendResponse<Bytes>, method: &Method, response: Response<B>, stall: Duration) -> Sent
where
    B: http_body::Body<Data = Bytes, Error = BodyError> + Unpin,
{
    let (head, body) = response.into_parts();
    // An answer to HEAD has no content, whoever made it (RFC 9110 §9.3.2).
    let is_bodiless = *method == Method::HEAD || body.is_end_stream();
    let Ok(mut stream) = respond.send_response(Response::from_parts(head, ()), is_bodiless) else {
        respond.send_reset(Reason::INTERNAL_ERROR);
        return Err((Cut::Unwanted, None));
    };
    if is_bodiless {
        return Ok(stream);
    }
    match pump(&mut stream, body, stall).await {
        Ok(()) => Ok(stream),
        Err(cut) => Err((cut, Some(stream))),
    }
}

/// Sends the body and its trailers, as fast as the client takes them.
async fn pump<B>(stream: &mut SendStream<Bytes>, mut body: B, stall: Duration) -> Result<(), Cut>
where
    B: http_body::Body<Data = Bytes, Error = BodyError> + Unpin,
{
    let unwanted = |_| Cut::Unwanted;
    loop {
        let frame = poll_fn(|cx| {
            if stream.poll_reset(cx).is_ready() {
                return Poll::Ready(Err(Cut::Unwanted));
            }
            Pin::new(&mut body).poll_frame(cx).map(|frame| frame.transpose().map_err(Cut::Body))
        })
        .await?;
        let Some(frame) = frame else { return stream.send_data(Bytes::new(), true).map_err(unwanted) };
        match frame.into_data() {
            Ok(mut data) => {
                while !data.is_empty() {
                    let part = data.split_to(capacity(stream, data.len(), stall).await?.min(data.len()));
                    let is_last = data.is_empty() && body.is_end_stream();
                    stream.send_data(part, is_last).map_err(unwanted)?;
                    if is_last {
                        return Ok(());
                    }
                }
            }
            Err(frame) => {
                // An empty section is allowed, but some decoders stumble over it.
                match frame.into_trailers() {
                    Ok(trailers) if !trailers.is_empty() => return stream.send_trailers(trailers).map_err(unwanted),
                    _ => return stream.send_data(Bytes::new(), true).map_err(unwanted),
                }
            }
        }
    }
}

/// How much the client takes, once it takes something.
async fn capacity(stream: &mut SendStream<Bytes>, wanted: usize, stall: Duration) -> Result<usize, Cut> {
    stream.reserve_capacity(wanted);
    let mut stall = Stall::of(stall);
    poll_fn(|cx| {
        loop {
            if stream.capacity() > 0 {
                return Poll::Ready(Ok(stream.capacity()));
            }
            match stream.poll_capacity(cx) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(_) => return Poll::Ready(Err(Cut::Unwanted)),
                Poll::Pending => return stall.poll_stalled(cx).map(|()| Err(Cut::Stalled)),
            }
        }
    })
    .await
}

/// What there is to know of a request's body beside its bytes.
#[derive(Default)]
struct Upload {
    /// Told when somebody asks for it.
    wanted: Notify,
    /// Nothing more comes.
    over: AtomicBool,
    /// Told when nothing more comes, or nobody listens.
    ended: Notify,
}

/// A request's body.
pub(crate) struct Http2Body {
    stream: RecvStream,
    /// Only trailers may come.
    data_over: bool,
    upload: Arc<Upload>,
}

impl Http2Body {
    fn new(stream: RecvStream) -> Self {
        let over = AtomicBool::new(stream.is_end_stream());
        Self { stream, data_over: false, upload: Arc::new(Upload { over, ..Upload::default() }) }
    }

    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.upload.wanted.notify_one();
        let frame = ready!(self.poll_next(cx));
        if self.stream.is_end_stream() || !matches!(frame, Some(Ok(_))) {
            self.upload.over.store(true, Relaxed);
            self.upload.ended.notify_one();
        }
        Poll::Ready(frame.map(|frame| frame.map_err(|error| BodyError::Broken(error.to_string()))))
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        if !self.data_over {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    let _ = self.stream.flow_control().release_capacity(data.len());
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => self.data_over = true,
            }
        }
        let trailers: Result<Option<HeaderMap>, h2::Error> = ready!(self.stream.poll_trailers(cx));
        Poll::Ready(trailers.transpose().map(|trailers| trailers.map(Frame::trailers)))
    }

    pub(crate) fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }
}

impl Drop for Http2Body {
    fn drop(&mut self) {
        self.upload.ended.notify_one();
    }
}
