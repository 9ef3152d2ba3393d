//! What each peer has here, over all of its connections: a node with several workers has one from each of them.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, Weak, atomic::AtomicUsize},
};

use starling_protocol::NodeId;

/// Calls of one peer at once, whatever number of connections they come on: as many as one of them may carry.
pub(super) const MAX_IN_FLIGHT: usize = 4096;

/// Tunnels of one peer at once: they are many and idle, so that they have places of their own, and leave calls theirs.
pub(super) const MAX_TUNNELS: usize = 16_384;

/// All peers that are connected, to any worker.
#[derive(Debug, Default)]
pub(super) struct Peers(Mutex<HashMap<NodeId, Weak<Here>>>);

/// One of them.
#[derive(Debug, Default)]
pub(super) struct Here {
    /// The numbers of its connections.
    connections: Mutex<BTreeSet<usize>>,
    pub(super) in_flight: AtomicUsize,
    pub(super) tunnels: AtomicUsize,
}

/// A connection of a peer, counted until it is dropped.
#[derive(Debug)]
pub(super) struct Connected {
    here: Arc<Here>,
    /// Which of its connections it is, from 1: the lowest number that no other one has.
    pub(super) nth: usize,
}

impl Peers {
    /// Counts a connection of a peer.
    pub(super) fn connect(&self, id: NodeId) -> Connected {
        let mut peers = self.lock();
        let here = match peers.get(&id).and_then(Weak::upgrade) {
            Some(here) => here,
            None => {
                peers.retain(|_, here| here.strong_count() > 0);
                let here = Arc::<Here>::default();
                peers.insert(id, Arc::downgrade(&here));
                here
            }
        };
        let nth = {
            let mut connections = lock(&here.connections);
            let nth = (1..).find(|nth| !connections.contains(nth)).expect("there are fewer connections than numbers");
            connections.insert(nth);
            nth
        };
        Connected { here, nth }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NodeId, Weak<Here>>> {
        lock(&self.0)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Connected {
    /// What the peer has here.
    pub(super) fn peer(&self) -> Arc<Here> {
        self.here.clone()
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        lock(&self.here.connections).remove(&self.nth);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    #[test]
    fn connections_of_a_peer_are_counted_together() {
        let peers = Peers::default();
        let (a, b) = (NodeId([1; 16]), NodeId([2; 16]));
        let (first, second, other) = (peers.connect(a), peers.connect(a), peers.connect(b));
        assert_eq!((first.nth, second.nth, other.nth), (1, 2, 1));
        first.peer().in_flight.fetch_add(7, Relaxed);
        assert_eq!((second.peer().in_flight.load(Relaxed), other.peer().in_flight.load(Relaxed)), (7, 0));
        drop(first);
        assert_eq!(peers.connect(a).nth, 1, "a place that is free again");
        drop((second, other));
        peers.connect(NodeId([3; 16]));
        assert_eq!(peers.lock().len(), 1, "those who have gone leave nothing");
    }
}
