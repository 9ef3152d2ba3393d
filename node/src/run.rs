//! A running node: composition of identity, gossip, endpoints, listeners and the admin API, and the order of its end.

mod addresses;
mod error;
mod establish;
mod life;
mod reception;
mod reload;
mod subject;
mod succession;
mod upkeep;
mod worker;

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, atomic::AtomicBool},
    time::{Duration, Instant, SystemTime},
};

use starling_gossip::{Gossip, GossipHandle, Ident, Memory};
use starling_http::{Drain, accept::Sources, pseudonym, shared_port::Ports};
use starling_protocol::{Name, NodeKind, Phase};
use tokio::{
    sync::{oneshot, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    Documents, MeshClient,
    admin::{ExtraRoutes, Subject},
    call::{Calls, Introduction},
    config::Config,
    identity::{
        Identity, RecordCredentials,
        admission::Admission,
        authority::{Authority, SharedAuthority},
        renewal, unix_now,
    },
    inbound::{Inbound, condition::Condition, health},
    mesh::{announced::Announcements, fleet::Fleet, links::Links, reachability},
    observe::{
        caller_name,
        otlp::{self, Collectors, Export, ExportCounts},
        readings::Books,
        trace::Tracer,
    },
    outbound::{self, Complaints, Door, TcpDoor, UdpDoor},
    port::endpoint::{CONTROL, MeshEndpoint, Windows, load_or_create_reset_key},
    state::{StateDir, StateLock},
    takeover::Place,
};

pub use self::error::StartError;
pub(crate) use self::life::keep_peers;
use self::{
    addresses::{Bound, DoorFrame, Leads, MESH_PORT, tokio_listener},
    establish::{Established, establish_identity},
    life::{announcement, next_generation, remembered_peers, zone_of},
    reception::Reception,
    succession::Succession,
    upkeep::{resolve_seeds, take_stock},
    worker::Thread,
};
pub use self::{
    succession::{ENVIRONMENT as TAKEOVER_ENVIRONMENT, EXIT_WITH},
    worker::Worker,
};

/// How long peers get to take in that this node drains, before its connections say so.
const DRAIN_GRACE: Duration = Duration::from_millis(300);
/// How long the application has for its own calls at the end of a drain, whatever streams of others there are; of a short one, a
/// quarter.
const OWN_CALLS: Duration = Duration::from_secs(3);
/// How long the good-bye may take to leave the sockets.
const LEAVE_GRACE: Duration = Duration::from_millis(300);

/// A running node. Dropping it does not stop it; [`Node::drain`] does.
pub struct Node {
    running: Arc<Running>,
    workers: Vec<Worker>,
    /// Ends with the node.
    export: Mutex<Option<Export>>,
    /// Until the node is in charge.
    admin_listener: Mutex<Option<tokio::net::TcpListener>>,
    drain_asked: CancellationToken,
}

struct Running {
    identity: Arc<Identity>,
    authority: SharedAuthority,
    gossip: GossipHandle,
    links: Links,
    condition: Condition,
    documents: Documents,
    admission: Admission,
    control: MeshEndpoint,
    calls: Arc<Calls>,
    /// Of the control thread: it takes calls where nobody else can.
    inbound: Inbound,
    books: Books,
    /// Whether the last reload was taken.
    reloaded: AtomicBool,
    /// Of what takes calls from others, and from the public.
    drain: Drain,
    /// Of the application's doors, which last as long as calls that it may need them for.
    doors_drain: Drain,
    drain_asked: CancellationToken,
    state: StateDir,
    lock: StateLock,
    /// Where it listens, for a process that takes over.
    ports: Mutex<Ports>,
    succession: Succession,
    /// What only the process does that speaks for the node.
    duties: Mutex<JoinSet<()>>,
    generation: u64,
    kind: NodeKind,
    listen: SocketAddr,
    advertise: SocketAddr,
    outbound: Option<SocketAddr>,
    started: Instant,
    introduction: Introduction,
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
    /// Binds, joins if need be, and starts. Nothing of a join is spent before every address is bound. Where `place` is another
    /// process's, this one knows what there is in the mesh before its doors open; the other one goes on until
    /// [`Node::take_charge`].
    pub async fn start(config: &Config, kind: NodeKind, place: &mut Place) -> Result<Self, StartError> {
        if let Some((key, problem)) = config.problems().into_iter().next() {
            return Err(StartError::Config { key, problem });
        }
        // Keys are in this memory: no core dump of it, and no debugger of another process of the same user.
        if let Err(error) = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable) {
            tracing::debug!(%error, "this process can be dumped");
        }
        let collectors =
            match config.telemetry.collector().map_err(|(key, problem)| StartError::Config { key, problem })? {
                Some(settings) => {
                    Some(Collectors::new(&settings).map_err(|error| StartError::Collector(error.to_string()))?)
                }
                None => None,
            };
        let state = StateDir::open(config.node.state.clone().ok_or(StartError::NoState)?)?;
        let before = place.told().cloned();
        let lock = match place.take_lock() {
            None => state.lock()?,
            Some(shared) => state.shared_lock(shared)?,
        };
        let bound = Bound::all(config, place.ports())?;
        let Bound { listen, advertise, control_socket, worker_sockets, admin_listener, doors } = bound;

        let threads = (0..worker_sockets.len() as u8).map(Thread::start).collect::<io::Result<Vec<_>>>();
        let threads = threads.map_err(StartError::Threads)?;
        // The process before, if there is one, lets go of the gossip and the state.
        place.ready().await?;
        let ports = std::mem::take(place.ports());
        let known = before.as_ref().map_or(&[][..], |before| &before.health);

        let authority = Authority::load(&state)?.map(|a| Arc::new(a.with_cert_life(config.node.cert_ttl)));
        let Established { identity, peers: peers_told } = establish_identity(config, kind, &state, &authority).await?;
        // A join may just have made this node an issuer.
        let authority = match authority {
            Some(authority) => Some(authority),
            None => Authority::load(&state)?.map(|a| Arc::new(a.with_cert_life(config.node.cert_ttl))),
        };
        let identity = Arc::new(identity);
        let generation = next_generation(&state)?;
        let reset_key = load_or_create_reset_key(&state)?;
        let io_error = |e| StartError::bind(MESH_PORT, listen, e);

        let windows = Windows::of(config.gossip.profile);
        // Where ports cannot be shared, the main thread takes everything.
        let takes_calls = worker_sockets.iter().all(Option::is_none);
        let endpoint = |socket, index, takes_calls| {
            MeshEndpoint::new(socket, listen, ports.owned_by(index), takes_calls, &identity, &reset_key, windows)
                .map_err(io_error)
        };
        let control = endpoint(Some(control_socket), CONTROL, takes_calls)?;

        let me = Ident { id: identity.id(), addr: advertise, generation };
        let mut remembered = remembered_peers(&state);
        remembered.extend(peers_told);
        remembered.extend(before.iter().flat_map(|before| &before.peers));
        let knows_peers = !remembered.is_empty();
        let (documents, kept) = Documents::open(&state)?;
        let (contacts, known_contacts) = watch::channel(remembered.clone());
        let gossip = Gossip::new(
            me,
            announcement(config, kind, &identity, &authority, known),
            Arc::new(RecordCredentials(identity.clone())),
            Memory { peers: remembered, documents: kept.newest, floors: kept.floors },
            &starling_gossip::Config::new(config.gossip.profile),
            (Instant::now(), unix_now()),
        );
        let (gossip, outgoing) = starling_gossip::spawn(gossip);
        let links = Links::new(identity.clone(), control.clone(), gossip.clone(), documents.clone());
        tokio::spawn(links.clone().run(outgoing, gossip.durable(), state.clone()));

        let (tracer, recorded) = match collectors {
            Some(collectors) => {
                let (tracer, spans) = Tracer::recording(config.telemetry.sample);
                (tracer, Some((collectors, spans)))
            }
            None => Default::default(),
        };
        let counts = Arc::<ExportCounts>::default();
        let books = Books::new(
            caller_name(&identity.grants().services, identity.name()),
            threads.len(),
            tracer,
            counts.clone(),
        );
        let own = pseudonym(identity.name());
        let introduction = Introduction::new(!config.node.seeds.is_empty() || knows_peers);
        let calls = Arc::new(Calls::new(gossip.watch(), zone_of(config, &identity), own.clone(), introduction));
        let inbound = Inbound::new(&config.service, own, books.observer(), books.packets(), windows);
        let start = |((number, thread), socket): ((u8, Thread), _)| {
            let endpoint = thread.enter(|| endpoint(socket, CONTROL + 1 + number, true))?;
            let client = MeshClient::on(calls.clone(), identity.clone(), endpoint.clone());
            let observer = books.observer();
            let inbound = inbound.for_another(observer.clone());
            Ok(Worker { thread, number, endpoint, client, observer, inbound })
        };
        let workers = (0..).zip(threads).zip(worker_sockets).map(start).collect::<Result<Vec<_>, StartError>>()?;
        let condition = Condition::new(&config.service, gossip.clone(), known);
        let admission =
            Admission::new(identity.clone(), authority.clone(), gossip.clone(), documents.clone(), control.clone());
        let drain = Drain::default();
        let doors_drain = Drain::default();
        let drain_asked = CancellationToken::new();
        let running = Arc::new(Running {
            authority,
            gossip: gossip.clone(),
            links: links.clone(),
            documents,
            admission: admission.clone(),
            control: control.clone(),
            calls,
            inbound: inbound.clone(),
            books,
            reloaded: AtomicBool::new(true),
            drain: drain.clone(),
            doors_drain: doors_drain.clone(),
            drain_asked: drain_asked.clone(),
            state: state.clone(),
            lock,
            ports: Mutex::new(ports),
            succession: Succession::default(),
            duties: Mutex::default(),
            generation,
            kind,
            listen,
            advertise,
            outbound: doors.iter().find_map(DoorFrame::outbound_addr),
            started: Instant::now(),
            introduction,
            seeds: watch::Sender::new(config.node.seeds.clone()),
            config: config.clone(),
            extra: Mutex::default(),
            condition: condition.clone(),
            identity: identity.clone(),
        });

        let export = recorded.map(|(collectors, spans)| {
            let reader = running.clone();
            let sources = otlp::Sources {
                spans,
                counts,
                readings: move || {
                    let running = reader.clone();
                    async move { running.readings().await }
                },
                interval: config.telemetry.metrics_interval,
                resource: otlp::Resource::of(
                    identity.mesh().as_str(),
                    identity.name().as_str(),
                    &zone_of(config, &identity),
                ),
                since: SystemTime::now(),
                superseded: running.succession.superseded.clone(),
            };
            Export::start(collectors, sources)
        });
        let strangers = Sources::default();
        let reception = |inbound: &Inbound| Reception {
            running: running.clone(),
            inbound: inbound.clone(),
            admission: admission.clone(),
            strangers: strangers.clone(),
        };
        if let Some(listening) = control.listening() {
            tokio::spawn(reception(&inbound).accept(listening.clone(), 1));
        }
        for worker in &workers {
            tokio::spawn(worker::watch(worker.runtime().clone(), worker.number()));
            if let Some(listening) = worker.endpoint.listening() {
                worker.runtime().spawn(reception(&worker.inbound).accept(listening.clone(), workers.len()));
            }
        }
        tokio::spawn(renewal::run(admission.clone(), state.clone(), known_contacts));
        tokio::spawn(take_stock(
            running.clone(),
            workers.iter().map(|worker| (worker.runtime().clone(), worker.client.clone())).collect(),
        ));
        tokio::spawn(crate::memory::give_back());
        {
            let mut duties = running.duties();
            duties.spawn(running.documents.clone().run(gossip.durable()));
            duties.spawn(resolve_seeds(running.seeds.subscribe(), gossip.clone(), contacts));
            health::spawn(&config.service, &condition, &mut duties);
            duties.spawn(reachability::watch(gossip.clone(), links.clone(), condition));
        }
        if let Some(before) = before {
            // The ledger is the other process's until this one is in charge.
            running.succession.hold(admission.rest().await);
            running.meet_the_mesh(before.peers.len()).await?;
        }
        let admin_listener =
            tokio_listener(admin_listener).map_err(|e| StartError::bind("the admin API", config.admin.listen, e))?;

        for (nth, frame) in doors.into_iter().enumerate() {
            open_door(frame, nth, &workers, &running);
        }
        Ok(Self {
            running,
            workers,
            export: Mutex::new(export),
            drain_asked,
            admin_listener: Mutex::new(Some(admin_listener)),
        })
    }

    /// The threads that carry calls: listeners of an edge run there too.
    pub fn workers(&self) -> &[Worker] {
        &self.workers
    }

    /// What listeners of an edge must take part in.
    pub fn drain_signal(&self) -> &Drain {
        &self.running.drain
    }

    /// Mesh documents, to follow.
    pub fn documents(&self) -> &Documents {
        &self.running.documents
    }

    /// The edges of the mesh.
    pub fn fleet(&self) -> Fleet {
        let running = &self.running;
        Fleet::new(running.links.clone(), running.gossip.clone(), running.identity.id())
    }

    /// The versions of services, to follow.
    pub fn announcements(&self) -> Announcements {
        Announcements::new(&self.running.gossip)
    }

    /// Name of the node.
    pub fn name(&self) -> &Name {
        self.running.identity.name()
    }

    /// Address of the mesh port.
    pub fn listen(&self) -> SocketAddr {
        self.running.listen
    }

    /// The address that others are told.
    pub fn advertise(&self) -> SocketAddr {
        self.running.advertise
    }

    /// Adds an edge's routes to the admin API.
    pub fn set_admin_routes(&self, routes: Arc<dyn ExtraRoutes>) {
        self.running.extra().routes = Some(routes);
    }

    /// Says what a reload does.
    pub fn set_reload(&self, reload: impl Fn() -> Result<(), String> + Send + 'static) {
        self.running.extra().reload = Some(Box::new(reload));
    }

    /// A function that takes a changed configuration, for [`Node::set_reload`]: seeds, zone, and version and weight of the
    /// services change at once. It refuses what only a restart can change, and then changes nothing.
    pub fn reconfigurer(&self) -> impl Fn(&Config) -> Result<(), String> + Send + Sync + use<> {
        let (running, runtime) = (self.running.clone(), tokio::runtime::Handle::current());
        move |config| running.reconfigure(config, &runtime)
    }

    /// Reloads the configuration; on an error the old one stays.
    pub fn reload(&self) -> Result<(), String> {
        self.running.reload()
    }

    /// The same, for those who outlive a borrow of the node: file watchers.
    pub fn reloader(&self) -> impl Fn() -> Result<(), String> + Send + Sync + use<> {
        let running = self.running.clone();
        move || running.reload()
    }

    /// Does something for as long as this process has the node's place: from when it takes charge until another process has.
    pub fn while_in_charge(&self, duty: impl Future<Output = ()> + Send + 'static) {
        let in_charge = self.running.succession.in_charge.clone();
        self.running.duties().spawn(async move {
            in_charge.cancelled().await;
            duty.await;
        });
    }

    /// Resolves when the admin API was asked to drain. Cancel safe.
    pub async fn drain_asked(&self) {
        self.drain_asked.cancelled().await;
    }

    /// Goes away in order: not ready, record says draining, grace, GOAWAY, calls of others finish or are cut, then those of
    /// the application, good-bye, close. `patience` is for both together; where others' streams use it up, the last of it is for
    /// both.
    /// Returns whether every call finished by itself.
    pub async fn drain(&self, patience: Duration) -> bool {
        let running = &self.running;
        self.drain_asked.cancel();
        running.gossip.announce(|a| a.phase = Phase::Draining).await;
        tokio::time::sleep(DRAIN_GRACE).await;
        running.ports().close_listeners();
        let begun = Instant::now();
        let (finishing, finished) = oneshot::channel::<()>();
        let others = async {
            let others = running.drain.finish(patience).await;
            drop(finishing);
            others
        };
        let own = async {
            let _ = tokio::time::timeout(patience.saturating_sub(OWN_CALLS.min(patience / 4)), finished).await;
            running.doors_drain.finish(patience.saturating_sub(begun.elapsed())).await
        };
        let (others, own) = tokio::join!(others, own);
        let finished = others && own;
        running.gossip.leave().await;
        tokio::time::sleep(LEAVE_GRACE).await;
        running.documents.acquit();
        self.close().await;
        finished
    }

    /// Sends what is left to be told, and closes what is open.
    async fn close(&self) {
        let export = self.export.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(export) = export {
            export.finish().await;
        }
        let endpoints = self.workers.iter().map(|worker| &worker.endpoint).chain([&self.running.control]);
        let mut closing: JoinSet<()> =
            endpoints.cloned().map(|endpoint| async move { endpoint.close().await }).collect();
        while closing.join_next().await.is_some() {}
        self.workers.iter().for_each(Worker::stop);
    }
}

