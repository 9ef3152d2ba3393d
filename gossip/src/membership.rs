//! The driver around foca: the only place that knows it.

use std::{
    cmp::{Ordering, Reverse},
    collections::BinaryHeap,
    net::SocketAddr,
    num::{NonZeroU8, NonZeroUsize},
    time::{Duration, Instant},
};

use bytes::Bytes;
use foca::{Codec, Foca, Notification, OwnedNotification, PeriodicParams, PostcardCodec, Timer};
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};
use starling_protocol::{MemberHealth, MemberState, NodeId};

/// Largest SWIM packet, in bytes: what a QUIC datagram carries over a 1200-byte path (1162), with room to spare.
const MAX_PACKET_BYTES: usize = 1150;
/// How long a dead member is remembered, so that old news cannot bring it back.
const REMEMBER_DOWN: Duration = Duration::from_secs(24 * 3600);

/// A member in SWIM's eyes: which node, where, in which life. Nothing that changes while it lives may be in here, because
/// foca drops packets to any other identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ident {
    /// Who.
    pub id: NodeId,
    /// Where its mesh port answers.
    pub addr: SocketAddr,
    /// Which life; higher wins.
    pub generation: u64,
}

impl foca::Identity for Ident {
    type Addr = NodeId;

    fn renew(&self) -> Option<Self> {
        Some(Self { generation: self.generation.saturating_add(1), ..*self })
    }

    fn addr(&self) -> NodeId {
        self.id
    }

    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        // Two different identities of one life can only differ in the address; any order will do if all use the same.
        (self.generation, self.addr) > (adversary.generation, adversary.addr)
    }
}

/// What a step of the driver wants done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// A packet to send.
    Send { to: Ident, bytes: Bytes },
    /// The mesh had declared this life dead; we live on under a new generation.
    Rejoined(Ident),
}

/// Timing of failure detection.
#[derive(Debug, Clone)]
pub(crate) struct Timing {
    pub(crate) probe_period: Duration,
    pub(crate) probe_rtt: Duration,
    pub(crate) suspicion: Duration,
}

/// foca, its timers on one ordered heap, and the gate in front of its suspicion timer.
pub(crate) struct Membership {
    foca: Foca<Ident, PostcardCodec, StdRng, foca::NoCustomBroadcast>,
    timers: BinaryHeap<Reverse<Due>>,
    /// Makes timers of one instant fire in the order in which they were set.
    timer_seq: u64,
    timing: Timing,
    sized_for: usize,
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

#[derive(Default)]
struct Collected {
    effects: Vec<Effect>,
    timers: Vec<(Timer<Ident>, Duration)>,
}

impl foca::Runtime<Ident> for Collected {
    fn notify(&mut self, notification: Notification<'_, Ident>) {
        // Changes of others are read from the membership table; only our own change has a consequence of its own.
        if let OwnedNotification::Rejoin(ident) = notification.to_owned() {
            self.effects.push(Effect::Rejoined(ident));
        }
    }

    fn send_to(&mut self, to: Ident, data: &[u8]) {
        self.effects.push(Effect::Send { to, bytes: Bytes::copy_from_slice(data) });
    }

    fn submit_after(&mut self, event: Timer<Ident>, after: Duration) {
        self.timers.push((event, after));
    }
}

impl Membership {
    pub(crate) fn new(me: Ident, timing: Timing, rng: StdRng) -> Self {
        let config = foca_config(&timing, 1);
        Self {
            foca: Foca::new(me, config, rng, PostcardCodec),
            timers: BinaryHeap::new(),
            timer_seq: 0,
            timing,
            sized_for: 1,
        }
    }

    /// This node, in its present life.
    pub(crate) fn me(&self) -> Ident {
        *self.foca.identity()
    }

    /// All others that SWIM remembers, dead ones included.
    pub(crate) fn others(&self) -> impl Iterator<Item = MemberState> + '_ {
        self.foca.iter_membership_state().map(|member| MemberState {
            id: member.id().id,
            addr: member.id().addr,
            generation: member.id().generation,
            incarnation: member.incarnation(),
            health: match member.state() {
                foca::State::Alive => MemberHealth::Alive,
                foca::State::Suspect => MemberHealth::Suspect,
                foca::State::Down => MemberHealth::Down,
            },
        })
    }

    /// The sender that a packet claims, without believing it.
    pub(crate) fn claimed_sender(packet: &[u8]) -> Option<NodeId> {
        let header: foca::Header<Ident> = PostcardCodec.decode_header(packet).ok()?;
        Some(header.src.id)
    }

