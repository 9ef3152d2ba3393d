//! How this node sees each other member: what membership says, since when, and what was last heard of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use starling_protocol::{MemberHealth, NodeId, SignedStrike, Strike, StrikeEdition};

use crate::{
    Ident,
    membership::{Observed, PeerState, Touched},
};

/// How long ago a member must have been heard to count as within reach.
const OF_LATE: Duration = Duration::from_secs(10);
/// Members within reach that show that a node is not deaf.
const ENOUGH: usize = 8;
/// Members struck off that are remembered.
const MAX_STRUCK: usize = 1024;

/// A member other than this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Peer {
    /// As membership has it.
    pub(crate) state: PeerState,
    /// Its health as it is shown: a suspicion counts when this node shares it, or two others do.
    pub(crate) shown: MemberHealth,
    /// Since when that is so, unix seconds.
    pub(crate) since: u64,
}

impl Peer {
    pub(crate) fn ident(&self) -> Ident {
        (&self.state).into()
    }

    pub(crate) fn is_live(&self) -> bool {
        self.state.health != MemberHealth::Down
    }
}

/// What this node has heard of a member itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heard {
    /// When it last sent anything.
    pub(crate) at: Instant,
    /// Since when it has been sending while it is thought dead.
    pub(crate) dead_since: Option<Instant>,
    /// Root hash that it last told.
    pub(crate) root: Option<u64>,
}

/// What is kept of each member. Small: there can be thousands of them.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    addr: SocketAddr,
    generation: u64,
    incarnation: u16,
    believed: MemberHealth,
    shown: MemberHealth,
    /// Unix seconds; enough until 2106.
    since: u32,
}

impl Entry {
    fn new(state: &PeerState, shown: MemberHealth, since: u32) -> Self {
        let PeerState { addr, generation, incarnation, health, .. } = *state;
        Self { addr, generation, incarnation, believed: health, shown, since }
    }

    fn peer(&self, id: NodeId) -> Peer {
        let Self { addr, generation, incarnation, believed: health, .. } = *self;
        let state = PeerState { id, addr, generation, incarnation, health };
        Peer { state, shown: self.shown, since: self.since.into() }
    }
}

/// What came out of bringing the roster up to date.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Members that changed in any way.
    pub(crate) members: Vec<NodeId>,
    /// Members whose health as shown changed, or whose life did, with what was before.
    pub(crate) turned: Vec<(NodeId, MemberHealth)>,
    /// Members that came back under a new generation.
    pub(crate) renewed: Vec<NodeId>,
    /// Members that are dead now.
    pub(crate) died: Vec<NodeId>,
    /// Whether members were forgotten.
    pub(crate) shrunk: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Roster {
    // Ordered, so that random choices among them repeat with the seed.
    members: BTreeMap<NodeId, Entry>,
    /// Those that are dead.
    dead: BTreeSet<NodeId>,
    /// Who could not reach the suspects.
    accusers: BTreeMap<NodeId, Vec<NodeId>>,
    heard: BTreeMap<NodeId, Heard>,
    struck: BTreeMap<NodeId, (Strike, Arc<SignedStrike>)>,
}

