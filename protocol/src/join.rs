use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::Name;

/// Longest frame on a join stream, in bytes.
pub const MAX_JOIN_FRAME_BYTES: usize = 64 << 10;

/// What a node asks of the mesh over `starling-join/1`. Both forms prove themselves, so that any member can relay them to
/// an issuer without being trusted with anything.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum JoinRequest {
    /// A first certificate, for a token.
    Join(Join),
    /// The next certificate for a key that has one.
    Renew(Renew),
}

/// Request for a first certificate.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Join {
    /// The token's claims, exactly as in the token.
    pub claims: Vec<u8>,
    /// HMAC-SHA256, keyed with the token's secret, over [`Join::proven_bytes`]. The secret itself stays home; the proof is
    /// worth nothing without the private key of the CSR.
    pub proof: [u8; 32],
    /// The name that the node wants.
    pub name: Name,
    /// The services that it means to announce; each must be granted.
    pub services: Vec<Name>,
    /// PKCS #10 request (RFC 2986), DER.
    pub csr: Vec<u8>,
    /// A second request, for the issuing key, if the token grants that.
    pub issuer_csr: Option<Vec<u8>>,
}

impl Join {
    /// The bytes that `proof` covers.
    pub fn proven_bytes(&self) -> Vec<u8> {
        crate::encode(&("starling join v1", &self.claims, &self.name, &self.services, &self.csr, &self.issuer_csr))
    }
}

/// Request for the next certificate. The CSR's key must be the certificate's key, which proves possession.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Renew {
    /// PKCS #10 request, DER.
    pub csr: Vec<u8>,
    /// The current chain, the node's own certificate first. It may have ended up to seven days ago.
    pub chain: Vec<Vec<u8>>,
}

/// The answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum JoinReply {
    /// Welcome.
    Granted(Grant),
    /// No, and why.
    Refused(Refusal),
}

/// What a node gets.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Grant {
    /// Its certificate, then its issuer's.
    pub chain: Vec<Vec<u8>>,
    /// Root certificates of the mesh.
    pub roots: Vec<Vec<u8>>,
    /// The certificate for its own issuing key, if asked for and granted.
    pub issuer_cert: Option<Vec<u8>>,
    /// Where other members answer, so that the node is not lost when its seed dies.
    pub peers: Vec<SocketAddr>,
}

/// Why a request is refused. `Display` is what the person at the other end reads, with the next step in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// Past its time.
    #[error("the token has expired; make a new one with `starling token create`")]
    Expired,
    /// All uses are spent.
    #[error("the token has been used already; make a new one with `starling token create` (or with `--uses N`)")]
    Used,
    /// Not made, or changed after it was made, by the issuer that it names.
    #[error("the token was not made by this mesh's issuer, or was altered; copy it again or make a new one")]
    Forged,
    /// Made for another mesh.
    #[error("the token belongs to another mesh; check the seed address, or make a token on this mesh")]
    Foreign,
    /// Asks for more than the token grants.
    #[error("the token does not grant {0}; make one that does with `starling token create`")]
    NotGranted(String),
    /// Another node has the name.
    #[error("a live node is called {0:?} already; choose another --name, or stop that node first")]
    NameTaken(Name),
    /// The issuer named in the token does not answer.
    #[error(
        "the issuer that made this token cannot be reached from the seed; try again, or use a token of another issuer"
    )]
    IssuerUnreachable,
    /// The certificate to renew is not valid.
    #[error("the certificate cannot be renewed: {0}; join again with a new token")]
    NotRenewable(String),
    /// The issuer cannot do it.
    #[error("the issuer cannot sign: {0}")]
    Issuer(String),
    /// Not understood.
    #[error("the request was not understood: {0}")]
    Malformed(String),
}

impl Refusal {
    /// Whether the same request may succeed later without anyone changing it.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::IssuerUnreachable | Self::Issuer(_))
    }
}
