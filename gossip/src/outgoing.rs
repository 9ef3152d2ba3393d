//! What the state machine wants done, and what it tells when asked.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use starling_protocol::{Items, NodeId, Summary};

use crate::{DocumentView, Ident, Refused, Snapshot};

/// Whom an exchange is with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Target {
    /// A member.
    Node(Ident),
    /// Whoever answers there: a seed, or a former peer.
    Addr(SocketAddr),
    /// A peer that has a connection to this node, and whose address is not known.
    Linked(NodeId),
}

impl Target {
    /// Where to dial, if there is no connection.
    pub fn addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Node(ident) => Some(ident.addr),
            Self::Addr(addr) => Some(*addr),
            Self::Linked(_) => None,
        }
    }
}

/// Which connection a packet is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// A new one, if there is none: a probe must not fail for want of it.
    Dial,
    /// One that is there, or on its way.
    Linked,
    /// One that is there to anybody, if there is none to its receiver: a rumour is for whoever hears it.
    Anybody,
}

/// How items have come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// Somebody thought that they would be news.
    Push,
    /// Two nodes compared what they have, and this one lacked them.
    Exchange,
}

/// What the state machine wants done. It does no I/O itself.
#[derive(Debug)]
pub enum Outgoing {
    /// Send a SWIM packet; losing it is fine, delaying it is not.
    Datagram {
        /// Whom to.
        to: Ident,
        /// The packet, at most 1150 bytes.
        bytes: Bytes,
        /// What if there is no connection.
        reach: Reach,
    },
    /// Send items over that many live connections, taken at random.
    Push {
        /// Most connections.
        fanout: usize,
        /// The items.
        items: Items,
    },
    /// Exchange summaries over a stream; see [`Gossip::answer`](crate::Gossip::answer) and
    /// [`Gossip::absorb`](crate::Gossip::absorb).
    Sync(Sync),
    /// Ping a suspect over a stream, for `limit` at most; tell [`Gossip::checked`](crate::Gossip::checked).
    Check {
        /// Whom.
        suspect: Ident,
        /// At which incarnation it is suspected.
        incarnation: u16,
        /// How long to wait.
        limit: Duration,
    },
    /// A member came back under a new generation: a connection to its former life may be dead.
    Renewed(NodeId),
    /// A member died or left: nothing is to be sent over its connection, but it is to be heard for a while longer. Only who
    /// heard it while it heard nobody can tell it afterwards.
    Gone(NodeId),
    /// Store the generation before anything else is sent.
    Generation(u64),
    /// Store the addresses of live members.
    Peers(Vec<SocketAddr>),
    /// Store the document, and let it come into force.
    Document(DocumentView),
    /// The mesh has changed.
    Changed(Arc<Snapshot>),
}

/// An exchange to make.
#[derive(Debug)]
pub struct Sync {
    /// With whom.
    pub with: Target,
    /// What this node has.
    pub summary: Summary,
}

/// Things counted since the start. Those that were refused stay 0 in a healthy mesh.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counters {
    /// Packets that are no SWIM packets, or speak for another node than the connection's.
    pub packets_refused: u64,
    /// Packets of a later version of the protocol. No offence.
    pub packets_unsupported: u64,
    /// Records whose signature, chain, names, generation or size are wrong.
    pub records_refused: u64,
    /// Records older than the one that is known: late, or replayed.
    pub records_stale: u64,
    /// Documents whose signature, certificate or size are wrong, or that leap or roll back.
    pub documents_refused: u64,
    /// Strikes that neither the admin key nor an issuer has signed.
    pub strikes_refused: u64,
    /// Times that the mesh declared this node dead.
    pub lost: u64,
    /// Exchanges begun.
    pub exchanges: u64,
    /// How much this node doubts its own judgement, 0 to 8 (Lifeguard's local health).
    pub doubt: u64,
    /// Updates that wait to be passed on.
    pub backlog: u64,
}

/// What is known of a member at this moment, beside the snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Detail {
    /// Who.
    pub id: NodeId,
    /// How long ago it last sent anything; `None` if it never did.
    pub heard: Option<Duration>,
    /// Root hash of its records and documents, as it last told.
    pub root: Option<u64>,
    /// What was refused of it.
    pub refused: Refused,
}

/// Why a member cannot be struck off.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForgetError {
    /// Not by whom it must be signed.
    #[error("{0}")]
    Unverified(String),
    /// Nobody of that id.
    #[error("no member has that name or id")]
    Unknown,
    /// It lives.
    #[error("it is not down; to take a live node out, drain it, or stop it")]
    Alive,
    /// Too many are remembered already.
    #[error("too many members have been struck off within a day")]
    Full,
}
