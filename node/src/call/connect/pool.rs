//! One QUIC connection per peer, dialled once by whoever comes first, shared by all calls to all services there.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Instant,
};

use starling_gossip::Instance;
use starling_protocol::NodeId;
use tokio::sync::watch;

use super::{
    Connection, DialError,
    dial::{DIAL_TIMEOUT, dial},
    silence::watch_for_silence,
};
use crate::{
    call::choose::{Candidate, KnownPeer, KnownPeers, Reach},
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
    slot: Mutex<Slot>,
}

/// The connections of one worker.
pub(crate) struct Pool {
    identity: Arc<Identity>,
    endpoint: MeshEndpoint,
    known: Arc<KnownPeers>,
    peers: Mutex<HashMap<NodeId, Arc<PeerSlot>>>,
}

impl Pool {
    pub(crate) fn new(identity: Arc<Identity>, endpoint: MeshEndpoint, known: Arc<KnownPeers>) -> Self {
        Self { identity, endpoint, known, peers: Mutex::default() }
    }

    fn slot<'a>(&self, peers: &'a mut HashMap<NodeId, Arc<PeerSlot>>, id: &NodeId) -> &'a Arc<PeerSlot> {
        peers.entry(*id).or_insert_with(|| {
            let known = self.known.peer(id);
            Arc::new(PeerSlot { reach: known.reach(), known, slot: Mutex::default() })
        })
    }

    /// Pairs instances with what is known of them and their peers. Those that were out of reach for a while are dialled
    /// again, beside the call: it has others to go to.
    pub(crate) fn candidates(self: &Arc<Self>, instances: impl Iterator<Item = Arc<Instance>>) -> Vec<Candidate> {
        let (mut peers, now) = (lock(&self.peers), Instant::now());
        instances
            .map(|instance| {
                let peer = self.slot(&mut peers, &instance.node);
                let (is_out, is_due) = peer.reach.look(now);
                if is_due {
                    let (pool, reach, instance) = (self.clone(), peer.reach.clone(), instance.clone());
                    tokio::spawn(async move {
                        // It may be there already: what fell silent was an older one, of a former life.
                        if pool.connection(&instance).await.is_ok() {
                            reach.reached();
                        }
                    });
                }
                let experience = peer.known.experience(&instance.service);
                Candidate { peer: peer.reach.clone(), is_out, experience, instance }
            })
            .collect()
    }

    /// Forgets peers that are not in the mesh any more.
    pub(crate) fn retain(&self, keep: impl Fn(&NodeId) -> bool) {
        lock(&self.peers).retain(|id, peer| keep(id) || peer.reach.in_flight() > 0);
    }

    /// A connection to the instance's node: the one that is there, or a new one. Cancel safe; the dial goes on for others.
    pub(crate) async fn connection(self: &Arc<Self>, instance: &Arc<Instance>) -> Result<Connection, DialError> {
        let peer = self.slot(&mut lock(&self.peers), &instance.node).clone();
        let deadline = Instant::now() + DIAL_TIMEOUT;
        loop {
            let mut dialled = {
                let mut slot = lock(&peer.slot);
                match &*slot {
                    Slot::Ready(ready) if ready.is_usable(instance.generation) => return Ok(ready.clone()),
                    Slot::Dialling(dialled) => dialled.clone(),
                    Slot::Idle | Slot::Ready(_) => {
                        let (done, dialled) = watch::channel(None);
                        *slot = Slot::Dialling(dialled.clone());
                        tokio::spawn(self.clone().fill(peer.clone(), instance.clone(), done));
                        dialled
                    }
                }
            };
            let outcome = dialled.wait_for(Option::is_some).await.map(|outcome| outcome.clone());
            match outcome {
                Ok(Some(Err(error))) => return Err(error),
                Err(_) => {
                    // The dial ended without a word: whoever comes next may try again.
                    *lock(&peer.slot) = Slot::Idle;
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
        instance: Arc<Instance>,
        done: watch::Sender<Option<Result<(), DialError>>>,
    ) {
        let outcome = match dial(&self.identity, &self.endpoint, &instance).await {
            Ok(made) => {
                peer.reach.reached();
                tokio::spawn(watch_for_silence(Arc::downgrade(&made.0), peer.reach.clone()));
                *lock(&peer.slot) = Slot::Ready(made);
                Ok(())
            }
            Err(error) => {
                tracing::debug!(node = %instance.node_name, addr = %instance.addr, %error, "cannot connect");
                peer.reach.unreachable();
                *lock(&peer.slot) = Slot::Idle;
                Err(error)
            }
        };
        done.send_replace(Some(outcome));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
