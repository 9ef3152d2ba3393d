//! A mesh of real state machines on a virtual clock: one heap of (time, event). The same seed gives the same run.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IteratorRandom};
use starling_gossip::{
    Announcement, Config, DocumentView, Gossip, Ident, Memory, Outgoing, Profile, Reach, Target, Via,
};
use starling_protocol::{
    Delta, DocumentHash, Items, MeshDocument, Name, NodeId, NodeKind, Phase, Pong, Protocol, ServiceRecord,
    ServiceState, SignedDocument, Summary,
};

use crate::{
    credentials::{Interned, SimulatedKey, sign_document},
    invariants::{Invariants, Observer},
    links::Links,
    network::{Fault, Network},
};

/// The clock of the simulated world at its start, unix seconds.
const EPOCH: u64 = 1_800_000_000;
/// After a fault has ended, this long may pass before its victims are called healthy again: a suspicion that it caused may
/// still run its course.
const EXCUSE: Duration = Duration::from_secs(20);

/// Nodes that serve something: in the very large meshes, what each node remembers of services would fill the memory.
const MAX_SERVING: usize = 1000;
/// A packet that has waited so long for a handshake is not sent.
const STALE: Duration = Duration::from_millis(150);
/// A connection to a member that has died stays open for so long, only to hear from it.
const LINGER: Duration = Duration::from_secs(60);
/// Events at one moment that are too many to be true: a node asks again and again to be woken at once.
const MAX_AT_ONCE: u64 = 100_000;

/// What really is, for the invariants.
#[derive(Debug, Default)]
pub(crate) struct Truth {
    pub(crate) introduced: usize,
    pub(crate) generation: Vec<u64>,
    /// Nodes that were declared dead and are on their way back.
    lost: Vec<bool>,
    pub(crate) now: Duration,
    /// Until when nodes are excused: under a fault, dead, or just recovered.
    excused: HashMap<usize, Duration>,
}

impl Truth {
    pub(crate) fn is_excused(&self, node: usize) -> bool {
        self.lost[node] || self.excused.get(&node).is_some_and(|until| self.now < *until)
    }

    fn excuse(&mut self, node: usize, until: Duration) {
        let known = self.excused.entry(node).or_default();
        *known = until.max(*known);
    }
}

#[derive(Debug, Clone)]
enum Message {
    Datagram(Bytes),
    Push(Items),
    Summary { summary: Summary, with: Target },
    Delta { delta: Delta, with: Target },
    Last(Items),
    Ping { suspect: Ident, incarnation: u16, check: u64 },
    Pong { suspect: Ident, incarnation: u16, check: u64, pong: Pong },
}

#[derive(Debug)]
enum Event {
    Tick(usize, u64),
    Arrive { from: usize, to: usize, message: Message },
    CheckOver { node: usize, suspect: Ident, incarnation: u16, check: u64 },
    Close { node: usize, peer: usize, number: u64 },
    Do(Action),
}

/// What a scenario does to the mesh.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Action {
    Start(usize),
    Kill(usize),
    Pause(usize),
    Resume(usize),
    Begin(Fault),
    End(Fault),
    /// A node's service becomes unhealthy, or healthy again.
    Serve(usize, bool),
    Publish {
        by: usize,
        version: u64,
    },
    /// Somebody with no key of the mesh, or with another node's id, sends records and documents to a node.
    Forge(usize),
    Leave(usize),
}

struct Scheduled {
    at: Duration,
    seq: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.seq) == (other.at, other.seq)
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.seq).cmp(&(other.at, other.seq))
    }
}

pub(crate) struct Node {
    pub(crate) gossip: Option<Box<Gossip>>,
    /// Counts lives of the process, so that timers of a dead one do nothing.
    life: u64,
    pub(crate) paused: bool,
    waiting: Vec<(usize, Message)>,
    tick_at: Option<Duration>,
    generation: u64,
    peers: Vec<SocketAddr>,
    documents: BTreeMap<Name, DocumentView>,
    checks: HashSet<u64>,
    pub(crate) observer: Observer,
    pub(crate) sent_bytes: u64,
}

