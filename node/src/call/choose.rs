//! Choosing an instance: what this node has experienced with peers, and who gets the next call.

mod experience;
mod known;
mod pick;
#[cfg(test)]
mod simulation;

pub(crate) use self::{
    experience::{Experience, PendingCall, Reach, Seen},
    known::{KnownPeer, KnownPeers},
    pick::{Candidate, Wish, has_another, pick},
};
