//! Members that may have changed since they were last looked at.

use std::collections::BTreeSet;

use starling_protocol::NodeId;

/// Above so many, all are looked at.
const MAX_TOUCHED: usize = 256;

/// A set of members; looking at these alone is what makes a change cost no more in a large mesh.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Touched {
    everybody: bool,
    ids: BTreeSet<NodeId>,
}

impl Touched {
    pub(crate) fn add(&mut self, id: NodeId) {
        if !self.everybody {
            self.ids.insert(id);
            if self.ids.len() > MAX_TOUCHED {
                self.add_everybody();
            }
        }
    }

    pub(crate) fn add_all(&mut self, ids: impl IntoIterator<Item = NodeId>) {
        ids.into_iter().for_each(|id| self.add(id));
    }

    pub(crate) fn add_everybody(&mut self) {
        self.everybody = true;
        self.ids.clear();
    }

    pub(crate) fn is_empty(&self) -> bool {
        !self.everybody && self.ids.is_empty()
    }

    pub(crate) fn has(&self, id: &NodeId) -> bool {
        self.everybody || self.ids.contains(id)
    }

    /// All of them by id; `None` if they are everybody.
    pub(crate) fn ids(&self) -> Option<&BTreeSet<NodeId>> {
        (!self.everybody).then_some(&self.ids)
    }
}
