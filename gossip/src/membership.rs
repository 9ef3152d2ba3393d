//! The driver around foca: the only place that speaks to it.
//!
//! foca decides who is suspect and who is down, and writes the packets. This driver decides *when*: it owns the timers,
//! and adds what foca lacks of Lifeguard (Dadgar, Phillips, Currey 2018) from outside.

mod comeback;
mod judgement;
mod swim;
mod touched;

use std::{
    cmp::{Ordering, Reverse},
    collections::{BinaryHeap, HashMap, HashSet},
    time::{Duration, Instant},
};

use bytes::{BufMut, Bytes};
use foca::{Codec, Foca, Header, Member, Message, PostcardCodec, Timer};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use starling_protocol::{MemberHealth, MemberState, NodeId, Pong};

pub use self::swim::Ident;
use self::swim::{
    Collected, MAX_PACKET_BYTES, REMEMBER_DOWN, foca_config, member_of, members_in, readdressed, state_of,
};
pub(crate) use self::touched::Touched;
use crate::{
    Config, Reach,
    awareness::Awareness,
    recovery::Recovery,
    suspicion::{Accusations, Suspicion},
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
/// Most members, dead ones included.
const MAX_MEMBERS: usize = 16_384;
/// News from one exchange that is told on. More means that this node is the one who is behind: what it learns is known to
/// the rest, and telling it all again would drown what is new.
pub(crate) const MAX_RETOLD: usize = 16;
/// What a node concluded while it heard nobody it tells when it has heard others for so long, and nobody objected.
const BELIEVED_AFTER: Duration = Duration::from_secs(60);
/// A death that is older than this is known to whoever should know it.
const OLD_DEATH_S: u32 = 300;
/// Probes for others that are watched at a time.
const MAX_ERRANDS: usize = 256;

/// What a step of the driver wants done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// A packet to send.
    Send { to: Ident, bytes: Bytes, reach: Reach },
    /// Ask the suspect itself over a stream; tell the outcome to [`Membership::learn`] or [`Membership::check_failed`].
    Check { suspect: Ident, incarnation: u16 },
    /// Compare states with that node: it holds us for dead, or we it, and one of the two is wrong.
    Exchange(Ident),
    /// The mesh has declared this life dead.
    Lost,
    /// We live on under a new generation.
    Rejoined(Ident),
}

/// A member as this node's membership has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Observed {
    pub(crate) state: MemberState,
    /// Who could not reach it, if it is suspect.
    pub(crate) accusers: Vec<NodeId>,
}

/// The probe that is under way, once others were asked to join in.
#[derive(Debug)]
struct Probe {
    target: Ident,
    asked: Vec<NodeId>,
}

/// A probe made for another node.
#[derive(Debug)]
struct Errand {
    origin: Ident,
    target: Ident,
    due: Instant,
}

