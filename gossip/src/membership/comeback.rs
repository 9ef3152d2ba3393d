//! How a node that was given up comes back.

use std::time::{Duration, Instant};

use foca::{Foca, Member, PostcardCodec};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use starling_protocol::{MemberHealth, NodeId};

use super::{
    Effect, Ident, Membership, PeerState,
    swim::{foca_config, member_of},
};
use crate::suspicion::Words;

/// Members that a node greets when it comes back.
const HELLOS: usize = 8;
/// Pause between two times that a node gives in to the same one that it holds for dead; doubles. Where halves of a mesh meet
/// again, once is enough.
const CONCESSION_PAUSE: Duration = Duration::from_secs(30);
const MAX_CONCESSION_PAUSE: Duration = Duration::from_secs(600);
/// Members that must come with the same story within that time, if there are as many that could.
const CLAIMANTS: usize = 2;
const TOGETHER: Duration = Duration::from_secs(10);
/// Members whose stories were believed that are remembered.
const MAX_CONCESSIONS: usize = 4096;

impl Membership {
    /// A node that this node holds for dead holds this one for dead, and has the better case.
    pub(crate) fn concede(&mut self, now: Instant) -> Vec<Effect> {
        if self.recovery.is_lost() {
            return Vec::new();
        }
        let me = Member::new(self.me(), self.incarnation, foca::State::Down);
        self.step(now, |foca, rt| foca.apply_many([me].into_iter(), false, rt)).unwrap_or_default()
    }

    /// The same, to one that has but its own word for it: if there are others who say so, of those that could, and not every
    /// time that the same one comes with that story.
    pub(crate) fn concede_to_claim(&mut self, by: NodeId, dead: usize, now: Instant) -> Vec<Effect> {
        self.disputes.retain(|_, at| now.saturating_duration_since(*at) < TOGETHER);
        self.disputes.insert(by, now);
        if self.disputes.len() < CLAIMANTS.min(dead) || self.recovery.is_lost() {
            return Vec::new();
        }
        let since = |at: Instant| now.saturating_duration_since(at);
        self.concessions.retain(|_, (at, _)| since(*at) < 2 * MAX_CONCESSION_PAUSE);
        let (at, pause) = self.concessions.get(&by).copied().unwrap_or((now, CONCESSION_PAUSE));
        if now < at || self.concessions.len() >= MAX_CONCESSIONS {
            return Vec::new();
        }
        for by in std::mem::take(&mut self.disputes).into_keys() {
            self.concessions.insert(by, (now + pause, (pause * 2).min(MAX_CONCESSION_PAUSE)));
        }
        self.concede(now)
    }

    /// Whether that member, who is there after all, was given up while this node heard nobody: then it is this node that was
    /// cut off.
    pub(crate) fn proves_deaf(&self, sender: &Ident) -> bool {
        !self.recovery.is_lost() && self.given_up_alone.contains(&sender.id) && self.holds_dead(sender)
    }

    /// This node asks those why it was given up.
    pub(crate) fn asks_why(&mut self, whom: Vec<NodeId>) {
        self.recovery.asks_why(whom);
    }

    /// A member heard this node for that long while this node, which it believed dead, did not hear it.
    pub(crate) fn was_deaf(&mut self, by: NodeId, deaf: Duration) {
        self.recovery.was_deaf(by, deaf);
    }

    pub(super) fn recover(&mut self, now: Instant) -> Vec<Effect> {
        if !self.recovery.is_lost() {
            return Vec::new();
        }
        let mut effects = Vec::new();
        if self.recovery.ping_is_due(now, self.config.probe_rtt * 2)
            && let Some(to) = self.acquaintance()
        {
            self.recovery.asked(to, now);
            effects.push(self.ping(to, 0));
        }
        let stays_away = self.stays_away_until.is_some_and(|until| now < until);
        if !stays_away && self.recovery.try_return(now) {
            effects.extend(self.rejoin(now));
        }
        effects
    }

    /// There was a later life of this node than it remembers: begins one after that, or nobody would hear it.
    pub(crate) fn outlive(&mut self, generation: u64, now: Instant) -> Vec<Effect> {
        if self.leaving || generation < self.me().generation {
            return Vec::new();
        }
        self.recovery.came_back(now);
        self.stays_away_until = None;
        self.rejoin_after(generation, now)
    }

    /// If this node is given up, it does not come back by itself before then.
    pub(crate) fn stay_away_until(&mut self, until: Instant) {
        self.stays_away_until = Some(until);
    }

    pub(super) fn rejoin(&mut self, now: Instant) -> Vec<Effect> {
        self.rejoin_after(self.me().generation, now)
    }

    /// Comes back in a new life, and with a clean slate: whom this node held for dead while it was cut off itself may be
    /// alive, and those who know will tell.
    fn rejoin_after(&mut self, generation: u64, now: Instant) -> Vec<Effect> {
        let me = self.me();
        let next = Ident { generation: generation.saturating_add(1), ..me };
        let (living, dead): (Vec<_>, Vec<_>) = self.others().partition(|m| m.health != MemberHealth::Down);
        let rng = StdRng::seed_from_u64(self.rng.random());
        let config = foca_config(&self.config, self.sized_for);
        self.accusations.retain(|_| false);
        self.foca = Foca::with_custom_broadcast(next, config, rng, PostcardCodec, Words);
        self.timers.clear();
        self.suspicions.clear();
        self.waiting.clear();
        self.inquest = None;
        self.appeals.clear();
        self.called_dead_by.clear();
        self.probe = None;
        self.errands.clear();
        self.down_since.clear();
        self.given_up_alone.clear();
        self.incarnation = 0;
        self.lives.remove(&me.id);
        self.probing = false;
        self.touched.add_everybody();
        self.urgent = true;
        let mut effects = vec![Effect::Rejoined(next)];
        let alive = living.iter().map(|m| member_of(&PeerState { health: MemberHealth::Alive, ..*m }));
        let alive: Vec<_> = alive.collect();
        effects.extend(self.step(now, |foca, rt| foca.apply_many(alive.into_iter(), false, rt)).unwrap_or_default());
        // News of this life must reach those, too, that are on the other side of what was a partition.
        for known in [&living, &dead] {
            for _ in 0..HELLOS.min(known.len()) {
                let to = Ident::from(&known[self.rng.random_range(0..known.len())]);
                effects.push(self.ping(to, 0));
            }
        }
        effects.extend(dead.iter().take(2).map(|m| Effect::Exchange(m.into())));
        effects
    }

    /// Somebody to talk to: one who is thought alive, or else anybody.
    fn acquaintance(&mut self) -> Option<Ident> {
        let me = self.me().id;
        let active = self.foca.num_members();
        if active > 0 {
            let pick = self.rng.random_range(0..active);
            return self.foca.iter_members().nth(pick).map(|member| *member.id());
        }
        let all = self.foca.iter_membership_state().len();
        let pick = if all > 0 { self.rng.random_range(0..all) } else { 0 };
        self.foca.iter_membership_state().nth(pick).map(|member| *member.id()).filter(|ident| ident.id != me)
    }
}
