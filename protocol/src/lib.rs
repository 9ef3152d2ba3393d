//! What Starling nodes say to each other, and to their operators.
//!
//! Names and ids, node records, join tokens, length-bounded frames, header names, close codes and the JSON of the admin
//! API. Nothing here awaits, opens a socket or reads a clock: every type is data, every decoder is bounded.

mod close;
mod document;
mod fleet;
mod frame;
mod gossip;
mod join;
mod name;
mod packet;
mod record;
mod strike;
mod token;
mod wire;

pub mod admin;
pub mod alpn;
pub mod headers;

pub use close::CloseCode;
pub use document::{
    DocumentEdition, DocumentHash, DocumentState, MAX_DOCUMENT_BYTES, MAX_DOCUMENTS, MeshDocument, SignedDocument,
};
pub use fleet::{
    AskCounts, ChallengeShown, FindCertificate, FoundCertificate, KnownCount, ShowChallenge, TakeCount, TakenCount,
    TellCounts,
};
pub use frame::{FrameHeader, Framed, MAX_FRAME_HEADER_BYTES, Unsupported, frame, frame_header, frame_of};
pub use gossip::{
    Delta, DialBack, DialledBack, DocumentSight, Inspect, Items, MAX_GOSSIP_FRAME_BYTES, MAX_PUSH_BYTES, MemberHealth,
    MemberState, Ping, Pong, Sight, StrikeEdition, Summary, View, Word,
};
pub use join::{
    Answer, Application, Floor, Grant, Join, Ledger, MAX_JOIN_FRAME_BYTES, MAX_LEDGER_BYTES, Refusal, RefusalCode,
    Relayed, Renew, Reservation, SignedAnswer, SignedReservation,
};
pub use name::{InvalidName, MeshName, Name, NodeId, service_of_host};
pub use packet::{Life, MAX_PACKET_BYTES, News, Packet, PacketError, Purpose};
pub use record::{
    Capabilities, IssuerProof, MAX_LABEL_BYTES, MAX_LINK_BYTES, MAX_RECORD_BYTES, MAX_SERVICES, MAX_WEIGHT, NodeKind,
    NodeRecord, Phase, Protocol, RecordEdition, ServiceRecord, ServiceState, SignedRecord, is_label,
};
pub use strike::{SignedStrike, Strike};
pub use token::{Grants, JoinToken, NamePattern, TokenClaims, TokenError};
pub use wire::{MAX_REPEATED, Message, Unknown, WireError, decode, encode, put_varint, take_varint};

/// Default UDP port of the mesh.
pub const MESH_PORT: u16 = 7400;
/// Default TCP port of the outbound listener, on loopback.
pub const OUTBOUND_PORT: u16 = 7401;
/// Default TCP port of the admin API, on loopback.
pub const ADMIN_PORT: u16 = 7402;
