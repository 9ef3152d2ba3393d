//! HTTP/1.1 to the service: a connection for each call at a time, kept for the next one.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use http::{HeaderMap, Request, Response, Version, header};
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper_util::rt::TokioIo;
use starling_http::{Body, Guarded, Interim, normal};

use super::{Connections, Dialler, LocalError, MAX_HEAD_BYTES, Repeats, Room, failed, stream::Glance, terminated};
use crate::Sent;

/// Connections kept for the next request, at most.
const MAX_IDLE: usize = 256;
/// We close so much before the service says that it will.
const MARGIN: Duration = Duration::from_secs(1);

/// The kept connections.
pub(super) struct Pool {
    idle: Arc<Idle>,
    keep: Duration,
    repeats: Arc<Repeats>,
}

#[derive(Default)]
struct Idle(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    /// Oldest first.
    connections: Vec<Connection>,
    /// Somebody closes those whose time is over.
    swept: bool,
}

struct Connection {
    sender: SendRequest<Body>,
    glance: Glance,
    /// Until when it may be used, once it is kept.
    until: Instant,
    _room: Room,
}

impl Connection {
    fn is_over(&self, now: Instant) -> bool {
        now >= self.until || self.sender.is_closed()
    }
}

impl Pool {
    /// `keep` is how long connections are kept.
    pub(super) fn new(keep: Duration, repeats: Arc<Repeats>) -> Self {
        Self { idle: Arc::default(), keep, repeats }
    }

    pub(super) async fn send(
        &self,
        dialler: &Dialler,
        request: Request<Body>,
    ) -> Result<Response<Guarded<super::Place>>, LocalError> {
        self.repeats.budget.earn();
        let mut request = origin_form(request);
        if let Some(interim) = request.extensions().get::<Interim>().cloned() {
            hyper::ext::on_informational(&mut request, move |early| {
                interim.pass_on(early.status(), early.headers().clone(), normal::Origin::Outside);
            });
        }
        let elsewhere = |all: &Connections| match all {
            Connections::Http1(pool) => pool.idle.take(),
            Connections::Http2(_) => None,
        };
        if let Some(kept) = self.idle.take().or_else(|| dialler.borrow(elsewhere)) {
            // A kept connection may be closed by the service at the very moment it is used. Then the request comes back
            // unsent, or is sent once more if that is harmless: without a body, and idempotent.
            let repeatable = http_body::Body::is_end_stream(request.body()) && request.method().is_idempotent();
            let copy = repeatable.then(|| copy_bodiless(&request));
            match self.exchange(kept, request).await {
                Ok(response) => return Ok(response),
                Err((error, unsent)) => {
                    // What it went through, the others most likely did, too.
                    self.idle.clear();
                    request = match (unsent, copy) {
                        (Some(unsent), _) => *unsent,
                        (None, Some(copy)) if !error.is_parse() && self.repeats.allow() => copy,
                        (None, _) => return Err(failed(&error, false)),
                    };
                }
            }
        }
        let (stream, room) = dialler.dial().await?;
        let glance = stream.glance();
        let (mut sender, connection) = Builder::new()
            .max_buf_size(MAX_HEAD_BYTES)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|e| failed(&e, true))?;
        tokio::spawn(connection);
        sender.ready().await.map_err(|_| terminated("closed the connection at once", Sent::No))?;
        let fresh = Connection { sender, glance, until: Instant::now(), _room: room };
        self.exchange(fresh, request).await.map_err(|(error, unsent)| failed(&error, unsent.is_some()))
    }

    async fn exchange(
        &self,
        mut connection: Connection,
        request: Request<Body>,
    ) -> Result<Response<Guarded<super::Place>>, (hyper::Error, Option<Box<Request<Body>>>)> {
        match connection.sender.try_send_request(request).await {
            Ok(response) => {
                let keep = keep_alive(response.headers()).map_or(self.keep, |said| said.min(self.keep));
                let place = Place { connection: Some(connection), keep, idle: self.idle.clone() };
                Ok(response.map(|body| Guarded::new(Body::from(body), super::Place::Http1(place))))
            }
            Err(mut failed) => {
                let unsent = failed.take_message().map(Box::new);
                Err((failed.into_error(), unsent))
            }
        }
    }
}

