//! A mesh of real state machines on a virtual clock: one heap of (time, event). The same seed gives the same run.

mod actions;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, HashMap, HashSet},
    net::SocketAddr,
    time::{Duration, Instant},
};

use bytes::Bytes;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use starling_gossip::{DocumentView, Gossip, Ident, Outgoing, Profile, Reach, Target, Via};
use starling_protocol::{Delta, Items, Name, NodeId, Pong, Summary};

pub(crate) use self::actions::Action;
use crate::{
    credentials::Interned,
    invariants::{Invariants, Observer},
    links::{Links, Way},
    network::Network,
};

/// The clock of the simulated world at its start, unix seconds.
const EPOCH: u64 = 1_800_000_000;
/// A packet that has waited so long for a handshake is not sent.
const STALE: Duration = Duration::from_millis(150);
/// A connection to a member that has died stays open for so long, only to hear from it.
const LINGER: Duration = Duration::from_secs(60);
/// How long a connection to a former life of a member has to show that it works all the same.
const RENEWED_TIMEOUT: Duration = Duration::from_secs(1);
/// Events at one moment that are too many to be true: a node asks again and again to be woken at once.
const MAX_AT_ONCE: u64 = 100_000;

/// What really is, for the invariants.
#[derive(Debug, Default)]
pub(crate) struct Truth {
    pub(crate) introduced: usize,
    pub(crate) generation: Vec<u64>,
    /// Nodes that were declared dead and are on their way back.
    lost: Vec<bool>,
    /// Since when nodes are that no fault excuses, and the longest time that one was.
    lost_since: HashMap<usize, Duration>,
    pub(crate) longest_lost: Duration,
    /// Nodes that lie: what they show counts for nothing, and they may be shown as anything.
    pub(crate) liars: Vec<usize>,
    pub(crate) now: Duration,
    /// Until when nodes are excused: under a fault, dead, or just recovered.
    excused: HashMap<usize, Duration>,
}

impl Truth {
    pub(crate) fn is_excused(&self, node: usize) -> bool {
        self.liars.contains(&node) || self.excused_by_fault(node)
    }

    fn excused_by_fault(&self, node: usize) -> bool {
        self.lost[node] && self.liars.is_empty() || self.excused.get(&node).is_some_and(|until| self.now < *until)
    }

    /// The mesh has given a node up, or it is back.
    fn note_lost(&mut self, node: usize, lost: bool) {
        self.lost[node] = lost;
        if lost && !self.is_excused(node) {
            self.lost_since.entry(node).or_insert(self.now);
        } else if let Some(since) = self.lost_since.remove(&node) {
            self.longest_lost = self.longest_lost.max(self.now - since);
        }
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
    Arrive { from: usize, to: usize, message: Box<Message> },
    CheckOver { node: usize, suspect: Ident, incarnation: u16, check: u64 },
    Close { node: usize, peer: usize, number: u64 },
    Do(Action),
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
    /// Seconds that its clock is ahead.
    ahead: u64,
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
    pub(crate) rng: StdRng,
    pub(crate) interned: Interned,
    profile: Profile,
    /// How many of the first nodes all start from.
    pub(crate) seeds: usize,
    check: u64,
    pub(crate) forged: u64,
    pub(crate) lies: u64,
    pub(crate) events_done: u64,
    standstill: u64,
    /// Prints what is done: for the replay of a single seed.
    tells: bool,
    /// Hash of everything that happened, to compare runs.
    pub(crate) trace: u64,
}

impl World {
    /// `nodes` nodes that do not run yet. Each has the first three as seeds, if nobody says otherwise.
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
            ahead: 0,
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
            seeds: 3,
            check: 0,
            forged: 0,
            lies: 0,
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

