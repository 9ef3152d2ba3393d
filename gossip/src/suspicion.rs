//! Who is accused by whom, and how long a suspect has to answer (Lifeguard §IV-B: suspicion that shrinks with independent
//! confirmations).

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use foca::{BroadcastHandler, Invalidates, Timer};
use serde::{Deserialize, Serialize};
use starling_protocol::NodeId;

use crate::membership::Ident;

/// Confirmations from others that make a suspicion as short as it gets.
const CONFIRMATIONS: usize = 3;
/// How many times longer than the longest confirmed suspicion one lasts that nobody confirms.
const LONE: u32 = 2;
/// Accusers that are remembered of one suspect; more would change nothing.
const MAX_ACCUSERS: usize = CONFIRMATIONS + 1;
/// Accusations that are passed on between two prunings (5 s): no flood of them may fill the packets.
const MAX_PASSED_ON: usize = 256;
/// Suspects of whom accusers are remembered. Above, the mesh is falling apart and the longest timeout is right.
const MAX_ACCUSED: usize = 1024;

/// One node's word that it could not reach another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Accusation {
    pub(crate) suspect: NodeId,
    pub(crate) generation: u64,
    pub(crate) incarnation: u16,
    pub(crate) by: NodeId,
    /// Part of a suspicion that stands, for everybody; otherwise only an answer to whoever asked for a probe.
    pub(crate) raised: bool,
}

impl Accusation {
    pub(crate) fn encode(&self) -> Vec<u8> {
        starling_protocol::encode(self)
    }
}

/// Accusers by suspect. The gossip library's broadcast handler and the driver share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Accusations(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    accused: HashMap<NodeId, Accused>,
    /// Highest generation that can be true.
    horizon: u64,
    /// Accusations of others that were passed on of late.
    passed_on: usize,
    /// Of whom there are new ones.
    changed: BTreeSet<NodeId>,
}

#[derive(Debug)]
struct Accused {
    generation: u64,
    incarnation: u16,
    by: Vec<NodeId>,
}

impl Accusations {
    /// Takes one; whether it was news. One about a later life or incarnation replaces what was there.
    pub(crate) fn record(&self, accusation: &Accusation) -> bool {
        let mut table = self.lock();
        if accusation.generation > table.horizon {
            return false;
        }
        if !table.accused.contains_key(&accusation.suspect) && table.accused.len() >= MAX_ACCUSED {
            return false;
        }
        let (generation, incarnation) = (accusation.generation, accusation.incarnation);
        let accused =
            table.accused.entry(accusation.suspect).or_insert(Accused { generation, incarnation, by: vec![] });
        if (generation, incarnation) < (accused.generation, accused.incarnation) {
            return false;
        }
        if (generation, incarnation) > (accused.generation, accused.incarnation) {
            *accused = Accused { generation, incarnation, by: vec![] };
        }
        if accused.by.len() >= MAX_ACCUSERS || accused.by.contains(&accusation.by) {
            return false;
        }
        accused.by.push(accusation.by);
        table.changed.insert(accusation.suspect);
        true
    }

    /// Who accuses that life at that incarnation.
    pub(crate) fn against(&self, suspect: &Ident, incarnation: u16) -> Vec<NodeId> {
        let table = self.lock();
        let fits = |a: &&Accused| (a.generation, a.incarnation) == (suspect.generation, incarnation);
        table.accused.get(&suspect.id).filter(fits).map(|a| a.by.clone()).unwrap_or_default()
    }

    /// Nothing of a later generation is believed.
    pub(crate) fn set_horizon(&self, generation: u64) {
        self.lock().horizon = generation;
    }

    fn may_pass_on(&self) -> bool {
        let mut table = self.lock();
        table.passed_on += 1;
        table.passed_on <= MAX_PASSED_ON
    }

    /// Whether any came since [`Accusations::take_changed`].
    pub(crate) fn has_changed(&self) -> bool {
        !self.lock().changed.is_empty()
    }

    /// Of whom there are new ones since the last time.
    pub(crate) fn take_changed(&self) -> BTreeSet<NodeId> {
        std::mem::take(&mut self.lock().changed)
    }

