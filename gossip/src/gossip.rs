mod exchange;
mod housekeeping;
mod intake;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{BufMut, BytesMut};
use rand::{SeedableRng, rngs::StdRng};
use starling_protocol::{
    Forgotten, Items, MAX_PUSH_BYTES, MemberHealth, MemberState, NodeId, NodeRecord, Phase, Pong, ROOT_HASH_BYTES,
    SignedDocument, SignedRecord,
};

use crate::{
    Announcement, Config, Counters, Credentials, Detail, ForgetError, Memory, Outgoing, Target, Via,
    contacts::Contacts,
    documents::{DocumentError, DocumentView, Documents},
    membership::{Effect, Ident, MAX_RETOLD, Membership},
    records::Records,
    roster::{Peer, Roster},
    snapshot::{MemberView, Photographer, Snapshot},
};

/// How often contacts are looked over.
const HOUSEKEEPING: Duration = Duration::from_millis(250);
/// Pause between periodic full exchanges with a random member, at N = 2; grows with log2 N.
const EXCHANGE: Duration = Duration::from_secs(30);
/// Most addresses of former members that are kept to find back into the mesh.
const MAX_REMEMBERED: usize = 64;
/// Members that a change of this node's own is pushed to, and that somebody else's is passed on to. What both miss, the
/// root hash in the next packets brings up.
const PUSH: usize = 64;
const PASS_ON: usize = 6;
/// Changes of others that come within this time are passed on together.
const PASS_ON_PERIOD: Duration = Duration::from_millis(50);
/// Pause between two exchanges with nodes that hold this one for dead.
const DISPUTE: Duration = Duration::from_millis(100);
/// Changes are published together, but for the first.
const PUBLISH_PERIOD: Duration = Duration::from_millis(200);
/// Suspicions and refutations come in bursts, and are looked at together.
const REFRESH_PERIOD: Duration = Duration::from_millis(100);
/// Rounds of gossip that a good-bye is told in.
const GOODBYES: usize = 4;

/// Membership, records, documents and contacts of one node.
///
/// Call a method with what happened and the time; then take everything from [`Gossip::drain`]; call [`Gossip::tick`] at
/// [`Gossip::next_tick`].
pub struct Gossip {
    membership: Membership,
    roster: Roster,
    records: Records,
    documents: Documents,
    credentials: Box<dyn Credentials>,
    announcement: Announcement,
    seq: u64,
    /// `since` of this node's own status.
    started: u64,
    photographer: Photographer,
    contacts: Contacts,
    seeds: Vec<SocketAddr>,
    remembered: Vec<SocketAddr>,
    /// Who answered at an address that is not its own: a seed behind a name or another interface.
    aliases: HashMap<SocketAddr, NodeId>,
    /// Members whose record may be missing.
    lacking: BTreeMap<NodeId, Lack>,
    to_pass_on: Items,
    /// Whether it has the record of a node that is new here.
    introducing: bool,
    next_pass_on: Instant,
    next_housekeeping: Instant,
    next_exchange: Instant,
    next_compare: Instant,
    next_dispute: Instant,
    next_refresh: Instant,
    next_warning: Instant,
    next_publish: Instant,
    /// When this node's own set of records and documents last changed.
    settled_at: Instant,
    check_limit: Duration,
    left: bool,
    changed: bool,
    outgoing: Vec<Outgoing>,
    counters: Counters,
    rng: StdRng,
    /// Pairs the two clocks: `Instant` for timers, unix seconds for people.
    epoch: (Instant, u64),
}

/// A record that has not come.
#[derive(Debug, Clone, Copy)]
struct Lack {
    since: Instant,
    /// When the member was last asked for it.
    asked: Option<Instant>,
}

impl Gossip {
    /// A node that knows only itself, and what it has kept from its former life.
    ///
    /// `epoch` is one moment by both clocks (unix seconds). The caller has stored `me.generation` already.
    pub fn new(
        me: Ident,
        announcement: Announcement,
        credentials: Box<dyn Credentials>,
        memory: Memory,
        config: &Config,
        epoch: (Instant, u64),
    ) -> Self {
        let now = epoch.0;
        let mut gossip = Self {
            membership: Membership::new(me, config),
            roster: Roster::default(),
            records: Records::default(),
            documents: Documents::with_floors(memory.floors),
            credentials,
            announcement,
            seq: 0,
            started: epoch.1,
            photographer: Photographer::new(config.probe_period * 2),
            contacts: Contacts::default(),
            seeds: Vec::new(),
            remembered: memory.peers,
            aliases: HashMap::new(),
            lacking: BTreeMap::new(),
            to_pass_on: Items::default(),
            introducing: false,
            next_pass_on: now,
            next_housekeeping: now,
            next_exchange: now + EXCHANGE,
            next_compare: now,
            next_dispute: now,
            next_refresh: now,
            next_warning: now,
            next_publish: now,
            settled_at: now,
            check_limit: config.suspicion[0],
            left: false,
            changed: true,
            outgoing: Vec::new(),
            counters: Counters::default(),
            rng: StdRng::seed_from_u64(config.seed.rotate_left(32) ^ 1),
            epoch,
        };
        for signed in memory.documents {
            if let Err(error) = gossip.take_document(signed) {
                tracing::warn!(%error, "a stored document is not used");
            }
        }
        gossip.publish_own_record(now);
        gossip
    }

