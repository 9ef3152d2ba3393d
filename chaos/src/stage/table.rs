//! The one table of what is wrong with the network: rules over directed links, which overlap, count what they do, and end by
//! themselves.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use super::Slot;

/// Which rule.
pub(crate) type RuleId = u64;

/// Which directed links a rule is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Links {
    /// From and to these.
    Of(Vec<bool>),
    /// Between these and all others.
    Across(Vec<bool>),
    /// Among these.
    Among(Vec<bool>),
    /// From these to anybody.
    From(Vec<bool>),
    /// From anybody to these.
    To(Vec<bool>),
}

impl Links {
    pub(crate) fn contains(&self, from: Slot, to: Slot) -> bool {
        let is = |set: &[bool], slot: Slot| set.get(slot).copied().unwrap_or(false);
        match self {
            Self::Of(set) => is(set, from) || is(set, to),
            Self::Across(set) => is(set, from) != is(set, to),
            Self::Among(set) => is(set, from) && is(set, to),
            Self::From(set) => is(set, from),
            Self::To(set) => is(set, to),
        }
    }
}

/// What happens to a packet.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Effect {
    /// It is lost.
    Cut,
    /// It is lost if it is UDP.
    UdpBlocked,
    /// It is lost with that chance, in bursts of that mean length (Gilbert 1960, Elliott 1963: a link is good and loses
    /// nothing, or bad and loses all).
    Loss { share: f64, burst: f64 },
    /// It takes longer.
    Delay { by: Duration, jitter: Duration },
    /// It arrives twice with that chance.
    Duplicate { share: f64 },
    /// It is held back for so long with that chance.
    Reorder { share: f64, by: Duration },
    /// A bit of it is flipped with that chance.
    Corrupt { share: f64 },
    /// It waits for its turn on a link of so many bytes a second, or is lost if that takes too long.
    Rate { bytes_per_second: f64 },
    /// It is lost if its UDP payload is longer.
    Mtu { bytes: usize },
    /// It waits until the rule ends.
    HoldBack,
    /// What the victims have dialled comes from another port each time.
    Rebind { every: Duration },
    /// It is lost unless the victim, to which it goes, has sent there within that time.
    NatForgets { idle: Duration },
}

/// How long a packet waits for its turn before it is dropped.
const RATE_QUEUE: Duration = Duration::from_millis(100);

/// What a rule has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// Packets on its links while it was in force.
    pub seen: u64,
    /// Packets that it changed: lost, later, twice, flipped.
    pub touched: u64,
}

/// Counts by directed link: from, to.
type ByLink = BTreeMap<(Slot, Slot), Count>;

/// A thing that is wrong, for a time.
#[derive(Debug)]
pub(crate) struct Rule {
    pub(crate) links: Links,
    pub(crate) effect: Effect,
    /// In force and not, in turn, each for so long.
    pub(crate) flip: Option<Duration>,
    /// When it ends whatever happens to whoever made it.
    pub(crate) until: Instant,
}

struct InForce {
    rule: Rule,
    since: Instant,
    count: Count,
    by_link: ByLink,
    /// Links that are in a burst of losses.
    bad: HashMap<(Slot, Slot), bool>,
    /// When the last packet of a link will have gone.
    busy_until: HashMap<(Slot, Slot), Instant>,
    /// When a link was last used.
    used: HashMap<(Slot, Slot), Instant>,
}

impl InForce {
    fn applies(&self, from: Slot, to: Slot, now: Instant) -> bool {
        let on = match self.rule.flip {
            Some(flip) => ((now - self.since).as_millis() / flip.as_millis().max(1)).is_multiple_of(2),
            None => true,
        };
        on && now < self.rule.until && self.rule.links.contains(from, to)
    }
}

/// A packet, as far as it matters here.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packet {
    pub(crate) from: Slot,
    pub(crate) to: Slot,
    /// Bytes on the wire.
    pub(crate) bytes: usize,
    /// Bytes of the UDP payload; `None` if it is none.
    pub(crate) udp: Option<usize>,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Passage {
    pub(crate) after: Duration,
    pub(crate) corrupt: bool,
    /// Until that rule ends.
    pub(crate) held: bool,
}

