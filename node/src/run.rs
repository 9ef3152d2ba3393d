//! A running node: composition of identity, gossip, endpoints, listeners and the admin API, and the order of its end.

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use starling_gossip::{Announcement, Gossip, GossipHandle, Ident, MemberView, Memory, Snapshot};
use starling_http::{Drain, pseudonym};
use starling_protocol::{
    CloseCode, DocumentEdition, JoinToken, Name, NodeKind, Phase, ServiceRecord, ServiceState, TokenError,
    admin as json, alpn,
};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

use crate::{
    Documents, MeshClient, Metrics,
    admin::{self, ExtraRoutes, Subject},
    call::connect::Pool,
    config::Config,
    identity::tls::{self, Peer},
    identity::{
        Identity, RecordCredentials,
        admission::Admission,
        authority::{Authority, SharedAuthority},
        join::{Application, JoinError, join},
        load_or_create_key, renewal, unix_now,
    },
    inbound::Inbound,
    inbound::health,
    mesh::documents,
    mesh::links::Links,
    mesh::survey,
    observe::metrics::GossipFigures,
    outbound::Outbound,
    port::endpoint::{CONTROL, FIRST_WORKER, MeshEndpoint, Room, load_or_create_reset_key},
    port::reuseport,
    state::{StateDir, StateError, StateLock},
};

