//! How a node that was given up comes back.

use std::time::{Duration, Instant};

use foca::{Foca, PostcardCodec};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use starling_protocol::{MemberHealth, MemberState};

use super::{Effect, Ident, Membership, swim::foca_config};

/// Members that a node greets when it comes back.
const HELLOS: usize = 8;

impl Membership {
    /// A node that this node holds for dead holds this one for dead, and has the better case.
    pub(crate) fn concede(&mut self, now: Instant) -> Vec<Effect> {
        if self.recovery.is_lost() {
            return Vec::new();
        }
        let me = MemberState { health: MemberHealth::Down, ..self.own_state() };
        self.learn(&[me], now, me.generation).unwrap_or_default()
    }

    /// Whether that member, who is there after all, was given up while this node heard nobody: then it is this node that was
    /// cut off.
    pub(crate) fn proves_deaf(&self, sender: &Ident) -> bool {
        !self.recovery.is_lost() && self.given_up_alone.contains(&sender.id) && self.holds_dead(sender)
    }

    /// A member heard this node for that long while this node, which it believed dead, did not hear it.
    pub(crate) fn was_deaf(&mut self, deaf: Duration) {
        self.recovery.was_deaf(deaf);
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
            effects.push(self.ping(to));
        }
        if self.recovery.try_return(now) {
            effects.extend(self.rejoin(now));
        }
        effects
    }

    /// Comes back in a new life, and with a clean slate: whom this node held for dead while it was cut off itself may be
    /// alive, and those who know will tell.
    fn rejoin(&mut self, now: Instant) -> Vec<Effect> {
        let me = self.me();
        // Above whatever is said about this node, or the mesh would hold the new life for an old one.
        let said = self.foca.iter_membership_state().filter(|m| m.id().id == me.id).map(|m| m.id().generation);
        let highest = said.chain([me.generation]).max().unwrap_or(me.generation);
        let next = Ident { generation: highest.saturating_add(1), ..me };
        let (living, dead): (Vec<_>, Vec<_>) = self.others().partition(|m| m.health != MemberHealth::Down);
        let rng = StdRng::seed_from_u64(self.rng.random());
        let config = foca_config(&self.config, self.sized_for);
        self.accusations.retain(|_| false);
        self.foca = Foca::with_custom_broadcast(next, config, rng, PostcardCodec, self.accusations.clone());
        self.timers.clear();
        self.suspicions.clear();
        self.probe = None;
        self.errands.clear();
        self.down_since.clear();
        self.given_up_alone.clear();
        self.incarnation = 0;
        self.probing = false;
        self.touched.add_everybody();
        self.urgent = true;
        let mut effects = vec![Effect::Rejoined(next)];
        let living: Vec<_> = living.into_iter().map(|m| MemberState { health: MemberHealth::Alive, ..m }).collect();
        effects.extend(self.learn(&living, now, u64::MAX).unwrap_or_default());
        // News of this life must reach those, too, that are on the other side of what was a partition.
        for known in [&living, &dead] {
            for _ in 0..HELLOS.min(known.len()) {
                let to = Ident::from(&known[self.rng.random_range(0..known.len())]);
                effects.push(self.ping(to));
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
