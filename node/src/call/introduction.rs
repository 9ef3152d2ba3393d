//! The first moments of a node, in which it does not know yet who is there.

use std::time::{Duration, Instant};

use starling_gossip::Snapshot;

/// A node that hears of nobody for so long is alone.
const ALONE: Duration = Duration::from_secs(5);

/// Whether a node still has to be told what there is. Until then it is not ready, and a service that it does not know may
/// well be there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Introduction {
    /// Whether there may be somebody to tell: seeds, or peers of a former life.
    expected: bool,
    started: Instant,
}

impl Introduction {
    pub(crate) fn new(expected: bool) -> Self {
        Self { expected, started: Instant::now() }
    }

    /// Whether what is missing in the snapshot is missing in the mesh.
    pub(crate) fn is_over(&self, snapshot: &Snapshot) -> bool {
        !self.expected || snapshot.introduced || self.started.elapsed() > ALONE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_over_when_somebody_has_told_or_nobody_is_there() {
        let (mut told, untold) = (Snapshot::default(), Snapshot::default());
        told.introduced = true;
        assert!(Introduction::new(false).is_over(&untold), "the first node of a mesh");
        let introduction = Introduction::new(true);
        assert!(!introduction.is_over(&untold) && introduction.is_over(&told));
        let started = introduction.started.checked_sub(ALONE);
        assert!(started.is_none_or(|started| Introduction { expected: true, started }.is_over(&untold)), "alone");
    }
}