/// How long peers get to take in that this node drains, before its connections say so.
const DRAIN_GRACE: Duration = Duration::from_millis(300);
/// How long the good-bye may take to leave the sockets.
const LEAVE_GRACE: Duration = Duration::from_millis(300);
/// A node that finds nobody is ready anyway after this long: what it serves itself can be called.
const LONELY_READY: Duration = Duration::from_secs(5);
/// Connections of one endpoint on the mesh port.
const ROOM: Room = Room { connections: 20_000, unproven: 2_000 };
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a member may take to answer an operator's ping.
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// How often seeds' names are resolved again.
const RESOLVE_PERIOD: Duration = Duration::from_secs(10);

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Settings that make no sense together.
    #[error("{key}: {problem}")]
    Config {
        /// Which.
        key: String,
        /// What to do.
        problem: String,
    },
    /// No state directory.
    #[error("no state directory; give --state DIR")]
    NoState,
    /// No identity and no way to get one.
    #[error(
        "{path} holds no identity, and there is no token to join with; give --token (see `starling token create`), or run \
         `starling init` to make a new mesh"
    )]
    NoToken {
        /// The directory.
        path: String,
    },
    /// The token file.
    #[error("cannot read the token file {path}")]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The token.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The join.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The certificate does not cover what the node is to serve.
    #[error(
        "the certificate of {name} does not grant service {service}; join again with --token from \
         `starling token create --service {service}`"
    )]
    NotGranted {
        /// The node.
        name: Name,
        /// The service.
        service: Name,
    },
    /// The certificate is not an edge's.
    #[error("the certificate of {name} is not an edge's; join again with --token from `starling token create --edge`")]
    NotAnEdge {
        /// The node.
        name: Name,
    },
    /// The state directory belongs to a node of another name.
    #[error("this state directory belongs to node {stored}; start it as --name {stored}, or give another --state")]
    OtherName {
        /// Whose it is.
        stored: Name,
    },
    /// A file.
    #[error(transparent)]
    State(#[from] StateError),
    /// An address.
    #[error("cannot listen on {what} {addr}: {hint}")]
    Bind {
        /// What for.
        what: &'static str,
        /// Where.
        addr: SocketAddr,
        /// What to do.
        hint: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl StartError {
    /// An address that cannot be listened on.
    pub fn bind(what: &'static str, addr: SocketAddr, source: io::Error) -> Self {
        let hint = match source.kind() {
            io::ErrorKind::AddrInUse => "another process has the port; stop it or choose another port",
            io::ErrorKind::AddrNotAvailable => "no interface of this host has the address",
            io::ErrorKind::PermissionDenied => "not permitted; ports below 1024 need CAP_NET_BIND_SERVICE",
            _ => "the system refused",
        };
        Self::Bind { what, addr, hint: hint.into(), source }
    }
}

/// A running node. Dropping it does not stop it; [`Node::drain`] does.
pub struct Node {
    shared: Arc<Shared>,
    worker: Worker,
    endpoints: [MeshEndpoint; 2],
    drain_asked: CancellationToken,
    _lock: StateLock,
}

struct Shared {
    identity: Arc<Identity>,
    authority: SharedAuthority,
    gossip: GossipHandle,
    links: Links,
    documents: Documents,
    client: MeshClient,
    inbound: Inbound,
    metrics: Metrics,
    drain: Drain,
    drain_asked: CancellationToken,
    generation: u64,
    kind: NodeKind,
    listen: SocketAddr,
    advertise: SocketAddr,
    outbound: Option<SocketAddr>,
    started: Instant,
    met_somebody: AtomicBool,
    /// Where to look for the mesh, `host:port`; a reload may change it.
    seeds: watch::Sender<Vec<String>>,
    /// What this node was started with, to tell what a reload cannot change.
    config: Config,
    extra: Mutex<Extra>,
}

#[derive(Default)]
struct Extra {
    routes: Option<Arc<dyn ExtraRoutes>>,
    reload: Option<Box<dyn Fn() -> Result<(), String> + Send>>,
    reload_error: Option<String>,
}

impl Node {
    /// Binds, joins if need be, and starts. Nothing of a join is spent before every address is bound.
    pub async fn start(config: &Config, kind: NodeKind) -> Result<Self, StartError> {
        if let Some((key, problem)) = config.problems().into_iter().next() {
            return Err(StartError::Config { key, problem });
        }
        let state = StateDir::open(config.node.state.clone().ok_or(StartError::NoState)?)?;
        let lock = state.lock()?;

        let listen = config.node.listen;
        let mut sockets = reuseport::bind_group(listen, 2)
            .map_err(|e| StartError::bind("the mesh port (UDP)", listen, e))?
            .into_iter();
        let (Some(control_socket), Some(worker_socket)) = (sockets.next(), sockets.next()) else {
            return Err(StartError::bind("the mesh port (UDP)", listen, io::ErrorKind::Other.into()));
        };
        let bound = control_socket.local_addr().map_err(|e| StartError::bind("the mesh port (UDP)", listen, e))?;
        let admin_listener = bind_tcp("the admin API", config.admin.listen)?;
        let outbound_listener = config.outbound.listen.map(|addr| bind_tcp("the outbound port", addr)).transpose()?;
        let upstream_listeners = config
            .upstream
            .iter()
            .map(|u| Ok((u.service.clone(), bind_tcp("an upstream port", u.listen)?)))
            .collect::<Result<Vec<_>, StartError>>()?;
        let advertise = advertised(config, bound);

        let authority = Authority::load(&state)?.map(|a| Arc::new(a.with_cert_life(config.node.cert_ttl)));
        let (identity, peers_told) = establish_identity(config, kind, &state, &authority).await?;
        // A join may just have made this node an issuer.
        let authority = match authority {
            Some(authority) => Some(authority),
            None => Authority::load(&state)?.map(|a| Arc::new(a.with_cert_life(config.node.cert_ttl))),
        };
        let identity = Arc::new(identity);
        let generation = next_generation(&state)?;
        let reset_key = load_or_create_reset_key(&state)?;
        let io_error = |e| StartError::bind("the mesh port (UDP)", listen, e);

        let control = MeshEndpoint::new(control_socket, CONTROL, &identity, &reset_key).map_err(io_error)?;
        let worker = Worker::start();
        let worker_endpoint = {
            let _runtime = worker.handle.enter();
            MeshEndpoint::new(worker_socket, FIRST_WORKER, &identity, &reset_key).map_err(io_error)?
        };

        let me = Ident { id: identity.id(), addr: advertise, generation };
        let mut remembered = remembered_peers(&state);
        remembered.extend(peers_told);
        let (documents, kept) = Documents::open(&state)?;
        let (contacts, known_contacts) = watch::channel(remembered.clone());
        let gossip = Gossip::new(
            me,
            announcement(config, kind, &identity, &authority),
            Box::new(RecordCredentials(identity.clone())),
            Memory { peers: remembered, documents: kept.newest, floors: kept.floors },
            &starling_gossip::Config::new(config.gossip.profile),
            (Instant::now(), unix_now()),
        );
        let (gossip, outgoing) = starling_gossip::spawn(gossip);
        let links = Links::new(identity.clone(), control.clone(), gossip.clone(), documents.clone());
        tokio::spawn(links.clone().run(outgoing, gossip.durable(), state.clone()));
        tokio::spawn(documents.clone().run(gossip.durable()));

        let metrics = Metrics::new();
        let own = pseudonym(identity.name());
        let pool = Arc::new(Pool::new(identity.clone(), worker_endpoint.clone()));
        let client = MeshClient::new(gossip.watch(), pool, config.node.zone.clone(), own.clone());
        let inbound = Inbound::new(&config.service, own, metrics.clone());
        let drain = Drain::default();
        let drain_asked = CancellationToken::new();
        let shared = Arc::new(Shared {
            authority: authority.clone(),
            gossip: gossip.clone(),
            links: links.clone(),
            documents,
            client: client.clone(),
            inbound: inbound.clone(),
            metrics: metrics.clone(),
            drain: drain.clone(),
            drain_asked: drain_asked.clone(),
            generation,
            kind,
            listen: bound,
            advertise,
            outbound: outbound_listener.as_ref().and_then(|l| l.local_addr().ok()),
            started: Instant::now(),
            met_somebody: AtomicBool::new(false),
            seeds: watch::Sender::new(config.node.seeds.clone()),
            config: config.clone(),
            extra: Mutex::default(),
            identity: identity.clone(),
        });

        let admission = Admission { identity, authority, gossip: gossip.clone(), endpoint: control.clone() };
        let doors = Doors { shared: shared.clone(), admission: admission.clone() };
        tokio::spawn(doors.clone().accept(control.listening.clone()));
        worker.handle.spawn(doors.accept(worker_endpoint.listening.clone()));
        tokio::spawn(renewal::run(admission, state.clone(), known_contacts));
        tokio::spawn(resolve_seeds(shared.seeds.subscribe(), gossip.clone(), contacts));
        tokio::spawn(keep_house(shared.clone()));
        health::spawn(&config.service, &gossip);

        let admin_listener =
            tokio_listener(admin_listener).map_err(|e| StartError::bind("the admin API", config.admin.listen, e))?;
        tokio::spawn(admin::serve_tcp(admin_listener, shared.clone()));
        let (socket, subject) = (state.path().join("admin.sock"), shared.clone());
        tokio::spawn(async move { admin::serve_unix(&socket, subject).await });

        let outbound = outbound_listener.map(|listener| (None, listener));
        for (service, listener) in outbound.into_iter().chain(upstream_listeners.into_iter().map(|(s, l)| (Some(s), l)))
        {
            let door = Outbound { client: client.clone(), service, metrics: metrics.clone() };
            let of = drain.clone();
            worker.handle.spawn(async move {
                match tokio_listener(listener) {
                    Ok(listener) => door.serve(listener, of).await,
                    Err(error) => tracing::error!(%error, "an outbound port"),
                }
            });
        }
        Ok(Self { shared, worker, endpoints: [control, worker_endpoint], drain_asked, _lock: lock })
    }

    /// Calls services from within this process, on the worker's thread.
    pub fn client(&self) -> &MeshClient {
        &self.shared.client
    }

    /// The thread that carries calls: listeners of an edge run there too.
    pub fn worker(&self) -> &tokio::runtime::Handle {
        &self.worker.handle
    }

    /// What listeners of an edge must take part in.
    pub fn drain_signal(&self) -> &Drain {
        &self.shared.drain
    }

    /// Mesh documents, to follow.
    pub fn documents(&self) -> &Documents {
        &self.shared.documents
    }

    /// Where metrics are counted.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Name of the node.
    pub fn name(&self) -> &Name {
        self.shared.identity.name()
    }

    /// Address of the mesh port.
    pub fn listen(&self) -> SocketAddr {
        self.shared.listen
    }

    /// Adds an edge's routes to the admin API.
    pub fn set_admin_routes(&self, routes: Arc<dyn ExtraRoutes>) {
        self.shared.extra().routes = Some(routes);
    }

    /// Says what a reload does.
    pub fn set_reload(&self, reload: impl Fn() -> Result<(), String> + Send + 'static) {
        self.shared.extra().reload = Some(Box::new(reload));
    }

    /// A function that takes a changed configuration, for [`Node::set_reload`]: seeds, zone, and version and weight of the
    /// services change at once. It refuses what only a restart can change, and then changes nothing.
    pub fn reconfigurer(&self) -> impl Fn(&Config) -> Result<(), String> + Send + Sync + use<> {
        let (shared, runtime) = (self.shared.clone(), tokio::runtime::Handle::current());
        move |config| shared.reconfigure(config, &runtime)
    }

    /// Reloads the configuration; on an error the old one stays.
    pub fn reload(&self) -> Result<(), String> {
        self.shared.reload()
    }

    /// The same, for those who outlive a borrow of the node: file watchers.
    pub fn reloader(&self) -> impl Fn() -> Result<(), String> + Send + Sync + use<> {
        let shared = self.shared.clone();
        move || shared.reload()
    }

    /// Resolves when the admin API was asked to drain. Cancel safe.
    pub async fn drain_asked(&self) {
        self.drain_asked.cancelled().await;
    }

    /// Goes away in order: not ready, record says draining, grace, GOAWAY, calls finish or are cut, good-bye, close.
    /// Returns whether every call finished by itself.
    pub async fn drain(&self, patience: Duration) -> bool {
        let shared = &self.shared;
        self.drain_asked.cancel();
        shared.gossip.announce(|a| a.phase = Phase::Draining).await;
        tokio::time::sleep(DRAIN_GRACE).await;
        let finished = shared.drain.finish(patience).await;
        shared.gossip.leave().await;
        tokio::time::sleep(LEAVE_GRACE).await;
        shared.documents.acquit();
        for endpoint in &self.endpoints {
            endpoint.close().await;
        }
        self.worker.stop.cancel();
        finished
    }
}

/// The data-plane thread with its runtime.
struct Worker {
    handle: tokio::runtime::Handle,
    stop: CancellationToken,
}

impl Worker {
    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("the system has resources for an event loop");
        let handle = runtime.handle().clone();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        std::thread::Builder::new()
            .name("worker-0".into())
            .spawn(move || runtime.block_on(stopped.cancelled()))
            .expect("the system has resources for a thread");
        Self { handle, stop }
    }
}

/// Takes connections on the mesh port and leads each to its protocol.
#[derive(Clone)]
struct Doors {
    shared: Arc<Shared>,
    admission: Admission,
}

impl Doors {
    async fn accept(self, endpoint: quinn::Endpoint) {
        while let Some(incoming) = endpoint.accept().await {
            let Some(incoming) = ROOM.admit(&endpoint, incoming) else { continue };
            let doors = self.clone();
            tokio::spawn(async move {
                match tokio::time::timeout(HANDSHAKE_TIMEOUT, incoming).await {
                    Ok(Ok(connection)) => doors.lead(connection).await,
                    Ok(Err(error)) => tracing::debug!(%error, "handshake"),
                    Err(_) => tracing::debug!("handshake timed out"),
                }
            });
        }
    }

    async fn lead(self, connection: quinn::Connection) {
        let protocol = tls::protocol_of(&connection).unwrap_or_default();
        if protocol == alpn::JOIN {
            return self.admission.serve(connection).await;
        }
        let peer = match Peer::of(&connection, &self.shared.identity) {
            Ok(peer) => peer,
            Err(error) => {
                tracing::info!(from = %connection.remote_address(), %error, "refused a connection");
                return connection.close((CloseCode::Unauthenticated as u32).into(), b"certificate required");
            }
        };
        let drain = self.shared.drain.clone();
        if protocol == alpn::CALLS {
            let inbound = self.shared.inbound.clone();
            let _ = drain.clone().spawn(inbound.serve(connection, peer, drain)).await;
        } else {
            self.shared.links.clone().accept(connection, peer).await;
        }
    }
}

impl Shared {
    fn extra(&self) -> std::sync::MutexGuard<'_, Extra> {
        self.extra.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn reconfigure(&self, new: &Config, runtime: &tokio::runtime::Handle) -> Result<(), String> {
        if let Some((key, problem)) = new.problems().into_iter().next() {
            return Err(format!("{key}: {problem}"));
        }
        let old = &self.config;
        let fixed = |c: &Config| {
            let services: Vec<_> =
                c.service.iter().map(|s| (s.name.clone(), s.addr, s.protocol, s.health.clone())).collect();
            let upstreams: Vec<_> = c.upstream.iter().map(|u| (u.service.clone(), u.listen)).collect();
            (
                services,
                upstreams,
                c.node.listen,
                c.node.advertise,
                c.node.name.clone(),
                c.admin.listen,
                c.outbound.listen,
            )
        };
        if fixed(old) != fixed(new) {
            let what = "name, addresses, and which services and upstreams there are";
            return Err(format!("{what} change only with a restart; nothing was changed"));
        }
        self.seeds.send_replace(new.node.seeds.clone());
        let (gossip, zone, services) = (self.gossip.clone(), new.node.zone.clone(), new.service.clone());
        runtime.spawn(async move {
            gossip
                .announce(move |a| {
                    a.zone = zone;
                    for service in services {
                        if let Some(own) = a.services.iter_mut().find(|s| s.name == service.name) {
                            (own.version, own.weight) = (service.version, service.weight);
                        }
                    }
                })
                .await;
        });
        Ok(())
    }

    fn phase(&self) -> &'static str {
        match () {
            () if self.drain_asked.is_cancelled() => "draining",
            () if self.is_ready() => "ready",
            () => "starting",
        }
    }
}

