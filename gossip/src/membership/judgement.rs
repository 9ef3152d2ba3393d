//! Who is suspect, and when a suspect is given up: what the driver adds to foca of Lifeguard.

use std::{cmp::Reverse, collections::BTreeSet, time::Instant};

use foca::{Member, Timer};

use starling_protocol::{MemberHealth, News, Packet, Purpose, Word};

use super::{Due, Effect, Grounds, Ident, Membership};
use crate::{
    Reach,
    suspicion::{Patience, Suspicion},
};

impl Membership {
    /// The suspect has not answered over a stream either.
    pub(crate) fn check_failed(&mut self, suspect: &Ident, incarnation: u16, now: Instant) {
        for suspicion in &mut self.suspicions {
            if suspicion.suspect == *suspect && suspicion.incarnation == incarnation {
                suspicion.unanswered = Some(now);
            }
        }
    }

    /// How long suspects have in a mesh of this size.
    pub(super) fn patience(&self) -> Patience {
        let others = self.foca.num_members();
        let growth = ((others as f64 + 1.0).log2() / 6.0).max(1.0);
        let [min, max] = self.config.suspicion.map(|time| time.mul_f64(growth));
        Patience { min, max, witnesses: others.saturating_sub(1) }
    }

    /// When a suspicion is to be looked at: when the suspect's time is up, and the stream has given no answer. A node that
    /// doubts itself leaves the verdict to others, as long as there are any and it hears them.
    pub(super) fn verdict_at(&self, suspicion: &Suspicion, patience: Patience) -> Instant {
        if suspicion.unanswered.is_none() {
            return suspicion.asked + patience.max;
        }
        let confirmations = self.confirmations(suspicion);
        let earliest = suspicion.deadline(confirmations, patience);
        let Some(silent_at) = self.silent_at(patience).filter(|_| patience.witnesses > 0) else { return earliest };
        let [min, max] = [patience.min, patience.max].map(|time| self.awareness.stretch(time));
        suspicion.deadline(confirmations, Patience { min, max, ..patience }).min(earliest.max(silent_at))
    }

    /// From when on this node hears nobody, if nobody is heard until then; `None` if it never has.
    fn silent_at(&self, patience: Patience) -> Option<Instant> {
        self.recovery.heard_at().map(|at| at + patience.max)
    }

    /// How many others could not reach the suspect either: by their signatures, or by what they told this node themselves.
    fn confirmations(&self, suspicion: &Suspicion) -> usize {
        let me = self.me().id;
        let accusers = self.accusations.against(&suspicion.suspect, suspicion.incarnation).into_iter();
        let claims = self.accusations.claims(&suspicion.suspect).iter().copied();
        accusers.chain(claims).filter(|by| *by != me).collect::<BTreeSet<_>>().len()
    }

    /// foca 2.0 tells a member that it is dead when a suspicion's timer fires, also when the suspicion was refuted in
    /// time, and so forces a healthy node to rejoin. A timer whose suspicion no longer stands is not delivered.
    pub(super) fn judge_suspects(&mut self, grounds: &mut Grounds<'_>) -> Vec<Effect> {
        let now = grounds.now;
        let patience = self.patience();
        let (due, wait) = std::mem::take(&mut self.suspicions)
            .into_iter()
            .filter(|suspicion| self.stands(suspicion))
            .partition::<Vec<_>, _>(|suspicion| self.verdict_at(suspicion, patience) <= now);
        self.suspicions = wait;
        // Others are there and heard, and none of them says what this node says: then it is this node that is mistaken, and
        // whoever else has a link as bad must not be believed either.
        let in_touch = self.silent_at(patience).is_some_and(|at| now < at);
        let mut effects = Vec::new();
        for mut suspicion in due {
            let contradicted = in_touch && patience.witnesses > 0 && self.confirmations(&suspicion) == 0;
            // Its silence is old: the fault may have been here, and be over.
            let stale = suspicion.unanswered.is_none_or(|at| now.saturating_duration_since(at) > patience.min);
            if contradicted || stale {
                (suspicion.asked, suspicion.unanswered) = (now, None);
                let Suspicion { suspect, incarnation, .. } = suspicion;
                effects.push(Effect::Check { suspect, incarnation });
                self.suspicions.push(suspicion);
            } else if in_touch {
                if let Some(since) = self.accusations.dead_since(&suspicion.suspect) {
                    self.down_since.insert(suspicion.suspect.id, since);
                }
                for by in self.accusations.against(&suspicion.suspect, suspicion.incarnation) {
                    grounds.trust.confirmed(by, now);
                }
                match suspicion.timer {
                    Some(timer) => effects.extend(self.fire(timer, now)),
                    None => {
                        // Those whose probes found out tell it on. It may hear, though nobody hears it.
                        self.touched.add(suspicion.suspect.id);
                        let packet = self.craft(suspicion.suspect.life(), Purpose::Dead);
                        effects.push(Effect::Send { to: suspicion.suspect, packet, reach: Reach::Linked });
                        let dead = Member::new(suspicion.suspect, suspicion.incarnation, foca::State::Down);
                        let applied = self.step(now, |foca, rt| foca.apply_many([dead].into_iter(), false, rt));
                        effects.extend(applied.unwrap_or_default());
                    }
                }
            } else {
                effects.extend(self.give_up_alone(&suspicion, now));
            }
        }
        effects
    }

