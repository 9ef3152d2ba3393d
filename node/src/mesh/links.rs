//! Gossip's transport: one authenticated QUIC connection per pair of nodes, used both ways, for datagrams and for streams.

mod exchange;
mod flow;
mod table;

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use quinn::crypto::rustls::QuicClientConfig;
use rand::RngExt;
use starling_gossip::{Durable, GossipHandle, Ident, Outgoing, Reach};
use starling_protocol::{CloseCode, Items, NodeId, alpn, frame};
use tokio::sync::{Semaphore, mpsc, watch};

use self::{
    flow::Flow,
    table::{Link, Step, Table},
};
use super::fleet::Colleague;
use crate::{
    Documents,
    identity::{
        Identity,
        tls::{self, Peer},
    },
    port::endpoint::MeshEndpoint,
    run::keep_peers,
    state::StateDir,
};

pub(crate) use self::table::LinkView;

/// How long a dial or an exchange may take.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection that is replaced stays open for so long: the peer may still be sending on it.
const OVERLAP: Duration = Duration::from_secs(2);
/// A connection to a member that was given up stays open for so long, to hear it: only who heard it can tell it later that
/// it was its link that worked one way.
const LINGER: Duration = Duration::from_secs(60);
/// How long a connection to a member's former life has to show that it works all the same.
const RENEWED_TIMEOUT: Duration = Duration::from_secs(1);
/// Addresses that are remembered as not answering.
const MAX_UNREACHABLE: usize = 256;
/// Connections of one peer that are served at a time: the one in use, one dialled by each side at once, and one of a former
/// life of the peer, which is not found dead yet, or was given up and is still listened to.
const MAX_CONNECTIONS_OF_PEER: usize = 4;
/// Dials at a time that are made for checks and exchanges.
const DIALS: usize = 64;
/// The same, that others ask for: few, because whoever tells a wrong address keeps each busy for a while.
const DIAL_BACKS: usize = 8;
/// How long what a peer may still say is remembered after its last connection has ended.
const FLOW_KEPT: Duration = Duration::from_secs(60);
/// Large frames that are read at a time, from all peers: bounds the memory that they can take.
const LARGE_FRAMES: usize = 4;

/// The links of a node. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Links(Arc<LinksState>);

struct LinksState {
    identity: Arc<Identity>,
    endpoint: MeshEndpoint,
    /// For links; it shows the certificate of the moment.
    crypto: Arc<QuicClientConfig>,
    /// For dial-backs: the same certificate, over the protocol of joins, in which nothing follows from a connection. One that
    /// gossips would take the place of the link that is there, and leave none when it ends.
    silent_crypto: Arc<QuicClientConfig>,
    gossip: GossipHandle,
    documents: Documents,
    table: Mutex<Table>,
    /// Why addresses did not answer last time, for the operator.
    unreachable: Mutex<HashMap<SocketAddr, String>>,
    /// Members that asked to be dialled and were not reached, and where.
    not_reached: Mutex<HashMap<NodeId, SocketAddr>>,
    large_frames: Semaphore,
    /// Dials that others ask for.
    dial_backs: Semaphore,
    /// Dials that a check or an exchange is the cause of.
    dials: Semaphore,
    /// Connections that are served, by peer, and what it may say over them.
    served: Mutex<HashMap<NodeId, Served>>,
    counters: LinkCounters,
    /// Whether another process speaks for this node.
    rests: AtomicBool,
    /// Who answers other edges, if this is one.
    colleagues: RwLock<Vec<Arc<dyn Colleague>>>,
}

/// How many connections of a peer are served, and what it may still say over them.
struct Served {
    count: usize,
    flow: Arc<Mutex<Flow>>,
    /// When there was one last.
    at: Instant,
}

impl Served {
    fn new() -> Self {
        let now = Instant::now();
        Self { count: 0, flow: Arc::new(Mutex::new(Flow::new(now))), at: now }
    }
}

/// What peers sent that was not let through.
#[derive(Debug, Default)]
pub(crate) struct LinkCounters {
    /// Datagrams and streams above a peer's rate.
    pub(crate) flood: AtomicU64,
    /// Streams that do not carry what they should.
    pub(crate) streams_refused: AtomicU64,
}

