use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use starling_protocol::{
    FullState, MemberHealth, MemberState, Name, NodeId, NodeKind, NodeRecord, Phase, ServiceRecord, SignedRecord,
};

use crate::{
    contacts::Contacts,
    membership::{Effect, Ident, Membership, Timing},
    records::Records,
    snapshot::{MemberView, Snapshot},
};

/// How often contacts are looked over.
const HOUSEKEEPING: Duration = Duration::from_millis(250);
/// Pause between periodic full exchanges with a random member, at N = 2; grows with log2 N.
const EXCHANGE: Duration = Duration::from_secs(30);
/// How long a live member may lack its record before it is asked for one; a push usually is faster.
const RECORD_GRACE: Duration = Duration::from_millis(400);
/// Most members that are asked for their record in one round.
const RECORDS_PER_ROUND: usize = 3;
/// Most addresses of former members that are kept to find back into the mesh.
const MAX_REMEMBERED: usize = 64;

/// Settings that do not change while the node runs.
#[derive(Debug, Clone)]
pub struct Config {
    /// How often a random member is probed.
    pub probe_period: Duration,
    /// How long a direct answer may take before others are asked to probe; below the period.
    pub probe_rtt: Duration,
    /// How long a suspect has to refute before it is declared dead, in a small mesh; grows with log N.
    pub suspicion: Duration,
    /// Makes the random choices repeatable.
    pub seed: u64,
}

impl Default for Config {
    /// For nodes within one site: a dead node is declared so after about three seconds.
    fn default() -> Self {
        Self {
            probe_period: Duration::from_millis(500),
            probe_rtt: Duration::from_millis(150),
            suspicion: Duration::from_secs(2),
            seed: rand::random(),
        }
    }
}

/// Why a record is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct RecordError(pub String);

/// The node's key and its view of who may vouch for keys: the seam to the identity layer.
pub trait Credentials: Send {
    /// Signs this node's own record with its certificate's key.
    fn sign(&self, record: &NodeRecord) -> SignedRecord;
    /// Checks signature, chain, id, name and services against the certificate; only then the content may be believed.
    fn verify(&self, signed: &SignedRecord) -> Result<NodeRecord, RecordError>;
}

/// What this node tells about itself. Id, address and generation are known already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    /// Name, as in the certificate.
    pub name: Name,
    /// Plain node or edge.
    pub kind: NodeKind,
    /// Where it stands.
    pub zone: String,
    /// Its issuing key's id, if it can admit others.
    pub issuer: Option<NodeId>,
    /// What it serves.
    pub services: Vec<ServiceRecord>,
    /// Whether it takes new calls.
    pub phase: Phase,
    /// End of its certificate, unix seconds.
    pub cert_expires: u64,
}

/// Whom a full exchange is with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Target {
    /// A member.
    Node(Ident),
    /// Whoever answers there: a seed, or a former peer.
    Addr(SocketAddr),
}

impl Target {
    /// Where to dial.
    pub fn addr(&self) -> SocketAddr {
        match self {
            Self::Node(ident) => ident.addr,
            Self::Addr(addr) => *addr,
        }
    }
}

/// What the state machine wants done. It does no I/O itself.
#[derive(Debug)]
pub enum Outgoing {
    /// Send a SWIM packet; losing it is fine, delaying it is not.
    Datagram {
        /// Whom to.
        to: Ident,
        /// The packet, at most 1150 bytes.
        bytes: Bytes,
    },
    /// Send records over every live connection, except back to where they came from.
    Push {
        /// Where they came from, if not from here.
        except: Option<NodeId>,
        /// The records.
        records: Vec<SignedRecord>,
    },
    /// Exchange full state over a stream and give the answer to [`Gossip::sync_reply`].
    Sync(Sync),
    /// Store the generation before anything else is sent.
    Generation(u64),
    /// Store the addresses of live members.
    Peers(Vec<SocketAddr>),
    /// The mesh has changed.
    Changed(Arc<Snapshot>),
}

/// A full exchange to make.
#[derive(Debug)]
pub struct Sync {
    /// With whom.
    pub with: Target,
    /// What this node knows.
    pub state: FullState,
}

/// Things that were refused; all of them stay 0 in a healthy mesh.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counters {
    /// Packets that are no SWIM packets, or speak for another node than the connection's.
    pub packets_refused: u64,
    /// Records whose signature, chain, names or size are wrong.
    pub records_refused: u64,
}