    /// What a node concludes that hears nobody is for itself alone: it may be deaf, and others still hear it.
    fn give_up_alone(&mut self, suspicion: &Suspicion, now: Instant) -> Vec<Effect> {
        self.touched.add(suspicion.suspect.id);
        self.given_up_alone.insert(suspicion.suspect.id);
        let dead = Member::new(suspicion.suspect, suspicion.incarnation, foca::State::Down);
        self.step(now, |foca, rt| foca.apply_many([dead].into_iter(), false, rt)).unwrap_or_default()
    }

    fn stands(&self, suspicion: &Suspicion) -> bool {
        self.foca.iter_membership_state().any(|member| {
            *member.id() == suspicion.suspect
                && member.state() == foca::State::Suspect
                && member.incarnation() == suspicion.incarnation
        })
    }

    /// A probe of ours has failed. Says so to everybody and, at once, to the suspect, which can refute before it is too late
    /// (Lifeguard §IV-C: buddy system), and has it asked over a stream, where a lost packet does not count.
    pub(super) fn suspect(&mut self, timer: Timer<Ident>, now: Instant) -> Vec<Effect> {
        let Timer::ChangeSuspectToDown { member_id: suspect, incarnation, .. } = timer else { return Vec::new() };
        self.touched.add(suspect.id);
        self.probe_failed = true;
        let me = self.me().id;
        let witnesses = self.accusations.words(&suspect, incarnation).to_vec();
        if witnesses.iter().all(|word| word.by == me) {
            // Nobody who was asked to probe it says that it failed: those may be unreachable from here, too.
            self.awareness.worse();
        }
        let known = self.suspicions.iter_mut().find(|s| s.suspect == suspect && s.incarnation == incarnation);
        let is_new = known.is_none();
        if let Some(known) = known
            && known.timer.replace(timer.clone()).is_some()
        {
            return Vec::new();
        }
        let own = self.word(Word::ACCUSES, suspect.life(), incarnation);
        self.accusations.record(&own, |_| true);
        for word in witnesses.into_iter().filter(|word| word.by != me).chain([own]) {
            self.spread_word(&Word { raised: true, ..word });
        }
        self.news = true;
        if !is_new {
            return Vec::new();
        }
        let timer = Some(timer);
        self.suspicions.push(Suspicion { suspect, incarnation, timer, since: now, asked: now, unanswered: None });
        vec![Effect::Check { suspect, incarnation }, self.tell_suspect(suspect, incarnation)]
    }

    /// A ping that tells its receiver that it is suspected.
    pub(super) fn tell_suspect(&self, to: Ident, incarnation: u16) -> Effect {
        let news = vec![News { life: to.life(), incarnation, health: MemberHealth::Suspect }];
        let packet = Packet { news, ..self.craft(to.life(), Purpose::Ping) };
        Effect::Send { to, packet, reach: Reach::Dial }
    }

    /// Nobody who was asked to probe the target could reach it: the rest of the probe's time would bring nothing.
    pub(super) fn end_probe_early(&mut self, now: Instant) {
        let Some(probe) = &self.probe else { return };
        let target = self.foca.iter_members().find(|member| member.id().life() == probe.target);
        let accusers =
            target.map_or_else(Vec::new, |target| self.accusations.against(target.id(), target.incarnation()));
        if probe.asked.iter().all(|asked| accusers.contains(asked)) {
            self.probe = None;
            let timers = std::mem::take(&mut self.timers).into_iter();
            let due = |due: Due| match due.timer {
                Timer::ProbeRandomMember(_) => Due { at: now.min(due.at), ..due },
                _ => due,
            };
            self.timers = timers.map(|Reverse(timer)| Reverse(due(timer))).collect();
        }
    }

    /// Probes that were made for others and brought nothing: whoever asked should know that this node was reached, and
    /// could not reach the target either (Lifeguard §IV-A: nack).
    pub(super) fn end_errands(&mut self, now: Instant) -> Vec<Effect> {
        let (due, wait) = std::mem::take(&mut self.errands).into_iter().partition::<Vec<_>, _>(|e| e.due <= now);
        self.errands = wait;
        due.into_iter()
            .filter_map(|errand| {
                let target = self.foca.iter_members().find(|member| *member.id() == errand.target)?;
                let origin = self.foca.iter_members().find(|member| member.id().life() == errand.origin)?;
                let to = *origin.id();
                let word = self.word(Word::ACCUSES, errand.target.life(), target.incarnation());
                let packet = Packet { words: vec![word], ..self.craft(errand.origin, Purpose::Gossip) };
                Some(Effect::Send { to, packet, reach: Reach::Linked })
            })
            .collect()
    }
}
