//! Two of one: nodes that run with the same key, because a state directory was copied. Each of them begins a new life when it
//! hears of the other's, so that for all others one node moves to and fro.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use starling_protocol::NodeId;

/// Moves between two addresses that make two of one. Whoever tries another address, or was restored from an older copy, comes
/// back once.
const MOVES: u32 = 3;
/// How long a move counts.
const COUNTS: Duration = Duration::from_secs(600);
/// How long a node leaves the other in peace that has taken its turn.
pub(crate) const PEACE: Duration = Duration::from_secs(10);

/// Who moved, and between which addresses. Only members that were seen at two have an entry.
#[derive(Debug, Default)]
pub(crate) struct Twins {
    by_node: HashMap<NodeId, Moves>,
}

#[derive(Debug)]
struct Moves {
    between: [SocketAddr; 2],
    count: u32,
    at: Instant,
}

impl Twins {
    /// A new life of the node is at `to`, the one before it was at `from`. Whether this is what makes it two of one.
    pub(crate) fn moved(&mut self, id: NodeId, [from, to]: [SocketAddr; 2], now: Instant) -> bool {
        if from == to {
            return false;
        }
        let moves = self.by_node.entry(id).or_insert(Moves { between: [from, to], count: 0, at: now });
        let again = moves.between.contains(&from) && moves.between.contains(&to) && moves.counts(now);
        if !again {
            *moves = Moves { between: [from, to], count: 0, at: now };
        }
        moves.count = moves.count.saturating_add(1);
        moves.at = now;
        moves.count == MOVES
    }

    /// Where else the node runs that is at `addr`, if it is two of one.
    pub(crate) fn of(&self, id: &NodeId, addr: SocketAddr, now: Instant) -> Option<SocketAddr> {
        let moves = self.by_node.get(id).filter(|moves| moves.count >= MOVES && moves.counts(now))?;
        moves.between.into_iter().find(|other| *other != addr)
    }

    /// Forgets what counts no more; whether somebody was two of one until now.
    pub(crate) fn forget(&mut self, now: Instant) -> bool {
        let before = self.by_node.values().filter(|moves| moves.count >= MOVES).count();
        self.by_node.retain(|_, moves| moves.counts(now));
        self.by_node.values().filter(|moves| moves.count >= MOVES).count() < before
    }

    /// Forgets members.
    pub(crate) fn retain(&mut self, keep: impl Fn(&NodeId) -> bool) {
        self.by_node.retain(|id, _| keep(id));
    }
}

impl Moves {
    fn counts(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) < COUNTS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: NodeId = NodeId([1; 16]);

    fn at(port: u16) -> SocketAddr {
        ([127, 0, 0, 1], port).into()
    }

    #[test]
    fn who_goes_to_and_fro_is_two_and_who_comes_back_is_one() {
        let (mut twins, now) = (Twins::default(), Instant::now());
        assert!(!twins.moved(ID, [at(1), at(2)], now));
        assert!(!twins.moved(ID, [at(2), at(1)], now));
        assert_eq!(twins.of(&ID, at(1), now), None, "it may have been restarted at its old address");
        assert!(twins.moved(ID, [at(1), at(2)], now));
        assert_eq!(twins.of(&ID, at(2), now), Some(at(1)));
        assert!(!twins.moved(ID, [at(2), at(1)], now), "it is said once");
        assert_eq!(twins.of(&ID, at(1), now), Some(at(2)));
        assert_eq!(twins.of(&ID, at(1), now + COUNTS), None);
        assert!(!twins.forget(now) && twins.forget(now + COUNTS) && twins.by_node.is_empty());
    }

    #[test]
    fn who_moves_on_is_one() {
        let (mut twins, now) = (Twins::default(), Instant::now());
        for port in 1..20 {
            assert!(!twins.moved(ID, [at(port), at(port + 1)], now));
            assert!(!twins.moved(ID, [at(port + 1), at(port + 1)], now));
        }
        assert_eq!(twins.of(&ID, at(20), now), None);
    }
}