    /// A datagram from an authenticated peer. Packets that speak for somebody else are refused.
    pub fn deliver(&mut self, from: NodeId, datagram: &[u8], now: Instant) {
        if self.left {
            return;
        }
        let unix = self.unix(now);
        let outcome = match datagram.split_first_chunk::<ROOT_HASH_BYTES>() {
            Some((root, packet)) => {
                let known = self.roster.get(&from).map(|peer| peer.state);
                let effects = self.membership.packet(from, known.as_ref(), packet, now, unix);
                effects.map(|effects| (u64::from_be_bytes(*root), effects))
            }
            None => Err("too short".into()),
        };
        match outcome {
            Ok((root, effects)) => {
                self.roster.heard(&from, Some(root), now);
                self.apply(effects, now);
                self.compare(from, root, now);
            }
            Err(error) => {
                self.counters.packets_refused += 1;
                tracing::debug!(%from, error, "refused a gossip packet");
            }
        }
    }

    /// Items from an authenticated peer: verified, stored and passed on once if they are news.
    pub fn receive(&mut self, from: NodeId, items: Items, via: Via, now: Instant) {
        if self.left {
            return;
        }
        self.roster.heard(&from, None, now);
        let mut news = self.store(items, now);
        if via == Via::Exchange {
            if news.records.len() > MAX_RETOLD {
                news.records.clear();
            }
            // A node that has just come in has few links to push its record over, or none but this one.
            let by_sender = |signed: &Arc<SignedRecord>| signed.peek_edition().is_ok_and(|edition| edition.id == from);
            self.introducing |= news.records.iter().any(by_sender);
        }
        self.to_pass_on.append(news);
        self.pass_on(now);
        self.refresh(now);
    }

    /// A ping over a stream; refutes the suspicion that it tells of.
    pub fn answer_ping(&mut self, from: NodeId, suspected: Option<u16>, now: Instant) -> Pong {
        self.roster.heard(&from, None, now);
        let Some(incarnation) = suspected.filter(|_| !self.left) else {
            let me = self.membership.own_state();
            return Pong { generation: me.generation, incarnation: me.incarnation };
        };
        let (pong, effects) = self.membership.refute(incarnation, now);
        self.apply(effects, now);
        pong
    }

    /// What came of an [`Outgoing::Check`]; `None` if the suspect gave no answer.
    pub fn checked(&mut self, suspect: Ident, incarnation: u16, pong: Option<Pong>, now: Instant) {
        match pong {
            Some(Pong { generation, incarnation }) => {
                self.roster.heard(&suspect.id, None, now);
                let (Ident { id, addr, .. }, health) = (suspect, MemberHealth::Alive);
                let state = MemberState { id, addr, generation, incarnation, health, down_s: 0 };
                self.learn(id, &[state], now);
            }
            None => self.membership.check_failed(&suspect, incarnation, now),
        }
        self.refresh(now);
    }

    /// Changes what this node tells about itself.
    pub fn announce(&mut self, announcement: Announcement, now: Instant) {
        if self.announcement != announcement && !self.left {
            self.announcement = announcement;
            self.publish_own_record(now);
            self.refresh(now);
        }
    }

    /// What this node tells about itself now.
    pub fn announcement(&self) -> &Announcement {
        &self.announcement
    }

    /// Publishes a document to the mesh, from here. Errors as if it had come from a peer; one that is already known is
    /// fine.
    pub fn publish(&mut self, signed: SignedDocument, now: Instant) -> Result<(), DocumentError> {
        let signed = Arc::new(signed);
        let claimed = signed.peek().map_err(|e| DocumentError::Unverified(e.to_string()))?;
        if claimed.expires.is_some_and(|expires| expires < self.unix(now)) {
            return Err(DocumentError::Expired { kind: claimed.kind, version: claimed.version });
        }
        if self.take_document(signed.clone())? {
            self.settled_at = now;
            let items = Items { documents: vec![signed], ..Items::default() };
            self.outgoing.push(Outgoing::Push { fanout: PUSH, items });
        }
        Ok(())
    }

    /// Mesh documents that this node has.
    pub fn documents(&self) -> Vec<DocumentView> {
        self.documents.all().cloned().collect()
    }