impl Subject for Shared {
    fn snapshot(&self) -> Arc<Snapshot> {
        self.gossip.snapshot()
    }

    fn client(&self) -> &MeshClient {
        &self.client
    }

    fn is_ready(&self) -> bool {
        let settled =
            self.seeds.borrow().is_empty() || self.met_somebody.load(Relaxed) || self.started.elapsed() > LONELY_READY;
        settled && !self.drain_asked.is_cancelled()
    }

    async fn status(&self) -> json::Status {
        let snapshot = self.snapshot();
        let live: Vec<_> = snapshot.members.iter().filter(|m| m.is_live()).collect();
        let ends = live.iter().filter_map(|m| m.record.as_ref()).map(|r| r.cert_expires).min().unwrap_or_default();
        json::Status {
            name: self.identity.name().clone(),
            id: self.identity.id().to_string(),
            mesh: self.identity.mesh().to_string(),
            spiffe_id: self.identity.mesh().spiffe_id(self.identity.name()),
            kind: self.kind,
            version: env!("CARGO_PKG_VERSION").into(),
            phase: self.phase().into(),
            listen: self.listen,
            advertise: self.advertise,
            outbound: self.outbound,
            generation: snapshot.me().map_or(self.generation, |m| m.generation),
            uptime_s: self.started.elapsed().as_secs(),
            cert_expires: admin::rfc3339(self.identity.validity().1),
            issuer: self.authority.is_some(),
            members_alive: live.len(),
            members: snapshot.members.len(),
            issuers_alive: live.iter().filter(|m| m.record.as_ref().is_some_and(|r| r.issuer.is_some())).count(),
            first_cert_expires: admin::rfc3339(ends),
            in_flight: self.client.in_flight() + self.inbound.in_flight(),
            doubt: self.gossip.counters().await.doubt,
            panicking: snapshot.panicking.clone(),
            unreachable_seeds: self.links.unreachable().iter().map(|(addr, why)| format!("{addr}: {why}")).collect(),
            reload_error: self.extra().reload_error.clone(),
        }
    }