impl Roster {
    pub(crate) fn get(&self, id: &NodeId) -> Option<Peer> {
        self.members.get(id).map(|entry| entry.peer(*id))
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = Peer> {
        self.members.iter().map(|(id, entry)| entry.peer(*id))
    }

    /// Those that membership does not hold for dead.
    pub(crate) fn live(&self) -> impl Iterator<Item = Peer> {
        self.all().filter(Peer::is_live)
    }

    /// How many these are.
    pub(crate) fn live_count(&self) -> usize {
        self.members.len() - self.dead.len()
    }

    /// The others.
    pub(crate) fn dead(&self) -> impl Iterator<Item = Peer> {
        self.dead.iter().filter_map(|id| self.get(id))
    }

    /// Who could not reach that member, if it is suspect.
    pub(crate) fn accusers(&self, id: &NodeId) -> &[NodeId] {
        self.accusers.get(id).map_or(&[], Vec::as_slice)
    }

    /// What this node has heard of that member itself; `None` if nothing.
    pub(crate) fn heard_of(&self, id: &NodeId) -> Option<&Heard> {
        self.heard.get(id)
    }

    /// How good this node's case is against another's: whether it hears enough members at all, then how many it holds for
    /// alive. Higher is better.
    pub(crate) fn standing(&self, now: Instant) -> u32 {
        let of_late = |(_, heard): &(&NodeId, &Heard)| now.saturating_duration_since(heard.at) < OF_LATE;
        let live = |(id, _): &(&NodeId, &Heard)| !self.dead.contains(id);
        let heard = self.heard.iter().filter(of_late).filter(live).take(ENOUGH).count();
        (heard as u32) << 24 | (self.live_count() as u32).min((1 << 24) - 1)
    }

    /// Brings it up to what membership says of those members that were touched; one that it does not observe any more is
    /// forgotten.
    pub(crate) fn update(
        &mut self,
        touched: &Touched,
        observed: impl Iterator<Item = Observed>,
        me: NodeId,
        unix: u64,
    ) -> Changes {
        let mut changes = Changes::default();
        let mut known = 0;
        let since = u32::try_from(unix).unwrap_or(u32::MAX);
        let before = touched
            .ids()
            .map_or(self.members.len(), |ids| ids.iter().filter(|id| self.members.contains_key(id)).count());
        for Observed { state, accusers } in observed {
            let id = state.id;
            match state.health {
                MemberHealth::Down => self.dead.insert(id),
                _ => self.dead.remove(&id),
            };
            let shared = accusers.contains(&me) || accusers.len() >= 2;
            let shown = match state.health {
                MemberHealth::Suspect if !shared => MemberHealth::Alive,
                health => health,
            };
            let accused = *self.accusers(&id) != *accusers;
            if accused && accusers.is_empty() {
                self.accusers.remove(&id);
            } else if accused {
                self.accusers.insert(id, accusers);
            }
            let Some(entry) = self.members.get_mut(&id) else {
                self.members.insert(id, Entry::new(&state, shown, since));
                changes.members.push(id);
                continue;
            };
            known += 1;
            let is = Entry::new(&state, shown, entry.since);
            if *entry == is && !accused {
                continue;
            }
            changes.members.push(id);
            let was = std::mem::replace(entry, is);
            if was.generation != state.generation {
                changes.renewed.push(id);
            }
            if was.generation != state.generation || was.shown != shown {
                changes.turned.push((id, was.shown));
                entry.since = since;
            }
            if shown == MemberHealth::Down && was.shown != MemberHealth::Down {
                changes.died.push(id);
            }
            if shown != MemberHealth::Down
                && let Some(heard) = self.heard.get_mut(&id)
            {
                heard.dead_since = None;
            }
        }
        changes.shrunk = known != before;
        changes
    }

    /// Drops members that `remembered` does not name.
    pub(crate) fn retain(&mut self, remembered: impl Fn(&NodeId) -> bool) {
        self.members.retain(|id, _| remembered(id));
        self.dead.retain(|id| remembered(id));
        self.accusers.retain(|id, _| remembered(id));
        self.heard.retain(|id, _| remembered(id));
        self.struck.retain(|id, _| remembered(id));
    }

    /// Something came from that member.
    pub(crate) fn heard(&mut self, from: &NodeId, root: Option<u64>, now: Instant) {
        if !self.members.contains_key(from) {
            return;
        }
        let heard = self.heard.entry(*from).or_insert(Heard { at: now, dead_since: None, root });
        heard.at = now;
        heard.root = root.or(heard.root);
        if self.dead.contains(from) {
            heard.dead_since.get_or_insert(now);
        }
    }

    /// Whether that strike, if it is right, would be news and have a place.
    pub(crate) fn wants(&self, edition: &StrikeEdition) -> bool {
        let known = self.struck.get(&edition.id).map(|(strike, _)| (strike.generation, strike.prune));
        let room = known.is_some() || self.struck.len() < MAX_STRUCK;
        room && self.members.contains_key(&edition.id) && known.is_none_or(|k| (edition.generation, edition.prune) > k)
    }

    /// Strikes a member off; [`Roster::wants`] was asked.
    pub(crate) fn strike(&mut self, strike: Strike, signed: Arc<SignedStrike>) {
        self.struck.insert(strike.id, (strike, signed));
    }

    /// Whether, and how, that life was struck off.
    pub(crate) fn struck(&self, state: &PeerState) -> Option<Strike> {
        let dead = state.health == MemberHealth::Down;
        self.struck.get(&state.id).map(|(strike, _)| *strike).filter(|s| dead && s.generation >= state.generation)
    }

    /// Those that were struck off.
    pub(crate) fn strikes(&self) -> impl Iterator<Item = (&Strike, &Arc<SignedStrike>)> {
        self.struck.values().map(|(strike, signed)| (strike, signed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: NodeId = NodeId([0; 16]);

    fn observed(n: u8, generation: u64, health: MemberHealth, accusers: &[u8]) -> Observed {
        let (id, addr) = (NodeId([n; 16]), ([127, 0, 0, n], 7400).into());
        let state = PeerState { id, addr, generation, incarnation: 0, health };
        Observed { state, accusers: accusers.iter().map(|by| NodeId([*by; 16])).collect() }
    }

    fn update(roster: &mut Roster, observed: Vec<Observed>, gone: &[u8]) -> Changes {
        let mut touched = Touched::default();
        touched.add_all(observed.iter().map(|o| o.state.id));
        touched.add_all(gone.iter().map(|n| NodeId([*n; 16])));
        roster.update(&touched, observed.into_iter(), ME, 7)
    }

    #[test]
    fn a_change_is_told_once_and_a_forgotten_member_leaves_nothing_behind() {
        use MemberHealth::{Alive, Down, Suspect};
        let (mut roster, now, id) = (Roster::default(), Instant::now(), NodeId([1; 16]));
        roster.heard(&id, None, now);
        assert!(roster.heard_of(&id).is_none(), "a stranger");
        let born = update(&mut roster, vec![observed(1, 1, Alive, &[]), observed(2, 1, Alive, &[])], &[]);
        assert_eq!(born, Changes { members: vec![id, NodeId([2; 16])], ..Changes::default() });
        assert_eq!(update(&mut roster, vec![observed(1, 1, Alive, &[])], &[]), Changes::default());

        // One accuser is not shown, and two are.
        for (accusers, shown) in [(&[3][..], Alive), (&[3, 4], Suspect)] {
            let changes = update(&mut roster, vec![observed(1, 1, Suspect, accusers)], &[]);
            let turned = if shown == Suspect { vec![(id, Alive)] } else { Vec::new() };
            assert_eq!(changes, Changes { members: vec![id], turned, ..Changes::default() });
            assert_eq!((roster.get(&id).unwrap().shown, roster.accusers(&id).len()), (shown, accusers.len()));
        }
        let changes = update(&mut roster, vec![observed(1, 1, Down, &[])], &[]);
        assert_eq!((changes.died, roster.accusers(&id).len(), roster.live_count()), (vec![id], 0, 1));
        roster.heard(&id, Some(9), now);
        assert_eq!(roster.heard_of(&id).map(|h| (h.dead_since, h.root)), Some((Some(now), Some(9))));
        let changes = update(&mut roster, vec![observed(1, 2, Alive, &[])], &[]);
        assert_eq!((changes.renewed, changes.turned), (vec![id], vec![(id, Down)]));
        assert_eq!((roster.heard_of(&id).unwrap().dead_since, roster.dead().count()), (None, 0));

        update(&mut roster, vec![observed(1, 2, Suspect, &[3])], &[]);
        assert!(update(&mut roster, Vec::new(), &[1]).shrunk);
        roster.retain(|other| *other != id);
        assert!(roster.get(&id).is_none() && roster.heard_of(&id).is_none() && roster.accusers(&id).is_empty());
        assert_eq!(roster.live_count(), 1);
    }
}
