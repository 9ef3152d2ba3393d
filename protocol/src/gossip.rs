use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{
    DocumentEdition, DocumentState, Name, NodeId, SignedDocument, SignedRecord, SignedStrike,
    admin::MemberStatus,
    frame::kinds,
    wire::{Message, Unknown, Value, WireError, fixed, message, nested, once, put_fixed, put_message, read_fixed},
};

/// Longest frame on a gossip stream, in bytes: the records of about ten thousand nodes.
pub const MAX_GOSSIP_FRAME_BYTES: usize = 16 << 20;
/// Longest first frame of a gossip stream that is no exchange, in bytes: a push of a few changes and a document.
pub const MAX_PUSH_BYTES: usize = 1 << 20;

// First frames, from the side that opened a gossip stream: `Items`, one-way, what changed; `Summary`, the beginning of a
// push-pull, answered by a `Delta`, after which the opener sends the `Items` that the answer wants, as the last frame;
// `Ping`, answered by a `Pong`; `Inspect`, answered by a `View`; `DialBack`, answered by a `DialledBack`.
kinds!(1 Items, 2 Summary, 3 Delta, 4 Ping, 5 Pong, 6 Inspect, 7 View, 8 DialBack, 9 DialledBack);

/// Asks for a sign of life over a reliable stream. Whoever suspects the answering node says at which incarnation, so that it
/// can refute at once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ping {
    /// Incarnation at which the answering node is suspected, if it is.
    pub suspected: Option<u16>,
}
message!(Ping { 1 suspected });

/// A sign of life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// Present life of the answering node.
    pub generation: u64,
    /// Present incarnation, after the refutation if it was suspected.
    pub incarnation: u16,
}
message!(Pong { 1 generation, 2 incarnation });

/// Asks how the answering node sees the mesh.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inspect {}
message!(Inspect {});

/// Asks the answering node to dial the asking one at the address in its record: a connection that it made itself shows nobody
/// that it can be reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DialBack {}
message!(DialBack {});

/// How that went.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DialledBack {
    /// Why it is not reached there; `None` if it is.
    pub why: Option<String>,
}
message!(DialledBack { 1 why });

/// Signed things on their way. Each proves itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Items {
    /// Node records.
    pub records: Vec<Arc<SignedRecord>>,
    /// Mesh documents.
    pub documents: Vec<Arc<SignedDocument>>,
    /// Members struck off.
    pub strikes: Vec<Arc<SignedStrike>>,
    /// Members' words about their own incarnations.
    pub words: Vec<Word>,
}
message!(Items { 1 records, 2 documents, 3 strikes, 4 words });
nested!(Items);

impl Items {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty() && self.documents.is_empty() && self.strikes.is_empty() && self.words.is_empty()
    }

    /// Takes out as much as fits into that many bytes, and at least one item.
    pub fn take_within(&mut self, bytes: usize) -> Self {
        let mut left = bytes;
        let mut fits = |size: usize| {
            let fits = left >= size || left == bytes;
            left = left.saturating_sub(size);
            fits
        };
        let documents = self.documents.iter().take_while(|d| fits(d.encoded_len())).count();
        let records = self.records.iter().take_while(|r| fits(r.encoded_len())).count();
        let strikes = self.strikes.iter().take_while(|s| fits(s.encoded_len())).count();
        let words = std::mem::take(&mut self.words);
        let documents = self.documents.drain(..documents).collect();
        let records = self.records.drain(..records).collect();
        let strikes = self.strikes.drain(..strikes).collect();
        Self { records, documents, strikes, words }
    }

    /// Adds what is in `other`.
    pub fn append(&mut self, mut other: Self) {
        self.records.append(&mut other.records);
        self.documents.append(&mut other.documents);
        self.strikes.append(&mut other.strikes);
        self.words.append(&mut other.words);
    }
}

/// What a member says about an incarnation, its own or another's, and signs: nobody else can say it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Word {
    /// What it says: [`Word::ACCUSES`] or [`Word::LIVES`]; others are for later versions.
    pub kind: u8,
    /// Of whom.
    pub subject: NodeId,
    /// Which life of it.
    pub generation: u64,
    /// Which incarnation.
    pub incarnation: u16,
    /// Who says it.
    pub by: NodeId,
    /// An accusation that is part of a suspicion, and for everybody; otherwise only an answer to whoever asked for a probe.
    /// Not signed: it says what is to be done with the word, not what it means.
    pub raised: bool,
    /// By the key of `by`, over [`Word::signed_bytes`].
    pub signature: Vec<u8>,
}
fixed!(Word);

