//! HTTP/2 to the service: as few connections as carry the calls.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use http::{Request, Response, Version};
use hyper::{
    body::Incoming,
    client::conn::http2::{Builder, SendRequest},
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use starling_http::{
    Body, Guarded, Shelf,
    tunnel::{End, Protocol},
};
use tokio::sync::Notify;

use super::{Connections, Dialler, LocalError, MAX_HEAD_BYTES, Room, TunnelPlace, carry, failed, not_switched};
use crate::{Sent, inbound::limiter::Admitted};

/// What one answer may hold that nobody reads.
const STREAM_WINDOW_BYTES: u32 = 64 << 10;
/// The same of all answers on a connection: so much that the streams' own windows end first.
const CONNECTION_WINDOW_BYTES: u32 = STREAM_WINDOW_BYTES * MAX_STREAMS as u32;
/// What those may hold that stand still.
const STANDING_BYTES: u64 = 32 << 20;
/// Calls at once on a connection whose service has not said yet how many it takes; it says so at once.
const UNTOLD: usize = 1;
const SAYS_WITHIN: Duration = Duration::from_millis(100);
/// Calls at once on a connection, whatever the service says.
const MAX_STREAMS: usize = 4096;

/// A connection without calls is closed after so long, looked at as often.
const IDLE: Duration = Duration::from_secs(60);

/// The connections. More than one if the service takes fewer calls on one than there are.
pub(super) struct Pool {
    shelf: Shelf,
    connections: Arc<Mutex<Vec<Arc<Connection>>>>,
    /// Held across a dial on purpose: whoever comes meanwhile wants this very connection, or shares in it that there is none. With when
    /// a dial last failed, and why.
    dialling: tokio::sync::Mutex<Option<(Instant, LocalError)>>,
}

struct Connection {
    sender: SendRequest<Body>,
    /// Calls at once that the service takes, as it last said.
    room: Arc<AtomicUsize>,
    /// It has said that it takes extended CONNECT (RFC 8441 §3).
    takes_protocols: Arc<AtomicBool>,
    in_flight: AtomicUsize,
    _place: Room,
}

/// A call on a connection; given back when dropped.
pub(crate) struct Place(Arc<Connection>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Relaxed);
    }
}

impl Connection {
    /// A place on it, if the service takes one more call.
    fn enter(self: &Arc<Self>) -> Option<Place> {
        let room = self.room.load(Relaxed).min(MAX_STREAMS);
        let entered = self.in_flight.fetch_update(Relaxed, Relaxed, |n| (n < room).then_some(n + 1));
        entered.is_ok().then(|| Place(self.clone()))
    }
}

impl Default for Pool {
    fn default() -> Self {
        let shelf = Shelf::new(STANDING_BYTES, STREAM_WINDOW_BYTES.into());
        Self { shelf, connections: Arc::default(), dialling: tokio::sync::Mutex::default() }
    }
}

impl Pool {
    pub(super) async fn send(
        &self,
        dialler: &Dialler,
        mut request: Request<Body>,
    ) -> Result<Response<Guarded<super::Place>>, LocalError> {
        *request.version_mut() = Version::HTTP_2;
        let (response, place) = self.sent(dialler, request).await?;
        let place = super::Place::Http2 { _place: place };
        Ok(response.map(|body| Guarded::new(Body::of_http2_server(body).shelved(&self.shelf), place)))
    }

    /// Sends a request; once more, over another connection, if it comes back untouched because the service has just said that it
    /// ends the first one, as those do that end them by their age.
    async fn sent(
        &self,
        dialler: &Dialler,
        mut request: Request<Body>,
    ) -> Result<(Response<Incoming>, Place), LocalError> {
        let is_tunnel = request.extensions().get::<hyper::ext::Protocol>().is_some();
        let mut is_first = true;
        loop {
            let place = self.place(dialler).await?;
            let mut sender = place.0.sender.clone();
            sender.ready().await.map_err(|error| failed(&error, true))?;
            if is_tunnel && !place.0.takes_protocols.load(Relaxed) {
                return Err(not_switched("it has not said that it takes extended CONNECT", Sent::No));
            }
            match sender.try_send_request(request).await {
                Ok(response) => return Ok((response, place)),
                Err(mut error) => match error.take_message() {
                    Some(unsent) if std::mem::take(&mut is_first) => {
                        self.lock().retain(|other| !Arc::ptr_eq(other, &place.0));
                        request = unsent;
                    }
                    message => {
                        let unsent = message.is_some() || starling_http::was_refused(error.error());
                        return Err(failed(error.error(), unsent));
                    }
                },
            }
        }
    }

