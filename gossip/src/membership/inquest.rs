//! Whether this node is dead, as somebody says.
//!
//! In SWIM a node that hears of its own death has to believe it, and come back in a new life. Anybody could then take anybody
//! out, again and again. So this node asks around: those who hold it for dead say so to its ping, and the others acknowledge.
//! It picks whom it asks, so that few liars among many do not decide.

use std::time::{Duration, Instant};

use foca::Timer;
use rand::RngExt;
use starling_protocol::{NodeId, Purpose};

use super::{Effect, Grounds, Ident, Membership};

/// Members that are asked at a time.
const JURY: usize = 7;
/// Pause until others are asked, if nobody has answered, and how often that is tried.
const RETRY: Duration = Duration::from_secs(1);
const ROUNDS: u32 = 30;
/// Pause between the beginnings of two inquests.
const PAUSE: Duration = Duration::from_secs(2);
/// How long what a member has said of its own accord counts as its answer, if it gives no other.
const STANDS: Duration = Duration::from_secs(10);

/// What was heard so far.
#[derive(Debug)]
pub(super) struct Inquest {
    /// Who says that this node is dead.
    by: NodeId,
    /// Who was asked and has not answered.
    asked: Vec<NodeId>,
    alive: usize,
    dead: usize,
    pub(super) until: Instant,
    rounds: u32,
    /// Whether the jury before this one has found that this node is dead: one alone may be full of liars.
    again: bool,
    /// How many were asked.
    size: usize,
    /// Of the pings. What came late from before, when nobody thought so yet, is no answer.
    probe: u8,
}

impl Membership {
    /// A member that this node does not hold for dead says that this life of it is over.
    pub(super) fn called_dead(&mut self, by: NodeId, generation: u64, grounds: &mut Grounds<'_>) -> Vec<Effect> {
        let now = grounds.now;
        if generation == self.me().generation && !self.recovery.is_lost() {
            self.called_dead_by.insert(by, now);
        }
        let early = self.next_inquest.is_some_and(|at| now < at);
        let busy = early || self.inquest.is_some() || self.recovery.is_lost() || self.leaving;
        if busy || generation != self.me().generation || !grounds.trust.may_provoke(by, now) {
            return Vec::new();
        }
        self.next_inquest = Some(now + PAUSE);
        self.ask_around(by, (1, false), self.config.probe_rtt * 2, now)
    }

    /// `rounds` were begun; `again` is whether the jury before this one has found that this node is dead.
    fn ask_around(
        &mut self,
        by: NodeId,
        (rounds, again): (u32, bool),
        patience: Duration,
        now: Instant,
    ) -> Vec<Effect> {
        let mut members: Vec<Ident> = self.foca.iter_members().map(|member| *member.id()).collect();
        if members.len() > 1 {
            members.retain(|member| member.id != by);
        }
        let jury = (0..JURY.min(members.len())).map(|_| members.swap_remove(self.rng.random_range(0..members.len())));
        let jury: Vec<Ident> = jury.collect();
        let asked = jury.iter().map(|member| member.id).collect();
        let (size, probe) = (jury.len(), self.rng.random());
        self.inquest =
            Some(Inquest { by, asked, alive: 0, dead: 0, until: now + patience, rounds, again, size, probe });
        jury.into_iter().map(|member| self.ping(member, probe)).collect()
    }

    /// Whoever holds this node for dead answers nothing else.
    pub(super) fn testify(
        &mut self,
        from: NodeId,
        (purpose, probe): (Purpose, u8),
        grounds: &mut Grounds<'_>,
    ) -> Vec<Effect> {
        let Some(inquest) = &mut self.inquest else { return Vec::new() };
        let dead = purpose == Purpose::Dead;
        if !dead && (purpose, probe) != (Purpose::Ack, inquest.probe) {
            return Vec::new();
        }
        let Some(at) = inquest.asked.iter().position(|asked| *asked == from) else { return Vec::new() };
        inquest.asked.swap_remove(at);
        *(if dead { &mut inquest.dead } else { &mut inquest.alive }) += 1;
        if inquest.asked.is_empty() {
            inquest.until = grounds.now;
        }
        if !dead {
            self.called_dead_by.remove(&from);
        }
        self.conclude_inquest(grounds)
    }

    /// Ends it when its time is over or all have answered.
    pub(super) fn conclude_inquest(&mut self, grounds: &mut Grounds<'_>) -> Vec<Effect> {
        let Some(Inquest { by, asked, alive, dead: answered, rounds, again, size, .. }) =
            self.inquest.take_if(|inquest| inquest.until <= grounds.now)
        else {
            return Vec::new();
        };
        // Whoever is heard by nobody gets no answers, but hears what the others think.
        self.called_dead_by.retain(|_, at| grounds.now.saturating_duration_since(*at) < STANDS);
        let dead = answered + asked.iter().filter(|asked| self.called_dead_by.contains_key(asked)).count();
        tracing::debug!(?by, alive, dead, size, rounds, again, "asked around whether this node is dead");
        // Nobody answers, and has not for long: those who say so may be the only ones that can still be heard.
        let unheard = alive + dead == 0 && self.recovery.is_unheard(grounds.now);
        let found_dead = dead > alive && 2 * dead > size;
        if unheard || (found_dead && again) {
            return self.concede(grounds.now);
        }
        if found_dead {
            return self.ask_around(by, (rounds, true), self.config.probe_rtt * 2, grounds.now);
        }
        if 2 * (alive + dead) <= size {
            return match rounds < ROUNDS {
                true => self.ask_around(by, (rounds + 1, again), RETRY, grounds.now),
                false => Vec::new(),
            };
        }
        if alive > dead {
            grounds.trust.contradicted(by, self.me().id, grounds.now);
        }
        // It is not most that say so. Whoever does may have been cut off, and is told, if this node's own link is good.
        let good = 2 * (alive + answered) > size;
        match grounds.records.life(&by).filter(|_| good) {
            Some(judge) => {
                let mut effects = self.refute_now(grounds.now);
                effects.push(Effect::Appeal(judge));
                effects
            }
            None => Vec::new(),
        }
    }

    /// A member that this node holds for dead says itself that it lives, at a later incarnation: asks it.
    pub(crate) fn hear_appeal(&mut self, of: Ident, incarnation: u16, grounds: &mut Grounds<'_>) -> Vec<Effect> {
        let dead_at = self
            .foca
            .iter_membership_state()
            .find(|member| *member.id() == of)
            .filter(|m| m.state() == foca::State::Down);
        let later = dead_at.is_some_and(|dead| incarnation > dead.incarnation());
        if !later || self.recovery.is_lost() || !grounds.trust.may_provoke(of.id, grounds.now) {
            return Vec::new();
        }
        self.appeals.insert(of.id, of.generation);
        vec![Effect::Check { suspect: of, incarnation }]
    }

    /// The one that appealed was asked and is there: it is a member again, in the same life.
    pub(super) fn raise(&mut self, member: &Ident, now: Instant) -> Vec<Effect> {
        if self.appeals.remove(&member.id) != Some(member.generation) {
            return Vec::new();
        }
        self.down_since.remove(&member.id);
        self.given_up_alone.remove(&member.id);
        self.fire(Timer::RemoveDown(*member), now)
    }
}