impl Word {
    /// "I could not reach it."
    pub const ACCUSES: u8 = 1;
    /// "I live, at this incarnation." Only of oneself.
    pub const LIVES: u8 = 2;
    /// Longest encoding, in bytes.
    pub const MAX_BYTES: usize = 160;

    /// The bytes that are signed.
    pub fn signed_bytes(&self) -> Vec<u8> {
        let mut out = b"starling word v1\0".to_vec();
        out.push(self.kind);
        out.extend_from_slice(&self.subject.0);
        out.extend_from_slice(&self.generation.to_be_bytes());
        out.extend_from_slice(&self.incarnation.to_be_bytes());
        out.extend_from_slice(&self.by.0);
        out
    }

    /// Its encoding by itself.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).expect("a word is encodable")
    }

    /// Reads one; what follows is ignored. Says nothing about who signed it.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        read_fixed(bytes)
    }
}

/// What a node knows, without the signed bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Membership, the sender included, and which edition of each member's record it has.
    pub members: Vec<MemberState>,
    /// Which edition of each mesh document it has.
    pub documents: Vec<DocumentEdition>,
    /// Members struck off, by life.
    pub strikes: Vec<StrikeEdition>,
    /// How good the sender's view is: whether it hears other members, and how many it holds for alive. Of two that hold each
    /// other for dead, the one with the lower standing concedes.
    pub standing: u32,
    /// That the sender, whom the receiver holds for dead, has asked others and is not.
    pub appeals: bool,
}
message!(Summary { 1 members, 2 documents, 3 strikes, 4 standing, 5 appeals });

/// Which strike a node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StrikeEdition {
    /// Who was struck off.
    pub id: NodeId,
    /// Up to which life.
    pub generation: u64,
    /// Whether it is not even shown.
    pub prune: bool,
}
fixed!(StrikeEdition);

/// Answer to a [`Summary`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Delta {
    /// Membership, the answering node included.
    pub members: Vec<MemberState>,
    /// What the asking node lacked.
    pub items: Items,
    /// Records that the answering node wants.
    pub wanted_records: Vec<NodeId>,
    /// Documents that it wants, by kind.
    pub wanted_documents: Vec<Name>,
    /// Strikes that it wants, by member.
    pub wanted_strikes: Vec<NodeId>,
    /// Members of whose present incarnation it has no word.
    pub wanted_words: Vec<NodeId>,
    /// For how long the answering node has been hearing the asking one while it believed it dead, in milliseconds: the
    /// asking node could speak and not hear. 0 if it believes it alive.
    pub deaf_ms: u64,
    /// As [`Summary::standing`], of the answering node.
    pub standing: u32,
}
message!(Delta {
    1 members, 2 items, 3 wanted_records, 4 wanted_documents, 5 wanted_strikes, 6 wanted_words, 7 deaf_ms, 8 standing,
});

/// How one node sees the mesh.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    /// Members, itself included.
    pub members: Vec<Sight>,
    /// Documents.
    pub documents: Vec<DocumentSight>,
}
message!(View { 1 members, 2 documents });

/// A member in somebody's view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sight {
    /// Who.
    pub id: NodeId,
    /// Which life.
    pub generation: u64,
    /// How it is, as that node shows it.
    pub status: MemberStatus,
}
message!(Sight { 1 id, 2 generation, 3 status });
nested!(Sight);

/// A mesh document in somebody's view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DocumentSight {
    /// Which edition it has.
    pub edition: DocumentEdition,
    /// Whether it is in force there.
    pub state: DocumentState,
}
message!(DocumentSight { 1 edition, 2 state });
nested!(DocumentSight);

/// One member as SWIM sees it. Its address is in its record, and nowhere else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberState {
    /// Who.
    pub id: NodeId,
    /// Which life of it: higher after each restart or rejoin.
    pub generation: u64,
    /// Which edition of its record the sender has, within that life.
    pub seq: u64,
    /// Which refutation within that life.
    pub incarnation: u16,
    /// How it is.
    pub health: MemberHealth,
    /// For how long it has been down, in seconds; 0 while it is not.
    pub down_s: u32,
}
message!(MemberState { 1 id, 2 generation, 3 seq, 4 incarnation, 5 health, 6 down_s });

