//! How this node sees each other member: what membership says, since when, and what was last heard of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use starling_protocol::{Forgotten, MemberHealth, MemberState, NodeId};

use crate::{
    Ident,
    membership::{Observed, Touched},
};

/// How long ago a member must have been heard to count as within reach.
const OF_LATE: Duration = Duration::from_secs(10);
/// Members within reach that show that a node is not deaf.
const ENOUGH: usize = 8;
/// Members struck off that are remembered.
const MAX_FORGOTTEN: usize = 1024;

/// A member other than this node.
#[derive(Debug)]
pub(crate) struct Peer {
    /// As membership has it.
    pub(crate) state: MemberState,
    /// As it is shown: a suspicion counts when this node shares it, or two others do.
    pub(crate) health: MemberHealth,
    pub(crate) accusers: Vec<NodeId>,
    /// Since when `health` is what it is, unix seconds.
    pub(crate) since: u64,
    /// Since when this life of it is known.
    pub(crate) met: Instant,
    /// When it last sent anything.
    pub(crate) heard: Option<Instant>,
    /// Since when it has been sending while it is thought dead.
    pub(crate) heard_dead: Option<Instant>,
    /// Root hash that it last told.
    pub(crate) root: Option<u64>,
}

impl Peer {
    pub(crate) fn ident(&self) -> Ident {
        (&self.state).into()
    }

    pub(crate) fn is_live(&self) -> bool {
        self.state.health != MemberHealth::Down
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
    peers: BTreeMap<NodeId, Peer>,
    /// Those that are dead.
    dead: BTreeSet<NodeId>,
    forgotten: BTreeMap<NodeId, Forgotten>,
}

impl Roster {
    pub(crate) fn get(&self, id: &NodeId) -> Option<&Peer> {
        self.peers.get(id)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Peer> {
        self.peers.values()
    }

    /// Those that membership does not hold for dead.
    pub(crate) fn live(&self) -> impl Iterator<Item = &Peer> {
        self.peers.values().filter(|peer| peer.is_live())
    }

    /// How many these are.
    pub(crate) fn live_count(&self) -> usize {
        self.peers.len() - self.dead.len()
    }

    /// The others.
    pub(crate) fn dead(&self) -> impl Iterator<Item = &Peer> {
        self.dead.iter().filter_map(|id| self.peers.get(id))
    }

    /// How good this node's case is against another's: whether it hears enough members at all, then how many it holds for
    /// alive. Higher is better.
    pub(crate) fn standing(&self, now: Instant) -> u32 {
        let heard = |peer: &&Peer| peer.heard.is_some_and(|at| now.saturating_duration_since(at) < OF_LATE);
        let (heard, live) = (self.live().filter(heard).take(ENOUGH).count(), self.live_count());
        (heard as u32) << 24 | (live as u32).min((1 << 24) - 1)
    }

    /// Brings it up to what membership says of those members that were touched; one that it does not observe any more is
    /// forgotten.
    pub(crate) fn update(
        &mut self,
        touched: &Touched,
        observed: impl Iterator<Item = Observed>,
        me: NodeId,
        now: Instant,
        unix: u64,
    ) -> Changes {
        let mut changes = Changes::default();
        let mut known = 0;
        for Observed { state, accusers } in observed {
            known += 1;
            match state.health {
                MemberHealth::Down => self.dead.insert(state.id),
                _ => self.dead.remove(&state.id),
            };
            let shared = accusers.contains(&me) || accusers.len() >= 2;
            let health = match state.health {
                MemberHealth::Suspect if !shared => MemberHealth::Alive,
                health => health,
            };
            let Some(peer) = self.peers.get_mut(&state.id) else {
                let (heard, heard_dead, root) = (None, None, None);
                let peer = Peer { state, health, accusers, since: unix, met: now, heard, heard_dead, root };
                self.peers.insert(state.id, peer);
                changes.members.push(state.id);
                continue;
            };
            if peer.state == state && peer.health == health && peer.accusers == accusers {
                continue;
            }
            changes.members.push(state.id);
            let renewed = peer.state.generation != state.generation;
            if renewed {
                peer.met = now;
                changes.renewed.push(state.id);
            }
            if renewed || peer.health != health {
                changes.turned.push((state.id, peer.health));
                peer.since = unix;
            }
            if health == MemberHealth::Down && peer.health != MemberHealth::Down {
                changes.died.push(state.id);
            }
            if health != MemberHealth::Down {
                peer.heard_dead = None;
            }
            (peer.state, peer.health, peer.accusers) = (state, health, accusers);
        }
        let before =
            touched.ids().map_or(self.peers.len(), |ids| ids.iter().filter(|id| self.peers.contains_key(id)).count());
        changes.shrunk = known != before;
        changes
    }

    /// Drops members that `remembered` does not name.
    pub(crate) fn retain(&mut self, remembered: impl Fn(&NodeId) -> bool) {
        self.peers.retain(|id, _| remembered(id));
        self.dead.retain(|id| remembered(id));
        self.forgotten.retain(|id, _| remembered(id));
    }

    /// Something came from that member.
    pub(crate) fn heard(&mut self, from: &NodeId, root: Option<u64>, now: Instant) {
        if let Some(peer) = self.peers.get_mut(from) {
            peer.heard = Some(now);
            peer.root = root.or(peer.root);
            if !peer.is_live() {
                peer.heard_dead.get_or_insert(now);
            }
        }
    }

    /// Strikes a dead member off; whether that was news.
    pub(crate) fn forget(&mut self, forgotten: Forgotten) -> bool {
        let known = self.forgotten.get(&forgotten.id);
        let news = known.is_none_or(|k| (forgotten.generation, forgotten.prune) > (k.generation, k.prune));
        if news && (known.is_some() || self.forgotten.len() < MAX_FORGOTTEN) {
            self.forgotten.insert(forgotten.id, forgotten);
            return true;
        }
        false
    }

    /// Whether, and how, that life was struck off.
    pub(crate) fn forgotten(&self, state: &MemberState) -> Option<Forgotten> {
        let dead = state.health == MemberHealth::Down;
        self.forgotten.get(&state.id).filter(|f| dead && f.generation >= state.generation).copied()
    }

    /// All that were struck off, for other nodes.
    pub(crate) fn all_forgotten(&self) -> Vec<Forgotten> {
        self.forgotten.values().copied().collect()
    }
}