impl Links {
    pub(crate) fn new(
        identity: Arc<Identity>,
        endpoint: MeshEndpoint,
        gossip: GossipHandle,
        documents: Documents,
    ) -> Self {
        Self(Arc::new(LinksState {
            crypto: tls::client_crypto(&identity, alpn::GOSSIP),
            silent_crypto: tls::client_crypto(&identity, alpn::JOIN),
            identity,
            endpoint,
            gossip,
            documents,
            table: Mutex::default(),
            unreachable: Mutex::default(),
            not_reached: Mutex::default(),
            large_frames: Semaphore::new(LARGE_FRAMES),
            dials: Semaphore::new(DIALS),
            dial_backs: Semaphore::new(DIAL_BACKS),
            served: Mutex::default(),
            counters: LinkCounters::default(),
            rests: AtomicBool::new(false),
            colleagues: RwLock::default(),
        }))
    }

    /// Does what gossip asks for, until gossip ends. What is to be stored is stored before the next message goes out.
    pub(crate) async fn run(
        self,
        mut outgoing: mpsc::Receiver<Outgoing>,
        mut durable: watch::Receiver<Durable>,
        state: StateDir,
    ) {
        let mut stored = durable.borrow_and_update().clone();
        loop {
            tokio::select! {
                biased;
                changed = durable.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = durable.borrow_and_update().clone();
                    keep(&state, &stored, &now).await;
                    stored = now;
                }
                next = outgoing.recv() => match next {
                    Some(next) => self.handle(next),
                    None => return,
                },
            }
        }
    }

    fn handle(&self, next: Outgoing) {
        let links = self.clone();
        match next {
            Outgoing::Datagram { to, bytes, reach } => self.send(to, bytes, reach),
            Outgoing::Push { fanout, items } => self.push(fanout, items),
            Outgoing::Sync(sync) => drop(tokio::spawn(async move { links.sync(sync).await })),
            Outgoing::Check { suspect, incarnation, limit } => drop(tokio::spawn(async move {
                let pong = tokio::time::timeout(limit, links.ping(suspect, Some(incarnation))).await;
                let pong = pong.ok().and_then(|outcome| outcome.ok());
                links.0.gossip.checked(suspect, incarnation, pong).await;
            })),
            Outgoing::Renewed(id) => self.verify_renewed(id),
            Outgoing::Gone(id) => {
                if let Some(connection) = self.table().give_up(&id) {
                    tokio::spawn(retire(connection, LINGER, CloseCode::Stale));
                }
            }
            // Published or kept by the actor itself.
            Outgoing::Generation(_) | Outgoing::Peers(_) | Outgoing::Document(_) | Outgoing::Changed(_) => {}
        }
    }

    /// Closes all connections and takes none, while another process speaks for this node; or takes them again.
    pub(crate) fn rest(&self, rests: bool) {
        self.0.rests.store(rests, Relaxed);
        if rests {
            for (_, connection) in self.table().live() {
                connection.close((CloseCode::Leaving as u32).into(), b"another process takes over");
            }
        }
    }

    /// Takes a connection that a peer has dialled.
    pub(crate) async fn accept(self, connection: quinn::Connection, peer: Peer) {
        if self.0.rests.load(Relaxed) {
            return connection.close((CloseCode::Leaving as u32).into(), b"another process takes over");
        }
        if let Some(turn) = self.take_turn(&peer, &connection) {
            self.adopt(&connection, peer.id, peer.id);
            self.serve(connection, turn, peer.expires).await;
        }
    }

    /// Why addresses do not answer, by address.
    pub(crate) fn unreachable(&self) -> Vec<(SocketAddr, String)> {
        lock(&self.0.unreachable).iter().map(|(addr, why)| (*addr, why.clone())).collect()
    }

    /// How the links to members are.
    pub(crate) fn views(&self) -> HashMap<NodeId, LinkView> {
        self.table().views()
    }

    pub(crate) fn counters(&self) -> &LinkCounters {
        &self.0.counters
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        lock(&self.0.table)
    }

    fn send(&self, to: Ident, bytes: Bytes, reach: Reach) {
        let step = self.table().send(to.id, &bytes, reach, Instant::now());
        match step {
            Step::Over(connection) => {
                if let Err(error) = connection.send_datagram(bytes) {
                    tracing::debug!(to = %to.addr, %error, "gossip packet not sent");
                }
            }
            Step::Dial => {
                let links = self.clone();
                tokio::spawn(async move { links.dial_member(to).await });
            }
            Step::Nothing => {}
        }
    }

    async fn dial_member(&self, to: Ident) {
        let dialled = self.dial(to.addr, &self.0.crypto).await;
        let worked = dialled.as_ref().is_ok_and(|(_, peer)| peer.id == to.id);
        let held = self.table().dialled(to.id, worked, Instant::now());
        if let Ok((connection, peer)) = dialled {
            if peer.id == to.id {
                for bytes in held {
                    let _ = connection.send_datagram(bytes);
                }
            }
            self.adopt_dialled(connection, &peer);
        }
    }

    async fn dial(
        &self,
        addr: SocketAddr,
        crypto: &Arc<QuicClientConfig>,
    ) -> Result<(quinn::Connection, Peer), String> {
        if self.0.rests.load(Relaxed) {
            return Err("another process speaks for this node".into());
        }
        let connecting = self.0.endpoint.dial_gossip(addr, crypto.clone()).map_err(|e| e.to_string())?;
        let connection = tokio::time::timeout(EXCHANGE_TIMEOUT, connecting)
            .await
            .map_err(|_| "no answer in time".to_string())?
            .map_err(|e| e.to_string())?;
        let peer = Peer::of(&connection, &self.0.identity).map_err(|e| e.to_string())?;
        if peer.id == self.0.identity.id() {
            connection.close((CloseCode::Done as u32).into(), b"");
            return Err("this node itself answers there".into());
        }
        Ok((connection, peer))
    }

    fn adopt_dialled(&self, connection: quinn::Connection, peer: &Peer) {
        if self.0.rests.load(Relaxed) {
            return connection.close((CloseCode::Leaving as u32).into(), b"another process takes over");
        }
        if let Some(turn) = self.take_turn(peer, &connection) {
            self.adopt(&connection, peer.id, self.0.identity.id());
            let (links, until) = (self.clone(), tls::useful_until(peer, &self.0.identity));
            tokio::spawn(async move { links.serve(connection, turn, until).await });
        }
    }

    /// Makes the connection the one to send over, or lets it go because a better one is there.
    fn adopt(&self, connection: &quinn::Connection, peer: NodeId, dialled_by: NodeId) {
        let adopted = self.table().adopt(connection, peer, dialled_by, Instant::now());
        for bytes in adopted.held {
            let _ = connection.send_datagram(bytes);
        }
        for loser in adopted.losers {
            tokio::spawn(retire(loser, OVERLAP, CloseCode::Duplicate));
        }
    }

    /// Reads what the peer sends, until the connection ends, or the time of a certificate behind it. A peer that sends too much is not listened to for the rest of
    /// the second; the others do not notice.
    async fn serve(&self, connection: quinn::Connection, turn: Turn, until: u64) {
        let peer = turn.peer;
        let mut over = std::pin::pin!(tls::until(until));
        loop {
            tokio::select! {
                () = &mut over => {
                    connection.close((CloseCode::Unauthenticated as u32).into(), b"a certificate has ended");
                    break;
                }
                datagram = connection.read_datagram() => match datagram {
                    Ok(bytes) if lock(&turn.flow).datagram(Instant::now()) => self.0.gossip.deliver(peer, bytes),
                    Ok(_) => self.flooded(peer, &turn),
                    Err(_) => break,
                },
                stream = connection.accept_bi() => match stream {
                    Ok((send, receive)) if lock(&turn.flow).stream(Instant::now()) => {
                        let (links, flow, is_edge) = (self.clone(), turn.flow.clone(), turn.is_edge);
                        tokio::spawn(async move { links.answer((peer, is_edge), send, receive, flow).await });
                    }
                    // Dropping them resets the one and stops the other.
                    Ok(_) => self.flooded(peer, &turn),
                    Err(_) => break,
                },
            }
        }
        self.table().ended(&peer, &connection);
    }

    /// Counts the connections of a peer that are served, so that it cannot say more by opening more; closes one too many.
    fn take_turn(&self, peer: &Peer, connection: &quinn::Connection) -> Option<Turn> {
        let mut served = lock(&self.0.served);
        // Whoever dials again goes on where it was.
        served.retain(|_, peer| peer.count > 0 || peer.at.elapsed() < FLOW_KEPT);
        let of_peer = served.entry(peer.id).or_insert_with(Served::new);
        if of_peer.count >= MAX_CONNECTIONS_OF_PEER {
            self.0.counters.flood.fetch_add(1, Relaxed);
            connection.close((CloseCode::Duplicate as u32).into(), b"too many connections");
            return None;
        }
        of_peer.count += 1;
        Some(Turn { links: self.clone(), peer: peer.id, is_edge: peer.edge, flow: of_peer.flow.clone() })
    }

    /// What a peer may still say.
    fn flow_of(&self, peer: NodeId) -> Arc<Mutex<Flow>> {
        lock(&self.0.served).entry(peer).or_insert_with(Served::new).flow.clone()
    }

    fn flooded(&self, peer: NodeId, turn: &Turn) {
        self.0.counters.flood.fetch_add(1, Relaxed);
        if lock(&turn.flow).is_first_of_flood() {
            tracing::warn!(%peer, "sends more gossip than a member has to say; the rest is dropped");
        }
    }

    fn push(&self, fanout: usize, items: Items) {
        let mut connections = self.table().live();
        let request = Bytes::from(frame(&items));
        let mut rng = rand::rng();
        for _ in 0..fanout.min(connections.len()) {
            let (peer, connection) = connections.swap_remove(rng.random_range(0..connections.len()));
            self.table().used_for_push(&peer);
            let request = request.clone();
            tokio::spawn(async move {
                let pushed = async {
                    let (mut send, _) = connection.open_bi().await.ok()?;
                    send.write_all(&request).await.ok()?;
                    send.finish().ok()
                };
                let _ = tokio::time::timeout(EXCHANGE_TIMEOUT, pushed).await;
            });
        }
    }

    /// A member has come back in a new life. If it is a new process, a connection that its old one had dialled leads
    /// nowhere, and nobody is there to say so.
    fn verify_renewed(&self, id: NodeId) {
        let Some(Link::Up { connection, dialled_by, .. }) = self.table().get(&id) else { return };
        if dialled_by != id {
            // What we dialled is reset by whoever has the port now, whose reset key is kept on disk.
            return;
        }
        let links = self.clone();
        tokio::spawn(async move {
            let works = exchange::ping_over(&connection, None);
            if !matches!(tokio::time::timeout(RENEWED_TIMEOUT, works).await, Ok(Ok(_))) {
                links.table().ended(&id, &connection);
                connection.close((CloseCode::Stale as u32).into(), b"stale");
            }
        });
    }

    fn not_reached(&self, addr: SocketAddr, why: String) {
        let mut unreachable = lock(&self.0.unreachable);
        if unreachable.len() >= MAX_UNREACHABLE {
            unreachable.clear();
        }
        if unreachable.insert(addr, why.clone()).is_none() {
            tracing::warn!(%addr, why, "a seed or former member does not answer; trying again for ever");
        }
    }

    /// Forgets about addresses that nobody asks for any more.
    pub(crate) fn forget_unreachable(&self, live: &HashSet<SocketAddr>) {
        lock(&self.0.not_reached).retain(|_, addr| live.contains(addr));
        lock(&self.0.unreachable).retain(|addr, _| !live.contains(addr));
    }
}

