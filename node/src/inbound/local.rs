//! The service behind this node: a client of it over HTTP/1.1, HTTP/2 with prior knowledge, TCP or UDP.

mod http1;
mod http2;
mod tcp;
mod udp;

use std::{
    any::Any,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use http::{Request, Response, StatusCode};
use starling_http::{
    Body, Guard, Guarded, Problem, ProxyError,
    h1::ServerStream,
    tunnel::{self, Protocol as UpgradeTo, Writing},
};
use starling_protocol::Protocol;
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
};

use crate::{
    LimitSettings, Sent,
    call::{Kind, RetryBudget},
    config::ServiceConfig,
    inbound::limiter::{Admitted, Limiter, Settings},
    observe::packets::PacketCounts,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest head of a response, in bytes.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// A failed request to the local service, and whether the service may have acted on it.
#[derive(Clone)]
pub(crate) struct LocalError {
    pub(crate) sent: Sent,
    pub(crate) problem: Problem,
}

/// Client of one local service, for one worker. Cheap to clone.
#[derive(Clone)]
pub(crate) struct LocalService {
    service: Arc<State>,
    connections: Arc<Connections>,
}

/// What the workers share of a service.
struct State {
    dialler: Dialler,
    protocol: Protocol,
    keep_idle: Duration,
    limits: LimitSettings,
    repeats: Arc<Repeats>,
    in_flight: AtomicUsize,
    packets: Arc<PacketCounts>,
    calls: Arc<Limiter>,
    tunnels: Arc<Limiter>,
}

enum Connections {
    Http1(http1::Pool),
    Http2(http2::Pool),
    /// One a tunnel, kept by nobody.
    Tcp,
    /// A socket a tunnel.
    Udp,
}

impl LocalService {
    pub(crate) fn new(service: &ServiceConfig, packets: Arc<PacketCounts>) -> Self {
        let places = Arc::new(Semaphore::new(service.max_connections));
        let dialler = Dialler { addr: service.addr, places, connections: Mutex::default() };
        Self::with_own_connections(Arc::new(State {
            dialler,
            protocol: service.protocol.0,
            keep_idle: service.keep_idle,
            limits: service.limits(),
            repeats: Arc::default(),
            in_flight: AtomicUsize::new(0),
            packets,
            calls: Arc::new(Limiter::new(Settings {
                most: service.limits.calls,
                of_one: service.limits.calls,
                late: service.limits.adaptive.then_some(service.limits.late),
            })),
            // They stay for long, so that one peer must not have them all.
            tunnels: Arc::new(Limiter::new(Settings {
                most: service.max_connections,
                of_one: (service.max_connections * 3).div_ceil(4),
                late: None,
            })),
        }))
    }

    /// The same for another worker.
    pub(crate) fn for_another(&self) -> Self {
        Self::with_own_connections(self.service.clone())
    }

    fn with_own_connections(service: Arc<State>) -> Self {
        let connections = match service.protocol {
            Protocol::H2c => Connections::Http2(http2::Pool::default()),
            Protocol::Tcp => Connections::Tcp,
            Protocol::Udp => Connections::Udp,
            // Others cannot be configured.
            Protocol::Http1 | Protocol::Unknown(_) => {
                Connections::Http1(http1::Pool::new(service.keep_idle, service.repeats.clone()))
            }
        };
        let connections = Arc::new(connections);
        service.dialler.all().push(Arc::downgrade(&connections));
        Self { service, connections }
    }

    /// How long its answers may take, by its operator's word.
    pub(crate) fn limits(&self) -> &LimitSettings {
        &self.service.limits
    }

    /// Lets calls in.
    pub(crate) fn calls(&self) -> &Arc<Limiter> {
        &self.service.calls
    }

    /// Lets tunnels in, which have places of their own: they are many and idle, and would leave calls none.
    pub(crate) fn tunnels(&self) -> &Arc<Limiter> {
        &self.service.tunnels
    }

    /// Calls under way, of other nodes.
    pub(crate) fn in_flight(&self) -> &AtomicUsize {
        &self.service.in_flight
    }

    /// Requests that were sent a second time, because a kept connection turned out to be closed.
    pub(crate) fn repeated(&self) -> u64 {
        self.service.repeats.count.load(Relaxed)
    }

    /// What it takes.
    pub(crate) fn kind(&self) -> Kind {
        Kind::of_service(&self.service.protocol).unwrap_or_default()
    }

    /// Opens the tunnel that a request asks for, which is let in.
    pub(crate) async fn open(
        &self,
        request: Request<Body>,
        admitted: Admitted,
    ) -> Result<Response<Guarded<Place>>, LocalError> {
        let dialler = &self.service.dialler;
        match &*self.connections {
            Connections::Http1(_) => http1::switch(dialler, request, admitted).await,
            Connections::Http2(pool) => pool.switch(dialler, request, admitted).await,
            Connections::Tcp => tcp::open(dialler, request.into_body(), admitted).await,
            Connections::Udp => udp::open(dialler, &self.service.packets, request, admitted).await,
        }
    }

    /// Sends a request whose target is `http://authority/path`, to a service that takes HTTP.
    pub(crate) async fn send(&self, request: Request<Body>) -> Result<Response<Guarded<Place>>, LocalError> {
        match &*self.connections {
            Connections::Http1(pool) => pool.send(&self.service.dialler, request).await,
            Connections::Http2(pool) => pool.send(&self.service.dialler, request).await,
            Connections::Tcp | Connections::Udp => Err(not_http(&"it was not asked for HTTP")),
        }
    }

    /// Whether it can be connected to.
    pub(crate) async fn is_reachable(&self) -> bool {
        self.service.dialler.connect().await.is_ok()
    }
}

/// What the body of an answer holds at the service.
pub(crate) enum Place {
    Http1(http1::Place),
    Http2 {
        _place: http2::Place,
    },
    /// A tunnel, or an answer in place of one.
    Tunnel {
        _place: TunnelPlace,
    },
}

impl Guard for Place {
    fn ended(&mut self) {
        match self {
            Self::Http1(place) => place.ended(),
            Self::Http2 { .. } | Self::Tunnel { .. } => {}
        }
    }
}

/// Requests that are sent a second time are retries like others: a fifth of all and ten a second, and counted.
const REPEATS: f64 = 0.2;
const REPEATS_PER_SECOND: u32 = 10;

/// Those of one service.
#[derive(Default)]
struct Repeats {
    budget: RetryBudget,
    count: AtomicU64,
}

impl Repeats {
    fn allow(&self) -> bool {
        let allowed = self.budget.spend(REPEATS_PER_SECOND);
        self.count.fetch_add(u64::from(allowed), Relaxed);
        allowed
    }
}

/// Makes connections to the service, so many at a time over all workers.
struct Dialler {
    addr: SocketAddr,
    places: Arc<Semaphore>,
    /// Those of all workers.
    connections: Mutex<Vec<Weak<Connections>>>,
}

/// Room for one connection; given back with the last of whoever holds it.
type Room = Arc<OwnedSemaphorePermit>;

impl Dialler {
    fn all(&self) -> MutexGuard<'_, Vec<Weak<Connections>>> {
        self.connections.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Where there may be no more connections, one of another worker: what one keeps must not shut the others out.
    fn borrow<T>(&self, of: impl Fn(&Connections) -> Option<T>) -> Option<T> {
        if self.places.available_permits() > 0 {
            return None;
        }
        let all: Vec<_> = self.all().iter().filter_map(Weak::upgrade).collect();
        all.iter().find_map(|connections| of(connections))
    }

    async fn dial(&self) -> Result<(ServerStream, Room), LocalError> {
        let Ok(room) = self.places.clone().try_acquire_owned() else {
            let detail = "the service has as many connections as it may have";
            let problem = Problem::proxy(StatusCode::SERVICE_UNAVAILABLE, ProxyError::DestinationUnavailable, detail);
            return Err(LocalError { sent: Sent::No, problem: problem.retry_after(Duration::from_secs(1)) });
        };
        Ok((ServerStream::new(self.connect().await?), Arc::new(room)))
    }

    /// Connects without taking one of the places for calls.
    async fn connect(&self) -> Result<TcpStream, LocalError> {
        match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(self.addr)).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(not_connected(&error)),
            Err(_) => Err(refused("no answer".into())),
        }
    }
}

