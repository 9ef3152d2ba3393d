//! How a node shows the mesh, in a few bytes a member: snapshots of thousands of nodes would not fit into memory.

use starling_gossip::{MemberView, Snapshot};
use starling_protocol::{MemberHealth, ServiceState};

use crate::world::index_of;

/// A member as a snapshot showed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) generation: u64,
    pub(crate) incarnation: u16,
    pub(crate) health: MemberHealth,
    pub(crate) left: bool,
    /// Whether there is a record of this life of it.
    pub(crate) told: bool,
    /// Whether its service takes calls, by that record.
    pub(crate) serves: bool,
}

impl Seen {
    fn new(member: &MemberView) -> Self {
        let record = member.record.as_ref();
        Self {
            generation: member.generation,
            incarnation: member.incarnation,
            health: member.health,
            left: member.left,
            told: record.is_some_and(|r| r.generation == member.generation),
            serves: record.and_then(|r| r.services.first()).is_some_and(|s| s.state == ServiceState::Up),
        }
    }

    pub(crate) fn is_live(&self) -> bool {
        self.health != MemberHealth::Down && !self.left
    }

    /// In the mesh, and not even suspected.
    pub(crate) fn is_alive(&self) -> bool {
        self.health == MemberHealth::Alive && !self.left
    }
}

/// Everybody whom the node showed last, by index.
#[derive(Debug, Default)]
pub(crate) struct View {
    members: Vec<Option<Seen>>,
    /// How many of them it showed alive.
    pub(crate) alive: usize,
}

impl View {
    /// What a snapshot shows of a mesh of at most so many.
    pub(crate) fn new(snapshot: &Snapshot, nodes: usize) -> Self {
        let mut members = vec![None; nodes];
        for member in &snapshot.members {
            members[index_of(&member.id)] = Some(Seen::new(member));
        }
        let alive = members.iter().flatten().filter(|seen| seen.is_alive()).count();
        Self { members, alive }
    }

    pub(crate) fn get(&self, index: usize) -> Option<Seen> {
        self.members.get(index).copied().flatten()
    }

    /// All that it shows as in the mesh.
    pub(crate) fn live(&self) -> impl Iterator<Item = (usize, Seen)> {
        let seen = self.members.iter().enumerate().filter_map(|(index, seen)| Some((index, (*seen)?)));
        seen.filter(|(_, seen)| seen.is_live())
    }
}