    async fn metrics(&self) -> String {
        let left = self.identity.validity().1 as i64 - unix_now() as i64;
        let of_links = self.links.counters();
        let figures = GossipFigures {
            counters: self.gossip.counters().await,
            streams_refused: of_links.streams_refused.load(Relaxed),
            flood: of_links.flood.load(Relaxed),
            dropped: self.gossip.dropped(),
        };
        self.metrics.text(&self.snapshot(), &self.client, &figures, left)
    }

    async fn members(&self, detailed: bool) -> Vec<json::Member> {
        let mut members = admin::members(&self.snapshot());
        if detailed {
            let (links, details) = (self.links.views(), self.gossip.details().await);
            for member in members.iter_mut().filter(|m| !m.is_self) {
                let known = details.iter().find(|d| d.id.to_string() == member.id);
                let link = known.and_then(|d| links.get(&d.id));
                member.detail = Some(json::MemberDetail {
                    heard_ms_ago: known.and_then(|d| d.heard).map(|ago| ago.as_millis() as u64),
                    connection: link.map_or("none", |l| l.state).into(),
                    rtt_us: link.and_then(|l| l.rtt).map(|rtt| rtt.as_micros() as u64),
                    root: known.and_then(|d| d.root).map(|root| format!("{root:016x}")),
                });
            }
        }
        members
    }

