//! What a node is told at its start, and who signs for it.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use serde::Deserialize;
use starling_protocol::{
    Capabilities, IssuerProof, MeshDocument, Name, NodeKind, NodeRecord, Phase, ServiceRecord, SignedDocument,
    SignedRecord, SignedStrike, Strike,
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

/// Why a record or a strike is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Its signature, certificate or content is wrong, for everybody and at any time: who passes it on has not looked.
    #[error("{0}")]
    Forged(String),
    /// It is not for this node, or not now: another may rightly have taken it.
    #[error("{0}")]
    Unfit(String),
}

/// The node's key and its view of who may vouch for keys: the seam to the identity layer.
pub trait Credentials: Send + Sync {
    /// Signs this node's own record with its certificate's key.
    fn sign(&self, record: &NodeRecord) -> SignedRecord;
    /// Checks signature, chain, id, name and services against the certificate; only then the content may be believed. What is
    /// returned ends when the certificate does.
    fn verify(&self, signed: &SignedRecord) -> Result<Arc<NodeRecord>, RecordError>;
    /// Signs a word of this node's with the same key.
    fn sign_word(&self, bytes: &[u8]) -> Vec<u8>;
    /// Whether the signer of that record, which is verified, signed those bytes.
    fn verify_word(&self, signer: &SignedRecord, bytes: &[u8], signature: &[u8]) -> bool;
    /// Checks signature, certificate and size; only then the content may be believed.
    fn verify_document(&self, signed: &SignedDocument) -> Result<MeshDocument, DocumentError>;
    /// Checks that the mesh's admin key or an issuer signed it.
    fn verify_strike(&self, signed: &SignedStrike) -> Result<Strike, RecordError>;
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
    /// That it can admit others.
    pub issuer: Option<IssuerProof>,
    /// What it serves.
    pub services: Vec<ServiceRecord>,
    /// Whether it takes new calls.
    pub phase: Phase,
    /// End of its certificate, unix seconds.
    pub cert_expires: u64,
    /// What it can speak.
    pub speaks: Capabilities,
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
