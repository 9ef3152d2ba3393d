//! What a node knows of its peers, whichever of its workers learnt it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, Weak},
};

use starling_protocol::{Name, NodeId};

use super::{Experience, Reach, Seen};
use crate::call::{Called, Repeats};

/// All peers that were ever looked at, and the services that they have. Shared by the workers of a node.
#[derive(Default)]
pub(crate) struct KnownPeers {
    peers: Mutex<HashMap<NodeId, Arc<KnownPeer>>>,
    services: Mutex<HashMap<Name, Arc<Called>>>,
}

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
        lock(&self.peers).entry(*id).or_default().clone()
    }

    /// What is known of calls to a service as a whole.
    pub(crate) fn called(&self, service: &Name) -> Arc<Called> {
        let mut services = lock(&self.services);
        match services.get(service) {
            Some(known) => known.clone(),
            None => services.entry(service.clone()).or_default().clone(),
        }
    }

    /// Attempts beyond the first, by service.
    pub(crate) fn repeats(&self) -> Vec<(Name, Repeats)> {
        let mut all: Vec<_> =
            lock(&self.services).iter().map(|(name, called)| (name.clone(), called.repeats())).collect();
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        all
    }

    /// The same of one.
    pub(crate) fn repeats_of(&self, service: &Name) -> Repeats {
        lock(&self.services).get(service).map(|called| called.repeats()).unwrap_or_default()
    }

    /// What an instance looks like from here; `None` if it was never looked at.
    pub(crate) fn seen(&self, id: &NodeId, service: &Name) -> Option<Seen> {
        let peer = lock(&self.peers).get(id)?.clone();
        let instance = lock(&peer.instances).get(service)?.clone();
        Some(instance.seen())
    }

    /// Whether calls keep away from that instance, or, on any worker, from all of its peer.
    pub(crate) fn is_ejected(&self, id: &NodeId, service: &Name) -> bool {
        lock(&self.peers).get(id).is_some_and(|peer| {
            peer.reaches().iter().any(|reach| reach.is_out())
                || lock(&peer.instances).get(service).is_some_and(|instance| instance.is_ejected())
        })
    }

    /// Calls in flight to all peers.
    pub(crate) fn in_flight(&self) -> usize {
        lock(&self.peers).values().map(|peer| peer.in_flight() as usize).sum()
    }

    /// Forgets peers and services that are not in the mesh any more, and of which no worker has anything.
    pub(crate) fn retain(&self, is_member: impl Fn(&NodeId) -> bool, is_served: impl Fn(&Name) -> bool) {
        lock(&self.peers).retain(|id, peer| is_member(id) || Arc::strong_count(peer) > 1);
        lock(&self.services).retain(|name, called| is_served(name) || Arc::strong_count(called) > 1);
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