impl Idle {
    /// The newest that can be used: the others then come to the end of their time. Only those are looked at that are newer, for
    /// a look is a call of the kernel; and all of them, if a new one is to take the place of one that is over.
    fn take(&self) -> Option<Connection> {
        let (mut kept, now) = (self.lock(), Instant::now());
        for at in (0..kept.connections.len()).rev() {
            let connection = &kept.connections[at];
            // Its request is still being written, though its answer has ended: whoever took it would wait for an upload.
            if !connection.is_over(now) && !connection.sender.is_ready() {
                continue;
            }
            let connection = kept.connections.remove(at);
            if !connection.is_over(now) && connection.glance.is_quiet() {
                return Some(connection);
            }
        }
        None
    }

    fn clear(&self) {
        self.lock().connections.clear();
    }

    fn put(self: &Arc<Self>, connection: Connection) {
        let mut kept = self.lock();
        if kept.connections.len() >= MAX_IDLE {
            // One that somebody's upload holds is no use to anybody.
            kept.connections.retain(|connection| connection.sender.is_ready());
        }
        if kept.connections.len() < MAX_IDLE {
            kept.connections.push(connection);
        }
        if !std::mem::replace(&mut kept.swept, true) {
            let idle = self.clone();
            tokio::spawn(async move { idle.sweep().await });
        }
    }

    /// Closes connections in time, as long as there are any: a service has better use for its end.
    async fn sweep(&self) {
        loop {
            let next = {
                let (mut kept, now) = (self.lock(), Instant::now());
                kept.connections.retain(|connection| !connection.is_over(now));
                kept.swept = !kept.connections.is_empty();
                match kept.connections.iter().map(|connection| connection.until).min() {
                    Some(next) => next,
                    None => return,
                }
            };
            tokio::time::sleep_until(next.into()).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A connection that carries an answer. Kept for the next request if the answer ends whole; else it closes, which is how
/// HTTP/1.1 tells the service that nobody wants the rest.
pub(crate) struct Place {
    connection: Option<Connection>,
    keep: Duration,
    idle: Arc<Idle>,
}

impl Place {
    pub(super) fn ended(&mut self) {
        if let Some(mut connection) = self.connection.take().filter(|c| !c.sender.is_closed()) {
            connection.until = Instant::now() + self.keep;
            self.idle.put(connection);
        }
    }
}

/// How long the service says that it keeps the connection, with room for what is on its way meanwhile.
fn keep_alive(fields: &HeaderMap) -> Option<Duration> {
    let said = fields.get("keep-alive")?.to_str().ok()?;
    let seconds = said.split([',', ';']).find_map(|part| part.trim().strip_prefix("timeout=")?.trim().parse().ok())?;
    let said = Duration::from_secs(seconds);
    Some(said.saturating_sub(MARGIN).max(said / 4))
}

/// HTTP/1.1 wants the path as the target and the authority in Host.
fn origin_form(mut request: Request<Body>) -> Request<Body> {
    normal::join_cookies(request.headers_mut());
    let host = request.uri().authority().and_then(|a| http::HeaderValue::from_str(a.as_str()).ok());
    if let Some(host) = host {
        request.headers_mut().insert(header::HOST, host);
    }
    if let Some(target) = request.uri().path_and_query().cloned() {
        *request.uri_mut() = http::Uri::from(target);
    }
    // hyper takes a GET without a length for one without a body.
    if !http_body::Body::is_end_stream(request.body()) && !request.headers().contains_key(header::CONTENT_LENGTH) {
        let chunked = http::HeaderValue::from_static("chunked");
        request.headers_mut().insert(header::TRANSFER_ENCODING, chunked);
    }
    *request.version_mut() = Version::HTTP_11;
    request
}

fn copy_bodiless(request: &Request<Body>) -> Request<Body> {
    let mut copy = Request::new(Body::empty());
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    copy.headers_mut().clone_from(request.headers());
    copy.extensions_mut().clone_from(request.extensions());
    copy
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_service_says_of_its_patience_is_believed() {
        let of = |text: &str| {
            let fields = [(header::HeaderName::from_static("keep-alive"), text.parse().unwrap())];
            keep_alive(&HeaderMap::from_iter(fields))
        };
        assert_eq!(of("timeout=5"), Some(Duration::from_secs(4)));
        assert_eq!(of("max=100, timeout=5"), Some(Duration::from_secs(4)));
        assert_eq!(of("timeout=1"), Some(Duration::from_millis(250)));
        assert_eq!(of("timeout=0"), Some(Duration::ZERO));
        assert_eq!(of("max=100"), None);
        assert_eq!(of("timeout=x"), None);
    }
}
