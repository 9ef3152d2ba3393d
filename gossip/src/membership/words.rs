//! What members say about incarnations and sign, what they tell unsigned, and what this node makes of either. Nothing that is
//! unsigned changes anything here: it is a reason to look.

use std::collections::BTreeMap;

use starling_protocol::{Life, MemberHealth, News, NodeId, Word};

use super::{Effect, Grounds, Ident, Membership};
use crate::suspicion::Suspicion;

/// Words that are looked at in one message; of those about one member by one, the newest.
const MAX_WORDS: usize = 256;
/// Members that are asked at a time because others accuse them or hold them for dead.
const MAX_CHECKS: usize = 64;
/// Accusers that make a node look after a suspect itself, if there are as many.
const ENOUGH_ACCUSERS: usize = 2;

impl Membership {
    /// Takes signed words that a peer sends, its own and others'.
    pub(crate) fn take_words(&mut self, from: NodeId, words: &[Word], grounds: &mut Grounds<'_>) -> Vec<Effect> {
        let mut effects = Vec::new();
        let mut newest: BTreeMap<(u8, NodeId, NodeId), &Word> = BTreeMap::new();
        for word in words {
            let known = newest.entry((word.kind, word.subject, word.by)).or_insert(word);
            if (word.generation, word.incarnation) > (known.generation, known.incarnation) {
                *known = word;
            }
        }
        for word in newest.into_values().take(MAX_WORDS) {
            if !grounds.trust.listens(&from, grounds.now) {
                break;
            }
            match word.kind {
                Word::ACCUSES => effects.extend(self.take_accusation(from, word, grounds)),
                Word::LIVES => effects.extend(self.take_sign_of_life(from, word, grounds)),
                // Of a later version.
                _ => {}
            }
        }
        effects
    }

    /// Words of members about their present incarnation, of those that `wants` names.
    pub(crate) fn lives(&self, wants: impl Fn(&NodeId) -> bool) -> Vec<Word> {
        self.lives.values().filter(|word| wants(&word.subject)).cloned().collect()
    }

    /// Whether that state is of an incarnation that this node has no word of.
    pub(crate) fn lacks_word(&self, life: Life, incarnation: u16) -> bool {
        life.id != self.me().id && incarnation > self.proven(&life.id, life.generation)
    }

    /// A word of this node's own.
    pub(super) fn word(&self, kind: u8, subject: Life, incarnation: u16) -> Word {
        let Life { id, generation } = subject;
        let by = self.me().id;
        let mut word = Word { kind, subject: id, generation, incarnation, by, raised: false, signature: Vec::new() };
        word.signature = self.credentials.sign_word(&word.signed_bytes());
        word
    }

    /// Gives a word, which is verified or this node's own, to others with the next packets.
    pub(super) fn spread_word(&mut self, word: &Word) {
        if let Err(error) = self.foca.add_broadcast(&word.encode()) {
            tracing::debug!(?error, "a word is not spread");
        }
        self.news = true;
    }

    /// This node is at a new incarnation, which others believe from nobody else.
    pub(super) fn say_that_it_lives(&mut self) {
        let word = self.word(Word::LIVES, self.me().life(), self.incarnation);
        self.spread_word(&word);
        self.lives.insert(word.subject, word);
    }

    fn take_sign_of_life(&mut self, from: NodeId, word: &Word, grounds: &mut Grounds<'_>) -> Vec<Effect> {
        let now = grounds.now;
        let life = Life { id: word.subject, generation: word.generation };
        let Some(ident) = self.known(from, life, grounds) else { return Vec::new() };
        let is_old = self
            .lives
            .get(&word.subject)
            .is_some_and(|known| (known.generation, known.incarnation) >= (word.generation, word.incarnation));
        if is_old || ident.id == self.me().id {
            return Vec::new();
        }
        if word.by != word.subject {
            grounds.trust.forged(from, now);
            return Vec::new();
        }
        if !self.may_believe(from, word, grounds) {
            return Vec::new();
        }
        self.lives.insert(word.subject, word.clone());
        let was = self.proven(&life.id, life.generation);
        self.prove(life, word.incarnation);
        self.spread_word(word);
        if word.incarnation <= was {
            return Vec::new();
        }
        self.touched.add(life.id);
        let alive = foca::Member::new(ident, word.incarnation, foca::State::Alive);
        self.step(now, |foca, rt| foca.apply_many([alive].into_iter(), false, rt)).unwrap_or_default()
    }

    fn take_accusation(&mut self, from: NodeId, word: &Word, grounds: &mut Grounds<'_>) -> Vec<Effect> {
        let now = grounds.now;
        let life = Life { id: word.subject, generation: word.generation };
        let me = self.me();
        let suspect = if life == me.life() { Some(me) } else { self.known(from, life, grounds) };
        let Some(suspect) = suspect else { return Vec::new() };
        let present = if suspect == me { self.incarnation } else { self.proven(&life.id, life.generation) };
        if word.incarnation != present || word.by == me.id || word.by == word.subject || self.accusations.is_old(word) {
            return Vec::new();
        }
        if !word.raised && word.by != from {
            // An answer to a request for a probe is for whoever asked.
            return Vec::new();
        }
        if grounds.records.signed(&word.by).is_none() {
            let life = Life { id: word.by, generation: 0 };
            grounds.trust.stranger(from, life, grounds.records, now);
            return Vec::new();
        }
        if !self.may_believe(from, word, grounds) {
            return Vec::new();
        }
        let trusts = |by: &NodeId| grounds.trust.trusts(by, now);
        if !self.accusations.record(word, trusts) {
            return Vec::new();
        }
        if suspect == me {
            return if grounds.trust.may_provoke(word.by, now) { self.refute_now(now) } else { Vec::new() };
        }
        // Whoever only answers a request for a probe waits for what comes of it.
        if !word.raised || !grounds.trust.trusts(&word.by, now) {
            return Vec::new();
        }
        self.spread_word(word);
        self.touched.add(life.id);
        let mut effects = self.mark_suspect(suspect, word.incarnation, now);
        effects.extend(self.look_after(&suspect.id, grounds));
        effects
    }

