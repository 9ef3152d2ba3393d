//! The admin API's JSON: what `starling members -o json` and its sisters print. Field names are a contract.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};

use crate::{DocumentState, Name, NodeKind, Protocol, ServiceState, wire::open_enum};

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
    /// Where another node runs with its key; present while two do, and for ten minutes afterwards.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub also_at: Option<SocketAddr>,
    /// Who could not reach it, by name; present while somebody suspects it.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub suspected_by: Vec<String>,
    /// What changes all the time; present when asked for (`?detail=true`).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub detail: Option<MemberDetail>,
}

/// What a node knows of a member at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberDetail {
    /// How long ago it last sent any gossip, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub heard_ms_ago: Option<u64>,
    /// `connected`, `dialling`, `unreachable`, `closed`, or `none` until there is something to say.
    pub connection: String,
    /// Round trip of that connection, in microseconds.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub rtt_us: Option<u64>,
    /// Hash of all records and documents that it last said to have, hex. The same everywhere in a calm mesh.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub root: Option<String>,
    /// Version of its software, as it says.
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub software: String,
    /// Things of it that were refused since the answering node's start; absent if there were none.
    #[serde(skip_serializing_if = "Refused::is_nothing", default)]
    pub refused: Refused,
}

/// What was refused of a member: a liar, or one with a bad link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Signed things whose signature, certificate or content is wrong.
    pub forged: u64,
    /// Messages that are not in the protocol's form, or speak for somebody else.
    pub malformed: u64,
    /// Mentions of members of which there is no record.
    pub strangers: u64,
    /// Complaints about members that turned out to be there.
    pub complaints: u64,
}

impl Refused {
    /// Whether there is nothing.
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }

    /// All together.
    pub fn total(&self) -> u64 {
        self.forged + self.malformed + self.strangers + self.complaints
    }
}

/// A name and the key that it belongs to, as an issuer has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnedName {
    /// The name.
    pub name: Name,
    /// Id of the key, hex.
    pub id: String,
    /// Since when, RFC 3339 in UTC.
    pub since: String,
    /// Until when, unless it is renewed; RFC 3339 in UTC.
    pub until: String,
}

/// Body of `POST /v1/names/free`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreeName {
    /// The name.
    pub name: Name,
}

/// How one node sees the mesh, as another was told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObserverView {
    /// The observing node's name.
    pub observer: String,
    /// Why it could not be asked; then it sees nothing here.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
    /// Status by member name.
    pub sees: BTreeMap<String, MemberStatus>,
}

/// A mesh document, and who has which edition of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// Which document.
    pub kind: Name,
    /// The newest version that any live node has.
    pub version: u64,
    /// SHA-256 of its body, hex.
    pub hash: String,
    /// What the answering node does with it, or whoever has it.
    pub state: DocumentState,
    /// From when it is in force, RFC 3339 in UTC.
    pub not_before: String,
    /// Until when; absent if for ever.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub expires: Option<String>,
    /// Whether any node that was asked has another edition, or does something else with it.
    pub drift: bool,
    /// Every live node.
    pub nodes: Vec<NodeDocument>,
}

/// The edition of a document that one node has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeDocument {
    /// Name.
    pub node: String,
    /// Its version; absent if it has none.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub version: Option<u64>,
    /// Hash of its version, hex.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub hash: Option<String>,
    /// What it does with it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub state: Option<DocumentState>,
    /// Why it could not be asked.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
}

/// Body of `POST /v1/documents`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewDocument {
    /// The signed document: base64 of its encoding.
    pub signed: String,
}

/// Body of `POST /v1/ping`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ping {
    /// Name or id of the member.
    pub node: String,
}

/// Its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pinged {
    /// Name of the member.
    pub node: String,
    /// Its mesh address.
    pub addr: SocketAddr,
    /// Time to the answer, in microseconds.
    pub rtt_us: u64,
    /// Which life of it answered.
    pub generation: u64,
}

/// Body of `POST /v1/forget`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forget {
    /// Name or id of the member, which must be down.
    pub node: String,
    /// Not even to be shown any more.
    #[serde(default)]
    pub prune: bool,
    /// The strike as the admin key or an issuer has signed it, base64. Without it, the node signs it itself, if it is an issuer.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub signed: Option<String>,
}

