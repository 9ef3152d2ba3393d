//! The driver around foca: the only place that speaks to it.
//!
//! foca decides who is suspect and who is down, and writes the packets. This driver decides *when*: it owns the timers,
//! and adds what foca lacks of Lifeguard (Dadgar, Phillips, Currey 2018) from outside.

mod comeback;
mod inquest;
mod judgement;
mod swim;
mod touched;
mod words;

use std::{
    cmp::{Ordering, Reverse},
    collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use foca::{Foca, Member, PostcardCodec, Timer};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use starling_protocol::{
    Life, MemberHealth, MemberState, News, NodeId, NodeRecord, Packet, Phase, Pong, Purpose, Word,
};

pub use self::swim::Ident;
use self::{
    inquest::Inquest,
    swim::{Collected, REMEMBER_DOWN, foca_config, inner, outer, state_of},
};
pub(crate) use self::{swim::PeerState, touched::Touched};
use crate::{
    Config, Credentials, Reach,
    awareness::Awareness,
    records::Records,
    recovery::Recovery,
    suspicion::{Accusations, Suspicion, Words},
    trust::Trust,
};

/// How far a generation, which is made from a clock, may be ahead of this node's clock, in seconds. Without a limit, one
/// made-up number could never be outdone.
pub(crate) const MAX_AHEAD_S: u64 = 24 * 3600;
/// Timers that are this late mean that this process did not run: its silence is then no evidence against others.
const STALL: Duration = Duration::from_millis(250);
/// News goes on at once, but not more often than this.
const SPREAD_PERIOD: Duration = Duration::from_millis(50);
/// How often accusations are dropped that led to no suspicion.
const PRUNE_PERIOD: Duration = Duration::from_secs(5);
/// News from one exchange that is told on. More means that this node is the one who is behind: what it learns is known to
/// the rest, and telling it all again would drown what is new.
pub(crate) const MAX_RETOLD: usize = 16;
/// Before the dead are forgotten, for so long nobody takes them in: clocks and exchanges differ a little.
const FORGET_TOGETHER: Duration = Duration::from_secs(600);
/// Complaints about one member at a time that are not held against those who make them.
const UNSTEADY: usize = 4;
/// Most members, dead ones included.
pub(crate) const MAX_MEMBERS: usize = 16_384;
/// What a node concluded while it heard nobody it tells when it has heard others for so long, and nobody objected.
const BELIEVED_AFTER: Duration = Duration::from_secs(60);
/// Probes for others that are watched at a time, and of those for one.
const MAX_ERRANDS: usize = 256;
const MAX_ERRANDS_FOR_ONE: usize = 32;
/// An incarnation from which on this node rather begins a new life than refute for ever.
const MAX_INCARNATION: u16 = 0xf000;

/// What a step of the driver wants done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// A packet to send; its root hash is to be filled in.
    Send { to: Ident, packet: Packet, reach: Reach },
    /// Ask the suspect itself over a stream; tell the outcome to [`Membership::vouched`] or [`Membership::check_failed`].
    Check { suspect: Ident, incarnation: u16 },
    /// Compare states with that node, which may be the one that is wrong: it was dead when this node came back.
    Exchange(Ident),
    /// The same, over the connection that it has: each of the two holds the other for dead.
    Dispute(NodeId),
    /// A peer talks to this node that has no record of it, or of members that it mentions.
    Introduce(NodeId),
    /// That member alone holds this node for dead: show it that it is not.
    Appeal(Ident),
    /// The mesh has declared this life dead.
    Lost,
    /// We live on under a new generation.
    Rejoined(Ident),
}

/// A member as this node's membership has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Observed {
    pub(crate) state: PeerState,
    /// Who could not reach it, if it is suspect.
    pub(crate) accusers: Vec<NodeId>,
}

/// What judgements stand on: verified records, and what is known of those who tell.
pub(crate) struct Grounds<'a> {
    pub(crate) records: &'a Records,
    pub(crate) trust: &'a mut Trust,
    pub(crate) now: Instant,
}

/// The probe that is under way, once others were asked to join in.
#[derive(Debug)]
struct Probe {
    target: Life,
    asked: Vec<NodeId>,
}

/// A probe made for another node.
#[derive(Debug)]
struct Errand {
    origin: Life,
    target: Ident,
    due: Instant,
}

