//! What must hold at every step, whatever happens to the network.

use std::{collections::HashMap, sync::Arc};

use starling_gossip::{Outgoing, Snapshot};
use starling_protocol::{MemberHealth, Name, NodeId, NodeRecord};

use crate::{
    view::{Seen, View},
    world::{Truth, index_of},
};

/// What one observer has seen so far, to compare the next with.
#[derive(Debug, Default)]
pub(crate) struct Observer {
    pub(crate) view: View,
    /// Whether it has rejoined since: what it saw before is void. What it agreed to is not.
    anew: bool,
    documents: HashMap<Name, u64>,
}

impl Observer {
    /// The observer has rejoined.
    pub(crate) fn begin_anew(&mut self) {
        self.anew = true;
    }
}

/// How often observers showed a member going down or coming up, by (observer, subject).
#[derive(Debug, Default)]
pub(crate) struct Transitions(pub(crate) HashMap<(usize, usize), u32>);

#[derive(Debug, Default)]
pub(crate) struct Invariants {
    records: HashMap<(NodeId, u64, u64), Arc<NodeRecord>>,
    pub(crate) transitions: Transitions,
    /// Members shown as down that had given no cause for it: who saw whom, and when.
    pub(crate) false_downs: Vec<String>,
    /// Members shown as suspect that had given no cause for it.
    pub(crate) false_suspects: Vec<String>,
    pub(crate) checked: u64,
}

impl Invariants {
    /// A new snapshot of `who`.
    pub(crate) fn snapshot(&mut self, who: usize, observer: &mut Observer, snapshot: &Snapshot, truth: &Truth) {
        self.checked += 1;
        assert!(snapshot.members.len() <= truth.introduced, "{who} sees {} members", snapshot.members.len());
        let view = View::new(snapshot, truth.introduced);
        let anew = std::mem::take(&mut observer.anew);
        for member in snapshot.members.iter().filter(|m| !m.is_self) {
            let subject = index_of(&member.id);
            let seen = view.get(subject).expect("it is shown");
            let before = observer.view.get(subject).filter(|_| !anew);
            if let Some(before) = before {
                let order = |s: &Seen| (s.generation, s.incarnation);
                // A death is told with the incarnation of the suspicion that led to it, which may be an old one.
                let went_back = order(&seen) < order(&before)
                    && !(seen.generation == before.generation && seen.health == MemberHealth::Down);
                assert!(!went_back, "{who} sees {subject} go back: {before:?} then {seen:?}");
                let risen = before.health == MemberHealth::Down && seen.health != MemberHealth::Down;
                assert!(
                    !risen || order(&seen) > order(&before),
                    "{who} sees {subject} rise from the dead: {before:?} then {seen:?}"
                );
                let down = |s: &Seen| s.health == MemberHealth::Down;
                if down(&before) != down(&seen) {
                    *self.transitions.0.entry((who, subject)).or_default() += 1;
                }
            }
            let turned = before.is_none_or(|before| before.health != seen.health);
            let excused =
                truth.is_excused(who) || truth.is_excused(subject) || truth.generation[subject] > seen.generation;
            if turned && !excused {
                let what = || format!("{who} sees {subject} at {:?}, by {:?}", truth.now, member.suspected_by);
                match seen.health {
                    MemberHealth::Down => self.false_downs.push(what()),
                    MemberHealth::Suspect => self.false_suspects.push(what()),
                    MemberHealth::Alive => {}
                }
            }
            if let Some(record) = &member.record {
                assert_ne!(record.zone, "forged", "{who} shows a forged record");
                assert_eq!(record.id, member.id);
                let number = (record.id, record.generation, record.seq);
                let known = self.records.entry(number).or_insert_with(|| record.clone());
                let same = Arc::ptr_eq(known, record) || known == record;
                assert!(same, "two records of {subject} with one number");
            }
        }
        observer.view = view;
    }

    /// What a node wants done besides.
    pub(crate) fn outgoing(
        &mut self,
        who: usize,
        observer: &mut Observer,
        outgoing: &Outgoing,
        nodes: usize,
        backlog: u64,
    ) {
        match outgoing {
            Outgoing::Datagram { bytes, .. } => assert!(bytes.len() <= 1150, "{who} sends {} bytes", bytes.len()),
            Outgoing::Document(view) => {
                assert_ne!(&view.document.content[..], b"forged", "{who} takes a forged document");
                let before = observer.documents.insert(view.document.kind.clone(), view.document.version);
                assert!(before <= Some(view.document.version), "{who} takes an older document");
            }
            _ => {}
        }
        assert!(backlog <= 8 * nodes as u64 + 64, "{who} has {backlog} updates waiting");
    }
}
