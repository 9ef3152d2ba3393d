//! The newest verified record of each node.

use std::{collections::BTreeMap, sync::Arc};

use starling_protocol::{NodeId, NodeRecord, RecordEdition, SignedRecord};

use crate::{Ident, Instance};

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

    /// The member by its record.
    pub(crate) fn life(&self, id: &NodeId) -> Option<Ident> {
        self.get(id).map(|record| Ident { id: record.id, addr: record.addr, generation: record.generation })
    }

    pub(crate) fn edition(&self, id: &NodeId) -> Option<RecordEdition> {
        self.get(id).map(|record| edition_of(record))
    }

    pub(crate) fn len(&self) -> usize {
        self.by_node.len()
    }

    pub(crate) fn signed(&self, id: &NodeId) -> Option<&Arc<SignedRecord>> {
        self.by_node.get(id).map(|stored| &stored.signed)
    }

    /// Services of the node that can be called if it is alive and its record says `up`.
    pub(crate) fn instances(&self, id: &NodeId) -> &[Arc<Instance>] {
        self.by_node.get(id).map_or(&[], |stored| &stored.instances)
    }

    pub(crate) fn put(&mut self, record: Arc<NodeRecord>, signed: Arc<SignedRecord>) {
        self.root ^= edition_of(&record).hash();
        let instances = Instance::all_of(&record).collect();
        let stored = Stored { record, signed, instances };
        if let Some(old) = self.by_node.insert(stored.record.id, stored) {
            self.root ^= edition_of(&old.record).hash();
        }
    }

    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&NodeId) -> bool) {
        let root = &mut self.root;
        self.by_node.retain(|id, stored| {
            let keeps = keep(id);
            if !keeps {
                *root ^= edition_of(&stored.record).hash();
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