/// One whose health this version does not know is left out.
impl Value for MemberState {
    fn put(&self, tag: u64, out: &mut Vec<u8>) {
        put_message(self, tag, out);
    }
    fn take(slot: &mut Option<Self>, value: &[u8], unknown: Unknown) -> Result<(), WireError> {
        match Self::read(value, unknown) {
            Err(WireError::NotUnderstood(_)) => Ok(()),
            read => once(slot, read?),
        }
    }
}

/// SWIM's states (Das, Gupta, Motivala 2002, §4.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MemberHealth {
    /// Answers probes.
    Alive,
    /// Missed a probe and has not refuted it yet; still used.
    Suspect,
    /// Declared dead by the mesh.
    Down,
}

impl MemberHealth {
    /// Its number on the wire.
    pub fn number(self) -> u8 {
        self as u8
    }

    /// The state of that number; `None` if this version knows none.
    pub fn of(number: u8) -> Option<Self> {
        [Self::Alive, Self::Suspect, Self::Down].get(usize::from(number)).copied()
    }
}

impl Value for MemberHealth {
    fn put(&self, tag: u64, out: &mut Vec<u8>) {
        put_fixed(&self.number(), tag, out);
    }
    fn take(slot: &mut Option<Self>, value: &[u8], _: Unknown) -> Result<(), WireError> {
        let number: u8 = read_fixed(value)?;
        once(slot, Self::of(number).ok_or(WireError::NotUnderstood(number.into()))?)
    }
    fn absent() -> Option<Self> {
        Some(Self::Alive)
    }
    fn is_absent(&self) -> bool {
        *self == Self::Alive
    }
}

impl Value for NodeId {
    fn put(&self, tag: u64, out: &mut Vec<u8>) {
        self.0.put(tag, out);
    }
    fn take(slot: &mut Option<Self>, value: &[u8], _: Unknown) -> Result<(), WireError> {
        once(slot, Self(read_fixed(value)?))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{decode, encode};

    #[test]
    fn a_member_in_a_state_of_later_versions_is_left_out_and_the_others_stay() {
        let member = |n: u8, health| MemberState {
            id: NodeId([n; 16]),
            generation: 7,
            seq: 2,
            incarnation: 0,
            health,
            down_s: 0,
        };
        let summary = Summary {
            members: vec![member(1, MemberHealth::Alive), member(2, MemberHealth::Down)],
            standing: 9,
            ..Summary::default()
        };
        let bytes = encode(&summary);
        assert_eq!(decode::<Summary>(&bytes), Ok(summary.clone()));
        let mut later = bytes;
        let at = later.windows(3).position(|w| w == [5 << 1, 1, 2]).expect("its health") + 2;
        later[at] = 9;
        assert_eq!(decode::<Summary>(&later).unwrap().members, summary.members[..1]);
    }

    #[test]
    fn a_word_is_short_and_its_use_is_not_signed() {
        let word = Word {
            kind: Word::ACCUSES,
            subject: NodeId([1; 16]),
            generation: u64::MAX,
            incarnation: u16::MAX,
            by: NodeId([2; 16]),
            raised: true,
            signature: vec![0; 72],
        };
        assert!(word.encode().len() <= Word::MAX_BYTES);
        assert_eq!(Word::decode(&[&word.encode()[..], b"more"].concat()), Ok(word.clone()));
        assert_eq!(Word { raised: false, ..word.clone() }.signed_bytes(), word.signed_bytes());
        assert_ne!(Word { kind: Word::LIVES, ..word.clone() }.signed_bytes(), word.signed_bytes());
    }

    #[test]
    fn items_are_taken_in_parts() {
        let record = |n: u8| {
            let (body, signature) = (Bytes::from(vec![n; 100]), Bytes::new());
            Arc::new(SignedRecord { body, signature, chain: Vec::new() })
        };
        let mut items = Items { records: (0..5).map(record).collect(), ..Items::default() };
        assert_eq!(items.take_within(250).records.len(), 2);
        assert_eq!(items.take_within(10).records.len(), 1, "at least one");
        assert_eq!(items.records.len(), 2);
    }
}
