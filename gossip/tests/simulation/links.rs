//! Who has a connection to whom. One of a pair can have let go of a connection that the other still sends over.

use std::collections::BTreeMap;

/// The links of all nodes, by node and peer, with the number of the connection.
#[derive(Debug)]
pub(crate) struct Links {
    of: Vec<BTreeMap<usize, u64>>,
    opened: u64,
}

impl Links {
    pub(crate) fn new(nodes: usize) -> Self {
        Self { of: vec![BTreeMap::new(); nodes], opened: 0 }
    }

    pub(crate) fn has(&self, node: usize, peer: usize) -> bool {
        self.of[node].contains_key(&peer)
    }

    /// The node's peers.
    pub(crate) fn of(&self, node: usize) -> impl Iterator<Item = usize> {
        self.of[node].keys().copied()
    }

    /// A new connection takes the place of whatever either had.
    pub(crate) fn open(&mut self, node: usize, peer: usize) {
        self.opened += 1;
        self.of[node].insert(peer, self.opened);
        self.of[peer].insert(node, self.opened);
    }

    /// The node sends no more over its connection, and gets the number of it to [close](Links::close) it later.
    pub(crate) fn let_go(&mut self, node: usize, peer: usize) -> Option<u64> {
        self.of[node].remove(&peer)
    }

    /// That connection ends for the peer, unless it has got another by now.
    pub(crate) fn close(&mut self, node: usize, peer: usize, number: u64) {
        if self.of[peer].get(&node) == Some(&number) {
            self.of[peer].remove(&node);
        }
    }

    /// All that the node had ends: its port resets what was open to its former life.
    pub(crate) fn reset(&mut self, node: usize) {
        for peer in std::mem::take(&mut self.of[node]).into_keys() {
            self.of[peer].remove(&node);
        }
        // A peer may still send over one that the node had let go of.
        for links in &mut self.of {
            links.remove(&node);
        }
    }
}