/// Rules in force, and their counts after their end.
pub(crate) struct Table {
    rules: BTreeMap<RuleId, InForce>,
    ended: BTreeMap<RuleId, (Count, ByLink)>,
    next: RuleId,
    rng: StdRng,
    slots: usize,
    /// Does nothing to packets, and says nothing of it: sabotage that must be noticed.
    pub(crate) disarmed: bool,
}

impl Table {
    pub(crate) fn new(slots: usize, seed: u64) -> Self {
        let (rules, ended) = Default::default();
        Self { rules, ended, next: 0, rng: StdRng::seed_from_u64(seed), slots, disarmed: false }
    }

    /// A set of slots, for [`Links`].
    pub(crate) fn set(&self, members: &[Slot]) -> Vec<bool> {
        (0..self.slots).map(|slot| members.contains(&slot)).collect()
    }

    pub(crate) fn add(&mut self, rule: Rule, now: Instant) -> RuleId {
        self.next += 1;
        let (bad, busy_until, used) = Default::default();
        let count = Count::default();
        let by_link = BTreeMap::new();
        self.rules.insert(self.next, InForce { rule, since: now, count, by_link, bad, busy_until, used });
        self.next
    }

    pub(crate) fn remove(&mut self, id: RuleId) {
        if let Some(ended) = self.rules.remove(&id) {
            self.ended.insert(id, (ended.count, ended.by_link));
        }
    }

    /// What a rule has done, in all.
    pub(crate) fn count(&self, id: RuleId) -> Count {
        let live = self.rules.get(&id).map(|rule| rule.count);
        live.or_else(|| self.ended.get(&id).map(|(count, _)| *count)).unwrap_or_default()
    }

    /// What a rule has done, by directed link.
    pub(crate) fn count_by_link(&self, id: RuleId) -> ByLink {
        let live = self.rules.get(&id).map(|rule| &rule.by_link);
        live.or_else(|| self.ended.get(&id).map(|(_, links)| links)).cloned().unwrap_or_default()
    }

    /// How often the source ports of what a slot has dialled have changed by now; 0 if nobody changes them.
    pub(crate) fn binding(&self, slot: Slot, now: Instant) -> u64 {
        let rebinds = self.rules.values().filter_map(|force| match force.rule.effect {
            Effect::Rebind { every } if now < force.rule.until && force.rule.links.contains(slot, slot) => {
                Some(1 + ((now - force.since).as_millis() / every.as_millis().max(1)) as u64)
            }
            _ => None,
        });
        if self.disarmed { 0 } else { rebinds.sum() }
    }

    /// What becomes of a packet: copies of it, none if it is lost.
    pub(crate) fn pass(&mut self, packet: Packet, now: Instant) -> Vec<Passage> {
        let mut copies = vec![Passage::default()];
        if self.disarmed {
            return copies;
        }
        let Self { rules, rng, .. } = self;
        let link = (packet.from, packet.to);
        for force in rules.values_mut() {
            if !force.applies(packet.from, packet.to, now) {
                continue;
            }
            let touched = force.touch(packet, now, rng, &mut copies);
            let by_link = force.by_link.entry(link).or_default();
            for count in [&mut force.count, by_link] {
                count.seen += 1;
                count.touched += u64::from(touched);
            }
            if copies.is_empty() {
                break;
            }
        }
        copies
    }
}

