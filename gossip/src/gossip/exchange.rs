//! Two nodes compare what they have, and each gets what it lacks.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    time::{Duration, Instant},
};

use rand::RngExt;
use starling_protocol::{Delta, Items, Life, MemberHealth, MemberState, NodeId, Summary};

use super::{COMPARE, Gossip};
use crate::{DocumentView, Ident, Outgoing, Sync, Target, Via, membership::Membership};

/// How long root hashes may differ before members compare what they have: a change needs a moment to get round.
const SETTLE: Duration = Duration::from_millis(300);
/// Longest pause between comparisons with one member that bring nothing.
const MAX_FUTILE: Duration = Duration::from_secs(60);
/// Most bytes of records and documents in one answer; the rest comes with the next exchange.
const MAX_DELTA_BYTES: usize = 12 << 20;

impl Gossip {
    /// What this node has, to begin an exchange.
    pub fn summary(&self, now: Instant) -> Summary {
        Summary {
            members: self.membership.states(&self.records, now),
            documents: self.documents.all().map(DocumentView::edition).collect(),
            strikes: self.roster.strikes().map(|(strike, _)| strike.edition()).collect(),
            standing: self.roster.standing(now),
            appeals: false,
        }
    }

    /// Shows a member that this node lives.
    pub(super) fn appeal(&mut self, to: Ident, now: Instant) {
        self.counters.exchanges += 1;
        let summary = Summary { appeals: true, ..self.summary(now) };
        self.outgoing.push(Outgoing::Sync(Sync { with: Target::Node(to), summary }));
    }

    /// Takes a peer's summary; returns what the peer lacks, and which of its items are wanted.
    pub fn answer(&mut self, from: NodeId, summary: Summary, now: Instant) -> Delta {
        if self.left {
            return Delta::default();
        }
        let deaf = self.roster.heard_of(&from).and_then(|heard| heard.dead_since);
        let deaf_ms = deaf.map_or(0, |since| now.saturating_duration_since(since).as_millis() as u64);
        self.roster.heard(&from, None, now);
        // Taken now: what follows must be judged as the other side will judge it.
        let standing = self.roster.standing(now);
        self.learn_from(from, &summary.members, (standing, summary.standing), summary.appeals, now);
        let theirs: HashMap<NodeId, &MemberState> = summary.members.iter().map(|m| (m.id, m)).collect();
        let members = self.membership.states(&self.records, now);
        let mut items = Items::default();
        let mut budget = MAX_DELTA_BYTES;
        for held in self.documents.all() {
            let news = summary.documents.iter().all(|e| e.kind != held.document.kind || self.documents.is_behind(e));
            if news && spend(&mut budget, held.signed.encoded_len()) {
                items.documents.push(held.signed.clone());
            }
        }
        for edition in self.records.editions() {
            let news =
                theirs.get(&edition.id).is_none_or(|m| (edition.generation, edition.seq) > (m.generation, m.seq));
            if let Some(signed) = self.records.signed(&edition.id).filter(|_| news)
                && spend(&mut budget, signed.encoded_len())
            {
                items.records.push(signed.clone());
            }
        }
        let lacked = self.roster.strikes().filter(|(strike, _)| !summary.strikes.contains(&strike.edition()));
        items.strikes = lacked.map(|(_, signed)| signed.clone()).collect();
        let ours: HashMap<NodeId, (u64, u16)> = members.iter().map(|m| (m.id, (m.generation, m.incarnation))).collect();
        items.words = self.membership.lives(|id| {
            let theirs = theirs.get(id).map(|m| (m.generation, m.incarnation));
            ours.get(id).is_some_and(|ours| theirs.is_none_or(|theirs| theirs < *ours))
        });
        let me = self.membership.me().id;
        let wanted_records = summary
            .members
            .iter()
            .filter(|m| m.id != me && m.seq > 0 && !Membership::is_nearly_forgotten(m))
            .filter(|m| self.records.edition(&m.id).is_none_or(|e| (m.generation, m.seq) > (e.generation, e.seq)))
            .map(|m| m.id)
            .collect();
        let wanted_documents =
            summary.documents.iter().filter(|e| self.documents.is_news(e)).map(|e| e.kind.clone()).collect();
        let wanted_strikes = summary.strikes.iter().filter(|e| self.roster.wants(e)).map(|e| e.id).collect();
        let lacks =
            |m: &&MemberState| self.membership.lacks_word(Life { id: m.id, generation: m.generation }, m.incarnation);
        let wanted_words = summary.members.iter().filter(lacks).map(|m| m.id).collect();
        self.refresh(now);
        Delta { members, items, wanted_records, wanted_documents, wanted_strikes, wanted_words, deaf_ms, standing }
    }

