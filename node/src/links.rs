//! Gossip's transport: one authenticated QUIC connection per pair of nodes, for datagrams and sync streams both ways.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use starling_gossip::{GossipHandle, Ident, Outgoing, Sync, Target};
use starling_protocol::{CloseCode, FullState, GossipRequest, MAX_GOSSIP_FRAME_BYTES, NodeId, SignedRecord, alpn};
use tokio::sync::mpsc;

use crate::{
    endpoint::{CONTROL, MeshEndpoint},
    identity::Identity,
    state::StateDir,
    stream::{self, StreamFault},
    tls::{self, Peer},
};

/// A packet older than this when the handshake is done is stale.
const STALE: Duration = Duration::from_millis(150);
/// Packets held for a handshake.
const MAX_HELD: usize = 8;
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections that one change is pushed over.
const MAX_PUSHES: usize = 64;
/// Addresses that are remembered as not answering.
const MAX_UNREACHABLE: usize = 256;

/// The links of a node. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Links(Arc<Shared>);

struct Shared {
    identity: Arc<Identity>,
    endpoint: MeshEndpoint,
    gossip: GossipHandle,
    table: Mutex<HashMap<NodeId, Link>>,
    /// Why addresses did not answer last time, for the operator.
    unreachable: Mutex<HashMap<SocketAddr, String>>,
}

enum Link {
    Dialling { held: Vec<(Instant, Bytes)> },
    Up { connection: quinn::Connection, dialled_by: NodeId },
}

impl Links {
    pub(crate) fn new(identity: Arc<Identity>, endpoint: MeshEndpoint, gossip: GossipHandle) -> Self {
        let (table, unreachable) = Default::default();
        Self(Arc::new(Shared { identity, endpoint, gossip, table, unreachable }))
    }

    /// Does what gossip asks for, until gossip ends.
    pub(crate) async fn run(self, mut outgoing: mpsc::UnboundedReceiver<Outgoing>, state: StateDir) {
        while let Some(next) = outgoing.recv().await {
            match next {
                Outgoing::Datagram { to, bytes } => self.send(to, bytes),
                Outgoing::Push { except, records } => self.push(except, &records),
                Outgoing::Sync(sync) => {
                    let links = self.clone();
                    tokio::spawn(async move { links.sync(sync).await });
                }
                Outgoing::Generation(generation) => store(&state, "generation", generation.to_string().as_bytes()),
                Outgoing::Peers(peers) => match serde_json::to_vec(&peers) {
                    // Not on this thread, which must answer probes while the disk syncs.
                    Ok(json) => {
                        let state = state.clone();
                        tokio::task::spawn_blocking(move || store(&state, "peers.json", &json));
                    }
                    Err(error) => tracing::error!(%error, "peers.json"),
                },
                // Published by the actor itself.
                Outgoing::Changed(_) => {}
            }
        }
    }

    /// Takes a connection that a peer has dialled.
    pub(crate) async fn accept(self, connection: quinn::Connection, peer: Peer) {
        self.adopt(&connection, peer.id, peer.id);
        self.serve(connection, peer.id).await;
    }

    /// Why addresses do not answer, by address.
    pub(crate) fn unreachable(&self) -> Vec<(SocketAddr, String)> {
        lock(&self.0.unreachable).iter().map(|(addr, why)| (*addr, why.clone())).collect()
    }

    fn send(&self, to: Ident, bytes: Bytes) {
        let mut table = lock(&self.0.table);
        match table.get_mut(&to.id) {
            Some(Link::Up { connection, .. }) if connection.close_reason().is_none() => {
                if let Err(error) = connection.send_datagram(bytes) {
                    tracing::debug!(to = %to.addr, %error, "gossip packet not sent");
                }
            }
            Some(Link::Dialling { held }) => {
                if held.len() < MAX_HELD {
                    held.push((Instant::now(), bytes));
                }
            }
            _ => {
                table.insert(to.id, Link::Dialling { held: vec![(Instant::now(), bytes)] });
                let links = self.clone();
                tokio::spawn(async move { links.dial_member(to).await });
            }
        }
    }

