//! The other edges: who is there, and who says nothing.

use std::{pin::Pin, sync::Arc, time::Duration};

use starling_node::Fleet;
use starling_protocol::{AskCounts, NodeId, TellCounts};
use tokio::time::Instant;

use super::{Tally, lock};

/// How long an edge may take to answer; one that does not is left out for a while, which doubles.
pub(super) const PATIENCE: Duration = Duration::from_millis(700);
const SILENCE: Duration = Duration::from_secs(2);
pub(super) const MAX_SILENCE: Duration = Duration::from_secs(30);

/// The other edges.
pub(crate) trait Peers: Send + Sync {
    /// This one.
    fn own(&self) -> NodeId;
    /// The others that are alive.
    fn others(&self) -> Vec<NodeId>;
    /// Whether the mesh has been heard; before that there may be others that are not known.
    fn is_settled(&self) -> bool;
    /// Asks one of them. Cancel safe, but that it may have heard the question.
    fn ask<'a>(
        &'a self,
        edge: &'a NodeId,
        ask: &'a AskCounts,
    ) -> Pin<Box<dyn Future<Output = Result<TellCounts, String>> + Send + 'a>>;
}

impl Peers for Fleet {
    fn own(&self) -> NodeId {
        Fleet::own(self)
    }

    fn others(&self) -> Vec<NodeId> {
        Fleet::others(self)
    }

    fn is_settled(&self) -> bool {
        Fleet::is_settled(self)
    }

    fn ask<'a>(
        &'a self,
        edge: &'a NodeId,
        ask: &'a AskCounts,
    ) -> Pin<Box<dyn Future<Output = Result<TellCounts, String>> + Send + 'a>> {
        Box::pin(Fleet::ask(self, edge, ask))
    }
}

impl Tally {
    /// Finds out who is there.
    pub(super) fn look(self: &Arc<Self>) {
        let now = Instant::now();
        let mut others = self.peers.others();
        let mut silent = lock(&self.silent);
        silent.retain(|edge, _| others.contains(edge));
        for (edge, (until, pause)) in silent.iter_mut().filter(|(_, (until, _))| *until <= now) {
            // It comes back when it has answered.
            *until = now + *pause;
            *pause = (*pause * 2).min(MAX_SILENCE);
            let (tally, edge) = (self.clone(), *edge);
            self.runtime.spawn(async move {
                let nothing = AskCounts::default();
                let answer = tokio::time::timeout(PATIENCE, tally.peers.ask(&edge, &nothing)).await;
                if matches!(answer, Ok(Ok(_))) {
                    lock(&tally.silent).remove(&edge);
                }
            });
        }
        others.retain(|edge| !silent.contains_key(edge));
        drop(silent);
        let edges = self.edges.load();
        let next = edges.with(others);
        if **edges != next {
            self.edges.store(Arc::new(next));
        }
    }

    /// Edges that are alive, and do not say what they have counted.
    pub(crate) fn silent(&self) -> usize {
        lock(&self.silent).len()
    }

    /// Leaves an edge out until it answers again.
    pub(super) fn falls_silent(self: &Arc<Self>, edge: NodeId, why: &str) {
        let is_news = lock(&self.silent).insert(edge, (Instant::now() + SILENCE, SILENCE * 2)).is_none();
        if is_news {
            tracing::warn!(%edge, why, "an edge does not say what it has counted of quotas; the others share them without it");
        }
        self.look();
    }
}