    /// Takes what a peer says of members without a signature.
    pub(super) fn take_news(&mut self, from: NodeId, news: &[News], grounds: &mut Grounds<'_>) -> Vec<Effect> {
        let me = self.me();
        let mut effects = Vec::new();
        let mut behind = false;
        for News { life, incarnation, health } in news {
            if life.id == me.id {
                effects.extend(match health {
                    MemberHealth::Suspect if life.generation == me.generation => {
                        self.refute(from, *incarnation, grounds).1
                    }
                    MemberHealth::Down => self.called_dead(from, life.generation, grounds),
                    _ => Vec::new(),
                });
                continue;
            }
            let Some(ident) = self.known(from, *life, grounds) else {
                let known = grounds.records.life(&life.id).map_or(0, |known| known.generation);
                if *health == MemberHealth::Alive && life.generation > known {
                    behind = true;
                }
                continue;
            };
            if *health != MemberHealth::Down {
                continue;
            }
            let present = self.proven(&life.id, life.generation);
            let trusted = grounds.trust.trusts(&from, grounds.now);
            if trusted && self.accusations.claim(from, &ident, present) {
                effects.extend(self.look_after(&ident.id, grounds));
            }
        }
        if behind {
            effects.push(Effect::Introduce(from));
        }
        effects
    }

    /// The member by its record, in that life; mentions of anybody else are counted.
    fn known(&self, from: NodeId, life: Life, grounds: &mut Grounds<'_>) -> Option<Ident> {
        let known = grounds.records.life(&life.id);
        if known.is_none_or(|known| known.generation < life.generation) && life.id != self.me().id {
            grounds.trust.stranger(from, life, grounds.records, grounds.now);
        }
        known.filter(|known| known.generation == life.generation)
    }

    /// Whether that member did say so, and has not said too much of late. Whoever passes on what is not so answers for it.
    fn may_believe(&self, from: NodeId, word: &Word, grounds: &mut Grounds<'_>) -> bool {
        if !grounds.trust.hears(word.by, grounds.now) {
            return false;
        }
        let signer = grounds.records.signed(&word.by);
        if !signer.is_some_and(|signer| self.credentials.verify_word(signer, &word.signed_bytes(), &word.signature)) {
            grounds.trust.forged(from, grounds.now);
            return false;
        }
        grounds.trust.may_say(word.by, grounds.now)
    }

    /// Comes to a judgement of this node's own about a member that others complain about: asks it.
    pub(super) fn look_after(&mut self, id: &NodeId, grounds: &mut Grounds<'_>) -> Vec<Effect> {
        let now = grounds.now;
        let Some(member) = self.foca.iter_members().find(|member| member.id().id == *id) else { return Vec::new() };
        let (suspect, incarnation) = (*member.id(), member.incarnation());
        let known = self.suspicions.iter().any(|s| s.suspect == suspect && s.incarnation == incarnation);
        let cleared = self.cleared.get(id).is_some_and(|(life, at, _)| (*life, *at) == (suspect.life(), incarnation));
        if known || cleared || self.recovery.is_lost() {
            return Vec::new();
        }
        let me = self.me().id;
        let counts = |by: &&NodeId| **by != me && grounds.trust.trusts(by, now);
        let accusers = self.accusations.against(&suspect, incarnation).iter().filter(counts).count();
        let claims = self.accusations.claims(&suspect).iter().filter(counts).count();
        let enough = ENOUGH_ACCUSERS.min(self.patience().witnesses.max(1));
        if accusers < enough && claims == 0 {
            return Vec::new();
        }
        if self.suspicions.iter().filter(|s| s.timer.is_none() && s.unanswered.is_none()).count() >= MAX_CHECKS {
            self.waiting.insert(*id);
            return Vec::new();
        }
        self.waiting.remove(id);
        self.touched.add(*id);
        let mut effects = self.mark_suspect(suspect, incarnation, now);
        let timer = None;
        self.suspicions.push(Suspicion { suspect, incarnation, timer, since: now, asked: now, unanswered: None });
        effects.push(Effect::Check { suspect, incarnation });
        effects
    }

    /// Those for whom there was no room before.
    pub(super) fn look_after_waiting(&mut self, grounds: &mut Grounds<'_>) -> Vec<Effect> {
        let waiting = std::mem::take(&mut self.waiting);
        waiting.into_iter().flat_map(|id| self.look_after(&id, grounds)).collect()
    }

    /// Whether others hold that member for dead, and this node is only about to find out.
    pub(crate) fn doubts(&self, id: &NodeId) -> bool {
        let looked_after =
            self.suspicions.iter().any(|s| s.suspect.id == *id && !self.accusations.claims(&s.suspect).is_empty());
        looked_after || self.waiting.contains(id)
    }

    fn mark_suspect(&mut self, suspect: Ident, incarnation: u16, now: std::time::Instant) -> Vec<Effect> {
        let suspect = foca::Member::new(suspect, incarnation, foca::State::Suspect);
        self.step(now, |foca, rt| foca.apply_many([suspect].into_iter(), false, rt)).unwrap_or_default()
    }
}
