//! The newest verified record of each node.

use std::{collections::BTreeMap, sync::Arc};

use sha2::{Digest, Sha256};
use starling_protocol::{NodeId, NodeRecord, RecordEdition, SignedRecord};

use crate::Instance;

/// A record that was verified.
#[derive(Debug)]
struct Stored {
    /// What it says.
    record: Arc<NodeRecord>,
    /// The bytes to pass on.
    signed: Arc<SignedRecord>,
    /// What can be called by it, made once for all snapshots.
    instances: Box<[Arc<Instance>]>,
}

/// Store of records by node. Bounded by the mesh's admission: only a node with a certificate can have one.
#[derive(Debug, Default)]
pub(crate) struct Records {
    by_node: BTreeMap<NodeId, Stored>,
    root: u64,
}

impl Records {
    pub(crate) fn get(&self, id: &NodeId) -> Option<&Arc<NodeRecord>> {
        self.by_node.get(id).map(|stored| &stored.record)
    }

    pub(crate) fn signed(&self, id: &NodeId) -> Option<&Arc<SignedRecord>> {
        self.by_node.get(id).map(|stored| &stored.signed)
    }

    /// Services of the node that can be called if it is alive and its record says `up`.
    pub(crate) fn instances(&self, id: &NodeId) -> &[Arc<Instance>] {
        self.by_node.get(id).map_or(&[], |stored| &stored.instances)
    }

    pub(crate) fn put(&mut self, record: Arc<NodeRecord>, signed: Arc<SignedRecord>) {
        self.root ^= hash_of(&edition_of(&record));
        let instances = Instance::all_of(&record).collect();
        let stored = Stored { record, signed, instances };
        if let Some(old) = self.by_node.insert(stored.record.id, stored) {
            self.root ^= hash_of(&edition_of(&old.record));
        }
    }

    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&NodeId) -> bool) {
        let root = &mut self.root;
        self.by_node.retain(|id, stored| {
            let keeps = keep(id);
            if !keeps {
                *root ^= hash_of(&edition_of(&stored.record));
            }
            keeps
        });
    }

    /// Hash of all editions; the same for the same set.
    pub(crate) fn root(&self) -> u64 {
        self.root
    }

    pub(crate) fn editions(&self) -> impl Iterator<Item = RecordEdition> + '_ {
        self.by_node.values().map(|stored| edition_of(&stored.record))
    }
}

fn edition_of(record: &NodeRecord) -> RecordEdition {
    RecordEdition { id: record.id, generation: record.generation, seq: record.seq }
}

/// The first eight bytes of a SHA-256, so that all builds of all nodes agree.
pub(crate) fn hash_of(value: &impl serde::Serialize) -> u64 {
    let digest = Sha256::digest(starling_protocol::encode(value));
    u64::from_be_bytes(digest[..8].try_into().expect("SHA-256 has 32 bytes"))
}