/// Membership, records and contacts of one node.
///
/// Call a method with what happened and the time; then take everything from [`Gossip::drain`]; call [`Gossip::tick`] at
/// [`Gossip::next_tick`].
pub struct Gossip {
    membership: Membership,
    records: Records,
    credentials: Box<dyn Credentials>,
    announcement: Announcement,
    seq: u64,
    peers: HashMap<NodeId, Peer>,
    /// `since` of this node's own status.
    started: u64,
    contacts: Contacts,
    seeds: Vec<SocketAddr>,
    remembered: Vec<SocketAddr>,
    record_asked: HashMap<NodeId, Instant>,
    next_housekeeping: Instant,
    next_exchange: Instant,
    left: bool,
    changed: bool,
    outgoing: Vec<Outgoing>,
    counters: Counters,
    rng: StdRng,
    /// Pairs the two clocks: `Instant` for timers, unix seconds for people.
    epoch: (Instant, u64),
}

struct Peer {
    state: MemberState,
    since: u64,
    first_seen: Instant,
}

impl Gossip {
    /// A node that knows only itself, its seeds, and the addresses it remembers from its former life.
    ///
    /// `epoch` is one moment by both clocks (unix seconds). The caller has stored `me.generation` already.
    pub fn new(
        me: Ident,
        announcement: Announcement,
        credentials: Box<dyn Credentials>,
        remembered: Vec<SocketAddr>,
        config: &Config,
        epoch: (Instant, u64),
    ) -> Self {
        let timing =
            Timing { probe_period: config.probe_period, probe_rtt: config.probe_rtt, suspicion: config.suspicion };
        let mut gossip = Self {
            membership: Membership::new(me, timing, StdRng::seed_from_u64(config.seed)),
            records: Records::default(),
            credentials,
            announcement,
            seq: 0,
            peers: HashMap::new(),
            started: epoch.1,
            contacts: Contacts::default(),
            seeds: Vec::new(),
            remembered,
            record_asked: HashMap::new(),
            next_housekeeping: epoch.0,
            next_exchange: epoch.0 + EXCHANGE,
            left: false,
            changed: true,
            outgoing: Vec::new(),
            counters: Counters::default(),
            rng: StdRng::seed_from_u64(config.seed.rotate_left(32) ^ 1),
            epoch,
        };
        gossip.publish_own_record();
        gossip
    }

    /// A packet from an authenticated peer. Packets that speak for somebody else are refused.
    pub fn deliver(&mut self, from: NodeId, packet: &[u8], now: Instant) {
        if self.left {
            return;
        }
        if Membership::claimed_sender(packet) != Some(from) {
            self.counters.packets_refused += 1;
            return;
        }
        match self.membership.packet(packet, now) {
            Ok(effects) => self.apply(effects, now),
            Err(error) => {
                self.counters.packets_refused += 1;
                tracing::debug!(%from, error, "refused a gossip packet");
            }
        }
    }

    /// Records pushed by an authenticated peer: verified, stored and passed on once if they are news.
    pub fn receive_records(&mut self, from: NodeId, records: Vec<SignedRecord>, now: Instant) {
        let news = self.store(records);
        if !news.is_empty() {
            self.outgoing.push(Outgoing::Push { except: Some(from), records: news });
        }
        self.refresh(now);
    }

    /// A peer's full state; returns ours for the answer.
    pub fn sync(&mut self, from: NodeId, state: FullState, now: Instant) -> FullState {
        self.sync_reply(from, state, now);
        self.full_state()
    }

    /// A peer's answer to our full state.
    pub fn sync_reply(&mut self, from: NodeId, state: FullState, now: Instant) {
        if self.left {
            return;
        }
        // Members first: records of nodes that membership has forgotten are not kept.
        match self.membership.learn(&state.members, now) {
            Ok(effects) => self.apply(effects, now),
            Err(error) => tracing::debug!(%from, error, "refused a peer's members"),
        }
        self.receive_records(from, state.records, now);
    }

    /// Changes what this node tells about itself.
    pub fn announce(&mut self, announcement: Announcement, now: Instant) {
        if self.announcement != announcement && !self.left {
            self.announcement = announcement;
            self.publish_own_record();
            self.refresh(now);
        }
    }

    /// What this node tells about itself now.
    pub fn announcement(&self) -> &Announcement {
        &self.announcement
    }

    /// Where to look for the mesh; replaces the former list.
    pub fn set_seeds(&mut self, seeds: Vec<SocketAddr>) {
        self.seeds = seeds;
    }

    /// Says good-bye. The outgoing messages must still be sent; nothing is received any more.
    pub fn leave(&mut self, now: Instant) {
        if self.left {
            return;
        }
        self.announcement.phase = Phase::Left;
        self.publish_own_record();
        let mut effects = self.membership.leave(now);
        for _ in 0..3 {
            effects.extend(self.membership.gossip(now));
        }
        self.apply(effects, now);
        self.left = true;
    }