    async fn views(&self) -> Vec<json::ObserverView> {
        survey::views(&self.snapshot(), &self.links).await
    }

    async fn documents(&self) -> Vec<json::Document> {
        survey::documents(&self.snapshot(), &self.links, &self.documents, &self.gossip.durable()).await
    }

    async fn publish(&self, new: json::NewDocument) -> Result<DocumentEdition, String> {
        let bytes = STANDARD.decode(&new.signed).map_err(|e| format!("the document is not base64: {e}"))?;
        let signed = starling_protocol::decode(&bytes).map_err(|e| format!("the document does not decode: {e}"))?;
        documents::publish(&self.gossip, signed).await.map_err(|e| e.to_string())
    }

    async fn ping(&self, node: &str) -> Result<json::Pinged, String> {
        let snapshot = self.snapshot();
        let member = find(&snapshot, node)?;
        if member.is_self {
            return Err(format!("{node} is this node itself"));
        }
        let started = Instant::now();
        let pong = tokio::time::timeout(PING_TIMEOUT, self.links.ping(member.ident(), None)).await;
        let pong = pong.map_err(|_| format!("{node} does not answer within {PING_TIMEOUT:?}"))?;
        let pong = pong.map_err(|e| format!("{node} does not answer: {e}"))?;
        let rtt_us = started.elapsed().as_micros() as u64;
        let name = admin::name_of(&snapshot, &member.id);
        Ok(json::Pinged { node: name, addr: member.addr, rtt_us, generation: pong.generation })
    }

