//! Answers requests on an established QUIC connection: the mesh's calls and the public side's requests alike.

use std::{
    future::Future,
    pin::{Pin, pin},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header, request};
use tokio_util::task::TaskTracker;

use super::{
    Broken, Code, Fault,
    codec::{
        control::Role,
        head::{self, Checked, Limits as HeadLimits},
        message::Event,
        varint,
    },
    connection::{Connection, MAX_SECTION_BYTES},
    datagrams::Flow,
    order::Order,
    pump::{Cut, pump},
    stream::{Receiver, Sender},
    upload::Upload,
};
use crate::{
    Body, BodyError, Drain, Interim, Problem, ProxyError, Shelf, names,
    patience::{HOLD, Patience},
    shelf::Wanted,
    tunnel::{self, FlowSlot, Protocol},
};

/// How long a request's head may take to arrive.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// After the first GOAWAY, how long requests that were on their way are still taken.
const GOAWAY_GRACE: Duration = Duration::from_millis(100);
/// How long a client may take to read the end of its last answer.
const LAST_BYTES: Duration = Duration::from_secs(1);
/// The first GOAWAY names no request at all, because RFC 9114 §5.2 lets a client take anything from the named id on for
/// unprocessed; the second one names the real bound.
const GOAWAY_ALL: u64 = varint::MAX - 3;
/// Serves requests until the peer closes or the node drains. Requests run side by side; one that fails resets its own stream
/// and nothing else. Dropping an answer's body before its end resets the stream.
pub async fn serve<H, F, B>(connection: quinn::Connection, limits: Limits, drain: Drain, handler: H)
where
    H: Fn(Request<Body>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: http_body::Body<Data = Bytes, Error = BodyError> + Unpin + Send + 'static,
{
    let server = Server {
        connection: Connection::start(connection.clone(), Role::Server, limits.order),
        handler,
        requests: TaskTracker::new(),
        patience: (limits.peer == Peer::Client).then(Arc::default),
        shelf: limits.shelf,
        drain: drain.clone(),
    };
    // From which stream id on requests are refused.
    let mut bound = 0;
    let first_is_late = drain.no_more_requests();
    let goes_away = async {
        tokio::pin!(first_is_late);
        loop {
            tokio::select! {
                accepted = connection.accept_bi() => match accepted {
                    Ok((send, receive)) => bound = server.take(send, receive),
                    Err(_) => return,
                },
                // A connection on which nothing was asked yet is there for its first request.
                () = drain.draining(), if bound > 0 => break,
                () = &mut first_is_late, if bound == 0 => break,
                () = server.connection.worn_out() => break,
                () = idle(&server.requests, limits.idle) => break,
            }
        }
        server.go_away(&connection, bound).await;
    };
    tokio::select! {
        () = goes_away => {}
        () = drain.closing() => {}
    }
    connection.close(Code::H3_NO_ERROR.var_int(), b"");
}

/// What a connection may hold, and how long; and how it is used.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Where uploads stand that nobody reads.
    pub shelf: Shelf,
    /// How long a connection may have no request, though its client keeps it alive; for ever if `None`.
    pub idle: Option<Duration>,
    /// In which order its answers are sent.
    pub order: Order,
    /// Who is at its other end.
    pub peer: Peer,
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// A client, that has to wait if it opens requests only to give them up.
    Client,
    /// A node, with the calls of many: what some give up is not for all to wait for. It is told which answers are not the service's.
    Node,
}

/// Resolves when there has been no request for so long. Begins anew with each that comes.
async fn idle(requests: &TaskTracker, limit: Option<Duration>) {
    let Some(limit) = limit else { return std::future::pending().await };
    loop {
        tokio::time::sleep(limit).await;
        if requests.is_empty() {
            return;
        }
    }
}

struct Server<H> {
    connection: Arc<Connection>,
    handler: H,
    requests: TaskTracker,
    /// With a client; `None` with a node.
    patience: Option<Arc<Patience>>,
    shelf: Shelf,
    drain: Drain,
}

