//! The newest verified record of each node.

use std::{collections::HashMap, sync::Arc};

use starling_protocol::{NodeId, NodeRecord, SignedRecord};

/// A record that was verified: what it says, and the bytes to pass on.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) record: NodeRecord,
    pub(crate) signed: SignedRecord,
}

/// Store of records by node. Bounded by the mesh's admission: only a node with a certificate can have one.
#[derive(Debug, Default)]
pub(crate) struct Records {
    by_node: HashMap<NodeId, Arc<Stored>>,
}

impl Records {
    pub(crate) fn get(&self, id: &NodeId) -> Option<&Arc<Stored>> {
        self.by_node.get(id)
    }

    /// Whether `record` would replace what is stored. Asked before the signature is checked, to save checking old news.
    pub(crate) fn is_news(&self, record: &NodeRecord) -> bool {
        self.by_node.get(&record.id).is_none_or(|stored| record.edition() > stored.record.edition())
    }

    pub(crate) fn put(&mut self, record: NodeRecord, signed: SignedRecord) {
        self.by_node.insert(record.id, Arc::new(Stored { record, signed }));
    }

    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&NodeId) -> bool) {
        self.by_node.retain(|id, _| keep(id));
    }

    pub(crate) fn signed(&self) -> Vec<SignedRecord> {
        self.by_node.values().map(|stored| stored.signed.clone()).collect()
    }
}
