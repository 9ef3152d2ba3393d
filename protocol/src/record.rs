use std::{fmt, net::SocketAddr, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{FrameError, Name, NodeId, RecordEdition, decode, encode};

/// Largest encoded record, in bytes.
pub const MAX_RECORD_BYTES: usize = 16 << 10;
/// Most services one node may announce.
pub const MAX_SERVICES: usize = 128;

/// What a node says about itself. Only that node can sign it; `(generation, seq)` orders a node's own records.
///
/// The first three fields are those of a [`RecordEdition`], and are read as one by [`SignedRecord::peek_edition`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Who; equals the hash of the signing key.
    pub id: NodeId,
    /// Which life of the node.
    pub generation: u64,
    /// Which edition within that life.
    pub seq: u64,
    /// Name, as in the certificate.
    pub name: Name,
    /// Advertised address of the mesh port.
    pub addr: SocketAddr,
    /// Plain node or edge.
    pub kind: NodeKind,
    /// Where it stands; empty if not told.
    pub zone: String,
    /// Its issuing key's id, if it can admit and renew nodes.
    pub issuer: Option<NodeId>,
    /// What it serves.
    pub services: Vec<ServiceRecord>,
    /// Whether it takes new calls.
    pub phase: Phase,
    /// End of its certificate, in unix seconds.
    pub cert_expires: u64,
}

impl NodeRecord {
    /// Total order of one node's records: newer wins.
    pub fn edition(&self) -> (u64, u64) {
        (self.generation, self.seq)
    }
}

/// Plain node or edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeKind {
    /// Beside a service.
    Node,
    /// With public listeners.
    Edge,
}

/// Where a node is in its life, by its own word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// Takes calls.
    Up,
    /// Finishes what it has; give it nothing new.
    Draining,
    /// Gone on purpose: not a failure.
    Left,
}

/// One service behind a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceRecord {
    /// What callers ask for.
    pub name: Name,
    /// API version of this instance; empty if not told.
    pub version: String,
    /// How the node speaks to it.
    pub protocol: Protocol,
    /// Share of calls relative to other instances; 100 is normal, 0 none.
    pub weight: u16,
    /// Whether it can be called now.
    pub state: ServiceState,
}

/// How a node speaks to the service behind it. Declared, never sniffed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// HTTP/1.1 (RFC 9112).
    #[default]
    Http1,
    /// HTTP/2 without TLS, prior knowledge (RFC 9113 §3.3); what gRPC servers speak.
    H2c,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Http1 => "http1",
            Self::H2c => "h2c",
        })
    }
}

impl FromStr for Protocol {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "http1" => Ok(Self::Http1),
            "h2c" => Ok(Self::H2c),
            "tcp" | "udp" => Err(format!("protocol {text:?} is not in this version yet; use http1 or h2c")),
            _ => Err(format!("unknown protocol {text:?}; use http1 or h2c")),
        }
    }
}

/// Whether an instance can be called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceState {
    /// Yes.
    Up,
    /// Finishes what it has.
    Draining,
    /// Its health check fails.
    Unhealthy,
}

/// A record as it travels: its exact bytes, the signature over them, and the certificates that vouch for the key.
///
/// Nothing in `body` may be believed before the signature is checked; [`SignedRecord::peek`] is for routing the bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedRecord {
    /// Postcard of a [`NodeRecord`].
    pub body: Vec<u8>,
    /// ECDSA P-256 with SHA-256 over [`SignedRecord::signed_bytes`], ASN.1 encoded.
    pub signature: Vec<u8>,
    /// DER certificates: the node's own, then its issuer's.
    pub chain: Vec<Vec<u8>>,
}

impl SignedRecord {
    /// Encoded body of `record`, ready to be signed.
    pub fn encode_body(record: &NodeRecord) -> Vec<u8> {
        encode(record)
    }

    /// The bytes that are signed: a context string, so that the signature can serve for nothing else, and the body.
    pub fn signed_bytes(body: &[u8]) -> Vec<u8> {
        [b"starling node record v1\0".as_slice(), body].concat()
    }

    /// Whose record it claims to be, and which edition, *without* believing it and without decoding the rest.
    pub fn peek_edition(&self) -> Result<RecordEdition, FrameError> {
        let (edition, _) = postcard::take_from_bytes(&self.body).map_err(|e| FrameError::Malformed(e.to_string()))?;
        Ok(edition)
    }

    /// Size of body, signature and chain, in bytes.
    pub fn encoded_len(&self) -> usize {
        self.body.len() + self.signature.len() + self.chain.iter().map(Vec::len).sum::<usize>()
    }

    /// Decodes the body *without* believing it. Errors on oversized or malformed bodies.
    pub fn peek(&self) -> Result<NodeRecord, FrameError> {
        let total = self.encoded_len();
        if total > MAX_RECORD_BYTES {
            return Err(FrameError::TooLong { length: total, limit: MAX_RECORD_BYTES });
        }
        let record: NodeRecord = decode(&self.body)?;
        if record.services.len() > MAX_SERVICES || record.zone.len() > 64 {
            return Err(FrameError::Malformed("too many services or too long a zone".into()));
        }
        Ok(record)
    }
}