/// foca, its timers on one ordered heap, and what stands between the two.
pub(crate) struct Membership {
    foca: Swim,
    credentials: Arc<dyn Credentials>,
    timers: BinaryHeap<Reverse<Due>>,
    /// Makes timers of one instant fire in the order in which they were set.
    timer_seq: u64,
    config: Config,
    sized_for: usize,
    awareness: Awareness,
    accusations: Accusations,
    suspicions: Vec<Suspicion>,
    /// Suspects that are looked after once there is room for another check.
    waiting: BTreeSet<NodeId>,
    /// Members that were asked and are there, at which incarnation, and when.
    cleared: HashMap<NodeId, (Life, u16, Instant)>,
    /// Incarnations that members have told themselves, but for the first of each life.
    proven: HashMap<NodeId, (u64, u16)>,
    /// Their words for it, to give to others.
    lives: BTreeMap<NodeId, Word>,
    /// Whether this node is dead, as somebody says.
    inquest: Option<Inquest>,
    next_inquest: Option<Instant>,
    /// Who has said that this life of this node is over, and when last.
    called_dead_by: BTreeMap<NodeId, Instant>,
    /// Lives that this node holds for dead, and that are asked because they say that they are not.
    appeals: HashMap<NodeId, u64>,
    probe: Option<Probe>,
    errands: Vec<Errand>,
    recovery: Recovery,
    /// Another node runs with the same key, and has its turn until then: this one does not come back by itself.
    stays_away_until: Option<Instant>,
    /// Own incarnation. foca does not tell it, but every packet that it sends says it.
    incarnation: u16,
    /// Members that this node holds for dead and that hold it for dead, and when they last said so.
    disputes: BTreeMap<NodeId, Instant>,
    /// When this node may give in again because of each of them, and after which pause then.
    concessions: BTreeMap<NodeId, (Instant, Duration)>,
    /// Since when members have been dead.
    down_since: HashMap<NodeId, Instant>,
    /// Members that this node gave up while it heard nobody: what it says of them to others is nothing.
    given_up_alone: HashSet<NodeId>,
    /// Whether a probe was made before the one that comes next, and whether it failed.
    probing: bool,
    probe_failed: bool,
    leaving: bool,
    touched: Touched,
    urgent: bool,
    news: bool,
    next_spread: Option<Instant>,
    next_prune: Option<Instant>,
    rng: StdRng,
}

struct Due {
    at: Instant,
    seq: u64,
    timer: Timer<Ident>,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.seq).cmp(&(other.at, other.seq))
    }
}

type Swim = Foca<Ident, PostcardCodec, StdRng, Words>;

impl Membership {
    pub(crate) fn new(me: Ident, config: &Config, credentials: Arc<dyn Credentials>) -> Self {
        let mut rng = StdRng::seed_from_u64(config.seed);
        let own_rng = StdRng::seed_from_u64(rng.random());
        Self {
            foca: Foca::with_custom_broadcast(me, foca_config(config, 1), rng, PostcardCodec, Words),
            credentials,
            timers: BinaryHeap::new(),
            timer_seq: 0,
            config: config.clone(),
            sized_for: 1,
            awareness: Awareness::default(),
            accusations: Accusations::default(),
            suspicions: Vec::new(),
            waiting: BTreeSet::new(),
            cleared: HashMap::new(),
            proven: HashMap::new(),
            lives: BTreeMap::new(),
            inquest: None,
            appeals: HashMap::new(),
            probe: None,
            errands: Vec::new(),
            recovery: Recovery::default(),
            stays_away_until: None,
            incarnation: 0,
            disputes: BTreeMap::new(),
            concessions: BTreeMap::new(),
            next_inquest: None,
            called_dead_by: BTreeMap::new(),
            down_since: HashMap::new(),
            given_up_alone: HashSet::new(),
            probing: false,
            probe_failed: false,
            leaving: false,
            touched: Touched::default(),
            urgent: false,
            news: false,
            next_spread: None,
            next_prune: None,
            rng: own_rng,
        }
    }

    /// This node, in its present life.
    pub(crate) fn me(&self) -> Ident {
        *self.foca.identity()
    }