/// A connection that is served; given back when dropped.
struct Turn {
    links: Links,
    peer: NodeId,
    /// Whether it may be an edge.
    is_edge: bool,
    /// What the peer may still say, over all its connections.
    flow: Arc<Mutex<Flow>>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut served = lock(&self.links.0.served);
        if let Some(peer) = served.get_mut(&self.peer) {
            (peer.count, peer.at) = (peer.count - 1, Instant::now());
        }
    }
}

/// Closes a connection that is out of use, after a while in which it is still listened to.
async fn retire(connection: quinn::Connection, after: Duration, code: CloseCode) {
    if tokio::time::timeout(after, connection.closed()).await.is_err() {
        connection.close((code as u32).into(), b"retired");
    }
}

/// Stores what changed; not on this thread, which must answer probes while the disk syncs.
async fn keep(state: &StateDir, before: &Durable, now: &Durable) {
    if now.peers != before.peers {
        let (state, peers) = (state.clone(), now.peers.clone());
        tokio::task::spawn_blocking(move || keep_peers(&state, &peers));
    }
    if now.generation != before.generation {
        let (state, generation) = (state.clone(), now.generation);
        let stored = tokio::task::spawn_blocking(move || {
            state.keep("generation", generation.to_string().as_bytes());
        });
        // Before anything else is sent.
        let _ = stored.await;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