    pub(crate) fn instant(&self) -> Instant {
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
                    self.nodes[to].waiting.push((from, *message));
                } else {
                    self.arrive(from, to, *message);
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
                replies.extend(pong.map(|pong| Message::Pong { suspect, incarnation, check, pong }));
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
    pub(crate) fn with(&mut self, node: usize, step: impl FnOnce(&mut Gossip, &mut Node)) {
        let Some(mut gossip) = self.nodes[node].gossip.take() else { return };
        step(&mut gossip, &mut self.nodes[node]);
        let outgoing = gossip.drain(self.instant());
        let backlog = gossip.counters().backlog;
        let next = gossip.next_tick();
        let was_lost = self.truth.lost[node];
        self.truth.note_lost(node, gossip.is_lost());
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
            Outgoing::Datagram { to, bytes, reach } => self.packet(node, index_of(&to.id), bytes, reach),
            Outgoing::Push { fanout, items } => {
                let mut links: Vec<usize> = self.links.of(node).collect();
                for _ in 0..fanout.min(links.len()) {
                    let to = links.swap_remove(self.rng.random_range(0..links.len()));
                    self.stream(node, to, Message::Push(items.clone()));
                }
            }
            Outgoing::Sync(sync) => {
                let to = match sync.with {
                    Target::Linked(id) => index_of(&id),
                    Target::Node(Ident { addr, .. }) | Target::Addr(addr) => usize::from(addr.port()) - 1,
                };
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
                if let Some(number) = self.links.give_up(node, gone) {
                    self.schedule(self.now + LINGER, Event::Close { node, peer: gone, number });
                }
            }
            Outgoing::Renewed(id) => {
                let renewed = index_of(&id);
                if let Some(number) = self.links.orphan(node, renewed) {
                    self.schedule(self.now + RENEWED_TIMEOUT, Event::Close { node, peer: renewed, number });
                }
            }
            Outgoing::Changed(_) => {}
        }
    }

    /// Sends a SWIM packet to whom it is for, or, if it may, to somebody else.
    fn packet(&mut self, node: usize, to: usize, bytes: Bytes, reach: Reach) {
        let to = match reach {
            Reach::Anybody if !self.links.has(node, to) => self.links.stray(node, self.now, &mut self.rng),
            _ => Some(to),
        };
        let Some(to) = to else { return };
        let dials = reach == Reach::Dial && self.links.may_dial(node, to, self.now);
        if !dials && !self.links.has(node, to) {
            return;
        }
        let Some(waited) = self.connect(node, to) else {
            if dials {
                self.links.dial_failed(node, to, self.now);
            }
            return;
        };
        if waited >= STALE {
            return;
        }
        let arrivals = self.network.datagram(node, to, &mut self.rng);
        let acknowledged = !arrivals.is_empty() && self.network.acknowledges(to, node, &mut self.rng);
        if !self.links.may_send(node, to, bytes.len(), acknowledged) {
            return;
        }
        self.nodes[node].sent_bytes += bytes.len() as u64;
        for delay in arrivals {
            let message = Message::Datagram(bytes.clone());
            self.schedule(self.now + waited + delay, Event::Arrive { from: node, to, message: Box::new(message) });
        }
    }

    fn stream(&mut self, from: usize, to: usize, message: Message) {
        self.nodes[from].sent_bytes += size_of_message(&message);
        let Some(waited) = self.connect(from, to) else { return };
        if let Some(delay) = self.network.stream(from, to, &mut self.rng) {
            self.schedule(self.now + waited + delay, Event::Arrive { from, to, message: Box::new(message) });
        }
    }

    /// How long a message has to wait for a connection, which is made if there is none; `None` if it is lost.
    fn connect(&mut self, from: usize, to: usize) -> Option<Duration> {
        let there = self.nodes[to].gossip.is_some() && !self.nodes[to].paused;
        match self.links.way(from, to) {
            Way::Open => Some(Duration::ZERO),
            Way::Orphan => None,
            Way::Dead => {
                let mut crosses = |from, to| self.network.stream(from, to, &mut self.rng).is_some();
                if there && crosses(from, to) && crosses(to, from) {
                    self.links.is_reset(from, to);
                }
                None
            }
            Way::None if there && from != to => {
                let there = self.network.stream(from, to, &mut self.rng)?;
                let back = self.network.stream(to, from, &mut self.rng)?;
                self.links.open(from, to);
                Some(there + back)
            }
            Way::None => None,
        }
    }

    pub(crate) fn id_of(&self, node: usize) -> NodeId {
        self.ids[node]
    }
}

/// Where in a node's id its index is.
const INDEX_AT: usize = 12;

/// The node of that id.
pub(crate) fn index_of(id: &NodeId) -> usize {
    u32::from_be_bytes(id.0[INDEX_AT..].try_into().expect("four bytes")) as usize
}

/// Size on the wire; of records with the chain that real ones carry.
fn size_of_message(message: &Message) -> u64 {
    let items = |items: &Items| {
        let documents = items.documents.iter().map(|d| d.body.len()).sum::<usize>();
        1100 * items.records.len() + documents + 120 * items.words.len()
    };
    let bytes = match message {
        Message::Datagram(bytes) => bytes.len(),
        Message::Push(i) | Message::Last(i) => items(i),
        Message::Summary { summary, .. } => 31 * summary.members.len(),
        Message::Delta { delta, .. } => 31 * delta.members.len() + items(&delta.items),
        Message::Ping { .. } | Message::Pong { .. } => 12,
    };
    bytes as u64
}