    /// Takes a packet. `Err` says what is wrong with it; foca's state is intact then.
    pub(crate) fn packet(&mut self, packet: &[u8], now: Instant) -> Result<Vec<Effect>, String> {
        self.step(now, |foca, rt| foca.handle_data(packet, rt))
    }

    /// Takes what another node knows.
    pub(crate) fn learn(&mut self, members: &[MemberState], now: Instant) -> Result<Vec<Effect>, String> {
        let updates = members.iter().map(|m| {
            let ident = Ident { id: m.id, addr: m.addr, generation: m.generation };
            let state = match m.health {
                MemberHealth::Alive => foca::State::Alive,
                MemberHealth::Suspect => foca::State::Suspect,
                MemberHealth::Down => foca::State::Down,
            };
            foca::Member::new(ident, m.incarnation, state)
        });
        self.step(now, |foca, rt| foca.apply_many(updates, true, rt))
    }

    /// Tells peers what has changed, now.
    pub(crate) fn gossip(&mut self, now: Instant) -> Vec<Effect> {
        self.step(now, |foca, rt| foca.gossip(rt)).unwrap_or_default()
    }

    /// Says good-bye; nothing may be asked of the membership afterwards but [`Membership::gossip`].
    pub(crate) fn leave(&mut self, now: Instant) -> Vec<Effect> {
        self.step(now, |foca, rt| foca.leave_cluster(rt)).unwrap_or_default()
    }

    /// When [`Membership::tick`] wants to be called next.
    pub(crate) fn next_timer(&self) -> Option<Instant> {
        self.timers.peek().map(|Reverse(due)| due.at)
    }

    /// Fires the timers that are due.
    pub(crate) fn tick(&mut self, now: Instant) -> Vec<Effect> {
        let mut effects = Vec::new();
        while self.timers.peek().is_some_and(|Reverse(due)| due.at <= now) {
            let Some(Reverse(due)) = self.timers.pop() else { break };
            if self.is_refuted_suspicion(&due.timer) {
                continue;
            }
            match self.step(now, |foca, rt| foca.handle_timer(due.timer, rt)) {
                Ok(more) => effects.extend(more),
                Err(error) => tracing::debug!(error, "membership timer"),
            }
        }
        self.resize();
        effects
    }

    /// foca 2.0 tells a member that it is dead when a suspicion's timer fires, also when the suspicion was refuted in
    /// time, and so forces a healthy node to rejoin. A timer whose suspicion no longer stands is not delivered.
    fn is_refuted_suspicion(&self, timer: &Timer<Ident>) -> bool {
        let Timer::ChangeSuspectToDown { member_id, incarnation, .. } = timer else { return false };
        !self.foca.iter_membership_state().any(|member| {
            member.id() == member_id && member.state() == foca::State::Suspect && member.incarnation() == *incarnation
        })
    }

    fn step(
        &mut self,
        now: Instant,
        run: impl FnOnce(
            &mut Foca<Ident, PostcardCodec, StdRng, foca::NoCustomBroadcast>,
            &mut Collected,
        ) -> Result<(), foca::Error>,
    ) -> Result<Vec<Effect>, String> {
        let mut collected = Collected::default();
        let result = run(&mut self.foca, &mut collected);
        for (timer, after) in collected.timers {
            self.timer_seq += 1;
            self.timers.push(Reverse(Due { at: now + after, seq: self.timer_seq, timer }));
        }
        match result {
            Ok(()) => Ok(collected.effects),
            // An error on the way does not undo what was decided before it.
            Err(_) if !collected.effects.is_empty() => Ok(collected.effects),
            Err(error) => Err(format!("{error:?}")),
        }
    }

    /// Dissemination and suspicion follow the size of the mesh. Powers of two, so that one join does not change them.
    fn resize(&mut self) {
        let size = (self.foca.num_members() + 1).next_power_of_two();
        if size != self.sized_for && self.foca.set_config(foca_config(&self.timing, size)).is_ok() {
            self.sized_for = size;
        }
    }
}