pub(crate) struct World {
    base: Instant,
    pub(crate) now: Duration,
    events: BinaryHeap<Reverse<Scheduled>>,
    seq: u64,
    pub(crate) nodes: Vec<Node>,
    ids: Vec<NodeId>,
    pub(crate) network: Network,
    links: Links,
    pub(crate) truth: Truth,
    pub(crate) invariants: Invariants,
    rng: StdRng,
    interned: Interned,
    profile: Profile,
    check: u64,
    pub(crate) forged: u64,
    pub(crate) events_done: u64,
    standstill: u64,
    /// Prints what is done: for the replay of a single seed.
    tells: bool,
    /// Hash of everything that happened, to compare runs.
    pub(crate) trace: u64,
}

impl World {
    /// `nodes` nodes that do not run yet. Each has the first three as seeds.
    pub(crate) fn new(nodes: usize, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut ids = Vec::new();
        let mut truth = Truth { introduced: nodes, ..Truth::default() };
        for index in 0..nodes {
            let mut id: [u8; 16] = rng.random();
            id[INDEX_AT..].copy_from_slice(&(index as u32).to_be_bytes());
            ids.push(NodeId(id));
            truth.generation.push(0);
            truth.lost.push(false);
        }
        let node = || Node {
            gossip: None,
            life: 0,
            paused: false,
            waiting: Vec::new(),
            tick_at: None,
            generation: 0,
            peers: Vec::new(),
            documents: BTreeMap::new(),
            checks: HashSet::new(),
            observer: Observer::default(),
            sent_bytes: 0,
        };
        Self {
            base: Instant::now(),
            now: Duration::ZERO,
            events: BinaryHeap::new(),
            seq: 0,
            nodes: (0..nodes).map(|_| node()).collect(),
            ids,
            network: Network::new(),
            links: Links::new(nodes),
            truth,
            invariants: Invariants::default(),
            rng,
            interned: Interned::default(),
            profile: Profile::Lan,
            check: 0,
            forged: 0,
            events_done: 0,
            standstill: 0,
            tells: std::env::var_os("STARLING_SIM_SEED").is_some(),
            trace: 0,
        }
    }

    pub(crate) fn plan(&mut self, at: Duration, action: Action) {
        self.schedule(at, Event::Do(action));
    }

    /// Runs until then.
    pub(crate) fn run_until(&mut self, end: Duration) {
        while self.events.peek().is_some_and(|Reverse(next)| next.at <= end) {
            let Some(Reverse(next)) = self.events.pop() else { break };
            self.standstill = if next.at > self.now { 0 } else { self.standstill + 1 };
            assert!(self.standstill < MAX_AT_ONCE, "time stands still at {:?}: {:?}", self.now, next.event);
            self.advance(next.at);
            self.events_done += 1;
            self.happen(next.event);
        }
        self.advance(end);
    }

    /// Runs until `holds`, looking every few milliseconds; `None` if it does not within `limit`.
    pub(crate) fn run_until_holds(&mut self, limit: Duration, holds: impl Fn(&Self) -> bool) -> Option<Duration> {
        let start = self.now;
        while self.now < start + limit {
            if holds(self) {
                return Some(self.now - start);
            }
            self.run_until(self.now + Duration::from_millis(if self.nodes.len() > 200 { 50 } else { 10 }));
            if self.tells && self.now.subsec_millis() < 50 {
                eprintln!("{:9.3} s: {} events", self.now.as_secs_f64(), self.events_done);
            }
        }
        None
    }

    fn advance(&mut self, to: Duration) {
        self.now = to.max(self.now);
        self.truth.now = self.now;
    }

    fn instant(&self) -> Instant {
        self.base + self.now
    }

