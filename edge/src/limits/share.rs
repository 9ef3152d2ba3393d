//! How edges share one counter: one of them owns it, and counts; the others have leases of it, so many calls that they let through by
//! themselves, because the owner has counted them already.

use std::time::Duration;

use starling_protocol::{NodeId, TakeCount};
use tokio::time::Instant;

use super::quota::Span;
use crate::rendezvous::score;

/// Of a limit, what all edges together hold in leases at most, as a fraction of it: unless it is so small that an edge holds one call.
const LEASED: u64 = 100;
/// A lease that is asked for sooner than that after the one before is twice as large; one that lies so long is given back.
const IDLE: Duration = Duration::from_secs(2);
/// How long nobody asks again who was told that there is nothing left.
const DENIED: Duration = Duration::from_secs(1);
/// From which size on a lease is renewed before it is used up.
const RENEWED_EARLY: u64 = 4;

/// A store, where one is named: it owns every counter, as long as it answers.
pub(super) const STORE: NodeId = NodeId([0xff; 16]);

/// The edges that count together, as one of them sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Edges {
    own: NodeId,
    /// With when each came, as a version: what it has counted, nobody may know yet.
    others: Vec<(NodeId, u64)>,
    /// Goes up with every change.
    version: u64,
}

impl Edges {
    pub(super) fn only(own: NodeId) -> Self {
        Self { own, others: Vec::new(), version: 1 }
    }

    /// The same, if these are the others now.
    pub(super) fn with(&self, mut others: Vec<NodeId>) -> Self {
        others.sort();
        if self.others().eq(others.iter().copied()) {
            return self.clone();
        }
        let version = self.version + 1;
        // Without the store they count what was counted there so far, each of which knows another part of that.
        let loses_the_store = self.has_store() && !others.contains(&STORE);
        let known = |edge: &NodeId| self.others.iter().find(|(known, _)| known == edge && !loses_the_store);
        let known = |edge: &NodeId| known(edge).map(|(_, since)| *since);
        let since = |edge: NodeId| (edge, known(&edge).unwrap_or(version));
        Self { own: self.own, others: others.into_iter().map(since).collect(), version }
    }

    pub(super) fn others(&self) -> impl Iterator<Item = NodeId> {
        self.others.iter().map(|(edge, _)| *edge)
    }

    /// Whether a store is among them.
    pub(super) fn has_store(&self) -> bool {
        self.others().any(|edge| edge == STORE)
    }

    /// Another number for every change.
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    pub(super) fn is_alone(&self) -> bool {
        self.others.is_empty()
    }

    /// Who owns a counter; or would, if this edge did not.
    pub(super) fn owner_beside_own(&self, key: &str) -> Option<NodeId> {
        self.others().max_by_key(|edge| (*edge == STORE, score(key, edge)))
    }

    fn owner(&self, key: &str) -> NodeId {
        let other = self.owner_beside_own(key);
        other.filter(|other| *other == STORE || score(key, other) > score(key, &self.own)).unwrap_or(self.own)
    }

    fn count(&self) -> u64 {
        self.others.len() as u64 + 1
    }
}

/// Whose a counter is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// This edge's.
    Own,
    /// This edge's, but others may know more of it.
    Unsettled,
    /// Another one's.
    Of(NodeId),
}

/// This edge's part in a counter.
#[derive(Debug, Default)]
pub(super) struct Share {
    /// The edges by which the owner was found, as a version; 0 before.
    found: u64,
    /// `None` is this edge.
    owner: Option<NodeId>,
    /// Up to whose coming it is known what others have counted.
    settled: u64,
    /// The edges at which the owner was told what is known here.
    told: u64,
    lease: Option<Box<Lease>>,
}

impl Share {
    pub(super) fn role(&mut self, key: &str, edges: &Edges) -> Role {
        if edges.others.is_empty() {
            return Role::Own;
        }
        if self.found != edges.version {
            self.owner = Some(edges.owner(key)).filter(|owner| *owner != edges.own);
            self.found = edges.version;
        }
        match self.owner {
            Some(owner) => Role::Of(owner),
            None if self.is_settled(edges) => Role::Own,
            None => Role::Unsettled,
        }
    }

    /// Whether what others have counted is known, whoever owns it.
    pub(super) fn is_settled(&self, edges: &Edges) -> bool {
        edges.others.iter().all(|(_, since)| *since <= self.settled)
    }

    /// Whether the owner was found among these edges.
    pub(super) fn is_found(&self, edges: &Edges) -> bool {
        self.found == edges.version
    }

    /// Who has to be asked first.
    pub(super) fn unsettled(&self, edges: &Edges) -> Vec<NodeId> {
        edges.others.iter().filter(|(_, since)| *since > self.settled).map(|(edge, _)| *edge).collect()
    }

    /// All that these edges knew is known.
    pub(super) fn settle(&mut self, edges: &Edges) {
        self.settled = self.settled.max(edges.version);
    }

