//! One QUIC connection per peer, dialled once by whoever comes first, shared by all calls to all services there.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, Weak},
    time::Instant,
};

use starling_gossip::{Instance, Snapshot};
use starling_protocol::{Name, NodeId};
use tokio::sync::watch;

use super::{
    Connection, DialError, Lane,
    dial::{DIAL_TIMEOUT, Mesh, dial},
    silence::watch_for_silence,
};
use crate::{
    call::{
        Called,
        choose::{Candidate, KnownPeer, KnownPeers, Reach},
    },
    identity::Identity,
    port::endpoint::MeshEndpoint,
};

#[derive(Default)]
enum Slot {
    #[default]
    Idle,
    Dialling(watch::Receiver<Option<Result<(), DialError>>>),
    Ready(Connection),
}

/// A peer as one worker has it.
struct PeerSlot {
    known: Arc<KnownPeer>,
    reach: Arc<Reach>,
    calls: Mutex<Slot>,
    packets: Mutex<Slot>,
}

impl PeerSlot {
    fn slot(&self, lane: Lane) -> MutexGuard<'_, Slot> {
        lock(match lane {
            Lane::Calls => &self.calls,
            Lane::Packets => &self.packets,
        })
    }
}

/// The connections of one worker.
pub(crate) struct Pool {
    identity: Arc<Identity>,
    endpoint: MeshEndpoint,
    mesh: Mesh,
    known: Arc<KnownPeers>,
    peers: Mutex<HashMap<NodeId, Arc<PeerSlot>>>,
    targets: Mutex<HashMap<Name, Target>>,
}

/// The instances of a service, with what is known of them, as long as the mesh does not change.
struct Target {
    /// When it was so. Held weakly: a mesh that is past is not to be kept for services that nobody calls.
    at: Weak<Snapshot>,
    candidates: Arc<[Candidate]>,
    called: Arc<Called>,
}

impl Pool {
    pub(crate) fn new(identity: Arc<Identity>, endpoint: MeshEndpoint, mesh: Mesh, known: Arc<KnownPeers>) -> Self {
        Self { identity, endpoint, mesh, known, peers: Mutex::default(), targets: Mutex::default() }
    }

    fn slot<'a>(&self, peers: &'a mut HashMap<NodeId, Arc<PeerSlot>>, id: &NodeId) -> &'a Arc<PeerSlot> {
        peers.entry(*id).or_insert_with(|| {
            let known = self.known.peer(id);
            let (calls, packets) = Default::default();
            Arc::new(PeerSlot { reach: known.reach(), known, calls, packets })
        })
    }

    /// The instances of a service with what is known of them and their peers, and of the service as a whole; `None` if there is no
    /// such service.
    pub(crate) fn candidates(
        &self,
        snapshot: &Arc<Snapshot>,
        service: &Name,
    ) -> Option<(Arc<[Candidate]>, Arc<Called>)> {
        let mut targets = lock(&self.targets);
        if let Some(target) = targets.get(service)
            && std::ptr::eq(target.at.as_ptr(), Arc::as_ptr(snapshot))
        {
            return Some((target.candidates.clone(), target.called.clone()));
        }
        let Some(instances) = snapshot.instances(service) else {
            targets.remove(service);
            return None;
        };
        let mut peers = lock(&self.peers);
        let candidate = |instance: &Arc<Instance>| {
            let peer = self.slot(&mut peers, &instance.node);
            let experience = peer.known.experience(service);
            Candidate { peer: peer.reach.clone(), experience, instance: instance.clone() }
        };
        let candidates: Arc<[Candidate]> = instances.iter().map(candidate).collect();
        let called = self.known.called(service);
        let (at, kept) = (Arc::downgrade(snapshot), (candidates.clone(), called.clone()));
        targets.insert(service.clone(), Target { at, candidates, called });
        Some(kept)
    }

    /// Dials one again that was out of reach for a while, beside a call that has others to go to.
    pub(crate) fn look_for(self: &Arc<Self>, candidate: &Candidate) {
        let (pool, reach, instance) = (self.clone(), candidate.peer.clone(), candidate.instance.clone());
        tokio::spawn(async move {
            // It may be there already: what fell silent was an older one, of a former life.
            if pool.connection(&instance, Lane::Calls).await.is_ok() {
                reach.reached();
            }
        });
    }

    /// Forgets peers that are not in the mesh any more.
    pub(crate) fn retain(&self, keep: impl Fn(&NodeId) -> bool) {
        lock(&self.targets).clear();
        lock(&self.peers).retain(|id, peer| keep(id) || peer.reach.in_flight() > 0);
    }

    /// A connection to the instance's node: the one that is there, or a new one. Cancel safe; the dial goes on for others.
    pub(crate) async fn connection(
        self: &Arc<Self>,
        instance: &Arc<Instance>,
        lane: Lane,
    ) -> Result<Connection, DialError> {
        let peer = self.slot(&mut lock(&self.peers), &instance.node).clone();
        let deadline = Instant::now() + DIAL_TIMEOUT;
        loop {
            let mut dialled = {
                let mut slot = peer.slot(lane);
                match &*slot {
                    Slot::Ready(ready) if ready.is_usable(instance.generation) => return Ok(ready.clone()),
                    Slot::Dialling(dialled) => dialled.clone(),
                    Slot::Idle | Slot::Ready(_) => {
                        let (done, dialled) = watch::channel(None);
                        *slot = Slot::Dialling(dialled.clone());
                        tokio::spawn(self.clone().fill(peer.clone(), lane, instance.clone(), done));
                        dialled
                    }
                }
            };
            let outcome = dialled.wait_for(Option::is_some).await.map(|outcome| outcome.clone());
            match outcome {
                Ok(Some(Err(error))) => return Err(error),
                Err(_) => {
                    // The dial ended without a word: whoever comes next may try again.
                    *peer.slot(lane) = Slot::Idle;
                    return Err(DialError("the dial broke off".into()));
                }
                Ok(_) if Instant::now() > deadline => return Err(DialError("the connection does not hold".into())),
                Ok(_) => {}
            }
        }
    }
}

impl Pool {
    /// Dials for everybody who waits, and says how it went.
    async fn fill(
        self: Arc<Self>,
        peer: Arc<PeerSlot>,
        lane: Lane,
        instance: Arc<Instance>,
        done: watch::Sender<Option<Result<(), DialError>>>,
    ) {
        let outcome = match dial(&self.identity, &self.endpoint, &self.mesh, &instance).await {
            Ok(made) => {
                peer.reach.reached();
                tokio::spawn(watch_for_silence(Arc::downgrade(&made.0), peer.reach.clone()));
                *peer.slot(lane) = Slot::Ready(made);
                Ok(())
            }
            Err(error) => {
                tracing::debug!(node = %instance.node_name, addr = %instance.addr, %error, "cannot connect");
                peer.reach.unreachable();
                *peer.slot(lane) = Slot::Idle;
                Err(error)
            }
        };
        done.send_replace(Some(outcome));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
