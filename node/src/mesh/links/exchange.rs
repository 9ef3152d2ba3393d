//! What goes over the streams of a link, on the asking and on the answering side.

use std::{net::SocketAddr, sync::atomic::Ordering::Relaxed, time::Instant};

use quinn::ReadExactError;
use serde::de::DeserializeOwned;
use starling_gossip::{Ident, Sync, Target, Via};
use starling_protocol::{
    Delta, FrameError, GossipRequest, Items, MAX_GOSSIP_FRAME_BYTES, MAX_PUSH_BYTES, NodeId, Pong, View, frame,
};

use super::{EXCHANGE_TIMEOUT, Links};
use crate::{
    admin,
    port::frames::{self, StreamFault},
};

/// Longest answer to a ping, in bytes.
const MAX_PONG_BYTES: usize = 64;

impl Links {
    /// Compares states with a peer, both ways.
    pub(super) async fn sync(&self, sync: Sync) {
        let addr = sync.with.addr();
        let outcome = tokio::time::timeout(EXCHANGE_TIMEOUT, self.exchange(sync)).await;
        match outcome.unwrap_or_else(|_| Err("no answer in time".into())) {
            Ok(()) => drop(super::lock(&self.0.unreachable).remove(&addr)),
            Err(why) => self.not_reached(addr, why),
        }
    }

    async fn exchange(&self, sync: Sync) -> Result<(), String> {
        let (connection, peer) = match sync.with {
            Target::Node(member) => (self.connection_to(member).await?, member.id),
            Target::Addr(addr) => self.connect(addr).await?,
        };
        let text = |e: StreamFault| e.to_string();
        let (mut send, mut receive) = connection.open_bi().await.map_err(|e| e.to_string())?;
        send.write_all(&frame(&GossipRequest::Sync(sync.summary))).await.map_err(|e| e.to_string())?;
        let delta: Delta = frames::read_frame(&mut receive, MAX_GOSSIP_FRAME_BYTES).await.map_err(text)?;
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
                frames::write_frame(&mut send, &GossipRequest::Inspect).await?;
                frames::read_frame(&mut receive, MAX_GOSSIP_FRAME_BYTES).await
            };
            asked.await.map_err(|e: StreamFault| e.to_string())
        };
        tokio::time::timeout(EXCHANGE_TIMEOUT, asked).await.unwrap_or_else(|_| Err("no answer in time".into()))
    }

    /// The connection to a member that is there, or a new one.
    async fn connection_to(&self, member: Ident) -> Result<quinn::Connection, String> {
        let known = self.table().up(&member.id, Instant::now());
        if let Some(connection) = known {
            return Ok(connection);
        }
        let (connection, peer) = self.connect(member.addr).await?;
        if peer == member.id { Ok(connection) } else { Err("another node answers at its address".into()) }
    }

    /// A new connection, and who answered.
    async fn connect(&self, addr: SocketAddr) -> Result<(quinn::Connection, NodeId), String> {
        let (connection, peer) = self.dial(addr).await?;
        self.adopt_dialled(connection.clone(), peer);
        Ok((connection, peer))
    }

    /// Answers a stream that a peer opened.
    pub(super) async fn answer(&self, peer: NodeId, send: quinn::SendStream, receive: quinn::RecvStream) {
        match tokio::time::timeout(EXCHANGE_TIMEOUT, self.respond(peer, send, receive)).await {
            Ok(Ok(())) => {}
            Ok(Err(error @ (StreamFault::Frame(_) | StreamFault::Read(ReadExactError::FinishedEarly(_))))) => {
                self.0.counters.streams_refused.fetch_add(1, Relaxed);
                tracing::debug!(%peer, %error, "refused a gossip stream");
            }
            Ok(Err(error)) => tracing::debug!(%error, "gossip stream"),
            Err(_) => tracing::debug!("gossip stream timed out"),
        }
    }

    async fn respond(
        &self,
        peer: NodeId,
        mut send: quinn::SendStream,
        mut receive: quinn::RecvStream,
    ) -> Result<(), StreamFault> {
        let gossip = &self.0.gossip;
        match self.read_request(&mut receive).await? {
            GossipRequest::Push(items) => gossip.receive(peer, items, Via::Push).await,
            GossipRequest::Sync(summary) => {
                let Some(delta) = gossip.answer(peer, summary).await else { return Ok(()) };
                frames::write_frame(&mut send, &delta).await?;
                let items: Items = self.read_frame(&mut receive).await?.0;
                if !items.is_empty() {
                    gossip.receive(peer, items, Via::Exchange).await;
                }
            }
            GossipRequest::Ping { suspected } => {
                if let Some(pong) = gossip.answer_ping(peer, suspected).await {
                    frames::write_frame(&mut send, &pong).await?;
                }
            }
            GossipRequest::Inspect => {
                let view = View { members: admin::sights(&gossip.snapshot()), documents: self.0.documents.sights() };
                frames::write_frame(&mut send, &view).await?;
            }
        }
        Ok(())
    }

    /// The first frame.
    async fn read_request(&self, receive: &mut quinn::RecvStream) -> Result<GossipRequest, StreamFault> {
        match self.read_frame(receive).await? {
            (GossipRequest::Push(_), length) if length > MAX_PUSH_BYTES => {
                Err(FrameError::TooLong { length, limit: MAX_PUSH_BYTES }.into())
            }
            (request, _) => Ok(request),
        }
    }

    /// A frame from a peer, and its length. Large ones, which only a first exchange of a large mesh needs, are read a few at
    /// a time, from all peers together.
    async fn read_frame<T: DeserializeOwned>(
        &self,
        receive: &mut quinn::RecvStream,
    ) -> Result<(T, usize), StreamFault> {
        let length = frames::read_length(receive, MAX_GOSSIP_FRAME_BYTES).await?;
        let _permit = match length > MAX_PUSH_BYTES {
            true => Some(self.0.large_frames.acquire().await),
            false => None,
        };
        Ok((frames::read_body(receive, length).await?, length))
    }
}

pub(super) async fn ping_over(connection: &quinn::Connection, suspected: Option<u16>) -> Result<Pong, StreamFault> {
    let (mut send, mut receive) = connection.open_bi().await?;
    frames::write_frame(&mut send, &GossipRequest::Ping { suspected }).await?;
    frames::read_frame(&mut receive, MAX_PONG_BYTES).await
}