    async fn forget(&self, node: &str, prune: bool) -> Result<(), String> {
        let id = find(&self.snapshot(), node)?.id;
        let outcome = self.gossip.forget(id, prune).await.ok_or("the node is going away")?;
        outcome.map_err(|e| format!("{node}: {e}"))
    }

    fn drain(&self) {
        self.drain_asked.cancel();
    }

    fn reload(&self) -> Result<(), String> {
        let mut extra = self.extra();
        let Some(reload) = &extra.reload else {
            let why = "this node was started without a configuration file; there is nothing to reload";
            tracing::warn!("{why}");
            return Err(why.into());
        };
        let outcome = reload();
        self.metrics.reloaded(outcome.is_ok());
        extra.reload_error = outcome.clone().err();
        match &outcome {
            Ok(()) => tracing::info!("configuration reloaded"),
            Err(error) => tracing::error!(error, "configuration not reloaded; the old one stays"),
        }
        outcome
    }

    fn extra(&self) -> Option<Arc<dyn ExtraRoutes>> {
        Shared::extra(self).routes.clone()
    }
}

fn find<'a>(snapshot: &'a Snapshot, node: &str) -> Result<&'a MemberView, String> {
    let by_id = || snapshot.members.iter().find(|m| m.id.to_string() == node);
    snapshot.named(node).or_else(by_id).ok_or_else(|| format!("no member has the name or id {node:?}"))
}

