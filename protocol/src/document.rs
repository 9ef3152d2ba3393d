use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{FrameError, Name, decode, encode};

/// Largest content of a mesh document, in bytes.
pub const MAX_DOCUMENT_BYTES: usize = 256 << 10;
/// Most kinds of documents in a mesh.
pub const MAX_DOCUMENTS: usize = 64;
/// What a document's certificate, signature and fields may take beside its content, in bytes.
const MAX_ENVELOPE_BYTES: usize = 8 << 10;

/// Something that the whole mesh has agreed on: signed by a holder of the mesh's admin key, the same on every node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeshDocument {
    /// Which document; there is one current version of each kind.
    pub kind: Name,
    /// Higher wins; of two with the same version, the one with the higher hash.
    pub version: u64,
    /// Hash of the version that it replaces; zeros for the first.
    pub previous: DocumentHash,
    /// From when it is in force, unix seconds.
    pub not_before: u64,
    /// Until when, unix seconds; for ever if absent.
    pub expires: Option<u64>,
    /// A tombstone: the document is deleted, and only its version is kept.
    pub deleted: bool,
    /// What it says, in the form of its kind.
    pub content: Vec<u8>,
}

/// SHA-256 of a document's body.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DocumentHash(pub [u8; 32]);

impl fmt::Display for DocumentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl FromStr for DocumentHash {
    type Err = FrameError;
    fn from_str(hex: &str) -> Result<Self, FrameError> {
        let digits: Option<Vec<u8>> = hex.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect();
        let bytes: Vec<u8> =
            digits.unwrap_or_default().chunks(2).map(|pair| pair.iter().fold(0, |b, d| b << 4 | d)).collect();
        let hash = bytes.try_into().ok().filter(|_| hex.len() == 64);
        hash.map(Self).ok_or_else(|| FrameError::Malformed("a document's hash has 64 hex digits".into()))
    }
}

impl fmt::Debug for DocumentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// A document as it travels: its exact bytes, the signature over them, and the certificate of the admin key.
///
/// Nothing in `body` may be believed before the signature is checked; [`SignedDocument::peek`] is for routing the bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedDocument {
    /// Postcard of a [`MeshDocument`].
    pub body: Vec<u8>,
    /// Ed25519 over [`SignedDocument::signed_bytes`] (RFC 8032).
    pub signature: Vec<u8>,
    /// DER certificate of the admin key, signed by the mesh's root.
    pub certificate: Vec<u8>,
}

impl SignedDocument {
    /// Encoded body of `document`, ready to be signed.
    pub fn encode_body(document: &MeshDocument) -> Vec<u8> {
        encode(document)
    }

    /// The bytes that are signed: a context string, so that the signature can serve for nothing else, and the body.
    pub fn signed_bytes(body: &[u8]) -> Vec<u8> {
        [b"starling mesh document v1\0".as_slice(), body].concat()
    }

    /// Size of body, signature and certificate, in bytes.
    pub fn encoded_len(&self) -> usize {
        self.body.len() + self.signature.len() + self.certificate.len()
    }

    /// Hash by which this edition is known.
    pub fn hash(&self) -> DocumentHash {
        DocumentHash(Sha256::digest(&self.body).into())
    }

    /// Decodes the body *without* believing it. Errors on oversized or malformed bodies.
    pub fn peek(&self) -> Result<MeshDocument, FrameError> {
        let (length, limit) = (self.encoded_len(), MAX_DOCUMENT_BYTES + MAX_ENVELOPE_BYTES);
        if length > limit {
            return Err(FrameError::TooLong { length, limit });
        }
        let document: MeshDocument = decode(&self.body)?;
        if document.content.len() > MAX_DOCUMENT_BYTES {
            return Err(FrameError::TooLong { length: document.content.len(), limit: MAX_DOCUMENT_BYTES });
        }
        if document.deleted && !document.content.is_empty() {
            return Err(FrameError::Malformed("a tombstone with content".into()));
        }
        Ok(document)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signed(document: &MeshDocument) -> SignedDocument {
        SignedDocument { body: SignedDocument::encode_body(document), signature: vec![0; 64], certificate: vec![] }
    }

    fn document(content: Vec<u8>, deleted: bool) -> MeshDocument {
        let kind = "policy".parse().unwrap();
        let previous = DocumentHash::default();
        MeshDocument { kind, version: 1, previous, not_before: 0, expires: None, deleted, content }
    }

    #[test]
    fn content_has_a_cap_and_tombstones_have_none() {
        assert!(signed(&document(vec![7; MAX_DOCUMENT_BYTES], false)).peek().is_ok());
        for bad in [document(vec![7; MAX_DOCUMENT_BYTES + 1], false), document(vec![7], true)] {
            assert!(signed(&bad).peek().is_err());
        }
    }

    #[test]
    fn a_hash_prints_and_parses_again() {
        let hash = signed(&document(vec![1], false)).hash();
        assert_eq!(hash.to_string().parse(), Ok(hash));
        for bad in ["", "00", &"0".repeat(63), &"0".repeat(66), &"g".repeat(64), &"é".repeat(32)] {
            assert!(bad.parse::<DocumentHash>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_hash_is_of_the_body_alone() {
        let one = signed(&document(vec![1], false));
        let mut other = one.clone();
        other.signature = vec![9; 64];
        assert_eq!(one.hash(), other.hash());
        assert_ne!(one.hash(), signed(&document(vec![2], false)).hash());
    }
}