    /// Strikes a dead member off, mesh-wide.
    pub fn forget(&mut self, id: &NodeId, prune: bool, now: Instant) -> Result<(), ForgetError> {
        let state = self.roster.get(id).ok_or(ForgetError::Unknown)?.state;
        if state.health != MemberHealth::Down {
            return Err(ForgetError::Alive);
        }
        let forgotten = Forgotten { id: *id, generation: state.generation, prune };
        let items = self.store(Items { forgotten: vec![forgotten], ..Items::default() }, now);
        if self.roster.forgotten(&state).is_none() {
            return Err(ForgetError::Full);
        }
        self.outgoing.push(Outgoing::Push { fanout: PUSH, items });
        Ok(())
    }

    /// Tells the time by the wall clock, which may have been set, or gone on while this machine slept.
    pub fn set_clock(&mut self, now: Instant, unix: u64) {
        self.epoch = (now, unix);
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
        self.publish_own_record(now);
        let mut effects = self.membership.leave(now);
        for _ in 0..GOODBYES {
            effects.extend(self.membership.gossip(now));
        }
        self.apply(effects, now);
        self.left = true;
        self.next_publish = now;
    }

    /// When [`Gossip::tick`] is wanted.
    pub fn next_tick(&self) -> Instant {
        if self.left {
            return self.next_housekeeping;
        }
        let publish = self.changed.then_some(self.next_publish);
        let pass_on = (!self.to_pass_on.is_empty()).then_some(self.next_pass_on);
        let refresh = self.membership.has_changed().then_some(self.next_refresh);
        let others = [self.membership.next_timer(), publish, pass_on, refresh, self.photographer.next()];
        others.into_iter().flatten().fold(self.next_housekeeping, Instant::min)
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Instant) {
        if self.left {
            self.next_housekeeping = now + Duration::from_secs(3600);
            return;
        }
        let effects = self.membership.tick(now);
        self.apply(effects, now);
        self.pass_on(now);
        self.refresh(now);
        self.changed |= self.photographer.next().is_some_and(|at| at <= now);
        if now >= self.next_housekeeping {
            self.next_housekeeping = now + HOUSEKEEPING;
            self.housekeep(now);
        }
    }

    /// Takes what is to be done, in order.
    pub fn drain(&mut self, now: Instant) -> Vec<Outgoing> {
        if self.changed && now >= self.next_publish {
            self.changed = false;
            self.next_publish = now + PUBLISH_PERIOD;
            let snapshot = Arc::new(self.snapshot(now));
            self.outgoing.push(Outgoing::Changed(snapshot));
        }
        std::mem::take(&mut self.outgoing)
    }

    /// What was counted so far.
    pub fn counters(&self) -> Counters {
        let (doubt, backlog) = (self.membership.doubt().into(), self.membership.backlog() as u64);
        Counters { doubt, backlog, ..self.counters }
    }

    /// Whether the mesh has declared this node dead, and it is on its way back.
    pub fn is_lost(&self) -> bool {
        self.membership.is_lost()
    }

    /// This node, in its present life.
    pub fn me(&self) -> Ident {
        self.membership.me()
    }

    /// Hash of all records and documents that this node has.
    pub fn root(&self) -> u64 {
        self.records.root() ^ self.documents.root()
    }

    /// What is known of each member at this moment.
    pub fn details(&self, now: Instant) -> Vec<Detail> {
        let detail = |peer: Peer| {
            let (id, heard) = (peer.state.id, self.roster.heard_of(&peer.state.id));
            let ago = heard.map(|heard| now.saturating_duration_since(heard.at));
            Detail { id, heard: ago, root: heard.and_then(|heard| heard.root) }
        };
        self.roster.all().map(detail).collect()
    }

    fn learn(&mut self, from: NodeId, members: &[MemberState], now: Instant) {
        let unix = self.unix(now);
        match self.membership.learn(members, now, unix) {
            Ok(effects) => self.apply(effects, now),
            Err(error) => tracing::debug!(%from, error, "refused a peer's members"),
        }
    }

    fn apply(&mut self, effects: Vec<Effect>, now: Instant) {
        let root = self.root();
        for effect in effects {
            match effect {
                Effect::Send { to, bytes, reach } => {
                    let mut datagram = BytesMut::with_capacity(ROOT_HASH_BYTES + bytes.len());
                    datagram.put_u64(root);
                    datagram.put(bytes);
                    self.outgoing.push(Outgoing::Datagram { to, bytes: datagram.freeze(), reach });
                }
                Effect::Check { suspect, incarnation } => {
                    let limit = self.check_limit;
                    self.outgoing.push(Outgoing::Check { suspect, incarnation, limit });
                }
                Effect::Exchange(ident) => {
                    if self.next_dispute <= now {
                        self.next_dispute = now + DISPUTE;
                        self.push_sync(Target::Node(ident), now);
                    }
                }
                Effect::Lost => {
                    tracing::warn!("the mesh has given this node up; it comes back when its link is good");
                    self.counters.lost += 1;
                    // Whoever answers says whether this node could be heard all the time.
                    self.exchange_with_anybody(now);
                }
                Effect::Rejoined(ident) => {
                    tracing::info!(generation = ident.generation, "back in the mesh");
                    self.outgoing.push(Outgoing::Generation(ident.generation));
                    self.publish_own_record(now);
                    self.exchange_with_anybody(now);
                }
            }
        }
        self.refresh(now);
    }

