//! The edges of a mesh, and what they ask each other: over the links that gossip has, and only of those that are edges by
//! their certificates.

use std::{pin::Pin, sync::Arc};

use bytes::Bytes;
use starling_gossip::GossipHandle;
use starling_protocol::{Framed, NodeId, NodeKind};

use super::links::Links;

/// Answers what other edges ask this one.
pub trait Colleague: Send + Sync {
    /// The answer to a question of an edge, as a frame; `None` if it is none that is known, or if nobody asks well. Must not block: the links
    /// wait for it.
    fn answer<'a>(&'a self, from: NodeId, kind: u64, body: &'a Bytes) -> Answering<'a>;
}

/// An answer that may take its time.
pub type Answering<'a> = Pin<Box<dyn Future<Output = Option<Vec<u8>>> + Send + 'a>>;

/// The edges of the mesh, as one of them sees them. Cheap to clone.
#[derive(Clone)]
pub struct Fleet {
    links: Links,
    gossip: GossipHandle,
    own: NodeId,
}

impl Fleet {
    pub(crate) fn new(links: Links, gossip: GossipHandle, own: NodeId) -> Self {
        Self { links, gossip, own }
    }

    /// This one.
    pub fn own(&self) -> NodeId {
        self.own
    }

    /// The other ones that are alive.
    pub fn others(&self) -> Vec<NodeId> {
        let snapshot = self.gossip.snapshot();
        let others = snapshot.members.iter().filter(|member| member.is_live() && !member.is_self);
        let edges = others.filter(|member| member.record.as_ref().is_some_and(|r| r.kind == NodeKind::Edge));
        edges.map(|member| member.id).collect()
    }

    /// Whether the mesh has been heard; before that, others may be there that are not known.
    pub fn is_settled(&self) -> bool {
        self.gossip.snapshot().introduced
    }

    /// Asks one of them. Cancel safe, but that it may have heard the question.
    ///
    /// # Errors
    /// In words, if it cannot be reached, is no edge, or does not know the question.
    pub async fn ask<Q: Framed, A: Framed>(&self, edge: &NodeId, question: &Q) -> Result<A, String> {
        let ident = self.gossip.snapshot().member(edge).map(|member| member.ident());
        self.links.ask_edge(ident.ok_or("it is not in the mesh")?, question).await
    }

    /// Says who answers for this one; before that nobody does. Where several do, each is asked until one knows the question.
    pub fn answer_with(&self, colleague: Arc<dyn Colleague>) {
        self.links.answer_edges_with(colleague);
    }
}