    async fn dial_member(&self, to: Ident) {
        let dialled = self.dial(to.addr).await;
        let mut table = lock(&self.0.table);
        if let Some(Link::Dialling { held }) = table.get(&to.id) {
            let fresh: Vec<Bytes> =
                held.iter().filter(|(at, _)| at.elapsed() < STALE).map(|(_, bytes)| bytes.clone()).collect();
            table.remove(&to.id);
            drop(table);
            if let Ok((connection, peer)) = dialled {
                if peer == to.id {
                    for bytes in fresh {
                        let _ = connection.send_datagram(bytes);
                    }
                }
                self.adopt_dialled(connection, peer);
            }
        } else {
            drop(table);
            if let Ok((connection, peer)) = dialled {
                self.adopt_dialled(connection, peer);
            }
        }
    }

    async fn dial(&self, addr: SocketAddr) -> Result<(quinn::Connection, NodeId), String> {
        let crypto = tls::client_crypto(&self.0.identity, alpn::GOSSIP);
        let connecting = self.0.endpoint.dial(addr, crypto, CONTROL).map_err(|e| e.to_string())?;
        let connection = tokio::time::timeout(EXCHANGE_TIMEOUT, connecting)
            .await
            .map_err(|_| "no answer in time".to_string())?
            .map_err(|e| e.to_string())?;
        let peer = Peer::of(&connection, &self.0.identity).map_err(|e| e.to_string())?;
        if peer.id == self.0.identity.id() {
            connection.close((CloseCode::Done as u32).into(), b"");
            return Err("this node itself answers there".into());
        }
        Ok((connection, peer.id))
    }

    fn adopt_dialled(&self, connection: quinn::Connection, peer: NodeId) {
        self.adopt(&connection, peer, self.0.identity.id());
        let links = self.clone();
        tokio::spawn(async move { links.serve(connection, peer).await });
    }

