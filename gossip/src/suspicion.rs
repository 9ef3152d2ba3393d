//! Who is accused by whom, and how long a suspect has to answer (Lifeguard §IV-B: suspicion that shrinks with independent
//! confirmations).

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};

use foca::{BroadcastHandler, Invalidates, Timer};
use starling_protocol::{NodeId, Word};

use crate::membership::Ident;

/// Confirmations from others that make a suspicion as short as it gets.
const CONFIRMATIONS: usize = 3;
/// How many times longer than the longest confirmed suspicion one lasts that nobody confirms.
const LONE: u32 = 2;
/// Accusers that are remembered of one suspect; more would change nothing.
const MAX_ACCUSERS: usize = CONFIRMATIONS + 1;
/// Suspects of whom accusers are remembered. Above, the mesh is falling apart and the longest timeout is right.
const MAX_ACCUSED: usize = 1024;

/// Signed accusations by suspect, and members' direct word that somebody is dead.
#[derive(Debug, Default)]
pub(crate) struct Accusations {
    accused: HashMap<NodeId, Accused>,
    /// Of whom there are new ones.
    changed: BTreeSet<NodeId>,
}

#[derive(Debug)]
struct Accused {
    generation: u64,
    incarnation: u16,
    words: Vec<Word>,
    /// Who holds that life for dead, and told so itself.
    claims: Vec<NodeId>,
    /// Since when it has been dead, by the latest time that anybody told.
    dead_since: Option<Instant>,
}

impl Accusations {
    /// Whether a word like it was taken already, or says too little to be worth a look at its signature.
    pub(crate) fn is_old(&self, word: &Word) -> bool {
        match self.accused.get(&word.subject) {
            Some(accused) => {
                let (said, known) = ((word.generation, word.incarnation), (accused.generation, accused.incarnation));
                said < known || (said == known && accused.words.iter().any(|known| known.by == word.by))
            }
            None => self.accused.len() >= MAX_ACCUSED,
        }
    }

    /// Takes one whose signature is right; whether it was news. One about a later life or incarnation replaces what was there,
    /// and one of somebody who `is_trusted` that of somebody who is not.
    pub(crate) fn record(&mut self, word: &Word, is_trusted: impl Fn(&NodeId) -> bool) -> bool {
        if self.is_old(word) {
            return false;
        }
        let accused = self.entry(word.subject, word.generation, word.incarnation);
        if accused.words.len() >= MAX_ACCUSERS {
            let untrusted = accused.words.iter().position(|known| !is_trusted(&known.by));
            let Some(at) = untrusted.filter(|_| is_trusted(&word.by)) else { return false };
            accused.words.swap_remove(at);
        }
        accused.words.push(word.clone());
        self.changed.insert(word.subject);
        true
    }

    /// A member says to this node that it holds that life for dead; whether that was news.
    pub(crate) fn claim(&mut self, by: NodeId, suspect: &Ident, incarnation: u16) -> bool {
        if !self.accused.contains_key(&suspect.id) && self.accused.len() >= MAX_ACCUSED {
            return false;
        }
        let accused = self.entry(suspect.id, suspect.generation, incarnation);
        let news = accused.claims.len() < MAX_ACCUSERS && !accused.claims.contains(&by);
        if news {
            accused.claims.push(by);
        }
        news
    }

    /// Somebody tells since when that life has been dead: counts if this node finds that it is.
    pub(crate) fn tell_age(&mut self, suspect: &Ident, since: Instant) {
        if let Some(accused) = self.accused.get_mut(&suspect.id).filter(|a| a.generation == suspect.generation) {
            accused.dead_since = accused.dead_since.max(Some(since));
        }
    }

    /// Since when that life has been dead, as was told.
    pub(crate) fn dead_since(&self, suspect: &Ident) -> Option<Instant> {
        self.accused.get(&suspect.id).filter(|a| a.generation == suspect.generation)?.dead_since
    }

    fn entry(&mut self, id: NodeId, generation: u64, incarnation: u16) -> &mut Accused {
        let new = || Accused { generation, incarnation, words: Vec::new(), claims: Vec::new(), dead_since: None };
        let accused = self.accused.entry(id).or_insert_with(new);
        if (generation, incarnation) > (accused.generation, accused.incarnation) {
            // Who holds a life for dead does so whatever it says of itself.
            let (claims, dead_since) = match generation == accused.generation {
                true => (std::mem::take(&mut accused.claims), accused.dead_since),
                false => (Vec::new(), None),
            };
            *accused = Accused { claims, dead_since, ..new() };
        }
        accused
    }

    fn accused(&self, suspect: &Ident, incarnation: u16) -> Option<&Accused> {
        let fits = |a: &&Accused| (a.generation, a.incarnation) == (suspect.generation, incarnation);
        self.accused.get(&suspect.id).filter(fits)
    }

    /// Signed accusations against that life at that incarnation.
    pub(crate) fn words(&self, suspect: &Ident, incarnation: u16) -> &[Word] {
        self.accused(suspect, incarnation).map_or(&[], |accused| &accused.words)
    }