/// foca, its timers on one ordered heap, and what stands between the two.
pub(crate) struct Membership {
    foca: Foca<Ident, PostcardCodec, StdRng, Accusations>,
    timers: BinaryHeap<Reverse<Due>>,
    /// Makes timers of one instant fire in the order in which they were set.
    timer_seq: u64,
    config: Config,
    sized_for: usize,
    awareness: Awareness,
    accusations: Accusations,
    suspicions: Vec<Suspicion>,
    probe: Option<Probe>,
    errands: Vec<Errand>,
    recovery: Recovery,
    /// Own incarnation. foca does not tell it, but every packet that it sends says it.
    incarnation: u16,
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

type Swim = Foca<Ident, PostcardCodec, StdRng, Accusations>;

impl Membership {
    pub(crate) fn new(me: Ident, config: &Config) -> Self {
        let mut rng = StdRng::seed_from_u64(config.seed);
        let accusations = Accusations::default();
        accusations.set_horizon(me.generation.saturating_add(MAX_AHEAD_S));
        let own_rng = StdRng::seed_from_u64(rng.random());
        Self {
            foca: Foca::with_custom_broadcast(me, foca_config(config, 1), rng, PostcardCodec, accusations.clone()),
            timers: BinaryHeap::new(),
            timer_seq: 0,
            config: config.clone(),
            sized_for: 1,
            awareness: Awareness::default(),
            accusations,
            suspicions: Vec::new(),
            probe: None,
            errands: Vec::new(),
            recovery: Recovery::default(),
            incarnation: 0,
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
    pub(crate) fn own_state(&self) -> MemberState {
        let me = self.me();
        let health = MemberHealth::Alive;
        let incarnation = self.incarnation;
        MemberState { id: me.id, addr: me.addr, generation: me.generation, incarnation, health, down_s: 0 }
    }

    /// All others that SWIM remembers, dead ones included.
    pub(crate) fn others(&self) -> impl Iterator<Item = MemberState> + '_ {
        let me = self.me().id;
        self.foca.iter_membership_state().filter(move |member| member.id().id != me).map(state_of)
    }

    /// Those of them that are among `touched`, with the accusers of suspects.
    pub(crate) fn observed(&self, touched: &Touched) -> impl Iterator<Item = Observed> {
        self.others().filter(|state| touched.has(&state.id)).map(|state| {
            let suspect = state.health == MemberHealth::Suspect;
            let against = || self.accusations.against(&Ident::from(&state), state.incarnation);
            let accusers = if suspect { against() } else { Vec::new() };
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

    /// Everybody, this node included, for another node. A node that was declared dead speaks only for itself: it was cut
    /// off, and whom it holds for dead may be alive.
    pub(crate) fn states(&self, now: Instant) -> Vec<MemberState> {
        if self.recovery.is_lost() {
            return vec![self.own_state()];
        }
        let private =
            |state: &MemberState| state.health == MemberHealth::Down && self.given_up_alone.contains(&state.id);
        let others = self.others().filter(|state| !private(state)).map(|state| match state.health {
            MemberHealth::Down => MemberState { down_s: self.down_s(&state.id, now), ..state },
            _ => state,
        });
        others.chain([self.own_state()]).collect()
    }

    /// Takes a packet from an authenticated peer, of which so far `known` was observed. `Err` says what is wrong with it; the
    /// state is intact then. `unix` is the time in seconds, to judge generations by.
    pub(crate) fn packet(
        &mut self,
        from: NodeId,
        known: Option<&MemberState>,
        packet: &[u8],
        now: Instant,
        unix: u64,
    ) -> Result<Vec<Effect>, String> {
        if packet.len() > MAX_PACKET_BYTES {
            return Err("too long".into());
        }
        let mut rest = packet;
        let header: Header<Ident> = PostcardCodec.decode_header(&mut rest).map_err(|e| e.to_string())?;
        if header.src.id != from {
            return Err(format!("it speaks for {:?}", header.src.id));
        }
        let has_updates = rest.len() >= 2 && rest[..2] != [0, 0];
        let ahead = |generation: u64| generation > unix.saturating_add(MAX_AHEAD_S);
        let told = if has_updates { members_in(&header, rest)? } else { Vec::new() };
        if ahead(header.src.generation) || told.iter().any(|member| ahead(member.generation)) {
            return Err("a generation of the future".into());
        }
        self.touched.add_all(told.iter().map(|member| member.id));
        if known.is_none_or(|known| {
            (known.generation, known.incarnation) != (header.src.generation, header.src_incarnation)
        }) {
            self.touched.add(from);
        }
        self.accusations.set_horizon(unix.saturating_add(MAX_AHEAD_S));
        if let Message::IndirectAck { .. } = header.message {
            self.errands.retain(|errand| errand.target.id != from);
        }
        self.recovery.answered(&header.src);
        if self.proves_deaf(&header.src) {
            return Ok(self.concede(now));
        }
        if known.is_none_or(|known| known.health != MemberHealth::Down || known.generation < header.src.generation) {
            self.recovery.heard(now);
        }
        if header.message == Message::TurnUndead {
            if self.recovery.is_lost() {
                // It says what we know. foca would answer the like to a sender that it holds for dead, who would answer the
                // like: two lost nodes would never stop.
                return Ok(Vec::new());
            }
            if self.holds_dead(&header.src) {
                // Either may be the one that was cut off. foca would believe it; we look who has the better case.
                return Ok(vec![Effect::Exchange(header.src)]);
            }
        }
        let overheard = header.message == Message::Gossip && header.dst != self.me();
        let readdressed = overheard.then(|| readdressed(header.clone(), rest, self.me())).transpose()?;
        let packet = readdressed.as_deref().unwrap_or(packet);
        let mut effects = self.step(now, |foca, rt| foca.handle_data(packet, rt))?;
        if let Message::Ping(number) = header.message
            && self.recovery.is_lost()
        {
            // foca falls silent when it is declared dead; but two who are on their way back need each other's answers.
            let (to, ack) = (header.src, Message::Ack(number));
            effects.push(Effect::Send { to, bytes: self.craft(to, ack, None, None), reach: Reach::Dial });
        }
        self.end_probe_early(now);
        Ok(effects)
    }

    /// Takes what another node knows, who must not be one that this node holds for dead; `unix` as in
    /// [`Membership::packet`]. Generations of the future are left out.
    pub(crate) fn learn(&mut self, members: &[MemberState], now: Instant, unix: u64) -> Result<Vec<Effect>, String> {
        let remembered = u32::try_from(REMEMBER_DOWN.as_secs()).unwrap_or(u32::MAX);
        for dead in members.iter().filter(|m| m.health == MemberHealth::Down && m.down_s < remembered) {
            let age = Duration::from_secs(dead.down_s.into());
            self.down_since.entry(dead.id).or_insert_with(|| now.checked_sub(age).unwrap_or(now));
        }
        let worth = |m: &&MemberState| {
            m.generation <= unix.saturating_add(MAX_AHEAD_S)
                && (m.health != MemberHealth::Down || m.down_s < remembered)
        };
        let members: Vec<MemberState> = members.iter().filter(worth).copied().collect();
        let members = self.within_limits(self.news_of(members));
        let broadcast = members.len() <= MAX_RETOLD;
        // Old deaths are not told on: a packet does not say how old they are.
        let (old, fresh): (Vec<_>, Vec<_>) =
            members.iter().partition(|m| m.health == MemberHealth::Down && m.down_s > OLD_DEATH_S);
        self.touched.add_all(members.iter().map(|member| member.id));
        self.step(now, |foca, rt| {
            foca.apply_many(fresh.into_iter().map(member_of), broadcast, &mut *rt)?;
            foca.apply_many(old.into_iter().map(member_of), false, rt)
        })
    }

    /// Leaves out strangers above [`MAX_MEMBERS`]: a made-up mesh must not make this node forget its work over it.
    fn within_limits(&self, mut members: Vec<MemberState>) -> Vec<MemberState> {
        let held = self.foca.iter_membership_state().len();
        if held + members.len() > MAX_MEMBERS {
            let known: HashSet<NodeId> = self.others().map(|m| m.id).collect();
            let mut room = MAX_MEMBERS.saturating_sub(held);
            members.retain(|m| {
                known.contains(&m.id) || {
                    let fits = room > 0;
                    room = room.saturating_sub(1);
                    fits
                }
            });
        }
        members
    }

    /// Those states that are other than this node has them. foca looks through all members for each that it is given, and
    /// most of a full exchange is known.
    fn news_of(&self, mut members: Vec<MemberState>) -> Vec<MemberState> {
        if members.len() > MAX_RETOLD {
            let key = |m: &MemberState| (m.addr, m.generation, m.incarnation, m.health);
            let known: HashMap<NodeId, _> = self.others().map(|m| (m.id, key(&m))).collect();
            members.retain(|m| known.get(&m.id).is_none_or(|known| *known != key(m)));
        }
        members
    }

    /// Somebody suspects this node at that incarnation: refutes it, and says how it is now.
    pub(crate) fn refute(&mut self, incarnation: u16, now: Instant) -> (Pong, Vec<Effect>) {
        let me = self.own_state();
        let suspected = MemberState { incarnation, health: MemberHealth::Suspect, ..me };
        let effects = self.learn(&[suspected], now, me.generation).unwrap_or_default();
        (Pong { generation: self.me().generation, incarnation: self.incarnation }, effects)
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
        suspicions.chain(errands).chain(timer).chain(self.recovery.next()).min()
    }

    /// Does what is due.
    pub(crate) fn tick(&mut self, now: Instant) -> Vec<Effect> {
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
            if probes && std::mem::replace(&mut self.probing, true) && !self.probe_failed {
                self.awareness.better();
            }
        }
        effects.extend(self.end_errands(now));
        effects.extend(self.judge_suspects(now));
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
    fn ping(&self, to: Ident) -> Effect {
        Effect::Send { to, bytes: self.craft(to, Message::Ping(0), None, None), reach: Reach::Dial }
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
        let believed = self.recovery.in_touch_for(BELIEVED_AFTER, now);
        self.given_up_alone.retain(|id| down.contains(id) && !believed);
    }

    /// A packet in foca's format (foca `payload.rs`): header, counted updates, length-prefixed broadcasts.
    fn craft(
        &self,
        to: Ident,
        message: Message<Ident>,
        update: Option<Member<Ident>>,
        broadcast: Option<&[u8]>,
    ) -> Bytes {
        let counts_updates = message != Message::Broadcast;
        let header = Header { src: self.me(), src_incarnation: self.incarnation, dst: to, message };
        let mut bytes = Vec::with_capacity(128);
        let mut codec = PostcardCodec;
        codec.encode_header(&header, &mut bytes).expect("a vector grows");
        if counts_updates {
            bytes.put_u16(u16::from(update.is_some()));
            if let Some(member) = &update {
                codec.encode_member(member, &mut bytes).expect("a vector grows");
            }
        }
        if let Some(broadcast) = broadcast {
            bytes.put_u16(broadcast.len() as u16);
            bytes.put_slice(broadcast);
        }
        bytes.into()
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
            effects.extend(self.sent(to, bytes, now));
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
    fn sent(&mut self, to: Ident, bytes: Bytes, now: Instant) -> Vec<Effect> {
        let header: Header<Ident> = PostcardCodec.decode_header(&bytes[..]).expect("foca writes what it reads");
        if header.src == self.me() && header.src_incarnation > self.incarnation {
            // Somebody suspected us, and we live: perhaps we are slow.
            self.incarnation = header.src_incarnation;
            self.awareness.worse();
            self.touched.add(header.src.id);
        }
        let mut effects = Vec::new();
        match header.message {
            Message::IndirectPing { origin, .. } if self.errands.len() < MAX_ERRANDS => {
                self.errands.push(Errand {
                    origin,
                    target: to,
                    due: now + self.awareness.stretch(self.config.probe_rtt),
                });
            }
            Message::PingReq { target, .. } => {
                let probe = self.probe.get_or_insert(Probe { target, asked: Vec::new() });
                probe.asked.push(to.id);
            }
            Message::Ping(_) => {
                let suspect = |member: &&Member<Ident>| *member.id() == to && member.state() == foca::State::Suspect;
                let suspected = self.foca.iter_members().find(suspect).map(Member::incarnation);
                effects.extend(suspected.map(|incarnation| self.tell_suspect(to, incarnation)));
            }
            _ => {}
        }
        let reach = if header.message == Message::Gossip { Reach::Anybody } else { Reach::Dial };
        effects.push(Effect::Send { to, bytes, reach });
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