fn bind_tcp(what: &'static str, addr: SocketAddr) -> Result<std::net::TcpListener, StartError> {
    let listener = std::net::TcpListener::bind(addr).map_err(|e| StartError::bind(what, addr, e))?;
    listener.set_nonblocking(true).map_err(|e| StartError::bind(what, addr, e))?;
    Ok(listener)
}

fn tokio_listener(listener: std::net::TcpListener) -> io::Result<TcpListener> {
    TcpListener::from_std(listener)
}

/// The address that others are told: as configured, or as bound, or the one that this host uses towards its seeds.
fn advertised(config: &Config, bound: SocketAddr) -> SocketAddr {
    if let Some(advertise) = config.node.advertise {
        return advertise;
    }
    if !bound.ip().is_unspecified() {
        return bound;
    }
    // Connecting a UDP socket sends nothing; it only asks for the route. The fallback is a documentation address.
    let towards = config.node.seeds.first().map_or("192.0.2.1:7400", String::as_str);
    let local = std::net::UdpSocket::bind("0.0.0.0:0").and_then(|s| {
        s.connect(towards)?;
        s.local_addr()
    });
    let ip = local.map_or_else(|_| std::net::Ipv4Addr::LOCALHOST.into(), |addr| addr.ip());
    SocketAddr::new(ip, bound.port())
}

/// The stored identity, or one that the local issuer gives, or one for the token; and addresses that the mesh told.
async fn establish_identity(
    config: &Config,
    kind: NodeKind,
    state: &StateDir,
    authority: &SharedAuthority,
) -> Result<(Identity, Vec<SocketAddr>), StartError> {
    let provider = crate::identity::crypto_provider();
    let services: Vec<Name> = config.service.iter().map(|s| s.name.clone()).collect();
    let missing = |identity: &Identity| services.iter().find(|s| !identity.services().contains(s)).cloned();
    let stored = Identity::load(state, provider.clone())?;
    if let Some(stored) = &stored
        && config.node.name.as_ref().is_some_and(|name| name != stored.name())
    {
        return Err(StartError::OtherName { stored: stored.name().clone() });
    }
    let stored_name = stored.as_ref().map(|stored| stored.name().clone());
    let token = read_token(config)?;
    let is_fresh = |identity: &Identity| {
        // A certificate past its end and its grace cannot renew itself.
        unix_now() < identity.validity().1.saturating_add(tls::EXPIRED_GRACE.as_secs())
    };
    let may_be = |identity: &Identity| kind == NodeKind::Node || identity.is_edge();
    match stored {
        Some(stored) if missing(&stored).is_none() && may_be(&stored) && is_fresh(&stored) && authority.is_none() => {
            return Ok((stored, Vec::new()));
        }
        Some(stored) if authority.is_none() && token.is_none() => {
            if let Some(service) = missing(&stored) {
                return Err(StartError::NotGranted { name: stored.name().clone(), service });
            }
            if !may_be(&stored) {
                return Err(StartError::NotAnEdge { name: stored.name().clone() });
            }
            return Ok((stored, Vec::new()));
        }
        _ => {}
    }
    let name = config.node.name.clone().or(stored_name).unwrap_or_else(default_name);
    if let Some(authority) = authority {
        let key = load_or_create_key(state)?;
        let issued = authority.self_issue(&name, &services, kind == NodeKind::Edge, &key).map_err(JoinError::from)?;
        let (chain, root) = issued;
        return Ok((Identity::establish(state, key, chain, vec![root], provider)?, Vec::new()));
    }
    let token = token.ok_or_else(|| StartError::NoToken { path: state.path().display().to_string() })?;
    if kind == NodeKind::Edge && !token.claims.grants.edge {
        return Err(JoinError::from(starling_protocol::Refusal::NotGranted("an edge (--edge)".into())).into());
    }
    let application = Application { token: &token, name: &name, services: &services, seeds: &config.node.seeds };
    Ok(join(state, &application, provider).await?)
}