    /// Forgets accusations against members that `stands` does not name.
    pub(crate) fn retain(&self, stands: impl Fn(&NodeId) -> bool) {
        let mut table = self.lock();
        table.accused.retain(|id, _| stands(id));
        table.passed_on = 0;
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Replaces an earlier broadcast of the same accuser about the same suspect.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct AccusationKey {
    suspect: NodeId,
    by: NodeId,
}

impl Invalidates for AccusationKey {
    fn invalidates(&self, other: &Self) -> bool {
        self == other
    }
}

/// Bytes in a packet that are no accusation.
#[derive(Debug, thiserror::Error)]
#[error("not an accusation")]
pub(crate) struct NotAnAccusation;

impl BroadcastHandler<Ident> for Accusations {
    type Key = AccusationKey;
    type Error = NotAnAccusation;

    fn receive_item(&mut self, data: &[u8], sender: Option<&Ident>) -> Result<Option<AccusationKey>, NotAnAccusation> {
        let accusation: Accusation = starling_protocol::decode(data).map_err(|_| NotAnAccusation)?;
        if !accusation.raised && sender.is_some_and(|sender| sender.id != accusation.by) {
            return Err(NotAnAccusation);
        }
        let news = self.record(&accusation);
        // Our own to spread, or somebody else's that we had not heard.
        let spread = sender.is_none() || (news && accusation.raised && self.may_pass_on());
        Ok(spread.then_some(AccusationKey { suspect: accusation.suspect, by: accusation.by }))
    }
}

/// A suspicion of this node's own: others' are theirs to end.
#[derive(Debug)]
pub(crate) struct Suspicion {
    pub(crate) suspect: Ident,
    pub(crate) incarnation: u16,
    pub(crate) timer: Timer<Ident>,
    pub(crate) since: Instant,
    /// When the suspect was last asked over a stream.
    pub(crate) asked: Instant,
    /// When it turned out that it gave no answer.
    pub(crate) unanswered: Option<Instant>,
}

/// Limits of the time that a suspect has, and how many others there are who could confirm.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    pub(crate) min: Duration,
    pub(crate) max: Duration,
    pub(crate) witnesses: usize,
}

impl Suspicion {
    /// When the suspect is given up, with that many confirmations by others.
    pub(crate) fn deadline(&self, confirmations: usize, patience: Patience) -> Instant {
        let wanted = CONFIRMATIONS.min(patience.witnesses);
        let length = if confirmations >= wanted {
            patience.min
        } else if confirmations == 0 {
            // Others are there, and none of them says so: it may well be this node that hears nobody.
            patience.max * LONE
        } else {
            // max - (max - min) * log(c + 1) / log(k + 1), Lifeguard §IV-B.
            let share = (confirmations as f64 + 1.0).ln() / (wanted as f64 + 1.0).ln();
            patience.max - (patience.max - patience.min).mul_f64(share)
        };
        self.since + length
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accusation(by: u8, incarnation: u16) -> Accusation {
        Accusation { suspect: NodeId([9; 16]), generation: 1, incarnation, by: NodeId([by; 16]), raised: true }
    }

    fn suspect() -> Ident {
        Ident { id: NodeId([9; 16]), addr: ([127, 0, 0, 1], 7400).into(), generation: 1 }
    }

    #[test]
    fn accusers_count_once_and_end_with_a_refutation() {
        let accusations = Accusations::default();
        assert!(!accusations.record(&accusation(1, 0)), "of the future");
        accusations.set_horizon(1);
        assert!(accusations.record(&accusation(1, 0)) && accusations.record(&accusation(2, 0)));
        assert!(!accusations.record(&accusation(2, 0)));
        assert_eq!(accusations.against(&suspect(), 0).len(), 2);
        assert!(accusations.record(&accusation(3, 1)));
        assert_eq!(accusations.against(&suspect(), 0), []);
        assert_eq!(accusations.against(&suspect(), 1), [NodeId([3; 16])]);
        assert!(!accusations.record(&accusation(4, 0)));
    }

    #[test]
    fn a_node_cannot_answer_for_another_prober() {
        let mut accusations = Accusations::default();
        let liar = Ident { id: NodeId([7; 16]), ..suspect() };
        let nack = Accusation { raised: false, ..accusation(1, 0) };
        assert!(accusations.receive_item(&nack.encode(), Some(&liar)).is_err());
        assert!(accusations.receive_item(b"\xff", Some(&liar)).is_err());
        assert_eq!(accusations.against(&suspect(), 0), []);
    }

    #[test]
    fn confirmations_shorten_the_wait() {
        let since = Instant::now();
        let timer = Timer::RemoveDown(suspect());
        let suspicion = Suspicion { suspect: suspect(), incarnation: 0, timer, since, asked: since, unanswered: None };
        let second = Duration::from_secs(1);
        let patience = Patience { min: second, max: 3 * second, witnesses: 50 };
        let waits: Vec<_> = (0..5).map(|c| suspicion.deadline(c, patience) - since).collect();
        assert_eq!((waits[0], waits[3], waits[4]), (6 * second, second, second));
        assert!(waits[0] > waits[1] && waits[1] > waits[2] && waits[2] > waits[3], "{waits:?}");
        // With nobody who could confirm, our own word has to do.
        assert_eq!(suspicion.deadline(0, Patience { witnesses: 0, ..patience }) - since, second);
    }
}
