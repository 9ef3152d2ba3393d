//! What goes over the streams of a link, on the asking and on the answering side.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use bytes::Bytes;
use quinn::ReadExactError;
use starling_gossip::{Ident, Sync, Target, Via};
use starling_protocol::{
    CloseCode, Delta, DialBack, DialledBack, Framed, Inspect, Items, MAX_GOSSIP_FRAME_BYTES, MAX_PUSH_BYTES, NodeId,
    Ping, Pong, Summary, Unsupported, View, WireError, frame,
};

use super::{super::fleet::Colleague, EXCHANGE_TIMEOUT, Links, flow::Flow};
use tokio::sync::SemaphorePermit;

use crate::{
    admin,
    identity::tls::Peer,
    port::frames::{self, Frame, StreamFault},
};

/// Longest word on why somebody is not reached, in bytes.
const MAX_WHY_BYTES: usize = 1024;
/// How long somebody may take who asked to be dialled.
const DIAL_BACK_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest answer to a ping, in bytes.
const MAX_PONG_BYTES: usize = 64;

impl Links {
    /// Compares states with a peer, both ways.
    pub(super) async fn sync(&self, sync: Sync) {
        let addr = sync.with.addr();
        let outcome = tokio::time::timeout(EXCHANGE_TIMEOUT, self.exchange(sync)).await;
        match (outcome.unwrap_or_else(|_| Err("no answer in time".into())), addr) {
            (Ok(()), Some(addr)) => drop(super::lock(&self.0.unreachable).remove(&addr)),
            (Err(why), Some(addr)) => self.not_reached(addr, why),
            (Ok(()), None) => {}
            (Err(why), None) => tracing::debug!(why, "a peer is not asked for its record"),
        }
    }

    async fn exchange(&self, sync: Sync) -> Result<(), String> {
        let (connection, peer) = match sync.with {
            Target::Node(member) => (self.connection_to(member).await?, member.id),
            Target::Addr(addr) => {
                let (connection, peer) = self.connect(addr).await?;
                (connection, peer.id)
            }
            Target::Linked(id) => (self.table().heard_over(&id, Instant::now()).ok_or("its connection is gone")?, id),
        };
        let text = |e: StreamFault| e.to_string();
        let (mut send, mut receive) = connection.open_bi().await.map_err(|e| e.to_string())?;
        send.write_all(&frame(&sync.summary)).await.map_err(|e| e.to_string())?;
        let flow = self.flow_of(peer);
        let delta: Delta = self.read_message(&mut receive, &flow).await.map_err(text)?;
        let wanted = self.0.gossip.absorb(peer, sync.with, delta).await.unwrap_or_default();
        frames::write_frame(&mut send, &wanted).await.map_err(text)
    }

    /// Pings a member over a stream, dialling it if need be.
    pub(crate) async fn ping(&self, to: Ident, suspected: Option<u16>) -> Result<Pong, String> {
        let connection = self.connection_to(to).await?;
        ping_over(&connection, suspected).await.map_err(|e| e.to_string())
    }

    /// Asks a member how it sees the mesh.
    pub(crate) async fn inspect(&self, member: Ident) -> Result<View, String> {
        let asked = async {
            let connection = self.connection_to(member).await?;
            let asked = async {
                let (mut send, mut receive) = connection.open_bi().await?;
                frames::write_frame(&mut send, &Inspect {}).await?;
                frames::read_frame(&mut receive, MAX_GOSSIP_FRAME_BYTES).await?.read()
            };
            asked.await.map_err(|e: StreamFault| e.to_string())
        };
        tokio::time::timeout(EXCHANGE_TIMEOUT, asked).await.unwrap_or_else(|_| Err("no answer in time".into()))
    }

    /// Asks a member to dial this node at the address in its record: why it does not get there, if it does not.
    pub(crate) async fn ask_dial_back(&self, member: Ident) -> Result<Option<String>, String> {
        let asked = async {
            let connection = self.connection_to(member).await?;
            let asked = async {
                let (mut send, mut receive) = connection.open_bi().await?;
                frames::write_frame(&mut send, &DialBack {}).await?;
                frames::read_frame(&mut receive, MAX_WHY_BYTES).await?.read::<DialledBack>()
            };
            asked.await.map_err(|e: StreamFault| e.to_string())
        };
        let answer = tokio::time::timeout(EXCHANGE_TIMEOUT * 2, asked).await;
        answer.unwrap_or_else(|_| Err("no answer in time".into())).map(|answer| answer.why)
    }

