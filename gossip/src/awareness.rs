//! How far this node trusts its own judgement (Lifeguard, Dadgar, Phillips, Currey 2018, §IV-A: local health).

use std::time::Duration;

/// Highest score: probes are then nine times as slow and as patient as usual.
const MAX_SCORE: u32 = 8;

/// 0 when all is well. Rises when probes fail without a witness, when this node has to refute a suspicion, and when it was
/// stalled: each is a sign that the fault may be here.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Awareness(u32);

impl Awareness {
    pub(crate) fn better(&mut self) {
        self.0 = self.0.saturating_sub(1);
    }

    pub(crate) fn worse(&mut self) {
        self.0 = (self.0 + 1).min(MAX_SCORE);
    }

    pub(crate) fn score(self) -> u32 {
        self.0
    }

    /// A time of the probe cycle, longer the less this node trusts itself.
    pub(crate) fn stretch(self, time: Duration) -> Duration {
        time * (self.0 + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubt_is_bounded_and_passes() {
        let mut awareness = Awareness::default();
        (0..20).for_each(|_| awareness.worse());
        assert_eq!(awareness.stretch(Duration::from_millis(500)), Duration::from_millis(4500));
        (0..20).for_each(|_| awareness.better());
        assert_eq!(awareness.stretch(Duration::from_millis(500)), Duration::from_millis(500));
    }
}