    /// Whether the owner has to be told first what is known here: it may have come to it since.
    pub(super) fn tells(&mut self, edges: &Edges) -> bool {
        std::mem::replace(&mut self.told, edges.version) != edges.version
    }

    /// The owner has forgotten something, and is told again.
    pub(super) fn tell_again(&mut self) {
        self.told = 0;
    }

    /// Whether a call that is counted here is another edge's affair.
    pub(super) fn is_of_another(&mut self, key: &str, edges: &Edges) -> Option<NodeId> {
        match self.role(key, edges) {
            Role::Of(owner) => Some(owner),
            Role::Own | Role::Unsettled => None,
        }
    }

    pub(super) fn lease(&mut self) -> &mut Lease {
        self.lease.get_or_insert_default()
    }

    /// Whether calls are left in a lease, of now or of the time before.
    pub(super) fn has_lease(&self) -> bool {
        self.lease.as_ref().is_some_and(|lease| lease.left > 0 || !lease.former.is_empty())
    }

    /// Calls in the lease for a part of time that are not used.
    pub(super) fn left(&self, part: u64) -> u64 {
        self.lease.as_ref().filter(|lease| lease.part == part).map_or(0, |lease| lease.left)
    }

    /// What has lain for too long, to be given back: for which part of time, and how much.
    pub(super) fn take_idle(&mut self, now: Instant) -> Vec<(u64, u64)> {
        let Some(lease) = &mut self.lease else { return Vec::new() };
        let mut idle = std::mem::take(&mut lease.former);
        if lease.used.is_none_or(|used| now - used >= IDLE) {
            lease.chunk = 0;
            idle.push((lease.part, std::mem::take(&mut lease.left)));
        }
        idle.retain(|(_, left)| *left > 0);
        idle
    }

    /// All that is not used, to be given back.
    pub(super) fn take_all(&mut self) -> Vec<(u64, u64)> {
        let Some(lease) = self.lease.take() else { return Vec::new() };
        let unused = lease.former.iter().copied().chain([(lease.part, lease.left)]);
        unused.filter(|(_, left)| *left > 0).collect()
    }

    /// Somebody has given something back: what was denied may be had.
    pub(super) fn hope(&mut self) {
        if let Some(lease) = &mut self.lease {
            lease.denied = None;
        }
    }

    /// Everything begins anew.
    pub(super) fn forget_lease(&mut self) {
        self.lease = None;
    }
}

/// Calls that another edge has counted already.
#[derive(Debug, Default)]
pub(super) struct Lease {
    /// For which part of time.
    part: u64,
    left: u64,
    /// What is left of other parts: to be given back, since it may still count.
    former: Vec<(u64, u64)>,
    /// How much was asked for last.
    chunk: u64,
    /// When it was asked for last, and whether there is no answer yet.
    asked: Option<Instant>,
    asking: bool,
    used: Option<Instant>,
    /// Until when, and for how dear a call, there is nothing left.
    denied: Option<(Instant, u64)>,
}

/// What a lease says to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    /// It is taken.
    Enough,
    /// There is none, by the owner's word.
    Denied,
    /// The owner is to be asked.
    Short,
}

impl Lease {
    /// Takes a call.
    pub(super) fn take(&mut self, part: u64, cost: u64, now: Instant) -> Held {
        // A call that has waited beyond the end of its part takes of the new one, as long as there is something.
        if part > self.part || part < self.part && self.left < cost {
            let (former, left) = ((self.part, self.left), self.left);
            *self = Self {
                part,
                chunk: self.chunk,
                asked: self.asked,
                former: std::mem::take(&mut self.former),
                ..Self::default()
            };
            self.former.extend((left > 0).then_some(former));
        }
        if let Some(left) = self.left.checked_sub(cost) {
            (self.left, self.used) = (left, Some(now));
            return Held::Enough;
        }
        match self.denied {
            Some((until, denied)) if now < until && cost >= denied => Held::Denied,
            _ => Held::Short,
        }
    }

    pub(super) fn give_back(&mut self, part: u64, cost: u64) -> bool {
        let is_of = self.part == part;
        self.left = self.left.saturating_add(if is_of { cost } else { 0 });
        is_of
    }

    /// What to ask the owner for, so that a call of that cost can pass; `None` for `cost` asks early.
    pub(super) fn ask(
        &mut self,
        key: &str,
        (span, limit): (Span, u64),
        cost: Option<u64>,
        edges: &Edges,
        now: Instant,
    ) -> Option<TakeCount> {
        let cap = (limit / LEASED / edges.count()).max(1);
        let recent = self.asked.is_some_and(|asked| now - asked < IDLE);
        let chunk = if recent { self.chunk.saturating_mul(2).clamp(1, cap) } else { 1 };
        let is_low =
            self.left <= self.chunk / 2 && self.chunk >= RENEWED_EARLY && self.denied.is_none_or(|d| d.0 <= now);
        let least = match cost {
            Some(cost) => cost.saturating_sub(self.left).max(1),
            None if is_low && !self.asking => 1,
            None => return None,
        };
        // What others wait for meanwhile comes on top, where they are put together.
        if !self.asking {
            (self.chunk, self.asked, self.asking) = (chunk, Some(now), true);
        }
        let most = chunk.max(least);
        Some(TakeCount { key: key.to_owned(), part: span.part, since: span.since, limit, least, most })
    }

