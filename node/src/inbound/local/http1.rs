//! HTTP/1.1 to the service: a connection for each call at a time, kept for the next one.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use http::{HeaderMap, Request, Response, StatusCode, header, request, uri};
use starling_http::{
    Body, Guarded, Head, Interim, Problem, ProxyError,
    h1::{self, ExchangeError, Outgoing, ServerStream, Switched},
    normal,
    tunnel::{self, Handshake, NotSwitched, Protocol},
};

use super::{Connections, Dialler, LocalError, REPEATS, Repeats, carry, not_http, not_switched, terminated};
use crate::{Sent, inbound::limiter::Admitted};

/// Connections kept for the next request, at most.
const MAX_IDLE: usize = 256;
/// We close so much before the service says that it will.
const MARGIN: Duration = Duration::from_secs(1);
/// How often kept connections are looked at, which the service may have closed.
const LOOK: Duration = Duration::from_secs(5);

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
    http: h1::Connection,
    /// Until when it may be used, once it is kept.
    until: Instant,
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
        self.repeats.budget.earn(REPEATS);
        let (mut parts, body) = request.into_parts();
        normal::join_cookies(&mut parts.headers);
        let head = head_of(&parts);
        // A kept connection may be closed by the service at the very moment it is used. Then the request comes back unsent,
        // or is sent once more if that is harmless: without a body, and idempotent.
        let repeatable = http_body::Body::is_end_stream(&body) && parts.method.is_idempotent();
        let mut outgoing = Outgoing::new(&head, body);
        let elsewhere = |all: &Connections| match all {
            Connections::Http1(pool) => pool.idle.take(),
            _ => None,
        };
        if let Some(kept) = self.idle.take().or_else(|| dialler.borrow(elsewhere)) {
            match self.exchange(kept, outgoing, head.interim).await {
                Ok(response) => return Ok(response),
                Err(error) => {
                    if matches!(error, ExchangeError::Unsent(_) | ExchangeError::Closed(_)) {
                        // What it went through, the others most likely did, too.
                        self.idle.clear();
                    }
                    outgoing = match error {
                        ExchangeError::Unsent(unsent) => *unsent,
                        ExchangeError::Closed(_) if repeatable && self.repeats.allow() => {
                            Outgoing::new(&head, Body::empty())
                        }
                        error => return Err(failed(&error)),
                    };
                }
            }
        }
        let (stream, room) = dialler.dial().await?;
        let fresh = Connection { http: h1::Connection::new(stream, room), until: Instant::now() };
        self.exchange(fresh, outgoing, head.interim).await.map_err(|error| failed(&error))
    }

    async fn exchange(
        &self,
        connection: Connection,
        request: Outgoing,
        interim: Option<&Interim>,
    ) -> Result<Response<Guarded<super::Place>>, ExchangeError> {
        let response = connection.http.exchange(request, interim).await?;
        Ok(self.placed(response, connection))
    }

    /// An answer, with its connection to be kept when it has ended.
    fn placed(&self, response: Response<Body>, connection: Connection) -> Response<Guarded<super::Place>> {
        let keep = keep_alive(response.headers()).map_or(self.keep, |said| said.min(self.keep));
        let place = Place { connection: Some(connection), keep, idle: self.idle.clone() };
        response.map(|body| Guarded::new(body, super::Place::Http1(place)))
    }
}

/// Asks the service to change protocols, on a connection of its own.
pub(super) async fn switch(
    dialler: &Dialler,
    request: Request<Body>,
    admitted: Admitted,
) -> Result<Response<Guarded<super::Place>>, LocalError> {
    let (mut parts, upload) = request.into_parts();
    normal::join_cookies(&mut parts.headers);
    let protocol = parts.extensions.remove::<Protocol>();
    let protocol = protocol.ok_or_else(|| not_switched("it speaks HTTP, and no other protocol was named", Sent::No))?;
    let handshake = protocol.is_websocket().then(Handshake::new);
    if let Some(handshake) = &handshake {
        handshake.put_into(&mut parts.headers);
    }
    let head = Head { protocol: Some(&protocol), ..head_of(&parts) };
    let request = Outgoing::new(&head, Body::empty());
    let connection = h1::Connection::new(ServerStream::new(dialler.connect().await?), Arc::new(admitted));
    match connection.switch(request, head.interim).await.map_err(|error| failed(&error))? {
        Switched::To(mut parts, end, place) => {
            let named = parts.headers.get(header::UPGRADE).and_then(|name| name.to_str().ok());
            if !named.is_some_and(|named| named.eq_ignore_ascii_case(&protocol.0)) {
                return Err(not_switched(&format!("it switched to {}", named.unwrap_or("nothing")), Sent::Maybe));
            }
            if handshake.is_some_and(|handshake| !handshake.is_accepted(&mut parts.headers)) {
                return Err(not_switched("its Sec-WebSocket-Accept is wrong", Sent::Maybe));
            }
            parts.status = tunnel::OPEN;
            let (answer, writing) = end.divide();
            carry(writing, upload, Some(&protocol), place.clone());
            Ok(Response::from_parts(parts, Guarded::new(answer, super::Place::Tunnel { _place: place })))
        }
        Switched::Not(mut response, connection) => {
            if response.status().is_success() {
                response.extensions_mut().insert(NotSwitched);
            }
            // It has a tunnel's place, and closes with its answer.
            let place = super::Place::Tunnel { _place: Arc::new(connection) };
            Ok(response.map(|body| Guarded::new(body, place)))
        }
    }
}

fn head_of(parts: &request::Parts) -> Head<'_> {
    Head {
        method: &parts.method,
        authority: parts.uri.authority().map_or("", uri::Authority::as_str),
        path: parts.uri.path_and_query().map_or("/", uri::PathAndQuery::as_str),
        fields: &parts.headers,
        protocol: None,
        interim: Interim::of(parts),
    }
}

fn failed(error: &ExchangeError) -> LocalError {
    match error {
        ExchangeError::Offence(offence) => not_http(offence),
        ExchangeError::Unsent(_) => terminated(&error.to_string(), Sent::No),
        ExchangeError::Closed(Some(why)) => terminated(&format!("{error}: {why}"), Sent::Maybe),
        ExchangeError::Closed(None) | ExchangeError::Upload(_) => terminated(&error.to_string(), Sent::Maybe),
        ExchangeError::Stalled => {
            let (status, detail) = (StatusCode::GATEWAY_TIMEOUT, format!("the service {error}"));
            LocalError { sent: Sent::Maybe, problem: Problem::proxy(status, ProxyError::HttpResponseTimeout, detail) }
        }
    }
}

impl Idle {
    /// The newest that can be used: the others then come to the end of their time. Only those are looked at that are newer, for
    /// a look is a call of the kernel.
    fn take(&self) -> Option<Connection> {
        let (mut kept, now) = (self.lock(), Instant::now());
        while let Some(connection) = kept.connections.pop() {
            if now < connection.until && connection.http.is_quiet() {
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
                kept.connections.retain(|connection| now < connection.until && connection.http.is_quiet());
                kept.swept = !kept.connections.is_empty();
                match kept.connections.iter().map(|connection| connection.until).min() {
                    Some(next) => next.min(now + LOOK),
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
        if let Some(http) = self.connection.take().and_then(|connection| connection.http.again()) {
            self.idle.put(Connection { http, until: Instant::now() + self.keep });
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

#[cfg(test)]
mod tests {
    use http::header;

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
