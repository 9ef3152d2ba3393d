use std::{fmt, str::FromStr};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    Name,
    wire::{Unknown, WireError, fixed, message, nested, open_enum, take_array},
};

/// Largest content of a mesh document, in bytes.
pub const MAX_DOCUMENT_BYTES: usize = 256 << 10;
/// Most kinds of documents in a mesh.
pub const MAX_DOCUMENTS: usize = 64;
/// What a document's certificate, signature and fields may take beside its content, in bytes.
const MAX_ENVELOPE_BYTES: usize = 8 << 10;
/// The format of documents that this version writes.
const FORMAT: u8 = 1;

/// Something that the whole mesh has agreed on: signed by a holder of the mesh's admin key, the same on every node.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    pub content: Bytes,
    /// Whether this version understands all that it says of itself. One that is not understood is kept and passed on, and
    /// does not come into force.
    pub understood: bool,
}

message!(MeshDocument, given (kind: Name, version: u64, understood: bool) {
    1 previous, 2 not_before, 3 expires, 4 deleted, 5 content,
});

/// SHA-256 of a document's body.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DocumentHash(pub [u8; 32]);

fixed!(DocumentHash);

impl fmt::Display for DocumentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl FromStr for DocumentHash {
    type Err = WireError;
    fn from_str(hex: &str) -> Result<Self, WireError> {
        let digits: Option<Vec<u8>> = hex.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect();
        let bytes: Vec<u8> =
            digits.unwrap_or_default().chunks(2).map(|pair| pair.iter().fold(0, |b, d| b << 4 | d)).collect();
        let hash = bytes.try_into().ok().filter(|_| hex.len() == 64);
        hash.map(Self).ok_or_else(|| WireError::Malformed("a document's hash has 64 hex digits".into()))
    }
}

impl fmt::Debug for DocumentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// Edition of a mesh document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DocumentEdition {
    /// Which document.
    pub kind: Name,
    /// Which version.
    pub version: u64,
    /// Of its body.
    pub hash: DocumentHash,
}

message!(DocumentEdition { 1 kind, 2 version, 3 hash });
nested!(DocumentEdition);

impl DocumentEdition {
    /// The first eight bytes of SHA-256 over kind, a zero byte, version and hash, so that all nodes agree about what they
    /// have.
    pub fn hash(&self) -> u64 {
        let digest = Sha256::new()
            .chain_update(self.kind.as_str())
            .chain_update([0])
            .chain_update(self.version.to_be_bytes())
            .chain_update(self.hash.0)
            .finalize();
        u64::from_be_bytes(digest[..8].try_into().expect("SHA-256 has 32 bytes"))
    }
}

open_enum! {
    /// What a node does with the newest edition of a document that it has.
    DocumentState {
        /// Follows it.
        0 Active "active",
        /// Its time has not come.
        1 Pending "pending",
        /// Its time is over.
        2 Expired "expired",
        /// It is a tombstone: the document was deleted.
        3 Deleted "deleted",
        /// The node died soon after it came into force, and leaves it alone.
        4 Quarantined "quarantined",
        /// Its reader on that node does not understand it; the one before stays in force.
        5 Refused "refused",
    }
}

/// A document as it travels: its exact bytes, the signature over them, and the certificate of the admin key.
///
/// Nothing in `body` may be believed before the signature is checked; [`SignedDocument::peek`] is for routing the bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedDocument {
    /// Prefix and fields of a [`MeshDocument`].
    pub body: Bytes,
    /// Ed25519 over [`SignedDocument::signed_bytes`] (RFC 8032).
    pub signature: Bytes,
    /// DER certificate of the admin key, signed by the mesh's root.
    pub certificate: Bytes,
}

message!(SignedDocument { 1 body, 2 signature, 3 certificate });
nested!(SignedDocument);

