//! What a node is told at its start, and who signs for it.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use serde::Deserialize;
use starling_protocol::{
    MeshDocument, Name, NodeId, NodeKind, NodeRecord, Phase, ServiceRecord, SignedDocument, SignedRecord,
};

use crate::DocumentError;

/// Timing for the kind of network that the mesh spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// One site: round trips of a few milliseconds. A dead node is known within about three seconds.
    #[default]
    Lan,
    /// Several sites: round trips of up to some hundred milliseconds, and more loss. About ten seconds.
    Wan,
}

/// Settings that do not change while the node runs.
#[derive(Debug, Clone)]
pub struct Config {
    /// How often a random member is probed.
    pub probe_period: Duration,
    /// How long a direct answer may take before others are asked to probe; below the period.
    pub probe_rtt: Duration,
    /// How long a suspect has to refute before it is declared dead, in a small mesh: with confirmations by others, and
    /// without. Grows with log N.
    pub suspicion: [Duration; 2],
    /// Makes the random choices repeatable.
    pub seed: u64,
}

impl Config {
    /// The timing of a profile, with a random seed.
    pub fn new(profile: Profile) -> Self {
        let ms = Duration::from_millis;
        let (probe_period, probe_rtt, suspicion) = match profile {
            Profile::Lan => (ms(500), ms(150), [ms(1500), ms(4500)]),
            Profile::Wan => (ms(2000), ms(700), [ms(5000), ms(15_000)]),
        };
        Self { probe_period, probe_rtt, suspicion, seed: rand::random() }
    }
}

/// Why a record is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct RecordError(pub String);

/// The node's key and its view of who may vouch for keys: the seam to the identity layer.
pub trait Credentials: Send {
    /// Signs this node's own record with its certificate's key.
    fn sign(&self, record: &NodeRecord) -> SignedRecord;
    /// Checks signature, chain, id, name and services against the certificate; only then the content may be believed.
    fn verify(&self, signed: &SignedRecord) -> Result<Arc<NodeRecord>, RecordError>;
    /// Checks signature, certificate and size; only then the content may be believed.
    fn verify_document(&self, signed: &SignedDocument) -> Result<MeshDocument, DocumentError>;
}

/// What this node tells about itself. Id, address and generation are known already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    /// Name, as in the certificate.
    pub name: Name,
    /// Plain node or edge.
    pub kind: NodeKind,
    /// Where it stands.
    pub zone: String,
    /// Its issuing key's id, if it can admit others.
    pub issuer: Option<NodeId>,
    /// What it serves.
    pub services: Vec<ServiceRecord>,
    /// Whether it takes new calls.
    pub phase: Phase,
    /// End of its certificate, unix seconds.
    pub cert_expires: u64,
}

/// What a node has kept from its former life.
#[derive(Debug, Default)]
pub struct Memory {
    /// Addresses of former peers.
    pub peers: Vec<SocketAddr>,
    /// Mesh documents; verified again before they are used.
    pub documents: Vec<Arc<SignedDocument>>,
    /// Version of each kind of document below which nothing is taken.
    pub floors: HashMap<Name, u64>,
}