    /// Dials a member that asks for it, at the address in its record and nowhere else: why it is not reached, if it is not.
    /// `None` if there is nothing to be said.
    async fn dial_back(&self, peer: NodeId) -> Option<DialledBack> {
        let snapshot = self.0.gossip.snapshot();
        let (member, record) = snapshot.member(&peer).and_then(|m| Some((m, m.record.as_ref()?)))?;
        let _permit = self.0.dial_backs.try_acquire().ok()?;
        let dialled = tokio::time::timeout(DIAL_BACK_TIMEOUT, self.dial(member.addr, &self.0.silent_crypto)).await;
        let why = match dialled {
            Ok(Ok((connection, found))) => {
                connection.close((CloseCode::Done as u32).into(), b"reached");
                (found.id != peer).then(|| format!("{} answers there", found.name))
            }
            Ok(Err(why)) => Some(why),
            Err(_) => Some("no answer in time".into()),
        };
        let Some(why) = why else {
            super::lock(&self.0.not_reached).remove(&peer);
            return Some(DialledBack { why: None });
        };
        if super::lock(&self.0.not_reached).insert(peer, member.addr) != Some(member.addr) {
            tracing::warn!(
                member = %record.name, addr = %member.addr, why,
                "cannot reach a member at the address that it tells; its services will not be called until it says another"
            );
        }
        Some(DialledBack { why: Some(why) })
    }

    /// Asks a member that is an edge by its certificate.
    pub(crate) async fn ask_edge<Q: Framed, A: Framed>(&self, edge: Ident, question: &Q) -> Result<A, String> {
        let asked = async {
            let connection = self.connection_to(edge).await?;
            if !Peer::of(&connection, &self.0.identity).map_err(|e| e.to_string())?.edge {
                return Err("it is no edge".into());
            }
            let asked = async {
                let (mut send, mut receive) = connection.open_bi().await?;
                frames::write_frame(&mut send, question).await?;
                frames::read_frame(&mut receive, MAX_PUSH_BYTES).await?.read()
            };
            asked.await.map_err(|e: StreamFault| e.to_string())
        };
        tokio::time::timeout(EXCHANGE_TIMEOUT, asked).await.unwrap_or_else(|_| Err("no answer in time".into()))
    }

    /// Says who answers other edges, with whoever does already.
    pub(crate) fn answer_edges_with(&self, colleague: Arc<dyn Colleague>) {
        self.0.colleagues.write().unwrap_or_else(|e| e.into_inner()).push(colleague);
    }

    /// The connection to a member that is there, or a new one.
    async fn connection_to(&self, member: Ident) -> Result<quinn::Connection, String> {
        let known = self.table().up(&member.id, Instant::now());
        if let Some(connection) = known {
            return Ok(connection);
        }
        let _permit = self.0.dials.acquire().await.map_err(|e| e.to_string())?;
        let (connection, peer) = self.connect(member.addr).await?;
        if peer.id == member.id { Ok(connection) } else { Err("another node answers at its address".into()) }
    }

    /// A new connection, and who answered.
    async fn connect(&self, addr: SocketAddr) -> Result<(quinn::Connection, Peer), String> {
        let (connection, peer) = self.dial(addr, &self.0.crypto).await?;
        self.adopt_dialled(connection.clone(), &peer);
        Ok((connection, peer))
    }

    /// Answers a stream that a peer opened, who may be an edge; `flow` is what it may still say.
    pub(super) async fn answer(
        &self,
        (peer, is_edge): (NodeId, bool),
        send: quinn::SendStream,
        receive: quinn::RecvStream,
        flow: Arc<Mutex<Flow>>,
    ) {
        match tokio::time::timeout(EXCHANGE_TIMEOUT, self.respond((peer, is_edge), send, receive, &flow)).await {
            Ok(Ok(())) => {}
            Ok(Err(
                error @ (StreamFault::Frame(_)
                | StreamFault::Unexpected(_)
                | StreamFault::Read(ReadExactError::FinishedEarly(_))),
            )) => {
                self.0.counters.streams_refused.fetch_add(1, Relaxed);
                self.0.gossip.malformed(peer);
                tracing::debug!(%peer, %error, "refused a gossip stream");
            }
            Ok(Err(StreamFault::Flood)) => drop(self.0.counters.flood.fetch_add(1, Relaxed)),
            Ok(Err(error)) => tracing::debug!(%error, "gossip stream"),
            Err(_) => tracing::debug!("gossip stream timed out"),
        }
    }