/// Opens the nth door to the application, on all workers; one for packets, on one of them.
fn open_door(DoorFrame { leads, limits, repeats }: DoorFrame, nth: usize, workers: &[Worker], running: &Running) {
    let places = outbound::places();
    let door = |worker: &Worker, service: Option<Name>| Door {
        client: worker.client.clone(),
        service,
        limits,
        repeats,
        observer: worker.observer.clone(),
        places: places.clone(),
        shelf: outbound::shelf(workers.len()),
    };
    let (drain, failed) = (&running.doors_drain, |error| tracing::error!(%error, "an outbound port"));
    match leads {
        Leads::Http(service, listeners) => {
            for (worker, listener) in workers.iter().cycle().zip(listeners) {
                let (door, drain) = (door(worker, service.clone()), drain.clone());
                worker.runtime().spawn(async move {
                    match tokio_listener(listener) {
                        Ok(listener) => door.serve(listener, drain).await,
                        Err(error) => failed(error),
                    }
                });
            }
        }
        Leads::Tcp(service, listeners) => {
            let complaints = Complaints::default();
            for (worker, listener) in workers.iter().cycle().zip(listeners) {
                let (door, drain) =
                    (TcpDoor::new(door(worker, None), service.clone(), complaints.clone()), drain.clone());
                worker.runtime().spawn(async move {
                    match tokio_listener(listener) {
                        Ok(listener) => door.serve(listener, drain).await,
                        Err(error) => failed(error),
                    }
                });
            }
        }
        Leads::Udp(service, socket) => {
            let (worker, drain) = (&workers[nth % workers.len()], drain.clone());
            let door = UdpDoor::new(door(worker, None), service, running.books.packets().clone());
            let (opening, unsettled) = (running.succession.in_charge.clone(), running.succession.unsettled.token());
            worker.runtime().spawn(async move {
                match tokio::net::UdpSocket::from_std(socket) {
                    Ok(socket) => door.serve(socket, drain, opening, unsettled).await,
                    Err(error) => failed(error),
                }
            });
        }
    }
}

impl Running {
    fn ports(&self) -> std::sync::MutexGuard<'_, Ports> {
        self.ports.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn duties(&self) -> std::sync::MutexGuard<'_, JoinSet<()>> {
        self.duties.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn extra(&self) -> std::sync::MutexGuard<'_, Extra> {
        self.extra.lock().unwrap_or_else(|e| e.into_inner())
    }
}
