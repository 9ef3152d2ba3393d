//! What a node knows of its peers, whichever of its workers learnt it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, Weak},
};

use starling_protocol::{Name, NodeId};

use super::{Experience, Reach};

/// All peers that were ever looked at. Shared by the workers of a node.
#[derive(Default)]
pub(crate) struct KnownPeers(Mutex<HashMap<NodeId, Arc<KnownPeer>>>);

/// One of them.
#[derive(Default)]
pub(crate) struct KnownPeer {
    /// As each worker has it: a peer's threads can be out of reach one by one, and so can ours.
    reaches: Mutex<Vec<Weak<Reach>>>,
    /// By service.
    instances: Mutex<HashMap<Name, Arc<Experience>>>,
}

impl KnownPeers {
    pub(crate) fn peer(&self, id: &NodeId) -> Arc<KnownPeer> {
        lock(&self.0).entry(*id).or_default().clone()
    }

    /// Whether calls keep away from that instance, or, on any worker, from all of its peer.
    pub(crate) fn is_ejected(&self, id: &NodeId, service: &Name) -> bool {
        lock(&self.0).get(id).is_some_and(|peer| {
            peer.reaches().iter().any(|reach| reach.is_out())
                || lock(&peer.instances).get(service).is_some_and(|instance| instance.is_ejected())
        })
    }

    /// Calls in flight to all peers.
    pub(crate) fn in_flight(&self) -> usize {
        lock(&self.0).values().map(|peer| peer.in_flight() as usize).sum()
    }

    /// Forgets peers that are not in the mesh any more, and of which no worker has anything.
    pub(crate) fn retain(&self, keep: impl Fn(&NodeId) -> bool) {
        lock(&self.0).retain(|id, peer| keep(id) || Arc::strong_count(peer) > 1);
    }
}

impl KnownPeer {
    /// A new worker's reach of it.
    pub(crate) fn reach(&self) -> Arc<Reach> {
        let reach = Arc::default();
        let mut reaches = lock(&self.reaches);
        reaches.retain(|reach| reach.strong_count() > 0);
        reaches.push(Arc::downgrade(&reach));
        reach
    }

    fn reaches(&self) -> Vec<Arc<Reach>> {
        lock(&self.reaches).iter().filter_map(Weak::upgrade).collect()
    }

    fn in_flight(&self) -> u32 {
        self.reaches().iter().map(|reach| reach.in_flight()).sum()
    }

    pub(crate) fn experience(&self, service: &Name) -> Arc<Experience> {
        let mut instances = lock(&self.instances);
        match instances.get(service) {
            Some(known) => known.clone(),
            None => {
                instances.retain(|_, known| Arc::strong_count(known) > 1 || !known.is_forgotten());
                instances.entry(service.clone()).or_insert_with(|| Arc::new(Experience::new())).clone()
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
