//! What Starling nodes say to each other, and to their operators.
//!
//! Names and ids, node records, join tokens, length-bounded frames, header names, close codes and the JSON of the admin
//! API. Nothing here awaits, opens a socket or reads a clock: every type is data, every decoder is bounded.

mod close;
mod document;
mod frame;
mod gossip;
mod join;
mod name;
mod record;
mod token;

pub mod admin;
pub mod alpn;
pub mod headers;

pub use close::CloseCode;
pub use document::{DocumentHash, MAX_DOCUMENT_BYTES, MAX_DOCUMENTS, MeshDocument, SignedDocument};
pub use frame::{FRAME_HEADER_BYTES, FrameError, decode, encode, frame, frame_length};
pub use gossip::{
    Delta, DocumentEdition, DocumentSight, DocumentState, Forgotten, GossipRequest, Items, MAX_GOSSIP_FRAME_BYTES,
    MAX_PUSH_BYTES, MemberHealth, MemberState, Pong, ROOT_HASH_BYTES, RecordEdition, Sight, Summary, View,
};
pub use join::{Grant, Join, JoinReply, JoinRequest, MAX_JOIN_FRAME_BYTES, Refusal, Renew};
pub use name::{InvalidName, MeshName, Name, NodeId, service_of_host};
pub use record::{
    MAX_RECORD_BYTES, MAX_SERVICES, NodeKind, NodeRecord, Phase, Protocol, ServiceRecord, ServiceState, SignedRecord,
};
pub use token::{Grants, JoinToken, TokenClaims, TokenError};

/// Default UDP port of the mesh.
pub const MESH_PORT: u16 = 7400;
/// Default TCP port of the outbound listener, on loopback.
pub const OUTBOUND_PORT: u16 = 7401;
/// Default TCP port of the admin API, on loopback.
pub const ADMIN_PORT: u16 = 7402;
