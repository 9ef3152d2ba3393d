use std::{net::SocketAddr, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{DocumentHash, Name, NodeId, SignedDocument, SignedRecord};

/// Longest frame on a gossip stream, in bytes: the records of about ten thousand nodes.
pub const MAX_GOSSIP_FRAME_BYTES: usize = 16 << 20;
/// Longest first frame of a gossip stream that is no exchange, in bytes: a push of a few changes and a document.
pub const MAX_PUSH_BYTES: usize = 1 << 20;
/// Bytes in front of each SWIM packet: the sender's root hash, big-endian.
pub const ROOT_HASH_BYTES: usize = 8;

/// First frame from the side that opened a gossip stream.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum GossipRequest {
    /// One-way: what changed.
    Push(Items),
    /// Push-pull. Answered by a [`Delta`]; then the opener sends the [`Items`] that the answer wants, as the last frame.
    Sync(Summary),
    /// Asks for a sign of life over a reliable stream; answered by a [`Pong`]. Whoever suspects the answering node says at
    /// which incarnation, so that it can refute at once.
    Ping {
        /// Incarnation at which the answering node is suspected, if it is.
        suspected: Option<u16>,
    },
    /// Asks how the answering node sees the mesh; answered by a [`View`].
    Inspect,
}

/// A sign of life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// Present life of the answering node.
    pub generation: u64,
    /// Present incarnation, after the refutation if it was suspected.
    pub incarnation: u16,
}

/// Signed things on their way, and members that an operator struck off.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Items {
    /// Node records.
    pub records: Vec<Arc<SignedRecord>>,
    /// Mesh documents.
    pub documents: Vec<Arc<SignedDocument>>,
    /// Members struck off.
    pub forgotten: Vec<Forgotten>,
}

impl Items {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty() && self.documents.is_empty() && self.forgotten.is_empty()
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
        let forgotten = std::mem::take(&mut self.forgotten);
        let documents = self.documents.drain(..documents).collect();
        let records = self.records.drain(..records).collect();
        Self { records, documents, forgotten }
    }

    /// Adds what is in `other`.
    pub fn append(&mut self, mut other: Self) {
        self.records.append(&mut other.records);
        self.documents.append(&mut other.documents);
        self.forgotten.append(&mut other.forgotten);
    }
}

/// A dead member that an operator gave up for good. Holds for that life of it and those before; a later life is a member
/// like any other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Forgotten {
    /// Who.
    pub id: NodeId,
    /// Up to which life.
    pub generation: u64,
    /// Not even shown any more; otherwise shown as left.
    pub prune: bool,
}

/// What a node knows, without the signed bytes.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Summary {
    /// Membership, the sender included.
    pub members: Vec<MemberState>,
    /// Which edition of each node's record it has.
    pub records: Vec<RecordEdition>,
    /// Which edition of each mesh document it has.
    pub documents: Vec<DocumentEdition>,
    /// Members struck off.
    pub forgotten: Vec<Forgotten>,
    /// How good the sender's view is: whether it hears other members, and how many it holds for alive. Of two that hold each
    /// other for dead, the one with the lower standing concedes.
    pub standing: u32,
}

/// Answer to a [`Summary`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Delta {
    /// Membership, the answering node included.
    pub members: Vec<MemberState>,
    /// What the asking node lacked.
    pub items: Items,
    /// Records that the answering node wants.
    pub wanted_records: Vec<NodeId>,
    /// Documents that it wants, by kind.
    pub wanted_documents: Vec<Name>,
    /// For how long the answering node has been hearing the asking one while it believed it dead, in milliseconds: the
    /// asking node could speak and not hear. 0 if it believes it alive.
    pub deaf_ms: u64,
    /// As [`Summary::standing`], of the answering node.
    pub standing: u32,
}

/// Edition of a node's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordEdition {
    /// Whose.
    pub id: NodeId,
    /// Which life.
    pub generation: u64,
    /// Which edition within it.
    pub seq: u64,
}

/// Edition of a mesh document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentEdition {
    /// Which document.
    pub kind: Name,
    /// Which version.
    pub version: u64,
    /// Of its body.
    pub hash: DocumentHash,
}

/// How one node sees the mesh.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct View {
    /// Members, itself included.
    pub members: Vec<Sight>,
    /// Documents.
    pub documents: Vec<DocumentSight>,
}

/// A member in somebody's view.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sight {
    /// Who.
    pub id: NodeId,
    /// Which life.
    pub generation: u64,
    /// How it is, as that node shows it.
    pub status: crate::admin::MemberStatus,
}

/// A mesh document in somebody's view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentSight {
    /// Which edition it has.
    pub edition: DocumentEdition,
    /// Whether it is in force there.
    pub state: DocumentState,
}

/// What a node does with the newest edition of a document that it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DocumentState {
    /// Follows it.
    Active,
    /// Its time has not come.
    Pending,
    /// Its time is over.
    Expired,
    /// It is a tombstone: the document was deleted.
    Deleted,
    /// The node died soon after it came into force, and leaves it alone.
    Quarantined,
    /// Its reader on that node does not understand it; the one before stays in force.
    Refused,
}

/// One member as SWIM sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberState {
    /// Who.
    pub id: NodeId,
    /// Where its mesh port answers.
    pub addr: SocketAddr,
    /// Which life of it: higher after each restart or rejoin.
    pub generation: u64,
    /// Which refutation within that life.
    pub incarnation: u16,
    /// How it is.
    pub health: MemberHealth,
    /// For how long it has been down, in seconds; 0 while it is not.
    pub down_s: u32,
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