fn foca_config(timing: &Timing, size: usize) -> foca::Config {
    let nonzero = |n: usize| NonZeroUsize::new(n).unwrap_or(NonZeroUsize::MIN);
    let rounds = (size as f64 + 1.0).log2().max(1.0);
    foca::Config {
        probe_period: timing.probe_period,
        probe_rtt: timing.probe_rtt,
        num_indirect_probes: nonzero(3),
        max_transmissions: NonZeroU8::new((2.0 * rounds).ceil().min(60.0) as u8 + 2).unwrap_or(NonZeroU8::MIN),
        suspect_to_down_after: timing.suspicion.mul_f64((rounds / 5.0).max(1.0)),
        remove_down_after: Some(REMEMBER_DOWN),
        max_packet_size: nonzero(MAX_PACKET_BYTES),
        notify_down_members: true,
        // Full state travels over streams (see `contacts`), so members need not be asked for a packet of others.
        periodic_announce: None,
        periodic_announce_to_down_members: None,
        periodic_gossip: Some(PeriodicParams { frequency: Duration::from_millis(200), num_members: nonzero(3) }),
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn ident(n: u8) -> Ident {
        Ident { id: NodeId([n; 16]), addr: ([127, 0, 0, n], 7400).into(), generation: 1 }
    }

    fn timing() -> Timing {
        Timing {
            probe_period: Duration::from_millis(500),
            probe_rtt: Duration::from_millis(150),
            suspicion: Duration::from_secs(2),
        }
    }

    fn state(n: u8, incarnation: u16, health: MemberHealth) -> MemberState {
        MemberState { id: ident(n).id, addr: ident(n).addr, generation: 1, incarnation, health }
    }

    fn health_of(membership: &Membership, n: u8) -> Option<MemberHealth> {
        membership.others().find(|m| m.id == ident(n).id).map(|m| m.health)
    }

    /// Runs the timers for `seconds` of simulated time; counts packets to node `n`.
    fn run(membership: &mut Membership, now: &mut Instant, seconds: u64, mut on_effect: impl FnMut(&Effect)) {
        let end = *now + Duration::from_secs(seconds);
        while let Some(at) = membership.next_timer().filter(|at| *at <= end) {
            *now = at;
            membership.tick(at).iter().for_each(&mut on_effect);
        }
        *now = end;
    }

    #[test]
    fn a_refuted_suspicion_leaves_the_member_alone() {
        let mut now = Instant::now();
        let mut a = Membership::new(ident(1), timing(), StdRng::seed_from_u64(1));
        a.learn(&[state(2, 0, MemberHealth::Alive)], now).unwrap();
        run(&mut a, &mut now, 1, |_| ()); // it does not answer a probe
        assert_eq!(health_of(&a, 2), Some(MemberHealth::Suspect));
        a.learn(&[state(2, 1, MemberHealth::Alive)], now).unwrap();

        // Deliver only the timer in question, past its time: with foca alone, this is where node 2 is told that it is dead.
        let suspicion = std::mem::take(&mut a.timers)
            .into_iter()
            .find(|Reverse(due)| matches!(due.timer, Timer::ChangeSuspectToDown { .. }))
            .expect("a suspicion starts a timer");
        let timer = suspicion.0.timer.clone();
        a.timers.push(suspicion);
        now += Duration::from_secs(10);
        assert_eq!(a.tick(now), []);
        assert_eq!(health_of(&a, 2), Some(MemberHealth::Alive));

        // The same timer given to foca ungated shows the behaviour that the gate is there for.
        let ungated = a.step(now, |foca, rt| foca.handle_timer(timer, rt)).unwrap();
        assert!(matches!(&ungated[..], [Effect::Send { to, .. }] if to.id == ident(2).id), "{ungated:?}");
    }

    #[test]
    fn a_silent_member_is_suspected_then_down() {
        let mut now = Instant::now();
        let mut a = Membership::new(ident(1), timing(), StdRng::seed_from_u64(2));
        a.learn(&[state(2, 0, MemberHealth::Alive)], now).unwrap();
        run(&mut a, &mut now, 1, |_| ());
        assert_eq!(health_of(&a, 2), Some(MemberHealth::Suspect));
        run(&mut a, &mut now, 3, |_| ());
        assert_eq!(health_of(&a, 2), Some(MemberHealth::Down));
    }

    #[test]
    fn being_declared_dead_means_a_new_life() {
        let now = Instant::now();
        let mut a = Membership::new(ident(1), timing(), StdRng::seed_from_u64(3));
        a.learn(&[state(2, 0, MemberHealth::Alive)], now).unwrap();
        let effects = a.learn(&[state(1, 0, MemberHealth::Down)], now).unwrap();
        assert!(effects.contains(&Effect::Rejoined(Ident { generation: 2, ..ident(1) })), "{effects:?}");
        assert_eq!(a.me().generation, 2);
    }

    #[test]
    fn garbage_is_refused() {
        let mut a = Membership::new(ident(1), timing(), StdRng::seed_from_u64(4));
        assert!(a.packet(b"\xff\xff\xff\xff", Instant::now()).is_err());
        assert_eq!(Membership::claimed_sender(b"\xff"), None);
    }
}