fn read_token(config: &Config) -> Result<Option<JoinToken>, StartError> {
    let text = match (&config.node.token, &config.node.token_file) {
        (Some(token), _) => token.clone(),
        (None, Some(path)) => match std::fs::read_to_string(path) {
            Ok(text) => text,
            // It is for the first start only, and may be gone by the second.
            Err(e) if e.kind() == io::ErrorKind::NotFound && has_identity(config) => return Ok(None),
            Err(source) => return Err(StartError::TokenFile { path: path.clone(), source }),
        },
        (None, None) => return Ok(None),
    };
    Ok(Some(text.parse()?))
}

fn has_identity(config: &Config) -> bool {
    config.node.state.as_ref().is_some_and(|state| state.join("identity/chain.pem").exists())
}

/// First label of the host name, as far as it can be a name.
fn default_name() -> Name {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let label = host.trim().split('.').next().unwrap_or_default().to_ascii_lowercase();
    label.parse().unwrap_or_else(|_| "node".parse().expect("a valid name"))
}

/// Higher than in any former life, also when the clock was set back; stored before anything is sent.
fn next_generation(state: &StateDir) -> Result<u64, StateError> {
    /// Others refuse what is further ahead of their clocks, so nobody has believed such a life.
    const MAX_AHEAD_S: u64 = 24 * 3600;
    let last: u64 = state.read_text("generation")?.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    let now = unix_now();
    let next = if last > now + MAX_AHEAD_S { now } else { now.max(last + 1) };
    state.write("generation", next.to_string().as_bytes())?;
    Ok(next)
}

fn remembered_peers(state: &StateDir) -> Vec<SocketAddr> {
    // A damaged list costs nothing but the way back through former peers.
    let bytes = state.read("peers.json").ok().flatten();
    bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

fn announcement(config: &Config, kind: NodeKind, identity: &Identity, authority: &SharedAuthority) -> Announcement {
    Announcement {
        name: identity.name().clone(),
        kind,
        zone: config.node.zone.clone(),
        issuer: authority.as_ref().map(|a| a.id()),
        services: config
            .service
            .iter()
            .map(|s| ServiceRecord {
                name: s.name.clone(),
                version: s.version.clone(),
                protocol: s.protocol.0,
                weight: s.weight,
                state: ServiceState::Up,
            })
            .collect(),
        phase: Phase::Up,
        cert_expires: identity.validity().1,
    }
}

/// Tells gossip, and whoever must find an issuer without gossip, where the seeds are.
async fn resolve_seeds(
    mut seeds: watch::Receiver<Vec<String>>,
    gossip: GossipHandle,
    contacts: watch::Sender<Vec<SocketAddr>>,
) {
    let remembered = contacts.borrow().clone();
    loop {
        let mut resolved = Vec::new();
        let names = seeds.borrow_and_update().clone();
        for seed in &names {
            match tokio::net::lookup_host(seed).await {
                Ok(addrs) => resolved.extend(addrs),
                Err(error) => tracing::warn!(seed, %error, "cannot resolve a seed; trying again"),
            }
        }
        contacts.send_replace([&resolved[..], &remembered].concat());
        gossip.set_seeds(resolved).await;
        if let Ok(Err(_)) = tokio::time::timeout(RESOLVE_PERIOD, seeds.changed()).await {
            return;
        }
    }
}

async fn keep_house(shared: Arc<Shared>) {
    let mut watch = shared.gossip.watch();
    while watch.changed().await.is_ok() {
        let snapshot = watch.borrow_and_update().clone();
        if snapshot.members.iter().any(|m| !m.is_self && m.is_live()) {
            shared.met_somebody.store(true, Relaxed);
        }
        shared.client.forget_strangers();
        shared.links.forget_unreachable(&snapshot.members.iter().filter(|m| m.is_live()).map(|m| m.addr).collect());
    }
}