impl InForce {
    /// Does it to the copies; whether anything was changed.
    fn touch(&mut self, packet: Packet, now: Instant, rng: &mut StdRng, copies: &mut Vec<Passage>) -> bool {
        let link = (packet.from, packet.to);
        let mut chance = |share: f64| rng.random_bool(share.clamp(0.0, 1.0));
        let lost = match self.rule.effect {
            Effect::Cut => true,
            Effect::UdpBlocked => packet.udp.is_some(),
            Effect::Mtu { bytes } => packet.udp.is_some_and(|udp| udp > bytes),
            Effect::Loss { share, burst } if burst <= 1.0 => chance(share),
            Effect::Loss { share, burst } => {
                let bad = self.bad.entry(link).or_insert(false);
                // Mean stay in the bad state: `burst` packets; in the good one: so many that `share` of all are lost.
                let leave = 1.0 / burst;
                let turn = if *bad { leave } else { leave * share / (1.0 - share) };
                *bad ^= chance(turn);
                *bad
            }
            // Whoever passes packets on gives them other ports.
            Effect::Rebind { .. } => return self.rule.links.contains(packet.from, packet.from) && packet.udp.is_some(),
            Effect::NatForgets { idle } => {
                let remembered = self.used.get(&(packet.to, packet.from)).is_some_and(|at| now - *at < idle);
                let is_victim = matches!(&self.rule.links, Links::Of(set) if set.get(packet.to) == Some(&true));
                if is_victim && !remembered {
                    true
                } else {
                    self.used.insert(link, now);
                    false
                }
            }
            Effect::Rate { bytes_per_second } => {
                let free = self.busy_until.get(&link).copied().unwrap_or(now).max(now);
                let takes = Duration::from_secs_f64(packet.bytes as f64 / bytes_per_second);
                let waits = free - now;
                if waits > RATE_QUEUE {
                    true
                } else {
                    self.busy_until.insert(link, free + takes);
                    copies.iter_mut().for_each(|copy| copy.after += waits + takes);
                    return !waits.is_zero();
                }
            }
            Effect::Delay { by, jitter } => {
                for copy in copies.iter_mut() {
                    copy.after += by + jitter.mul_f64(rng.random_range(0.0..1.0));
                }
                return true;
            }
            Effect::Duplicate { share } => {
                let twice = chance(share);
                if twice {
                    copies.extend_from_within(..1);
                }
                return twice;
            }
            Effect::Reorder { share, by } => {
                let back = chance(share);
                if back {
                    copies.iter_mut().for_each(|copy| copy.after += by);
                }
                return back;
            }
            Effect::Corrupt { share } => {
                let flipped = chance(share);
                copies.iter_mut().for_each(|copy| copy.corrupt |= flipped);
                return flipped;
            }
            Effect::HoldBack => {
                copies.iter_mut().for_each(|copy| copy.held = true);
                return true;
            }
        };
        if lost {
            copies.clear();
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    fn table(effect: Effect, now: Instant) -> (Table, RuleId) {
        let mut table = Table::new(4, 7);
        let links = Links::Of(table.set(&[1]));
        let id = table.add(Rule { links, effect, flip: None, until: now + LONG }, now);
        (table, id)
    }

    fn packet(from: Slot, to: Slot) -> Packet {
        Packet { from, to, bytes: 1228, udp: Some(1200) }
    }

    #[test]
    fn only_the_links_of_a_rule_are_touched() {
        let now = Instant::now();
        let sets = [
            (Links::Of(vec![false, true, true]), [(0, 1), (1, 2), (2, 0)], [(0, 3), (3, 0), (0, 0)]),
            (Links::Across(vec![false, true, true]), [(0, 1), (2, 0), (3, 2)], [(1, 2), (2, 1), (0, 3)]),
            (Links::Among(vec![false, true, true]), [(1, 2), (2, 1), (1, 1)], [(0, 1), (1, 0), (2, 3)]),
            (Links::From(vec![false, true]), [(1, 0), (1, 2), (1, 3)], [(0, 1), (2, 1), (2, 0)]),
            (Links::To(vec![false, true]), [(0, 1), (2, 1), (3, 1)], [(1, 0), (1, 2), (2, 0)]),
        ];
        for (links, hit, missed) in sets {
            let mut table = Table::new(4, 1);
            table.add(Rule { links: links.clone(), effect: Effect::Cut, flip: None, until: now + LONG }, now);
            for (from, to) in hit {
                assert!(table.pass(packet(from, to), now).is_empty(), "{links:?} {from}->{to}");
            }
            for (from, to) in missed {
                assert_eq!(table.pass(packet(from, to), now).len(), 1, "{links:?} {from}->{to}");
            }
        }
    }

    #[test]
    fn losses_have_their_share_and_come_in_bursts() {
        let now = Instant::now();
        for (share, burst) in [(0.01, 1.0), (0.1, 1.0), (0.1, 8.0), (0.3, 4.0)] {
            let (mut table, id) = table(Effect::Loss { share, burst }, now);
            let lost: Vec<bool> = (0..200_000).map(|_| table.pass(packet(0, 1), now).is_empty()).collect();
            let count = table.count(id);
            assert_eq!(count.seen, 200_000);
            let seen = count.touched as f64 / count.seen as f64;
            assert!((seen / share - 1.0).abs() < 0.1, "{share} {burst}: {seen}");
            let bursts = lost.windows(2).filter(|w| !w[0] && w[1]).count();
            let mean = count.touched as f64 / bursts as f64;
            let expected = if burst > 1.0 { burst } else { 1.0 / (1.0 - share) };
            assert!((mean / expected - 1.0).abs() < 0.15, "{share} {burst}: bursts of {mean}");
        }
    }

    #[test]
    fn rules_add_up_end_rightly_and_end_by_themselves() {
        let now = Instant::now();
        let by = |ms| Effect::Delay { by: Duration::from_millis(ms), jitter: Duration::ZERO };
        let (mut table, first) = table(by(20), now);
        let links = Links::Of(table.set(&[1]));
        let until = now + Duration::from_secs(1);
        let second = table.add(Rule { links, effect: by(30), flip: None, until }, now);
        let after = |table: &mut Table, now| table.pass(packet(0, 1), now)[0].after.as_millis();
        assert_eq!(after(&mut table, now), 50);
        table.remove(first);
        assert_eq!(after(&mut table, now), 30);
        assert_eq!(after(&mut table, until), 0);
        assert_eq!((table.count(first).touched, table.count(second).touched), (1, 2));
    }

    #[test]
    fn a_slow_link_delays_and_then_drops() {
        let now = Instant::now();
        let (mut table, _) = table(Effect::Rate { bytes_per_second: 122_800.0 }, now);
        let waits: Vec<_> = (0..20).map(|_| table.pass(packet(0, 1), now)).collect();
        assert_eq!(waits[0][0].after.as_millis(), 10);
        assert_eq!(waits[5][0].after.as_millis(), 60);
        assert!(waits[15].is_empty());
        assert!(!table.pass(packet(0, 1), now + Duration::from_secs(1)).is_empty());
    }

    #[test]
    fn a_nat_forgets_who_was_not_called() {
        let now = Instant::now();
        let idle = Duration::from_secs(5);
        let (mut table, _) = table(Effect::NatForgets { idle }, now);
        assert!(table.pass(packet(0, 1), now).is_empty());
        assert_eq!(table.pass(packet(1, 0), now).len(), 1);
        assert_eq!(table.pass(packet(0, 1), now).len(), 1);
        assert!(table.pass(packet(2, 1), now).is_empty());
        assert!(table.pass(packet(0, 1), now + idle).is_empty());
    }

    #[test]
    fn a_flipping_rule_is_on_and_off_in_turn() {
        let now = Instant::now();
        let flip = Duration::from_secs(2);
        let mut table = Table::new(4, 1);
        let links = Links::Across(table.set(&[1]));
        table.add(Rule { links, effect: Effect::Cut, flip: Some(flip), until: now + LONG }, now);
        for (second, cut) in [(0, true), (1, true), (2, false), (3, false), (4, true)] {
            assert_eq!(table.pass(packet(0, 1), now + Duration::from_secs(second)).is_empty(), cut, "{second}");
        }
    }
}