impl SignedDocument {
    /// Encoded body of `document`, ready to be signed.
    pub fn encode_body(document: &MeshDocument) -> Bytes {
        let kind = document.kind.as_str().as_bytes();
        let mut out = Vec::with_capacity(64 + document.content.len());
        out.push(kind.len() as u8);
        out.extend_from_slice(kind);
        out.extend_from_slice(&document.version.to_be_bytes());
        out.push(FORMAT);
        document.write_fields(&mut out);
        out.into()
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
    pub fn peek(&self) -> Result<MeshDocument, WireError> {
        let (length, limit) = (self.encoded_len(), MAX_DOCUMENT_BYTES + MAX_ENVELOPE_BYTES);
        if length > limit {
            return Err(WireError::TooLong { length, limit });
        }
        let document = read(&self.body)?;
        if document.content.len() > MAX_DOCUMENT_BYTES {
            return Err(WireError::TooLong { length: document.content.len(), limit: MAX_DOCUMENT_BYTES });
        }
        if document.deleted && !document.content.is_empty() {
            return Err(WireError::Malformed("a tombstone with content".into()));
        }
        Ok(document)
    }
}

fn read(body: &[u8]) -> Result<MeshDocument, WireError> {
    let mut rest = body;
    let [length] = take_array(&mut rest)?;
    let (kind, mut rest) =
        rest.split_at_checked(length.into()).ok_or_else(|| WireError::Malformed("the prefix is cut short".into()))?;
    let kind = std::str::from_utf8(kind).ok().and_then(|kind| kind.parse::<Name>().ok());
    let kind = kind.ok_or_else(|| WireError::Malformed("the kind is no name".into()))?;
    let version = u64::from_be_bytes(take_array(&mut rest)?);
    let [format] = take_array(&mut rest)?;
    match MeshDocument::read_fields(rest, Unknown::Ignored, kind.clone(), version, true) {
        Ok(document) if format == FORMAT => Ok(document),
        Err(error) if format == FORMAT && !matches!(error, WireError::NotUnderstood(_)) => Err(error),
        // A later format may have moved everything but the prefix.
        _ => Ok(MeshDocument {
            kind,
            version,
            previous: DocumentHash::default(),
            not_before: 0,
            expires: None,
            deleted: false,
            content: Bytes::new(),
            understood: false,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::put_field;

    fn signed(document: &MeshDocument) -> SignedDocument {
        let body = SignedDocument::encode_body(document);
        SignedDocument { body, signature: vec![0; 64].into(), certificate: Bytes::new() }
    }

    fn document(content: Vec<u8>, deleted: bool) -> MeshDocument {
        MeshDocument {
            kind: "policy".parse().unwrap(),
            version: 1,
            previous: DocumentHash::default(),
            not_before: 0,
            expires: None,
            deleted,
            content: content.into(),
            understood: true,
        }
    }

    #[test]
    fn content_has_a_cap_and_tombstones_have_none() {
        assert!(signed(&document(vec![7; MAX_DOCUMENT_BYTES], false)).peek().is_ok());
        for bad in [document(vec![7; MAX_DOCUMENT_BYTES + 1], false), document(vec![7], true)] {
            assert!(signed(&bad).peek().is_err());
        }
    }

    #[test]
    fn a_later_form_is_known_by_kind_and_version_and_not_understood() {
        let plain = signed(&document(vec![7], false));
        assert_eq!(plain.peek(), Ok(document(vec![7], false)));
        let mut critical = plain.body.to_vec();
        let at = critical.len();
        put_field(60, b"", &mut critical);
        critical[at] |= 1;
        let mut reformed = plain.body.to_vec();
        reformed[1 + 6 + 8] = 9;
        reformed.truncate(1 + 6 + 8 + 2);
        for body in [critical, reformed] {
            let read = SignedDocument { body: body.into(), ..plain.clone() }.peek().unwrap();
            assert_eq!((read.kind.as_str(), read.version, read.understood), ("policy", 1, false));
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
        other.signature = vec![9; 64].into();
        assert_eq!(one.hash(), other.hash());
        assert_ne!(one.hash(), signed(&document(vec![2], false)).hash());
    }
}
