//! Two nodes compare what they have, and each gets what it lacks.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use rand::RngExt;
use starling_protocol::{Delta, Items, MemberHealth, MemberState, NodeId, Summary};

use super::Gossip;
use crate::{DocumentView, Ident, Outgoing, Sync, Target, Via};

/// How long root hashes may differ before members compare what they have: a change needs a moment to get round.
const SETTLE: Duration = Duration::from_millis(300);
/// Pause between two comparisons because of differing root hashes, at N = 2; grows with log2 N.
const COMPARE: Duration = Duration::from_millis(250);
/// Most bytes of records and documents in one answer; the rest comes with the next exchange.
const MAX_DELTA_BYTES: usize = 12 << 20;

impl Gossip {
    /// What this node has, to begin an exchange.
    pub fn summary(&self, now: Instant) -> Summary {
        Summary {
            members: self.membership.states(now),
            records: self.records.editions().collect(),
            documents: self.documents.all().map(DocumentView::edition).collect(),
            forgotten: self.roster.all_forgotten(),
            standing: self.roster.standing(now),
        }
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
        // Members first: records of nodes that membership has forgotten are not kept.
        self.learn_from(from, &summary.members, (standing, summary.standing), now);
        let theirs: HashMap<NodeId, (u64, u64)> =
            summary.records.iter().map(|e| (e.id, (e.generation, e.seq))).collect();
        let members = self.membership.states(now);
        let mut items = Items { forgotten: self.roster.all_forgotten(), ..Items::default() };
        let mut budget = MAX_DELTA_BYTES;
        for held in self.documents.all() {
            let news = summary.documents.iter().all(|e| e.kind != held.document.kind || self.documents.is_behind(e));
            if news && spend(&mut budget, held.signed.encoded_len()) {
                items.documents.push(held.signed.clone());
            }
        }
        for edition in self.records.editions() {
            let news = theirs.get(&edition.id).is_none_or(|theirs| (edition.generation, edition.seq) > *theirs);
            if let Some(signed) = self.records.signed(&edition.id).filter(|_| news)
                && spend(&mut budget, signed.encoded_len())
            {
                items.records.push(signed.clone());
            }
        }
        let me = self.membership.me().id;
        let wanted_records = summary
            .records
            .iter()
            .filter(|e| e.id != me)
            .filter(|e| self.records.get(&e.id).is_none_or(|r| (e.generation, e.seq) > r.edition()))
            .map(|e| e.id)
            .collect();
        let wanted_documents =
            summary.documents.iter().filter(|e| self.documents.is_news(e)).map(|e| e.kind.clone()).collect();
        let forgotten = Items { forgotten: summary.forgotten, ..Items::default() };
        let news = self.store(forgotten, now);
        self.to_pass_on.append(news);
        self.refresh(now);
        Delta { members, items, wanted_records, wanted_documents, deaf_ms, standing }
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
        self.learn_from(from, &delta.members, (standing, delta.standing), now);
        // After this node may have learned that it was given up.
        self.membership.was_deaf(Duration::from_millis(delta.deaf_ms));
        self.receive(from, delta.items, Via::Exchange, now);
        let mut budget = MAX_DELTA_BYTES;
        let documents = delta.wanted_documents.iter().filter_map(|kind| self.documents.get(kind));
        let documents = documents.map(|held| held.signed.clone());
        let documents = documents.filter(|signed| spend(&mut budget, signed.encoded_len())).collect();
        let records = delta.wanted_records.iter().filter_map(|id| self.records.signed(id));
        let records = records.filter(|signed| spend(&mut budget, signed.encoded_len())).cloned().collect();
        Items { records, documents, forgotten: Vec::new() }
    }

    /// Takes a peer's view, unless this node holds the peer for dead: such a view is that of a node that was cut off. If it
    /// holds this node for dead as well, either may be the one; whoever has the lower standing concedes.
    fn learn_from(&mut self, from: NodeId, members: &[MemberState], (ours, theirs): (u32, u32), now: Instant) {
        let Some(sender) = members.iter().find(|m| m.id == from) else { return };
        if !self.membership.holds_dead(&sender.into()) {
            return self.learn(from, members, now);
        }
        let me = self.membership.me();
        let deaf = self.membership.proves_deaf(&sender.into());
        let dispute =
            members.iter().any(|m| m.id == me.id && m.generation >= me.generation && m.health == MemberHealth::Down);
        if deaf || (dispute && (ours, me.id) < (theirs, from)) {
            let effects = self.membership.concede(now);
            self.apply(effects, now);
        }
    }

    /// A live peer's set of records and documents is `root`; if that is not ours, and it lasts, compares the two.
    pub(super) fn compare(&mut self, from: NodeId, root: u64, now: Instant) {
        let settled = now.saturating_duration_since(self.settled_at) > SETTLE;
        if root == self.root() || !settled || now < self.next_compare {
            return;
        }
        let Some(peer) = self.roster.get(&from).filter(|peer| peer.is_live()) else { return };
        let with = Target::Node(peer.ident());
        self.next_compare = now + COMPARE.mul_f64(self.rounds() * self.rng.random_range(0.8..1.2));
        self.push_sync(with, now);
    }

    /// With a live member; if there is none, with a dead one: it may be this node that was cut off.
    pub(super) fn exchange_with_anybody(&mut self, now: Instant) {
        let live: Vec<Ident> = self.roster.live().map(|peer| peer.ident()).collect();
        let dead = || self.roster.dead().filter(|peer| !self.has_left(&peer.state)).map(|peer| peer.ident()).collect();
        let candidates: Vec<Ident> = if live.is_empty() { dead() } else { live };
        if !candidates.is_empty() {
            let with = candidates[self.rng.random_range(0..candidates.len())];
            self.push_sync(Target::Node(with), now);
        }
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