    fn schedule(&mut self, at: Duration, event: Event) {
        self.seq += 1;
        self.events.push(Reverse(Scheduled { at, seq: self.seq, event }));
    }

    fn note(&mut self, what: &[u64]) {
        for word in what {
            self.trace = (self.trace ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(5);
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Tick(node, life) => {
                let place = &self.nodes[node];
                // One that a later look has put off, or brought forward, does nothing.
                if place.life != life || place.paused || place.tick_at != Some(self.now) {
                    return;
                }
                self.nodes[node].tick_at = None;
                let now = self.instant();
                self.note(&[1, node as u64, self.now.as_nanos() as u64]);
                self.with(node, |gossip, _| gossip.tick(now));
            }
            Event::Arrive { from, to, message } => {
                if self.nodes[to].paused {
                    self.nodes[to].waiting.push((from, message));
                } else {
                    self.arrive(from, to, message);
                }
            }
            Event::CheckOver { node, suspect, incarnation, check } => {
                if self.nodes[node].checks.remove(&check) {
                    let now = self.instant();
                    self.with(node, |gossip, _| gossip.checked(suspect, incarnation, None, now));
                }
            }
            Event::Close { node, peer, number } => self.links.close(node, peer, number),
            Event::Do(action) => self.act(action),
        }
    }

    fn arrive(&mut self, from: usize, to: usize, message: Message) {
        let now = self.instant();
        let sender = self.id_of(from);
        self.note(&[2, from as u64, to as u64, self.now.as_nanos() as u64]);
        let mut replies = Vec::new();
        match message {
            Message::Datagram(bytes) => self.with(to, |gossip, _| gossip.deliver(sender, &bytes, now)),
            Message::Push(items) => self.with(to, |gossip, _| gossip.receive(sender, items, Via::Push, now)),
            Message::Last(items) => self.with(to, |gossip, _| gossip.receive(sender, items, Via::Exchange, now)),
            Message::Summary { summary, with } => self.with(to, |gossip, _| {
                replies.push(Message::Delta { delta: gossip.answer(sender, summary, now), with });
            }),
            Message::Delta { delta, with } => self.with(to, |gossip, _| {
                let items = gossip.absorb(sender, with, delta, now);
                if !items.is_empty() {
                    replies.push(Message::Last(items));
                }
            }),
            Message::Ping { suspect, incarnation, check } => self.with(to, |gossip, _| {
                let pong = gossip.answer_ping(sender, Some(incarnation), now);
                replies.push(Message::Pong { suspect, incarnation, check, pong });
            }),
            Message::Pong { suspect, incarnation, check, pong } => {
                if self.nodes[to].checks.remove(&check) {
                    self.with(to, |gossip, _| gossip.checked(suspect, incarnation, Some(pong), now));
                }
            }
        }
        for reply in replies {
            self.stream(to, from, reply);
        }
    }

    /// Runs a step of a node and does what it wants done.
    fn with(&mut self, node: usize, step: impl FnOnce(&mut Gossip, &mut Node)) {
        let Some(mut gossip) = self.nodes[node].gossip.take() else { return };
        step(&mut gossip, &mut self.nodes[node]);
        let outgoing = gossip.drain(self.instant());
        let backlog = gossip.counters().backlog;
        let next = gossip.next_tick();
        let was_lost = std::mem::replace(&mut self.truth.lost[node], gossip.is_lost());
        if self.tells && was_lost != gossip.is_lost() {
            eprintln!("{:9.3} s: {node} is {}", self.now.as_secs_f64(), if was_lost { "back" } else { "lost" });
        }
        self.nodes[node].gossip = Some(gossip);
        for out in outgoing {
            let count = self.nodes.len();
            let mut observer = std::mem::take(&mut self.nodes[node].observer);
            self.invariants.outgoing(node, &mut observer, &out, count, backlog);
            if let Outgoing::Changed(snapshot) = &out {
                self.invariants.snapshot(node, &mut observer, snapshot, &self.truth);
            }
            self.nodes[node].observer = observer;
            self.send(node, out);
        }
        let at = next.saturating_duration_since(self.base).max(self.now);
        if self.nodes[node].tick_at.is_none_or(|known| at < known) {
            self.nodes[node].tick_at = Some(at);
            let life = self.nodes[node].life;
            self.schedule(at, Event::Tick(node, life));
        }
    }

    fn send(&mut self, node: usize, out: Outgoing) {
        match out {
            Outgoing::Datagram { to, bytes, reach } => {
                let Some(to) = self.receiver(node, index_of(&to.id), reach) else { return };
                let Some(waited) = self.link(node, to).filter(|waited| *waited < STALE) else { return };
                self.nodes[node].sent_bytes += bytes.len() as u64;
                for delay in self.network.datagram(node, to, &mut self.rng) {
                    let message = Message::Datagram(bytes.clone());
                    self.schedule(self.now + waited + delay, Event::Arrive { from: node, to, message });
                }
            }
            Outgoing::Push { fanout, items } => {
                let mut links: Vec<usize> = self.links.of(node).collect();
                for _ in 0..fanout.min(links.len()) {
                    let to = links.swap_remove(self.rng.random_range(0..links.len()));
                    self.stream(node, to, Message::Push(items.clone()));
                }
            }
            Outgoing::Sync(sync) => {
                let port = usize::from(sync.with.addr().port());
                let to = port - 1;
                self.stream(node, to, Message::Summary { summary: sync.summary, with: sync.with });
            }
            Outgoing::Check { suspect, incarnation, limit } => {
                self.check += 1;
                let check = self.check;
                let to = index_of(&suspect.id);
                self.nodes[node].checks.insert(check);
                self.stream(node, to, Message::Ping { suspect, incarnation, check });
                self.schedule(self.now + limit, Event::CheckOver { node, suspect, incarnation, check });
            }
            Outgoing::Generation(generation) => {
                self.nodes[node].generation = generation;
                self.truth.generation[node] = generation;
                // It has been cut off, and what it held for true may have been wrong.
                self.nodes[node].observer.begin_anew();
            }
            Outgoing::Peers(peers) => self.nodes[node].peers = peers,
            Outgoing::Document(view) => {
                self.nodes[node].documents.insert(view.document.kind.clone(), view);
            }
            Outgoing::Gone(id) => {
                let gone = index_of(&id);
                if let Some(number) = self.links.let_go(node, gone) {
                    self.schedule(self.now + LINGER, Event::Close { node, peer: gone, number });
                }
            }
            Outgoing::Changed(_) | Outgoing::Renewed(_) => {}
        }
    }

    /// Who gets a packet.
    fn receiver(&mut self, node: usize, to: usize, reach: Reach) -> Option<usize> {
        match reach {
            Reach::Dial => Some(to),
            _ if self.links.has(node, to) => Some(to),
            Reach::Linked => None,
            Reach::Anybody => self.links.of(node).choose(&mut self.rng),
        }
    }

    fn stream(&mut self, from: usize, to: usize, message: Message) {
        self.nodes[from].sent_bytes += size_of_message(&message);
        let Some(waited) = self.link(from, to) else { return };
        if let Some(delay) = self.network.stream(from, to, &mut self.rng) {
            self.schedule(self.now + waited + delay, Event::Arrive { from, to, message });
        }
    }

    /// How long a message has to wait for a connection, which is made if there is none; `None` if there is nobody.
    fn link(&mut self, from: usize, to: usize) -> Option<Duration> {
        if self.nodes[to].gossip.is_none() || to == from {
            return None;
        }
        if self.links.has(from, to) {
            return Some(Duration::ZERO);
        }
        if self.nodes[to].paused {
            return None;
        }
        let handshake = self.network.stream(from, to, &mut self.rng)? + self.network.stream(to, from, &mut self.rng)?;
        self.links.open(from, to);
        Some(handshake)
    }

    fn id_of(&self, node: usize) -> NodeId {
        self.ids[node]
    }

    fn act(&mut self, action: Action) {
        if self.tells {
            eprintln!("{:9.3} s: {action:?} ({} events)", self.now.as_secs_f64(), self.events_done);
        }
        let now = self.instant();
        let for_ever = Duration::MAX;
        let over = self.now + EXCUSE;
        match action {
            Action::Start(node) => {
                self.start(node);
                self.truth.excused.insert(node, over);
            }
            Action::Kill(node) => {
                self.nodes[node].gossip = None;
                self.nodes[node].life += 1;
                self.nodes[node].tick_at = None;
                self.nodes[node].waiting.clear();
                self.nodes[node].paused = false;
                self.truth.excuse(node, for_ever);
            }
            Action::Leave(node) => {
                self.with(node, |gossip, _| gossip.leave(now));
                self.truth.excuse(node, for_ever);
                let at = self.now + Duration::from_millis(300);
                self.schedule(at, Event::Do(Action::Kill(node)));
            }
            Action::Pause(node) => {
                self.nodes[node].paused = true;
                self.truth.excuse(node, for_ever);
            }
            Action::Resume(node) => {
                self.nodes[node].paused = false;
                self.nodes[node].tick_at = None;
                self.truth.excused.insert(node, over);
                // What waits in the socket is read before the timers are looked at.
                for (from, message) in std::mem::take(&mut self.nodes[node].waiting) {
                    self.arrive(from, node, message);
                }
                self.with(node, |gossip, _| gossip.tick(now));
            }
            Action::Begin(fault) => {
                self.victims(&fault).into_iter().for_each(|node| self.truth.excuse(node, for_ever));
                self.network.begin(fault);
            }
            Action::End(fault) => {
                self.network.end(&fault);
                for node in self.victims(&fault) {
                    self.truth.excused.insert(node, over);
                }
            }
            Action::Serve(node, up) => self.with(node, |gossip, _| {
                let mut announcement = gossip.announcement().clone();
                announcement.services[0].state = if up { ServiceState::Up } else { ServiceState::Unhealthy };
                gossip.announce(announcement, now);
            }),
            Action::Publish { by, version } => {
                let signed = sign_document(&document(version, b"rules".to_vec()));
                self.with(by, |gossip, _| gossip.publish(signed, now).expect("the admin key signed it"));
            }
            Action::Forge(node) => self.forge(node),
        }
    }

    /// Nodes that may rightly be given up because of the fault.
    fn victims(&self, fault: &Fault) -> Vec<usize> {
        match *fault {
            Fault::Loss(p) if p > 0.1 => (0..self.nodes.len()).collect(),
            Fault::Loss(_) | Fault::Duplication(_) | Fault::Cut(..) => Vec::new(),
            Fault::Lossy(node, _) | Fault::Mute(node) | Fault::Deaf(node) => vec![node],
            Fault::Split(_) => (0..self.nodes.len()).collect(),
        }
    }

    fn start(&mut self, node: usize) {
        let id = self.id_of(node);
        let unix = EPOCH + self.now.as_secs();
        let generation = (self.nodes[node].generation + 1).max(unix);
        let config = Config { seed: self.rng.random(), ..Config::new(self.profile) };
        let known = &self.nodes[node];
        let memory = Memory {
            peers: known.peers.clone(),
            documents: known.documents.values().map(|view| view.signed.clone()).collect(),
            floors: known.documents.values().map(|v| (v.document.kind.clone(), v.document.version)).collect(),
        };
        let me = Ident { id, addr: addr(node), generation };
        let credentials = Box::new(SimulatedKey(self.interned.clone()));
        let mut gossip = Gossip::new(me, announcement(node), credentials, memory, &config, (self.instant(), unix));
        gossip.set_seeds((0..3.min(self.nodes.len())).map(addr).collect());
        self.links.reset(node);
        let place = &mut self.nodes[node];
        place.generation = generation;
        place.life += 1;
        place.observer = Observer::default();
        place.gossip = Some(Box::new(gossip));
        place.tick_at = None;
        self.truth.generation[node] = generation;
        self.with(node, |_, _| ());
    }

    fn forge(&mut self, node: usize) {
        let now = self.instant();
        let (victim, sender) = (self.id_of((node + 1) % self.nodes.len()), self.id_of((node + 2) % self.nodes.len()));
        let record = starling_protocol::NodeRecord {
            id: victim,
            generation: EPOCH * 2,
            seq: u64::MAX,
            name: "forged".parse().unwrap(),
            addr: addr(0),
            kind: NodeKind::Node,
            zone: "forged".into(),
            issuer: None,
            services: Vec::new(),
            phase: Phase::Up,
            cert_expires: 0,
        };
        let near = starling_protocol::NodeRecord { generation: EPOCH + self.now.as_secs() + 5, ..record.clone() };
        let records = [record, near].map(|record| {
            let body = starling_protocol::SignedRecord::encode_body(&record);
            Arc::new(starling_protocol::SignedRecord { body, signature: vec![7; 32], chain: Vec::new() })
        });
        let body = SignedDocument::encode_body(&document(1 << 30, b"forged".to_vec()));
        let forged = Arc::new(SignedDocument { body, signature: vec![7; 32], certificate: Vec::new() });
        let items = Items { records: records.into(), documents: vec![forged], forgotten: Vec::new() };
        self.forged += 1;
        self.with(node, |gossip, _| {
            gossip.receive(sender, items, Via::Push, now);
            gossip.deliver(sender, b"garbage that is no packet", now);
        });
    }
}

/// Where in a node's id its index is.
const INDEX_AT: usize = 12;

/// The node of that id.
pub(crate) fn index_of(id: &NodeId) -> usize {
    u32::from_be_bytes(id.0[INDEX_AT..].try_into().expect("four bytes")) as usize
}

fn document(version: u64, content: Vec<u8>) -> MeshDocument {
    MeshDocument {
        kind: "policy".parse().unwrap(),
        version,
        previous: DocumentHash::default(),
        not_before: 0,
        expires: None,
        deleted: false,
        content,
    }
}

fn addr(node: usize) -> SocketAddr {
    ([10, 0, 0, 1], u16::try_from(node + 1).expect("fewer nodes than ports")).into()
}

fn announcement(node: usize) -> Announcement {
    Announcement {
        name: format!("n{node}").parse().unwrap(),
        kind: NodeKind::Node,
        zone: String::new(),
        issuer: None,
        services: (node < MAX_SERVING)
            .then(|| ServiceRecord {
                name: format!("s{}", node % 20).parse().unwrap(),
                version: String::new(),
                protocol: Protocol::Http1,
                weight: 100,
                state: ServiceState::Up,
            })
            .into_iter()
            .collect(),
        phase: Phase::Up,
        cert_expires: EPOCH + 86_400,
    }
}

/// Size on the wire; of records with the chain that real ones carry.
fn size_of_message(message: &Message) -> u64 {
    let items =
        |items: &Items| 1100 * items.records.len() + items.documents.iter().map(|d| d.body.len()).sum::<usize>();
    let bytes = match message {
        Message::Datagram(bytes) => bytes.len(),
        Message::Push(i) | Message::Last(i) => items(i),
        Message::Summary { summary, .. } => 33 * summary.members.len() + 24 * summary.records.len(),
        Message::Delta { delta, .. } => 33 * delta.members.len() + items(&delta.items),
        Message::Ping { .. } | Message::Pong { .. } => 12,
    };
    bytes as u64
}
