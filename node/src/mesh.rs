//! What gossip needs of the world: links to other members, questions to all of them, documents on disk.

pub(crate) mod announced;
pub(crate) mod documents;
pub(crate) mod fleet;
pub(crate) mod links;
pub(crate) mod reachability;
pub(crate) mod survey;