    /// Takes the answer to our summary; returns what the peer wants from us.
    pub fn absorb(&mut self, from: NodeId, with: Target, delta: Delta, now: Instant) -> Items {
        if self.left {
            return Items::default();
        }
        self.roster.heard(&from, None, now);
        if let Target::Addr(addr) = with {
            self.aliases.insert(addr, from);
        }
        let standing = self.roster.standing(now);
        // Records first: what is said of members without one is not heard.
        self.told(&delta.members);
        let mut items = delta.items;
        let forgotten: HashSet<NodeId> =
            delta.members.iter().filter(|m| Membership::is_nearly_forgotten(m)).map(|m| m.id).collect();
        items.records.retain(|signed| signed.peek_edition().is_ok_and(|e| !forgotten.contains(&e.id)));
        self.receive(from, items, Via::Exchange, now);
        self.learn_from(from, &delta.members, (standing, delta.standing), false, now);
        // After this node may have learned that it was given up.
        self.membership.was_deaf(from, Duration::from_millis(delta.deaf_ms));
        let mut budget = MAX_DELTA_BYTES;
        let documents = delta.wanted_documents.iter().filter_map(|kind| self.documents.get(kind));
        let documents = documents.map(|held| held.signed.clone());
        let documents = documents.filter(|signed| spend(&mut budget, signed.encoded_len())).collect();
        let wanted_records: BTreeSet<NodeId> = delta.wanted_records.into_iter().collect();
        let records = wanted_records.iter().filter_map(|id| self.records.signed(id));
        let records = records.filter(|signed| spend(&mut budget, signed.encoded_len())).cloned().collect();
        let wanted_strikes: HashSet<NodeId> = delta.wanted_strikes.into_iter().collect();
        let strikes = self.roster.strikes().filter(|(strike, _)| wanted_strikes.contains(&strike.id));
        let strikes = strikes.map(|(_, signed)| signed.clone()).collect();
        let wanted_words: HashSet<NodeId> = delta.wanted_words.into_iter().collect();
        let words = self.membership.lives(|id| wanted_words.contains(id));
        Items { records, documents, strikes, words }
    }

    /// Remembers for the moment whom a peer holds for dead, and since when: their records may be about to come.
    fn told(&mut self, members: &[MemberState]) {
        let dead = members.iter().filter(|m| m.health == MemberHealth::Down);
        self.ages = dead.map(|m| (m.id, m.down_s)).collect();
    }

    /// Takes a peer's view, unless this node holds the peer for dead: such a view is that of a node that was cut off. If it
    /// holds this node for dead as well, either may be the one; whoever has the lower standing concedes.
    fn learn_from(
        &mut self,
        from: NodeId,
        members: &[MemberState],
        (ours, theirs): (u32, u32),
        appeals: bool,
        now: Instant,
    ) {
        let Some(&MemberState { generation, incarnation, .. }) = members.iter().find(|m| m.id == from) else { return };
        let known = self.records.life(&from).filter(|known| known.generation == generation);
        let Some(sender) = known.filter(|known| self.membership.holds_dead(known)) else {
            let effects = self.judge(now, |membership, grounds| membership.learn(from, members, grounds));
            return self.apply(effects, now);
        };
        let me = self.membership.me();
        let dispute =
            members.iter().any(|m| m.id == me.id && m.generation == me.generation && m.health == MemberHealth::Down);
        let left = self.roster.get(&from).is_some_and(|peer| self.has_left(&peer.state));
        let effects = if left {
            // It has gone by its own word, and has no part in it any more.
            return;
        } else if self.membership.proves_deaf(&sender) {
            self.membership.concede(now)
        } else if dispute && (ours, me.id) < (theirs, from) {
            let could = self.roster.dead().filter(|peer| !self.has_left(&peer.state)).count();
            self.membership.concede_to_claim(from, could, now)
        } else if !appeals {
            return;
        } else {
            self.judge(now, |membership, grounds| membership.hear_appeal(sender, incarnation, grounds))
        };
        self.apply(effects, now);
    }

    /// A live peer's set of records and documents is `root`; if that is not ours, and it lasts, compares the two.
    pub(super) fn compare(&mut self, from: NodeId, root: u64, now: Instant) {
        let settled = now.saturating_duration_since(self.settled_at) > SETTLE;
        let futile = self.futile.get(&from).is_some_and(|(until, _)| now < *until);
        if root == self.root() || !settled || futile || now < self.next_compare || !self.trust.listens(&from, now) {
            return;
        }
        let Some(peer) = self.roster.get(&from).filter(|peer| peer.is_live()) else { return };
        let with = Target::Node(peer.ident());
        // One whose root never fits must not take the place of others: it counts as in vain until it brings something.
        let (_, pause) = self.futile.get(&from).copied().unwrap_or((now, COMPARE));
        let pause = pause.min(MAX_FUTILE);
        self.futile.insert(from, (now + pause, pause * 2));
        self.next_compare = now + COMPARE.mul_f64(self.rounds() * self.rng.random_range(0.8..1.2));
        self.push_sync(with, now);
    }

    /// With so many live members; if there is none, with dead ones: it may be this node that was cut off. With whom.
    pub(super) fn exchange_with(&mut self, count: usize, now: Instant) -> Vec<NodeId> {
        let live: Vec<Ident> = self.roster.live().map(|peer| peer.ident()).collect();
        let dead = || self.roster.dead().filter(|peer| !self.has_left(&peer.state)).map(|peer| peer.ident()).collect();
        let mut candidates: Vec<Ident> = if live.is_empty() { dead() } else { live };
        let mut chosen = Vec::new();
        for _ in 0..count.min(candidates.len()) {
            let with = candidates.swap_remove(self.rng.random_range(0..candidates.len()));
            self.push_sync(Target::Node(with), now);
            chosen.push(with.id);
        }
        chosen
    }

    pub(super) fn push_sync(&mut self, with: Target, now: Instant) {
        self.counters.exchanges += 1;
        let summary = self.summary(now);
        self.outgoing.push(Outgoing::Sync(Sync { with, summary }));
    }

    /// log2 of the mesh's size: how many rounds news takes, and by how much slower background work may be.
    pub(super) fn rounds(&self) -> f64 {
        (self.roster.live_count() as f64 + 2.0).log2()
    }
}

fn spend(budget: &mut usize, bytes: usize) -> bool {
    let fits = *budget >= bytes;
    *budget -= if fits { bytes } else { 0 };
    fits
}
