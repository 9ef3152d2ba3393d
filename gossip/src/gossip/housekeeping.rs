//! Whom to call without being asked: seeds, former peers, the dead, and peers whose record is missing.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use rand::RngExt;
use starling_protocol::NodeId;

use super::{EXCHANGE, Gossip, Lack};
use crate::Target;

/// How long a peer may talk without a record before it is asked for one; a push usually is faster.
const RECORD_GRACE: Duration = Duration::from_millis(150);
/// Pause before the same peer is asked again.
const RECORD_RETRY: Duration = Duration::from_secs(2);
/// Most peers that are asked for their record in one round.
const RECORDS_PER_ROUND: usize = 3;

impl Gossip {
    /// What is looked after a few times a second.
    pub(super) fn housekeep(&mut self, now: Instant) {
        let wanted = self.addresses_to_call();
        for addr in self.contacts.due(&wanted, now) {
            self.push_sync(Target::Addr(addr), now);
        }
        self.ask_for_records(now);
        self.take_turn(now);
        if now >= self.next_exchange {
            self.next_exchange = now + EXCHANGE.mul_f64(self.rounds() * self.rng.random_range(0.8..1.2));
            self.exchange_with(1, now);
        }
    }

    /// Compares with peers that talk to this node, or of members, without a record here, if it has not come by itself.
    fn ask_for_records(&mut self, now: Instant) {
        let since = |at| now.saturating_duration_since(at);
        self.strangers.retain(|_, lack| lack.asked.is_none_or(|at| since(at) < RECORD_RETRY));
        let may_ask = |lack: &Lack| lack.asked.is_none() && since(lack.since) > RECORD_GRACE;
        let due = self.strangers.iter_mut().filter(|(_, lack)| may_ask(lack)).take(RECORDS_PER_ROUND);
        let ask: Vec<NodeId> = due
            .map(|(id, lack)| {
                lack.asked = Some(now);
                *id
            })
            .collect();
        ask.into_iter().for_each(|id| self.push_sync(Target::Linked(id), now));
    }

    /// Seeds, former peers and the dead, as long as nobody alive answers at the address.
    fn addresses_to_call(&mut self) -> BTreeSet<SocketAddr> {
        let me = self.membership.me();
        let dead = self.roster.dead().filter(|p| !self.has_left(&p.state)).map(|p| p.state.addr);
        let mut wanted: BTreeSet<SocketAddr> = self.seeds.iter().copied().chain(dead).collect();
        // Former peers matter only while nobody is there: seeds and the dead cover a partition.
        let lonely = self.roster.live_count() == 0;
        wanted.extend(self.remembered.iter().filter(|_| lonely));
        let reached = |addr: &SocketAddr| {
            let alias = self.aliases.get(addr);
            alias.is_some_and(|id| *id == me.id || self.roster.get(id).is_some_and(|peer| peer.is_live()))
        };
        wanted.retain(|addr| *addr != me.addr && !reached(addr));
        if !wanted.is_empty() {
            for peer in self.roster.live().filter(|peer| wanted.remove(&peer.state.addr)) {
                self.aliases.insert(peer.state.addr, peer.state.id);
            }
        }
        self.aliases.retain(|addr, _| self.seeds.contains(addr));
        wanted
    }
}
