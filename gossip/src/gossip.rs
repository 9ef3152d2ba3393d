mod exchange;
mod housekeeping;
mod intake;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use rand::{SeedableRng, rngs::StdRng};
use starling_protocol::{
    Items, MAX_PUSH_BYTES, MemberHealth, NodeId, NodeRecord, Packet, PacketError, Phase, Pong, SignedDocument,
    SignedRecord, SignedStrike,
};

use crate::{
    Announcement, Config, Counters, Credentials, Detail, ForgetError, Memory, Outgoing, Target, Via,
    contacts::Contacts,
    documents::{DocumentError, DocumentView, Documents},
    membership::{Effect, Grounds, Ident, MAX_RETOLD, Membership, PeerState},
    records::Records,
    roster::{Peer, Roster},
    snapshot::{MemberView, Photographer, Snapshot},
    trust::Trust,
    twins::Twins,
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
/// Pause between two comparisons because of differing root hashes, at N = 2; grows with log2 N, but for a node that is far
/// behind.
const COMPARE: Duration = Duration::from_millis(250);
/// Members that a node asks, when it is given up, for how long they have heard it.
const LOST_EXCHANGES: usize = 7;
/// Peers without a record that are looked after at a time.
const MAX_STRANGERS: usize = 64;
/// Pause between two times that the addresses of members are stored.
const PEERS_PERIOD: Duration = Duration::from_secs(5);
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
    trust: Trust,
    credentials: Arc<dyn Credentials>,
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
    /// Peers that talk to this node, and whose record is missing, or those of members that they mention.
    strangers: BTreeMap<NodeId, Lack>,
    /// Members with whom comparisons were in vain, until when there is none, and for how long after the next.
    futile: BTreeMap<NodeId, (Instant, Duration)>,
    /// For how long members have been dead, as the peer whose items are being taken says, in seconds.
    ages: HashMap<NodeId, u32>,
    /// A later life of this node than its own, of which there is a record.
    outlive: Option<u64>,
    twins: Twins,
    /// Which life the other node has that runs with this one's key, and until when this one leaves it in peace.
    others_turn: Option<(u64, Instant)>,
    to_pass_on: Items,
    /// Whether it has the record of a node that is new here.
    introducing: bool,
    /// Whether somebody has told all that it has, so that what is not known is most likely not there.
    introduced: bool,
    next_pass_on: Instant,
    next_housekeeping: Instant,
    next_exchange: Instant,
    next_compare: Instant,
    next_dispute: Instant,
    next_refresh: Instant,
    next_warning: Instant,
    next_publish: Instant,
    next_peers: Instant,
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
        credentials: Arc<dyn Credentials>,
        memory: Memory,
        config: &Config,
        epoch: (Instant, u64),
    ) -> Self {
        let now = epoch.0;
        let mut gossip = Self {
            membership: Membership::new(me, config, credentials.clone()),
            trust: Trust::default(),
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
            strangers: BTreeMap::new(),
            futile: BTreeMap::new(),
            ages: HashMap::new(),
            outlive: None,
            twins: Twins::default(),
            others_turn: None,
            to_pass_on: Items::default(),
            introducing: false,
            introduced: false,
            next_pass_on: now,
            next_housekeeping: now,
            next_exchange: now + EXCHANGE,
            next_compare: now,
            next_dispute: now,
            next_refresh: now,
            next_warning: now,
            next_publish: now,
            next_peers: now,
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
        let packet = match Packet::decode(datagram) {
            Ok(packet) => packet,
            Err(PacketError::Unsupported) => return self.counters.packets_unsupported += 1,
            Err(PacketError::Malformed(error)) => return self.refuse_packet(from, &error.to_string(), now),
        };
        let known = self.roster.get(&from).map(|peer| peer.state);
        let outcome = self.judge(now, |membership, grounds| membership.packet(from, known.as_ref(), &packet, grounds));
        match outcome {
            Ok(effects) => {
                self.roster.heard(&from, Some(packet.root), now);
                self.apply(effects, now);
                self.compare(from, packet.root, now);
            }
            Err(error) => self.refuse_packet(from, &error, now),
        }
    }

    fn refuse_packet(&mut self, from: NodeId, error: &str, now: Instant) {
        self.counters.packets_refused += 1;
        self.trust.malformed(from, now);
        tracing::debug!(%from, error, "refused a gossip packet");
    }

    /// A message of an authenticated peer, on a stream, was not in the protocol's form.
    pub fn malformed(&mut self, from: NodeId, now: Instant) {
        self.trust.malformed(from, now);
    }

    /// Items from an authenticated peer: verified, stored and passed on once if they are news.
    pub fn receive(&mut self, from: NodeId, items: Items, via: Via, now: Instant) {
        if self.left {
            return;
        }
        self.roster.heard(&from, None, now);
        let before = self.records.life(&from);
        let mut news = self.store(from, items, now);
        let is_new = self.records.life(&from).map(|life| life.generation) > before.map(|life| life.generation);
        self.ages.clear();
        if !news.records.is_empty() || !news.documents.is_empty() {
            self.futile.remove(&from);
        }
        if via == Via::Exchange {
            self.changed |= !self.introduced;
            self.introduced = true;
            if news.records.len() > MAX_RETOLD {
                // There may be more where that came from.
                self.next_compare = now;
                news.records.clear();
            }
            // A node that has just come in has few links to push its record over, or none but this one.
            let by_sender = |signed: &Arc<SignedRecord>| signed.peek_edition().is_ok_and(|edition| edition.id == from);
            self.introducing |= is_new && news.records.iter().any(by_sender);
        }
        let mut may_publish = |signed: &Arc<SignedRecord>| {
            signed.peek_edition().is_ok_and(|edition| self.trust.may_publish(edition.id, now))
        };
        news.records.retain(|signed| may_publish(signed));
        let newer: BTreeSet<NodeId> =
            news.records.iter().filter_map(|signed| signed.peek_edition().ok()).map(|edition| edition.id).collect();
        self.to_pass_on.records.retain(|old| old.peek_edition().is_ok_and(|edition| !newer.contains(&edition.id)));
        self.to_pass_on.append(news);
        self.pass_on(now);
        self.refresh(now);
    }

    /// A ping over a stream; refutes the suspicion that it tells of. A node that has left gives no sign of life.
    pub fn answer_ping(&mut self, from: NodeId, suspected: Option<u16>, now: Instant) -> Option<Pong> {
        if self.left {
            return None;
        }
        self.roster.heard(&from, None, now);
        let Some(incarnation) = suspected else {
            let me = self.membership.own_state();
            return Some(Pong { generation: me.generation, incarnation: me.incarnation });
        };
        let (pong, effects) = self.judge(now, |membership, grounds| membership.refute(from, incarnation, grounds));
        self.apply(effects, now);
        Some(pong)
    }

    /// What came of an [`Outgoing::Check`]; `None` if the suspect gave no answer.
    pub fn checked(&mut self, suspect: Ident, incarnation: u16, pong: Option<Pong>, now: Instant) {
        match pong {
            Some(pong) => {
                self.roster.heard(&suspect.id, None, now);
                let effects = self.judge(now, |membership, grounds| membership.vouched(&suspect, pong, grounds));
                self.apply(effects, now);
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
        // Gossip passes over what is older without a word; whoever publishes it has to know.
        self.documents.admits(&claimed)?;
        if self.take_document(signed.clone())? {
            self.settled_at = now;
            let items = Items { documents: vec![signed], ..Items::default() };
            self.outgoing.push(Outgoing::Push { fanout: PUSH, items });
        } else if self.documents.all().all(|held| held.hash != signed.hash()) {
            return Err(DocumentError::Twin { kind: claimed.kind, version: claimed.version });
        }
        Ok(())
    }

    /// Mesh documents that this node has.
    pub fn documents(&self) -> Vec<DocumentView> {
        self.documents.all().cloned().collect()
    }

    /// Strikes a dead member off, mesh-wide.
    pub fn strike(&mut self, signed: SignedStrike, now: Instant) -> Result<(), ForgetError> {
        let strike = self.credentials.verify_strike(&signed).map_err(|e| ForgetError::Unverified(e.to_string()))?;
        let state = self.roster.get(&strike.id).ok_or(ForgetError::Unknown)?.state;
        if state.health != MemberHealth::Down {
            return Err(ForgetError::Alive);
        }
        let me = self.membership.me().id;
        let items = self.store(me, Items { strikes: vec![Arc::new(signed)], ..Items::default() }, now);
        if self.roster.struck(&state).is_none() {
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
        let effects = self.judge(now, |membership, grounds| membership.tick(grounds));
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

    /// Its present incarnation.
    pub fn incarnation(&self) -> u16 {
        self.membership.own_state().incarnation
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
            Detail { id, heard: ago, root: heard.and_then(|heard| heard.root), refused: self.trust.refused(&id) }
        };
        self.roster.all().map(detail).collect()
    }

    /// Lets membership judge by what is known now.
    fn judge<T>(&mut self, now: Instant, judge: impl FnOnce(&mut Membership, &mut Grounds<'_>) -> T) -> T {
        let mut grounds = Grounds { records: &self.records, trust: &mut self.trust, now };
        judge(&mut self.membership, &mut grounds)
    }

    fn apply(&mut self, effects: Vec<Effect>, now: Instant) {
        let root = self.root();
        for effect in effects {
            match effect {
                Effect::Send { to, packet, reach } => {
                    let bytes = Packet { root, ..packet }.encode().into();
                    self.outgoing.push(Outgoing::Datagram { to, bytes, reach });
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
                Effect::Dispute(id) => {
                    let left = self.roster.get(&id).is_some_and(|peer| self.has_left(&peer.state));
                    if self.next_dispute <= now && !left {
                        self.next_dispute = now + DISPUTE;
                        self.push_sync(Target::Linked(id), now);
                    }
                }
                Effect::Introduce(id) if !self.trust.listens(&id, now) => {}
                Effect::Introduce(id) => {
                    if self.strangers.len() < MAX_STRANGERS {
                        self.strangers.entry(id).or_insert(Lack { since: now, asked: None });
                    }
                }
                Effect::Appeal(to) => self.appeal(to, now),
                Effect::Lost => {
                    tracing::warn!("the mesh has given this node up; it comes back when its link is good");
                    self.counters.lost += 1;
                    // Whoever answers says whether this node could be heard all the time.
                    let asked = self.exchange_with(LOST_EXCHANGES, now);
                    self.membership.asks_why(asked);
                }
                Effect::Rejoined(ident) => {
                    tracing::info!(generation = ident.generation, "back in the mesh");
                    self.outgoing.push(Outgoing::Generation(ident.generation));
                    self.publish_own_record(now);
                    self.exchange_with(1, now);
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
        let observed = self.membership.observed(&touched, &self.trust, now);
        let changes = self.roster.update(&touched, observed, me, unix);
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
            self.trust.retain(|id| remembered.contains(id));
            self.twins.retain(|id| remembered.contains(id));
            self.futile.retain(|id, _| remembered.contains(id));
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
            services: a.services.clone(),
            phase: a.phase,
            cert_expires: a.cert_expires,
            issuer: a.issuer.clone(),
            speaks: a.speaks.clone(),
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

    fn has_left(&self, state: &PeerState) -> bool {
        self.roster.struck(state).is_some()
            || self.records.get(&state.id).is_some_and(|r| r.phase == Phase::Left && r.generation >= state.generation)
    }

    fn snapshot(&mut self, now: Instant) -> Snapshot {
        let me = self.membership.own_state();
        let shown = self.roster.all().filter(|p| self.roster.struck(&p.state).is_none_or(|strike| !strike.prune));
        let mut members: Vec<MemberView> = shown
            .map(|peer| MemberView {
                id: peer.state.id,
                addr: peer.state.addr,
                generation: peer.state.generation,
                incarnation: peer.state.incarnation,
                health: peer.shown,
                suspected_by: self.roster.accusers(&peer.state.id).to_vec(),
                left: self.has_left(&peer.state),
                unheard: self.roster.heard_of(&peer.state.id).is_none() && self.membership.doubts(&peer.state.id),
                since: peer.since,
                is_self: false,
                also_at: self.twins.of(&peer.state.id, peer.state.addr, now),
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
            unheard: false,
            since: self.started,
            is_self: true,
            also_at: self.twins.of(&me.id, me.addr, now),
            record: self.records.get(&me.id).cloned(),
        });
        members.sort_by(|a, b| a.record.as_ref().map(|r| &r.name).cmp(&b.record.as_ref().map(|r| &r.name)));

        let mut live: Vec<SocketAddr> =
            members.iter().filter(|m| !m.is_self && m.is_live()).map(|m| m.addr).take(MAX_REMEMBERED).collect();
        live.sort();
        // An empty mesh does not erase the way back into it.
        if !live.is_empty() && live != self.remembered && now >= self.next_peers {
            self.next_peers = now + PEERS_PERIOD;
            self.remembered.clone_from(&live);
            self.outgoing.push(Outgoing::Peers(live));
        }
        let mut snapshot = self.photographer.snapshot(members, &self.records, me.id, &self.announcement.zone, now);
        snapshot.introduced = self.introduced;
        snapshot
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