    /// Asks the service to change protocols on a stream (RFC 8441). Only for WebSocket, whose ends say themselves when they have said
    /// all: the library ends such a stream in the same way whether it was cut or complete.
    pub(super) async fn switch(
        &self,
        dialler: &Dialler,
        request: Request<Body>,
        admitted: Admitted,
    ) -> Result<Response<Guarded<super::Place>>, LocalError> {
        let (mut parts, upload) = request.into_parts();
        let protocol = parts.extensions.remove::<Protocol>().filter(Protocol::is_websocket);
        let protocol =
            protocol.ok_or_else(|| not_switched("over HTTP/2 it can be asked for WebSocket only", Sent::No))?;
        parts.version = Version::HTTP_2;
        parts.extensions.insert(hyper::ext::Protocol::from(protocol.0.as_str()));
        let (mut response, place) = self.sent(dialler, Request::from_parts(parts, Body::empty())).await?;
        let place: TunnelPlace = Arc::new((place, admitted));
        if !response.status().is_success() {
            return Ok(
                response.map(|body| Guarded::new(Body::of_http2_server(body), super::Place::Tunnel { _place: place }))
            );
        }
        let upgraded = hyper::upgrade::on(&mut response).await;
        let upgraded = upgraded.map_err(|error| not_switched(&error.to_string(), Sent::Maybe))?;
        let (answer, writing) = End::of(TokioIo::new(upgraded)).divide();
        carry(writing, upload, Some(&protocol), place.clone());
        Ok(response.map(|_| Guarded::new(answer, super::Place::Tunnel { _place: place })))
    }

    /// A place on a connection that is there, here or at another worker, or on a new one.
    async fn place(&self, dialler: &Dialler) -> Result<Place, LocalError> {
        let elsewhere = |all: &Connections| match all {
            Connections::Http2(pool) => pool.enter(),
            _ => None,
        };
        if let Some(place) = self.enter().or_else(|| dialler.borrow(elsewhere)) {
            return Ok(place);
        }
        let asked = Instant::now();
        let mut last = self.dialling.lock().await;
        if let Some(place) = self.enter() {
            return Ok(place);
        }
        if let Some((at, error)) = &*last
            && *at >= asked
        {
            return Err(error.clone());
        }
        let dialled = self.dial(dialler).await;
        *last = dialled.as_ref().err().map(|error| (Instant::now(), error.clone()));
        dialled
    }

    /// A place on a connection that is there.
    fn enter(&self) -> Option<Place> {
        let mut connections = self.lock();
        connections.retain(|connection| !connection.sender.is_closed());
        connections.iter().find_map(Connection::enter)
    }

    async fn dial(&self, dialler: &Dialler) -> Result<Place, LocalError> {
        let (stream, place) = dialler.dial().await?;
        let (sender, mut connection) = Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_max_send_streams(UNTOLD)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_header_list_size(MAX_HEAD_BYTES as u32)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|e| failed(&e, true))?;
        let (room, told) = (Arc::new(AtomicUsize::new(UNTOLD)), Arc::new(Notify::new()));
        let takes_protocols = Arc::<AtomicBool>::default();
        let (of, tell, service, takes) = (room.clone(), told.clone(), dialler.addr, takes_protocols.clone());
        tokio::spawn(poll_fn(move |cx| {
            let ended = Pin::new(&mut connection).poll(cx);
            let most = connection.current_max_send_streams();
            takes.store(connection.is_extended_connect_protocol_enabled(), Relaxed);
            if of.swap(most, Relaxed) != most || ended.is_ready() {
                tell.notify_one();
            }
            ended.map(|ended| {
                if let Some(offence) = ended.err().as_ref().and_then(starling_http::offence) {
                    tracing::warn!(%service, offence, "ended a connection to a service, with all calls on it");
                }
            })
        }));
        let _ = tokio::time::timeout(SAYS_WITHIN, told.notified()).await;
        let in_flight = AtomicUsize::new(1);
        let connection = Arc::new(Connection { sender, room, takes_protocols, in_flight, _place: place });
        self.lock().push(connection.clone());
        tokio::spawn(close_when_idle(Arc::downgrade(&self.connections), Arc::downgrade(&connection)));
        Ok(Place(connection))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Connection>>> {
        lock(&self.connections)
    }
}

/// Closes a connection that had no calls twice in a row.
async fn close_when_idle(all: Weak<Mutex<Vec<Arc<Connection>>>>, connection: Weak<Connection>) {
    let mut idle_before = false;
    loop {
        tokio::time::sleep(IDLE).await;
        let (Some(all), Some(connection)) = (all.upgrade(), connection.upgrade()) else { return };
        let mut all = lock(&all);
        let is_idle = connection.in_flight.load(Relaxed) == 0;
        if is_idle && idle_before || connection.sender.is_closed() {
            return all.retain(|other| !Arc::ptr_eq(other, &connection));
        }
        idle_before = is_idle;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
