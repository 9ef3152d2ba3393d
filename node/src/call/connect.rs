//! One QUIC connection per peer, dialled once by whoever comes first, shared by all calls to all services there.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use h3::error::Code;
use starling_gossip::Instance;
use starling_http::guard;
use starling_protocol::{NodeId, alpn};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    call::choose::{Candidate, PeerLoad},
    identity::Identity,
    identity::tls::{self, Peer},
    port::endpoint::{FIRST_WORKER, MeshEndpoint},
};

/// How long a handshake may take.
const DIAL_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a connection with calls in flight is looked at.
const WATCH_PERIOD: Duration = Duration::from_millis(50);
/// Silence that is taken for death: QUIC acknowledges within 25 ms (RFC 9000 §13.2.1), so nothing for this long, and for
/// three round trips, while probes go out, means that nobody is there.
const SILENCE: Duration = Duration::from_millis(300);
/// Packets that must have gone unanswered, so that one loss is not a silence.
const UNANSWERED: u64 = 3;

pub(crate) type SendRequest = h3::client::SendRequest<guard::Opener, Bytes>;

/// A live connection to a peer.
#[derive(Clone)]
pub(crate) struct Link {
    pub(crate) send: SendRequest,
    pub(crate) silent: CancellationToken,
    generation: u64,
    connection: quinn::Connection,
    busy: Arc<Notify>,
    retired: CancellationToken,
}

impl Link {
    fn is_usable(&self, generation: u64) -> bool {
        // A peer that came back under a new generation may be a new process: calls under way may finish on the old
        // connection, new ones must not be the first to find out that it is gone.
        self.generation >= generation && !self.retired.is_cancelled() && self.connection.close_reason().is_none()
    }

    /// Takes no more calls; those under way keep it alive.
    pub(crate) fn retire(&self) {
        self.retired.cancel();
    }

    /// A call begins: somebody should notice if the peer falls silent.
    pub(crate) fn wake_watch(&self) {
        self.busy.notify_one();
    }
}

/// Why there is no connection. Nothing was sent.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub(crate) struct DialError(String);

#[derive(Default)]
enum Slot {
    #[default]
    Idle,
    Dialling(watch::Receiver<Option<Result<(), DialError>>>),
    Ready(Link),
}

struct PeerSlot {
    load: Arc<PeerLoad>,
    slot: Mutex<Slot>,
}

/// The pool of one worker.
pub(crate) struct Pool {
    identity: Arc<Identity>,
    endpoint: MeshEndpoint,
    peers: Mutex<HashMap<NodeId, Arc<PeerSlot>>>,
}

impl Pool {
    pub(crate) fn new(identity: Arc<Identity>, endpoint: MeshEndpoint) -> Self {
        Self { identity, endpoint, peers: Mutex::default() }
    }

    /// Pairs instances with what is known of their peers.
    pub(crate) fn candidates(&self, instances: impl Iterator<Item = Arc<Instance>>) -> Vec<Candidate> {
        let mut peers = lock(&self.peers);
        instances
            .map(|instance| {
                let peer = peers.entry(instance.node).or_insert_with(new_peer);
                Candidate { load: peer.load.clone(), instance }
            })
            .collect()
    }

    /// Whether calls keep away from that peer.
    pub(crate) fn is_ejected(&self, id: &NodeId) -> bool {
        lock(&self.peers).get(id).is_some_and(|peer| peer.load.is_ejected())
    }

    /// Calls in flight to all peers.
    pub(crate) fn in_flight(&self) -> usize {
        lock(&self.peers).values().map(|peer| peer.load.in_flight() as usize).sum()
    }

    /// Forgets peers that are not in the mesh any more.
    pub(crate) fn retain(&self, keep: impl Fn(&NodeId) -> bool) {
        lock(&self.peers).retain(|id, peer| keep(id) || peer.load.in_flight() > 0);
    }