    async fn respond(
        &self,
        (peer, is_edge): (NodeId, bool),
        mut send: quinn::SendStream,
        mut receive: quinn::RecvStream,
        flow: &Mutex<Flow>,
    ) -> Result<(), StreamFault> {
        let gossip = &self.0.gossip;
        let request = self.read_frame(&mut receive, flow).await?;
        match request.kind {
            Items::KIND if request.body.len() > MAX_PUSH_BYTES => {
                let (length, limit) = (request.body.len(), MAX_PUSH_BYTES);
                return Err(WireError::TooLong { length, limit }.into());
            }
            Items::KIND => gossip.receive(peer, request.read()?, Via::Push).await,
            Summary::KIND => {
                let Some(delta) = gossip.answer(peer, request.read()?).await else { return Ok(()) };
                let delta = frame(&delta);
                // What it is told costs, too.
                if !super::lock(flow).bytes(delta.len(), Instant::now()) {
                    return Err(StreamFault::Flood);
                }
                frames::write_bytes(&mut send, &delta).await?;
                let items: Items = self.read_message(&mut receive, flow).await?;
                if !items.is_empty() {
                    gossip.receive(peer, items, Via::Exchange).await;
                }
            }
            Ping::KIND => {
                if let Some(pong) = gossip.answer_ping(peer, request.read::<Ping>()?.suspected).await {
                    frames::write_frame(&mut send, &pong).await?;
                }
            }
            Inspect::KIND => {
                let view = View { members: admin::sights(&gossip.snapshot()), documents: self.0.documents.sights() };
                frames::write_frame(&mut send, &view).await?;
            }
            DialBack::KIND => {
                if let Some(dialled) = self.dial_back(peer).await {
                    frames::write_frame(&mut send, &dialled).await?;
                }
            }
            kind => {
                let answer = if is_edge { self.answer_edge(peer, kind, &request.body).await } else { None };
                match answer {
                    Some(answer) => frames::write_bytes(&mut send, &answer).await?,
                    // Of a later version, which can do without.
                    None => frames::write_frame(&mut send, &Unsupported { kind }).await?,
                }
            }
        }
        Ok(())
    }

    async fn answer_edge(&self, from: NodeId, kind: u64, body: &Bytes) -> Option<Vec<u8>> {
        let colleagues = self.0.colleagues.read().unwrap_or_else(|e| e.into_inner()).clone();
        for colleague in colleagues {
            if let Some(answer) = colleague.answer(from, kind, body).await {
                return Some(answer);
            }
        }
        None
    }

    /// A message from a peer, as [`Links::read_frame`] reads it; a large one is unfolded while it still counts.
    async fn read_message<T: Framed>(
        &self,
        receive: &mut quinn::RecvStream,
        flow: &Mutex<Flow>,
    ) -> Result<T, StreamFault> {
        let (frame, _permit) = self.read_counted(receive, flow).await?;
        frame.read()
    }

    async fn read_frame(&self, receive: &mut quinn::RecvStream, flow: &Mutex<Flow>) -> Result<Frame, StreamFault> {
        self.read_counted(receive, flow).await.map(|(frame, _)| frame)
    }

    /// A frame from a peer. What it has to say has a limit a second, which is looked at before anything is read; large ones,
    /// which only a first exchange of a large mesh needs, are read a few at a time, from all peers together.
    async fn read_counted(
        &self,
        receive: &mut quinn::RecvStream,
        flow: &Mutex<Flow>,
    ) -> Result<(Frame, Option<SemaphorePermit<'_>>), StreamFault> {
        let header = frames::read_header(receive, MAX_GOSSIP_FRAME_BYTES).await?;
        if !super::lock(flow).bytes(header.1, Instant::now()) {
            return Err(StreamFault::Flood);
        }
        let permit = match header.1 > MAX_PUSH_BYTES {
            true => self.0.large_frames.acquire().await.ok(),
            false => None,
        };
        Ok((frames::read_body(receive, header).await?, permit))
    }
}

pub(super) async fn ping_over(connection: &quinn::Connection, suspected: Option<u16>) -> Result<Pong, StreamFault> {
    let (mut send, mut receive) = connection.open_bi().await?;
    frames::write_frame(&mut send, &Ping { suspected }).await?;
    frames::read_frame(&mut receive, MAX_PONG_BYTES).await?.read()
}