open_enum! {
    /// How a member is.
    MemberStatus {
        /// Answers.
        0 Alive "alive",
        /// Missed a probe.
        1 Suspect "suspect",
        /// Dead by the mesh's judgement.
        2 Down "down",
        /// Gone by its own word.
        3 Left "left",
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
    /// Since when, or from when on, that should not be used any more; RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deprecated: Option<String>,
    /// From when on it is gone; RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sunset: Option<String>,
    /// Where that is explained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// Its instances, by node name.
    pub instances: Vec<ServiceInstance>,
    /// Attempts beyond the first at calls of the answering node's to it, in any version: after a failure.
    #[serde(default)]
    pub retries: u64,
    /// The same before a failure.
    #[serde(default)]
    pub hedges: u64,
    /// Retries and hedges that were not made, because the service's budget was spent.
    #[serde(default)]
    pub retries_denied: u64,
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
    /// How its node speaks to it.
    #[serde(default)]
    pub protocol: Protocol,
    /// Calls of the answering node's to it that are under way.
    #[serde(default)]
    pub in_flight: u32,
    /// How soon the answering node expects an answer of it, in microseconds; absent if it was not called of late.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_us: Option<u64>,
    /// Of the answering node's own: calls that the service gets at a time, and how many were refused beyond that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<CallLimit>,
}

/// How many calls a service gets at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallLimit {
    /// As it stands.
    pub calls: u64,
    /// Calls that were refused at once, since the start.
    pub shed: u64,
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
    /// How much the node doubts its own judgement of others, 0 to 8; above 0, its own link or CPU may be the problem.
    #[serde(default)]
    pub doubt: u64,
    /// Services most of whose instances vanished at once, so that the last known ones are still called.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub panicking: Vec<Name>,
    /// Seeds that do not answer right now, with why.
    pub unreachable_seeds: Vec<String>,
    /// Why others cannot reach this node at the address that it tells them; absent while they can.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub not_reached: Option<String>,
    /// Where another node runs with this one's key; absent unless two do, or did ten minutes ago.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub also_at: Option<SocketAddr>,
    /// Process id of the one before this one, which still finishes what it has; absent otherwise.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub predecessor: Option<u32>,
    /// Why the last reload was refused; absent when it was taken.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reload_error: Option<String>,
}

/// A wish that a new process takes over.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Upgrade {
    /// The program to run, with the arguments of the one that runs; the same program if absent.
    pub binary: Option<String>,
}

/// A process has taken over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upgraded {
    /// Its process id.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// Process id of the one before, which finishes what it has.
    pub predecessor: u32,
}

/// A public route of an edge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Host, or `*`.
    pub host: String,
    /// Path prefix.
    pub path: String,
    /// What a request must have besides, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<String>,
    /// Service that answers, unless it is a redirect.
    pub service: Option<Name>,
    /// Where requests are sent instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redirect: Option<String>,
    /// Whether requests are put off.
    #[serde(default)]
    pub maintenance: bool,
    /// Any of these lets a caller in; empty means public.
    pub auth: Vec<String>,
    /// The service that decides besides whether a request may pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forward: Option<Name>,
    /// Plan that limits it, if any.
    pub plan: Option<String>,
    /// API versions, if any.
    pub versions: Vec<String>,
}

/// A certificate that an edge shows to clients.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// Host names, exact or `*.example.com`.
    pub hosts: Vec<String>,
    /// Whether somebody vouches for it.
    pub state: CertificateState,
    /// When it ends (RFC 3339); `None` of one that the edge made itself.
    pub until: Option<String>,
    /// How it is renewed; `None` if it comes from files, which somebody else renews.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issuance: Option<Issuance>,
}

/// Whether somebody vouches for a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CertificateState {
    /// It is valid as far as its dates go.
    Valid,
    /// It has ended.
    Ended,
    /// Another one stands in, until an authority has issued it: one that lacks names, or one that the edge made itself, which clients
    /// refuse; that one has no end.
    StandIn,
}

/// How the edge has a certificate issued and renewed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Issuance {
    /// Tries that failed, one after the other.
    pub failures: u32,
    /// Why the last one failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// When the next try is (RFC 3339).
    pub next: String,
}

/// Body of `POST /v1/certificates/renew` on an edge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewCertificate {
    /// One of its host names.
    pub host: String,
}

/// How it stands with one quota of a caller, on one edge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuotaUse {
    /// The plan that it is of.
    pub plan: String,
    /// In what time: `day`, `month`, or a span such as `7d`.
    pub period: String,
    /// How much there is.
    pub limit: u64,
    /// How much is used.
    pub used: u64,
    /// Seconds until there is room again, or more of it.
    pub resets_in_s: u64,
}

/// Body of `POST /v1/explain` on an edge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explain {
    /// Method of the request.
    pub method: String,
    /// Its whole URL.
    pub url: String,
    /// Its fields.
    #[serde(default)]
    pub headers: Vec<(String, String)>,
}

/// Where a request would go on an edge, and why.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// Method of the request.
    pub method: String,
    /// Its URL.
    pub url: String,
    /// Why it goes nowhere, if it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<RefusedRequest>,
    /// The route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<Route>,
    /// Why that one.
    #[serde(default)]
    pub because: String,
    /// Where the request is sent instead of to a service, behind the status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redirected: Option<String>,
    /// Path and query that the service sees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The version of the API, if there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Where the request names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version_by: Option<String>,
    /// Fields of the answer that tell of the version.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<(String, String)>,
    /// What the route's plan lets a caller do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<String>,
    /// How much of it one call takes.
    #[serde(default)]
    pub cost: u32,
}

/// Why a request goes nowhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedRequest {
    /// Status of the answer.
    pub status: u16,
    /// Why.
    pub why: String,
}

/// Body of `POST /v1/quotas/show` and `POST /v1/quotas/reset` on an edge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuotaOf {
    /// A consumer;
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consumer: Option<String>,
    /// or the address of callers who are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
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
    /// Whether it holds on all edges.
    #[serde(default)]
    pub published: bool,
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