    /// Makes the connection the one to send over. Of two that were dialled by both sides at once, both sides keep the one
    /// dialled by the smaller id, or they would go on replacing each other's.
    fn adopt(&self, connection: &quinn::Connection, peer: NodeId, dialled_by: NodeId) {
        let mut table = lock(&self.0.table);
        let keep_old = matches!(table.get(&peer), Some(Link::Up { connection: old, dialled_by: by })
            if old.close_reason().is_none() && *by != dialled_by && *by < dialled_by);
        let new = Link::Up { connection: connection.clone(), dialled_by };
        let loser = if keep_old { Some(new) } else { table.insert(peer, new) };
        match loser {
            Some(Link::Up { connection, .. }) => {
                // The peer may still be sending on it.
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_secs(2)).await;
                    connection.close((CloseCode::Duplicate as u32).into(), b"duplicate");
                });
            }
            Some(Link::Dialling { held }) => {
                for (_, bytes) in held.into_iter().filter(|(at, _)| at.elapsed() < STALE) {
                    let _ = connection.send_datagram(bytes);
                }
            }
            None => {}
        }
    }

    /// Reads what the peer sends, until the connection ends.
    async fn serve(&self, connection: quinn::Connection, peer: NodeId) {
        loop {
            tokio::select! {
                datagram = connection.read_datagram() => match datagram {
                    Ok(bytes) => self.0.gossip.deliver(peer, bytes),
                    Err(_) => break,
                },
                stream = connection.accept_bi() => match stream {
                    Ok((send, receive)) => {
                        let gossip = self.0.gossip.clone();
                        tokio::spawn(async move {
                            let answered = answer(gossip, peer, send, receive);
                            match tokio::time::timeout(EXCHANGE_TIMEOUT, answered).await {
                                Ok(Ok(())) => {}
                                Ok(Err(error)) => tracing::debug!(%error, "gossip stream"),
                                Err(_) => tracing::debug!("gossip stream timed out"),
                            }
                        });
                    }
                    Err(_) => break,
                },
            }
        }
        let mut table = lock(&self.0.table);
        if matches!(table.get(&peer), Some(Link::Up { connection: c, .. }) if c.stable_id() == connection.stable_id()) {
            table.remove(&peer);
        }
    }

    fn push(&self, except: Option<NodeId>, records: &[SignedRecord]) {
        let request = Arc::new(GossipRequest::Push(records.to_vec()));
        let table = lock(&self.0.table);
        let live = table.iter().filter(|(id, _)| Some(**id) != except).filter_map(|(_, link)| match link {
            Link::Up { connection, .. } => Some(connection.clone()),
            Link::Dialling { .. } => None,
        });
        for connection in live.take(MAX_PUSHES) {
            let request = request.clone();
            tokio::spawn(async move {
                let pushed = async {
                    let (mut send, _) = connection.open_bi().await?;
                    stream::write_frame(&mut send, &*request).await
                };
                let _ = tokio::time::timeout(EXCHANGE_TIMEOUT, pushed).await;
            });
        }
    }

    async fn sync(&self, sync: Sync) {
        let addr = sync.with.addr();
        let outcome = tokio::time::timeout(EXCHANGE_TIMEOUT, self.exchange(sync)).await;
        match outcome.unwrap_or_else(|_| Err("no answer in time".into())) {
            Ok((peer, state)) => {
                lock(&self.0.unreachable).remove(&addr);
                self.0.gossip.sync_reply(peer, state).await;
            }
            Err(why) => {
                let mut unreachable = lock(&self.0.unreachable);
                if unreachable.len() >= MAX_UNREACHABLE {
                    unreachable.clear();
                }
                if unreachable.insert(addr, why.clone()).is_none() {
                    tracing::warn!(%addr, why, "a seed or former member does not answer; trying again for ever");
                }
            }
        }
    }

    async fn exchange(&self, sync: Sync) -> Result<(NodeId, FullState), String> {
        let known = match sync.with {
            Target::Node(ident) => match lock(&self.0.table).get(&ident.id) {
                Some(Link::Up { connection, .. }) if connection.close_reason().is_none() => {
                    Some((connection.clone(), ident.id))
                }
                _ => None,
            },
            Target::Addr(_) => None,
        };
        let (connection, peer) = match known {
            Some(known) => known,
            None => {
                let (connection, peer) = self.dial(sync.with.addr()).await?;
                self.adopt_dialled(connection.clone(), peer);
                (connection, peer)
            }
        };
        let asked = async {
            let (mut send, mut receive) = connection.open_bi().await?;
            stream::write_frame(&mut send, &GossipRequest::Sync(sync.state)).await?;
            stream::read_frame(&mut receive, MAX_GOSSIP_FRAME_BYTES).await
        };
        let state: FullState = asked.await.map_err(|e: StreamFault| e.to_string())?;
        Ok((peer, state))
    }
}

async fn answer(
    gossip: GossipHandle,
    peer: NodeId,
    mut send: quinn::SendStream,
    mut receive: quinn::RecvStream,
) -> Result<(), StreamFault> {
    match stream::read_frame(&mut receive, MAX_GOSSIP_FRAME_BYTES).await? {
        GossipRequest::Push(records) => gossip.receive_records(peer, records).await,
        GossipRequest::Sync(state) => {
            if let Some(reply) = gossip.sync(peer, state).await {
                stream::write_frame(&mut send, &reply).await?;
            }
        }
    }
    Ok(())
}

fn store(state: &StateDir, name: &str, bytes: &[u8]) {
    // A full disk must not take the node out of the mesh: it serves from memory and says so.
    if let Err(error) = state.write(name, bytes) {
        tracing::error!(error = %error, "cannot store {name}");
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
