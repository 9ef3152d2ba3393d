use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::{NodeId, SignedRecord};

/// Longest frame on a gossip stream, in bytes: the full state of about ten thousand nodes.
pub const MAX_GOSSIP_FRAME_BYTES: usize = 16 << 20;

/// First and only frame from the side that opened a gossip stream.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum GossipRequest {
    /// One-way: records that changed.
    Push(Vec<SignedRecord>),
    /// Push-pull: the opener's full state; answered by one frame with the other side's [`FullState`].
    Sync(FullState),
}

/// All that a node knows of the mesh.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct FullState {
    /// Membership, the sender included.
    pub members: Vec<MemberState>,
    /// The newest record of each node that has one.
    pub records: Vec<SignedRecord>,
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
