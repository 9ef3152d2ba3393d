//! Whom to call without being asked: seeds, former peers, the dead, and members whose record is missing.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use rand::RngExt;

use super::{EXCHANGE, Gossip, UNSETTLED};
use crate::{Ident, Target, roster::Peer};

/// How long a live member may lack its record before it is asked for one; a push usually is faster.
const RECORD_GRACE: Duration = Duration::from_millis(400);
/// Most members that are asked for their record in one round.
const RECORDS_PER_ROUND: usize = 3;

impl Gossip {
    /// What is looked after a few times a second.
    pub(super) fn housekeep(&mut self, now: Instant) {
        let wanted = self.addresses_to_call();
        for addr in self.contacts.due(&wanted, now) {
            self.push_sync(Target::Addr(addr), now);
        }

        if now < self.unsettled_until {
            self.ask_for_records(now);
        }
        if now >= self.next_exchange {
            self.next_exchange = now + EXCHANGE.mul_f64(self.rounds() * self.rng.random_range(0.8..1.2));
            self.exchange_with_anybody(now);
        }
    }

    /// Asks live members for the record of their present life if it has not come by itself.
    fn ask_for_records(&mut self, now: Instant) {
        self.record_asked.retain(|_, at| now.saturating_duration_since(*at) < Duration::from_secs(2));
        let lacking: Vec<Ident> = self
            .roster
            .live()
            .filter(|p| now.saturating_duration_since(p.met) > RECORD_GRACE)
            .filter(|p| self.records.get(&p.state.id).is_none_or(|r| r.generation < p.state.generation))
            .filter(|p| !self.record_asked.contains_key(&p.state.id))
            .map(Peer::ident)
            .take(RECORDS_PER_ROUND)
            .collect();
        for ident in lacking {
            self.record_asked.insert(ident.id, now);
            self.push_sync(Target::Node(ident), now);
        }
        // As long as any is missing.
        if !self.record_asked.is_empty() {
            self.unsettled_until = now + UNSETTLED;
        }
    }

    /// Seeds, former peers and the dead, as long as nobody alive answers at the address.
    fn addresses_to_call(&mut self) -> BTreeSet<SocketAddr> {
        let me = self.membership.me();
        let dead = self.roster.all().filter(|p| !p.is_live() && !self.has_left(&p.state)).map(|p| p.state.addr);
        let mut wanted: BTreeSet<SocketAddr> = self.seeds.iter().copied().chain(dead).collect();
        // Former peers matter only while nobody is there: seeds and the dead cover a partition.
        let lonely = self.roster.live().next().is_none();
        wanted.extend(self.remembered.iter().filter(|_| lonely));
        let reached = |addr: &SocketAddr| {
            let alias = self.aliases.get(addr);
            alias.is_some_and(|id| *id == me.id || self.roster.get(id).is_some_and(Peer::is_live))
        };
        wanted.retain(|addr| *addr != me.addr && !reached(addr));
        for peer in self.roster.live() {
            wanted.remove(&peer.state.addr);
        }
        self.aliases.retain(|addr, _| self.seeds.contains(addr));
        wanted
    }
}