    /// Brings the roster up to what membership says: at once if it matters to calls, or else soon.
    fn refresh(&mut self, now: Instant) {
        if !self.membership.has_changed() || (!self.membership.is_urgent() && now < self.next_refresh) {
            return;
        }
        self.next_refresh = now + REFRESH_PERIOD;
        let touched = self.membership.take_touched();
        let (me, unix) = (self.membership.me().id, self.unix(now));
        let changes = self.roster.update(&touched, self.membership.observed(&touched), me, unix);
        for (id, before) in &changes.turned {
            if let Some(peer) = self.roster.get(id) {
                log_transition(*before, &peer, self.records.get(id));
            }
        }
        self.outgoing.extend(changes.renewed.iter().copied().map(Outgoing::Renewed));
        self.outgoing.extend(changes.died.iter().copied().map(Outgoing::Gone));
        if changes.shrunk {
            let remembered: BTreeSet<NodeId> = self.membership.others().map(|m| m.id).chain([me]).collect();
            self.roster.retain(|id| remembered.contains(id));
            self.records.retain(|id| remembered.contains(id));
        }
        for id in &changes.members {
            self.lacking.entry(*id).or_insert(Lack { since: now, asked: None });
        }
        self.changed |= !changes.members.is_empty() || changes.shrunk || touched.has(&me);
    }

    fn publish_own_record(&mut self, now: Instant) {
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
        let signed = Arc::new(self.credentials.sign(&record));
        self.records.put(Arc::new(record), signed.clone());
        let items = Items { records: vec![signed], ..Items::default() };
        self.outgoing.push(Outgoing::Push { fanout: PUSH, items });
        self.settled_at = now;
        self.changed = true;
    }

    fn pass_on(&mut self, now: Instant) {
        if !self.to_pass_on.is_empty() && now >= self.next_pass_on {
            self.next_pass_on = now + PASS_ON_PERIOD;
            let items = self.to_pass_on.take_within(MAX_PUSH_BYTES / 2);
            let fanout = if self.introducing { PUSH } else { PASS_ON };
            self.introducing &= !self.to_pass_on.is_empty();
            self.outgoing.push(Outgoing::Push { fanout, items });
        }
    }

    fn has_left(&self, state: &MemberState) -> bool {
        self.roster.forgotten(state).is_some()
            || self.records.get(&state.id).is_some_and(|r| r.phase == Phase::Left && r.generation >= state.generation)
    }

    fn snapshot(&mut self, now: Instant) -> Snapshot {
        let me = self.membership.own_state();
        let shown = self.roster.all().filter(|p| self.roster.forgotten(&p.state).is_none_or(|f| !f.prune));
        let mut members: Vec<MemberView> = shown
            .map(|peer| MemberView {
                id: peer.state.id,
                addr: peer.state.addr,
                generation: peer.state.generation,
                incarnation: peer.state.incarnation,
                health: peer.shown,
                suspected_by: self.roster.accusers(&peer.state.id).to_vec(),
                left: self.has_left(&peer.state),
                since: peer.since,
                is_self: false,
                record: self.records.get(&peer.state.id).cloned(),
            })
            .collect();
        members.push(MemberView {
            id: me.id,
            addr: me.addr,
            generation: me.generation,
            incarnation: me.incarnation,
            health: MemberHealth::Alive,
            suspected_by: Vec::new(),
            left: self.announcement.phase == Phase::Left,
            since: self.started,
            is_self: true,
            record: self.records.get(&me.id).cloned(),
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
        self.photographer.snapshot(members, &self.records, me.id, &self.announcement.zone, now)
    }

    fn unix(&self, now: Instant) -> u64 {
        self.epoch.1 + now.saturating_duration_since(self.epoch.0).as_secs()
    }
}

fn log_transition(before: MemberHealth, peer: &Peer, record: Option<&Arc<NodeRecord>>) {
    let name = record.map_or_else(|| format!("{:?}", peer.state.id), |r| r.name.to_string());
    tracing::info!(
        node = name,
        addr = %peer.state.addr,
        generation = peer.state.generation,
        "member {before:?} -> {:?}", peer.shown
    );
}