    /// Who signed them.
    pub(crate) fn against(&self, suspect: &Ident, incarnation: u16) -> Vec<NodeId> {
        self.words(suspect, incarnation).iter().map(|word| word.by).collect()
    }

    /// Who told this node to hold that life for dead.
    pub(crate) fn claims(&self, suspect: &Ident) -> &[NodeId] {
        let fits = |a: &&Accused| a.generation == suspect.generation;
        self.accused.get(&suspect.id).filter(fits).map_or(&[], |accused| &accused.claims)
    }

    /// What was said against that member turned out to be wrong.
    pub(crate) fn dismiss(&mut self, suspect: &NodeId) {
        if self.accused.remove(suspect).is_some() {
            self.changed.insert(*suspect);
        }
    }

    /// Whether any came since [`Accusations::take_changed`].
    pub(crate) fn has_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Of whom there are new ones since the last time.
    pub(crate) fn take_changed(&mut self) -> BTreeSet<NodeId> {
        std::mem::take(&mut self.changed)
    }

    /// Forgets accusations against members that `stands` does not name.
    pub(crate) fn retain(&mut self, stands: impl Fn(&NodeId) -> bool) {
        self.accused.retain(|id, _| stands(id));
    }
}

/// The gossip library's side of words: the driver has verified each before it is given to it, and takes none out of packets
/// through it.
#[derive(Debug, Default)]
pub(crate) struct Words;

/// Replaces an earlier word of the same kind, by the same member, about the same one.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct WordKey {
    kind: u8,
    subject: NodeId,
    by: NodeId,
}

impl Invalidates for WordKey {
    fn invalidates(&self, other: &Self) -> bool {
        self == other
    }
}

/// Bytes in a packet that are no word.
#[derive(Debug, thiserror::Error)]
#[error("not a word")]
pub(crate) struct NoWord;

impl BroadcastHandler<Ident> for Words {
    type Key = WordKey;
    type Error = NoWord;

    fn receive_item(&mut self, data: &[u8], sender: Option<&Ident>) -> Result<Option<WordKey>, NoWord> {
        let Word { kind, subject, by, .. } = Word::decode(data).map_err(|_| NoWord)?;
        Ok(sender.is_none().then_some(WordKey { kind, subject, by }))
    }
}

/// A suspicion of this node's own. Each node comes to its own verdict: what others say makes it look, and no more.
#[derive(Debug)]
pub(crate) struct Suspicion {
    pub(crate) suspect: Ident,
    pub(crate) incarnation: u16,
    /// Ends it, if it began with a probe of this node's own and not with what others say.
    pub(crate) timer: Option<Timer<Ident>>,
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

    fn accusation(by: u8, incarnation: u16) -> Word {
        let (kind, subject, signature) = (Word::ACCUSES, NodeId([9; 16]), Vec::new());
        Word { kind, subject, generation: 1, incarnation, by: NodeId([by; 16]), raised: true, signature }
    }

    fn suspect() -> Ident {
        Ident { id: NodeId([9; 16]), addr: ([127, 0, 0, 1], 7400).into(), generation: 1 }
    }

    #[test]
    fn accusers_count_once_and_end_with_a_refutation() {
        let mut accusations = Accusations::default();
        let mut record = |word: Word| accusations.record(&word, |_| true);
        assert!(record(accusation(1, 0)) && record(accusation(2, 0)));
        assert!(!record(accusation(2, 0)));
        assert!(
            accusations.claim(NodeId([5; 16]), &suspect(), 0) && !accusations.claim(NodeId([5; 16]), &suspect(), 0)
        );
        assert_eq!(accusations.against(&suspect(), 0).len(), 2);
        assert!(accusations.record(&accusation(3, 1), |_| true));
        assert_eq!(accusations.against(&suspect(), 0), []);
        assert_eq!(accusations.against(&suspect(), 1), [NodeId([3; 16])]);
        assert_eq!(accusations.claims(&suspect()), [NodeId([5; 16])]);
        assert!(!accusations.record(&accusation(4, 0), |_| true));
        accusations.dismiss(&suspect().id);
        assert_eq!(accusations.against(&suspect(), 1), []);
    }

    #[test]
    fn those_who_cry_wolf_do_not_keep_others_from_being_heard() {
        let mut accusations = Accusations::default();
        let trusts = |id: &NodeId| id.0[0] > 10;
        (1..=5).for_each(|by| assert_eq!(accusations.record(&accusation(by, 0), trusts), by < 5));
        assert_eq!(accusations.against(&suspect(), 0).len(), MAX_ACCUSERS);
        (11..=14).for_each(|by| assert!(accusations.record(&accusation(by, 0), trusts)));
        assert!(!accusations.record(&accusation(15, 0), trusts));
        assert!(accusations.against(&suspect(), 0).iter().all(trusts));
    }

    #[test]
    fn confirmations_shorten_the_wait() {
        let since = Instant::now();
        let timer = None;
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