fn not_connected(error: &std::io::Error) -> LocalError {
    // Ours to mend, and not the service's: EMFILE, ENFILE.
    if matches!(error.raw_os_error(), Some(23 | 24)) {
        let detail = "this node is out of file descriptors; raise its limit (LimitNOFILE=, ulimit -n)";
        tracing::debug!(%error, detail);
        let problem = Problem::proxy(StatusCode::SERVICE_UNAVAILABLE, ProxyError::ProxyInternalError, detail);
        return LocalError { sent: Sent::No, problem: problem.retry_after(Duration::from_secs(1)) };
    }
    refused(error.to_string())
}

fn refused(why: String) -> LocalError {
    let detail = format!("the service does not accept connections: {why}");
    LocalError {
        sent: Sent::No,
        problem: Problem::proxy(StatusCode::BAD_GATEWAY, ProxyError::ConnectionRefused, detail),
    }
}

fn failed(error: &hyper::Error, unsent: bool) -> LocalError {
    if error.is_parse() || error.is_parse_too_large() {
        return not_http(error);
    }
    terminated(&error.to_string(), if unsent { Sent::No } else { Sent::Maybe })
}

fn not_http(why: &dyn std::fmt::Display) -> LocalError {
    let detail = format!("the service's answer is not valid HTTP: {why}");
    LocalError {
        sent: Sent::Maybe,
        problem: Problem::proxy(StatusCode::BAD_GATEWAY, ProxyError::HttpProtocolError, detail),
    }
}

fn not_switched(why: &str, sent: Sent) -> LocalError {
    let detail = format!("the service does not change protocols: {why}");
    LocalError { sent, problem: Problem::proxy(StatusCode::BAD_GATEWAY, ProxyError::HttpUpgradeFailed, detail) }
}

/// What a tunnel holds at its service, until both of its halves are over.
type TunnelPlace = Arc<dyn Any + Send + Sync>;

/// Writes what comes for a tunnel's end at the service, until it ends; `place` is held as long.
fn carry(writing: Writing, upload: Body, protocol: Option<&UpgradeTo>, place: TunnelPlace) {
    let patience = tunnel::patience_in(protocol);
    tokio::spawn(async move {
        writing.carry_to_server(upload, patience).await;
        drop(place);
    });
}

fn terminated(why: &str, sent: Sent) -> LocalError {
    let detail = format!("the service broke the connection: {why}");
    LocalError { sent, problem: Problem::proxy(StatusCode::BAD_GATEWAY, ProxyError::ConnectionTerminated, detail) }
}
