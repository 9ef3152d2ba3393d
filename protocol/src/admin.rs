//! The admin API's JSON: what `starling members -o json` and its sisters print. Field names are a contract.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::{Name, NodeKind, Protocol, ServiceState};

/// A member as the answering node sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Name by its record, or the short id while the record is still on its way.
    pub name: String,
    /// Node id, hex.
    pub id: String,
    /// Mesh address.
    pub addr: SocketAddr,
    /// `node` or `edge`.
    pub kind: NodeKind,
    /// How it is.
    pub status: MemberStatus,
    /// Which life of it.
    pub generation: u64,
    /// Which refutation within that life.
    pub incarnation: u16,
    /// Zone, empty if not told.
    pub zone: String,
    /// What it serves.
    pub services: Vec<MemberService>,
    /// Since when it has this status, RFC 3339 in UTC.
    pub since: String,
    /// End of its certificate, RFC 3339 in UTC; absent while its record is unknown.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cert_expires: Option<String>,
    /// Whether this is the answering node; present only when true.
    #[serde(rename = "self", skip_serializing_if = "std::ops::Not::not", default)]
    pub is_self: bool,
}

/// How a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemberStatus {
    /// Answers.
    Alive,
    /// Missed a probe.
    Suspect,
    /// Dead by the mesh's judgement.
    Down,
    /// Gone by its own word.
    Left,
}

impl MemberStatus {
    /// As in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Alive => "alive",
            Self::Suspect => "suspect",
            Self::Down => "down",
            Self::Left => "left",
        }
    }
}

/// A service of a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberService {
    /// Name.
    pub name: Name,
    /// API version, empty if not told.
    pub version: String,
    /// How its node speaks to it.
    pub protocol: Protocol,
    /// Whether it can be called.
    pub state: ServiceState,
}

/// A service and who serves it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Name.
    pub name: Name,
    /// API version, empty if not told.
    pub version: String,
    /// Its instances, by node name.
    pub instances: Vec<ServiceInstance>,
}

/// One instance of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceInstance {
    /// Node name.
    pub node: String,
    /// Mesh address of the node.
    pub addr: SocketAddr,
    /// Zone of the node.
    pub zone: String,
    /// The node's status.
    pub status: MemberStatus,
    /// The instance's own state.
    pub state: ServiceState,
    /// Whether this node's own experience keeps calls away from it.
    pub ejected: bool,
}

/// The answering node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Name.
    pub name: Name,
    /// Node id, hex.
    pub id: String,
    /// Mesh.
    pub mesh: String,
    /// SPIFFE id.
    pub spiffe_id: String,
    /// `node` or `edge`.
    pub kind: NodeKind,
    /// Version of the binary.
    pub version: String,
    /// `starting`, `ready`, `draining`.
    pub phase: String,
    /// Mesh address bound.
    pub listen: SocketAddr,
    /// Mesh address told to others.
    pub advertise: SocketAddr,
    /// Outbound listener, if on.
    pub outbound: Option<SocketAddr>,
    /// Which life.
    pub generation: u64,
    /// Seconds since the start.
    pub uptime_s: u64,
    /// End of the certificate, RFC 3339 in UTC.
    pub cert_expires: String,
    /// Whether it can admit others.
    pub issuer: bool,
    /// Members alive, itself included.
    pub members_alive: usize,
    /// Members known.
    pub members: usize,
    /// Live issuers in the mesh. With none, the mesh runs until the last certificate ends.
    pub issuers_alive: usize,
    /// The earliest certificate end among live members, RFC 3339 in UTC.
    pub first_cert_expires: String,
    /// Calls in flight, in and out.
    pub in_flight: usize,
    /// Seeds that do not answer right now, with why.
    pub unreachable_seeds: Vec<String>,
    /// Why the last reload was refused; absent when it was taken.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reload_error: Option<String>,
}

/// A public route of an edge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Host, or `*`.
    pub host: String,
    /// Path prefix.
    pub path: String,
    /// Service that answers.
    pub service: Name,
    /// Any of these lets a caller in; empty means public.
    pub auth: Vec<String>,
    /// Plan that limits it, if any.
    pub plan: Option<String>,
    /// API versions, if any.
    pub versions: Vec<String>,
}

/// Body of `POST /v1/keys` on an edge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewKey {
    /// Whom the key is for.
    pub consumer: String,
    /// Plan, if not the route's.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub plan: Option<String>,
}

/// An API key, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// Public part.
    pub id: String,
    /// Whom it is for.
    pub consumer: String,
    /// Plan, if not the route's.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub plan: Option<String>,
    /// When it was made, RFC 3339 in UTC.
    pub created: String,
    /// The whole key, in the answer to its creation and never again.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub key: Option<String>,
}

/// Any refusal of the admin API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Error {
    /// What is wrong, and the next step.
    pub error: String,
}