    /// A connection to the instance's node: the one that is there, or a new one. Cancel safe; the dial goes on for others.
    pub(crate) async fn link(self: &Arc<Self>, instance: &Arc<Instance>) -> Result<Link, DialError> {
        let peer = lock(&self.peers).entry(instance.node).or_insert_with(new_peer).clone();
        let deadline = Instant::now() + DIAL_TIMEOUT;
        loop {
            let mut dialled = {
                let mut slot = lock(&peer.slot);
                match &*slot {
                    Slot::Ready(link) if link.is_usable(instance.generation) => return Ok(link.clone()),
                    Slot::Dialling(dialled) => dialled.clone(),
                    Slot::Idle | Slot::Ready(_) => {
                        let (done, dialled) = watch::channel(None);
                        *slot = Slot::Dialling(dialled.clone());
                        tokio::spawn(dial(self.clone(), peer.clone(), instance.clone(), done));
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

fn new_peer() -> Arc<PeerSlot> {
    Arc::new(PeerSlot { load: Arc::new(PeerLoad::new()), slot: Mutex::default() })
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

async fn dial(
    pool: Arc<Pool>,
    peer: Arc<PeerSlot>,
    instance: Arc<Instance>,
    done: watch::Sender<Option<Result<(), DialError>>>,
) {
    let outcome = match tokio::time::timeout(DIAL_TIMEOUT, connect(&pool, &peer, &instance)).await {
        Ok(Ok(link)) => {
            *lock(&peer.slot) = Slot::Ready(link);
            Ok(())
        }
        failed => {
            let reason = failed.map_or_else(|_| "no answer in time".into(), |r| r.err().unwrap_or_default());
            tracing::debug!(node = %instance.node_name, addr = %instance.addr, reason, "cannot connect");
            peer.load.unreachable();
            *lock(&peer.slot) = Slot::Idle;
            Err(DialError(reason))
        }
    };
    done.send_replace(Some(outcome));
}

async fn connect(pool: &Pool, peer: &Arc<PeerSlot>, instance: &Instance) -> Result<Link, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let crypto = tls::client_crypto(&pool.identity, alpn::CALLS);
    let connecting = pool.endpoint.dial(instance.addr, crypto, FIRST_WORKER).map_err(|e| text(&e))?;
    let connection = connecting.await.map_err(|e| text(&e))?;
    let found = Peer::of(&connection, &pool.identity).map_err(|e| text(&e))?;
    if found.id != instance.node {
        connection.close((Code::H3_NO_ERROR.value() as u32).into(), b"");
        return Err(format!("{} answers at its address", found.name));
    }
    let (mut driver, send) = h3::client::builder()
        .send_grease(false)
        .max_field_section_size(guard::MAX_FRAME_BYTES)
        .build(guard::Connection::new(connection.clone()))
        .await
        .map_err(|e| text(&e))?;
    let link = Link {
        send,
        silent: CancellationToken::new(),
        generation: instance.generation,
        connection: connection.clone(),
        busy: Arc::new(Notify::new()),
        retired: CancellationToken::new(),
    };
    let retired = link.retired.clone();
    tokio::spawn(async move {
        std::future::poll_fn(|cx| driver.poll_close(cx)).await;
        retired.cancel();
    });
    tokio::spawn(watch_for_silence(
        connection,
        peer.load.clone(),
        link.busy.clone(),
        link.silent.clone(),
        link.retired.clone(),
    ));
    Ok(link)
}

/// Notices within a few hundred milliseconds that a peer has died or hangs, long before gossip can say so: calls that may
/// be repeated then go elsewhere.
async fn watch_for_silence(
    connection: quinn::Connection,
    load: Arc<PeerLoad>,
    busy: Arc<Notify>,
    silent: CancellationToken,
    retired: CancellationToken,
) {
    loop {
        tokio::select! {
            () = busy.notified() => {}
            _ = connection.closed() => return,
        }
        let mut heard = connection.stats().udp_rx.datagrams;
        let mut sent_then = connection.stats().udp_tx.datagrams;
        let mut since: Option<Instant> = None;
        while load.in_flight() > 0 && connection.close_reason().is_none() {
            let slept = Instant::now();
            tokio::time::sleep(WATCH_PERIOD).await;
            let stats = connection.stats();
            let sent = stats.udp_tx.datagrams;
            if stats.udp_rx.datagrams != heard || slept.elapsed() > WATCH_PERIOD * 3 {
                // Heard something; or this thread itself was stalled, and says nothing about the peer.
                (heard, sent_then, since) = (stats.udp_rx.datagrams, sent, None);
            } else if sent > sent_then {
                let quiet = since.get_or_insert(slept).elapsed();
                if quiet > SILENCE.max(connection.rtt() * 3) && sent >= sent_then + UNANSWERED {
                    tracing::debug!(peer = %connection.remote_address(), ?quiet, "peer is silent");
                    load.unreachable();
                    retired.cancel();
                    silent.cancel();
                    return;
                }
            }
        }
    }
}