    /// What the owner says; 0 is that there is not enough.
    pub(super) fn hear(&mut self, asked: &TakeCount, taken: u64, now: Instant) {
        self.asking = false;
        if self.part != asked.part {
            self.former.extend((taken > 0).then_some((asked.part, taken)));
            return;
        }
        self.left = self.left.saturating_add(taken);
        self.used = Some(now);
        self.denied = (taken == 0).then(|| (now + DENIED, asked.least.saturating_add(self.left)));
    }

    /// The owner says nothing.
    pub(super) fn unheard(&mut self) {
        self.asking = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edges(count: u8) -> Edges {
        Edges::only(NodeId([0; 16])).with((1..count).map(|n| NodeId([n; 16])).collect())
    }

    #[test]
    fn leases_grow_with_use_and_never_beyond_a_hundredth() {
        let edges = edges(3);
        let (mut lease, mut now) = (Lease::default(), Instant::now());
        let span = Span { part: 5, since: 5, part_seconds: 100 };
        let mut asked = Vec::new();
        for _ in 0..2000 {
            if lease.take(5, 1, now) == Held::Short {
                let ask = lease.ask("k", (span, 30_000), Some(1), &edges, now).unwrap();
                asked.push(ask.most);
                lease.hear(&ask, ask.most, now);
                assert_eq!(lease.take(5, 1, now), Held::Enough);
            }
            if let Some(early) = lease.ask("k", (span, 30_000), None, &edges, now) {
                asked.push(early.most);
                lease.hear(&early, early.most, now);
            }
            assert!(lease.left <= 150, "one and a half of {}", lease.chunk);
            now += Duration::from_millis(1);
        }
        assert_eq!(asked[..8], [1, 2, 4, 8, 16, 32, 64, 100]);
        assert!(asked.len() < 40, "{}", asked.len());

        lease.left = 0;
        let first = lease.ask("k", (span, 30_000), Some(1), &edges, now).unwrap();
        lease.hear(&first, 0, now);
        assert_eq!(lease.take(5, 1, now), Held::Denied);
        assert_eq!(lease.take(5, 1, now + DENIED), Held::Short);
        // Another day; who has waited since yesterday takes of today's, and yesterday's is given back.
        lease.left = 7;
        assert_eq!(lease.take(6, 1, now), Held::Short);
        let ask =
            lease.ask("k", (Span { part: 6, since: 6, part_seconds: 100 }, 30_000), Some(1), &edges, now).unwrap();
        lease.hear(&ask, 3, now);
        assert_eq!(lease.take(5, 1, now), Held::Enough);
        assert_eq!((lease.part, lease.left, &lease.former[..]), (6, 2, &[(5, 7)][..]));
        lease.hear(&TakeCount { part: 5, ..ask }, 4, now);
        assert_eq!(lease.former, [(5, 7), (5, 4)]);
    }

    #[test]
    fn what_lies_is_given_back() {
        let edges = edges(2);
        let (mut share, now) = (Share::default(), Instant::now());
        let key = (0..).map(|n| format!("k{n}")).find(|key| edges.owner(key) == NodeId([1; 16])).unwrap();
        assert_eq!(share.role(&key, &edges), Role::Of(NodeId([1; 16])));
        assert_eq!(share.lease().take(5, 1, now), Held::Short);
        let ask =
            share.lease().ask(&key, (Span { part: 5, since: 5, part_seconds: 9 }, 10), Some(3), &edges, now).unwrap();
        share.lease().hear(&ask, 3, now);
        assert_eq!((share.take_idle(now), share.left(5)), (vec![], 3));
        assert_eq!(share.take_idle(now + IDLE), [(5, 3)]);
        assert!(!share.has_lease());
    }

    #[test]
    fn a_counter_moves_with_its_owner_and_is_settled_when_one_comes() {
        let (three, two) = (edges(3), edges(3).with(vec![NodeId([1; 16])]));
        for n in 0..100 {
            let (key, mut share) = (format!("k{n}"), Share::default());
            let before = share.role(&key, &three);
            let after = share.role(&key, &two);
            match before {
                Role::Of(owner) if owner == NodeId([2; 16]) => {}
                before => assert_eq!(before, after, "nobody else's moves"),
            }
            if after == Role::Unsettled {
                share.settle(&two);
                assert_eq!(share.role(&key, &two), Role::Own);
                let again = two.with(vec![NodeId([1; 16]), NodeId([2; 16])]);
                assert_ne!(share.role(&key, &again), Role::Own, "who has come may know more");
                assert_eq!(share.unsettled(&again), [NodeId([2; 16])], "and nobody else");
            }
        }
    }
}
