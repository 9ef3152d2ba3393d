//! What scenarios ask of a world.

use starling_gossip::Gossip;
use starling_protocol::MemberHealth;

use crate::{view::View, world::World};

impl World {
    /// Nodes that run and are not paused.
    pub(crate) fn running(&self) -> Vec<usize> {
        (0..self.nodes.len()).filter(|n| self.nodes[*n].gossip.is_some() && !self.nodes[*n].paused).collect()
    }

    /// Whether every running node sees exactly the running ones alive, in their present life, each with its record.
    pub(crate) fn views_agree(&self) -> bool {
        let running = self.running();
        // The cheap question first: it is asked of thousands of nodes, and mostly answered by it.
        running.iter().rev().all(|observer| self.view(*observer).alive == running.len())
            && running.iter().all(|observer| {
                running.iter().all(|subject| {
                    self.view(*observer).get(*subject).is_some_and(|seen| {
                        let current = seen.generation == self.truth.generation[*subject];
                        current && seen.told && seen.is_alive()
                    })
                })
            })
    }

    /// Why views do not agree, in a few lines.
    pub(crate) fn disagreement(&self) -> String {
        let running = self.running();
        let mut lines = Vec::new();
        for observer in &running {
            let is_lost = self.gossip(*observer).is_lost();
            let alive = self.view(*observer).live().filter(|(_, seen)| seen.is_alive());
            let alive: Vec<usize> = alive.map(|(index, _)| index).collect();
            let missing = running.iter().filter(|n| !alive.contains(n)).take(5);
            let missing: Vec<_> = missing.map(|n| (n, self.view(*observer).get(*n))).collect();
            let ghosts: Vec<_> = alive.iter().filter(|n| !running.contains(n)).take(20).collect();
            if !missing.is_empty() || !ghosts.is_empty() || is_lost {
                lines.push(format!("{observer}: missing {missing:?}, ghosts {ghosts:?}, lost {is_lost}"));
            }
        }
        lines.truncate(12);
        let lost = running.iter().filter(|n| self.gossip(**n).is_lost());
        lines.push(format!("lost: {:?}", lost.collect::<Vec<_>>()));
        lines.join("\n")
    }

    /// Whether the observers show the subject as down, or left.
    pub(crate) fn all_see_down(&self, subject: usize) -> bool {
        self.running()
            .into_iter()
            .filter(|n| *n != subject)
            .all(|n| self.view_of(n, subject).is_some_and(|(health, left)| health == MemberHealth::Down || left))
    }

    /// How the observer shows the subject, and whether as having left.
    pub(crate) fn view_of(&self, observer: usize, subject: usize) -> Option<(MemberHealth, bool)> {
        self.view(observer).get(subject).map(|seen| (seen.health, seen.left))
    }

    /// Whether all running nodes have the same records and documents.
    pub(crate) fn roots_agree(&self) -> bool {
        let roots: Vec<u64> = self.running().iter().map(|n| self.gossip(*n).root()).collect();
        roots.windows(2).all(|pair| pair[0] == pair[1])
    }

    /// Share of running nodes that see the subject's service as taking calls, or not.
    pub(crate) fn share_that_sees(&self, subject: usize, serves: bool) -> f64 {
        let running = self.running();
        let seeing = running.iter().filter(|n| self.view(**n).get(subject).is_some_and(|seen| seen.serves == serves));
        seeing.count() as f64 / running.len() as f64
    }

    /// Times that nodes were declared dead by the mesh, summed.
    pub(crate) fn times_lost(&self) -> u64 {
        self.running().iter().map(|n| self.gossip(*n).counters().lost).sum()
    }

    pub(crate) fn documents_refused(&self) -> u64 {
        self.running().iter().map(|n| self.gossip(*n).counters().documents_refused).sum()
    }

    pub(crate) fn packets_refused(&self) -> u64 {
        self.running().iter().map(|n| self.gossip(*n).counters().packets_refused).sum()
    }

    pub(crate) fn records_refused(&self) -> u64 {
        self.running().iter().map(|n| self.gossip(*n).counters().records_refused).sum()
    }

    /// Bytes of all datagrams and stream messages that were sent, without headers.
    pub(crate) fn sent_bytes(&self) -> u64 {
        self.nodes.iter().map(|n| n.sent_bytes).sum()
    }

    fn gossip(&self, node: usize) -> &Gossip {
        self.nodes[node].gossip.as_deref().expect("it runs")
    }

    pub(crate) fn view(&self, observer: usize) -> &View {
        &self.nodes[observer].observer.view
    }
}
