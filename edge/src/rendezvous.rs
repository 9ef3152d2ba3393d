//! Who of all edges looks after something: the one with the highest score, which all find out alike without asking (rendezvous
//! hashing: Thaler, Ravishankar, "A name-based mapping scheme for rendezvous", 1996). When one dies or comes, only what it looks
//! after goes to others.

use sha2::{Digest, Sha256};
use starling_protocol::NodeId;

/// How an edge stands with something of that name; the highest looks after it.
pub(crate) fn score(name: &str, edge: &NodeId) -> [u8; 32] {
    Sha256::new().chain_update(name).chain_update([0]).chain_update(edge.to_string()).finalize().into()
}