    /// This node as others should see it.
    pub(crate) fn own_state(&self) -> PeerState {
        let Ident { id, addr, generation } = self.me();
        PeerState { id, addr, generation, incarnation: self.incarnation, health: MemberHealth::Alive }
    }

    /// All others that SWIM remembers, dead ones included.
    pub(crate) fn others(&self) -> impl Iterator<Item = PeerState> + '_ {
        let me = self.me().id;
        self.foca.iter_membership_state().filter(move |member| member.id().id != me).map(state_of)
    }

    /// Those of them that are among `touched`, with the accusers of suspects as far as they are trusted.
    pub(crate) fn observed(&self, touched: &Touched, trust: &Trust, now: Instant) -> impl Iterator<Item = Observed> {
        self.others().filter(|state| touched.has(&state.id)).map(move |state| {
            let suspect = state.health == MemberHealth::Suspect;
            let against = || self.accusations.against(&Ident::from(&state), state.incarnation);
            let mut accusers = if suspect { against() } else { Vec::new() };
            accusers.retain(|by| trust.trusts(by, now));
            Observed { state, accusers }
        })
    }

    /// Whether [`Membership::take_touched`] would give anything.
    pub(crate) fn has_changed(&self) -> bool {
        !self.touched.is_empty() || self.accusations.has_changed()
    }

    /// Whether it has, in a way that calls must know of at once: somebody died.
    pub(crate) fn is_urgent(&self) -> bool {
        self.urgent
    }

    /// Members that may not be any more as they were observed before: the roster is about to be brought up to date.
    pub(crate) fn take_touched(&mut self) -> Touched {
        self.urgent = false;
        let mut touched = std::mem::take(&mut self.touched);
        touched.add_all(self.accusations.take_changed());
        touched
    }

    /// How much this node doubts its own judgement: 0 to 8.
    pub(crate) fn doubt(&self) -> u32 {
        self.awareness.score()
    }

    /// Whether the mesh has declared this node dead, and it is on its way back.
    pub(crate) fn is_lost(&self) -> bool {
        self.recovery.is_lost()
    }

    /// Updates that wait to be passed on.
    pub(crate) fn backlog(&self) -> usize {
        self.foca.updates_backlog() + self.foca.custom_broadcast_backlog()
    }

    /// For how long a member has been dead, in seconds.
    fn down_s(&self, id: &NodeId, now: Instant) -> u32 {
        // Rounded up, or each who is told would remember it a little longer than who told.
        let since = self.down_since.get(id).map(|since| now.saturating_duration_since(*since).as_secs() + 1);
        since.and_then(|s| u32::try_from(s).ok()).unwrap_or(0)
    }

    /// Everybody, this node included, for another node. A node that was declared dead says nothing against others: it was cut
    /// off, and whom it holds for dead may be alive. Nor does any node of whom it gave up while it heard nobody.
    pub(crate) fn states(&self, records: &Records, now: Instant) -> Vec<MemberState> {
        let lost = self.recovery.is_lost();
        let told = |state: PeerState| {
            let private = lost || self.given_up_alone.contains(&state.id);
            let health = if private { MemberHealth::Alive } else { state.health };
            let down_s = if health == MemberHealth::Down { self.down_s(&state.id, now) } else { 0 };
            let PeerState { id, generation, incarnation, .. } = state;
            let seq = records.edition(&id).filter(|e| e.generation == generation).map_or(0, |e| e.seq);
            MemberState { id, generation, seq, incarnation, health, down_s }
        };
        self.others().chain([self.own_state()]).map(told).collect()
    }

    /// Takes a packet from an authenticated peer, of which so far `known` was observed. `Err` says what is wrong with it; the
    /// state is intact then.
    pub(crate) fn packet(
        &mut self,
        from: NodeId,
        known: Option<&PeerState>,
        packet: &Packet,
        grounds: &mut Grounds<'_>,
    ) -> Result<Vec<Effect>, String> {
        let now = grounds.now;
        if packet.source.id != from {
            return Err(format!("it speaks for {:?}", packet.source.id));
        }
        let Some(source) = grounds.records.life(&from).filter(|life| life.generation >= packet.source.generation)
        else {
            return Ok(self.greet(packet));
        };
        if source.generation > packet.source.generation {
            // Late, from a life that is over.
            return Ok(Vec::new());
        }
        if known.is_none_or(|known| (known.generation, known.incarnation) != (source.generation, packet.incarnation)) {
            self.touched.add(from);
        }
        self.prove(source.life(), packet.incarnation);
        let mut effects = self.take_words(from, &packet.words, grounds);
        effects.extend(self.take_news(from, &packet.news, grounds));
        if let Purpose::IndirectAck(origin) = packet.purpose {
            let before = self.errands.len();
            self.errands.retain(|errand| errand.target.id != from || errand.origin != origin);
            if self.errands.len() == before {
                // Nobody has asked for it.
                return Ok(effects);
            }
        }
        self.recovery.answered(&source);
        effects.extend(self.testify(from, (packet.purpose, packet.probe), grounds));
        if self.proves_deaf(&source) {
            effects.extend(self.concede(now));
            return Ok(effects);
        }
        if known.is_none_or(|known| known.health != MemberHealth::Down || known.generation < source.generation) {
            self.recovery.heard(now);
        }
        if packet.purpose == Purpose::Dead {
            if self.recovery.is_lost() {
                // It says what we know. foca would answer the like to a sender that it holds for dead, who would answer the
                // like: two lost nodes would never stop.
            } else if self.holds_dead(&source) {
                // Either may be the one that was cut off: we look who has the better case.
                effects.push(Effect::Dispute(from));
            } else if packet.receiver.id == self.me().id {
                effects.extend(self.called_dead(from, packet.receiver.generation, grounds));
            }
            return Ok(effects);
        }
        let me = self.me();
        let receiver = match packet.receiver {
            life if life == me.life() => me,
            // A rumour is for whoever hears it.
            _ if packet.purpose == Purpose::Gossip => me,
            // For a former life of this node, whose new one is not known there yet; or for somebody else.
            life if life.id == me.id => return Ok(effects),
            life => return Err(format!("it is for {:?}", life.id)),
        };
        let asks = matches!(packet.purpose, Purpose::Ping | Purpose::PingRequest(_) | Purpose::IndirectPing(_));
        if asks && !grounds.trust.may_request(from, now) {
            // It gets its sign of life, and nothing that is meant for others.
            if packet.purpose == Purpose::Ping {
                let packet = Packet { probe: packet.probe, ..self.craft(source.life(), Purpose::Ack) };
                effects.push(Effect::Send { to: source, packet, reach: Reach::Linked });
            }
            return Ok(effects);
        }
        let about = match packet.purpose {
            Purpose::PingRequest(life)
            | Purpose::IndirectPing(life)
            | Purpose::IndirectAck(life)
            | Purpose::ForwardedAck(life) => {
                // Whoever is not a member at its recorded address gets nothing sent because a packet says so.
                let known = grounds.records.life(&life.id).filter(|known| known.life() == life && life.id != me.id);
                if known.is_none() {
                    grounds.trust.stranger(from, life, grounds.records, now);
                    return Ok(effects);
                }
                known
            }
            _ => None,
        };
        let given = inner(source, packet.incarnation, receiver, (packet.purpose, packet.probe), about);
        effects.extend(self.step(now, |foca, rt| foca.handle_data(&given, rt))?);
        if packet.purpose == Purpose::Ping && self.recovery.is_lost() {
            // foca falls silent when it is declared dead; but two who are on their way back need each other's answers.
            let packet = Packet { probe: packet.probe, ..self.craft(source.life(), Purpose::Ack) };
            effects.push(Effect::Send { to: source, packet, reach: Reach::Dial });
        }
        self.end_probe_early(now);
        Ok(effects)
    }

    /// A packet of a member whose record, of this life, is not here. It gets a sign of life if it asks for one, over the
    /// connection that it has made; everything else has to wait.
    fn greet(&self, packet: &Packet) -> Vec<Effect> {
        let mut effects = vec![Effect::Introduce(packet.source.id)];
        if packet.purpose == Purpose::Ping && packet.receiver == self.me().life() {
            let Life { id, generation } = packet.source;
            // Its address is not known, and not needed.
            let to = Ident { id, addr: self.me().addr, generation };
            let packet = Packet { probe: packet.probe, ..self.craft(packet.source, Purpose::Ack) };
            effects.push(Effect::Send { to, packet, reach: Reach::Linked });
        }
        effects
    }

    /// Takes in members by their records: whoever signs a record is there, has left, or, if its certificate has ended, is not
    /// there any more; then `ages` says for how long, in seconds, as was told.
    pub(crate) fn meet<'r>(
        &mut self,
        records: impl Iterator<Item = &'r NodeRecord>,
        unix: u64,
        ages: &HashMap<NodeId, u32>,
        now: Instant,
    ) -> Vec<Effect> {
        let (mut living, mut dead) = (Vec::new(), Vec::new());
        for record in records {
            let gone = record.phase == Phase::Left || record.cert_expires < unix;
            let incarnation = self.proven(&record.id, record.generation);
            let state = if gone { foca::State::Down } else { foca::State::Alive };
            let ident = Ident { id: record.id, addr: record.addr, generation: record.generation };
            if self.lives.get(&record.id).is_some_and(|word| word.generation < record.generation) {
                self.lives.remove(&record.id);
            }
            self.touched.add(record.id);
            let member = Member::new(ident, incarnation, state);
            if gone {
                let age = Duration::from_secs(ages.get(&record.id).copied().unwrap_or(0).into());
                self.down_since.insert(record.id, now.checked_sub(age).unwrap_or(now));
                dead.push(member);
            } else {
                living.push(member);
            }
        }
        if living.is_empty() && dead.is_empty() {
            return Vec::new();
        }
        // Whoever hears of the living before their records knows that there is something to ask for.
        let broadcast = living.len() <= MAX_RETOLD;
        let met = self.step(now, |foca, rt| {
            foca.apply_many(living.into_iter(), broadcast, &mut *rt)?;
            foca.apply_many(dead.into_iter(), false, rt)
        });
        met.unwrap_or_default()
    }

    /// Takes what a peer knows, who must not be one that this node holds for dead. All that counts of it is whom it holds for
    /// dead: that is a reason to look.
    pub(crate) fn learn(&mut self, from: NodeId, members: &[MemberState], grounds: &mut Grounds<'_>) -> Vec<Effect> {
        let now = grounds.now;
        let remembered = u32::try_from(REMEMBER_DOWN.as_secs()).unwrap_or(u32::MAX);
        let dead = |m: &&MemberState| m.health == MemberHealth::Down && m.down_s < remembered;
        let news = |m: &MemberState| {
            let life = Life { id: m.id, generation: m.generation };
            News { life, incarnation: m.incarnation, health: m.health }
        };
        let dead: Vec<&MemberState> = members.iter().filter(dead).collect();
        let effects = self.take_news(from, &dead.iter().map(|m| news(m)).collect::<Vec<_>>(), grounds);
        for MemberState { id, generation, down_s, .. } in dead {
            // All shall forget it at the same time.
            let since = now.checked_sub(Duration::from_secs((*down_s).into())).unwrap_or(now);
            if let Some(known) = grounds.records.life(id).filter(|known| known.generation == *generation) {
                self.accusations.tell_age(&known, since);
            }
        }
        effects
    }

    /// Whether a member is to be forgotten that soon that nobody should be told of it any more.
    pub(crate) fn is_nearly_forgotten(state: &MemberState) -> bool {
        let limit = REMEMBER_DOWN - FORGET_TOGETHER;
        state.health == MemberHealth::Down && u64::from(state.down_s) > limit.as_secs()
    }

    /// The member was asked over an authenticated stream and has answered.
    pub(crate) fn vouched(&mut self, suspect: &Ident, pong: Pong, grounds: &mut Grounds<'_>) -> Vec<Effect> {
        let now = grounds.now;
        if pong.generation != suspect.generation || grounds.records.life(&suspect.id) != Some(*suspect) {
            return Vec::new();
        }
        let asked_at =
            self.suspicions.iter().find(|s| s.suspect == *suspect).map(|s| (s.incarnation, s.timer.is_none()));
        self.suspicions.retain(|s| s.suspect != *suspect);
        if let Some((incarnation, by_hearsay)) = asked_at {
            if by_hearsay {
                let accusers = self.accusations.against(suspect, incarnation);
                let wrong: BTreeSet<NodeId> =
                    accusers.into_iter().chain(self.accusations.claims(suspect).iter().copied()).collect();
                // Where several say so it is rather that member who comes and goes.
                if wrong.len() < UNSTEADY {
                    wrong.into_iter().for_each(|by| grounds.trust.contradicted(by, suspect.id, now));
                }
            }
            self.cleared.insert(suspect.id, (suspect.life(), incarnation, now));
            self.accusations.dismiss(&suspect.id);
        }
        self.touched.add(suspect.id);
        self.prove(suspect.life(), pong.incarnation);
        let mut effects = self.raise(suspect, now);
        let alive = Member::new(*suspect, self.proven(&suspect.id, suspect.generation), foca::State::Alive);
        effects.extend(self.step(now, |foca, rt| foca.apply_many([alive].into_iter(), false, rt)).unwrap_or_default());
        effects
    }

    /// The incarnation that a member has told of itself in that life.
    fn proven(&self, id: &NodeId, generation: u64) -> u16 {
        self.proven.get(id).filter(|(of, _)| *of == generation).map_or(0, |(_, incarnation)| *incarnation)
    }

    /// The member itself says so.
    fn prove(&mut self, life: Life, incarnation: u16) {
        if incarnation > self.proven(&life.id, life.generation) {
            self.proven.insert(life.id, (life.generation, incarnation));
        }
    }

    /// Somebody suspects this node at that incarnation: refutes it, unless that is an old story or it says so too often, and
    /// says how it is now.
    pub(crate) fn refute(&mut self, by: NodeId, incarnation: u16, grounds: &mut Grounds<'_>) -> (Pong, Vec<Effect>) {
        let mut effects = Vec::new();
        if incarnation == self.incarnation && grounds.trust.may_provoke(by, grounds.now) {
            effects = self.refute_now(grounds.now);
        }
        (Pong { generation: self.me().generation, incarnation: self.incarnation }, effects)
    }

    fn refute_now(&mut self, now: Instant) -> Vec<Effect> {
        if self.recovery.is_lost() || self.leaving {
            return Vec::new();
        }
        if self.incarnation >= MAX_INCARNATION {
            return self.rejoin(now);
        }
        let suspected = Member::new(self.me(), self.incarnation, foca::State::Suspect);
        self.step(now, |foca, rt| foca.apply_many([suspected].into_iter(), false, rt)).unwrap_or_default()
    }

    /// Whether this node holds that life for dead.
    pub(crate) fn holds_dead(&self, ident: &Ident) -> bool {
        self.foca.iter_membership_state().any(|member| {
            member.id().id == ident.id
                && member.id().generation >= ident.generation
                && member.state() == foca::State::Down
        })
    }

    /// Says good-bye; nothing may be asked of the membership afterwards but [`Membership::gossip`].
    pub(crate) fn leave(&mut self, now: Instant) -> Vec<Effect> {
        self.leaving = true;
        self.step(now, |foca, rt| foca.leave_cluster(rt)).unwrap_or_default()
    }

    /// Tells some peers what has changed, now.
    pub(crate) fn gossip(&mut self, now: Instant) -> Vec<Effect> {
        self.step(now, |foca, rt| foca.gossip(rt)).unwrap_or_default()
    }

    /// When [`Membership::tick`] wants to be called next.
    pub(crate) fn next_timer(&self) -> Option<Instant> {
        let patience = self.patience();
        let timer = self.timers.peek().map(|Reverse(due)| due.at);
        let suspicions = self.suspicions.iter().map(|suspicion| self.verdict_at(suspicion, patience));
        let errands = self.errands.iter().map(|errand| errand.due);
        let inquest = self.inquest.as_ref().map(|inquest| inquest.until);
        suspicions.chain(errands).chain(timer).chain(self.recovery.next()).chain(inquest).min()
    }

    /// Does what is due.
    pub(crate) fn tick(&mut self, grounds: &mut Grounds<'_>) -> Vec<Effect> {
        let now = grounds.now;
        // Only timers tell: a suspect's time can end in the past, because a witness has come.
        let due = self.timers.peek().map(|Reverse(due)| due.at);
        if let Some(late) = due.map(|at| now.saturating_duration_since(at)).filter(|late| *late > STALL) {
            self.stalled_for(late);
        }
        let mut effects = Vec::new();
        while self.timers.peek().is_some_and(|Reverse(due)| due.at <= now) {
            let Some(Reverse(due)) = self.timers.pop() else { break };
            let probes = matches!(due.timer, Timer::ProbeRandomMember(_));
            self.probe_failed = false;
            effects.extend(self.fire(due.timer, now));
            // Each probe is judged when the next one starts.
            if probes && std::mem::replace(&mut self.probing, true) {
                self.recovery.probed(!self.probe_failed, now);
                if !self.probe_failed {
                    self.awareness.better();
                }
            }
        }
        effects.extend(self.end_errands(now));
        effects.extend(self.judge_suspects(grounds));
        effects.extend(self.look_after_waiting(grounds));
        effects.extend(self.conclude_inquest(grounds));
        effects.extend(self.recover(now));
        if self.next_prune.is_none_or(|at| at <= now) {
            self.next_prune = Some(now + PRUNE_PERIOD);
            self.prune(now);
        }
        self.resize();
        effects
    }

    fn fire(&mut self, timer: Timer<Ident>, now: Instant) -> Vec<Effect> {
        match &timer {
            Timer::ChangeSuspectToDown { member_id: member, .. } | Timer::RemoveDown(member) => {
                self.touched.add(member.id)
            }
            Timer::ProbeRandomMember(_) => self.probe = None,
            _ => {}
        }
        self.step(now, |foca, rt| foca.handle_timer(timer, rt)).unwrap_or_else(|error| {
            tracing::debug!(error, "membership timer");
            Vec::new()
        })
    }

    /// This process has not run for that long. All that was due then is due as much later, as if time had stood still.
    fn stalled_for(&mut self, late: Duration) {
        tracing::debug!(?late, "stalled");
        self.awareness.worse();
        let timers = std::mem::take(&mut self.timers).into_iter();
        self.timers = timers.map(|Reverse(due)| Reverse(Due { at: due.at + late, ..due })).collect();
        for suspicion in &mut self.suspicions {
            suspicion.since += late;
            suspicion.asked += late;
        }
        self.down_since.values_mut().for_each(|since| *since += late);
        self.errands.clear();
    }

    /// A ping of the driver's own: foca takes no notice of the answer but for the sign of life in it.
    fn ping(&self, to: Ident, probe: u8) -> Effect {
        let packet = Packet { probe, ..self.craft(to.life(), Purpose::Ping) };
        Effect::Send { to, packet, reach: Reach::Dial }
    }

    fn prune(&mut self, now: Instant) {
        let suspects: Vec<NodeId> = self
            .foca
            .iter_members()
            .filter(|member| member.state() == foca::State::Suspect)
            .map(|member| member.id().id)
            .collect();
        self.accusations.retain(|id| suspects.contains(id));
        let down: HashSet<NodeId> =
            self.others().filter(|m| m.health == MemberHealth::Down).map(|member| member.id).collect();
        self.down_since.retain(|id, _| down.contains(id));
        self.cleared.retain(|_, (_, _, at)| now.saturating_duration_since(*at) < PRUNE_PERIOD);
        let known: HashSet<NodeId> = self.foca.iter_membership_state().map(|member| member.id().id).collect();
        self.proven.retain(|id, _| known.contains(id));
        self.lives.retain(|id, _| known.contains(id));
        self.appeals.retain(|id, _| down.contains(id));
        let believed = self.recovery.in_touch_for(BELIEVED_AFTER, now);
        self.given_up_alone.retain(|id| down.contains(id) && !believed);
    }

    /// A packet of the driver's own.
    fn craft(&self, receiver: Life, purpose: Purpose) -> Packet {
        Packet {
            root: 0,
            source: self.me().life(),
            incarnation: self.incarnation,
            receiver,
            purpose,
            probe: 0,
            news: Vec::new(),
            words: Vec::new(),
        }
    }

    /// One call of foca, and everything that follows from it.
    fn step(
        &mut self,
        now: Instant,
        run: impl FnOnce(&mut Swim, &mut Collected) -> Result<(), foca::Error>,
    ) -> Result<Vec<Effect>, String> {
        let mut collected = Collected::default();
        let result = run(&mut self.foca, &mut collected);
        let mut effects = Vec::new();
        if self.recovery.is_lost() {
            // Nobody should hear the rumours of a node that was cut off.
            collected.packets.clear();
        }
        for (to, bytes) in collected.packets {
            effects.extend(self.sent(to, &bytes, now));
        }
        for (timer, after) in collected.timers {
            match timer {
                Timer::ChangeSuspectToDown { .. } => effects.extend(self.suspect(timer, now)),
                Timer::ProbeRandomMember(_) | Timer::SendIndirectProbe { .. } => {
                    self.schedule(timer, now + self.awareness.stretch(after));
                }
                Timer::RemoveDown(dead) => {
                    let since = *self.down_since.entry(dead.id).or_insert(now);
                    self.schedule(timer, (since + after).max(now));
                }
                _ => self.schedule(timer, now + after),
            }
        }
        if collected.defunct && !self.leaving && !self.recovery.is_lost() {
            self.recovery.lose(now);
            self.suspicions.clear();
            self.inquest = None;
            self.touched.add_everybody();
            self.urgent = true;
            effects.push(Effect::Lost);
        }
        self.news |= !collected.news.is_empty();
        self.touched.add_all(collected.news);
        self.urgent |= collected.death;
        effects.extend(self.spread(now));
        match result {
            Ok(()) => Ok(effects),
            // An error on the way does not undo what was decided before it.
            Err(_) if !effects.is_empty() => Ok(effects),
            Err(error) => Err(format!("{error:?}")),
        }
    }

    /// Looks at a packet that foca sends, for it says our incarnation and what foca is up to, and adds what belongs to it.
    fn sent(&mut self, to: Ident, bytes: &[u8], now: Instant) -> Vec<Effect> {
        let Some(packet) = outer(bytes) else { return Vec::new() };
        let me = self.me();
        if packet.source == me.life() && packet.incarnation > self.incarnation {
            let accusers = self.accusations.against(&me, self.incarnation).len();
            self.incarnation = packet.incarnation;
            if accusers >= 2.min(self.foca.num_members()) {
                // Several could not reach us, and we live: perhaps we are slow.
                self.awareness.worse();
            }
            self.accusations.dismiss(&me.id);
            self.say_that_it_lives();
            self.touched.add(me.id);
        }
        let mut effects = Vec::new();
        match packet.purpose {
            Purpose::IndirectPing(origin) => {
                let for_it = self.errands.iter().filter(|errand| errand.origin == origin).count();
                if for_it >= MAX_ERRANDS_FOR_ONE || self.errands.len() >= MAX_ERRANDS {
                    return Vec::new();
                }
                self.errands.push(Errand {
                    origin,
                    target: to,
                    due: now + self.awareness.stretch(self.config.probe_rtt),
                });
            }
            Purpose::PingRequest(target) => {
                let probe = self.probe.get_or_insert(Probe { target, asked: Vec::new() });
                probe.asked.push(to.id);
            }
            Purpose::Ping => {
                let suspect = |member: &&Member<Ident>| *member.id() == to && member.state() == foca::State::Suspect;
                let suspected = self.foca.iter_members().find(suspect).map(Member::incarnation);
                effects.extend(suspected.map(|incarnation| self.tell_suspect(to, incarnation)));
            }
            _ => {}
        }
        let reach = if packet.purpose == Purpose::Gossip { Reach::Anybody } else { Reach::Dial };
        effects.push(Effect::Send { to, packet, reach });
        effects
    }

    /// Passes news on at once: waiting for the next round would add its period for each hop.
    fn spread(&mut self, now: Instant) -> Vec<Effect> {
        if !self.news || self.next_spread.is_some_and(|at| now < at) {
            return Vec::new();
        }
        self.news = false;
        self.next_spread = Some(now + SPREAD_PERIOD);
        self.gossip(now)
    }

    fn schedule(&mut self, timer: Timer<Ident>, at: Instant) {
        self.timer_seq += 1;
        self.timers.push(Reverse(Due { at, seq: self.timer_seq, timer }));
    }

    /// Dissemination follows the size of the mesh. Powers of two, so that one join does not change it.
    fn resize(&mut self) {
        let size = (self.foca.num_members() + 1).next_power_of_two();
        if size != self.sized_for && self.foca.set_config(foca_config(&self.config, size)).is_ok() {
            self.sized_for = size;
        }
    }
}

#[cfg(test)]
mod tests;