impl<H, F, B> Server<H>
where
    H: Fn(Request<Body>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: http_body::Body<Data = Bytes, Error = BodyError> + Unpin + Send + 'static,
{
    /// Answers a request on a task of its own; returns the first stream id that is not taken yet.
    fn take(&self, send: quinn::SendStream, receive: quinn::RecvStream) -> u64 {
        let next = quinn::VarInt::from(send.id()).into_inner() + 4;
        let exchange = Exchange {
            sender: Sender::new(send, self.connection.clone(), Code::H3_INTERNAL_ERROR),
            receiver: Receiver::new(receive, self.connection.clone(), Code::H3_NO_ERROR),
            patience: self.patience.clone(),
            shelf: self.shelf.clone(),
            drain: self.drain.clone(),
        };
        // Boxed, because a task is copied several times when it is spawned and when it ends.
        self.requests.spawn(Box::pin(exchange.run(self.handler.clone())));
        next
    }

    /// Two-step GOAWAY, then waits for what was taken.
    async fn go_away(&self, connection: &quinn::Connection, mut bound: u64) {
        self.connection.go_away(GOAWAY_ALL);
        let grace = tokio::time::sleep(GOAWAY_GRACE.max(connection.rtt() * 2));
        tokio::pin!(grace);
        loop {
            tokio::select! {
                accepted = connection.accept_bi() => match accepted {
                    Ok((send, receive)) => bound = self.take(send, receive),
                    Err(_) => break,
                },
                () = &mut grace => break,
            }
        }
        self.connection.go_away(bound);
        self.requests.close();
        self.reject_until(connection, self.requests.wait()).await;
        // The last bytes are written, and not yet read: a client loses what it has not read when the connection goes. Most close it
        // themselves when they have all.
        let read = async {
            let _ = tokio::time::timeout(LAST_BYTES.max(connection.rtt() * 2), connection.closed()).await;
        };
        self.reject_until(connection, read).await;
    }

    /// Rejects every request that comes before `end`: nothing is done, so that the client may send it to somebody else
    /// (RFC 9114 §4.1.1).
    async fn reject_until(&self, connection: &quinn::Connection, end: impl Future<Output = ()>) {
        let rejecting = async {
            while let Ok((mut send, mut receive)) = connection.accept_bi().await {
                let _ = send.reset(Code::H3_REQUEST_REJECTED.var_int());
                let _ = receive.stop(Code::H3_REQUEST_REJECTED.var_int());
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = end => {}
            () = rejecting => {}
        }
    }
}

/// One request and its answer.
struct Exchange {
    sender: Sender,
    receiver: Receiver,
    patience: Option<Arc<Patience>>,
    shelf: Shelf,
    drain: Drain,
}

impl Exchange {
    async fn run<H, F, B>(self, handler: H)
    where
        H: Fn(Request<Body>) -> F,
        F: Future<Output = Response<B>>,
        B: http_body::Body<Data = Bytes, Error = BodyError> + Unpin,
    {
        let Self { mut sender, mut receiver, patience, shelf, drain } = self;
        let begun = Instant::now();
        let mut head = match tokio::time::timeout(HEAD_TIMEOUT, read_head(&mut receiver)).await {
            Ok(Ok(head)) => head,
            Ok(Err(Broken::Fault(Fault::TooLarge))) => {
                let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
                let detail = "the header fields are too large";
                // Without content, because the method is not known: it may be HEAD.
                let problem = Problem::proxy(status, ProxyError::HttpRequestError, detail);
                return send_problem(sender, problem, None, patience.is_none()).await;
            }
            Ok(Err(broken)) => {
                if let Some(patience) = &patience {
                    patience.cancelled(begun);
                }
                return sender.reset(broken.reset_code());
            }
            Err(_) => {
                receiver.stop(Code::H3_REQUEST_INCOMPLETE);
                return sender.reset(Code::H3_REQUEST_INCOMPLETE);
            }
        };
        let method = head.method.clone();
        let protocol = head.extensions.get::<Protocol>().cloned();
        let stall = tunnel::patience_with(&method, protocol.as_ref());
        if protocol.as_ref().is_some_and(Protocol::is_udp) {
            head.extensions.insert(FlowSlot::new(Flow::of(sender.connection(), sender.stream_id())));
        }
        // Mostly the end comes along with the head; then there is no body, and nothing to watch but the answer.
        let (upload, body) = if receiver.has_ended() {
            (None, Body::empty())
        } else {
            let (upload, body) = Upload::divide(receiver);
            let body = Body::from(body).shelved_for(&shelf, stall, Wanted::with(&method));
            (Some(upload), tunnel::sent(body, protocol.as_ref(), &drain))
        };
        let mut is_open = false;
        let outcome = {
            let mut unwanted = pin!(unwanted(sender.stopped(), upload.as_ref()));
            match ask(&mut sender, head, body, upload.as_ref(), patience.as_deref(), handler, unwanted.as_mut()).await {
                Ok(response) => match tunnel::answered(response, &method, protocol.as_ref(), &drain) {
                    Ok((response, opened)) => {
                        is_open = opened;
                        if is_open {
                            sender.have_patience(stall);
                        }
                        reply(&mut sender, &method, response, upload.as_ref(), unwanted).await
                    }
                    Err(problem) => Err(Unanswered::Problem(Box::new(problem))),
                },
                Err(Unanswered::Unwanted(code)) => {
                    if let Some(patience) = &patience {
                        patience.cancelled(begun);
                    }
                    Err(Unanswered::Unwanted(code))
                }
                Err(problem) => Err(problem),
            }
        };
        match outcome {
            Ok(()) => {
                match upload {
                    // The other half of a tunnel may be open for long, and is what a drain waits for.
                    Some(upload) if is_open => upload.ended().await,
                    Some(upload) => upload.answered(),
                    None => {}
                }
                sender.delivered().await;
            }
            Err(Unanswered::Unwanted(code)) => sender.reset(code),
            Err(Unanswered::Problem(problem)) => {
                if let Some(upload) = &upload {
                    upload.release();
                }
                send_problem(sender, *problem, Some(&method), patience.is_none()).await;
            }
        }
    }
}

/// Why a request gets no answer of the handler's, or not all of it.
enum Unanswered {
    /// The stream is to be reset with that code.
    Unwanted(Code),
    /// An answer of our own making takes its place.
    Problem(Box<Problem>),
}

/// Hands the request to the handler and waits for its answer, as long as the caller does.
async fn ask<H, F, B>(
    sender: &mut Sender,
    mut head: request::Parts,
    body: Body,
    upload: Option<&Upload>,
    patience: Option<&Patience>,
    handler: H,
    mut unwanted: Pin<&mut impl Future<Output = Code>>,
) -> Result<Response<B>, Unanswered>
where
    H: Fn(Request<Body>) -> F,
    F: Future<Output = Response<B>>,
{
    let expects = head.headers.get(header::EXPECT).is_some_and(|e| e.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    let interim = Interim::default();
    head.extensions.insert(interim.clone());
    let mut answered = pin!(async move {
        let body = body.settle(&head.method, &head.headers).await?;
        if patience.is_some_and(Patience::is_worn_out) {
            tokio::time::sleep(HOLD).await;
        }
        if upload.is_some_and(|upload| upload.broken_so_far().is_some()) {
            // Given up already; whoever watches says so in a moment.
            std::future::pending::<()>().await;
        }
        // Boxed, because it is by far the largest part of this task, and a task is copied when it is spawned.
        Ok(Box::pin(handler(Request::from_parts(head, body))).await)
    });
    let mut expects = upload.filter(|_| expects);
    let answered: Result<_, Problem> = loop {
        let early = tokio::select! {
            biased;
            code = unwanted.as_mut() => return Err(Unanswered::Unwanted(code)),
            answered = &mut answered => break answered,
            early = interim.next() => early,
            // The body is asked for, and the client waits to be (RFC 9110 §10.1.1).
            () = wanted(expects), if expects.is_some() => {
                expects = None;
                let mut go_on = Response::new(());
                *go_on.status_mut() = StatusCode::CONTINUE;
                go_on
            }
        };
        sender.interim(early.status(), early.headers());
        tokio::select! {
            sent = sender.flush() => {
                if sent.is_err() {
                    return Err(Unanswered::Unwanted(Code::H3_REQUEST_CANCELLED));
                }
            }
            code = unwanted.as_mut() => return Err(Unanswered::Unwanted(code)),
        }
    };
    // What came together with the answer goes with it.
    while let Some(early) = interim.take() {
        sender.interim(early.status(), early.headers());
    }
    if let Some(code) = upload.and_then(Upload::broken_so_far) {
        // Whatever the answer is, it was made of less than the whole request.
        return Err(Unanswered::Unwanted(code));
    }
    answered.map_err(|problem| Unanswered::Problem(Box::new(problem)))
}

/// Sends the handler's answer, as long as the caller wants it.
async fn reply<B>(
    sender: &mut Sender,
    method: &Method,
    response: Response<B>,
    upload: Option<&Upload>,
    unwanted: Pin<&mut impl Future<Output = Code>>,
) -> Result<(), Unanswered>
where
    B: http_body::Body<Data = Bytes, Error = BodyError> + Unpin,
{
    let (head, body) = response.into_parts();
    if sender.response(head.status, &head.headers).is_err() {
        let detail = "the head of the answer is larger than the client takes";
        let problem = Problem::proxy(StatusCode::BAD_GATEWAY, ProxyError::HttpProtocolError, detail);
        return Err(Unanswered::Problem(Box::new(problem)));
    }
    if let Some(upload) = upload {
        upload.release();
    }
    // An answer to HEAD has no content, whoever made it (RFC 9110 §9.3.2).
    let body = (*method != Method::HEAD).then_some(body);
    pump(sender, body, async { Some(unwanted.await) }).await.map_err(|cut| {
        Unanswered::Unwanted(match cut {
            Cut::Unwanted(code) => code.unwrap_or(Code::H3_REQUEST_CANCELLED),
            Cut::Body(error) => {
                tracing::debug!(%error, "an answer broke off");
                Code::H3_INTERNAL_ERROR
            }
            Cut::TrailersTooLarge => Code::H3_INTERNAL_ERROR,
            Cut::Stalled => Code::H3_REQUEST_CANCELLED,
        })
    })
}

/// Resolves when somebody asks for the body of a request.
async fn wanted(upload: Option<&Upload>) {
    match upload {
        Some(upload) => upload.wanted().await,
        None => std::future::pending().await,
    }
}

/// Reads and checks the head, and looks whether the request ends with it.
async fn read_head(receiver: &mut Receiver) -> Result<request::Parts, Broken> {
    const LIMITS: HeadLimits = HeadLimits { max_section_bytes: MAX_SECTION_BYTES, extended_connect: true };
    let Some(Event::Head(section)) = receiver.event().await? else {
        return Err(receiver.break_off(Fault::Stream(Code::H3_REQUEST_INCOMPLETE, "a request without a head")));
    };
    match head::decode_request(&section, LIMITS) {
        Ok(Checked { head, length }) => {
            receiver.promise(length);
            receiver.look_ahead().await?;
            Ok(head)
        }
        Err(fault) => Err(receiver.break_off(fault)),
    }
}

/// Resolves when the caller wants no answer any more, with the code to reset it with: it stopped the answer, gave its upload
/// up, or is gone.
async fn unwanted(stopped: impl Future<Output = Option<Code>>, upload: Option<&Upload>) -> Code {
    match upload {
        None => drop(stopped.await),
        Some(upload) => tokio::select! {
            _ = stopped => {}
            code = upload.broken() => return code,
        },
    }
    Code::H3_REQUEST_CANCELLED
}

/// Answers in place of the handler; with content only to a method that is known, and not HEAD. To a node it says so. Boxed, to keep
/// the room for it out of every request's task.
fn send_problem(
    mut sender: Sender,
    problem: Problem,
    method: Option<&Method>,
    to_node: bool,
) -> Pin<Box<impl Future<Output = ()> + use<>>> {
    let has_content = method.is_some_and(|method| *method != Method::HEAD);
    let is_known = method.is_some();
    Box::pin(async move {
        let (mut head, body) = problem.into_response("starling", false).into_parts();
        if !is_known {
            // Only an answer to HEAD may tell a length that it does not have (RFC 9114 §4.1.2).
            head.headers.remove(header::CONTENT_LENGTH);
            head.headers.remove(header::CONTENT_TYPE);
        }
        if to_node {
            head.headers.insert(names::SENT.clone(), HeaderValue::from_static("maybe"));
        }
        let stopped = sender.stopped();
        let sent = sender.response(head.status, &head.headers).is_ok()
            && pump(&mut sender, has_content.then_some(body), stopped).await.is_ok();
        if !sent {
            sender.reset(Code::H3_INTERNAL_ERROR);
        }
    })
}