    /// When [`Gossip::tick`] is wanted.
    pub fn next_tick(&self) -> Instant {
        self.membership.next_timer().map_or(self.next_housekeeping, |at| at.min(self.next_housekeeping))
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Instant) {
        if self.left {
            self.next_housekeeping = now + Duration::from_secs(3600);
            return;
        }
        let effects = self.membership.tick(now);
        self.apply(effects, now);
        if now >= self.next_housekeeping {
            self.next_housekeeping = now + HOUSEKEEPING;
            self.housekeep(now);
        }
    }

    /// Takes what is to be done, in order.
    pub fn drain(&mut self) -> Vec<Outgoing> {
        if std::mem::take(&mut self.changed) {
            let snapshot = Arc::new(self.snapshot());
            self.outgoing.push(Outgoing::Changed(snapshot));
        }
        std::mem::take(&mut self.outgoing)
    }

    /// What was refused so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    fn apply(&mut self, effects: Vec<Effect>, now: Instant) {
        for effect in effects {
            match effect {
                Effect::Send { to, bytes } => self.outgoing.push(Outgoing::Datagram { to, bytes }),
                Effect::Rejoined(ident) => {
                    tracing::info!(generation = ident.generation, "the mesh had given this node up; rejoining");
                    self.outgoing.push(Outgoing::Generation(ident.generation));
                    self.publish_own_record();
                }
            }
        }
        self.refresh(now);
    }

    /// Brings `peers` up to what membership and records say.
    fn refresh(&mut self, now: Instant) {
        let unix = self.unix(now);
        let mut known = 0;
        for state in self.membership.others() {
            known += 1;
            match self.peers.get_mut(&state.id) {
                Some(peer) if peer.state == state => {}
                Some(peer) => {
                    if peer.state.health != state.health || peer.state.generation != state.generation {
                        log_transition(&peer.state, &state, self.records.get(&state.id).map(|s| &s.record));
                        peer.since = unix;
                        peer.first_seen = now;
                    }
                    peer.state = state;
                    self.changed = true;
                }
                None => {
                    self.peers.insert(state.id, Peer { state, since: unix, first_seen: now });
                    self.changed = true;
                }
            }
        }
        if known != self.peers.len() {
            let remembered: Vec<NodeId> = self.membership.others().map(|m| m.id).collect();
            let me = self.membership.me().id;
            self.peers.retain(|id, _| remembered.contains(id));
            self.records.retain(|id| *id == me || remembered.contains(id));
            self.changed = true;
        }
    }

    /// Verifies and stores; returns what was news.
    fn store(&mut self, records: Vec<SignedRecord>) -> Vec<SignedRecord> {
        let me = self.membership.me().id;
        let mut news = Vec::new();
        for signed in records {
            match signed.peek() {
                Ok(claimed) if claimed.id == me || !self.records.is_news(&claimed) => continue,
                Ok(_) => {}
                Err(_) => {
                    self.counters.records_refused += 1;
                    continue;
                }
            }
            match self.credentials.verify(&signed) {
                Ok(record) => {
                    news.push(signed.clone());
                    self.records.put(record, signed);
                    self.changed = true;
                }
                Err(error) => {
                    self.counters.records_refused += 1;
                    tracing::warn!(%error, "refused a node record");
                }
            }
        }
        news
    }

    fn publish_own_record(&mut self) {
        self.seq += 1;
        let me = self.membership.me();
        let a = &self.announcement;
        let record = NodeRecord {
            id: me.id,
            generation: me.generation,
            seq: self.seq,
            name: a.name.clone(),
            addr: me.addr,
            kind: a.kind,
            zone: a.zone.clone(),
            issuer: a.issuer,
            services: a.services.clone(),
            phase: a.phase,
            cert_expires: a.cert_expires,
        };
        let signed = self.credentials.sign(&record);
        self.records.put(record, signed.clone());
        self.outgoing.push(Outgoing::Push { except: None, records: vec![signed] });
        self.changed = true;
    }

    fn housekeep(&mut self, now: Instant) {
        let me = self.membership.me();
        let live: Vec<MemberState> =
            self.peers.values().map(|p| p.state).filter(|s| s.health != MemberHealth::Down).collect();

        // Seeds, former peers and the dead, as long as nobody alive answers at the address.
        let mut dead: Vec<SocketAddr> = self
            .peers
            .values()
            .filter(|p| p.state.health == MemberHealth::Down && !self.has_left(&p.state))
            .map(|p| p.state.addr)
            .collect();
        dead.sort_unstable();
        let lonely = live.is_empty();
        let mut wanted: Vec<SocketAddr> = self.seeds.clone();
        wanted.extend(dead);
        // Former peers matter only while nobody is there: seeds and the dead cover a partition.
        wanted.extend(self.remembered.iter().filter(|_| lonely));
        wanted.retain(|addr| *addr != me.addr && !live.iter().any(|s| s.addr == *addr));
        for addr in self.contacts.due(&wanted, now) {
            self.push_sync(Target::Addr(addr));
        }

        // Live members without a record of their present life.
        self.record_asked.retain(|_, at| now.duration_since(*at) < Duration::from_secs(2));
        let lacking: Vec<Ident> = self
            .peers
            .values()
            .filter(|p| p.state.health == MemberHealth::Alive && now.duration_since(p.first_seen) > RECORD_GRACE)
            .filter(|p| self.records.get(&p.state.id).is_none_or(|s| s.record.generation < p.state.generation))
            .map(|p| Ident { id: p.state.id, addr: p.state.addr, generation: p.state.generation })
            .filter(|ident| !self.record_asked.contains_key(&ident.id))
            .take(RECORDS_PER_ROUND)
            .collect();
        for ident in lacking {
            self.record_asked.insert(ident.id, now);
            self.push_sync(Target::Node(ident));
        }

        if now >= self.next_exchange {
            let rounds = (live.len() as f64 + 2.0).log2();
            self.next_exchange = now + EXCHANGE.mul_f64(rounds * self.rng.random_range(0.8..1.2));
            if !live.is_empty() {
                let with = live[self.rng.random_range(0..live.len())];
                self.push_sync(Target::Node(Ident { id: with.id, addr: with.addr, generation: with.generation }));
            }
        }
    }

    fn push_sync(&mut self, with: Target) {
        let state = self.full_state();
        self.outgoing.push(Outgoing::Sync(Sync { with, state }));
    }

    fn full_state(&self) -> FullState {
        let me = self.membership.me();
        let mut members: Vec<MemberState> = self.membership.others().collect();
        members.push(MemberState {
            id: me.id,
            addr: me.addr,
            generation: me.generation,
            // foca does not tell its own incarnation; any packet of ours carries the real one, and 0 never overrides it.
            incarnation: 0,
            health: MemberHealth::Alive,
        });
        FullState { members, records: self.records.signed() }
    }

    fn has_left(&self, state: &MemberState) -> bool {
        self.records
            .get(&state.id)
            .is_some_and(|s| s.record.phase == Phase::Left && s.record.generation >= state.generation)
    }

    fn snapshot(&mut self) -> Snapshot {
        let me = self.membership.me();
        let mut members: Vec<MemberView> = self
            .peers
            .values()
            .map(|peer| MemberView {
                id: peer.state.id,
                addr: peer.state.addr,
                generation: peer.state.generation,
                incarnation: peer.state.incarnation,
                health: peer.state.health,
                left: self.has_left(&peer.state),
                since: peer.since,
                is_self: false,
                record: self.records.get(&peer.state.id).map(|s| Arc::new(s.record.clone())),
            })
            .collect();
        members.push(MemberView {
            id: me.id,
            addr: me.addr,
            generation: me.generation,
            incarnation: 0,
            health: MemberHealth::Alive,
            left: self.announcement.phase == Phase::Left,
            since: self.started,
            is_self: true,
            record: self.records.get(&me.id).map(|s| Arc::new(s.record.clone())),
        });
        members.sort_by(|a, b| a.record.as_ref().map(|r| &r.name).cmp(&b.record.as_ref().map(|r| &r.name)));

        let mut live: Vec<SocketAddr> =
            members.iter().filter(|m| !m.is_self && m.is_live()).map(|m| m.addr).take(MAX_REMEMBERED).collect();
        live.sort();
        // An empty mesh does not erase the way back into it.
        if !live.is_empty() && live != self.remembered {
            self.remembered.clone_from(&live);
            self.outgoing.push(Outgoing::Peers(live));
        }
        Snapshot::new(members)
    }

    fn unix(&self, now: Instant) -> u64 {
        self.epoch.1 + now.saturating_duration_since(self.epoch.0).as_secs()
    }
}

fn log_transition(before: &MemberState, after: &MemberState, record: Option<&NodeRecord>) {
    let name = record.map_or_else(|| format!("{:?}", after.id), |r| r.name.to_string());
    tracing::info!(
        node = name,
        addr = %after.addr,
        generation = after.generation,
        "member {:?} -> {:?}", before.health, after.health
    );
}
